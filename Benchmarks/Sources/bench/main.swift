import CBench
import Glibc

// Microbenchmarks of the data path: what one item costs on this machine, as ratios to compare rather than as figures to
// quote. tools/bench builds and runs it; the lines below are what it takes.

let usage = """
  usage: bench [PART] [--smoke] [--repetitions N] [--json FILE]
    PART            ring | checksum | lookup | encapsulation | segmentation | route | layouts |
                    virtqueue: that one alone
    --smoke         few items, once: only checks that results are right; exit code 1 when one is wrong
    --repetitions   how often each row is measured, 1 to 1000; 7 unless given
    --json          writes all figures to a file too
  """

let benchmarks: [(name: String, run: (Report) -> Void)] = [
  ("ring", benchmarkRing), ("checksum", benchmarkChecksum), ("lookup", benchmarkLookup),
  ("encapsulation", benchmarkEncapsulation), ("segmentation", benchmarkSegmentation), ("route", benchmarkRoute),
  ("layouts", benchmarkLayouts), ("virtqueue", benchmarkVirtqueue),
]

func exitWrongUsage(_ what: String) -> Never {
  printError("bench: \(what)\n\(usage)")
  exit(2)
}

var chosen: String?
var jsonPath: String?
var isSmoke = false
var repetitions = 7
var arguments = CommandLine.arguments.dropFirst()
while let argument = arguments.popFirst() {
  switch argument {
  case "--smoke": isSmoke = true
  case "--repetitions":
    guard let text = arguments.popFirst(), let number = Int(text), (1...1_000).contains(number) else {
      exitWrongUsage("--repetitions wants a number from 1 to 1000")
    }
    repetitions = number
  case "--json":
    guard let path = arguments.popFirst() else { exitWrongUsage("--json wants a file") }
    jsonPath = path
  case "-h", "--help":
    print(usage)
    exit(0)
  default:
    guard chosen == nil, benchmarks.contains(where: { $0.name == argument }) else {
      exitWrongUsage("unknown argument '\(argument)'")
    }
    chosen = argument
  }
}

let report = Report(isSmoke: isSmoke, repetitions: repetitions)
report.begin()
report.check(countsAllocations(), "allocations are counted")
report.table("the core's clock", item: "cycle") { table in
  table.measure("rotations that wait for each other", items: 100_000_000) { items in cbench_rotate(UInt64(items)) }
}
for benchmark in benchmarks where chosen == nil || benchmark.name == chosen { benchmark.run(report) }
if let jsonPath, !write(report.json, to: jsonPath) {
  printError("bench: cannot write \(jsonPath)")
  exit(1)
}
exit(report.finish())

/// Whether the counter sees what Swift allocates.
func countsAllocations() -> Bool {
  let before = cbench_allocations()
  let words = [Int](repeating: CommandLine.arguments.count, count: 100)
  return words.last! > 0 && cbench_allocations() > before
}

func write(_ text: String, to path: String) -> Bool {
  guard let file = unsafe fopen(path, "w") else { return false }
  let isWritten = unsafe fputs(text, file) >= 0
  return unsafe fclose(file) == 0 && isWritten
}
