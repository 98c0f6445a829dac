import CLinux
import Datapath
import Glibc

/// The simulated side of a worker's I/O: a kernel with a seed. It does, at the rates of `Faults`, what a real kernel
/// may do, and writes down what the worker does against the contract of `WorkerIO` (`SimulatedNetwork.violations`).
///
/// One instance a worker, all joined to one `SimulatedNetwork`, all on one thread: the test turns the workers in turn.
/// A `collect` that may wait therefore never blocks. It moves time on to the next moment at which anything is due in
/// the network, once, and returns with or without events: to a worker that is a spurious wake-up, which it must bear
/// anyway, and the other workers get their turn.
///
/// What one `collect` does
/// 1. Time moves on by what a call costs, and what is due on the wire arrives.
/// 2. Armed sources and chains are carried out, in an order drawn anew, each as far as is drawn.
/// 3. What was completed is reported, in an order drawn anew between sources and lanes, in order within one.
///
/// As on the io_uring side a waker is armed for one wake-up: `woken` ends it, and `receiveEnded` comes in its place
/// when it was cancelled.
@safe
public struct SimulatedIO: ~Copyable, WorkerIO {
  public let chainFramesMax: Int
  private let network: SimulatedNetwork
  private var sources: [Source] = []
  private var lanes: [Lane] = []
  /// Slots that the kernel may fill, the one posted first in front.
  private var posted = Queue<Int>()
  /// The slots that the kernel has, filled and not yet reported ones included.
  private var slotsLent: [Bool] = []
  private var lentCount = 0
  private var hasReportedSlots = false
  /// Calls of `collect` so far: what delayed operations count.
  private var collects = 0
  private var completionSequence = 0
  private var statistics = IOStatistics()

  /// What a datagram's kernel headers take before it in a slot: 16 (io_uring_recvmsg_out), 28 (sender), 64 (control).
  private static let datagramOffsetMin = 108

  private struct Completion {
    var event: IOEvent
    var sequence: Int
  }

  private struct Source {
    var kind = SourceKind.waker
    var descriptor: Int32 = -1
    var isOpen = false
    /// From `arm` until `receiveEnded` was reported.
    var isArmed = false
    /// Whether that end waits to be reported.
    var isOver = false
    /// The `collect` from which on it receives.
    var startsAt = 0
    var cancelsAt: Int?
    var completions = Queue<Completion>()
    var isHeldBack = false
  }

  /// One send of a chain that is out. The operation stays where it is until its `sent` event: that is the contract.
  @safe
  private struct OutSend {
    var header: UnsafeMutablePointer<msghdr>
    /// What the operation said when it was submitted.
    var message: Message

    /// Whether the kernel would still read the same bytes.
    var isUnchanged: Bool {
      let header = unsafe header.pointee
      return unsafe message.bytes.withUnsafeBytes { bytes in
        var start = 0
        for index in unsafe 0..<header.msg_iovlen {
          let vector = unsafe header.msg_iov[index]
          guard unsafe vector.iov_len <= bytes.count - start else { return false }
          guard unsafe memcmp(vector.iov_base, bytes.baseAddress! + start, vector.iov_len) == 0 else { return false }
          unsafe start += vector.iov_len
        }
        return start == bytes.count
      }
    }
  }

  private struct Message {
    var bytes: [UInt8]
    var typeOfService: UInt8
    /// Of each datagram of a train but the last; 0 for a single one.
    var segmentBytes = 0
    var isMalformed: Bool
  }

  private struct Lane {
    var kind = LaneKind.tap
    var descriptor: Int32 = -1
    var isOpen = false
    var chain: [OutSend] = []
    /// From `send` until `sent` was reported.
    var isOut = false
    /// Whether that end waits to be reported.
    var isOver = false
    /// Sends of the chain that are done.
    var sent = 0
    var startsAt = 0
    /// Whether the chain paused before its next send: it pauses there once.
    var wasPaused = false
    /// From `awaitWritable` until `writable` was reported.
    var isAwaiting = false
    var isAwaitOver = false
    var awaitStartsAt = 0
    var awaitIsFalse = false
    /// The next send finds the lane full, whatever it is.
    var isFullOnce = false
    var completions = Queue<Completion>()
    var isHeldBack = false
  }

  public init(_ network: SimulatedNetwork, chainFramesMax: Int = 64) {
    precondition(chainFramesMax > 0)
    self.network = network
    self.chainFramesMax = chainFramesMax
  }

