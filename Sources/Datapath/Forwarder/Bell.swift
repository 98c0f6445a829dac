import Synchronization

/// Where a worker says that it sleeps, so that a neighbour wakes it only then.
///
/// The sleeper says so, then looks at its rings a last time; the neighbour pushes, then looks at the bell. Each side
/// has a full fence between its two steps, so at least one of them sees the other: no frame waits for a worker that
/// sleeps. Who rings takes the bell down, so a sleep costs one wake-up, however many neighbours push.
@safe
public final class Bell: @unchecked Sendable {
  private let padFirst = InlineArray<16, UInt64>(repeating: 0)
  private let isUp = Atomic<Bool>(false)
  private let padLast = InlineArray<15, UInt64>(repeating: 0)
  /// The sleeper's eventfd.
  public let waker: Int32

  public init(waker: Int32) { self.waker = waker }

  /// The sleeper is about to sleep; it looks at its rings after this.
  @inline(__always)
  func hang() {
    isUp.store(true, ordering: .relaxed)
    atomicMemoryFence(ordering: .sequentiallyConsistent)
  }

  /// The sleeper is awake.
  @inline(__always)
  func takeDown() { isUp.store(false, ordering: .relaxed) }

  /// A neighbour pushed something; true if it must wake the sleeper.
  @inline(__always)
  func mustRing() -> Bool {
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    guard isUp.load(ordering: .relaxed) else { return false }
    return isUp.exchange(false, ordering: .relaxed)
  }
}
