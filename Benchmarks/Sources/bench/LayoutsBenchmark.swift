import CBench
import Datapath
import Glibc
import Synchronization

/// The layouts against each other, over a kernel that costs nothing (`MemoryIO`): what a frame costs all cores together
/// when one worker does everything, and when its stages are on cores of their own, with rings between.
///
/// A worker is busy in the turns that had anything to do. Its cost of a frame is the time of those turns by the frames
/// that they were about; turns that found nothing are waiting, whatever they burn.
func benchmarkLayouts(_ report: Report) {
  let cpus = ProcessorSet.allowed()
  var layouts: [[Roles]] = [[.all]]
  if cpus.count >= 3 { layouts.append([.receive, .route, .transmit]) }
  if cpus.count >= 2 {
    layouts += [
      [[.receive, .route], .transmit], [.receive, [.route, .transmit]], [[.receive, .transmit], .route],
    ]
  }
  if cpus.count < 2 { report.skip("pipelines", "there is one CPU") }
  for traffic in LayoutScene.Traffic.all {
    guard let scene = LayoutScene(traffic) else { return report.check(false, "layouts: a snapshot is made") }
    measure(layouts, scene, cpus, report)
  }
}

/// What one worker did while it was measured.
private struct Share {
  var frames = 0
  var busyNanoseconds: UInt64 = 0
  var nanoseconds: UInt64 = 0
  var busyTurns = 0
  var sent = 0
  var interruptions = 0
  var allocations: UInt64 = 0

  var nanosecondsPerFrame: Double { Double(busyNanoseconds) / Double(max(1, frames)) }
  var framesPerTurn: Double { Double(frames) / Double(max(1, busyTurns)) }
}

/// The workers of one layout, from start to stop.
private struct Run {
  var shares: [Share]
  /// All of them stopped, and every frame and slot is accounted for.
  var holds: Bool

  var allocations: UInt64 { shares.reduce(0) { $0 + $1.allocations } }
  var busyNanosecondsPerFrame: Double { shares.reduce(0) { $0 + $1.nanosecondsPerFrame } }
  var framesPerSecond: Double {
    let longest = shares.map(\.nanoseconds).max() ?? 1
    return Double(shares.reduce(0) { $0 + $1.sent }) * 1e9 / Double(max(1, longest))
  }
}

/// One worker with its thread. Each field is used by one thread at a time: before the start and after the join by
/// control, in between by the worker's.
private final class Seat: @unchecked Sendable {
  let roles: Roles
  let mailbox: Mailbox
  var share = Share()
  private let signal = MemoryIO.Signal()
  private let measured = Atomic<Int>(0)
  private let scene: LayoutScene
  private let phase: Phase
  private let joints: Parcel<Joints>
  private let memory: Parcel<FrameMemory>
  private var commands: SPSCRing<Command>.Producer
  private var reports: SPSCRing<Datapath.Report>.Consumer
  private let blocks = (0...LayoutScene.interfaces).map { _ in CounterBlock() }
  private let workerCounters = CounterBlock()
  private let underlayCounters = CounterBlock()
  private let ioCounters = CounterBlock()

  /// How long control waits for an answer of a worker.
  static let answerMillisecondsMax = 10_000

  init(
    _ roles: Roles, _ mailbox: Mailbox, _ scene: LayoutScene, _ phase: Phase, joints: consuming Joints,
    memory: consuming FrameMemory
  ) {
    self.roles = roles
    self.mailbox = mailbox
    self.scene = scene
    self.phase = phase
    self.joints = Parcel(joints)
    self.memory = Parcel(memory)
    commands = mailbox.commands.makeProducer()
    reports = mailbox.reports.makeConsumer()
    let kinds: [InterfaceRecord.Kind] = [.tap, .tap, .vxlan]
    let laneFirst = [0, 0, 1]
    let laneCount = [0, 1, LayoutScene.linkLanes]
    send(.addDomain(LayoutScene.domain, blocks[LayoutScene.interfaces].writer))
    for index in 0..<LayoutScene.interfaces {
      let record = InterfaceRecord(
        kinds[index], laneFirst: laneFirst[index], laneCount: laneCount[index], mtuBytes: 1_500,
        counters: blocks[index].writer)
      send(.addInterface(InterfaceIndex(index), record))
    }
    if roles.contains(.transmit) {
      send(.openLane(0, .tap, interface: LayoutScene.portOut, descriptor: -1))
      for lane in 1..<LayoutScene.lanes {
        send(.openLane(lane, .datagramIPv4, interface: LayoutScene.linkOut, descriptor: -1))
      }
    }
    // Answered when all of it is done.
    send(.audit)
  }

  /// Frames come from now on; to be called when every worker knows the interfaces.
  func receive() {
    guard roles.contains(.receive) else { return }
    let (kind, interface, domain): (SourceKind, InterfaceIndex, DomainIndex) =
      scene.traffic.isFromLink ? (.vxlan, .none, .none) : (.tap, LayoutScene.portIn, LayoutScene.domain)
    send(.openSource(LayoutScene.source, kind, interface: interface, domain: domain, descriptor: -1))
  }

