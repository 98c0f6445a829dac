import Datapath
import Glibc
import Logging

/// A `vhost-user` port at control: the socket that a frontend talks by, and each ring of its guest on its way to the
/// worker that polls it and back. The rings that the guest transmits by are spread over the workers that receive; those
/// that it receives by have the one that sends.
///
/// The way of a ring: the frontend starts it (`parameters`), the worker gets it (`running`), it is taken back
/// (`leaving`) and, when the worker told so, handed over anew or given up. Whatever changes while a ring runs, memory,
/// eventfds, its end, goes that way: nothing that a worker uses changes under it.
final class GuestPort {
  /// Where the port is at the workers.
  struct Place {
    var interface: InterfaceIndex
    var domain: DomainIndex
    /// Two for each pair of queues: the ring that the guest transmits by, and the kicks of the one that it receives by.
    var sourceFirst: Int
    /// One for each pair.
    var laneFirst: Int
    /// By pair: what the frames that the guest transmits lie in, and who takes them.
    var frames: [GuestRing.Frames]
    var receivers: [WorkerThread]
    /// Who sends to the guest.
    var transmitter: WorkerThread
  }

  /// What the port is to those who send to it, which changes with its guest.
  struct Abilities: Equatable {
    /// Pairs of queues, from the first on, whose ring the guest receives by.
    var laneCount = 0
    var takesTCPSuperFrames = false
    var takesUDPSuperFrames = false
  }

  private struct Parameters {
    var start: VhostUserQueueStart
    var rings: VhostUserRings
    var memory: VhostUserMemory
    var kick: OwnedDescriptor?
    var call: OwnedDescriptor?
    var error: OwnedDescriptor?
    var isEnabled: Bool
    var base: UInt32
    /// Where the guest sees the used ring, while its writes are logged.
    var usedLogAddress: UInt64?
  }

  /// What a worker has; kept until it let go.
  private struct Lent {
    let ring: GuestRing
    let memory: VhostUserMemory
    let dirtyLog: VhostUserLog?
    let kick: OwnedDescriptor?
    let call: OwnedDescriptor?
    let inflight: VhostUserInflight?
    /// Answers of the worker that are still to come, once it was asked to let go.
    var answersLeft = 0
  }

  private struct Queue {
    var parameters: Parameters?
    var lent: Lent?
    /// The frontend waits for it to be stopped.
    var isStopping = false
    /// What the worker has is not what the frontend said last.
    var isStale = false

    var isLeaving: Bool { (lent?.answersLeft ?? 0) > 0 }
    var isWanted: Bool { !isStopping && parameters?.isEnabled == true }
  }

  let name: String
  let socket: VhostUserSocket
  private let place: Place
  private let log: Logger
  /// Tells all workers what the port is from now on.
  private let announce: (Abilities) -> Void
  private var abilities = Abilities()
  private var features = VhostUserFeatures()
  /// By number: even ones the guest receives by, odd ones it transmits by (virtio 1.2 §5.1.2).
  private var queues: [Queue]
  /// Where pages that are written to are noted while the guest migrates.
  private var dirtyLog: VhostUserLog?
  /// The guest that was announced last, while it is connected.
  private var movedHere: MACAddress?
  /// Of changes that are not yet in force.
  private var version: UInt64?
  /// What happened so far, for the table of counters.
  private(set) var counts: [Counter: UInt64] = [.guestConnections: 0, .ringFaults: 0, .memoryFaults: 0]
  /// Why a client has no connection, as it was logged last.
  private var problemTold: String?

  init(
    _ port: Configuration.Port, mtuBytes: Int, place: Place, log: Logger,
    announce: @escaping (Abilities) -> Void
  ) throws(PortError) {
    name = port.name
    self.place = place
    self.log = log
    self.announce = announce
    queues = [Queue](repeating: Queue(), count: 2 * port.queues)
    var features = VhostUserFeatures.served
    if !port.offloads { features.subtract(.offloads) }
    // What is wrong with it, the socket tells.
    if port.socket.hasPrefix(Schema.socketFolder + "/") { _ = unsafe mkdir(Schema.socketFolder, 0o755) }
    socket = try VhostUserSocket(
      port.socketMode == .server ? .server : .client, path: port.socket,
      settings: VhostUserSession.Settings(
        queuePairsMax: port.queues, features: features,
        protocolFeatures: [
          .multiQueue, .replyAcknowledge, .mtu, .configureMemorySlots, .status, .resetDevice, .logInSharedMemory, .rarp,
          .inflightInSharedMemory,
        ],
        mtuBytesMax: mtuBytes))
  }

