import Datapath
import Glibc
import Testing

@testable import SimulatedKernel

/// One worker's side of the simulated kernel, held by hand: a device with two queues, a socket that receives, and
/// lanes.
struct Hands: ~Copyable {
  let network: SimulatedNetwork
  let device: Int
  let queues: [Int32]
  let receiver: Int32
  var io: SimulatedIO
  var memory: FrameMemory
  var pool = SendPool(count: 32)
  var events = EventBatch(capacity: 64)

  static let here = UnderlayAddress(ipv4: 0x0A00_0001)
  static let there = UnderlayAddress(ipv4: 0x0A00_0002)

  /// Lanes 0 and 1 are the queues of the device; sources 0 and 1 the first queue and a socket bound to port 4789.
  init(
    seed: UInt64 = 1, slots: Int = 16, limits: SimulatedNetwork.Limits = SimulatedNetwork.Limits(),
    _ set: (inout Faults) -> Void = { _ in }
  ) throws {
    var faults = Faults.none
    set(&faults)
    network = SimulatedNetwork(seed: seed, faults: faults, limits: limits)
    device = network.addDevice()
    queues = [network.openQueue(device: device), network.openQueue(device: device)]
    receiver = network.openSocket(Self.here, port: 4789)
    io = SimulatedIO(network, chainFramesMax: 8)
    memory = try FrameMemory(slotCount: slots, hugePages: false)
    io.openSource(0, .tap, descriptor: queues[0])
    io.openSource(1, .vxlan, descriptor: receiver)
    io.openLane(0, .tap, descriptor: queues[0])
    io.openLane(1, .tap, descriptor: queues[1])
  }

  /// Takes a free slot, writes `bytes` there and fills in a send of it; the slot stays held.
  mutating func prepare(_ bytes: [UInt8], lane kind: LaneKind, typeOfService: UInt8 = 0) -> Int {
    let slot = memory.post()!
    memory.received(slot)
    var descriptor = Descriptor(
      buffer: BufferReference(slot: slot), offset: FrameMemory.headroomBytes, length: bytes.count,
      ingress: InterfaceIndex(0))
    descriptor.typeOfService = typeOfService
    var head = memory.mutableHead(of: descriptor)
    for index in bytes.indices { head.storeBytes(of: bytes[index], toByteOffset: index, as: UInt8.self) }
    let operation = pool.take()!
    let header = SendPool.Header(count: kind == .tap ? SimulatedNetwork.virtioHeaderBytes : 8)
    precondition(
      pool.fill(operation, descriptor, egress: InterfaceIndex(0), lane: kind, header: header, memory))
    return operation
  }

  /// Sends frames that start with these bytes as one chain; returns its operations.
  @discardableResult
  mutating func send(_ lane: Int, _ firsts: [UInt8]) -> [Int] {
    var operations: [Int] = []
    for first in firsts {
      operations.append(prepare([first] + [UInt8](repeating: 0, count: 19), lane: .tap))
    }
    for (operation, next) in zip(operations, operations.dropFirst()) { pool[operation].next = UInt32(next) }
    io.send(lane, first: operations[0], count: operations.count, pool)
    return operations
  }

  mutating func finish(_ operations: [Int]) {
    for operation in operations {
      memory.release(pool[operation].descriptor.buffer)
      pool.giveBack(operation)
    }
  }

  mutating func post(_ count: Int) {
    for _ in 0..<count {
      let slot = memory.post()!
      io.post(slot, &memory)
    }
  }

  mutating func collect(_ wait: Wait = .sweep) -> [IOEvent] {
    events.removeAll()
    io.collect(wait, &memory, into: &events)
    return (0..<events.count).map { events[$0] }
  }

  mutating func bytes(of event: IOEvent) -> [UInt8] {
    let descriptor = Descriptor(
      buffer: BufferReference(slot: Int(event.slot)), offset: Int(event.offset), length: Int(event.length),
      ingress: InterfaceIndex(0))
    let head = memory.head(of: descriptor)
    return (0..<head.byteCount).map { unsafe head.unsafeLoad(fromByteOffset: $0, as: UInt8.self) }
  }

  var writtenFirsts: [UInt8] { network.takeWritten(device: device).map { $0.frame[0] } }
}