  func send(_ command: Command) {
    let isSent = commands.push(command)
    precondition(isSent, "the mailbox is full")
    signal.isWoken.store(true, ordering: .releasing)
  }

  /// Waits for a report; false when it does not come.
  func await(_ isIt: (Datapath.Report) -> Bool) -> Bool {
    for _ in 0..<Self.answerMillisecondsMax {
      while let report = reports.pop() { if isIt(report) { return true } }
      usleep(1_000)
    }
    return false
  }

  /// Frames measured so far; for control.
  var measuredFrames: Int { measured.load(ordering: .relaxed) }

  var sendsAreRight: Bool { signal.wrongSends.load(ordering: .relaxed) == 0 }

  /// On the worker's thread.
  func run() {
    var settings = WorkerSettings()
    settings.dispatch.mode = .vmmDriven
    settings.dispatch.yield = .immediate
    settings.sources = LayoutScene.sources
    settings.lanes = LayoutScene.lanes
    settings.interfaces = LayoutScene.interfaces
    settings.domains = 1
    settings.operations = LayoutScene.operations
    var memory = memory.open()
    if roles.contains(.receive) { scene.load.fill(&memory) }
    let io = MemoryIO(
      scene.load, slots: memory.slotCount, lanes: LayoutScene.lanes, wakerSource: Worker<MemoryIO>.wakerSource, signal,
      ioCounters.writer)
    var worker = Worker(
      io: io, memory: memory, joints: joints.open(), mailbox: mailbox, settings: settings,
      view: scene.snapshot.view, workerCounters: workerCounters.writer, underlayCounters: underlayCounters.writer)
    let ioCounters = ioCounters.writer
    var share = Share()
    var start: UInt64 = 0
    var sentBefore: UInt64 = 0
    var allocationsBefore: UInt64 = 0
    var before = Report.now()
    let turnNanosecondsMax = scene.turnNanosecondsMax
    var framesBefore = frames(ioCounters)
    var thingsBefore = things(ioCounters)
    while worker.turn() {
      let now = Report.now()
      let frames = frames(ioCounters)
      let things = things(ioCounters)
      switch phase.now {
      case .warming: break
      case .measuring:
        if start == 0 {
          start = before
          sentBefore = ioCounters.value(.outFrames)
          allocationsBefore = cbench_allocations()
        }
        if now &- before > turnNanosecondsMax {
          share.interruptions += 1
        } else if things != thingsBefore {
          share.busyNanoseconds += now &- before
          share.frames += Int(frames &- framesBefore)
          share.busyTurns += 1
          measured.store(share.frames, ordering: .relaxed)
        }
        share.allocations = cbench_allocations() &- allocationsBefore
        share.nanoseconds = now &- start
        share.sent = Int(ioCounters.value(.outFrames) &- sentBefore)
      case .over: break
      }
      before = now
      framesBefore = frames
      thingsBefore = things
    }
    self.share = share
  }

  /// Frames that the worker has been about: each once, also where it sends what it received before.
  @inline(__always)
  private func frames(_ io: CounterBlock.Writer) -> UInt64 {
    roles.contains(.receive) ? io.value(.inFrames) : takenOver
  }

  /// All that gave it something to do.
  @inline(__always)
  private func things(_ io: CounterBlock.Writer) -> UInt64 { io.value(.completions) &+ takenOver }

  /// Frames and datagrams that neighbours handed on to it.
  @inline(__always)
  private var takenOver: UInt64 {
    workerCounters.writer.value(.takenOverFrames) &+ underlayCounters.writer.value(.takenOverFrames)
  }

  /// Datagrams that it handed on less those that it took over; for control, after the end.
  var datagramsHandedOn: Int {
    let counters = underlayCounters.writer
    return Int(counters.value(.handedOnFrames)) - Int(counters.value(.takenOverFrames))
  }
}

/// What all workers of a run are to do now.
private final class Phase: Sendable {
  enum Name: UInt8 { case warming, measuring, over }
  private let raw = Atomic<UInt8>(0)
  var now: Name { Name(rawValue: raw.load(ordering: .relaxed))! }
  func begin(_ name: Name) { raw.store(name.rawValue, ordering: .relaxed) }
}

