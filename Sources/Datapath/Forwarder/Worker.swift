import CLinux
import Glibc

/// One worker: it runs the stages of its roles in turn over the same batch. In the fused layout these are all three, to
/// completion; in the pipeline layout a ring to or from a neighbour stands where the next or the last stage is another
/// worker's.
///
/// The way of a frame, once a turn:
/// 1. `collect`: the kernel takes the sends of the last turn and says what happened: one call a batch.
/// 2. receive: filled slots become descriptors; chains of sends that are over give their slots back.
/// 3. route: each frame gets its target.
/// 4. transmit: frames join their lanes; each lane's queue becomes one chain of sends, submitted by the next `collect`.
/// 5. Commands of control are carried out, slots go back to the neighbours whose they are, free slots are posted again,
///    and the clock decides how the next turn waits.
/// Between 2 and 3, and between 3 and 4, frames are handed on to a neighbour, or taken over from one.
///
/// One thread owns it, from the moment it is made there. Control talks to it through its mailbox alone. Nothing is
/// allocated, locked or logged in a turn.
public struct Worker<IO: WorkerIO & ~Copyable>: ~Copyable {
  /// How long frames may wait for full sockets after control asked to stop.
  static var drainNanosecondsMax: UInt64 { 1_000_000_000 }
  /// The source that is always control's waker.
  public static var wakerSource: Int { 0 }
  private static var eventsMax: Int { 512 }

  private var io: GuestIO<IO>
  private var memory: FrameMemory
  private var counters: CounterTable
  private var events = EventBatch(capacity: eventsMax)
  private var received = DescriptorBatch(capacity: eventsMax)
  private var routed = RoutedBatch(capacity: eventsMax)
  /// Frames that went from guest to guest at once in this turn.
  private(set) var passed = 0
  /// Routed frames that went on in this turn.
  private var routedFrames = 0
  private var receive: ReceiveStage
  private var route: RouteStage
  private var transmit: TransmitStage
  private let roles: Roles
  private var joints: Joints

  private var dispatch: Dispatch
  private var wait = Wait.sweep
  private var wasPolling = false
  private var clock = TurnClock(nanoseconds: 0)
  private let startNanoseconds: UInt64

  private var commands: SPSCRing<Command>.Consumer
  private var reports: SPSCRing<Report>.Producer
  private let controlWaker: Int32
  private var state = State.running
  private var drainStart: UInt64 = 0
  /// Slots that were still posted after the last receive ended, at the end of a drain, and what neighbours still have.
  private var slotsNotTakenBack = 0

  private enum State {
    case running, draining, drained, stopping
    /// Lanes are closed; the chains that are out come back.
    case leaving
    case stopped
  }

  /// The sends that wait or are out, as `audit` counted them last.
  private struct InFlight: ~Copyable {
    var frames = 0
    var slots = 0
    var byInterface: FixedArray<UInt32>
    var byDomain: FixedArray<UInt32>
  }
  private var inFlight: InFlight

  /// - Parameters:
  ///   - io: made on this thread.
  ///   - memory: this worker's alone from now on.
  ///   - joints: what joins it with its neighbours; nil in the fused layout.
  ///   - view: the first snapshot.
  public init(
    io: consuming IO, memory: consuming FrameMemory, joints: consuming Joints? = nil, mailbox: Mailbox,
    settings: WorkerSettings, view: SnapshotView, workerCounters: CounterBlock.Writer,
    underlayCounters: CounterBlock.Writer
  ) {
    let now = io.now()
    startNanoseconds = settings.epochNanoseconds ?? now
    dispatch = Dispatch(settings.dispatch, now: now)
    wasPolling = dispatch.isPolling
    counters = CounterTable(
      interfaceCount: settings.interfaces, domainCount: settings.domains, worker: workerCounters,
      underlay: underlayCounters)
    inFlight = InFlight(
      byInterface: FixedArray(repeating: 0, count: settings.interfaces),
      byDomain: FixedArray(repeating: 0, count: settings.domains))
    let joints = joints ?? Joints.alone(waker: mailbox.workerWaker)
    roles = joints.roles
    self.joints = joints
    receive = ReceiveStage(sourceCount: settings.sources, postedMax: settings.postedSlots)
    route = RouteStage(view, domainCount: settings.domains)
    transmit = TransmitStage(
      laneCount: settings.lanes, operationCount: settings.operations, formsTrains: settings.formsTrains)
    commands = mailbox.commands.makeConsumer()
    reports = mailbox.reports.makeProducer()
    controlWaker = mailbox.controlWaker
    self.io = GuestIO(
      io, sources: settings.sources, lanes: settings.lanes, framesOfTurnMax: settings.postedSlots,
      patienceNanoseconds: settings.guestPatienceNanoseconds)
    self.memory = memory
    receive.open(
      Self.wakerSource, .waker, interface: .none, domain: .none, descriptor: mailbox.workerWaker, &self.io, &self.memory
    )
    receive.replenish(&self.io, &self.memory)
  }

