import Glibc
import Logging

/// Writes each message to stderr as one line: `LEVEL message key=value`.
struct StandardErrorLog: LogHandler {
  var metadata: Logger.Metadata = [:]
  var logLevel: Logger.Level = .info

  subscript(metadataKey key: String) -> Logger.Metadata.Value? {
    get { metadata[key] }
    set { metadata[key] = newValue }
  }

  func log(event: LogEvent) {
    var line = "\(event.level.rawValue.uppercased()) \(event.message)"
    let all = metadata.merging(event.metadata ?? [:]) { _, new in new }
    for (key, value) in all.sorted(by: { $0.key < $1.key }) { line += " \(key)=\(quotedIfNeeded("\(value)"))" }
    if let error = event.error { line += " error=\(quotedIfNeeded("\(error)"))" }
    writeToStandardError(line)
  }

  /// A value that would not read as one is quoted.
  private func quotedIfNeeded(_ value: String) -> String {
    value.isEmpty || value.contains(where: { $0.isWhitespace || $0 == "\"" }) ? value.debugDescription : value
  }
}

/// Writes one line, whole, in one call: lines of several threads do not mix.
func writeToStandardError(_ text: String) {
  let bytes = Array((text + "\n").utf8)
  // Nothing is left to tell when stderr is gone.
  _ = unsafe write(STDERR_FILENO, bytes, bytes.count)
}
