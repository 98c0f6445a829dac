// Cutting a super-frame into the frames that it stands for, as the kernel's software segmentation does
// (`tcp_gso_segment` of net/ipv4/tcp_offload.c, `__udp_gso_segment` of net/ipv4/udp_offload.c, `inet_gso_segment`,
// `ipv6_gso_segment`): the headers of each segment are made here, its payload stays where it is.

/// Where the parts of a super-frame lie (virtio 1.x §5.1.6.2): TCP over IPv4 or IPv6 (TSO), or UDP over either (USO),
/// behind VLAN tags, IPv4 options and IPv6 extension headers.
///
/// That there is a value means that every segment of it can be made: its headers are whole and within bounds, and say
/// the same as the offload header. The frame itself is not held; whoever asks for a segment hands it over again.
public struct SuperFrame: BitwiseCopyable, Hashable, Sendable {
  /// The longest headers that are cut, Ethernet to transport: 14 bytes of Ethernet, 8 of two tags, 40 of IPv6 and 60 of
  /// TCP leave 70 for extension headers; IPv4 with all its options has 142. Each send has room for so many.
  @inlinable @inline(always)
  public static var headerBytesMax: Int { 192 }

  /// The segments of one TCP super-frame. A guest may ask for segments of a byte each: 65,000 frames for one. 256 cut
  /// 64 KiB into 256 bytes each, half of what any TCP must take (536 bytes, RFC 9293 §3.7.1), and are what one lane
  /// holds; more would not get out anyway.
  @inlinable @inline(always)
  public static var segmentsMaxTCP: Int { 256 }

  /// The segments of one UDP super-frame: the kernel's UDP_MAX_SEGMENTS since 6.9 (include/linux/udp.h), which neither
  /// makes nor takes longer ones.
  @inlinable @inline(always)
  public static var segmentsMaxUDP: Int { 128 }

  /// Of the whole, from the Ethernet header on.
  public let frameBytes: Int
  /// Of the headers that each segment has, Ethernet to transport with options: at most ``headerBytesMax``.
  public let headerBytes: Int
  /// Payload of each segment; the last may have less, and a single one is not longer than what there is.
  public let segmentPayloadBytes: Int
  /// 1 to ``segmentsMaxTCP`` or ``segmentsMaxUDP``.
  public let segmentCount: Int
  @usableFromInline let networkOffset: Int
  @usableFromInline let transportOffset: Int
  @usableFromInline let isIPv4: Bool
  @usableFromInline let isTCP: Bool

  /// From a whole frame; nil when it is not well-formed.
  @inlinable
  public init?(_ frame: RawSpan, _ offload: OffloadHeader) {
    self.init(headers: frame, frameBytes: frame.byteCount, offload)
  }

  /// From a frame's first bytes; nil when it is not well-formed: no segmentation that is known, no checksum to finish
  /// or not the transport's, another protocol than the offload header says, a fragment, headers that are cut off or
  /// longer than ``headerBytesMax``, lengths that differ from the frame's, no payload, or too many segments.
  /// - Parameters:
  ///   - headers: all of the frame, or enough for all headers.
  ///   - frameBytes: of the whole frame.
  @inlinable
  public init?(headers: RawSpan, frameBytes: Int, _ offload: OffloadHeader) {
    guard offload.isSuperFrame, offload.isWellFormed(frameBytes: frameBytes),
      let parsed = ParsedFrame(headers: headers, frameBytes: frameBytes)
    else { return nil }
    let isTCP = parsed.ipProtocol == IPProtocol.tcp
    switch offload.segmentation {
    case .tcpv4: guard isTCP, parsed.ipVersion == 4 else { return nil }
    case .tcpv6: guard isTCP, parsed.ipVersion == 6 else { return nil }
    case .udp: guard parsed.ipProtocol == IPProtocol.udp else { return nil }
    default: return nil
    }
    // Offset 0: no whole transport header. A super-frame has no padding behind the IP packet.
    let transport = parsed.transportOffset
    guard transport != 0, !parsed.isFragment, parsed.networkOffset &+ parsed.networkBytes == frameBytes,
      Int(offload.checksumStart) == transport,
      Int(offload.checksumOffset) == (isTCP ? TCPHeader.checksumOffset : UDPHeader.checksumOffset)
    else { return nil }
    let transportBytes = isTCP ? Int(unsafe headers.networkUInt8(at: transport &+ 12) &>> 4) &* 4 : UDPHeader.bytes
    let headerBytes = transport &+ transportBytes
    guard transportBytes >= (isTCP ? TCPHeader.bytesMin : UDPHeader.bytes), headerBytes <= Self.headerBytesMax,
      headerBytes <= headers.byteCount, headerBytes < frameBytes
    else { return nil }
    let payloadBytes = frameBytes &- headerBytes
    // Not 0: that is not well-formed.
    let segmentBytes = Int(offload.gsoSize)
    let count = (payloadBytes &+ segmentBytes &- 1) / segmentBytes
    guard count <= (isTCP ? Self.segmentsMaxTCP : Self.segmentsMaxUDP) else { return nil }
    self.frameBytes = frameBytes
    self.headerBytes = headerBytes
    self.segmentPayloadBytes = min(segmentBytes, payloadBytes)
    self.segmentCount = count
    self.networkOffset = parsed.networkOffset
    self.transportOffset = transport
    self.isIPv4 = parsed.ipVersion == 4
    self.isTCP = isTCP
  }

  /// Bytes of the longest segment, headers included: the first's.
  @inlinable @inline(always)
  public var segmentBytesMax: Int { headerBytes &+ segmentPayloadBytes }

