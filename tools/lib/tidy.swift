// The tidy test: the project's rules that neither the compiler nor `swift format` checks.
// tools/lint compiles and runs it. It reads the tracked paths, separated by NUL, from standard input, and prints
// `path:line: what is wrong` for each finding. Every rule is a pure function over a `Tree`, so that the
// self-test (`--self-test`) can plant a violation of each and see that it is found.
import Foundation

/// The tracked text files of the project, or the planted ones of the self-test.
struct Tree {
  var files: [File] = []
  /// Every tracked path, of files that are no text too.
  var paths: [String] { files.map(\.path) }

  func files(under folder: String) -> [File] { files.filter { $0.path.hasPrefix(folder + "/") } }
}

struct File {
  let path: String
  /// The lines as they are; empty for a file that is no text.
  let lines: [Substring]
  /// The same lines, with comments and the contents of string literals blanked: what the compiler sees as code.
  let codeLines: [Substring]

  init(path: String, text: String) {
    self.path = path
    lines = text.split(separator: "\n", omittingEmptySubsequences: false)
    let isCode = [".swift", ".h", ".c"].contains { path.hasSuffix($0) }
    codeLines =
      isCode ? blankingCommentsAndStrings(text).split(separator: "\n", omittingEmptySubsequences: false) : lines
  }

  var isSwift: Bool { path.hasSuffix(".swift") }

  func finding(line index: Int, _ what: String) -> String { "\(path):\(index + 1): \(what)" }

  /// The modules that the file imports, with the index of the line.
  var imports: [(line: Int, module: String)] {
    codeLines.enumerated().compactMap { index, line in
      let words = identifiers(in: line).map(\.word)
      guard let position = words.firstIndex(of: "import"), words[..<position].allSatisfy(mayPrecedeImport) else {
        return nil
      }
      let kinds: Set<Substring> = ["struct", "class", "enum", "protocol", "func", "typealias", "var", "let"]
      return words[(position + 1)...].first { !kinds.contains($0) }.map { (index, String($0)) }
    }
  }
}

func mayPrecedeImport(_ word: Substring) -> Bool {
  ["public", "package", "internal", "fileprivate", "private", "testable", "unsafe", "preconcurrency", "_exported"]
    .contains(word)
}

/// Replaces what stands in comments and string literals by blanks and keeps every line break.
func blankingCommentsAndStrings(_ text: String) -> String {
  let source = Array(text.utf8)
  var code = source
  var index = 0
  func at(_ offset: Int) -> UInt8? { offset < source.count ? source[offset] : nil }
  func starts(_ token: String, _ offset: Int) -> Bool {
    token.utf8.enumerated().allSatisfy { at(offset + $0.offset) == $0.element }
  }
  func blank(to end: Int) {
    while index < min(end, source.count) {
      if source[index] != UInt8(ascii: "\n") { code[index] = UInt8(ascii: " ") }
      index += 1
    }
  }
  /// The end of the literal that opens at `start` with `hashes` number signs before its quotation mark.
  func endOfString(from start: Int, hashes: Int) -> Int {
    let quotes = starts("\"\"\"", start) ? 3 : 1
    let delimiter = String(repeating: "\"", count: quotes) + String(repeating: "#", count: hashes)
    let escape = "\\" + String(repeating: "#", count: hashes)
    var offset = start + quotes
    while let byte = at(offset), !starts(delimiter, offset) {
      if quotes == 1, byte == UInt8(ascii: "\n") { return offset }
      guard starts(escape, offset) else {
        offset += 1
        continue
      }
      offset += escape.utf8.count
      guard at(offset) == UInt8(ascii: "(") else {
        offset += 1
        continue
      }
      // An interpolation: up to its closing parenthesis, over literals inside it.
      var depth = 0
      repeat {
        switch at(offset) {
        case UInt8(ascii: "(")?: depth += 1
        case UInt8(ascii: ")")?: depth -= 1
        case UInt8(ascii: "\"")?: offset = endOfString(from: offset, hashes: 0) - 1
        case nil: return source.count
        default: break
        }
        offset += 1
      } while depth > 0
    }
    return offset + delimiter.utf8.count
  }

  while index < source.count {
    if starts("//", index) {
      blank(to: source[index...].firstIndex(of: UInt8(ascii: "\n")) ?? source.count)
    } else if starts("/*", index) {
      var end = index
      var depth = 0
      repeat {
        if starts("/*", end) {
          depth += 1
          end += 2
        } else if starts("*/", end) {
          depth -= 1
          end += 2
        } else {
          end += 1
        }
      } while depth > 0 && end < source.count
      blank(to: end)
    } else if source[index] == UInt8(ascii: "\"") || source[index] == UInt8(ascii: "#") {
      let hashes = source[index...].prefix { $0 == UInt8(ascii: "#") }.count
      if at(index + hashes) == UInt8(ascii: "\"") {
        blank(to: endOfString(from: index + hashes, hashes: hashes))
      } else {
        index += max(hashes, 1)
      }
    } else if starts("'\"'", index) {
      blank(to: index + 3)
    } else {
      index += 1
    }
  }
  return String(decoding: code, as: UTF8.self)
}

