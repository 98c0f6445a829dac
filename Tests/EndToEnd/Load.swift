import Testing

extension EndToEnd {
  /// What holds while there is more to do than time.
  @Suite(needsForwarder)
  struct Load {
    /// The frames that a report counts as received, from guests and from the underlay.
    private func received(_ report: CounterReport) -> Int {
      report.total("in_frames", .ports) + report.total("in_frames", .links)
    }

    @Test("at load one call of io_uring_enter serves at least 16 frames", arguments: ["adaptive", "vmm-driven"])
    func entersPerFrame(dispatch: String) throws {
      let framesPerEnterMin = 16
      try withLab { lab in
        let pair = try lab.pair(flags: ["--dispatch", dispatch])
        #expect(try pair.guestA.ping(pair.guestB).isComplete)
        let before = try pair.forwarders.map { try $0.counters() }
        // Small datagrams without a limit: every one is a frame of its own.
        _ = try pair.guestA.flow(
          to: pair.guestB, ["--udp", "--length", "64", "--bitrate", "0", "--time", "3", "--parallel", "2"])
        let after = try pair.forwarders.map { try $0.counters() }
        for (host, (before, after)) in zip(["sending", "receiving"], zip(before, after)) {
          let frames = received(after) - received(before)
          let enters = after.total("enters", .workers) - before.total("enters", .workers)
          #expect(frames > 10_000)
          #expect(enters > 0)
          #expect(enters * framesPerEnterMin <= frames, "\(host) host: \(enters) enters for \(frames) frames")
          expectConservation(after)
        }
      }
    }

    @Test func orderIsKeptThroughAFullSocket() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        // The shaper's queue is longer than all sockets may send, so that it is the sockets that get full.
        try hosts[0].namespace.run(
          "tc", "qdisc", "add", "dev", Host.underlayDevice, "root", "tbf", "rate", "20mbit", "burst", "8kb",
          "limit", "4mb")
        let (sending, guestA) = try lab.forwarder(
          on: hosts[0], peer: hosts[1], guest: 1, flags: ["--send-buffer-bytes", "16384"])
        let (receiving, guestB) = try lab.forwarder(on: hosts[1], peer: hosts[0], guest: 2)
        let flows = try OrderedFlows(from: guestA, to: guestB, flows: 8, payloadBytes: 1000)
        try flows.run(datagramsPerFlow: 500)
        #expect(flows.disorder == [])
        #expect(flows.silentFlows == [])
        let report = try sending.stop()
        #expect(report.total("lane_blocks", .workers) > 0, "no socket was full: the test shows nothing")
        expectConservation(report)
        try expectConservation(receiving.stop())
      }
    }

    @Test func floodsAndBackgroundTrafficLoseNothingUncounted() throws {
      try withLab { lab in
        let hosts = try lab.hosts(3)
        var forwarders: [Forwarder] = []
        var guests: [Guest] = []
        for host in hosts {
          // Few slots: every queue gets full.
          forwarders.append(
            try Forwarder(on: host, NodeConfiguration(host, among: hosts), flags: ["--slots", "16"]))
          let guest = try lab.guest(host.index + 1)
          try lab.plug(guest, into: "vm1", of: host)
          guests.append(guest)
        }
        let socket = try PacketSocket(in: guests[0].namespace)
        for number in 0..<20_000 {
          try? socket.send(Frame.numbered(UInt32(number), to: .broadcast, from: guests[0].mac))
        }
        _ = try guests[1].flow(
          to: guests[2], ["--udp", "--length", "1400", "--bitrate", "0", "--time", "2"])
        #expect(try guests[0].ping(guests[1]).isComplete, "the service goes on")
        for forwarder in forwarders { try expectConservation(forwarder.stop()) }
      }
    }

    @Test func memoryDoesNotGrowUnderLoad() throws {
      try withLab { lab in
        let pair = try lab.pair()
        func load() throws {
          _ = try pair.guestA.flow(
            to: pair.guestB, ["--udp", "--length", "1400", "--bitrate", "0", "--time", "2"])
        }
        // The first load touches every slot.
        try load()
        let before = try pair.forwarders.map { try $0.process.residentKibibytes() }
        try load()
        let after = try pair.forwarders.map { try $0.process.residentKibibytes() }
        for (before, after) in zip(before, after) {
          // Printing the counters may take a page or two; a frame kept from each batch would take far more.
          #expect(after - before < 1024, "\(before) KiB before, \(after) KiB after")
        }
      }
    }
  }
}
