import Testing

extension EndToEnd {
  /// Frames that are longer than the underlay carries, or were not until now.
  @Suite(needsForwarder)
  struct LargeFrames {
    /// Two hosts with a guest each.
    private func nodes(
      _ lab: Lab, _ hosts: [Host], encapsulation: String, mtu: Int? = nil, fragment: Bool? = nil, io: String = "uring"
    ) throws -> [Node] {
      try hosts.map { host in
        var configuration = NodeConfiguration(
          host, among: hosts, ports: [.init(name: "vm1", mtu: mtu)], encapsulation: encapsulation)
        configuration.links[0].fragment = fragment
        return try lab.node(host, configuration, guests: [host.index + 1], flags: ["--io", io])
      }
    }

    private func mtu(of guest: Guest) throws -> Int? {
      Int(try guest.namespace.run("cat", "/sys/class/net/\(Guest.device)/mtu").filter(\.isNumber))
    }

    @Test("a VNET/P guest's 64 KB frames pass over an underlay of 1,500 bytes", arguments: ["uring", "syscalls"])
    func largestFrames(io: String) throws {
      let mtuMax = 65_493
      try withLab { lab in
        let hosts = try lab.hosts(2, mtu: 1500)
        let nodes = try nodes(lab, hosts, encapsulation: "vnetp", mtu: mtuMax, io: io)
        let (a, b) = (nodes[0].guests[0], nodes[1].guests[0])
        #expect(try mtu(of: a) == mtuMax)
        let marked = try Capture(in: hosts[0].namespace, device: Host.underlayDevice, "ip and ip[6] & 0x40 != 0")
        let fragments = try Capture(
          in: hosts[0].namespace, device: Host.underlayDevice, "ip and ip[6:2] & 0x3fff != 0", direction: "out",
          framesMax: 100)
        #expect(try a.ping(b).isComplete)
        #expect(try a.ping(b, payloadBytes: 60_000).isComplete)
        // The largest: less IPv4 (20) and ICMP (8) headers.
        #expect(try a.ping(b, payloadBytes: mtuMax - 28, mayFragment: false).isComplete)
        #expect(try b.ping(a, payloadBytes: mtuMax - 28, mayFragment: false).isComplete)
        #expect(fragments.isFull())
        let unwanted = try marked.stop()
        #expect(unwanted == "", "Don't Fragment is set")
        // Bursts of 16 such frames take more than the kernel keeps of fragments that are not whole yet: fewer.
        let sender = try PacketSocket(in: a.namespace)
        let receiver = try PacketSocket(in: b.namespace)
        for number in UInt32(0)..<100 {
          try sender.send(Frame.numbered(number, to: b.mac, from: a.mac, payloadBytes: mtuMax))
          let frame = try #require(try receiver.receive(seconds: 2), "frame \(number)")
          #expect(Frame.number(of: frame) == number)
          #expect(frame.count == 14 + mtuMax)
        }
        #expect(try a.carriesStream(to: b))
        #expect(try b.carriesStream(to: a))
        #expect(try b.checksumErrors() == [:])
        try stopAll(nodes)
      }
    }

    @Test("an IPv6 underlay fragments too", arguments: ["vnetp", "vxlan"])
    func fragmentsOverIPv6(encapsulation: String) throws {
      try withLab { lab in
        let hosts = try lab.hosts(2, family: .ipv6, mtu: 1500)
        let nodes = try nodes(lab, hosts, encapsulation: encapsulation, mtu: 9000, fragment: true)
        let (a, b) = (nodes[0].guests[0], nodes[1].guests[0])
        #expect(try a.ping(b, payloadBytes: 8972, mayFragment: false).isComplete)
        #expect(try a.tcp(to: b).receivedBytes > 16 << 20)
        #expect(try a.carriesStream(to: b))
        #expect(try b.checksumErrors() == [:])
        try stopAll(nodes)
      }
    }

    @Test func aTrainOfFragmentsThatNeverCompletesIsCounted() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2, mtu: 1500)
        try hosts[0].namespace.setKernelParameter("net.ipv4.ipfrag_time", "1")
        let nodes = try nodes(lab, hosts, encapsulation: "vnetp", mtu: 9000)
        let (a, b) = (nodes[0].guests[0], nodes[1].guests[0])
        #expect(try a.ping(b, payloadBytes: 8000).isComplete)
        let before = try nodes[0].forwarder.counters().total("reassembly_failures", .underlay)
        #expect(before == 0)

