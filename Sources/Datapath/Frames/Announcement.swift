/// A frame that tells an Ethernet where a guest is, after it moved: every switch on its way learns its source. The
/// request of reverse ARP (RFC 903) of one who asks for its own address, which nobody answers; monitors of virtual
/// machines send the same.
package enum Announcement {
  /// The shortest frame on an Ethernet, without its check sequence (IEEE 802.3 §4.4.2); the end is zero.
  package static var frameBytes: Int { 60 }

  private static var etherType: UInt16 { 0x8035 }
  private static var etherTypeIPv4: UInt16 { 0x0800 }
  private static var hardwareEthernet: UInt16 { 1 }
  private static var operationRequest: UInt16 { 3 }
  private static var addressIPv4Bytes: UInt8 { 4 }

  /// Fills in `frame`, which has `frameBytes`.
  package static func write(_ guest: MACAddress, into frame: inout MutableRawSpan) {
    precondition(frame.byteCount >= frameBytes, "an announcement needs \(frameBytes) bytes")
    let high = UInt16(truncatingIfNeeded: guest.bits >> 32)
    let low = UInt32(truncatingIfNeeded: guest.bits)
    unsafe frame.storeNetwork(UInt16.max, at: 0)
    unsafe frame.storeNetwork(UInt32.max, at: 2)
    unsafe frame.storeNetwork(high, at: 6)
    unsafe frame.storeNetwork(low, at: 8)
    unsafe frame.storeNetwork(etherType, at: 12)
    unsafe frame.storeNetwork(hardwareEthernet, at: 14)
    unsafe frame.storeNetwork(etherTypeIPv4, at: 16)
    unsafe frame.storeNetwork(UInt8(MACAddress.bytes), at: 18)
    unsafe frame.storeNetwork(addressIPv4Bytes, at: 19)
    unsafe frame.storeNetwork(operationRequest, at: 20)
    // Source and target: the hardware address, and no protocol address.
    for place in [22, 32] {
      unsafe frame.storeNetwork(high, at: place)
      unsafe frame.storeNetwork(low, at: place + 2)
      unsafe frame.storeNetwork(UInt32(0), at: place + 6)
    }
    for place in 42..<frameBytes { unsafe frame.storeNetwork(UInt8(0), at: place) }
  }
}
