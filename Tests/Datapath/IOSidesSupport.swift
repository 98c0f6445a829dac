import CLinux
import Glibc
import Testing

@testable import Datapath

/// The real sides of a worker's I/O, each of which must keep the same rules.
enum IOSide: String, CaseIterable, CustomTestStringConvertible {
  case uring
  /// io_uring as an old kernel has it: one receive at a time.
  case uringWithoutMultishot
  case systemCalls
  /// System calls as an old kernel has them: waits are rounded up to milliseconds.
  case systemCallsWithoutNanoseconds

  var testDescription: String { rawValue }

  /// Those that this machine lets be made.
  static let usable = allCases.filter { side in
    side == .systemCalls || side == .systemCallsWithoutNanoseconds || (try? UringFeatures.probe()) != nil
  }

  /// Carries out a scenario on this side.
  /// - Parameter eventRoom: events that one `collect` may bring.
  func run(_ scenario: some IOScenario, slots: Int = 128, eventRoom: Int = 256) throws {
    let limits = IOLimits(entries: 128, slots: slots, posted: slots, sources: 4, lanes: 4, operations: 256)
    switch self {
    case .uring:
      var bench = try IOBench(io: UringIO(limits), slots: slots, eventRoom: eventRoom)
      try scenario.run(&bench)
    case .uringWithoutMultishot:
      let without: UringFeatures = [.bufferRing, .multishotReceive, .multishotRead, .fixedFiles]
      var bench = try IOBench(io: UringIO(limits, without: without), slots: slots, eventRoom: eventRoom)
      try scenario.run(&bench)
    case .systemCalls:
      var bench = try IOBench(io: SyscallIO(limits), slots: slots, eventRoom: eventRoom)
      try scenario.run(&bench)
    case .systemCallsWithoutNanoseconds:
      var bench = try IOBench(io: SyscallIO(limits, waitsByNanoseconds: false), slots: slots, eventRoom: eventRoom)
      try scenario.run(&bench)
    }
  }
}

/// What is done with a side, whichever it is.
protocol IOScenario {
  func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws
}

/// A side with its memory, driven as a worker would.
struct IOBench<IO: WorkerIO & ~Copyable>: ~Copyable {
  var io: IO
  var memory: FrameMemory
  var pool = SendPool(count: 256)
  var events: EventBatch

  init(io: consuming IO, slots: Int, eventRoom: Int) throws {
    self.io = io
    memory = try FrameMemory(slotCount: slots, hugePages: false)
    events = EventBatch(capacity: eventRoom)
  }

  mutating func post(_ count: Int) {
    for _ in 0..<count {
      let slot = memory.post()!
      io.post(slot, &memory)
    }
  }

  mutating func open(_ source: Int, _ kind: SourceKind, _ descriptor: Int32) {
    io.openSource(source, kind, descriptor: descriptor)
    io.arm(source, &memory)
  }

  /// What one `collect` brings.
  mutating func collect(_ wait: Wait) -> [IOEvent] {
    events.removeAll()
    io.collect(wait, &memory, into: &events)
    return (0..<events.count).map { events[$0] }
  }

  /// Collects until `isEnough` of all that came, or for two seconds in vain.
  mutating func collect(until isEnough: ([IOEvent]) -> Bool) -> [IOEvent] {
    var all: [IOEvent] = []
    for _ in 0..<200 where !isEnough(all) {
      all += collect(.atMost(nanoseconds: 10_000_000))
    }
    return all
  }

  mutating func collect(_ count: Int, _ kind: IOEvent.Kind) -> [IOEvent] {
    collect { events in events.count { $0.kind == kind } >= count }.filter { $0.kind == kind }
  }

  /// All that comes while nothing is waited for long.
  mutating func collectRest() -> [IOEvent] {
    var all: [IOEvent] = []
    for _ in 0..<5 { all += collect(.atMost(nanoseconds: 2_000_000)) }
    return all
  }

  /// The bytes of a `received` event; its slot goes back.
  mutating func take(_ event: IOEvent) -> [UInt8] {
    let bytes = unsafe Array(
      UnsafeRawBufferPointer(
        start: memory.address(ofSlot: Int(event.slot)) + Int(event.offset), count: Int(event.length)))
    memory.release(BufferReference(slot: Int(event.slot)))
    return bytes
  }

