import Datapath
import Glibc
import SimulatedKernel

/// The smallest forwarder that keeps the contract of `WorkerIO`: what comes from its device leaves by its socket behind
/// eight bytes of header, and the other way round. It has no tables: what these tests look at is the simulated kernel.
struct Relay: ~Copyable {
  static let deviceSource = 0, socketSource = 1, wakerSource = 2
  static let deviceLane = 0, socketLane = 1
  static let encapsulationBytes = 8

  var io: SimulatedIO
  var memory: FrameMemory
  var pool: SendPool
  private var events = EventBatch(capacity: 32)
  private var lanes = [LaneState(kind: .tap), LaneState(kind: .datagramIPv4)]
  private var isArmed = [false, false, false]
  private var isStopping = false
  /// Frames that ended here, by reason.
  private(set) var drops: [String: Int] = [:]
  private(set) var wakeups = 0
  /// How often receives ended, by error, and how often a lane was full.
  private(set) var receiveEnds: [Int32: Int] = [:]
  private(set) var blocks = 0

  private struct LaneState {
    var kind: LaneKind
    var waiting: [Int] = []
    var chain: [Int] = []
    var isBlocked = false
    var isGone = false
  }

  private static let postedMax = 16

  init(_ network: SimulatedNetwork, device: Int32, receive: Int32, send: Int32, waker: Int32, slots: Int = 48) throws {
    io = SimulatedIO(network, chainFramesMax: 8)
    memory = try FrameMemory(slotCount: slots, hugePages: false)
    pool = SendPool(count: 64)
    io.openSource(Self.deviceSource, .tap, descriptor: device)
    io.openSource(Self.socketSource, .vxlan, descriptor: receive)
    io.openSource(Self.wakerSource, .waker, descriptor: waker)
    io.openLane(Self.deviceLane, .tap, descriptor: device)
    io.openLane(Self.socketLane, .datagramIPv4, descriptor: send)
  }

  var dropCount: Int { drops.values.reduce(0, +) }
  var waitingCount: Int { lanes.reduce(0) { $0 + $1.waiting.count + $1.chain.count } }
  var isQuiet: Bool { waitingCount == 0 && io.isIdle }
  var hasEnded: Bool { isStopping && !isArmed.contains(true) && isQuiet }

  mutating func turn(_ wait: Wait = .forEvent) {
    while !isStopping, memory.postedCount < Self.postedMax, let slot = memory.post() { io.post(slot, &memory) }
    for source in 0..<3 where !isArmed[source] && !isStopping && !(source == Self.deviceSource && lanes[0].isGone) {
      // Where no slot is free the receive would only end again.
      guard source == Self.wakerSource || memory.postedCount > 0 else { continue }
      io.arm(source, &memory)
      isArmed[source] = true
    }
    io.collect(wait, &memory, into: &events)
    for index in 0..<events.count { handle(events[index]) }
    events.removeAll()
    for lane in 0..<2 { flush(lane) }
  }

  mutating func stop() {
    isStopping = true
    for source in 0..<3 where isArmed[source] { io.cancel(source) }
  }

  /// After `hasEnded`: gives everything back.
  mutating func close() {
    for source in 0..<3 { io.closeSource(source) }
    for lane in 0..<2 { io.closeLane(lane) }
    io.takeBackSlots(&memory)
  }

  private mutating func handle(_ event: IOEvent) {
    let index = Int(event.index)
    switch event.kind {
    case .woken:
      wakeups += 1
      isArmed[index] = false
    case .receiveEnded:
      isArmed[index] = false
      receiveEnds[event.error, default: 0] += 1
      if event.error == EBADFD { lanes[Self.deviceLane].isGone = true }
    case .received: received(event)
    case .sent: sent(event)
    case .writable:
      lanes[index].isBlocked = false
      if event.error != 0 { lanes[index].isGone = true }
    case .stuck: preconditionFailure("the kernel says nothing of that kind")
    }
  }

  private mutating func received(_ event: IOEvent) {
    let buffer = BufferReference(slot: Int(event.slot))
    let isFromDevice = event.index == Self.deviceSource
    let skip = isFromDevice ? SimulatedNetwork.virtioHeaderBytes : Self.encapsulationBytes
    guard !event.isTruncated, event.length > skip else { return drop("truncated", buffer) }
    guard let operation = pool.take() else { return drop("no operation", buffer) }
    var descriptor = Descriptor(
      buffer: buffer, offset: Int(event.offset) + skip, length: Int(event.length) - skip, ingress: InterfaceIndex(0))
    descriptor.typeOfService = isFromDevice ? 0xB8 | 2 : 0
    let header = SendPool.Header(
      first: 8, count: isFromDevice ? Self.encapsulationBytes : SimulatedNetwork.virtioHeaderBytes)
    let lane = isFromDevice ? Self.socketLane : Self.deviceLane
    let fits = pool.fill(
      operation, descriptor, egress: InterfaceIndex(1), lane: lanes[lane].kind, header: header, memory)
    precondition(fits)
    lanes[lane].waiting.append(operation)
  }

  private mutating func drop(_ reason: String, _ buffer: BufferReference) {
    drops[reason, default: 0] += 1
    memory.release(buffer)
  }

  private mutating func sent(_ event: IOEvent) {
    let lane = Int(event.index)
    var chain = lanes[lane].chain
    lanes[lane].chain = []
    for operation in chain.prefix(Int(event.count)) { finish(operation, reason: nil) }
    chain.removeFirst(Int(event.count))
    if event.error == EAGAIN {
      lanes[lane].isBlocked = true
      blocks += 1
      io.awaitWritable(lane)
    } else if event.error != 0 {
      finish(chain.removeFirst(), reason: "error \(event.error)")
    }
    lanes[lane].waiting = chain + lanes[lane].waiting
  }

  private mutating func finish(_ operation: Int, reason: String?) {
    if let reason { drops[reason, default: 0] += 1 }
    memory.release(pool[operation].descriptor.buffer)
    pool.giveBack(operation)
  }

  private mutating func flush(_ lane: Int) {
    guard lanes[lane].chain.isEmpty, !lanes[lane].isBlocked, !lanes[lane].waiting.isEmpty else { return }
    if lanes[lane].isGone {
      for operation in lanes[lane].waiting { finish(operation, reason: "device gone") }
      lanes[lane].waiting = []
      return
    }
    let chain = Array(lanes[lane].waiting.prefix(io.chainFramesMax))
    lanes[lane].waiting.removeFirst(chain.count)
    for (operation, next) in zip(chain, chain.dropFirst()) { pool[operation].next = UInt32(next) }
    io.send(lane, first: chain[0], count: chain.count, pool)
    lanes[lane].chain = chain
  }
}