  /// Turns until control stops it.
  public mutating func run() {
    carryOutCommands()
    while turn() {}
  }

  /// One turn; false when the worker has stopped.
  public mutating func turn() -> Bool {
    // 1.
    events.removeAll()
    passed = roles == .all && io.openGuestSourceCount > 0 ? passBetweenGuests() : 0
    if passed > 0 { wait = .sweep }
    collect()

    // 2.
    received.removeAll()
    routedFrames = 0
    var isWoken = false
    for place in 0..<events.count {
      let event = events[place]
      switch event.kind {
      case .received: receive.take(event, &memory, counters, into: &received)
      case .sent: report(transmit.finished(event, &io, &memory, counters))
      case .writable: transmit.writable(event)
      case .stuck: transmit.stuck(event, &memory, counters)
      case .receiveEnded: report(receive.ended(event, &io, &memory, counters))
      case .woken:
        isWoken = true
        counters.worker.add(.wakeups)
        report(receive.woken(event, &io, &memory))
      }
    }
    if received.count + passed > 0 { counters.worker.add(.receives, received.count + passed) }
    if roles != .all { exchange() }

    // 3.
    if roles.contains(.route) {
      for place in 0..<min(received.count, RouteStage.prefetchFrames) { route.prefetch(received[place], memory) }
      for place in 0..<received.count {
        if place + RouteStage.prefetchFrames < received.count {
          route.prefetch(received[place + RouteStage.prefetchFrames], memory)
        }
        // Trains may be routed to more places than a batch has.
        if routed.room < RouteStage.trainFramesMax { passOnRouted() }
        route.route(received[place], now: clock, &memory, counters, into: &routed)
      }
    }

    // 4.
    passOnRouted()

    // 5.
    if isWoken { carryOutCommands() }
    if roles != .all { giveBack() }
    receive.replenish(&io, &memory)
    settle(isIdle: events.count == 0 && received.count == 0 && routedFrames == 0 && passed == 0)
    return state != .stopped
  }

  /// The short way of what one guest sends another, over and over: where the router remembers its decision and nothing
  /// waits, frames are copied from ring to ring, and a run of them is decided and counted as one. The first frame of a
  /// guest for which that does not hold stops it for this turn: it and those behind it go through the stages, in
  /// their order.
  @inline(never)
  private mutating func passBetweenGuests() -> Int {
    guard state == .running else { return 0 }
    var sum = 0
    for place in 0..<io.openGuestSourceCount {
      let source = io.guestSource(place)
      let (ingress, domain) = receive.place(of: source)
      guard domain != .none else { continue }
      io.beginPassing(source)
      while let addresses = io.nextAddresses(source) {
        let egress = route.remembered(addresses, ingress: ingress, domain: domain, now: clock)
        guard egress != .none else { break }
        let record = counters[egress]
        guard let lane = transmit.laneAtOnce(record) else { break }
        let run = io.pass(source, addresses, frameBytesMax: Int(record.frameBytesMax), to: lane)
        guard run.frames > 0 else { break }
        counters.countPassed(run, from: ingress, to: record, domain)
        sum += run.frames
      }
      io.endPassing(source)
    }
    return sum
  }

  /// Forwards one frame that a port brought by itself: memory of a guest that is polled, not received from. Its
  /// descriptor names port, domain and a held buffer. To be called between turns.
  public mutating func bring(_ descriptor: Descriptor) {
    if descriptor.buffer.isForeign { memory.brought(1, of: Int(descriptor.buffer.owner)) }
    counters.countIn(descriptor)
    guard roles.contains(.route) else {
      received.removeAll()
      received.append(descriptor)
      return handOnReceived()
    }
    route.route(descriptor, now: clock, &memory, counters, into: &routed)
    passOnRouted()
  }

