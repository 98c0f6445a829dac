/// A parser of TOML 1.0.0 (https://toml.io/en/v1.0.0) that knows where every key stands.
///
/// It is our own, because a configuration is input that must not crash or leak: toml++ 3.4, which TOMLKit 0.6.0 wraps,
/// aborts the process on such files as `[.a]` and `a = [}`, and TOMLKit frees nothing that it parsed and knows no place
/// of a key. Dates, times and floating-point numbers are recognized but not evaluated, for no key takes one.
enum TOML {
  /// A value and where its key (or, within an array, the value itself) starts, in bytes from the start of the text.
  struct Node {
    var value: Value
    var offset: Int
  }

  enum Value {
    case string(String)
    case integer(Int)
    case boolean(Bool)
    case float
    case dateOrTime
    case array([Node])
    case table(Table)
    /// Tables that `[[…]]` headers opened: more may come until the text ends.
    case tables(TableList)
  }

  /// A class, so that adding one to many copies none.
  final class TableList {
    fileprivate(set) var tables: [(table: Table, offset: Int)] = []
  }

  /// Keys and values in the order of the text.
  final class Table {
    /// How a table came to be, which decides how it may be added to.
    enum Origin {
      /// Named on the way to another by a header: a header of its own may follow.
      case path
      case header
      case dottedKey
      /// Nothing can be added.
      case inline
    }

    fileprivate(set) var keys: [String] = []
    private var nodes: [String: Node] = [:]
    fileprivate var origin: Origin

    fileprivate init(_ origin: Origin) {
      self.origin = origin
    }

    fileprivate(set) subscript(key: String) -> Node? {
      get { nodes[key] }
      set {
        if nodes[key] == nil { keys.append(key) }
        nodes[key] = newValue
      }
    }
  }

  struct SyntaxError: Error, Equatable {
    var offset: Int
    var problem: String
    var remedy: String
  }

  /// How deep tables and arrays may nest: a configuration needs 3, and a hostile one must not exhaust the stack.
  static let depthMax = 32

  static func parse(_ text: String) throws(SyntaxError) -> Table {
    var parser = TOMLParser(text)
    return try parser.parseDocument()
  }

  /// Line and column, both from 1 and the column in characters (Unicode scalars), of places in a text.
  struct LineMap {
    private let bytes: [UInt8]
    private let lineStarts: [Int]

    init(_ text: String) {
      let bytes = Array(text.utf8)
      self.bytes = bytes
      lineStarts = [0] + bytes.indices.filter { bytes[$0] == UInt8(ascii: "\n") }.map { $0 + 1 }
    }

    func position(of offset: Int) -> ConfigurationError.Position {
      // The number of lines that start at or before the offset, by halving.
      var low = 1
      var high = lineStarts.count
      while low < high {
        let middle = (low + high + 1) / 2
        if lineStarts[middle - 1] <= offset { low = middle } else { high = middle - 1 }
      }
      // Bytes that continue a UTF-8 sequence start no character.
      let characters = bytes[lineStarts[low - 1]..<min(offset, bytes.count)].count(where: { $0 & 0xC0 != 0x80 })
      return .init(line: low, column: characters + 1)
    }
  }
}

/// Reads a text from its start to its end or its first error.
private struct TOMLParser {
  private let bytes: [UInt8]
  private var offset = 0
  private let root = TOML.Table(.header)

  init(_ text: String) {
    bytes = Array(text.utf8)
    // A byte order mark is no character of the text.
    if bytes.starts(with: [0xEF, 0xBB, 0xBF]) { offset = 3 }
  }

  mutating func parseDocument() throws(TOML.SyntaxError) -> TOML.Table {
    var section = root
    while true {
      try skipBlankLines()
      guard let next = peek() else { return root }
      if next == UInt8(ascii: "[") {
        section = try parseHeader()
      } else {
        try parseKeyAndValue(into: section, depth: 1)
      }
      skipSpaces()
      try skipComment()
      guard peek() == nil || skipNewline() else { throw unexpected("expected the end of the line") }
    }
  }

  // MARK: Headers

