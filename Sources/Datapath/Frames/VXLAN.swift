/// The VXLAN header (RFC 7348 §5): flags, 24 reserved bits, VNI, 8 reserved bits.
public struct VXLANHeader: BitwiseCopyable, Hashable, Sendable {
  @inlinable @inline(always)
  public static var bytes: Int { 8 }

  /// The UDP port that IANA assigned (RFC 7348 §8).
  @inlinable @inline(always)
  public static var portDefault: UInt16 { 4789 }

  /// The I flag of the first byte: the VNI is valid.
  @inlinable @inline(always)
  public static var flagVNI: UInt8 { 0x08 }

  /// The largest VNI: 24 bits.
  @inlinable @inline(always)
  public static var vniMax: UInt32 { 0xff_ffff }

  /// 24 bits.
  public var vni: UInt32

  /// From the low 24 bits of `vni`.
  @inlinable @inline(always)
  public init(vni: UInt32) { self.vni = vni & Self.vniMax }

  /// The header for a VNI, as a number whose bytes in memory are those on the wire: store it as it is. Made once
  /// for a domain, so that encapsulation is one store.
  @inlinable @inline(always)
  public static func networkOrder(vni: UInt32) -> UInt64 {
    (UInt64(flagVNI) &<< 56 | UInt64(vni & vniMax) &<< 8).bigEndian
  }

  /// Writes the header at `offset`, the I flag set, the reserved bits clear; traps where it does not fit.
  /// - Returns: the offset after it.
  @discardableResult
  @inlinable
  public func write(into datagram: inout MutableRawSpan, at offset: Int = 0) -> Int {
    datagram.preconditionFits(Self.bytes, at: offset)
    unsafe datagram.storeBytes(of: Self.networkOrder(vni: vni), toUncheckedByteOffset: offset, as: UInt64.self)
    return offset &+ Self.bytes
  }
}

/// The payload of a VXLAN datagram whose length was checked: at least a VXLAN header. Whether the frame inside is
/// one is for ``ParsedFrame`` to say.
public struct VXLANView: ~Escapable {
  /// Header and frame.
  public let bytes: RawSpan

  /// nil when `datagram`, the payload of UDP, is shorter than 8 bytes.
  @inlinable @inline(always) @_lifetime(copy datagram)
  public init?(_ datagram: RawSpan) {
    guard datagram.byteCount >= VXLANHeader.bytes else { return nil }
    bytes = datagram
  }

  /// The first byte: the I flag and seven reserved bits.
  @inlinable @inline(always)
  public var flags: UInt8 { unsafe bytes.networkUInt8(at: 0) }

  /// The I flag. Without it the VNI means nothing and the datagram is dropped (RFC 7348 §5).
  @inlinable @inline(always)
  public var hasVNI: Bool { flags & VXLANHeader.flagVNI != 0 }

  /// 24 bits.
  @inlinable @inline(always)
  public var vni: UInt32 { unsafe bytes.networkUInt32(at: 4) &>> 8 }

  /// Whether all reserved bits are zero, those among the flags too. RFC 7348 §5 has them ignored on receipt; Linux
  /// drops such datagrams.
  @inlinable @inline(always)
  public var reservedBitsAreZero: Bool { unsafe bytes.networkUInt64(at: 0) & 0xf7ff_ffff_0000_00ff == 0 }

  /// The inner frame.
  @inlinable
  public var payload: RawSpan {
    @_lifetime(copy self) get { unsafe bytes.extracting(unchecked: VXLANHeader.bytes..<bytes.byteCount) }
  }
}
