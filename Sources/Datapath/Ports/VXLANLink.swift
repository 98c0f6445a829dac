import CLinux
import Glibc

// A `vxlan` link (RFC 7348): frames in UDP datagrams to one other host.
//
// The way of a frame
//   in:  a receive of the underlay's socket gives a datagram → `VXLANLink.describe` → routing finds link and domain by
//        sender and VNI → `VXLANLink.decapsulate`
//   out: `VXLANLink.header` in front of the frame, one `sendmsg` a frame, on the socket that the flow's hash picks
// Control opens the sockets (`UnderlaySocket`) and lends them to workers.

/// The per-frame side of VXLAN.
public enum VXLANLink {
  /// The datagram in a filled slot, before anything of it was looked at.
  @inline(__always)
  package static func describe(_ event: IOEvent) -> Descriptor {
    var descriptor = Descriptor(
      buffer: BufferReference(slot: Int(event.slot)), offset: Int(event.offset), length: Int(event.length),
      ingress: .none)
    descriptor.sender = event.sender
    descriptor.typeOfService = event.typeOfService
    descriptor.isTruncated = event.isTruncated
    let segmentBytes = UInt32(event.trainSegmentBytes)
    if segmentBytes > 0 && segmentBytes < event.length {
      descriptor.trainSegmentBytes = event.trainSegmentBytes
      descriptor.wireFrames = UInt16(clamping: (event.length + segmentBytes - 1) / segmentBytes)
    }
    return descriptor
  }

  /// The header before a frame of the domain.
  @inline(__always)
  static func header(vni: UInt32) -> SendPool.Header {
    SendPool.Header(first: VXLANHeader.networkOrder(vni: vni), count: VXLANHeader.bytes)
  }

  /// What a datagram's header says; nil when it is cut short.
  @inline(__always)
  static func readHeader(_ datagram: RawSpan) -> (vni: UInt32, hasVNI: Bool, hasReservedBits: Bool)? {
    guard let view = VXLANView(datagram) else { return nil }
    return (view.vni, view.hasVNI, !view.reservedBitsAreZero)
  }

  /// Steps over the header: the descriptor names the inner frame from then on.
  @inline(__always)
  static func decapsulate(_ descriptor: inout Descriptor) {
    descriptor.offset += UInt32(VXLANHeader.bytes)
    descriptor.length -= UInt32(VXLANHeader.bytes)
  }
}

/// The sockets of the underlay, made by control.
public enum UnderlaySocket {
  /// Source ports of links come from the dynamic range (RFC 7348 section 5, RFC 6335 section 6).
  static let sourcePortFirst = 49_152
  static let sourcePortCount = 16_384
  /// How long the port of a process that was just killed stays taken: its ring holds the socket for some ms.
  private static let busyRetries = 50
  private static let busyRetryMicroseconds: UInt32 = 20_000

  /// The least send buffer of a socket whose datagrams are fragmented, before the kernel doubles it: the fragments of
  /// the longest one, each with the kernel's bookkeeping, must fit at once or the send fails (ENOBUFS). At an MTU of
  /// 1,500 bytes 32,768 were enough and 16,384 were not, at 576 bytes 65,536 and 32,768.
  static let fragmentingBufferBytesMin = 131_072

