/// What one frame, super-frame or train is, where its bytes are and who owns them: the unit that travels between
/// stages. It is small and of fixed size; frames themselves never move.
///
/// Kept in words. Where a value is written by narrow parts and soon read or copied by wider loads, the load waits until
/// every store before it is done: measured, half of what it cost to hand a frame on to another worker.
public struct Descriptor: BitwiseCopyable, Sendable {
  /// The memory that holds the bytes; completion of the last send returns it there.
  public var buffer: BufferReference
  private var extent: UInt64
  private var places: UInt64
  private var facts: UInt64
  /// Who sent a datagram; nobody for a frame from a port.
  public var sender: UnderlayAddress
  /// The virtio header that came with the frame; all zero for none.
  public var offload: OffloadHeader

  @inline(__always)
  public init(buffer: BufferReference, offset: Int, length: Int, segments: Int = 1, ingress: InterfaceIndex) {
    self.buffer = buffer
    extent = UInt64(UInt32(truncatingIfNeeded: offset)) | UInt64(UInt32(truncatingIfNeeded: length)) << 32
    places =
      UInt64(ingress.rawValue) | UInt64(DomainIndex.none.rawValue) << 16
      | UInt64(UInt16(truncatingIfNeeded: segments)) << 32 | 1 << 48
    facts = 0
    sender = UnderlayAddress(high: 0, low: 0)
    offload = OffloadHeader()
  }

  /// Where the frame starts in its first segment, in bytes.
  @inline(__always)
  public var offset: UInt32 {
    get { extent.low32 }
    set { extent.setLow32(newValue) }
  }
  /// The frame's bytes, over all its segments from `offset` on.
  @inline(__always)
  public var length: UInt32 {
    get { extent.high32 }
    set { extent.setHigh32(newValue) }
  }
  /// The port or link that it came by.
  @inline(__always)
  public var ingress: InterfaceIndex {
    get { InterfaceIndex(rawValue: places.bits16(at: 0)) }
    set { places.setBits16(newValue.rawValue, at: 0) }
  }
  /// The Ethernet that it belongs to; `.none` until a datagram's VNI was looked up.
  @inline(__always)
  public var domain: DomainIndex {
    get { DomainIndex(rawValue: places.bits16(at: 16)) }
    set { places.setBits16(newValue.rawValue, at: 16) }
  }
  /// How many segments hold the frame; a slot of the arena is one.
  @inline(__always)
  public var segments: UInt16 {
    get { places.bits16(at: 32) }
    set { places.setBits16(newValue, at: 32) }
  }
  /// How many frames on the wire this is: 1, or the segments of a super-frame or train.
  @inline(__always)
  public var wireFrames: UInt16 {
    get { places.bits16(at: 48) }
    set { places.setBits16(newValue, at: 48) }
  }
  /// Equal for all frames of a flow; picks the outer source port.
  @inline(__always)
  public var flowHash: UInt32 {
    get { facts.low32 }
    set { facts.setLow32(newValue) }
  }
  /// Size of each datagram of a received train, in bytes; 0 for a single one.
  @inline(__always)
  public var trainSegmentBytes: UInt16 {
    get { facts.bits16(at: 32) }
    set { facts.setBits16(newValue, at: 32) }
  }
  /// Of a frame or a run of a received train, once it is routed: which of the train's frames it is, the first by bit 0.
  /// Stands where the sender stood, of whom routing is the last to ask.
  @inline(__always)
  var trainMembers: UInt128 {
    get { UInt128(sender.high) << 64 | UInt128(sender.low) }
    set {
      sender = UnderlayAddress(
        high: UInt64(truncatingIfNeeded: newValue >> 64), low: UInt64(truncatingIfNeeded: newValue))
    }
  }
  /// ToS or traffic class (DSCP and ECN): the outer header's for a datagram that came in, the inner frame's after
  /// routing.
  @inline(__always)
  public var typeOfService: UInt8 {
    get { UInt8(truncatingIfNeeded: facts >> 48) }
    set { facts = facts & ~(0xFF << 48) | UInt64(newValue) << 48 }
  }
  /// How a datagram that came in carries its frame; means nothing for a frame from a port.
  @inline(__always)
  public var encapsulation: Encapsulation {
    get { facts & Self.vnetpBit != 0 ? .vnetp : .vxlan }
    set { facts = newValue == .vnetp ? facts | Self.vnetpBit : facts & ~Self.vnetpBit }
  }
  /// Whether the kernel cut it because it did not fit.
  @inline(__always)
  public var isTruncated: Bool {
    get { facts & Self.truncatedBit != 0 }
    set { facts = newValue ? facts | Self.truncatedBit : facts & ~Self.truncatedBit }
  }

  private static var vnetpBit: UInt64 { 1 << 56 }
  private static var truncatedBit: UInt64 { 1 << 57 }
}

