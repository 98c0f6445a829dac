import Synchronization

/// Notes of the chains that a device has taken and not given back, in memory that it shares with the frontend: a device
/// that ends without a farewell leaves there what the next one is to take up again. The layout and the order of stores
/// are those of docs/interop/vhost-user of QEMU, "Inflight I/O tracking"; the process may end between any two.
///
/// The frontend can write there too. What is needed later is kept here as well and never read back.
@safe
struct InFlightNotes: ~Copyable, @unchecked Sendable {
  private(set) var isOn = false
  fileprivate let region: UnsafeMutableRawPointer?
  fileprivate let size: Int
  fileprivate var counter: UInt64 = 0
  /// The notes of the chains that were taken, in order: that of the chain number n is at n modulo the size.
  fileprivate var taken: FixedArray<UInt16>
  /// The notes of what is completed and not published.
  fileprivate var staged: FixedArray<UInt16>
  fileprivate var stagedCount = 0
  /// The notes that the device before left, in the order in which it took them; those up to `againNext` were taken.
  private var again: FixedArray<UInt16>
  private(set) var againNext = 0
  /// Packed: the entry that follows each one, in a chain or on the list of free ones; and the first free one.
  fileprivate var links: FixedArray<UInt16>
  fileprivate var free: UInt16 = 0
  /// Packed: how many entries the chain has that begins at each one.
  fileprivate var counts: FixedArray<UInt16>

  /// No notes are taken.
  init() {
    unsafe region = nil
    size = 0
    taken = FixedArray(repeating: 0, count: 0)
    staged = FixedArray(repeating: 0, count: 0)
    again = FixedArray(repeating: 0, count: 0)
    links = FixedArray(repeating: 0, count: 0)
    counts = FixedArray(repeating: 0, count: 0)
  }

  fileprivate init(_ region: UnsafeMutableRawPointer, size: Int, again left: [UInt16], counter: UInt64, isPacked: Bool)
  {
    isOn = true
    unsafe self.region = unsafe region
    self.size = size
    self.counter = counter
    taken = FixedArray(repeating: 0, count: size)
    staged = FixedArray(repeating: 0, count: size)
    again = FixedArray(repeating: 0, count: left.count)
    for (index, note) in left.enumerated() { again[index] = note }
    links = FixedArray(repeating: 0, count: isPacked ? size : 0)
    counts = FixedArray(repeating: 0, count: isPacked ? size : 0)
  }

  /// Whether chains are left that a device before took.
  @inline(__always)
  var hasAgain: Bool { againNext < again.count }

  /// How many they were at first. They are taken before all others, as the numbers from 0 on.
  var againCount: Int { again.count }
  /// The next of them.
  var againNote: UInt16 { again[againNext] }
  /// It was taken.
  mutating func takeAgain() { againNext += 1 }
  /// Only so many are taken.
  mutating func giveBackAgain(to count: Int) { againNext = min(againNext, count) }

  /// Bytes of the region of one queue, a whole number of cache lines, as QEMU's library lays them one behind the other.
  static func regionBytes(size: Int, isPacked: Bool) -> Int {
    let bytes = isPacked ? Packed.entries + Packed.entryBytes * size : Split.entries + Split.entryBytes * size
    return (bytes + 63) / 64 * 64
  }

  /// QueueRegionSplit and DescStateSplit: bytes from the start of the region, and of an entry.
  private enum Split {
    static var version: Int { 8 }
    static var size: Int { 10 }
    static var lastBatchHead: Int { 12 }
    static var usedIndex: Int { 14 }
    static var entries: Int { 16 }

    static var entryBytes: Int { 16 }
    static var isInFlight: Int { 0 }
    static var next: Int { 6 }
    static var counter: Int { 8 }
  }

  /// QueueRegionPacked and DescStatePacked.
  private enum Packed {
    static var version: Int { 8 }
    static var size: Int { 10 }
    static var free: Int { 12 }
    static var oldFree: Int { 14 }
    static var used: Int { 16 }
    static var oldUsed: Int { 18 }
    static var usedWrap: Int { 20 }
    static var oldUsedWrap: Int { 21 }
    static var entries: Int { 32 }

    static var entryBytes: Int { 32 }
    static var isInFlight: Int { 0 }
    static var next: Int { 2 }
    static var last: Int { 4 }
    static var count: Int { 6 }
    static var counter: Int { 8 }
    static var identifier: Int { 16 }
    static var flags: Int { 18 }
    static var bytes: Int { 20 }
    static var address: Int { 24 }
  }

  @unsafe
  private func split(_ head: UInt16) -> UnsafeMutableRawPointer {
    unsafe region.unsafelyUnwrapped + Split.entries + Split.entryBytes * Int(head)
  }
  @unsafe
  private func packed(_ note: UInt16) -> UnsafeMutableRawPointer {
    unsafe region.unsafelyUnwrapped + Packed.entries + Packed.entryBytes * Int(note)
  }

