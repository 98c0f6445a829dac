import CLinux
import Glibc

/// A system call that failed: which number, and what it was called for.
public struct SystemError: Error, CustomStringConvertible, Sendable {
  /// The positive error number, as in `errno.h`.
  public let number: Int32
  /// What was being done, on what: "open /dev/net/tun".
  public let doing: String

  public init(_ number: Int32, doing: String) {
    self.number = number
    self.doing = doing
  }

  public var description: String { "cannot \(doing): \(Self.text(number))" }

  /// The system's words for an error number.
  public static func text(_ number: Int32) -> String {
    unsafe String(cString: strerror(number))
  }
}