  /// Does what can be done now.
  func ready() {
    let hadFault = socket.hasMemoryFault
    carryOut(socket.ready(nowNanoseconds: MonotonicClock.now()))
    if hadFault { counts[.memoryFaults, default: 0] += 1 }
    guard socket.problem != problemTold else { return }
    problemTold = socket.problem
    if let problemTold {
      log.warning(
        "a guest's VMM is not there, will be retried", metadata: ["port": "\(name)", "why": "\(problemTold)"])
    }
  }

  /// Whether a report is about this port; then it is dealt with.
  func takes(_ report: Report) -> Bool {
    switch report {
    case .sourceClosed(let source):
      guard let number = queue(ofSource: source) else { return false }
      answered(number)
    case .laneClosed(let lane):
      guard let number = queue(ofLane: lane) else { return false }
      answered(number)
    case .sourceFailed(let source, let error):
      guard let number = queue(ofSource: source) else { return false }
      failed(number, error)
    case .laneFailed(let lane, let error):
      guard let number = queue(ofLane: lane) else { return false }
      failed(number, error)
    default: return false
    }
    return true
  }

  private func queue(ofSource source: Int) -> Int? {
    let number = source - place.sourceFirst
    guard queues.indices.contains(number) else { return nil }
    // Of each pair, first the ring that the guest transmits by.
    return number ^ 1
  }

  private func queue(ofLane lane: Int) -> Int? {
    let number = 2 * (lane - place.laneFirst)
    return queues.indices.contains(number) ? number : nil
  }

  private var isLogged: Bool { features.contains(.logAll) }

  private func source(ofQueue number: Int) -> Int { place.sourceFirst + (number ^ 1) }
  private func lane(ofQueue number: Int) -> Int { place.laneFirst + number / 2 }
  private func isFromGuest(_ number: Int) -> Bool { number % 2 == 1 }
  private func worker(ofQueue number: Int) -> WorkerThread {
    isFromGuest(number) ? place.receivers[number / 2] : place.transmitter
  }

  private func carryOut(_ effects: [VhostUserEffect]) {
    var effects = effects[...]
    while let effect = effects.popFirst() {
      effects += carryOut(effect)
    }
  }

  private func carryOut(_ effect: VhostUserEffect) -> [VhostUserEffect] {
    switch effect {
    case .connected:
      counts[.guestConnections, default: 0] += 1
      log.info("a guest is connected", metadata: ["port": "\(name)", "socket": "\(socket.path)"])
    case .disconnected:
      dirtyLog = nil
      movedHere = nil
      log.info("the guest is gone", metadata: ["port": "\(name)"])
    case .refused(let why):
      log.warning("what the guest's VMM asked for was refused", metadata: ["port": "\(name)", "why": "\(why)"])
    case .broken(let why):
      log.warning("the connection with a guest's VMM is closed", metadata: ["port": "\(name)", "why": "\(why)"])
    case .startQueue(let start):
      guard start.number < queues.count else { return [] }
      queues[start.number].parameters = Parameters(
        start: start, rings: start.rings, memory: start.memory, kick: start.kick, call: start.call,
        error: start.error, isEnabled: start.isEnabled, base: start.base.rawValue(start.kind),
        usedLogAddress: start.usedLogAddress)
      return settle(start.number)
    case .stopQueue(let number):
      queues[number].isStopping = true
      return settle(number)
    case .queueEnabled(let number, let isEnabled):
      queues[number].parameters?.isEnabled = isEnabled
      return settle(number)
    case .memoryChanged(let memory, let rings, let version):
      return change(version) { number, parameters in
        parameters.memory = memory
        if let moved = rings[number] { parameters.rings = moved }
      }
    case .kickChanged(let queue, let kick, let version):
      return change(version, of: queue) { $1.kick = kick }
    case .callChanged(let queue, let call, let version):
      return change(version, of: queue) { $1.call = call }
    // The log belongs to the memory: a ring is lent with it, or without.
    case .featuresAgreed(let features, let version):
      let before = features.symmetricDifference(self.features)
      self.features = features
      announceAbilities()
      return change(version, of: before.contains(.logAll) ? nil : queues.count) { _, _ in }
    case .logChanged(let log, let version):
      dirtyLog = log
      return change(version, of: isLogged ? nil : queues.count) { _, _ in }
    case .usedLogChanged(let queue, let address, let version):
      return change(version, of: queue) { $1.usedLogAddress = address }
    case .errorChanged(let queue, let error, let version):
      queues[queue].parameters?.error = error
      return change(version, of: queues.count) { _, _ in }
    case .sendRARP(let guest):
      // QEMU asks several times, in case a frame gets lost.
      if movedHere != guest { log.info("a guest has moved here", metadata: ["port": "\(name)", "mac": "\(guest)"]) }
      movedHere = guest
      place.receivers[0].send(.announce(guest, interface: place.interface, domain: place.domain))
    case .mtuChanged, .reset: break
    }
    return []
  }

