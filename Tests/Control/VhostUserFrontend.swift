import CLinux
import Datapath
import Glibc

@testable import Control

/// A memory file with a name that no other test has, to be shared, and to be found again among what is open and mapped.
struct SharedFile {
  let descriptor: OwnedDescriptor
  let byteCount: Int

  init(_ name: String, byteCount: Int = 1 << 20) {
    let number = unsafe clinux_make_memory_file(name)
    precondition(number >= 0 && ftruncate(number, byteCount) == 0)
    descriptor = OwnedDescriptor(number)
    self.byteCount = byteCount
  }

  /// A descriptor of its own for the same file, as one that came with a message is.
  var received: OwnedDescriptor { OwnedDescriptor(dup(descriptor.number)) }

  /// As a region at a guest address; the frontend's own address is as much higher as virtio-user's or QEMU's may be.
  func region(
    guest: UInt64 = 0, user: UInt64 = 0x7f00_0000_0000, offset: UInt64 = 0, bytes: Int? = nil
  ) -> VhostUserMessage.RegionDescription {
    .init(
      guestAddress: guest, byteCount: UInt64(bytes ?? byteCount), userAddress: user &+ guest, fileOffset: offset)
  }

  /// How many descriptors of this process are of files with the name.
  static func openCount(_ name: String) -> Int {
    var count = 0
    guard let folder = unsafe opendir("/proc/self/fd") else { return -1 }
    defer { unsafe _ = closedir(folder) }
    while let entry = unsafe readdir(folder) {
      let number = unsafe withUnsafeBytes(of: &entry.pointee.d_name) {
        unsafe String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self)
      }
      var target = [UInt8](repeating: 0, count: 256)
      let length = unsafe target.withUnsafeMutableBytes { target in
        unsafe readlink(
          "/proc/self/fd/" + number, target.baseAddress!.assumingMemoryBound(to: CChar.self), target.count)
      }
      if length > 0, String(decoding: target.prefix(length), as: UTF8.self).contains("/memfd:" + name + " ") {
        count += 1
      }
    }
    return count
  }

  /// How many mappings of this process are of files with the name.
  static func mappedCount(_ name: String) -> Int { lines(of: "/proc/self/maps", with: "/memfd:" + name + " ") }

  /// How many sockets of this machine have the path.
  static func socketCount(_ path: String) -> Int { lines(of: "/proc/net/unix", with: path) }

  private static func lines(of path: String, with text: String) -> Int {
    let number = unsafe open(path, O_RDONLY)
    precondition(number >= 0)
    defer { close(number) }
    var bytes: [UInt8] = []
    var part = [UInt8](repeating: 0, count: 65_536)
    while true {
      let count = unsafe read(number, &part, part.count)
      guard count > 0 else { break }
      bytes += part.prefix(count)
    }
    return String(decoding: bytes, as: UTF8.self).split(separator: "\n").count { $0.contains(text) }
  }
}

/// The frontend's end of a connection: it sends whatever it is told to, in whatever pieces.
final class VhostUserFrontend {
  let socket: OwnedDescriptor

  init(_ socket: OwnedDescriptor) { self.socket = socket }

  /// Over at once, even while a process that another test starts has a copy of it.
  deinit { shutdown(socket.number, Int32(SHUT_RDWR)) }

