import Testing

extension EndToEnd {
  /// `packet` ports: wired to another port, or in a domain, on NICs whose other end sends super-frames.
  @Suite(needsForwarder)
  struct DirectBridge {
    /// TCP both ways, whole to the byte, and no checksum wrong where it arrived.
    private func expectStreams(_ a: Guest, _ b: Guest) throws {
      #expect(try a.ping(b).isComplete)
      #expect(try a.tcp(to: b).receivedBytes > 16 << 20)
      #expect(try a.tcp(to: b, reverse: true).receivedBytes > 16 << 20)
      #expect(try a.carriesStream(to: b))
      #expect(try b.carriesStream(to: a))
      for guest in [a, b] { #expect(try guest.checksumErrors() == [:]) }
    }

    /// How promiscuous a device is: how many ask that it be.
    private func promiscuity(of device: String, on host: Host) throws -> Int? {
      let words = try host.namespace.ip("-d", "link", "show", "dev", device).split(whereSeparator: \.isWhitespace)
      return words.firstIndex(of: "promiscuity").flatMap { Int(words[$0 + 1]) }
    }

    // MARK: - Passthrough

    @Test(
      "a TAP device wired to a NIC that takes super-frames carries TCP both ways", arguments: ["uring", "syscalls"])
    func tapToNIC(io: String) throws {
      try withLab { lab in
        let host = try lab.hosts(2)[0]
        let far = try lab.cabledGuest(2, to: "nic", of: host)
        let configuration = NodeConfiguration(passthrough: .init(name: "vm1"), .packet("nic"))
        let node = try lab.node(host, configuration, guests: [1], flags: ["--io", io])
        try expectStreams(node.guests[0], far)
        #expect(try node.guests[0].sendNumbered(500, to: far) == Array(0..<500))
        #expect(try far.sendNumbered(500, to: node.guests[0]) == Array(0..<500))
        try stopAll([node])
      }
    }

    @Test(
      "between two NICs super-frames go whole",
      arguments: [["--io", "uring"], ["--io", "syscalls"], ["--layout", "pipeline"]])
    func superFramesGoWhole(flags: [String]) throws {
      try withLab { lab in
        let host = try lab.hosts(2)[0]
        let a = try lab.cabledGuest(1, to: "nic1", of: host)
        let b = try lab.cabledGuest(2, to: "nic2", of: host)
        let configuration = NodeConfiguration(passthrough: .packet("nic1"), .packet("nic2"))
        let node = try lab.node(host, configuration, guests: [], flags: flags)
        let large = try Capture(
          in: b.namespace, device: Guest.device, "tcp and greater 9000", direction: "in", framesMax: 1)
        #expect(try a.ping(b).isComplete)
        let before = try node.forwarder.counters()
        #expect(try a.tcp(to: b).receivedBytes > 16 << 20)
        #expect(large.isFull(), "no frame longer than nine segments arrived")
        let after = try node.forwarder.counters()
        // A super-frame counts as its segments, and its bytes as they were handed over, its headers once: on average a
        // segment has little more than the 1,448 bytes of payload that go into a packet of 1,500 with timestamps.
        let frames = after.total("out_frames", .ports, of: "nic2") - before.total("out_frames", .ports, of: "nic2")
        let bytes = after.total("out_bytes", .ports, of: "nic2") - before.total("out_bytes", .ports, of: "nic2")
        #expect(frames > 10_000)
        #expect(bytes < frames * 1480, "\(bytes) bytes in \(frames) frames: each of them has headers of its own")
        try expectStreams(a, b)
        try stopAll([node])
      }
    }

    @Test func twoHostsAreAWireBetweenTheirGuests() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        try lab.cable(hosts[0], hosts[1], device: "nic")
        let nodes = try hosts.map { host in
          try lab.node(
            host, NodeConfiguration(passthrough: .init(name: "vm1"), .packet("nic")), guests: [host.index + 1])
        }
        let (a, b) = (nodes[0].guests[0], nodes[1].guests[0])
        try expectStreams(a, b)
        // No lookup: what would flood, or not be forwarded at all, goes over the wire as the rest does.
        let sender = try PacketSocket(in: a.namespace)
        let receiver = try PacketSocket(in: b.namespace)
        let group = MAC(0x01, 0x80, 0xc2, 0, 0, 0)
        for number in 1...3 {
          try sender.send(Frame.numbered(UInt32(number), to: number == 1 ? group : MAC(2, 2, 2, 2, 2, 2), from: a.mac))
        }
        #expect(try receiver.receiveNumbers() == [1, 2, 3])
        try stopAll(nodes)
      }
    }

    // MARK: - Direct bridge

    @Test(
      "a TAP device and a NIC in one domain carry TCP both ways, and tagged frames with their tags",
      arguments: ["uring", "syscalls"])
    func tapAndNICInOneDomain(io: String) throws {
      try withLab { lab in
        let host = try lab.hosts(2)[0]
        let far = try lab.cabledGuest(2, to: "nic", of: host)
        let configuration = NodeConfiguration(ports: [.init(name: "vm1"), .packet("nic")])
        let node = try lab.node(host, configuration, guests: [1], flags: ["--io", io])
        let near = node.guests[0]
        try expectStreams(near, far)

        let sockets = [try PacketSocket(in: near.namespace), try PacketSocket(in: far.namespace)]
        var number: UInt32 = 0
        for types in [[Frame.customerTag], [Frame.serviceTag], [Frame.serviceTag, Frame.customerTag]] {
          let tags = types.enumerated().map { (type: $0.element, id: UInt16(5 << 13 | (7 + $0.offset))) }
          for (from, to) in [(0, 1), (1, 0)] {
            let guests = [near, far]
            for _ in 0..<5 {
              number += 1
              let frame = Frame.numbered(number, to: guests[to].mac, from: guests[from].mac, tags: tags)
              try sockets[from].send(frame)
              #expect(try sockets[to].receive() == frame, "tags \(types), from \(from)")
            }
          }
        }
        try stopAll([node])
      }
    }

