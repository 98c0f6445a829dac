import Glibc

extension UnderlaySocket {
  /// The longest payload of a UDP datagram over IPv4, in bytes: 65,535 less the headers of IP and UDP.
  public static let datagramBytesMax = 65_535 - 20 - 8

  /// Datagrams of which some fragments came and others did not, or did not fit together: of all programs in this
  /// network namespace, since the namespace was made. Allocates: for control only.
  ///
  /// The kernel's ReasmFails (RFC 4293, ipSystemStatsReasmFails) of both families, which holds its ReasmTimeout.
  public static func reassemblyFailures() -> Int {
    reassemblyFailures(
      snmp: text(ofFile: "/proc/thread-self/net/snmp"), snmp6: text(ofFile: "/proc/thread-self/net/snmp6"))
  }

  /// The same from the text of the kernel's two tables; 0 for what they do not have.
  /// - Parameters:
  ///   - snmp: pairs of lines for each protocol, `Ip: NAME …` above `Ip: VALUE …`.
  ///   - snmp6: a line for each counter, `Ip6ReasmFails VALUE`.
  static func reassemblyFailures(snmp: String, snmp6: String) -> Int {
    let rows = snmp.split(separator: "\n").map { $0.split(separator: " ") }.filter { $0.first == "Ip:" }
    var failures = 0
    if rows.count == 2, let column = rows[0].firstIndex(of: "ReasmFails"), column < rows[1].count {
      failures += Int(rows[1][column]) ?? 0
    }
    for line in snmp6.split(separator: "\n") {
      let words = line.split { $0 == " " || $0 == "\t" }
      if words.count == 2, words[0] == "Ip6ReasmFails" { failures += Int(words[1]) ?? 0 }
    }
    return failures
  }

  /// A small file of /proc; empty where it cannot be read.
  private static func text(ofFile path: String) -> String {
    let descriptor = unsafe open(path, O_RDONLY | O_CLOEXEC)
    guard descriptor >= 0 else { return "" }
    defer { close(descriptor) }
    var bytes: [UInt8] = []
    var chunk = [UInt8](repeating: 0, count: 16_384)
    while true {
      let count = unsafe read(descriptor, &chunk, chunk.count)
      guard count > 0 else { return String(decoding: bytes, as: UTF8.self) }
      bytes += chunk[0..<count]
    }
  }
}
