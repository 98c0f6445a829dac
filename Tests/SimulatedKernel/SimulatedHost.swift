import Glibc
import SimulatedKernel

@testable import Datapath

/// One host of a simulated network, as control would set it up: its workers, the tables that they share, and control's
/// end of their mailboxes.
final class SimulatedHost {
  /// What hosts are like; the same for all hosts of a run.
  struct Plan {
    var hosts = 2
    /// By worker; one that has all is of the fused layout.
    var roles: [Roles] = [.all]
    /// Descriptors that fit on a ring between workers; nil: as many as there are slots.
    var ringFrames: Int?
    /// Guests of each host in each domain.
    var guests = 1
    var domains = 1
    var workers: Int { roles.count }
    var receivers: [Int] { roles.indices.filter { roles[$0].contains(.receive) } }
    /// Source ports, and so lanes, of a link.
    var linkLanes = 2
    var slots = 64
    var posted = 16
    var operations = 128
    var isIPv6 = false
    /// VNET/P's links carry one domain.
    var encapsulation = Encapsulation.vxlan
    /// Links only between hosts of neighbouring numbers, which relay; otherwise between all.
    var isChain = false
    /// Domains, from the first on, in which rules decide, that say what learning would.
    var domainsWithRules = 0
    /// Whether each host has two more ports, wired to each other.
    var hasWire = false
    /// Whether each first guest of a domain, and of a wire, is behind a packet socket.
    var hasPacketPorts = false
    var dispatch = Dispatch.Settings()

    static let layouts: [[Roles]] = [
      [.all], [.all, .all],
      [.receive, .route, .transmit],
      [[.receive, .route], .transmit], [.receive, [.route, .transmit]],
      [.receive, .receive, .route, .transmit, .transmit], [.receive, .route, .route, .transmit],
      [[.receive, .transmit], .route], [[.receive, .transmit], [.receive, .transmit], .route],
      [[.receive, .route], [.route, .transmit], .receive, .transmit],
    ]

    static func mixture(_ random: inout SimulatedRandom) -> Plan {
      var plan = Plan()
      plan.hosts = random.number(in: 2...3)
      plan.roles = layouts[random.below(layouts.count)]
      plan.ringFrames = random.chance(0.3) ? random.number(in: 2...16) : nil
      plan.guests = random.number(in: 1...2)
      plan.domains = random.number(in: 1...2)
      plan.linkLanes = random.number(in: 1...3)
      plan.posted = random.number(in: 2...24)
      plan.slots = plan.posted + random.number(in: 1...64)
      plan.operations = random.number(in: 4...200)
      plan.isIPv6 = random.chance(0.3)
      if random.chance(0.2) {
        plan.encapsulation = .vnetp
        plan.domains = 1
      }
      plan.isChain = plan.hosts > 2 && random.chance(0.3)
      plan.domainsWithRules = random.chance(0.25) ? random.number(in: 1...plan.domains) : 0
      plan.hasWire = random.chance(0.15)
      plan.hasPacketPorts = random.chance(0.3)
      plan.dispatch.mode = [.guestDriven, .vmmDriven, .adaptive][random.below(3)]
      plan.dispatch.yield = [.immediate, .timed, .adaptive][random.below(3)]
      // Short against a run, so that adaptive dispatch changes its mind.
      plan.dispatch.periodNanoseconds = 200_000
      plan.dispatch.batchWaitNanoseconds = random.chance(0.3) ? 20_000 : 0
      return plan
    }

