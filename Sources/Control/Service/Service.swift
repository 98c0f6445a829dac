import CLinux
import Datapath
import Glibc
import Logging

/// How counters are printed.
public enum CountersFormat: String, CaseIterable, Sendable {
  case table
  case json
}

/// The forwarding service: it opens devices and sockets, starts workers and lends them what was opened, and looks after
/// all of it until it is told to stop. One thread, one loop; it never touches a worker's memory.
///
/// The way of a service:
/// 1. `init`: plan, sockets, devices. Whatever cannot be had is one line that says what to do, and nothing stays
///    behind.
/// 2. `startWorkers`: threads, each with its share of queues and sockets; then `ready`.
/// 3. `loop`: signals, reports of workers, and once a second what needs a clock: ageing, devices that went away.
/// 4. `stop`: workers send what waits and say goodbye; the table; the devices that were made go with their descriptors.
public final class Service {
  /// A command of the service ended in a state that it should not: the exit code is 1, the text was printed.
  public struct Failure: Error, CustomStringConvertible {
    public let description: String
  }

  /// Forwards until it is told to stop.
  /// - Throws: why it could not start, or that frames were lost without a name.
  public static func run(
    configuration: Configuration, countersFormat: CountersFormat, logger: Logger
  ) throws {
    let signals = try Signals([SIGTERM, SIGINT, SIGUSR1])
    Privileges.raiseOpenFiles()
    let service = try Service(configuration, countersFormat, logger, signals)
    try Privileges.drop()
    do {
      try service.startWorkers()
    } catch {
      service.abandonWorkers()
      throw error
    }
    try service.loop()
  }

  private let configuration: Configuration
  private let countersFormat: CountersFormat
  private let log: Logger
  private let signals: Signals
  private let plan: Plan
  private let waker: Int32
  private let notify: Notify
  private let tables: [MACTable]
  private let snapshot: Snapshot
  private var workers: [WorkerThread] = []
  private let startNanoseconds = MonotonicClock.now()

  private var underlaySockets: [UnderlayState] = []
  private var ports: [PortState] = []
  private var links: [LinkState] = []
  private var guests: [GuestPort] = []
  /// By owner, from 1 on: what the frames of a guest's ring lie in, which workers may use as long as they run.
  private var guestFrames: [ForeignMemory] = []
  /// Readable when memory that a guest shares was cut; where there are guests.
  private var faults: Int32?
  /// The longest payload that each link carries now.
  private var linkMTUBytesMax: [Int]
  /// What the kernel had counted before this service started.
  private let reassemblyFailuresBefore = UnderlaySocket.reassemblyFailures()
  /// Sources of the underlay's sockets whose receive failed, by worker: they are opened again at the next tick.
  private var deafSources: [(worker: Int, source: Int)] = []
  /// The workers that answered an audit since the last tick.
  private var answered: Set<Int> = []
  /// By worker: the counters of each interface and each domain.
  private var interfaceCounters: [[CounterBlock]] = []
  private var domainCounters: [[CounterBlock]] = []
  /// By domain: what control itself counts.
  private let controlCounters: [CounterBlock]

  private struct PortState {
    var device: PortDevice?
    var mtuBytes: Int
    /// Whether the device was made here: then it is made again when it went away, rather than waited for.
    var wasMade = false
    /// Answers of workers that are still to come before the descriptors can be closed.
    var closing = 0
    var isDown = false
    /// Of a vhost-user port.
    var guest = GuestPort.Abilities()
    /// Frames that the kernel dropped before a packet socket's worker took them.
    var receiveBufferDrops = 0
  }

  /// A socket that receives, of one receiver.
  private struct UnderlayState {
    let worker: Int
    let source: Int
    let kind: SourceKind
    let descriptor: Int32
  }

  private struct LinkState {
    /// By worker, then by source port; empty while there is no route to the other end.
    var sockets: [[Int32]] = []
    var problem: String?
  }

  // MARK: 1. What can be had before any worker runs

