/// A run of items that one step hands to the next: the plain buffer between the stages of the fused layout.
/// Its size is settled when it is made.
public struct Batch<Element: BitwiseCopyable>: ~Copyable {
  @usableFromInline var items: FixedArray<Element>
  @usableFromInline var used = 0

  /// - Parameter filler: any value; what the places hold that were never used.
  public init(capacity: Int, filler: Element) {
    items = FixedArray(repeating: filler, count: capacity)
  }

  @inlinable public var count: Int { used }
  @inlinable public var capacity: Int { items.count }
  @inlinable public var isFull: Bool { used == items.count }
  @inlinable public var room: Int { items.count - used }

  /// Appends; the caller has seen that the batch is not full.
  @inlinable
  public mutating func append(_ item: Element) {
    items[used] = item
    used += 1
  }

  @inlinable
  public subscript(index: Int) -> Element {
    _read {
      precondition(index < used, "index out of range")
      yield items[index]
    }
    _modify {
      precondition(index < used, "index out of range")
      yield &items[index]
    }
  }

  /// Of a batch that is not empty.
  @inlinable
  public mutating func removeLast() {
    precondition(used > 0, "nothing to remove")
    used -= 1
  }

  @inlinable
  public mutating func removeAll() { used = 0 }

  /// The items from `start` on.
  @inlinable
  @_lifetime(borrow self)
  public func span(from start: Int = 0) -> Span<Element> { items.span(from: start, count: used - start) }
}

public typealias DescriptorBatch = Batch<Descriptor>

extension Batch<Descriptor> {
  public init(capacity: Int) {
    self.init(
      capacity: capacity,
      filler: Descriptor(buffer: BufferReference(slot: 0), offset: 0, length: 0, ingress: .none))
  }
}