  /// A socket that receives the datagrams of all links of one family and encapsulation.
  /// - Parameters:
  ///   - isShared: whether several workers bind the same address, each to a share of the flows (SO_REUSEPORT).
  ///   - bufferBytes: receive buffer; beyond the system's limit only with CAP_NET_ADMIN.
  ///   - takesTrains: whether datagrams of one flow come as one train (UDP_GRO). A kernel before 5.0 has no such
  ///     option, and they come singly.
  public static func receive(
    on address: UnderlayAddress, port: UInt16, encapsulation: Encapsulation, isShared: Bool, bufferBytes: Int,
    takesTrains: Bool = true
  ) throws(PortError) -> Int32 {
    let doing = "receive on \(text(address, port))"
    let descriptor = try make(address, doing)
    do throws(PortError) {
      if isShared { try set(descriptor, SOL_SOCKET, SO_REUSEPORT, 1, doing) }
      try setBuffer(descriptor, SO_RCVBUFFORCE, SO_RCVBUF, bufferBytes, doing)
      // The outer ToS comes with each datagram: its congestion mark must reach the inner frame (RFC 6040).
      if address.isIPv4 {
        try set(descriptor, Int32(IPPROTO_IP), IP_RECVTOS, 1, doing)
      } else {
        try set(descriptor, Int32(IPPROTO_IPV6), IPV6_RECVTCLASS, 1, doing)
      }
      if takesTrains { try? set(descriptor, Int32(IPPROTO_UDP), CLINUX_UDP_GRO, 1, doing) }
      try bind(
        descriptor, address, port, doing, portKey: encapsulation == .vxlan ? "vxlan_port" : "vnetp_port",
        retries: busyRetries)
    } catch {
      close(descriptor)
      throw error
    }
    return descriptor
  }

  /// Whether the kernel cuts trains (`UDP_SEGMENT` of linux/udp.h, since 4.18). One that does not know the control
  /// message would send a train as one datagram.
  public static func kernelCutsTrains() -> Bool {
    var descriptor = socket(AF_INET, Int32(SOCK_DGRAM.rawValue), 0)
    if descriptor < 0 { descriptor = socket(AF_INET6, Int32(SOCK_DGRAM.rawValue), 0) }
    guard descriptor >= 0 else { return false }
    defer { close(descriptor) }
    return (try? set(descriptor, Int32(IPPROTO_UDP), CLINUX_UDP_SEGMENT, 0, "ask for UDP_SEGMENT")) != nil
  }

  /// A socket that sends to one link's other end, from a source port of its own: datagrams that come back to the
  /// tunnel's port must not be its.
  /// - Parameters:
  ///   - spread: which of the dynamic ports to try first; a taken one gives way to the next.
  ///   - fragments: whether a datagram that is longer than the path's MTU goes out in fragments; else the send fails
  ///     (EMSGSIZE).
  public static func transmit(
    from local: UnderlayAddress, to remote: UnderlayAddress, port: UInt16, spread: Int, fragments: Bool,
    bufferBytes: Int
  ) throws(PortError) -> Int32 {
    let doing = "send to \(text(remote, port))"
    let descriptor = try make(local, doing)
    do throws(PortError) {
      // Links to different ends may share a source port: the four-tuples differ.
      try set(descriptor, SOL_SOCKET, SO_REUSEPORT, 1, doing)
      let sendBytes = fragments ? max(bufferBytes, fragmentingBufferBytesMin) : bufferBytes
      try setBuffer(descriptor, SO_SNDBUFFORCE, SO_SNDBUF, sendBytes, doing)
      // Nothing but errors comes here.
      try set(descriptor, SOL_SOCKET, SO_RCVBUF, 1, doing)
      // A VXLAN tunnel's end must not fragment (RFC 7348 section 4.3): what is too long is told (EMSGSIZE) and counted.
      // Where fragments are wanted, routers may make them too (IPv4, no DF); on IPv6 only this host can, to the path's
      // MTU as it is known.
      if local.isIPv4 {
        let mode = fragments ? IP_PMTUDISC_DONT : IP_PMTUDISC_DO
        try set(descriptor, Int32(IPPROTO_IP), IP_MTU_DISCOVER, mode, doing)
      } else {
        let mode = fragments ? IPV6_PMTUDISC_WANT : IPV6_PMTUDISC_DO
        try set(descriptor, Int32(IPPROTO_IPV6), IPV6_MTU_DISCOVER, mode, doing)
      }
      try bindToFreePort(descriptor, local, spread, doing)
      var room = sockaddr_storage()
      let length = socketAddress(remote, port, &room)
      guard unsafe withAddress(&room, { unsafe connect(descriptor, $0, length) }) == 0 else {
        let number = errno
        let isRoute = number == ENETUNREACH || number == EHOSTUNREACH || number == EADDRNOTAVAIL
        throw PortError(
          doing: doing, number: number, remedy: "see that the underlay has a route (ip route get \(remote))",
          mayPass: isRoute)
      }
    } catch {
      close(descriptor)
      throw error
    }
    return descriptor
  }

