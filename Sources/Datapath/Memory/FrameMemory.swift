import CLinux
import Glibc

/// The buffers of one worker: the arena of slots that the kernel receives into, and memory of others (a guest's) that
/// its descriptors may name. One worker uses it; nobody else touches it after start.
///
/// Every buffer is free, posted (the kernel may write to it), or held with the count of sends still out. A flood to
/// n places holds n; a buffer returns to its owner when the count is zero: a slot to the free list, a foreign buffer
/// to its port's list of returned ones. An operation that does not fit the state traps: it is a bug of ours and would
/// end in one frame overwriting another.
@safe
public struct FrameMemory: ~Copyable, @unchecked Sendable {
  /// Bytes before a received frame: the kernel's header of a multishot recvmsg (16), the sender's address (28) and
  /// control messages (64) come first in the same slot, or a virtio header (12).
  public static let headroomBytes = 128
  /// The longest frame or datagram that a slot takes, headroom not counted.
  public static let payloadBytesMax = 65_536
  /// An odd multiple of 64 bytes: the starts of successive slots then fall into different cache sets.
  public static let slotStrideBytes = headroomBytes + payloadBytesMax + 64
  /// Foreign memories that one worker can know: one for each vhost-user or memory port.
  public static let foreignOwnersMax = 64

  private static var postedMark: UInt16 { 0xFFFF }

  private let base: UnsafeMutableRawPointer
  private let mappedBytes: Int
  public let slotCount: Int
  /// Whether the kernel gave huge pages.
  public let hasHugePages: Bool

  /// The state of each slot: 0 free, `postedMark`, or the count of sends still out.
  private var states: FixedArray<UInt16>
  /// Free slots, the one last used on top: its lines are still in the cache.
  private var free: FixedArray<UInt32>
  private var freeCount: Int
  public private(set) var postedCount = 0

  private var foreign: FixedArray<ForeignOwner>
  private var foreignCount = 0

  struct ForeignOwner: BitwiseCopyable {
    var memory: ForeignMemory.Reference
  }

  /// - Parameters:
  ///   - slotCount: slots; each takes `slotStrideBytes` of address space, of memory only what is touched.
  ///   - hugePages: whether to ask for them; without any free the arena uses ordinary pages.
  /// - Throws: `ENOMEM` where the address space is used up.
  public init(slotCount: Int, hugePages: Bool = true) throws(SystemError) {
    precondition(slotCount > 0 && slotCount < Int(UInt32.max))
    let hugePageBytes = 2 << 20
    let bytes = (slotCount * Self.slotStrideBytes + hugePageBytes - 1) / hugePageBytes * hugePageBytes
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
    states = FixedArray(repeating: 0, count: slotCount)
    free = FixedArray(repeating: 0, count: slotCount)
    for index in 0..<slotCount { free[index] = UInt32(slotCount - 1 - index) }
    freeCount = slotCount
    // Owner 0 is the arena itself.
    foreign = FixedArray(repeating: ForeignOwner(memory: .none), count: Self.foreignOwnersMax + 1)
  }

  deinit {
    unsafe munmap(base, mappedBytes)
  }

  // MARK: Ownership

  public var heldCount: Int { slotCount - freeCount - postedCount }
  public var freeSlots: Int { freeCount }

  /// Slots that are neither lent nor held and not on the free list either; 0, or one was lost.
  public var slotsAstray: Int {
    var idle = 0
    for slot in 0..<slotCount where states[slot] == 0 { idle += 1 }
    return idle - freeCount
  }

  /// The sends that all held slots wait for.
  public var holdsTotal: Int {
    var total = 0
    for slot in 0..<slotCount where states[slot] != Self.postedMark { total += Int(states[slot]) }
    return total
  }

  /// Whether a slot is lent to the kernel.
  @inline(__always)
  public func isPosted(_ slot: Int) -> Bool { states[slot] == Self.postedMark }

  /// Takes a free slot to be posted to the kernel; nil when none is free.
  @inline(__always)
  public mutating func post() -> Int? {
    guard freeCount > 0 else { return nil }
    freeCount -= 1
    let slot = Int(free[freeCount])
    precondition(states[slot] == 0, "a slot on the free list is in use")
    states[slot] = Self.postedMark
    postedCount += 1
    return slot
  }

  /// The kernel filled a posted slot: it is held once from now on.
  @inline(__always)
  public mutating func received(_ slot: Int) {
    precondition(states[slot] == Self.postedMark, "a slot was received that was not posted")
    states[slot] = 1
    postedCount -= 1
  }

  /// The kernel gives a posted slot back unused (a receive was cancelled, or its ring is gone).
  public mutating func unpost(_ slot: Int) {
    received(slot)
    release(BufferReference(slot: slot))
  }

