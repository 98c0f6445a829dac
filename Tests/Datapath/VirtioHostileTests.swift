import Datapath
import Synchronization
import TestSupport
import Testing

/// Rings that no driver may make, written word by word.
@Suite("Hostile virtio rings")
struct VirtioHostileTests {
  private static let descriptors = VirtioGuest.ringsAddress
  private static let driver = VirtioGuest.ringsAddress + 0x8_0000
  private static let device = VirtioGuest.ringsAddress + 0xa_0000
  private static let size = 8
  private static let buffers = VirtioGuest.buffersAddress
  private static let tables = VirtioGuest.tablesAddress

  private static let next: UInt16 = 1
  private static let write: UInt16 = 2
  private static let indirect: UInt16 = 4

  struct Word: Sendable {
    var address: UInt64
    var bytes: UInt32
    var flags: UInt16 = 0
    var next: UInt16 = 0
  }

  private static func areas(_ guest: VirtioGuest, size: Int = size) -> VirtqueueAreas {
    unsafe VirtqueueAreas(
      size: size, descriptor: guest.place(descriptors), driver: guest.place(driver), device: guest.place(device))
  }

  private static func store(_ guest: VirtioGuest, _ words: [Word], at address: UInt64) {
    for (index, word) in words.enumerated() {
      let place = address + 16 * UInt64(index)
      guest.store(word.address, at: place)
      guest.store(word.bytes, at: place + 8)
      guest.store(word.flags, at: place + 12)
      guest.store(word.next, at: place + 14)
    }
  }

  /// What a split queue says of a table of descriptors whose first is made available.
  private func split(
    _ words: [Word], table: [Word] = [], head: UInt16 = 0, index: UInt16 = 1,
    features: VirtqueueFeatures = .indirectDescriptors
  ) throws -> VirtqueueResult {
    let guest = try VirtioGuest()
    Self.store(guest, words, at: Self.descriptors)
    Self.store(guest, table, at: Self.tables)
    guest.store(head, at: Self.driver + 4)
    guest.store(index, at: Self.driver + 2)
    var queue = try SplitQueue(Self.areas(guest), features: features, base: 0)
    var chain = VirtioChain()
    let result = queue.next(guest.memory.reference, into: &chain)
    if result != .chain {
      #expect(queue.takenCount == 0)
      #expect(queue.base == 0, "a fault takes nothing")
      #expect(queue.next(guest.memory.reference, into: &chain) == result, "and is told again")
    }
    return result
  }

  /// What a packed queue says of descriptors, all of which are available in the first round.
  private func packed(
    _ words: [Word], table: [Word] = [], features: VirtqueueFeatures = .indirectDescriptors
  ) throws -> VirtqueueResult {
    let guest = try VirtioGuest()
    func packed(_ words: [Word], available: UInt16) -> [Word] {
      words.map { Word(address: $0.address, bytes: $0.bytes, flags: 7, next: $0.flags | available) }
    }
    Self.store(guest, packed(words, available: 0x80), at: Self.descriptors)
    Self.store(guest, packed(table, available: 0), at: Self.tables)
    var queue = try PackedQueue(Self.areas(guest), features: features, base: 0x8000)
    var chain = VirtioChain()
    let result = queue.next(guest.memory.reference, into: &chain)
    if result != .chain {
      #expect(queue.takenCount == 0)
      #expect(queue.base == 0x8000_8000, "a fault takes nothing")
      #expect(queue.next(guest.memory.reference, into: &chain) == result, "and is told again")
    }
    return result
  }

  @Test("an available index that jumps and a head beyond the ring are told")
  func heads() throws {
    let good = Word(address: Self.buffers, bytes: 64)
    #expect(try split([good]) == .chain)
    #expect(try split([good], index: 8) == .chain)
    #expect(try split([good], index: 9) == .broken(.availableIndexJumped))
    #expect(try split([good], index: 0xffff) == .broken(.availableIndexJumped))
    #expect(try split([good], head: 8) == .broken(.headOutOfRange))
    #expect(try split([good], head: 0xffff) == .broken(.headOutOfRange))
  }

