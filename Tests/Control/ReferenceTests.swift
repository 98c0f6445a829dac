import Datapath
import Testing

@testable import Control

@Suite struct ReferenceTests {
  /// A page beside the sources: three folders up from this file.
  private func committed(_ name: String) throws -> String {
    let root = #filePath.split(separator: "/").dropLast(3).map { "/" + $0 }.joined()
    return String(decoding: try readFile(root + "/docs/" + name, bytesMax: 1 << 20), as: UTF8.self)
  }

  @Test func theCommittedReferencesAreWhatTheTablesGive() throws {
    #expect(
      try committed("configuration.md") == Schema.reference,
      "run: vnetr reference configuration > docs/configuration.md")
    #expect(try committed("counters.md") == Counter.reference, "run: vnetr reference counters > docs/counters.md")
  }

  @Test func theCounterReferenceNamesEveryCounterUnderEachOfItsScopes() {
    let rows = Counter.reference.split(separator: "\n").filter { $0.hasPrefix("| `") }
    for counter in Counter.allCases {
      let count = rows.count(where: { $0.hasPrefix("| `\(counter.definition.name)` |") })
      #expect(count == counter.definition.scopes.count, "\(counter)")
    }
  }

  @Test func everyKeyIsDeclaredOnceAndItsDefaultIsAValueThatItTakes() {
    var seen: Set<String> = []
    for definition in Schema.keys {
      #expect(seen.insert("\(definition.section).\(definition.key)").inserted, "\(definition.key) twice")
      if case .value(let value) = definition.defaultValue {
        #expect(definition.objection(to: value) == nil, "\(definition.section).\(definition.key)")
      }
      for value in definition.valuesNotYetSupported {
        #expect(definition.objection(to: value) != nil, "\(definition.section).\(definition.key)")
      }
    }
  }

  @Test func theTuningGuideExplainsEveryTuningKey() throws {
    let guide = try committed("tuning.md")
    for definition in Schema.tuningKeys {
      #expect(guide.contains("**`\(definition.key)`**"), "docs/tuning.md has no \(definition.key)")
    }
  }

  @Test func theReferenceNamesEverySupportedKey() {
    for definition in Schema.keys where definition.isSupported {
      #expect(Schema.reference.contains("| `\(definition.key)` |"), "\(definition.section).\(definition.key)")
    }
  }
}
