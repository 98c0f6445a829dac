import TestSupport
import Testing

@testable import Datapath

/// A domain with rules: `ports` ports from index 0 on, and `links` links behind them.
private struct RoutedNetwork {
  static let domain = DomainIndex(0)
  let macs: MACTable
  let snapshot: Snapshot

  init(_ routes: [VNETRoute], ports: Int = 2, links: Int = 2, floodFramesPerSecondMax: Int = 0) throws {
    let macs = MACTable(macsMax: 64, seed: 1)
    self.macs = macs
    snapshot = try Snapshot(
      version: 1,
      interfaces: (0..<ports + links).map { index in
        Snapshot.Interface(
          InterfaceIndex(index),
          index < ports
            ? .port(domain: Self.domain)
            : .link(peer: UnderlayAddress(ipv4: UInt32(index + 1)), domains: [Self.domain]), mtuBytes: 1450)
      },
      domains: [
        Snapshot.Domain(
          Self.domain, vni: 1, macs: macs, forwarding: .routes(routes),
          floodFramesPerSecondMax: floodFramesPerSecondMax)
      ])
  }
}

private func mac(_ number: Int) -> MACAddress { MACAddress(bits: testMAC(number)) }

/// What a router with these rules does with a frame, by cache or not.
private func decide(
  _ router: inout Router, _ source: MACAddress, _ destination: MACAddress, from ingress: Int
) -> Router.Decision.Action {
  router.decide(
    source: source.bits, destination: destination.bits, ingress: InterfaceIndex(ingress),
    domain: RoutedNetwork.domain, now: TurnClock(seconds: 1)
  ).action
}

/// What comes out, in a form that a test can write down.
private enum Outcome: Hashable {
  case to([Int])
  case drop(Counter)

  init(_ action: Router.Decision.Action) {
    switch action {
    case .unicast(let egress): self = .to([egress.index])
    case .flood(let targets):
      let indices = targets.map(\.index)
      #expect(indices.count == targets.targetCount && indices.count > 1)
      self = .to(indices)
    case .drop(let reason): self = .drop(reason)
    }
  }
}

/// The rules read one after the other, as VNETP.md has them: what the compiled table is compared with.
private enum PlainReference {
  static func score(_ route: VNETRoute) -> Int? {
    switch (route.source, route.destination) {
    case (.exact, .exact): 8
    case (.exact, .not), (.not, .exact): 7
    case (.exact, .any), (.any, .exact): 6
    case (.any, .not), (.not, .any): 5
    case (.exact, .none): 4
    case (.any, .any): 3
    default: nil
    }
  }

  static func matches(_ pattern: MACPattern, _ address: MACAddress, isDestination: Bool) -> Bool {
    switch pattern {
    case .exact(let wanted): wanted == address
    case .any: true
    case .not(let excepted): excepted != address
    case .none: isDestination
    }
  }

  static func decide(_ routes: [VNETRoute], _ source: MACAddress, _ destination: MACAddress, from ingress: Int)
    -> Outcome
  {
    let matching = routes.filter { route in
      matches(route.source, source, isDestination: false)
        && matches(route.destination, destination, isDestination: true)
        && (route.from == .any || route.from == .interface(InterfaceIndex(ingress)))
    }
    guard let highest = matching.compactMap(score).max() else { return .drop(.dropNoRoute) }
    let targets = Set(matching.filter { score($0) == highest }.map(\.to.index)).subtracting([ingress])
    return targets.isEmpty ? .drop(.dropSameInterface) : .to(targets.sorted())
  }
}

@Suite struct RoutingRoutesTests {
  /// Host A's four example routes; host B's are the same with the guests exchanged.
  private static func example(guest: MACAddress, other: MACAddress, port: Int, link: Int) -> [VNETRoute] {
    let (port, link) = (InterfaceIndex(port), InterfaceIndex(link))
    return [
      VNETRoute(source: .any, destination: .exact(guest), to: port),
      VNETRoute(source: .exact(guest), destination: .exact(other), to: link),
      VNETRoute(source: .exact(guest), destination: .exact(.broadcast), to: link),
      VNETRoute(source: .not(guest), destination: .exact(.broadcast), to: port),
    ]
  }