  @Test("next indices beyond the table, and loops of any length, are told")
  func loops() throws {
    let good = Word(address: Self.buffers, bytes: 64, flags: Self.next, next: 1)
    #expect(try split([good, Word(address: Self.buffers, bytes: 1, flags: 1, next: 8)]) == .broken(.nextOutOfRange))
    #expect(try split([good, Word(address: Self.buffers, bytes: 1, flags: 1, next: 1)]) == .broken(.chainTooLong))
    #expect(try split([good, Word(address: Self.buffers, bytes: 1, flags: 1, next: 0)]) == .broken(.chainTooLong))
    // Nor does a loop of descriptors without bytes, which make no pieces, run for ever.
    #expect(try split([Word(address: 0, bytes: 0, flags: 1, next: 0)]) == .broken(.chainTooLong))
    // The whole ring is one chain that never ends.
    let endless = [Word](repeating: Word(address: Self.buffers, bytes: 0, flags: 1), count: Self.size)
    #expect(try packed(endless) == .broken(.chainTooLong))
    let table = Word(address: Self.tables, bytes: 32, flags: Self.indirect)
    #expect(try split([table], table: [good, good]) == .broken(.chainTooLong))
    let far = Word(address: Self.buffers, bytes: 64, flags: Self.next, next: 2)
    #expect(try split([table], table: [good, far]) == .broken(.nextOutOfRange))
  }

  @Test("memory that is not mapped is refused, by one byte too", arguments: [false, true])
  func unmapped(isPacked: Bool) throws {
    let end = Self.buffers + UInt64(VirtioGuest.buffersBytes)
    let cases: [(Word, Bool)] = [
      (Word(address: end - 64, bytes: 64), true), (Word(address: end - 64, bytes: 65), false),
      (Word(address: end, bytes: 1), false), (Word(address: Self.buffers - 1, bytes: 2), false),
      (Word(address: 0, bytes: 1), false), (Word(address: .max, bytes: 1), false),
      (Word(address: .max - 63, bytes: 64), false), (Word(address: Self.buffers, bytes: .max), false),
      // No bytes are nowhere.
      (Word(address: 0, bytes: 0), true), (Word(address: .max, bytes: 0), true),
    ]
    for (word, isGood) in cases {
      let result = try isPacked ? packed([word]) : split([word])
      #expect(result == (isGood ? .chain : .broken(.notMapped)), "\(word)")
    }
  }

  @Test("a readable descriptor after a writable one is told", arguments: [false, true])
  func order(isPacked: Bool) throws {
    let words = [
      Word(address: Self.buffers, bytes: 64, flags: Self.next | Self.write, next: 1),
      Word(address: Self.buffers, bytes: 64),
    ]
    #expect(try (isPacked ? packed(words) : split(words)) == .broken(.readableAfterWritable))
    let table = Word(address: Self.tables, bytes: 32, flags: Self.indirect)
    let result = try isPacked ? packed([table], table: words) : split([table], table: words)
    #expect(result == .broken(.readableAfterWritable))
  }

  @Test("indirect tables of each wrong kind are told", arguments: [false, true])
  func indirectTables(isPacked: Bool) throws {
    func ask(_ word: Word, _ table: [Word] = [], features: VirtqueueFeatures = .indirectDescriptors) throws
      -> VirtqueueResult
    {
      try isPacked
        ? packed([word], table: table, features: features) : split([word], table: table, features: features)
    }
    let table = Word(address: Self.tables, bytes: 16, flags: Self.indirect)
    let good = Word(address: Self.buffers, bytes: 64)
    #expect(try ask(table, [good]) == .chain)
    // The write flag of the one that names the table means nothing (virtio 1.2 §2.7.5.3.2).
    #expect(try ask(Word(address: Self.tables, bytes: 16, flags: Self.indirect | Self.write), [good]) == .chain)
    #expect(try ask(table, [good], features: []) == .broken(.indirectNotAgreed))
    #expect(try ask(Word(address: Self.tables, bytes: 16, flags: 5), [good]) == .broken(.indirectWithNext))
    #expect(try ask(table, [table]) == .broken(.indirectNested))
    for bytes: UInt32 in [0, 1, 15, 17, .max] {
      #expect(try ask(Word(address: Self.tables, bytes: bytes, flags: Self.indirect)) == .broken(.indirectSize))
    }
    for bytes: UInt32 in [9 * 16, 0xffff_fff0] {
      #expect(try ask(Word(address: Self.tables, bytes: bytes, flags: Self.indirect)) == .broken(.indirectTooLong))
    }
    // Not mapped, partly mapped, over the border of two regions, crooked.
    let end = Self.tables + UInt64(VirtioGuest.tablesBytes)
    for address in [0, .max, end - 16, VirtioGuest.buffersBorder - 16, Self.tables + 4] {
      #expect(try ask(Word(address: address, bytes: 32, flags: Self.indirect)) == .broken(.indirectNotMapped))
    }
  }

