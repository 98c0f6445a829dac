import CLinux
import Glibc

// A `packet` port: any network device that exists (a NIC, a veth's end, a VMM's own TAP), by an AF_PACKET socket.
//
// The way of a frame
//   in:  a receive gives a virtio header, a frame and, beside it, the VLAN tag that the kernel took out of it →
//        `PacketPort.describe` puts the tag back
//   out: `TapPort.header` in front of the frame, one `sendmsg` a frame
// Control opens the sockets (`PacketDevice`) and lends them to workers.
//
// When the device goes down, or away, the socket says ENETDOWN, once, whichever of the two it is (`packet_notifier` of
// the kernel's net/packet/af_packet.c); nothing more comes when a device that is down is removed. So a worker treats it
// as the end of the port, and control opens a new socket as soon as the device is there and up.
//
// A send that the device's queue has no room for gets ENOBUFS, and the kernel has dropped the frame: the socket is
// writable, so there is nothing to wait for. EAGAIN comes before that where the send buffer is the smaller one.

/// The per-frame side of a packet socket.
public enum PacketPort {
  /// The virtio header before each frame, set by PACKET_VNET_HDR_SZ: the same as a TAP's.
  public static let headerBytes = TapPort.headerBytes

  /// The frame in a filled slot, its VLAN tag where it belongs, its checksum finished unless it is a super-frame,
  /// which keeps its offload header; the reason when there is none.
  @inline(__always)
  static func describe(
    _ event: IOEvent, from port: InterfaceIndex, domain: DomainIndex, _ memory: inout FrameMemory
  ) -> (descriptor: Descriptor, drop: Counter?) {
    let length = max(0, Int(event.length) - headerBytes)
    var descriptor = Descriptor(
      buffer: BufferReference(slot: Int(event.slot)), offset: Int(event.offset) + headerBytes, length: length,
      ingress: port)
    descriptor.domain = domain
    if event.isTruncated { return (descriptor, .dropOversizedFrame) }
    if length < EthernetHeader.bytes { return (descriptor, .dropRunt) }
    var whole = descriptor
    whole.offset = event.offset
    whole.length = event.length
    guard var header = OffloadHeader(memory.head(of: whole)) else { return (descriptor, .dropRunt) }
    if event.vlanTag != 0 {
      var bytes = memory.mutableHead(of: whole)
      insert(event.vlanTag, into: &bytes)
      descriptor.offset -= UInt32(VLANTag.bytes)
      descriptor.length += UInt32(VLANTag.bytes)
      if header.needsChecksum { header.checksumStart &+= UInt16(VLANTag.bytes) }
      if header.isSuperFrame { header.headerLength &+= UInt16(VLANTag.bytes) }
    }
    if header.gsoType == 0 && !header.needsChecksum { return (descriptor, nil) }
    if header.isSuperFrame { return TapPort.describeSuperFrame(header, descriptor, &memory) }
    var frame = memory.mutableHead(of: descriptor)
    return header.finishChecksum(in: &frame) ? (descriptor, nil) : (descriptor, .dropBadOffload)
  }

  /// Puts a tag behind the addresses, which move down into the room of the virtio header.
  /// - Parameter bytes: the virtio header and the frame.
  @inline(__always)
  private static func insert(_ tag: UInt32, into bytes: inout MutableRawSpan) {
    bytes.preconditionFits(headerBytes + EthernetHeader.bytes, at: 0)
    let start = headerBytes - VLANTag.bytes
    for word in 0..<3 {
      let value = unsafe bytes.bytes.networkUInt32(at: headerBytes + 4 * word)
      unsafe bytes.storeNetwork(value, at: start + 4 * word)
    }
    unsafe bytes.storeNetwork(tag, at: start + 12)
  }
}

/// The packet sockets on one device, owned by control. The device is somebody else's: closing the sockets ends
/// promiscuous mode and leaves it as it was.
public struct PacketDevice: Sendable {
  public let name: String
  /// One descriptor a queue.
  public let queues: [Int32]