  /// Changes what rings are to be, one or all of those that run.
  private func change(
    _ version: UInt64, of only: Int? = nil, _ body: (Int, inout Parameters) -> Void
  ) -> [VhostUserEffect] {
    self.version = version
    var effects: [VhostUserEffect] = []
    for number in queues.indices where only == nil || only == number {
      guard var parameters = queues[number].parameters else { continue }
      body(number, &parameters)
      queues[number].parameters = parameters
      queues[number].isStale = queues[number].lent != nil
      effects += settle(number)
    }
    return effects + adoptIfAll()
  }

  /// Brings a ring nearer to what it is to be.
  private func settle(_ number: Int) -> [VhostUserEffect] {
    let queue = queues[number]
    if queue.isLeaving { return [] }
    if let lent = queue.lent {
      if !queue.isWanted || queue.isStale { takeBack(number, lent) }
      return []
    }
    if queue.isStopping {
      queues[number].isStopping = false
      guard let parameters = queue.parameters else { return [] }
      queues[number].parameters = nil
      let kind = parameters.start.kind
      guard let base = VhostUserQueueBase(rawValue: parameters.base, kind) else { return [] }
      return socket.queueStopped(number, base: base, nowNanoseconds: MonotonicClock.now())
    }
    if queue.isWanted { lend(number) }
    return []
  }

  private func lend(_ number: Int) {
    guard let parameters = queues[number].parameters else { return }
    guard parameters.start.features.headerBytes == OffloadHeader.bytes else {
      return refuse(number, "its driver is from before virtio 1.0 and merges no receive buffers")
    }
    guard let ring = makeRing(parameters, number) else {
      return refuse(
        number, "its rings do not lie in the memory that the VMM shares, or its in-flight memory is not aligned")
    }
    queues[number].isStale = false
    queues[number].lent = Lent(
      ring: ring, memory: parameters.memory, dirtyLog: dirtyLog, kick: parameters.kick, call: parameters.call,
      inflight: parameters.start.inflight?.memory)
    let worker = worker(ofQueue: number)
    if isFromGuest(number) {
      worker.send(
        .openGuestSource(
          source(ofQueue: number), interface: place.interface, domain: place.domain, ring.reference), wakes: false)
    } else {
      worker.send(
        .openGuestLane(lane(ofQueue: number), interface: place.interface, ring.reference), wakes: false)
      if ring.kick >= 0 {
        worker.send(
          .openSource(
            source(ofQueue: number), .waker, interface: place.interface, domain: place.domain, descriptor: ring.kick),
          wakes: false)
      }
    }
    announceAbilities()
    worker.wake()
    log.debug("a ring runs", metadata: ["port": "\(name)", "queue": "\(number)", "size": "\(parameters.start.size)"])
  }

  private func takeBack(_ number: Int, _ lent: Lent) {
    var lent = lent
    lent.answersLeft = 1
    queues[number].lent = lent
    announceAbilities()
    let worker = worker(ofQueue: number)
    if isFromGuest(number) {
      // Its frames may wait for a guest that takes nothing: this one is not to wait for that.
      place.frames[number / 2].memory.endWaiting()
      place.transmitter.send(.dropWaiting(isSecondOver: false))
      worker.send(.closeSource(source(ofQueue: number)), wakes: false)
    } else {
      worker.send(.closeLane(lane(ofQueue: number)), wakes: false)
      if lent.ring.kick >= 0 {
        worker.send(.closeSource(source(ofQueue: number)), wakes: false)
        lent.answersLeft = 2
      }
    }
    worker.wake()
    queues[number].lent = lent
  }

