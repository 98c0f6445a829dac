import CLinux
import Datapath
import Glibc

/// A vhost-user port's socket: it finds a frontend, as the side that listens or as the side that connects, talks to it,
/// and finds the next one when it is gone. One frontend at a time; others wait in the listening socket's queue.
///
/// For a loop around poll(2): watch ``watch`` and ``retryAtNanoseconds``, call ``ready(nowNanoseconds:)`` when there is
/// something or ``MappingFaults/event()`` is readable, and do what comes back, in order. Nothing here blocks. One
/// thread.
public final class VhostUserSocket {
  public enum Role: String, Sendable {
    /// Listens on the path, and makes it.
    case server
    /// Connects to the path, again and again.
    case client
  }

  public let role: Role
  public let path: String
  /// Why there is no connection, as far as a client knows; nil while there is one.
  public private(set) var problem: String?

  private let settings: VhostUserSession.Settings
  private let listener: Listener?
  private var stream: VhostUserStream?
  /// Of the connection, or of the one before until workers have left it.
  private var backend: VhostUserSession?
  private var retryNanoseconds: UInt64 = 0
  private var backOffNanoseconds = VhostUserSocket.backOffNanosecondsMin
  private var isClosed = false

  /// A frontend that restarts is back soon; one that is not there costs a call every few seconds.
  private static let backOffNanosecondsMin: UInt64 = 100_000_000
  private static let backOffNanosecondsMax: UInt64 = 5_000_000_000
  /// Messages taken at once, so that a frontend that never stops cannot keep control from all else.
  private static let messagesMax = 64

  /// - Throws: a server's path that cannot be listened on, or a path that is too long. A client whose frontend is not
  ///   there tries again.
  public init(_ role: Role, path: String, settings: VhostUserSession.Settings) throws(PortError) {
    self.role = role
    self.path = path
    self.settings = settings
    _ = try UnixAddress(path)
    listener = role == .server ? try Listener(path) : nil
  }

  /// What to poll for, and where; nil while there is only time, or a worker, to wait for.
  public var watch: (descriptor: Int32, events: Int16)? {
    if isClosed { return nil }
    guard let backend else { return listener.map { ($0.socket.number, Int16(POLLIN)) } }
    guard let number = socketNumber else { return nil }
    // As long as a reply is due, or cannot be sent, no more is read.
    if wantsToSend { return (number, Int16(POLLOUT | CLINUX_POLLRDHUP)) }
    return (number, backend.isWaiting ? Int16(CLINUX_POLLRDHUP) : Int16(POLLIN | CLINUX_POLLRDHUP))
  }

  /// When to call ``ready(nowNanoseconds:)`` though nothing happened; nil: never.
  public var retryAtNanoseconds: UInt64? {
    role == .client && backend == nil && !isClosed ? retryNanoseconds : nil
  }

  public var isConnected: Bool { socketNumber != nil }

  /// Whether the next ``ready(nowNanoseconds:)`` closes the connection because shared memory was cut.
  public var hasMemoryFault: Bool { isConnected && backend?.memoryFault != nil }

  /// Does what can be done now.
  /// - Parameter nowNanoseconds: by `MonotonicClock`.
  public func ready(nowNanoseconds: UInt64) -> [VhostUserEffect] {
    var effects: [VhostUserEffect] = []
    guard !isClosed else { return effects }
    if isConnected, let backend, let fault = backend.memoryFault {
      backend.signalErrors()
      effects.append(.broken(fault))
      end(&effects, nowNanoseconds)
      return effects
    }
    if backend == nil {
      guard let socket = role == .server ? listener?.accept() : connect(nowNanoseconds) else { return effects }
      stream = VhostUserStream(socket)
      backend = VhostUserSession(settings)
      problem = nil
      effects.append(.connected)
    }
    converse(&effects, nowNanoseconds)
    return effects
  }