  deinit {
    // The ring goes and with it everything that is out.
    network.countUnreported(posted.count - lentCount)
    for source in sources where source.isArmed { network.countOut(source.descriptor, -1) }
    for index in lanes.indices {
      network.countOut(lanes[index].descriptor, -(lanes[index].isOut ? 1 : 0) - (lanes[index].isAwaiting ? 1 : 0))
    }
  }

  public func now() -> UInt64 { network.clock.nanoseconds }
  public func yieldProcessor() {}
  public mutating func wake(_ waker: Int32) { network.wake(waker) }

  public mutating func takeStatistics() -> IOStatistics {
    defer { statistics = IOStatistics() }
    return statistics
  }

  // MARK: Sources

  public mutating func openSource(_ source: Int, _ kind: SourceKind, descriptor: Int32) {
    while sources.count <= source { sources.append(Source()) }
    if sources[source].isOpen { network.record(.openedTwice(index: source)) }
    if !network.fits(descriptor, kind) { network.record(.wrongDescriptor(descriptor: descriptor)) }
    sources[source] = Source(kind: kind, descriptor: descriptor, isOpen: true)
  }

  public mutating func arm(_ source: Int, _ memory: inout FrameMemory) {
    guard isOpenSource(source) else { return network.record(.notOpen(index: source)) }
    guard !sources[source].isArmed else { return network.record(.sourceArmedTwice(source: source)) }
    sources[source].isArmed = true
    sources[source].isOver = false
    sources[source].cancelsAt = nil
    sources[source].startsAt = start()
    network.countOut(sources[source].descriptor, 1)
  }

  public mutating func cancel(_ source: Int) {
    guard isOpenSource(source) else { return network.record(.notOpen(index: source)) }
    // A receive that has just ended by itself is not there to be cancelled, and its own end is reported.
    guard sources[source].isArmed, !sources[source].isOver, sources[source].cancelsAt == nil else { return }
    sources[source].cancelsAt = start()
  }

  public mutating func closeSource(_ source: Int) {
    guard isOpenSource(source) else { return network.record(.notOpen(index: source)) }
    if sources[source].isArmed { network.record(.closedInUse(index: source)) }
    sources[source] = Source()
  }

  private func isOpenSource(_ source: Int) -> Bool { sources.indices.contains(source) && sources[source].isOpen }

  // MARK: Slots

  public mutating func post(_ slot: Int, _ memory: inout FrameMemory) {
    while slotsLent.count < memory.slotCount { slotsLent.append(false) }
    guard !slotsLent[slot] else { return network.record(.slotPostedTwice(slot: slot)) }
    guard memory.isPosted(slot) else { return network.record(.slotNotPosted(slot: slot)) }
    if network.strikes(.lostSlot, rate: 0.05) { return }
    slotsLent[slot] = true
    lentCount += 1
    posted.append(slot)
  }

  public mutating func takeBackSlots(_ memory: inout FrameMemory) {
    for source in sources.indices where sources[source].isArmed && sources[source].kind != .waker {
      network.record(.slotsTakenBackWhileArmed(source: source))
    }
    while !posted.isEmpty {
      let slot = posted.popFirst()
      slotsLent[slot] = false
      lentCount -= 1
      memory.unpost(slot)
    }
  }

  // MARK: Lanes

  public mutating func openLane(_ lane: Int, _ kind: LaneKind, descriptor: Int32) {
    lanes.append(contentsOf: repeatElement(Lane(), count: max(0, lane + 1 - lanes.count)))
    if lanes[lane].isOpen { network.record(.openedTwice(index: lane)) }
    if !network.fits(descriptor, kind) { network.record(.wrongDescriptor(descriptor: descriptor)) }
    lanes[lane] = Lane(kind: kind, descriptor: descriptor, isOpen: true)
  }

  public mutating func closeLane(_ lane: Int) {
    guard isOpenLane(lane) else { return network.record(.notOpen(index: lane)) }
    if lanes[lane].isOut { network.record(.closedInUse(index: lane)) }
    if lanes[lane].isAwaiting { network.countOut(lanes[lane].descriptor, -1) }
    lanes[lane] = Lane()
  }

