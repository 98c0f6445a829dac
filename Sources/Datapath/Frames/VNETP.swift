/// VNET/P's encapsulation: the UDP payload is the Ethernet frame, with nothing before it. What a datagram is can only
/// be told by the port that it came to and by its sender.
public enum VNETPFrame {
  /// The UDP port of the original.
  @inlinable @inline(always)
  public static var portDefault: UInt16 { 9000 }

  /// What a guest's packet grows by on an IPv4 underlay: outer IP 20, UDP 8, and its own Ethernet header 14.
  @inlinable @inline(always)
  public static var overheadBytesIPv4: Int { IPv4Header.bytesMin + UDPHeader.bytes + EthernetHeader.bytes }

  /// The same on IPv6, whose header has 40 bytes.
  @inlinable @inline(always)
  public static var overheadBytesIPv6: Int { IPv6Header.bytes + UDPHeader.bytes + EthernetHeader.bytes }

  /// The largest MTU of a guest on an IPv4 underlay that fragments: the total length has 16 bits (RFC 791 §3.1) and
  /// counts the outer header, which leaves 65,493.
  @inlinable @inline(always)
  public static var mtuBytesMaxIPv4: Int { 0xffff - overheadBytesIPv4 }

  /// The same on IPv6, whose length field does not count the fixed header (RFC 8200 §3): 65,513.
  @inlinable @inline(always)
  public static var mtuBytesMaxIPv6: Int { 0xffff - UDPHeader.bytes - EthernetHeader.bytes }

  /// Whether a datagram begins as VXLAN does, sent to the wrong port: the I flag and no other, reserved bits zero
  /// (RFC 7348 §5), and room for a frame behind. As a frame it would go to 08:00:00:00:xx:xx, from an address whose
  /// second byte is zero.
  @inlinable @inline(always)
  public static func looksLikeVXLAN(_ datagram: RawSpan) -> Bool {
    guard datagram.byteCount >= VXLANHeader.bytes &+ EthernetHeader.bytes else { return false }
    return unsafe datagram.networkUInt64(at: 0) & 0xffff_ffff_0000_00ff == UInt64(VXLANHeader.flagVNI) &<< 56
  }
}
