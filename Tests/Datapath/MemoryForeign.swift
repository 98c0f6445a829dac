import CLinux
import Testing

@testable import Datapath

/// A port whose frames lie in somebody else's memory, as a VM's do: it brings chains of pieces and gets them back.
@safe
private final class FakePort {
  let memory: ForeignMemory
  /// The guest's pages.
  let pages: UnsafeMutableRawPointer
  static let pageBytes = 4_096

  init(bufferCount: Int = 4) {
    memory = ForeignMemory(bufferCount: bufferCount)
    unsafe pages = .allocate(byteCount: 32 * Self.pageBytes, alignment: 64)
    for place in 0..<32 * Self.pageBytes {
      unsafe pages.storeBytes(of: FakePort.byte(place), toByteOffset: place, as: UInt8.self)
    }
  }
  deinit { unsafe pages.deallocate() }

  static func byte(_ place: Int) -> UInt8 { UInt8(truncatingIfNeeded: place &* 13 &+ place / 251) }

  /// Brings a chain of pieces, each a range of the guest's pages; returns how many segments it has.
  func bring(_ index: Int, _ pieces: [Range<Int>], headerBytes: Int) -> Int? {
    let vectors = unsafe pieces.map { unsafe iovec(iov_base: pages + $0.lowerBound, iov_len: $0.count) }
    return unsafe vectors.withUnsafeBufferPointer { vectors in
      unsafe memory.reference.bring(index, payload: vectors, headerBytes: headerBytes)
    }
  }

  /// The guest writes to its own memory, at any time it likes.
  func scribble(_ range: Range<Int>) {
    for place in range { unsafe pages.storeBytes(of: 0xEE, toByteOffset: place, as: UInt8.self) }
  }
}

@Suite struct MemoryForeignTests {
  /// The bytes of a frame as a send would gather them.
  private func gather(_ memory: borrowing FrameMemory, _ descriptor: Descriptor) -> [UInt8]? {
    var vectors = unsafe [iovec](repeating: iovec(), count: ForeignMemory.segmentsMax)
    return unsafe vectors.withUnsafeMutableBufferPointer { room -> [UInt8]? in
      guard let count = unsafe memory.vectors(of: descriptor, into: room.baseAddress!, room: room.count) else {
        return nil
      }
      var bytes: [UInt8] = []
      for index in 0..<count {
        unsafe bytes.append(contentsOf: UnsafeRawBufferPointer(start: room[index].iov_base, count: room[index].iov_len))
      }
      return bytes
    }
  }

  private func expected(_ pieces: [Range<Int>]) -> [UInt8] { pieces.flatMap { $0.map(FakePort.byte) } }

  private func descriptor(_ owner: Int, _ index: Int, offset: Int = 0, length: Int, segments: Int) -> Descriptor {
    Descriptor(
      buffer: BufferReference(owner: owner, index: index), offset: offset, length: length, segments: segments,
      ingress: InterfaceIndex(3))
  }

  @Test("a frame in pieces is gathered whole, behind its header copy")
  func gathering() throws {
    let port = FakePort()
    var memory = try FrameMemory(slotCount: 1, hugePages: false)
    let owner = memory.adopt(port.memory.reference)
    #expect(owner != 0)
    let pieces = [100..<700, 5_000..<5_001, 9_000..<13_000]
    let segments = try #require(port.bring(2, pieces, headerBytes: 64))
    #expect(segments == 4)
    let whole = gather(memory, descriptor(owner, 2, length: 4_601, segments: segments))
    #expect(whole == expected(pieces))
  }

  @Test("a frame may start behind the beginning of its first segment and end before the end of its last")
  func offsets() throws {
    let port = FakePort()
    var memory = try FrameMemory(slotCount: 1, hugePages: false)
    let owner = memory.adopt(port.memory.reference)
    let pieces = [0..<300, 4_096..<4_500]
    let segments = try #require(port.bring(0, pieces, headerBytes: 128))
    let all = expected(pieces)
    for (offset, length) in [(12, 500), (0, 10), (128, 100), (128, all.count - 128), (20, 108), (20, 109)] {
      let frame = gather(memory, descriptor(owner, 0, offset: offset, length: length, segments: segments))
      #expect(frame == Array(all[offset..<offset + length]), "offset \(offset), length \(length)")
    }
  }

