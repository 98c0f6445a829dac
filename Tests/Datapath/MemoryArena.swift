import Datapath
import Glibc
import Testing

@Suite struct MemoryArenaTests {
  private func descriptor(_ slot: Int, offset: Int = 0, length: Int) -> Descriptor {
    Descriptor(buffer: BufferReference(slot: slot), offset: offset, length: length, ingress: InterfaceIndex(0))
  }

  @Test("slots lie an odd multiple of 64 bytes apart and do not overlap")
  func stride() throws {
    #expect(FrameMemory.slotStrideBytes % 64 == 0)
    #expect(FrameMemory.slotStrideBytes / 64 % 2 == 1)
    #expect(FrameMemory.slotBytes <= FrameMemory.slotStrideBytes)
    #expect(FrameMemory.payloadBytesMax >= 65_535)
    let memory = try FrameMemory(slotCount: 65, hugePages: false)
    for slot in 1..<65 {
      let distance = unsafe memory.address(ofSlot: slot) - memory.address(ofSlot: slot - 1)
      #expect(distance == FrameMemory.slotStrideBytes)
    }
    // So the starts of 64 slots in a row fall into 64 different sets of a first-level cache of 64 sets of 64 bytes.
    let sets = Set((0..<64).map { unsafe UInt(bitPattern: memory.address(ofSlot: $0)) / 64 % 64 })
    #expect(sets.count == 64)
  }

  @Test("every byte of every slot can be written and is the slot's alone")
  func bytes() throws {
    var memory = try FrameMemory(slotCount: 5, hugePages: false)
    for slot in 0..<5 {
      var head = memory.mutableHead(of: descriptor(slot, length: FrameMemory.slotBytes))
      for place in Swift.stride(from: 0, to: FrameMemory.slotBytes, by: 64) {
        head.storeBytes(of: UInt8(slot + 1), toByteOffset: place, as: UInt8.self)
      }
      head.storeBytes(of: UInt8(slot + 1), toByteOffset: FrameMemory.slotBytes - 1, as: UInt8.self)
    }
    for slot in 0..<5 {
      let head = memory.head(of: descriptor(slot, length: FrameMemory.slotBytes))
      var wrong = 0
      for place in Swift.stride(from: 0, to: FrameMemory.slotBytes, by: 64)
      where unsafe head.unsafeLoad(fromByteOffset: place, as: UInt8.self) != slot + 1 { wrong += 1 }
      let last = unsafe head.unsafeLoad(fromByteOffset: FrameMemory.slotBytes - 1, as: UInt8.self)
      #expect(wrong == 0)
      #expect(last == slot + 1)
    }
  }