  /// More than there are workers; the kernel's limit of sockets that share a device's frames is 65,536.
  public static let queuesMax = 256
  /// What waits in a socket for its worker: some ms of a fast NIC.
  public static let receiveBufferBytes = 8 << 20
  /// What may wait for the device; the kernel doubles it and counts 2,304 bytes for a full-sized frame, so it is 455 of
  /// them, or some 15 super-frames: less than a device's queue takes (1,000 frames), so that a full one is mostly told
  /// (EAGAIN) rather than dropped (ENOBUFS).
  public static let sendBufferBytes = 512 << 10

  /// Opens one socket a queue on a device that exists and is up. Nothing is received before all options are set.
  ///
  /// With several queues the kernel hands each flow's frames to one of them, by the flow's hash (PACKET_FANOUT_HASH).
  public static func open(name: String, queues: Int) throws(PortError) -> PacketDevice {
    let index = unsafe if_nametoindex(name)
    guard index != 0 else {
      throw PortError(
        doing: "find device \(name)", number: ENODEV, remedy: "make it, or correct the name (ip link)", mayPass: true)
    }
    var descriptors: [Int32] = []
    do throws(PortError) {
      for _ in 0..<queues {
        descriptors.append(try openQueue(name, index, isShared: queues > 1))
      }
      if queues > 1 { try share(name, descriptors) }
    } catch {
      for descriptor in descriptors { Glibc.close(descriptor) }
      throw error
    }
    return PacketDevice(name: name, queues: descriptors)
  }

