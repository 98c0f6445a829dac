/// The fixed IPv6 header (RFC 8200 §3) as a value.
public struct IPv6Header: BitwiseCopyable, Hashable, Sendable {
  /// Bytes of the fixed header.
  @inlinable @inline(always)
  public static var bytes: Int { 40 }

  /// DSCP and ECN.
  public var trafficClass: UInt8
  /// 20 bits.
  public var flowLabel: UInt32
  /// Extension headers and payload, at most 65,535 bytes.
  public var payloadBytes: Int
  /// ``IPProtocol`` of the first extension header or of the transport.
  public var nextHeader: UInt8
  public var hopLimit: UInt8
  /// The first byte on the wire is the most significant.
  public var source: UInt128
  public var destination: UInt128

  @inlinable
  public init(
    trafficClass: UInt8 = 0, flowLabel: UInt32 = 0, payloadBytes: Int, nextHeader: UInt8, hopLimit: UInt8 = 64,
    source: UInt128, destination: UInt128
  ) {
    self.trafficClass = trafficClass
    self.flowLabel = flowLabel & 0xf_ffff
    self.payloadBytes = payloadBytes
    self.nextHeader = nextHeader
    self.hopLimit = hopLimit
    self.source = source
    self.destination = destination
  }

  /// Writes the header at `offset`; traps where it does not fit or the payload's length is out of its range.
  /// - Returns: the offset after it.
  @discardableResult
  @inlinable
  public func write(into frame: inout MutableRawSpan, at offset: Int) -> Int {
    precondition(payloadBytes >= 0 && payloadBytes <= 0xffff)
    frame.preconditionFits(Self.bytes, at: offset)
    unsafe frame.storeNetwork(UInt32(6) &<< 28 | UInt32(trafficClass) &<< 20 | flowLabel & 0xf_ffff, at: offset)
    unsafe frame.storeNetwork(UInt16(payloadBytes), at: offset &+ 4)
    unsafe frame.storeNetwork(nextHeader, at: offset &+ 6)
    unsafe frame.storeNetwork(hopLimit, at: offset &+ 7)
    unsafe frame.storeNetwork(source, at: offset &+ 8)
    unsafe frame.storeNetwork(destination, at: offset &+ 24)
    return offset &+ Self.bytes
  }
}

/// The fragment extension header (RFC 8200 §4.5) as a value.
public struct IPv6FragmentHeader: BitwiseCopyable, Hashable, Sendable {
  @inlinable @inline(always)
  public static var bytes: Int { 8 }

  /// ``IPProtocol`` of what the whole packet has after this header.
  public var nextHeader: UInt8
  /// Bytes, a multiple of 8, at most 65,528.
  public var fragmentOffsetBytes: Int
  public var moreFragments: Bool
  public var identification: UInt32

  @inlinable
  public init(nextHeader: UInt8, fragmentOffsetBytes: Int, moreFragments: Bool, identification: UInt32) {
    self.nextHeader = nextHeader
    self.fragmentOffsetBytes = fragmentOffsetBytes
    self.moreFragments = moreFragments
    self.identification = identification
  }

  /// Writes the header at `offset`; traps where it does not fit or the fragment's offset is out of its range.
  /// - Returns: the offset after it.
  @discardableResult
  @inlinable
  public func write(into frame: inout MutableRawSpan, at offset: Int) -> Int {
    precondition(fragmentOffsetBytes >= 0 && fragmentOffsetBytes <= 0xfff8 && fragmentOffsetBytes & 7 == 0)
    frame.preconditionFits(Self.bytes, at: offset)
    unsafe frame.storeNetwork(nextHeader, at: offset)
    unsafe frame.storeNetwork(UInt8(0), at: offset &+ 1)
    unsafe frame.storeNetwork(UInt16(fragmentOffsetBytes) | (moreFragments ? 1 : 0), at: offset &+ 2)
    unsafe frame.storeNetwork(identification, at: offset &+ 4)
    return offset &+ Self.bytes
  }
}

/// Where the extension headers of an IPv6 packet lead (RFC 8200 §4).
public struct IPv6UpperLayer: BitwiseCopyable, Hashable, Sendable {
  /// Extension headers that are followed: one more than RFC 8200 §4.1 foresees in one packet (hop-by-hop,
  /// destination options, routing, fragment, AH, ESP, destination options again), so that no packet makes the
  /// walk long.
  @inlinable @inline(always)
  public static var extensionHeadersMax: Int { 8 }

  /// ``IPProtocol`` of the header where the walk ended: the transport's; in a fragment that is not the first, of
  /// what the fragment header names; an extension header's when there were too many or one of them is cut off.
  public let ipProtocol: UInt8
  /// Of the header of ``ipProtocol``, from the start of the bytes that were walked; 0 when it is not there: no next
  /// header, a later fragment, too many extension headers, one cut off.
  public let offset: Int
  /// Part of a packet, the first or a later one. A fragment header with offset 0 and nothing to follow is a whole
  /// packet (RFC 6946) and no fragment.
  public let isFragment: Bool
  /// Bytes; 0 for what is no fragment.
  public let fragmentOffsetBytes: Int
  public let moreFragments: Bool
  /// False when an extension header claims more than the packet has.
  public let isWellFormed: Bool

  @inlinable @inline(always)
  init(
    ipProtocol: UInt8, offset: Int, fragmentField: UInt16, isWellFormed: Bool
  ) {
    self.ipProtocol = ipProtocol
    self.offset = offset
    self.isFragment = fragmentField & 0xfff9 != 0
    self.fragmentOffsetBytes = Int(fragmentField & 0xfff8)
    self.moreFragments = fragmentField & 1 != 0
    self.isWellFormed = isWellFormed
  }

