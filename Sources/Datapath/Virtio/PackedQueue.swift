import CLinux
import Synchronization

/// A packed ring (virtio 1.2 §2.8): one ring of descriptors that both sides write. Two bits of each tell, with the
/// count of rounds, whose it is; a chain is consecutive descriptors, and is given back in the place of the oldest that
/// was taken, whichever chain that was.
@safe
public struct PackedQueue: Virtqueue, ~Copyable, @unchecked Sendable {
  private let descriptors: UnsafeMutableRawPointer
  private let driverEvent: UnsafeMutableRawPointer
  private let deviceEvent: UnsafeMutableRawPointer
  public let size: Int
  private let features: VirtqueueFeatures
  private var nextAvailable: Int
  /// Both ownership bits of a descriptor that the driver makes available in this round.
  private var availableBits: UInt16
  private var nextUsed: Int
  /// Both ownership bits of a descriptor that the device gives back in this round.
  private var usedBits: UInt16
  /// Places that were completed and not published; the flags of the first are not on the ring yet.
  private var stagedPlaces = 0
  private var stagedFirst = 0
  private var stagedFlags: UInt16 = 0
  /// Places published since `mustCall` was asked.
  private var unannounced = Virtqueues.unannouncedFirst
  private var takenPlaces = 0
  /// Chains ever taken.
  private var takenTotal = 0
  public private(set) var takenCount = 0
  private var pieceHint = GuestMemory.Hint()
  private var tableHint = GuestMemory.Hint()
  private var log: VirtqueueLogAddresses?
  private var inFlight = InFlightNotes()

  /// The available bit is 1 << 7, the used bit 1 << 15.
  private static var ownershipBits: UInt16 { 0x8080 }
  private static var usedBit: UInt16 { 0x8000 }
  /// Reserved (virtio 1.2 §2.8.13), and no driver's: of the first place of a batch that is completed and not published,
  /// for a device that takes this one's place.
  private static var stagedBit: UInt16 { 1 << 12 }
  private static func availableBits(wrap: Bool) -> UInt16 { wrap ? 0x0080 : 0x8000 }
  private static func usedBits(wrap: Bool) -> UInt16 { wrap ? 0x8080 : 0 }

  // Event suppression (virtio 1.2 §2.8.10 and §2.8.14): the low half a place and its wrap counter, the high half flags.
  private static var eventsOn: UInt32 { 0 }
  private static var eventsOff: UInt32 { 1 }
  private static var eventsAtPlace: UInt32 { 2 }

  public static func areaBytes(size: Int, features: VirtqueueFeatures) -> (descriptor: Int, driver: Int, device: Int) {
    (16 * size, 4, 4)
  }

  /// A base whose high half is 0 says nothing of the used place, which then is the available one: DPDK's virtio-user
  /// sends that, and a device that gave back all chains before it stopped has them equal.
  public init(_ areas: VirtqueueAreas, features: VirtqueueFeatures, base: UInt32) throws(VirtqueueError) {
    guard areas.size > 0, areas.size <= VirtqueueAreas.sizeMax else { throw .size(areas.size) }
    let availableHalf = UInt16(truncatingIfNeeded: base)
    let usedHalf = base >> 16 == 0 ? availableHalf : UInt16(truncatingIfNeeded: base >> 16)
    guard Int(availableHalf & 0x7FFF) < areas.size, Int(usedHalf & 0x7FFF) < areas.size else { throw .base(base) }
    // What stands between the two was taken by a device before us: it is not ours to complete.
    var distance = Int(availableHalf & 0x7FFF) - Int(usedHalf & 0x7FFF)
    if availableHalf >> 15 != usedHalf >> 15 { distance += areas.size }
    guard distance >= 0, distance <= areas.size else { throw .base(base) }
    try areas.checkAlignment(driver: 4, device: 4)
    unsafe descriptors = unsafe areas.descriptor
    unsafe driverEvent = unsafe areas.driver
    unsafe deviceEvent = unsafe areas.device
    size = areas.size
    self.features = features
    nextAvailable = Int(availableHalf & 0x7FFF)
    availableBits = Self.availableBits(wrap: availableHalf >> 15 != 0)
    nextUsed = Int(usedHalf & 0x7FFF)
    usedBits = Self.usedBits(wrap: usedHalf >> 15 != 0)
    takenPlaces = distance
    goOnWhereRingSays()
  }

