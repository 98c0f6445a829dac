import CBench
import Datapath
import Glibc

/// Measures tables, checks results, prints, and keeps all of it as JSON.
final class Report {
  let isSmoke: Bool
  let repetitions: Int
  /// Whether DPDK's functions may be called.
  private(set) var hasDPDK = false
  private var checks = 0
  private var failures: [String] = []
  private var tables: [Table] = []
  private var skipped: [(what: String, reason: String)] = []
  private var versions: [(name: String, version: String)] = []

  fileprivate static let nameWidth = 58

  init(isSmoke: Bool, repetitions: Int) {
    self.isSmoke = isSmoke
    self.repetitions = isSmoke ? 1 : repetitions
  }

  /// How large a table may be: `full`, or less where only results are checked.
  func size(_ full: Int, smoke: Int) -> Int { isSmoke ? min(full, smoke) : full }

  func check(_ isRight: Bool, _ what: String) {
    checks += 1
    guard !isRight else { return }
    failures.append(what)
    printError("bench: wrong result: \(what)")
  }

  /// Measures a table. `rows` is called once to warm up, with a tenth of the items, and then once a repetition: so all
  /// rows of a table take turns, and what else the machine does meets all of them.
  /// - Parameters:
  ///   - item: what a figure is for.
  ///   - rounds: how often a repetition goes through the rows, where figures vary more than elsewhere.
  func table(_ title: String, item: String, rounds: Int = 1, _ rows: (Table) -> Void) {
    let table = Table(title, item: item, isSmoke: isSmoke)
    if !isSmoke { rows(table) }
    table.isWarm = true
    for _ in 0..<(isSmoke ? 1 : repetitions * rounds) { rows(table) }
    for row in table.rows {
      check(row.allocations == 0, "\(title): \(row.name): \(row.allocations) allocations")
    }
    tables.append(table)
    if !isSmoke { table.print() }
  }

  /// Leaves something out.
  func skip(_ what: String, _ reason: String) {
    skipped.append((what, reason))
    if !isSmoke { print("\n\(what): left out: \(reason)") }
  }

  func note(_ text: String) {
    tables.last?.notes.append(text)
    if !isSmoke { print("  \(text)") }
  }

  /// A version that figures depend on.
  func version(of name: String, _ version: String) {
    versions.append((name, version))
    if !isSmoke { print(Self.pad(name, 10) + version) }
  }

  /// Says how it went; the exit code.
  func finish() -> Int32 {
    guard failures.isEmpty else {
      print("bench: \(failures.count) of \(checks) checks failed")
      return 1
    }
    if isSmoke { print("bench smoke: \(checks) checks passed") }
    return checks > 0 ? 0 : 1
  }

  /// Everything, for other programs. Figures are ns an item, one of each repetition.
  var json: String {
    func list<Item>(_ items: [Item], _ text: (Item) -> String) -> String {
      "[" + items.map(text).joined(separator: ", ") + "]"
    }
    let tables = list(tables) { table in
      let rows = list(table.rows) { row in
        "{\"name\": \(quoted(row.name)), \"bytes\": \(row.bytes ?? 0), \"allocations\": \(row.allocations), "
          + "\"ns\": \(list(row.times) { Self.decimal($0, 4) })}"
      }
      return "\n{\"title\": \(quoted(table.title)), \"item\": \(quoted(table.item)), "
        + "\"notes\": \(list(table.notes, quoted)), \"rows\": \(rows)}"
    }
    let versions = versions.map { "\(quoted($0.name)): \(quoted($0.version))" }.joined(separator: ", ")
    return "{\"repetitions\": \(repetitions), \"versions\": {\(versions)}, "
      + "\"skipped\": \(list(skipped) { "{\"what\": \(quoted($0.what)), \"reason\": \(quoted($0.reason))}" }), "
      + "\"failures\": \(list(failures, quoted)), \"tables\": \(tables)}\n"
  }

  private func quoted(_ text: String) -> String {
    "\"" + text.replacing("\\", with: "\\\\").replacing("\"", with: "\\\"") + "\""
  }

  // MARK: The machine

  /// Versions come first in what is printed; DPDK is opened for its own.
  func begin() {
    var names = utsname()
    unsafe uname(&names)
    let release = unsafe withUnsafeBytes(of: &names.release) { bytes in
      unsafe String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
    }
    version(of: "CPU", "\(Self.processorName()), \(ProcessorSet.allowed().count) usable")
    version(of: "kernel", "Linux \(release)")
    if let text = unsafe getenv("VNETR_BENCH_COMPILER") { version(of: "compiler", unsafe String(cString: text)) }
    if let text = unsafe getenv("VNETR_BENCH_REVISION") { version(of: "revision", unsafe String(cString: text)) }
    if let path = unsafe getenv("VNETR_BENCH_DPDK"), unsafe cbench_dpdk_open(path) {
      hasDPDK = true
      version(of: "DPDK", unsafe String(cString: cbench_dpdk_version()))
    }
    guard !isSmoke else { return }
    print("runs      \(repetitions) of each row, in turn with the others of its table, after one to warm up")
    print("speed     how many times as fast as a table's first row")
  }

  private static func processorName() -> String {
    guard let file = unsafe fopen("/proc/cpuinfo", "r") else { return "unknown" }
    defer { unsafe fclose(file) }
    var line = [UInt8](repeating: 0, count: 256)
    while true {
      let isRead = unsafe line.withUnsafeMutableBytes { bytes in
        unsafe fgets(bytes.bindMemory(to: CChar.self).baseAddress!, Int32(bytes.count), file) != nil
      }
      guard isRead else { return "unknown" }
      let text = String(decoding: line.prefix { $0 != 0 && $0 != 10 }, as: UTF8.self)
      if text.hasPrefix("model name"), let colon = text.firstIndex(of: ":") {
        return String(text[text.index(colon, offsetBy: 2)...])
      }
    }
  }

  /// Monotonic, nanoseconds.
  static func now() -> UInt64 {
    var time = timespec()
    unsafe clock_gettime(CLOCK_MONOTONIC, &time)
    return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
  }

  // MARK: Text

  fileprivate static func pad(_ text: String, _ width: Int) -> String {
    text + String(repeating: " ", count: max(1, width - text.count))
  }
  fileprivate static func padLeft(_ text: String, _ width: Int) -> String {
    String(repeating: " ", count: max(1, width - text.count)) + text
  }
  static func decimal(_ value: Double, _ places: Int) -> String {
    var scale = 1
    for _ in 0..<places { scale *= 10 }
    let scaled = Int((value * Double(scale)).rounded())
    guard places > 0 else { return "\(scaled)" }
    let fraction = String(scaled % scale)
    return "\(scaled / scale)." + String(repeating: "0", count: places - fraction.count) + fraction
  }
}

