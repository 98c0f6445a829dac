/// Where a value was written: in a file under a key path, or on the command line as a flag.
struct Place: Equatable {
  /// nil: the command line.
  var file: String?
  var keyPath: String
  /// Line and column; nil on the command line, and for what is not there.
  var position: ConfigurationError.Position?

  /// An element of the array that stands here.
  func element(_ index: Int) -> Place {
    Place(file: file, keyPath: "\(keyPath)[\(index)]", position: position)
  }
}

/// One section as it was written: values of the right type and range, and where each stands.
///
/// A key is in one of three states: it has a value (its own or the default), it is absent, or it is invalid. An invalid
/// key has had its error reported: later checks pass over it.
struct Fields {
  let section: Schema.Section
  /// Where the section stands: `port[1]`, or a flag.
  let place: Place
  private var values: [String: Schema.Value] = [:]
  private var places: [String: Place] = [:]
  private var invalid: Set<String> = []

  /// A section in which nothing is set: every key has its default, if it has one.
  init(_ section: Schema.Section, at place: Place) {
    self.section = section
    self.place = place
    for definition in Schema.keys(of: section) {
      if case .value(let value) = definition.defaultValue { values[definition.key] = value }
    }
  }

  mutating func set(_ key: String, to value: Schema.Value, at place: Place? = nil) {
    values[key] = value
    places[key] = place
    invalid.remove(key)
  }

  mutating func setInvalid(_ key: String) {
    values[key] = nil
    invalid.insert(key)
  }

  func isInvalid(_ key: String) -> Bool { invalid.contains(key) }

  /// Whether the key was left out and has no default of its own.
  func isAbsent(_ key: String) -> Bool { values[key] == nil && !invalid.contains(key) }

  /// Whether the key itself was written, rather than left to its default.
  func isWritten(_ key: String) -> Bool { places[key] != nil }

  /// Where a key stands; where it is not set, its section.
  func place(of key: String) -> Place {
    places[key] ?? Place(file: place.file, keyPath: "\(place.keyPath).\(key)", position: place.position)
  }

  func value(_ key: String) -> Schema.Value? { values[key] }

  func string(_ key: String) -> String? {
    guard case .string(let text)? = values[key] else { return nil }
    return text
  }

  func integer(_ key: String) -> Int? {
    guard case .integer(let number)? = values[key] else { return nil }
    return number
  }

  func boolean(_ key: String) -> Bool? {
    guard case .boolean(let flag)? = values[key] else { return nil }
    return flag
  }

  func strings(_ key: String) -> [String]? {
    guard case .strings(let texts)? = values[key] else { return nil }
    return texts
  }
}

/// Reads sections by the schema and keeps every error that it finds.
struct Reader {
  private(set) var errors: [ConfigurationError] = []
  /// What is allowed and probably not meant.
  private(set) var warnings: [ConfigurationError] = []

  mutating func report(_ place: Place, _ problem: String, _ remedy: String) {
    errors.append(Self.error(place, problem, remedy))
  }

  mutating func warn(_ place: Place, _ problem: String, _ remedy: String) {
    warnings.append(Self.error(place, problem, remedy))
  }

  private static func error(_ place: Place, _ problem: String, _ remedy: String) -> ConfigurationError {
    ConfigurationError(
      file: place.file, position: place.position, keyPath: place.keyPath, problem: problem, remedy: remedy)
  }

  /// Parses TOML and reads its sections in the order of the schema. Sections that may come once and are left out are
  /// read as empty ones. After a syntax error there are no sections, for nothing is known of the rest of the file.
  mutating func read(_ text: String, file: String) -> [Fields] {
    let lines = TOML.LineMap(text)
    let table: TOML.Table
    do {
      table = try TOML.parse(text)
    } catch {
      let place = Place(file: file, keyPath: "", position: lines.position(of: error.offset))
      report(place, error.problem, error.remedy)
      return []
    }
    let document = Document(file: file, lines: lines)
    for name in table.keys where Schema.Section(rawValue: name) == nil {
      let owners = Schema.keys.filter { $0.key == name && $0.isSupported }.map(\.section.header)
      report(
        document.place(name.printable, table[name]), "there is no such section",
        owners.isEmpty
          ? remedy(for: name, in: Schema.Section.allCases.map(\.rawValue), called: "sections")
          : "it is a key of \(owners.joined(separator: " and "))")
    }
    return Schema.Section.allCases.flatMap { read($0, of: table[$0.rawValue], document) }
  }

