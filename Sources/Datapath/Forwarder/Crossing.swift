// How frames cross from one worker to the next.
//
// A plain frame crosses in half a cache line, for what one core writes and another reads moves by lines. What does not
// fit into that, floods and super-frames and trains, which are few or stand for many frames, crosses whole by a second
// ring; in the first a mark keeps its place, so the order stays.

/// A frame in the form in which it crosses a ring: whole words, so that neither side waits for a store that it reads
/// back by another width.
struct Crossing: BitwiseCopyable {
  /// From bit 0 on: slot 16, owner 16, length 32.
  private var place: UInt64
  /// Offset 16, ingress 16, domain 16, ToS 8, flags 8.
  private var facts: UInt64
  /// Of a received frame its sender; of a routed one what routing found.
  let first: UInt64
  let second: UInt64

  private static var truncatedFlag: UInt64 { 1 << 56 }
  private static var vnetpFlag: UInt64 { 2 << 56 }
  /// The frame itself is the next on the ring beside.
  private static var besideFlag: UInt64 { 4 << 56 }

  @inline(__always)
  var isBeside: Bool { facts & Self.besideFlag != 0 }

  /// The mark of a frame that crosses whole.
  @inline(__always)
  static var beside: Crossing { Crossing(place: 0, facts: besideFlag) }

  @inline(__always)
  private init(place: UInt64, facts: UInt64) {
    self.place = place
    self.facts = facts
    first = 0
    second = 0
  }

  /// Whether a frame fits: a single one, in one piece, with nothing left to do.
  @inline(__always)
  fileprivate static func takes(_ descriptor: Descriptor, _ buffer: BufferReference) -> Bool {
    descriptor.wireFrames == 1 && descriptor.trainSegmentBytes == 0 && descriptor.segments == 1
      && descriptor.offload.isPlain && buffer.index | descriptor.offset <= 0xFFFF
  }

  /// A frame that fits.
  @inline(__always)
  fileprivate init(_ descriptor: Descriptor, _ buffer: BufferReference, _ first: UInt64, _ second: UInt64) {
    self.first = first
    self.second = second
    place = UInt64(buffer.index) | UInt64(buffer.owner) << 16 | UInt64(descriptor.length) << 32
    facts =
      UInt64(descriptor.offset) | UInt64(descriptor.ingress.rawValue) << 16
      | UInt64(descriptor.domain.rawValue) << 32 | UInt64(descriptor.typeOfService) << 48
      | (descriptor.isTruncated ? Self.truncatedFlag : 0)
      | (descriptor.encapsulation == .vnetp ? Self.vnetpFlag : 0)
  }

  @inline(__always)
  var buffer: BufferReference { BufferReference(owner: Int(place >> 16 & 0xFFFF), index: Int(place & 0xFFFF)) }

  @inline(__always)
  fileprivate func descriptor(_ buffer: BufferReference) -> Descriptor {
    var descriptor = Descriptor(
      buffer: buffer, offset: Int(facts & 0xFFFF), length: Int(place >> 32),
      ingress: InterfaceIndex(rawValue: UInt16(truncatingIfNeeded: facts >> 16)))
    descriptor.domain = DomainIndex(rawValue: UInt16(truncatingIfNeeded: facts >> 32))
    descriptor.typeOfService = UInt8(truncatingIfNeeded: facts >> 48)
    descriptor.isTruncated = facts & Self.truncatedFlag != 0
    if facts & Self.vnetpFlag != 0 { descriptor.encapsulation = .vnetp }
    return descriptor
  }
}

/// What crosses from worker to worker.
protocol Crosses: BitwiseCopyable, Sendable {
  var descriptor: Descriptor { get set }
  /// How many frames of one slot cross together, this the first of them; 0 for those that follow it.
  var crossesWith: UInt16 { get }
  /// Whether it crosses as a ``Crossing``, its buffer under the name that it has for the neighbour.
  func fits(_ buffer: BufferReference) -> Bool
  /// One that fits.
  func crossing(_ buffer: BufferReference) -> Crossing
  /// From a crossing, with the name that its buffer has here.
  init(_ crossing: Crossing, _ buffer: BufferReference)
}

extension Descriptor: Crosses {
  @inline(__always)
  var descriptor: Descriptor {
    get { self }
    set { self = newValue }
  }
  var crossesWith: UInt16 { @inline(__always) get { 1 } }

  @inline(__always)
  func fits(_ buffer: BufferReference) -> Bool { Crossing.takes(self, buffer) }

  @inline(__always)
  func crossing(_ buffer: BufferReference) -> Crossing { Crossing(self, buffer, sender.high, sender.low) }

  @inline(__always)
  init(_ crossing: Crossing, _ buffer: BufferReference) {
    self = crossing.descriptor(buffer)
    sender = UnderlayAddress(high: crossing.first, low: crossing.second)
  }
}

extension RoutedFrame: Crosses {
  @inline(__always)
  func fits(_ buffer: BufferReference) -> Bool {
    if case .unicast = target { crossesWith == 1 && Crossing.takes(descriptor, buffer) } else { false }
  }

  /// Of no use any more, and left behind: who sent the datagram.
  @inline(__always)
  func crossing(_ buffer: BufferReference) -> Crossing {
    guard case .unicast(let egress) = target else { preconditionFailure("a flood does not fit into a crossing") }
    return Crossing(
      descriptor, buffer, UInt64(descriptor.flowHash) | UInt64(vni) << 32, UInt64(egress.rawValue))
  }

  @inline(__always)
  init(_ crossing: Crossing, _ buffer: BufferReference) {
    var descriptor = crossing.descriptor(buffer)
    descriptor.flowHash = UInt32(truncatingIfNeeded: crossing.first)
    self.init(
      descriptor: descriptor, target: .unicast(InterfaceIndex(rawValue: UInt16(truncatingIfNeeded: crossing.second))),
      vni: UInt32(truncatingIfNeeded: crossing.first >> 32))
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