  /// A frontend whose device died may not know where the queue stands: QEMU then says again where it began. Where the
  /// ring contradicts that, and has chains of one place only, it tells itself: the used bit of the places that were
  /// given back in this round is another than that of the rest. What was taken and not given back is taken again.
  ///
  /// A device that died in the midst of a batch left the batch's first place marked, and later ones as used, which the
  /// driver does not see before the first: that batch is published next.
  private mutating func goOnWhereRingSays() {
    let isBeginning = nextUsed == 0 && usedBits != 0 && takenPlaces == 0
    let bits = usedBits
    let used = nextUsed
    let staged = (0..<size).first { flags($0) & Self.stagedBit != 0 }
    let isContradicted = (0..<size).contains { index in
      // On a new ring no used bit was ever set. On another nothing from the next used place on was given back in this
      // round, and nothing before it in the last one: the driver wrote to it since.
      isBeginning
        ? isMarkedUsed(index)
        : flags(index) & Self.ownershipBits == (index < used ? bits ^ Self.ownershipBits : bits)
    }
    guard isContradicted || staged != nil else { return }
    // The rest of a chain that was given back looks like a chain that is available; a last place may be such a rest.
    guard !(0..<size).contains(where: { flags($0) & VirtioDescriptor.next != 0 }) else { return }
    if let staged { return goOn(behind: staged) }
    let isUsed = isMarkedUsed(0)
    let place = (0..<size).first { isMarkedUsed($0) != isUsed }
    // All the same: the round just ended.
    let wrap = place == nil ? !isUsed : isUsed
    guard !((place ?? size)..<size).contains(where: { isMarkedUsed($0) == isUsed }) else { return }
    guard !(isBeginning && !wrap && place == size - 1) else { return }
    goOn(at: place ?? 0, wrap: wrap)
  }

  private mutating func goOn(at place: Int, wrap: Bool) {
    nextUsed = place
    usedBits = Self.usedBits(wrap: wrap)
    nextAvailable = place
    availableBits = Self.availableBits(wrap: wrap)
    takenPlaces = 0
  }

  /// - Parameter place: of the chain that a batch begins with, which is completed again.
  private mutating func goOn(behind place: Int) {
    let wrap = flags(place) & Self.availableBits(wrap: true) != 0
    stagedFirst = place
    stagedFlags = Self.usedBits(wrap: wrap) | flags(place) & VirtioDescriptor.write
    stagedPlaces = 1
    func isGivenBack(_ distance: Int) -> Bool {
      let isNextRound = place + distance >= size
      let index = isNextRound ? place + distance - size : place + distance
      return flags(index) & Self.ownershipBits == Self.usedBits(wrap: wrap != isNextRound)
    }
    while stagedPlaces < size, isGivenBack(stagedPlaces) { stagedPlaces += 1 }
    let isNextRound = place + stagedPlaces >= size
    goOn(at: isNextRound ? place + stagedPlaces - size : place + stagedPlaces, wrap: wrap != isNextRound)
  }

  private func flags(_ index: Int) -> UInt16 { unsafe SharedWord.load16(place(index) + 14) }
  private func isMarkedUsed(_ index: Int) -> Bool { flags(index) & Self.usedBit != 0 }

  private var availableHalf: UInt32 {
    UInt32(truncatingIfNeeded: nextAvailable) | (availableBits == Self.availableBits(wrap: true) ? 1 << 15 : 0)
  }
  private var usedHalf: UInt32 { UInt32(truncatingIfNeeded: nextUsed) | (usedBits != 0 ? 1 << 15 : 0) }

  public var base: UInt32 { availableHalf | usedHalf << 16 }

  public mutating func logWrites(_ addresses: VirtqueueLogAddresses?) { log = addresses }

  public static func inFlightBytes(size: Int) -> Int { InFlightNotes.regionBytes(size: size, isPacked: true) }

