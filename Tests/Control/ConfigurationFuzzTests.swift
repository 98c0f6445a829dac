import TestSupport
import Testing

@testable import Control

@Suite struct ConfigurationFuzzTests {
  /// Texts that matter to TOML or to a key.
  private static let morsels = [
    "[", "]", "[[", "]]", "=", "\"", "'", "\"\"\"", "{", "}", ",", ".", "#", "\n", "\\u0000", "\u{0}", "\\", "-1",
    "9223372036854775807", "9223372036854775808", "1e400", "nan", "true", "1979-05-27T07:32:00Z", "07:32:00", "é",
    "\u{FEFF}", "[[port]]", "[port]", "[[domain]]", "name = \"x\"", "[[route]]", "domains = [[]]", "vni = 1",
    "remote = \"[::]:0\"", "port.port.port = 1", "[domain.x]", "\"\" = 1", "a.b = {c = [1, {}]}", "cpus = \"\"",
    "address = []", "address = [\"\", \"1.1.1.1\"]", "without = [\"\"]",
    "[[passthrough]]", "a = \"vm1\"", "to = \"port:\"", "from = \"link:\"", "source = \"not-\"", "cpus = \"rx=\"",
    "cpus = \"rx=0 route=9 tx=\"", "domains = [\"blue\"]", "domain = \"blue\"", String(repeating: "[", count: 300),
    String(repeating: "x", count: 1000),
  ]

  @Test(arguments: [UInt64](1...8))
  func noMutationOfAConfigurationCrashesOrGivesAnErrorThatIsNotOneLine(_ seed: UInt64) {
    var generator = SeededRandom(seed: seed)
    for _ in 0..<400 {
      var text = Array(Bool.random(using: &generator) ? sound : soundRules)
      for _ in 0..<Int.random(in: 1...6, using: &generator) {
        let start = Int.random(in: 0...text.count, using: &generator)
        let end = min(text.count, start + Int.random(in: 0...12, using: &generator))
        let morsel = Self.morsels.randomElement(using: &generator) ?? ""
        switch Int.random(in: 0..<4, using: &generator) {
        case 0: text.removeSubrange(start..<end)
        case 1: text.insert(contentsOf: morsel, at: start)
        case 2: text.replaceSubrange(start..<end, with: morsel)
        default:
          text.insert(contentsOf: Array(text[start..<end]), at: Int.random(in: 0...text.count, using: &generator))
        }
      }
      for line in errors(String(text)) {
        #expect(line.hasPrefix("f.toml") && line.contains("; ") && !line.contains("\n"), "seed \(seed): \(line)")
      }
    }
  }

  @Test func everyPrefixOfAConfigurationIsReadWithoutACrash() {
    for text in [sound, soundRules] { for end in text.indices { _ = errors(String(text[..<end])) } }
  }
}
