import Datapath
import Glibc

/// A raw socket on a device of a namespace: what stands here goes on the wire, what the device receives arrives here.
final class PacketSocket {
  private let descriptor: Int32
  private let takesOffloads: Bool

  /// - Parameter takesOffloads: whether an offload header stands before each frame that is sent.
  init(in namespace: Namespace, device: String = Guest.device, takesOffloads: Bool = false) throws {
    self.takesOffloads = takesOffloads
    descriptor = try namespace.inside {
      let everything = Int32(UInt16(0x0003).bigEndian)  // ETH_P_ALL of linux/if_ether.h
      let descriptor = socket(AF_PACKET, socketKind(SOCK_RAW), everything)
      guard descriptor >= 0 else { throw LabError("no packet socket: \(errorText(errno))") }
      let index = unsafe if_nametoindex(device)
      // struct sockaddr_ll of linux/if_packet.h.
      let address =
        hostOrder(UInt16(AF_PACKET)) + networkOrder(UInt16(0x0003)) + hostOrder(UInt32(index))
        + [UInt8](repeating: 0, count: 12)
      do {
        // Not what this device sends, and the VLAN tag that the kernel took out of a frame beside it.
        try set(descriptor, solPacket, packetIgnoreOutgoing, 1)
        try set(descriptor, solPacket, packetAuxiliaryData, 1)
        if takesOffloads { try set(descriptor, solPacket, packetOffloadHeaderBytes, Int32(OffloadHeader.bytes)) }
        try set(descriptor, SOL_SOCKET, SO_RCVBUFFORCE, receiveBufferBytes)
        try bindSocket(descriptor, to: address)
      } catch {
        close(descriptor)
        throw error
      }
      return descriptor
    }
  }

  deinit { close(descriptor) }

  func send(_ frame: [UInt8]) throws {
    let sent = unsafe frame.withUnsafeBytes { unsafe Glibc.send(descriptor, $0.baseAddress!, $0.count, 0) }
    guard sent == frame.count else { throw LabError("packet socket: \(errorText(errno))") }
  }

  /// Sends a super-frame, or a frame without its transport checksum; only where the socket `takesOffloads`.
  func send(_ frame: [UInt8], _ offload: OffloadHeader) throws {
    var header = [UInt8](repeating: 0, count: OffloadHeader.bytes)
    var elements = header.mutableSpan
    var room = unsafe elements.mutableBytes
    offload.write(into: &room)
    try send(header + frame)
  }

  /// The next frame as it was on the wire, with its VLAN tags; nil when none comes in time.
  func receive(seconds: Double = 1) throws -> [UInt8]? { try receiveWithOffload(seconds: seconds)?.frame }

  /// The next frame, and what is to be done to it yet, where the socket `takesOffloads`; nil when none comes in time.
  func receiveWithOffload(seconds: Double = 1) throws -> (frame: [UInt8], offload: OffloadHeader)? {
    guard waitForInput(descriptor, seconds: seconds) else { return nil }
    var (frame, control) = try receiveMessage(descriptor, "packet socket")
    var offload = OffloadHeader()
    if takesOffloads {
      guard let found = unsafe OffloadHeader(frame.span.bytes) else { throw LabError("no offload header") }
      offload = found
      frame.removeFirst(OffloadHeader.bytes)
    }
    if let tag = vlanTag(control), frame.count >= 12 { frame.insert(contentsOf: tag, at: 12) }
    return (frame, offload)
  }

  /// The numbers of the numbered frames that arrive until none has come for `quietSeconds`.
  func receiveNumbers(quietSeconds: Double = 0.5) throws -> [UInt32] {
    var numbers: [UInt32] = []
    while let frame = try receive(seconds: quietSeconds) {
      if let number = Frame.number(of: frame) { numbers.append(number) }
    }
    return numbers
  }

  /// Waits for the frame with this number and passes over others.
  func receives(number: UInt32, seconds: Double = 5) throws -> Bool {
    try eventually(within: seconds) {
      guard let frame = try receive(seconds: 0.1) else { return false }
      return Frame.number(of: frame) == number
    }
  }