  private init(
    _ configuration: Configuration, _ countersFormat: CountersFormat, _ log: Logger, _ signals: Signals
  ) throws {
    self.configuration = configuration
    self.countersFormat = countersFormat
    self.log = log
    self.signals = signals
    notify = Notify(logger: log)
    for warning in configuration.warnings { log.warning("\(warning)") }
    plan = Plan(configuration, allowed: ProcessorSet.allowed())
    waker = try Waker.make()
    let deviceMTUBytes = try plan.families.map { address in
      guard let device = UnderlaySocket.device(of: address) else {
        throw PortError(
          doing: "use \(address) as the underlay's address", number: EADDRNOTAVAIL,
          reason: "no device of this host has it",
          remedy: "set underlay.address (or --address) to one that `ip address` shows")
      }
      return device.mtuBytes
    }
    let plan = plan
    let pathMTUBytes = plan.links.indices.map { link -> Int in
      guard let local = plan.local(ofLink: link), let family = plan.families.firstIndex(of: local) else { return 0 }
      // The route's, because the address may be a loopback one; the device's where there is no route yet.
      return UnderlaySocket.pathMTUBytes(from: local, to: plan.links[link].remote.address) ?? deviceMTUBytes[family]
    }
    let linkMTUBytes = plan.links.indices.map {
      plan.mtuBytesWithoutFragments(link: $0, underlayMTUBytes: pathMTUBytes[$0])
    }
    linkMTUBytesMax = plan.links.indices.map { plan.mtuBytesMax(link: $0, underlayMTUBytes: pathMTUBytes[$0]) }
    let deviceMTUs = plan.ports.map { $0.kind == .packet ? PacketDevice.mtuBytes(of: $0.device) : nil }
    let mtuBytes = plan.ports.indices.map {
      plan.mtuBytes(port: $0, linkMTUBytes: linkMTUBytes, deviceMTUBytes: deviceMTUs)
    }
    tables = configuration.domains.map { MACTable(macsMax: $0.macsMax) }
    controlCounters = configuration.domains.map { _ in CounterBlock() }
    snapshot = try plan.snapshot(version: 1, tables: tables, mtuBytes: mtuBytes)
    ports = mtuBytes.map { PortState(mtuBytes: $0) }
    for (port, bytes) in mtuBytes.enumerated() {
      guard plan.ports[port].kind == .tap,
        let carried = plan.carriedBytes(port: port, linkMTUBytes: linkMTUBytesMax), carried < bytes
      else {
        continue
      }
      log.warning(
        "the underlay carries less than the port's mtu: longer frames will be dropped at links (drop_too_big)",
        metadata: ["name": "\(plan.ports[port].name)", "mtu": "\(bytes)", "carried": "\(carried)"])
    }
    links = plan.links.map { _ in LinkState() }
    try openUnderlay()
    for port in plan.ports.indices where plan.ports[port].kind != .vhostUser { try openDevice(port) }
    for link in plan.links.indices {
      // What may pass is retried at every tick; what cannot is told now.
      if let error = openLink(link), !error.mayPass { throw error }
    }
  }

  private func openUnderlay() throws {
    let tuning = configuration.tuning
    for (family, address) in plan.families.enumerated() {
      for (number, configured) in plan.encapsulations.enumerated() {
        let udpPort = configuration.underlay.port(of: configured)
        // Alone first: with SO_REUSEPORT a second service would silently get a share of our datagrams.
        let isShared = plan.receivers.count > 1
        if isShared {
          close(
            try UnderlaySocket.receive(
              on: address, port: udpPort, encapsulation: configured.onTheWire, isShared: false, bufferBytes: 4_096))
        }
        for worker in plan.receivers {
          let descriptor = try UnderlaySocket.receive(
            on: address, port: udpPort, encapsulation: configured.onTheWire, isShared: isShared,
            bufferBytes: tuning.receiveBufferBytes, takesTrains: tuning.gro)
          underlaySockets.append(
            UnderlayState(
              worker: worker, source: plan.source(family: family, encapsulation: number),
              kind: configured == .vxlan ? .vxlan : .vnetp, descriptor: descriptor))
        }
      }
    }
  }

  private func makeDevice(
    _ port: Int, retries: Int = TapDevice.busyRetriesAtStart
  ) throws(PortError) -> PortDevice {
    let configured = plan.ports[port]
    switch configured.kind {
    case .tap:
      return .tap(
        try TapDevice.open(
          name: configured.device, queues: configured.queues, mtuBytes: ports[port].mtuBytes,
          mac: plan.mac(port: port, node: configuration.node.name), offloads: configured.offloads, retries: retries))
    case .packet: return .packet(try PacketDevice.open(name: configured.device, queues: configured.queues))
    case .vhostUser: preconditionFailure("a vhost-user port has no device")
    }
  }

