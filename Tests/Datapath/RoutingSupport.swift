import Glibc

@testable import Datapath

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