    func address(_ host: Int) -> UnderlayAddress {
      isIPv6
        ? UnderlayAddress(high: 0xFD00 << 48, low: UInt64(host + 1)) : UnderlayAddress(ipv4: 0x0A00_0001 + UInt32(host))
    }
    func vni(_ domain: Int) -> UInt32 { UInt32(42 + domain) }
    var underlayPort: UInt16 { encapsulation == .vxlan ? 4789 : VNETPFrame.portDefault }
    /// Ports that are in a domain: the first ones.
    var memberCount: Int { guests * domains }
    var portCount: Int { memberCount + (hasWire ? 2 : 0) }
    /// Nil for an end of a wire.
    func domain(ofPort port: Int) -> Int? { port < memberCount ? port % domains : nil }
    func index(ofDomainOfPort port: Int) -> DomainIndex { domain(ofPort: port).map { DomainIndex($0) } ?? .none }
    func port(ofGuest guest: Int, domain: Int) -> Int { guest * domains + domain }
    func isPacket(_ port: Int) -> Bool {
      hasPacketPorts && (port < memberCount ? port / domains == 0 : port == memberCount)
    }
    /// The other end of an end of a wire.
    func wire(ofPort port: Int) -> Int { port == memberCount ? port + 1 : memberCount }
    /// By number within the domain, the same in all: guests of host 0 first.
    func mac(ofGuest guest: Int, host: Int) -> UInt64 { 0x0200_0000_0001 + UInt64(host * guests + guest) }
    /// Hosts that a host has links to.
    func peers(of host: Int) -> [Int] { (0..<hosts).filter { isChain ? abs($0 - host) == 1 : $0 != host } }
    /// The link of `host` that leads to another.
    func link(of host: Int, towards other: Int) -> Int {
      let next = isChain ? host + (other - host).signum() : other
      return portCount + peers(of: host).firstIndex(of: next)!
    }
  }

  /// A worker and control's end of it.
  private final class Seat {
    var worker: Worker<SimulatedIO>
    let mailbox: Mailbox
    var commands: SPSCRing<Command>.Producer
    var reports: SPSCRing<Report>.Consumer
    let counters = CounterBlock()
    let underlay = CounterBlock()
    var isStopped = false
    var closingLanes: Set<Int> = []

    init(
      _ network: SimulatedNetwork, _ plan: Plan, _ view: SnapshotView, _ mailbox: Mailbox, _ wiring: inout Wiring,
      number: Int, links: Int
    ) {
      self.mailbox = mailbox
      network.addWaker(mailbox.workerWaker)
      commands = mailbox.commands.makeProducer()
      reports = mailbox.reports.makeConsumer()
      var settings = WorkerSettings()
      settings.dispatch = plan.dispatch
      settings.postedSlots = plan.posted
      settings.sources = 1 + plan.portCount + 1
      settings.lanes = plan.portCount + links * plan.linkLanes
      settings.interfaces = plan.portCount + links
      settings.domains = plan.domains
      settings.operations = plan.operations
      worker = Worker(
        io: SimulatedIO(network, chainFramesMax: 16), memory: wiring.makeMemory(of: number),
        joints: wiring.takeJoints(of: number), mailbox: mailbox, settings: settings, view: view,
        workerCounters: counters.writer, underlayCounters: underlay.writer)
    }
  }

  let plan: Plan
  let number: Int
  /// The device of each port.
  let devices: [Int]
  private let network: SimulatedNetwork
  private var seats: [Seat] = []
  private var tables: [MACTable] = []
  /// All that a worker may still use.
  private var snapshots: [Snapshot] = []
  private var descriptors: [Int32] = []
  /// Queues by port and receiver, sockets by receiver.
  private var queues: [[Int32]] = []
  private var receivers: [Int32] = []
  private var interfaceBlocks: [[CounterBlock]] = []
  private var domainBlocks: [[CounterBlock]] = []
  private(set) var reportsSeen: [String] = []

