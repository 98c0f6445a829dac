// The way of a frame through its parser, in order: addresses, tags, IP header, extension headers, ports; then one
// hash over what tells flows apart. One pass, each border checked once, nothing written but the result.

/// What forwarding wants to know of a frame, read from its headers once.
///
/// Nothing in it is a judgement: a frame whose IP header is broken is still an Ethernet frame, and a bridge forwards
/// it. Whoever acts on the IP layer (ToS, segmentation, coalescing) asks ``networkLengthValid`` first.
///
/// Every offset counts from the start of the frame and lies within the bytes that were parsed.
public struct ParsedFrame: BitwiseCopyable, Hashable, Sendable {
  public let destination: MACAddress
  public let source: MACAddress
  /// After the Ethernet header and its tags: of the IP header, if ``ipVersion`` is not 0. At most the count of bytes.
  public let networkOffset: Int
  /// Of the transport header, behind IP options and extension headers; 0 when there is none to read: not IP, a
  /// fragment that is not the first, a length that is not valid, or less than a whole TCP (20 bytes), UDP (8) or
  /// SCTP (12) header, for other protocols less than 1 byte.
  public let transportOffset: Int
  /// Bytes of the IP packet as its header declares them, the header included; 0 for what is not IP.
  public let networkBytes: Int
  /// The same for all frames of a flow in one direction, well mixed in all its bits. From VLAN identifiers, addresses,
  /// protocol and, in a whole TCP, UDP or SCTP datagram, ports. Fragments have no ports (all fragments of a datagram
  /// agree, the first too) and IPv6 fragments no protocol either (theirs may differ: RFC 8200 §4.5). From MAC
  /// addresses and EtherType when not IP. Not keyed: no defence against flows made to collide.
  public let flowHash: UInt32
  /// VID of the outer tag; 0 with no tag, or with a tag that bears a priority only.
  public let vlanIdentifier: UInt16
  /// Behind the tags. A tag's own where there are more than ``VLANTag/tagsMax`` tags or one is cut off.
  public let etherType: UInt16
  /// 0 to ``VLANTag/tagsMax``.
  public let tagCount: UInt8
  /// 4 or 6; 0 when not IP, or when the fixed IP header is cut off or is none.
  public let ipVersion: UInt8
  /// IPv4's ToS or IPv6's traffic class: DSCP and ECN; 0 when ``ipVersion`` is 0.
  public let typeOfService: UInt8
  /// ``IPProtocol`` of the transport, behind extension headers where they could be followed (as in
  /// ``IPv6UpperLayer/ipProtocol``); 0 when ``ipVersion`` is 0.
  public let ipProtocol: UInt8
  /// Part of a datagram, the first or a later one.
  public let isFragment: Bool
  /// False when the EtherType says IP and the header is malformed or claims more bytes than the frame has.
  public let networkLengthValid: Bool

  /// Parses a frame; nil when it is shorter than 14 bytes.
  @inlinable @inline(always)
  public init?(_ frame: RawSpan) {
    self.init(headers: frame, frameBytes: frame.byteCount)
  }

