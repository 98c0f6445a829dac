import Glibc

/// A raw socket on a device of a namespace: what stands here goes on the wire, what the device receives arrives here.
final class PacketSocket {
  private let descriptor: Int32

  init(in namespace: Namespace, device: String = Guest.device) throws {
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

  /// The next frame as it was on the wire, with its VLAN tags; nil when none comes in time.
  func receive(seconds: Double = 1) throws -> [UInt8]? {
    guard waitForInput(descriptor, seconds: seconds) else { return nil }
    var frame = [UInt8](repeating: 0, count: 1 << 16)
    var control = [UInt8](repeating: 0, count: 128)
    var controlCount = 0
    let count = unsafe frame.withUnsafeMutableBytes { frame in
      unsafe control.withUnsafeMutableBytes { control in
        var vector = unsafe iovec(iov_base: frame.baseAddress!, iov_len: frame.count)
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
    guard count >= 0 else { throw LabError("packet socket: \(errorText(errno))") }
    frame.removeLast(frame.count - count)
    if let tag = vlanTag(control: Array(control[..<controlCount])), count >= 12 {
      frame.insert(contentsOf: tag, at: 12)
    }
    return frame
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

  /// struct cmsghdr and struct tpacket_auxdata of linux/if_packet.h: status, len, snaplen, mac, net, tci, tpid.
  private func vlanTag(control: [UInt8]) -> [UInt8]? {
    let header = 16
    guard control.count >= header + 20 else { return nil }
    func number(_ offset: Int, _ count: Int) -> UInt32 {
      control[offset..<(offset + count)].reversed().reduce(0) { $0 << 8 | UInt32($1) }
    }
    let tagIsValid: UInt32 = 1 << 4
    guard Int32(number(8, 4)) == solPacket, Int32(number(12, 4)) == packetAuxiliaryData,
      number(header, 4) & tagIsValid != 0
    else { return nil }
    return networkOrder(UInt16(number(header + 18, 2))) + networkOrder(UInt16(number(header + 16, 2)))
  }
}

/// A UDP socket in a namespace.
final class DatagramSocket {
  private let descriptor: Int32

  /// Bound to an address, and to a port or to one that the kernel picks.
  init(in namespace: Namespace, address: String, port: UInt16 = 0) throws {
    descriptor = try namespace.inside {
      let bytes = try socketAddress(address, port: port)
      let family = address.contains(":") ? AF_INET6 : AF_INET
      let descriptor = socket(family, socketKind(SOCK_DGRAM), 0)
      guard descriptor >= 0 else { throw LabError("no UDP socket: \(errorText(errno))") }
      do {
        try set(descriptor, SOL_SOCKET, SO_RCVBUFFORCE, receiveBufferBytes)
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
  func setService(_ value: UInt8) throws {
    try set(descriptor, Int32(IPPROTO_IP), IP_TOS, Int32(value))
  }

  func send(_ payload: [UInt8], to address: String, port: UInt16) throws {
    let bytes = try socketAddress(address, port: port)
    let sent = unsafe payload.withUnsafeBytes { payload in
      unsafe withSocketAddress(bytes) { address, count in
        unsafe sendto(descriptor, payload.baseAddress, payload.count, 0, address, count)
      }
    }
    guard sent == payload.count else { throw LabError("UDP socket: \(errorText(errno))") }
  }

  /// The next datagram; nil when none comes in time.
  func receive(seconds: Double = 1) throws -> [UInt8]? {
    guard waitForInput(descriptor, seconds: seconds) else { return nil }
    var payload = [UInt8](repeating: 0, count: 1 << 16)
    let count = unsafe payload.withUnsafeMutableBytes {
      unsafe recv(descriptor, $0.baseAddress!, $0.count, Int32(MSG_DONTWAIT))
    }
    guard count >= 0 else { throw LabError("UDP socket: \(errorText(errno))") }
    return Array(payload[..<count])
  }
}

/// A TCP socket that waits for a connection.
final class StreamListener {
  private let descriptor: Int32
  let port: UInt16 = 5001

  init(in namespace: Namespace, address: String) throws {
    let bytes = try socketAddress(address, port: port)
    descriptor = try namespace.inside {
      let descriptor = socket(AF_INET, socketKind(SOCK_STREAM), 0)
      guard descriptor >= 0 else { throw LabError("no TCP socket: \(errorText(errno))") }
      do {
        try set(descriptor, SOL_SOCKET, SO_REUSEADDR, 1)
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
  init(in namespace: Namespace, to address: String, port: UInt16) throws {
    let bytes = try socketAddress(address, port: port)
    descriptor = try namespace.inside {
      let descriptor = socket(AF_INET, socketKind(SOCK_STREAM), 0)
      guard descriptor >= 0 else { throw LabError("no TCP socket: \(errorText(errno))") }
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
  func send(_ bytes: ArraySlice<UInt8>) throws -> Int {
    let flags = Int32(MSG_DONTWAIT) | Int32(MSG_NOSIGNAL)
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

/// Room for every frame of a test, so that a slow reader loses none.
private let receiveBufferBytes: Int32 = 32 << 20

private func socketKind(_ kind: __socket_type) -> Int32 {
  Int32(kind.rawValue) | Int32(SOCK_CLOEXEC.rawValue)
}

private func hostOrder(_ value: some FixedWidthInteger) -> [UInt8] { networkOrder(value.byteSwapped) }

private func set(_ descriptor: Int32, _ level: Int32, _ option: Int32, _ value: Int32) throws {
  var value = value
  let status = unsafe setsockopt(descriptor, level, option, &value, socklen_t(MemoryLayout<Int32>.size))
  guard status == 0 else { throw LabError("socket option \(option): \(errorText(errno))") }
}

private func bindSocket(_ descriptor: Int32, to address: [UInt8]) throws {
  let status = unsafe withSocketAddress(address) { unsafe bind(descriptor, $0, $1) }
  guard status == 0 else { throw LabError("cannot bind a socket: \(errorText(errno))") }
}

/// struct sockaddr_in or sockaddr_in6 of netinet/in.h.
private func socketAddress(_ address: String, port: UInt16) throws -> [UInt8] {
  let isIPv6 = address.contains(":")
  var bytes = [UInt8](repeating: 0, count: isIPv6 ? 16 : 4)
  let status = unsafe bytes.withUnsafeMutableBytes {
    unsafe inet_pton(isIPv6 ? AF_INET6 : AF_INET, address, $0.baseAddress!)
  }
  guard status == 1 else { throw LabError("no address: \(address)") }
  return isIPv6
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
