/// The flags of `vnetr run` that the table of keys declares: `--ring-entries 512`, `--ring-entries=512`.
public enum TuningFlags {
  /// Why arguments are no tuning flags: wrong usage.
  public struct UsageError: Error, Equatable, Sendable, CustomStringConvertible {
    public var description: String
  }

  /// Parses arguments to the texts of keys, by the keys' names. What the texts mean is checked with the configuration.
  public static func parse(_ arguments: [String]) throws(UsageError) -> [String: String] {
    var values: [String: String] = [:]
    var rest = arguments[...]
    while let argument = rest.popFirst() {
      guard argument.hasPrefix("--") else {
        throw UsageError(description: "unexpected argument \"\(argument.printable)\"")
      }
      let parts = argument.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
      let flag = String(parts[0])
      guard let definition = Schema.tuningKeys.first(where: { $0.flag == flag }) else {
        let known = Schema.tuningKeys.map(\.flag)
        let meant = nearest(to: flag, in: known).map { "did you mean \($0)?" } ?? "see vnetr run --help"
        throw UsageError(description: "there is no option \(flag.printable); \(meant)")
      }
      guard values[definition.key] == nil else { throw UsageError(description: "\(flag) comes twice; give it once") }
      if parts.count == 2 {
        values[definition.key] = String(parts[1])
      } else if let value = rest.popFirst() {
        values[definition.key] = value
      } else {
        throw UsageError(description: "\(flag) has no value; give \(definition.flagValuesText)")
      }
    }
    return values
  }

  /// The flags and their values, one a line.
  public static var help: String {
    let width = Schema.tuningKeys.map(\.flag.count).max() ?? 0
    return Schema.tuningKeys.map { definition in
      let padding = String(repeating: " ", count: width - definition.flag.count)
      return "\(definition.flag)\(padding)  \(definition.flagValuesText)"
    }.joined(separator: "\n")
  }
}