  @Test("a chain of more pieces than are taken is told", arguments: [false, true])
  func pieces(isPacked: Bool) throws {
    let guest = try VirtioGuest()
    let size = 512
    for count in [VirtioChain.piecesMax, VirtioChain.piecesMax + 1] {
      let buffers = (0..<count).map { _ in VirtioBuffer(address: Self.buffers, bytes: 1, isWritable: false) }
      var chain = VirtioChain()
      let result: VirtqueueResult
      if isPacked {
        let driver = PackedDriver(guest, size: size, features: [], base: 0x8000)
        _ = driver.offer(buffers, isIndirect: false)
        var queue = try PackedQueue(driver.areas, features: [], base: 0x8000)
        result = queue.next(guest.memory.reference, into: &chain)
      } else {
        let driver = SplitDriver(guest, size: size, features: [], base: 0)
        _ = driver.offer(buffers, isIndirect: false)
        var queue = try SplitQueue(driver.areas, features: [], base: 0)
        result = queue.next(guest.memory.reference, into: &chain)
      }
      #expect(result == (count == VirtioChain.piecesMax ? .chain : .broken(.tooManyPieces)))
    }
  }

  @Test("more chains than the ring has places are not taken")
  func tooMany() throws {
    let guest = try VirtioGuest()
    Self.store(guest, [Word(address: Self.buffers, bytes: 1)], at: Self.descriptors)
    var split = try SplitQueue(Self.areas(guest), features: [], base: 0)
    var chain = VirtioChain()
    for index in 1...UInt16(Self.size) {
      guest.store(index, at: Self.driver + 2)
      #expect(split.next(guest.memory.reference, into: &chain) == .chain)
    }
    guest.store(UInt16(Self.size + 1), at: Self.driver + 2)
    #expect(split.next(guest.memory.reference, into: &chain) == .broken(.tooManyTaken))

    var packed = try PackedQueue(Self.areas(guest), features: [], base: 0x8000)
    for round in [UInt16(0x80), 0x8000] {
      for index in 0..<Self.size {
        Self.store(
          guest, [Word(address: Self.buffers, bytes: 1, next: round)], at: Self.descriptors + 16 * UInt64(index))
        let result = packed.next(guest.memory.reference, into: &chain)
        #expect(result == (round == 0x80 ? .chain : .broken(.tooManyTaken)))
      }
    }
  }

  @Test("random bytes as rings bring chains within the regions or a fault", arguments: [false, true])
  func noise(isPacked: Bool) throws {
    let guest = try VirtioGuest()
    var random = SeededRandom(seed: 11)
    var chains = 0
    for _ in 0..<600 {
      scribble(guest, &random, words: 600, isPacked: isPacked)
      if isPacked {
        var queue = try PackedQueue(Self.areas(guest), features: [.indirectDescriptors, .eventIndex], base: 0x8000)
        chains += try run(&queue, guest, most: 64)
      } else {
        guest.store(UInt16(0), at: Self.device + 2)
        var queue = try SplitQueue(Self.areas(guest), features: [.indirectDescriptors, .eventIndex], base: 0)
        chains += try run(&queue, guest, most: 64)
      }
    }
    #expect(chains > 30, "not all is refused: \(chains)")
  }