  @Test("a guest that rewrites its headers afterwards changes neither what is parsed nor what is sent of them")
  func privateHeader() throws {
    let port = FakePort()
    var memory = try FrameMemory(slotCount: 1, hugePages: false)
    let owner = memory.adopt(port.memory.reference)
    let segments = try #require(port.bring(0, [0..<1_000], headerBytes: 54))
    let frame = descriptor(owner, 0, length: 1_000, segments: segments)
    port.scribble(0..<1_000)
    let head = memory.head(of: frame)
    let parsed = (0..<head.byteCount).map { unsafe head.unsafeLoad(fromByteOffset: $0, as: UInt8.self) }
    #expect(parsed == expected([0..<54]))
    let gathered = gather(memory, frame)
    let sent = try #require(gathered)
    #expect(Array(sent[..<54]) == expected([0..<54]))
    // The payload is the guest's own: it goes as it is at the moment of sending.
    #expect(sent[54...].allSatisfy { $0 == 0xEE })
  }

  @Test("the copy of the headers can be changed, and the guest does not see it")
  func writableHeader() throws {
    let port = FakePort()
    var memory = try FrameMemory(slotCount: 1, hugePages: false)
    let owner = memory.adopt(port.memory.reference)
    let segments = try #require(port.bring(0, [0..<100], headerBytes: 60))
    let frame = descriptor(owner, 0, length: 100, segments: segments)
    var head = memory.mutableHead(of: frame)
    head.storeBytes(of: 0x77, toByteOffset: 15, as: UInt8.self)
    let sent = gather(memory, frame)
    #expect(sent?[15] == 0x77)
    let guests = unsafe port.pages.load(fromByteOffset: 15, as: UInt8.self)
    #expect(guests == FakePort.byte(15))
  }

  @Test("a header longer than the first piece, or than the copy, takes what there is")
  func shortHeader() throws {
    let port = FakePort()
    var memory = try FrameMemory(slotCount: 1, hugePages: false)
    let owner = memory.adopt(port.memory.reference)
    // The first piece is all header: no segment is left of it.
    let first = try #require(port.bring(0, [0..<20, 100..<200], headerBytes: 64))
    #expect(first == 2)
    let firstHead = memory.head(of: descriptor(owner, 0, length: 120, segments: first)).byteCount
    #expect(firstHead == 20)
    let second = try #require(port.bring(1, [0..<4_000], headerBytes: 4_000))
    let secondHead = memory.head(of: descriptor(owner, 1, length: 4_000, segments: second)).byteCount
    #expect(secondHead == ForeignMemory.headerCopyBytes)
    let whole = gather(memory, descriptor(owner, 1, length: 4_000, segments: second))
    #expect(whole == expected([0..<4_000]))
  }

  @Test("a chain of as many pieces as a send takes goes, and one more is refused")
  func manyPieces() throws {
    let port = FakePort()
    var memory = try FrameMemory(slotCount: 1, hugePages: false)
    let owner = memory.adopt(port.memory.reference)
    let pieces = (0..<20).map { $0 * 4_096..<$0 * 4_096 + 100 }
    let segments = try #require(port.bring(0, pieces, headerBytes: 54))
    #expect(segments == ForeignMemory.segmentsMax)
    let whole = gather(memory, descriptor(owner, 0, length: 2_000, segments: segments))
    #expect(whole == expected(pieces))
    // It fits a send beside the encapsulation header.
    var pool = SendPool(count: 1)
    let operation = pool.take()!
    let isFilled = pool.fill(
      operation, descriptor(owner, 0, length: 2_000, segments: segments), egress: InterfaceIndex(1),
      lane: .datagramIPv4, header: SendPool.Header(count: 8), memory)
    #expect(isFilled)
    #expect(port.bring(1, pieces + [0..<1], headerBytes: 54) == nil)
    #expect(port.bring(1, [], headerBytes: 54) == nil)
    #expect(port.memory.reference.holds(1) == 0)
  }

  @Test("a buffer returns only when the last of its sends is released, and then once")
  func returning() throws {
    let port = FakePort()
    var memory = try FrameMemory(slotCount: 1, hugePages: false)
    let owner = memory.adopt(port.memory.reference)
    _ = port.bring(3, [0..<100], headerBytes: 54)
    let buffer = BufferReference(owner: owner, index: 3)
    // A flood to five places.
    memory.hold(buffer, adding: 4)
    #expect(port.memory.reference.holds(3) == 5)
    for left in [4, 3, 2, 1] {
      memory.release(buffer)
      #expect(port.memory.reference.holds(3) == left)
      #expect(port.memory.reference.takeReturned() == nil)
    }
    memory.release(buffer)
    #expect(port.memory.reference.takeReturned() == 3)
    #expect(port.memory.reference.takeReturned() == nil)
    // The arena's own slots have no part in it.
    let slots = (memory.freeSlots, memory.holdsTotal)
    #expect(slots == (1, 0))
    #expect(port.bring(3, [0..<50], headerBytes: 54) == 1)
    #expect(port.memory.reference.holds(3) == 1)
  }

