import Datapath

extension Counter {
  /// The reference of every counter, as Markdown: docs/counters.md is this text.
  public static var reference: String {
    var lines = [
      "# Counter reference",
      "",
      "Generated from the registry of counters by `vnetr reference counters`: do not edit.",
      "",
      "A counter counts frames as they are on the wire (a super-frame counts as its segments) unless its unit says "
        + "otherwise. `vnetr run` prints all of them on exit and on SIGUSR1, and checks that no frame was lost "
        + "uncounted: "
        + "received + copies = sent + dropped + in flight.",
    ]
    for scope in Scope.allCases {
      let counters = allCases.filter { $0.definition.scopes.contains(scope) }
      guard !counters.isEmpty else { continue }
      lines += ["", "## \(heading(scope))", "", "| counter | unit | meaning |", "|---|---|---|"]
      lines += counters.map { "| `\($0.definition.name)` | \($0.definition.unit) | \($0.definition.help) |" }
    }
    return lines.joined(separator: "\n") + "\n"
  }

  private static func heading(_ scope: Scope) -> String {
    switch scope {
    case .underlay: "Of the underlay, before a datagram's link is known"
    case .port: "Of each port"
    case .link: "Of each link"
    case .domain: "Of each domain"
    case .worker: "Of each worker"
    }
  }
}