private func run(_ roles: [Roles], _ scene: LayoutScene, _ cpus: [Int], milliseconds: Int, framesMin: Int) throws -> Run
{
  let mailboxes = try roles.map { _ in try Mailbox(controlWaker: -1) }
  var joining = Wiring.Settings()
  joining.slots = LayoutScene.slots
  var wiring = try Wiring(roles: roles, wakers: mailboxes.map(\.workerWaker), settings: joining)
  let phase = Phase()
  let seats = roles.indices.map { number in
    Seat(
      roles[number], mailboxes[number], scene, phase, joints: wiring.takeJoints(of: number),
      memory: wiring.makeMemory(of: number))
  }
  let threads = seats.indices.map { number in
    let seat = seats[number]
    return BenchmarkThread(cpu: cpus[number]) { seat.run() }
  }
  var holds = true
  for seat in seats {
    let isReady = seat.await { if case .audited = $0 { true } else { false } }
    holds = holds && isReady
  }
  for seat in seats { seat.receive() }
  usleep(UInt32(milliseconds) * 1_000 / 4)
  phase.begin(.measuring)
  usleep(UInt32(milliseconds) * 1_000)
  // On a busy machine a worker may have had no turn yet.
  for _ in 0..<Seat.answerMillisecondsMax where seats.contains(where: { $0.measuredFrames < framesMin }) {
    usleep(1_000)
  }
  phase.begin(.over)

  // In the order of a frame's way, then back: what is handed on finds the next at work, and slots come back.
  let order = seats.indices.sorted { stage(roles[$0]) < stage(roles[$1]) }
  for number in order {
    seats[number].send(.drain)
    let isDrained = seats[number].await { if case .drained = $0 { true } else { false } }
    holds = holds && isDrained
  }
  var handedOn: UInt64 = 0
  var takenOver: UInt64 = 0
  for number in order.reversed() {
    seats[number].send(.stop)
    let isStopped = seats[number].await { report in
      if case .audited(let audit) = report {
        holds = holds && audit.holds && audit.dropped == 0
        handedOn += audit.handedOn
        takenOver += audit.takenOver
      }
      return if case .stopped = report { true } else { false }
    }
    precondition(isStopped, "a worker of the benchmark does not stop")
  }
  for thread in threads { thread.join() }
  holds = holds && handedOn == takenOver && seats.reduce(0) { $0 + $1.datagramsHandedOn } == 0
  holds = holds && seats.allSatisfy { $0.sendsAreRight }
  return Run(shares: seats.map(\.share), holds: holds)
}

/// Where a worker is on the way of a frame: one that receives is first, even where it sends too.
private func stage(_ roles: Roles) -> Int { roles.contains(.receive) ? 0 : roles.contains(.route) ? 1 : 2 }

private func measure(_ layouts: [[Roles]], _ scene: LayoutScene, _ cpus: [Int], _ report: Report) {
  var runs = [[Run]](repeating: [], count: layouts.count)
  report.table("all three stages in memory, \(scene.name)", item: "frame, of all busy cores") { table in
    for place in layouts.indices {
      guard
        let run = try? run(
          layouts[place], scene, cpus, milliseconds: report.isSmoke ? 10 : 200,
          framesMin: report.isSmoke ? 2_000 : 100_000)
      else {
        return report.check(false, "layouts: \(name(layouts[place])): rings and memory are made")
      }
      runs[place].append(run)
      table.add(name(layouts[place]), run.busyNanosecondsPerFrame, allocations: run.allocations)
    }
  }
  // As in the table: the run to warm up does not count.
  let counted = report.isSmoke ? runs : runs.map { Array($0.dropFirst()) }
  let fusedRate = median(counted[0].map(\.framesPerSecond))
  let fusedCost = median(counted[0].map(\.busyNanosecondsPerFrame))
  for (place, layout) in layouts.enumerated() {
    let isRight = runs[place].allSatisfy { run in run.holds && run.shares.allSatisfy { $0.frames > 0 } }
    report.check(isRight, "layouts: \(name(layout)): \(scene.name): every frame is sent as it came, none is lost")
    let runs = counted[place]
    let rate = median(runs.map(\.framesPerSecond))
    let ofCore = rate / fusedRate / Double(layout.count)
    let ofBusyCore = fusedCost / median(runs.map(\.busyNanosecondsPerFrame))
    report.note(
      "\(name(layout)): \(Report.decimal(rate / 1e6, 2)) M frames/s, \(Report.decimal(rate / fusedRate, 2)) × fused")
    if layout.count > 1 {
      report.note(
        "  at least \(Report.decimal(shareOfFusedMin, 1)) of fused: a core \(verdict(ofCore)), "
          + "a busy core \(verdict(ofBusyCore))")
    }
    for (number, roles) in layout.enumerated() {
      let shares = runs.map { $0.shares[number] }
      let core = median(shares.map { Double($0.busyNanoseconds) * 100 / Double(max(1, $0.nanoseconds)) })
      let nanoseconds = Report.decimal(median(shares.map(\.nanosecondsPerFrame)), 2)
      let batch = Report.decimal(median(shares.map(\.framesPerTurn)), 1)
      let interruptions = shares.reduce(0) { $0 + $1.interruptions }
      report.note(
        "  \(roles) on CPU \(cpus[number]): \(nanoseconds) ns a frame, \(Report.decimal(core, 0)) % of the core, "
          + "\(batch) frames a turn, \(interruptions) turns interrupted")
    }
  }
}

/// What a pipeline is to reach, of the frames that the fused layout forwards on as many cores: on all that it has, and
/// on those that it keeps busy, as its stages differ in length.
private let shareOfFusedMin = 0.8

private func verdict(_ share: Double) -> String {
  "\(share >= shareOfFusedMin ? "yes" : "NO") (\(Report.decimal(share, 2)))"
}

private func name(_ layout: [Roles]) -> String {
  layout == [.all] ? "fused" : layout.map(\.description).joined(separator: " → ")
}

private func median(_ values: [Double]) -> Double { values.sorted()[values.count / 2] }