  /// struct tpacket_auxdata of linux/if_packet.h: status, len, snaplen, mac, net, tci, tpid.
  private func vlanTag(_ control: ControlMessage?) -> [UInt8]? {
    guard let control, control.level == solPacket, control.type == packetAuxiliaryData, control.value.count >= 20
    else { return nil }
    let tagIsValid: UInt32 = 1 << 4
    func number(_ offset: Int) -> UInt16 { UInt16(control.value[offset + 1]) << 8 | UInt16(control.value[offset]) }
    guard UInt32(number(0)) & tagIsValid != 0 else { return nil }
    return networkOrder(number(18)) + networkOrder(number(16))
  }
}

/// An option of a socket, as setsockopt(2) takes it.
struct SocketOption {
  let level: Int32
  let name: Int32
  let value: [UInt8]

  init(_ level: some BinaryInteger, _ name: Int32, bytes: [UInt8]) {
    self.level = Int32(level)
    self.name = name
    value = bytes
  }

  init(_ level: some BinaryInteger, _ name: Int32, _ value: Int32) {
    self.init(level, name, bytes: hostOrder(value))
  }

  /// The ToS byte, or the traffic class, of what is sent.
  static func service(_ family: Family, _ value: UInt8) -> SocketOption {
    family == .ipv4
      ? SocketOption(IPPROTO_IP, IP_TOS, Int32(value)) : SocketOption(IPPROTO_IPV6, IPV6_TCLASS, Int32(value))
  }
}

/// A UDP socket in a namespace.
final class DatagramSocket {
  private let descriptor: Int32
  private let family: Family

  /// Bound to an address, and to a port or to one that the kernel picks.
  init(in namespace: Namespace, address: String, port: UInt16 = 0, _ options: [SocketOption] = []) throws {
    let family = Family(of: address)
    self.family = family
    descriptor = try namespace.inside {
      let bytes = try socketAddress(address, port: port)
      let descriptor = socket(family.number, socketKind(SOCK_DGRAM), 0)
      guard descriptor >= 0 else { throw LabError("no UDP socket: \(errorText(errno))") }
      do {
        try set(descriptor, SOL_SOCKET, SO_RCVBUFFORCE, receiveBufferBytes)
        try family == .ipv4
          ? set(descriptor, Int32(IPPROTO_IP), IP_RECVTOS, 1)
          : set(descriptor, Int32(IPPROTO_IPV6), IPV6_RECVTCLASS, 1)
        for option in options { try set(descriptor, option) }
        try bindSocket(descriptor, to: bytes)
      } catch {
        close(descriptor)
        throw error
      }
      return descriptor
    }
  }

  deinit { close(descriptor) }

  /// Sets the ToS byte, with its ECN bits, of what is sent from now on.
  func setService(_ value: UInt8) throws { try set(descriptor, .service(family, value)) }

  func send(_ payload: [UInt8], to address: String, port: UInt16) throws {
    let bytes = try socketAddress(address, port: port)
    let sent = unsafe payload.withUnsafeBytes { payload in
      unsafe withSocketAddress(bytes) { address, count in
        unsafe sendto(descriptor, payload.baseAddress, payload.count, 0, address, count)
      }
    }
    guard sent == payload.count else { throw LabError("UDP socket, \(payload.count) bytes: \(errorText(errno))") }
  }

  /// Hands over many datagrams at once (UDP_SEGMENT of udp(7)): as long as that, but for the last.
  func send(_ payload: [UInt8], segmentBytes: Int, to address: String, port: UInt16) throws {
    try set(descriptor, Int32(IPPROTO_UDP), udpSegment, Int32(segmentBytes))
    try send(payload, to: address, port: port)
    try set(descriptor, Int32(IPPROTO_UDP), udpSegment, 0)
  }