  private func openDevice(_ port: Int) throws {
    let configured = plan.ports[port]
    let device: PortDevice
    do throws(PortError) {
      device = try makeDevice(port)
    } catch {
      // A packet port's device is somebody else's, who may make it later: a VMM its TAP, a driver its card.
      guard configured.kind == .packet, error.mayPass else { throw error }
      ports[port].isDown = true
      log.warning("port is down, will be retried", metadata: ["name": "\(configured.name)", "why": "\(error)"])
      return
    }
    ports[port].device = device
    ports[port].wasMade = device.wasMade
    for (what, why, remedy) in device.shortcomings(offloads: configured.offloads) {
      log.warning("\(what)", metadata: ["device": "\(configured.device)", "why": "\(why)", "remedy": "\(remedy)"])
    }
    log.info(
      "port",
      metadata: [
        "name": "\(configured.name)", "kind": "\(configured.kind)", "device": "\(configured.device)",
        "made": "\(device.wasMade)", "queues": "\(configured.queues)", "mtu": "\(ports[port].mtuBytes)",
      ])
    if configured.kind == .tap, !device.wasMade, let mtu = device.mtuBytes, mtu > ports[port].mtuBytes {
      log.warning(
        "the device's MTU is more than the port's: longer frames will be dropped (drop_too_big)",
        metadata: [
          "device": "\(configured.device)", "mtu": "\(mtu)",
          "remedy": "ip link set \(configured.device) mtu \(ports[port].mtuBytes)",
        ])
    }
  }

  /// Opens the sockets of a link, or remembers why not: a route may come later.
  @discardableResult
  private func openLink(_ link: Int) -> PortError? {
    let configured = plan.links[link]
    guard let local = plan.local(ofLink: link) else { return nil }
    var sockets: [[Int32]] = []
    do throws(PortError) {
      for worker in 0..<plan.workerCount {
        sockets.append([])
        for number in 0..<plan.sourcePorts where plan.transmitters.contains(worker) {
          let spread = worker * plan.sourcePorts + number
          sockets[worker].append(
            try UnderlaySocket.transmit(
              from: local, to: configured.remote.address, port: configured.remote.port, spread: spread,
              fragments: configured.fragments, bufferBytes: configuration.tuning.sendBufferBytes))
        }
      }
      links[link] = LinkState(sockets: sockets)
      log.info(
        "link", metadata: ["name": "\(configured.name)", "remote": "\(configured.remote)", "from": "\(local)"])
      return nil
    } catch {
      for descriptor in sockets.joined() { close(descriptor) }
      if links[link].problem == nil, error.mayPass {
        log.warning("link is down, will be retried", metadata: ["name": "\(configured.name)", "why": "\(error)"])
      }
      links[link].problem = error.description
      return error
    }
  }

  // MARK: 2. Workers

  private func startWorkers() throws {
    let tuning = configuration.tuning
    let cpus = plan.workers.map { plan.layout == .fused ? "\($0.cpu)" : "\($0.roles)=\($0.cpu)" }
    log.info(
      "workers",
      metadata: [
        "cpus": "\(cpus.joined(separator: " "))", "layout": "\(plan.layout)", "why": "\(plan.whyTheseWorkers)",
      ])
    let cutsTrains = UnderlaySocket.kernelCutsTrains()
    let formsTrains = tuning.gso && cutsTrains
    if tuning.gso && !cutsTrains && !plan.links.isEmpty {
      log.warning(
        "links send one datagram at a time", metadata: ["why": "this kernel has no UDP_SEGMENT, which came with 4.18"])
    }
    for (number, worker) in plan.workers.enumerated() {
      var settings = WorkerThread.Plan(number: number, cpu: worker.cpu)
      settings.ringEntries = tuning.ringEntries
      settings.slots = tuning.slots
      settings.without = tuning.without
      settings.io =
        switch tuning.io {
        case .auto: .auto
        case .uring: .uring
        case .syscalls: .syscalls
        }
      settings.worker.dispatch = tuning.dispatchSettings
      // At least half of the slots may wait for full sockets.
      settings.worker.postedSlots = max(1, min(tuning.batchFrames, tuning.slots / 2))
      settings.worker.epochNanoseconds = startNanoseconds
      settings.worker.sources = plan.sourceCount
      settings.worker.lanes = max(1, plan.laneCount)
      settings.worker.interfaces = plan.interfaceCount
      settings.worker.domains = plan.domains.count
      settings.worker.operations = max(tuning.slots * 8, WorkerThread.Plan.operationsMin)
      settings.worker.formsTrains = formsTrains
      let worker = try WorkerThread(settings, controlWaker: waker, snapshot: snapshot)
      workers.append(worker)
      interfaceCounters.append((0..<plan.interfaceCount).map { _ in CounterBlock() })
      domainCounters.append(plan.domains.map { _ in CounterBlock() })
      configure(worker)
    }
    var joining = Wiring.Settings()
    joining.slots = tuning.slots
    joining.hugePages = tuning.hugePages != .off
    joining.ringFrames = tuning.ringDepthFrames
    joining.batchFrames = tuning.ringBatchFrames
    guestFrames = plan.guestRings.map { _ in ForeignMemory(bufferCount: GuestRing.framesMax) }
    let shares = zip(plan.guestRings, guestFrames).map { ring, frames in
      FrameMemory.ForeignShare(frames, bringer: plan.reader(port: ring.port, queue: ring.pair))
    }
    var wiring = try Wiring(
      roles: plan.workers.map(\.roles), wakers: workers.map(\.waker), settings: joining, shares: shares)
    for (number, worker) in workers.enumerated() {
      if tuning.hugePages == .on && plan.receivers.contains(number) && !wiring.hasHugePages(number) {
        throw SystemError(ENOMEM, doing: "map the frame arena in huge pages")
      }
      try worker.start(joints: wiring.takeJoints(of: number), memory: wiring.makeMemory(of: number))
    }
    try awaitStart()
    try openGuests()
    answered = Set(workers.map(\.plan.number))
    log.info("ready")
    notify.ready()
  }

