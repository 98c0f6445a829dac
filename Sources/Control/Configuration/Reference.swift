extension Schema {
  /// The reference of every key, as Markdown: docs/configuration.md is this text.
  public static var reference: String {
    var lines = [
      "# Configuration reference",
      "",
      "Generated from the table of keys by `vnetr reference configuration`: do not edit.",
      "",
      "A configuration is one TOML file. It is read strictly: an unknown key, a bad value or a name that does not "
        + "exist "
        + "is an error, and `vnetr check FILE` reports all of them with their key paths. Arrays count from 0 in key "
        + "paths: `port[1].domain` is the second port's domain.",
    ]
    for section in Section.allCases {
      lines += ["", "## `\(section.header)`", "", section.help, ""]
      lines += section == .tuning ? ["| key | flag | values | default | meaning |", "|---|---|---|---|---|"] : []
      lines += section == .tuning ? [] : ["| key | values | default | meaning |", "|---|---|---|---|"]
      for definition in keys(of: section) where definition.isSupported {
        let flag = section == .tuning ? " `\(definition.flag)` |" : ""
        lines.append(
          "| `\(definition.key)` |\(flag) \(definition.valuesText) | \(definition.defaultText) | \(definition.help) |")
      }
    }
    lines += [
      "", "## Names", "",
      "Names are 1 to \(nameCharactersMax) letters, digits and `.` `_` `-` `:` `[` `]`. No two domains share a "
        + "name, and "
        + "no two of the ports and links. A device name has 1 to \(deviceNameBytesMax) bytes, without spaces, `/`, `:` "
        + "and `%`.",
      "", "## Not supported yet", "",
      "These are refused by this version, so that no file says what is not done:", "",
    ]
    for definition in keys {
      if !definition.isSupported { lines.append("- `\(definition.key)` in `\(definition.section.header)`") }
      lines += definition.valuesNotYetSupported.map {
        "- `\(definition.key) = \($0)` in `\(definition.section.header)`"
      }
    }
    return lines.joined(separator: "\n") + "\n"
  }
}

extension Schema.KeyDefinition {
  /// The values as the reference and the help of the flags have them.
  public var valuesText: String {
    func code(_ words: [String]) -> String { words.map { "`\"\($0)\"`" }.joined(separator: ", ") }
    return switch kind {
    case .string(let form): form
    case .boolean:
      valuesNotYetSupported.isEmpty
        ? "`true`, `false`"
        : [true, false].filter { !valuesNotYetSupported.contains(.boolean($0)) }.map { "`\($0)`" }.joined()
    case .integer(let range): "\(range.lowerBound) to \(range.upperBound)"
    case .choice(let words): code(words)
    case .strings: "array of strings"
    case .stringOrStrings: "string, or array of strings"
    case .choices(let words): "array of \(code(words))"
    }
  }

  fileprivate var defaultText: String {
    switch defaultValue {
    case .required: "required"
    case .value(let value): "`\(value)`"
    case .derived(let text): text
    }
  }

  /// The values and the default for a flag's help, such as `auto, fused; default auto`.
  public var flagValuesText: String {
    let values =
      switch kind {
      case .string(let form): form
      case .boolean: "true or false"
      case .integer(let range): "\(range.lowerBound)…\(range.upperBound)"
      case .choice(let words): words.joined(separator: " | ")
      case .strings, .stringOrStrings: "text, …"
      case .choices(let words): "some of " + words.joined(separator: ",")
      }
    switch defaultValue {
    case .value(.string(let text)): return "\(values) (default \(text))"
    case .value(.strings(let texts)):
      return "\(values) (default \(texts.isEmpty ? "none" : texts.joined(separator: ",")))"
    case .value(let value): return "\(values) (default \(value))"
    case .required, .derived: return values
    }
  }
}
