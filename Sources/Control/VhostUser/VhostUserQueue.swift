/// How the two sides of a queue share it (virtio 1.2 §2.7 and §2.8).
public enum VhostUserQueueKind: Sendable {
  case split
  case packed
}

/// Where a queue stands: what SET_VRING_BASE says and GET_VRING_BASE asks.
public struct VhostUserQueueBase: Hashable, Sendable {
  /// The next descriptor to be taken: a count that wraps at 2^16 of a split queue, a place of a packed one.
  public var availableIndex: UInt16
  /// The wrap counter there; packed queues only.
  public var availableWrap: Bool
  /// The next place to give back at; packed queues only: a split queue has it in its used ring.
  public var usedIndex: UInt16
  public var usedWrap: Bool

  /// Of a split queue.
  public init(availableIndex: UInt16) {
    self.init(availableIndex: availableIndex, availableWrap: true, usedIndex: availableIndex, usedWrap: true)
  }

  public init(availableIndex: UInt16, availableWrap: Bool, usedIndex: UInt16, usedWrap: Bool) {
    self.availableIndex = availableIndex
    self.availableWrap = availableWrap
    self.usedIndex = usedIndex
    self.usedWrap = usedWrap
  }

  private static let indexMask: UInt16 = 0x7FFF
  private static let wrapBit: UInt16 = 0x8000

  /// From the number of a message. Of a packed queue the lower half is where to take, the upper where to give back.
  /// DPDK knows the lower half only and leaves the other zero: then they are the same, as they are of every queue that
  /// was stopped with nothing out.
  init?(rawValue: UInt32, _ kind: VhostUserQueueKind) {
    let low = UInt16(truncatingIfNeeded: rawValue)
    let high = UInt16(truncatingIfNeeded: rawValue >> 16)
    switch kind {
    case .split:
      guard high == 0 else { return nil }
      self.init(availableIndex: low)
    case .packed:
      let used = high == 0 ? low : high
      self.init(
        availableIndex: low & Self.indexMask, availableWrap: low & Self.wrapBit != 0,
        usedIndex: used & Self.indexMask, usedWrap: used & Self.wrapBit != 0)
    }
  }

  func rawValue(_ kind: VhostUserQueueKind) -> UInt32 {
    guard kind == .packed else { return UInt32(availableIndex) }
    let low = availableIndex & Self.indexMask | (availableWrap ? Self.wrapBit : 0)
    let high = usedIndex & Self.indexMask | (usedWrap ? Self.wrapBit : 0)
    return UInt32(low) | UInt32(high) << 16
  }
}

/// Where the three parts of a queue are in guest memory, by guest address. Each is aligned as virtio wants it and lies
/// within one region of the table that it was resolved with.
public struct VhostUserRings: Hashable, Sendable {
  /// The descriptor table, or the ring of a packed queue.
  public let descriptors: UInt64
  /// The available ring, or the driver's event suppression.
  public let available: UInt64
  /// The used ring, or the device's event suppression.
  public let used: UInt64
}

/// All that a worker needs to serve a queue.
public struct VhostUserQueueStart: Sendable {
  /// Even: the guest receives by it. Odd: it sends by it.
  public let number: Int
  public let kind: VhostUserQueueKind
  /// Places: a power of two of a split queue, any of a packed one.
  public let size: Int
  public let rings: VhostUserRings
  public let base: VhostUserQueueBase
  public let features: VhostUserFeatures
  /// A queue that is disabled takes what a guest sends and drops it, and gives a guest nothing.
  public let isEnabled: Bool
  /// Readable when the guest added buffers; nil: to be polled.
  public let kick: OwnedDescriptor?
  /// To be written to when buffers were used; nil: the guest polls.
  public let call: OwnedDescriptor?
  /// To be written to when the queue cannot be served any more.
  public let error: OwnedDescriptor?
  public let memory: VhostUserMemory
  /// Where the used ring's first byte is in the log, by guest address; nil: its writes are not logged.
  public let usedLogAddress: UInt64?
  /// The queue's part of the in-flight memory, in bytes from the start of its mapping.
  public let inflight: (memory: VhostUserInflight, part: Range<Int>)?
}

/// What a frontend said about one queue so far.
struct VhostUserQueue {
  /// The largest queue (virtio 1.2 §2.6).
  static let sizeMax = 32_768
  private static let logFlag: UInt32 = 1

  enum State {
    case stopped
    case started(VhostUserQueueKind)
    /// A worker was told to leave it and has not yet said where it stands.
    case stopping(VhostUserQueueKind)
  }

  var state = State.stopped
  var size: Int?
  var addresses: VhostUserMessage.QueueAddresses?
  /// As the frontend says and asks it.
  var base: UInt32 = 0
  /// Where it stood before a reset, until the frontend says a base: QEMU before 8.0 resets the device and then asks for
  /// this, to have the guest go on there after a migration.
  var baseBeforeReset: UInt32?
  var kick: OwnedDescriptor?
  var call: OwnedDescriptor?
  var error: OwnedDescriptor?
  /// By SET_VRING_ENABLE; nil as long as there was none.
  var enabled: Bool?

  var isStopped: Bool { if case .stopped = state { true } else { false } }
  var isStarted: Bool { if case .started = state { true } else { false } }
  var isStopping: Bool { if case .stopping = state { true } else { false } }

  var usedLogAddress: UInt64? {
    guard let addresses, addresses.flags & Self.logFlag != 0 else { return nil }
    return addresses.log
  }

  /// Back to the beginning, but for the descriptors for calls and errors, which frontends send once.
  mutating func reset() {
    self = VhostUserQueue(baseBeforeReset: base, call: call, error: error)
  }

  /// What can be said of addresses without the size of the queue and the memory.
  static func check(_ addresses: VhostUserMessage.QueueAddresses) throws(VhostUserRefusal) {
    guard addresses.flags & ~logFlag == 0 else {
      throw VhostUserRefusal("flags \(hexadecimal(addresses.flags)) have bits without a meaning")
    }
  }

  static func resolve(
    _ addresses: VhostUserMessage.QueueAddresses, size: Int, _ kind: VhostUserQueueKind, _ memory: VhostUserMemory
  ) throws(VhostUserRefusal) -> VhostUserRings {
    func place(
      _ name: String, _ address: UInt64, bytes: Int, alignment: UInt64
    ) throws(VhostUserRefusal) -> UInt64 {
      guard let guest = memory.guestAddress(user: address, byteCount: bytes) else {
        throw VhostUserRefusal("no region has the \(bytes) bytes of its \(name) at \(hexadecimal(address))")
      }
      guard address % alignment == 0 else {
        throw VhostUserRefusal("its \(name) at \(hexadecimal(address)) is not aligned to \(alignment) bytes")
      }
      return guest
    }
    let descriptors = try place("descriptors", addresses.descriptors, bytes: 16 * size, alignment: 16)
    // virtio 1.2 §2.7, with the event index at the end of each ring, and §2.8.
    switch kind {
    case .split:
      return VhostUserRings(
        descriptors: descriptors,
        available: try place("available ring", addresses.available, bytes: 6 + 2 * size, alignment: 2),
        used: try place("used ring", addresses.used, bytes: 6 + 8 * size, alignment: 4))
    case .packed:
      return VhostUserRings(
        descriptors: descriptors,
        available: try place("driver's event suppression", addresses.available, bytes: 4, alignment: 4),
        used: try place("device's event suppression", addresses.used, bytes: 4, alignment: 4))
    }
  }
}