  /// What is known of the file while it is read.
  private struct Document {
    var file: String
    var lines: TOML.LineMap

    func place(_ keyPath: String, _ node: TOML.Node?) -> Place {
      place(keyPath, offset: node?.offset)
    }

    func place(_ keyPath: String, offset: Int?) -> Place {
      Place(file: file, keyPath: keyPath, position: offset.map(lines.position))
    }
  }

  /// Reads one section of any number of tables.
  private mutating func read(_ section: Schema.Section, of node: TOML.Node?, _ document: Document) -> [Fields] {
    let place = document.place(section.rawValue, node)
    guard let node else { return section.isArray ? [] : [Fields(section, at: place)] }
    if section.isArray {
      guard let tables = node.value.tables else {
        report(place, "it is \(node.value.described)", "open each one with \(section.header)")
        return []
      }
      return tables.enumerated().map { index, element in
        read(
          section, element.table, at: document.place("\(section.rawValue)[\(index)]", offset: element.offset), document)
      }
    }
    guard case .table(let table) = node.value else {
      report(place, "it is \(node.value.described)", "open it, once, with \(section.header)")
      return [Fields(section, at: place)]
    }
    return [read(section, table, at: place, document)]
  }

  private mutating func read(
    _ section: Schema.Section, _ table: TOML.Table, at place: Place, _ document: Document
  ) -> Fields {
    var fields = Fields(section, at: place)
    let definitions = Schema.keys(of: section)
    for key in table.keys where !definitions.contains(where: { $0.key == key }) {
      let owners = Schema.keys.filter { $0.key == key && $0.isSupported }.map(\.section.header)
      let known = definitions.filter(\.isSupported).map(\.key)
      let meant = nearest(to: key, in: known)
      report(
        document.place("\(place.keyPath).\(key.printable)", table[key]),
        "there is no such key in \(section.header)",
        meant == nil && !owners.isEmpty
          ? "it is a key of \(owners.joined(separator: " and "))"
          : remedy(for: key, in: known, called: "keys"))
      // One mistake, one error: the key that was meant is not missing.
      if let meant, table[meant] == nil { fields.setInvalid(meant) }
    }
    for definition in definitions {
      guard let node = table[definition.key] else {
        if definition.defaultValue == .required && !fields.isInvalid(definition.key) {
          report(fields.place(of: definition.key), "it is missing", "set it: \(definition.help)")
          fields.setInvalid(definition.key)
        }
        continue
      }
      let keyPlace = document.place("\(place.keyPath).\(definition.key)", node)
      guard let value = node.value.schemaValue else {
        report(keyPlace, "it is \(node.value.described)", "write \(definition.expectation)")
        fields.setInvalid(definition.key)
        continue
      }
      set(definition, of: &fields, to: value, at: keyPlace)
    }
    return fields
  }

  /// Sets a key that was given as a flag: its text is read by the key's kind, and its place is the flag.
  mutating func set(_ definition: Schema.KeyDefinition, of fields: inout Fields, toFlagText text: String) {
    let value: Schema.Value
    switch definition.kind {
    case .integer:
      guard let number = Int(text) else {
        report(
          Place(file: nil, keyPath: definition.flag), "\"\(text)\" is no integer", "give \(definition.expectation)")
        fields.setInvalid(definition.key)
        return
      }
      value = .integer(number)
    case .boolean:
      guard let flag = Bool(text) else {
        report(
          Place(file: nil, keyPath: definition.flag), "\"\(text)\" is no boolean", "give \(definition.expectation)")
        fields.setInvalid(definition.key)
        return
      }
      value = .boolean(flag)
    case .string, .choice:
      value = .string(text)
    case .strings, .stringOrStrings, .choices:
      value = .strings(
        text.isEmpty ? [] : text.split(separator: ",", omittingEmptySubsequences: false).map(String.init))
    }
    set(definition, of: &fields, to: value, at: Place(file: nil, keyPath: definition.flag))
  }