  /// The next datagram; nil when none comes in time.
  func receive(seconds: Double = 1) throws -> [UInt8]? { try receiveWithService(seconds: seconds)?.payload }

  /// The next datagram and the ToS byte, or traffic class, that it came with; nil when none comes in time.
  func receiveWithService(seconds: Double = 1) throws -> (payload: [UInt8], service: UInt8)? {
    guard waitForInput(descriptor, seconds: seconds) else { return nil }
    let (payload, control) = try receiveMessage(descriptor, "UDP socket")
    // One byte for IPv4; for IPv6 a number in the machine's order, which is taken to be little-endian.
    return (payload, control?.value.first ?? 0)
  }
}

/// A TCP socket that waits for a connection.
final class StreamListener {
  private let descriptor: Int32
  let port: UInt16 = 5001

  /// - Parameter options: also of the connections that it accepts.
  init(in namespace: Namespace, address: String, _ options: [SocketOption] = []) throws {
    let bytes = try socketAddress(address, port: port)
    descriptor = try namespace.inside {
      let descriptor = socket(Family(of: address).number, socketKind(SOCK_STREAM), 0)
      guard descriptor >= 0 else { throw LabError("no TCP socket: \(errorText(errno))") }
      do {
        try set(descriptor, SOL_SOCKET, SO_REUSEADDR, 1)
        for option in options { try set(descriptor, option) }
        try bindSocket(descriptor, to: bytes)
        guard listen(descriptor, 1) == 0 else { throw LabError("cannot listen: \(errorText(errno))") }
      } catch {
        close(descriptor)
        throw error
      }
      return descriptor
    }
  }

  deinit { close(descriptor) }

  func accept(seconds: Double) throws -> StreamSocket {
    guard waitForInput(descriptor, seconds: seconds) else { throw LabError("nobody connects to TCP port \(port)") }
    let accepted = Glibc.accept(descriptor, nil, nil)
    guard accepted >= 0 else { throw LabError("cannot accept: \(errorText(errno))") }
    return StreamSocket(descriptor: accepted)
  }
}

/// One end of a TCP connection. Nothing waits: a test looks after both ends in turn.
final class StreamSocket {
  private let descriptor: Int32

  fileprivate init(descriptor: Int32) { self.descriptor = descriptor }

  /// Connects within 10 seconds, or throws.
  init(in namespace: Namespace, to address: String, port: UInt16, _ options: [SocketOption] = []) throws {
    let bytes = try socketAddress(address, port: port)
    descriptor = try namespace.inside {
      let descriptor = socket(Family(of: address).number, socketKind(SOCK_STREAM), 0)
      guard descriptor >= 0 else { throw LabError("no TCP socket: \(errorText(errno))") }
      do {
        for option in options { try set(descriptor, option) }
      } catch {
        close(descriptor)
        throw error
      }
      // The time that a send may take is the connection's too: socket(7).
      var timeout = timeval(tv_sec: 10, tv_usec: 0)
      let size = socklen_t(MemoryLayout<timeval>.size)
      let isSet = unsafe setsockopt(descriptor, SOL_SOCKET, SO_SNDTIMEO, &timeout, size)
      guard isSet == 0, unsafe withSocketAddress(bytes, { unsafe connect(descriptor, $0, $1) }) == 0 else {
        let text = errorText(errno)
        close(descriptor)
        throw LabError("no TCP connection to \(address): \(text)")
      }
      return descriptor
    }
  }

  deinit { close(descriptor) }

  /// Hands over as much as the socket takes at once, and returns how many bytes that was.
  /// - Parameter isUrgent: whether the last of them is (MSG_OOB).
  func send(_ bytes: ArraySlice<UInt8>, isUrgent: Bool = false) throws -> Int {
    let flags = Int32(MSG_DONTWAIT) | Int32(MSG_NOSIGNAL) | (isUrgent ? Int32(MSG_OOB) : 0)
    let sent = unsafe bytes.withUnsafeBytes { unsafe Glibc.send(descriptor, $0.baseAddress!, $0.count, flags) }
    guard sent >= 0 || errno == EAGAIN else { throw LabError("TCP socket: \(errorText(errno))") }
    return max(0, sent)
  }

