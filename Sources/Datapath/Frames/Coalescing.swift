// Joining consecutive frames of one flow into a super-frame: the way back of Segmentation.swift. The rules are those of
// the kernel's GRO (`tcp_gro_receive` of net/ipv4/tcp_offload.c, `udp_gro_receive_segment` of net/ipv4/udp_offload.c,
// `inet_gro_receive` and `inet_gro_flush`, `ipv6_gro_receive`), narrowed to what segmentation makes again bit by bit.
// The frames are not copied: what is kept of them is a few numbers, and the whole's headers are written at the end.

/// Frames that become one super-frame: the first, and how many more have joined it.
///
/// Whatever joins comes out again, byte for byte, when ``SuperFrame`` cuts the whole. All frames have the same headers
/// but for lengths, checksums, IPv4 identification (counts up by one), TCP sequence (counts up by payload), PSH and FIN
/// (the last frame's only) and CWR (the first's only). All have as much payload as the first; the last may have less.
///
/// One thing may come out otherwise: UDP datagrams with DF may have any IPv4 identifications, which say nothing there
/// (RFC 6864 section 4.1). Linux sends all with one where the socket is not connected, and a queue before us that lost
/// some leaves gaps. Cut again they have ones that count up from the first's.
///
/// The whole gets a checksum of its own, which would bless a corrupt frame: so the IPv4 header's and the transport's
/// checksum of every frame are verified before it is taken.
///
/// No frame is held: the first's headers are handed over with every call, and must be the same bytes as in
/// ``init(_:)``. Other bytes make a wrong super-frame, and nothing worse.
public struct Coalescer: BitwiseCopyable, Hashable, Sendable {
  /// Bytes of the longest IP packet that is made: what IPv4's length field says at most. IPv6's payload length could
  /// say 40 more, which the kernel's GRO does not make either (its GRO_LEGACY_MAX_SIZE is 65,536).
  @inlinable @inline(always)
  public static var networkBytesMax: Int { 0xffff }

  /// Of the headers that each frame has, Ethernet to transport with options: there its payload starts, in every frame.
  /// At most ``SuperFrame/headerBytesMax``.
  public let headerBytes: Int
  /// Payload of the first frame, and of each but the last.
  public let segmentPayloadBytes: Int
  /// Frames that are in, the first included.
  public private(set) var frameCount: Int
  /// Payload of all frames together.
  public private(set) var payloadBytes: Int
  @usableFromInline let networkOffset: Int
  @usableFromInline let transportOffset: Int
  @usableFromInline let isIPv4: Bool
  @usableFromInline let isTCP: Bool
  /// The first frame has TCP's CWR.
  @usableFromInline let hasCWR: Bool
  /// PSH and FIN of the last frame: either ends the run.
  private var endFlags: TCPFlags
  /// The running sum over the IPv4 header without total length, identification and checksum; over the pseudo-header
  /// without length.
  private let networkSum: UInt64
  private let pseudoHeaderSum: UInt64

  // MARK: The first frame

