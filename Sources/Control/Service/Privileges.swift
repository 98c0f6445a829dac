import CLinux
import Datapath
import Glibc

/// What the process may do: as little as forwarding needs.
enum Privileges {
  private static let netAdmin = 12  // CAP_NET_ADMIN in linux/capability.h: TAP devices, forced buffer sizes
  private static let netRaw = 13  // CAP_NET_RAW: packet sockets

  /// Gives up every capability of this thread, and of those that it starts, but the two that ports added later need.
  /// To be called after everything was opened and before any thread is started.
  static func drop() throws(SystemError) {
    var effective = [UInt32](repeating: 0, count: 2)
    var permitted = effective
    guard unsafe clinux_get_capabilities(&effective, &permitted) == 0 else {
      throw SystemError(errno, doing: "read this process's capabilities")
    }
    let kept = [permitted[0] & (1 << netAdmin | 1 << netRaw), 0]
    guard unsafe clinux_set_capabilities(kept) == 0 else { throw SystemError(errno, doing: "give up capabilities") }
    guard clinux_forbid_new_privileges() == 0 else { throw SystemError(errno, doing: "forbid new privileges") }
  }

  /// Raises the soft limit of open files to the hard one: each link has a socket for each source port and worker.
  static func raiseOpenFiles() {
    var limit = rlimit()
    guard unsafe getrlimit(__rlimit_resource_t(UInt32(RLIMIT_NOFILE.rawValue)), &limit) == 0 else { return }
    limit.rlim_cur = limit.rlim_max
    _ = unsafe setrlimit(__rlimit_resource_t(UInt32(RLIMIT_NOFILE.rawValue)), &limit)
  }
}

/// Signals as a descriptor that the control loop reads.
struct Signals {
  let descriptor: Int32

  /// Blocks the signals in this thread, and in those that it starts.
  init(_ numbers: [Int32]) throws(SystemError) {
    var set = sigset_t()
    unsafe sigemptyset(&set)
    for number in numbers { unsafe sigaddset(&set, number) }
    unsafe pthread_sigmask(SIG_BLOCK, &set, nil)
    descriptor = unsafe signalfd(-1, &set, Int32(SFD_CLOEXEC) | Int32(SFD_NONBLOCK))
    guard descriptor >= 0 else { throw SystemError(errno, doing: "make a signalfd") }
    // A reader of the counters that went away must not end the service.
    unsafe signal(SIGPIPE, SIG_IGN)
  }

  /// The next signal that came; nil when there is none.
  func next() -> Int32? {
    var information = signalfd_siginfo()
    let size = MemoryLayout<signalfd_siginfo>.size
    guard unsafe read(descriptor, &information, size) == size else { return nil }
    return Int32(information.ssi_signo)
  }
}