  /// Nothing more is sent.
  func end() { shutdown(descriptor, Int32(SHUT_WR)) }

  /// Appends what has arrived; true when the other end has sent its last.
  func receive(into bytes: inout [UInt8]) throws -> Bool {
    var chunk = [UInt8](repeating: 0, count: 1 << 20)
    while true {
      let count = unsafe chunk.withUnsafeMutableBytes {
        unsafe recv(descriptor, $0.baseAddress!, $0.count, Int32(MSG_DONTWAIT))
      }
      if count < 0 && errno == EAGAIN { return false }
      guard count >= 0 else { throw LabError("TCP socket: \(errorText(errno))") }
      if count == 0 { return true }
      bytes += chunk[..<count]
    }
  }

  /// The urgent byte, which is not among the others; nil when none comes in time.
  func receiveUrgent(seconds: Double = 5) throws -> UInt8? {
    var request = pollfd(fd: descriptor, events: Int16(POLLPRI), revents: 0)
    guard unsafe poll(&request, 1, Int32(seconds * 1000)) > 0 else { return nil }
    var byte: UInt8 = 0
    let count = unsafe recv(descriptor, &byte, 1, Int32(MSG_OOB))
    guard count == 1 else { throw LabError("TCP socket, urgent byte: \(errorText(errno))") }
    return byte
  }

  /// Waits until one of the sockets has something to read, or takes more of those that have something to send.
  static func waitForAny(of sockets: [(socket: StreamSocket, hasMore: Bool)], seconds: Double) {
    var requests = sockets.map {
      pollfd(fd: $0.socket.descriptor, events: Int16(POLLIN) | ($0.hasMore ? Int16(POLLOUT) : 0), revents: 0)
    }
    _ = unsafe poll(&requests, nfds_t(requests.count), Int32(seconds * 1000))
  }
}

/// A datagram socket of the file system, as a service manager opens it for sd_notify(3).
final class NotificationSocket {
  let path: String
  private let descriptor: Int32

  init(path: String) throws {
    self.path = path
    descriptor = socket(AF_UNIX, socketKind(SOCK_DGRAM), 0)
    guard descriptor >= 0 else { throw LabError("no notification socket: \(errorText(errno))") }
    let name = Array(path.utf8)
    // struct sockaddr_un of sys/un.h has room for 108 bytes.
    let address = hostOrder(UInt16(AF_UNIX)) + name + [UInt8](repeating: 0, count: 108 - name.count)
    try bindSocket(descriptor, to: address)
  }

  deinit {
    close(descriptor)
    unsafe unlink(path)
  }

  func receive(seconds: Double) -> String? {
    guard waitForInput(descriptor, seconds: seconds) else { return nil }
    var text = [UInt8](repeating: 0, count: 4096)
    let count = unsafe text.withUnsafeMutableBytes { unsafe recv(descriptor, $0.baseAddress!, $0.count, 0) }
    return count < 0 ? nil : String(decoding: text[..<count], as: UTF8.self)
  }
}

// linux/socket.h and linux/if_packet.h, which Swift's Glibc module leaves out.
private let solPacket: Int32 = 263
private let packetAuxiliaryData: Int32 = 8
private let packetIgnoreOutgoing: Int32 = 23
private let packetOffloadHeaderBytes: Int32 = 24

/// Room for every frame of a test, so that a slow reader loses none.
private let receiveBufferBytes: Int32 = 32 << 20

private func socketKind(_ kind: __socket_type) -> Int32 {
  Int32(kind.rawValue) | Int32(SOCK_CLOEXEC.rawValue)
}

private let udpSegment: Int32 = 103

private func hostOrder(_ value: some FixedWidthInteger) -> [UInt8] { networkOrder(value.byteSwapped) }