  @Test("damaged notes of chains in flight are refused, or bring chains within the regions", arguments: [false, true])
  func damagedNotes(isPacked: Bool) throws {
    let guest = try VirtioGuest()
    var random = SeededRandom(seed: 29)
    let bytes = max(SplitQueue.inFlightBytes(size: Self.size), PackedQueue.inFlightBytes(size: Self.size))
    let notes = UnsafeMutableRawBufferPointer.allocate(byteCount: bytes, alignment: 64)
    defer { unsafe notes.deallocate() }
    var refused = 0
    var chains = 0
    for _ in 0..<4_000 {
      for index in 0..<bytes {
        // Most bytes are small, as good notes' are.
        unsafe notes[index] = [0, 0, 0, 1, 1, 2, 5, 7, 255].randomElement(using: &random)!
      }
      for index in 8..<24 where index % 2 == 1 { unsafe notes[index] = 0 }
      unsafe notes.storeBytes(of: 1, toByteOffset: 8, as: UInt16.self)
      unsafe notes.storeBytes(of: UInt16(Self.size), toByteOffset: 10, as: UInt16.self)
      scribble(guest, &random, words: 64, isPacked: isPacked)
      let features: VirtqueueFeatures = [.indirectDescriptors, .eventIndex]
      do {
        if isPacked {
          var queue = try PackedQueue(Self.areas(guest), features: features, base: 0x8000)
          _ = unsafe try queue.trackInFlight(notes.baseAddress!)
          chains += try run(&queue, guest, most: 16)
        } else {
          guest.store(UInt16(unsafe notes[14] &+ notes[16] & 7), at: Self.device + 2)
          var queue = try SplitQueue(Self.areas(guest), features: features, base: 0)
          _ = unsafe try queue.trackInFlight(notes.baseAddress!)
          chains += try run(&queue, guest, most: 16)
        }
      } catch VirtqueueError.inFlightNotes {
        refused += 1
      }
    }
    #expect(refused > 100 && chains > 10, "refused \(refused), chains \(chains)")
  }

  @Test(
    "a driver that rewrites its rings while they are read makes no piece outside of its memory",
    arguments: [false, true])
  func rewriting(isPacked: Bool) throws {
    let guest = try VirtioGuest()
    let isOver = Flag()
    var random = SeededRandom(seed: 17)
    scribble(guest, &random, words: 600, isPacked: isPacked)
    let thread = TestThread {
      var random = SeededRandom(seed: 23)
      while !isOver.isSet { scribble(guest, &random, words: 64, isPacked: isPacked) }
    }
    defer {
      isOver.set()
      thread.join()
    }
    var chains = 0
    var rounds = 0
    // On a loaded machine the other thread may be the one that runs.
    while rounds < 2_000 || chains <= 30 && rounds < 200_000 {
      rounds += 1
      // The first descriptor is a good one at first.
      let good = Word(address: Self.buffers, bytes: 64, next: isPacked ? 0x80 : 0)
      guest.storeShared(good.address, at: Self.descriptors)
      guest.storeShared(good.bytes, at: Self.descriptors + 8)
      guest.storeShared(good.flags, at: Self.descriptors + 12)
      guest.storeShared(good.next, at: Self.descriptors + 14)
      if isPacked {
        var queue = try PackedQueue(Self.areas(guest), features: [.indirectDescriptors, .eventIndex], base: 0x8000)
        chains += try run(&queue, guest, most: 16)
      } else {
        var queue = try SplitQueue(Self.areas(guest), features: [.indirectDescriptors, .eventIndex], base: 0)
        chains += try run(&queue, guest, most: 16)
      }
    }
    #expect(chains > 30, "not all is refused: \(chains)")
  }

  private final class Flag: Sendable {
    private let value = Atomic<Bool>(false)
    var isSet: Bool { value.load(ordering: .relaxed) }
    func set() { value.store(true, ordering: .relaxed) }
  }