  public mutating func send(_ lane: Int, first: Int, count: Int, _ pool: borrowing SendPool) {
    guard isOpenLane(lane) else { return network.record(.notOpen(index: lane)) }
    guard !lanes[lane].isOut else { return network.record(.laneHasChain(lane: lane)) }
    if count < 1 || count > chainFramesMax { network.record(.chainLength(lane: lane, count: count)) }
    guard count > 0 else { return }
    lanes[lane].chain.removeAll(keepingCapacity: true)
    var operation = first
    for position in 0..<count {
      let header = unsafe pool.message(operation)
      let message = unsafe Self.read(header, lanes[lane].kind)
      if message.isMalformed { network.record(.malformedSend(lane: lane, position: position)) }
      lanes[lane].chain.append(unsafe OutSend(header: header, message: message))
      operation = pool.nextMessage(operation)
    }
    if count > 1, network.strikes(.reorderedChain, rate: 0.25) { lanes[lane].chain.reverse() }
    lanes[lane].isOut = true
    lanes[lane].isOver = false
    lanes[lane].sent = 0
    lanes[lane].wasPaused = false
    lanes[lane].startsAt = start()
    network.countOut(lanes[lane].descriptor, 1)
  }

  public mutating func awaitWritable(_ lane: Int) {
    guard isOpenLane(lane) else { return network.record(.notOpen(index: lane)) }
    guard !lanes[lane].isAwaiting else { return network.record(.laneAwaitedTwice(lane: lane)) }
    lanes[lane].isAwaiting = true
    lanes[lane].isAwaitOver = false
    lanes[lane].awaitStartsAt = start()
    lanes[lane].awaitIsFalse = network.chance(network.faults.falseWritable)
    network.countOut(lanes[lane].descriptor, 1)
  }

  private func isOpenLane(_ lane: Int) -> Bool { lanes.indices.contains(lane) && lanes[lane].isOpen }

  /// What the kernel would read of an operation now.
  @unsafe
  private static func read(_ header: UnsafeMutablePointer<msghdr>, _ kind: LaneKind) -> Message {
    let header = unsafe header.pointee
    var message = Message(bytes: [], typeOfService: 0, isMalformed: false)
    let vectors = unsafe UnsafeBufferPointer(start: header.msg_iov, count: header.msg_iovlen)
    for index in vectors.indices {
      let vector = unsafe vectors[index]
      unsafe message.bytes.append(contentsOf: UnsafeRawBufferPointer(start: vector.iov_base, count: vector.iov_len))
    }
    let vectorsMax = Int(CLINUX_GATHER_VECTORS_MAX)
    message.isMalformed = vectors.isEmpty || vectors.count > vectorsMax || message.bytes.isEmpty
    if kind.isDevice {
      // No control message is made for them; what they need is the virtio header.
      message.isMalformed = message.isMalformed || message.bytes.count < SimulatedNetwork.virtioHeaderBytes
      return message
    }
    guard let control = unsafe header.msg_control, unsafe header.msg_controllen > 0 else { return message }
    // struct cmsghdr: length (8 bytes), level, type, then an int (ToS) or a short (UDP_SEGMENT), padded to 8 bytes.
    let expected = kind == .datagramIPv4 ? (Int32(IPPROTO_IP), IP_TOS) : (Int32(IPPROTO_IPV6), IPV6_TCLASS)
    let count = unsafe header.msg_controllen
    var offset = 0
    while offset + 18 <= count {
      let length = unsafe control.loadUnaligned(fromByteOffset: offset, as: Int.self)
      let level = unsafe control.loadUnaligned(fromByteOffset: offset + 8, as: Int32.self)
      let type = unsafe control.loadUnaligned(fromByteOffset: offset + 12, as: Int32.self)
      if (level, type) == (Int32(IPPROTO_UDP), CLINUX_UDP_SEGMENT), length == 18 {
        message.segmentBytes = unsafe Int(control.loadUnaligned(fromByteOffset: offset + 16, as: UInt16.self))
        message.isMalformed = message.isMalformed || message.segmentBytes == 0
      } else if (level, type) == expected, length == 20, offset + 20 <= count {
        let value = unsafe control.loadUnaligned(fromByteOffset: offset + 16, as: Int32.self)
        message.isMalformed = message.isMalformed || value < 0 || value > 255
        message.typeOfService = UInt8(truncatingIfNeeded: value)
      } else {
        message.isMalformed = true
      }
      offset += (length + 7) & ~7
    }
    message.isMalformed = message.isMalformed || offset != count
    return message
  }