  /// The MTU of a device, in bytes; nil when it is not there.
  public static func mtuBytes(of name: String) -> Int? {
    let control = socket(AF_INET, Int32(SOCK_DGRAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
    defer { Glibc.close(control) }
    let bytes = unsafe clinux_device_mtu(control, name)
    return bytes < 0 ? nil : Int(bytes)
  }

  /// The device's MTU now, in bytes; nil when it is not in this namespace any more.
  public var mtuBytes: Int? {
    guard let queue = queues.first else { return nil }
    let bytes = unsafe clinux_device_mtu(queue, name)
    return bytes < 0 ? nil : Int(bytes)
  }

  public func close() {
    for queue in queues { Glibc.close(queue) }
  }

  /// Frames that the kernel dropped because the socket's receive buffer was full, since the last call (`tp_drops` of
  /// PACKET_STATISTICS, which reading sets to zero); 0 when it cannot be read.
  public static func dropsSinceLastRead(_ descriptor: Int32) -> Int {
    var statistics = tpacket_stats()
    var length = socklen_t(MemoryLayout<tpacket_stats>.size)
    let result = unsafe getsockopt(descriptor, SOL_PACKET, PACKET_STATISTICS, &statistics, &length)
    return result == 0 ? Int(statistics.tp_drops) : 0
  }

  // MARK: Opening

  private static func openQueue(_ name: String, _ index: UInt32, isShared: Bool) throws(PortError) -> Int32 {
    let doing = "open a packet socket on \(name)"
    // Protocol 0: it receives nothing until it is bound with one.
    let kind = Int32(SOCK_RAW.rawValue) | Int32(SOCK_NONBLOCK.rawValue) | Int32(SOCK_CLOEXEC.rawValue)
    let descriptor = socket(AF_PACKET, kind, 0)
    guard descriptor >= 0 else {
      throw PortError(doing: doing, number: errno, remedy: "run as root or with CAP_NET_RAW")
    }
    do throws(PortError) {
      // Others bear no Ethernet header; and what is sent by loopback comes in by it.
      let type = unsafe clinux_device_type(descriptor, name)
      guard type < 0 || type == Int32(ARPHRD_ETHER) else {
        throw PortError(
          doing: doing, number: EINVAL, reason: "it is no Ethernet device (its type is \(type))",
          remedy: "choose a NIC, a veth's end or a TAP")
      }
      let flags = unsafe clinux_device_flags(descriptor, name)
      guard flags >= 0, flags & Int32(IFF_UP) != 0 else {
        throw PortError(
          doing: doing, number: flags < 0 ? ENODEV : ENETDOWN, remedy: "set it up: ip link set \(name) up",
          mayPass: true)
      }
      try set(
        descriptor, CLINUX_PACKET_VNET_HDR_SZ, Int32(PacketPort.headerBytes), doing,
        remedy: "packet ports need Linux 6.4 or later (PACKET_VNET_HDR_SZ)")
      try set(
        descriptor, CLINUX_PACKET_IGNORE_OUTGOING, 1, doing,
        remedy: "packet ports need Linux 4.20 or later (PACKET_IGNORE_OUTGOING)")
      try set(descriptor, PACKET_AUXDATA, 1, doing, remedy: "see `dmesg`")
      setBuffer(descriptor, SO_RCVBUFFORCE, SO_RCVBUF, receiveBufferBytes)
      setBuffer(descriptor, SO_SNDBUFFORCE, SO_SNDBUF, sendBufferBytes)
      // Until the last socket has joined, each would get every frame.
      if isShared, clinux_socket_refuse_all(descriptor) < 0 {
        throw PortError(doing: doing, number: errno, remedy: "use one queue")
      }
      guard clinux_packet_be_promiscuous(descriptor, index) == 0 else {
        let number = errno
        throw PortError(
          doing: "make \(name) promiscuous", number: number, remedy: "see `dmesg`", mayPass: number == ENODEV)
      }
      guard clinux_packet_bind(descriptor, index) == 0 else {
        throw PortError(
          doing: doing, number: errno, remedy: "see that the device is there and up (ip link show \(name))",
          mayPass: true)
      }
    } catch {
      Glibc.close(descriptor)
      throw error
    }
    return descriptor
  }

  /// Makes the sockets share the device's frames, and lets them in.
  private static func share(_ name: String, _ descriptors: [Int32]) throws(PortError) {
    let doing = "share the frames of \(name) between \(descriptors.count) queues"
    // The first socket gets a number that no other group of the namespace has; the others join by it. The group has its
    // own mark for outgoing frames: the sockets' does not hold for it.
    let mode = PACKET_FANOUT_HASH | CLINUX_PACKET_FANOUT_FLAG_IGNORE_OUTGOING
    var group: Int32 = 0
    for (place, descriptor) in descriptors.enumerated() {
      let flags = place == 0 ? mode | CLINUX_PACKET_FANOUT_FLAG_UNIQUEID : mode
      try set(
        descriptor, PACKET_FANOUT, group | flags << 16, doing, remedy: "use one queue, or set the device up first")
      guard place == 0 else { continue }
      var length = socklen_t(MemoryLayout<Int32>.size)
      guard unsafe getsockopt(descriptor, SOL_PACKET, PACKET_FANOUT, &group, &length) == 0 else {
        throw PortError(doing: doing, number: errno, remedy: "use one queue")
      }
      group &= 0xFFFF
    }
    for descriptor in descriptors {
      guard clinux_socket_refuse_nothing(descriptor) == 0 else {
        throw PortError(doing: doing, number: errno, remedy: "use one queue")
      }
    }
  }

  private static func set(
    _ descriptor: Int32, _ option: Int32, _ value: Int32, _ doing: String, remedy: String
  ) throws(PortError) {
    var value = value
    let length = socklen_t(MemoryLayout<Int32>.size)
    guard unsafe setsockopt(descriptor, SOL_PACKET, option, &value, length) == 0 else {
      throw PortError(doing: doing, number: errno, remedy: remedy)
    }
  }

  /// Beyond the system's limit only with CAP_NET_ADMIN; as far as it allows without.
  private static func setBuffer(_ descriptor: Int32, _ forced: Int32, _ plain: Int32, _ bytes: Int) {
    var value = Int32(truncatingIfNeeded: bytes)
    let length = socklen_t(MemoryLayout<Int32>.size)
    if unsafe setsockopt(descriptor, SOL_SOCKET, forced, &value, length) == 0 { return }
    _ = unsafe setsockopt(descriptor, SOL_SOCKET, plain, &value, length)
  }
}