/// The identifiers and keywords of a line, each with the text before it.
func identifiers(in line: Substring) -> [(word: Substring, before: Substring, after: Substring)] {
  var found: [(word: Substring, before: Substring, after: Substring)] = []
  var rest = line[...]
  func isPart(_ character: Character) -> Bool { character == "_" || character.isLetter || character.isNumber }
  while let start = rest.firstIndex(where: isPart) {
    let end = rest[start...].firstIndex { !isPart($0) } ?? rest.endIndex
    found.append((rest[start..<end], line[..<start], line[end...]))
    rest = rest[end...]
  }
  return found
}

// MARK: - Layers

/// Lowest first: each may use those before it.
let modules = ["CLinux", "Datapath", "SimulatedKernel", "Control", "vnetr"]
let datapathLayers = ["Memory", "Virtio", "Frames", "Routing", "IO", "Ports", "Forwarder"]

func moduleDirection(_ tree: Tree) -> [String] {
  modules.indices.flatMap { level in
    tree.files(under: "Sources/" + modules[level]).flatMap { file in
      file.imports.compactMap { line, module in
        modules[(level + 1)...].contains(module)
          ? file.finding(line: line, "\(modules[level]) imports \(module), which stands above it") : nil
      }
    }
  }
}

/// Inside one module the compiler lets every file see every type: here a file of a lower layer may not mention a
/// type that a file of a higher layer declares.
func layerDirection(_ tree: Tree) -> [String] {
  let declarations: Set<Substring> = ["struct", "class", "enum", "protocol", "actor", "typealias"]
  let hidden: Set<Substring> = ["private", "fileprivate"]
  var layerOfType: [Substring: Int] = [:]
  for (level, layer) in datapathLayers.enumerated() {
    for line in tree.files(under: "Sources/Datapath/" + layer).flatMap(\.codeLines) where line.first != " " {
      let words = identifiers(in: line).map(\.word)
      guard let keyword = words.firstIndex(where: declarations.contains), keyword + 1 < words.count else { continue }
      let before = words[..<keyword]
      if before.contains("func") || before.contains("extension") || before.contains(where: hidden.contains) { continue }
      layerOfType[words[keyword + 1]] = level
    }
  }
  var findings: [String] = []
  for (level, layer) in datapathLayers.enumerated() {
    for file in tree.files(under: "Sources/Datapath/" + layer) {
      for (index, line) in file.codeLines.enumerated() {
        for (word, before, _) in identifiers(in: line) {
          guard let declared = layerOfType[word], declared > level else { continue }
          // A member of another type that has the same name is not meant.
          if before.hasSuffix("."), !before.hasSuffix("Datapath.") { continue }
          findings.append(
            file.finding(
              line: index, "Datapath/\(layer) mentions \(word), which Datapath/\(datapathLayers[declared]) declares"))
        }
      }
    }
  }
  let known = datapathLayers.map { "Sources/Datapath/\($0)/" }
  for file in tree.files(under: "Sources/Datapath") where !known.contains(where: file.path.hasPrefix) {
    findings.append(file.finding(line: 0, "stands in none of the layers \(datapathLayers.joined(separator: ", "))"))
  }
  return findings
}

// MARK: - The data path

let dataPathFolders = ["Sources/Datapath", "Sources/SimulatedKernel"]

/// What the data path must not use, and why.
let banned: [Substring: String] = [
  "Foundation": "allocates and locks behind every call",
  "DispatchQueue": "brings threads that nobody pinned",
  "Logger": "the data path logs nothing: count it",
  "async": "workers are pinned threads, no tasks",
  "await": "workers are pinned threads, no tasks",
  "actor": "workers are pinned threads, no tasks",
  "Mutex": "the data path locks nothing",
  "pthread_mutex_t": "the data path locks nothing",
  "pthread_mutex_lock": "the data path locks nothing",
  "NSLock": "the data path locks nothing",
]
let bannedCalls: [Substring: String] = [
  "print": "the data path logs nothing: count it",
  "debugPrint": "the data path logs nothing: count it",
  "dump": "the data path logs nothing: count it",
  "fatalError": "say what was broken with precondition or preconditionFailure",
]

