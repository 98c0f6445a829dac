import Glibc

// Microbenchmarks of the data path: what one item costs on this machine, as ratios to compare rather than as figures to
// quote. tools/bench builds and runs it; the lines below are what it takes.

let usage = """
  usage: bench [NAME] [--smoke] [--repetitions N]
    NAME            ring | lookup | checksum | encapsulation | layouts: that one alone
    --smoke         few items, once: only checks that results are right; exit code 1 when one is wrong
    --repetitions   how often each row is measured, 1 to 1000; 7 unless given
  """

let benchmarks: [(name: String, run: (Report) -> Void)] = [
  ("ring", benchmarkRing), ("lookup", benchmarkLookup), ("checksum", benchmarkChecksum),
  ("encapsulation", benchmarkEncapsulation), ("layouts", benchmarkLayouts),
]

func exitWrongUsage(_ what: String) -> Never {
  printError("bench: \(what)\n\(usage)")
  exit(2)
}

var chosen: String?
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
report.printMachine()
for benchmark in benchmarks where chosen == nil || benchmark.name == chosen { benchmark.run(report) }
exit(report.finish())
