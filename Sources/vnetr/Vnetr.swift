import ArgumentParser
import Control
import Datapath
import Glibc
import Logging

/// The command. It parses arguments and prints; all else is in Control.
struct Vnetr: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "vnetr",
    abstract: "A layer-2 overlay forwarder: one Ethernet across hosts.",
    discussion: """
      Quick start: vnetr run --tap vm1 --peer HOST --vni 42

      Links are neither encrypted nor authenticated: use it on networks that you trust.
      """,
    version: version,
    subcommands: [RunCommand.self, CheckCommand.self, DoctorCommand.self, ReferenceCommand.self])
}

/// The version of this command, as the change log has it.
let version = "0.1.0"

/// The exit codes of the command.
enum ExitStatus {
  static let done: CInt = 0
  static let failed: CInt = 1
  static let wrongUsage: CInt = 2
}

struct CheckCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "check", abstract: "Checks a configuration: all errors, each with its place, or a summary.",
    discussion: "What is allowed and probably not meant is a warning on stderr; the exit code is 0 then.")

  @Argument(help: "The configuration file.")
  var file: String

  func run() throws {
    let checked = try Configuration.load(file: file)
    for warning in checked.warnings { writeToStandardError("warning: \(warning)") }
    print("\(file): ok, \(checked.summary)")
  }
}

struct DoctorCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "doctor",
    abstract: "Shows what this kernel and machine offer, and what each missing thing costs.",
    discussion: "Exits with 1 where something that the forwarder needs is missing.")

  func run() throws {
    let report = Doctor.examine()
    print(report.table)
    if !report.canRun { throw ExitCode(ExitStatus.failed) }
  }
}

struct ReferenceCommand: ParsableCommand {
  enum Subject: String, CaseIterable, ExpressibleByArgument {
    case configuration
    case counters
  }

  static let configuration = CommandConfiguration(
    commandName: "reference", abstract: "Prints a generated page of the documentation.", shouldDisplay: false)

  @Argument(help: "What to print the reference of.")
  var subject: Subject

  func run() {
    switch subject {
    case .configuration: print(Schema.reference, terminator: "")
    case .counters: print(Counter.reference, terminator: "")
    }
  }
}
