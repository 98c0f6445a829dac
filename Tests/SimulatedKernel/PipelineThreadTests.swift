import Glibc
import SimulatedKernel
import Synchronization
import TestSupport
import Testing

@testable import Datapath

/// The simulated kernel for a worker that has a thread and a network of its own, and really sleeps: on its mailbox's
/// eventfd, for as long as nobody writes to it. A wake-up that is forgotten is a worker that hangs.
private struct SleepingIO: ~Copyable, WorkerIO {
  private var inner: SimulatedIO
  private let network: SimulatedNetwork
  private let waker: Int32
  private let sleeps: Sleeps
  /// Chains and waits for full lanes whose event has not come: a kernel carries them out by itself.
  private var awaited = 0

  final class Sleeps: Sendable {
    let count = Atomic<Int>(0)
  }

  init(_ network: SimulatedNetwork, waker: Int32, _ sleeps: Sleeps) {
    inner = SimulatedIO(network, chainFramesMax: 16)
    self.network = network
    self.waker = waker
    self.sleeps = sleeps
  }

  mutating func collect(_ wait: Wait, _ memory: inout FrameMemory, into events: inout EventBatch) {
    if wait == .forEvent, awaited == 0, network.isIdle, network.nextDue == nil {
      sleeps.count.add(1, ordering: .relaxed)
      var one = pollfd(fd: waker, events: Int16(POLLIN), revents: 0)
      _ = unsafe poll(&one, 1, -1)
    }
    var value: UInt64 = 0
    if unsafe read(waker, &value, 8) == 8 { network.wake(waker) }
    let before = events.count
    inner.collect(wait, &memory, into: &events)
    for place in before..<events.count where events[place].kind == .sent || events[place].kind == .writable {
      awaited -= 1
    }
  }

  mutating func wake(_ waker: Int32) { Waker.wake(waker) }

  mutating func openSource(_ source: Int, _ kind: SourceKind, descriptor: Int32) {
    inner.openSource(source, kind, descriptor: descriptor)
  }
  mutating func arm(_ source: Int, _ memory: inout FrameMemory) { inner.arm(source, &memory) }
  mutating func cancel(_ source: Int) { inner.cancel(source) }
  mutating func closeSource(_ source: Int) { inner.closeSource(source) }
  mutating func openLane(_ lane: Int, _ kind: LaneKind, descriptor: Int32) {
    inner.openLane(lane, kind, descriptor: descriptor)
  }
  mutating func closeLane(_ lane: Int) { inner.closeLane(lane) }
  mutating func post(_ slot: Int, _ memory: inout FrameMemory) { inner.post(slot, &memory) }
  mutating func send(_ lane: Int, first: Int, count: Int, _ pool: borrowing SendPool) {
    awaited += 1
    inner.send(lane, first: first, count: count, pool)
  }
  mutating func awaitWritable(_ lane: Int) {
    awaited += 1
    inner.awaitWritable(lane)
  }
  mutating func takeStatistics() -> IOStatistics { inner.takeStatistics() }
  mutating func takeBackSlots(_ memory: inout FrameMemory) { inner.takeBackSlots(&memory) }
  var chainFramesMax: Int { inner.chainFramesMax }
  func now() -> UInt64 { inner.now() }
  func yieldProcessor() { sched_yield() }
}

/// Workers of the pipeline layout on threads of their own: what they share is rings, bells and slots alone. Under the
/// thread sanitizer this finds what is not ordered by them.
@Suite struct PipelineThreadTests {
  /// One worker with its thread. Each is used by one thread at a time: first the test's, then its own.
  private final class Seat: @unchecked Sendable {
    let network: SimulatedNetwork
    let mailbox: Mailbox
    let roles: Roles
    var commands: SPSCRing<Command>.Producer
    var reports: SPSCRing<Report>.Consumer
    let counters = CounterBlock()
    let sleeps = SleepingIO.Sleeps()
    private let underlay = CounterBlock()
    private var blocks: [CounterBlock] = []
    private var worker: Worker<SleepingIO>?
    private(set) var devices: [Int] = []
    private var thread = pthread_t()
    /// What the thread does before each turn.
    var beforeTurn: () -> Void = {}

