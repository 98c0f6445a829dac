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

  /// The same for an eventfd that somebody else has a hand in: it may be full, and no longer be one that never waits.
  /// An eventfd that is full wakes its reader anyway.
  public static func call(_ event: Int32) {
    var room = pollfd(fd: event, events: Int16(POLLOUT), revents: 0)
    guard unsafe poll(&room, 1, 0) == 1, room.revents & Int16(POLLOUT) != 0 else { return }
    wake(event)
  }
}
