/// Why a device or socket could not be opened, and what the user can do: one line.
public struct PortError: Error, CustomStringConvertible, Sendable {
  /// What was tried, on what: "attach TAP device vm1".
  public let doing: String
  /// The system's error number, positive.
  public let number: Int32
  public let reason: String
  public let remedy: String
  /// Whether trying again later may help without anybody changing the configuration.
  public let mayPass: Bool

  public init(doing: String, number: Int32, reason: String? = nil, remedy: String, mayPass: Bool = false) {
    self.doing = doing
    self.number = number
    self.reason = reason ?? SystemError.text(number)
    self.remedy = remedy
    self.mayPass = mayPass
  }

  public var description: String { "cannot \(doing): \(reason); \(remedy)" }
}