  /// All stores before come before all stores after.
  private func order() { atomicMemoryFence(ordering: .acquiringAndReleasing) }

  /// Whether nothing was ever noted.
  static func isNew(_ region: UnsafeMutableRawPointer) -> Bool {
    unsafe SharedWord.load16(region + Split.version) == 0
  }

  // MARK: Split

  /// Takes up the notes of a queue that has published up to `usedIndex`, or begins them where there are none.
  static func split(
    _ region: UnsafeMutableRawPointer, size: Int, usedIndex: UInt16
  ) throws(VirtqueueError) -> InFlightNotes {
    let entries = unsafe region + Split.entries
    func entry(_ head: Int) -> UnsafeMutableRawPointer { unsafe entries + Split.entryBytes * head }
    let version = unsafe SharedWord.load16(region + Split.version)
    guard version != 0 else {
      for head in 0..<size { unsafe SharedWord.store8(0, at: entry(head) + Split.isInFlight) }
      unsafe SharedWord.store16(usedIndex, at: region + Split.usedIndex)
      unsafe SharedWord.store16(UInt16(size), at: region + Split.size)
      unsafe SharedWord.store16Releasing(1, at: region + Split.version)
      return unsafe InFlightNotes(region, size: size, again: [], counter: 0, isPacked: false)
    }
    guard version == 1, unsafe Int(SharedWord.load16(region + Split.size)) == size else { throw .inFlightNotes }
    // The last batch was published, and perhaps not yet taken out of the notes.
    let batchCount = unsafe Int(usedIndex &- SharedWord.load16(region + Split.usedIndex))
    guard batchCount <= size else { throw .inFlightNotes }
    var head = unsafe Int(SharedWord.load16(region + Split.lastBatchHead))
    for _ in 0..<batchCount {
      guard head < size else { throw .inFlightNotes }
      unsafe SharedWord.store8(0, at: entry(head) + Split.isInFlight)
      head = unsafe Int(SharedWord.load16(entry(head) + Split.next))
    }
    unsafe SharedWord.store16Releasing(usedIndex, at: region + Split.usedIndex)
    var left: [(counter: UInt64, head: UInt16)] = []
    for head in 0..<size where unsafe SharedWord.load8(entry(head) + Split.isInFlight) == 1 {
      left.append((unsafe SharedWord.load64(entry(head) + Split.counter), UInt16(head)))
    }
    left.sort { $0 < $1 }
    return unsafe InFlightNotes(
      region, size: size, again: left.map(\.head), counter: (left.last?.counter ?? 0) &+ 1, isPacked: false)
  }

  /// A chain was taken, the one of this number.
  @inline(never)
  mutating func noteSplit(_ head: UInt16, number: Int) {
    taken[number % size] = head
    unsafe SharedWord.store64(counter, at: split(head) + Split.counter)
    order()
    unsafe SharedWord.store8(1, at: split(head) + Split.isInFlight)
    counter &+= 1
  }

  /// The chains of these numbers, the last ones, are given back as if never taken.
  mutating func forgetSplit(_ numbers: Range<Int>) {
    for number in numbers.reversed() { unsafe SharedWord.store8(0, at: split(taken[number % size]) + Split.isInFlight) }
  }

  /// A chain is completed.
  @inline(__always)
  mutating func stage(_ note: UInt16) {
    staged[stagedCount] = note
    stagedCount += 1
  }

  /// Before the used index is stored: which chains it is about.
  mutating func beginSplitBatch() {
    let place = unsafe region.unsafelyUnwrapped + Split.lastBatchHead
    var last = unsafe SharedWord.load16(place)
    for index in 0..<stagedCount {
      unsafe SharedWord.store16(last, at: split(staged[index]) + Split.next)
      last = staged[index]
    }
    order()
    unsafe SharedWord.store16(last, at: place)
    order()
  }

  /// After it was stored.
  mutating func endSplitBatch(usedIndex: UInt16) {
    order()
    for index in 0..<stagedCount { unsafe SharedWord.store8(0, at: split(staged[index]) + Split.isInFlight) }
    order()
    unsafe SharedWord.store16(usedIndex, at: region.unsafelyUnwrapped + Split.usedIndex)
    stagedCount = 0
  }
}

extension InFlightNotes {
  // MARK: Packed

  /// What the notes of a packed queue say of it.
  struct PackedPlace {
    /// The next used place, and its wrap counter.
    var used: Int
    var usedWrap: Bool
    /// Places between it and the next available one: those of the chains in flight.
    var takenPlaces: Int
  }

