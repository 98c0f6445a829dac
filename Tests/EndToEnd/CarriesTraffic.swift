import Datapath
import Testing

extension EndToEnd {
  /// Two hosts with a forwarder each, a guest behind each: what guests send arrives, whole, once and in order.
  @Suite(needsForwarder)
  struct CarriesTraffic {
    /// Ping, TCP both ways and UDP both ways between the guests of a pair, and nothing lost uncounted.
    private func expectTraffic(_ pair: Pair) throws {
      #expect(try pair.guestA.ping(pair.guestB).isComplete)
      #expect(try pair.guestB.ping(pair.guestA).isComplete)
      #expect(try pair.guestA.tcp(to: pair.guestB).receivedBytes > 16 << 20)
      #expect(try pair.guestA.tcp(to: pair.guestB, reverse: true).receivedBytes > 16 << 20)
      for (sender, receiver) in [(pair.guestA, pair.guestB), (pair.guestB, pair.guestA)] {
        let udp = ["--udp", "--length", "1400", "--bitrate", "20M", "--time", "1"]
        #expect(try sender.flow(to: receiver, udp).receivedBytes > 0)
        #expect(try receiver.checksumErrors() == [:])
      }
      for forwarder in pair.forwarders {
        try expectConservation(forwarder.counters())
        try expectConservation(forwarder.stop())
      }
    }

    @Test(
      "each dispatch mode carries ping, TCP and UDP", arguments: ["guest-driven", "vmm-driven", "adaptive"])
    func dispatchModes(mode: String) throws {
      try withLab { lab in
        try expectTraffic(lab.pair(flags: ["--dispatch", mode]))
      }
    }

    @Test(
      "each way to yield carries ping, TCP and UDP while polling", arguments: ["immediate", "timed", "adaptive"])
    func yields(yield: String) throws {
      try withLab { lab in
        try expectTraffic(lab.pair(flags: ["--dispatch", "vmm-driven", "--yield", yield]))
      }
    }

    @Test(
      "without one of io_uring's features the slower way carries the same",
      arguments: [
        "single-issuer", "deferred-work", "buffer-ring", "multishot-receive", "multishot-read", "fixed-files",
        "restrictions", UringFeatures.names.map(\.name).joined(separator: ","),
      ])
    func missingFeatures(features: String) throws {
      try withLab { lab in
        let pair = try lab.pair(flags: ["--without", features])
        #expect(pair.forwarders.allSatisfy { $0.isLogged("without=") }, "it says what it does without")
        #expect(try pair.guestA.ping(pair.guestB).isComplete)
        #expect(try pair.guestA.tcp(to: pair.guestB).receivedBytes > 16 << 20)
        #expect(try pair.guestA.sendNumbered(500, to: pair.guestB) == Array(0..<500))
        for forwarder in pair.forwarders { try expectConservation(forwarder.stop()) }
      }
    }

    @Test func anIPv6UnderlayCarriesPingTCPAndUDP() throws {
      try withLab { lab in
        try expectTraffic(lab.pair(family: .ipv6))
      }
    }

    @Test("the port's MTU leaves room for the encapsulation, and frames of that size pass", arguments: Family.allCases)
    func fullSizedFrames(family: Family) throws {
      try withLab { lab in
        let pair = try lab.pair(family: family)
        let device = try pair.guestA.namespace.ip("link", "show", "dev", Guest.device)
        #expect(device.contains(" mtu 1500 "), "the underlay's MTU is 1500 and \(family.overheadBytes)")
        // 1500 less IPv4 (20) and ICMP (8) headers.
        #expect(try pair.guestA.ping(pair.guestB, payloadBytes: 1472, mayFragment: false).isComplete)
        #expect(try pair.guestA.ping(pair.guestB, payloadBytes: 4000).isComplete, "fragments of guests are frames too")
      }
    }

