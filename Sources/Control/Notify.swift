import CLinux
import Datapath
import Glibc
import Logging

/// Tells the service manager how the service does, by the protocol of sd_notify(3): datagrams of `NAME=VALUE` lines to
/// the AF_UNIX socket that NOTIFY_SOCKET names. Without that variable every call does nothing.
///
/// A manager that cannot be reached is no reason to stop forwarding: errors are logged at debug and otherwise ignored.
public struct Notify: Sendable {
  private let socketName: String?
  private let logger: Logger

  /// How often `watchdog` is expected, in microseconds; nil where the manager does not watch this process.
  public let watchdogMicroseconds: Int?

  /// - Parameters:
  ///   - environment: NOTIFY_SOCKET (a path, or `@NAME` for an abstract socket), WATCHDOG_USEC and WATCHDOG_PID.
  ///   - logger: where failures are told.
  public init(environment: [String: String], logger: Logger) {
    let name = environment["NOTIFY_SOCKET"] ?? ""
    socketName = name.isEmpty ? nil : name
    self.logger = logger
    let isForThisProcess = environment["WATCHDOG_PID"].map { Int32($0) == getpid() } ?? true
    let interval = environment["WATCHDOG_USEC"].flatMap { Int($0) } ?? 0
    watchdogMicroseconds = isForThisProcess && interval > 0 ? interval : nil
  }

  /// With this process's environment.
  public init(logger: Logger) {
    var environment: [String: String] = [:]
    for name in ["NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"] {
      if let value = unsafe getenv(name) { environment[name] = unsafe String(cString: value) }
    }
    self.init(environment: environment, logger: logger)
  }

  /// The service forwards.
  public func ready(status: String? = nil) { send("READY=1", status) }

  /// The service is ending.
  public func stopping(status: String? = nil) { send("STOPPING=1", status) }

  /// The service lives. To be called at least every `watchdogMicroseconds`; half of that is usual.
  public func watchdog() { send("WATCHDOG=1", nil) }

  /// What the service does, for people.
  public func status(_ text: String) { send(nil, text) }

  private func send(_ state: String?, _ status: String?) {
    guard let socketName else { return }
    // The protocol's lines end at a newline: one within a status would begin a message of its own.
    let statusLine = status.map { "STATUS=" + $0.split(whereSeparator: \.isNewline).joined(separator: " ") }
    let message = [state, statusLine].compactMap(\.self).joined(separator: "\n")
    do {
      try Self.send(message, to: socketName)
    } catch {
      logger.debug("the service manager was not told", metadata: ["message": "\(message)", "reason": "\(error)"])
    }
  }

  private static func send(_ message: String, to name: String) throws(SystemError) {
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    // An abstract name starts with a zero byte, which the environment shows as `@`, and has no zero at its end.
    let isAbstract = name.hasPrefix("@")
    guard isAbstract || name.hasPrefix("/") else { throw SystemError(EAFNOSUPPORT, doing: "notify \(name)") }
    let bytes = isAbstract ? [0] + Array(name.utf8.dropFirst()) : Array(name.utf8) + [0]
    let capacity = MemoryLayout.size(ofValue: address.sun_path)
    guard bytes.count <= capacity else { throw SystemError(ENAMETOOLONG, doing: "notify \(name)") }
    unsafe withUnsafeMutableBytes(of: &address.sun_path) { unsafe $0.copyBytes(from: bytes) }
    let length = socklen_t(MemoryLayout<sockaddr_un>.size - capacity + bytes.count)

    let descriptor = socket(AF_UNIX, Int32(SOCK_DGRAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
    guard descriptor >= 0 else { throw SystemError(errno, doing: "make a socket to notify \(name)") }
    defer { close(descriptor) }
    let payload = Array(message.utf8)
    let flags = Int32(MSG_NOSIGNAL) | Int32(MSG_DONTWAIT)
    let sent = unsafe withUnsafePointer(to: &address) { pointer in
      unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        unsafe sendto(descriptor, payload, payload.count, flags, $0, length)
      }
    }
    guard sent == payload.count else { throw SystemError(errno, doing: "notify \(name)") }
  }
}
