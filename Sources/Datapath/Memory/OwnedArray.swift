/// A table of things that cannot be copied, filled once and then used in place: the ends of rings.
/// One owner; every access is bounds-checked.
@safe
public struct OwnedArray<Element: ~Copyable>: ~Copyable {
  private let base: UnsafeMutablePointer<Element>
  private let capacity: Int
  public private(set) var count = 0

  public init(capacity: Int) {
    precondition(capacity >= 0)
    self.capacity = capacity
    unsafe base = .allocate(capacity: max(1, capacity))
  }

  deinit {
    unsafe base.deinitialize(count: count)
    unsafe base.deallocate()
  }

  /// Appends; traps beyond the capacity.
  public mutating func append(_ element: consuming Element) {
    precondition(count < capacity, "the table is full")
    unsafe (base + count).initialize(to: element)
    count += 1
  }

  @inline(__always)
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
}

extension OwnedArray: @unchecked Sendable where Element: Sendable & ~Copyable {}