  /// Makes the sockets of vhost-user ports: what connects there finds workers that run.
  private func openGuests() throws {
    // Asked for before any memory is shared: from then on a cut file ends its port, and not this process.
    if !plan.guestRings.isEmpty { faults = try MappingFaults.event().number }
    for port in plan.ports.indices where plan.ports[port].kind == .vhostUser {
      precondition(plan.transmitters.count == 1, "a configuration with guests has one worker that sends")
      let firstOwner = plan.firstOwner(port: port)
      let place = GuestPort.Place(
        interface: plan.interface(port: port), domain: plan.domain(ofPort: port),
        sourceFirst: plan.source(port: port, queue: 0), laneFirst: plan.lane(port: port),
        frames: (0..<plan.ports[port].queues).map { pair in
          GuestRing.Frames(guestFrames[firstOwner + pair - 1], owner: firstOwner + pair)
        },
        receivers: (0..<plan.ports[port].queues).map { workers[plan.reader(port: port, queue: $0)] },
        transmitter: workers[plan.transmitters[0]])
      guests.append(
        try GuestPort(plan.ports[port], mtuBytes: ports[port].mtuBytes, place: place, log: log) {
          [unowned self] abilities in
          ports[port].guest = abilities
          for worker in workers {
            worker.send(
              .addInterface(plan.interface(port: port), record(ofPort: port, at: worker.plan.number)), wakes: true)
          }
        })
      log.info(
        "port",
        metadata: [
          "name": "\(plan.ports[port].name)", "kind": "\(plan.ports[port].kind.rawValue)",
          "socket": "\(plan.ports[port].socket)", "socket_mode": "\(plan.ports[port].socketMode)",
          "mtu": "\(ports[port].mtuBytes)",
        ])
    }
  }

  /// Everything that a worker must know before its first turn.
  private func configure(_ worker: WorkerThread) {
    let number = worker.plan.number
    for domain in plan.domains.indices {
      worker.send(.addDomain(DomainIndex(domain), domainCounters[number][domain].writer), wakes: false)
    }
    for port in plan.ports.indices {
      worker.send(.addInterface(plan.interface(port: port), record(ofPort: port, at: number)), wakes: false)
      lend(port, to: worker)
    }
    for link in plan.links.indices {
      worker.send(.addInterface(plan.interface(link: link), record(ofLink: link, at: number)), wakes: false)
      lendLink(link, to: worker)
    }
    for socket in underlaySockets where socket.worker == number { lend(socket) }
  }

  private func record(ofPort port: Int, at worker: Int) -> InterfaceRecord {
    let guest = plan.ports[port].kind == .vhostUser ? ports[port].guest : nil
    return InterfaceRecord(
      plan.ports[port].kind.record, laneFirst: plan.lane(port: port), laneCount: guest?.laneCount ?? 1,
      mtuBytes: ports[port].mtuBytes, takesSuperFrames: guest?.takesTCPSuperFrames ?? plan.ports[port].offloads,
      takesUDPSuperFrames: guest?.takesUDPSuperFrames ?? ports[port].device?.takesUDPSuperFrames ?? true,
      counters: interfaceCounters[worker][plan.interface(port: port).index].writer)
  }

  private func record(ofLink link: Int, at worker: Int) -> InterfaceRecord {
    InterfaceRecord(
      plan.links[link].encapsulation == .vxlan ? .vxlan : .vnetp, laneFirst: plan.lane(link: link, sourcePort: 0),
      laneCount: plan.sourcePorts, mtuBytes: linkMTUBytesMax[link],
      counters: interfaceCounters[worker][plan.interface(link: link).index].writer)
  }