  init(_ network: SimulatedNetwork, _ plan: Plan, number: Int) throws {
    self.network = network
    self.plan = plan
    self.number = number
    devices = (0..<plan.portCount).map { _ in network.addDevice() }
    for domain in 0..<plan.domains { tables.append(MACTable(macsMax: 64, seed: UInt64(number * 7 + domain))) }
    snapshots = [try makeSnapshot(version: 1)]
    for port in 0..<plan.portCount {
      queues.append(plan.receivers.map { _ in open(network.openQueue(device: devices[port])) })
    }
    for _ in plan.receivers {
      receivers.append(open(network.openSocket(plan.address(number), port: plan.underlayPort)))
    }
    let mailboxes = try plan.roles.map { _ in try Mailbox(controlWaker: -1) }
    var joining = Wiring.Settings()
    joining.slots = plan.slots
    joining.hugePages = false
    joining.ringFrames = plan.ringFrames
    joining.batchFrames = 16
    var wiring = try Wiring(roles: plan.roles, wakers: mailboxes.map(\.workerWaker), settings: joining)
    for worker in plan.roles.indices {
      seats.append(
        Seat(network, plan, snapshots[0].view, mailboxes[worker], &wiring, number: worker, links: peers.count))
      interfaceBlocks.append((0..<plan.portCount + peers.count).map { _ in CounterBlock() })
      domainBlocks.append((0..<plan.domains).map { _ in CounterBlock() })
    }
    for worker in 0..<plan.workers { configure(worker) }
  }

  deinit {
    // Control's part: everything it lent is closed when nobody uses it any more.
    seats.removeAll()
    for descriptor in descriptors { network.close(descriptor) }
  }

  private func open(_ descriptor: Int32) -> Int32 {
    descriptors.append(descriptor)
    return descriptor
  }

  private var peers: [Int] { plan.peers(of: number) }

  private func makeSnapshot(version: UInt64) throws -> Snapshot {
    var interfaces: [Snapshot.Interface] = []
    for port in 0..<plan.portCount {
      let kind: Snapshot.Interface.Kind =
        if let domain = plan.domain(ofPort: port) {
          .port(domain: DomainIndex(domain))
        } else {
          .passthrough(to: InterfaceIndex(plan.wire(ofPort: port)))
        }
      interfaces.append(Snapshot.Interface(InterfaceIndex(port), kind, mtuBytes: 1450))
    }
    for (place, peer) in peers.enumerated() {
      interfaces.append(
        Snapshot.Interface(
          InterfaceIndex(plan.portCount + place),
          .link(
            peer: plan.address(peer), domains: (0..<plan.domains).map { DomainIndex($0) },
            encapsulation: plan.encapsulation, isRelay: plan.isChain), mtuBytes: 1450))
    }
    return try Snapshot(
      version: version, interfaces: interfaces,
      domains: (0..<plan.domains).map {
        Snapshot.Domain(
          DomainIndex($0), vni: plan.vni($0), macs: tables[$0],
          forwarding: $0 < plan.domainsWithRules ? .routes(rules(ofDomain: $0)) : .learning)
      })
  }

  /// What learning would come to: each guest's MAC to where it is; what is for all to the others, from a link to other
  /// links only in a chain.
  private func rules(ofDomain domain: Int) -> [VNETRoute] {
    var rules: [VNETRoute] = []
    for host in 0..<plan.hosts {
      for guest in 0..<plan.guests {
        let place = host == number ? plan.port(ofGuest: guest, domain: domain) : plan.link(of: number, towards: host)
        let mac = MACAddress(bits: plan.mac(ofGuest: guest, host: host))
        rules.append(VNETRoute(source: .any, destination: .exact(mac), to: InterfaceIndex(place)))
      }
    }
    let links = Set(plan.portCount..<plan.portCount + peers.count)
    let members = (0..<plan.guests).map { plan.port(ofGuest: $0, domain: domain) } + links.sorted()
    let all = MACPattern.exact(MACAddress(bits: NumberedFrame.broadcast))
    for from in members {
      for to in members where to != from && (plan.isChain || !links.contains(from) || !links.contains(to)) {
        rules.append(
          VNETRoute(source: .any, destination: all, from: .interface(InterfaceIndex(from)), to: InterfaceIndex(to)))
      }
    }
    return rules
  }