func bannedOnTheDataPath(_ tree: Tree) -> [String] {
  var findings: [String] = []
  for file in dataPathFolders.flatMap(tree.files(under:)) where file.isSwift {
    for (index, line) in file.codeLines.enumerated() {
      for (word, before, after) in identifiers(in: line) {
        if word == "Dispatch", before.hasSuffix("import ") {
          findings.append(
            file.finding(line: index, "import Dispatch is banned on the data path: brings unpinned threads"))
        }
        if let reason = banned[word], !before.hasSuffix(".") {
          findings.append(file.finding(line: index, "\(word) is banned on the data path: \(reason)"))
        }
        if let reason = bannedCalls[word], after.hasPrefix("("), !before.hasSuffix("."), !before.hasSuffix("func ") {
          findings.append(file.finding(line: index, "\(word)( is banned on the data path: \(reason)"))
        }
        if word == "try", after.hasPrefix("!") {
          findings.append(file.finding(line: index, "try! is banned on the data path: handle the error by its name"))
        }
      }
    }
  }
  return findings
}

/// Building without checks deletes preconditions, and gained nothing when it was measured.
func checksStayOn(_ tree: Tree) -> [String] {
  let flag = "-O" + "unchecked"
  return tree.files.filter { $0.path.hasSuffix("Package.swift") || $0.path.hasPrefix("tools/") }.flatMap { file in
    file.lines.enumerated().compactMap { index, line in
      line.contains(flag) ? file.finding(line: index, "\(flag) deletes preconditions") : nil
    }
  }
}

/// C holds shims only: inline calls without a loop, in headers. A loop of instructions that Swift has no word for, as a
/// `target` attribute names them, is the exception: it would cost a call for each of them.
func shimsWithoutLogic(_ tree: Tree) -> [String] {
  var findings: [String] = []
  let loops: Set<Substring> = ["for", "while", "do", "goto"]
  for file in tree.files(under: "Sources/CLinux") {
    guard file.path.hasSuffix(".h") else {
      if !file.path.hasSuffix(".modulemap") {
        findings.append(file.finding(line: 0, "CLinux holds headers and a module map only"))
      }
      continue
    }
    var heading: [Substring] = []
    var isForTarget = false
    for (index, line) in file.codeLines.enumerated() {
      let words = identifiers(in: line).map(\.word)
      if line.hasPrefix("__attribute__((target(") { isForTarget = true }
      if line.hasPrefix("}") { isForTarget = false }
      for word in words where loops.contains(word) && !isForTarget {
        findings.append(file.finding(line: index, "'\(word)': a shim has no logic; loop in Swift"))
      }
      // A function's heading may span lines: it runs from its first unindented line to the brace.
      guard let first = line.first, !line.hasPrefix("#") else { continue }
      if first != " ", first != "{", first != "}", first != ")" { heading = [] }
      heading.append(line)
      guard line.contains("{") else { continue }
      let text = heading.joined(separator: " ")
      let declared = identifiers(in: text[...]).map(\.word)
      let isFunction =
        text.contains("(") && first != " "
        && !["struct", "union", "enum", "typedef", "extern"].contains(declared.first)
      if isFunction, Array(declared.prefix(2)) != ["static", "inline"] {
        findings.append(file.finding(line: index, "a shim is `static inline`"))
      }
    }
  }
  return findings
}

// MARK: - The project's face

func topLevel(_ tree: Tree) -> [String] {
  let wanted: Set<String> = [
    "Package.swift", "Sources", "Tests", "Benchmarks", "tools", "docs",
    "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md",
  ]
  func top(_ path: String) -> String { String(path.prefix { $0 != "/" }) }
  let strangers = tree.paths.filter { !$0.hasPrefix(".") && !wanted.contains(top($0)) }
  let missing = wanted.subtracting(tree.paths.map(top)).sorted()
  return strangers.map { "\($0):1: '\(top($0))' does not belong at the top level" }
    + missing.map { "\($0):1: is missing at the top level" }
}

