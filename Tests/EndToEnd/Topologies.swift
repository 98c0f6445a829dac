import Testing

extension EndToEnd {
  /// More than two hosts, more than one guest, more than one domain.
  @Suite(needsForwarder)
  struct Topologies {
    @Test("three hosts in full mesh deliver each broadcast exactly once", arguments: Family.allCases)
    func fullMesh(family: Family) throws {
      try withLab { lab in
        let hosts = try lab.hosts(3, family: family)
        let nodes = try hosts.map { try lab.node($0, NodeConfiguration($0, among: hosts), guests: [$0.index + 1]) }
        let guests = nodes.flatMap(\.guests)
        try expectEachBroadcastOnce(guests)
        for a in guests {
          for b in guests where a.number != b.number { #expect(try a.ping(b, count: 3).isComplete) }
        }
        // Each guest's frames came in by its own host's port alone: a loop would have added to them.
        try stopAll(nodes)
      }
    }

    @Test func guestsOfOneHostAndOfAnotherShareOneEthernet() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        let twoPorts = [NodeConfiguration.Port(name: "vm1"), NodeConfiguration.Port(name: "vm2")]
        let a = try lab.node(hosts[0], NodeConfiguration(hosts[0], among: hosts, ports: twoPorts), guests: [1, 2])
        let b = try lab.node(hosts[1], NodeConfiguration(hosts[1], among: hosts, ports: twoPorts), guests: [3, 4])
        let guests = a.guests + b.guests
        try expectEachBroadcastOnce(guests)
        #expect(try guests[0].ping(guests[1]).isComplete)
        #expect(try guests[0].ping(guests[3]).isComplete)
        try stopAll([a, b])
      }
    }

    @Test func aFrameToAKnownAddressGoesToItsPlaceOnly() throws {
      try withLab { lab in
        let hosts = try lab.hosts(3)
        let nodes = try hosts.map { try lab.node($0, NodeConfiguration($0, among: hosts), guests: [$0.index + 1]) }
        let guests = nodes.flatMap(\.guests)
        let sockets = try guests.map { try PacketSocket(in: $0.namespace) }
        // Guest 2 is heard once; from then on its place is known.
        try sockets[1].send(Frame.numbered(0, to: .broadcast, from: guests[1].mac))
        #expect(try sockets[0].receives(number: 0))
        #expect(try sockets[2].receives(number: 0))
        for number in 1...20 {
          try sockets[0].send(Frame.numbered(UInt32(number), to: guests[1].mac, from: guests[0].mac))
        }
        #expect(try sockets[1].receiveNumbers() == Array(1...20))
        #expect(try sockets[2].receiveNumbers() == [])
      }
    }

    @Test func twoDomainsWithTheSameAddressesNeverMeet() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        let nodes = try hosts.map { host in
          var configuration = NodeConfiguration(
            host, among: hosts,
            ports: [.init(name: "blue1", domain: "blue"), .init(name: "red1", domain: "red")])
          configuration.domains = [.init(name: "blue", vni: 42), .init(name: "red", vni: 43)]
          // The same number in both domains: the same MAC and IP address.
          return try lab.node(host, configuration, guests: [host.index + 1, host.index + 1])
        }
        let blue = nodes.map { $0.guests[0] }
        let red = nodes.map { $0.guests[1] }
        let blueSockets = try blue.map { try PacketSocket(in: $0.namespace) }
        let redSockets = try red.map { try PacketSocket(in: $0.namespace) }
        // Even numbers are blue, odd ones red; unknown, known and broadcast destinations.
        for round in 0..<30 {
          let destination = round % 3 == 0 ? MAC.broadcast : blue[1].mac
          try blueSockets[0].send(Frame.numbered(UInt32(2 * round), to: destination, from: blue[0].mac))
          try redSockets[0].send(Frame.numbered(UInt32(2 * round + 1), to: destination, from: red[0].mac))
          if round == 0 {
            try blueSockets[1].send(Frame.numbered(1000, to: .broadcast, from: blue[1].mac))
            try redSockets[1].send(Frame.numbered(1001, to: .broadcast, from: red[1].mac))
          }
        }
        // Frames to different addresses are different flows, which may overtake each other.
        let blueNumbers = try blueSockets[1].receiveNumbers()
        let redNumbers = try redSockets[1].receiveNumbers()
        let even = (0..<30).map { UInt32(2 * $0) }
        let odd = even.map { $0 + 1 }
        #expect(blueNumbers.sorted() == even, "\(blueNumbers)")
        #expect(redNumbers.sorted() == odd, "\(redNumbers)")
        #expect(try blueSockets[0].receiveNumbers() == [1000])
        #expect(try redSockets[0].receiveNumbers() == [1001])