  private func configure(_ worker: Int) {
    for domain in 0..<plan.domains {
      send(.addDomain(DomainIndex(domain), domainBlocks[worker][domain].writer), to: worker)
    }
    for port in 0..<plan.portCount {
      let index = InterfaceIndex(port)
      let record = InterfaceRecord(
        plan.isPacket(port) ? .packet : .tap, laneFirst: port, laneCount: 1,
        counters: interfaceBlocks[worker][port].writer)
      send(.addInterface(index, record), to: worker)
      openLane(port, at: worker)
      openSource(port, at: worker)
    }
    for (place, peer) in peers.enumerated() {
      let index = InterfaceIndex(plan.portCount + place)
      let first = plan.portCount + place * plan.linkLanes
      let record = InterfaceRecord(
        plan.encapsulation == .vxlan ? .vxlan : .vnetp, laneFirst: first, laneCount: plan.linkLanes,
        counters: interfaceBlocks[worker][index.index].writer)
      send(.addInterface(index, record), to: worker)
      for lane in first..<first + plan.linkLanes where plan.roles[worker].contains(.transmit) {
        let socket = open(
          network.openSocket(plan.address(number), connectedTo: plan.address(peer), port: plan.underlayPort))
        let kind: LaneKind = plan.isIPv6 ? .datagramIPv6 : .datagramIPv4
        send(.openLane(lane, kind, interface: index, descriptor: socket), to: worker)
      }
    }
    openUnderlay(at: worker)
  }

  private func openUnderlay(at worker: Int) {
    guard let receiver = plan.receivers.firstIndex(of: worker) else { return }
    send(
      .openSource(
        1 + plan.portCount, plan.encapsulation == .vxlan ? .vxlan : .vnetp, interface: .none, domain: .none,
        descriptor: receivers[receiver]), to: worker)
  }

  private func openSource(_ port: Int, at worker: Int) {
    guard let receiver = plan.receivers.firstIndex(of: worker) else { return }
    send(
      .openSource(
        1 + port, plan.isPacket(port) ? .packet : .tap, interface: InterfaceIndex(port),
        domain: plan.index(ofDomainOfPort: port), descriptor: queues[port][receiver]), to: worker)
  }

  /// A worker writes to the queue that it reads, if it reads one.
  private func openLane(_ port: Int, at worker: Int) {
    guard plan.roles[worker].contains(.transmit) else { return }
    let queue = plan.receivers.firstIndex(of: worker) ?? worker % plan.receivers.count
    send(
      .openLane(
        port, plan.isPacket(port) ? .packet : .tap, interface: InterfaceIndex(port), descriptor: queues[port][queue]),
      to: worker)
  }

  private func send(_ command: Command, to worker: Int) {
    let isSent = seats[worker].commands.push(command)
    precondition(isSent, "the mailbox is full")
    network.wake(seats[worker].mailbox.workerWaker)
  }

  /// One turn of each worker, and what control does about their reports.
  func turn() throws {
    for (number, seat) in seats.enumerated() where !seat.isStopped {
      let goesOn = seat.worker.turn()
      if !goesOn { seat.isStopped = true }
      while let report = seat.reports.pop() {
        switch report {
        case .sourceFailed(let source, let error):
          reportsSeen.append("source \(error)")
          // A device that is still there is opened again; the underlay's socket always is.
          if source == 1 + plan.portCount {
            openUnderlay(at: number)
          } else if !network.isGone(device: devices[source - 1]) {
            openSource(source - 1, at: number)
          }
        case .laneFailed(let lane, let error):
          reportsSeen.append("lane \(error)")
          // Several chains may have failed before the worker reads the command: one close is enough.
          if seat.closingLanes.insert(lane).inserted { send(.closeLane(lane), to: number) }
        case .laneClosed(let lane) where !isStopping:
          seat.closingLanes.remove(lane)
          if lane < plan.portCount, !network.isGone(device: devices[lane]) { openLane(lane, at: number) }
        case .adopted(let version):
          adopted[number] = version
          try haveOthersAdopt()
          let oldest = adopted.min()!
          snapshots.removeAll { $0.version < oldest }
        case .drained: answered += 1
        default: break
        }
      }
    }
    if isStopping { drainFurther() }
  }

  private lazy var adopted = [UInt64](repeating: 1, count: plan.workers)
  /// The version that those who do not route were asked to adopt last.
  private var askedOthers: UInt64 = 1
  private var isStopping = false
  private var answered = 0
  /// What the drain is at: stages of workers to drain, then those to stop.
  private var toDrain: [[Int]] = []
  private var toStop: [[Int]] = []