/// Fields of a word.
extension UInt64 {
  @inline(__always)
  fileprivate var low32: UInt32 { UInt32(truncatingIfNeeded: self) }
  @inline(__always)
  fileprivate var high32: UInt32 { UInt32(truncatingIfNeeded: self >> 32) }
  @inline(__always)
  fileprivate mutating func setLow32(_ value: UInt32) { self = self & ~0xFFFF_FFFF | UInt64(value) }
  @inline(__always)
  fileprivate mutating func setHigh32(_ value: UInt32) { self = self & 0xFFFF_FFFF | UInt64(value) << 32 }
  @usableFromInline @inline(__always)
  func bits16(at bit: UInt64) -> UInt16 { UInt16(truncatingIfNeeded: self >> bit) }
  @usableFromInline @inline(__always)
  mutating func setBits16(_ value: UInt16, at bit: UInt64) { self = self & ~(0xFFFF << bit) | UInt64(value) << bit }
}

/// The offload header in front of a super-frame: the fields of `virtio_net_hdr_v1` (virtio 1.x §5.1.6,
/// linux/virtio_net.h), in host order. All zero asks for nothing.
///
/// It comes from a guest: nothing in it is trusted. How it is read, written and judged stands with the frames'
/// formats. Kept in words, as ``Descriptor`` is: bytes in the order of the fields below.
public struct OffloadHeader: BitwiseCopyable, Hashable, Sendable {
  @usableFromInline var first: UInt64
  @usableFromInline var second: UInt64

  /// The first 8 bytes and the last 4, each as a number whose lowest byte comes first.
  @inlinable @inline(always)
  public init(first: UInt64, second: UInt32) {
    self.first = first
    self.second = UInt64(second)
  }

  @inlinable @inline(always)
  public init(
    flags: UInt8 = 0, gsoType: UInt8 = 0, headerLength: UInt16 = 0, gsoSize: UInt16 = 0, checksumStart: UInt16 = 0,
    checksumOffset: UInt16 = 0, bufferCount: UInt16 = 0
  ) {
    first =
      UInt64(flags) | UInt64(gsoType) &<< 8 | UInt64(headerLength) &<< 16 | UInt64(gsoSize) &<< 32
      | UInt64(checksumStart) &<< 48
    second = UInt64(checksumOffset) | UInt64(bufferCount) &<< 16
  }

  /// Bits: ``flagNeedsChecksum``, ``flagDataValid``.
  @inlinable
  public var flags: UInt8 {
    @inline(__always) get { UInt8(truncatingIfNeeded: first) }
    @inline(__always) set { first = first & ~0xFF | UInt64(newValue) }
  }
  /// ``Segmentation``, perhaps with ``segmentationECN``: see ``segmentation``.
  @inlinable
  public var gsoType: UInt8 {
    @inline(__always) get { UInt8(truncatingIfNeeded: first &>> 8) }
    @inline(__always) set { first = first & ~0xFF00 | UInt64(newValue) &<< 8 }
  }
  /// Bytes of all headers in front of the first segment's payload: a hint, which is not trusted.
  @inlinable
  public var headerLength: UInt16 {
    @inline(__always) get { first.bits16(at: 16) }
    @inline(__always) set { first.setBits16(newValue, at: 16) }
  }
  /// Payload bytes of each segment; the last may have less.
  @inlinable
  public var gsoSize: UInt16 {
    @inline(__always) get { first.bits16(at: 32) }
    @inline(__always) set { first.setBits16(newValue, at: 32) }
  }
  /// Bytes from the start of the frame to where the checksum starts.
  @inlinable
  public var checksumStart: UInt16 {
    @inline(__always) get { first.bits16(at: 48) }
    @inline(__always) set { first.setBits16(newValue, at: 48) }
  }
  /// Bytes from there to the checksum.
  @inlinable
  public var checksumOffset: UInt16 {
    @inline(__always) get { second.bits16(at: 0) }
    @inline(__always) set { second.setBits16(newValue, at: 0) }
  }
  /// Buffers that a frame was received into, with mergeable buffers; 1 without, 0 on transmit.
  @inlinable
  public var bufferCount: UInt16 {
    @inline(__always) get { second.bits16(at: 16) }
    @inline(__always) set { second.setBits16(newValue, at: 16) }
  }

  /// No offload asked for: the frame is as it goes on the wire.
  @inlinable @inline(always)
  public var isPlain: Bool { first & 0xFFFF == 0 }
}

/// A buffer by its owner and its place there: a slot of the worker's own arena (owner 0) or of a neighbour's, or a
/// chain of foreign memory. Owner numbers of slots are a worker's own: `FrameMemory.handOn` names one for the next.
///
/// One word: where it is written by parts and then copied as a whole, the copy waits for every store before it, those
/// onto a ring that a neighbour reads included (measured: half of what it cost to hand a frame on).
public struct BufferReference: BitwiseCopyable, Hashable, Sendable {
  public let rawValue: UInt64

  public var owner: UInt16 {
    @inline(__always) get { UInt16(truncatingIfNeeded: rawValue >> 32) }
  }
  public var index: UInt32 {
    @inline(__always) get { UInt32(truncatingIfNeeded: rawValue) }
  }

  @inline(__always)
  public init(owner: Int, index: Int) {
    rawValue = UInt64(UInt16(truncatingIfNeeded: owner)) << 32 | UInt64(UInt32(truncatingIfNeeded: index))
  }
  @inline(__always)
  public init(slot: Int) { self.init(owner: 0, index: slot) }

  @inline(__always)
  public var isForeign: Bool { owner != 0 && owner < FrameMemory.neighbourOwnerFirst }
}
