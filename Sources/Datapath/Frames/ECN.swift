/// Explicit congestion notification through a tunnel (RFC 6040): how the ToS bytes (DSCP and ECN) of the outer and
/// the inner header make each other. DSCP by RFC 2983: copied out at encapsulation, the inner one kept at
/// decapsulation.
public enum ECN {
  /// The sender does not take part.
  @inlinable @inline(always) public static var notCapable: UInt8 { 0b00 }
  /// ECT(1)
  @inlinable @inline(always) public static var capable1: UInt8 { 0b01 }
  /// ECT(0)
  @inlinable @inline(always) public static var capable0: UInt8 { 0b10 }
  /// CE
  @inlinable @inline(always) public static var congestionExperienced: UInt8 { 0b11 }
  /// The ECN bits of a ToS byte.
  @inlinable @inline(always) public static var mask: UInt8 { 0b11 }

  /// What decapsulation does to the inner frame.
  public enum Decapsulation: BitwiseCopyable, Hashable, Sendable {
    /// Forward it as it is.
    case keep
    /// Forward it with this ToS byte: the inner DSCP, the ECN bits changed.
    case mark(UInt8)
    /// Drop it: congestion was met on the way, and the inner sender could not be told otherwise.
    case drop
  }

  /// The outer ToS byte for an inner one: normal mode (RFC 6040 §4.1) copies the ECN bits, RFC 2983 the DSCP. For
  /// frames that are not IP it is 0, which is what ``ParsedFrame/typeOfService`` gives for them.
  @inlinable @inline(always)
  public static func encapsulate(inner: UInt8) -> UInt8 { inner }

  /// What the outer ToS byte does to the inner one (RFC 6040 §4.2, figure 4). Only the ECN bits of `outer` count.
  /// An inner frame that is not IP has no ECN bits: do not ask.
  @inlinable @inline(always)
  public static func decapsulate(outer: UInt8, inner: UInt8) -> Decapsulation {
    let innerECN = inner & mask
    switch outer & mask {
    case congestionExperienced:
      if innerECN == notCapable { return .drop }
      return innerECN == congestionExperienced ? .keep : .mark(inner | congestionExperienced)
    case capable1:
      return innerECN == capable0 ? .mark(inner & ~mask | capable1) : .keep
    default:
      return .keep
    }
  }

  /// Writes a new ToS byte or traffic class into the IP header at `networkOffset`, whose version nibble says which;
  /// an IPv4 header's checksum is brought up to date without reading the header (RFC 1624). No transport checksum
  /// covers the byte.
  /// - Returns: false, with nothing written, when there is no whole fixed IP header.
  @inlinable
  public static func rewrite(
    typeOfService: UInt8, in frame: inout MutableRawSpan, networkOffset: Int
  ) -> Bool {
    let available = frame.byteCount &- networkOffset
    guard networkOffset >= 0, available >= IPv4Header.bytesMin else { return false }
    let old = unsafe frame.bytes.networkUInt16(at: networkOffset)
    switch old &>> 12 {
    case 4:
      let new = old & 0xff00 | UInt16(typeOfService)
      let checksum = unsafe frame.bytes.networkUInt16(at: networkOffset &+ 10)
      unsafe frame.storeNetwork(new, at: networkOffset)
      unsafe frame.storeNetwork(InternetChecksum.update(checksum, from: old, to: new), at: networkOffset &+ 10)
      return true
    case 6:
      guard available >= IPv6Header.bytes else { return false }
      unsafe frame.storeNetwork(old & 0xf00f | UInt16(typeOfService) &<< 4, at: networkOffset)
      return true
    default:
      return false
    }
  }
}
