import Glibc
import Testing

extension EndToEnd {
  /// The lab is good: what its tests of the forwarder use works with the kernel's own overlay on both sides.
  @Suite(needsLab)
  struct LabItself {
    /// Two hosts with the kernel's VXLAN and bridge, and a guest behind each.
    private func kernelPair(_ lab: Lab, _ family: Family) throws -> (a: Guest, b: Guest) {
      let hosts = try lab.hosts(2, family: family)
      return (
        try lab.kernelOverlay(on: hosts[0], remote: hosts[1], guest: 1),
        try lab.kernelOverlay(on: hosts[1], remote: hosts[0], guest: 2)
      )
    }

    @Test("ping, TCP and UDP are measured over the kernel's overlay", arguments: Family.allCases)
    func measures(family: Family) throws {
      try withLab { lab in
        let guests = try kernelPair(lab, family)
        #expect(try guests.a.ping(guests.b, payloadBytes: 1472, mayFragment: false).isComplete)
        #expect(try guests.a.tcp(to: guests.b).receivedBytes >= 16 << 20)
        #expect(try guests.b.tcp(to: guests.a, reverse: true).receivedBytes >= 16 << 20)
        let udp = try guests.a.flow(to: guests.b, ["--udp", "--length", "1400", "--bitrate", "20M", "--time", "1"])
        #expect(udp.receivedBytes > 0)
        #expect(try guests.b.checksumErrors() == [:])
      }
    }

    @Test func aPingThatIsNotAnsweredIsSeen() throws {
      try withLab { lab in
        let guests = try kernelPair(lab, .ipv4)
        try guests.b.namespace.ip("link", "set", Guest.device, "down")
        let result = try guests.a.ping(guests.b, count: 1)
        #expect(result.sent == 1 && result.received == 0)
        #expect(!result.isComplete)
      }
    }

    @Test func numberedFramesArriveOnceWithTheirTags() throws {
      try withLab { lab in
        let guests = try kernelPair(lab, .ipv4)
        let a = try PacketSocket(in: guests.a.namespace)
        let b = try PacketSocket(in: guests.b.namespace)
        for number in 0..<100 { try a.send(Frame.numbered(UInt32(number), to: .broadcast, from: guests.a.mac)) }
        #expect(try b.receiveNumbers() == Array(0..<100))
        #expect(try a.receiveNumbers() == [], "a socket hears what its own device sends")

        let tagged = Frame.numbered(
          100, to: guests.b.mac, from: guests.a.mac, tags: [(Frame.serviceTag, 7), (Frame.customerTag, 8)])
        try a.send(tagged)
        #expect(try b.receive() == tagged)
      }
    }

    @Test func datagramsReachTheirNamespaceOnly() throws {
      try withLab { lab in
        let hosts = try lab.hosts(3, family: .ipv6)
        let receivers = try hosts.map { try DatagramSocket(in: $0.namespace, address: $0.address, port: 5000) }
        let sender = try DatagramSocket(in: hosts[0].namespace, address: hosts[0].address)
        try sender.send([1, 2, 3], to: hosts[2].address, port: 5000)
        #expect(try receivers[2].receive() == [1, 2, 3])
        #expect(try receivers[1].receive(seconds: 0.2) == nil)
      }
    }

    @Test func nothingStaysBehindWhenATestThrows() throws {
      var prefix = ""
      #expect(throws: LabError.self) {
        try withLab { lab in
          prefix = lab.prefix
          let hosts = try lab.hosts(2)
          let sleeper = try hosts[0].namespace.start(["sleep", "1000"])
          #expect(sleeper.isRunning)
          throw LabError("on purpose")
        }
      }
      #expect(!prefix.isEmpty)
      #expect(try !execute(["ip", "netns", "list"]).contains(prefix))
    }

    @Test func aCommandThatFailsSaysWhatFailed() throws {
      let error = #expect(throws: LabError.self) { try execute(["ls", "/nowhere/at/all"]) }
      #expect(error?.description.contains("/nowhere/at/all") == true)
    }

    @Test func aCounterReportIsRead() throws {
      let report = try CounterReport(
        """
        {
          "underlay": {"drop_unknown_vni": 3},
          "ports": {"vm1": {"in_frames": 5}, "vm2": {"in_frames": 7}},
          "links": {"to-host-b": {"out_frames": 12}},
          "workers": {"0": {"enters": 1}, "1": {"enters": 2}},
          "conservation": {"holds": false, "text": "conservation: BROKEN"}
        }
        """)
      #expect(report.conservation == .init(holds: false, description: "conservation: BROKEN"))
      #expect(report.total("drop_unknown_vni", .underlay) == 3)
      #expect(report.total("in_frames", .ports) == 12)
      #expect(report.total("in_frames", .ports, of: "vm2") == 7)
      #expect(report.total("out_frames", .links, of: "to-host-b") == 12)
      #expect(report.total("enters", .workers) == 3)
      #expect(report.total("enters", .domains) == 0)
    }
  }
}