  /// Publishes a new snapshot of the same state: nothing may be lost by it.
  func publish() throws {
    let snapshot = try makeSnapshot(version: snapshots.last!.version + 1)
    snapshots.append(snapshot)
    for worker in 0..<plan.workers where plan.roles[worker].contains(.route) { send(.adopt(snapshot.view), to: worker) }
  }

  /// Once every router has adopted a snapshot, all others may.
  private func haveOthersAdopt() throws {
    let routed = plan.roles.indices.filter { plan.roles[$0].contains(.route) }.map { adopted[$0] }.min()!
    guard routed > askedOthers, let snapshot = snapshots.first(where: { $0.version == routed }) else { return }
    askedOthers = routed
    for worker in 0..<plan.workers where !plan.roles[worker].contains(.route) {
      send(.adopt(snapshot.view), to: worker)
    }
  }

  /// Makes a guest's memory known to a worker; returns its owner number there.
  func adopt(_ foreign: ForeignMemory, at worker: Int = 0) -> Int { seats[worker].worker.adopt(foreign.reference) }

  /// Hands a worker a frame as a port does that polls a guest's memory.
  func bring(_ descriptor: Descriptor, at worker: Int = 0) { seats[worker].worker.bring(descriptor) }

  /// Tells the domain of the first port that a guest is there now.
  func announce(_ guest: MACAddress) {
    send(.announce(guest, interface: InterfaceIndex(0), domain: DomainIndex(0)), to: 0)
  }

  /// Receivers first, then routers, then transmitters; stopped the other way round.
  func drain() {
    isStopping = true
    let first: (Roles) -> Int = { $0.contains(.receive) ? 0 : $0.contains(.route) ? 1 : 2 }
    let stages = (0..<3).map { stage in plan.roles.indices.filter { first(plan.roles[$0]) == stage } }
      .filter { !$0.isEmpty }
    toDrain = stages
    toStop = stages.reversed()
    for worker in toDrain[0] { send(.drain, to: worker) }
  }

  private func drainFurther() {
    if let stage = toDrain.first, answered == stage.count {
      answered = 0
      toDrain.removeFirst()
      for worker in toDrain.first ?? toStop[0] { send(toDrain.isEmpty ? .stop : .drain, to: worker) }
    } else if toDrain.isEmpty, let stage = toStop.first, stage.allSatisfy({ seats[$0].isStopped }) {
      toStop.removeFirst()
      for worker in toStop.first ?? [] { send(.stop, to: worker) }
    }
  }

  var isStopped: Bool { seats.allSatisfy(\.isStopped) }
  func audits() -> [Audit] { seats.map { $0.worker.audit() } }
  /// Frames that wait or are out, and those on the rings between workers.
  var inFlight: Int {
    audits().reduce(0) { $0 + Int($1.inFlight) + Int($1.handedOn) - Int($1.takenOver) }
      + underlay(.handedOnFrames) - underlay(.takenOverFrames)
  }

  /// The sum of a counter over the workers and over the host's ports, its links, or its underlay.
  func ports(_ counter: Counter) -> Int { sum(counter, 0..<plan.portCount) }
  func links(_ counter: Counter) -> Int { sum(counter, plan.portCount..<plan.portCount + peers.count) }
  func underlay(_ counter: Counter) -> Int { seats.reduce(0) { $0 + Int($1.underlay.value(counter)) } }
  func workers(_ counter: Counter) -> Int { seats.reduce(0) { $0 + Int($1.counters.value(counter)) } }
  func domains(_ counter: Counter) -> Int {
    domainBlocks.reduce(0) { $0 + $1.reduce(0) { $0 + Int($1.value(counter)) } }
  }
  func port(_ port: Int, _ counter: Counter) -> Int { sum(counter, port..<port + 1) }
  private func sum(_ counter: Counter, _ range: Range<Int>) -> Int {
    interfaceBlocks.reduce(0) { sum, blocks in sum + range.reduce(0) { $0 + Int(blocks[$1].value(counter)) } }
  }
}