  /// See ``VhostUserSession/queueStopped(_:base:)``; then goes on with the messages that had to wait.
  public func queueStopped(
    _ queue: Int, base: VhostUserQueueBase, nowNanoseconds: UInt64
  ) -> [VhostUserEffect] {
    after(backend?.queueStopped(queue, base: base), nowNanoseconds)
  }

  /// See ``VhostUserSession/adopted(version:)``; then goes on with the messages that had to wait.
  public func adopted(version: UInt64, nowNanoseconds: UInt64) -> [VhostUserEffect] {
    after(backend?.adopted(version: version), nowNanoseconds)
  }

  /// Ends the connection and finds no other. Queues that run are still to be stopped: see the effects. A server's path
  /// is removed when this goes away.
  public func close() -> [VhostUserEffect] {
    var effects: [VhostUserEffect] = []
    isClosed = true
    end(&effects, 0)
    return effects
  }

  private func after(_ outcome: VhostUserSession.Outcome?, _ now: UInt64) -> [VhostUserEffect] {
    guard let outcome else { return [] }
    var effects = outcome.effects
    guard isConnected else {
      finish(&effects, now)
      return effects
    }
    guard stream?.send(outcome.replies) == true else {
      end(&effects, now)
      return effects
    }
    converse(&effects, now)
    return effects
  }

  private var socketNumber: Int32? { stream?.socket.number }
  private var wantsToSend: Bool { stream?.wantsToSend ?? false }

  /// Takes messages until there are none, or one has to wait.
  private func converse(_ effects: inout [VhostUserEffect], _ now: UInt64) {
    for _ in 0..<Self.messagesMax {
      guard isConnected, backend != nil else { return }
      guard stream!.send() else { return end(&effects, now) }
      if backend!.isWaiting || wantsToSend {
        if stream!.hasHungUp { end(&effects, now) }
        return
      }
      switch stream!.next() {
      case .nothing: return
      case .closed: return end(&effects, now)
      case .broken(let why):
        effects.append(.broken(why))
        return end(&effects, now)
      case .message(let header, let payload, let descriptors):
        backOffNanoseconds = Self.backOffNanosecondsMin
        let outcome = backend!.receive(header, payload: payload, descriptors: descriptors)
        effects += outcome.effects
        guard stream!.send(outcome.replies) else { return end(&effects, now) }
      }
    }
  }

  /// Closes the connection; workers may still have to leave queues.
  private func end(_ effects: inout [VhostUserEffect], _ now: UInt64) {
    stream = nil
    guard backend != nil else { return }
    effects += backend!.end().effects
    finish(&effects, now)
  }

  /// The connection is gone for good when no worker has anything of it.
  private func finish(_ effects: inout [VhostUserEffect], _ now: UInt64) {
    guard backend?.hasEnded == true else { return }
    backend = nil
    waitForNext(now)
    effects.append(.disconnected)
  }

  private func connect(_ now: UInt64) -> OwnedDescriptor? {
    guard now >= retryNanoseconds else { return nil }
    do throws(PortError) {
      return try UnixAddress(path).connect()
    } catch {
      problem = error.description
      waitForNext(now)
      return nil
    }
  }

  private func waitForNext(_ now: UInt64) {
    retryNanoseconds = now + backOffNanoseconds
    backOffNanoseconds = min(backOffNanoseconds * 2, Self.backOffNanosecondsMax)
  }
}

/// A socket that listens on a path which it made, and which goes with it.
private final class Listener {
  let socket: OwnedDescriptor
  private let path: String
  private let device: UInt
  private let node: UInt

  /// Frontends that wait while another is served: one that restarts connects before the old connection is over.
  private static let waitingMax: Int32 = 8
  /// A VMM runs as another user; it gets in by its group.
  private static let mode: mode_t = 0o660

