/// Protocol numbers (IANA "Assigned Internet Protocol Numbers") that are read here.
public enum IPProtocol {
  /// IPv6 only: hop-by-hop options.
  @inlinable @inline(always) public static var hopByHop: UInt8 { 0 }
  @inlinable @inline(always) public static var icmp: UInt8 { 1 }
  @inlinable @inline(always) public static var tcp: UInt8 { 6 }
  @inlinable @inline(always) public static var udp: UInt8 { 17 }
  /// IPv6 only: routing header.
  @inlinable @inline(always) public static var routing: UInt8 { 43 }
  /// IPv6 only: fragment header.
  @inlinable @inline(always) public static var fragment: UInt8 { 44 }
  /// ESP (RFC 4303): nothing after it can be read.
  @inlinable @inline(always) public static var encapsulatingSecurity: UInt8 { 50 }
  /// AH (RFC 4302).
  @inlinable @inline(always) public static var authentication: UInt8 { 51 }
  @inlinable @inline(always) public static var icmpv6: UInt8 { 58 }
  /// IPv6 only: nothing follows.
  @inlinable @inline(always) public static var noNextHeader: UInt8 { 59 }
  /// IPv6 only: destination options.
  @inlinable @inline(always) public static var destinationOptions: UInt8 { 60 }
  @inlinable @inline(always) public static var sctp: UInt8 { 132 }
}

/// An IPv4 header (RFC 791 §3.1) as a value.
public struct IPv4Header: BitwiseCopyable, Hashable, Sendable {
  /// Bytes of the header without options.
  @inlinable @inline(always)
  public static var bytesMin: Int { 20 }

  /// Bytes of the longest header: IHL is 4 bits of 4-byte words.
  @inlinable @inline(always)
  public static var bytesMax: Int { 60 }

  /// 20 to 60, a multiple of 4. The writer fills what is above 20 with zeros ("end of options").
  public var headerBytes: Int
  /// DSCP and ECN (RFC 2474, RFC 3168).
  public var typeOfService: UInt8
  /// Header and payload, at most 65,535 bytes.
  public var totalBytes: Int
  public var identification: UInt16
  /// DF.
  public var dontFragment: Bool
  /// MF.
  public var moreFragments: Bool
  /// Bytes, a multiple of 8, at most 65,528.
  public var fragmentOffsetBytes: Int
  public var timeToLive: UInt8
  /// ``IPProtocol``.
  public var ipProtocol: UInt8
  /// The first byte on the wire is the most significant.
  public var source: UInt32
  public var destination: UInt32

  @inlinable
  public init(
    headerBytes: Int = IPv4Header.bytesMin, typeOfService: UInt8 = 0, totalBytes: Int, identification: UInt16 = 0,
    dontFragment: Bool = false, moreFragments: Bool = false, fragmentOffsetBytes: Int = 0, timeToLive: UInt8 = 64,
    ipProtocol: UInt8, source: UInt32, destination: UInt32
  ) {
    self.headerBytes = headerBytes
    self.typeOfService = typeOfService
    self.totalBytes = totalBytes
    self.identification = identification
    self.dontFragment = dontFragment
    self.moreFragments = moreFragments
    self.fragmentOffsetBytes = fragmentOffsetBytes
    self.timeToLive = timeToLive
    self.ipProtocol = ipProtocol
    self.source = source
    self.destination = destination
  }

  /// Writes the header with its checksum at `offset`; traps where it does not fit or a field is out of its range.
  /// - Returns: the offset after it.
  @discardableResult
  @inlinable
  public func write(into frame: inout MutableRawSpan, at offset: Int) -> Int {
    precondition(headerBytes >= Self.bytesMin && headerBytes <= Self.bytesMax && headerBytes & 3 == 0)
    precondition(totalBytes >= 0 && totalBytes <= 0xffff)
    precondition(fragmentOffsetBytes >= 0 && fragmentOffsetBytes <= 0xfff8 && fragmentOffsetBytes & 7 == 0)
    frame.preconditionFits(headerBytes, at: offset)
    let versionAndLength = UInt8(0x40 | headerBytes &>> 2)
    let flags: UInt16 = (dontFragment ? 0x4000 : 0) | (moreFragments ? 0x2000 : 0)
    unsafe frame.storeNetwork(versionAndLength, at: offset)
    unsafe frame.storeNetwork(typeOfService, at: offset &+ 1)
    unsafe frame.storeNetwork(UInt16(totalBytes), at: offset &+ 2)
    unsafe frame.storeNetwork(identification, at: offset &+ 4)
    unsafe frame.storeNetwork(flags | UInt16(fragmentOffsetBytes &>> 3), at: offset &+ 6)
    unsafe frame.storeNetwork(timeToLive, at: offset &+ 8)
    unsafe frame.storeNetwork(ipProtocol, at: offset &+ 9)
    unsafe frame.storeNetwork(UInt16(0), at: offset &+ 10)
    unsafe frame.storeNetwork(source, at: offset &+ 12)
    unsafe frame.storeNetwork(destination, at: offset &+ 16)
    var option = Self.bytesMin
    while option < headerBytes {
      unsafe frame.storeNetwork(UInt32(0), at: offset &+ option)
      option &+= 4
    }
    let sum = InternetChecksum.sum(unsafe frame.bytes.extracting(unchecked: offset..<offset &+ headerBytes))
    unsafe frame.storeNetwork(InternetChecksum.finish(sum), at: offset &+ 10)
    return offset &+ headerBytes
  }
}

