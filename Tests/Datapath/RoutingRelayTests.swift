import TestSupport
import Testing

@testable import Datapath

/// Routers in a ring, each with one port and a relay link to either neighbour; frames on a link keep their order, and
/// which link delivers next is a matter of the seed.
private struct Ring: ~Copyable {
  static let domain = DomainIndex(0)
  static let port = InterfaceIndex(0)
  static let left = InterfaceIndex(1)
  static let right = InterfaceIndex(2)

  struct Frame {
    let source: UInt64
    let destination: UInt64
  }

  let size: Int
  private let tables: [MACTable]
  private let snapshots: [Snapshot]
  private var one: Router
  private var two: Router
  private var three: Router
  /// What is on its way to a router's left or right link.
  private var queues: [[Frame]]
  private var random: SeededRandom
  /// Frames that routers took from a link.
  private(set) var forwards = 0
  /// Frames that reached a guest, by router.
  private(set) var delivered = [0, 0, 0]
  private(set) var drops: [Counter: Int] = [:]

  init(seed: UInt64, floodFramesPerSecondMax: Int = 0) throws {
    size = 3
    tables = (0..<3).map { MACTable(macsMax: 64, seed: seed + UInt64($0)) }
    var snapshots: [Snapshot] = []
    for number in 0..<3 {
      let left = UnderlayAddress(ipv4: UInt32((number + 2) % 3 + 1))
      let right = UnderlayAddress(ipv4: UInt32((number + 1) % 3 + 1))
      snapshots.append(
        try Snapshot(
          version: 1,
          interfaces: [
            Snapshot.Interface(Self.port, .port(domain: Self.domain), mtuBytes: 1450),
            Snapshot.Interface(Self.left, .link(peer: left, domains: [Self.domain], isRelay: true), mtuBytes: 1450),
            Snapshot.Interface(Self.right, .link(peer: right, domains: [Self.domain], isRelay: true), mtuBytes: 1450),
          ],
          domains: [
            Snapshot.Domain(
              Self.domain, vni: 1, macs: tables[number], floodFramesPerSecondMax: floodFramesPerSecondMax)
          ]))
    }
    self.snapshots = snapshots
    one = Router(snapshots[0].view)
    two = Router(snapshots[1].view)
    three = Router(snapshots[2].view)
    queues = [[Frame]](repeating: [], count: 6)
    random = SeededRandom(seed: seed)
  }

  /// A guest's frame enters at a router's port.
  mutating func enter(_ frame: Frame, at router: Int, now: TurnClock) {
    forward(frame, at: router, from: Self.port, now)
  }

  /// One frame goes one hop; false when none is on its way.
  mutating func step(now: TurnClock) -> Bool {
    let busy = queues.indices.filter { !queues[$0].isEmpty }
    guard let queue = busy.randomElement(using: &random) else { return false }
    takeHop(of: queue, now)
    return true
  }

  private mutating func takeHop(of queue: Int, _ now: TurnClock) {
    forwards += 1
    forward(queues[queue].removeFirst(), at: queue / 2, from: queue % 2 == 0 ? Self.left : Self.right, now)
  }

  /// Every frame that is on its way goes one hop, all in the same time: so what comes straight is before what comes
  /// round. False when none is on its way.
  mutating func stepAll(now: TurnClock) -> Bool {
    var remaining = queues.map(\.count)
    var isAny = false
    while let queue = queues.indices.filter({ remaining[$0] > 0 }).randomElement(using: &random) {
      isAny = true
      remaining[queue] -= 1
      takeHop(of: queue, now)
    }
    return isAny
  }

  /// Where a router has an address.
  func location(of mac: UInt64, at router: Int) -> InterfaceIndex { tables[router].reference.lookup(mac) }

  func isFrozen(_ mac: UInt64, at router: Int, now: TurnClock) -> Bool {
    tables[router].entries(nowSeconds: now.seconds).contains { $0.mac == mac && $0.isFrozen }
  }

