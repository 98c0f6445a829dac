import CLinux
import Glibc

/// The buffers that one worker works with: its own arena of slots that the kernel receives into; slots of neighbours
/// that handed frames on to it; and memory of others (a guest's) that its descriptors may name. One worker uses it;
/// nobody else touches it after start.
///
/// Every buffer is free, posted (the kernel may write to it), or held with the count of sends still out. A flood to
/// n places holds n; a buffer returns to its owner when the count is zero: a slot to the free list, a neighbour's slot
/// to the batch of `returned` ones, a foreign buffer to its port's list, or to that batch where a neighbour brought it.
/// A slot that was handed on to a neighbour stays held, once, until the neighbour returns it; the holds of a foreign
/// buffer stand in its own memory and go with it. An operation that does not fit the state traps: it is a bug of ours
/// and would end in one frame overwriting another.
@safe
public struct FrameMemory: ~Copyable, @unchecked Sendable {
  public static var headroomBytes: Int { FrameArena.headroomBytes }
  public static var payloadBytesMax: Int { FrameArena.payloadBytesMax }
  public static var slotBytes: Int { FrameArena.slotBytes }
  public static var slotStrideBytes: Int { FrameArena.slotStrideBytes }
  /// Foreign memories that one worker can know: one for each ring that a guest transmits by.
  public static let foreignOwnersMax = 256
  /// The owner number of worker 0's slots at its neighbours; worker n's is n more. 0 is always one's own arena, then
  /// come foreign memories.
  public static let neighbourOwnerFirst = 1 + foreignOwnersMax

  private static var postedMark: UInt32 { .max }

  /// What comes back from a neighbour: a buffer's owner, 0 for a slot, above its number there.
  private static let returnedNumberBits: UInt32 = 22
  private static let returnedNumberMax = 1 << Int(returnedNumberBits)

  private let arena: FrameArena
  private let own: FrameArena.View
  public var slotCount: Int { own.slotCount }
  public var hasHugePages: Bool { arena.hasHugePages }

  /// The state of each slot: 0 free, `postedMark`, or the count of sends still out.
  private var states: FixedArray<UInt32>
  /// Free slots, the one last used on top: its lines are still in the cache.
  private var free: FixedArray<UInt32>
  private var freeCount: Int
  public private(set) var postedCount = 0
  /// Slots that neighbours have.
  public private(set) var handedOnCount = 0
  /// Foreign buffers that this worker brought and neighbours have.
  public private(set) var foreignHandedOnCount = 0

  private var foreign: FixedArray<ForeignOwner>
  private var foreignCount = 0
  private let foreignMemories: [ForeignMemory]

  struct ForeignOwner: BitwiseCopyable {
    var memory: ForeignMemory.Reference
    /// The neighbour that brings its buffers; nil: this worker does.
    var bringer: UInt16?
    /// Buffers of it that this worker has.
    var takenCount = 0
  }

  /// A foreign memory whose frames cross between the workers of one service: each of them knows it under one number.
  public struct ForeignShare: Sendable {
    public let memory: ForeignMemory
    /// The worker that brings its buffers and takes them back.
    public let bringer: Int

    public init(_ memory: ForeignMemory, bringer: Int) {
      precondition(memory.bufferCount <= FrameMemory.returnedNumberMax, "too many foreign buffers")
      self.memory = memory
      self.bringer = bringer
    }
  }

  /// By worker number; empty in the fused layout.
  private var neighbours: FixedArray<Neighbour>
  private let neighbourArenas: [FrameArena?]
  /// Sends beyond the first that are still out for each slot of each neighbour.
  private var furtherHolds: FixedArray<UInt32>
  /// What neighbours are to be given back, in one run for each.
  private var returned: FixedArray<UInt32>

  struct Neighbour: BitwiseCopyable {
    var view: FrameArena.View
    /// Where its slots start in `furtherHolds`.
    var start: Int
    /// Where its run starts in `returned`.
    var returnedStart = 0
    var returnedCount = 0
    /// Slots of it that this worker has.
    var takenCount = 0
  }

