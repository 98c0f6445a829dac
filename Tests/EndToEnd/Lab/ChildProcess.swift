import Glibc
import TestSupport

/// A failure of the lab itself, or of a command that a test needs to succeed.
struct LabError: Error, CustomStringConvertible {
  let description: String
  init(_ description: String) { self.description = description }
}

/// Waits until `condition` holds and says whether it did within `seconds`.
///
/// Every wait of the lab is bounded: a test that hangs would hide the ones behind it.
/// - Parameter pollMicroseconds: how long it sleeps between two tries; 0 where the condition does.
func eventually(
  within seconds: Double = 10, pollMicroseconds: UInt32 = 5_000, _ condition: () throws -> Bool
) rethrows -> Bool {
  let deadline = ContinuousClock.now + .seconds(seconds)
  while try !condition() {
    guard ContinuousClock.now < deadline else { return false }
    usleep(pollMicroseconds)
  }
  return true
}

/// A file without a name, which goes away with its descriptor.
final class NamelessFile {
  let descriptor: Int32

  init() throws {
    guard let file = unsafe tmpfile() else { throw LabError("no temporary file: \(errorText(errno))") }
    defer { unsafe fclose(file) }
    descriptor = unsafe fcntl(fileno(file), F_DUPFD_CLOEXEC, 0)
    guard descriptor >= 0 else { throw LabError("no temporary file: \(errorText(errno))") }
  }

  deinit { close(descriptor) }

  /// Everything written so far.
  var text: String {
    var bytes: [UInt8] = []
    var chunk = [UInt8](repeating: 0, count: 1 << 16)
    while true {
      let offset = bytes.count
      let count = unsafe chunk.withUnsafeMutableBytes { unsafe pread(descriptor, $0.baseAddress!, $0.count, offset) }
      guard count > 0 else { break }
      bytes += chunk[..<count]
    }
    return String(decoding: bytes, as: UTF8.self)
  }
}

func errorText(_ code: Int32) -> String { unsafe String(cString: strerror(code)) }

/// A command that runs beside the test. Its output goes to files, so that it never waits for a reader.
final class ChildProcess {
  let arguments: [String]
  let id: pid_t
  private let output: NamelessFile
  private let errors: NamelessFile
  /// As `waitpid` gave it, once the process has ended.
  private var waitStatus: Int32?

  /// Starts `arguments`, its first found by PATH, with nothing on standard input unless a descriptor is given.
  init(
    _ arguments: [String], environment: [String: String] = [:], standardInput: Int32? = nil,
    ownTerminalGroup: Bool = false
  ) throws {
    self.arguments = arguments
    output = try NamelessFile()
    errors = try NamelessFile()

    var actions = unsafe posix_spawn_file_actions_t()
    unsafe posix_spawn_file_actions_init(&actions)
    defer { unsafe posix_spawn_file_actions_destroy(&actions) }
    if let standardInput {
      unsafe posix_spawn_file_actions_adddup2(&actions, standardInput, 0)
    } else {
      unsafe posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
    }
    unsafe posix_spawn_file_actions_adddup2(&actions, output.descriptor, 1)
    unsafe posix_spawn_file_actions_adddup2(&actions, errors.descriptor, 2)

    let added = environment.map { "\($0.key)=\($0.value)" }
    let inherited = currentEnvironment().filter { line in
      !environment.keys.contains { line.hasPrefix("\($0)=") }
    }
    var child: pid_t = 0
    let status = unsafe withCStrings(arguments) { argv in
      unsafe withCStrings(inherited + added) { envp in
        unsafe withCleanSignals(ownGroup: ownTerminalGroup) { attributes in
          unsafe posix_spawnp(&child, argv[0]!, &actions, attributes, argv, envp)
        }
      }
    }
    guard status == 0 else { throw LabError("cannot start \(arguments.joined(separator: " ")): \(errorText(status))") }
    id = child
  }

  deinit { kill() }

  var standardOutput: String { output.text }
  var standardError: String { errors.text }
  var commandLine: String { arguments.joined(separator: " ") }