@Suite struct SimulatedIOTests {
  // MARK: Time and order

  @Test("without faults a chain is done in the next collect, in order")
  func promptChain() throws {
    var hands = try Hands()
    hands.send(0, [1, 2, 3])
    let events = hands.collect()
    #expect(events.map(\.kind) == [.sent])
    #expect(events[0].count == 3 && events[0].error == 0)
    #expect(hands.writtenFirsts == [1, 2, 3])
  }

  @Test("a delayed operation starts some collects later, and does start")
  func delayedOperation() throws {
    var hands = try Hands {
      $0.delayedOperation = 1
      $0.delayCollectsMax = 3
    }
    hands.send(0, [1])
    #expect(hands.collect().isEmpty)
    var kinds: [IOEvent.Kind] = []
    for _ in 0..<3 { kinds += hands.collect().map(\.kind) }
    #expect(kinds == [.sent])
  }

  @Test("a paused chain goes on in later collects, in order")
  func pausedChain() throws {
    var hands = try Hands { $0.pausedChain = 1 }
    hands.send(0, [1, 2, 3])
    #expect(hands.collect().isEmpty)
    #expect(hands.writtenFirsts == [1])
    #expect(hands.collect().isEmpty)
    #expect(hands.writtenFirsts == [2])
    #expect(hands.collect().map(\.kind) == [.sent])
    #expect(hands.writtenFirsts == [3])
  }

  @Test("chains of two lanes are carried out in either order, each in its own")
  func reorderedExecution() throws {
    var hands = try Hands { $0.reorderedExecution = 1 }
    var firsts: Set<UInt8> = []
    for _ in 0..<40 {
      let operations = hands.send(0, [1, 2]) + hands.send(1, [11, 12])
      #expect(hands.collect().count == 2)
      let written = hands.writtenFirsts
      #expect(written.filter { $0 < 10 } == [1, 2])
      #expect(written.filter { $0 > 10 } == [11, 12])
      firsts.insert(written[0])
      hands.finish(operations)
    }
    #expect(firsts == [1, 11])
  }

  @Test("completions of two lanes come in either order")
  func reorderedCompletion() throws {
    var hands = try Hands { $0.reorderedCompletion = 1 }
    var firsts: Set<UInt32> = []
    for _ in 0..<40 {
      let operations = hands.send(0, [1]) + hands.send(1, [11])
      firsts.insert(hands.collect()[0].index)
      #expect(hands.writtenFirsts == [1, 11])
      hands.finish(operations)
    }
    #expect(firsts == [0, 1])
  }

  @Test("a delayed completion is reported later than the frame is written")
  func delayedCompletion() throws {
    var hands = try Hands { $0.delayedCompletion = 1 }
    hands.send(0, [1])
    #expect(hands.collect().isEmpty)
    #expect(hands.writtenFirsts == [1])
    hands.network.faults.delayedCompletion = 0
    #expect(hands.collect().map(\.kind) == [.sent])
  }

  @Test("completions of one source keep their order under every fault")
  func orderWithinSource() throws {
    var hands = try Hands(seed: 5, slots: 64) {
      $0.reorderedCompletion = 1
      $0.delayedCompletion = 0.5
      $0.reorderedExecution = 1
    }
    hands.post(32)
    hands.io.arm(0, &hands.memory)
    for number in UInt8(0)..<32 { hands.network.inject([number] + [UInt8](repeating: 0, count: 13), device: 0) }
    var firsts: [UInt8] = []
    for _ in 0..<60 {
      for event in hands.collect() where event.kind == .received {
        firsts.append(hands.bytes(of: event)[SimulatedNetwork.virtioHeaderBytes])
      }
    }
    #expect(firsts == Array(0..<32))
  }

