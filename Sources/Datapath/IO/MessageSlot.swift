import CLinux
import Glibc

/// Where `recvmsg` puts the parts of a datagram, or of a packet socket's frame, in a slot: the same on both real sides.
///
/// | offset | bytes | what |
/// |---|---|---|
/// | 0 | 16 | `struct io_uring_recvmsg_out`, of a multishot receive alone |
/// | 16 | 28 | the sender: `struct sockaddr_in6` is the longest of those that may come |
/// | 44 | 64 | control messages |
/// | 108 | the rest | the datagram; or virtio header and frame |
enum MessageSlot {
  static var nameOffset: Int { MemoryLayout<io_uring_recvmsg_out>.size }
  static var nameBytes: Int { MemoryLayout<sockaddr_in6>.size }
  static var controlOffset: Int { nameOffset + nameBytes }
  /// Room for control messages: ToS (24) and GRO size (24), with which less than 48 loses the ToS; or auxiliary data
  /// of a packet (40).
  static var controlBytes: Int { 64 }
  static var payloadOffset: Int { controlOffset + controlBytes }
  static var payloadBytes: Int { FrameMemory.slotBytes - payloadOffset }

  /// What a filled slot holds.
  /// - Parameters:
  ///   - start: of the slot.
  ///   - length: bytes of the payload.
  ///   - controlCount: bytes of control messages that the kernel wrote.
  @unsafe @inline(__always)
  static func describe(
    _ start: UnsafeRawPointer, _ source: Int, _ kind: SourceKind, slot: Int, length: Int, controlCount: Int,
    flags: UInt32
  ) -> IOEvent {
    var event = IOEvent(.received, source)
    event.slot = UInt32(truncatingIfNeeded: slot)
    event.offset = UInt32(payloadOffset)
    event.length = UInt32(truncatingIfNeeded: max(0, length))
    event.isTruncated = flags & UInt32(MSG_TRUNC) != 0
    if kind.isDatagram { event.sender = unsafe sender(start + nameOffset) }
    unsafe readControl(start + controlOffset, min(controlCount, controlBytes), &event)
    return event
  }

  /// The address in a `struct sockaddr_in` or `sockaddr_in6`.
  @unsafe @inline(__always)
  private static func sender(_ name: UnsafeRawPointer) -> UnderlayAddress {
    if unsafe name.loadUnaligned(as: sa_family_t.self) == sa_family_t(AF_INET) {
      return unsafe UnderlayAddress(
        ipv4: UInt32(bigEndian: name.loadUnaligned(fromByteOffset: 4, as: UInt32.self)))
    }
    return unsafe UnderlayAddress(
      high: UInt64(bigEndian: name.loadUnaligned(fromByteOffset: 8, as: UInt64.self)),
      low: UInt64(bigEndian: name.loadUnaligned(fromByteOffset: 16, as: UInt64.self)))
  }

  /// Reads the control messages: struct cmsghdr (length, level, type), data, padding to 8 bytes.
  @unsafe @inline(__always)
  private static func readControl(_ start: UnsafeRawPointer, _ count: Int, _ event: inout IOEvent) {
    var offset = 0
    while offset + 16 < count {
      let length = unsafe start.loadUnaligned(fromByteOffset: offset, as: Int.self)
      guard length > 16, length <= count - offset else { return }
      let level = unsafe start.loadUnaligned(fromByteOffset: offset + 8, as: Int32.self)
      let type = unsafe start.loadUnaligned(fromByteOffset: offset + 12, as: Int32.self)
      let data = unsafe start + offset + 16
      if level == Int32(IPPROTO_IP) && type == IP_TOS || level == Int32(IPPROTO_IPV6) && type == IPV6_TCLASS {
        event.typeOfService = unsafe data.load(as: UInt8.self)
      } else if level == Int32(IPPROTO_UDP) && type == CLINUX_UDP_GRO, length >= 16 + 4 {
        // Of a train that the kernel put together; a single datagram comes without.
        event.trainSegmentBytes = unsafe UInt16(truncatingIfNeeded: data.loadUnaligned(as: Int32.self))
      } else if level == SOL_PACKET && type == PACKET_AUXDATA,
        length >= 16 + MemoryLayout<tpacket_auxdata>.size
      {
        event.vlanTag = unsafe vlanTag(data.loadUnaligned(as: tpacket_auxdata.self))
      }
      offset += (length + 7) & ~7
    }
  }

  /// The tag that the kernel took out of a frame, as in `IOEvent.vlanTag`. Kernels before 3.14 do not say the TPID.
  @inline(__always)
  private static func vlanTag(_ data: tpacket_auxdata) -> UInt32 {
    guard data.tp_status & UInt32(TP_STATUS_VLAN_VALID) != 0 else { return 0 }
    let hasIdentifier = data.tp_status & UInt32(TP_STATUS_VLAN_TPID_VALID) != 0
    return UInt32(hasIdentifier ? data.tp_vlan_tpid : EtherType.vlan) << 16 | UInt32(data.tp_vlan_tci)
  }
}