  public mutating func trackInFlight(_ region: UnsafeMutableRawPointer) throws(VirtqueueError) -> Int {
    precondition(takenTotal == 0, "chains in flight are noted from the first one on")
    let isNew = unsafe InFlightNotes.isNew(region)
    var stand = InFlightNotes.PackedPlace(used: nextUsed, usedWrap: usedBits != 0, takenPlaces: takenPlaces)
    inFlight = unsafe try InFlightNotes.packed(region, size: size, ring: descriptors, &stand)
    guard !isNew else { return 0 }
    stagedPlaces = 0
    nextUsed = stand.used
    usedBits = Self.usedBits(wrap: stand.usedWrap)
    nextAvailable = stand.used
    availableBits = Self.availableBits(wrap: stand.usedWrap)
    takenPlaces = stand.takenPlaces
    for _ in 0..<takenPlaces {
      // A batch that was not published may have left its later places as used: the driver would take them for that as
      // soon as it saw the place before.
      unsafe SharedWord.store16(availableBits, at: place(nextAvailable) + 14)
      nextAvailable += 1
      if nextAvailable == size {
        nextAvailable = 0
        availableBits ^= Self.ownershipBits
      }
    }
    return inFlight.againCount
  }

  // MARK: Taking

  @unsafe @inline(__always)
  private func place(_ index: Int) -> UnsafeMutableRawPointer {
    unsafe descriptors + VirtioDescriptor.bytes * index
  }

  @inline(__always)
  public mutating func next(_ memory: GuestMemory.Reference, into chain: inout VirtioChain) -> VirtqueueResult {
    if inFlight.isOn, inFlight.hasAgain { return nextAgain(memory, into: &chain) }
    var index = nextAvailable
    // The driver writes these flags last of the chain: all that follows is of after.
    var flags = unsafe SharedWord.load16Acquiring(place(index) + 14)
    guard flags & Self.ownershipBits == availableBits else { return .none }
    chain.begin()
    var places = 0
    var identifier: UInt16 = 0
    var isLast = false
    var note: UInt16?
    while !isLast {
      guard takenPlaces + stagedPlaces + places < size else {
        return .broken(places == 0 ? .tooManyTaken : .chainTooLong)
      }
      places += 1
      let address = unsafe SharedWord.load64(place(index))
      let bytes = unsafe SharedWord.load32(place(index) + 8)
      identifier = unsafe SharedWord.load16(place(index) + 12)
      isLast = flags & VirtioDescriptor.next == 0
      if let fault = append(address, bytes, flags, memory, into: &chain) { return .broken(fault) }
      if inFlight.isOn {
        inFlight.fillPacked(&note, address: address, bytes: bytes, identifier: identifier, flags: flags)
      }
      index = index + 1 == size ? 0 : index + 1
      if !isLast { flags = unsafe SharedWord.load16(place(index) + 14) }
    }
    let head = note.map { inFlight.notePacked(last: $0, places: places, number: takenTotal) } ?? 0
    chain.token = VirtioChain.Token(identifier: identifier, places: places, note: head)
    if index <= nextAvailable { availableBits ^= Self.ownershipBits }
    nextAvailable = index
    takenPlaces += places
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
    let count = min(most, VirtioSingles.countMax)
    // What is wrong beyond it `next` tells.
    let room = size - takenPlaces - stagedPlaces
    let ring = unsafe descriptors
    let notesChains = inFlight.isOn
    var isLeft = false
    var index = nextAvailable
    var bits = availableBits
    var region = memory.region(pieceHint)
    var taken = 0
    while taken < count {
      let descriptor = unsafe ring + VirtioDescriptor.bytes &* index
      let flags = unsafe SharedWord.load16Acquiring(descriptor + 14)
      guard flags & Self.ownershipBits == bits else { break }
      isLeft = true
      guard flags & (VirtioDescriptor.next | VirtioDescriptor.indirect) == 0, taken < room else { break }
      let address = unsafe SharedWord.load64(descriptor)
      let rest = unsafe SharedWord.load64(descriptor + 8)
      if !region.contains(address) { region = memory.region(at: address, &pieceHint) }
      let bytes = UInt32(truncatingIfNeeded: rest)
      let identifier = UInt16(truncatingIfNeeded: rest >> 32)
      guard let place = unsafe region.place(of: address, bytes: bytes) else { break }
      var note: UInt16 = 0
      if notesChains {
        note = inFlight.noteSingle(
          address: address, bytes: bytes, identifier: identifier, flags: flags, number: takenTotal &+ taken)
      }
      isLeft = false
      unsafe singles.set(
        taken, place, guestAddress: address, bytes: bytes, isWritable: flags & VirtioDescriptor.write != 0,
        token: VirtioChain.Token(identifier: identifier, places: 1, note: note))
      taken &+= 1
      index &+= 1
      if index == size {
        index = 0
        bits ^= Self.ownershipBits
      }
    }
    singles.count = taken
    nextAvailable = index
    availableBits = bits
    takenPlaces &+= taken
    takenCount &+= taken
    takenTotal &+= taken
    return isLeft
  }