  /// As if the guest itself had sent the frame. Without a free slot nobody does: then the port is busy, and the guest's
  /// own frames tell the same.
  private mutating func announce(_ guest: MACAddress, _ interface: InterfaceIndex, _ domain: DomainIndex) {
    guard let slot = memory.post() else { return }
    memory.received(slot)
    var descriptor = Descriptor(
      buffer: BufferReference(slot: slot), offset: FrameMemory.headroomBytes, length: Announcement.frameBytes,
      ingress: interface)
    descriptor.domain = domain
    var frame = memory.mutableHead(of: descriptor)
    Announcement.write(guest, into: &frame)
    bring(descriptor)
  }

  /// Makes a foreign memory known before its frames are brought; returns its owner number.
  public mutating func adopt(_ foreign: ForeignMemory.Reference) -> Int { memory.adopt(foreign) }

  private mutating func passOnRouted() {
    routedFrames += routed.count
    if roles.contains(.transmit) { send() } else { handOnRouted() }
    routed.removeAll()
  }

  @inline(__always)
  private mutating func send() {
    let canHoldBack = canHoldBack
    for place in 0..<routed.count { transmit.transmit(routed[place], canHoldBack: canHoldBack, &io, &memory, counters) }
    transmit.flush(&io, counters, nowSeconds: clock.seconds)
  }

  /// Whether slots beyond those that receives need are left, here and at each neighbour whose slots wait here: what a
  /// full socket may hold on to.
  @inline(__always)
  private var canHoldBack: Bool {
    if roles.contains(.receive) && memory.freeSlots <= receive.postedMax { return false }
    for neighbour in 0..<memory.neighbourCount where memory.takenCount(of: neighbour) > joints.holdBackMax {
      return false
    }
    return true
  }

  // MARK: Neighbours

  /// Waits as the last turn decided. A worker that neighbours push to first says that it may sleep, then looks a last
  /// time whether something is there.
  @inline(__always)
  private mutating func collect() {
    var wait = wait
    // A batch on a ring is no completion: it would be waited for in vain.
    if joints.hasInlets, case .forBatch = wait { wait = .sweep }
    // Who has no frames to expect from neighbours is woken by them only when it lacks slots, or guests wait for theirs.
    guard roles != .all, wait != .sweep,
      joints.hasInlets || memory.postedCount < receive.postedMax || memory.foreignHandedOnCount > 0
    else {
      return io.collect(wait, &memory, into: &events)
    }
    joints.bell.hang()
    if joints.haveFrames() || !joints.comesBack.isEmpty() { wait = .sweep }
    io.collect(wait, &memory, into: &events)
    joints.bell.takeDown()
  }

  /// Takes slots and frames off the rings; hands on what was received, where routing is another's.
  private mutating func exchange() {
    joints.comesBack.take(&memory)
    if roles.contains(.receive) && !roles.contains(.route) {
      handOnReceived()
    } else {
      joints.fromReceivers.take(joints.batchFrames, by: joints.number, &memory, counters, into: &received)
    }
    joints.fromRouters.take(joints.batchFrames, by: joints.number, &memory, counters, into: &routed)
  }

  /// To one router all that came from one port, or from one sender of datagrams: so each flow stays in order.
  private mutating func handOnReceived() {
    let neighbours = joints.toRouters.count
    var handedOn = CrossingCount(.handedOnFrames)
    if neighbours == 1 { joints.toRouters[0].prefetch(received.count) }
    for place in 0..<received.count {
      let neighbour = neighbours == 1 ? 0 : Self.origin(of: received[place]) % neighbours
      guard joints.toRouters[neighbour].hasRoom(for: 1) else {
        dropForFullRing(received[place])
        continue
      }
      handedOn.count(received[place], counters)
      joints.toRouters[neighbour].stage(
        received[place], memory.handOn(received[place].buffer, from: joints.number))
    }
    handedOn.flush(counters)
    for neighbour in 0..<neighbours where joints.toRouters[neighbour].flush(&io) {
      counters.worker.add(.neighbourWakes)
    }
  }

  /// A number for where a frame came from: its port, or who sent the datagram.
  @inline(__always)
  private static func origin(of descriptor: Descriptor) -> Int {
    descriptor.ingress == .none ? Int(descriptor.sender.low & 0xFFFF) : descriptor.ingress.index
  }