    init(_ number: Int, _ roles: Roles, seed: UInt64) throws {
      self.roles = roles
      network = SimulatedNetwork(seed: seed &+ UInt64(number))
      mailbox = try Mailbox(controlWaker: -1)
      network.addWaker(mailbox.workerWaker)
      commands = mailbox.commands.makeProducer()
      reports = mailbox.reports.makeConsumer()
    }

    /// - Parameter guests: by port, where they are guests' network cards instead of TAP devices.
    func make(
      _ wiring: inout Wiring, _ number: Int, _ view: SnapshotView, ports: Int, guests: [GuestNetworkCard]?,
      dispatch: Dispatch.Settings
    ) {
      var settings = WorkerSettings()
      settings.dispatch = dispatch
      settings.postedSlots = 16
      settings.sources = 1 + ports
      settings.lanes = ports
      settings.interfaces = ports
      worker = Worker(
        io: SleepingIO(network, waker: mailbox.workerWaker, sleeps), memory: wiring.makeMemory(of: number),
        joints: wiring.takeJoints(of: number), mailbox: mailbox, settings: settings, view: view,
        workerCounters: counters.writer, underlayCounters: underlay.writer)
      blocks = (0...ports).map { _ in CounterBlock() }
      send(.addDomain(DomainIndex(0), blocks[ports].writer))
      for port in 0..<ports {
        let index = InterfaceIndex(port)
        send(
          .addInterface(
            index,
            InterfaceRecord(
              guests == nil ? .tap : .guest, laneFirst: port, laneCount: 1, counters: blocks[port].writer)))
        if let guest = guests?[port] {
          if roles.contains(.receive) {
            network.addWaker(guest.kick)
            send(
              .openGuestSource(1 + port, interface: index, domain: DomainIndex(0), guest.transmits!.reference))
          }
          if roles.contains(.transmit) { send(.openGuestLane(port, interface: index, guest.receives!.reference)) }
          continue
        }
        devices.append(network.addDevice())
        let queue = network.openQueue(device: devices[port])
        if roles.contains(.receive) {
          send(.openSource(1 + port, .tap, interface: index, domain: DomainIndex(0), descriptor: queue))
        }
        if roles.contains(.transmit) { send(.openLane(port, .tap, interface: index, descriptor: queue)) }
      }
    }

    func send(_ command: Command) {
      let isSent = commands.push(command)
      precondition(isSent, "the mailbox is full")
      Waker.wake(mailbox.workerWaker)
    }

    func start() {
      let context = unsafe Unmanaged.passRetained(self).toOpaque()
      let error = unsafe pthread_create(
        &thread, nil,
        { context in
          unsafe Unmanaged<Seat>.fromOpaque(context!).takeRetainedValue().turn()
          return nil
        }, context)
      precondition(error == 0)
    }

    private func turn() {
      worker!.carryOutCommands()
      repeat { beforeTurn() } while worker!.turn()
    }

    func join() { pthread_join(thread, nil) }

    /// Waits for a report, which must come: a worker that does not answer sleeps through its waker.
    func await(_ isIt: (Report) -> Bool) -> Bool {
      for _ in 0..<60_000 {
        while let report = reports.pop() { if isIt(report) { return true } }
        usleep(1_000)
      }
      return false
    }
  }

  @Test(
    "frames go through workers on threads of their own, in order, none is lost and no wake-up is forgotten",
    arguments: [
      [Roles.receive, .route, .transmit], [[.receive, .route], .transmit], [.receive, [.route, .transmit]],
      [.receive, .route, .transmit, .transmit], [[.receive, .transmit], .route],
    ], [Dispatch.Mode.guestDriven, .adaptive])
  func threads(roles: [Roles], mode: Dispatch.Mode) throws { try run(roles, mode, guests: nil) }

  @Test(
    "frames in the memory of guests go through workers on threads of their own, and every chain comes back",
    arguments: [
      [Roles.receive, .route, .transmit], [[.receive, .route], .transmit], [.receive, [.route, .transmit]],
      [.receive, .route, .route, .transmit], [[.receive, .transmit], .route],
    ], [Dispatch.Mode.guestDriven, .adaptive])
  func guestThreads(roles: [Roles], mode: Dispatch.Mode) throws {
    let guests = try (0..<3).map { try GuestNetworkCard(owner: $0 + 1) }
    defer { for guest in guests { close(guest.kick) } }
    try run(roles, mode, guests: guests)
    for guest in guests {
      guest.card.reapSent()
      #expect(guest.card.send.out == 0, "every chain came back")
    }
  }