  /// Sends `payloads` as one chain, each in a slot of its own, behind `header`.
  mutating func send(
    _ lane: Int, _ kind: LaneKind, _ payloads: [[UInt8]], typeOfService: UInt8 = 0,
    header: SendPool.Header = SendPool.Header(count: 0)
  ) {
    var first = -1
    var last = -1
    for payload in payloads {
      let slot = memory.post()!
      memory.received(slot)
      let start = FrameMemory.headroomBytes
      unsafe (memory.address(ofSlot: slot) + start).copyMemory(from: payload, byteCount: payload.count)
      var descriptor = Descriptor(
        buffer: BufferReference(slot: slot), offset: start, length: payload.count, ingress: .none)
      descriptor.typeOfService = typeOfService
      let operation = pool.take()!
      precondition(pool.fill(operation, descriptor, egress: .none, lane: kind, header: header, memory))
      if first < 0 { first = operation } else { pool[last].next = UInt32(operation) }
      last = operation
    }
    io.send(lane, first: first, count: payloads.count, pool)
    chains.append((first, payloads.count))
  }
  private var chains: [(first: Int, count: Int)] = []

  /// Gives back the operations and slots of all chains, which are over.
  mutating func forgetChains() {
    for chain in chains {
      var operation = chain.first
      for _ in 0..<chain.count {
        let next = pool.next(operation)
        memory.release(pool[operation].descriptor.buffer)
        pool.giveBack(operation)
        operation = next
      }
    }
    chains = []
  }

  /// Ends the receive of sources that are armed, and takes back all slots.
  mutating func close(_ sources: Int...) {
    for source in sources { io.cancel(source) }
    let ended = collect(sources.count, .receiveEnded)
    #expect(ended.count == sources.count)
    for source in sources { io.closeSource(source) }
    io.takeBackSlots(&memory)
  }
}

/// A UDP socket that receives, and one that sends to it.
struct DatagramPath {
  let receiver: Int32
  let sender: Int32
  let address: UnderlayAddress

  init(_ text: String = "127.0.0.1") throws {
    address = UnderlayAddress(text)!
    receiver = try UnderlaySocket.receive(
      on: address, port: 0, encapsulation: .vxlan, isShared: false, bufferBytes: 1 << 20)
    var name = sockaddr_in6()
    var length = socklen_t(MemoryLayout<sockaddr_in6>.size)
    let descriptor = receiver
    _ = unsafe withUnsafeMutablePointer(to: &name) { pointer in
      unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        unsafe getsockname(descriptor, $0, &length)
      }
    }
    // The port stands at the same place in both families' addresses.
    sender = try UnderlaySocket.transmit(
      from: address, to: address, port: UInt16(bigEndian: name.sin6_port), spread: Int(getpid()), fragments: false,
      bufferBytes: 1 << 20)
  }

  var lane: LaneKind { address.isIPv4 ? .datagramIPv4 : .datagramIPv6 }

  func sendPlainly(_ payload: [UInt8]) {
    let count = unsafe Glibc.send(sender, payload, payload.count, 0)
    precondition(count == payload.count, "a datagram on loopback was not taken")
  }

  func close() {
    Glibc.close(receiver)
    Glibc.close(sender)
  }
}

/// Two joined sockets that keep the borders of messages: one end takes the place of a TAP queue or of a connected
/// socket with a small buffer.
struct MessagePair {
  let ours: Int32
  let theirs: Int32

  init(bufferBytes: Int32 = 16_384) {
    var ends: [Int32] = [-1, -1]
    let kind = Int32(SOCK_DGRAM.rawValue) | Int32(SOCK_NONBLOCK.rawValue)
    let made = unsafe socketpair(AF_UNIX, kind, 0, &ends)
    precondition(made == 0, "no socket pair")
    (ours, theirs) = (ends[0], ends[1])
    var bytes = bufferBytes
    _ = unsafe setsockopt(ours, SOL_SOCKET, SO_SNDBUF, &bytes, 4)
  }

  /// Reads all that is there.
  func drain() -> [[UInt8]] {
    var all: [[UInt8]] = []
    var buffer = [UInt8](repeating: 0, count: 70_000)
    while true {
      let count = unsafe read(theirs, &buffer, buffer.count)
      guard count > 0 else { return all }
      all.append(Array(buffer[0..<count]))
    }
  }

  func give(_ message: [UInt8]) {
    let count = unsafe write(theirs, message, message.count)
    precondition(count == message.count, "a message was not taken")
  }

  func close() {
    Glibc.close(ours)
    Glibc.close(theirs)
  }
}

/// Payloads that tell their place.
func numbered(_ count: Int, bytes: Int = 40) -> [[UInt8]] {
  (0..<count).map { [UInt8($0)] + [UInt8](repeating: 0xA5, count: bytes - 1) }
}
