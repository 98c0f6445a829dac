import Glibc
import Testing

extension EndToEnd {
  /// Links that relay: a chain, a star, and a ring, which is one link too many.
  @Suite(needsForwarder)
  struct Relays {
    /// Hosts with a guest each, and links that relay where `edges` joins two of them.
    private func nodes(
      _ lab: Lab, _ hosts: [Host], edges: [(Int, Int)], encapsulation: String, floodLimit: Int? = nil
    ) throws -> [Node] {
      try hosts.map { host in
        let neighbours = edges.compactMap { edge in
          edge.0 == host.index ? edge.1 : edge.1 == host.index ? edge.0 : nil
        }
        var configuration = NodeConfiguration(
          host, among: neighbours.map { hosts[$0] }, encapsulation: encapsulation, relay: true)
        configuration.domains[0].floodFramesPerSecondMax = floodLimit
        return try lab.node(host, configuration, guests: [host.index + 1])
      }
    }

    @Test("a chain of five hosts is one Ethernet", arguments: ["vxlan", "vnetp"])
    func chain(encapsulation: String) throws {
      try withLab { lab in
        let hosts = try lab.hosts(5)
        let edges = (0..<4).map { ($0, $0 + 1) }
        let nodes = try nodes(lab, hosts, edges: edges, encapsulation: encapsulation)
        let guests = nodes.flatMap(\.guests)
        try expectEachBroadcastOnce(guests, perGuest: 20)
        #expect(try guests[0].ping(guests[4]).isComplete)
        #expect(try guests[4].ping(guests[0]).isComplete)
        #expect(try guests[2].ping(guests[1]).isComplete)
        #expect(try guests[0].carriesStream(to: guests[4]))
        #expect(try guests[0].sendNumbered(500, to: guests[4]) == Array(0..<500))
        for guest in guests { #expect(try guest.checksumErrors() == [:]) }
        try stopAll(nodes)
      }
    }

    @Test("a hub that relays joins its leaves, and each broadcast arrives once", arguments: ["vxlan", "vnetp"])
    func star(encapsulation: String) throws {
      try withLab { lab in
        let hosts = try lab.hosts(4)
        let nodes = try nodes(lab, hosts, edges: [(0, 1), (0, 2), (0, 3)], encapsulation: encapsulation)
        let guests = nodes.flatMap(\.guests)
        try expectEachBroadcastOnce(guests, perGuest: 20)
        for (a, b) in [(1, 2), (2, 3), (3, 1), (0, 3)] { #expect(try guests[a].ping(guests[b]).isComplete) }
        // What the hub knows the place of goes to that leaf alone.
        let sockets = try guests.map { try PacketSocket(in: $0.namespace) }
        for number in 0..<20 {
          try sockets[1].send(Frame.numbered(UInt32(number), to: guests[2].mac, from: guests[1].mac))
        }
        #expect(try sockets[2].receiveNumbers() == Array(0..<20))
        #expect(try sockets[3].receiveNumbers(quietSeconds: 0.2) == [])
        try stopAll(nodes)
      }
    }

    @Test func withoutRelayTheEndsOfAChainDoNotMeet() throws {
      try withLab { lab in
        let hosts = try lab.hosts(3)
        let nodes = try hosts.map { host in
          let neighbours = hosts.filter { abs($0.index - host.index) == 1 }
          return try lab.node(host, NodeConfiguration(host, among: neighbours), guests: [host.index + 1])
        }
        let guests = nodes.flatMap(\.guests)
        #expect(try guests[0].ping(guests[1]).isComplete)
        #expect(try guests[1].ping(guests[2]).isComplete)
        #expect(try guests[0].ping(guests[2], count: 2).received == 0)
        try stopAll(nodes)
      }
    }

    // MARK: - A ring

    /// The frames that have gone over links, of all hosts.
    private func framesOnLinks(_ nodes: [Node]) throws -> Int {
      try nodes.reduce(0) { try $0 + $1.forwarder.counters().total("out_frames", .links) }
    }

    /// Waits until no frame goes over any link any more; how many have gone until then, nil when they do not end.
    private func framesUntilQuiet(_ nodes: [Node], seconds: Double = 20) throws -> Int? {
      var last = try framesOnLinks(nodes)
      let isQuiet = try eventually(within: seconds) {
        usleep(300_000)
        let now = try framesOnLinks(nodes)
        defer { last = now }
        return now == last
      }
      return isQuiet ? last : nil
    }

    @Test("broadcasts in a ring come to rest, and cutting it mends it", arguments: ["vxlan", "vnetp"])
    func ring(encapsulation: String) throws {
      try withLab { lab in
        let hosts = try lab.hosts(3)
        let nodes = try nodes(lab, hosts, edges: [(0, 1), (1, 2), (2, 0)], encapsulation: encapsulation)
        let guests = nodes.flatMap(\.guests)
        let sockets = try guests.map { try PacketSocket(in: $0.namespace) }
        let broadcasts = 50
        for number in 0..<broadcasts {
          try sockets[0].send(Frame.numbered(UInt32(number), to: .broadcast, from: guests[0].mac))
          usleep(2_000)
        }
        let frames = try #require(try framesUntilQuiet(nodes), "frames still go round")
        // Each broadcast goes over two links at least. A storm would have made thousands of each.
        #expect(frames <= 20 * broadcasts, "\(frames) frames of \(broadcasts) broadcasts")
        let copies = try (1..<3).map { try sockets[$0].receiveNumbers(quietSeconds: 0.2) }
        for copies in copies {
          #expect(!copies.isEmpty)
          #expect(copies.count <= 10 * broadcasts)
        }
        let reports = try nodes.map { try $0.forwarder.counters() }
        for report in reports { expectConservation(report) }
        #expect(reports.reduce(0) { $0 + $1.total("mac_freezes", .domains) } > 0, "what else ended it?")

        // What flaps is held where it was first heard, so that the ring is a tree to it; until then answers may get
        // lost, or come twice.
        for (a, b) in [(0, 1), (1, 2), (2, 0)] {
          #expect(try eventually { try guests[a].ping(guests[b], count: 2).isComplete }, "\(a) to \(b)")
        }

        // A chain of what is left; addresses that are not held where a copy came the long way round.
        try expectConservation(nodes[2].forwarder.stop())
        try expectConservation(nodes[0].forwarder.counters())
        let newcomers = [MAC(0x02, 0, 0, 0, 0, 0x71), MAC(0x02, 0, 0, 0, 0, 0x72)]
        for round in 0..<5 {
          let number = UInt32(1000 + round)
          try sockets[0].send(Frame.numbered(number, to: .broadcast, from: newcomers[0]))
          #expect(try sockets[1].receives(number: number))
          try sockets[1].send(Frame.numbered(number, to: newcomers[0], from: newcomers[1]))
          #expect(try sockets[0].receives(number: number))
        }
        try stopAll([nodes[0], nodes[1]])
      }
    }

    /// One direction of the ring alone: a frame that goes round meets itself on the same side each time, so that no
    /// address moves; the limit of floods is what ends it.
    @Test("a frame that goes round one way meets the limit of floods", arguments: [100, nil])
    func oneWay(limit: Int?) throws {
      // The default of domains that a relay carries is higher.
      let framesMax = 3 * (limit ?? 50_000)
      try withLab { lab in
        let hosts = try lab.hosts(3)
        // The first host reaches the second, the second the third, the third the first; none reaches the one before.
        for host in hosts {
          let before = hosts[(host.index + 2) % 3].address
          try host.namespace.ip("route", "add", "unreachable", before + "/32")
        }
        let nodes = try nodes(
          lab, hosts, edges: [(0, 1), (1, 2), (2, 0)], encapsulation: "vxlan", floodLimit: limit)
        let socket = try PacketSocket(in: nodes[0].guests[0].namespace)
        try socket.send(Frame.numbered(1, to: .broadcast, from: nodes[0].guests[0].mac))
        let frames = try #require(try framesUntilQuiet(nodes), "the frame still goes round")
        #expect(frames >= 3, "it never went round")
        #expect(frames <= framesMax)
        let reports = try nodes.map { try $0.forwarder.counters() }
        #expect(reports.reduce(0) { $0 + $1.total("drop_flood_limit", .domains) } > 0)
        try stopAll(nodes)
      }
    }
  }
}