  /// Takes what is there, checks every piece, and gives it back.
  private func run<Queue: Virtqueue & ~Copyable>(_ queue: inout Queue, _ guest: VirtioGuest, most: Int) throws -> Int {
    let memory = guest.memory.reference
    var chain = VirtioChain()
    var singles = VirtioSingles()
    var count = 0
    for turn in 0..<most {
      if turn % 2 == 1 {
        _ = queue.take(memory, upTo: 3, into: &singles)
        for index in 0..<singles.count {
          let single = singles[index]
          let piece = VirtioPiece(place: unsafe UInt(bitPattern: single.place), bytes: Int(single.bytes))
          try #require(guest.isWithin(piece))
          queue.complete(single.token, writtenBytes: index)
        }
        count += singles.count
        queue.publish(memory)
      }
      guard queue.next(memory, into: &chain) == .chain else { break }
      count += 1
      let pieces = chain.readablePieces + chain.writablePieces
      let sum = chain.readableBytes + chain.writableBytes
      try #require(pieces.allSatisfy(guest.isWithin) && pieces.reduce(0) { $0 + $1.bytes } == sum)
      queue.complete(chain.token, writtenBytes: chain.writableBytes)
      queue.publish(memory)
      _ = queue.mustCall()
      _ = queue.askForKicks(memory)
    }
    return count
  }
}

/// Writes words of the kinds that stand in rings over the rings and a few tables, likely ones more often.
private func scribble(_ guest: VirtioGuest, _ random: inout SeededRandom, words: Int, isPacked: Bool) {
  let size = 8
  for _ in 0..<words {
    let kind = Int.random(in: 0..<10, using: &random)
    let index = UInt64(Int.random(in: 0..<size, using: &random))
    let base = kind < 3 ? VirtioGuest.tablesAddress : VirtioGuest.ringsAddress
    let address =
      [VirtioGuest.buffersAddress, VirtioGuest.buffersBorder - 100, VirtioGuest.tablesAddress, .max - 5, 0]
      .randomElement(using: &random)! &+ UInt64(Int.random(in: 0..<200, using: &random)) & ~7
    let bytes: UInt32 = [16, 32, 128, 0, 64, 100, 0xffff_ffff, 0x8000].randomElement(using: &random)!
    let flags = UInt16(Int.random(in: 0..<8, using: &random)) & (kind % 2 == 0 ? 7 : 2)
    let ownership: UInt16 = [0x80, 0x80, 0x80, 0x8000, 0, 0x8080].randomElement(using: &random)!
    switch kind {
    case 0...6:
      let place = base + 16 * index
      guest.storeShared(address, at: place)
      guest.storeShared(bytes, at: place + 8)
      // Flags where the kind of ring has them.
      guest.storeShared(isPacked ? UInt16(index) : flags, at: place + 12)
      guest.storeShared(isPacked ? flags | ownership : UInt16(index), at: place + 14)
    case 7:
      guest.storeShared(UInt16(Int.random(in: 0..<size + 1, using: &random)), at: VirtioGuest.ringsAddress + 0x8_0002)
    case 8:
      let head = UInt16(Int.random(in: 0..<size, using: &random))
      guest.storeShared(head, at: VirtioGuest.ringsAddress + 0x8_0004 + 2 * index)
    default:
      guest.storeShared(UInt16.random(in: 0...UInt16.max, using: &random), at: VirtioGuest.ringsAddress + 0x8_0000)
    }
  }
}

extension VirtioGuest {
  /// A store beside which the device may read: by another thread, as a guest's are.
  fileprivate func storeShared(_ value: UInt64, at address: UInt64) {
    unsafe place(address).assumingMemoryBound(to: Atomic<UInt64>.self).pointee.store(value, ordering: .relaxed)
  }
  fileprivate func storeShared(_ value: UInt32, at address: UInt64) {
    unsafe place(address).assumingMemoryBound(to: Atomic<UInt32>.self).pointee.store(value, ordering: .relaxed)
  }
  fileprivate func storeShared(_ value: UInt16, at address: UInt64) {
    unsafe place(address).assumingMemoryBound(to: Atomic<UInt16>.self).pointee.store(value, ordering: .relaxed)
  }
}
