import CLinux
import Synchronization

/// A bounded lock-free queue between exactly one producer and exactly one consumer.
///
/// The contract
/// - One thread holds the `Producer`, one the `Consumer`; each end is made once (a second one traps). An end may be
///   handed to another thread only when the hand-over itself orders memory (a thread start, another ring).
/// - Only the producer writes `tail`, only the consumer writes `head`. Both only grow; `tail - head` is the fill and
///   never leaves 0...capacity. Neither side ever steps the other's cursor: that is what makes it free of locks.
/// - The producer writes items, then stores `tail` with release; the consumer loads `tail` with acquire, then reads.
///   The way back is the same with `head`, so an item's place is not written again before it was read.
/// - Each side keeps a copy of the other's cursor and looks again only when the copy says full (or empty): in the
///   steady state the two cores exchange a cache line once a batch. One item a call is 3 to 4 times slower than
///   batches of 32.
/// - Cursors sit two cache lines apart: the adjacent-line prefetcher fetches lines in pairs.
/// - Nothing wakes a sleeping neighbour: who pushes must know whether the other side sleeps.
@safe
public final class SPSCRing<Element: BitwiseCopyable>: @unchecked Sendable {
  private let padFirst = InlineArray<16, UInt64>(repeating: 0)
  @usableFromInline let head = Atomic<Int>(0)
  private let padHead = InlineArray<15, UInt64>(repeating: 0)
  @usableFromInline let tail = Atomic<Int>(0)
  private let padTail = InlineArray<15, UInt64>(repeating: 0)
  @usableFromInline let items: UnsafeMutablePointer<Element>
  @usableFromInline let mask: Int
  private let producerMade = Atomic<Bool>(false)
  private let consumerMade = Atomic<Bool>(false)

  public var capacity: Int { mask + 1 }

  /// - Parameter capacity: items, rounded up to a power of two.
  public init(capacity: Int) {
    precondition(capacity > 0 && capacity <= 1 << 30, "ring capacity out of range")
    var size = 1
    while size < capacity { size <<= 1 }
    mask = size - 1
    let raw = UnsafeMutableRawPointer.allocate(byteCount: size * MemoryLayout<Element>.stride, alignment: 128)
    unsafe items = raw.bindMemory(to: Element.self, capacity: size)
  }

  deinit {
    unsafe UnsafeMutableRawPointer(items).deallocate()
  }

  /// The pushing end; traps when it was made before.
  public func makeProducer() -> Producer {
    precondition(!producerMade.exchange(true, ordering: .relaxed), "the ring has a producer")
    return Producer(ring: self)
  }

  /// The popping end; traps when it was made before.
  public func makeConsumer() -> Consumer {
    precondition(!consumerMade.exchange(true, ordering: .relaxed), "the ring has a consumer")
    return Consumer(ring: self)
  }

  public struct Producer: ~Copyable, Sendable {
    @usableFromInline let ring: SPSCRing
    @usableFromInline var tail = 0
    @usableFromInline var headSeen = 0

    @inlinable init(ring: SPSCRing) { self.ring = ring }

    /// How many items fit now; looks at the other end's cursor only when fewer than `wanted` seem to.
    @inlinable
    public mutating func room(for wanted: Int) -> Int {
      if ring.mask + 1 - (tail &- headSeen) < wanted { headSeen = ring.head.load(ordering: .acquiring) }
      return ring.mask + 1 - (tail &- headSeen)
    }

    /// Pushes as many of `batch` as fit, the first ones first; returns how many.
    @inlinable
    public mutating func push(_ batch: Span<Element>) -> Int {
      var free = ring.mask + 1 - (tail &- headSeen)
      if free < batch.count {
        headSeen = ring.head.load(ordering: .acquiring)
        free = ring.mask + 1 - (tail &- headSeen)
      }
      let count = min(free, batch.count)
      guard count > 0 else { return 0 }
      // At most two runs: up to the end of the storage, then from its start.
      let start = tail & ring.mask
      let run = min(count, ring.mask + 1 - start)
      unsafe batch.withUnsafeBufferPointer { source in
        unsafe (ring.items + start).update(from: source.baseAddress!, count: run)
        unsafe ring.items.update(from: source.baseAddress! + run, count: count - run)
      }
      tail &+= count
      ring.tail.store(tail, ordering: .releasing)
      return count
    }