  public mutating func giveBack(last count: Int) {
    let index = nextAvailable - count
    rewind(
      to: VirtqueueMark(
        available: UInt16(truncatingIfNeeded: index < 0 ? index + size : index),
        availableBits: index < 0 ? availableBits ^ Self.ownershipBits : availableBits, takenTotal: takenTotal &- count))
  }

  /// A chain that a device before took, as it was noted: its place on the ring may be written over.
  @inline(never)
  private mutating func nextAgain(_ memory: GuestMemory.Reference, into chain: inout VirtioChain) -> VirtqueueResult {
    let head = inFlight.againNote
    let places = inFlight.places(of: head)
    var note = head
    var identifier: UInt16 = 0
    chain.begin()
    for _ in 0..<places {
      let descriptor = inFlight.descriptor(note)
      identifier = descriptor.identifier
      if let fault = append(descriptor.address, descriptor.bytes, descriptor.flags, memory, into: &chain) {
        return .broken(fault)
      }
      note = descriptor.next
    }
    chain.token = VirtioChain.Token(identifier: identifier, places: places, note: head)
    inFlight.takeAgain()
    takenCount += 1
    takenTotal &+= 1
    return .chain
  }

  /// Adds the memory of a descriptor, or of those in the table that it names.
  @inline(__always)
  private mutating func append(
    _ address: UInt64, _ bytes: UInt32, _ flags: UInt16, _ memory: GuestMemory.Reference, into chain: inout VirtioChain
  ) -> VirtqueueFault? {
    if flags & VirtioDescriptor.indirect != 0 {
      guard features.contains(.indirectDescriptors) else { return .indirectNotAgreed }
      guard flags & VirtioDescriptor.next == 0 else { return .indirectWithNext }
      return walkTable(address, bytes, memory, into: &chain)
    }
    return chain.append(
      address, bytes: Int(bytes), isWritable: flags & VirtioDescriptor.write != 0, memory: memory, hint: &pieceHint)
  }

  /// All descriptors of an indirect table, in their order (virtio 1.2 §2.8.7).
  private mutating func walkTable(
    _ address: UInt64, _ bytes: UInt32, _ memory: GuestMemory.Reference, into chain: inout VirtioChain
  ) -> VirtqueueFault? {
    var table = unsafe descriptors
    var entries = 0
    if let fault = unsafe VirtioDescriptor.table(
      at: address, bytes: bytes, size: size, memory: memory, hint: &tableHint, &table, &entries)
    {
      return fault
    }
    for index in 0..<entries {
      let place = unsafe table + VirtioDescriptor.bytes * index
      let address = unsafe SharedWord.load64(place)
      let rest = unsafe SharedWord.load64(place + 8)
      let flags = UInt16(truncatingIfNeeded: rest >> 48)
      guard flags & VirtioDescriptor.indirect == 0 else { return .indirectNested }
      if let fault = chain.append(
        address, bytes: Int(UInt32(truncatingIfNeeded: rest)), isWritable: flags & VirtioDescriptor.write != 0,
        memory: memory, hint: &pieceHint)
      {
        return fault
      }
    }
    return nil
  }

  @inline(__always)
  public var mark: VirtqueueMark {
    VirtqueueMark(
      available: UInt16(truncatingIfNeeded: nextAvailable), availableBits: availableBits, takenTotal: takenTotal)
  }

