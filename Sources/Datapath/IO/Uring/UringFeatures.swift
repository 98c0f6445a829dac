import CLinux
import Glibc

/// What a kernel's io_uring offers beyond its first release, of what the forwarder uses. Each missing one is replaced
/// by a slower way.
public struct UringFeatures: OptionSet, Sendable, CustomStringConvertible {
  public let rawValue: UInt32
  public init(rawValue: UInt32) { self.rawValue = rawValue }

  /// IORING_SETUP_SINGLE_ISSUER (6.0). Without it: the kernel takes a lock on every submission.
  public static let singleIssuer = Self(rawValue: 1 << 0)
  /// IORING_SETUP_DEFER_TASKRUN (6.1): completions are made when the worker asks. Without it: on every return to user
  /// space.
  public static let deferredWork = Self(rawValue: 1 << 1)
  /// Provided-buffer rings (5.19). Without them: one receive at a time for each source, into a slot named beforehand.
  public static let bufferRing = Self(rawValue: 1 << 2)
  /// Multishot recvmsg (6.0). Without it: one receive at a time for each socket.
  public static let multishotReceive = Self(rawValue: 1 << 3)
  /// IORING_OP_READ_MULTISHOT (6.7). Without it: one read at a time for each TAP queue.
  public static let multishotRead = Self(rawValue: 1 << 4)
  /// A sparse table of registered files (5.19). Without it: a descriptor look-up on every operation.
  public static let fixedFiles = Self(rawValue: 1 << 5)
  /// IORING_REGISTER_RESTRICTIONS (5.10). Without it: the ring could be used for operations that the forwarder never
  /// needs.
  public static let restrictions = Self(rawValue: 1 << 6)

  /// IOSQE_CQE_SKIP_SUCCESS (5.17): what succeeds says nothing. Without it: a completion for each call of a guest.
  public static let silentSuccess = Self(rawValue: 1 << 7)

  public static let all: Self = [
    .singleIssuer, .deferredWork, .bufferRing, .multishotReceive, .multishotRead, .fixedFiles, .restrictions,
    .silentSuccess,
  ]

  /// Each feature by the name that configuration and `vnetr doctor` use, and what its absence costs.
  public static let names: [(name: String, feature: UringFeatures, cost: String)] = [
    ("single-issuer", .singleIssuer, "some locking in the kernel with every call (kernel 6.0)"),
    ("deferred-work", .deferredWork, "completions interrupt the worker: more calls and wake-ups (kernel 6.1)"),
    ("buffer-ring", .bufferRing, "receives name their buffers one by one: no multishot (kernel 5.19)"),
    ("multishot-receive", .multishotReceive, "a request for every datagram (kernel 6.0)"),
    ("multishot-read", .multishotRead, "a request for every frame of a TAP port (kernel 6.7)"),
    ("fixed-files", .fixedFiles, "a reference to the file for every operation (kernel 5.19)"),
    ("restrictions", .restrictions, "rings could be used for operations that forwarding never needs (kernel 5.10)"),
    ("silent-success", .silentSuccess, "a completion for each call of a guest (kernel 5.17)"),
  ]

  public var description: String {
    Self.names.filter { contains($0.feature) }.map(\.name).joined(separator: ", ")
  }

  /// Asks this kernel by making a small ring and trying.
  /// - Throws: why io_uring cannot be used at all (EPERM: forbidden by `kernel.io_uring_disabled` or a filter).
  public static func probe() throws(SystemError) -> UringFeatures {
    let io = try UringIO(UringIO.Limits(entries: 8, slots: 8, posted: 8, sources: 1, lanes: 1, operations: 1))
    return io.features
  }
}