  @Test("a wait moves time on to what is due, a sweep does not, and a spurious return does not")
  func waiting() throws {
    var limits = SimulatedNetwork.Limits()
    limits.delayNanoseconds = 50_000...50_000
    limits.collectNanoseconds = 100...100
    var hands = try Hands(limits: limits)
    hands.post(4)
    hands.io.arm(1, &hands.memory)
    hands.network.forge([1, 2, 3], from: Hands.there, port: 9, to: Hands.here, port: 4789)
    #expect(hands.collect(.sweep).isEmpty)
    #expect(hands.network.clock.nanoseconds == 100)
    #expect(hands.collect(.atMost(nanoseconds: 1_000)).isEmpty)
    #expect(hands.network.clock.nanoseconds == 1_200)
    hands.network.faults.spuriousReturn = 1
    #expect(hands.collect(.forEvent).isEmpty)
    hands.network.faults.spuriousReturn = 0
    #expect(hands.collect(.forEvent).map(\.kind) == [.received])
    #expect(hands.network.clock.nanoseconds == 50_000)
  }

  // MARK: Receives

  @Test("a datagram lies behind room for the kernel's headers, with its sender and its ToS")
  func datagramLayout() throws {
    var hands = try Hands(slots: 64)
    hands.post(40)
    hands.io.arm(1, &hands.memory)
    var offsets: Set<UInt32> = []
    for number in UInt8(0)..<40 {
      hands.network.forge([7, number], typeOfService: 0xB9, from: Hands.there, port: 9, to: Hands.here, port: 4789)
      for event in hands.collect(.forEvent) {
        #expect(event.offset >= 108 && event.offset <= FrameMemory.headroomBytes)
        #expect(event.sender == Hands.there)
        #expect(event.typeOfService == 0xB9)
        #expect(!event.isTruncated)
        #expect(hands.bytes(of: event) == [7, number])
        offsets.insert(event.offset)
      }
    }
    #expect(offsets.count > 3)
  }