  /// Parses a frame whose headers alone were copied (from a guest's memory, where they could change under the
  /// parser) while its payload stays elsewhere.
  /// - Parameters:
  ///   - headers: the frame's first bytes: all of them, or enough for all headers.
  ///   - frameBytes: of the whole frame; lengths are checked against it. Below the count of `headers` it cuts them.
  /// - Returns: nil when there are less than 14 bytes.
  ///
  /// Inlined into its few callers, which spares the result its way through memory: 9 to 10 ns for TCP over IPv4 and 16
  /// to 18 over IPv6, against 21 and 24 to 26 when called (one hot frame, every field used, best of 9).
  @inlinable @inline(always)
  public init?(headers: RawSpan, frameBytes: Int) {
    let limit = min(headers.byteCount, frameBytes)
    guard limit >= EthernetHeader.bytes else { return nil }
    let frame = unsafe headers.extracting(unchecked: 0..<limit)

    // 1. Addresses.
    destination = MACAddress(bits: unsafe frame.networkUInt64(at: 0) &>> 16)
    source = MACAddress(bits: unsafe frame.networkUInt64(at: 6) &>> 16)

    // 2. Tags.
    var etherType = unsafe frame.networkUInt16(at: 12)
    var networkOffset = EthernetHeader.bytes
    var tagCount: UInt8 = 0
    var vlanIdentifier: UInt16 = 0
    var vlanIdentifiers: UInt64 = 0
    while VLANTag.isTag(etherType), Int(tagCount) < VLANTag.tagsMax, networkOffset &+ VLANTag.bytes <= limit {
      let identifier = unsafe frame.networkUInt16(at: networkOffset) & 0xfff
      etherType = unsafe frame.networkUInt16(at: networkOffset &+ 2)
      networkOffset &+= VLANTag.bytes
      vlanIdentifier = tagCount == 0 ? identifier : vlanIdentifier
      vlanIdentifiers = vlanIdentifiers &<< 12 | UInt64(identifier)
      tagCount &+= 1
    }

    // 3. IP header, extension headers.
    let network: Network
    switch etherType {
    case EtherType.ipv4: network = Self.parseIPv4(frame, at: networkOffset, frameBytes: frameBytes)
    case EtherType.ipv6: network = Self.parseIPv6(frame, at: networkOffset, frameBytes: frameBytes)
    default: network = Network(isValid: true)
    }

    // 4. What tells flows apart: 24 bits of VLAN identifiers, 8 of protocol, 32 of ports; and the addresses.
    var key = vlanIdentifiers &<< 40 | UInt64(network.flowProtocol) &<< 32
    var addresses = network.addressHash
    if network.version == 0 {
      key |= UInt64(etherType)
      addresses = Self.mix(destination.bits ^ 0xa076_1d64_78bd_642f, source.bits ^ 0xe703_7ed1_a0b4_28db)
    } else if network.transportOffset != 0, !network.isFragment, Self.hasPorts(network.ipProtocol) {
      key |= UInt64(unsafe frame.networkUInt32(at: network.transportOffset))
    }
    let mixed = Self.mix(
      Self.mix(addresses ^ 0x8ebc_6af0_9c88_c6e3, key ^ 0x5899_65cc_7537_4cc3), 0x9e37_79b9_7f4a_7c15)

    self.networkOffset = networkOffset
    self.transportOffset = network.transportOffset
    self.networkBytes = network.declaredBytes
    self.flowHash = UInt32(truncatingIfNeeded: mixed ^ mixed &>> 32)
    self.vlanIdentifier = vlanIdentifier
    self.etherType = etherType
    self.tagCount = tagCount
    self.ipVersion = network.version
    self.typeOfService = network.typeOfService
    self.ipProtocol = network.ipProtocol
    self.isFragment = network.isFragment
    self.networkLengthValid = network.isValid
  }

  /// What the IP header says.
  @usableFromInline
  struct Network: BitwiseCopyable {
    @usableFromInline var version: UInt8 = 0
    @usableFromInline var typeOfService: UInt8 = 0
    @usableFromInline var ipProtocol: UInt8 = 0
    /// The protocol as far as all fragments of a datagram agree on it.
    @usableFromInline var flowProtocol: UInt8 = 0
    @usableFromInline var isFragment = false
    @usableFromInline var isValid: Bool
    @usableFromInline var transportOffset = 0
    @usableFromInline var declaredBytes = 0
    @usableFromInline var addressHash: UInt64 = 0

    @inlinable @inline(always)
    init(isValid: Bool) { self.isValid = isValid }
  }