  var isRunning: Bool {
    if waitStatus != nil { return false }
    var status: Int32 = 0
    if unsafe waitpid(id, &status, WNOHANG) == id { waitStatus = status }
    return waitStatus == nil
  }

  /// The exit code, or 128 and the number of the signal that ended it; nil while it runs.
  var exitCode: Int32? {
    guard !isRunning, let waitStatus else { return nil }
    let signal = waitStatus & 0x7f
    return signal == 0 ? (waitStatus >> 8) & 0xff : 128 + signal
  }

  /// Waits for the end; nil when it did not come in time.
  func wait(seconds: Double) -> Int32? {
    _ = eventually(within: seconds) { !isRunning }
    return exitCode
  }

  func send(signal: Int32) {
    if isRunning { Glibc.kill(id, signal) }
  }

  /// The memory that it holds: VmRSS of proc(5).
  func residentKibibytes() throws -> Int {
    let status = try execute(["cat", "/proc/\(id)/status"])
    let line = status.split(separator: "\n").first { $0.hasPrefix("VmRSS:") }
    guard let line, let value = Int(line.filter(\.isNumber)) else { throw LabError("process \(id) has no VmRSS") }
    return value
  }

  /// Ends it at once.
  func kill() {
    guard isRunning else { return }
    Glibc.kill(id, SIGKILL)
    var status: Int32 = 0
    if unsafe waitpid(id, &status, 0) == id { waitStatus = status }
  }
}

/// Runs a command to its end and returns what it printed; throws when it fails.
@discardableResult
func execute(_ arguments: [String], seconds: Double = 60) throws -> String {
  let process = try ChildProcess(arguments)
  guard let code = process.wait(seconds: seconds) else {
    throw LabError("\(process.commandLine): did not end within \(seconds) s")
  }
  guard code == 0 else {
    throw LabError("\(process.commandLine): exit code \(code)\n\(process.standardOutput)\(process.standardError)")
  }
  return process.standardOutput
}

/// The value of an environment variable, nil where it is unset or empty.
func environmentValue(_ name: String) -> String? {
  guard let value = unsafe getenv(name), unsafe value.pointee != 0 else { return nil }
  return unsafe String(cString: value)
}

private func currentEnvironment() -> [String] {
  var lines: [String] = []
  var next = unsafe environ
  while let line = unsafe next.pointee {
    unsafe lines.append(String(cString: line))
    unsafe next += 1
  }
  return lines
}

private func withCStrings<R>(
  _ strings: [String], _ body: (UnsafePointer<UnsafeMutablePointer<CChar>?>) throws -> R
) rethrows -> R {
  var pointers: [UnsafeMutablePointer<CChar>?] = unsafe strings.map { unsafe strdup($0) }
  unsafe pointers.append(nil)
  defer { for index in unsafe pointers.indices { unsafe free(pointers[index]) } }
  return try unsafe pointers.withUnsafeBufferPointer { try unsafe body($0.baseAddress!) }
}

/// A descriptor that another process has open too: what is set through it is set for that process.
final class BorrowedDescriptor {
  let number: Int32

  /// The first of the process's descriptors that was opened by this path.
  init(of process: ChildProcess, path: String) throws {
    let folder = "/proc/\(process.id)/fd"
    let numbers = try execute(["ls", folder]).split(separator: "\n")
    guard let theirs = numbers.first(where: { (try? execute(["readlink", "\(folder)/\($0)"])) == path + "\n" }),
      let theirNumber = Int(theirs)
    else { throw LabError("process \(process.id) has not opened \(path)") }
    // pidfd_open(2) and pidfd_getfd(2), which older C libraries lack; their numbers are the same on all processors.
    let processDescriptor = systemCall(434, Int(process.id), 0, 0)
    defer { close(Int32(processDescriptor)) }
    number = Int32(systemCall(438, processDescriptor, theirNumber, 0))
    guard number >= 0 else { throw LabError("cannot borrow a descriptor of \(process.id): \(errorText(errno))") }
  }

  deinit { close(number) }
}

/// syscall(2), which Swift does not import: its arguments are variadic. It returns -1 and sets errno.
@_silgen_name("syscall")
private func systemCall(_ number: Int, _ first: Int, _ second: Int, _ third: Int) -> Int