  public mutating func rewind(to mark: VirtqueueMark) {
    var places = nextAvailable - Int(mark.available)
    if availableBits != mark.availableBits { places += size }
    let count = takenTotal &- mark.takenTotal
    precondition(places <= takenPlaces && count <= takenCount, "chains are given back that were completed")
    if inFlight.isOn {
      inFlight.forgetPacked(max(mark.takenTotal, inFlight.againCount)..<max(takenTotal, inFlight.againCount))
      inFlight.giveBackAgain(to: mark.takenTotal)
    }
    nextAvailable = Int(mark.available)
    availableBits = mark.availableBits
    takenPlaces -= places
    takenCount -= count
    takenTotal = mark.takenTotal
  }

  // MARK: Giving back

  @inline(__always)
  public mutating func complete(_ token: VirtioChain.Token, writtenBytes: Int) {
    precondition(takenCount > 0 && takenPlaces >= Int(token.places), "a chain is completed that was not taken")
    takenCount &-= 1
    takenPlaces -= Int(token.places)
    let place = unsafe place(nextUsed)
    let bytes = UInt32(clamping: writtenBytes)
    var flags = usedBits | (writtenBytes > 0 ? VirtioDescriptor.write : 0)
    // The driver looks at a place only when it has seen the one before: while the first is not marked as used it sees
    // none.
    if stagedPlaces == 0 {
      stagedFirst = nextUsed
      stagedFlags = flags
      flags = flags ^ Self.usedBit | Self.stagedBit
    }
    unsafe SharedWord.store64(
      UInt64(bytes) | UInt64(token.identifier) << 32 | UInt64(flags) << 48, at: place + 8)
    stagedPlaces &+= Int(token.places)
    nextUsed &+= Int(token.places)
    if nextUsed >= size {
      nextUsed -= size
      usedBits ^= Self.ownershipBits
    }
    if inFlight.isOn { inFlight.stage(token.note) }
  }

  @inline(__always)
  public mutating func publish(_ memory: GuestMemory.Reference) {
    guard stagedPlaces > 0 else { return }
    if inFlight.isOn { inFlight.beginPackedBatch(used: nextUsed, wrap: usedBits != 0) }
    unsafe SharedWord.store16Releasing(stagedFlags, at: place(stagedFirst) + 14)
    if inFlight.isOn { inFlight.endPackedBatch(used: nextUsed, wrap: usedBits != 0) }
    if let log { markUsed(memory, at: log.descriptor) }
    unannounced += stagedPlaces
    stagedPlaces = 0
  }

  @inline(never)
  private func markUsed(_ memory: GuestMemory.Reference, at address: UInt64) {
    let run = min(stagedPlaces, size - stagedFirst)
    memory.markDirty(address &+ UInt64(16 * stagedFirst), bytes: 16 * run)
    memory.markDirty(address, bytes: 16 * (stagedPlaces - run))
  }

  // MARK: Notifications

  /// virtio 1.2 §2.8.10.
  @inline(__always)
  public mutating func mustCall() -> Bool {
    guard unannounced > 0 else { return false }
    let count = unannounced
    // Of what was published and of what the driver reads after it says what it wants: one sees the other.
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    unannounced = 0
    let event = unsafe SharedWord.load32(driverEvent)
    let flags = event >> 16 & 3
    guard features.contains(.eventIndex), flags == Self.eventsAtPlace else { return flags != Self.eventsOff }
    // How far the next used place is beyond the one that the driver waits for: over 0 once that one was used.
    var distance = nextUsed - Int(event & 0x7FFF)
    if event & 0x8000 != usedHalf & 0x8000 { distance += size }
    return distance > 0 && distance <= count
  }

  public mutating func askForKicks(_ memory: GuestMemory.Reference) -> Bool {
    // Not by place, which those that are there may have passed: they may be too few for who asks.
    setDeviceEvent(Self.eventsOn << 16, memory)
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    return unsafe inFlight.hasAgain
      || SharedWord.load16Acquiring(place(nextAvailable) + 14) & Self.ownershipBits == availableBits
  }

  public mutating func refuseKicks(_ memory: GuestMemory.Reference) {
    setDeviceEvent(Self.eventsOff << 16, memory)
  }

  private func setDeviceEvent(_ event: UInt32, _ memory: GuestMemory.Reference) {
    unsafe SharedWord.store32(event, at: deviceEvent)
    if let log { memory.markDirty(log.device, bytes: 4) }
  }
}
