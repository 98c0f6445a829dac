import CLinux
import Glibc
import Logging
import Testing

@testable import Control

/// A service manager's socket: it receives what services send.
private struct ManagerSocket: ~Copyable {
  let descriptor: CInt
  /// The path of a socket that has one: it is removed at the end.
  let path: String?

  /// - Parameter name: as NOTIFY_SOCKET has it, `@` for an abstract one.
  init(_ name: String) throws {
    let isAbstract = name.hasPrefix("@")
    path = isAbstract ? nil : name
    descriptor = socket(AF_UNIX, Int32(SOCK_DGRAM.rawValue), 0)
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    let bytes = isAbstract ? [0] + Array(name.utf8.dropFirst()) : Array(name.utf8)
    unsafe withUnsafeMutableBytes(of: &address.sun_path) { unsafe $0.copyBytes(from: bytes) }
    let length = socklen_t(MemoryLayout<sa_family_t>.size + bytes.count + (isAbstract ? 0 : 1))
    let descriptor = self.descriptor
    let status = unsafe withUnsafePointer(to: &address) { pointer in
      unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { unsafe bind(descriptor, $0, length) }
    }
    try #require(status == 0)
  }

  deinit {
    close(descriptor)
    if let path { unsafe unlink(path) }
  }

  /// The next message that has arrived; nil where there is none.
  borrowing func receive() -> String? {
    var bytes = [UInt8](repeating: 0, count: 4096)
    let count = unsafe recv(descriptor, &bytes, bytes.count, Int32(MSG_DONTWAIT))
    return count < 0 ? nil : String(decoding: bytes.prefix(count), as: UTF8.self)
  }
}

/// Keeps what is logged, for a test to look at.
private final class LogKeeper: LogHandler, @unchecked Sendable {
  var metadata: Logger.Metadata = [:]
  var logLevel: Logger.Level = .trace
  var lines: [String] = []

  subscript(metadataKey key: String) -> Logger.Metadata.Value? {
    get { metadata[key] }
    set { metadata[key] = newValue }
  }

  func log(event: LogEvent) {
    lines.append("\(event.level) \(event.message) \(event.metadata?["reason"]?.description ?? "")")
  }
}

@Suite struct NotifyTests {
  private let logger = Logger(label: "test")

  @Test(arguments: [temporaryFolder + "/vnetr-notify-test-\(getpid())", "@vnetr-notify-test-\(getpid())"])
  func theManagerReceivesEveryMessage(_ name: String) throws {
    let manager = try ManagerSocket(name)
    let notify = Notify(environment: ["NOTIFY_SOCKET": name], logger: logger)
    notify.ready(status: "2 ports")
    #expect(manager.receive() == "READY=1\nSTATUS=2 ports")
    notify.watchdog()
    #expect(manager.receive() == "WATCHDOG=1")
    notify.status("draining\nREADY=1")
    #expect(manager.receive() == "STATUS=draining READY=1")
    notify.stopping()
    #expect(manager.receive() == "STOPPING=1")
    #expect(manager.receive() == nil)
  }

  @Test(arguments: ["/nonexistent/socket", "relative", "/" + String(repeating: "x", count: 200)])
  func aManagerThatCannotBeReachedIsLoggedAtDebugAndNothingElse(_ name: String) {
    let keeper = LogKeeper()
    Notify(environment: ["NOTIFY_SOCKET": name], logger: Logger(label: "test") { _ in keeper }).ready()
    #expect(keeper.lines.count == 1)
    #expect(keeper.lines.first?.hasPrefix("debug the service manager was not told cannot notify \(name): ") == true)
  }

  @Test func withoutAManagerNothingIsSentAndNothingIsLogged() {
    let keeper = LogKeeper()
    let notify = Notify(environment: [:], logger: Logger(label: "test") { _ in keeper })
    notify.ready()
    notify.stopping()
    #expect(keeper.lines.isEmpty)
    #expect(notify.watchdogMicroseconds == nil)
  }

  @Test func theWatchdogsIntervalIsReadUnlessItIsMeantForAnotherProcess() {
    func interval(_ environment: [String: String]) -> Int? {
      Notify(environment: environment, logger: logger).watchdogMicroseconds
    }
    #expect(interval(["WATCHDOG_USEC": "3000000"]) == 3_000_000)
    #expect(interval(["WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "\(getpid())"]) == 3_000_000)
    #expect(interval(["WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"]) == nil)
    #expect(interval(["WATCHDOG_USEC": "soon"]) == nil)
    #expect(interval(["WATCHDOG_USEC": "0"]) == nil)
  }
}
