import CLinux
import Glibc

// A `tap` port: a device that the guest uses as its network card, and whose other side is ours.
//
// The way of a frame
//   in:  a read of a queue gives a virtio header and one frame → `TapPort.describe`
//   out: `TapPort.header` in front of the frame, one `writev` a frame
// Control opens the device (`TapDevice`) and lends its queues to workers.

/// The per-frame side of a TAP queue.
public enum TapPort {
  /// The virtio header before each frame, set by TUNSETVNETHDRSZ: `struct virtio_net_hdr_mrg_rxbuf`.
  public static let headerBytes = 12

  /// What goes before a frame that asks for no offload.
  @inline(__always)
  static var plainHeader: SendPool.Header { SendPool.Header(count: headerBytes) }

  /// What goes before a frame that is handed over with its offload.
  @inline(__always)
  static func header(_ offload: OffloadHeader) -> SendPool.Header {
    let words = offload.words
    return SendPool.Header(first: words.first, second: words.second, count: headerBytes)
  }

  /// The frame in a filled slot; the reason when there is none.
  @inline(__always)
  static func describe(
    _ event: IOEvent, from port: InterfaceIndex, domain: DomainIndex, _ memory: inout FrameMemory
  ) -> (descriptor: Descriptor, drop: Counter?) {
    let length = max(0, Int(event.length) - headerBytes)
    var descriptor = Descriptor(
      buffer: event.buffer, offset: Int(event.offset) + headerBytes, length: length,
      segments: max(1, Int(event.count)), ingress: port)
    descriptor.domain = domain
    if event.isTruncated { return (descriptor, .dropOversizedFrame) }
    if length < EthernetHeader.bytes { return (descriptor, .dropRunt) }
    var whole = descriptor
    whole.offset = event.offset
    whole.length = event.length
    guard var header = OffloadHeader(memory.head(of: whole)) else { return (descriptor, .dropRunt) }
    if header.gsoType == 0 && header.flags & OffloadHeader.flagNeedsChecksum == 0 { return (descriptor, nil) }
    if header.isSuperFrame { return describeSuperFrame(header, descriptor, &memory) }
    return memory.finishChecksum(&header, of: descriptor) ? (descriptor, nil) : (descriptor, .dropBadOffload)
  }

  /// A super-frame goes on whole, with its offload header, and counts as its segments.
  @inline(__always)
  static func describeSuperFrame(
    _ header: OffloadHeader, _ descriptor: Descriptor, _ memory: inout FrameMemory
  ) -> (descriptor: Descriptor, drop: Counter?) {
    var descriptor = descriptor
    let frameBytes = Int(descriptor.length)
    guard let whole = SuperFrame(headers: memory.head(of: descriptor), frameBytes: frameBytes, header) else {
      return (descriptor, .dropBadOffload)
    }
    descriptor.wireFrames = UInt16(truncatingIfNeeded: whole.segmentCount)
    descriptor.offload = header
    return (descriptor, nil)
  }
}

/// A TAP device and its queues, owned by control. Closing the queues ends a device that was made here.
public struct TapDevice: Sendable {
  public let name: String
  /// One descriptor a queue.
  public let queues: [Int32]
  /// Whether the device was made here, rather than found.
  public let wasMade: Bool
  /// What was agreed on with the kernel.
  public let offloads: Offloads
  /// Why the longest super-frame of a device that was made could not be set: an error number, and the length in bytes.
  public let superFrameBytesRefused: (number: Int32, bytes: Int)?

  /// What a guest may leave to us, and what may be written for it: more from case to case.
  public enum Offloads: Int, CaseIterable, Sendable {
    case none
    /// Checksums.
    case checksums
    /// And TCP super-frames.
    case tcp
    /// And UDP super-frames: USO, IPv4 and IPv6 only together, since Linux 6.2. A kernel without them refuses to have
    /// them written, too.
    case tcpAndUDP

