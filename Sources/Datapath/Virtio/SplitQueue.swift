import CLinux
import Synchronization

/// A split ring (virtio 1.2 §2.7): a table of descriptors, a ring of chains that the driver makes available, and one of
/// those that the device has used.
@safe
public struct SplitQueue: Virtqueue, ~Copyable, @unchecked Sendable {
  private let descriptors: UnsafeMutableRawPointer
  private let available: UnsafeMutableRawPointer
  private let used: UnsafeMutableRawPointer
  public let size: Int
  private let features: VirtqueueFeatures
  /// Indices count up for ever, modulo 2^16; their place on a ring is modulo its size.
  private var nextAvailable: UInt16
  /// The driver's index, as it was when it was read last.
  private var availableSeen: UInt16
  private var nextUsed: UInt16
  private var publishedUsed: UInt16
  /// Chains published since `mustCall` was asked.
  private var unannounced = Virtqueues.unannouncedFirst
  public private(set) var takenCount = 0
  private var pieceHint = GuestMemory.Hint()
  private var tableHint = GuestMemory.Hint()
  private var log: VirtqueueLogAddresses?
  /// Chains ever taken.
  private var takenTotal = 0
  private var inFlight = InFlightNotes()

  private static var flagNoNotify: UInt16 { 1 }
  private static var flagNoInterrupt: UInt16 { 1 }

  public static func areaBytes(size: Int, features: VirtqueueFeatures) -> (descriptor: Int, driver: Int, device: Int) {
    let event = features.contains(.eventIndex) ? 2 : 0
    return (16 * size, 4 + 2 * size + event, 4 + 8 * size + event)
  }

  /// What was used is read from the used ring.
  public init(_ areas: VirtqueueAreas, features: VirtqueueFeatures, base: UInt32) throws(VirtqueueError) {
    guard areas.size > 0, areas.size <= VirtqueueAreas.sizeMax, areas.size & (areas.size - 1) == 0 else {
      throw .size(areas.size)
    }
    guard base <= UInt16.max else { throw .base(base) }
    try areas.checkAlignment(driver: 2, device: 4)
    unsafe descriptors = unsafe areas.descriptor
    unsafe available = unsafe areas.driver
    unsafe used = unsafe areas.device
    size = areas.size
    self.features = features
    nextAvailable = UInt16(base)
    availableSeen = nextAvailable
    nextUsed = unsafe SharedWord.load16(areas.device + 2)
    publishedUsed = nextUsed
  }

  public var base: UInt32 { UInt32(nextAvailable) }

  public mutating func logWrites(_ addresses: VirtqueueLogAddresses?) { log = addresses }

  public static func inFlightBytes(size: Int) -> Int { InFlightNotes.regionBytes(size: size, isPacked: false) }

  public mutating func trackInFlight(_ region: UnsafeMutableRawPointer) throws(VirtqueueError) -> Int {
    precondition(takenTotal == 0, "chains in flight are noted from the first one on")
    let isNew = unsafe InFlightNotes.isNew(region)
    inFlight = unsafe try InFlightNotes.split(region, size: size, usedIndex: nextUsed)
    if !isNew {
      nextAvailable = nextUsed &+ UInt16(truncatingIfNeeded: inFlight.againCount)
      availableSeen = nextAvailable
    }
    return inFlight.againCount
  }

  // MARK: Taking

  @inline(__always)
  public mutating func next(_ memory: GuestMemory.Reference, into chain: inout VirtioChain) -> VirtqueueResult {
    if inFlight.isOn, inFlight.hasAgain { return nextAgain(memory, into: &chain) }
    if nextAvailable == availableSeen {
      availableSeen = unsafe SharedWord.load16Acquiring(available + 2)
      if nextAvailable == availableSeen { return .none }
    }
    // What was seen may be of an earlier look, and taken chains may have been given back: still no more than the size.
    guard Int(availableSeen &- nextAvailable) <= size else {
      availableSeen = nextAvailable
      return .broken(.availableIndexJumped)
    }
    guard takenCount + Int(nextUsed &- publishedUsed) < size else { return .broken(.tooManyTaken) }
    let head = unsafe SharedWord.load16(available + 4 + 2 * (Int(nextAvailable) & (size - 1)))
    guard Int(head) < size else { return .broken(.headOutOfRange) }
    chain.begin()
    if let fault = walk(from: Int(head), memory, into: &chain) { return .broken(fault) }
    chain.token = VirtioChain.Token(identifier: head, places: 1)
    if inFlight.isOn { inFlight.noteSplit(head, number: takenTotal) }
    nextAvailable &+= 1
    takenCount += 1
    takenTotal &+= 1
    return .chain
  }