private func set(_ descriptor: Int32, _ level: Int32, _ name: Int32, _ value: Int32) throws {
  try set(descriptor, SocketOption(level, name, value))
}

private func set(_ descriptor: Int32, _ option: SocketOption) throws {
  let value = option.value
  let status = unsafe setsockopt(descriptor, option.level, option.name, value, socklen_t(value.count))
  guard status == 0 else { throw LabError("socket option \(option.name): \(errorText(errno))") }
}

/// The first control message beside what was received: struct cmsghdr of sys/socket.h.
private struct ControlMessage {
  let level: Int32
  let type: Int32
  let value: [UInt8]

  init?(_ bytes: ArraySlice<UInt8>) {
    let header = 16
    guard bytes.count >= header else { return nil }
    func number(_ offset: Int) -> Int {
      bytes[offset..<offset + 4].reversed().reduce(0) { $0 << 8 | Int($1) }
    }
    level = Int32(number(8))
    type = Int32(number(12))
    value = Array(bytes[header..<max(header, min(number(0), bytes.count))])
  }
}

/// Takes what waits at a socket, and what the kernel says beside it.
private func receiveMessage(_ descriptor: Int32, _ what: String) throws -> ([UInt8], ControlMessage?) {
  var bytes = [UInt8](repeating: 0, count: 1 << 17)
  var control = [UInt8](repeating: 0, count: 128)
  var controlCount = 0
  let count = unsafe bytes.withUnsafeMutableBytes { bytes in
    unsafe control.withUnsafeMutableBytes { control in
      var vector = unsafe iovec(iov_base: bytes.baseAddress!, iov_len: bytes.count)
      return unsafe withUnsafeMutablePointer(to: &vector) { vector in
        var message = unsafe msghdr()
        unsafe message.msg_iov = vector
        unsafe message.msg_iovlen = 1
        unsafe message.msg_control = control.baseAddress!
        unsafe message.msg_controllen = control.count
        let count = unsafe recvmsg(descriptor, &message, Int32(MSG_DONTWAIT))
        controlCount = unsafe Int(message.msg_controllen)
        return count
      }
    }
  }
  guard count >= 0 else { throw LabError("\(what): \(errorText(errno))") }
  return (Array(bytes[..<count]), ControlMessage(control[..<controlCount]))
}

private func bindSocket(_ descriptor: Int32, to address: [UInt8]) throws {
  let status = unsafe withSocketAddress(address) { unsafe bind(descriptor, $0, $1) }
  guard status == 0 else { throw LabError("cannot bind a socket: \(errorText(errno))") }
}

/// struct sockaddr_in or sockaddr_in6 of netinet/in.h.
private func socketAddress(_ address: String, port: UInt16) throws -> [UInt8] {
  let family = Family(of: address)
  var bytes = [UInt8](repeating: 0, count: family == .ipv6 ? 16 : 4)
  let status = unsafe bytes.withUnsafeMutableBytes { unsafe inet_pton(family.number, address, $0.baseAddress!) }
  guard status == 1 else { throw LabError("no address: \(address)") }
  return family == .ipv6
    ? hostOrder(UInt16(AF_INET6)) + networkOrder(port) + [0, 0, 0, 0] + bytes + [0, 0, 0, 0]
    : hostOrder(UInt16(AF_INET)) + networkOrder(port) + bytes + [UInt8](repeating: 0, count: 8)
}

private func withSocketAddress<R>(
  _ bytes: [UInt8], _ body: (UnsafePointer<sockaddr>, socklen_t) throws -> R
) rethrows -> R {
  var storage = sockaddr_storage()
  return try unsafe withUnsafeMutableBytes(of: &storage) { storage in
    unsafe storage.copyBytes(from: bytes)
    return try unsafe body(storage.baseAddress!.assumingMemoryBound(to: sockaddr.self), socklen_t(bytes.count))
  }
}

private func waitForInput(_ descriptor: Int32, seconds: Double) -> Bool {
  var request = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
  return unsafe poll(&request, 1, Int32(seconds * 1000)) > 0
}