/// Rows that are compared with each other, the first with all others.
final class Table {
  struct Row {
    let name: String
    /// Of one item.
    let bytes: Int?
    /// Nanoseconds an item, one of each repetition.
    var times: [Double] = []
    /// In the measured parts of all repetitions.
    var allocations: UInt64 = 0

    var median: Double { times.sorted()[times.count / 2] }
  }

  let title: String
  let item: String
  fileprivate(set) var rows: [Row] = []
  fileprivate(set) var notes: [String] = []
  /// Whether what is measured counts.
  fileprivate var isWarm = false
  private let isSmoke: Bool

  /// Items of a row in smoke mode: enough to go round every ring and through every path.
  private static let smokeItemsMax = 5_000

  fileprivate init(_ title: String, item: String, isSmoke: Bool) {
    self.title = title
    self.item = item
    self.isSmoke = isSmoke
  }

  /// How many items to handle this time.
  func items(_ full: Int) -> Int { isSmoke ? min(full, Self.smokeItemsMax) : isWarm ? full : max(1, full / 10) }

  /// Measures a row once: `body` handles as many items as it is given, on this thread.
  /// - Parameter bytes: of one item; adds the bit rate to the row.
  @inline(__always)
  func measure(_ name: String, items full: Int, bytes: Int? = nil, _ body: (Int) -> Void) {
    let items = items(full)
    let allocations = cbench_allocations()
    let start = Report.now()
    body(items)
    let end = Report.now()
    add(
      name, bytes: bytes, Double(end - start) / Double(items), allocations: cbench_allocations() - allocations)
  }

  /// Adds what was measured otherwise.
  func add(_ name: String, bytes: Int? = nil, _ nanoseconds: Double, allocations: UInt64) {
    guard isWarm else { return }
    let place =
      rows.firstIndex { $0.name == name }
      ?? {
        rows.append(Row(name: name, bytes: bytes))
        return rows.count - 1
      }()
    rows[place].times.append(nanoseconds)
    rows[place].allocations += allocations
  }

  fileprivate func print() {
    Swift.print("\n\(title)")
    Swift.print(
      Report.pad("  ns a \(item)", Report.nameWidth)
        + ["min", "median", "max", "M/s", "speed", "allocs"].map { Report.padLeft($0, 9) }.joined())
    for row in rows {
      let times = row.times.sorted()
      let values = [
        Report.decimal(times[0], 2), Report.decimal(row.median, 2), Report.decimal(times[times.count - 1], 2),
        Report.decimal(1_000 / row.median, 1), Report.decimal(rows[0].median / row.median, 2), "\(row.allocations)",
      ]
      let rate = row.bytes.map { "  \(Report.decimal(Double($0 * 8) / row.median, 1)) Gb/s" } ?? ""
      Swift.print(
        Report.pad("  \(row.name)", Report.nameWidth) + values.map { Report.padLeft($0, 9) }.joined() + rate)
    }
  }
}

func printError(_ line: String) {
  let bytes = Array((line + "\n").utf8)
  _ = unsafe bytes.withUnsafeBytes { unsafe write(STDERR_FILENO, $0.baseAddress!, $0.count) }
}

/// Numbers from a seed, fast enough to be nothing beside what is measured (xorshift64).
struct BenchmarkRandom {
  private var state: UInt64
  init(seed: UInt64) { state = seed &* 0x9E37_79B9_7F4A_7C15 | 1 }
  mutating func next() -> UInt64 {
    state ^= state << 13
    state ^= state >> 7
    state ^= state << 17
    return state
  }
  /// A number in 0 ..< `bound`, at most 2^32.
  mutating func below(_ bound: Int) -> Int { Int(truncatingIfNeeded: ((next() >> 32) &* UInt64(bound)) >> 32) }
}
