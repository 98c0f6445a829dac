import Foundation

/// A `vnetr run` on a host of the lab.
final class Forwarder {
  /// The binary under test: VNETR names it, else a build of this package.
  static let path: String? = {
    let built = [".build/release/vnetr", ".build/debug/vnetr"]
    let candidates = environmentValue("VNETR").map { [$0] } ?? built
    return candidates.first(where: FileManager.default.isExecutableFile(atPath:))
      .map { URL(fileURLWithPath: $0).path }
  }()

  let host: Host
  let process: ChildProcess
  /// How much of standard output the last report ended at.
  private var readCharacters = 0

  /// Starts it with these arguments of `vnetr run` and waits until it forwards.
  init(on host: Host, _ arguments: [String], environment: [String: String] = [:]) throws {
    self.host = host
    process = try Forwarder.start(on: host, arguments, environment: environment)
    let hasStarted = eventually(within: 20) { !process.isRunning || isReady }
    guard hasStarted, process.isRunning else {
      throw LabError("\(process.commandLine): not ready, exit code \(exitCodeText)\n\(process.standardError)")
    }
  }

  /// Starts it with a configuration file.
  convenience init(on host: Host, _ configuration: NodeConfiguration, flags: [String] = []) throws {
    // The file is read before the forwarder is ready.
    let file = try TemporaryText(configuration.toml, suffix: ".toml")
    try self.init(on: host, ["--config", file.path] + flags)
  }

  deinit { process.kill() }

  /// Starts it and waits for nothing, for what must fail.
  static func start(
    on host: Host, _ arguments: [String], environment: [String: String] = [:], through wrapper: [String] = []
  ) throws -> ChildProcess {
    guard let path else { throw LabError("no vnetr is built") }
    return try host.namespace.start(
      wrapper + [path, "run", "--counters-format", "json"] + arguments, environment: environment)
  }

  private var exitCodeText: String { process.exitCode.map(String.init) ?? "none" }

  /// Whether it has said that it forwards.
  private var isReady: Bool {
    process.standardError.split(whereSeparator: \.isWhitespace).contains("ready")
  }

  func isLogged(_ words: String) -> Bool { process.standardError.contains(words) }

  /// The counters as they are now, by SIGUSR1.
  func counters() throws -> CounterReport {
    process.send(signal: SIGUSR1)
    return try nextReport()
  }

  /// Stops it by SIGTERM, expects that it drains and ends well, and returns its last counters.
  @discardableResult
  func stop() throws -> CounterReport {
    process.send(signal: SIGTERM)
    guard let code = process.wait(seconds: 15) else { throw LabError("the forwarder does not end on SIGTERM") }
    guard code == 0 else { throw LabError("the forwarder ended with \(code) on SIGTERM\n\(process.standardError)") }
    return try nextReport()
  }

  private func nextReport() throws -> CounterReport {
    var report: CounterReport?
    _ = try eventually {
      let text = process.standardOutput.dropFirst(readCharacters)
      // A report is whole when its conservation line has ended.
      guard let verdict = text.range(of: "conservation: "), let end = text[verdict.upperBound...].firstIndex(of: "\n")
      else { return false }
      let whole = text[..<end]
      readCharacters += whole.count
      report = try CounterReport(String(whole))
      return true
    }
    guard let report else { throw LabError("no counters on standard output:\n\(process.standardOutput)") }
    return report
  }
}

/// One report of the forwarder: the counters as JSON, then the line that says whether conservation holds.
struct CounterReport {
  /// What stands after `conservation: `.
  let conservation: String
  private let root: JSONValue

  init(_ text: String) throws {
    guard let start = text.firstIndex(of: "{"), let end = text.lastIndex(of: "}"),
      let verdict = text.range(of: "conservation: ", options: .backwards)
    else { throw LabError("no counter report: \(text)") }
    root = try JSONDecoder().decode(JSONValue.self, from: Data(text[start...end].utf8))
    conservation = text[verdict.upperBound...].trimmingCharacters(in: .whitespacesAndNewlines)
  }