  @Test(arguments: [true, false], [true, false])
  func `The example routes carry two guests' frames, seen from either host`(isHostA: Bool, cacheEnabled: Bool) throws {
    let (guest, other) = isHostA ? (mac(0x0a), mac(0x0b)) : (mac(0x0b), mac(0x0a))
    let network = try RoutedNetwork(
      Self.example(guest: guest, other: other, port: 0, link: 1), ports: 1, links: 1)
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view, cacheEnabled: cacheEnabled)
    for _ in 0..<2 {
      func expect(_ source: MACAddress, _ destination: MACAddress, from ingress: Int, _ expected: Outcome) {
        let action = decide(&router, source, destination, from: ingress)
        #expect(Outcome(action) == expected, "\(source) to \(destination) from \(ingress)")
      }
      expect(guest, other, from: 0, .to([1]))
      expect(guest, .broadcast, from: 0, .to([1]))
      expect(other, guest, from: 1, .to([0]))
      expect(other, .broadcast, from: 1, .to([0]))
      // A third host's guest is heard, and can be answered only by broadcast.
      expect(mac(0x0c), guest, from: 1, .to([0]))
      expect(guest, mac(0x0c), from: 0, .drop(.dropNoRoute))
      expect(other, mac(0x0c), from: 1, .drop(.dropNoRoute))
      // What would go back where it came from does not.
      expect(guest, guest, from: 0, .drop(.dropSameInterface))
      expect(mac(0x0c), .broadcast, from: 0, .drop(.dropSameInterface))
    }
    #expect(network.macs.count == 0)
  }

  @Test func `Every combination of patterns has the score of VNET/P, or none`() {
    let patterns: [MACPattern] = [.exact(mac(1)), .any, .not(mac(1)), .none]
    let scores: [[Int?]] = [
      // exact, any, not, none as the destination
      [8, 6, 7, 4],
      [6, 3, 5, nil],
      [7, 5, nil, nil],
      [nil, nil, nil, nil],
    ]
    for (row, source) in patterns.enumerated() {
      for (column, destination) in patterns.enumerated() {
        for from in [VNETRoute.Origin.any, .interface(InterfaceIndex(3))] {
          let route = VNETRoute(source: source, destination: destination, from: from, to: InterfaceIndex(0))
          #expect(route.score == scores[row][column], "\(source), \(destination)")
        }
      }
    }
    for pattern in RoutePattern.allCases {
      let levels = (0..<RoutePattern.levels).filter { level in
        let (first, second) = RoutePattern.level(level)
        return first == pattern || second == pattern
      }
      #expect(levels.count == 1, "\(pattern) is looked up once")
    }
  }

  @Test(arguments: [true, false]) func `Of the rules that match only those with the highest score fire`(
    cacheEnabled: Bool
  ) throws {
    // Rows of the table from the highest score on; each matches the frame and has targets of its own.
    let rows: [[(MACPattern, MACPattern)]] = [
      [(.exact(mac(1)), .exact(mac(2)))],
      [(.exact(mac(1)), .not(mac(9))), (.not(mac(9)), .exact(mac(2)))],
      [(.exact(mac(1)), .any), (.any, .exact(mac(2)))],
      [(.any, .not(mac(9))), (.not(mac(9)), .any)],
      [(.exact(mac(1)), .none)],
      [(.any, .any)],
    ]
    for first in rows.indices {
      var routes: [VNETRoute] = []
      for (row, pairs) in rows.enumerated() where row >= first {
        for (place, pair) in pairs.enumerated() {
          routes.append(
            VNETRoute(source: pair.0, destination: pair.1, to: InterfaceIndex(1 + 2 * row + place)))
        }
      }
      let network = try RoutedNetwork(routes.reversed(), ports: 13, links: 0)
      defer { withExtendedLifetime(network) {} }
      var router = Router(network.snapshot.view, cacheEnabled: cacheEnabled)
      for _ in 0..<2 {
        let action = decide(&router, mac(1), mac(2), from: 0)
        #expect(Outcome(action) == .to(rows[first].indices.map { 1 + 2 * first + $0 }))
      }
    }
  }

  @Test func `A rule with an exception does not match the address that it excepts`() throws {
    let network = try RoutedNetwork([
      VNETRoute(source: .not(mac(1)), destination: .exact(mac(2)), to: InterfaceIndex(2)),
      VNETRoute(source: .any, destination: .not(mac(2)), to: InterfaceIndex(1)),
      VNETRoute(source: .any, destination: .not(mac(2)), to: InterfaceIndex(3)),
      VNETRoute(source: .any, destination: .not(mac(3)), to: InterfaceIndex(3)),
    ])
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view)
    let other = decide(&router, mac(5), mac(2), from: 0)
    #expect(Outcome(other) == .to([2]))
    // The exceptions of two rules for one target cancel.
    let excepted = decide(&router, mac(1), mac(2), from: 0)
    #expect(Outcome(excepted) == .to([3]))
    let both = decide(&router, mac(1), mac(4), from: 0)
    #expect(Outcome(both) == .to([1, 3]))
  }

  @Test func `A rule from one interface is for that interface's frames, and its score is the same`() throws {
    let network = try RoutedNetwork([
      VNETRoute(source: .any, destination: .exact(mac(2)), from: .interface(InterfaceIndex(0)), to: InterfaceIndex(2)),
      VNETRoute(source: .any, destination: .exact(mac(2)), from: .interface(InterfaceIndex(1)), to: InterfaceIndex(3)),
      VNETRoute(source: .any, destination: .any, to: InterfaceIndex(1)),
      VNETRoute(source: .any, destination: .any, from: .interface(InterfaceIndex(3)), to: InterfaceIndex(0)),
    ])
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view)
    let expected: [[Int]] = [[2], [3], [1], [0, 1]]
    for (ingress, targets) in expected.enumerated() {
      let action = decide(&router, mac(1), mac(2), from: ingress)
      #expect(Outcome(action) == .to(targets), "from \(ingress)")
    }
  }

  @Test(arguments: [true, false])
  func `All rules that tie fire: each target once, the ingress never`(cacheEnabled: Bool) throws {
    let patterns: [(MACPattern, MACPattern)] = [(.not(mac(9)), .any), (.any, .not(mac(9)))]
    var routes: [VNETRoute] = []
    for pair in patterns {
      for target in [0, 1, 3, 5, 3] {
        routes.append(VNETRoute(source: pair.0, destination: pair.1, to: InterfaceIndex(target)))
      }
      routes.append(
        VNETRoute(source: pair.0, destination: pair.1, from: .interface(InterfaceIndex(1)), to: InterfaceIndex(4)))
    }
    let network = try RoutedNetwork(routes, ports: 3, links: 3)
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view, cacheEnabled: cacheEnabled)
    for _ in 0..<2 {
      for (ingress, expected) in [(0, [1, 3, 5]), (1, [0, 3, 4, 5]), (2, [0, 1, 3, 5]), (3, [0, 1, 5])] {
        let action = decide(&router, mac(1), .broadcast, from: ingress)
        #expect(Outcome(action) == .to(expected), "from \(ingress)")
      }
    }
  }

  @Test func `Targets stay as they are while the worker decides other frames`() throws {
    let routes = (0..<40).flatMap { number in
      (0...number % 4 + 1).map { place in
        VNETRoute(source: .any, destination: .exact(mac(number)), to: InterfaceIndex(1 + (number + place) % 7))
      }
    }
    let network = try RoutedNetwork(routes, ports: 4, links: 4)
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view)
    var held: [(number: Int, targets: TargetSet)] = []
    for number in 0..<40 {
      guard case .flood(let targets) = decide(&router, mac(100), mac(number), from: 0) else {
        Issue.record("\(number) goes to one place")
        continue
      }
      held.append((number, targets))
      // Enough others to push every decision out of the cache.
      for other in 0..<2_000 { _ = decide(&router, mac(1_000 + other), mac((number + other) % 40), from: 0) }
    }
    for (number, targets) in held {
      let expected = Set(routes.filter { $0.destination == .exact(mac(number)) }.map(\.to.index))
      #expect(targets.map(\.index) == expected.sorted())
    }
  }

  @Test func `No rule, a foreign frame and a group source are dropped by name`() throws {
    let network = try RoutedNetwork([])
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view)
    let nothing = decide(&router, mac(1), mac(2), from: 0)
    #expect(nothing == .drop(.dropNoRoute))
    let foreign = decide(&router, mac(1), mac(2), from: 77)
    #expect(foreign == .drop(.dropNoDestination))
    let group = decide(&router, .broadcast, mac(2), from: 0)
    #expect(group == .drop(.dropBadSource))
  }

  @Test func `A new snapshot's rules hold at once`() throws {
    let before = try RoutedNetwork([VNETRoute(source: .any, destination: .any, to: InterfaceIndex(1))])
    let after = try RoutedNetwork([VNETRoute(source: .any, destination: .any, to: InterfaceIndex(2))])
    defer { withExtendedLifetime((before, after)) {} }
    var router = Router(before.snapshot.view)
    for _ in 0..<2 {
      let action = decide(&router, mac(1), mac(2), from: 0)
      #expect(action == .unicast(InterfaceIndex(1)))
    }
    router.adopt(after.snapshot.view)
    let action = decide(&router, mac(1), mac(2), from: 0)
    #expect(action == .unicast(InterfaceIndex(2)))
  }

  /// A rule over few addresses and interfaces, so that rules meet; all scored combinations come up.
  private static func randomRoute(_ random: inout SeededRandom, interfaces: Int, addresses: Int) -> VNETRoute {
    while true {
      func pattern() -> MACPattern {
        let address = mac(Int.random(in: 0..<addresses, using: &random))
        switch Int.random(in: 0..<4, using: &random) {
        case 0: return .exact(address)
        case 1: return .not(address)
        case 2: return .any
        default: return Bool.random(using: &random) ? .none : .any
        }
      }
      let from: VNETRoute.Origin =
        Bool.random(using: &random)
        ? .any : .interface(InterfaceIndex(Int.random(in: 0..<interfaces, using: &random)))
      let route = VNETRoute(
        source: pattern(), destination: pattern(), from: from,
        to: InterfaceIndex(Int.random(in: 0..<interfaces, using: &random)))
      if PlainReference.score(route) != nil { return route }
    }
  }

  @Test(arguments: 1...4)
  func `1,000 random rule sets decide as the rules read one after the other`(part: Int) throws {
    var outcomes: [String: Int] = [:]
    for number in 0..<250 {
      var random = SeededRandom(seed: UInt64(part * 1_000 + number))
      let interfaces = Int.random(in: 2...7, using: &random)
      let addresses = Int.random(in: 2...5, using: &random)
      let routes = (0..<Int.random(in: 1...24, using: &random)).map { _ in
        Self.randomRoute(&random, interfaces: interfaces, addresses: addresses)
      }
      let network = try RoutedNetwork(routes, ports: 1, links: interfaces - 1)
      defer { withExtendedLifetime(network) {} }
      var cached = Router(network.snapshot.view)
      var plain = Router(network.snapshot.view, cacheEnabled: false)
      for _ in 0..<100 {
        // One address more than the rules name.
        let source = mac(Int.random(in: 0...addresses, using: &random))
        let destination = mac(Int.random(in: 0...addresses, using: &random))
        let ingress = Int.random(in: 0..<interfaces, using: &random)
        let expected = PlainReference.decide(routes, source, destination, from: ingress)
        let byCache = decide(&cached, source, destination, from: ingress)
        let anew = decide(&plain, source, destination, from: ingress)
        try #require(Outcome(byCache) == expected, "set \(number): \(source) to \(destination) from \(ingress)")
        try #require(Outcome(anew) == expected, "set \(number): \(source) to \(destination) from \(ingress)")
        switch expected {
        case .to(let targets): outcomes[targets.count == 1 ? "one" : "several", default: 0] += 1
        case .drop(let reason): outcomes["\(reason)", default: 0] += 1
        }
      }
    }
    // The run is worth something only if everything came up.
    for outcome in ["one", "several", "dropNoRoute", "dropSameInterface"] {
      #expect(outcomes[outcome, default: 0] > 200, "\(outcome)")
    }
  }

  @Test(arguments: [10, 1_000, 10_000])
  func `A lookup reads no more of the table for 10,000 rules than for 10`(ruleCount: Int) throws {
    var random = SeededRandom(seed: 3)
    // All patterns are there from any and from one interface, so that all 18 are looked up.
    var routes: [VNETRoute] = []
    while routes.count < ruleCount {
      routes.append(Self.randomRoute(&random, interfaces: 8, addresses: ruleCount))
    }
    let network = try RoutedNetwork(routes, ports: 4, links: 4)
    defer { withExtendedLifetime(network) {} }
    let view = network.snapshot.view
    var total = 0
    var most = 0
    var found = 0
    let lookups = 20_000
    for _ in 0..<lookups {
      let source = testMAC(Int.random(in: 0...ruleCount, using: &random))
      let destination = testMAC(Int.random(in: 0...ruleCount, using: &random))
      var groupsRead = 0
      let match = view.matchRoutes(
        domain: RoutedNetwork.domain, source: source, destination: destination,
        ingress: InterfaceIndex(Int.random(in: 0..<8, using: &random)), groupsRead: &groupsRead)
      total += groupsRead
      most = max(most, groupsRead)
      found += match == nil ? 0 : 1
    }
    #expect(found > lookups / 4)
    // At most 18 buckets of at most 8; in fact hardly any has two groups, whatever the seed of the hash is.
    #expect(most <= 3 * RoutePattern.allCases.count)
    #expect(total <= 10 * lookups, "\(total) groups read")
    for range in 0..<network.snapshot.view.routes.bucketStarts.count - 1 {
      let starts = network.snapshot.view.routes.bucketStarts
      try #require(starts[range + 1] - starts[range] <= UInt32(RouteTable.bucketGroupsMax))
    }
  }

  @Test func `10,000 rules for one target are one, so that no frame goes through them`() throws {
    var routes = (0..<10_000).map { number in
      VNETRoute(source: .any, destination: .not(mac(number)), to: InterfaceIndex(1 + number % 2))
    }
    routes += (0..<10_000).map { _ in VNETRoute(source: .any, destination: .any, to: InterfaceIndex(3)) }
    let network = try RoutedNetwork(routes)
    defer { withExtendedLifetime(network) {} }
    #expect(network.snapshot.view.routes.targets.count == 3)
    var router = Router(network.snapshot.view)
    let action = decide(&router, mac(20_000), mac(5), from: 0)
    #expect(Outcome(action) == .to([1, 2]))
  }

  @Test func `Rules that cannot be forwarded by are refused`() throws {
    func refusal(_ route: VNETRoute) -> Snapshot.Invalid? {
      do throws(Snapshot.Invalid) {
        let macs = MACTable(macsMax: 16)
        _ = try Snapshot(
          version: 1,
          interfaces: [
            Snapshot.Interface(InterfaceIndex(0), .port(domain: DomainIndex(0)), mtuBytes: 1450),
            Snapshot.Interface(InterfaceIndex(1), .port(domain: DomainIndex(1)), mtuBytes: 1450),
          ],
          domains: [
            Snapshot.Domain(DomainIndex(0), vni: 1, macs: macs, forwarding: .routes([route])),
            Snapshot.Domain(DomainIndex(1), vni: 2, macs: macs),
          ])
        return nil
      } catch {
        return error
      }
    }
    let domain = DomainIndex(0)
    let (here, elsewhere) = (InterfaceIndex(0), InterfaceIndex(1))
    #expect(refusal(VNETRoute(source: .any, destination: .any, from: .interface(here), to: here)) == nil)
    for route in [
      VNETRoute(source: .any, destination: .any, to: elsewhere),
      VNETRoute(source: .any, destination: .any, to: InterfaceIndex(9)),
      VNETRoute(source: .any, destination: .any, to: .none),
      VNETRoute(source: .any, destination: .any, from: .interface(elsewhere), to: here),
    ] { #expect(refusal(route) == .danglingRoute(route, domain)) }
    for route in [
      VNETRoute(source: .none, destination: .any, to: here), VNETRoute(source: .any, destination: .none, to: here),
      VNETRoute(source: .not(mac(1)), destination: .not(mac(1)), to: here),
    ] { #expect(refusal(route) == .routeWithoutScore(route, domain)) }
  }

  @Test(arguments: [true, false]) func `What goes to several places by rules meets the domain's limit too`(
    cacheEnabled: Bool
  ) throws {
    let routes = [1, 2].map { VNETRoute(source: .any, destination: .any, to: InterfaceIndex($0)) }
    let network = try RoutedNetwork(routes, floodFramesPerSecondMax: 1_000)
    defer { withExtendedLifetime(network) {} }
    var router = Router(network.snapshot.view, cacheEnabled: cacheEnabled)
    var passed = 0
    for _ in 0..<1_000 {
      let action = decide(&router, mac(1), mac(2), from: 0)
      if case .flood = action { passed += 1 } else { #expect(action == .drop(.dropFloodLimit)) }
    }
    #expect(passed == 100)
    // One target is no flood.
    let single = decide(&router, mac(1), mac(2), from: 1)
    #expect(single == .unicast(InterfaceIndex(2)))
  }
}
