import Datapath

/// Frames from a port that leave by VXLAN links, in memory on one core: headers are read, the frame is routed among
/// 1 M MACs, and its VXLAN header is written in front of it.
///
/// Frames lie in as many slots as one receive fills under load, and a batch gets its destinations just before it is
/// routed, as if it had been received: uniform over all MACs, so nothing of the table is warm. What that alone costs is
/// a row of its own, and is within all others.
func benchmarkRoute(_ report: Report) {
  let macs = report.size(1_000_000, smoke: 2_000)
  guard let made = RouteBench(macs: macs) else {
    return report.check(false, "route: an arena and a snapshot are made")
  }
  var bench = consume made
  report.table("route + encapsulate, in memory, one core, \(macs) MACs", item: "frame") { table in
    for way in RouteBench.Way.allCases {
      table.measure(way.rawValue, items: 6_400_000) { items in
        for _ in 0..<max(1, items / RouteBench.batchFrames) { bench.turn(way) }
      }
    }
  }
  report.check(bench.wrong == 0, "route: every frame goes to its link")
  report.check(bench.headersAreRight, "route: every frame has its VXLAN header")
}

private struct RouteBench: ~Copyable {
  enum Way: String, CaseIterable {
    case parsed = "parse with flow hash, route, VXLAN header"
    case parsedPrefetched = "the same, prefetched some frames ahead"
    case addresses = "read addresses, route, VXLAN header"
    case addressesPrefetched = "the same, prefetched some frames ahead, no flow hash"
    case receive = "destinations written, and nothing else"

    var isPrefetched: Bool { self == .parsedPrefetched || self == .addressesPrefetched }
    var isParsed: Bool { self == .parsed || self == .parsedPrefetched }
  }

  static let batchFrames = 64
  private static let frameBytes = 64
  /// From one slot to the next, in words of 8 bytes: not a power of two, as in the arena, or slots would fight for the
  /// same cache sets. The frame starts after the first words, which are its headroom.
  private static let strideWords = 264
  private static let headroomWords = 8
  /// MACs were all heard in this second.
  private static let now = TurnClock(seconds: 1)

  private var slots = FixedArray(repeating: UInt64(0), count: batchFrames * strideWords)
  private var router: Router
  private let scene: RoutingScene
  private var random = BenchmarkRandom(seed: 5)
  private var numbers = FixedArray(repeating: 0, count: batchFrames)
  private var flowHashes = FixedArray(repeating: UInt32(0), count: batchFrames)
  private(set) var wrong = 0

  init?(macs: Int) {
    guard let scene = RoutingScene(macs: macs) else { return nil }
    self.scene = scene
    router = Router(scene.view)
    for slot in 0..<Self.batchFrames {
      let bytes = udpFrame(number: slot, count: Self.frameBytes)
      write(frame: bytes, slot, source: RoutingScene.source(slot))
    }
  }

  /// All of the source's address but what `receive` writes.
  private mutating func write(frame bytes: [UInt8], _ slot: Int, source: UInt64) {
    var words = slots.mutableSpan(from: slot * Self.strideWords + Self.headroomWords, count: Self.frameBytes / 8)
    var frame = unsafe words.mutableBytes
    for place in bytes.indices { frame.storeBytes(of: bytes[place], toByteOffset: place, as: UInt8.self) }
    frame.storeBytes(of: UInt32(truncatingIfNeeded: source).bigEndian, toByteOffset: 8, as: UInt32.self)
  }

  /// A batch of frames all the way.
  @inline(__always)
  mutating func turn(_ way: Way) {
    receive()
    if way == .receive { return }
    let ahead = way.isPrefetched ? Router.prefetchFrames : 0
    for place in 0..<ahead { prefetch(place) }
    for place in 0..<Self.batchFrames {
      if way.isPrefetched, place + ahead < Self.batchFrames { prefetch(place + ahead) }
      forward(place, isParsed: way.isParsed)
    }
  }

  @inline(__always)
  private mutating func receive() {
    for place in 0..<Self.batchFrames {
      let number = random.below(scene.count)
      numbers[place] = number
      let addresses = RoutingScene.mac(number) << 16 | RoutingScene.source(0) >> 32
      slots[place &* Self.strideWords &+ Self.headroomWords] = addresses.bigEndian
    }
  }

  @inline(__always)
  private func prefetch(_ place: Int) {
    router.prefetch(domain: RoutingScene.domain) { EthernetView(frame(place))?.destination.bits }
  }

  @inline(__always)
  private mutating func forward(_ place: Int, isParsed: Bool) {
    let source: UInt64
    let destination: UInt64
    if isParsed {
      guard let parsed = ParsedFrame(frame(place)) else {
        wrong += 1
        return
      }
      // What a transmit stage would read.
      flowHashes[place] = parsed.flowHash
      source = parsed.source.bits
      destination = parsed.destination.bits
    } else {
      guard let frame = EthernetView(frame(place)) else {
        wrong += 1
        return
      }
      source = frame.source.bits
      destination = frame.destination.bits
    }
    let decision = router.decide(
      source: source, destination: destination, ingress: RoutingScene.port, domain: RoutingScene.domain, now: Self.now)
    write(VXLANHeader(vni: RoutingScene.vni), place)
    let isRight = isUnicast(decision, RoutingScene.location(numbers[place]))
    wrong += isRight ? 0 : 1
  }

  @inline(__always)
  @_lifetime(borrow self)
  private func frame(_ place: Int) -> RawSpan {
    let words = slots.span(from: place &* Self.strideWords &+ Self.headroomWords, count: Self.frameBytes / 8)
    return unsafe words.bytes
  }

  /// In front of the frame.
  @inline(__always)
  private mutating func write(_ header: VXLANHeader, _ place: Int) {
    var words = slots.mutableSpan(from: place &* Self.strideWords &+ Self.headroomWords &- 1, count: 1)
    var bytes = unsafe words.mutableBytes
    header.write(into: &bytes)
  }

  /// Whether all headers are there, as RFC 7348 has them.
  var headersAreRight: Bool {
    (0..<Self.batchFrames).allSatisfy { place in
      slots[place * Self.strideWords + Self.headroomWords - 1] == VXLANHeader.networkOrder(vni: RoutingScene.vni)
    }
  }
}
