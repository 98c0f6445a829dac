import Glibc

/// Calls `body` with attributes for `posix_spawn` that start a child with no signal blocked or ignored, as the test
/// runner has them for its own ends.
/// - Parameter ownGroup: whether the child leads a process group of its own.
@unsafe
public func withCleanSignals<Result>(
  ownGroup: Bool = false, _ body: (UnsafePointer<posix_spawnattr_t>) -> Result
) -> Result {
  var attributes = posix_spawnattr_t()
  unsafe posix_spawnattr_init(&attributes)
  defer { unsafe posix_spawnattr_destroy(&attributes) }
  var none = sigset_t()
  var all = sigset_t()
  unsafe sigemptyset(&none)
  unsafe sigfillset(&all)
  unsafe posix_spawnattr_setsigmask(&attributes, &none)
  unsafe posix_spawnattr_setsigdefault(&attributes, &all)
  var flags = POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF
  if ownGroup {
    flags |= POSIX_SPAWN_SETPGROUP
    unsafe posix_spawnattr_setpgroup(&attributes, 0)
  }
  unsafe posix_spawnattr_setflags(&attributes, Int16(flags))
  return unsafe body(&attributes)
}