  @Test("a frame lies behind its virtio header")
  func frameLayout() throws {
    var hands = try Hands()
    hands.post(1)
    hands.io.arm(0, &hands.memory)
    let header: [UInt8] = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0]
    let frame = [UInt8](1...60)
    hands.network.inject(frame, virtioHeader: header, device: 0)
    let event = hands.collect()[0]
    #expect(event.kind == .received)
    #expect(hands.bytes(of: event) == header + frame)
    #expect(hands.memory.heldCount == 1)
    #expect(hands.memory.postedCount == 0)
  }

  @Test("a receive without a posted slot ends with ENOBUFS and its frame waits")
  func starved() throws {
    var hands = try Hands()
    hands.post(1)
    hands.io.arm(0, &hands.memory)
    hands.network.inject([UInt8](repeating: 1, count: 20), device: 0)
    hands.network.inject([UInt8](repeating: 2, count: 20), device: 0)
    let events = hands.collect()
    #expect(events.map(\.kind) == [.received, .receiveEnded])
    #expect(events[1].error == ENOBUFS)
    #expect(hands.network.framesQueued == 1)
    hands.post(1)
    hands.io.arm(0, &hands.memory)
    let second = hands.collect()
    #expect(second.map(\.kind) == [.received])
    #expect(hands.bytes(of: second[0])[12] == 2)
  }

  @Test("a cancelled receive ends with ECANCELED, and the slots come back")
  func cancelled() throws {
    var hands = try Hands()
    hands.post(5)
    hands.io.arm(0, &hands.memory)
    #expect(hands.collect().isEmpty)
    hands.io.cancel(0)
    let events = hands.collect()
    #expect(events.map(\.kind) == [.receiveEnded])
    #expect(events[0].error == ECANCELED)
    hands.io.closeSource(0)
    hands.io.takeBackSlots(&hands.memory)
    #expect(hands.memory.freeSlots == hands.memory.slotCount)
    #expect(hands.network.violations == [])
  }

  @Test("any number of wakes makes one wake-up, which ends the waker's receive")
  func waker() throws {
    var hands = try Hands()
    let waker = hands.network.openWaker()
    hands.io.openSource(2, .waker, descriptor: waker)
    hands.io.arm(2, &hands.memory)
    for _ in 0..<5 { hands.network.wake(waker) }
    #expect(hands.collect().map(\.kind) == [.woken])
    #expect(hands.collect().isEmpty)
    hands.io.arm(2, &hands.memory)
    #expect(hands.collect().isEmpty)
    hands.network.wake(waker)
    #expect(hands.collect().map(\.kind) == [.woken])
    #expect(hands.network.violations == [])
  }

  @Test("a lost device ends its receive with EBADFD, its sends with EIO, and a wait for room with an error")
  func lostDevice() throws {
    var hands = try Hands()
    hands.post(1)
    hands.io.arm(0, &hands.memory)
    hands.network.inject([UInt8](repeating: 1, count: 20), device: 0, queue: 1)
    hands.network.removeDevice(0)
    hands.send(0, [1, 2])
    hands.io.awaitWritable(1)
    let events = hands.collect()
    #expect(events.map(\.kind) == [.receiveEnded, .sent, .writable])
    #expect(events.map(\.error) == [EBADFD, EIO, EBADFD])
    #expect(events[1].count == 0)
    #expect(hands.network.counts.framesLostWithDevice == 1)
    #expect(!hands.network.inject([UInt8](repeating: 1, count: 20), device: 0))
  }

  // MARK: Sends

  @Test("a chain stops at its first failure, and says how many went before it")
  func chainStops() throws {
    var hands = try Hands()
    let operations = [
      hands.prepare([UInt8](repeating: 1, count: 20), lane: .tap),
      // Shorter than an Ethernet header: the device refuses it.
      hands.prepare([UInt8](repeating: 2, count: 5), lane: .tap),
      hands.prepare([UInt8](repeating: 3, count: 20), lane: .tap),
    ]
    for (operation, next) in zip(operations, operations.dropFirst()) { hands.pool[operation].next = UInt32(next) }
    hands.io.send(0, first: operations[0], count: 3, hands.pool)
    let event = hands.collect()[0]
    #expect(event.count == 1)
    #expect(event.error == EINVAL)
    #expect(hands.writtenFirsts == [1])
  }

  /// Sends one datagram of `count` bytes, header included, on lane 2, and reports its error.
  private func sendDatagram(_ hands: inout Hands, _ kind: LaneKind, count: Int, typeOfService: UInt8 = 0) -> Int32 {
    let operation = hands.prepare(
      [UInt8](repeating: 5, count: count - 8), lane: kind, typeOfService: typeOfService)
    hands.io.send(2, first: operation, count: 1, hands.pool)
    let events = hands.collect()
    hands.finish([operation])
    return events[0].error
  }

  @Test("a datagram arrives with its bytes and its ToS, over IPv4 and IPv6")
  func datagrams() throws {
    for (kind, here, there) in [
      (LaneKind.datagramIPv4, Hands.here, Hands.there),
      (.datagramIPv6, UnderlayAddress("fd00::1")!, UnderlayAddress("fd00::2")!),
    ] {
      var hands = try Hands()
      let receiver = hands.network.openSocket(there, port: 4789)
      hands.io.openSource(2, .vxlan, descriptor: receiver)
      hands.io.openLane(2, kind, descriptor: hands.network.openSocket(here, connectedTo: there, port: 4789))
      hands.post(1)
      hands.io.arm(2, &hands.memory)
      #expect(sendDatagram(&hands, kind, count: 100, typeOfService: 0x2A) == 0)
      var events: [IOEvent] = []
      for _ in 0..<5 where events.isEmpty { events = hands.collect(.forEvent) }
      #expect(events.map(\.kind) == [.received])
      #expect(events[0].sender == here)
      #expect(events[0].typeOfService == 0x2A)
      #expect(hands.bytes(of: events[0]) == [UInt8](repeating: 0, count: 8) + [UInt8](repeating: 5, count: 92))
      #expect(hands.network.violations == [])
    }
  }

  @Test("a datagram over the underlay's MTU is refused with EMSGSIZE")
  func tooBig() throws {
    var limits = SimulatedNetwork.Limits()
    limits.mtuBytes = 1500
    var hands = try Hands(limits: limits)
    let descriptor = hands.network.openSocket(Hands.here, connectedTo: Hands.there, port: 4789)
    hands.io.openLane(2, .datagramIPv4, descriptor: descriptor)
    #expect(sendDatagram(&hands, .datagramIPv4, count: 1500 - 28) == 0)
    #expect(sendDatagram(&hands, .datagramIPv4, count: 1500 - 27) == EMSGSIZE)
  }

  @Test("where nobody listens, the send after the ICMP message is refused, and the one after that is not")
  func refused() throws {
    var hands = try Hands()
    let descriptor = hands.network.openSocket(Hands.here, connectedTo: Hands.there, port: 4789)
    hands.io.openLane(2, .datagramIPv4, descriptor: descriptor)
    #expect(sendDatagram(&hands, .datagramIPv4, count: 50) == 0)
    for _ in 0..<5 { _ = hands.collect(.forEvent) }
    #expect(hands.network.counts.noListener == 1)
    #expect(sendDatagram(&hands, .datagramIPv4, count: 50) == ECONNREFUSED)
    #expect(sendDatagram(&hands, .datagramIPv4, count: 50) == 0)
  }

  @Test("a full socket says EAGAIN, and writable once it has drained to half")
  func full() throws {
    var limits = SimulatedNetwork.Limits()
    limits.sendBufferBytes = 1_000
    limits.bytesPerMicrosecond = 1
    limits.collectNanoseconds = 1...1
    var hands = try Hands(limits: limits)
    _ = hands.network.openSocket(Hands.there, port: 4789)
    let descriptor = hands.network.openSocket(Hands.here, connectedTo: Hands.there, port: 4789)
    hands.io.openLane(2, .datagramIPv4, descriptor: descriptor)
    for _ in 0..<4 { #expect(sendDatagram(&hands, .datagramIPv4, count: 200) == 0) }
    #expect(sendDatagram(&hands, .datagramIPv4, count: 200) == EAGAIN)
    hands.io.awaitWritable(2)
    #expect(hands.collect().isEmpty)
    var kinds: [IOEvent.Kind] = []
    for _ in 0..<6 where kinds.isEmpty { kinds = hands.collect(.forEvent).map(\.kind) }
    #expect(kinds == [.writable])
    // Two datagrams of 228 bytes have left, at one byte a microsecond.
    #expect(hands.network.clock.nanoseconds >= 456_000)
    #expect(sendDatagram(&hands, .datagramIPv4, count: 200) == 0)
  }

  @Test("datagrams of one flow never overtake each other, those of two flows do")
  func overtaking() throws {
    let network = SimulatedNetwork(seed: 3)
    let receiver = network.openSocket(Hands.here, port: 4789)
    for number in UInt8(0)..<100 {
      network.forge(
        [number % 2, number], from: Hands.there, port: 1000 + UInt16(number % 2), to: Hands.here, port: 4789)
    }
    network.clock.advance(by: 1_000_000)
    network.run()
    var all: [UInt8] = []
    var perFlow: [[UInt8]] = [[], []]
    for _ in 0..<100 {
      let bytes = network.receive(receiver).bytes
      all.append(bytes[1])
      perFlow[Int(bytes[0])].append(bytes[1])
    }
    #expect(perFlow[0] == perFlow[0].sorted())
    #expect(perFlow[1] == perFlow[1].sorted())
    #expect(all != all.sorted())
  }

  @Test("of sockets bound to one port a flow always goes to the same, and flows go to all")
  func sharedPort() throws {
    let network = SimulatedNetwork(seed: 3)
    let receivers = [network.openSocket(Hands.here, port: 4789), network.openSocket(Hands.here, port: 4789)]
    for round in 0..<4 {
      for port in UInt16(2000)..<2020 {
        network.forge([UInt8(port - 2000), UInt8(round)], from: Hands.there, port: port, to: Hands.here, port: 4789)
      }
    }
    network.clock.advance(by: 1_000_000)
    network.run()
    var flows: [Set<UInt8>] = [[], []]
    for (number, receiver) in receivers.enumerated() {
      while network.readiness(receiver) == .something { flows[number].insert(network.receive(receiver).bytes[0]) }
    }
    #expect(flows[0].isDisjoint(with: flows[1]))
    #expect(flows[0].count + flows[1].count == 20)
    #expect(!flows[0].isEmpty && !flows[1].isEmpty)
    #expect(network.isConserved)
  }

  // MARK: What a worker must not do

  @Test("a second chain on a lane is recorded")
  func secondChain() throws {
    var hands = try Hands()
    hands.send(0, [1])
    hands.send(0, [2])
    #expect(hands.network.violations == [.laneHasChain(lane: 0)])
  }

  @Test("a chain that is too long is recorded")
  func longChain() throws {
    var hands = try Hands()
    hands.send(0, [UInt8](0..<9))
    #expect(hands.network.violations == [.chainLength(lane: 0, count: 9)])
  }

  @Test("a frame that changes while its send is out is recorded, and so is a header")
  func changedSend() throws {
    var hands = try Hands { $0.delayedOperation = 1 }
    let operations = hands.send(0, [1, 2])
    let descriptor = hands.pool[operations[1]].descriptor
    var head = hands.memory.mutableHead(of: descriptor)
    head.storeBytes(of: 99, toByteOffset: 3, as: UInt8.self)
    while hands.collect().isEmpty {}
    #expect(hands.network.violations.contains(.sendChanged(lane: 0, position: 1)))
    #expect(!hands.network.violations.contains(.sendChanged(lane: 0, position: 0)))
  }

  @Test("a slot posted twice, or not in state posted, is recorded")
  func wrongSlots() throws {
    var hands = try Hands()
    let slot = hands.memory.post()!
    hands.io.post(slot, &hands.memory)
    hands.io.post(slot, &hands.memory)
    hands.io.post(slot + 1, &hands.memory)
    #expect(hands.network.violations == [.slotPostedTwice(slot: slot), .slotNotPosted(slot: slot + 1)])
  }

  @Test("a source armed twice, or closed while it is armed, is recorded")
  func wrongSources() throws {
    var hands = try Hands()
    hands.io.arm(0, &hands.memory)
    hands.io.arm(0, &hands.memory)
    hands.io.takeBackSlots(&hands.memory)
    hands.io.closeSource(0)
    hands.io.arm(7, &hands.memory)
    #expect(
      hands.network.violations == [
        .sourceArmedTwice(source: 0), .slotsTakenBackWhileArmed(source: 0), .closedInUse(index: 0), .notOpen(index: 7),
      ])
  }

  @Test("a lane closed with a chain out, or awaited twice, is recorded; a wait alone may be out")
  func wrongLanes() throws {
    var hands = try Hands { $0.delayedOperation = 1 }
    hands.io.awaitWritable(1)
    hands.io.awaitWritable(1)
    #expect(hands.network.violations == [.laneAwaitedTwice(lane: 1)])
    hands.io.closeLane(1)
    hands.send(0, [1])
    hands.io.closeLane(0)
    hands.io.openLane(1, .datagramIPv4, descriptor: hands.queues[1])
    #expect(
      hands.network.violations == [
        .laneAwaitedTwice(lane: 1), .closedInUse(index: 0), .wrongDescriptor(descriptor: hands.queues[1]),
      ])
  }

  @Test("a descriptor closed while something is out on it is recorded, and not when the source has ended")
  func closedDescriptor() throws {
    var hands = try Hands()
    hands.io.arm(0, &hands.memory)
    hands.io.arm(1, &hands.memory)
    _ = hands.collect()
    hands.io.cancel(1)
    _ = hands.collect()
    hands.network.close(hands.receiver)
    #expect(hands.network.violations == [])
    hands.network.close(hands.queues[0])
    #expect(hands.network.violations == [.descriptorClosedInUse(descriptor: hands.queues[0])])
  }

  @Test("a control message of the other family is recorded")
  func wrongFamily() throws {
    var hands = try Hands()
    let descriptor = hands.network.openSocket(Hands.here, connectedTo: Hands.there, port: 4789)
    hands.io.openLane(2, .datagramIPv4, descriptor: descriptor)
    let operation = hands.prepare([UInt8](repeating: 5, count: 50), lane: .datagramIPv6, typeOfService: 4)
    hands.io.send(2, first: operation, count: 1, hands.pool)
    #expect(hands.network.violations == [.malformedSend(lane: 2, position: 0)])
  }

  // MARK: Numbers

  @Test("the generator is xoshiro256** over splitmix64: the same numbers on every machine")
  func generator() {
    // Computed with the authors' reference implementations (prng.di.unimi.it) for the seed 42.
    var random = SimulatedRandom(seed: 42)
    #expect(
      [random.next(), random.next(), random.next()] == [
        1_546_998_764_402_558_742, 6_990_951_692_964_543_102, 12_544_586_762_248_559_009,
      ])
  }
}
