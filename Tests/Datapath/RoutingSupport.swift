import Glibc

@testable import Datapath

/// Numbers from a seed (SplitMix64), so that a failing run can be repeated.
struct RoutingRandom: RandomNumberGenerator {
  private var state: UInt64
  init(_ seed: UInt64) { state = seed }
  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var z = state
    z = (z ^ z >> 30) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ z >> 27) &* 0x94D0_49BB_1331_11EB
    return z ^ z >> 31
  }
}

/// A unicast MAC for a test: 02:00:00:00:00:00 and a number.
func testMAC(_ number: Int) -> UInt64 { 0x02_00_00_00_00_00 + UInt64(number) }
let testBroadcast: UInt64 = 0xFFFF_FFFF_FFFF

/// Runs a body on `count` threads at once and waits for all of them.
func onThreads(_ count: Int, _ body: @escaping @Sendable (Int) -> Void) {
  final class Start {
    let index: Int
    let body: @Sendable (Int) -> Void
    init(_ index: Int, _ body: @escaping @Sendable (Int) -> Void) {
      self.index = index
      self.body = body
    }
  }
  let threads = (0..<count).map { index -> pthread_t in
    var thread = pthread_t()
    let start = unsafe Unmanaged.passRetained(Start(index, body)).toOpaque()
    let status = unsafe pthread_create(
      &thread, nil,
      { raw in
        let start = unsafe Unmanaged<Start>.fromOpaque(raw!).takeRetainedValue()
        start.body(start.index)
        return nil
      }, start)
    precondition(status == 0, "no thread")
    return thread
  }
  for thread in threads { pthread_join(thread, nil) }
}