  /// Where the payload of a segment starts, from the start of the frame.
  /// - Parameter number: 0 to ``segmentCount`` - 1; traps outside.
  @inlinable @inline(always)
  public func payloadOffset(ofSegment number: Int) -> Int {
    precondition(number >= 0 && number < segmentCount, "no such segment")
    return headerBytes &+ number &* segmentPayloadBytes
  }

  /// How many bytes of payload a segment has: ``segmentPayloadBytes``, the last perhaps less.
  @inlinable @inline(always)
  public func payloadBytes(ofSegment number: Int) -> Int {
    min(segmentPayloadBytes, frameBytes &- payloadOffset(ofSegment: number))
  }

  /// Writes the headers of a segment at `offset`, Ethernet to transport, with all lengths and checksums finished: with
  /// its payload behind them it is a frame. The IPv4 identification counts up by segments; the TCP sequence by bytes;
  /// PSH and FIN stay on the last segment only, CWR on the first. A transport checksum of zero is written as ffff.
  ///
  /// The checksum that the super-frame has is believed to be the pseudo-header's sum over its whole length, as the
  /// kernel does: where it is not, those of the segments are wrong as well, and the receiver drops them.
  /// - Parameters:
  ///   - number: 0 to ``segmentCount`` - 1.
  ///   - frame: the whole that this was made from. Traps when it has another length.
  ///   - headers: traps when there is no room for ``headerBytes``.
  /// - Returns: the offset after the headers.
  @discardableResult
  @inlinable
  public func writeHeaders(
    ofSegment number: Int, of frame: RawSpan, into headers: inout MutableRawSpan, at offset: Int = 0
  ) -> Int {
    precondition(frame.byteCount == frameBytes, "another frame than the one that was looked at")
    let start = payloadOffset(ofSegment: number)
    let end = start &+ payloadBytes(ofSegment: number)
    let sum = InternetChecksum.sum(unsafe frame.extracting(unchecked: start..<end))
    return writeHeaders(ofSegment: number, of: frame, payloadSum: sum, into: &headers, at: offset)
  }

  /// The same for a frame of which only the first bytes are at hand, with the sum of the segment's payload.
  /// - Parameter frame: at least its headers: traps where it has fewer than ``headerBytes``.
  @inlinable
  public func writeHeaders(
    ofSegment number: Int, of frame: RawSpan, payloadSum: UInt64, into headers: inout MutableRawSpan, at offset: Int
  ) -> Int {
    precondition(frame.byteCount >= headerBytes, "a super-frame's headers are cut off")
    headers.preconditionFits(headerBytes, at: offset)
    let payloadBytes = payloadBytes(ofSegment: number)
    headers.copy(headerBytes, of: frame, to: offset)
    let transportBytes = headerBytes &- transportOffset
    let network = offset &+ networkOffset
    let packetBytes = headerBytes &- networkOffset &+ payloadBytes
    if isIPv4 {
      let identification = unsafe frame.networkUInt16(at: networkOffset &+ 4)
      unsafe headers.storeNetwork(UInt16(truncatingIfNeeded: packetBytes), at: network &+ 2)
      unsafe headers.storeNetwork(identification &+ UInt16(truncatingIfNeeded: number), at: network &+ 4)
      unsafe headers.storeNetwork(UInt16(0), at: network &+ 10)
      let networkHeaderBytes = Int(unsafe frame.networkUInt8(at: networkOffset) & 0x0f) &* 4
      let sum = InternetChecksum.sum(
        unsafe headers.bytes.extracting(unchecked: network..<network &+ networkHeaderBytes))
      unsafe headers.storeNetwork(InternetChecksum.finish(sum), at: network &+ 10)
    } else {
      unsafe headers.storeNetwork(UInt16(truncatingIfNeeded: packetBytes &- IPv6Header.bytes), at: network &+ 4)
    }

    // The pseudo-header's sum with this segment's length instead of the whole's.
    let transport = offset &+ transportOffset
    let wholeBytes: UInt16
    let checksum: Int
    if isTCP {
      wholeBytes = UInt16(truncatingIfNeeded: frameBytes &- transportOffset)
      checksum = TCPHeader.checksumOffset
      let sequence = unsafe frame.networkUInt32(at: transportOffset &+ 4)
      unsafe headers.storeNetwork(
        sequence &+ UInt32(truncatingIfNeeded: number &* segmentPayloadBytes), at: transport &+ 4)
      var flags = TCPFlags(rawValue: unsafe frame.networkUInt8(at: transportOffset &+ 13))
      if number > 0 { flags.remove(.cwr) }
      if number < segmentCount &- 1 { flags.subtract([.psh, .fin]) }
      unsafe headers.storeNetwork(flags.rawValue, at: transport &+ 13)
    } else {
      wholeBytes = unsafe frame.networkUInt16(at: transportOffset &+ 4)
      checksum = UDPHeader.checksumOffset
      unsafe headers.storeNetwork(
        UInt16(truncatingIfNeeded: UDPHeader.bytes &+ payloadBytes), at: transport &+ 4)
    }
    let pseudoHeader = unsafe frame.networkUInt16(at: transportOffset &+ checksum)
    unsafe headers.storeNetwork(UInt16(0), at: transport &+ checksum)
    var sum = UInt64(InternetChecksum.fold(payloadSum)) &+ UInt64(pseudoHeader) &+ UInt64(~wholeBytes)
    sum = InternetChecksum.sum(
      unsafe headers.bytes.extracting(unchecked: transport..<transport &+ transportBytes),
      initial: sum &+ UInt64(transportBytes &+ payloadBytes))
    unsafe headers.storeNetwork(InternetChecksum.finishTransport(sum), at: transport &+ checksum)
    return offset &+ headerBytes
  }
}