    /// The bits for TUNSETOFFLOAD.
    var bits: UInt {
      let tcp = UInt(TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN)
      return switch self {
      case .none: 0
      case .checksums: UInt(TUN_F_CSUM)
      case .tcp: tcp
      case .tcpAndUDP: tcp | UInt(CLINUX_TUN_F_USO4 | CLINUX_TUN_F_USO6)
      }
    }

    /// What the kernel takes for a TAP device of which this is a queue, set from now on; none where it takes nothing.
    public static func agreed(on queue: Int32) -> Offloads { (try? agree(isWanted: true, on: queue)) ?? .none }

    static func agree(isWanted: Bool, on queue: Int32) throws(SystemError) -> Offloads {
      try agree(isWanted: isWanted) { clinux_tap_set_offloads(queue, $0) == 0 ? 0 : errno }
    }

    /// Asks for all, then for less and less where the kernel does not know what was asked for (EINVAL); for nothing at
    /// all where none are wanted.
    /// - Parameter set: 0 or an error number.
    static func agree(isWanted: Bool, set: (UInt) -> Int32) throws(SystemError) -> Offloads {
      for offloads in isWanted ? allCases.reversed() : [.none] {
        let number = set(offloads.bits)
        if number == 0 { return offloads }
        guard number == EINVAL else { throw SystemError(number, doing: "set offloads") }
      }
      throw SystemError(EINVAL, doing: "set offloads")
    }
  }

  /// The longest payload that a TAP takes: an IP packet of 65,535 bytes less the Ethernet header (`MAX_MTU` and
  /// `hard_header_len` of the kernel's drivers/net/tun.c).
  public static let mtuBytesMax = 65_521
  /// The kernel's limit of queues a device (`MAX_TAP_QUEUES`), and far more than there are workers.
  public static let queuesMax = 256
  private static let path = "/dev/net/tun"
  /// How long a device that a process just ended with stays busy: 20 to 60 ms were seen.
  public static let busyRetriesAtStart = 50
  private static let busyRetryMicroseconds: UInt32 = 20_000

  /// Attaches to the device if it exists, else makes it.
  /// - Parameters:
  ///   - queues: how many queues to open, from 1 on.
  ///   - mtuBytes: set on a device that was made.
  ///   - mac: given to a device that was made, so that it comes back with the same one: neighbours remember it.
  ///   - offloads: whether the guest may hand over super-frames and unfinished checksums.
  ///   - retries: how often a busy device is tried again, each after 20 ms.
  public static func open(
    name: String, queues: Int, mtuBytes: Int, mac: MACAddress, offloads: Bool = true, retries: Int = busyRetriesAtStart
  ) throws(PortError) -> TapDevice {
    let existed = unsafe if_nametoindex(name) != 0
    var descriptors: [Int32] = []
    var agreed = Offloads.none
    var superFrameBytesRefused: (number: Int32, bytes: Int)?
    do throws(PortError) {
      for _ in 0..<queues {
        let queue = try openQueue(name, isMultiQueue: queues > 1, existed: existed, offloads: offloads, retries)
        descriptors.append(queue.descriptor)
        // The device's, whichever queue they were asked for by.
        agreed = queue.offloads
      }
      if !existed { superFrameBytesRefused = try configure(name, mtuBytes, mac) }
    } catch {
      for descriptor in descriptors { Glibc.close(descriptor) }
      throw error
    }
    return TapDevice(
      name: name, queues: descriptors, wasMade: !existed, offloads: agreed,
      superFrameBytesRefused: superFrameBytesRefused)
  }