  /// Takes up the notes of a queue, or begins them where there are none.
  /// - Parameter start: where the queue stands; what the notes say takes its place.
  static func packed(
    _ region: UnsafeMutableRawPointer, size: Int, ring: UnsafeMutableRawPointer, _ start: inout PackedPlace
  ) throws(VirtqueueError) -> InFlightNotes {
    let version = unsafe SharedWord.load16(region + Packed.version)
    guard version != 0 else {
      var notes = unsafe InFlightNotes(region, size: size, again: [], counter: 0, isPacked: true)
      start.takenPlaces = 0
      notes.linkFree([Bool](repeating: false, count: size))
      for note in 0..<UInt16(size) { unsafe SharedWord.store8(0, at: notes.packed(note) + Packed.isInFlight) }
      notes.storePackedUsed(start.used, wrap: start.usedWrap)
      notes.endPackedUpdate(used: start.used, wrap: start.usedWrap)
      unsafe SharedWord.store16(UInt16(size), at: region + Packed.size)
      unsafe SharedWord.store16Releasing(1, at: region + Packed.version)
      return notes
    }
    guard version == 1, unsafe Int(SharedWord.load16(region + Packed.size)) == size else { throw .inFlightNotes }
    func entry(_ note: Int) -> UnsafeMutableRawPointer {
      unsafe region + Packed.entries + Packed.entryBytes * note
    }
    var used = unsafe Int(SharedWord.load16(region + Packed.oldUsed))
    var usedWrap = unsafe SharedWord.load8(region + Packed.oldUsedWrap) != 0
    let newUsed = unsafe Int(SharedWord.load16(region + Packed.used))
    let newWrap = unsafe SharedWord.load8(region + Packed.usedWrap) != 0
    guard used < size, newUsed < size else { throw .inFlightNotes }
    if newUsed != used || newWrap != usedWrap {
      // A batch was under way. The driver has seen it if its first place is no longer as the driver made it.
      let flags = unsafe SharedWord.load16Acquiring(ring + VirtioDescriptor.bytes * used + 14)
      if flags & 0x8080 != (usedWrap ? 0x0080 : 0x8000) {
        let count = newUsed - used + (newWrap == usedWrap ? 0 : size)
        guard count > 0, count <= size else { throw .inFlightNotes }
        var note = unsafe Int(SharedWord.load16(region + Packed.free))
        for _ in 0..<count {
          guard note < size else { throw .inFlightNotes }
          unsafe SharedWord.store8(0, at: entry(note) + Packed.isInFlight)
          note = unsafe Int(SharedWord.load16(entry(note) + Packed.next))
        }
        used = newUsed
        usedWrap = newWrap
      }
    }
    var left: [(counter: UInt64, note: UInt16, places: [UInt16])] = []
    var isTaken = [Bool](repeating: false, count: size)
    var places = 0
    for head in 0..<size where unsafe SharedWord.load8(entry(head) + Packed.isInFlight) == 1 {
      let count = unsafe Int(SharedWord.load16(entry(head) + Packed.count))
      places += count
      guard count > 0, places <= size else { throw .inFlightNotes }
      var chain: [UInt16] = []
      var note = head
      for _ in 0..<count {
        guard note < size, !isTaken[note] else { throw .inFlightNotes }
        isTaken[note] = true
        chain.append(UInt16(note))
        note = unsafe Int(SharedWord.load16(entry(note) + Packed.next))
      }
      left.append((unsafe SharedWord.load64(entry(head) + Packed.counter), UInt16(head), chain))
    }
    left.sort { $0.counter < $1.counter }
    var notes = unsafe InFlightNotes(
      region, size: size, again: left.map(\.note), counter: (left.last?.counter ?? 0) &+ 1, isPacked: true)
    for chain in left {
      for (note, next) in zip(chain.places, chain.places.dropFirst()) { notes.links[Int(note)] = next }
      notes.counts[Int(chain.note)] = UInt16(chain.places.count)
    }
    notes.linkFree(isTaken)
    notes.storePackedUsed(used, wrap: usedWrap)
    notes.endPackedUpdate(used: used, wrap: usedWrap)
    start = PackedPlace(used: used, usedWrap: usedWrap, takenPlaces: places)
    return notes
  }

