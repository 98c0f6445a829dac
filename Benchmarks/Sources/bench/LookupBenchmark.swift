import Datapath

/// The MAC table and the routing decision, in random order over tables of three sizes: the first fits the first-level
/// cache, the last no cache of a core. Keys are uniform over all MACs, which is the worst for the decision cache; what
/// it is there for, the few pairs of addresses of a busy moment, has a table of its own.
func benchmarkLookup(_ report: Report) {
  let sizes = [1_000, 100_000, 1_000_000].map { report.size($0, smoke: 2_000) }
  let scenes = sizes.compactMap { RoutingScene(macs: $0) }
  guard scenes.count == sizes.count else { return report.check(false, "lookup: MACs are learned, and snapshots made") }

  measure("MAC table, look up a known MAC", scenes, report) { scene, numbers in
    var wrong = 0
    for place in numbers.indices {
      let number = numbers[place]
      if scene.macs.lookup(RoutingScene.mac(number)) != RoutingScene.location(number) { wrong += 1 }
    }
    return wrong
  }
  measure("MAC table, look up an unknown MAC", scenes, report) { scene, numbers in
    var found = 0
    for place in numbers.indices {
      if scene.macs.lookup(RoutingScene.mac(numbers[place]) ^ 1 << 32) != .none { found += 1 }
    }
    return found
  }
  measure("MAC table, learn a known MAC in the same second", scenes, report) { scene, numbers in
    var changed = 0
    for place in numbers.indices {
      let number = numbers[place]
      let learned = scene.macs.learn(RoutingScene.mac(number), at: RoutingScene.location(number), nowSeconds: 1)
      if learned != .known { changed += 1 }
    }
    return changed
  }
  for cacheEnabled in [false, true] {
    let title = "routing decision, destinations uniform over all MACs, decision cache \(cacheEnabled ? "on" : "off")"
    let now = TurnClock(seconds: 1)
    measure(title, scenes, report) { scene, numbers in
      scene.withRouter(cacheEnabled: cacheEnabled) { router in
        var wrong = 0
        for place in numbers.indices {
          let number = numbers[place]
          let decision = router.decide(
            source: RoutingScene.source(number), destination: RoutingScene.mac(number), ingress: RoutingScene.port,
            domain: RoutingScene.domain, now: now)
          if !isUnicast(decision, RoutingScene.location(number)) { wrong += 1 }
        }
        return wrong
      }
    }
    measure("\(title), prefetched \(Router.prefetchFrames) ahead", scenes, report) { scene, numbers in
      scene.withRouter(cacheEnabled: cacheEnabled) { router in
        var wrong = 0
        for place in -Router.prefetchFrames..<numbers.count {
          let next = place + Router.prefetchFrames
          if next < numbers.count {
            router.prefetch(domain: RoutingScene.domain) { RoutingScene.mac(numbers[next]) }
          }
          guard place >= 0 else { continue }
          let number = numbers[place]
          let decision = router.decide(
            source: RoutingScene.source(number), destination: RoutingScene.mac(number), ingress: RoutingScene.port,
            domain: RoutingScene.domain, now: now)
          if !isUnicast(decision, RoutingScene.location(number)) { wrong += 1 }
        }
        return wrong
      }
    }
  }
  benchmarkDecision(report)
  for rules in [10, 1_000, 10_000] { benchmarkRoutes(report, rules: rules) }
}

/// As many frames as one receive brings under load.
private let batchFrames = 64

/// A row for each size; `body` handles a batch of MACs, by their numbers, and says how many came out wrong.
@inline(__always)
private func measure(
  _ title: String, _ scenes: [RoutingScene], _ report: Report, _ body: (RoutingScene, Span<Int>) -> Int
) {
  var wrong = 0
  var random = BenchmarkRandom(seed: 1)
  var numbers = FixedArray(repeating: 0, count: batchFrames)
  report.table(title, item: "frame") { table in
    for scene in scenes {
      table.measure("\(scene.count) MACs", items: 3_000_000) { items in
        for _ in 0..<max(1, items / batchFrames) {
          for place in 0..<batchFrames { numbers[place] = random.below(scene.count) }
          wrong += body(scene, numbers.span(count: batchFrames))
        }
      }
    }
  }
  report.check(wrong == 0, "\(title): every answer is right")
}

/// A port and links in one domain that learns; MACs are known behind the links, and a few at the port.
final class RoutingScene {
  static let port = InterfaceIndex(0)
  static let domain = DomainIndex(0)
  static let links = 8
  static let sources = 64
  static let vni: UInt32 = 42

  /// How many MACs are behind the links.
  let count: Int
  let macs: MACTable.Reference
  let view: SnapshotView
  private let table: MACTable
  private let snapshot: Snapshot
  private var router: Router
  private var routerWithCache: Router

  init?(macs count: Int) {
    let table = MACTable(macsMax: min(count + Self.sources, MACTable.macsMaxLimit), seed: 7)
    let links = (1...Self.links).compactMap { number in
      UnderlayAddress("10.99.0.\(number)").map { peer in
        Snapshot.Interface(InterfaceIndex(number), .link(peer: peer, domains: [Self.domain]), mtuBytes: 1_500)
      }
    }
    guard links.count == Self.links,
      let snapshot = try? Snapshot(
        version: 1,
        interfaces: [Snapshot.Interface(Self.port, .port(domain: Self.domain), mtuBytes: 1_500)] + links,
        domains: [Snapshot.Domain(Self.domain, vni: Self.vni, macs: table)])
    else { return nil }
    self.count = count
    self.table = table
    macs = table.reference
    self.snapshot = snapshot
    view = snapshot.view
    router = Router(snapshot.view, cacheEnabled: false)
    routerWithCache = Router(snapshot.view)
    var learned = 0
    for number in 0..<count {
      if macs.learn(Self.mac(number), at: Self.location(number), nowSeconds: 1) == .learned { learned += 1 }
    }
    for number in 0..<Self.sources {
      if macs.learn(Self.source(number), at: Self.port, nowSeconds: 1) == .learned { learned += 1 }
    }
    guard learned == count + Self.sources, table.count == learned else { return nil }
  }