  /// The way from a router to another's guest that takes the fewest hops.
  static func way(from router: Int, to other: Int) -> InterfaceIndex {
    router == other ? port : (router + 1) % 3 == other ? right : left
  }

  /// Loses one frame that is on its way, if there is one.
  mutating func lose() {
    let busy = queues.indices.filter { !queues[$0].isEmpty }
    guard let queue = busy.randomElement(using: &random) else { return }
    queues[queue].removeFirst()
  }

  private mutating func forward(_ frame: Frame, at router: Int, from ingress: InterfaceIndex, _ now: TurnClock) {
    let decision =
      switch router {
      case 0: Self.decide(&one, frame, ingress, now)
      case 1: Self.decide(&two, frame, ingress, now)
      default: Self.decide(&three, frame, ingress, now)
      }
    switch decision.action {
    case .unicast(let egress): put(frame, at: router, egress)
    case .flood(let targets): for egress in targets { put(frame, at: router, egress) }
    case .drop(let reason): drops[reason, default: 0] += 1
    }
  }

  private static func decide(
    _ router: inout Router, _ frame: Frame, _ ingress: InterfaceIndex, _ now: TurnClock
  ) -> Router.Decision {
    router.decide(
      source: frame.source, destination: frame.destination, ingress: ingress, domain: domain, now: now)
  }

  private mutating func put(_ frame: Frame, at router: Int, _ egress: InterfaceIndex) {
    switch egress {
    case Self.port: delivered[router] += 1
    // A router's left link ends at its left neighbour's right one.
    case Self.left: queues[(router + 2) % 3 * 2 + 1].append(frame)
    default: queues[(router + 1) % 3 * 2].append(frame)
    }
  }
}

@Suite struct RoutingRelayTests {
  private let broadcast = Ring.Frame(source: testMAC(1), destination: testBroadcast)
  private let unknown = Ring.Frame(source: testMAC(1), destination: testMAC(2))

  @Test func `A broadcast or an unknown destination in a ring of relays comes to rest, for 500 seeds`() throws {
    var most = 0
    var frozen = 0
    for seed in 1...500 as ClosedRange<UInt64> {
      var ring = try Ring(seed: seed)
      ring.enter(seed % 2 == 0 ? broadcast : unknown, at: Int(seed % 3), now: TurnClock(seconds: 1))
      // All in one second, as a storm would be.
      while ring.forwards < 10_000, ring.step(now: TurnClock(seconds: 1)) {}
      most = max(most, ring.forwards)
      let isFrozen = (0..<3).contains { ring.isFrozen(testMAC(1), at: $0, now: TurnClock(seconds: 1)) }
      frozen += isFrozen ? 1 : 0
      let reached = ring.delivered.enumerated().filter { $0.offset != Int(seed % 3) }.allSatisfy { $0.element > 0 }
      try #require(reached, "seed \(seed): the other two guests got it")
    }
    #expect(frozen == 500, "a loop ends by a freeze")
    #expect(most < 200, "\(most) hops")
  }

  @Test func `A guest that goes on sending is heard only a few times more while its address is frozen`() throws {
    for seed in 1...100 as ClosedRange<UInt64> {
      var ring = try Ring(seed: seed)
      var forwards = 0
      for number in 0..<200 {
        ring.enter(broadcast, at: 0, now: TurnClock(seconds: 1))
        while ring.forwards < 100_000, ring.step(now: TurnClock(seconds: 1)) {}
        if number == 100 { forwards = ring.forwards }
      }
      // The first hundred end the storm; of the others none goes further than one round.
      try #require(ring.forwards - forwards <= 99 * 6, "seed \(seed): \(ring.forwards - forwards) hops")
    }
  }

  /// Enters a frame, lets it go where it goes, and says how often each guest got it.
  private func deliveries(_ ring: inout Ring, _ frame: Ring.Frame, at router: Int, now: TurnClock) -> [Int] {
    let before = ring.delivered
    let hopsMax = ring.forwards + 10_000
    ring.enter(frame, at: router, now: now)
    while ring.forwards < hopsMax, ring.stepAll(now: now) {}
    return zip(ring.delivered, before).map { $0 - $1 }
  }

