import Testing

@testable import Control

@Suite struct ReferenceTests {
  /// The file beside the sources: three folders up from this one.
  private static let committedPath =
    #filePath.split(separator: "/").dropLast(3).map { "/" + $0 }.joined() + "/docs/configuration.md"

  @Test func theCommittedReferenceIsWhatTheTableOfKeysGives() throws {
    let committed = String(decoding: try readFile(Self.committedPath, bytesMax: 1 << 20), as: UTF8.self)
    #expect(committed == Schema.reference, "run: vnetr reference configuration > docs/configuration.md")
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

  @Test func theReferenceNamesEverySupportedKey() {
    for definition in Schema.keys where definition.isSupported {
      #expect(Schema.reference.contains("| `\(definition.key)` |"), "\(definition.section).\(definition.key)")
    }
  }
}
