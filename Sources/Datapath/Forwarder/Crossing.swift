// How frames cross from one worker to the next.
//
// What one core writes and another reads moves by cache lines, so a plain frame crosses in a quarter of one, or in half
// of one where more is to be told of it: two places of the ring, one behind the other. What does not fit into that,
// floods and super-frames and trains, which are few or stand for many frames, crosses whole by a second ring; in the
// first a mark keeps its place, so the order stays.

/// One place on a ring: a frame, or what more is to be told of the one before. Whole words, so that neither side waits
/// for a store that it reads back by another width.
struct Crossing: BitwiseCopyable {
  /// Of a frame, from bit 0 on: slot 16, owner 16, length 24, segments 8.
  let first: UInt64
  /// Of a frame: offset 16, ingress 16, domain 16, ToS 8, flags 8.
  let second: UInt64

  private static var truncatedFlag: UInt64 { 1 << 56 }
  private static var vnetpFlag: UInt64 { 2 << 56 }
  /// The frame itself is the next on the ring beside.
  private static var besideFlag: UInt64 { 4 << 56 }
  private static var goesOnFlag: UInt64 { 8 << 56 }

  /// Places that a frame takes at most.
  static var placesMax: Int { 2 }

  @inline(__always)
  var isBeside: Bool { second & Self.besideFlag != 0 }

  /// Whether the next place is about the same frame.
  @inline(__always)
  var goesOn: Bool { second & Self.goesOnFlag != 0 }

  /// The same, with another place behind it.
  @inline(__always)
  var goingOn: Crossing { Crossing(first, second | Self.goesOnFlag) }

  /// The mark of a frame that crosses whole.
  @inline(__always)
  static var beside: Crossing { Crossing(0, besideFlag) }

  @inline(__always)
  fileprivate init(_ first: UInt64, _ second: UInt64) {
    self.first = first
    self.second = second
  }

  /// Whether a frame fits: a single one, with nothing left to do.
  @inline(__always)
  fileprivate static func takes(_ descriptor: Descriptor, _ buffer: BufferReference) -> Bool {
    descriptor.wireFrames == 1 && descriptor.trainSegmentBytes == 0 && descriptor.segments <= 0xFF
      && descriptor.offload.isPlain && buffer.index | descriptor.offset <= 0xFFFF && descriptor.length <= 0xFF_FFFF
  }

  /// A frame that fits.
  @inline(__always)
  init(_ descriptor: Descriptor, _ buffer: BufferReference) {
    first =
      UInt64(buffer.index) | UInt64(buffer.owner) << 16 | UInt64(descriptor.length) << 32
      | UInt64(descriptor.segments) << 56
    second =
      UInt64(descriptor.offset) | UInt64(descriptor.ingress.rawValue) << 16
      | UInt64(descriptor.domain.rawValue) << 32 | UInt64(descriptor.typeOfService) << 48
      | (descriptor.isTruncated ? Self.truncatedFlag : 0)
      | (descriptor.encapsulation == .vnetp ? Self.vnetpFlag : 0)
  }

  @inline(__always)
  var buffer: BufferReference { BufferReference(owner: Int(first >> 16 & 0xFFFF), index: Int(first & 0xFFFF)) }

  @inline(__always)
  fileprivate func descriptor(_ buffer: BufferReference) -> Descriptor {
    var descriptor = Descriptor(
      buffer: buffer, offset: Int(second & 0xFFFF), length: Int(first >> 32 & 0xFF_FFFF), segments: Int(first >> 56),
      ingress: InterfaceIndex(rawValue: UInt16(truncatingIfNeeded: second >> 16)))
    descriptor.domain = DomainIndex(rawValue: UInt16(truncatingIfNeeded: second >> 32))
    descriptor.typeOfService = UInt8(truncatingIfNeeded: second >> 48)
    descriptor.isTruncated = second & Self.truncatedFlag != 0
    if second & Self.vnetpFlag != 0 { descriptor.encapsulation = .vnetp }
    return descriptor
  }
}