  // MARK: Carrying out

  /// The `collect` in which an operation asked for now starts.
  private func start() -> Int {
    guard network.chance(network.faults.delayedOperation) else { return collects + 1 }
    return collects + 1 + network.number(in: 1...max(1, network.faults.delayCollectsMax))
  }

  public mutating func collect(_ wait: Wait, _ memory: inout FrameMemory, into events: inout EventBatch) {
    let network = network
    collects += 1
    statistics.enters += 1
    network.clock.advance(by: network.number(in: network.limits.collectNanoseconds))
    network.drawDeviceLoss()
    for index in sources.indices {
      sources[index].isHeldBack = network.chance(network.faults.delayedCompletion)
    }
    for index in lanes.indices {
      lanes[index].isHeldBack = network.chance(network.faults.delayedCompletion)
    }
    carryOut(&memory)

    let (wanted, nanoseconds): (Int, Int?) =
      switch wait {
      case .sweep: (0, 0)
      case .forEvent: (1, nil)
      case .atMost(let nanoseconds): (1, nanoseconds)
      case .forBatch(let completions, let nanoseconds): (completions, nanoseconds)
      }
    // While something of ours counts calls, time must not run away over it.
    if wanted > 0 { statistics.sleeps += 1 }
    if wanted > readyCount, !countsCalls, !network.chance(network.faults.spuriousReturn) {
      let next = network.nextDue
      if let nanoseconds {
        let end = network.clock.nanoseconds + UInt64(nanoseconds)
        network.clock.advance(to: min(end, next ?? end))
      } else if let next {
        network.clock.advance(to: next)
      }
      carryOut(&memory)
    }
    report(&memory, &events)
    auditSlots(memory)
  }

  /// The worker's books say how many slots are posted; the kernel's, how many it has.
  private mutating func auditSlots(_ memory: borrowing FrameMemory) {
    let lent = lentCount
    guard memory.postedCount != lent, !hasReportedSlots else { return }
    hasReportedSlots = true
    network.record(.slotsUnaccounted(posted: memory.postedCount, lent: lent))
  }

  /// Completions that this call may report.
  private var readyCount: Int {
    var count = 0
    for index in sources.indices where !sources[index].isHeldBack { count += sources[index].completions.count }
    for index in lanes.indices where !lanes[index].isHeldBack {
      count += lanes[index].completions.count
    }
    return count
  }

  /// Whether anything waits for later calls of `collect`, not for time.
  private var countsCalls: Bool {
    for index in sources.indices {
      if sources[index].isHeldBack && !sources[index].completions.isEmpty { return true }
      if sources[index].isArmed && !sources[index].isOver
        && (sources[index].startsAt > collects || sources[index].cancelsAt != nil)
      {
        return true
      }
    }
    for index in lanes.indices {
      if lanes[index].isHeldBack && !lanes[index].completions.isEmpty { return true }
      if lanes[index].isOut && !lanes[index].isOver { return true }
      if lanes[index].isAwaiting && !lanes[index].isAwaitOver && lanes[index].awaitStartsAt > collects {
        return true
      }
    }
    return false
  }

  /// Lets everything go on that has started: each source and lane once.
  private mutating func carryOut(_ memory: inout FrameMemory) {
    network.run()
    let laneCount = lanes.count
    var order = Array(0..<sources.count + laneCount)
    if network.chance(network.faults.reorderedExecution) { network.shuffle(&order) }
    for number in order {
      if number < sources.count {
        receive(number, &memory)
      } else {
        carryOutChain(number - sources.count)
        carryOutWait(number - sources.count)
      }
    }
  }

  private mutating func complete(_ source: Int, _ event: IOEvent) {
    completionSequence += 1
    sources[source].completions.append(Completion(event: event, sequence: completionSequence))
  }

  private mutating func completeLane(_ lane: Int, _ event: IOEvent) {
    completionSequence += 1
    lanes[lane].completions.append(Completion(event: event, sequence: completionSequence))
  }

  private mutating func end(_ source: Int, _ error: Int32) {
    sources[source].isOver = true
    complete(source, IOEvent(.receiveEnded, source, error: error))
  }