        // Both domains carry their traffic, though every address is there twice.
        #expect(try blue[0].ping(blue[1]).isComplete)
        #expect(try red[0].ping(red[1]).isComplete)
        try red[1].namespace.ip("link", "set", Guest.device, "down")
        #expect(try blue[0].ping(blue[1]).isComplete)
        #expect(try red[0].ping(red[1], count: 1).received == 0, "the blue guest answers for the red one")
        try stopAll(nodes)
      }
    }

    @Test func anAddressThatMovesToAnotherHostIsFollowedAtOnce() throws {
      try withLab { lab in
        let hosts = try lab.hosts(3)
        let nodes = try hosts.map { try lab.node($0, NodeConfiguration($0, among: hosts), guests: [$0.index + 1]) }
        let guests = nodes.flatMap(\.guests)
        let sockets = try guests.map { try PacketSocket(in: $0.namespace) }
        let wanderer = MAC(0x02, 0, 0, 0, 0, 0x77)
        var number: UInt32 = 0

        /// The wanderer speaks from behind a host; what guest 1 sends it next must arrive there and nowhere else.
        func expectFollowed(to place: Int, from old: Int) throws {
          number += 1
          try sockets[place].send(Frame.numbered(number, to: .broadcast, from: wanderer))
          #expect(try sockets[0].receives(number: number))
          number += 1
          let next = number
          try sockets[0].send(Frame.numbered(next, to: wanderer, from: guests[0].mac))
          #expect(try sockets[place].receives(number: next))
          #expect(try !sockets[old].receiveNumbers(quietSeconds: 0.3).contains(next))
        }
        try expectFollowed(to: 1, from: 2)
        try expectFollowed(to: 2, from: 1)
        let report = try nodes[0].forwarder.counters()
        #expect(report.total("mac_moves", .domains) == 1)
        try stopAll(nodes)
      }
    }

    @Test func anAddressThatMovesFromALinkToAPortOfThisHostIsFollowedAtOnce() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        let twoPorts = [NodeConfiguration.Port(name: "vm1"), NodeConfiguration.Port(name: "vm2")]
        let a = try lab.node(hosts[0], NodeConfiguration(hosts[0], among: hosts, ports: twoPorts), guests: [1, 2])
        let b = try lab.node(hosts[1], NodeConfiguration(hosts[1], among: hosts), guests: [3])
        let sender = try PacketSocket(in: a.guests[0].namespace)
        let here = try PacketSocket(in: a.guests[1].namespace)
        let there = try PacketSocket(in: b.guests[0].namespace)
        let wanderer = MAC(0x02, 0, 0, 0, 0, 0x77)

        try there.send(Frame.numbered(1, to: .broadcast, from: wanderer))
        #expect(try sender.receives(number: 1))
        try sender.send(Frame.numbered(2, to: wanderer, from: a.guests[0].mac))
        #expect(try there.receives(number: 2))

        try here.send(Frame.numbered(3, to: .broadcast, from: wanderer))
        #expect(try sender.receives(number: 3))
        try sender.send(Frame.numbered(4, to: wanderer, from: a.guests[0].mac))
        #expect(try here.receives(number: 4))
        #expect(try !there.receiveNumbers(quietSeconds: 0.3).contains(4))
        try stopAll([a, b])
      }
    }
  }
}
