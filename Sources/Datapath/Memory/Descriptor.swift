/// What one frame, super-frame or train is, where its bytes are and who owns them: the unit that travels between
/// stages. It is small and of fixed size; frames themselves never move.
public struct Descriptor: BitwiseCopyable, Sendable {
  /// The memory that holds the bytes; completion of the last send returns it there.
  public var buffer: BufferReference
  /// Where the frame starts in its first segment, in bytes.
  public var offset: UInt32
  /// The frame's bytes, over all its segments from `offset` on.
  public var length: UInt32
  /// How many segments hold the frame; a slot of the arena is one.
  public var segments: UInt16
  /// The port or link that it came by.
  public var ingress: InterfaceIndex
  /// The Ethernet that it belongs to; `.none` until a datagram's VNI was looked up.
  public var domain: DomainIndex
  /// Who sent a datagram; nobody for a frame from a port.
  public var sender: UnderlayAddress
  /// ToS or traffic class (DSCP and ECN): the outer header's for a datagram that came in, the inner frame's after
  /// routing.
  public var typeOfService: UInt8
  /// How a datagram that came in carries its frame; means nothing for a frame from a port.
  public var encapsulation: Encapsulation
  /// Whether the kernel cut it because it did not fit.
  public var isTruncated: Bool
  /// Equal for all frames of a flow; picks the outer source port.
  public var flowHash: UInt32
  /// Size of each datagram of a received train, in bytes; 0 for a single one.
  public var trainSegmentBytes: UInt16
  /// How many frames on the wire this is: 1, or the segments of a super-frame or train.
  public var wireFrames: UInt16
  /// The virtio header that came with the frame; all zero for none.
  public var offload: OffloadHeader

  @inline(__always)
  public init(buffer: BufferReference, offset: Int, length: Int, segments: Int = 1, ingress: InterfaceIndex) {
    self.buffer = buffer
    self.offset = UInt32(truncatingIfNeeded: offset)
    self.length = UInt32(truncatingIfNeeded: length)
    self.segments = UInt16(truncatingIfNeeded: segments)
    self.ingress = ingress
    domain = .none
    sender = UnderlayAddress(high: 0, low: 0)
    typeOfService = 0
    encapsulation = .vxlan
    isTruncated = false
    flowHash = 0
    trainSegmentBytes = 0
    wireFrames = 1
    offload = OffloadHeader()
  }
}

/// The offload header in front of a super-frame: the fields of `virtio_net_hdr_v1` (virtio 1.x §5.1.6,
/// linux/virtio_net.h), in host order. All zero asks for nothing.
///
/// It comes from a guest: nothing in it is trusted. How it is read, written and judged stands with the frames'
/// formats.
public struct OffloadHeader: BitwiseCopyable, Hashable, Sendable {
  /// Bits: ``flagNeedsChecksum``, ``flagDataValid``.
  public var flags: UInt8
  /// ``Segmentation``, perhaps with ``segmentationECN``: see ``segmentation``.
  public var gsoType: UInt8
  /// Bytes of all headers in front of the first segment's payload: a hint, which is not trusted.
  public var headerLength: UInt16
  /// Payload bytes of each segment; the last may have less.
  public var gsoSize: UInt16
  /// Bytes from the start of the frame to where the checksum starts.
  public var checksumStart: UInt16
  /// Bytes from there to the checksum.
  public var checksumOffset: UInt16
  /// Buffers that a frame was received into, with mergeable buffers; 1 without, 0 on transmit.
  public var bufferCount: UInt16

  @inlinable @inline(always)
  public init(
    flags: UInt8 = 0, gsoType: UInt8 = 0, headerLength: UInt16 = 0, gsoSize: UInt16 = 0, checksumStart: UInt16 = 0,
    checksumOffset: UInt16 = 0, bufferCount: UInt16 = 0
  ) {
    self.flags = flags
    self.gsoType = gsoType
    self.headerLength = headerLength
    self.gsoSize = gsoSize
    self.checksumStart = checksumStart
    self.checksumOffset = checksumOffset
    self.bufferCount = bufferCount
  }

  /// No offload asked for: the frame is as it goes on the wire.
  @inlinable @inline(always)
  public var isPlain: Bool { flags == 0 && gsoType == 0 }
}

/// A buffer by its owner and its place there: a slot of the worker's own arena (owner 0) or of a neighbour's, or a
/// chain of foreign memory. Owner numbers are a worker's own: `FrameMemory.handOn` names a buffer for the next.
public struct BufferReference: BitwiseCopyable, Hashable, Sendable {
  public let owner: UInt16
  public let index: UInt32

  @inline(__always)
  public init(owner: Int, index: Int) {
    self.owner = UInt16(truncatingIfNeeded: owner)
    self.index = UInt32(truncatingIfNeeded: index)
  }
  @inline(__always)
  public init(slot: Int) { self.init(owner: 0, index: slot) }

  @inline(__always)
  public var isForeign: Bool { owner != 0 && owner < FrameMemory.neighbourOwnerFirst }
}