  private mutating func receive(_ source: Int, _ memory: inout FrameMemory) {
    guard sources[source].isArmed, !sources[source].isOver else { return }
    if let cancelsAt = sources[source].cancelsAt, cancelsAt <= collects { return end(source, ECANCELED) }
    guard sources[source].startsAt <= collects else { return }
    let descriptor = sources[source].descriptor
    let kind = sources[source].kind
    if kind == .waker {
      let isSpurious = network.chance(network.faults.spuriousWake)
      guard network.readiness(descriptor) == .something || isSpurious else { return }
      network.readWaker(descriptor)
      sources[source].isOver = true
      return complete(source, IOEvent(.woken, source))
    }
    while true {
      switch network.readiness(descriptor) {
      case .nothing: return
      case .gone: return end(source, kind == .packet ? ENETDOWN : EBADFD)
      case .something: break
      }
      if network.chance(network.faults.endedReceive) { return end(source, 0) }
      if network.chance(network.faults.failedReceive) {
        return end(source, failure(of: kind))
      }
      if posted.isEmpty { return end(source, ENOBUFS) }
      fill(posted.popFirst(), source, memory)
    }
  }

  /// What a receive that fails ends with.
  private func failure(of kind: SourceKind) -> Int32 {
    switch kind {
    case .tap: EIO
    // The device went down; or the next frame is a super-frame that no virtio header can tell.
    case .packet: network.chance(0.5) ? ENETDOWN : EINVAL
    case .vxlan, .vnetp, .waker, .guest: ECONNREFUSED
    }
  }

  /// Receives one item into a slot. What lies before it in the slot is overwritten as the kernel's headers do.
  private mutating func fill(_ slot: Int, _ source: Int, _ memory: borrowing FrameMemory) {
    let kind = sources[source].kind
    let isCut = network.chance(network.faults.truncatedReceive)
    let descriptor = sources[source].descriptor
    // Datagrams that are alike come as one train as often as not.
    let (item, segmentBytes) =
      kind.isDatagram && !isCut && network.chance(network.limits.trains)
      ? network.receiveTrain(descriptor) : (network.receive(descriptor), 0)
    // A TAP's bytes need no room in front, those of a message do. Where exactly they lie is not promised.
    let least = kind == .tap ? 0 : Self.datagramOffsetMin
    let offset = network.number(in: least...FrameMemory.headroomBytes)
    var length = min(item.bytes.count, FrameMemory.slotBytes - offset)
    if length > 0, isCut { length = network.below(length) }
    if length < item.bytes.count { network.countTruncated(item, kind) }

    let start = unsafe memory.address(ofSlot: slot)
    unsafe start.initializeMemory(as: UInt8.self, repeating: 0xA5, count: offset)
    unsafe item.bytes.withUnsafeBytes { bytes in
      if length > 0 { unsafe (start + offset).copyMemory(from: bytes.baseAddress!, byteCount: length) }
    }
    var event = IOEvent(.received, source)
    event.slot = UInt32(slot)
    event.offset = UInt32(offset)
    event.length = UInt32(length)
    event.isTruncated = length < item.bytes.count
    event.sender = item.sender
    event.typeOfService = item.typeOfService
    event.trainSegmentBytes = UInt16(segmentBytes)
    network.countUnreported(1)
    complete(source, event)
  }

  private mutating func carryOutChain(_ lane: Int) {
    guard lanes[lane].isOut, !lanes[lane].isOver, lanes[lane].startsAt <= collects else { return }
    var error: Int32 = 0
    while lanes[lane].sent < lanes[lane].chain.count {
      let position = lanes[lane].sent
      if position > 0, !lanes[lane].wasPaused, network.chance(network.faults.pausedChain) {
        lanes[lane].wasPaused = true
        lanes[lane].startsAt = collects + 1
        return
      }
      lanes[lane].wasPaused = false
      checkUnchanged(lane, position)
      error = sendOne(lane, position)
      if error != 0 {
        network.countSend(error: error, isShort: error == IOEvent.shortWrite)
        break
      }
      lanes[lane].sent += 1
    }
    lanes[lane].isOver = true
    var event = IOEvent(.sent, lane, error: error)
    event.count = UInt32(lanes[lane].sent)
    completeLane(lane, event)
  }