  @inlinable @inline(always)
  static func parseIPv4(_ frame: RawSpan, at start: Int, frameBytes: Int) -> Network {
    var network = Network(isValid: false)
    guard frame.byteCount &- start >= IPv4Header.bytesMin else { return network }
    let versionAndLength = unsafe frame.networkUInt8(at: start)
    let headerBytes = Int(versionAndLength & 0x0f) &* 4
    guard versionAndLength &>> 4 == 4, headerBytes >= IPv4Header.bytesMin else { return network }
    network.version = 4
    network.typeOfService = unsafe frame.networkUInt8(at: start &+ 1)
    network.declaredBytes = Int(unsafe frame.networkUInt16(at: start &+ 2))
    let fragmentField = unsafe frame.networkUInt16(at: start &+ 6)
    network.isFragment = fragmentField & 0x3fff != 0
    network.ipProtocol = unsafe frame.networkUInt8(at: start &+ 9)
    network.flowProtocol = network.ipProtocol
    network.addressHash = unsafe frame.networkUInt64(at: start &+ 12)
    guard network.declaredBytes >= headerBytes, network.declaredBytes <= frameBytes &- start else { return network }
    network.isValid = true
    if fragmentField & 0x1fff == 0 {
      network.transportOffset = transportOffset(
        of: network.ipProtocol, at: start &+ headerBytes, end: min(start &+ network.declaredBytes, frame.byteCount))
    }
    return network
  }

  @inlinable @inline(always)
  static func parseIPv6(_ frame: RawSpan, at start: Int, frameBytes: Int) -> Network {
    var network = Network(isValid: false)
    guard frame.byteCount &- start >= IPv6Header.bytes else { return network }
    guard unsafe frame.networkUInt8(at: start) &>> 4 == 6 else { return network }
    network.version = 6
    network.typeOfService = UInt8(truncatingIfNeeded: unsafe frame.networkUInt16(at: start) &>> 4)
    network.declaredBytes = IPv6Header.bytes &+ Int(unsafe frame.networkUInt16(at: start &+ 4))
    network.ipProtocol = unsafe frame.networkUInt8(at: start &+ 6)
    network.flowProtocol = network.ipProtocol
    let source = mix(
      unsafe frame.networkUInt64(at: start &+ 8) ^ 0xa076_1d64_78bd_642f,
      unsafe frame.networkUInt64(at: start &+ 16) ^ 0xe703_7ed1_a0b4_28db)
    let destination = mix(
      unsafe frame.networkUInt64(at: start &+ 24) ^ 0xe703_7ed1_a0b4_28db,
      unsafe frame.networkUInt64(at: start &+ 32) ^ 0xa076_1d64_78bd_642f)
    network.addressHash = source &+ destination &* 3
    guard network.declaredBytes <= frameBytes &- start else { return network }
    let end = start &+ network.declaredBytes
    let upper = IPv6UpperLayer.walk(
      frame, from: start &+ IPv6Header.bytes, to: end, nextHeader: network.ipProtocol)
    network.isValid = upper.isWellFormed
    network.ipProtocol = upper.ipProtocol
    network.isFragment = upper.isFragment
    network.flowProtocol = upper.isFragment ? IPProtocol.fragment : upper.ipProtocol
    if upper.offset != 0, upper.isWellFormed {
      network.transportOffset = transportOffset(
        of: upper.ipProtocol, at: upper.offset, end: min(end, frame.byteCount))
    }
    return network
  }

  /// `start` if a whole transport header is there before `end`, else 0.
  @inlinable @inline(always)
  static func transportOffset(of ipProtocol: UInt8, at start: Int, end: Int) -> Int {
    let bytesMin =
      switch ipProtocol {
      case IPProtocol.tcp: TCPHeader.bytesMin
      case IPProtocol.udp: UDPHeader.bytes
      case IPProtocol.sctp: 12  // RFC 9260 §3.1
      default: 1
      }
    return bytesMin <= end &- start ? start : 0
  }

  /// TCP, UDP and SCTP all begin with the two ports.
  @inlinable @inline(always)
  static func hasPorts(_ ipProtocol: UInt8) -> Bool {
    ipProtocol == IPProtocol.tcp || ipProtocol == IPProtocol.udp || ipProtocol == IPProtocol.sctp
  }

  /// A 128-bit product folded to 64 bits, the mixing step of wyhash; the constants above are its primes and the
  /// golden ratio.
  @inlinable @inline(always)
  static func mix(_ left: UInt64, _ right: UInt64) -> UInt64 {
    let product = left.multipliedFullWidth(by: right)
    return product.high ^ product.low
  }
}
