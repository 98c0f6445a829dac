import ArgumentParser
import Control
import Logging

extension CountersFormat: ExpressibleByArgument {}

struct RunCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "run",
    abstract: "Forwards, in the foreground, until SIGTERM or SIGINT.",
    usage: """
      vnetr run --config FILE [options]
      vnetr run --tap DEVICE … --vni VNI [--peer HOST …] [--address ADDRESS] [options]
      """,
    discussion: """
      Logs to stderr, and says `ready` when it forwards. SIGUSR1 prints the counters.

      TUNING OPTIONS (also the keys of [tuning] in the file; the option wins):
      \(TuningFlags.help)
      """)

  @Option(help: ArgumentHelp("The configuration file.", valueName: "file"))
  var config: String?

  @Option(help: ArgumentHelp("A TAP device to forward for; may come several times.", valueName: "device"))
  var tap: [String] = []

  @Option(help: ArgumentHelp("Another node's address or host name; may come several times.", valueName: "host"))
  var peer: [String] = []

  @Option(help: ArgumentHelp("The VXLAN network identifier, the same on every node.", valueName: "vni"))
  var vni: Int?

  @Option(help: ArgumentHelp("This node's address (default: that of the route to the peers).", valueName: "address"))
  var address: String?

  @Option(help: ArgumentHelp("How counters are printed: table or json.", valueName: "format"))
  var countersFormat: CountersFormat = .table

  @Option(
    help: ArgumentHelp("The least severe level that is logged: \(levels) (default: info).", valueName: "level"),
    transform: level)
  var logLevel: Logger.Level = .info

  private static let levels = Logger.Level.allCases.map(\.rawValue).joined(separator: ", ")

  private static func level(_ text: String) throws -> Logger.Level {
    guard let level = Logger.Level(rawValue: text) else { throw ValidationError("use one of \(levels)") }
    return level
  }

  // The tuning flags come from the table of keys, which ArgumentParser's declarations cannot read: they are what it
  // does not recognize.
  @Argument(parsing: .allUnrecognized, help: .hidden)
  var rest: [String] = []

  func validate() throws {
    _ = try tuning()
    if config != nil {
      guard tap.isEmpty, peer.isEmpty, vni == nil, address == nil else {
        throw ValidationError("--config says everything: leave out --tap, --peer, --vni and --address")
      }
      return
    }
    guard !tap.isEmpty else { throw ValidationError("give --config FILE, or --tap DEVICE with --vni VNI") }
    guard vni != nil else {
      throw ValidationError("--vni is missing: give the network's identifier, the same on every node")
    }
  }

  func run() throws {
    let overrides = try tuning()
    let configuration: Configuration =
      if let config {
        try Configuration.load(file: config, overrides: overrides)
      } else {
        try Configuration.quickStart(taps: tap, peers: peer, vni: vni ?? 0, address: address, overrides: overrides)
      }
    var logger = Logger(label: "vnetr")
    logger.logLevel = logLevel
    try Service.run(configuration: configuration, countersFormat: countersFormat, logger: logger)
  }

  private func tuning() throws(ValidationError) -> [String: String] {
    do {
      return try TuningFlags.parse(rest)
    } catch {
      throw ValidationError(error.description)
    }
  }
}
