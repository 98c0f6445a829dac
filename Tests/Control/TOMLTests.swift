import Testing

@testable import Control

/// A document in one line, to compare: `{a: 1, b: [true, "x"], c: [[{…}]]}`, the last for tables of `[[…]]` headers.
private func flat(_ value: TOML.Value) -> String {
  switch value {
  case .string(let text): return "\"\(text)\""
  case .integer(let number): return "\(number)"
  case .boolean(let flag): return "\(flag)"
  case .float: return "float"
  case .dateOrTime: return "date"
  case .array(let nodes): return "[" + nodes.map { flat($0.value) }.joined(separator: ", ") + "]"
  case .tables(let list): return "[[" + list.tables.map { flat(.table($0.table)) }.joined(separator: ", ") + "]]"
  case .table(let table):
    let entries = table.keys.map { key in "\(key): \(table[key].map { flat($0.value) } ?? "nothing")" }
    return "{" + entries.joined(separator: ", ") + "}"
  }
}

@Suite struct TOMLTests {
  @Test(arguments: [
    ("", "{}"), ("\u{FEFF}a = 1", "{a: 1}"), (" a\t=\t1 # comment\r\n\r\nb=2", "{a: 1, b: 2}"),
    ("'a b' = 1\n\"c\\td\" = 2\n3 = 3\n\"\" = 4", "{a b: 1, c\td: 2, 3: 3, : 4}"),
    ("a.b . c = 1\na.d = 2", "{a: {b: {c: 1}, d: 2}}"),
    ("a = [1, [\"x\", true,], # comment\n ]", "{a: [1, [\"x\", true]]}"),
    ("a = {b = 1, c.d = {}}", "{a: {b: 1, c: {d: {}}}}"),
    ("[a.b]\nx = 1\n[a]\ny = 2", "{a: {b: {x: 1}, y: 2}}"),
    ("[[a]]\nx = 1\n[a.b]\ny = 2\n[[a]]\n[[a.c]]\n[[a.c]]", "{a: [[{x: 1, b: {y: 2}}, {c: [[{}, {}]]}]]}"),
    ("[a]\nb.c = 1\n[a.b.d]\n", "{a: {b: {c: 1, d: {}}}}"), ("[ a . 'b' ]", "{a: {b: {}}}"),
  ])
  func keysAndTablesAreReadAsTheyNest(_ text: String, _ expected: String) throws {
    #expect(flat(.table(try TOML.parse(text))) == expected)
  }

  @Test(arguments: [
    ("0", "0"), ("+1_000", "1000"), ("-17", "-17"), ("0xDEAD_beef", "3735928559"), ("0o17", "15"), ("0b101", "5"),
    ("9223372036854775807", "9223372036854775807"), ("-9223372036854775808", "-9223372036854775808"),
    ("1.5", "float"), ("-1e6", "float"), ("6.02_2e+2_3", "float"), ("0.0", "float"), ("-inf", "float"),
    ("nan", "float"),
    ("1979-05-27", "date"), ("07:32:00.999", "date"), ("1979-05-27T07:32:00Z", "date"),
    ("1979-05-27 07:32:00-07:00", "date"), ("true", "true"), ("false", "false"),
    (#""a\"\\\u00E9\U0001F600\n""#, "\"a\"\\é😀\n\""), (#"'C:\x'"#, #""C:\x""#), ("\"\"", "\"\""), ("''", "\"\""),
    ("\"\"\"\na\r\nb\"\"\"", "\"a\nb\""), ("\"\"\"a \\  \n\n  b\"\"\"", "\"a b\""), ("'''a\\\n'b'''", "\"a\\\n'b\""),
    ("\"\"\"\"\"x\"\"\"\"\"", "\"\"\"x\"\"\""), ("\"\"\"\"\"\"", "\"\""), ("'''''a'''''", "\"''a''\""),
  ])
  func valuesAreReadByTheirSyntax(_ text: String, _ expected: String) throws {
    #expect(flat(.table(try TOML.parse("a = " + text))) == "{a: \(expected)}")
  }

  @Test(arguments: [
    ("a", 1), ("a =", 3), ("= 1", 0), ("a = 1 2", 6), ("a = 1\na = 2", 6), ("a.b = 1\na.b.c = 2", 10),
    ("[a]\n[a]", 5), ("[a]\n[[a]]", 6), ("[[a]]\n[a]", 7), ("a = []\n[[a]]", 9), ("a = {}\n[a.b]", 8),
    ("a = {b = 1}\na.c = 2", 12), ("[a.b]\n[a]\nb.c = 1", 10), ("a.b = 1\n[a]", 9), ("a = {b = 1,}", 11),
    ("a = {b = 1\n}", 10), ("a = [1", 6), ("a = [1 2]", 7), ("a = [,]", 5), ("a = [}", 5), ("[.a]", 1), ("[é]", 1),
    ("[", 1), ("[[", 2), ("[a", 2), ("[[a]", 4), ("[ [a]]", 2), ("[a]b", 3), ("[]", 1), ("\"\"\"a\"\"\" = 1", 0),
    ("a = 01", 4), ("a = 1__0", 4), ("a = _1", 4), ("a = 0x", 4), ("a = +0x1", 4), ("a = 1.", 4), ("a = .5", 4),
    ("a = 1e", 4), ("a = 9223372036854775808", 4), ("a = 1979-5-27", 4), ("a = 07:32", 4), ("a = True", 4),
    ("a = bare", 4), ("a = \"x", 4), ("a = 'x\n'", 4), ("a = \"\"\"x", 4), ("a = \"\\x\"", 5), ("a = \"\\uD800\"", 5),
    ("a = \"\\u0000\"", 5), ("a = \"\\u12\"", 5), ("a = \"\\", 6), ("a = \"\u{1}\"", 5), ("# \u{0}", 2),
    ("a = 1\rb = 2", 5),
    ("a\u{0}", 1),
  ])
  func aSyntaxErrorIsFoundWhereItIs(_ text: String, _ offset: Int) {
    do {
      let table = try TOML.parse(text)
      Issue.record("it was read as \(flat(.table(table)))")
    } catch {
      #expect(error.offset == offset, "\(error)")
    }
  }

  @Test func nestingIsBoundedSoThatNoFileExhaustsTheStack() {
    for text in [
      "a = " + String(repeating: "[", count: 100_000), "a = " + String(repeating: "{a = ", count: 100_000),
      "a" + String(repeating: ".a", count: 100_000) + " = 1", "[a" + String(repeating: ".a", count: 100_000) + "]",
    ] {
      #expect(throws: TOML.SyntaxError.self) { try TOML.parse(text) }
    }
  }

  @Test func linesAndColumnsCountFromOneAndColumnsInCharacters() {
    let lines = TOML.LineMap("é = 1\r\n\n  b")
    #expect(lines.position(of: 0) == .init(line: 1, column: 1))
    #expect(lines.position(of: 3) == .init(line: 1, column: 3))
    #expect(lines.position(of: 8) == .init(line: 2, column: 1))
    #expect(lines.position(of: 11) == .init(line: 3, column: 3))
    #expect(lines.position(of: 12) == .init(line: 3, column: 4))
  }
}
