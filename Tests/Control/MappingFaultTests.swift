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

  // MARK: What becomes of the port

  /// A guest with one queue on a socket of its own, whose workers are done at once.
  private final class Port {
    let socket: VhostUserSocket
    var effects: [String] = []
    private(set) var memory: VhostUserMemory?

    init(_ path: String) throws { socket = try VhostUserSocket(.server, path: path, settings: .init()) }

    func connect(_ file: SharedFile, error: OwnedDescriptor) -> VhostUserFrontend? {
      guard let frontend = VhostUserFrontend(path: socket.path) else { return nil }
      frontend.send(.setProtocolFeatures(VhostUserProtocolFeatures.replyAcknowledge.rawValue))
      frontend.send(.setFeatures(VhostUserFeatures([.version1, .protocolFeatures]).rawValue))
      frontend.send(.setMemoryTable([file.region()]), [file.descriptor])
      frontend.send(.setQueueError(.init(queue: 0)), [error])
      frontend.send(.setQueueSize(.init(queue: 0, number: 256)))
      frontend.send(.setQueueAddresses(VhostUserConversation.addresses(0)))
      frontend.send(.setQueueKick(.init(queue: 0)), [error])
      turn()
      return frontend
    }

    /// What the service does when something happened.
    func turn() {
      var open = socket.ready(nowNanoseconds: 1)
      while !open.isEmpty {
        let effect = open.removeFirst()
        effects.append(effect.name)
        if case .memoryChanged(let memory, _, _) = effect { self.memory = memory }
        if case .stopQueue(let queue) = effect {
          memory = nil
          open += socket.queueStopped(queue, base: .init(availableIndex: 0), nowNanoseconds: 1)
        }
        if let version = effect.version { open += socket.adopted(version: version, nowNanoseconds: 1) }
      }
    }

    func load(_ address: UInt64) -> UInt8? {
      unsafe memory?.pointer(guest: address, byteCount: 1)?.load(as: UInt8.self)
    }
  }

  @Test func aGuestThatCutsItsMemoryLosesItsPortAndNoOtherDoes() throws {
    let paths = (0..<2).map { temporaryFolder + "/vnetr-fault-\($0)-\(getpid())" }
    let ports = try paths.map(Port.init)
    let files = (0..<2).map { SharedFile("fault-port-\($0)") }
    let errors = (0..<2).map { _ in OwnedDescriptor(eventfd(0, Int32(EFD_NONBLOCK))) }
    let frontends = try (0..<2).map { try #require(ports[$0].connect(files[$0], error: errors[$0])) }
    for port in ports {
      #expect(port.effects == ["connected", "features", "memory 1", "start 0"])
      port.effects = []
    }
    precondition(ftruncate(files[0].descriptor.number, 0) == 0)
    for port in ports { port.turn() }
    #expect(ports.flatMap(\.effects) == [], "nobody has noticed yet")
    for port in ports { #expect(port.load(0x4000) == 0) }
    #expect(try isEventReadable)
    MappingFaults.acknowledge()
    for port in ports { port.turn() }
    #expect(
      ports[0].effects == [
        "broken the region at guest address 0x0: its file was cut short, or had no page left, while it was shared; "
          + "the frontend must keep its files as they are", "stop 0", "disconnected",
      ])
    #expect(frontends[0].isClosed)
    #expect(ports[1].effects.isEmpty && ports[1].socket.isConnected && !frontends[1].isClosed)
    var count: UInt64 = 0
    #expect(unsafe read(errors[0].number, &count, 8) == 8, "who watches the queue's errors is told")
    #expect(unsafe read(errors[1].number, &count, 8) == -1)

    // With memory that is whole it is served again.
    let whole = SharedFile("fault-port-whole")
    ports[0].effects = []
    let again = try #require(ports[0].connect(whole, error: errors[0]))
    ports[0].turn()
    #expect(ports[0].effects == ["connected", "features", "memory 1", "start 0"] && !again.isClosed)
  }

  @Test func theLogTheInflightMemoryAndMemoryThatIsBeingLeftAreLookedAtToo() throws {
    let file = SharedFile("fault-kinds")
    var frontend = VhostUserConversation()
    frontend.agree()
    frontend.lend(file)
    let log = SharedFile("fault-log", byteCount: 4_096)
    let outcome = frontend.backend.receive(
      VhostUserMessage.setLogBase(.init(byteCount: 4_096, fileOffset: 0)).header(),
      payload: VhostUserMessage.setLogBase(.init(byteCount: 4_096, fileOffset: 0)).payload,
      descriptors: [log.received])
    guard case .logChanged(let lent, let version) = outcome.effects.first else {
      Issue.record("no log")
      return
    }
    _ = frontend.backend.adopted(version: version)
    #expect(frontend.backend.memoryFault == nil)
    precondition(ftruncate(log.descriptor.number, 0) == 0)
    #expect(unsafe lent.mapping.base.load(as: UInt8.self) == 0)
    #expect(frontend.backend.memoryFault?.hasPrefix("the log: its file was cut short") == true)

    var other = VhostUserConversation()
    other.agree()
    other.lend(file)
    let old = other.backend.memory
    other.start(0, file)
    other.starts = []
    let new = SharedFile("fault-new")
    let message = VhostUserMessage.setMemoryTable([new.region()])
    let change = other.backend.receive(message.header(), payload: message.payload, descriptors: [new.received])
    precondition(ftruncate(file.descriptor.number, 0) == 0)
    #expect(unsafe old.pointer(guest: 0, byteCount: 1)?.load(as: UInt8.self) == 0)
    #expect(other.backend.memoryFault?.hasPrefix("the region at guest address 0x0: ") == true)
    _ = other.backend.adopted(version: change.effects.first?.version ?? 0)
    #expect(other.backend.memoryFault == nil, "nobody has it any more")

    let inflight = SharedFile("fault-inflight")
    var third = VhostUserConversation()
    third.agree()
    third.send(
      .setInflight(
        .init(area: .init(byteCount: UInt64(inflight.byteCount), fileOffset: 0), queues: 4, size: 256)),
      [inflight.received])
    third.lend(new)
    third.start(0, new)
    precondition(ftruncate(inflight.descriptor.number, 0) == 0)
    let part = try #require(third.starts.first?.inflight)
    #expect(unsafe part.memory.mapping.base.load(as: UInt8.self) == 0)
    #expect(third.backend.memoryFault?.hasPrefix("the in-flight memory: ") == true)
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
