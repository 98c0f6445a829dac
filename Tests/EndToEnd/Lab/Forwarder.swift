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
  init(
    on host: Host, _ arguments: [String], environment: [String: String] = [:], through wrapper: [String] = []
  ) throws {
    self.host = host
    process = try Forwarder.start(on: host, arguments, environment: environment, through: wrapper)
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
      // A report is one JSON object; it ends with a brace that begins a line.
      let text = process.standardOutput.dropFirst(readCharacters)
      guard let end = text.range(of: "\n}\n") else { return false }
      let whole = text[..<end.upperBound]
      readCharacters += whole.count
      report = try CounterReport(String(whole))
      return true
    }
    guard let report else { throw LabError("no counters on standard output:\n\(process.standardOutput)") }
    return report
  }
}

/// One report of the forwarder, as `--counters-format json` prints it.
struct CounterReport {
  private let parts: [String: JSONValue]

  init(_ text: String) throws {
    guard case .object(let parts) = try JSONDecoder().decode(JSONValue.self, from: Data(text.utf8)) else {
      throw LabError("no counter report: \(text)")
    }
    self.parts = parts
  }

  /// What the report says of the design's first rule: whether every frame is accounted for, and the sums.
  struct Conservation: Equatable, CustomStringConvertible {
    let holds: Bool
    let description: String
  }

  var conservation: Conservation {
    guard case .object(let fields)? = parts["conservation"], case .boolean(let holds)? = fields["holds"],
      case .string(let text)? = fields["text"]
    else { return Conservation(holds: false, description: "the report says nothing about conservation") }
    return Conservation(holds: holds, description: text)
  }

  /// Where a counter is kept, by the name of its part of the report.
  enum Scope: String { case underlay, ports, links, domains, workers }

  /// The sum of a counter over a scope, or of one member of it.
  func total(_ counter: String, _ scope: Scope, of member: String? = nil) -> Int {
    func value(_ counters: JSONValue?) -> Int {
      guard case .object(let counters)? = counters, case .number(let number)? = counters[counter] else { return 0 }
      return Int(number)
    }
    guard scope != .underlay, case .object(let members)? = parts[scope.rawValue] else {
      return value(parts[scope.rawValue])
    }
    return member.map { value(members[$0]) } ?? members.values.reduce(0) { $0 + value($1) }
  }

  /// Every frame that was dropped, here or in the kernel before, by reason.
  var drops: [String: Int] {
    var drops: [String: Int] = [:]
    func add(_ counters: JSONValue?) {
      guard case .object(let counters)? = counters else { return }
      for case (let name, .number(let number)) in counters where name.contains("drop") && number > 0 {
        drops[name, default: 0] += Int(number)
      }
    }
    add(parts[Scope.underlay.rawValue])
    for scope in [Scope.ports, .links] {
      guard case .object(let members)? = parts[scope.rawValue] else { continue }
      for member in members.values { add(member) }
    }
    return drops
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

/// A configuration file of the forwarder. What is nil is left out of the file: its default holds.
struct NodeConfiguration {
  struct Domain {
    var name = "blue"
    var vni = 42
    var forwarding: String?
    var floodFramesPerSecondMax: Int?
  }
  struct Port {
    var name: String
    /// Nil for an end of a passthrough.
    var domain: String? = "blue"
    var kind = "tap"
    var queues = 1
    var mtu: Int?
    var offloads: Bool?
    var socket: String?
    var socketMode: String?

    /// A port that serves a virtual machine by a socket of that path.
    static func vhostUser(_ name: String, _ socket: String, mode: String? = nil) -> Port {
      Port(name: name, kind: "vhost-user", socket: socket, socketMode: mode)
    }

    /// A port on the device of that name, which is there already.
    static func packet(_ name: String, domain: String? = "blue", mtu: Int? = nil) -> Port {
      Port(name: name, domain: domain, kind: "packet", mtu: mtu)
    }
  }
  struct Link {
    var name: String
    var remote: String
    var encapsulation: String?
    var relay: Bool?
    var fragment: Bool?
    var reservedBits: String?
  }
  struct Rule {
    var source: String
    var destination: String
    var from: String?
    var to: String
  }

  /// Nil where there is no link.
  var address: String?
  var domains = [Domain()]
  var ports: [Port]
  var links: [Link] = []
  var rules: [Rule] = []
  var passthroughs: [(a: String, b: String)] = []

  /// The configuration of a host that has a link to each of the others.
  init(
    _ host: Host, among hosts: [Host], ports: [Port] = [Port(name: "vm1")], encapsulation: String? = nil,
    relay: Bool? = nil
  ) {
    address = host.address
    self.ports = ports
    links = hosts.filter { $0.index != host.index }.map {
      Link(name: "to-\($0.name)", remote: $0.address, encapsulation: encapsulation, relay: relay)
    }
  }

  /// The configuration of a host without links.
  init(ports: [Port]) { self.ports = ports }

  /// The configuration of a host with two ports that are wired to each other.
  init(passthrough a: Port, _ b: Port) {
    ports = [a, b]
    domains = []
    passthroughs = [(a.name, b.name)]
    for index in ports.indices { ports[index].domain = nil }
  }

  var toml: String {
    var text = ""
    func section(_ header: String, _ fields: [(key: String, value: Any?)]) {
      text += "\n\(header)\n"
      for (key, value) in fields {
        switch value {
        case let string as String: text += "\(key) = \"\(string)\"\n"
        case let other?: text += "\(key) = \(other)\n"
        case nil: break
        }
      }
    }
    if address != nil { section("[underlay]", [("address", address)]) }
    for domain in domains {
      section(
        "[[domain]]",
        [
          ("name", domain.name), ("vni", domain.vni), ("forwarding", domain.forwarding),
          ("flood_frames_per_second_max", domain.floodFramesPerSecondMax),
        ])
    }
    for port in ports {
      section(
        "[[port]]",
        [
          ("name", port.name), ("kind", port.kind), ("device", port.socket == nil ? port.name : nil),
          ("socket", port.socket), ("socket_mode", port.socketMode), ("domain", port.domain), ("queues", port.queues),
          ("mtu", port.mtu),
          ("offloads", port.offloads),
        ])
    }
    for link in links {
      section(
        "[[link]]",
        [
          ("name", link.name), ("remote", link.remote), ("encapsulation", link.encapsulation), ("relay", link.relay),
          ("fragment", link.fragment), ("reserved_bits", link.reservedBits),
        ])
    }
    for rule in rules {
      section(
        "[[route]]",
        [("source", rule.source), ("destination", rule.destination), ("from", rule.from), ("to", rule.to)])
    }
    for wire in passthroughs { section("[[passthrough]]", [("a", wire.a), ("b", wire.b)]) }
    return text
  }
}