  /// To one transmitter all frames of a flow.
  private mutating func handOnRouted() {
    let neighbours = joints.toTransmitters.count
    var handedOn = CrossingCount(.handedOnFrames)
    if neighbours == 1 { joints.toTransmitters[0].prefetch(routed.count) }
    var place = 0
    while place < routed.count {
      // The frames of one slot stay together: it has one holder.
      let buffer = routed[place].descriptor.buffer
      var end = place + 1
      while end < routed.count, routed[end].descriptor.buffer == buffer { end += 1 }
      let neighbour = neighbours == 1 ? 0 : transmitter(of: routed[place].descriptor, among: neighbours)
      guard joints.toTransmitters[neighbour].hasRoom(for: end - place) else {
        for dropped in place..<end { dropForFullRing(routed[dropped].descriptor) }
        place = end
        continue
      }
      var holds = end - place
      while place < end {
        handedOn.count(routed[place].descriptor, counters)
        if holds != 1 { routed[place].crossesWith = UInt16(truncatingIfNeeded: holds) }
        joints.toTransmitters[neighbour].stage(
          routed[place], memory.handOn(buffer, from: joints.number, holds: holds))
        holds = 0
        place += 1
      }
    }
    handedOn.flush(counters)
    for neighbour in 0..<neighbours where joints.toTransmitters[neighbour].flush(&io) {
      counters.worker.add(.neighbourWakes)
    }
  }

  /// One for all that a link brought, as a train has frames of several flows; else one for each flow.
  @inline(__always)
  private func transmitter(of descriptor: Descriptor, among neighbours: Int) -> Int {
    if counters[descriptor.ingress].kind.isLink { return descriptor.ingress.index % neighbours }
    // The upper bits of the product: lanes are picked by the hash's lower ones.
    let product = UInt64(descriptor.flowHash) * UInt64(truncatingIfNeeded: neighbours)
    return Int(truncatingIfNeeded: product >> 32)
  }

  private mutating func dropForFullRing(_ descriptor: Descriptor) {
    if descriptor.ingress == .none {
      counters.underlay.add(.dropRingFull, Int(descriptor.wireFrames))
    } else {
      counters.countDrop(.dropRingFull, descriptor, at: descriptor.ingress)
    }
    memory.release(descriptor.buffer)
  }

  private mutating func giveBack() {
    for place in 0..<joints.givesBack.count where joints.givesBack[place].flush(&memory, &io) {
      counters.worker.add(.neighbourWakes)
    }
  }

  // MARK: The end of a turn

  @inline(__always)
  private mutating func settle(isIdle: Bool) {
    let now = io.now()
    clock = TurnClock(nanoseconds: now &- startNanoseconds)
    count()
    if state != .running { return drainFurther(now) }
    let (wait, yields) = dispatch.next(now: now, frames: wireFrames, didWork: !isIdle)
    self.wait = wait
    if yields { io.yieldProcessor() }
    if dispatch.isPolling != wasPolling {
      wasPolling = dispatch.isPolling
      counters.worker.add(.modeSwitches)
    }
  }

  /// Frames that this turn was about.
  @inline(__always)
  private var frames: Int {
    if roles.contains(.route) { return received.count + passed }
    return (roles.contains(.receive) ? received.count : 0) + (roles.contains(.transmit) ? routedFrames : 0)
  }

  /// The same as they are on the wire: the rate that dispatch goes by.
  @inline(__always)
  private var wireFrames: Int {
    guard roles.contains(.route) || roles.contains(.receive) else { return routedFrames }
    var sum = passed
    for place in 0..<received.count { sum += Int(received[place].wireFrames) }
    return sum
  }

  @inline(__always)
  private mutating func count() {
    let statistics = io.takeStatistics()
    counters.worker.add(.turns)
    counters.worker.add(.enters, statistics.enters)
    counters.worker.add(.completions, statistics.completions)
    if statistics.overflows > 0 { counters.worker.add(.completionOverflows, statistics.overflows) }
    if statistics.sleeps > 0 { counters.worker.add(.sleeps, statistics.sleeps) }
    if frames > 0 { counters.worker.add(Counter.batchBucket(frames)) }
  }

  // MARK: Control