/// What crosses from worker to worker.
protocol Crosses: BitwiseCopyable, Sendable {
  var descriptor: Descriptor { get set }
  /// Places that one takes on the ring, more often than not.
  static var placesUsual: Int { get }
  /// How many frames of one slot cross together, this the first of them; 0 for those that follow it.
  var crossesWith: UInt16 { get }
  /// Whether it crosses as a ``Crossing``, its buffer under the name that it has for the neighbour.
  func fits(_ buffer: BufferReference) -> Bool
  /// What else the neighbour must know of one that fits; nil: nothing.
  var addition: Crossing? { get }
  /// From a crossing, with the name that its buffer has here.
  init(_ crossing: Crossing, _ addition: Crossing?, _ buffer: BufferReference)
}

extension Descriptor: Crosses {
  @inline(__always)
  var descriptor: Descriptor {
    get { self }
    set { self = newValue }
  }
  var crossesWith: UInt16 { @inline(__always) get { 1 } }
  static var placesUsual: Int { @inline(__always) get { 1 } }

  @inline(__always)
  func fits(_ buffer: BufferReference) -> Bool { Crossing.takes(self, buffer) }

  /// Who sent a datagram; a frame from a port has nobody.
  @inline(__always)
  var addition: Crossing? { sender.high | sender.low == 0 ? nil : Crossing(sender.high, sender.low) }

  @inline(__always)
  init(_ crossing: Crossing, _ addition: Crossing?, _ buffer: BufferReference) {
    self = crossing.descriptor(buffer)
    if let addition { sender = UnderlayAddress(high: addition.first, low: addition.second) }
  }
}

extension RoutedFrame: Crosses {
  static var placesUsual: Int { @inline(__always) get { 2 } }

  @inline(__always)
  func fits(_ buffer: BufferReference) -> Bool {
    if case .unicast = target { crossesWith == 1 && Crossing.takes(descriptor, buffer) } else { false }
  }

  /// What routing found. Who sent the datagram is of no use any more, and left behind.
  @inline(__always)
  var addition: Crossing? {
    guard case .unicast(let egress) = target else { preconditionFailure("a flood does not fit into a crossing") }
    return Crossing(UInt64(descriptor.flowHash) | UInt64(vni) << 32, UInt64(egress.rawValue))
  }

  @inline(__always)
  init(_ crossing: Crossing, _ addition: Crossing?, _ buffer: BufferReference) {
    guard let addition else { preconditionFailure("a routed frame crosses without its egress") }
    var descriptor = crossing.descriptor(buffer)
    descriptor.flowHash = UInt32(truncatingIfNeeded: addition.first)
    self.init(
      descriptor: descriptor,
      target: .unicast(InterfaceIndex(rawValue: UInt16(truncatingIfNeeded: addition.second))),
      vni: UInt32(truncatingIfNeeded: addition.first >> 32))
  }
}

/// Counts what crosses, once for each run of frames of one domain.
struct CrossingCount: ~Copyable {
  private let counter: Counter
  private var isOfUnderlay = false
  private var domain = DomainIndex.none
  private var frames = 0

  @inline(__always)
  init(_ counter: Counter) { self.counter = counter }

  @inline(__always)
  mutating func count(_ descriptor: Descriptor, _ counters: borrowing CounterTable) {
    let isOfUnderlay = descriptor.ingress == .none
    if isOfUnderlay != self.isOfUnderlay || descriptor.domain != domain {
      flush(counters)
      self.isOfUnderlay = isOfUnderlay
      domain = descriptor.domain
    }
    frames += Int(descriptor.wireFrames)
  }

  /// To be called after the last.
  @inline(__always)
  mutating func flush(_ counters: borrowing CounterTable) {
    guard frames > 0 else { return }
    if isOfUnderlay {
      counters.underlay.add(counter, frames)
    } else {
      counters.worker.add(counter, frames)
      counters[domain]?.add(counter, frames)
    }
    frames = 0
  }
}