  private func lend(_ socket: UnderlayState) {
    workers[socket.worker].send(
      .openSource(socket.source, socket.kind, interface: .none, domain: .none, descriptor: socket.descriptor),
      wakes: false)
  }

  private func lend(_ port: Int, to worker: WorkerThread) {
    guard let device = ports[port].device else { return }
    let number = worker.plan.number
    let interface = plan.interface(port: port)
    let domain = plan.domain(ofPort: port)
    let kind = plan.ports[port].kind
    if plan.transmitters.contains(number) {
      worker.send(
        .openLane(
          plan.lane(port: port), kind.lane, interface: interface,
          descriptor: device.queues[plan.writtenQueue(port: port, worker: number)]), wakes: false)
    }
    for queue in device.queues.indices where plan.reader(port: port, queue: queue) == number {
      worker.send(
        .openSource(
          plan.source(port: port, queue: queue), kind.source, interface: interface, domain: domain,
          descriptor: device.queues[queue]), wakes: false)
    }
  }

  private func lendLink(_ link: Int, to worker: WorkerThread) {
    guard !links[link].sockets.isEmpty else { return }
    let kind: LaneKind = plan.links[link].remote.address.isIPv4 ? .datagramIPv4 : .datagramIPv6
    for (sourcePort, descriptor) in links[link].sockets[worker.plan.number].enumerated() {
      worker.send(
        .openLane(
          plan.lane(link: link, sourcePort: sourcePort), kind, interface: plan.interface(link: link),
          descriptor: descriptor), wakes: false)
    }
  }

  private func awaitStart() throws {
    var isStarted = [Bool](repeating: false, count: workers.count)
    let deadline = MonotonicClock.now() + 10_000_000_000
    while !isStarted.allSatisfy({ $0 }) {
      waitForSomething(milliseconds: 100)
      guard MonotonicClock.now() < deadline else {
        throw Failure(
          description: "workers did not start within 10 s; see whether their CPUs are busy with real-time threads")
      }
      for worker in workers {
        guard let report = worker.nextReport() else { continue }
        switch report {
        case .started(let side, let hasHugePages):
          isStarted[worker.plan.number] = true
          logStart(worker, side, hasHugePages)
        case .couldNotStart(let error):
          let remedy =
            error == EPERM || error == EACCES
            ? "io_uring is forbidden here (kernel.io_uring_disabled, or a container's seccomp profile): allow it, or "
              + "set tuning.io to \"auto\" or \"syscalls\""
            : error == ENOMEM && configuration.tuning.hugePages == .on
              ? "free huge pages (sysctl vm.nr_hugepages) or set tuning.huge_pages = \"auto\""
              : error == EINVAL ? "see that CPU \(worker.plan.cpu) may be used" : "run vnetr doctor"
          throw PortError(doing: "start worker \(worker.plan.number)", number: error, remedy: remedy)
        default: handle(report, of: worker)
        }
      }
    }
  }

  /// Ends the workers that already run when another could not start: they use what this object holds.
  private func abandonWorkers() {
    for worker in workers where worker.isStarted { worker.send(.stop) }
    for worker in workers where worker.isStarted { worker.join() }
  }

  private func logStart(_ worker: WorkerThread, _ side: IOSide, _ hasHugePages: Bool) {
    let planned = plan.workers[worker.plan.number]
    var metadata: Logger.Metadata = ["worker": "\(worker.plan.number)", "cpu": "\(planned.cpu)"]
    if plan.layout == .pipeline { metadata["stages"] = "\(planned.roles)" }
    if planned.roles.contains(.receive) { metadata["huge_pages"] = "\(hasHugePages)" }
    switch side {
    case .uring(let features):
      metadata["io"] = "uring"
      let missing = UringFeatures.all.subtracting(UringFeatures(rawValue: features))
      if !missing.isEmpty { metadata["without"] = "\(missing)" }
    case .syscalls(let error):
      metadata["io"] = "syscalls"
      guard error != 0 else { break }
      log.warning(
        "io_uring cannot be used here: plain system calls do its work, at a higher cost for each frame",
        metadata: [
          "worker": "\(worker.plan.number)", "why": "\(SystemError.text(error))",
          "remedy": "see kernel.io_uring_disabled and the container's seccomp profile; vnetr doctor tells more",
        ])
    }
    log.info("worker runs", metadata: metadata)
  }

  // MARK: 3. The control loop

