import Glibc
import TestSupport
import Testing

@testable import Control

/// The command that stands beside the program that runs the tests.
enum BuiltCommand {
  static let path: String = {
    var target = [CChar](repeating: 0, count: Int(PATH_MAX))
    let count = unsafe readlink("/proc/self/exe", &target, target.count)
    let bytes = target.prefix(max(0, count)).map { UInt8(bitPattern: $0) }
    let folder = bytes.split(separator: UInt8(ascii: "/")).dropLast()
    return folder.map { "/" + String(decoding: $0, as: UTF8.self) }.joined() + "/vnetr"
  }()

  static var isBuilt: Bool { unsafe access(path, X_OK) == 0 }
}

/// Waits until something holds, for a bounded time; whether it did.
func eventually(seconds: Int = 30, _ condition: () throws -> Bool) rethrows -> Bool {
  let deadline = ContinuousClock.now + .seconds(seconds)
  while try !condition() {
    guard ContinuousClock.now < deadline else { return false }
    usleep(500)
  }
  return true
}

/// The forwarding service as a process of its own, in a folder of its own, with vhost-user ports in one domain.
final class ServiceProcess {
  let folder: String
  private let files: [String]
  private let ports: [String]
  private var process = pid_t()
  private var isOver = true

  /// - Parameters:
  ///   - ports: their names.
  ///   - portKeys: further lines of each `[[port]]`.
  ///   - flags: of `vnetr run`.
  init(ports: [String], portKeys: String = "", flags: [String] = [], folder given: String? = nil) throws {
    var name = Array((temporaryFolder + "/vnetr-guests-XXXXXX").utf8CString)
    let folder: String
    if let given {
      folder = given
    } else {
      try #require(unsafe mkdtemp(&name) != nil)
      folder = String(decoding: name.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }
    self.folder = folder
    self.ports = ports
    files = ["configuration", "output", "log"].map { folder + "/" + $0 }
    var text = """
      [node]
      name = "test"
      [underlay]
      address = "127.0.0.1"
      [[domain]]
      name = "blue"
      vni = 42

      """
    for port in ports {
      text += """
        [[port]]
        name = "\(port)"
        kind = "vhost-user"
        socket = "\(folder)/\(port)"
        domain = "blue"
        \(portKeys)

        """
    }
    try Self.write(text, to: files[0])
    try start(flags)
  }

  /// Another one takes the place of one that ended.
  func startAnew(flags: [String]) throws {
    precondition(isOver, "it is still running")
    try start(flags)
  }

  deinit {
    end(SIGKILL)
    for file in files + ports.map(socketPath(ofPort:)) { unsafe unlink(file) }
    unsafe rmdir(folder)
  }

  func socketPath(ofPort port: String) -> String { folder + "/" + port }

  private static func write(_ text: String, to path: String) throws {
    let descriptor = unsafe open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o600)
    try #require(descriptor >= 0)
    defer { close(descriptor) }
    let bytes = Array(text.utf8)
    try #require(unsafe Glibc.write(descriptor, bytes, bytes.count) == bytes.count)
  }

  private func start(_ flags: [String]) throws {
    for file in files[1...] { try Self.write("", to: file) }
    var actions = unsafe posix_spawn_file_actions_t()
    unsafe posix_spawn_file_actions_init(&actions)
    defer { unsafe posix_spawn_file_actions_destroy(&actions) }
    unsafe posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0)
    unsafe posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, files[1], O_WRONLY | O_APPEND, 0)
    unsafe posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, files[2], O_WRONLY | O_APPEND, 0)
    let arguments = [BuiltCommand.path, "run", "--config", files[0]] + flags
    var vector = unsafe arguments.map { unsafe strdup($0) } + [nil]
    defer { for index in unsafe vector.indices { unsafe free(vector[index]) } }
    let status = unsafe withCleanSignals { attributes in
      unsafe posix_spawn(&process, BuiltCommand.path, &actions, attributes, &vector, environ)
    }
    try #require(status == 0)
    isOver = false
    let isReady = eventually { !isRunning || log.contains(" ready") }
    try #require(isReady && isRunning, "\(log)")
  }

  var log: String {
    String(decoding: (try? readFile(files[2], bytesMax: 1 << 24)) ?? [], as: UTF8.self)
  }
  private var output: String {
    String(decoding: (try? readFile(files[1], bytesMax: 1 << 24)) ?? [], as: UTF8.self)
  }

  private var status: Int32 = 0
  var isRunning: Bool {
    if !isOver, unsafe waitpid(process, &status, WNOHANG) == process { isOver = true }
    return !isOver
  }

  /// The table of counters as it is now.
  func counters() throws -> String {
    let before = output.utf8.count
    kill(process, SIGUSR1)
    let isPrinted = eventually { !isRunning || output.dropFirst(before).contains("conservation: ") }
    try #require(isPrinted && isRunning, "\(log)")
    return String(output.dropFirst(before))
  }

  /// A counter of a port that counts what happened to its guest; 0 where it is not told.
  func count(_ counter: String, ofPort port: String) throws -> Int {
    let line = try counters().split(separator: "\n").first { $0.hasPrefix("port \(port): ") }
    let pairs = line?.split(separator: " ").map { $0.split(separator: "=") } ?? []
    return pairs.first { $0.count == 2 && $0[0] == counter }.flatMap { Int($0[1]) } ?? 0
  }

  /// Open descriptors, and mappings of memory files.
  func holdings() throws -> (descriptors: Int, mappings: Int) {
    var descriptors = 0
    if let directory = unsafe opendir("/proc/\(process)/fd") {
      while unsafe readdir(directory) != nil { descriptors += 1 }
      unsafe closedir(directory)
    }
    let maps = String(decoding: try readFile("/proc/\(process)/maps", bytesMax: 1 << 24), as: UTF8.self)
    return (descriptors, maps.split(separator: "\n").count { $0.contains("/memfd:") })
  }

  /// As `kill` does.
  func end(_ signal: Int32) {
    guard !isOver else { return }
    kill(process, signal)
    while unsafe waitpid(process, &status, 0) != process {}
    isOver = true
  }

  /// Stops it as a service manager does; the exit code and what it printed last.
  func stop() throws -> (status: Int32, report: String) {
    let before = output.utf8.count
    end(SIGTERM)
    return (status & 0x7F == 0 ? status >> 8 & 0xFF : -1, String(output.dropFirst(before)))
  }
}