  /// Starts with one frame. nil when it can be no part of a super-frame: when it is not TCP or UDP over IPv4 or IPv6,
  /// is a fragment or has a fragment or authentication header, has a length that differs from the frame's (padding
  /// behind the IP packet, too), no payload, headers longer than ``SuperFrame/headerBytesMax``, IPv4's reserved flag,
  /// TCP's SYN, RST or URG, no transport checksum, or a checksum that is wrong.
  ///
  /// It costs a pass over the payload: ask only where a second frame follows.
  /// - Parameter first: the whole frame, destination MAC to the end of payload, as it goes on the wire.
  public init?(_ first: RawSpan) {
    guard let parsed = ParsedFrame(first) else { return nil }
    let isTCP = parsed.ipProtocol == IPProtocol.tcp
    let network = parsed.networkOffset
    let transport = parsed.transportOffset
    guard isTCP || parsed.ipProtocol == IPProtocol.udp, transport != 0,
      network &+ parsed.networkBytes == first.byteCount, parsed.networkBytes <= Self.networkBytesMax
    else { return nil }

    var flags = TCPFlags()
    var transportHeaderBytes = UDPHeader.bytes
    if isTCP {
      transportHeaderBytes = Int(unsafe first.networkUInt8(at: transport &+ 12) &>> 4) &* 4
      flags = TCPFlags(rawValue: unsafe first.networkUInt8(at: transport &+ 13))
      guard transportHeaderBytes >= TCPHeader.bytesMin, flags.isDisjoint(with: [.syn, .rst, .urg]) else { return nil }
    } else {
      guard Int(unsafe first.networkUInt16(at: transport &+ 4)) == first.byteCount &- transport else { return nil }
    }
    let headerBytes = transport &+ transportHeaderBytes
    guard headerBytes <= SuperFrame.headerBytesMax, headerBytes < first.byteCount else { return nil }

    self.headerBytes = headerBytes
    self.segmentPayloadBytes = first.byteCount &- headerBytes
    self.frameCount = 1
    self.payloadBytes = first.byteCount &- headerBytes
    self.networkOffset = network
    self.transportOffset = transport
    self.isIPv4 = parsed.ipVersion == 4
    self.isTCP = isTCP
    self.hasCWR = flags.contains(.cwr)
    self.endFlags = flags.intersection([.psh, .fin])
    if isIPv4 {
      // DF may stand there; a fragment's offset, MF and the reserved flag may not.
      guard unsafe first.networkUInt16(at: network &+ 6) & 0xbfff == 0 else { return nil }
      let header = InternetChecksum.sum(unsafe first.extracting(unchecked: network..<transport))
      let changing =
        UInt64(unsafe first.networkUInt32(at: network &+ 2)) &+ UInt64(unsafe first.networkUInt16(at: network &+ 10))
      self.networkSum = header &+ UInt64(~InternetChecksum.fold(changing))
      self.pseudoHeaderSum = InternetChecksum.pseudoHeader(
        source: unsafe first.networkUInt32(at: network &+ 12),
        destination: unsafe first.networkUInt32(at: network &+ 16), ipProtocol: parsed.ipProtocol, length: 0)
    } else {
      guard Self.isCuttable(first, from: network, to: transport) else { return nil }
      self.networkSum = 0
      self.pseudoHeaderSum = InternetChecksum.pseudoHeader(
        source: unsafe first.networkUInt128(at: network &+ 8),
        destination: unsafe first.networkUInt128(at: network &+ 24), ipProtocol: parsed.ipProtocol, length: 0)
    }
    guard areChecksumsRight(first) else { return nil }
  }

  /// Whether all extension headers of an IPv6 packet are of those that may stand before many segments: an
  /// authentication header covers its packet, a fragment header names it. Of a packet whose headers were followed.
  private static func isCuttable(_ frame: RawSpan, from network: Int, to transport: Int) -> Bool {
    var nextHeader = unsafe frame.networkUInt8(at: network &+ 6)
    var offset = network &+ IPv6Header.bytes
    while offset < transport {
      guard
        nextHeader == IPProtocol.hopByHop || nextHeader == IPProtocol.routing
          || nextHeader == IPProtocol.destinationOptions
      else { return false }
      nextHeader = unsafe frame.networkUInt8(at: offset)
      offset &+= (Int(unsafe frame.networkUInt8(at: offset &+ 1)) &+ 1) &* 8
    }
    return true
  }

  // MARK: The next frame

  /// Nothing more may join: the last frame is shorter or has PSH or FIN, there are as many frames as one super-frame
  /// may have (``SuperFrame/segmentsMaxTCP``, ``SuperFrame/segmentsMaxUDP``), or it is as long as it may be.
  @inlinable
  public var isComplete: Bool {
    hasEnd || payloadBytes < frameCount &* segmentPayloadBytes || frameCount >= framesMax
      || headerBytes &- networkOffset &+ payloadBytes >= Self.networkBytesMax
  }

  @usableFromInline var hasEnd: Bool { !endFlags.isEmpty }

  @inlinable @inline(always)
  var framesMax: Int { isTCP ? SuperFrame.segmentsMaxTCP : SuperFrame.segmentsMaxUDP }

  /// Joins the next frame, if it goes on where the last one ended. What needs few reads is asked first, and the
  /// checksum over all of it last: a frame of another flow costs a few nanoseconds.
  /// - Parameters:
  ///   - first: the first frame or its headers: traps when there are less than ``headerBytes``.
  ///   - next: the whole frame.
  /// - Returns: false, with nothing changed, where it may not join. It may be the first of another super-frame.
  public mutating func join(_ first: RawSpan, _ next: RawSpan) -> Bool {
    precondition(first.byteCount >= headerBytes, "the first frame's headers are not whole")
    let nextPayloadBytes = next.byteCount &- headerBytes
    guard !isComplete, nextPayloadBytes > 0, nextPayloadBytes <= segmentPayloadBytes,
      headerBytes &- networkOffset &+ payloadBytes &+ nextPayloadBytes <= Self.networkBytesMax,
      goesOn(first, next), hasSameHeaders(first, next), areChecksumsRight(next)
    else { return false }
    frameCount &+= 1
    payloadBytes &+= nextPayloadBytes
    if isTCP {
      endFlags = TCPFlags(rawValue: unsafe next.networkUInt8(at: transportOffset &+ 13)).intersection([.psh, .fin])
    }
    return true
  }