  /// Sets a key if its value is of the right type, range and among the right words; reports an error otherwise.
  private mutating func set(
    _ definition: Schema.KeyDefinition, of fields: inout Fields, to value: Schema.Value, at place: Place
  ) {
    guard definition.isSupported else {
      report(place, "it is not supported yet by this version", "leave it out")
      fields.setInvalid(definition.key)
      return
    }
    if let (problem, remedy) = definition.objection(to: value) {
      report(place, problem, remedy)
      fields.setInvalid(definition.key)
      return
    }
    if case (.stringOrStrings, .string(let text)) = (definition.kind, value) {
      fields.set(definition.key, to: .strings([text]), at: place)
    } else {
      fields.set(definition.key, to: value, at: place)
    }
  }
}

extension TOML.Value {
  /// The tables of an array that holds nothing else, and where each starts; nil for anything else.
  fileprivate var tables: [(table: TOML.Table, offset: Int)]? {
    switch self {
    case .tables(let list): return list.tables
    case .array(let elements):
      let tables = elements.compactMap { element in
        if case .table(let table) = element.value { (table: table, offset: element.offset) } else { nil }
      }
      return tables.count == elements.count ? tables : nil
    default: return nil
    }
  }

  /// The value as a key can have it; nil where no key can.
  fileprivate var schemaValue: Schema.Value? {
    switch self {
    case .string(let text): return .string(text)
    case .integer(let number): return .integer(number)
    case .boolean(let flag): return .boolean(flag)
    case .array(let elements):
      let texts = elements.compactMap { if case .string(let text) = $0.value { text } else { nil } }
      return texts.count == elements.count ? .strings(texts) : nil
    case .float, .dateOrTime, .table, .tables: return nil
    }
  }

  fileprivate var described: String {
    switch self {
    case .string: "a string"
    case .integer: "an integer"
    case .boolean: "a boolean"
    case .float: "a floating-point number"
    case .dateOrTime: "a date or time"
    case .array: "an array"
    case .table: "a table"
    case .tables: "several tables"
    }
  }
}

extension Schema.KeyDefinition {
  /// What may be written for the key, in words.
  var expectation: String {
    switch kind {
    case .string: "a string"
    case .boolean: "true or false"
    case .integer(let range): "an integer from \(range.lowerBound) to \(range.upperBound)"
    case .choice(let words): words.count == 1 ? "\"\(words[0])\"" : "one of " + quoted(words)
    case .strings: "an array of strings"
    case .stringOrStrings: "a string or an array of strings"
    case .choices(let words): "an array of some of " + quoted(words)
    }
  }

  /// What is wrong with a value, and what would be right; nil where it is right.
  func objection(to value: Schema.Value) -> (problem: String, remedy: String)? {
    if valuesNotYetSupported.contains(value) {
      return ("\(value) is not supported yet by this version", "use \(expectation(whenRefused: value))")
    }
    switch (kind, value) {
    case (.string, .string), (.strings, .strings), (.stringOrStrings, .string), (.stringOrStrings, .strings),
      (.boolean, .boolean):
      return nil
    case (.integer(let range), .integer(let number)):
      return range.contains(number) ? nil : ("\(number) is out of range", "use \(expectation)")
    case (.choice(let words), .string(let word)):
      return words.contains(word)
        ? nil : ("\"\(word)\" is no value of it", remedy(for: word, in: words, called: "values"))
    case (.choices(let words), .strings(let given)):
      for (index, word) in given.enumerated() {
        guard words.contains(word) else {
          return ("\"\(word)\" is no value of it", remedy(for: word, in: words, called: "values"))
        }
        if given[..<index].contains(word) { return ("\"\(word)\" comes twice", "name it once") }
      }
      return nil
    default:
      return ("\(value) is of the wrong type", "write \(expectation)")
    }
  }

  private func expectation(whenRefused value: Schema.Value) -> String {
    if case .boolean(let flag) = value { return "\(!flag)" }
    return expectation
  }

  private func quoted(_ words: [String]) -> String {
    words.map { "\"\($0)\"" }.joined(separator: ", ")
  }
}