  /// Follows the extension headers from `offset`. Hop-by-hop, routing, destination options, fragment and AH are
  /// followed; anything else, ESP too, is the upper layer.
  /// - Parameters:
  ///   - bytes: what may be read; it may end before the packet does, where only its headers were copied.
  ///   - offset: of the first extension header, within `bytes`.
  ///   - end: of the packet as its length field has it, at least `offset`; perhaps above the count of `bytes`.
  @inlinable
  static func walk(_ bytes: RawSpan, from start: Int, to end: Int, nextHeader: UInt8) -> IPv6UpperLayer {
    var ipProtocol = nextHeader
    var offset = start
    var fragmentField: UInt16 = 0
    var followed = 0
    while true {
      switch ipProtocol {
      case IPProtocol.hopByHop, IPProtocol.routing, IPProtocol.destinationOptions, IPProtocol.fragment,
        IPProtocol.authentication:
        // 8 bytes are the shortest of each of them.
        guard offset &+ 8 <= end else {
          return IPv6UpperLayer(ipProtocol: ipProtocol, offset: 0, fragmentField: fragmentField, isWellFormed: false)
        }
        guard followed < extensionHeadersMax, offset &+ 8 <= bytes.byteCount else {
          return IPv6UpperLayer(ipProtocol: ipProtocol, offset: 0, fragmentField: fragmentField, isWellFormed: true)
        }
        let next = unsafe bytes.networkUInt8(at: offset)
        let lengthField = Int(unsafe bytes.networkUInt8(at: offset &+ 1))
        let headerBytes: Int
        switch ipProtocol {
        case IPProtocol.fragment:
          fragmentField = unsafe bytes.networkUInt16(at: offset &+ 2)
          guard fragmentField & 0xfff8 == 0 else {
            return IPv6UpperLayer(ipProtocol: next, offset: 0, fragmentField: fragmentField, isWellFormed: true)
          }
          headerBytes = IPv6FragmentHeader.bytes
        case IPProtocol.authentication:
          headerBytes = (lengthField &+ 2) &* 4
        default:
          headerBytes = (lengthField &+ 1) &* 8
        }
        guard headerBytes <= end &- offset else {
          return IPv6UpperLayer(ipProtocol: ipProtocol, offset: 0, fragmentField: fragmentField, isWellFormed: false)
        }
        offset &+= headerBytes
        ipProtocol = next
        followed &+= 1
      case IPProtocol.noNextHeader:
        return IPv6UpperLayer(ipProtocol: ipProtocol, offset: 0, fragmentField: fragmentField, isWellFormed: true)
      default:
        let isThere = offset < end && offset < bytes.byteCount
        return IPv6UpperLayer(
          ipProtocol: ipProtocol, offset: isThere ? offset : 0, fragmentField: fragmentField, isWellFormed: true)
      }
    }
  }
}

/// An IPv6 packet whose version and payload length were checked against the bytes there are.
public struct IPv6View: ~Escapable {
  /// The packet: what the link layer padded behind it is cut off.
  public let bytes: RawSpan

  /// nil when `packet` is shorter than 40 bytes, is not version 6, or claims more payload than there is. A payload
  /// length of zero is no payload: jumbograms (RFC 2675) are longer than any frame here.
  @inlinable @inline(always) @_lifetime(copy packet)
  public init?(_ packet: RawSpan) {
    guard packet.byteCount >= IPv6Header.bytes else { return nil }
    let payloadBytes = Int(unsafe packet.networkUInt16(at: 4))
    guard unsafe packet.networkUInt8(at: 0) &>> 4 == 6, payloadBytes <= packet.byteCount &- IPv6Header.bytes
    else { return nil }
    bytes = unsafe packet.extracting(unchecked: 0..<IPv6Header.bytes &+ payloadBytes)
  }

  /// DSCP and ECN.
  @inlinable @inline(always)
  public var trafficClass: UInt8 { UInt8(truncatingIfNeeded: unsafe bytes.networkUInt16(at: 0) &>> 4) }

  /// The two ECN bits (RFC 3168).
  @inlinable @inline(always)
  public var ecn: UInt8 { trafficClass & 0x3 }

  /// 20 bits.
  @inlinable @inline(always)
  public var flowLabel: UInt32 { unsafe bytes.networkUInt32(at: 0) & 0xf_ffff }

  /// Extension headers and what follows them.
  @inlinable @inline(always)
  public var payloadBytes: Int { bytes.byteCount &- IPv6Header.bytes }

  @inlinable @inline(always)
  public var nextHeader: UInt8 { unsafe bytes.networkUInt8(at: 6) }

  @inlinable @inline(always)
  public var hopLimit: UInt8 { unsafe bytes.networkUInt8(at: 7) }

  @inlinable @inline(always)
  public var source: UInt128 { unsafe bytes.networkUInt128(at: 8) }

  @inlinable @inline(always)
  public var destination: UInt128 { unsafe bytes.networkUInt128(at: 24) }

  /// The fixed header as a value.
  @inlinable
  public var header: IPv6Header {
    IPv6Header(
      trafficClass: trafficClass, flowLabel: flowLabel, payloadBytes: payloadBytes, nextHeader: nextHeader,
      hopLimit: hopLimit, source: source, destination: destination)
  }

  /// What comes after the fixed header.
  @inlinable
  public var payload: RawSpan {
    @_lifetime(copy self) get { unsafe bytes.extracting(unchecked: IPv6Header.bytes..<bytes.byteCount) }
  }

  /// Follows the extension headers; the offset counts from the start of the fixed header.
  @inlinable
  public var upperLayer: IPv6UpperLayer {
    IPv6UpperLayer.walk(bytes, from: IPv6Header.bytes, to: bytes.byteCount, nextHeader: nextHeader)
  }
}
