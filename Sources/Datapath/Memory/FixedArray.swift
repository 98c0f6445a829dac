/// A table whose size is settled when it is made: memory that never moves and never grows.
///
/// The data path uses it where an `Array` would check for uniqueness, retain, or reallocate.
/// One owner; every access is bounds-checked. The base is aligned to 128 bytes, two cache lines, because
/// the adjacent-line prefetcher fetches lines in pairs.
@safe
public struct FixedArray<Element: BitwiseCopyable>: ~Copyable, @unchecked Sendable {
  @usableFromInline let base: UnsafeMutablePointer<Element>
  public let count: Int

  /// Allocates `count` elements, each a copy of `element`.
  public init(repeating element: Element, count: Int) {
    precondition(count >= 0)
    self.count = count
    let raw = UnsafeMutableRawPointer.allocate(
      byteCount: max(1, count * MemoryLayout<Element>.stride), alignment: max(128, MemoryLayout<Element>.alignment))
    unsafe base = raw.bindMemory(to: Element.self, capacity: count)
    unsafe base.initialize(repeating: element, count: count)
  }

  deinit {
    unsafe UnsafeMutableRawPointer(base).deallocate()
  }

  @inlinable @inline(always)
  public subscript(index: Int) -> Element {
    unsafeAddress {
      precondition(UInt(bitPattern: index) < UInt(bitPattern: count), "index out of range")
      return unsafe UnsafePointer(base + index)
    }
    unsafeMutableAddress {
      precondition(UInt(bitPattern: index) < UInt(bitPattern: count), "index out of range")
      return unsafe base + index
    }
  }

  /// The address of one element, for the kernel: it stays valid until the array goes.
  @unsafe @inlinable @inline(always)
  public func address(of index: Int) -> UnsafeMutablePointer<Element> {
    precondition(UInt(bitPattern: index) < UInt(bitPattern: count), "index out of range")
    return unsafe base + index
  }

  /// The elements from `start`, `length` of them, as a span.
  @inlinable @inline(always)
  @_lifetime(borrow self)
  public func span(from start: Int = 0, count length: Int) -> Span<Element> {
    precondition(start >= 0 && length >= 0 && length <= count - start, "span out of range")
    let span = unsafe Span(_unsafeStart: base + start, count: length)
    return unsafe _overrideLifetime(span, borrowing: self)
  }

  /// The same, writable.
  @inlinable @inline(always)
  @_lifetime(&self)
  public mutating func mutableSpan(from start: Int = 0, count length: Int) -> MutableSpan<Element> {
    precondition(start >= 0 && length >= 0 && length <= count - start, "span out of range")
    let span = unsafe MutableSpan(_unsafeStart: base + start, count: length)
    return unsafe _overrideLifetime(span, mutating: &self)
  }
}