  /// The MTU of the device that has an address, in bytes, and the device's name; nil where no device has it.
  public static func device(of address: UnderlayAddress) -> (name: String, mtuBytes: Int)? {
    var list: UnsafeMutablePointer<ifaddrs>?
    guard unsafe getifaddrs(&list) == 0 else { return nil }
    defer { unsafe freeifaddrs(list) }
    let control = socket(AF_INET, Int32(SOCK_DGRAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
    defer { close(control) }
    var next = unsafe list
    while let entry = unsafe next?.pointee {
      unsafe next = entry.ifa_next
      guard let bytes = unsafe entry.ifa_addr else { continue }
      let raw = UnsafeRawPointer(bytes)
      let found: UnderlayAddress
      switch unsafe Int32(raw.load(as: sa_family_t.self)) {
      case AF_INET:
        found = unsafe UnderlayAddress(ipv4: UInt32(bigEndian: raw.load(fromByteOffset: 4, as: UInt32.self)))
      case AF_INET6:
        found = unsafe UnderlayAddress(
          high: UInt64(bigEndian: raw.loadUnaligned(fromByteOffset: 8, as: UInt64.self)),
          low: UInt64(bigEndian: raw.loadUnaligned(fromByteOffset: 16, as: UInt64.self)))
      default: continue
      }
      guard found == address, let name = unsafe entry.ifa_name else { continue }
      let mtu = unsafe clinux_device_mtu(control, name)
      guard mtu > 0 else { continue }
      return unsafe (String(cString: name), Int(mtu))
    }
    return nil
  }

  /// The MTU of the path to `remote` as the kernel's route has it, in bytes; nil where there is no route.
  public static func pathMTUBytes(from local: UnderlayAddress, to remote: UnderlayAddress) -> Int? {
    guard let descriptor = try? make(local, "look up the path to \(remote)") else { return nil }
    defer { close(descriptor) }
    guard (try? bind(descriptor, local, 0, "")) != nil else { return nil }
    var room = sockaddr_storage()
    let length = socketAddress(remote, 9, &room)
    guard unsafe withAddress(&room, { unsafe connect(descriptor, $0, length) }) == 0 else { return nil }
    return pathMTUBytes(of: descriptor)
  }

  /// The MTU of the path that a connected socket sends along, in bytes, as the kernel knows it by now: it falls when a
  /// router on the way says so. nil where the socket is not connected.
  public static func pathMTUBytes(of descriptor: Int32) -> Int? {
    guard let family = option(descriptor, SOL_SOCKET, SO_DOMAIN) else { return nil }
    let bytes =
      family == AF_INET
      ? option(descriptor, Int32(IPPROTO_IP), IP_MTU) : option(descriptor, Int32(IPPROTO_IPV6), IPV6_MTU)
    return bytes.flatMap { $0 > 0 ? Int($0) : nil }
  }

  /// Datagrams that the kernel dropped because the socket's receive buffer was full (SK_MEMINFO_DROPS).
  public static func receiveBufferDrops(_ descriptor: Int32) -> Int {
    var words = InlineArray<9, UInt32>(repeating: 0)
    var size = socklen_t(MemoryLayout.size(ofValue: words))
    guard unsafe getsockopt(descriptor, SOL_SOCKET, SO_MEMINFO, &words, &size) == 0 else { return 0 }
    return Int(words[8])
  }

  // MARK: Parts

  private static func text(_ address: UnderlayAddress, _ port: UInt16) -> String {
    address.isIPv4 ? "\(address):\(port)" : "[\(address)]:\(port)"
  }

  private static func make(_ address: UnderlayAddress, _ doing: String) throws(PortError) -> Int32 {
    let type = Int32(SOCK_DGRAM.rawValue) | Int32(SOCK_NONBLOCK.rawValue) | Int32(SOCK_CLOEXEC.rawValue)
    let descriptor = socket(address.isIPv4 ? AF_INET : AF_INET6, type, 0)
    guard descriptor >= 0 else {
      let remedy = errno == EMFILE ? "raise the limit of open files (ulimit -n)" : "see that the kernel has this family"
      throw PortError(doing: doing, number: errno, remedy: remedy)
    }
    if !address.isIPv4 { try set(descriptor, Int32(IPPROTO_IPV6), IPV6_V6ONLY, 1, doing) }
    return descriptor
  }

  private static func set(
    _ descriptor: Int32, _ level: Int32, _ option: Int32, _ value: Int32, _ doing: String
  ) throws(PortError) {
    var value = value
    guard unsafe setsockopt(descriptor, level, option, &value, socklen_t(MemoryLayout<Int32>.size)) == 0 else {
      throw PortError(
        doing: doing, number: errno, reason: "socket option \(option): \(SystemError.text(errno))",
        remedy: "this kernel lacks an option that tunnels need")
    }
  }

  private static func option(_ descriptor: Int32, _ level: Int32, _ option: Int32) -> Int32? {
    var value: Int32 = 0
    var size = socklen_t(MemoryLayout<Int32>.size)
    return unsafe getsockopt(descriptor, level, option, &value, &size) == 0 ? value : nil
  }

  private static func setBuffer(
    _ descriptor: Int32, _ forced: Int32, _ plain: Int32, _ bytes: Int, _ doing: String
  ) throws(PortError) {
    var value = Int32(clamping: bytes)
    if unsafe setsockopt(descriptor, SOL_SOCKET, forced, &value, socklen_t(MemoryLayout<Int32>.size)) == 0 { return }
    try set(descriptor, SOL_SOCKET, plain, value, doing)
  }

  /// - Parameter portKey: the key of [underlay] that the port comes from; nil where no key names it.
  private static func bind(
    _ descriptor: Int32, _ address: UnderlayAddress, _ port: UInt16, _ doing: String, portKey: String? = nil,
    retries: Int = 0
  ) throws(PortError) {
    var room = sockaddr_storage()
    let length = socketAddress(address, port, &room)
    var number: Int32 = 0
    for attempt in 0...retries {
      number = unsafe withAddress(&room, { unsafe Glibc.bind(descriptor, $0, length) }) == 0 ? 0 : errno
      guard number == EADDRINUSE, attempt < retries else { break }
      usleep(busyRetryMicroseconds)
    }
    guard number == 0 else {
      let remedy =
        switch number {
        case EADDRINUSE:
          "another program uses this UDP port; stop it\(portKey.map { " or set underlay.\($0)" } ?? "")"
        case EADDRNOTAVAIL:
          "no device of this host has the address; set underlay.address (or --address) to one that `ip address` shows"
        case EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE"
        default: "check underlay.address\(portKey.map { " and underlay.\($0)" } ?? "")"
        }
      throw PortError(doing: doing, number: number, remedy: remedy, mayPass: number == EADDRNOTAVAIL)
    }
  }

  private static func bindToFreePort(
    _ descriptor: Int32, _ local: UnderlayAddress, _ spread: Int, _ doing: String
  ) throws(PortError) {
    let triesMax = 256
    for attempt in 0..<triesMax {
      let port = UInt16(sourcePortFirst + (spread &+ attempt) % sourcePortCount)
      do throws(PortError) {
        return try bind(descriptor, local, port, doing)
      } catch {
        if error.number != EADDRINUSE || attempt == triesMax - 1 { throw error }
      }
    }
  }

  private static func socketAddress(
    _ address: UnderlayAddress, _ port: UInt16, _ room: inout sockaddr_storage
  ) -> socklen_t {
    if address.isIPv4 {
      return unsafe clinux_address4(&room, UInt32(truncatingIfNeeded: address.low).bigEndian, port.bigEndian)
    }
    var words = (address.high.bigEndian, address.low.bigEndian)
    return unsafe clinux_address6(&room, &words, port.bigEndian)
  }

  @unsafe
  private static func withAddress<Result>(
    _ room: inout sockaddr_storage, _ body: (UnsafePointer<sockaddr>) -> Result
  ) -> Result {
    unsafe withUnsafePointer(to: &room) { pointer in
      unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { unsafe body($0) }
    }
  }
}