  /// - Parameters:
  ///   - arena: this worker's alone to receive into.
  ///   - number: this worker's.
  ///   - neighbours: by worker number the arenas of those whose frames come to this worker.
  ///   - shares: foreign memories, the first of them under the number 1.
  public init(
    arena: FrameArena, number own: Int = 0, neighbours arenas: [FrameArena?] = [], shares: [ForeignShare] = []
  ) {
    precondition(shares.count <= Self.foreignOwnersMax, "too many foreign memories")
    precondition(arena.slotCount <= Self.returnedNumberMax, "too many slots")
    self.arena = arena
    self.own = arena.view
    let slotCount = arena.slotCount
    states = FixedArray(repeating: 0, count: slotCount)
    free = FixedArray(repeating: 0, count: slotCount)
    for index in 0..<slotCount { free[index] = UInt32(slotCount - 1 - index) }
    freeCount = slotCount
    foreign = FixedArray(repeating: ForeignOwner(memory: .none), count: Self.foreignOwnersMax + 1)
    foreignMemories = shares.map(\.memory)
    foreignCount = shares.count
    for (index, share) in shares.enumerated() {
      foreign[index + 1] = ForeignOwner(
        memory: share.memory.reference, bringer: share.bringer == own ? nil : UInt16(share.bringer))
    }
    neighbourArenas = arenas
    neighbours = FixedArray(repeating: Neighbour(view: .none, start: 0), count: arenas.count)
    var slots = 0
    var returns = 0
    for (number, arena) in arenas.enumerated() {
      guard let arena else { continue }
      neighbours[number] = Neighbour(view: arena.view, start: slots, returnedStart: returns)
      slots += arena.slotCount
      returns += Self.returnsMax(of: number, arena, shares)
    }
    furtherHolds = FixedArray(repeating: 0, count: slots)
    returned = FixedArray(repeating: 0, count: returns)
  }

  /// All that may come back to a worker at once: its slots, and the foreign buffers that it brings.
  static func returnsMax(of number: Int, _ arena: FrameArena, _ shares: [ForeignShare]) -> Int {
    shares.reduce(arena.slotCount) { $0 + ($1.bringer == number ? $1.memory.bufferCount : 0) }
  }

  /// A worker's memory where no neighbour is.
  /// - Throws: `ENOMEM` where the address space is used up.
  public init(slotCount: Int, hugePages: Bool = true) throws(SystemError) {
    precondition(slotCount > 0)
    self.init(arena: try FrameArena(slotCount: slotCount, hugePages: hugePages))
  }

  // MARK: Ownership

  /// Slots of one's own that are held, those that neighbours have included.
  public var heldCount: Int { slotCount - freeCount - postedCount }
  public var freeSlots: Int { freeCount }

  /// Slots that are neither lent nor held and not on the free list either; 0, or one was lost.
  public var slotsAstray: Int {
    var idle = 0
    for slot in 0..<slotCount where states[slot] == 0 { idle += 1 }
    return idle - freeCount
  }

  /// The sends that all held slots wait for, neighbours' included, one's own that neighbours have not.
  public var holdsTotal: Int {
    var total = -handedOnCount
    for slot in 0..<slotCount where states[slot] != Self.postedMark { total += Int(states[slot]) }
    for number in 0..<neighbours.count { total += neighbours[number].takenCount }
    for place in 0..<furtherHolds.count { total += Int(furtherHolds[place]) }
    return total
  }