  /// Makes the list of all entries that no chain has.
  private mutating func linkFree(_ isTaken: [Bool]) {
    let entries = isTaken.indices.filter { !isTaken[$0] }
    for (index, note) in entries.enumerated() {
      link(UInt16(note), to: UInt16(index + 1 < entries.count ? entries[index + 1] : 0))
    }
    free = UInt16(entries.first ?? 0)
  }
  private mutating func link(_ note: UInt16, to next: UInt16) {
    links[Int(note)] = next
    unsafe SharedWord.store16(next, at: packed(note) + Packed.next)
  }
  /// Puts the entries of a chain back on the list.
  private mutating func release(_ head: UInt16) {
    var last = head
    for _ in 1..<max(1, Int(counts[Int(head)])) { last = links[Int(last)] }
    link(last, to: free)
    free = head
  }
  private func storePackedUsed(_ used: Int, wrap: Bool) {
    let region = unsafe region.unsafelyUnwrapped
    unsafe SharedWord.store16(free, at: region + Packed.free)
    unsafe SharedWord.store16(UInt16(used), at: region + Packed.used)
    unsafe SharedWord.store8(wrap ? 1 : 0, at: region + Packed.usedWrap)
  }
  private func endPackedUpdate(used: Int, wrap: Bool) {
    let region = unsafe region.unsafelyUnwrapped
    unsafe SharedWord.store16(free, at: region + Packed.oldFree)
    unsafe SharedWord.store16(UInt16(used), at: region + Packed.oldUsed)
    unsafe SharedWord.store8(wrap ? 1 : 0, at: region + Packed.oldUsedWrap)
  }
  private func storeFree() {
    let region = unsafe region.unsafelyUnwrapped
    unsafe SharedWord.store16(free, at: region + Packed.free)
    unsafe SharedWord.store16(free, at: region + Packed.oldFree)
  }

  /// A descriptor of a chain that is being taken goes to the first free entry or the one behind the last it went to.
  /// - Parameter cursor: the entry; nil for the chain's first descriptor.
  mutating func fillPacked(
    _ cursor: inout UInt16?, address: UInt64, bytes: UInt32, identifier: UInt16, flags: UInt16
  ) {
    let note = cursor.map { links[Int($0)] } ?? free
    let place = unsafe packed(note)
    unsafe SharedWord.store64(address, at: place + Packed.address)
    unsafe SharedWord.store32(bytes, at: place + Packed.bytes)
    unsafe SharedWord.store16(identifier, at: place + Packed.identifier)
    unsafe SharedWord.store16(flags, at: place + Packed.flags)
    cursor = note
  }

  /// A chain was taken, the one of this number, whose descriptors are noted up to `last`. Returns its note.
  mutating func notePacked(last: UInt16, places: Int, number: Int) -> UInt16 {
    let head = free
    let place = unsafe packed(head)
    unsafe SharedWord.store16(last, at: place + Packed.last)
    unsafe SharedWord.store16(UInt16(places), at: place + Packed.count)
    unsafe SharedWord.store64(counter, at: place + Packed.counter)
    order()
    unsafe SharedWord.store8(1, at: place + Packed.isInFlight)
    order()
    counter &+= 1
    counts[Int(head)] = UInt16(places)
    taken[number % size] = head
    free = links[Int(last)]
    storeFree()
    return head
  }

  /// A chain of one descriptor was taken.
  @inline(never)
  mutating func noteSingle(address: UInt64, bytes: UInt32, identifier: UInt16, flags: UInt16, number: Int) -> UInt16 {
    var cursor: UInt16?
    fillPacked(&cursor, address: address, bytes: bytes, identifier: identifier, flags: flags)
    return notePacked(last: free, places: 1, number: number)
  }

  mutating func forgetPacked(_ numbers: Range<Int>) {
    for number in numbers.reversed() {
      let head = taken[number % size]
      unsafe SharedWord.store8(0, at: packed(head) + Packed.isInFlight)
      order()
      release(head)
      storeFree()
    }
  }

  /// Places of the ring that a chain noted has.
  func places(of note: UInt16) -> Int { Int(counts[Int(note)]) }

  /// A descriptor as it was noted, and the entry of the next one.
  func descriptor(_ note: UInt16) -> (address: UInt64, bytes: UInt32, identifier: UInt16, flags: UInt16, next: UInt16) {
    let place = unsafe packed(note)
    return unsafe (
      SharedWord.load64(place + Packed.address), SharedWord.load32(place + Packed.bytes),
      SharedWord.load16(place + Packed.identifier), SharedWord.load16(place + Packed.flags), links[Int(note)]
    )
  }

  /// Before the first flags of a batch are stored: where the queue will stand.
  mutating func beginPackedBatch(used: Int, wrap: Bool) {
    for index in 0..<stagedCount { release(staged[index]) }
    order()
    storePackedUsed(used, wrap: wrap)
    order()
  }

  /// After they were stored.
  mutating func endPackedBatch(used: Int, wrap: Bool) {
    order()
    for index in 0..<stagedCount { unsafe SharedWord.store8(0, at: packed(staged[index]) + Packed.isInFlight) }
    order()
    endPackedUpdate(used: used, wrap: wrap)
    stagedCount = 0
  }
}