  /// Two connected ends.
  static func pair() -> (VhostUserFrontend, OwnedDescriptor) {
    var ends: [Int32] = [0, 0]
    precondition(unsafe socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0, &ends) == 0)
    return (VhostUserFrontend(OwnedDescriptor(ends[0])), OwnedDescriptor(ends[1]))
  }

  /// Connects; nil when nobody listens.
  init?(path: String) {
    let number = Glibc.socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
    socket = OwnedDescriptor(number)
    guard unsafe Self.withAddress(path, { unsafe connect(number, $0, $1) }) == 0 else { return nil }
  }

  /// A socket that listens on a path, as QEMU with server=on does.
  static func listen(_ path: String) -> OwnedDescriptor {
    let number = Glibc.socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
    precondition(unsafe withAddress(path) { unsafe bind(number, $0, $1) } == 0 && Glibc.listen(number, 4) == 0)
    return OwnedDescriptor(number)
  }

  static func accept(_ listener: OwnedDescriptor) -> VhostUserFrontend {
    VhostUserFrontend(OwnedDescriptor(Glibc.accept(listener.number, nil, nil)))
  }

  private static func withAddress(_ path: String, _ body: (UnsafePointer<sockaddr>, socklen_t) -> Int32) -> Int32 {
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    unsafe withUnsafeMutableBytes(of: &address.sun_path) { unsafe $0.copyBytes(from: Array(path.utf8)) }
    return unsafe withUnsafePointer(to: &address) { pointer in
      unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        unsafe body($0, socklen_t(MemoryLayout<sockaddr_un>.size))
      }
    }
  }

  func send(_ message: VhostUserMessage, needsReply: Bool = false, _ descriptors: [OwnedDescriptor] = []) {
    send(message.bytes(needsReply: needsReply), descriptors)
  }

  @discardableResult
  func send(_ bytes: [UInt8], _ descriptors: [OwnedDescriptor] = []) -> Int {
    var bytes = bytes
    var control =
      UInt64(16 + 4 * descriptors.count).littleEndianBytes + UInt32(SOL_SOCKET).littleEndianBytes
      + UInt32(SCM_RIGHTS).littleEndianBytes + descriptors.flatMap { $0.number.littleEndianBytes }
    control += [UInt8](repeating: 0, count: (8 - control.count % 8) % 8)
    let number = socket.number
    return unsafe bytes.withUnsafeMutableBytes { bytes in
      unsafe control.withUnsafeMutableBytes { control in
        var vector = unsafe iovec(iov_base: bytes.baseAddress, iov_len: bytes.count)
        return unsafe withUnsafeMutablePointer(to: &vector) { vector in
          var message = unsafe msghdr()
          unsafe message.msg_iov = vector
          unsafe message.msg_iovlen = 1
          if !descriptors.isEmpty {
            unsafe message.msg_control = control.baseAddress
            unsafe message.msg_controllen = control.count
          }
          return unsafe sendmsg(number, &message, Int32(MSG_NOSIGNAL))
        }
      }
    }
  }

  /// The next reply that has arrived; nil where there is none.
  func reply() -> (request: UInt32, flags: UInt32, payload: [UInt8])? {
    var header = [UInt8](repeating: 0, count: VhostUserHeader.byteCount)
    guard unsafe recv(socket.number, &header, header.count, Int32(MSG_DONTWAIT)) == header.count else { return nil }
    var reader = ByteReader(header)
    guard let request = reader.next32(), let flags = reader.next32(), let size = reader.next32() else { return nil }
    var payload = [UInt8](repeating: 0, count: Int(size))
    if size > 0 { precondition(unsafe recv(socket.number, &payload, payload.count, 0) == payload.count) }
    return (request, flags, payload)
  }

  /// The number in the next reply.
  func replyNumber() -> UInt64? {
    guard let payload = reply()?.payload else { return nil }
    var reader = ByteReader(payload)
    return reader.next64()
  }

  /// Whether the backend has closed its end.
  var isClosed: Bool {
    var byte: UInt8 = 0
    let count = unsafe recv(socket.number, &byte, 1, Int32(MSG_DONTWAIT) | Int32(MSG_PEEK))
    return count == 0 || count < 0 && errno == ECONNRESET
  }
}

extension VhostUserMessage {
  func header(needsReply: Bool = false) -> VhostUserHeader {
    VhostUserHeader(request: request.rawValue, needsReply: needsReply, payloadBytes: payload.count)
  }

  func bytes(needsReply: Bool = false) -> [UInt8] {
    header(needsReply: needsReply).bytes(isReply: false) + payload
  }

  /// One of each request, with payloads that make sense.
  static let oneOfEach: [VhostUserMessage] = [
    .getFeatures, .setFeatures(VhostUserFeatures.version1.rawValue), .setOwner, .resetOwner,
    .setMemoryTable([.init(guestAddress: 0, byteCount: 4096, userAddress: 8192, fileOffset: 0)]),
    .setLogBase(.init(byteCount: 4096, fileOffset: 0)), .setLogDescriptor,
    .setQueueSize(.init(queue: 0, number: 256)),
    .setQueueAddresses(.init(queue: 0, flags: 0, descriptors: 8192, used: 8192, available: 8192, log: 0)),
    .setQueueBase(.init(queue: 0)), .getQueueBase(.init(queue: 0)),
    .setQueueKick(.init(queue: 0)), .setQueueCall(.init(queue: 0)), .setQueueError(.init(queue: 0)),
    .getProtocolFeatures, .setProtocolFeatures(VhostUserProtocolFeatures.replyAcknowledge.rawValue),
    .getQueuePairsMax, .setQueueEnabled(.init(queue: 0, number: 1)), .sendRARP(0x0a00_0000_0002),
    .setMTU(1500), .getInflight(.init(area: .init(byteCount: 0, fileOffset: 0), queues: 2, size: 256)),
    .setInflight(.init(area: .init(byteCount: 16384, fileOffset: 0), queues: 2, size: 256)), .resetDevice,
    .getMemorySlotsMax,
    .addMemoryRegion(.init(guestAddress: 0, byteCount: 4096, userAddress: 8192, fileOffset: 0)),
    .removeMemoryRegion(.init(guestAddress: 0, byteCount: 4096, userAddress: 8192, fileOffset: 0)),
    .setStatus(4), .getStatus,
  ]
}