  /// Three guests broadcast, in a random order and into each other's storms, until every router holds each of them.
  private func freezeAll(_ ring: inout Ring, seed: UInt64, now: TurnClock) -> Bool {
    var random = SeededRandom(seed: seed)
    for _ in 0..<16 {
      for guest in (0..<3).shuffled(using: &random) {
        ring.enter(Ring.Frame(source: testMAC(guest + 1), destination: testBroadcast), at: guest, now: now)
        for _ in 0..<Int.random(in: 0...20, using: &random) { _ = ring.stepAll(now: now) }
      }
    }
    while ring.forwards < 100_000, ring.stepAll(now: now) {}
    return ring.forwards < 100_000
  }

  @Test func `In a ring that froze, each broadcast comes once and each guest is reached, for 500 seeds`() throws {
    var frozen = 0
    for seed in 1...500 as ClosedRange<UInt64> {
      var ring = try Ring(seed: seed)
      try #require(freezeAll(&ring, seed: seed, now: TurnClock(seconds: 1)), "seed \(seed): it comes to rest")
      for second in [2, 30, MACTable.freezeSeconds] {
        let now = TurnClock(seconds: second)
        for guest in 0..<3 {
          let mac = testMAC(guest + 1)
          for router in 0..<3 {
            frozen += ring.isFrozen(mac, at: router, now: now) ? 1 : 0
            try #require(
              ring.location(of: mac, at: router) == Ring.way(from: router, to: guest),
              "seed \(seed): guest \(guest) at router \(router)")
          }
          let broadcast = Ring.Frame(source: mac, destination: testBroadcast)
          let copies = deliveries(&ring, broadcast, at: guest, now: now)
          try #require(copies == (0..<3).map { $0 == guest ? 0 : 1 }, "seed \(seed): broadcast of guest \(guest)")
          let unknown = Ring.Frame(source: mac, destination: testMAC(99))
          let floods = deliveries(&ring, unknown, at: guest, now: now)
          try #require(floods == copies, "seed \(seed): a frame of guest \(guest) to nobody")
          for other in 0..<3 where other != guest {
            let frame = Ring.Frame(source: mac, destination: testMAC(other + 1))
            let reached = deliveries(&ring, frame, at: guest, now: now)
            try #require(reached == (0..<3).map { $0 == other ? 1 : 0 }, "seed \(seed): \(guest) to \(other)")
          }
        }
      }
    }
    #expect(frozen > 500 * 3 * 3, "it is the freeze that does it")
  }

  @Test func `In a ring whose hops take any time a frozen guest is reached, and no broadcast comes twice`() throws {
    let later = TurnClock(seconds: 30)
    var reachable = 0
    for seed in 1...500 as ClosedRange<UInt64> {
      var ring = try Ring(seed: seed)
      let now = TurnClock(seconds: 1)
      var random = SeededRandom(seed: seed)
      for _ in 0..<16 {
        for guest in (0..<3).shuffled(using: &random) {
          ring.enter(Ring.Frame(source: testMAC(guest + 1), destination: testBroadcast), at: guest, now: now)
          for _ in 0..<Int.random(in: 0...20, using: &random) { _ = ring.step(now: now) }
        }
      }
      while ring.forwards < 100_000, ring.step(now: now) {}
      for guest in 0..<3 {
        let broadcast = Ring.Frame(source: testMAC(guest + 1), destination: testBroadcast)
        let copies = deliveries(&ring, broadcast, at: guest, now: later)
        try #require(copies[guest] == 0 && copies.max() == 1, "seed \(seed): broadcast of \(guest): \(copies)")
        for other in 0..<3 where other != guest {
          // A router that saw too few moves to freeze a guest follows each of its frames, whichever way it came.
          let isHeld = (0..<3).allSatisfy { ring.isFrozen(testMAC(other + 1), at: $0, now: later) }
          guard isHeld else { continue }
          reachable += 1
          let frame = Ring.Frame(source: testMAC(guest + 1), destination: testMAC(other + 1))
          let reached = deliveries(&ring, frame, at: guest, now: later)
          try #require(reached == (0..<3).map { $0 == other ? 1 : 0 }, "seed \(seed): \(guest) to \(other)")
        }
      }
    }
    #expect(reachable > 500, "\(reachable) of 3,000")
  }

  @Test func `After the freeze a broken ring forwards to the guest again`() throws {
    var ring = try Ring(seed: 1)
    ring.enter(broadcast, at: 0, now: TurnClock(seconds: 1))
    while ring.forwards < 10_000, ring.step(now: TurnClock(seconds: 1)) {}
    let later = TurnClock(seconds: 2 + MACTable.freezeSeconds)
    let before = ring.delivered
    ring.enter(broadcast, at: 0, now: later)
    while ring.forwards < 20_000, ring.step(now: later) {}
    let reached = ring.delivered[1] > before[1] && ring.delivered[2] > before[2]
    #expect(reached)
  }

  @Test func `What no freeze ends, the limit of floods bounds`() throws {
    let limit = 1_000
    var unlimited = 0
    for (framesMax, seconds) in [(0, 1), (limit, 2)] {
      for seed in 1...4 as ClosedRange<UInt64> {
        var ring = try Ring(seed: seed, floodFramesPerSecondMax: framesMax)
        // Only one of the two copies goes on round the ring: each router hears the address from one side alone.
        ring.enter(broadcast, at: 0, now: TurnClock(seconds: 1))
        ring.lose()
        // A hop takes 10 µs: 100,000 a second, if nobody stops it. The guest goes on sending, each time another
        // address, so that none of them freezes.
        let hops = 100_000 * seconds
        for hop in 0..<hops {
          let now = TurnClock(nanoseconds: UInt64(hop) * 10_000)
          if hop % 1_000 == 0 {
            ring.enter(Ring.Frame(source: testMAC(2 + hop), destination: testBroadcast), at: 0, now: now)
            ring.lose()
          }
          _ = ring.step(now: now)
        }
        if framesMax == 0 {
          unlimited = max(unlimited, ring.forwards)
        } else {
          // Each router lets its rate and its burst through, each flood to at most two links; what a guest sends may be
          // dropped too.
          let bound = 3 * 2 * (limit * seconds + limit / 10 + 1)
          try #require(ring.forwards <= bound, "seed \(seed): \(ring.forwards) hops")
          try #require(ring.drops[.dropFloodLimit, default: 0] > 0)
        }
      }
    }
    #expect(unlimited > 50_000, "the storm is one without the limit")
  }

  @Test func `The limit lets a burst through and then its rate, a super-frame as its segments`() {
    let limit = FloodLimit(framesPerSecondMax: 1_000)
    var earliest: UInt64 = 0
    func passed(_ count: Int, _ frames: Int, from start: UInt64, every step: UInt64) -> Int {
      (0..<count).filter { limit.allows(frames: frames, now: start + UInt64($0) * step, earliest: &earliest) }.count
    }
    let second: UInt64 = 1_000_000_000
    #expect(passed(1_000, 1, from: second, every: 0) == 100)
    // Ten a millisecond are offered for a second.
    #expect(passed(10_000, 1, from: second, every: 100_000) == 1_000)
    // Rested, it has a burst again, which one super-frame may overdraw.
    #expect(passed(10, 40, from: 10 * second, every: 0) == 3)
    // 100 and 1,000 frames are 27 super-frames, and the last overdraws again.
    #expect(passed(1_000, 40, from: 11 * second, every: second / 1_000) == 28)
    // A small limit still lets a batch through.
    let small = FloodLimit(framesPerSecondMax: 1)
    earliest = 0
    let burst = (0..<1_000).filter { _ in small.allows(frames: 1, now: 5, earliest: &earliest) }.count
    #expect(burst == 64)
  }

  @Test func `While an address is frozen its floods are cut, and its other frames go on`() throws {
    let macs = MACTable(macsMax: 64, seed: 1)
    let (portA, portB, relay, other) = (InterfaceIndex(0), InterfaceIndex(1), InterfaceIndex(2), InterfaceIndex(3))
    let domain = DomainIndex(0)
    let snapshot = try Snapshot(
      version: 1,
      interfaces: [
        Snapshot.Interface(portA, .port(domain: domain), mtuBytes: 1450),
        Snapshot.Interface(portB, .port(domain: domain), mtuBytes: 1450),
        Snapshot.Interface(
          relay, .link(peer: UnderlayAddress(ipv4: 1), domains: [domain], isRelay: true), mtuBytes: 1450),
        Snapshot.Interface(
          other, .link(peer: UnderlayAddress(ipv4: 2), domains: [domain], isRelay: true), mtuBytes: 1450),
      ], domains: [Snapshot.Domain(domain, vni: 1, macs: macs)])
    defer { withExtendedLifetime(snapshot) {} }
    var router = Router(snapshot.view)
    var witness = Router(snapshot.view)
    func decide(_ router: inout Router, _ source: Int, _ destination: UInt64, _ ingress: InterfaceIndex)
      -> Router.Decision
    {
      router.decide(
        source: testMAC(source), destination: destination, ingress: ingress, domain: domain,
        now: TurnClock(seconds: 1))
    }
    func targets(_ decision: Router.Decision) -> [InterfaceIndex]? {
      if case .flood(let targets) = decision.action { Array(targets) } else { nil }
    }
    _ = decide(&router, 2, testBroadcast, portB)
    let (held, elsewhere) = (portA, relay)
    for move in 0...MACTable.movesMax { _ = decide(&router, 1, testBroadcast, [portA, relay, other][move % 3]) }
    // Wherever the moves end, another worker has cached a flood from there.
    let last = [portA, relay, other][MACTable.movesMax % 3]
    let before = decide(&witness, 1, testBroadcast, last)
    #expect(before.learned == .known && targets(before)?.count == 3)
    let froze = decide(&router, 1, testBroadcast, relay)
    #expect(froze.action == .drop(.dropFrozenSource) && froze.learned == .froze)
    let after = decide(&witness, 1, testBroadcast, last)
    #expect(after.action == .drop(.dropFrozenSource) && after.learned == .frozen)
    for _ in 0..<2 {
      let broadcast = decide(&router, 1, testBroadcast, elsewhere)
      #expect(broadcast.action == .drop(.dropFrozenSource) && broadcast.learned == .frozen)
      let unknown = decide(&router, 1, testMAC(9), elsewhere)
      #expect(unknown.action == .drop(.dropFrozenSource))
      let unicast = decide(&router, 1, testMAC(2), elsewhere)
      #expect(unicast.action == .unicast(portB) && unicast.learned == .frozen)
      // A port that holds it is the guest's own: its floods go everywhere.
      let own = decide(&witness, 1, testBroadcast, held)
      #expect(own.learned == .held && targets(own) == [portB, relay, other])
    }
    // The same with the place that holds it behind a relay: to ports alone, the frame that froze it too.
    for move in 0...MACTable.movesMax { _ = decide(&router, 3, testBroadcast, [relay, portA, other][move % 3]) }
    let frozeHere = decide(&router, 3, testBroadcast, relay)
    #expect(frozeHere.learned == .frozeHere && targets(frozeHere) == [portA, portB])
    #expect(macs.reference.lookup(testMAC(3)) == relay)
    let relayed = decide(&router, 3, testBroadcast, relay)
    #expect(relayed.learned == .held && targets(relayed) == [portA, portB])
    let unknown = decide(&witness, 3, testMAC(9), relay)
    #expect(targets(unknown) == [portA, portB])
    let unicast = decide(&witness, 3, testMAC(2), relay)
    #expect(unicast.action == .unicast(portB))
  }
}