  private func answered(_ number: Int) {
    guard queues[number].isLeaving, let lent = queues[number].lent else { return }
    queues[number].lent?.answersLeft -= 1
    guard lent.answersLeft == 1 else { return }
    queues[number].parameters?.base = lent.ring.base
    queues[number].lent = nil
    // What is not lent again, as the frontend turned it off, is not of before either.
    queues[number].isStale = false
    carryOut(settle(number))
    carryOut(adoptIfAll())
  }

  /// The guest broke the rules of the ring. It stays stopped until the frontend starts it again.
  private func failed(_ number: Int, _ error: Int32) {
    guard let lent = queues[number].lent else { return }
    counts[.ringFaults, default: 0] += 1
    log.warning(
      "a guest's ring makes no sense and is not served any more",
      metadata: ["port": "\(name)", "queue": "\(number)", "why": "\(SystemError.text(error))"])
    queues[number].parameters?.isEnabled = false
    queues[number].parameters?.error?.signal()
    // It is told once more when the worker answers.
    if queues[number].isLeaving { return }
    guard isFromGuest(number) else {
      // A lane is still to be closed, and so are its kicks.
      carryOut(settle(number))
      return
    }
    // The worker let go of a source by itself.
    queues[number].parameters?.base = lent.ring.base
    queues[number].lent = nil
    queues[number].isStale = false
    announceAbilities()
    carryOut(settle(number))
    carryOut(adoptIfAll())
  }

  private func refuse(_ number: Int, _ why: String) {
    log.warning(
      "a guest's ring is not served", metadata: ["port": "\(name)", "queue": "\(number)", "why": "\(why)"])
    queues[number].parameters?.isEnabled = false
  }

  private func announceAbilities() {
    let pairs = queues.indices.filter { !isFromGuest($0) }
    let abilities = Abilities(
      laneCount: pairs.prefix { queues[$0].lent != nil && !queues[$0].isLeaving }.count,
      takesTCPSuperFrames: features.isSuperset(of: [.guestChecksum, .guestTSO4, .guestTSO6]),
      takesUDPSuperFrames: features.isSuperset(of: [.guestChecksum, .guestUSO4, .guestUSO6]))
    guard abilities != self.abilities else { return }
    self.abilities = abilities
    announce(abilities)
  }

  /// Tells that a change is in force, when no worker has anything of before.
  private func adoptIfAll() -> [VhostUserEffect] {
    guard let version, !queues.contains(where: { $0.isLeaving || $0.isStale }) else { return [] }
    self.version = nil
    return socket.adopted(version: version, nowNanoseconds: MonotonicClock.now())
  }

  private func makeRing(_ parameters: Parameters, _ number: Int) -> GuestRing? {
    let start = parameters.start
    let features = VirtqueueFeatures(rawValue: start.features.rawValue)
    let bytes =
      start.kind == .split
      ? SplitQueue.areaBytes(size: start.size, features: features)
      : PackedQueue.areaBytes(size: start.size, features: features)
    let memory = parameters.memory
    guard
      let descriptor = unsafe memory.pointer(guest: parameters.rings.descriptors, byteCount: bytes.descriptor),
      let driver = unsafe memory.pointer(guest: parameters.rings.available, byteCount: bytes.driver),
      let device = unsafe memory.pointer(guest: parameters.rings.used, byteCount: bytes.device)
    else { return nil }
    let regions = memory.regions.map { region in
      unsafe GuestMemory.Region(
        guestAddress: region.guestAddress, userAddress: region.userAddress, bytes: region.byteCount,
        mapping: region.mapping.base)
    }
    let log = isLogged ? dirtyLog.map { unsafe DirtyLog(base: $0.mapping.base, bytes: $0.mapping.byteCount) } : nil
    guard let table = try? GuestMemory(regions, log: log) else { return nil }
    let inFlight = unsafe start.inflight.map { unsafe $0.memory.mapping.base + $0.part.lowerBound }
    guard Int(bitPattern: inFlight) % 8 == 0 else { return nil }
    return unsafe GuestRing(
      VirtqueueAreas(size: start.size, descriptor: descriptor, driver: driver, device: device), features: features,
      base: parameters.base, mergesBuffers: start.features.contains(.mergeableReceiveBuffers),
      frames: isFromGuest(number) ? place.frames[number / 2] : nil, memory: table, kick: parameters.kick?.number ?? -1,
      call: parameters.call?.number ?? -1,
      logAddresses: parameters.usedLogAddress.map {
        VirtqueueLogAddresses(descriptor: parameters.rings.descriptors, device: $0)
      }, inFlight: inFlight)
  }
}