  /// Ports, and the numbers that count up. Both spans have whole headers, here and below.
  @inline(__always)
  private func goesOn(_ first: RawSpan, _ next: RawSpan) -> Bool {
    guard unsafe first.networkUInt32(at: transportOffset) == next.networkUInt32(at: transportOffset) else {
      return false
    }
    if isTCP {
      let sequence = unsafe first.networkUInt32(at: transportOffset &+ 4) &+ UInt32(truncatingIfNeeded: payloadBytes)
      guard unsafe next.networkUInt32(at: transportOffset &+ 4) == sequence else { return false }
    } else {
      guard Int(unsafe next.networkUInt16(at: transportOffset &+ 4)) == next.byteCount &- transportOffset else {
        return false
      }
    }
    if isIPv4 {
      guard Int(unsafe next.networkUInt16(at: networkOffset &+ 2)) == next.byteCount &- networkOffset else {
        return false
      }
      let step =
        unsafe next.networkUInt16(at: networkOffset &+ 4) &- first.networkUInt16(at: networkOffset &+ 4)
      return step == UInt16(truncatingIfNeeded: frameCount) || mayHaveAnyIdentification(first)
    }
    return Int(unsafe next.networkUInt16(at: networkOffset &+ 4))
      == next.byteCount &- networkOffset &- IPv6Header.bytes
  }

  /// Whether the identification says nothing. TCP's segments, for which DF would allow it too, come out as they were.
  @inline(__always)
  private func mayHaveAnyIdentification(_ first: RawSpan) -> Bool {
    if isTCP { return false }
    return unsafe first.networkUInt8(at: networkOffset &+ 6) & 0x40 != 0
  }

  /// All that must be the same: collected, and asked once at the end. Since what tells how long the headers are is
  /// among it, the next frame needs no parsing.
  @inline(__always)
  private func hasSameHeaders(_ first: RawSpan, _ next: RawSpan) -> Bool {
    var difference = UInt64.zero
    // Ethernet, tags: 14 bytes and 4 each.
    difference |= unsafe first.networkUInt64(at: 0) ^ next.networkUInt64(at: 0)
    difference |= unsafe first.networkUInt64(at: 6) ^ next.networkUInt64(at: 6)
    difference |= Self.difference(first, next, from: EthernetHeader.bytes, to: networkOffset)
    let network = networkOffset
    if isIPv4 {
      // Without total length and identification, without the checksum.
      let start = unsafe first.networkUInt64(at: network) ^ next.networkUInt64(at: network)
      difference |= start & 0xffff_0000_0000_ffff
      let middle = unsafe first.networkUInt64(at: network &+ 8) ^ next.networkUInt64(at: network &+ 8)
      difference |= middle & 0xffff_0000_ffff_ffff
      difference |= Self.difference(first, next, from: network &+ 16, to: transportOffset)
    } else {
      // Without the payload's length.
      let start = unsafe first.networkUInt64(at: network) ^ next.networkUInt64(at: network)
      difference |= start & 0xffff_ffff_0000_ffff
      difference |= Self.difference(first, next, from: network &+ 8, to: transportOffset)
    }
    if isTCP {
      // Acknowledgement, data offset, flags, window, without CWR, PSH and FIN; then the urgent pointer and options. CWR
      // would have to stay on the first segment.
      let transport = transportOffset
      let word = unsafe next.networkUInt64(at: transport &+ 8)
      difference |= (unsafe first.networkUInt64(at: transport &+ 8) ^ word) & 0xffff_ffff_ff76_ffff
      difference |= word & 0x0000_0000_0080_0000
      difference |= UInt64(
        unsafe first.networkUInt16(at: transport &+ 18) ^ next.networkUInt16(at: transport &+ 18))
      difference |= Self.difference(first, next, from: transport &+ TCPHeader.bytesMin, to: headerBytes)
    }
    return difference == 0
  }

  /// Not zero where two ranges of bytes differ, whose length is a multiple of 4.
  @inline(__always)
  private static func difference(_ first: RawSpan, _ next: RawSpan, from start: Int, to end: Int) -> UInt64 {
    var difference = UInt64.zero
    var offset = start
    while offset &+ 8 <= end {
      difference |= unsafe first.networkUInt64(at: offset) ^ next.networkUInt64(at: offset)
      offset &+= 8
    }
    if offset < end {
      difference |= UInt64(unsafe first.networkUInt32(at: offset) ^ next.networkUInt32(at: offset))
    }
    return difference
  }

