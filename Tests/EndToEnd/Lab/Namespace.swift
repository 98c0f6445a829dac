import Glibc

/// A network namespace of this machine: a host or a guest of the lab.
final class Namespace {
  /// The name that `ip netns` knows it by.
  let name: String

  init(name: String) throws {
    self.name = name
    try execute(["ip", "netns", "add", name])
    try ip("link", "set", "lo", "up")
  }

  deinit { remove() }

  /// Removes it with everything in it, also when processes of a test still run there.
  func remove() {
    guard let identifiers = try? execute(["ip", "netns", "pids", name]) else { return }
    for line in identifiers.split(separator: "\n") {
      if let identifier = pid_t(line) { kill(identifier, SIGKILL) }
    }
    _ = try? execute(["ip", "netns", "delete", name])
  }

  /// `ip` with these arguments, on the devices of this namespace.
  @discardableResult
  func ip(_ arguments: String...) throws -> String {
    try execute(["ip", "-n", name] + arguments)
  }

  /// Runs a command in this namespace to its end.
  @discardableResult
  func run(_ arguments: String..., seconds: Double = 60) throws -> String { try run(arguments, seconds: seconds) }

  @discardableResult
  func run(_ arguments: [String], seconds: Double = 60) throws -> String {
    try execute(["ip", "netns", "exec", name] + arguments, seconds: seconds)
  }

  /// Starts a command in this namespace. Its identifier is the command's own: `ip` replaces itself by it.
  func start(_ arguments: [String], environment: [String: String] = [:]) throws -> ChildProcess {
    try ChildProcess(["ip", "netns", "exec", name] + arguments, environment: environment)
  }

  func setKernelParameter(_ parameter: String, _ value: String) throws {
    try run("sysctl", "-qw", "\(parameter)=\(value)")
  }

  func has(device: String) -> Bool {
    (try? ip("link", "show", "dev", device)) != nil
  }

  /// The MAC address of a device.
  func address(of device: String) throws -> MAC {
    let text = try run("cat", "/sys/class/net/\(device)/address")
    let bytes = text.split(separator: ":").compactMap { UInt8($0.prefix(2), radix: 16) }
    guard bytes.count == 6 else { throw LabError("no MAC address: \(text)") }
    return MAC(bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5])
  }

  /// Runs `body` on a thread that has entered this namespace: sockets that it opens belong to it for good.
  func inside<R>(_ body: () throws -> R) throws -> R {
    try withoutActuallyEscaping(body) { body in
      let task = NamespaceTask(namespace: name) { try body() }
      var thread = pthread_t()
      let argument = unsafe Unmanaged.passRetained(task)
      let status = unsafe pthread_create(
        &thread, nil,
        { argument in
          let task = unsafe Unmanaged<NamespaceTask>.fromOpaque(argument!).takeRetainedValue()
          task.run()
          return nil
        }, argument.toOpaque())
      guard status == 0 else {
        unsafe argument.release()
        throw LabError("no thread for namespace \(name): \(errorText(status))")
      }
      pthread_join(thread, nil)
      return try task.result!.get() as! R
    }
  }
}

/// What one thread does in a namespace. It runs while its creator waits for the thread's end.
private final class NamespaceTask {
  private let namespace: String
  private let body: () throws -> Any
  private(set) var result: Result<Any, any Error>?

  init(namespace: String, body: @escaping () throws -> Any) {
    self.namespace = namespace
    self.body = body
  }

  func run() {
    result = Result {
      let descriptor = unsafe open("/run/netns/\(namespace)", O_RDONLY | O_CLOEXEC)
      guard descriptor >= 0 else { throw LabError("cannot open namespace \(namespace): \(errorText(errno))") }
      defer { close(descriptor) }
      guard setNamespace(descriptor, networkNamespace) == 0 else {
        throw LabError("cannot enter namespace \(namespace): \(errorText(errno))")
      }
      return try body()
    }
  }
}

/// CLONE_NEWNET of linux/sched.h.
private let networkNamespace: Int32 = 0x4000_0000

/// setns(2), which glibc declares for C with GNU extensions only.
@_silgen_name("setns")
private func setNamespace(_ descriptor: Int32, _ kind: Int32) -> Int32
