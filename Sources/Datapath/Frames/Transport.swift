/// A UDP header (RFC 768) as a value.
public struct UDPHeader: BitwiseCopyable, Hashable, Sendable {
  @inlinable @inline(always)
  public static var bytes: Int { 8 }

  public var sourcePort: UInt16
  public var destinationPort: UInt16
  /// Header and payload, 8 to 65,535 bytes.
  public var totalBytes: Int
  /// 0: none, which only IPv4 allows (RFC 8200 §8.1).
  public var checksum: UInt16

  @inlinable
  public init(sourcePort: UInt16, destinationPort: UInt16, totalBytes: Int, checksum: UInt16 = 0) {
    self.sourcePort = sourcePort
    self.destinationPort = destinationPort
    self.totalBytes = totalBytes
    self.checksum = checksum
  }

  /// Writes the header at `offset`; traps where it does not fit or its length is out of its range. The checksum is
  /// written as it is: it covers what may not be there yet.
  /// - Returns: the offset after it.
  @discardableResult
  @inlinable
  public func write(into frame: inout MutableRawSpan, at offset: Int) -> Int {
    precondition(totalBytes >= Self.bytes && totalBytes <= 0xffff)
    frame.preconditionFits(Self.bytes, at: offset)
    unsafe frame.storeNetwork(sourcePort, at: offset)
    unsafe frame.storeNetwork(destinationPort, at: offset &+ 2)
    unsafe frame.storeNetwork(UInt16(totalBytes), at: offset &+ 4)
    unsafe frame.storeNetwork(checksum, at: offset &+ 6)
    return offset &+ Self.bytes
  }

  /// Where the checksum stands in the header.
  @inlinable @inline(always)
  public static var checksumOffset: Int { 6 }
}

/// A UDP datagram whose length field was checked against the bytes there are.
public struct UDPView: ~Escapable {
  /// The datagram as its length field has it.
  public let bytes: RawSpan

  /// nil when `datagram` is shorter than 8 bytes, or its length field is below 8 or above the bytes there are.
  @inlinable @inline(always) @_lifetime(copy datagram)
  public init?(_ datagram: RawSpan) {
    guard datagram.byteCount >= UDPHeader.bytes else { return nil }
    let totalBytes = Int(unsafe datagram.networkUInt16(at: 4))
    guard totalBytes >= UDPHeader.bytes, totalBytes <= datagram.byteCount else { return nil }
    bytes = unsafe datagram.extracting(unchecked: 0..<totalBytes)
  }

  @inlinable @inline(always)
  public var sourcePort: UInt16 { unsafe bytes.networkUInt16(at: 0) }

  @inlinable @inline(always)
  public var destinationPort: UInt16 { unsafe bytes.networkUInt16(at: 2) }

  /// Header and payload.
  @inlinable @inline(always)
  public var totalBytes: Int { bytes.byteCount }

  @inlinable @inline(always)
  public var checksum: UInt16 { unsafe bytes.networkUInt16(at: UDPHeader.checksumOffset) }

  /// The header as a value.
  @inlinable
  public var header: UDPHeader {
    UDPHeader(
      sourcePort: sourcePort, destinationPort: destinationPort, totalBytes: totalBytes, checksum: checksum)
  }

  @inlinable
  public var payload: RawSpan {
    @_lifetime(copy self) get { unsafe bytes.extracting(unchecked: UDPHeader.bytes..<bytes.byteCount) }
  }
}

/// The flags of a TCP header (RFC 9293 §3.1), as bits of its 14th byte.
public struct TCPFlags: OptionSet, BitwiseCopyable, Hashable, Sendable {
  public let rawValue: UInt8

  @inlinable @inline(always)
  public init(rawValue: UInt8) { self.rawValue = rawValue }

  @inlinable @inline(always) public static var fin: TCPFlags { TCPFlags(rawValue: 0x01) }
  @inlinable @inline(always) public static var syn: TCPFlags { TCPFlags(rawValue: 0x02) }
  @inlinable @inline(always) public static var rst: TCPFlags { TCPFlags(rawValue: 0x04) }
  @inlinable @inline(always) public static var psh: TCPFlags { TCPFlags(rawValue: 0x08) }
  @inlinable @inline(always) public static var ack: TCPFlags { TCPFlags(rawValue: 0x10) }
  @inlinable @inline(always) public static var urg: TCPFlags { TCPFlags(rawValue: 0x20) }
  @inlinable @inline(always) public static var ece: TCPFlags { TCPFlags(rawValue: 0x40) }
  @inlinable @inline(always) public static var cwr: TCPFlags { TCPFlags(rawValue: 0x80) }
}

/// A TCP header (RFC 9293 §3.1) as a value.
public struct TCPHeader: BitwiseCopyable, Hashable, Sendable {
  /// Bytes of the header without options.
  @inlinable @inline(always)
  public static var bytesMin: Int { 20 }

  /// Bytes of the longest header: the data offset is 4 bits of 4-byte words.
  @inlinable @inline(always)
  public static var bytesMax: Int { 60 }

  /// Where the checksum stands in the header.
  @inlinable @inline(always)
  public static var checksumOffset: Int { 16 }

