/// What frames grow by on the underlay, and how long they may be.
extension Encapsulation {
  /// What stands between the UDP header and the inner frame, in bytes: RFC 7348 section 5, and nothing in VNET/P.
  public var headerBytes: Int {
    switch self {
    case .vxlan: VXLANHeader.bytes
    case .vnetp: 0
    }
  }

  /// What a frame's payload is shorter than the underlay's packet, in bytes: the outer IP header (20 or 40), UDP (8),
  /// the encapsulation's header and the inner Ethernet header (14).
  public func overheadBytes(isIPv4: Bool) -> Int { (isIPv4 ? 20 : 40) + 8 + headerBytes + EthernetHeader.bytes }

  /// The longest payload of a frame that one datagram carries, however it is fragmented, in bytes: 65,507 of UDP over
  /// IPv4 (RFC 791, RFC 768), also over IPv6, less the encapsulation's header and the inner Ethernet header.
  public var payloadBytesMax: Int { UnderlaySocket.datagramBytesMax - headerBytes - EthernetHeader.bytes }
}
