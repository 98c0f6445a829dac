import CLinux
import Glibc

/// The memory that slots lie in: one for each worker that receives. Control makes it, before any worker runs; pages
/// come when they are first touched, by the kernel on behalf of the worker that receives into them, so near its core.
///
/// In the pipeline layout several workers read and send from the same slots, each through a `View`. Who may touch a
/// slot is settled by who holds its descriptor: it goes from worker to worker through a ring, which orders memory.
@safe
public final class FrameArena: @unchecked Sendable {
  /// Bytes before a received frame: the kernel's header of a multishot recvmsg (16), the sender's address (28) and
  /// control messages (64) come first in the same slot, or a virtio header (12).
  public static let headroomBytes = 128
  /// The longest frame or datagram that a slot takes, headroom not counted.
  public static let payloadBytesMax = 65_536
  /// Bytes of a slot that the kernel may write.
  public static let slotBytes = headroomBytes + payloadBytesMax
  /// An odd multiple of 64 bytes: the starts of successive slots then fall into different cache sets.
  public static let slotStrideBytes = slotBytes + 64

  private let base: UnsafeMutableRawPointer
  private let mappedBytes: Int
  public let slotCount: Int
  /// Whether the kernel gave huge pages.
  public let hasHugePages: Bool

  /// - Parameters:
  ///   - slotCount: slots; each takes `slotStrideBytes` of address space, of memory only what is touched.
  ///   - hugePages: whether to ask for them; without any free the arena uses ordinary pages.
  /// - Throws: `ENOMEM` where the address space is used up.
  public init(slotCount: Int, hugePages: Bool = true) throws(SystemError) {
    precondition(slotCount >= 0 && slotCount < Int(UInt32.max))
    let hugePageBytes = 2 << 20
    let bytes = (max(1, slotCount) * Self.slotStrideBytes + hugePageBytes - 1) / hugePageBytes * hugePageBytes
    let protection = PROT_READ | PROT_WRITE
    let flags = MAP_PRIVATE | MAP_ANONYMOUS
    var mapped = unsafe hugePages ? mmap(nil, bytes, protection, flags | MAP_HUGETLB, -1, 0) : MAP_FAILED
    hasHugePages = unsafe mapped != MAP_FAILED
    if unsafe mapped == MAP_FAILED {
      unsafe mapped = unsafe mmap(nil, bytes, protection, flags | MAP_NORESERVE, -1, 0)
      guard unsafe mapped != MAP_FAILED else { throw SystemError(errno, doing: "map the frame arena") }
      if hugePages { _ = unsafe madvise(mapped, bytes, MADV_HUGEPAGE) }
    }
    unsafe base = mapped!
    mappedBytes = bytes
    self.slotCount = slotCount
  }

  deinit {
    unsafe munmap(base, mappedBytes)
  }

  /// The slots without their ownership; the arena must outlive it.
  public var view: View { unsafe View(base: base, slotCount: slotCount) }

  @safe
  public struct View: BitwiseCopyable, @unchecked Sendable {
    fileprivate let base: UnsafeMutableRawPointer?
    public let slotCount: Int

    /// The slots of no arena.
    static var none: View { unsafe View(base: nil, slotCount: 0) }

    /// The start of a slot, `slotBytes` of which may be written.
    @unsafe @inline(__always)
    func address(ofSlot slot: Int) -> UnsafeMutableRawPointer {
      precondition(UInt(bitPattern: slot) < UInt(bitPattern: slotCount), "slot out of range")
      return unsafe base! + slot * FrameArena.slotStrideBytes
    }
  }
}