  /// A receiver that brings buffers, as worker 0, and the next worker.
  @safe
  private struct Pair: ~Copyable {
    var receiver: FrameMemory
    var next: FrameMemory

    init(_ port: FakePort) throws {
      let arenas = try (0..<2).map { _ in try FrameArena(slotCount: 2, hugePages: false) }
      let shares = [FrameMemory.ForeignShare(port.memory, bringer: 0)]
      receiver = FrameMemory(arena: arenas[0], number: 0, shares: shares)
      next = FrameMemory(arena: arenas[1], number: 1, neighbours: [arenas[0], nil], shares: shares)
    }
  }

  @Test("a buffer that is handed on is held and read there, and comes back to who brought it after its last send")
  func crossing() throws {
    let port = FakePort()
    var pair = try Pair(port)
    let pieces = [100..<700, 5_000..<5_100]
    let segments = try #require(port.bring(2, pieces, headerBytes: 64))
    pair.receiver.brought(1, of: 1)
    let buffer = BufferReference(owner: 1, index: 2)
    let handed = pair.receiver.handOn(buffer, from: 0)
    #expect(handed == buffer, "its name is the same everywhere")
    let out = pair.receiver.foreignHandedOnCount
    #expect(out == 1)
    let taken = pair.next.takeOver(handed, by: 1)
    let bytes = gather(pair.next, descriptor(1, 2, length: 700, segments: segments))
    #expect(bytes == expected(pieces))
    pair.next.hold(taken, adding: 2)
    for left in [2, 1, 0] {
      pair.next.release(taken)
      let back = pair.next.returnedCount(of: 0)
      #expect(back == (left == 0 ? 1 : 0))
    }
    #expect(port.memory.reference.takeReturned() == nil, "only who brought it gives it back")
    let returned = pair.next.returnedBuffers(of: 0)[0]
    pair.next.forgetReturned(of: 0)
    pair.receiver.comeBack(returned)
    #expect(port.memory.reference.takeReturned() == 2)
    let (outAfter, slots) = (pair.receiver.foreignHandedOnCount, pair.receiver.freeSlots)
    #expect(outAfter == 0)
    #expect(slots == 2, "a slot's number is told from a foreign buffer's")
  }

  @Test("a buffer that crosses to a router and comes home routed is the same as before")
  func crossingHome() throws {
    let port = FakePort()
    var pair = try Pair(port)
    _ = port.bring(0, [0..<100], headerBytes: 54)
    pair.receiver.brought(1, of: 1)
    let handed = pair.receiver.handOn(BufferReference(owner: 1, index: 0), from: 0)
    let there = pair.next.takeOver(handed, by: 1)
    let back = pair.next.handOn(there, from: 1)
    let home = pair.receiver.takeOver(back, by: 0)
    pair.receiver.release(home)
    #expect(port.memory.reference.takeReturned() == 0)
    let counts = (pair.receiver.foreignHandedOnCount, pair.next.returnedCount(of: 0))
    #expect(counts == (0, 0))
  }

  @Test("a quarter of the buffers may wait for a stuck lane, and none for any when their ring is to be stopped")
  func waiting() throws {
    let port = FakePort(bufferCount: 4)
    let shares = [FrameMemory.ForeignShare(port.memory, bringer: 0)]
    var memory = FrameMemory(arena: try FrameArena(slotCount: 1, hugePages: false), shares: shares)
    for count in 1...4 {
      _ = port.bring(count - 1, [0..<100], headerBytes: 54)
      memory.brought(1, of: 1)
      let mayWait = memory.mayWait(BufferReference(owner: 1, index: 0), forStuckLane: true)
      #expect(mayWait == (count <= 1))
      let mayWaitForFull = memory.mayWait(BufferReference(owner: 1, index: 0), forStuckLane: false)
      #expect(mayWaitForFull)
    }
    for index in 1..<4 { memory.release(BufferReference(owner: 1, index: index)) }
    let mayWait = memory.mayWait(BufferReference(owner: 1, index: 0), forStuckLane: true)
    #expect(mayWait)
    port.memory.endWaiting()
    let mayWaitStill = memory.mayWait(BufferReference(owner: 1, index: 0), forStuckLane: false)
    #expect(!mayWaitStill)
    let maySlotWait = memory.mayWait(BufferReference(slot: 0), forStuckLane: true)
    #expect(maySlotWait)
  }