    @Test(.disabled(if: Obstacle.toVLANDevices != nil, "\(Obstacle.toVLANDevices ?? "")"))
    func vlanDevicesReachEachOtherThroughTheBridgeWithSuperFrames() throws {
      try withLab { lab in
        let host = try lab.hosts(2)[0]
        let guests = try [1, 2].map { try lab.cabledGuest($0, to: "nic\($0)", of: host) }
        let node = try lab.node(
          host, NodeConfiguration(ports: [.packet("nic1"), .packet("nic2")]), guests: [])
        for guest in guests {
          try guest.namespace.ip("link", "add", "link", Guest.device, "name", "vlan7", "type", "vlan", "id", "7")
          // The guest's own address moves to the tagged network: all that follows is tagged.
          try guest.namespace.ip("address", "flush", "dev", Guest.device)
          try guest.namespace.ip("address", "add", guest.address + "/24", "dev", "vlan7")
          try guest.namespace.ip("link", "set", "vlan7", "up")
        }
        try expectStreams(guests[0], guests[1])
        try stopAll([node])
      }
    }

    @Test func aNICIsPromiscuousOnlyWhileTheServiceRuns() throws {
      try withLab { lab in
        let host = try lab.hosts(2)[0]
        _ = try lab.cabledGuest(2, to: "nic", of: host)
        let configuration = NodeConfiguration(ports: [.init(name: "vm1"), .packet("nic")])
        #expect(try promiscuity(of: "nic", on: host) == 0)
        let first = try lab.node(host, configuration, guests: [1])
        #expect(try promiscuity(of: "nic", on: host) == 1)
        try stopAll([first])
        #expect(try promiscuity(of: "nic", on: host) == 0)

        let second = try lab.node(host, configuration, guests: [3])
        #expect(try promiscuity(of: "nic", on: host) == 1)
        second.forwarder.process.kill()
        #expect(try eventually { try promiscuity(of: "nic", on: host) == 0 }, "it was killed")
        #expect(host.namespace.has(device: "nic"), "it was there before")
      }
    }

    @Test func twoHostsBridgeTheirGuestsOntoOneWire() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        try lab.cable(hosts[0], hosts[1], device: "nic")
        let nodes = try hosts.map { host in
          try lab.node(
            host, NodeConfiguration(ports: [.init(name: "vm1"), .init(name: "vm2"), .packet("nic")]),
            guests: [2 * host.index + 1, 2 * host.index + 2])
        }
        let guests = nodes.flatMap(\.guests)
        try expectEachBroadcastOnce(guests, perGuest: 10)
        try expectStreams(guests[0], guests[2])
        try stopAll(nodes)
      }
    }

    @Test("super-frames of a NIC leave by a link as right segments", arguments: ["vxlan", "vnetp"])
    func superFramesLeaveByALinkAsSegments(encapsulation: String) throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        try lab.likeAWire(hosts[0])
        let near = try lab.cabledGuest(1, to: "nic", of: hosts[0])
        let a = try lab.node(
          hosts[0], NodeConfiguration(hosts[0], among: hosts, ports: [.packet("nic")], encapsulation: encapsulation),
          guests: [])
        let b = try lab.node(
          hosts[1], NodeConfiguration(hosts[1], among: hosts, encapsulation: encapsulation), guests: [2])
        let far = b.guests[0]
        #expect(try near.ping(far).isComplete)

        // tcpdump reads on behind VXLAN's header; behind VNET/P's there is none, so only the outer ones are checked
        // there, and the receiving guest's own check has to do.
        let port = encapsulation == "vxlan" ? 4789 : 9000
        let capture = try Capture(
          in: hosts[0].namespace, device: Host.underlayDevice, "udp port \(port)", direction: "out", framesMax: 400)
        #expect(try near.carriesStream(to: far))
        #expect(capture.isFull())
        let report = try capture.stop()
        if encapsulation == "vxlan" { #expect(report.contains("(correct)"), "no inner TCP checksum was seen") }
        #expect(Capture.wrongChecksums(in: report) == [])

        try expectStreams(near, far)
        let counters = try a.forwarder.stop()
        expectConservation(counters)
        #expect(counters.total("drop_too_big", .links) == 0)
        try stopAll([b])
      }
    }

    @Test func aNICThatGoesDownAndUpIsUsedAgain() throws {
      try withLab { lab in
        let host = try lab.hosts(2)[0]
        let far = try lab.cabledGuest(2, to: "nic", of: host)
        let node = try lab.node(
          host, NodeConfiguration(ports: [.init(name: "vm1"), .packet("nic")]), guests: [1])
        #expect(try node.guests[0].ping(far).isComplete)
        try host.namespace.ip("link", "set", "nic", "down")
        #expect(try node.guests[0].ping(far, count: 2).received == 0)
        try host.namespace.ip("link", "set", "nic", "up")
        #expect(try eventually(within: 30) { try node.guests[0].ping(far, count: 1).isComplete })
        #expect(node.forwarder.isLogged("nic"))
        try stopAll([node])
      }
    }
  }
}