  /// Adds `count` sends to those that are still out for a held buffer.
  @inline(__always)
  public mutating func hold(_ buffer: BufferReference, adding count: Int) {
    if buffer.owner == 0 {
      let old = states[Int(buffer.index)]
      precondition(
        old != 0 && old != Self.postedMark && Int(old) + count < Int(Self.postedMark), "hold of a slot not held")
      states[Int(buffer.index)] = old + UInt16(truncatingIfNeeded: count)
    } else {
      foreignMemory(buffer).hold(Int(buffer.index), adding: count)
    }
  }

  /// One send is done (or was dropped): the last one returns the buffer to its owner.
  @inline(__always)
  public mutating func release(_ buffer: BufferReference) {
    if buffer.owner == 0 {
      let slot = Int(buffer.index)
      let old = states[slot]
      precondition(old != 0 && old != Self.postedMark, "release of a slot not held")
      states[slot] = old - 1
      if old == 1 {
        free[freeCount] = UInt32(truncatingIfNeeded: slot)
        freeCount += 1
      }
    } else {
      foreignMemory(buffer).release(Int(buffer.index))
    }
  }

  /// Makes a foreign memory known; its descriptors name the owner returned. Control keeps the memory alive.
  public mutating func adopt(_ memory: ForeignMemory.Reference) -> Int {
    precondition(foreignCount < Self.foreignOwnersMax, "too many foreign memories")
    foreignCount += 1
    foreign[foreignCount] = ForeignOwner(memory: memory)
    return foreignCount
  }

  @inline(__always)
  private func foreignMemory(_ buffer: BufferReference) -> ForeignMemory.Reference {
    precondition(buffer.owner != 0 && Int(buffer.owner) <= foreignCount, "unknown owner of a buffer")
    return foreign[Int(buffer.owner)].memory
  }

  // MARK: Bytes

  /// The start of a slot, for the kernel to write to: `slotStrideBytes` less 64 bytes of it.
  @unsafe @inline(__always)
  public func address(ofSlot slot: Int) -> UnsafeMutableRawPointer {
    precondition(UInt(bitPattern: slot) < UInt(bitPattern: slotCount), "slot out of range")
    return unsafe base + slot * Self.slotStrideBytes
  }

  /// Bytes of a slot that the kernel may write.
  public static let slotBytes = headroomBytes + payloadBytesMax

  /// The first segment of a frame, from its first byte on: what stages parse. For memory of a guest this is our
  /// private copy of the headers.
  @inline(__always)
  @_lifetime(borrow self)
  public func head(of descriptor: Descriptor) -> RawSpan {
    let (start, count) = unsafe headRange(descriptor)
    return unsafe _overrideLifetime(RawSpan(_unsafeStart: start, byteCount: count), borrowing: self)
  }

  /// The same, writable.
  @inline(__always)
  @_lifetime(&self)
  public mutating func mutableHead(of descriptor: Descriptor) -> MutableRawSpan {
    let (start, count) = unsafe headRange(descriptor)
    return unsafe _overrideLifetime(MutableRawSpan(_unsafeStart: start, byteCount: count), mutating: &self)
  }

  @unsafe @inline(__always)
  private func headRange(_ descriptor: Descriptor) -> (UnsafeMutableRawPointer, Int) {
    let offset = Int(descriptor.offset)
    let length = Int(descriptor.length)
    if descriptor.buffer.owner == 0 {
      precondition(offset + length <= Self.slotBytes, "a descriptor leaves its slot")
      return unsafe (address(ofSlot: Int(descriptor.buffer.index)) + offset, length)
    }
    let segment = unsafe foreignMemory(descriptor.buffer).segment(0, of: Int(descriptor.buffer.index))
    unsafe precondition(offset <= segment.iov_len, "a descriptor leaves its segment")
    return unsafe (segment.iov_base + offset, min(length, segment.iov_len - offset))
  }

  /// Writes the segments of a frame as I/O vectors; returns how many, or nil when they are more than `room`.
  @unsafe @inline(__always)
  public func vectors(of descriptor: Descriptor, into vectors: UnsafeMutablePointer<iovec>, room: Int) -> Int? {
    if descriptor.buffer.owner == 0 {
      guard room >= 1 else { return nil }
      let (start, count) = unsafe headRange(descriptor)
      unsafe vectors[0] = unsafe iovec(iov_base: start, iov_len: count)
      return 1
    }
    guard Int(descriptor.segments) <= room else { return nil }
    let memory = foreignMemory(descriptor.buffer)
    var left = Int(descriptor.length)
    var skip = Int(descriptor.offset)
    var used = 0
    for number in 0..<Int(descriptor.segments) where left > 0 {
      let segment = unsafe memory.segment(number, of: Int(descriptor.buffer.index))
      unsafe precondition(skip <= segment.iov_len, "a descriptor leaves its segment")
      let count = unsafe min(left, segment.iov_len - skip)
      unsafe vectors[used] = unsafe iovec(iov_base: segment.iov_base + skip, iov_len: count)
      used += 1
      left -= count
      skip = 0
    }
    precondition(left == 0, "a descriptor is longer than its segments")
    return used
  }
}
