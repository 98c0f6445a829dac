// The offload header's layout and meaning: 12 bytes, little endian, as a TAP with `IFF_VNET_HDR`, a packet socket with
// `PACKET_VNET_HDR` and a virtio-net queue have it. Ask ``OffloadHeader/isWellFormed(frameBytes:)`` before acting on
// one, and ``SuperFrame`` before cutting.

extension OffloadHeader {
  /// Bytes of the header in memory.
  @inlinable @inline(always)
  public static var bytes: Int { 12 }

  /// VIRTIO_NET_HDR_F_NEEDS_CSUM: the checksum at ``checksumStart`` + ``checksumOffset`` holds the pseudo-header's sum
  /// only.
  @inlinable @inline(always)
  public static var flagNeedsChecksum: UInt8 { 1 }

  /// VIRTIO_NET_HDR_F_DATA_VALID: the checksum was verified.
  @inlinable @inline(always)
  public static var flagDataValid: UInt8 { 2 }

  /// VIRTIO_NET_HDR_GSO_*: how the frame is to be cut.
  public enum Segmentation: UInt8, BitwiseCopyable, Sendable {
    case none = 0
    case tcpv4 = 1
    /// UFO, which cuts one datagram into IP fragments; never negotiated.
    case udpFragments = 3
    case tcpv6 = 4
    /// USO, which cuts one train into datagrams (kernel 6.2).
    case udp = 5
  }

  /// VIRTIO_NET_HDR_GSO_ECN, a bit that may stand in ``gsoType`` beside a TCP type: the segments' CWR flag.
  @inlinable @inline(always)
  public static var segmentationECN: UInt8 { 0x80 }

  /// Where a transport header starts at the earliest: behind Ethernet and IPv4 headers. So that no checksum a guest
  /// asks for is written over the addresses that were looked up, or over an IP header's.
  @inlinable @inline(always)
  public static var checksumStartMin: Int { EthernetHeader.bytes + IPv4Header.bytesMin }

  /// From the first 12 bytes; nil when there are fewer. The bytes are not judged.
  @inlinable
  public init?(_ bytes: RawSpan) {
    guard bytes.byteCount >= Self.bytes else { return nil }
    self.init(
      first: unsafe bytes.networkUInt64(at: 0).byteSwapped, second: unsafe bytes.networkUInt32(at: 8).byteSwapped)
  }

  /// Writes the header at `offset`; traps where it does not fit.
  /// - Returns: the offset after it.
  @discardableResult
  @inlinable
  public func write(into bytes: inout MutableRawSpan, at offset: Int = 0) -> Int {
    bytes.preconditionFits(Self.bytes, at: offset)
    unsafe bytes.storeNetwork(first.byteSwapped, at: offset)
    unsafe bytes.storeNetwork(UInt32(truncatingIfNeeded: second).byteSwapped, at: offset &+ 8)
    return offset &+ Self.bytes
  }

  /// The header as two words whose bytes in memory are those of ``write(into:at:)``, the last 4 bytes zero: for a
  /// writer that has room for 16.
  @inlinable @inline(always)
  public var words: (first: UInt64, second: UInt64) { (first.littleEndian, second.littleEndian) }

  /// The checksum is not finished yet.
  @inlinable @inline(always)
  public var needsChecksum: Bool { flags & Self.flagNeedsChecksum != 0 }

  /// The kind of segmentation, the ECN bit masked off; nil for a number that is none.
  @inlinable @inline(always)
  public var segmentation: Segmentation? { Segmentation(rawValue: gsoType & ~Self.segmentationECN) }

  /// Whether the frame is one of several segments, of whatever kind.
  @inlinable @inline(always)
  public var isSuperFrame: Bool { gsoType & ~Self.segmentationECN != 0 }

  /// Whether the header says something that can be done to a frame of `frameBytes`: a checksum within it, and behind
  /// Ethernet and IP headers; a known segmentation (UFO is none that we offer) with a size, a checksum to finish,
  /// as virtio 1.x §5.1.6.2 demands, and something to cut.
  @inlinable
  public func isWellFormed(frameBytes: Int) -> Bool {
    if needsChecksum, !checksumFits(frameBytes: frameBytes) { return false }
    switch gsoType & ~Self.segmentationECN {
    case Segmentation.none.rawValue:
      return gsoType == 0
    case Segmentation.tcpv4.rawValue, Segmentation.tcpv6.rawValue:
      return needsChecksum && gsoSize > 0 && Int(checksumStart) &+ TCPHeader.bytesMin < frameBytes
    case Segmentation.udp.rawValue:
      return gsoType == Segmentation.udp.rawValue && needsChecksum && gsoSize > 0
        && Int(checksumStart) &+ UDPHeader.bytes < frameBytes
    default:
      return false
    }
  }

  @inlinable @inline(always)
  func checksumFits(frameBytes: Int) -> Bool {
    Int(checksumStart) >= Self.checksumStartMin
      && Int(checksumStart) &+ Int(checksumOffset) &+ 2 <= frameBytes
  }

  /// Finishes the checksum of a frame that leaves for where nobody would: the sum from ``checksumStart`` to the end of
  /// the frame, which has the pseudo-header's sum in the checksum's place already. The header then no longer asks
  /// for one, so that a second call does nothing. A sum of zero is stored as 0xffff (see
  /// ``InternetChecksum/finishTransport(_:)``). Segments of a super-frame need one each: this makes the whole's.
  /// - Parameter frame: from the Ethernet header to the end, all of it.
  /// - Returns: false, with nothing written, when the checksum would lie outside of the frame or over its Ethernet and
  ///   IP headers. True when there was nothing to do.
  @inlinable
  public mutating func finishChecksum(in frame: inout MutableRawSpan) -> Bool {
    guard needsChecksum else { return true }
    guard checksumFits(frameBytes: frame.byteCount) else { return false }
    let start = Int(checksumStart)
    storeChecksum(
      InternetChecksum.sum(unsafe frame.bytes.extracting(unchecked: start..<frame.byteCount)), in: &frame)
    return true
  }

  /// The same with a sum that is known, for a frame of which only the first bytes are at hand; traps where its place is
  /// not among them.
  @inlinable
  mutating func storeChecksum(_ sum: UInt64, in frame: inout MutableRawSpan) {
    let place = Int(checksumStart) &+ Int(checksumOffset)
    frame.preconditionFits(2, at: place)
    unsafe frame.storeNetwork(InternetChecksum.finishTransport(sum), at: place)
    flags &= ~Self.flagNeedsChecksum
    checksumStart = 0
    checksumOffset = 0
  }
}
