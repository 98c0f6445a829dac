import Datapath

/// The MAC table, in random order over tables of three sizes: the first fits the first-level cache, the last no cache
/// of a core. The worker's decision cache stands beside it, for the few pairs of addresses of a busy moment.
func benchmarkLookup(_ report: Report) {
  for macs in [1_000, 100_000, 1_000_000] {
    let count = report.size(macs, smoke: 2_000)
    let table = MACTable(macsMax: MACTable.macsMaxLimit >= count * 2 ? count * 2 : MACTable.macsMaxLimit, seed: 7)
    let reference = table.reference
    var learned = 0
    for number in 0..<count {
      if reference.learn(mac(number), at: location(number), nowSeconds: 1) == .learned { learned += 1 }
    }
    report.check(learned == count && table.count == count, "lookup: \(count) MACs learned")

    report.table("MAC table, \(count) MACs", item: "frame")
    var wrong = 0
    var random = BenchmarkRandom(seed: 1)
    report.measure("look up a known MAC", items: 10_000_000) { items in
      for _ in 0..<items {
        let number = random.below(count)
        if reference.lookup(mac(number)) != location(number) { wrong += 1 }
      }
    }
    report.check(wrong == 0, "lookup: every known MAC is found where it was learned")
    var found = 0
    report.measure("look up an unknown MAC", items: 10_000_000) { items in
      for _ in 0..<items {
        let number = random.below(count)
        if reference.lookup(mac(number) ^ 1 << 32) != .none { found += 1 }
      }
    }
    report.check(found == 0, "lookup: no unknown MAC is found")
    var changed = 0
    report.measure("learn a known MAC, in the same second", items: 10_000_000) { items in
      for _ in 0..<items {
        let number = random.below(count)
        if reference.learn(mac(number), at: location(number), nowSeconds: 1) != .known { changed += 1 }
      }
    }
    report.check(changed == 0, "lookup: learning what is known changes nothing")
  }
  benchmarkDecision(report)
  for rules in [10, 1_000, 10_000] { benchmarkRoutes(report, rules: rules) }
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

  report.table("routing decision, \(ports) ports", item: "frame")
  for (name, cacheEnabled) in [("from the decision cache", true), ("made anew: learn and look up", false)] {
    var router = Router(snapshot.view, cacheEnabled: cacheEnabled)
    var wrong = 0
    report.measure(name, items: 10_000_000) { items in
      for item in 0..<items {
        let from = item & 3
        let to = (item &+ 1 &+ (item >> 2) % 3) & 3
        let decision = router.decide(
          source: mac(from), destination: mac(to), ingress: InterfaceIndex(from), domain: domain,
          now: TurnClock(seconds: 1))
        if !isUnicast(decision, to) { wrong += 1 }
      }
    }
    report.check(wrong == 0, "lookup: decisions \(name) are right")
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

  report.table("routing decision, \(rules) VNET rules", item: "frame")
  let rows = [
    ("8 flows, from the decision cache", true, 8), ("8 flows, made anew", false, 8),
    ("every guest in random order, with the cache", true, guests), ("every guest in random order, anew", false, guests),
  ]
  for (name, cacheEnabled, flows) in rows {
    var router = Router(snapshot.view, cacheEnabled: cacheEnabled)
    var wrong = 0
    var random = BenchmarkRandom(seed: 1)
    let now = TurnClock(seconds: 1)
    report.measure(name, items: 5_000_000) { items in
      for _ in 0..<items {
        let to = random.below(min(flows, guests))
        let from = (to &+ 1) & 3
        let decision = router.decide(
          source: mac(to ^ 1), destination: mac(to), ingress: InterfaceIndex(from), domain: domain, now: now)
        if !isUnicast(decision, to & 3) { wrong += 1 }
      }
    }
    report.check(wrong == 0, "lookup: decisions by \(rules) rules, \(name), are right")
  }
}

private func isUnicast(_ decision: Router.Decision, _ egress: Int) -> Bool {
  if case .unicast(let chosen) = decision.action { chosen.index == egress } else { false }
}

private func mac(_ number: Int) -> UInt64 { 0x0200_0000_0000 | UInt64(number + 1) }
private func location(_ number: Int) -> InterfaceIndex { InterfaceIndex(number & 0xFF) }
