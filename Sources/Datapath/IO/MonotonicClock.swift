import Glibc

/// The clock that workers and control share: it never goes back, and stands still while the machine is suspended.
public enum MonotonicClock {
  /// CLOCK_MONOTONIC, in nanoseconds.
  @inline(__always)
  public static func now() -> UInt64 {
    var time = timespec()
    unsafe clock_gettime(CLOCK_MONOTONIC, &time)
    return UInt64(time.tv_sec) &* 1_000_000_000 &+ UInt64(time.tv_nsec)
  }
}