  private func loop() throws {
    // Once a second, or twice in the time that the service manager allows.
    let tickNanoseconds = min(1_000_000_000, UInt64(notify.watchdogMicroseconds ?? 2_000_000) * 500)
    var nextTick = MonotonicClock.now() + tickNanoseconds
    while true {
      let next = guests.compactMap(\.socket.retryAtNanoseconds).min().map { min($0, nextTick) } ?? nextTick
      let left = Int(next &- min(next, MonotonicClock.now())) / 1_000_000 + 1
      waitForSomething(milliseconds: Int32(clamping: left))
      while let signal = signals.next() {
        if signal == SIGUSR1 {
          print(report(audits: askForAudits()))
        } else {
          return try stop()
        }
      }
      for worker in workers {
        while let report = worker.nextReport() { handle(report, of: worker) }
      }
      for guest in guests { guest.ready() }
      guard MonotonicClock.now() >= nextTick else { continue }
      nextTick = MonotonicClock.now() + tickNanoseconds
      tick()
    }
  }

  /// Sleeps until a signal, a report or the time.
  private func waitForSomething(milliseconds: Int32) {
    var watched = [
      pollfd(fd: signals.descriptor, events: Int16(POLLIN), revents: 0),
      pollfd(fd: waker, events: Int16(POLLIN), revents: 0),
    ]
    for guest in guests {
      if let watch = guest.socket.watch {
        watched.append(pollfd(fd: watch.descriptor, events: watch.events, revents: 0))
      }
    }
    if let faults { watched.append(pollfd(fd: faults, events: Int16(POLLIN), revents: 0)) }
    guard unsafe poll(&watched, nfds_t(watched.count), milliseconds) > 0 else { return }
    // The guests' ports are asked next which of them it was.
    if faults != nil, watched[watched.count - 1].revents != 0 { MappingFaults.acknowledge() }
    guard watched[1].revents != 0 else { return }
    var count: UInt64 = 0
    _ = unsafe read(waker, &count, 8)
  }

  private func tick() {
    let seconds = UInt32(truncatingIfNeeded: (MonotonicClock.now() - startNanoseconds) / 1_000_000_000 + 1)
    for (index, table) in tables.enumerated() {
      let removed = table.sweep(
        nowSeconds: seconds, ageingSeconds: UInt32(configuration.domains[index].ageingSeconds))
      controlCounters[index].writer.add(.macsAged, removed)
    }
    for port in plan.ports.indices where ports[port].isDown && ports[port].closing == 0 { bringBack(port) }
    for (worker, source) in deafSources {
      for socket in underlaySockets where socket.worker == worker && socket.source == source { lend(socket) }
      workers[worker].wake()
    }
    deafSources = []
    for link in plan.links.indices where links[link].sockets.isEmpty {
      openLink(link)
      if !links[link].sockets.isEmpty {
        for worker in workers {
          lendLink(link, to: worker)
          worker.wake()
        }
      }
    }
    for link in plan.links.indices { followPathMTU(link) }
    if guests.contains(where: \.socket.isConnected) {
      // A ring that does not end at once because its frames wait ends by this.
      workers[plan.transmitters[0]].send(.dropWaiting(isSecondOver: true))
    }
    if notify.watchdogMicroseconds != nil { beat() }
  }

  /// What the path to a link's other end carries may change: a route does, or a router on the way told so (ICMP). The
  /// kernel remembers it for the destination; workers then drop what is too big before they send it.
  private func followPathMTU(_ link: Int) {
    let configured = plan.links[link]
    // A lookup of its own: what a socket remembers is only looked at again when it sends, which it may not any more.
    guard !configured.fragments, !links[link].sockets.isEmpty, let local = plan.local(ofLink: link),
      let path = UnderlaySocket.pathMTUBytes(from: local, to: configured.remote.address)
    else { return }
    let carried = plan.mtuBytesMax(link: link, underlayMTUBytes: path)
    guard carried != linkMTUBytesMax[link] else { return }
    let isLess = carried < linkMTUBytesMax[link]
    linkMTUBytesMax[link] = carried
    log.log(
      level: isLess ? .warning : .info,
      isLess
        ? "the path of a link carries less now: longer frames are dropped (drop_too_big)"
        : "the path of a link carries more now",
      metadata: ["name": "\(configured.name)", "mtu": "\(carried)"])
    for worker in workers where plan.transmitters.contains(worker.plan.number) {
      worker.send(.addInterface(plan.interface(link: link), record(ofLink: link, at: worker.plan.number)))
    }
  }

  /// Tells the service manager that this service lives, if every worker answered the audit of the last tick.
  private func beat() {
    if answered.count == workers.count { notify.watchdog() }
    answered = []
    for worker in workers { worker.send(.audit) }
  }