  init(_ path: String) throws(PortError) {
    let address = try UnixAddress(path)
    var found = stat()
    if unsafe lstat(path, &found) == 0 {
      guard found.st_mode & S_IFMT == S_IFSOCK else {
        throw PortError(
          doing: address.listening, number: EEXIST, reason: "there is something that is no socket",
          remedy: "remove it or choose another path")
      }
      // A process that died leaves its path behind; one that lives answers, or has its queue full.
      var isUsed = true
      do throws(PortError) { _ = try address.connect() } catch { isUsed = error.number != ECONNREFUSED }
      guard !isUsed else {
        throw PortError(
          doing: address.listening, number: EADDRINUSE, reason: "another process listens there",
          remedy: "stop it or choose another path")
      }
      guard unsafe unlink(path) == 0 || errno == ENOENT else {
        throw PortError(
          doing: address.listening, number: errno,
          reason: "the socket that a dead process left cannot be removed: "
            + SystemError.text(errno), remedy: "remove \(path)")
      }
    }
    let number = Glibc.socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue), 0)
    guard number >= 0 else {
      throw PortError(doing: address.listening, number: errno, remedy: "raise the limit of open files")
    }
    let socket = OwnedDescriptor(number)
    // Before it has a path: never for a moment is it open to more than the mode says.
    _ = fchmod(number, Self.mode)
    guard unsafe address.withPointer({ unsafe bind(number, $0, $1) }) == 0 else {
      let number = errno
      throw PortError(
        doing: address.listening, number: number,
        remedy: number == ENOENT
          ? "make the folder first" : "choose a path in a folder that this user may write to")
    }
    guard unsafe chmod(path, Self.mode) == 0, unsafe lstat(path, &found) == 0, listen(number, Self.waitingMax) == 0
    else {
      let number = errno
      unsafe unlink(path)
      throw PortError(doing: address.listening, number: number, remedy: "choose another path")
    }
    self.socket = socket
    self.path = path
    device = UInt(found.st_dev)
    node = UInt(found.st_ino)
  }

  deinit {
    // Unless somebody put another there.
    var found = stat()
    if unsafe lstat(path, &found) == 0, UInt(found.st_dev) == device, UInt(found.st_ino) == node {
      unsafe unlink(path)
    }
  }

  func accept() -> OwnedDescriptor? {
    let number = clinux_accept(socket.number)
    return number < 0 ? nil : OwnedDescriptor(number)
  }
}

/// The address of a socket with a path.
private struct UnixAddress {
  let path: String
  private var address = sockaddr_un()

  init(_ path: String) throws(PortError) {
    self.path = path
    address.sun_family = sa_family_t(AF_UNIX)
    let bytes = Array(path.utf8) + [0]
    let capacity = MemoryLayout.size(ofValue: address.sun_path)
    guard path.hasPrefix("/"), bytes.count <= capacity else {
      throw PortError(
        doing: "use the vhost-user socket \(path)", number: ENAMETOOLONG,
        reason: path.hasPrefix("/")
          ? "a socket's path has at most \(capacity - 1) bytes" : "it is no absolute path",
        remedy: "choose another path")
    }
    unsafe withUnsafeMutableBytes(of: &address.sun_path) { unsafe $0.copyBytes(from: bytes) }
  }

  var listening: String { "listen on the vhost-user socket \(path)" }

  func withPointer(_ body: (UnsafePointer<sockaddr>, socklen_t) -> Int32) -> Int32 {
    unsafe withUnsafePointer(to: address) { pointer in
      unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        unsafe body($0, socklen_t(MemoryLayout<sockaddr_un>.size))
      }
    }
  }

  func connect() throws(PortError) -> OwnedDescriptor {
    let doing = "connect to the vhost-user socket \(path)"
    let number = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue), 0)
    guard number >= 0 else { throw PortError(doing: doing, number: errno, remedy: "raise the limit of open files") }
    let owned = OwnedDescriptor(number)
    guard unsafe withPointer({ unsafe Glibc.connect(number, $0, $1) }) == 0 else {
      throw PortError(
        doing: doing, number: errno, remedy: "start the process that listens there, with server=on for QEMU",
        mayPass: true)
    }
    return owned
  }
}