  @inline(__always)
  public mutating func take(
    _ memory: GuestMemory.Reference, upTo most: Int, into singles: inout VirtioSingles
  ) -> Bool {
    singles.count = 0
    if inFlight.isOn, inFlight.hasAgain { return true }
    var ready = Int(availableSeen &- nextAvailable)
    if ready < most {
      availableSeen = unsafe SharedWord.load16Acquiring(available + 2)
      ready = Int(availableSeen &- nextAvailable)
    }
    // What is wrong with these `next` tells.
    guard ready <= size - takenCount - Int(nextUsed &- publishedUsed) else { return true }
    let count = min(ready, most, VirtioSingles.countMax)
    // All that the loop needs at hand: what it stores might be any of it, for all that the compiler knows.
    let mask = size &- 1
    let start = Int(nextAvailable)
    let heads = unsafe available + 4
    let table = unsafe descriptors
    let notesChains = inFlight.isOn
    var region = memory.region(pieceHint)
    var taken = 0
    while taken < count {
      let head = unsafe SharedWord.load16(heads + 2 &* ((start &+ taken) & mask))
      guard Int(head) <= mask else { break }
      let descriptor = unsafe table + VirtioDescriptor.bytes &* Int(head)
      let address = unsafe SharedWord.load64(descriptor)
      let rest = unsafe SharedWord.load64(descriptor + 8)
      let flags = UInt16(truncatingIfNeeded: rest >> 32)
      guard flags & (VirtioDescriptor.next | VirtioDescriptor.indirect) == 0 else { break }
      if !region.contains(address) { region = memory.region(at: address, &pieceHint) }
      let bytes = UInt32(truncatingIfNeeded: rest)
      guard let place = unsafe region.place(of: address, bytes: bytes) else { break }
      if notesChains { inFlight.noteSplit(head, number: takenTotal &+ taken) }
      unsafe singles.set(
        taken, place, guestAddress: address, bytes: bytes, isWritable: flags & VirtioDescriptor.write != 0,
        token: VirtioChain.Token(identifier: head, places: 1))
      taken &+= 1
    }
    singles.count = taken
    nextAvailable &+= UInt16(truncatingIfNeeded: taken)
    takenCount &+= taken
    takenTotal &+= taken
    return taken < count
  }

  public mutating func giveBack(last count: Int) {
    rewind(
      to: VirtqueueMark(
        available: nextAvailable &- UInt16(truncatingIfNeeded: count), takenTotal: takenTotal &- count))
  }

  /// A chain that a device before took: its descriptors stand in the table as long as it is not given back.
  @inline(never)
  private mutating func nextAgain(_ memory: GuestMemory.Reference, into chain: inout VirtioChain) -> VirtqueueResult {
    let head = inFlight.againNote
    chain.begin()
    if let fault = walk(from: Int(head), memory, into: &chain) { return .broken(fault) }
    chain.token = VirtioChain.Token(identifier: head, places: 1)
    inFlight.takeAgain()
    takenCount += 1
    takenTotal &+= 1
    return .chain
  }

  @inline(__always)
  private mutating func walk(
    from head: Int, _ memory: GuestMemory.Reference, into chain: inout VirtioChain
  ) -> VirtqueueFault? {
    var table = unsafe descriptors
    var entries = size
    var index = head
    var left = size
    var isIndirect = false
    while true {
      // A chain of more descriptors than its table has comes by one twice.
      guard left > 0 else { return .chainTooLong }
      left -= 1
      let place = unsafe table + VirtioDescriptor.bytes * index
      let address = unsafe SharedWord.load64(place)
      let rest = unsafe SharedWord.load64(place + 8)
      let bytes = UInt32(truncatingIfNeeded: rest)
      let flags = UInt16(truncatingIfNeeded: rest >> 32)
      if flags & VirtioDescriptor.indirect != 0 {
        guard features.contains(.indirectDescriptors) else { return .indirectNotAgreed }
        guard !isIndirect else { return .indirectNested }
        guard flags & VirtioDescriptor.next == 0 else { return .indirectWithNext }
        if let fault = unsafe VirtioDescriptor.table(
          at: address, bytes: bytes, size: size, memory: memory, hint: &tableHint, &table, &entries)
        {
          return fault
        }
        index = 0
        left = entries
        isIndirect = true
        continue
      }
      if let fault = chain.append(
        address, bytes: Int(bytes), isWritable: flags & VirtioDescriptor.write != 0, memory: memory, hint: &pieceHint)
      {
        return fault
      }
      guard flags & VirtioDescriptor.next != 0 else { return nil }
      index = Int(truncatingIfNeeded: rest >> 48)
      guard index < entries else { return .nextOutOfRange }
    }
  }

