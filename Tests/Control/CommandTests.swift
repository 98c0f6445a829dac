import Foundation
import Testing

@testable import Control

/// The command as a person runs it. It stands beside the program that runs the tests.
private enum Command {
  struct Result {
    var status: Int32
    var output: String
    var errors: String
  }

  static let path = URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath().deletingLastPathComponent()
    .appendingPathComponent("vnetr").path

  static var isBuilt: Bool { FileManager.default.isExecutableFile(atPath: path) }

  static func run(_ arguments: [String]) throws -> Result {
    let process = Process()
    process.executableURL = URL(fileURLWithPath: path)
    process.arguments = arguments
    let output = Pipe()
    let errors = Pipe()
    process.standardOutput = output
    process.standardError = errors
    try process.run()
    // Neither stream fills its pipe: one after the other is safe.
    let outputData = output.fileHandleForReading.readDataToEndOfFile()
    let errorData = errors.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    return Result(
      status: process.terminationStatus, output: String(decoding: outputData, as: UTF8.self),
      errors: String(decoding: errorData, as: UTF8.self))
  }

  /// Runs `vnetr check` on a file of this text.
  static func check(_ text: String) throws -> Result {
    let file = FileManager.default.temporaryDirectory.appendingPathComponent("vnetr-\(UUID().uuidString).toml")
    try text.write(to: file, atomically: true, encoding: .utf8)
    defer { try? FileManager.default.removeItem(at: file) }
    var result = try run(["check", file.path])
    result.output = result.output.replacingOccurrences(of: file.path, with: "FILE")
    result.errors = result.errors.replacingOccurrences(of: file.path, with: "FILE")
    return result
  }
}

@Suite(.enabled(if: Command.isBuilt, "the command is not built: swift build"))
struct CommandTests {
  @Test func checkSaysOKWithASummaryAndExitsWith0() throws {
    let result = try Command.check(sound)
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

  @Test func anErrorInAFlagsValueExitsWith1BeforeAnythingIsStarted() throws {
    let result = try Command.run(["run", "--tap", "vm1", "--vni", "1", "--layout", "pipeline", "--slots=1"])
    #expect(result.status == 1)
    #expect(
      result.errors == """
        vnetr: --layout: "pipeline" is not supported yet by this version; use one of "auto", "fused"
        vnetr: --slots: 1 is out of range; use an integer from 8 to 16384

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