  /// `[a.b]` or `[[a.b]]`; returns the table that it opens.
  private mutating func parseHeader() throws(TOML.SyntaxError) -> TOML.Table {
    let start = offset
    offset += 1
    let isArray = skip("[")
    skipSpaces()
    let path = try parseKey()
    skipSpaces()
    guard skip("]"), !isArray || skip("]") else {
      throw unexpected("expected \(isArray ? "]]" : "]")", "open a section with [name] or [[name]]")
    }
    var table = root
    for part in path.dropLast() { table = try enter(part, of: table, from: start) }
    let last = path[path.count - 1]
    let existing = table[last.name]
    if isArray {
      let element = TOML.Table(.header)
      if existing == nil { table[last.name] = TOML.Node(value: .tables(TOML.TableList()), offset: start) }
      guard case .tables(let list)? = table[last.name]?.value else { throw taken(last) }
      list.tables.append((element, start))
      return element
    }
    guard let existing else {
      let opened = TOML.Table(.header)
      table[last.name] = TOML.Node(value: .table(opened), offset: start)
      return opened
    }
    guard case .table(let opened) = existing.value, opened.origin == .path else { throw taken(last) }
    opened.origin = .header
    return opened
  }

  /// The table that a header goes through on its way.
  private func enter(
    _ part: KeyPart, of table: TOML.Table, from start: Int
  ) throws(TOML.SyntaxError) -> TOML.Table {
    switch table[part.name]?.value {
    case nil:
      let entered = TOML.Table(.path)
      table[part.name] = TOML.Node(value: .table(entered), offset: start)
      return entered
    case .table(let entered) where entered.origin != .inline:
      return entered
    case .tables(let list):
      guard let entered = list.tables.last?.table else { throw taken(part) }
      return entered
    default:
      throw taken(part)
    }
  }

  // MARK: Keys

  private struct KeyPart {
    var name: String
    var offset: Int
  }

  /// `a`, `"a"`, `'a'`, or several with dots between them; at least one.
  private mutating func parseKey() throws(TOML.SyntaxError) -> [KeyPart] {
    var parts: [KeyPart] = []
    repeat {
      skipSpaces()
      let start = offset
      let name: String
      switch peek() {
      case UInt8(ascii: "\""), UInt8(ascii: "'"):
        if isNext("\"\"\"") || isNext("'''") { throw unexpected("expected a key of one line") }
        name = try parseString()
      default:
        while let byte = peek(), isBareKeyByte(byte) { offset += 1 }
        guard offset > start else { throw unexpected("expected a key", "write letters, digits, _ and -, or quote it") }
        name = String(decoding: bytes[start..<offset], as: UTF8.self)
      }
      parts.append(KeyPart(name: name, offset: start))
      guard parts.count < TOML.depthMax else { throw tooDeep() }
      skipSpaces()
    } while skip(".")
    return parts
  }

  private func isBareKeyByte(_ byte: UInt8) -> Bool {
    isLetterOrDigit(byte) || byte == UInt8(ascii: "_") || byte == UInt8(ascii: "-")
  }

  private mutating func parseKeyAndValue(into section: TOML.Table, depth: Int) throws(TOML.SyntaxError) {
    let path = try parseKey()
    guard skip("=") else { throw unexpected("expected =", "write key = value") }
    skipSpaces()
    var table = section
    for part in path.dropLast() {
      if let existing = table[part.name] {
        guard case .table(let entered) = existing.value, entered.origin == .dottedKey else { throw taken(part) }
        table = entered
      } else {
        let entered = TOML.Table(.dottedKey)
        table[part.name] = TOML.Node(value: .table(entered), offset: part.offset)
        table = entered
      }
    }
    let last = path[path.count - 1]
    guard table[last.name] == nil else { throw taken(last) }
    table[last.name] = TOML.Node(value: try parseValue(depth: depth + path.count), offset: last.offset)
  }

  // MARK: Values

  private mutating func parseValue(depth: Int) throws(TOML.SyntaxError) -> TOML.Value {
    guard depth <= TOML.depthMax else { throw tooDeep() }
    switch peek() {
    case UInt8(ascii: "\""), UInt8(ascii: "'"):
      return .string(try isNext("\"\"\"") || isNext("'''") ? parseMultiLineString() : parseString())
    case UInt8(ascii: "["):
      return try parseArray(depth: depth)
    case UInt8(ascii: "{"):
      return try parseInlineTable(depth: depth)
    default:
      return try parseWord()
    }
  }

  private mutating func parseArray(depth: Int) throws(TOML.SyntaxError) -> TOML.Value {
    offset += 1
    var elements: [TOML.Node] = []
    while true {
      try skipBlankLines()
      if skip("]") { return .array(elements) }
      let start = offset
      elements.append(TOML.Node(value: try parseValue(depth: depth + 1), offset: start))
      try skipBlankLines()
      guard peek() == UInt8(ascii: "]") || skip(",") else {
        throw unexpected("expected , or ]", "close the array with ]")
      }
    }
  }

  private mutating func parseInlineTable(depth: Int) throws(TOML.SyntaxError) -> TOML.Value {
    offset += 1
    let table = TOML.Table(.inline)
    skipSpaces()
    if skip("}") { return .table(table) }
    while true {
      skipSpaces()
      try parseKeyAndValue(into: table, depth: depth)
      skipSpaces()
      if skip("}") { break }
      guard skip(",") else { throw unexpected("expected , or }", "close the inline table with } on the same line") }
    }
    close(table)
    return .table(table)
  }

  /// Nothing can be added to a closed inline table, nor to the tables that its dotted keys made.
  private func close(_ table: TOML.Table) {
    table.origin = .inline
    for key in table.keys {
      if case .table(let inner)? = table[key]?.value, inner.origin == .dottedKey { close(inner) }
    }
  }

  /// A boolean, a number, a date or a time: what has no delimiters.
  private mutating func parseWord() throws(TOML.SyntaxError) -> TOML.Value {
    let start = offset
    skipWord()
    // RFC 3339 lets a space stand between date and time.
    if Self.isDate(bytes[start..<offset]), peek() == 0x20, offset + 3 < bytes.count, bytes[offset + 3] == 0x3A {
      offset += 1
      skipWord()
    }
    let word = bytes[start..<offset]
    let text = String(decoding: word, as: UTF8.self)
    if text == "true" { return .boolean(true) }
    if text == "false" { return .boolean(false) }
    if let integer = try Self.integer(text, at: start) { return .integer(integer) }
    if Self.isFloat(word) { return .float }
    if Self.isDateOrTime(word) { return .dateOrTime }
    offset = start
    if text.isEmpty { throw unexpected("expected a value") }
    throw TOML.SyntaxError(
      offset: start, problem: "\"\(text.printable)\" is no value", remedy: "put quotes around it if it is text")
  }

  private mutating func skipWord() {
    while let byte = peek(), isBareKeyByte(byte) || "+.:".utf8.contains(byte) { offset += 1 }
  }

  /// nil where the text is no integer at all.
  private static func integer(_ text: String, at start: Int) throws(TOML.SyntaxError) -> Int? {
    let prefixes = ["0x": 16, "0o": 8, "0b": 2]
    let radix = prefixes[String(text.prefix(2))] ?? 10
    let isSigned = radix == 10 && (text.hasPrefix("+") || text.hasPrefix("-"))
    let digits = radix == 10 ? text.dropFirst(isSigned ? 1 : 0) : text.dropFirst(2)
    let groups = digits.split(separator: "_", omittingEmptySubsequences: false)
    let isWellFormed = groups.allSatisfy { group in
      !group.isEmpty && group.allSatisfy { $0.isASCII && $0.hexDigitValue.map { $0 < radix } == true }
    }
    guard isWellFormed, radix != 10 || digits == "0" || !digits.hasPrefix("0") else { return nil }
    guard let integer = Int((isSigned ? text.prefix(1) : "") + groups.joined(), radix: radix) else {
      throw TOML.SyntaxError(offset: start, problem: "\(text.printable) is too large", remedy: "use at most \(Int.max)")
    }
    return integer
  }

  /// `[+-]DIGITS[.DIGITS][e[+-]DIGITS]` with a fraction or an exponent, or `[+-]inf` or `[+-]nan`.
  private static func isFloat(_ word: ArraySlice<UInt8>) -> Bool {
    func isSign(_ byte: UInt8?) -> Bool { byte == UInt8(ascii: "+") || byte == UInt8(ascii: "-") }
    var rest = isSign(word.first) ? word.dropFirst() : word
    if rest.elementsEqual("inf".utf8) || rest.elementsEqual("nan".utf8) { return true }
    func skipDigits() -> Bool {
      let digits = rest.prefix { isDigit($0) || $0 == UInt8(ascii: "_") }
      rest = rest.dropFirst(digits.count)
      return digits.split(separator: UInt8(ascii: "_"), omittingEmptySubsequences: false).allSatisfy { !$0.isEmpty }
    }
    let hasLeadingZero =
      rest.first == UInt8(ascii: "0") && rest.dropFirst().first.map { isDigit($0) || $0 == 0x5F } == true
    guard skipDigits(), !hasLeadingZero, !rest.isEmpty else { return false }
    if rest.first == UInt8(ascii: ".") {
      rest = rest.dropFirst()
      guard skipDigits() else { return false }
    }
    if rest.first == UInt8(ascii: "e") || rest.first == UInt8(ascii: "E") {
      rest = rest.dropFirst()
      if isSign(rest.first) { rest = rest.dropFirst() }
      guard skipDigits() else { return false }
    }
    return rest.isEmpty
  }

  /// Whether the bytes have a shape in which `0` stands for a digit and other bytes for themselves.
  private static func has(_ shape: String, _ word: ArraySlice<UInt8>) -> Bool {
    word.count == shape.utf8.count
      && zip(word, shape.utf8).allSatisfy { byte, model in model == UInt8(ascii: "0") ? isDigit(byte) : byte == model }
  }

  private static func isDate(_ word: ArraySlice<UInt8>) -> Bool { has("0000-00-00", word) }

  /// The shapes of RFC 3339: a date, a time, or both with or without an offset.
  private static func isDateOrTime(_ word: ArraySlice<UInt8>) -> Bool {
    var rest = word
    let hasDate = isDate(rest.prefix(10))
    if hasDate {
      if rest.count == 10 { return true }
      guard let separator = rest.dropFirst(10).first, "Tt ".utf8.contains(separator) else { return false }
      rest = rest.dropFirst(11)
    }
    guard has("00:00:00", rest.prefix(8)) else { return false }
    rest = rest.dropFirst(8)
    if rest.first == UInt8(ascii: ".") {
      let fraction = rest.dropFirst().prefix(while: isDigit)
      guard !fraction.isEmpty else { return false }
      rest = rest.dropFirst(1 + fraction.count)
    }
    if rest.isEmpty { return true }
    return hasDate && (has("Z", rest) || has("z", rest) || has("+00:00", rest) || has("-00:00", rest))
  }

  private static func isDigit(_ byte: UInt8) -> Bool { byte >= 0x30 && byte <= 0x39 }

  // MARK: Strings

  /// A basic (`"`) or literal (`'`) string of one line.
  private mutating func parseString() throws(TOML.SyntaxError) -> String {
    let start = offset
    let quote = bytes[offset]
    let isBasic = quote == UInt8(ascii: "\"")
    offset += 1
    var content: [UInt8] = []
    while let byte = peek() {
      if byte == quote {
        offset += 1
        return String(decoding: content, as: UTF8.self)
      }
      if isBasic && byte == UInt8(ascii: "\\") {
        content += try parseEscape()
        continue
      }
      if byte == 0x0A || byte == 0x0D { break }
      content.append(try textByte(byte))
      offset += 1
    }
    throw TOML.SyntaxError(
      offset: start, problem: "the string does not end", remedy: "close it with \(Character(Unicode.Scalar(quote)))")
  }

  /// A basic (`"""`) or literal (`'''`) string of several lines.
  private mutating func parseMultiLineString() throws(TOML.SyntaxError) -> String {
    let start = offset
    let quote = bytes[offset]
    let isBasic = quote == UInt8(ascii: "\"")
    let delimiter = String(repeating: Character(Unicode.Scalar(quote)), count: 3)
    offset += 3
    // A newline right after the opening is no part of the text.
    _ = skipNewline()
    var content: [UInt8] = []
    while let byte = peek() {
      if isNext(delimiter) {
        offset += 3
        // Up to two quotes may stand right before the closing ones.
        for _ in 0..<2 where peek() == quote {
          content.append(quote)
          offset += 1
        }
        return String(decoding: content, as: UTF8.self)
      }
      if isBasic && byte == UInt8(ascii: "\\") {
        if try !skipLineEndingBackslash() { content += try parseEscape() }
        continue
      }
      if skipNewline() {
        content.append(0x0A)
        continue
      }
      content.append(try textByte(byte))
      offset += 1
    }
    throw TOML.SyntaxError(offset: start, problem: "the string does not end", remedy: "close it with \(delimiter)")
  }

  /// A backslash at the end of a line takes the newline and all blanks after it away.
  private mutating func skipLineEndingBackslash() throws(TOML.SyntaxError) -> Bool {
    let start = offset
    offset += 1
    skipSpaces()
    guard skipNewline() else {
      offset = start
      return false
    }
    repeat { skipSpaces() } while skipNewline()
    return true
  }

  private mutating func parseEscape() throws(TOML.SyntaxError) -> [UInt8] {
    let start = offset
    offset += 1
    guard let letter = peek() else { throw unexpected("expected an escape sequence") }
    offset += 1
    switch letter {
    case UInt8(ascii: "b"): return [0x08]
    case UInt8(ascii: "t"): return [0x09]
    case UInt8(ascii: "n"): return [0x0A]
    case UInt8(ascii: "f"): return [0x0C]
    case UInt8(ascii: "r"): return [0x0D]
    case UInt8(ascii: "\""), UInt8(ascii: "\\"): return [letter]
    case UInt8(ascii: "u"), UInt8(ascii: "U"):
      let count = letter == UInt8(ascii: "u") ? 4 : 8
      let digits = bytes[offset..<min(offset + count, bytes.count)]
      offset += digits.count
      // U+0000 is TOML, but would cut the text off where it is handed to the system.
      if digits.count == count, digits.allSatisfy({ Character(Unicode.Scalar($0)).isHexDigit }),
        let number = UInt32(String(decoding: digits, as: UTF8.self), radix: 16), number != 0,
        let scalar = Unicode.Scalar(number)
      {
        return Array(String(Character(scalar)).utf8)
      }
    default: break
    }
    throw TOML.SyntaxError(
      offset: start, problem: "this escape sequence is no character",
      remedy: "use \\b \\t \\n \\f \\r \\\" \\\\ \\uXXXX or \\UXXXXXXXX, or a literal string in single quotes")
  }

  /// A byte of text or of a comment: no control character but the tab.
  private func textByte(_ byte: UInt8) throws(TOML.SyntaxError) -> UInt8 {
    if (byte < 0x20 && byte != 0x09) || byte == 0x7F { throw unexpected("expected text") }
    return byte
  }

  // MARK: Between the values

  private func peek() -> UInt8? { offset < bytes.count ? bytes[offset] : nil }

  private func isNext(_ text: String) -> Bool { bytes[offset...].starts(with: text.utf8) }

  private mutating func skip(_ text: String) -> Bool {
    guard isNext(text) else { return false }
    offset += text.utf8.count
    return true
  }

  private mutating func skipSpaces() {
    while let byte = peek(), byte == 0x20 || byte == 0x09 { offset += 1 }
  }

  private mutating func skipNewline() -> Bool { skip("\n") || skip("\r\n") }

  private mutating func skipComment() throws(TOML.SyntaxError) {
    guard peek() == UInt8(ascii: "#") else { return }
    while let byte = peek(), byte != 0x0A, !isNext("\r\n") {
      _ = try textByte(byte)
      offset += 1
    }
  }

  private mutating func skipBlankLines() throws(TOML.SyntaxError) {
    repeat {
      skipSpaces()
      try skipComment()
    } while skipNewline()
  }

  // MARK: Errors

  private func unexpected(_ expected: String, _ remedy: String = "see https://toml.io") -> TOML.SyntaxError {
    let rest = String(decoding: bytes[offset..<min(offset + 4, bytes.count)], as: UTF8.self)
    let found =
      switch peek() {
      case nil: "the end of the file"
      case 0x0A, 0x0D: "the end of the line"
      default: "\"\(String(rest.unicodeScalars.prefix(1)).printable)\""
      }
    return TOML.SyntaxError(offset: offset, problem: "\(expected), found \(found)", remedy: remedy)
  }

  private func taken(_ part: KeyPart) -> TOML.SyntaxError {
    TOML.SyntaxError(
      offset: part.offset, problem: "\"\(part.name.printable)\" is set or opened already",
      remedy: "set each key and open each [section] once; [[section]] may come again")
  }

  private func tooDeep() -> TOML.SyntaxError {
    TOML.SyntaxError(
      offset: offset, problem: "it is nested more than \(TOML.depthMax) deep", remedy: "take the nesting out")
  }
}
