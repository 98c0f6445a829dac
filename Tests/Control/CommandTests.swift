import Glibc
import Testing

@testable import Control

/// The command as a person runs it.
private enum Command {
  struct Result {
    var status: Int32
    var output: String
    var errors: String
  }

  static var path: String { BuiltCommand.path }
  static var isBuilt: Bool { BuiltCommand.isBuilt }

  /// An empty file of its own for the time of a call.
  private static func withFile<Value>(_ body: (String) throws -> Value) throws -> Value {
    var name = Array((temporaryFolder + "/vnetr-test-XXXXXX").utf8CString)
    let descriptor = unsafe mkstemp(&name)
    try #require(descriptor >= 0)
    close(descriptor)
    let path = String(decoding: name.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    defer { unsafe unlink(path) }
    return try body(path)
  }

  private static func text(of path: String) throws -> String {
    String(decoding: try readFile(path, bytesMax: 1 << 20), as: UTF8.self)
  }

  static func run(_ arguments: [String]) throws -> Result {
    try withFile { output in
      try withFile { errors in
        let status = try spawn(arguments, output: output, errors: errors)
        return Result(status: status, output: try text(of: output), errors: try text(of: errors))
      }
    }
  }

  /// Runs the command to its end; its exit code, or -1 where a signal ended it.
  private static func spawn(_ arguments: [String], output: String, errors: String) throws -> Int32 {
    var actions = unsafe posix_spawn_file_actions_t()
    unsafe posix_spawn_file_actions_init(&actions)
    defer { unsafe posix_spawn_file_actions_destroy(&actions) }
    unsafe posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, output, O_WRONLY, 0)
    unsafe posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, errors, O_WRONLY, 0)
    var vector = unsafe ([path] + arguments).map { unsafe strdup($0) } + [nil]
    defer { for index in unsafe vector.indices { unsafe free(vector[index]) } }
    var process = pid_t()
    try #require(unsafe posix_spawn(&process, path, &actions, nil, &vector, environ) == 0)
    var status: Int32 = 0
    try #require(unsafe waitpid(process, &status, 0) == process)
    return status & 0x7F == 0 ? (status >> 8) & 0xFF : -1
  }

  /// Runs `vnetr check` on a file of this text; the file is called FILE in what comes back.
  static func check(_ text: String) throws -> Result {
    try withFile { file in
      let bytes = Array(text.utf8)
      let descriptor = unsafe open(file, O_WRONLY)
      try #require(unsafe write(descriptor, bytes, bytes.count) == bytes.count)
      close(descriptor)
      var result = try run(["check", file])
      result.output = result.output.replacing(file, with: "FILE")
      result.errors = result.errors.replacing(file, with: "FILE")
      return result
    }
  }
}

/// Where tests put files for a moment.
let temporaryFolder = unsafe getenv("TMPDIR").map { unsafe String(cString: $0) } ?? "/tmp"

@Suite(.enabled(if: Command.isBuilt, "the command is not built: swift build"))
struct CommandTests {
  @Test func checkSaysOKWithASummaryAndExitsWith0() throws {
    // Whatever CPUs this machine has.
    let result = try Command.check(sound.replacing("cpus = \"0,1\"", with: "cpus = \"auto\""))
    #expect(result.status == 0)
    #expect(result.output == "FILE: ok, host-a: 2 domains, 2 ports, 2 links\n")
    #expect(result.errors.isEmpty)
  }

  @Test func checkPrintsEachErrorOnOneLineAndExitsWith1() throws {
    let result = try Command.check("[[domain]]\nname = \"a\"\nvni = -1\n[[port]]\nname = \"vm1\"\ndomain = \"b\"\n")
    #expect(result.status == 1)
    #expect(result.output.isEmpty)
    #expect(
      result.errors == """
        FILE:3:1: domain[0].vni: -1 is out of range; use an integer from 0 to 16777215
        FILE:6:1: port[0].domain: no domain is called "b"; did you mean "a"?

        """)
  }

  @Test func checkPrintsWarningsToStandardErrorAndExitsWith0() throws {
    let warned = try Command.check(least.replacing("vni = 42", with: "vni = 42\nforwarding = \"routes\""))
    #expect(warned.status == 0)
    #expect(warned.output.hasPrefix("FILE: ok, "))
    #expect(
      warned.errors == """
        warning: FILE:4:1: domain[0].forwarding: "blue" has no rule: it drops every frame; add a [[route]] for it, or \
        use forwarding = "learning"

        """)
  }

  @Test func anErrorInAFlagsValueExitsWith1BeforeAnythingIsStarted() throws {
    let result = try Command.run(["run", "--tap", "vm1", "--vni", "1", "--layout", "line", "--slots=1"])
    #expect(result.status == 1)
    #expect(
      result.errors == """
        vnetr: --layout: "line" is no value of it; values: auto, fused, pipeline
        vnetr: --slots: 1 is out of range; use an integer from 16 to 65535

        """)
  }

  @Test(arguments: [
    (["run"], "vnetr: give --config FILE, or --tap DEVICE with --vni VNI; see vnetr help\n"),
    (
      ["run", "--tap", "vm1"],
      "vnetr: --vni is missing: give the network's identifier, the same on every node; see vnetr help\n"
    ),
    (
      ["run", "--config", "f", "--peer", "h"],
      "vnetr: --config says everything: leave out --tap, --peer, --vni and --address; see vnetr help\n"
    ),
    (
      ["run", "--tap", "vm1", "--vni", "1", "--spn-us", "1"],
      "vnetr: there is no option --spn-us; did you mean --spin-us?; see vnetr help\n"
    ),
    (["run", "--tap", "vm1", "--vni", "x"], "vnetr: The value 'x' is invalid for '--vni <vni>'; see vnetr help\n"),
    (["check"], "vnetr: Missing expected argument '<file>'; see vnetr help\n"),
    (["frobnicate"], "vnetr: Unexpected argument 'frobnicate'; see vnetr help\n"),
  ])
  func wrongUsageIsOneLineAndExitsWith2(_ arguments: [String], _ expected: String) throws {
    let result = try Command.run(arguments)
    #expect(result.status == 2)
    #expect(result.errors == expected)
    #expect(result.output.isEmpty)
  }

  @Test func helpAndVersionGoToStandardOutputAndExitWith0() throws {
    let help = try Command.run(["run", "--help"])
    #expect(help.status == 0)
    #expect(help.output.contains(TuningFlags.help.split(separator: "\n")[0]))
    let version = try Command.run(["--version"])
    #expect(version.status == 0)
    #expect(version.output == "0.1.0\n")
  }

  @Test func theReferenceIsPrintedAsItIsGenerated() throws {
    let result = try Command.run(["reference", "configuration"])
    #expect(result.status == 0)
    #expect(result.output == Schema.reference)
  }

  @Test func doctorExitsWith0Or1AsItsLastLineSays() throws {
    let result = try Command.run(["doctor"])
    #expect(result.status == (result.output.hasSuffix("the forwarder can run here\n") ? 0 : 1))
    #expect(result.output.contains("\nio_uring "))
  }
}
