import Synchronization
import TestSupport
import Testing

@testable import Datapath

private typealias Decision = Router.Decision

/// Two ports and two links in domain 0 (the second link relays only if asked to), one port and one link in domain 1.
private struct Network {
  let macs: [MACTable]
  let snapshot: Snapshot
  static let portA = InterfaceIndex(0)
  static let portB = InterfaceIndex(1)
  static let linkA = InterfaceIndex(2)
  static let linkB = InterfaceIndex(3)
  static let other = InterfaceIndex(4)
  static let blue = DomainIndex(0)
  static let red = DomainIndex(1)

  init(macs: [MACTable]? = nil, without missing: Set<Int> = [], relay: Bool = false, seed: UInt64 = 1) throws {
    let tables = macs ?? (0..<2).map { _ in MACTable(macsMax: 64, seed: seed) }
    self.macs = tables
    let interfaces = [
      Snapshot.Interface(Self.portA, .port(domain: Self.blue), mtuBytes: 1450),
      Snapshot.Interface(Self.portB, .port(domain: Self.blue), mtuBytes: 1450),
      Snapshot.Interface(
        Self.linkA, .link(peer: UnderlayAddress(ipv4: 1), domains: [Self.blue, Self.red]), mtuBytes: 1500),
      Snapshot.Interface(
        Self.linkB, .link(peer: UnderlayAddress(ipv4: 2), domains: [Self.blue], isRelay: relay), mtuBytes: 1500),
      Snapshot.Interface(Self.other, .port(domain: Self.red), mtuBytes: 1450),
    ]
    snapshot = try Snapshot(
      version: 1, interfaces: interfaces.filter { !missing.contains($0.index.index) },
      domains: [
        Snapshot.Domain(Self.blue, vni: 1, macs: tables[0]), Snapshot.Domain(Self.red, vni: 2, macs: tables[1]),
      ])
  }

  func flood(from ingress: InterfaceIndex, _ domain: DomainIndex = Self.blue) -> Router.Decision.Action {
    .flood(snapshot.view.floodSet(domain: domain, ingress: ingress))
  }
}

extension Router.Decision.Action {
  fileprivate var isFlood: Bool {
    if case .flood = self { true } else { false }
  }
}

/// A frame from one test MAC to another, routed by a router of a network that lives on.
private func route(
  _ router: inout Router, _ source: Int, _ destination: UInt64, _ ingress: InterfaceIndex,
  _ domain: DomainIndex = Network.blue, now: UInt32 = 1
) -> Decision {
  router.decide(
    source: testMAC(source), destination: destination, ingress: ingress, domain: domain, now: TurnClock(seconds: now))
}

private func remembered(
  _ router: borrowing Router, _ source: Int, _ destination: UInt64, _ ingress: InterfaceIndex, _ domain: DomainIndex,
  now: UInt32
) -> InterfaceIndex {
  router.remembered(
    source: testMAC(source), destination: destination, ingress: ingress, domain: domain, now: TurnClock(seconds: now))
}

