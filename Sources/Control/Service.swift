import Logging

/// How counters are printed.
public enum CountersFormat: String, CaseIterable, Sendable {
  case table
  case json
}

/// The forwarding service.
public enum Service {
  public struct NotBuilt: Error, CustomStringConvertible {
    public var description: String { "the forwarding service is not built yet" }
  }

  /// Forwards until it is told to stop.
  public static func run(
    configuration: Configuration, countersFormat: CountersFormat, logger: Logger
  ) throws {
    throw NotBuilt()
  }
}