  mutating func report(_ report: Report?) {
    guard let report else { return }
    // Reports are few and bounded by what control asked for; a full ring means that control is gone.
    _ = reports.push(report)
    Waker.wake(controlWaker)
  }

  mutating func carryOutCommands() {
    while let command = commands.pop() {
      counters.worker.add(.commands)
      switch command {
      case .addInterface(let index, let record): counters.set(index, record)
      case .removeInterface(let index): counters.remove(index)
      case .addDomain(let index, let writer): counters.set(index, writer)
      case .openSource(let source, let kind, let interface, let domain, let descriptor):
        receive.open(source, kind, interface: interface, domain: domain, descriptor: descriptor, &io, &memory)
      case .openGuestSource(let source, let interface, let domain, let ring):
        openGuest(source, interface, domain, ring)
      case .openGuestLane(let lane, let interface, let ring):
        guard io.lend(ring, toLane: lane) else {
          report(.laneFailed(lane, error: EINVAL))
          break
        }
        transmit.open(lane, .guest, interface: interface, descriptor: -1, &io)
      case .dropWaiting(let isSecondOver):
        transmit.dropWaiting(isSecondOver: isSecondOver, &memory, counters)
      case .closeSource(let source):
        if receive.close(source, &io) { report(.sourceClosed(source)) }
      case .openLane(let lane, let kind, let interface, let descriptor):
        transmit.open(lane, kind, interface: interface, descriptor: descriptor, &io)
      case .closeLane(let lane):
        report(transmit.beginClose(lane, .dropInterfaceDown, &io, &memory, counters))
      case .announce(let guest, let interface, let domain): announce(guest, interface, domain)
      case .adopt(let view):
        route.adopt(view)
        if !roles.contains(.route) { sendWhatIsOnRings() }
        report(.adopted(version: view.version))
      case .audit: report(.audited(audit()))
      case .drain: if state == .running { beginDrain(.draining) }
      case .stop: beginDrain(.stopping)
      }
    }
  }

  private mutating func openGuest(
    _ source: Int, _ interface: InterfaceIndex, _ domain: DomainIndex, _ ring: GuestRing.Reference
  ) {
    guard io.lend(ring, toSource: source) else { return report(.sourceFailed(source, error: EINVAL)) }
    receive.open(source, .guest, interface: interface, domain: domain, descriptor: ring.kick, &io, &memory)
  }

  /// Frames that were routed by an older snapshot may point into it: they leave the rings before this worker says that
  /// it uses nothing of it any more. Control has routers adopt first, so all of them are on the rings now.
  private mutating func sendWhatIsOnRings() {
    var left = joints.fromRouters.capacity
    while left > 0 {
      joints.fromRouters.take(left, by: joints.number, &memory, counters, into: &routed)
      guard routed.count > 0 else { return }
      left -= routed.count
      passOnRouted()
    }
  }

  /// Ends all receives, and allows a second to those whose frames wait: `next` is where that ends.
  private mutating func beginDrain(_ next: State) {
    state = next
    drainStart = io.now()
    for source in 0..<receive.sourceCount where !receive.isWaker(source) { _ = receive.close(source, &io) }
  }

  /// What is there is handed on or sent, until none is left or the time is up.
  private mutating func drainFurther(_ now: UInt64) {
    wait = .atMost(nanoseconds: 1_000_000)
    switch state {
    case .drained: return
    case .leaving:
      // The sends of a chain wait for nothing, so it is back soon; a kernel that keeps one must not keep us.
      if transmit.inFlight == 0 || now &- drainStart > 2 * Self.drainNanosecondsMax { finish() }
      return
    default: break
    }
    let isEmpty = receive.openCount == 0 && transmit.inFlight == 0 && !joints.haveFrames()
    // Whoever stops last waits for its slots: the others have stopped.
    let isDone = isEmpty && (state == .draining || memory.handedOnCount + memory.foreignHandedOnCount == 0)
    guard isDone || now &- drainStart > Self.drainNanosecondsMax else { return }
    if state == .draining {
      state = .drained
      return report(.drained)
    }
    for lane in 0..<transmit.laneCount { _ = transmit.beginClose(lane, .dropStopped, &io, &memory, counters) }
    state = .leaving
    if transmit.inFlight == 0 { finish() }
  }