  /// Slots of a neighbour that this worker has.
  @inline(__always)
  public func takenCount(of neighbour: Int) -> Int { neighbours[neighbour].takenCount }
  public var neighbourCount: Int { neighbours.count }

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
      states[Int(buffer.index)] = old + UInt32(truncatingIfNeeded: count)
    } else if let number = neighbour(buffer) {
      let place = place(of: buffer, number)
      precondition(Int(furtherHolds[place]) + count < Int(Self.postedMark), "too many holds of a slot")
      furtherHolds[place] += UInt32(truncatingIfNeeded: count)
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
    } else if let number = neighbour(buffer) {
      let place = place(of: buffer, number)
      if furtherHolds[place] > 0 {
        furtherHolds[place] -= 1
      } else {
        precondition(neighbours[number].takenCount > 0, "release of a neighbour's slot not held")
        neighbours[number].takenCount -= 1
        returnTo(number, buffer.index)
      }
    } else {
      let owner = foreignOwner(buffer)
      guard foreign[owner].memory.release(Int(buffer.index)) else { return }
      foreign[owner].takenCount -= 1
      if let bringer = foreign[owner].bringer {
        returnTo(Int(bringer), UInt32(truncatingIfNeeded: owner) << Self.returnedNumberBits | buffer.index)
      } else {
        foreign[owner].memory.giveBack(Int(buffer.index))
      }
    }
  }

  @inline(__always)
  private mutating func returnTo(_ number: Int, _ what: UInt32) {
    returned[neighbours[number].returnedStart + neighbours[number].returnedCount] = what
    neighbours[number].returnedCount += 1
  }

  // MARK: Neighbours

  /// The name of a buffer for the worker that it is handed on to by worker `number`, this one.
  /// - Parameter holds: how many frames of it are handed on, which are all that hold it: they cross together, this the
  ///   first of them. 0 for those that follow.
  @inline(__always)
  public mutating func handOn(_ buffer: BufferReference, from number: Int, holds: Int = 1) -> BufferReference {
    if buffer.owner == 0 {
      if holds > 0 {
        precondition(states[Int(buffer.index)] == UInt32(holds), "a slot that waits for sends is handed on")
        states[Int(buffer.index)] = 1
        handedOnCount += 1
      }
      return BufferReference(owner: Self.neighbourOwnerFirst + number, index: Int(buffer.index))
    }
    guard let owner = neighbour(buffer) else {
      if holds > 0 { handOnForeign(buffer, holds: holds) }
      return buffer
    }
    if holds > 0 {
      let place = place(of: buffer, owner)
      precondition(Int(furtherHolds[place]) == holds - 1, "a slot that waits for sends is handed on")
      furtherHolds[place] = 0
      neighbours[owner].takenCount -= 1
    }
    return buffer
  }

  /// Takes over what a neighbour handed on to worker `own`, this one: it is held as often as it was there. Returns its
  /// name here: it may be a slot of one's own that was handed on and comes back routed.
  @inline(__always)
  public mutating func takeOver(_ buffer: BufferReference, by own: Int, holds: Int = 1) -> BufferReference {
    guard let number = neighbour(buffer) else {
      if holds > 0 { takeOverForeign(buffer) }
      return buffer
    }
    if number == own {
      if holds > 0 {
        precondition(handedOnCount > 0, "a slot came back that was not handed on")
        handedOnCount -= 1
        if holds > 1 { hold(BufferReference(slot: Int(buffer.index)), adding: holds - 1) }
      }
      return BufferReference(slot: Int(buffer.index))
    }
    if holds > 0 {
      neighbours[number].takenCount += 1
      if holds > 1 { hold(buffer, adding: holds - 1) }
    }
    return buffer
  }

  /// Its name is the same everywhere, and its holds are its own.
  private mutating func handOnForeign(_ buffer: BufferReference, holds: Int) {
    let owner = foreignOwner(buffer)
    precondition(
      foreign[owner].memory.holds(Int(buffer.index)) == holds, "a foreign buffer that waits for sends is handed on")
    foreign[owner].takenCount -= 1
    if foreign[owner].bringer == nil { foreignHandedOnCount += 1 }
  }

  private mutating func takeOverForeign(_ buffer: BufferReference) {
    let owner = foreignOwner(buffer)
    foreign[owner].takenCount += 1
    guard foreign[owner].bringer == nil else { return }
    precondition(foreignHandedOnCount > 0, "a foreign buffer came back that was not handed on")
    foreignHandedOnCount -= 1
  }

  /// A slot of one's own, or a foreign buffer that one brought, came back from a neighbour.
  @inline(__always)
  public mutating func comeBack(_ returned: UInt32) {
    let owner = Int(returned >> Self.returnedNumberBits)
    guard owner == 0 else { return comeBackForeign(owner, Int(returned & UInt32(Self.returnedNumberMax - 1))) }
    precondition(handedOnCount > 0, "a slot came back that was not handed on")
    handedOnCount -= 1
    release(BufferReference(slot: Int(returned)))
  }

  private mutating func comeBackForeign(_ owner: Int, _ index: Int) {
    precondition(foreignHandedOnCount > 0, "a foreign buffer came back that was not handed on")
    foreignHandedOnCount -= 1
    foreign[owner].memory.giveBack(index)
  }

  @inline(__always)
  public func returnedCount(of number: Int) -> Int { neighbours[number].returnedCount }

  /// What is to be given back to a neighbour, for its `comeBack`.
  @inline(__always)
  @_lifetime(borrow self)
  public func returnedBuffers(of number: Int) -> Span<UInt32> {
    returned.span(from: neighbours[number].returnedStart, count: neighbours[number].returnedCount)
  }

  /// They were given back.
  @inline(__always)
  public mutating func forgetReturned(of number: Int) { neighbours[number].returnedCount = 0 }

  @inline(__always)
  private func neighbour(_ buffer: BufferReference) -> Int? {
    let owner = Int(buffer.owner)
    return owner >= Self.neighbourOwnerFirst ? owner - Self.neighbourOwnerFirst : nil
  }

  @inline(__always)
  private func place(of buffer: BufferReference, _ number: Int) -> Int {
    precondition(Int(buffer.index) < neighbours[number].view.slotCount, "slot out of range")
    return neighbours[number].start + Int(buffer.index)
  }

  // MARK: Foreign memory

  /// Makes a foreign memory known; its descriptors name the owner returned. Control keeps the memory alive.
  public mutating func adopt(_ memory: ForeignMemory.Reference) -> Int {
    precondition(foreignCount < Self.foreignOwnersMax, "too many foreign memories")
    foreignCount += 1
    foreign[foreignCount] = ForeignOwner(memory: memory)
    return foreignCount
  }

  /// So many buffers of a foreign memory were brought by this worker.
  @inline(__always)
  mutating func brought(_ count: Int, of owner: Int) { foreign[owner].takenCount += count }

  /// Whether a frame may wait for a full lane. Of a foreign memory only a part may wait for one that is stuck: else a
  /// guest that takes nothing would keep all the frames that another may have under way, each in several places of its
  /// ring perhaps.
  @inline(__always)
  func mayWait(_ buffer: BufferReference, forStuckLane isStuck: Bool) -> Bool {
    guard buffer.isForeign else { return true }
    let owner = foreign[foreignOwner(buffer)]
    let waitingMax = owner.memory.waitingMax
    return waitingMax >= 0 && (!isStuck || owner.takenCount <= waitingMax)
  }

  @inline(__always)
  private func foreignOwner(_ buffer: BufferReference) -> Int {
    precondition(buffer.owner != 0 && Int(buffer.owner) <= foreignCount, "unknown owner of a buffer")
    return Int(buffer.owner)
  }

  @inline(__always)
  private func foreignMemory(_ buffer: BufferReference) -> ForeignMemory.Reference {
    foreign[foreignOwner(buffer)].memory
  }

  // MARK: Bytes

  /// The start of a slot of one's own, for the kernel to write `slotBytes` to.
  @unsafe @inline(__always)
  public func address(ofSlot slot: Int) -> UnsafeMutableRawPointer { unsafe own.address(ofSlot: slot) }

  /// The start of a slot of one's own or a neighbour's; nil for foreign memory.
  @unsafe @inline(__always)
  private func slotAddress(_ buffer: BufferReference) -> UnsafeMutableRawPointer? {
    if buffer.owner == 0 { return unsafe own.address(ofSlot: Int(buffer.index)) }
    guard let number = neighbour(buffer) else { return nil }
    return unsafe neighbours[number].view.address(ofSlot: Int(buffer.index))
  }

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
    if let start = unsafe slotAddress(descriptor.buffer) {
      precondition(offset + length <= Self.slotBytes, "a descriptor leaves its slot")
      return unsafe (start + offset, length)
    }
    let segment = unsafe foreignMemory(descriptor.buffer).segment(0, of: Int(descriptor.buffer.index))
    unsafe precondition(offset <= segment.iov_len, "a descriptor leaves its segment")
    return unsafe (segment.iov_base + offset, min(length, segment.iov_len - offset))
  }

  /// One segment of a frame that lies in another's memory.
  @unsafe
  func segment(_ number: Int, of buffer: BufferReference) -> iovec {
    unsafe foreignMemory(buffer).segment(number, of: Int(buffer.index))
  }

  /// Copies a frame's bytes, all its segments in order.
  /// - Parameter place: `descriptor.length` bytes.
  @unsafe @inline(__always)
  func copy(_ descriptor: Descriptor, to place: UnsafeMutableRawPointer) {
    let (start, count) = unsafe headRange(descriptor)
    unsafe clinux_copy(place, start, count)
    if count < Int(descriptor.length) { unsafe copyRest(of: descriptor, from: count, to: place + count) }
  }

  @unsafe @inline(never)
  private func copyRest(of descriptor: Descriptor, from first: Int, to place: UnsafeMutableRawPointer) {
    let memory = foreignMemory(descriptor.buffer)
    var left = Int(descriptor.length) - first
    var place = unsafe place
    var number = 1
    while left > 0 {
      let segment = unsafe memory.segment(number, of: Int(descriptor.buffer.index))
      let count = unsafe min(left, segment.iov_len)
      unsafe place.copyMemory(from: segment.iov_base, byteCount: count)
      unsafe place += count
      left -= count
      number += 1
    }
  }

  /// Writes the segments of a frame as I/O vectors; returns how many, or nil when they are more than `room`.
  @unsafe @inline(__always)
  public func vectors(of descriptor: Descriptor, into vectors: UnsafeMutablePointer<iovec>, room: Int) -> Int? {
    if !descriptor.buffer.isForeign {
      guard room >= 1 else { return nil }
      let (start, count) = unsafe headRange(descriptor)
      unsafe vectors[0] = unsafe iovec(iov_base: start, iov_len: count)
      return 1
    }
    let memory = foreignMemory(descriptor.buffer)
    var left = Int(descriptor.length)
    var skip = Int(descriptor.offset)
    var used = 0
    for number in 0..<Int(descriptor.segments) where left > 0 {
      let segment = unsafe memory.segment(number, of: Int(descriptor.buffer.index))
      guard unsafe skip < segment.iov_len else {
        skip -= unsafe segment.iov_len
        continue
      }
      guard used < room else { return nil }
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