  public var sourcePort: UInt16
  public var destinationPort: UInt16
  public var sequence: UInt32
  public var acknowledgement: UInt32
  /// 20 to 60, a multiple of 4. The writer fills what is above 20 with zeros ("end of options").
  public var headerBytes: Int
  public var flags: TCPFlags
  public var window: UInt16
  public var checksum: UInt16
  public var urgentPointer: UInt16

  @inlinable
  public init(
    sourcePort: UInt16, destinationPort: UInt16, sequence: UInt32 = 0, acknowledgement: UInt32 = 0,
    headerBytes: Int = TCPHeader.bytesMin, flags: TCPFlags = .ack, window: UInt16 = 0xffff, checksum: UInt16 = 0,
    urgentPointer: UInt16 = 0
  ) {
    self.sourcePort = sourcePort
    self.destinationPort = destinationPort
    self.sequence = sequence
    self.acknowledgement = acknowledgement
    self.headerBytes = headerBytes
    self.flags = flags
    self.window = window
    self.checksum = checksum
    self.urgentPointer = urgentPointer
  }

  /// Writes the header at `offset`; traps where it does not fit or its length is out of its range. The checksum is
  /// written as it is: it covers what may not be there yet.
  /// - Returns: the offset after it.
  @discardableResult
  @inlinable
  public func write(into frame: inout MutableRawSpan, at offset: Int) -> Int {
    precondition(headerBytes >= Self.bytesMin && headerBytes <= Self.bytesMax && headerBytes & 3 == 0)
    frame.preconditionFits(headerBytes, at: offset)
    unsafe frame.storeNetwork(sourcePort, at: offset)
    unsafe frame.storeNetwork(destinationPort, at: offset &+ 2)
    unsafe frame.storeNetwork(sequence, at: offset &+ 4)
    unsafe frame.storeNetwork(acknowledgement, at: offset &+ 8)
    unsafe frame.storeNetwork(UInt8(headerBytes &<< 2), at: offset &+ 12)
    unsafe frame.storeNetwork(flags.rawValue, at: offset &+ 13)
    unsafe frame.storeNetwork(window, at: offset &+ 14)
    unsafe frame.storeNetwork(checksum, at: offset &+ Self.checksumOffset)
    unsafe frame.storeNetwork(urgentPointer, at: offset &+ 18)
    var option = Self.bytesMin
    while option < headerBytes {
      unsafe frame.storeNetwork(UInt32(0), at: offset &+ option)
      option &+= 4
    }
    return offset &+ headerBytes
  }
}

/// A TCP segment whose header length was checked against the bytes there are.
public struct TCPView: ~Escapable {
  /// The segment: TCP has no length of its own, so it is as long as what was given.
  public let bytes: RawSpan

  /// nil when `segment` is shorter than 20 bytes, or its data offset is below 20 or above the bytes there are.
  @inlinable @inline(always) @_lifetime(copy segment)
  public init?(_ segment: RawSpan) {
    guard segment.byteCount >= TCPHeader.bytesMin else { return nil }
    let headerBytes = Int(unsafe segment.networkUInt8(at: 12) &>> 4) &* 4
    guard headerBytes >= TCPHeader.bytesMin, headerBytes <= segment.byteCount else { return nil }
    bytes = segment
  }

  @inlinable @inline(always)
  public var sourcePort: UInt16 { unsafe bytes.networkUInt16(at: 0) }

  @inlinable @inline(always)
  public var destinationPort: UInt16 { unsafe bytes.networkUInt16(at: 2) }

  @inlinable @inline(always)
  public var sequence: UInt32 { unsafe bytes.networkUInt32(at: 4) }

  @inlinable @inline(always)
  public var acknowledgement: UInt32 { unsafe bytes.networkUInt32(at: 8) }

  /// 20 to 60.
  @inlinable @inline(always)
  public var headerBytes: Int { Int(unsafe bytes.networkUInt8(at: 12) &>> 4) &* 4 }

  @inlinable @inline(always)
  public var flags: TCPFlags { TCPFlags(rawValue: unsafe bytes.networkUInt8(at: 13)) }

  @inlinable @inline(always)
  public var window: UInt16 { unsafe bytes.networkUInt16(at: 14) }

  @inlinable @inline(always)
  public var checksum: UInt16 { unsafe bytes.networkUInt16(at: TCPHeader.checksumOffset) }

  @inlinable @inline(always)
  public var urgentPointer: UInt16 { unsafe bytes.networkUInt16(at: 18) }

  /// The header as a value; its options are not in it.
  @inlinable
  public var header: TCPHeader {
    TCPHeader(
      sourcePort: sourcePort, destinationPort: destinationPort, sequence: sequence, acknowledgement: acknowledgement,
      headerBytes: headerBytes, flags: flags, window: window, checksum: checksum, urgentPointer: urgentPointer)
  }

  /// The options, as they stand.
  @inlinable
  public var options: RawSpan {
    @_lifetime(copy self) get { unsafe bytes.extracting(unchecked: TCPHeader.bytesMin..<headerBytes) }
  }

  @inlinable
  public var payload: RawSpan {
    @_lifetime(copy self) get { unsafe bytes.extracting(unchecked: headerBytes..<bytes.byteCount) }
  }
}