  var conserves: Bool { conservation == "holds" }

  /// Where a counter is kept, by the name of its part of the report.
  enum Scope: String { case underlay, ports, links, domains, workers }

  /// The sum of a counter over a scope, or of one member of it.
  func total(_ counter: String, _ scope: Scope, of member: String? = nil) -> Int {
    func sum(_ value: JSONValue) -> Int {
      switch value {
      case .object(let members):
        members.reduce(0) { total, entry in
          if entry.key == counter, case .number(let number) = entry.value { return total + Int(number) }
          return total + sum(entry.value)
        }
      case .array(let elements): elements.reduce(0) { $0 + sum($1) }
      default: 0
      }
    }
    guard case .object(let scopes) = root, let part = scopes[scope.rawValue] else { return 0 }
    guard let member else { return sum(part) }
    switch part {
    case .object(let members): return members[member].map(sum) ?? 0
    case .array(let elements):
      return elements.filter {
        guard case .object(let fields) = $0 else { return false }
        return fields["name"] == .string(member)
      }.reduce(0) { $0 + sum($1) }
    default: return 0
    }
  }
}

enum JSONValue: Decodable, Equatable {
  case object([String: JSONValue])
  case array([JSONValue])
  case string(String)
  case number(Double)
  case boolean(Bool)
  case null

  init(from decoder: any Decoder) throws {
    let container = try decoder.singleValueContainer()
    if container.decodeNil() {
      self = .null
    } else if let value = try? container.decode(Bool.self) {
      self = .boolean(value)
    } else if let value = try? container.decode(Double.self) {
      self = .number(value)
    } else if let value = try? container.decode(String.self) {
      self = .string(value)
    } else if let value = try? container.decode([JSONValue].self) {
      self = .array(value)
    } else {
      self = .object(try container.decode([String: JSONValue].self))
    }
  }
}

/// A text in a temporary file, which goes away with this object.
final class TemporaryText {
  let path: String

  init(_ text: String, suffix: String = "") throws {
    path = FileManager.default.temporaryDirectory.appendingPathComponent("vnetr-test-\(UUID())\(suffix)").path
    try text.write(toFile: path, atomically: true, encoding: .utf8)
  }

  deinit { try? FileManager.default.removeItem(atPath: path) }
}

/// A configuration file of the forwarder.
struct NodeConfiguration {
  struct Domain {
    var name = "blue"
    var vni = 42
  }
  struct Port {
    var name: String
    var domain = "blue"
    var queues = 1
  }
  struct Link {
    var name: String
    var remote: String
    var reservedBits: String?
  }

  var address: String
  var domains = [Domain()]
  var ports: [Port]
  var links: [Link]

  /// The configuration of a host that has a link to each of the others.
  init(_ host: Host, among hosts: [Host], ports: [Port] = [Port(name: "vm1")]) {
    address = host.address
    self.ports = ports
    links = hosts.filter { $0.index != host.index }.map { Link(name: "to-\($0.name)", remote: $0.address) }
  }

  var toml: String {
    var text = "[underlay]\naddress = \"\(address)\"\n"
    for domain in domains {
      text += "\n[[domain]]\nname = \"\(domain.name)\"\nvni = \(domain.vni)\n"
    }
    for port in ports {
      text += "\n[[port]]\nname = \"\(port.name)\"\nkind = \"tap\"\ndevice = \"\(port.name)\"\n"
      text += "domain = \"\(port.domain)\"\nqueues = \(port.queues)\n"
    }
    for link in links {
      text += "\n[[link]]\nname = \"\(link.name)\"\nremote = \"\(link.remote)\"\n"
      if let reservedBits = link.reservedBits { text += "reserved_bits = \"\(reservedBits)\"\n" }
    }
    return text
  }
}
