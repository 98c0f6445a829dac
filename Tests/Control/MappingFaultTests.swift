import CLinux
import Datapath
import Glibc
import Synchronization
import TestSupport
import Testing

@testable import Control

/// A memory file, mapped as a guest's is, that can be cut.
private struct CuttableMemory {
  let file: SharedFile
  let mapping: SharedMapping

  init(_ name: String, byteCount: Int = 1 << 20) throws {
    file = SharedFile(name, byteCount: byteCount)
    mapping = try SharedMapping(
      file.descriptor, VhostUserMessage.AreaDescription(byteCount: UInt64(byteCount), fileOffset: 0))
  }

  func cut(to byteCount: Int = 0) { precondition(ftruncate(file.descriptor.number, byteCount) == 0) }

  func load(_ offset: Int) -> UInt8 { unsafe mapping.base.load(fromByteOffset: offset, as: UInt8.self) }
  func store(_ byte: UInt8, _ offset: Int) {
    unsafe mapping.base.storeBytes(of: byte, toByteOffset: offset, as: UInt8.self)
  }
  func fill(_ byte: UInt8) { unsafe memset(mapping.base, Int32(byte), mapping.byteCount) }
  func count(of byte: UInt8) -> Int { (0..<mapping.byteCount).count { load($0) == byte } }
}

/// Serialized: they share the process's one event.
@Suite(.serialized) struct MappingFaultTests {
  private var isEventReadable: Bool {
    get throws {
      var watched = pollfd(fd: try MappingFaults.event().number, events: Int16(POLLIN), revents: 0)
      return unsafe poll(&watched, 1, 0) > 0
    }
  }

  @Test func threadsThatUseAFileWhileItIsCutGoOnWithZeroes() throws {
    let memory = try CuttableMemory("fault-threads")
    let other = try CuttableMemory("fault-threads-other")
    memory.fill(7)
    other.fill(8)
    let shared = Shared(memory)
    let threads = (0..<3).map { _ in
      TestThread {
        // As a worker: it neither knows nor asks.
        var offset = 0
        while !shared.isOver.load(ordering: .acquiring) {
          offset = (offset &+ 4_093) % shared.memory.mapping.byteCount
          if shared.memory.load(offset) == 9 { break }
          shared.memory.store(7, offset)
          shared.rounds.add(1, ordering: .relaxed)
        }
      }
    }
    while shared.rounds.load(ordering: .relaxed) < 10_000 { sched_yield() }
    #expect(!memory.mapping.isCut)
    memory.cut(to: 8_192)
    while !memory.mapping.isCut { sched_yield() }
    #expect(try isEventReadable)
    let before = shared.rounds.load(ordering: .relaxed)
    while shared.rounds.load(ordering: .relaxed) < before + 10_000 { sched_yield() }
    shared.isOver.store(true, ordering: .releasing)
    for thread in threads { thread.join() }

    MappingFaults.acknowledge()
    #expect(try !isEventReadable)
    #expect(memory.count(of: 7) + memory.count(of: 0) == memory.mapping.byteCount)
    memory.fill(3)
    #expect(memory.count(of: 3) == memory.mapping.byteCount, "it can be written to in all its length")
    #expect(!other.mapping.isCut)
    #expect(other.count(of: 8) == other.mapping.byteCount)
  }

  @Test func theMappingsBesideACutOneStayAsTheyAre() throws {
    let memories = try (0..<8).map { try CuttableMemory("fault-beside-\($0)", byteCount: 8_192) }
    for memory in memories { memory.fill(5) }
    memories[3].cut(to: 4_096)
    #expect(memories[3].load(4_095) == 5, "what is left of the file")
    #expect(!memories[3].mapping.isCut)
    #expect(memories[3].load(4_096) == 0)
    for (number, memory) in memories.enumerated() {
      #expect(memory.mapping.isCut == (number == 3))
      #expect(memory.count(of: 5) == (number == 3 ? 0 : 8_192))
    }
    #expect(SharedFile.mappedCount("fault-beside-3") == 0, "all of it is replaced")
    #expect(SharedFile.mappedCount("fault-beside-4") == 1)
  }

  @Test func whatTheKernelReadsFromACutFileFailsAndCutsNothing() throws {
    let memory = try CuttableMemory("fault-kernel")
    memory.cut()
    var ends: [Int32] = [0, 0]
    precondition(unsafe socketpair(AF_UNIX, Int32(SOCK_DGRAM.rawValue | SOCK_CLOEXEC.rawValue), 0, &ends) == 0)
    let sockets = ends.map(OwnedDescriptor.init)
    #expect(unsafe send(sockets[0].number, memory.mapping.base, 100, 0) == -1)
    #expect(errno == EFAULT)
    #expect(!memory.mapping.isCut)
    #expect(memory.load(0) == 0)
    #expect(memory.mapping.isCut)
    #expect(unsafe send(sockets[0].number, memory.mapping.base, 100, 0) == 100)
  }

  @Test func aPlaceIsFreeAgainWhenItsMappingIsGone() throws {
    for round in 0..<10_000 {
      let memory = try CuttableMemory("fault-places", byteCount: 4_096)
      guard round % 1_000 == 0 else { continue }
      memory.cut()
      #expect(memory.load(0) == 0 && memory.mapping.isCut)
    }
    #expect(SharedFile.mappedCount("fault-places") == 0)
    #expect(SharedFile.openCount("fault-places") == 0)
  }

  // MARK: What ends the process as ever

  @Test func anAccessThatIsNoGuestsEndsTheProcess() async {
    await #expect(processExitsWith: .signal(SIGBUS)) {
      let guest = try CuttableMemory("fault-guest")
      let own = SharedFile("fault-own")
      let mapped = unsafe mmap(nil, own.byteCount, PROT_READ, MAP_SHARED, own.descriptor.number, 0)
      guest.cut()
      precondition(guest.load(0) == 0 && guest.mapping.isCut)
      ftruncate(own.descriptor.number, 0)
      exit(unsafe Int32(mapped!.load(as: UInt8.self)))
    }
  }

  @Test func aSignalThatWasSentEndsTheProcess() async {
    await #expect(processExitsWith: .signal(SIGBUS)) {
      let guest = try CuttableMemory("fault-sent")
      guest.cut()
      precondition(guest.load(0) == 0 && guest.mapping.isCut)
      kill(getpid(), SIGBUS)
      for _ in 0..<1_000 { usleep(1_000) }
    }
  }

  @Test func aMappingThatIsGoneIsNobodysAnyMore() async {
    await #expect(processExitsWith: .signal(SIGBUS)) {
      let file = SharedFile("fault-gone")
      var guest: CuttableMemory? = try CuttableMemory("fault-gone-guest")
      let address = unsafe guest!.mapping.base
      guest = nil
      let mapped = unsafe mmap(
        address, file.byteCount, PROT_READ, MAP_SHARED | MAP_FIXED, file.descriptor.number, 0)
      precondition(unsafe mapped == address)
      ftruncate(file.descriptor.number, 0)
      exit(unsafe Int32(mapped!.load(as: UInt8.self)))
    }
  }
}

private final class Shared: Sendable {
  let memory: CuttableMemory
  let isOver = Atomic<Bool>(false)
  let rounds = Atomic<Int>(0)
  init(_ memory: CuttableMemory) { self.memory = memory }
}