  /// The device's MTU now, in bytes; nil when it is not in this namespace any more.
  public var mtuBytes: Int? {
    let control = socket(AF_INET, Int32(SOCK_DGRAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
    defer { Glibc.close(control) }
    let bytes = unsafe clinux_device_mtu(control, name)
    return bytes < 0 ? nil : Int(bytes)
  }

  public func close() {
    for queue in queues { Glibc.close(queue) }
  }

  private static func openQueue(
    _ name: String, isMultiQueue: Bool, existed: Bool, offloads: Bool, _ retries: Int
  ) throws(PortError) -> (descriptor: Int32, offloads: Offloads) {
    let doing = "attach TAP device \(name)"
    let descriptor = unsafe Glibc.open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC)
    guard descriptor >= 0 else {
      let number = errno
      let remedy =
        number == ENOENT || number == ENODEV
        ? "load the kernel's TUN module (modprobe tun) or give the container /dev/net/tun"
        : "run as root or with CAP_NET_ADMIN and access to \(path)"
      throw PortError(doing: "open \(path) for \(name)", number: number, remedy: remedy)
    }
    var number = attach(descriptor, name, isMultiQueue, retries)
    // An existing device made for several queues wants to be opened as such, even for one.
    if number == EINVAL && existed && !isMultiQueue { number = attach(descriptor, name, true, retries) }
    if number == 0, clinux_tap_set_header_bytes(descriptor, Int32(TapPort.headerBytes)) < 0 { number = errno }
    var agreed = Offloads.none
    if number == 0 {
      do throws(SystemError) {
        agreed = try Offloads.agree(isWanted: offloads, on: descriptor)
      } catch {
        number = error.number
      }
    }
    guard number == 0 else {
      Glibc.close(descriptor)
      let remedy =
        switch number {
        case EPERM, EACCES: "run as root or with CAP_NET_ADMIN"
        case EBUSY: "another process holds the device; stop it or choose another name"
        case EINVAL where existed:
          "a device of this name exists that is no TAP, or has another number of queues; choose another name"
        case E2BIG: "the device has no free queue left; ask for fewer"
        default: "see whether the name is taken (ip link show \(name))"
        }
      throw PortError(doing: doing, number: number, remedy: remedy, mayPass: number == EBUSY)
    }
    return (descriptor, agreed)
  }

  private static func attach(_ descriptor: Int32, _ name: String, _ isMultiQueue: Bool, _ retries: Int) -> Int32 {
    for attempt in 0...retries {
      if unsafe clinux_tap_attach(descriptor, name, isMultiQueue ? 1 : 0) == 0 { return 0 }
      guard errno == EBUSY, attempt < retries else { return errno }
      usleep(busyRetryMicroseconds)
    }
    return EBUSY
  }

  /// The longest super-frame whose segments fit one train of a VXLAN link, each with all its headers.
  static func superFrameBytes(mtuBytes: Int) -> Int {
    let datagramBytes = mtuBytes + EthernetHeader.bytes + VLANTag.bytes + VXLANHeader.bytes
    let segments = max(1, SendPool.trainBytesMax / datagramBytes)
    // Of a segment at least 40 bytes are headers, and the kernel leaves some more than the difference free.
    return min(segments * max(1, mtuBytes - 40), 65_536)
  }

  /// - Returns: why the longest super-frame could not be set, and its length, where it could not.
  private static func configure(
    _ name: String, _ mtuBytes: Int, _ mac: MACAddress
  ) throws(PortError) -> (number: Int32, bytes: Int)? {
    let control = socket(AF_INET, Int32(SOCK_DGRAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
    defer { Glibc.close(control) }
    if unsafe clinux_device_set_mtu(control, name, Int32(mtuBytes)) < 0 {
      throw PortError(
        doing: "set the MTU of \(name) to \(mtuBytes)", number: errno, remedy: "choose an MTU from 68 to \(mtuBytesMax)"
      )
    }
    let macBytes = (0..<6).map { UInt8(truncatingIfNeeded: mac.bits >> UInt64(40 - 8 * $0)) }
    guard unsafe clinux_device_set_mac(control, name, macBytes) == 0 else {
      throw PortError(doing: "give \(name) the MAC address \(mac)", number: errno, remedy: "see `dmesg`")
    }
    // One super-frame becomes one train, with its headers. Where the kernel cannot be told, some become two.
    let bytes = superFrameBytes(mtuBytes: mtuBytes)
    let refused = unsafe clinux_device_set_super_frame_bytes(name, UInt32(bytes)) == 0 ? nil : (number: errno, bytes)
    guard unsafe clinux_device_set_up(control, name) == 0 else {
      throw PortError(doing: "bring \(name) up", number: errno, remedy: "run as root or with CAP_NET_ADMIN")
    }
    return refused
  }
}
