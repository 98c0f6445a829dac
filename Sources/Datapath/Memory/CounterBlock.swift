import Synchronization

/// The counters of one thing (a port, a link, a domain, a worker) as one worker counts them.
///
/// Exactly one thread adds; any thread reads. Adding is a plain load and store (relaxed, no bus lock), which is
/// right only because there is one writer. A reader sees each counter whole, but two counters of a busy
/// worker need not be of the same moment: for a consistent picture control asks the worker for an audit.
///
/// The block outlives every `Writer` made from it: control owns both ends and closes an interface at all
/// workers before it lets its blocks go.
@safe
public final class CounterBlock: @unchecked Sendable {
  private let cells: UnsafeMutablePointer<Atomic<UInt64>>

  public init() {
    // Rounded up to two cache lines, so that blocks of two workers never share a line.
    let bytes = (Counter.allCases.count * 8 + 127) / 128 * 128
    let raw = UnsafeMutableRawPointer.allocate(byteCount: bytes, alignment: 128)
    unsafe cells = raw.bindMemory(to: Atomic<UInt64>.self, capacity: bytes / 8)
    for index in 0..<bytes / 8 { unsafe (cells + index).initialize(to: Atomic(0)) }
  }

  deinit {
    unsafe UnsafeMutableRawPointer(cells).deallocate()
  }

  /// The value now; callable from any thread.
  public func value(_ counter: Counter) -> UInt64 {
    unsafe cells[counter.rawValue].load(ordering: .relaxed)
  }

  /// The one writer's handle. The caller sees to it that only one thread uses it.
  public var writer: Writer { unsafe Writer(cells: cells) }

  @safe
  public struct Writer: BitwiseCopyable, @unchecked Sendable {
    @usableFromInline let cells: UnsafeMutablePointer<Atomic<UInt64>>
    @inlinable init(cells: UnsafeMutablePointer<Atomic<UInt64>>) { unsafe self.cells = unsafe cells }

    @inline(always)
    public func add(_ counter: Counter, _ amount: Int = 1) {
      let cell = unsafe cells + counter.rawValue
      let old = unsafe cell.pointee.load(ordering: .relaxed)
      unsafe cell.pointee.store(old &+ UInt64(truncatingIfNeeded: amount), ordering: .relaxed)
    }

    @inline(always)
    public func value(_ counter: Counter) -> UInt64 {
      unsafe cells[counter.rawValue].load(ordering: .relaxed)
    }
  }
}