/// Words that speak of the place and the circumstances in which the code was written, not of the code.
func noWorkplace(_ tree: Tree) -> [String] {
  var findings: [String] = []
  for file in tree.files {
    for (index, line) in file.lines.enumerated() {
      let lower = line.lowercased()
      for path in ["/wo" + "rk/", "/t" + "mp/"] where lower.contains(path) && !lower.contains("mktemp") {
        findings.append(file.finding(line: index, "'\(path)' is a path of one machine"))
      }
      let words = identifiers(in: lower[...])
      for (word, _, after) in words {
        if word == "ses" + "sion" || word == "ses" + "sions" {
          findings.append(file.finding(line: index, "'\(word)' is no word of this project"))
        }
        let number = after.drop { $0 == " " || $0 == "#" }
        if word == "iss" + "ue", after != number, after.dropFirst().prefix(1) != " ", number.first?.isNumber == true {
          findings.append(file.finding(line: index, "say what it is, not its number in a tracker"))
        }
      }
    }
  }
  return findings
}

func noUnfinishedWork(_ tree: Tree) -> [String] {
  let marks: Set<Substring> = ["TO" + "DO", "FIX" + "ME", "XX" + "X"].reduce(into: []) { $0.insert($1[...]) }
  return tree.files.flatMap { file in
    file.lines.enumerated().flatMap { index, line in
      identifiers(in: line).filter { marks.contains($0.word) }
        .map { file.finding(line: index, "\($0.word): do it, or drop it") }
    }
  }
}

func lineLength(_ tree: Tree) -> [String] {
  let columnsMax = 120
  let isCode = { (file: File) in
    file.isSwift || file.path.hasSuffix(".py") || ["tools/", ".ci/"].contains { file.path.hasPrefix($0) }
  }
  return tree.files.filter(isCode).flatMap { file in
    file.lines.enumerated().compactMap { index, line in
      line.count > columnsMax ? file.finding(line: index, "\(line.count) columns, over \(columnsMax)") : nil
    }
  }
}

let rules: [(name: String, check: (Tree) -> [String])] = [
  ("modules import downwards only", moduleDirection),
  ("layers of the data path mention lower layers only", layerDirection),
  ("nothing banned on the data path", bannedOnTheDataPath),
  ("preconditions stay on", checksStayOn),
  ("C holds shims only", shimsWithoutLogic),
  ("the top level holds what it should", topLevel),
  ("no trace of the workplace", noWorkplace),
  ("no unfinished work", noUnfinishedWork),
  ("lines fit", lineLength),
]

// MARK: - Self-test

/// A small project without a fault.
let faultless = [
  "Package.swift": "let package = 1\n",
  "Benchmarks/Package.swift": "",
  "README.md": "# vnetr: issue a ping\n",
  "LICENSE": "", "CHANGELOG.md": "", "CONTRIBUTING.md": "", "docs/guide.md": "", "tools/test": "dir=$(mktemp -d)\n",
  "Tests/Datapath/Some.swift": "import Foundation\n",
  "Sources/CLinux/shim.h":
    "// for a while\nstruct a {\n  int b;\n};\n"
    + "static inline int c(int d,\n                    int e) {\n  return d;\n}\n"
    + "__attribute__((target(\"avx2\")))\nstatic inline int f(void) {\n  for (;;) ;\n}\n",
  "Sources/Datapath/Memory/Slot.swift":
    "// a Worker and an actor\nstruct Slot {\n  var text = \"\\(worker(\"Worker\")) Worker print(1)\"\n"
    + "  var raw = #\"\\\" Worker\"#\n}\n",
  "Sources/Datapath/Forwarder/Worker.swift":
    "import CLinux\npublic struct Worker: ~Copyable {\n  var slot: Slot\n  func print(_ x: Int) { log.print(x) }\n}\n",
  "Sources/Control/Start.swift": "import Datapath\nimport Foundation\nfunc f() async { print(1) }\n",
]