  @Test("where there are no huge pages the arena uses ordinary ones")
  func hugePageFallback() throws {
    let without = try FrameMemory(slotCount: 2, hugePages: false).hasHugePages
    #expect(!without)
    // More than any machine has reserved: 2^16 slots are 4 GiB.
    let most = try FrameMemory(slotCount: 1 << 16, hugePages: true)
    unsafe most.address(ofSlot: (1 << 16) - 1).storeBytes(
      of: 1, toByteOffset: FrameMemory.slotBytes - 1, as: UInt8.self)
    let has = most.hasHugePages
    if freeHugePages == 0 { #expect(!has) }
  }

  private var freeHugePages: Int {
    guard let file = unsafe fopen("/proc/meminfo", "r") else { return 0 }
    defer { unsafe fclose(file) }
    var line = [CChar](repeating: 0, count: 256)
    while unsafe fgets(&line, Int32(line.count), file) != nil {
      let text = String(decoding: line.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
      if text.hasPrefix("HugePages_Free:") { return Int(text.split(separator: " ")[1].filter(\.isNumber)) ?? 0 }
    }
    return 0
  }

  @Test("an arena larger than the address space is an error, not a crash")
  func tooLarge() {
    let error = #expect(throws: SystemError.self) { _ = try FrameMemory(slotCount: 1 << 31, hugePages: false) }
    #expect(error?.number == ENOMEM)
    #expect(error?.description.contains("frame arena") == true)
  }

  /// Free, posted and held slots, and the sends that held ones wait for.
  private func census(_ memory: borrowing FrameMemory) -> [Int] {
    [memory.freeSlots, memory.postedCount, memory.heldCount, memory.holdsTotal]
  }

  @Test("a slot goes from free to posted, held and free again, and is counted in each state")
  func states() throws {
    var memory = try FrameMemory(slotCount: 3, hugePages: false)
    #expect(census(memory) == [3, 0, 0, 0])
    let posted = memory.post()
    let slot = try #require(posted)
    #expect(census(memory) == [2, 1, 0, 0])
    let isPosted = memory.isPosted(slot)
    #expect(isPosted)
    memory.received(slot)
    #expect(census(memory) == [2, 0, 1, 1])
    let isStillPosted = memory.isPosted(slot)
    #expect(!isStillPosted)
    memory.hold(BufferReference(slot: slot), adding: 2)
    #expect(census(memory) == [2, 0, 1, 3])
    for left in [2, 1] {
      memory.release(BufferReference(slot: slot))
      #expect(census(memory) == [2, 0, 1, left])
    }
    memory.release(BufferReference(slot: slot))
    #expect(census(memory) == [3, 0, 0, 0])
  }

  @Test("a flood to one place adds no hold")
  func floodToOne() throws {
    var memory = try FrameMemory(slotCount: 1, hugePages: false)
    let slot = memory.post()!
    memory.received(slot)
    memory.hold(BufferReference(slot: slot), adding: 0)
    memory.release(BufferReference(slot: slot))
    #expect(census(memory) == [1, 0, 0, 0])
  }

  @Test("every slot is given out once, then none, and the one that came back last goes first")
  func exhaustion() throws {
    var memory = try FrameMemory(slotCount: 8, hugePages: false)
    var slots: [Int] = []
    while let slot = memory.post() { slots.append(slot) }
    #expect(Set(slots) == Set(0..<8))
    for slot in slots { memory.received(slot) }
    memory.release(BufferReference(slot: 3))
    memory.release(BufferReference(slot: 6))
    let next = memory.post()
    #expect(next == 6)
  }

  @Test("a posted slot that comes back unused is free")
  func unpost() throws {
    var memory = try FrameMemory(slotCount: 1, hugePages: false)
    let slot = memory.post()!
    memory.unpost(slot)
    #expect(census(memory) == [1, 0, 0, 0])
  }

  @Test("an operation that does not fit the state of a slot traps")
  func stateTraps() async {
    await #expect(processExitsWith: .failure) {
      var memory = try FrameMemory(slotCount: 2, hugePages: false)
      memory.received(0)
    }
    await #expect(processExitsWith: .failure) {
      var memory = try FrameMemory(slotCount: 2, hugePages: false)
      let slot = memory.post()!
      memory.received(slot)
      memory.received(slot)
    }
    await #expect(processExitsWith: .failure) {
      var memory = try FrameMemory(slotCount: 2, hugePages: false)
      let slot = memory.post()!
      memory.release(BufferReference(slot: slot))
    }
    await #expect(processExitsWith: .failure) {
      var memory = try FrameMemory(slotCount: 2, hugePages: false)
      let slot = memory.post()!
      memory.received(slot)
      memory.release(BufferReference(slot: slot))
      memory.release(BufferReference(slot: slot))
    }
    await #expect(processExitsWith: .failure) {
      var memory = try FrameMemory(slotCount: 2, hugePages: false)
      memory.hold(BufferReference(slot: 0), adding: 1)
    }
    await #expect(processExitsWith: .failure) {
      var memory = try FrameMemory(slotCount: 2, hugePages: false)
      memory.unpost(1)
    }
    // One hold more than the count can tell from "posted".
    await #expect(processExitsWith: .failure) {
      var memory = try FrameMemory(slotCount: 2, hugePages: false)
      let slot = memory.post()!
      memory.received(slot)
      memory.hold(BufferReference(slot: slot), adding: Int(UInt32.max) - 1)
    }
  }

  @Test("a descriptor that leaves its slot, or names none, traps")
  func borderTraps() async {
    await #expect(processExitsWith: .failure) {
      let memory = try FrameMemory(slotCount: 2, hugePages: false)
      let descriptor = Descriptor(
        buffer: BufferReference(slot: 0), offset: 1, length: FrameMemory.slotBytes, ingress: .none)
      print(memory.head(of: descriptor).byteCount)
    }
    await #expect(processExitsWith: .failure) {
      let memory = try FrameMemory(slotCount: 2, hugePages: false)
      let descriptor = Descriptor(buffer: BufferReference(slot: 2), offset: 0, length: 1, ingress: .none)
      print(memory.head(of: descriptor).byteCount)
    }
    await #expect(processExitsWith: .failure) {
      let memory = try FrameMemory(slotCount: 2, hugePages: false)
      let descriptor = Descriptor(buffer: BufferReference(owner: 1, index: 0), offset: 0, length: 1, ingress: .none)
      print(memory.head(of: descriptor).byteCount)
    }
  }

  @Test("a frame in a slot is one vector over exactly its bytes")
  func vectors() throws {
    let memory = try FrameMemory(slotCount: 2, hugePages: false)
    var vectors = unsafe [iovec](repeating: iovec(), count: 2)
    let frame = descriptor(1, offset: 140, length: 1_400)
    let (count, isExact) = unsafe vectors.withUnsafeMutableBufferPointer { room in
      let count = unsafe memory.vectors(of: frame, into: room.baseAddress!, room: 2)
      let start = unsafe memory.address(ofSlot: 1) + 140
      return unsafe (count, room[0].iov_base == start && room[0].iov_len == 1_400)
    }
    #expect(count == 1)
    #expect(isExact)
    let none = unsafe vectors.withUnsafeMutableBufferPointer { room in
      unsafe memory.vectors(of: frame, into: room.baseAddress!, room: 0)
    }
    #expect(none == nil)
  }
}