extension VhostUserEffect {
  /// What it is, in a word or two.
  var name: String {
    switch self {
    case .featuresAgreed: "features"
    case .memoryChanged(let memory, _, _): "memory \(memory.regions.count)"
    case .logChanged: "log"
    case .usedLogChanged(let queue, let address, _): "used log \(queue) \(address.map { "\($0)" } ?? "off")"
    case .startQueue(let start): "start \(start.number)"
    case .stopQueue(let queue): "stop \(queue)"
    case .queueEnabled(let queue, let isEnabled): "\(isEnabled ? "enable" : "disable") \(queue)"
    case .kickChanged(let queue, _, _): "kick \(queue)"
    case .callChanged(let queue, _, _): "call \(queue)"
    case .errorChanged(let queue, _, _): "error \(queue)"
    case .sendRARP(let address): "rarp \(address)"
    case .mtuChanged(let bytes): "mtu \(bytes)"
    case .reset: "reset"
    case .refused(let why): "refused \(why)"
    case .broken(let why): "broken \(why)"
    case .connected: "connected"
    case .disconnected: "disconnected"
    }
  }

  /// What has to be told when every worker has done it.
  var version: UInt64? {
    switch self {
    case .featuresAgreed(_, let version), .memoryChanged(_, _, let version), .logChanged(_, let version),
      .usedLogChanged(_, _, let version), .kickChanged(_, _, let version), .callChanged(_, _, let version),
      .errorChanged(_, _, let version):
      version
    default: nil
    }
  }
}

/// A backend with a service that does at once what it is told.
struct VhostUserConversation {
  var backend: VhostUserSession
  /// What the frontend was told, in order.
  var replies: [VhostUserReply] = []
  /// What came out, by name.
  var effects: [String] = []
  var starts: [VhostUserQueueStart] = []
  /// Where a queue stands when it is stopped.
  var base = VhostUserQueueBase(availableIndex: 7)

  init(_ settings: VhostUserSession.Settings = .init(queuePairsMax: 2)) { backend = VhostUserSession(settings) }

  /// Sends one message, and returns what followed from it.
  @discardableResult
  mutating func send(
    _ message: VhostUserMessage, needsReply: Bool = false, _ descriptors: [OwnedDescriptor] = []
  ) -> [String] {
    send(message.header(needsReply: needsReply), message.payload, descriptors)
  }

  @discardableResult
  mutating func send(
    _ header: VhostUserHeader, _ payload: [UInt8], _ descriptors: [OwnedDescriptor] = []
  ) -> [String] {
    let before = effects.count
    var open = [backend.receive(header, payload: payload, descriptors: descriptors)]
    while !open.isEmpty {
      let outcome = open.removeFirst()
      replies += outcome.replies
      for effect in outcome.effects {
        effects.append(effect.name)
        if case .startQueue(let start) = effect { starts.append(start) }
        if case .stopQueue(let queue) = effect { open.append(backend.queueStopped(queue, base: base)) }
        if let version = effect.version { open.append(backend.adopted(version: version)) }
      }
    }
    return Array(effects[before...])
  }

  /// The reason of a message that is refused; checks that the frontend is told where it asks.
  mutating func refusal(_ message: VhostUserMessage, _ descriptors: [OwnedDescriptor] = []) -> String {
    let before = replies.count
    let effects = send(message, needsReply: true, descriptors)
    guard effects.count == 1, effects[0].hasPrefix("refused ") else { return "not refused: \(effects)" }
    guard replies.count == before + 1, lastNumber != 0 else { return "not told" }
    return String(effects[0].dropFirst(8))
  }

  /// The number in the last reply.
  var lastNumber: UInt64? {
    guard let payload = replies.last?.payload else { return nil }
    var reader = ByteReader(payload)
    return reader.next64()
  }

  /// Agrees on everything that is offered, and gives it memory and queues up to their start.
  mutating func agree(
    without: VhostUserFeatures = [.packedRing, .logAll], protocolFeatures: VhostUserProtocolFeatures = .served
  ) {
    send(.setProtocolFeatures(protocolFeatures.intersection(backend.settings.protocolFeatures).rawValue))
    send(.setFeatures(backend.settings.features.subtracting(without).rawValue))
  }

  mutating func lend(_ file: SharedFile) { send(.setMemoryTable([file.region()]), [file.received]) }

  /// What precedes the kick of a queue.
  mutating func prepare(_ queue: Int, size: Int = 256, base: UInt32 = 0, flags: UInt32 = 0) {
    send(.setQueueSize(.init(queue: UInt32(queue), number: UInt32(size))))
    send(.setQueueBase(.init(queue: UInt32(queue), number: base)))
    send(.setQueueAddresses(Self.addresses(queue, flags: flags)))
  }

  static func addresses(_ queue: Int, flags: UInt32 = 0) -> VhostUserMessage.QueueAddresses {
    let start = 0x7f00_0000_0000 + UInt64(queue) * 0x8000
    return .init(
      queue: UInt32(queue), flags: flags, descriptors: start, used: start + 0x4000, available: start + 0x2000,
      log: 0x4000 + UInt64(queue) * 0x8000)
  }

  @discardableResult
  mutating func start(_ queue: Int, _ file: SharedFile) -> [String] {
    prepare(queue)
    return send(.setQueueKick(.init(queue: queue)), [file.received])
  }
}
