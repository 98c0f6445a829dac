import Testing

extension EndToEnd {
  /// Domains in which VNET rules alone decide, on two hosts and a third that nobody names.
  @Suite(needsForwarder)
  struct Rules {
    /// The guest with the MAC address 02:00:00:00:00:0a, and so on.
    static let numbers = [0x0a, 0x0b, 0x0c]

    /// The rules that VNET/P's own guide gives for a host with one guest and one peer: what is for the guest goes to
    /// it, what it sends to the other guest or to all goes to the peer, and what others send to all goes to it.
    private func rules(for guest: MAC, peer: MAC, link: String) -> [NodeConfiguration.Rule] {
      [
        .init(source: "any", destination: "\(guest)", from: "any", to: "port:vm1"),
        .init(source: "\(guest)", destination: "\(peer)", from: "any", to: "link:\(link)"),
        .init(source: "\(guest)", destination: "\(MAC.broadcast)", from: "any", to: "link:\(link)"),
        .init(source: "not-\(guest)", destination: "\(MAC.broadcast)", from: "any", to: "port:vm1"),
      ]
    }

    private func mac(_ index: Int) -> MAC { MAC(0x02, 0, 0, 0, 0, UInt8(Self.numbers[index])) }

    /// Three hosts with links to each other. The first two have each other in their rules, the third has them both.
    private func nodes(_ lab: Lab, _ encapsulation: String) throws -> [Node] {
      let hosts = try lab.hosts(3)
      return try hosts.map { host in
        var configuration = NodeConfiguration(host, among: hosts, encapsulation: encapsulation)
        configuration.domains[0].forwarding = "routes"
        if host.index < 2 {
          let peer = 1 - host.index
          configuration.rules = rules(for: mac(host.index), peer: mac(peer), link: "to-\(hosts[peer].name)")
        } else {
          configuration.rules =
            rules(for: mac(2), peer: mac(0), link: "to-\(hosts[0].name)")
            // Broadcasts go to both: all rules with the highest score are followed.
            + [
              .init(source: "\(mac(2))", destination: "\(MAC.broadcast)", to: "link:to-\(hosts[1].name)"),
              .init(source: "\(mac(2))", destination: "\(mac(1))", to: "link:to-\(hosts[1].name)"),
            ]
        }
        return try lab.node(host, configuration, guests: [Self.numbers[host.index]])
      }
    }

    @Test("the example of VNET/P behaves as it is written", arguments: ["vnetp", "vxlan"])
    func example(encapsulation: String) throws {
      try withLab { lab in
        let nodes = try nodes(lab, encapsulation)
        let guests = nodes.map { $0.guests[0] }
        #expect(guests.map(\.mac) == (0..<3).map(mac))
        #expect(try guests[0].ping(guests[1]).isComplete)
        #expect(try guests[1].ping(guests[0]).isComplete)
        #expect(try guests[0].carriesStream(to: guests[1]))

        // Broadcasts of the first two go to the other alone.
        let sockets = try guests.map { try PacketSocket(in: $0.namespace) }
        for (from, to) in [(0, 1), (1, 0)] {
          for number in 0..<20 {
            try sockets[from].send(Frame.numbered(UInt32(number), to: .broadcast, from: guests[from].mac))
          }
          #expect(try sockets[to].receiveNumbers() == Array(0..<20))
          #expect(try sockets[2].receiveNumbers(quietSeconds: 0.2) == [], "no rule names the third host")
          #expect(try sockets[from].receiveNumbers(quietSeconds: 0.2) == [])
        }
        // Those of the third go to both, and once to each.
        for number in 0..<20 {
          try sockets[2].send(Frame.numbered(UInt32(number), to: .broadcast, from: guests[2].mac))
        }
        for receiver in 0..<2 { #expect(try sockets[receiver].receiveNumbers() == Array(0..<20)) }

        // What no rule matches is dropped and counted: here nothing is learned, and nothing floods.
        let before = try nodes[0].forwarder.counters()
        for number in 0..<20 {
          try sockets[0].send(Frame.numbered(UInt32(number), to: guests[2].mac, from: guests[0].mac))
        }
        for receiver in 1..<3 { #expect(try sockets[receiver].receiveNumbers(quietSeconds: 0.3) == []) }
        let after = try nodes[0].forwarder.counters()
        #expect(after.total("drop_no_route", .domains) - before.total("drop_no_route", .domains) == 20)
        #expect(after.total("macs_learned", .domains) == 0)
        try stopAll(nodes)
      }
    }

    /// Three guests of one host; where a frame comes from decides where it goes.
    @Test func theSideThatAFrameComesFromIsMatched() throws {
      try withLab { lab in
        let host = try lab.hosts(2)[0]
        var configuration = NodeConfiguration(ports: (1...3).map { .init(name: "vm\($0)") })
        configuration.domains[0].forwarding = "routes"
        configuration.rules = [
          .init(source: "any", destination: "any", from: "port:vm1", to: "port:vm2"),
          .init(source: "any", destination: "any", from: "port:vm2", to: "port:vm3"),
        ]
        let node = try lab.node(host, configuration, guests: [1, 2, 3])
        let sockets = try node.guests.map { try PacketSocket(in: $0.namespace) }
        let anyone = MAC(0x02, 0, 0, 0, 0, 0x77)
        for sender in 0..<3 {
          // The same addresses from each side.
          for number in 0..<20 {
            try sockets[sender].send(Frame.numbered(UInt32(number), to: anyone, from: MAC(2, 0, 0, 0, 0, 0x66)))
          }
          for receiver in 0..<3 where receiver != sender {
            let expected = sender < 2 && receiver == sender + 1 ? Array(UInt32(0)..<20) : []
            #expect(try sockets[receiver].receiveNumbers(quietSeconds: 0.3) == expected, "\(sender) to \(receiver)")
          }
        }
        try stopAll([node])
      }
    }
  }
}
