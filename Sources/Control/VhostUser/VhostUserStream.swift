import CLinux
import Datapath
import Glibc

/// A connected socket on which messages come and replies go, neither of which ever blocks: what came of a message is
/// kept until the rest is there, and what a reply could not be sent of until there is room.
///
/// Every descriptor that comes has an owner before anything else is looked at.
final class VhostUserStream {
  let socket: OwnedDescriptor
  private var header: VhostUserHeader?
  private var bytes: [UInt8] = []
  private var descriptors: [OwnedDescriptor] = []
  private var outgoing: [VhostUserReply] = []
  /// How much of the first of `outgoing` is sent.
  private var sentBytes = 0
  private var control = [UInt8](repeating: 0, count: VhostUserStream.controlBytes)

  /// Descriptors that the kernel sends with one message at most (`SCM_MAX_FD` of linux/net/scm.h): with room for all,
  /// none is lost without being counted.
  private static let descriptorsMax = 253
  /// `cmsghdr` on machines of 64 bits: length, level, type.
  private static let controlHeaderBytes = 16
  private static let controlBytes = controlHeaderBytes + descriptorsMax * 4 + 12

  enum Arrival {
    case message(VhostUserHeader, payload: [UInt8], [OwnedDescriptor])
    /// Not a whole one yet.
    case nothing
    /// The frontend closed it, or it failed.
    case closed
    /// What came is no message.
    case broken(String)
  }

  /// - Parameter socket: connected; need not be non-blocking.
  init(_ socket: OwnedDescriptor) { self.socket = socket }

  /// Over at once, even while a process that is being started has a copy of it.
  deinit { shutdown(socket.number, Int32(SHUT_RDWR)) }

  /// Whether a reply waits for room.
  var wantsToSend: Bool { !outgoing.isEmpty }

  /// Takes the next message, if all of it is there.
  func next() -> Arrival {
    while true {
      if let header, bytes.count == header.payloadBytes {
        let arrival = Arrival.message(header, payload: bytes, descriptors)
        self.header = nil
        bytes = []
        descriptors = []
        return arrival
      }
      let wanted = (header?.payloadBytes ?? VhostUserHeader.byteCount) - bytes.count
      if let failure = receive(wanted) { return failure }
      guard header == nil, bytes.count == VhostUserHeader.byteCount else { continue }
      do throws(VhostUserRefusal) {
        header = try VhostUserHeader(bytes: bytes)
        bytes = []
      } catch {
        return .broken("\(error)")
      }
    }
  }

  /// Adds to `bytes` and `descriptors`; returns why it could not.
  private func receive(_ wanted: Int) -> Arrival? {
    var part = [UInt8](repeating: 0, count: wanted)
    var flags: Int32 = 0
    var controlBytes = 0
    let socket = socket.number
    let count = unsafe part.withUnsafeMutableBytes { part in
      unsafe control.withUnsafeMutableBytes { control in
        var vector = unsafe iovec(iov_base: part.baseAddress, iov_len: part.count)
        return unsafe withUnsafeMutablePointer(to: &vector) { vector in
          var message = unsafe msghdr()
          unsafe message.msg_iov = vector
          unsafe message.msg_iovlen = 1
          unsafe message.msg_control = control.baseAddress
          unsafe message.msg_controllen = control.count
          let count = unsafe recvmsg(socket, &message, Int32(MSG_DONTWAIT) | Int32(MSG_CMSG_CLOEXEC))
          unsafe flags = message.msg_flags
          unsafe controlBytes = count < 0 ? 0 : Int(message.msg_controllen)
          return count
        }
      }
    }
    let number = errno
    own(controlBytes)
    if count < 0 { return number == EAGAIN || number == EINTR ? .nothing : .closed }
    guard flags & Int32(MSG_CTRUNC) == 0 else {
      return .broken(
        "descriptors of a message were lost; this process may have too many open: raise its limit of open files")
    }
    guard descriptors.count <= VhostUserHeader.descriptorsMax else {
      return .broken("a message with \(descriptors.count) descriptors, more than \(VhostUserHeader.descriptorsMax)")
    }
    guard count > 0 else { return .closed }
    bytes += part.prefix(count)
    return nil
  }

  /// Takes over the descriptors of the control messages that came: cmsg(3), laid out by the kernel.
  private func own(_ count: Int) {
    var start = 0
    while start + Self.controlHeaderBytes <= count {
      var reader = ByteReader(Array(control[start..<count]))
      guard let length = reader.next64(), let level = reader.next32(), let type = reader.next32(),
        length >= Self.controlHeaderBytes, length <= count - start
      else {
        return
      }
      if level == UInt32(SOL_SOCKET), type == UInt32(SCM_RIGHTS) {
        for _ in 0..<(Int(length) - Self.controlHeaderBytes) / 4 {
          if let number = reader.next32() { descriptors.append(OwnedDescriptor(Int32(bitPattern: number))) }
        }
      }
      start += (Int(length) + 7) & ~7
    }
  }

  /// Sends as much as there is room for; false when the connection is no more.
  func send(_ replies: [VhostUserReply] = []) -> Bool {
    outgoing += replies
    while let reply = outgoing.first {
      let rest = reply.bytes.dropFirst(sentBytes)
      let count = send(Array(rest), sentBytes == 0 ? reply.descriptor : nil)
      if count < 0 { return errno == EAGAIN || errno == EINTR }
      sentBytes += count
      if count == rest.count {
        outgoing.removeFirst()
        sentBytes = 0
      }
    }
    return true
  }

  private func send(_ bytes: [UInt8], _ descriptor: OwnedDescriptor?) -> Int {
    var bytes = bytes
    // One descriptor's control message, padded to eight bytes.
    var control =
      UInt64(Self.controlHeaderBytes + 4).littleEndianBytes + UInt32(SOL_SOCKET).littleEndianBytes
      + UInt32(SCM_RIGHTS).littleEndianBytes + (descriptor?.number ?? -1).littleEndianBytes + [0, 0, 0, 0]
    let socket = socket.number
    return unsafe bytes.withUnsafeMutableBytes { bytes in
      unsafe control.withUnsafeMutableBytes { control in
        var vector = unsafe iovec(iov_base: bytes.baseAddress, iov_len: bytes.count)
        return unsafe withUnsafeMutablePointer(to: &vector) { vector in
          var message = unsafe msghdr()
          unsafe message.msg_iov = vector
          unsafe message.msg_iovlen = 1
          if descriptor != nil {
            unsafe message.msg_control = control.baseAddress
            unsafe message.msg_controllen = control.count
          }
          return unsafe sendmsg(socket, &message, Int32(MSG_DONTWAIT) | Int32(MSG_NOSIGNAL))
        }
      }
    }
  }

  /// Whether the other end closed it, though messages may still be there to read.
  var hasHungUp: Bool {
    var watched = pollfd(fd: socket.number, events: Int16(CLINUX_POLLRDHUP), revents: 0)
    guard unsafe poll(&watched, 1, 0) > 0 else { return false }
    return watched.revents & Int16(CLINUX_POLLRDHUP | POLLHUP | POLLERR) != 0
  }
}
