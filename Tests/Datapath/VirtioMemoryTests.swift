import CLinux
import Datapath
import Glibc
import Synchronization
import TestSupport
import Testing

@Suite("Guest memory")
struct VirtioMemoryTests {
  /// A region that is never touched.
  private func region(_ guest: UInt64, _ bytes: UInt64, user: UInt64 = 0, mapping: UInt = 0x10_0000)
    -> GuestMemory.Region
  {
    unsafe GuestMemory.Region(
      guestAddress: guest, userAddress: user, bytes: bytes, mapping: UnsafeMutableRawPointer(bitPattern: mapping)!)
  }

  @Test("overlapping, empty, wrapping and too many regions are refused")
  func refused() throws {
    #expect(throws: GuestMemory.TableError.overlappingRegions(guestAddress: 0x1fff)) {
      _ = try GuestMemory([region(0x1fff, 1), region(0x1000, 0x1000)])
    }
    #expect(throws: GuestMemory.TableError.overlappingRegions(guestAddress: 0x1000)) {
      _ = try GuestMemory([region(0x1000, 1), region(0x1000, 1)])
    }
    #expect(throws: GuestMemory.TableError.emptyRegion(guestAddress: 5)) { _ = try GuestMemory([region(5, 0)]) }
    for wrapping in [
      region(.max, 1), region(0, .max), region(1, 1, user: .max), region(1, 0x1000, mapping: UInt.max - 0xfff),
    ] {
      #expect(throws: GuestMemory.TableError.wrappingRegion(guestAddress: wrapping.guestAddress)) {
        _ = try GuestMemory([wrapping])
      }
    }
    let many = (0...GuestMemory.regionsMax).map { region(UInt64($0) * 0x1000, 0x1000) }
    #expect(throws: GuestMemory.TableError.tooManyRegions(many.count)) { _ = try GuestMemory(many) }
    #expect(try GuestMemory(many.dropLast()).regionCount == GuestMemory.regionsMax)
    _ = try GuestMemory([])
  }

  @Test("random ranges are translated as a plain search over all regions does, from any hint")
  func translation() throws {
    var random = SeededRandom(seed: 5)
    var regions: [GuestMemory.Region] = []
    var address: UInt64 = 0x1000
    for number in 0..<200 {
      // Some follow each other, some leave a gap; each lies elsewhere with us.
      if Int.random(in: 0...2, using: &random) == 0 { address += UInt64.random(in: 1...0x2000, using: &random) }
      let bytes = UInt64.random(in: 1...0x1800, using: &random)
      regions.append(region(address, bytes, mapping: UInt(number + 1) << 32))
      address += bytes
    }
    let end = address
    let memory = try GuestMemory(regions.shuffled(using: &random))
    let reference = memory.reference
    var hint = GuestMemory.Hint()
    let room = 4
    var pieces = unsafe [iovec](repeating: unsafe iovec(), count: room)
    var outcomes = [0, 0, 0]
    for _ in 0..<20_000 {
      let start = UInt64.random(in: 0...end + 0x1000, using: &random)
      let bytes = Int.random(in: 0...0x3000, using: &random)
      let result = unsafe reference.translate(start, bytes: bytes, hint: &hint, into: &pieces, room: room)
      var expected: [VirtioPiece] = []
      var place = start
      var isMapped = true
      while isMapped, place < start + UInt64(bytes) {
        if let region = regions.first(where: { place >= $0.guestAddress && place - $0.guestAddress < $0.bytes }) {
          let offset = place - region.guestAddress
          let count = min(region.bytes - offset, start + UInt64(bytes) - place)
          expected.append(VirtioPiece(place: unsafe UInt(bitPattern: region.mapping) + UInt(offset), bytes: Int(count)))
          place += count
        } else {
          isMapped = false
        }
      }
      if expected.count > room {
        try #require(result == .noRoom)
        outcomes[0] += 1
      } else if !isMapped {
        try #require(result == .notMapped || result == .noRoom)
        outcomes[1] += 1
      } else {
        try #require(result == .pieces(expected.count))
        let found = unsafe pieces.prefix(expected.count).map { unsafe VirtioPiece($0) }
        try #require(found == expected)
        outcomes[2] += 1
      }
    }
    #expect(outcomes.allSatisfy { $0 > 100 }, "all outcomes were seen: \(outcomes)")
  }

  @Test("addresses at the end of 64 bits neither wrap nor trap")
  func ends() throws {
    let memory = try GuestMemory([region(0, 0x1000), region(.max - 0x1000, 0x1000, mapping: 0x20_0000)])
    var hint = GuestMemory.Hint()
    var pieces = unsafe [iovec](repeating: unsafe iovec(), count: 4)
    for (address, bytes) in [(UInt64.max, 1), (.max - 1, 2), (.max - 0x1000, 0x1001), (.max, .max), (0, .max)] {
      let result = unsafe memory.reference.translate(address, bytes: bytes, hint: &hint, into: &pieces, room: 4)
      #expect(result == .notMapped)
    }
    let last = unsafe memory.reference.translate(.max - 1, bytes: 1, hint: &hint, into: &pieces, room: 4)
    #expect(last == .pieces(1))
    let none = unsafe GuestMemory.Reference.none.translate(0, bytes: 1, hint: &hint, into: &pieces, room: 4)
    #expect(none == .notMapped)
  }

  @Test("a frontend's address is translated where all of it is in one region")
  func userAddresses() throws {
    let guest = try VirtioGuest()
    let user = VirtioGuest.buffersAddress + VirtioGuest.userOffset
    func translate(_ address: UInt64, _ bytes: Int) -> (UInt, UInt64)? {
      unsafe guest.memory.translate(userAddress: address, bytes: bytes).map {
        unsafe (UInt(bitPattern: $0.mapping), $0.guestAddress)
      }
    }
    let found = translate(user + 16, 0x8000 - 16)
    let place = unsafe UInt(bitPattern: guest.place(VirtioGuest.buffersAddress + 16))
    #expect(found?.0 == place && found?.1 == VirtioGuest.buffersAddress + 16)
    #expect(translate(user + 16, 0x8000 - 15) == nil)
    #expect(translate(VirtioGuest.buffersAddress, 1) == nil)
    #expect(translate(user, -1) == nil)
  }

  @Test("the dirty log has one bit for each page written, and nothing beyond its end")
  func dirtyLog() throws {
    var random = SeededRandom(seed: 7)
    let bytes = 64
    let storage = UnsafeMutableRawPointer.allocate(byteCount: bytes * 3, alignment: 8)
    defer { unsafe storage.deallocate() }
    let memory = try GuestMemory([], log: unsafe DirtyLog(base: storage + bytes, bytes: bytes))
    for _ in 0..<2_000 {
      unsafe storage.initializeMemory(as: UInt8.self, repeating: 0, count: bytes * 3)
      let start = UInt64.random(in: 0...UInt64(bytes * 8 + 40) * 4096, using: &random)
      let count = Int.random(in: 0...40 * 4096, using: &random)
      memory.reference.markDirty(start, bytes: count)
      memory.reference.markDirty(.max - 1, bytes: count)
      let pages = count == 0 ? [] : Array(start / 4096...(start + UInt64(count) - 1) / 4096)
      let expected = Set(pages.filter { $0 < UInt64(bytes * 8) })
      var marked: Set<UInt64> = []
      for index in 0..<bytes * 24 {
        let byte = unsafe storage.load(fromByteOffset: index / 8, as: UInt8.self)
        if byte >> (index % 8) & 1 != 0 { marked.insert(UInt64(bitPattern: Int64(index - bytes * 8))) }
      }
      try #require(marked == expected)
    }
  }

  @Test("workers that mark pages of the same bytes, while the frontend takes bits out, lose none")
  func dirtyLogIsShared() throws {
    let bytes = 32
    let storage = UnsafeMutableRawPointer.allocate(byteCount: bytes, alignment: 8)
    defer { unsafe storage.deallocate() }
    unsafe storage.initializeMemory(as: UInt8.self, repeating: 0, count: bytes)
    let log = unsafe DirtyLog(base: storage, bytes: bytes)
    let memory = try GuestMemory([], log: log)
    // Each worker marks pages of its own, which share every byte with the others'.
    let workers = (0..<3).map { worker in
      TestThread {
        for page in 0..<bytes * 8 where page % 3 == worker {
          memory.reference.markDirty(UInt64(page) * 4096 + 4095, bytes: 1)
        }
      }
    }
    var taken = [UInt64](repeating: 0, count: bytes / 8)
    func take() {
      for index in taken.indices {
        let word = unsafe (storage + 8 * index).assumingMemoryBound(to: Atomic<UInt64>.self)
        taken[index] |= unsafe word.pointee.exchange(0, ordering: .sequentiallyConsistent)
      }
    }
    for _ in 0..<100 { take() }
    for worker in workers { worker.join() }
    take()
    #expect(taken.allSatisfy { $0 == .max })
  }

  @Test("what the device writes of a ring and of a chain is in the dirty log", arguments: [false, true])
  func ringsAreLogged(isPacked: Bool) throws {
    // A log of one page's bits for all below 0x101_0000.
    let bytes = 0x101_0000 / 4096 / 8
    let storage = UnsafeMutableRawPointer.allocate(byteCount: bytes, alignment: 8)
    defer { unsafe storage.deallocate() }
    unsafe storage.initializeMemory(as: UInt8.self, repeating: 0, count: bytes)
    let guest = try VirtioGuest(log: unsafe DirtyLog(base: storage, bytes: bytes))
    if isPacked {
      try log(PackedQueue.self, PackedDriver(guest, size: 1024, features: [.eventIndex], base: 0x8000), 0x8000)
    } else {
      try log(SplitQueue.self, SplitDriver(guest, size: 1024, features: [.eventIndex], base: 0), 0)
    }
    let pages = Set(
      (0..<bytes * 8).filter { page in
        unsafe storage.load(fromByteOffset: page / 8, as: UInt8.self) >> (page % 8) & 1 != 0
      })
    // 300 chains: 300 used elements of 8 bytes, or descriptors of 16; the device's event; both pages that chains wrote.
    let rings: Set<Int> = isPacked ? [0x100, 0x101, 0x1a0] : [0x1a0, 0x1a2]
    #expect(pages == rings.union([0x1000, 0x1001]))
  }

  private func log<Queue: Virtqueue & ~Copyable>(
    _: Queue.Type, _ driver: some VirtioDriver, _ base: UInt32
  ) throws {
    let memory = driver.guest.memory.reference
    var queue = try Queue(driver.areas, features: [.eventIndex], base: base)
    queue.logWrites(
      VirtqueueLogAddresses(
        descriptor: VirtioGuest.ringsAddress, device: VirtioGuest.ringsAddress + 0xa_0000))
    var chain = VirtioChain()
    var singles = VirtioSingles()
    for number in 0..<300 {
      let buffer = VirtioBuffer(address: VirtioGuest.buffersAddress + 4000, bytes: 8000, isWritable: true)
      _ = driver.offer([buffer], isIndirect: false)
      if number % 2 == 0 {
        try #require(queue.next(memory, into: &chain) == .chain)
        chain.markDirty(memory, bytes: 100)
        queue.complete(chain.token, writtenBytes: 100)
      } else {
        _ = queue.take(memory, upTo: 1, into: &singles)
        singles[0].markDirty(memory, bytes: 4192)
        queue.complete(singles[0].token, writtenBytes: 4192)
      }
    }
    queue.publish(memory)
    _ = queue.askForKicks(memory)
  }
}
