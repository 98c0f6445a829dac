/// When a worker sleeps and when it polls: VNET/P's dispatch modes and yield strategies, as a pure function of time and
/// frames.
///
/// - `guestDriven` sleeps in the kernel and handles each event at once: the least delay for a frame that comes
///   alone on a busy machine, and no CPU while idle.
/// - `vmmDriven` polls: the most throughput.
/// - `adaptive` switches by the rate of frames, with hysteresis, looked at once a period.
/// When a poll finds nothing the yield strategy says what then.
public struct Dispatch: Sendable {
  public enum Mode: UInt8, Sendable { case guestDriven, vmmDriven, adaptive }
  public enum Yield: UInt8, Sendable {
    /// Lets another thread run, and polls again: never sleeps.
    case immediate
    /// Sleeps for at most `sleepNanoseconds`.
    case timed
    /// Polls again, and never lets another thread run: no system call while frames go between guests' rings.
    case never
    /// As immediate until nothing came for `spinNanoseconds`; then sleeps until something does.
    case adaptive
  }

  public struct Settings: Sendable {
    public var mode = Mode.adaptive
    public var yield = Yield.adaptive
    /// Frames a second above which adaptive dispatch polls (VNET/P's value).
    public var upperFramesPerSecond = 10_000
    /// Frames a second below which it sleeps again (VNET/P's value).
    public var lowerFramesPerSecond = 1_000
    /// How often the rate is looked at (VNET/P's value: 10 ms).
    public var periodNanoseconds: UInt64 = 10_000_000
    /// Longer than one wake-up of a sleeping neighbour takes. Measured round trip between two guests: 107 µs without a
    /// spin, 64 with 20 µs, 32 with 50, 31 with 200.
    public var spinNanoseconds: UInt64 = 50_000
    /// The sleep of `timed`: as long as a spin, so that it costs no more delay.
    public var sleepNanoseconds: UInt64 = 50_000
    /// How long a polling worker may wait for a fuller batch; 0: not at all.
    public var batchWaitNanoseconds: UInt64 = 0
    /// The batch that it then waits for, in completions.
    public var batchFrames = 64
    public init() {}
  }

  /// Frames in one turn from which on a polling worker lets another thread run before the next: whoever takes the
  /// frames may share its core, and a guest's socket holds some hundred frames, not what a time slice brings. A
  /// yield costs a core of one's own 0.2 µs. Measured with two hosts and two guests on two cores, UDP 1400 B
  /// delivered of an unthrottled sender: 1.7 times as much, TCP the same.
  private static let crowdFrames = 32

  private let settings: Settings
  public private(set) var isPolling: Bool
  private var periodStart: UInt64
  private var periodFrames = 0
  private var lastWork: UInt64

  public init(_ settings: Settings, now: UInt64) {
    self.settings = settings
    isPolling = settings.mode == .vmmDriven
    periodStart = now
    lastWork = now
  }

  /// How the next turn waits, and whether it first lets another thread run.
  /// - Parameters:
  ///   - now: monotonic, nanoseconds.
  ///   - frames: received in the last turn.
  ///   - didWork: whether anything happened in the last turn.
  @inline(__always)
  public mutating func next(now: UInt64, frames: Int, didWork: Bool) -> (wait: Wait, yields: Bool) {
    periodFrames += frames
    if didWork { lastWork = now }
    if settings.mode == .adaptive { adapt(now) }
    guard isPolling else { return (.forEvent, false) }
    if didWork {
      if settings.batchWaitNanoseconds > 0, frames < settings.batchFrames {
        return (
          .forBatch(completions: settings.batchFrames, nanoseconds: Int(settings.batchWaitNanoseconds)), false
        )
      }
      return (.sweep, frames >= Self.crowdFrames && settings.yield != .never)
    }
    switch settings.yield {
    case .immediate: return (.sweep, true)
    case .never: return (.sweep, false)
    case .timed: return (.atMost(nanoseconds: Int(settings.sleepNanoseconds)), false)
    case .adaptive: return now &- lastWork < settings.spinNanoseconds ? (.sweep, true) : (.forEvent, false)
    }
  }

  @inline(__always)
  private mutating func adapt(_ now: UInt64) {
    let elapsed = now &- periodStart
    guard elapsed >= settings.periodNanoseconds else { return }
    let perSecond = UInt64(periodFrames) &* 1_000_000_000 / elapsed
    if isPolling {
      if perSecond < UInt64(settings.lowerFramesPerSecond) { isPolling = false }
    } else if perSecond > UInt64(settings.upperFramesPerSecond) {
      isPolling = true
    }
    periodStart = now
    periodFrames = 0
  }
}