  /// Carries out one send; returns 0 or why it was not done.
  private mutating func sendOne(_ lane: Int, _ position: Int) -> Int32 {
    let faults = network.faults
    let descriptor = lanes[lane].descriptor
    let kind = lanes[lane].kind
    let message = lanes[lane].chain[position].message
    if network.isGone(descriptor) { return kind == .packet ? ENXIO : EIO }
    if lanes[lane].isFullOnce {
      lanes[lane].isFullOnce = false
      return EAGAIN
    }
    if network.chance(faults.fullLane) { return EAGAIN }
    // A packet socket's device drops what its queue has no room for.
    if network.chance(faults.failedSend) { return kind == .packet ? ENOBUFS : EIO }
    if kind == .packet {
      if network.chance(faults.badDescriptorSend) { return ENETDOWN }
      if network.chance(faults.tooBigSend) { return EMSGSIZE }
    } else if kind == .tap {
      if network.chance(faults.badDescriptorSend) { return EBADFD }
      if network.chance(faults.shortWrite) { return IOEvent.shortWrite }
    } else {
      if network.chance(faults.tooBigSend) { return EMSGSIZE }
      if network.chance(faults.refusedSend) { return ECONNREFUSED }
      if message.segmentBytes > 0, network.chance(faults.refusedTrain) {
        network.countRefusedTrain()
        return faults.trainErrors[network.below(faults.trainErrors.count)]
      }
    }
    if network.strikes(.uncountedDrop, rate: 0.05) { return 0 }
    return kind.isDevice
      ? network.write(descriptor, message.bytes)
      : network.send(
        descriptor, message.bytes, typeOfService: message.typeOfService, segmentBytes: message.segmentBytes)
  }

  private func checkUnchanged(_ lane: Int, _ position: Int) {
    if !lanes[lane].chain[position].isUnchanged { network.record(.sendChanged(lane: lane, position: position)) }
  }

  private mutating func carryOutWait(_ lane: Int) {
    guard lanes[lane].isAwaiting, !lanes[lane].isAwaitOver, lanes[lane].awaitStartsAt <= collects
    else { return }
    let descriptor = lanes[lane].descriptor
    var event = IOEvent(.writable, lane)
    if network.isGone(descriptor) {
      event.error = EBADFD
    } else if lanes[lane].awaitIsFalse {
      lanes[lane].isFullOnce = true
    } else if !network.isWritable(descriptor) {
      return
    }
    lanes[lane].isAwaitOver = true
    completeLane(lane, event)
  }

  // MARK: Reporting

  private mutating func report(_ memory: inout FrameMemory, _ events: inout EventBatch) {
    while !events.isFull, let number = nextToReport() {
      statistics.completions += 1
      if number < sources.count {
        let event = sources[number].completions.popFirst().event
        if event.kind == .received {
          slotsLent[Int(event.slot)] = false
          lentCount -= 1
          network.countUnreported(-1)
          memory.received(Int(event.slot))
        } else {
          sources[number].isArmed = false
          network.countOut(sources[number].descriptor, -1)
        }
        events.append(event)
      } else {
        let lane = number - sources.count
        let event = lanes[lane].completions.popFirst().event
        if event.kind == .sent {
          // Until this moment the worker may not have touched any send of the chain, sent or not.
          for position in lanes[lane].chain.indices { checkUnchanged(lane, position) }
          lanes[lane].chain.removeAll(keepingCapacity: true)
          lanes[lane].isOut = false
        } else {
          lanes[lane].isAwaiting = false
        }
        network.countOut(lanes[lane].descriptor, -1)
        events.append(event)
      }
    }
  }

  /// The source, or behind the sources the lane, whose completion is reported next; nil when none may be.
  private mutating func nextToReport() -> Int? {
    var oldest: (number: Int, sequence: Int)?
    var ready = 0
    let isRandom = network.chance(network.faults.reorderedCompletion)
    func consider(_ number: Int, _ sequence: Int) {
      ready += 1
      if isRandom ? network.below(ready) == 0 : sequence < oldest?.sequence ?? .max {
        oldest = (number, sequence)
      }
    }
    for index in sources.indices where !sources[index].isHeldBack {
      if let first = sources[index].completions.first { consider(index, first.sequence) }
    }
    for index in lanes.indices where !lanes[index].isHeldBack {
      if let first = lanes[index].completions.first { consider(sources.count + index, first.sequence) }
    }
    return oldest?.number
  }

  /// Whether nothing that the worker asked for, other than to receive, is out or to be reported.
  public var isIdle: Bool {
    for index in sources.indices where !sources[index].completions.isEmpty { return false }
    for index in lanes.indices where lanes[index].isOut || lanes[index].isAwaiting { return false }
    return true
  }
}