  @inline(__always)
  public var mark: VirtqueueMark {
    VirtqueueMark(available: nextAvailable, takenTotal: takenTotal)
  }

  public mutating func rewind(to mark: VirtqueueMark) {
    let count = takenTotal &- mark.takenTotal
    precondition(count <= takenCount, "chains are given back that were completed")
    if inFlight.isOn {
      inFlight.forgetSplit(max(mark.takenTotal, inFlight.againCount)..<max(takenTotal, inFlight.againCount))
      inFlight.giveBackAgain(to: mark.takenTotal)
    }
    nextAvailable = mark.available
    takenCount -= count
    takenTotal = mark.takenTotal
  }

  // MARK: Giving back

  @inline(__always)
  public mutating func complete(_ token: VirtioChain.Token, writtenBytes: Int) {
    precondition(takenCount > 0, "a chain is completed that was not taken")
    takenCount &-= 1
    let place = unsafe used + 4 + 8 * (Int(nextUsed) & (size &- 1))
    unsafe SharedWord.store32(UInt32(token.identifier), at: place)
    unsafe SharedWord.store32(UInt32(clamping: writtenBytes), at: place + 4)
    nextUsed &+= 1
    if inFlight.isOn { inFlight.stage(token.identifier) }
  }

  @inline(__always)
  public mutating func publish(_ memory: GuestMemory.Reference) {
    guard nextUsed != publishedUsed else { return }
    if inFlight.isOn { inFlight.beginSplitBatch() }
    unsafe SharedWord.store16Releasing(nextUsed, at: used + 2)
    if inFlight.isOn { inFlight.endSplitBatch(usedIndex: nextUsed) }
    if let log { markUsed(memory, at: log.device) }
    unannounced += Int(nextUsed &- publishedUsed)
    publishedUsed = nextUsed
  }

  @inline(never)
  private func markUsed(_ memory: GuestMemory.Reference, at address: UInt64) {
    let first = Int(publishedUsed) & (size - 1)
    let count = Int(nextUsed &- publishedUsed)
    let run = min(count, size - first)
    memory.markDirty(address &+ UInt64(4 + 8 * first), bytes: 8 * run)
    memory.markDirty(address &+ 4, bytes: 8 * (count - run))
    memory.markDirty(address &+ 2, bytes: 2)
  }

  // MARK: Notifications

  /// virtio 1.2 §2.7.7.
  @inline(__always)
  public mutating func mustCall() -> Bool {
    guard unannounced > 0 else { return false }
    let count = unannounced
    // Of the index that was published and of what the driver reads after it says what it wants: one sees the other.
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    unannounced = 0
    if features.contains(.eventIndex) {
      let event = unsafe SharedWord.load16(available + 4 + 2 * size)
      return Int(publishedUsed &- event &- 1) < count
    }
    return unsafe SharedWord.load16(available) & Self.flagNoInterrupt == 0
  }

  /// With event indices the kick comes with the next chain that the driver makes available: also for whom those that
  /// are there are too few.
  public mutating func askForKicks(_ memory: GuestMemory.Reference) -> Bool {
    guard features.contains(.eventIndex) else {
      setUsedFlags(0, memory)
      atomicMemoryFence(ordering: .sequentiallyConsistent)
      return unsafe inFlight.hasAgain || SharedWord.load16Acquiring(available + 2) != nextAvailable
    }
    var index = unsafe SharedWord.load16Acquiring(available + 2)
    // Each further look takes another chain from the driver, which has no more than the ring.
    for _ in 0...size {
      setAvailableEvent(index, memory)
      atomicMemoryFence(ordering: .sequentiallyConsistent)
      let now = unsafe SharedWord.load16Acquiring(available + 2)
      if now == index { break }
      index = now
    }
    return inFlight.hasAgain || index != nextAvailable
  }

  /// With event indices there is no "never": the index just passed comes again after 65,536 chains.
  public mutating func refuseKicks(_ memory: GuestMemory.Reference) {
    if features.contains(.eventIndex) {
      setAvailableEvent(nextAvailable &- 1, memory)
    } else {
      setUsedFlags(Self.flagNoNotify, memory)
    }
  }

  private func setAvailableEvent(_ index: UInt16, _ memory: GuestMemory.Reference) {
    unsafe SharedWord.store16(index, at: used + 4 + 8 * size)
    if let log { memory.markDirty(log.device &+ UInt64(4 + 8 * size), bytes: 2) }
  }
  private func setUsedFlags(_ flags: UInt16, _ memory: GuestMemory.Reference) {
    unsafe SharedWord.store16(flags, at: used)
    if let log { memory.markDirty(log.device, bytes: 2) }
  }
}