    /// Brings the places of the next `count` items near, all at once: written one by one each would be waited for, as
    /// the consumer's cache has its line.
    @inline(__always)
    public func prefetch(_ count: Int) {
      let step = max(1, 64 / MemoryLayout<Element>.stride)
      var place = 0
      while place < count {
        unsafe clinux_prefetch_to_write(ring.items + ((tail &+ place) & ring.mask))
        place &+= step
      }
    }

    /// Puts an item behind the others, where the consumer does not see it before `publish`. The caller has asked for
    /// `room`; without any it traps.
    @inlinable
    public mutating func stage(_ item: Element) {
      precondition(tail &- headSeen <= ring.mask, "an item is staged that does not fit on the ring")
      unsafe ring.items[tail & ring.mask] = item
      tail &+= 1
    }

    /// Lets the consumer see all that was staged.
    @inlinable
    public mutating func publish() { ring.tail.store(tail, ordering: .releasing) }

    /// Pushes one item; false when the ring is full.
    @inlinable
    public mutating func push(_ item: Element) -> Bool {
      if tail &- headSeen > ring.mask {
        headSeen = ring.head.load(ordering: .acquiring)
        if tail &- headSeen > ring.mask { return false }
      }
      unsafe ring.items[tail & ring.mask] = item
      tail &+= 1
      ring.tail.store(tail, ordering: .releasing)
      return true
    }
  }

  public struct Consumer: ~Copyable, Sendable {
    @usableFromInline let ring: SPSCRing
    @usableFromInline var head = 0
    @usableFromInline var tailSeen = 0

    @inlinable init(ring: SPSCRing) { self.ring = ring }

    /// Pops up to `batch.count` items into the front of `batch`, the oldest first; returns how many.
    @inlinable
    public mutating func pop(into batch: inout MutableSpan<Element>) -> Int {
      var ready = tailSeen &- head
      if ready < batch.count {
        tailSeen = ring.tail.load(ordering: .acquiring)
        ready = tailSeen &- head
      }
      let count = min(ready, batch.count)
      guard count > 0 else { return 0 }
      let start = head & ring.mask
      let run = min(count, ring.mask + 1 - start)
      unsafe batch.withUnsafeMutableBufferPointer { destination in
        unsafe destination.baseAddress!.update(from: ring.items + start, count: run)
        unsafe (destination.baseAddress! + run).update(from: ring.items, count: count - run)
      }
      head &+= count
      ring.head.store(head, ordering: .releasing)
      return count
    }

    public var capacity: Int { ring.capacity }

    /// How many items are there now, at most `wanted`.
    @inlinable
    public mutating func ready(_ wanted: Int) -> Int {
      if tailSeen &- head < wanted { tailSeen = ring.tail.load(ordering: .acquiring) }
      return min(tailSeen &- head, wanted)
    }

    /// Brings the oldest `count` items near, all at once: read one by one each would be waited for, as its line is
    /// still in the producer's cache.
    @inline(__always)
    public func prefetch(_ count: Int) {
      let step = max(1, 64 / MemoryLayout<Element>.stride)
      var place = 0
      while place < count {
        unsafe clinux_prefetch(ring.items + ((head &+ place) & ring.mask))
        place &+= step
      }
    }

    /// Reads the oldest item, which keeps its place until `free`; traps where `ready` has not seen one.
    @inlinable
    public mutating func read() -> Element {
      precondition(tailSeen != head, "an item is read that is not on the ring")
      let item = unsafe ring.items[head & ring.mask]
      head &+= 1
      return item
    }

    /// Gives the producer the places of all that was read.
    @inlinable
    public mutating func free() { ring.head.store(head, ordering: .releasing) }

    /// Whether nothing is there now.
    @inlinable
    public mutating func isEmpty() -> Bool {
      if tailSeen != head { return false }
      tailSeen = ring.tail.load(ordering: .acquiring)
      return tailSeen == head
    }

    /// Pops the oldest item; nil when the ring is empty.
    @inlinable
    public mutating func pop() -> Element? {
      if tailSeen == head {
        tailSeen = ring.tail.load(ordering: .acquiring)
        if tailSeen == head { return nil }
      }
      let item = unsafe ring.items[head & ring.mask]
      head &+= 1
      ring.head.store(head, ordering: .releasing)
      return item
    }
  }
}

extension Batch {
  /// Appends up to `most` items of a ring, the oldest first; returns how many.
  @inlinable
  public mutating func append(from ring: inout SPSCRing<Element>.Consumer, upTo most: Int) -> Int {
    let wanted = min(most, room)
    guard wanted > 0 else { return 0 }
    var span = items.mutableSpan(from: used, count: wanted)
    let count = ring.pop(into: &span)
    used += count
    return count
  }
}