  /// Whether the IPv4 header's and the transport's checksum of a frame with these headers are right, and are written
  /// as segmentation writes them: not as the other of the two zeros of one's complement. For UDP a zero is none.
  @inline(__always)
  private func areChecksumsRight(_ frame: RawSpan) -> Bool {
    if isIPv4 {
      let checksum = unsafe frame.networkUInt16(at: networkOffset &+ 10)
      let changing = UInt64(unsafe frame.networkUInt32(at: networkOffset &+ 2)) &+ UInt64(checksum)
      guard checksum != 0xffff, InternetChecksum.finish(networkSum &+ changing) == 0 else { return false }
    }
    let place = transportOffset &+ (isTCP ? TCPHeader.checksumOffset : UDPHeader.checksumOffset)
    guard unsafe frame.networkUInt16(at: place) != 0 else { return false }
    let sum = InternetChecksum.sum(
      unsafe frame.extracting(unchecked: transportOffset..<frame.byteCount),
      initial: pseudoHeaderSum &+ UInt64(frame.byteCount &- transportOffset))
    return InternetChecksum.finish(sum) == 0
  }

  // MARK: The whole

  /// Bytes of the whole: headers once, and the payload of each frame behind them, in order.
  @inlinable @inline(always)
  public var frameBytes: Int { headerBytes &+ payloadBytes }

  /// What stands before the whole: the transport's checksum is to be finished; with two frames and more, how to cut it.
  @inlinable
  public var offload: OffloadHeader {
    var offload = OffloadHeader(
      flags: OffloadHeader.flagNeedsChecksum, headerLength: UInt16(truncatingIfNeeded: headerBytes),
      checksumStart: UInt16(truncatingIfNeeded: transportOffset),
      checksumOffset: UInt16(truncatingIfNeeded: isTCP ? TCPHeader.checksumOffset : UDPHeader.checksumOffset))
    guard frameCount > 1 else { return offload }
    offload.gsoSize = UInt16(truncatingIfNeeded: segmentPayloadBytes)
    if isTCP {
      let segmentation: OffloadHeader.Segmentation = isIPv4 ? .tcpv4 : .tcpv6
      offload.gsoType = segmentation.rawValue | (hasCWR ? OffloadHeader.segmentationECN : 0)
    } else {
      offload.gsoType = OffloadHeader.Segmentation.udp.rawValue
    }
    return offload
  }

  /// Writes the whole's headers at `offset`, Ethernet to transport: the first frame's, with the whole's lengths and
  /// IPv4 checksum, PSH and FIN of the last frame, and the pseudo-header's sum in place of the transport's checksum.
  /// - Parameters:
  ///   - first: the first frame or its headers: traps when there are less than ``headerBytes``.
  ///   - headers: traps when there is no room for ``headerBytes``.
  /// - Returns: the offset after the headers.
  @discardableResult
  public func writeHeaders(_ first: RawSpan, into headers: inout MutableRawSpan, at offset: Int = 0) -> Int {
    precondition(first.byteCount >= headerBytes, "the first frame's headers are not whole")
    headers.preconditionFits(headerBytes, at: offset)
    headers.copy(headerBytes, of: first, to: offset)
    let network = offset &+ networkOffset
    let transport = offset &+ transportOffset
    let packetBytes = headerBytes &- networkOffset &+ payloadBytes
    let transportBytes = headerBytes &- transportOffset &+ payloadBytes
    if isIPv4 {
      let identification = unsafe first.networkUInt16(at: networkOffset &+ 4)
      let sum = networkSum &+ UInt64(packetBytes) &+ UInt64(identification)
      unsafe headers.storeNetwork(UInt16(truncatingIfNeeded: packetBytes), at: network &+ 2)
      unsafe headers.storeNetwork(InternetChecksum.finish(sum), at: network &+ 10)
    } else {
      unsafe headers.storeNetwork(UInt16(truncatingIfNeeded: packetBytes &- IPv6Header.bytes), at: network &+ 4)
    }
    let pseudoHeader = InternetChecksum.fold(pseudoHeaderSum &+ UInt64(transportBytes))
    if isTCP {
      let flags = TCPFlags(rawValue: unsafe first.networkUInt8(at: transportOffset &+ 13)).union(endFlags)
      unsafe headers.storeNetwork(flags.rawValue, at: transport &+ 13)
      unsafe headers.storeNetwork(pseudoHeader, at: transport &+ TCPHeader.checksumOffset)
    } else {
      unsafe headers.storeNetwork(UInt16(truncatingIfNeeded: transportBytes), at: transport &+ 4)
      unsafe headers.storeNetwork(pseudoHeader, at: transport &+ UDPHeader.checksumOffset)
    }
    return offset &+ headerBytes
  }
}