/// An IPv4 datagram whose version, header length and total length were checked against the bytes there are.
public struct IPv4View: ~Escapable {
  /// The datagram: what the link layer padded behind it is cut off.
  public let bytes: RawSpan

  /// nil when `packet` is shorter than 20 bytes, is not version 4, has a header length below 20 or above the total
  /// length, or a total length above the bytes there are. The header checksum is not looked at: see
  /// ``isChecksumValid``.
  @inlinable @inline(always) @_lifetime(copy packet)
  public init?(_ packet: RawSpan) {
    guard packet.byteCount >= IPv4Header.bytesMin else { return nil }
    let versionAndLength = unsafe packet.networkUInt8(at: 0)
    let headerBytes = Int(versionAndLength & 0x0f) &* 4
    let totalBytes = Int(unsafe packet.networkUInt16(at: 2))
    guard versionAndLength &>> 4 == 4, headerBytes >= IPv4Header.bytesMin, headerBytes <= totalBytes,
      totalBytes <= packet.byteCount
    else { return nil }
    bytes = unsafe packet.extracting(unchecked: 0..<totalBytes)
  }

  /// 20 to 60, within ``totalBytes``.
  @inlinable @inline(always)
  public var headerBytes: Int { Int(unsafe bytes.networkUInt8(at: 0) & 0x0f) &* 4 }

  /// DSCP and ECN.
  @inlinable @inline(always)
  public var typeOfService: UInt8 { unsafe bytes.networkUInt8(at: 1) }

  /// The two ECN bits (RFC 3168).
  @inlinable @inline(always)
  public var ecn: UInt8 { typeOfService & 0x3 }

  /// Header and payload.
  @inlinable @inline(always)
  public var totalBytes: Int { bytes.byteCount }

  @inlinable @inline(always)
  public var identification: UInt16 { unsafe bytes.networkUInt16(at: 4) }

  /// DF.
  @inlinable @inline(always)
  public var dontFragment: Bool { unsafe bytes.networkUInt16(at: 6) & 0x4000 != 0 }

  /// MF.
  @inlinable @inline(always)
  public var moreFragments: Bool { unsafe bytes.networkUInt16(at: 6) & 0x2000 != 0 }

  /// Bytes.
  @inlinable @inline(always)
  public var fragmentOffsetBytes: Int { Int(unsafe bytes.networkUInt16(at: 6) & 0x1fff) &* 8 }

  /// A part of a datagram, be it the first or a later one.
  @inlinable @inline(always)
  public var isFragment: Bool { unsafe bytes.networkUInt16(at: 6) & 0x3fff != 0 }

  @inlinable @inline(always)
  public var timeToLive: UInt8 { unsafe bytes.networkUInt8(at: 8) }

  /// ``IPProtocol``.
  @inlinable @inline(always)
  public var ipProtocol: UInt8 { unsafe bytes.networkUInt8(at: 9) }

  /// As it stands in the header.
  @inlinable @inline(always)
  public var headerChecksum: UInt16 { unsafe bytes.networkUInt16(at: 10) }

  @inlinable @inline(always)
  public var source: UInt32 { unsafe bytes.networkUInt32(at: 12) }

  @inlinable @inline(always)
  public var destination: UInt32 { unsafe bytes.networkUInt32(at: 16) }

  /// Whether the header checksum is right: reads the whole header.
  @inlinable
  public var isChecksumValid: Bool {
    InternetChecksum.finish(InternetChecksum.sum(unsafe bytes.extracting(unchecked: 0..<headerBytes))) == 0
  }

  /// The header as a value; its options are not in it.
  @inlinable
  public var header: IPv4Header {
    IPv4Header(
      headerBytes: headerBytes, typeOfService: typeOfService, totalBytes: totalBytes, identification: identification,
      dontFragment: dontFragment, moreFragments: moreFragments, fragmentOffsetBytes: fragmentOffsetBytes,
      timeToLive: timeToLive, ipProtocol: ipProtocol, source: source, destination: destination)
  }

  /// What comes after the header, to the end of the datagram.
  @inlinable
  public var payload: RawSpan {
    @_lifetime(copy self) get { unsafe bytes.extracting(unchecked: headerBytes..<bytes.byteCount) }
  }

  /// The running sum of the pseudo-header for the payload: of an unfragmented datagram.
  @inlinable
  public var pseudoHeaderSum: UInt64 {
    InternetChecksum.pseudoHeader(
      source: source, destination: destination, ipProtocol: ipProtocol, length: totalBytes &- headerBytes)
  }
}