  @inline(__always)
  func withRouter(cacheEnabled: Bool, _ body: (inout Router) -> Int) -> Int {
    cacheEnabled ? body(&routerWithCache) : body(&router)
  }

  @inline(__always)
  static func mac(_ number: Int) -> UInt64 { 0x0200_0000_0000 | UInt64(truncatingIfNeeded: number &+ 1) }
  @inline(__always)
  static func location(_ number: Int) -> InterfaceIndex {
    InterfaceIndex(rawValue: UInt16(truncatingIfNeeded: 1 &+ (number & (links &- 1))))
  }
  /// One of the few MACs at the port.
  @inline(__always)
  static func source(_ number: Int) -> UInt64 {
    0x0600_0000_0000 | UInt64(truncatingIfNeeded: number & (sources &- 1))
  }
}

private func benchmarkDecision(_ report: Report) {
  let macs = MACTable(macsMax: 1_024, seed: 7)
  let domain = DomainIndex(0)
  let ports = 4
  guard
    let snapshot = try? Snapshot(
      version: 1,
      interfaces: (0..<ports).map { Snapshot.Interface(InterfaceIndex($0), .port(domain: domain), mtuBytes: 1_500) },
      domains: [Snapshot.Domain(domain, vni: 42, macs: macs)])
  else { return report.check(false, "lookup: a snapshot is made") }
  for number in 0..<ports { _ = macs.reference.learn(mac(number), at: InterfaceIndex(number), nowSeconds: 1) }

  report.table("routing decision, \(ports) ports", item: "frame") { table in
    for (name, cacheEnabled) in [("from the decision cache", true), ("made anew: learn and look up", false)] {
      var router = Router(snapshot.view, cacheEnabled: cacheEnabled)
      var wrong = 0
      table.measure(name, items: 10_000_000) { items in
        for item in 0..<items {
          let from = item & 3
          let to = (item &+ 1 &+ (item >> 2) % 3) & 3
          let decision = router.decide(
            source: mac(from), destination: mac(to), ingress: InterfaceIndex(from), domain: domain,
            now: TurnClock(seconds: 1))
          if !isUnicast(decision, InterfaceIndex(to)) { wrong += 1 }
        }
      }
      report.check(wrong == 0, "lookup: decisions \(name) are right")
    }
  }
}

/// VNET rules: one for each guest, and rules of higher scores that match no frame but have to be looked up first.
private func benchmarkRoutes(_ report: Report, rules: Int) {
  let domain = DomainIndex(0)
  let ports = 4
  // The three highest patterns, from any port and from one.
  let idle = (0..<2).flatMap { place in
    let from: VNETRoute.Origin = place == 0 ? .any : .interface(InterfaceIndex(0))
    let nobody = MACPattern.exact(MACAddress(bits: mac(1_000_000)))
    return [
      VNETRoute(source: nobody, destination: nobody, from: from, to: InterfaceIndex(0)),
      VNETRoute(source: nobody, destination: .not(MACAddress(bits: 0)), from: from, to: InterfaceIndex(0)),
      VNETRoute(source: .not(MACAddress(bits: 0)), destination: nobody, from: from, to: InterfaceIndex(0)),
    ]
  }
  let guests = rules - idle.count
  let routes = (0..<guests).map { number in
    VNETRoute(source: .any, destination: .exact(MACAddress(bits: mac(number))), to: InterfaceIndex(number & 3))
  }
  guard
    let snapshot = try? Snapshot(
      version: 1,
      interfaces: (0..<ports).map { Snapshot.Interface(InterfaceIndex($0), .port(domain: domain), mtuBytes: 1_500) },
      domains: [
        Snapshot.Domain(domain, vni: 42, macs: MACTable(macsMax: 16), forwarding: .routes(idle + routes))
      ])
  else { return report.check(false, "lookup: a snapshot with \(rules) rules is made") }

  let rows = [
    ("8 flows, from the decision cache", true, 8), ("8 flows, made anew", false, 8),
    ("every guest in random order, with the cache", true, guests), ("every guest in random order, anew", false, guests),
  ]
  report.table("routing decision, \(rules) VNET rules", item: "frame") { table in
    for (name, cacheEnabled, flows) in rows {
      var router = Router(snapshot.view, cacheEnabled: cacheEnabled)
      var wrong = 0
      var random = BenchmarkRandom(seed: 1)
      let now = TurnClock(seconds: 1)
      table.measure(name, items: 3_000_000) { items in
        for _ in 0..<items {
          let to = random.below(min(flows, guests))
          let from = (to &+ 1) & 3
          let decision = router.decide(
            source: mac(to ^ 1), destination: mac(to), ingress: InterfaceIndex(from), domain: domain, now: now)
          if !isUnicast(decision, InterfaceIndex(to & 3)) { wrong += 1 }
        }
      }
      report.check(wrong == 0, "lookup: decisions by \(rules) rules, \(name), are right")
    }
  }
}

@inline(__always)
func isUnicast(_ decision: Router.Decision, _ egress: InterfaceIndex) -> Bool {
  if case .unicast(let chosen) = decision.action { chosen == egress } else { false }
}

private func mac(_ number: Int) -> UInt64 { 0x0200_0000_0000 | UInt64(number + 1) }