        // The first fragment of a VNET/P datagram, from the other host as it seems; the second never comes.
        let wire = try PacketSocket(in: hosts[1].namespace, device: Host.underlayDevice)
        let datagram = networkOrder(UInt16(9000)) + networkOrder(UInt16(9000)) + networkOrder(UInt16(3008)) + [0, 0]
        let moreFragments: UInt16 = 0x2000
        let packet = Frame.ipv4Packet(
          from: [10, 99, 0, 2], to: [10, 99, 0, 1], protocolNumber: 17, fragment: moreFragments,
          payload: datagram + [UInt8](repeating: 0, count: 1000))
        try wire.send(
          Frame.ethernet(
            to: try hosts[0].namespace.address(of: Host.underlayDevice),
            from: try hosts[1].namespace.address(of: Host.underlayDevice), type: Frame.ipv4, payload: packet))
        let isCounted = try eventually {
          try nodes[0].forwarder.counters().total("reassembly_failures", .underlay) == 1
        }
        #expect(isCounted)
        #expect(try a.ping(b, payloadBytes: 8000).isComplete)
        try stopAll(nodes)
      }
    }

    @Test("guests get jumbo frames where the underlay carries them", arguments: [("vxlan", 50), ("vnetp", 42)])
    func jumboUnderlay(encapsulation: String, overheadBytes: Int) throws {
      let underlay = 9000
      try withLab { lab in
        let hosts = try lab.hosts(2, mtu: underlay)
        let nodes = try nodes(lab, hosts, encapsulation: encapsulation, fragment: false)
        let (a, b) = (nodes[0].guests[0], nodes[1].guests[0])
        #expect(try mtu(of: a) == underlay - overheadBytes)
        #expect(try a.ping(b, payloadBytes: underlay - overheadBytes - 28, mayFragment: false).isComplete)
        #expect(try a.tcp(to: b).receivedBytes > 16 << 20)
        #expect(try b.checksumErrors() == [:])
        try stopAll(nodes)
      }
    }

    @Test("a link may let the underlay fragment, or drops and counts what is too big", arguments: [true, false])
    func fragments(mayFragment: Bool) throws {
      try withLab { lab in
        let hosts = try lab.hosts(2, mtu: 1500)
        let nodes = try nodes(lab, hosts, encapsulation: "vxlan", mtu: 1500, fragment: mayFragment)
        let (a, b) = (nodes[0].guests[0], nodes[1].guests[0])
        #expect(nodes[0].forwarder.isLogged("drop_too_big") == !mayFragment, "it warns at start")
        #expect(try a.ping(b, payloadBytes: 1422, mayFragment: false).isComplete, "what the underlay carries whole")
        let large = try a.ping(b, payloadBytes: 1472, mayFragment: false)
        #expect(large.isComplete == mayFragment)
        #expect(large.received == (mayFragment ? large.sent : 0))
        if mayFragment {
          #expect(try a.carriesStream(to: b))
          #expect(try b.checksumErrors() == [:])
        }
        let report = try nodes[0].forwarder.stop()
        expectConservation(report)
        #expect(report.total("drop_too_big", .links) == (mayFragment ? 0 : large.sent))
        try stopAll([nodes[1]])
      }
    }

    @Test func anUnderlayThatCarriesLessFromNowOnIsFollowedBothWays() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        let nodes = try nodes(lab, hosts, encapsulation: "vxlan")
        let (a, b) = (nodes[0].guests[0], nodes[1].guests[0])
        #expect(try a.ping(b, payloadBytes: 1472, mayFragment: false).isComplete)

        func setUnderlay(_ bytes: Int) throws {
          for host in hosts { try host.namespace.ip("link", "set", Host.underlayDevice, "mtu", "\(bytes)") }
        }
        try setUnderlay(1400)
        let large = try a.ping(b, count: 3, payloadBytes: 1472, mayFragment: false)
        #expect(large.received == 0)
        #expect(try nodes[0].forwarder.counters().total("drop_too_big", .links) == large.sent)
        #expect(try a.ping(b, payloadBytes: 1300, mayFragment: false).isComplete, "shorter frames go on")
        #expect(eventually { nodes[0].forwarder.isLogged("carries less now") })

        try setUnderlay(1550)
        #expect(try eventually { try a.ping(b, count: 1, payloadBytes: 1472, mayFragment: false).isComplete })
        try stopAll(nodes)
      }
    }

    @Test func aNarrowLegOnTheWayIsFound() throws {
      try withLab { lab in
        let hosts = try lab.hostsBehindRouter(mtu: 1550, narrowMTU: 1400)
        let nodes = try nodes(lab, hosts, encapsulation: "vxlan")
        let (a, b) = (nodes[0].guests[0], nodes[1].guests[0])
        #expect(try a.ping(b).isComplete)
        // The first is refused by the router, which says so; from then on the kernel refuses at once.
        let large = try a.ping(b, count: 10, payloadBytes: 1472, mayFragment: false)
        #expect(large.received == 0)
        let dropped = try nodes[0].forwarder.counters().total("drop_too_big", .links)
        #expect(dropped > 0 && dropped <= large.sent, "\(dropped) of \(large.sent)")
        // 1,400 less VXLAN's 50, IPv4's 20 and ICMP's 8.
        #expect(try a.ping(b, payloadBytes: 1322, mayFragment: false).isComplete)
        #expect(try b.ping(a, payloadBytes: 1322, mayFragment: false).isComplete)
        try stopAll(nodes)
      }
    }
  }
}