@Suite struct RoutingRouterTests {
  @Test(arguments: [true, false]) func `Two guests find each other`(cacheEnabled: Bool) throws {
    let network = try Network()
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view, cacheEnabled: cacheEnabled)
    let request = route(&router, 1, testBroadcast, Network.portA)
    #expect(request == Decision(network.flood(from: Network.portA), .learned))
    let reply = route(&router, 2, testMAC(1), Network.linkA)
    #expect(reply == Decision(.unicast(Network.portA), .learned))
    for _ in 0..<3 {
      let there = route(&router, 1, testMAC(2), Network.portA)
      #expect(there == Decision(.unicast(Network.linkA), .known))
      let back = route(&router, 2, testMAC(1), Network.linkA)
      #expect(back == Decision(.unicast(Network.portA), .known))
    }
  }

  @Test(arguments: [true, false]) func `An unknown destination floods until it is learned`(cacheEnabled: Bool) throws {
    let network = try Network()
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view, cacheEnabled: cacheEnabled)
    for expected in [MACTable.Learned.learned, .known, .known] {
      let decision = route(&router, 1, testMAC(2), Network.portA)
      #expect(decision == Decision(network.flood(from: Network.portA), expected))
    }
    _ = route(&router, 2, testBroadcast, Network.portB)
    let decision = route(&router, 1, testMAC(2), Network.portA)
    #expect(decision == Decision(.unicast(Network.portB), .known))
  }

  @Test func `A group or zero source is dropped and not learned`() throws {
    let network = try Network()
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view)
    for source in [0, testBroadcast, 0x01_00_5E_00_00_01, 0x33_33_00_00_00_01] {
      let decision = router.decide(
        source: source, destination: testMAC(2), ingress: Network.portA, domain: Network.blue,
        now: TurnClock(seconds: 1))
      #expect(decision == Decision(.drop(.dropBadSource), .skipped))
    }
    #expect(network.macs[0].count == 0)
  }

  @Test func `Group destinations flood, and an all-zero one is merely unknown`() throws {
    let network = try Network()
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view)
    for destination in [testBroadcast, 0x01_00_5E_00_00_01, 0x33_33_00_00_00_01, 0] as [UInt64] {
      for _ in 0..<2 {
        let decision = route(&router, 1, destination, Network.portA)
        #expect(decision.action.isFlood)
      }
    }
  }

  @Test(arguments: [true, false])
  func `A frame does not go back where it came from, nor from link to link`(cacheEnabled: Bool) throws {
    let network = try Network()
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view, cacheEnabled: cacheEnabled)
    _ = route(&router, 1, testBroadcast, Network.linkA)
    _ = route(&router, 2, testBroadcast, Network.linkB)
    _ = route(&router, 3, testBroadcast, Network.portA)
    for _ in 0..<2 {
      let linkToLink = route(&router, 1, testMAC(2), Network.linkA)
      #expect(linkToLink == Decision(.drop(.dropSplitHorizon), .known))
      let portToItself = route(&router, 3, testMAC(3), Network.portA)
      #expect(portToItself == Decision(.drop(.dropSameInterface), .known))
      let linkToItself = route(&router, 1, testMAC(1), Network.linkA)
      #expect(linkToItself == Decision(.drop(.dropSameInterface), .known))
    }
  }

  @Test func `From a link that relays a frame may leave by another link`() throws {
    let network = try Network(relay: true)
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view)
    _ = route(&router, 1, testBroadcast, Network.linkA)
    let relayed = route(&router, 2, testMAC(1), Network.linkB)
    #expect(relayed.action == .unicast(Network.linkA))
    let notRelayed = route(&router, 1, testMAC(2), Network.linkA)
    #expect(notRelayed.action == .drop(.dropSplitHorizon))
  }

  @Test func `The same MACs in two domains never meet`() throws {
    let network = try Network()
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view)
    _ = route(&router, 1, testBroadcast, Network.portA, Network.blue)
    _ = route(&router, 2, testBroadcast, Network.portB, Network.blue)
    // In the other domain neither is known.
    let unknown = route(&router, 1, testMAC(2), Network.other, Network.red)
    #expect(unknown == Decision(network.flood(from: Network.other, Network.red), .learned))
    _ = route(&router, 2, testBroadcast, Network.linkA, Network.red)
    for _ in 0..<3 {
      let blue = route(&router, 1, testMAC(2), Network.portA, Network.blue)
      #expect(blue == Decision(.unicast(Network.portB), .known))
      let red = route(&router, 1, testMAC(2), Network.other, Network.red)
      #expect(red == Decision(.unicast(Network.linkA), .known))
    }
    #expect(network.macs.map(\.count) == [2, 2])
    // A link is in both: what comes over it is told apart by the domain alone.
    let fromLinkBlue = route(&router, 3, testMAC(1), Network.linkA, Network.blue)
    #expect(fromLinkBlue.action == .unicast(Network.portA))
    let fromLinkRed = route(&router, 3, testMAC(1), Network.linkA, Network.red)
    #expect(fromLinkRed.action == .unicast(Network.other))
  }

  @Test func `A MAC that moves is followed at once by a worker that had cached where it was`() throws {
    let network = try Network()
    defer { withExtendedLifetime(network) {} }
    var one = Router(network.snapshot.view)
    var two = Router(network.snapshot.view)
    _ = route(&one, 2, testBroadcast, Network.linkA)
    _ = route(&one, 1, testBroadcast, Network.portA)
    for _ in 0..<2 {
      let before = route(&one, 1, testMAC(2), Network.portA)
      #expect(before.action == .unicast(Network.linkA))
    }
    let move = route(&two, 2, testBroadcast, Network.linkB)
    #expect(move.learned == .moved)
    let after = route(&one, 1, testMAC(2), Network.portA)
    #expect(after.action == .unicast(Network.linkB))
  }

  @Test func `A source that moved away and back is learned back at once`() throws {
    let network = try Network()
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view)
    for _ in 0..<2 { _ = route(&router, 1, testBroadcast, Network.portA) }
    _ = route(&router, 1, testBroadcast, Network.portB)
    // The cache still holds "1 is at port A", which the move has made void.
    let back = route(&router, 1, testBroadcast, Network.portA)
    #expect(back == Decision(network.flood(from: Network.portA), .moved))
    #expect(network.macs[0].reference.lookup(testMAC(1)) == Network.portA)
  }

  @Test func `A guest that only sends cached frames does not age`() throws {
    let network = try Network()
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view)
    for now in 1...400 as ClosedRange<UInt32> {
      for _ in 0..<3 { _ = route(&router, 1, testBroadcast, Network.portA, now: now) }
    }
    #expect(network.macs[0].sweep(nowSeconds: 400, ageingSeconds: 2) == 0)
    #expect(network.macs[0].sweep(nowSeconds: 402, ageingSeconds: 2) == 1)
    let again = route(&router, 1, testBroadcast, Network.portA, now: 402)
    #expect(again.learned == .learned)
  }

  @Test func `What a frozen MAC sends from elsewhere is forwarded and counted each time`() throws {
    let network = try Network()
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view)
    _ = route(&router, 2, testBroadcast, Network.portB)
    let places = [Network.portA, Network.linkA]
    for move in 0...MACTable.movesMax { _ = route(&router, 1, testBroadcast, places[move % 2]) }
    let froze = route(&router, 1, testMAC(2), Network.linkB)
    #expect(froze == Decision(.unicast(Network.portB), .froze))
    for elsewhere in [Network.linkA, Network.linkB, Network.linkA] {
      let frozen = route(&router, 1, testMAC(2), elsewhere)
      #expect(frozen == Decision(.unicast(Network.portB), .frozen))
    }
    let held = route(&router, 1, testMAC(2), Network.portA)
    #expect(held == Decision(.unicast(Network.portB), .held))
  }

  @Test func `At the limit frames of unlearned sources are forwarded and counted each time`() throws {
    let network = try Network(macs: [MACTable(macsMax: 1), MACTable(macsMax: 1)])
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view)
    _ = route(&router, 1, testBroadcast, Network.portA)
    for _ in 0..<3 {
      let decision = route(&router, 2, testMAC(1), Network.portB)
      #expect(decision == Decision(.unicast(Network.portA), .limited))
    }
  }

  @Test func `Places and frames of an interface that left the domain count for nothing`() throws {
    let network = try Network()
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view)
    _ = route(&router, 1, testBroadcast, Network.portA)
    _ = route(&router, 2, testBroadcast, Network.linkB)
    for _ in 0..<2 {
      let before = route(&router, 1, testMAC(2), Network.portA)
      #expect(before.action == .unicast(Network.linkB))
    }
    let without = try Network(macs: network.macs, without: [3])
    defer { withExtendedLifetime(without) {} }
    router.adopt(without.snapshot.view)
    // Control has not removed what was learned there yet.
    for _ in 0..<2 {
      let after = route(&router, 1, testMAC(2), Network.portA)
      #expect(after == Decision(without.flood(from: Network.portA), .known))
    }
    let late = route(&router, 5, testMAC(1), Network.linkB)
    #expect(late == Decision(.drop(.dropNoDestination), .skipped))
    #expect(network.macs[0].reference.lookup(testMAC(5)) == .none)
    let nowhere = route(&router, 5, testMAC(1), Network.portA, DomainIndex(9))
    #expect(nowhere == Decision(.drop(.dropNoDestination), .skipped))
    // A port of another domain is no member either.
    let foreign = route(&router, 5, testMAC(1), Network.other, Network.blue)
    #expect(foreign == Decision(.drop(.dropNoDestination), .skipped))
  }

  @Test(arguments: [1, 2, 3, 4] as [UInt64])
  func `With the cache two workers decide as without it, for 30,000 random frames, moves, ageing and snapshots`(
    seed: UInt64
  ) throws {
    var random = SeededRandom(seed: seed)
    let cachedNetwork = try Network(seed: seed)
    let plainNetwork = try Network(seed: seed)
    var one = Router(cachedNetwork.snapshot.view)
    var two = Router(cachedNetwork.snapshot.view)
    var plain = Router(plainNetwork.snapshot.view, cacheEnabled: false)
    // Kept to the end: routers do not own their snapshots.
    var snapshots: [Network] = []
    var now: UInt32 = 1
    var places = (0..<12).map { _ in Int.random(in: 0..<4, using: &random) }
    var actions: [Router.Decision.Action: Int] = [:]
    var floods = 0
    var hits = 0
    for step in 0..<30_000 {
      switch Int.random(in: 0..<1000, using: &random) {
      case 0..<960:
        let source = Int.random(in: 0..<12, using: &random)
        if Int.random(in: 0..<60, using: &random) == 0 { places[source] = Int.random(in: 0..<4, using: &random) }
        let destination =
          Int.random(in: 0..<10, using: &random) == 0
          ? testBroadcast : testMAC(Int.random(in: 0..<14, using: &random))
        let inRed = Int.random(in: 0..<4, using: &random) == 0
        let ingress = inRed ? [Network.other, Network.linkA][source % 2] : InterfaceIndex(places[source])
        let domain = inRed ? Network.red : Network.blue
        let expected = route(&plain, source, destination, ingress, domain, now: now)
        let isFirst = Bool.random(using: &random)
        let place =
          isFirst
          ? remembered(one, source, destination, ingress, domain, now: now)
          : remembered(two, source, destination, ingress, domain, now: now)
        let decision =
          isFirst
          ? route(&one, source, destination, ingress, domain, now: now)
          : route(&two, source, destination, ingress, domain, now: now)
        if place != .none {
          hits += 1
          try #require(expected.action == .unicast(place) && expected.learned.counter == nil, "step \(step)")
        }
        actions[decision.action, default: 0] += 1
        floods += decision.action.isFlood ? 1 : 0
        try #require(decision == expected, "step \(step)")
      case 960..<980:
        now += 1
      case 980..<990:
        let number = Int.random(in: 0..<2, using: &random)
        let removed = plainNetwork.macs[number].sweep(nowSeconds: now, ageingSeconds: 8)
        try #require(
          cachedNetwork.macs[number].sweep(nowSeconds: now, ageingSeconds: 8) == removed, "step \(step)")
      default:
        // A port or link goes or comes back; sometimes before its MACs are removed, sometimes after.
        let missing: Set<Int> = [Int.random(in: 0..<8, using: &random)]
        let cached = try Network(macs: cachedNetwork.macs, without: missing)
        let uncached = try Network(macs: plainNetwork.macs, without: missing)
        snapshots += [cached, uncached]
        one.adopt(cached.snapshot.view)
        two.adopt(cached.snapshot.view)
        plain.adopt(uncached.snapshot.view)
        if Bool.random(using: &random), let gone = missing.first {
          let removed = plainNetwork.macs[0].removeAll(at: InterfaceIndex(gone))
          try #require(cachedNetwork.macs[0].removeAll(at: InterfaceIndex(gone)) == removed, "step \(step)")
        }
      }
    }
    // The run is worth something only if everything came up.
    for action in [
      .unicast(Network.portA), .unicast(Network.linkA), .unicast(Network.other), .drop(.dropSplitHorizon),
      .drop(.dropSameInterface), .drop(.dropNoDestination),
    ] as [Router.Decision.Action] {
      #expect(actions[action, default: 0] > 20, "\(action)")
    }
    #expect(floods > 20)
    #expect(hits > 100)
    withExtendedLifetime((cachedNetwork, plainNetwork, snapshots)) {}
  }

  @Test func `A decision made after a move was seen never names the place before it, whatever the other workers do`()
    throws
  {
    let network = try Network()
    defer { withExtendedLifetime(network) {} }
    let tables = network.macs
    let rounds = 20_000
    // The round whose move has been learned: even rounds at link A, odd ones at link B.
    let learned = Atomic<Int>(0)
    let stale = Atomic<Int>(0)
    let checked = Atomic<Int>(0)
    onThreads(3) { thread in
      var router = Router(network.snapshot.view)
      if thread == 0 {
        for round in 0..<rounds {
          // 11 s a round, so that the MAC is never frozen.
          _ = route(
            &router, 2, testBroadcast, round % 2 == 0 ? Network.linkA : Network.linkB, now: UInt32(1 + round * 11))
          learned.store(round, ordering: .releasing)
        }
      } else {
        _ = route(&router, 10 + thread, testBroadcast, Network.portA)
        while learned.load(ordering: .acquiring) < rounds - 1 {
          let before = learned.load(ordering: .acquiring)
          // The clock of this worker stands, so that only the generation can void what it cached.
          let decision = route(&router, 10 + thread, testMAC(2), Network.portA)
          let after = learned.load(ordering: .acquiring)
          checked.wrappingAdd(1, ordering: .relaxed)
          // Nothing moved meanwhile, and the next move was not under way long enough to be followed.
          guard before == after, case .unicast(let egress) = decision.action else { continue }
          let expected = before % 2 == 0 ? Network.linkA : Network.linkB
          if egress != expected, tables[0].reference.lookup(testMAC(2)) == expected,
            learned.load(ordering: .acquiring) == before
          {
            stale.wrappingAdd(1, ordering: .relaxed)
          }
        }
      }
    }
    #expect(checked.load(ordering: .relaxed) > 0)
    #expect(stale.load(ordering: .relaxed) == 0)
  }
}
