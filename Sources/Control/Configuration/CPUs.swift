/// Reads the kernel's form of a set of CPUs, such as `0-3,8` (Documentation/admin-guide/cputopology.rst); nil for
/// anything else.
func cpus(ofKernelList text: String) -> [Int]? {
  var cpus: [Int] = []
  for part in text.split(whereSeparator: { $0 == "," || $0.isWhitespace }) {
    let bounds = part.split(separator: "-", omittingEmptySubsequences: false).map { cpuNumber($0) }
    switch (bounds.count, bounds.first ?? nil, bounds.last ?? nil) {
    case (1, let cpu?, _): cpus.append(cpu)
    case (2, let first?, let last?) where first <= last: cpus += first...last
    default: return nil
    }
  }
  return cpus
}

/// A set of CPUs, ascending, in the kernel's form.
func kernelList(ofCPUs cpus: [Int]) -> String {
  var runs: [ClosedRange<Int>] = []
  for cpu in cpus {
    if let last = runs.last, last.upperBound + 1 == cpu {
      runs[runs.count - 1] = last.lowerBound...cpu
    } else {
      runs.append(cpu...cpu)
    }
  }
  return runs.map { $0.count == 1 ? "\($0.lowerBound)" : "\($0.lowerBound)-\($0.upperBound)" }.joined(separator: ",")
}

/// The number of a CPU that a worker can be pinned to; nil for anything else.
private func cpuNumber(_ text: Substring) -> Int? {
  guard !text.isEmpty, text.utf8.allSatisfy({ $0 >= 0x30 && $0 <= 0x39 }), let cpu = Int(text), cpu <= Schema.cpuMax
  else { return nil }
  return cpu
}

extension Configuration.CPUs {
  /// Why a text is no value of `cpus`.
  struct Objection: Error, Equatable {
    var problem: String
    var remedy: String
  }

  /// The names of the stages in the order of a frame's way.
  static let stageNames = ["rx", "route", "tx"]

  /// Reads `auto`, `0,1` and `rx=0 route=1 tx=2,3`; the stages may stand in any order.
  init(_ text: String) throws(Objection) {
    if text == "auto" {
      self = .auto
      return
    }
    guard text.contains("=") else {
      self = .list(try Self.list(text[...], of: text, "name it once: each worker has a CPU of its own"))
      return
    }
    var stages: [String: [Int]] = [:]
    for word in text.split(separator: " ") {
      let parts = word.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
      let name = String(parts[0])
      guard parts.count == 2, Self.stageNames.contains(name) else {
        throw Objection(
          problem: "\"\(word.description.printable)\" is no stage with its CPUs", remedy: Self.stagesRemedy)
      }
      guard stages[name] == nil else {
        throw Objection(problem: "\(name) comes twice", remedy: "name it once, with all its CPUs: \(name)=0,1")
      }
      stages[name] = try Self.list(parts[1], of: text, "name it once for \(name)")
    }
    let missing = Self.stageNames.filter { stages[$0] == nil }
    guard let receive = stages["rx"], let route = stages["route"], let transmit = stages["tx"] else {
      throw Objection(
        problem: "it has no CPU for \(missing.joined(separator: " and "))",
        remedy: "give each stage at least one; stages may share CPUs: \"rx=0 route=0 tx=1\"")
    }
    self = .stages(receive: receive, route: route, transmit: transmit)
  }

  private static let stagesRemedy = "give each stage its CPUs, such as \"rx=0 route=1 tx=2,3\", or use \"auto\""

  private static func list(_ list: Substring, of text: String, _ remedy: String) throws(Objection) -> [Int] {
    var cpus: [Int] = []
    for part in list.split(separator: ",", omittingEmptySubsequences: false) {
      guard let cpu = cpuNumber(part) else {
        throw Objection(
          problem: "\"\(text.printable)\" is no list of CPUs",
          remedy: "list numbers from 0 to \(Schema.cpuMax), such as \"0,1\" or \"rx=0 route=1 tx=2\", or use \"auto\"")
      }
      guard !cpus.contains(cpu) else { throw Objection(problem: "CPU \(cpu) comes twice", remedy: remedy) }
      cpus.append(cpu)
    }
    return cpus
  }

  /// All CPUs that are named, ascending.
  var all: [Int] {
    switch self {
    case .auto: []
    case .list(let cpus): cpus.sorted()
    case .stages(let receive, let route, let transmit): Set(receive + route + transmit).sorted()
    }
  }
}
