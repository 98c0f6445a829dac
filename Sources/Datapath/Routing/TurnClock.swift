/// The time of one turn, as routing needs it: made once a turn, for a division costs more than a lookup.
public struct TurnClock: BitwiseCopyable, Hashable, Sendable {
  /// Since the start of second 1, which all workers and control share.
  public let nanoseconds: UInt64
  /// A count of seconds that starts at 1.
  public let seconds: UInt32

  @inline(__always)
  public init(nanoseconds: UInt64) {
    self.nanoseconds = nanoseconds
    seconds = UInt32(truncatingIfNeeded: nanoseconds / 1_000_000_000 &+ 1)
  }

  /// The start of a second; `seconds` of 1 or more.
  @inline(__always)
  public init(seconds: UInt32) {
    nanoseconds = UInt64(seconds &- 1) &* 1_000_000_000
    self.seconds = seconds
  }
}