    @Test func framesArriveOnceInOrderAndUnchanged() throws {
      try withLab { lab in
        let pair = try lab.pair()
        #expect(try pair.guestA.sendNumbered(2000, to: pair.guestB) == Array(0..<2000))
        #expect(try pair.guestB.sendNumbered(2000, to: pair.guestA) == Array(0..<2000))

        let a = try PacketSocket(in: pair.guestA.namespace)
        let b = try PacketSocket(in: pair.guestB.namespace)
        for length in [0, 1, 45, 46, 47, 511, 1499, 1500] {
          let payload = (0..<length).map { UInt8(truncatingIfNeeded: $0 &* 31) }
          let frame = Frame.ethernet(to: pair.guestB.mac, from: pair.guestA.mac, payload: payload)
          try a.send(frame)
          // A device may pad what is shorter than the least that Ethernet has: 14 and 46 bytes.
          let arrived = try #require(try b.receive(), "a payload of \(length) bytes")
          #expect(arrived.count == frame.count || arrived.count == 60 && frame.count < 60)
          #expect(Array(arrived.prefix(frame.count)) == frame, "a payload of \(length) bytes")
        }
      }
    }

    @Test(.disabled(if: Obstacle.toVLANDevices != nil, "\(Obstacle.toVLANDevices ?? "")"))
    func vlanDevicesInTheGuestsReachEachOther() throws {
      try withLab { lab in
        let pair = try lab.pair()
        for guest in [pair.guestA, pair.guestB] {
          for (vlan, network) in [(7, 7), (8, 8)] {
            try guest.namespace.ip(
              "link", "add", "link", Guest.device, "name", "vlan\(vlan)", "type", "vlan", "id", "\(vlan)")
            try guest.namespace.ip("address", "add", "10.\(network).0.\(guest.number)/24", "dev", "vlan\(vlan)")
            // A tag takes 4 bytes of what the underlay has room for.
            try guest.namespace.ip("link", "set", "vlan\(vlan)", "mtu", "1496", "up")
          }
        }
        for network in [7, 8] {
          let address = "10.\(network).0.\(pair.guestB.number)"
          #expect(try pair.guestA.ping(pair.guestB, payloadBytes: 1468, mayFragment: false, to: address).isComplete)
        }
        #expect(try pair.guestA.ping(pair.guestB).isComplete, "untagged frames pass beside the tagged ones")
      }
    }

    @Test(
      "tagged frames arrive with their tags as they were",
      arguments: [
        [Frame.customerTag], [Frame.serviceTag], [Frame.serviceTag, Frame.customerTag],
      ])
    func tagsStay(types: [UInt16]) throws {
      try withLab { lab in
        let pair = try lab.pair()
        let a = try PacketSocket(in: pair.guestA.namespace)
        let b = try PacketSocket(in: pair.guestB.namespace)
        // Priority 5, VLAN 7, 8, …: all the tag's 16 bits have to stay.
        let tags = types.enumerated().map { (type: $0.element, id: UInt16(5 << 13 | (7 + $0.offset))) }
        for number in 0..<10 {
          let frame = Frame.numbered(UInt32(number), to: pair.guestB.mac, from: pair.guestA.mac, tags: tags)
          try a.send(frame)
          #expect(try b.receive() == frame)
        }
      }
    }

    @Test("two workers over a device with two queues keep the order of every flow", arguments: ["0,1", "0"])
    func multipleQueuesKeepOrder(cpus: String) throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        var forwarders: [Forwarder] = []
        var guests: [Guest] = []
        for host in hosts {
          let configuration = NodeConfiguration(host, among: hosts, ports: [.init(name: "vm1", queues: 2)])
          forwarders.append(try Forwarder(on: host, configuration, flags: ["--cpus", cpus]))
          let guest = try lab.guest(host.index + 1)
          try lab.plug(guest, into: "vm1", of: host)
          guests.append(guest)
        }
        let flows = try OrderedFlows(from: guests[0], to: guests[1], flows: 32)
        try flows.run(datagramsPerFlow: 1000)
        #expect(flows.disorder == [])
        #expect(flows.silentFlows == [])
        for forwarder in forwarders {
          let report = try forwarder.stop()
          expectConservation(report)
        }
      }
    }
  }
}
