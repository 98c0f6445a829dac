import CLinux
import Glibc

/// The eventfd by which a thread is woken that sleeps in `collect`; callable from any thread.
public enum Waker {
  /// - Throws: where no descriptor is left (EMFILE).
  public static func make() throws(SystemError) -> Int32 {
    let waker = eventfd(0, Int32(EFD_CLOEXEC) | Int32(EFD_NONBLOCK))
    guard waker >= 0 else { throw SystemError(errno, doing: "make an eventfd") }
    return waker
  }

  /// Adds one. However many are added before the sleeper looks, it wakes once.
  public static func wake(_ waker: Int32) {
    var one: UInt64 = 1
    _ = unsafe write(waker, &one, 8)
  }
}
