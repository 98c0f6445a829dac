import CLinux
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

  /// Adds one to an eventfd. An eventfd that is full wakes its reader anyway, and one that is none is the frontend's
  /// own fault: nothing is told.
  public func signal() {
    var one: UInt64 = 1
    _ = unsafe write(number, &one, 8)
  }
}