/// Each plants one fault: the file's text, and the rule and the line that must report it.
let planted: [(path: String, text: String, rule: String, line: Int)] = [
  ("Sources/Datapath/IO/Up.swift", "\n@preconcurrency import Control\n", "modules import downwards only", 2),
  ("Sources/Control/Up.swift", "import struct vnetr.Run\n", "modules import downwards only", 1),
  (
    "Sources/Datapath/Memory/Up.swift", "/* one\n\"*/ let worker: Worker?\n",
    "layers of the data path mention lower layers only", 2
  ),
  (
    "Sources/Datapath/Frames/Up.swift", "func f(_ w: borrowing Datapath.Worker) {}\n",
    "layers of the data path mention lower layers only", 1
  ),
  ("Sources/Datapath/Loose.swift", "\n", "layers of the data path mention lower layers only", 1),
  ("Sources/SimulatedKernel/A.swift", "import Foundation\n", "nothing banned on the data path", 1),
  ("Sources/Datapath/IO/A.swift", "let a = \"x\"; print(a)\n", "nothing banned on the data path", 1),
  ("Sources/Datapath/IO/A.swift", "func f()\n  async {}\n", "nothing banned on the data path", 2),
  ("Sources/Datapath/IO/A.swift", "let m = Mutex(0)\n", "nothing banned on the data path", 1),
  (
    "Sources/Datapath/IO/A.swift", "let x = \"\"\"\n  \"a\" \\(b)\n  \"\"\"\ntry! g()\n",
    "nothing banned on the data path", 4
  ),
  ("Benchmarks/Package.swift", "// -O" + "unchecked\n", "preconditions stay on", 1),
  ("Sources/CLinux/more.h", "static inline int f(void) {\n  for (;;) ;\n}\n", "C holds shims only", 2),
  (
    "Sources/CLinux/more.h",
    "__attribute__((target(\"a\")))\nstatic inline int f(void) {\n}\n"
      + "static inline int g(void) {\n  for (;;) ;\n}\n", "C holds shims only", 5
  ),
  ("Sources/CLinux/more.h", "static int f(void) {\n}\n", "C holds shims only", 1),
  ("Sources/CLinux/more.h", "int\nf(int a,\n  int b)\n{\n}\n", "C holds shims only", 4),
  ("Sources/CLinux/more.c", "\n", "C holds shims only", 1),
  ("notes/plan.md", "", "the top level holds what it should", 1),
  ("docs/a.md", "\nsee /wo" + "rk/main\n", "no trace of the workplace", 2),
  ("docs/a.md", "As this Ses" + "sion found\n", "no trace of the workplace", 1),
  ("docs/a.md", "fixes iss" + "ue #12\n", "no trace of the workplace", 1),
  ("docs/a.md", "TO" + "DO: more\n", "no unfinished work", 1),
  ("Sources/Control/A.swift", "//" + String(repeating: "é", count: 119) + "\n", "lines fit", 1),
  ("Benchmarks/a.py", "#" + String(repeating: "é", count: 120) + "\n", "lines fit", 1),
]

/// What the rules failed to find, or found where nothing is.
func selfTest() -> [String] {
  func tree(_ texts: [String: String]) -> Tree {
    Tree(files: texts.sorted { $0.key < $1.key }.map { File(path: $0.key, text: $0.value) })
  }
  var faults = rules.flatMap { rule in
    rule.check(tree(faultless)).map { "self-test: '\(rule.name)' reports a faultless project: \($0)" }
  }
  for fault in planted {
    let changed = tree(faultless.merging([fault.path: fault.text]) { $1 })
    for rule in rules {
      let findings = rule.check(changed)
      let place = "\(fault.path):\(fault.line):"
      if rule.name == fault.rule, !findings.contains(where: { $0.hasPrefix(place) }) {
        faults.append("self-test: '\(rule.name)' does not find \(fault.text.debugDescription) in \(fault.path)")
      }
      if rule.name != fault.rule, !findings.isEmpty {
        faults.append("self-test: '\(rule.name)' reports what is no fault of its kind: \(findings)")
      }
    }
  }
  for missing in faultless.keys where !missing.hasPrefix("Sources/") {
    if topLevel(tree(faultless.filter { $0.key != missing })).isEmpty {
      faults.append("self-test: 'the top level holds what it should' does not miss \(missing)")
    }
  }
  return faults
}

// MARK: - Run

func report(_ name: String, _ findings: [String]) -> Bool {
  for finding in findings { print(finding) }
  print(findings.isEmpty ? "passed: \(name)" : "failed: \(name)")
  return findings.isEmpty
}

let everythingHolds: Bool
if CommandLine.arguments.contains("--self-test") {
  everythingHolds = report("each rule finds its planted fault", selfTest())
} else {
  let paths = FileHandle.standardInput.readDataToEndOfFile().split(separator: 0).map {
    String(decoding: $0, as: UTF8.self)
  }
  let tree = Tree(
    files: paths.compactMap { path in
      // A path that is deleted but not yet committed has no text.
      guard let data = FileManager.default.contents(atPath: path) else { return nil }
      return File(path: path, text: data.contains(0) ? "" : String(decoding: data, as: UTF8.self))
    })
  everythingHolds = rules.map { report($0.name, $0.check(tree)) }.allSatisfy { $0 }
}
exit(everythingHolds ? 0 : 1)