  private mutating func finish() {
    giveBack()
    // With no receive left the kernel has no slot left either: one that does not come back now was lost.
    if receive.openCount == 0 { io.takeBackSlots(&memory) }
    slotsNotTakenBack =
      (receive.openCount == 0 ? memory.postedCount : 0) + memory.handedOnCount + memory.foreignHandedOnCount
    report(.audited(audit()))
    state = .stopped
    report(.stopped)
  }

  /// The sums of this worker, consistent because it is between two turns.
  public mutating func audit() -> Audit {
    var result = Audit()
    tallyInFlight()
    result.inFlight = UInt64(inFlight.frames)
    result.slotsLost = memory.holdsTotal - inFlight.slots + memory.slotsAstray + slotsNotTakenBack
    result.operationsLost = transmit.operationsInUse - transmit.inFlight

    var linksIn: UInt64 = 0
    for index in 0..<counters.interfaceCount {
      let record = counters[InterfaceIndex(index)]
      guard record.kind != .absent else { continue }
      let drops = dropSums(record.counters)
      let received = record.counters.value(.inFrames)
      let sent = record.counters.value(.outFrames)
      result.received += received
      result.sent += sent
      result.dropped += drops.all
      if record.kind.isLink { linksIn += received }
      let accounted = sent + drops.egress + UInt64(inFlight.byInterface[index])
      if record.counters.value(.offeredFrames) != accounted, result.brokenInterface == .none {
        result.brokenInterface = InterfaceIndex(index)
      }
    }
    for index in 0..<counters.domainCount {
      guard let block = counters[DomainIndex(index)] else { continue }
      let copies = block.value(.copies)
      result.copies += copies
      let accounted = block.value(.outFrames) + dropSums(block).all + UInt64(inFlight.byDomain[index])
      let arrived = block.value(.inFrames) + block.value(.takenOverFrames) + copies
      if arrived != accounted + block.value(.handedOnFrames), result.brokenDomain == .none {
        result.brokenDomain = DomainIndex(index)
      }
    }
    let underlay = counters.underlay
    result.underlayHolds =
      underlay.value(.inFrames) + underlay.value(.takenOverFrames)
      == linksIn + dropSums(underlay).all + underlay.value(.handedOnFrames)
    result.handedOn = counters.worker.value(.handedOnFrames)
    result.takenOver = counters.worker.value(.takenOverFrames)
    return result
  }

  private mutating func tallyInFlight() {
    inFlight.frames = 0
    inFlight.slots = 0
    for index in 0..<inFlight.byInterface.count { inFlight.byInterface[index] = 0 }
    for index in 0..<inFlight.byDomain.count { inFlight.byDomain[index] = 0 }
    transmit.forEachInFlight { egress, descriptor in
      let frames = UInt32(descriptor.wireFrames)
      inFlight.frames += Int(frames)
      if !descriptor.buffer.isForeign { inFlight.slots += 1 }
      inFlight.byInterface[egress.index] += frames
      if descriptor.domain != .none { inFlight.byDomain[descriptor.domain.index] += frames }
    }
  }

  private func dropSums(_ block: CounterBlock.Writer) -> (all: UInt64, egress: UInt64) {
    var sums: (all: UInt64, egress: UInt64) = (0, 0)
    for raw in Counter.dropUnknownSource.rawValue...Counter.dropStopped.rawValue {
      let counter = Counter(rawValue: raw)!
      let value = block.value(counter)
      sums.all += value
      if counter.isEgressDrop { sums.egress += value }
    }
    return sums
  }
}

/// How a worker is sized and driven; the same for every kind of I/O.
public struct WorkerSettings: Sendable {
  public var dispatch = Dispatch.Settings()
  /// Slots that the kernel holds at most.
  public var postedSlots = 64
  public var sources = 1
  public var lanes = 1
  public var interfaces = 1
  public var domains = 1
  public var operations = 1_024
  /// Whether datagrams leave in trains (UDP GSO).
  public var formsTrains = true
  /// How long a guest may take nothing before frames stop to wait for it: longer than one that runs is away from its
  /// processor, shorter than TCP waits for an answer (200 ms).
  public var guestPatienceNanoseconds: UInt64 = 20_000_000
  /// The start of second 1 of learning and ageing, which all workers and control share; nil: now.
  public var epochNanoseconds: UInt64?
  public init() {}
}