  @Test("two foreign memories keep their buffers apart")
  func twoOwners() throws {
    let ports = [FakePort(), FakePort()]
    var memory = try FrameMemory(slotCount: 1, hugePages: false)
    let owners = [memory.adopt(ports[0].memory.reference), memory.adopt(ports[1].memory.reference)]
    #expect(owners[0] != owners[1])
    let first = try #require(ports[0].bring(0, [0..<100], headerBytes: 14))
    let second = try #require(ports[1].bring(0, [500..<700], headerBytes: 14))
    let firstBytes = gather(memory, descriptor(owners[0], 0, length: 100, segments: first))
    let secondBytes = gather(memory, descriptor(owners[1], 0, length: 200, segments: second))
    #expect(firstBytes == expected([0..<100]))
    #expect(secondBytes == expected([500..<700]))
    memory.release(BufferReference(owner: owners[1], index: 0))
    #expect(ports[0].memory.reference.takeReturned() == nil)
    #expect(ports[1].memory.reference.takeReturned() == 0)
  }

  @Test("as many foreign memories as promised can be adopted")
  func manyOwners() throws {
    let port = FakePort()
    var memory = try FrameMemory(slotCount: 1, hugePages: false)
    var owners: Set<Int> = []
    for _ in 0..<FrameMemory.foreignOwnersMax { owners.insert(memory.adopt(port.memory.reference)) }
    #expect(owners.count == FrameMemory.foreignOwnersMax)
    #expect(!owners.contains(0))
  }

  @Test("holding, releasing or bringing what is not in that state traps, and so does a frame longer than its segments")
  func traps() async {
    await #expect(processExitsWith: .failure) {
      let port = FakePort()
      var memory = try FrameMemory(slotCount: 1, hugePages: false)
      let owner = memory.adopt(port.memory.reference)
      memory.release(BufferReference(owner: owner, index: 0))
    }
    await #expect(processExitsWith: .failure) {
      let port = FakePort()
      var memory = try FrameMemory(slotCount: 1, hugePages: false)
      let owner = memory.adopt(port.memory.reference)
      memory.hold(BufferReference(owner: owner, index: 0), adding: 1)
    }
    await #expect(processExitsWith: .failure) {
      // A buffer that waits for sends is handed on.
      let port = FakePort()
      let shares = [FrameMemory.ForeignShare(port.memory, bringer: 0)]
      var memory = FrameMemory(arena: try FrameArena(slotCount: 1, hugePages: false), shares: shares)
      _ = port.bring(0, [0..<10], headerBytes: 10)
      memory.brought(1, of: 1)
      memory.hold(BufferReference(owner: 1, index: 0), adding: 1)
      _ = memory.handOn(BufferReference(owner: 1, index: 0), from: 0)
    }
    await #expect(processExitsWith: .failure) {
      // A buffer comes back that is at home.
      let port = FakePort()
      let shares = [FrameMemory.ForeignShare(port.memory, bringer: 0)]
      var memory = FrameMemory(arena: try FrameArena(slotCount: 1, hugePages: false), shares: shares)
      memory.comeBack(1 << 22)
    }
    await #expect(processExitsWith: .failure) {
      let port = FakePort()
      _ = port.bring(0, [0..<10], headerBytes: 10)
      _ = port.bring(0, [0..<10], headerBytes: 10)
    }
    await #expect(processExitsWith: .failure) {
      let port = FakePort()
      _ = port.bring(4, [0..<10], headerBytes: 10)
    }
    await #expect(processExitsWith: .failure) {
      let port = FakePort()
      var memory = try FrameMemory(slotCount: 1, hugePages: false)
      let owner = memory.adopt(port.memory.reference)
      _ = port.bring(0, [0..<100], headerBytes: 50)
      let frame = Descriptor(
        buffer: BufferReference(owner: owner, index: 0), offset: 0, length: 101, segments: 2, ingress: .none)
      var vectors = unsafe [iovec](repeating: iovec(), count: 4)
      _ = unsafe memory.vectors(of: frame, into: &vectors, room: 4)
    }
    await #expect(processExitsWith: .failure) {
      let port = FakePort()
      var memory = try FrameMemory(slotCount: 1, hugePages: false)
      for _ in 0...FrameMemory.foreignOwnersMax { _ = memory.adopt(port.memory.reference) }
    }
  }
}
