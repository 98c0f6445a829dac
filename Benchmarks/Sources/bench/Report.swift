import Datapath
import Glibc

/// Measures rows, checks results, prints.
final class Report {
  let isSmoke: Bool
  let repetitions: Int
  private var checks = 0
  private var failures: [String] = []
  /// The row that the ratios of a table refer to: its first.
  private var baseline: Double?

  /// Items of a row in smoke mode: enough to go round every ring and through every path.
  private static let smokeItemsMax = 5_000
  private static let nameWidth = 46

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

  /// Starts a table whose rows count `item`s.
  func table(_ title: String, item: String) {
    baseline = nil
    guard !isSmoke else { return }
    print("\n\(title)")
    print(
      Self.pad("  ns a \(item)", Self.nameWidth)
        + ["min", "median", "max", "M/s", "ratio"].map { Self.padLeft($0, 9) }.joined())
  }

  /// Measures a row: `body` handles as many items as it is given. The first run warms up and is not counted.
  /// - Parameter bytes: of one item; adds the bit rate to the row.
  func measure(_ name: String, items: Int, bytes: Int? = nil, _ body: (Int) -> Void) {
    let items = isSmoke ? min(items, Self.smokeItemsMax) : items
    if !isSmoke { body(max(1, items / 10)) }
    var times: [Double] = []
    for _ in 0..<repetitions {
      let start = Self.now()
      body(items)
      times.append(Double(Self.now() - start) / Double(items))
    }
    guard !isSmoke else { return }
    times.sort()
    let median = times[times.count / 2]
    if baseline == nil { baseline = median }
    var line = Self.pad("  \(name)", Self.nameWidth)
    line += [times[0], median, times[times.count - 1]].map { Self.padLeft(Self.decimal($0, 2), 9) }.joined()
    line += Self.padLeft(Self.decimal(1_000 / median, 1), 9)
    line += Self.padLeft(Self.decimal(median / baseline!, 2), 9)
    if let bytes { line += "  \(Self.decimal(Double(bytes * 8) / median, 1)) Gb/s" }
    print(line)
  }

  /// Starts a table of other columns than `measure` has.
  func table(_ title: String, _ firstColumn: String, columns: [String]) {
    guard !isSmoke else { return }
    print("\n\(title)")
    row(firstColumn, columns)
  }

  /// A row of it.
  func row(_ name: String, _ values: [String]) {
    guard !isSmoke else { return }
    print(Self.pad("  \(name)", Self.nameWidth) + values.map { Self.padLeft($0, 9) }.joined())
  }

  func note(_ text: String) { if !isSmoke { print("  \(text)") } }

  /// Says how it went; the exit code.
  func finish() -> Int32 {
    guard failures.isEmpty else {
      print("bench: \(failures.count) of \(checks) checks failed")
      return 1
    }
    if isSmoke { print("bench smoke: \(checks) checks passed") }
    return checks > 0 ? 0 : 1
  }

  // MARK: The machine

  func printMachine() {
    guard !isSmoke else { return }
    var names = utsname()
    unsafe uname(&names)
    let release = unsafe withUnsafeBytes(of: &names.release) { bytes in
      unsafe String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
    }
    print("CPU       \(Self.processorName()), \(ProcessorSet.allowed().count) usable")
    print("kernel    Linux \(release)")
    if let text = unsafe getenv("VNETR_BENCH_COMPILER") { print("compiler  \(unsafe String(cString: text))") }
    if let text = unsafe getenv("VNETR_BENCH_REVISION") { print("revision  \(unsafe String(cString: text))") }
    print("runs      \(repetitions) of each row, after one to warm up; ratio is to a table's first row")
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

  private static func pad(_ text: String, _ width: Int) -> String {
    text + String(repeating: " ", count: max(1, width - text.count))
  }
  private static func padLeft(_ text: String, _ width: Int) -> String {
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
