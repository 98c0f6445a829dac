import CLinux
import Datapath
import Glibc

/// A descriptor with an owner that closes it: once, when the last reference to it is gone.
///
/// Shared, because an event descriptor belongs to the backend that got it and is lent to a worker, in no fixed order
/// of who lets go last. Control only: a worker sees the number.
public final class OwnedDescriptor: Sendable {
  /// Valid as long as this lives.
  public let number: Int32

  /// Takes over an open descriptor.
  public init(_ number: Int32) { self.number = number }

  deinit { close(number) }

  /// Whether its file's bytes are in memory alone. Those of others are read from a disk, or from a process that may
  /// never answer, and whoever accesses them waits.
  var isInMemory: Bool {
    [Int(TMPFS_MAGIC), Int(HUGETLBFS_MAGIC), Int(RAMFS_MAGIC)].contains(clinux_file_system(number))
  }

  /// Makes it one that a worker can read or write without ever waiting.
  /// - Throws: that it is of a kind that may wait all the same.
  func becomeEvent() throws(VhostUserRefusal) {
    let system = clinux_file_system(number)
    guard system == Int(ANON_INODE_FS_MAGIC) || system == Int(PIPEFS_MAGIC) || isInMemory else {
      throw VhostUserRefusal("its descriptor is neither an eventfd nor a pipe")
    }
    guard clinux_make_nonblocking(number) == 0 else {
      throw VhostUserRefusal("its descriptor cannot be made one that never waits: \(SystemError.text(errno))")
    }
  }

  /// Adds one to an eventfd. An eventfd that is full wakes its reader anyway, and one that is none is the frontend's
  /// own fault: nothing is told.
  public func signal() { Waker.call(number) }
}
