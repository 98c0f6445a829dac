/// A limit on the frames that one worker floods in one domain: a rate, and a burst above it.
///
/// Kept as the times that frames take: `earliest` runs ahead of the clock by the time of every frame that was let
/// through, up to the burst. A super-frame may overdraw it once.
struct FloodLimit: BitwiseCopyable {
  /// A burst is this part of a second's frames: shorter than a person or a time-out notices, longer than a batch.
  static let burstNanoseconds: UInt64 = 100_000_000
  /// and at least so many frames: one batch, or a limit of a few frames a second would drop a guest's first words.
  static let burstFramesMin: UInt64 = 64
  private static let nanosecondsPerSecond: UInt64 = 1_000_000_000

  /// 0: no limit.
  let nanosecondsPerFrame: UInt64
  let burstNanoseconds: UInt64

  /// - Parameter framesPerSecondMax: 0 for no limit.
  init(framesPerSecondMax: Int) {
    nanosecondsPerFrame =
      framesPerSecondMax > 0 ? max(1, Self.nanosecondsPerSecond / UInt64(framesPerSecondMax)) : 0
    burstNanoseconds = max(Self.burstNanoseconds, Self.burstFramesMin * nanosecondsPerFrame)
  }

  /// Whether a flood of so many frames may go on.
  @inline(__always)
  func allows(frames: Int, now: UInt64, earliest: inout UInt64) -> Bool {
    let start = max(earliest, now)
    guard start - now < burstNanoseconds else { return false }
    earliest = start + UInt64(truncatingIfNeeded: frames) * nanosecondsPerFrame
    return true
  }
}