  private func run(_ roles: [Roles], _ mode: Dispatch.Mode, guests: [GuestNetworkCard]?) throws {
    let ports = 3
    let frames: UInt32 = 2_000
    let tables = [MACTable(macsMax: 64)]
    let snapshot = try Snapshot(
      version: 1,
      interfaces: (0..<ports).map {
        Snapshot.Interface(InterfaceIndex($0), .port(domain: DomainIndex(0)), mtuBytes: 1450)
      },
      domains: [Snapshot.Domain(DomainIndex(0), vni: 42, macs: tables[0])])
    let seats = try roles.enumerated().map { try Seat($0, $1, seed: 5) }
    var joining = Wiring.Settings()
    joining.slots = 128
    joining.hugePages = false
    joining.batchFrames = 16
    var wiring = try Wiring(
      roles: roles, wakers: seats.map(\.mailbox.workerWaker), settings: joining,
      shares: (guests ?? []).map { FrameMemory.ForeignShare($0.frames, bringer: 0) })
    var dispatch = Dispatch.Settings()
    dispatch.mode = mode
    dispatch.spinNanoseconds = 1_000
    for guest in guests ?? [] {
      try guest.connect(
        sender: seats[0].mailbox.workerWaker,
        receiver: seats.first { $0.roles.contains(.transmit) }!.mailbox.workerWaker)
    }
    for (number, seat) in seats.enumerated() {
      seat.make(&wiring, number, snapshot.view, ports: ports, guests: guests, dispatch: dispatch)
    }

    // Each port sends unicast to the next and every tenth frame to all; what comes is checked where it is written.
    let macs = (0..<ports).map { 0x0200_0000_0001 + UInt64($0) }
    let receiver = seats[0]
    // Guests have sent all, and every chain came back.
    let isAllTaken = Atomic<Bool>(false)
    var sent = [UInt32](repeating: 0, count: ports)
    var numbers: [UInt32: UInt32] = [:]
    receiver.beforeTurn = {
      // Always at least one while there are some: with nothing to receive the worker sleeps, and nobody would wake it.
      let first = sent.firstIndex { $0 < frames }
      if first == nil {
        for guest in guests ?? [] { guest.card.reapSent() }
        if guests?.contains(where: { $0.card.send.out > 0 }) != true { isAllTaken.store(true, ordering: .relaxed) }
      }
      for port in 0..<ports where sent[port] < frames && (port == first || receiver.network.random.chance(0.7)) {
        let isBroadcast = sent[port] % 10 == 0
        let flow = UInt32(port) << 8 | (isBroadcast ? 2 : 4)
        let number = numbers[flow, default: 0]
        let frame = NumberedFrame(
          destination: isBroadcast ? NumberedFrame.broadcast : macs[(port + 1) % ports], source: macs[port], flow: flow,
          number: number)
        let bytes = frame.bytes(count: 100)
        let isSent =
          if let guests { guests[port].card.send(bytes) != nil } else {
            receiver.network.inject(bytes, device: receiver.devices[port])
          }
        guard isSent else { continue }
        numbers[flow] = number + 1
        sent[port] += 1
      }
    }
    let delivered = Atomic<Int>(0)
    let problems = Problems()
    for seat in seats where seat.roles.contains(.transmit) {
      var checkers = (0..<ports).map { _ in OrderChecker() }
      let look = {
        for port in 0..<ports {
          let written =
            guests?[port].card.takeReceived() ?? seat.network.takeWritten(device: seat.devices[port]).map(\.frame)
          for frame in written {
            guard checkers[port].check(frame) != nil else { continue }
            delivered.add(1, ordering: .relaxed)
          }
          if !checkers[port].problems.isEmpty { problems.add(checkers[port].problems) }
        }
      }
      let inject = seat.beforeTurn
      seat.beforeTurn = {
        inject()
        look()
      }
    }
    for seat in seats { seat.start() }

    // A unicast frame reaches one port, or both others before its destination was learned; a broadcast frame both.
    let least = Int(frames) * ports + Int(frames) / 10 * ports
    func isOver() -> Bool { delivered.load(ordering: .relaxed) >= least && isAllTaken.load(ordering: .relaxed) }
    for _ in 0..<60_000 where !isOver() && problems.isEmpty { usleep(1_000) }
    for stage in [Roles.receive, .route, .transmit] {
      let those = seats.filter { $0.roles.contains(stage) && (stage == .receive || !$0.roles.contains(.receive)) }
        .filter { stage != .transmit || !$0.roles.contains(.route) }
      for seat in those { seat.send(.drain) }
      for seat in those {
        let isDrained = seat.await { if case .drained = $0 { true } else { false } }
        #expect(isDrained)
      }
    }
    var audits: [Audit] = []
    for seat in seats.reversed() {
      seat.send(.stop)
      let isStopped = seat.await {
        if case .audited(let audit) = $0 { audits.append(audit) }
        return if case .stopped = $0 { true } else { false }
      }
      #expect(isStopped)
      seat.join()
      seat.beforeTurn()
    }
    // They hold their seats, which hold them.
    for seat in seats { seat.beforeTurn = {} }
    #expect(delivered.load(ordering: .relaxed) >= least)
    #expect(problems.all == [])
    #expect(audits.count == seats.count)
    for audit in audits { #expect(audit.holds, "\(audit)") }
    let handedOn = audits.reduce(0) { $0 + $1.handedOn }
    #expect(handedOn == audits.reduce(0) { $0 + $1.takenOver })
    #expect(handedOn >= UInt64(frames) * UInt64(ports) * UInt64(min(2, roles.count - 1)))
    let slept = seats.reduce(0) { $0 + $1.sleeps.count.load(ordering: .relaxed) }
    let woken = seats.reduce(0) { $0 + $1.counters.value(.neighbourWakes) }
    if slept > seats.count * 4 { #expect(woken > 0) }
    for seat in seats { #expect(seat.network.violations == []) }
  }

  /// A guest's network card, in memory that the workers share with it.
  @safe
  private final class GuestNetworkCard: @unchecked Sendable {
    let card: GuestCard
    private(set) var transmits: GuestRing?
    private(set) var receives: GuestRing?
    let frames = ForeignMemory(bufferCount: 64)
    /// Never written to: what there is to send is there before a turn begins.
    let kick: Int32
    private let memory: UnsafeMutableRawPointer
    private let owner: Int
    private static let size = 32
    private static let address: UInt64 = 0x10_0000

    init(owner: Int) throws {
      self.owner = owner
      let bytes = GuestCard.memoryBytes(size: Self.size)
      unsafe memory = .allocate(byteCount: bytes, alignment: 4_096)
      let kick = try Waker.make()
      self.kick = kick
      unsafe memset(memory, 0, bytes)
      unsafe card = GuestCard(memory, size: Self.size, guestAddress: Self.address)
      card.piecesMax = owner
      card.offerReceiveBuffers()
    }

    /// Makes its rings.
    /// - Parameters:
    ///   - sender: wakes the worker before whose turns it sends: only then it notices that it may send more.
    ///   - receiver: the same of the worker before whose turns it takes what came.
    func connect(sender: Int32, receiver: Int32) throws {
      let bytes = GuestCard.memoryBytes(size: Self.size)
      let table = try GuestMemory([
        unsafe GuestMemory.Region(
          guestAddress: Self.address, userAddress: Self.address, bytes: UInt64(bytes), mapping: memory)
      ])
      let card = card
      func ring(_ ring: GuestCard.Ring, _ frames: GuestRing.Frames?, call: Int32) -> GuestRing {
        unsafe GuestRing(
          VirtqueueAreas(
            size: Self.size, descriptor: card.pointer(ring.descriptors), driver: card.pointer(ring.available),
            device: card.pointer(ring.used)), features: [], base: 0, mergesBuffers: true, frames: frames,
          memory: table, kick: kick, call: call)
      }
      transmits = ring(card.send, GuestRing.Frames(frames, owner: owner), call: sender)
      receives = ring(card.receive, nil, call: receiver)
    }

    deinit { unsafe memory.deallocate() }
  }

  private final class Problems: Sendable {
    private let found = Mutex<[String]>([])
    func add(_ problems: [String]) { found.withLock { $0 = problems } }
    var all: [String] { found.withLock { $0 } }
    var isEmpty: Bool { all.isEmpty }
  }
}
