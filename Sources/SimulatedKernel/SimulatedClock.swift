/// Time as the simulation has it. It moves only when a worker collects or when a test moves it: nothing here reads a
/// clock of the machine, so a run is the same every time.
public final class SimulatedClock {
  /// Nanoseconds since the simulation began.
  public private(set) var nanoseconds: UInt64 = 0

  public init() {}

  public func advance(by count: Int) { nanoseconds += UInt64(count) }

  /// Moves on to `time`; a time that has passed changes nothing.
  public func advance(to time: UInt64) { nanoseconds = max(nanoseconds, time) }
}