  private func handle(_ report: Report, of worker: WorkerThread) {
    if guests.contains(where: { $0.takes(report) }) { return }
    switch report {
    case .sourceFailed(let source, let error):
      guard let (port, _) = plan.queue(ofSource: source) else {
        log.error(
          "the underlay's socket failed, will be retried",
          metadata: ["worker": "\(worker.plan.number)", "why": "\(SystemError.text(error))"])
        deafSources.append((worker.plan.number, source))
        return
      }
      takeDown(port, error)
    case .laneFailed(let lane, let error):
      if let port = plan.port(ofLane: lane) { takeDown(port, error) }
    case .sourceClosed(let source):
      if let (port, _) = plan.queue(ofSource: source) { closed(port) }
    case .laneClosed(let lane):
      if let port = plan.port(ofLane: lane) { closed(port) }
    case .audited: answered.insert(worker.plan.number)
    case .couldNotStart, .started, .adopted, .drained, .stopped:
      log.debug("late report", metadata: ["report": "\(report)"])
    }
  }

  /// A device went away: every worker lets go of its queues; then they are closed, and it is tried again.
  private func takeDown(_ port: Int, _ error: Int32) {
    guard !ports[port].isDown else { return }
    ports[port].isDown = true
    log.warning(
      "port is down, will be retried",
      metadata: [
        "name": "\(plan.ports[port].name)",
        "why": error == EBADFD ? "the device is gone" : "\(SystemError.text(error))",
      ])
    for worker in workers {
      let number = worker.plan.number
      if plan.transmitters.contains(number) {
        worker.send(.closeLane(plan.lane(port: port)), wakes: false)
        ports[port].closing += 1
      }
      for queue in 0..<plan.ports[port].queues where plan.reader(port: port, queue: queue) == number {
        worker.send(.closeSource(plan.source(port: port, queue: queue)), wakes: false)
        ports[port].closing += 1
      }
      worker.wake()
    }
  }

  private func closed(_ port: Int) {
    guard ports[port].closing > 0 else { return }
    ports[port].closing -= 1
    guard ports[port].closing == 0 else { return }
    readDrops(port)
    ports[port].device?.close()
    ports[port].device = nil
    // Whoever was behind it may be elsewhere by now: frames to it are flooded until it is heard of.
    let domain = plan.domain(ofPort: port)
    if domain != .none { _ = tables[domain.index].removeAll(at: plan.interface(port: port)) }
  }

  /// What the kernel dropped before a packet socket's worker took it: reading sets it to zero there.
  private func readDrops(_ port: Int) {
    guard case .packet(let device) = ports[port].device else { return }
    for queue in device.queues { ports[port].receiveBufferDrops += PacketDevice.dropsSinceLastRead(queue) }
  }

  private func bringBack(_ port: Int) {
    let configured = plan.ports[port]
    // A device that somebody else made comes back by that somebody.
    guard unsafe ports[port].wasMade || if_nametoindex(configured.device) != 0 else { return }
    do throws(PortError) {
      // The next tick is the next try: this thread must not sleep.
      ports[port].device = try makeDevice(port, retries: 0)
    } catch {
      return log.debug("port stays down", metadata: ["name": "\(configured.name)", "why": "\(error)"])
    }
    ports[port].isDown = false
    if configured.kind == .packet, configured.mtuBytes == nil, let mtu = ports[port].device?.mtuBytes {
      ports[port].mtuBytes = mtu
    }
    for worker in workers {
      worker.send(
        .addInterface(plan.interface(port: port), record(ofPort: port, at: worker.plan.number)), wakes: false)
      lend(port, to: worker)
      worker.wake()
    }
    log.info("port is up again", metadata: ["name": "\(configured.name)", "device": "\(configured.device)"])
  }

  // MARK: 4. The end

  /// Workers send what waits, for a bounded time; a second signal ends it at once.
  private func stop() throws {
    log.info("stopping")
    notify.stopping()
    // What a worker hands on must find the next one at work; slots must come back before a receiver counts them.
    let stages = plan.stages.map { stage in stage.map { workers[$0] } }
    for stage in stages {
      for worker in stage { worker.send(.drain) }
      waitForReports(stage.count) { report, _ in if case .drained = report { true } else { false } }
    }
    var audits = [Audit](repeating: Audit(), count: workers.count)
    for stage in stages.reversed() {
      for worker in stage { worker.send(.stop) }
      waitForReports(stage.count) { report, worker in
        if case .audited(let audit) = report { audits[worker.plan.number] = audit }
        return if case .stopped = report { true } else { false }
      }
    }
    for worker in workers { worker.join() }
    let report = report(audits: audits)
    print(report)
    for port in ports { port.device?.close() }
    for socket in underlaySockets { close(socket.descriptor) }
    for link in links { for descriptor in link.sockets.joined() { close(descriptor) } }
    guard audits.allSatisfy(\.holds) else { throw Failure(description: "frames were lost without a name; see above") }
  }

