import Datapath

/// The counters of all workers at one moment, summed, as `run` prints them.
struct CounterReport {
  struct Row {
    var scope: Counter.Scope
    var name: String
    /// By `Counter.rawValue`.
    var values: [UInt64]

    init(_ scope: Counter.Scope, _ name: String, _ blocks: [CounterBlock]) {
      self.scope = scope
      self.name = name
      values = Counter.allCases.map { counter in blocks.reduce(0) { $0 &+ $1.value(counter) } }
    }

    func value(_ counter: Counter) -> UInt64 { values[counter.rawValue] }
    var drops: [(counter: Counter, frames: UInt64)] {
      Counter.allCases.filter { $0.isDrop && value($0) > 0 }.map { ($0, value($0)) }
    }
    var dropped: UInt64 { drops.reduce(0) { $0 + $1.frames } }
  }

  var rows: [Row]
  /// By worker; nil where one did not answer.
  var audits: [Audit?]
  /// Names of interfaces and domains by index, for what an audit finds broken.
  var interfaceNames: [String]
  var domainNames: [String]

  var holds: Bool { audits.allSatisfy { $0?.holds == true } }

  // MARK: Text

  func text(_ format: CountersFormat) -> String { format == .json ? json : table }

  private var table: String {
    var lines: [[String]] = [["", "in frames", "in bytes", "out frames", "out bytes", "dropped"]]
    for row in rows where row.scope != .worker {
      let shown: [Counter] = [.inFrames, .inBytes, .outFrames, .outBytes]
      lines.append(
        [label(row)] + shown.map { $0.definition.scopes.contains(row.scope) ? String(row.value($0)) : "" }
          + [String(row.dropped)])
    }
    var text = Self.align(lines) + "\n"
    var drops: [[String]] = []
    for row in rows where row.scope != .domain {
      for (counter, frames) in row.drops { drops.append([label(row), counter.definition.name, String(frames)]) }
    }
    if !drops.isEmpty { text += "\ndrops\n" + Self.align(drops) + "\n" }
    for scope in [Counter.Scope.port, .domain, .worker] {
      let shown = Counter.allCases.filter {
        let scopes = $0.definition.scopes
        return !$0.isDrop && (scope == .port ? scopes == [.port] : scopes.contains(scope) && !scopes.contains(.port))
      }
      for row in rows where row.scope == scope {
        let pairs = shown.filter { row.value($0) > 0 }.map { "\($0.definition.name)=\(row.value($0))" }
        if !pairs.isEmpty { text += "\n\(label(row)): \(pairs.joined(separator: " "))" }
      }
    }
    return text + "\n\(conservation)\n"
  }

  private func label(_ row: Row) -> String {
    row.name.isEmpty ? row.scope.rawValue : "\(row.scope.rawValue) \(row.name)"
  }

  /// The design's first rule, as it stands: one line.
  var conservation: String {
    func sum(_ part: (Audit) -> UInt64) -> UInt64 { audits.reduce(0) { $0 + ($1.map(part) ?? 0) } }
    // Workers answer one after the other: what one handed on another may have taken over before it was asked.
    let inFlight = Int(sum(\.inFlight)) + Int(sum(\.handedOn)) - Int(sum(\.takenOver))
    let sums =
      "received \(sum(\.received)) + copies \(sum(\.copies)) = sent \(sum(\.sent)) + dropped \(sum(\.dropped))"
      + " + in flight \(inFlight)"
    if holds { return "conservation: holds: \(sums)" }
    var broken: [String] = []
    for (worker, answer) in audits.enumerated() where answer?.holds != true {
      guard let audit = answer else {
        broken.append("worker \(worker) (it did not answer)")
        continue
      }
      var parts: [String] = []
      if audit.brokenInterface != .none {
        parts.append("interface \(name(audit.brokenInterface.index, interfaceNames))")
      }
      if audit.brokenDomain != .none { parts.append("domain \(name(audit.brokenDomain.index, domainNames))") }
      if !audit.underlayHolds { parts.append("underlay") }
      if audit.slotsLost != 0 { parts.append("\(audit.slotsLost) slots held by nobody") }
      if audit.operationsLost != 0 { parts.append("\(audit.operationsLost) send operations held by nobody") }
      broken.append("worker \(worker) (\(parts.isEmpty ? "sums" : parts.joined(separator: ", ")))")
    }
    return "conservation: BROKEN at \(broken.joined(separator: "; ")): \(sums)"
  }

  private func name(_ index: Int, _ names: [String]) -> String { index < names.count ? names[index] : "\(index)" }

  /// Columns as wide as their widest cell; the first flush left, the others right.
  static func align(_ lines: [[String]]) -> String {
    let columns = lines.map(\.count).max() ?? 0
    let widths = (0..<columns).map { column in lines.map { column < $0.count ? $0[column].count : 0 }.max() ?? 0 }
    return lines.map { line in
      line.enumerated().map { column, cell in
        let pad = String(repeating: " ", count: widths[column] - cell.count)
        return column == 0 ? cell + pad : pad + cell
      }.joined(separator: "  ")
    }.joined(separator: "\n")
  }

  private var json: String {
    func members(_ row: Row) -> String {
      let shown = Counter.allCases.filter { $0.definition.scopes.contains(row.scope) }
      return shown.map { "\"\($0.definition.name)\": \(row.value($0))" }.joined(separator: ", ")
    }
    var parts: [String] = []
    for scope in Counter.Scope.allCases {
      let of = rows.filter { $0.scope == scope }
      if scope == .underlay {
        parts.append("  \"underlay\": {\(of.map(members).joined())}")
      } else {
        let entries = of.map { "    \"\(Self.escape($0.name))\": {\(members($0))}" }
        parts.append("  \"\(scope.rawValue)s\": {\n\(entries.joined(separator: ",\n"))\n  }")
      }
    }
    parts.append(
      "  \"conservation\": {\"holds\": \(holds), \"text\": \"\(Self.escape(conservation))\"}")
    return "{\n\(parts.joined(separator: ",\n"))\n}\n"
  }

  /// Names have no control characters (the configuration refuses them), so quotes and backslashes are all there is.
  private static func escape(_ text: String) -> String {
    text.map { $0 == "\"" || $0 == "\\" ? "\\\($0)" : String($0) }.joined()
  }
}