  /// Waits until `count` reports are what `isIt` says; a second signal ends the process.
  private func waitForReports(_ count: Int, _ isIt: (Report, WorkerThread) -> Bool) {
    var left = count
    while left > 0 {
      waitForSomething(milliseconds: 100)
      if let signal = signals.next(), signal != SIGUSR1 {
        log.warning("stopped at once, by a second signal")
        exit(1)
      }
      for worker in workers {
        while let report = worker.nextReport() {
          if isIt(report, worker) { left -= 1 }
        }
      }
    }
  }

  // MARK: Counters

  /// Every worker's sums, each consistent in itself; waits for them, at most a second.
  private func askForAudits() -> [Audit?] {
    for worker in workers { worker.send(.audit) }
    var audits = [Audit?](repeating: nil, count: workers.count)
    let deadline = MonotonicClock.now() + 1_000_000_000
    while audits.contains(where: { $0 == nil }), MonotonicClock.now() < deadline {
      waitForSomething(milliseconds: 100)
      for worker in workers {
        while let report = worker.nextReport() {
          if case .audited(let audit) = report { audits[worker.plan.number] = audit }
          handle(report, of: worker)
        }
      }
    }
    return audits
  }

  private func report(audits: [Audit?]) -> String {
    var rows = [CounterReport.Row(.underlay, "", workers.map(\.underlayCounters))]
    let bufferDrops = underlaySockets.reduce(0) { $0 + UnderlaySocket.receiveBufferDrops($1.descriptor) }
    rows[0].values[Counter.receiveBufferDrops.rawValue] = UInt64(bufferDrops)
    let reassemblyFailures = UnderlaySocket.reassemblyFailures() - reassemblyFailuresBefore
    rows[0].values[Counter.reassemblyFailures.rawValue] = UInt64(max(0, reassemblyFailures))
    for (number, port) in plan.ports.enumerated() {
      var row = CounterReport.Row(
        .port, port.name, interfaceCounters.map { $0[plan.interface(port: number).index] })
      readDrops(number)
      row.values[Counter.receiveBufferDrops.rawValue] = UInt64(ports[number].receiveBufferDrops)
      for (counter, value) in guests.first(where: { $0.name == port.name })?.counts ?? [:] {
        row.values[counter.rawValue] = value
      }
      rows.append(row)
    }
    for (number, link) in plan.links.enumerated() {
      rows.append(.init(.link, link.name, interfaceCounters.map { $0[plan.interface(link: number).index] }))
    }
    for (number, domain) in plan.domains.enumerated() {
      rows.append(.init(.domain, domain.name, domainCounters.map { $0[number] } + [controlCounters[number]]))
    }
    for worker in workers { rows.append(.init(.worker, "\(worker.plan.number)", [worker.counters])) }
    let report = CounterReport(
      rows: rows, audits: audits, interfaceNames: plan.ports.map(\.name) + plan.links.map(\.name),
      domainNames: plan.domains.map(\.name))
    return report.text(countersFormat)
  }

  private func print(_ text: String) {
    var bytes = Array(text.utf8)[...]
    while !bytes.isEmpty {
      let written = unsafe bytes.withUnsafeBytes { unsafe write(STDOUT_FILENO, $0.baseAddress, $0.count) }
      guard written > 0 else { return }
      bytes = bytes.dropFirst(written)
    }
  }
}

extension Configuration.Tuning {
  var dispatchSettings: Dispatch.Settings {
    var settings = Dispatch.Settings()
    settings.mode =
      switch dispatch {
      case .adaptive: .adaptive
      case .guestDriven: .guestDriven
      case .vmmDriven: .vmmDriven
      }
    settings.yield =
      switch yield {
      case .adaptive: .adaptive
      case .immediate: .immediate
      case .timed: .timed
      case .never: .never
      }
    settings.upperFramesPerSecond = dispatchUpperFramesPerSecond
    settings.lowerFramesPerSecond = dispatchLowerFramesPerSecond
    settings.periodNanoseconds = UInt64(dispatchPeriodMilliseconds) * 1_000_000
    settings.spinNanoseconds = UInt64(spinMicroseconds) * 1_000
    settings.batchWaitNanoseconds = UInt64(batchWaitMicroseconds) * 1_000
    settings.batchFrames = batchFrames
    return settings
  }
}
