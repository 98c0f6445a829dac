import Datapath

/// Which number everything of a configuration has at the workers, and which worker does what: pure.
///
/// - Interfaces: the ports in order, then the links.
/// - Sources, the same at each worker: control's waker, the underlay's socket of each family and encapsulation, then
///   each queue of each port. Only receivers open any but the first and the kicks of guests' receive rings.
/// - Lanes, the same at each worker: one for each port (of a vhost-user port, for each pair of queues), then one for
///   each source port of each link. Only transmitters open any.
/// - Owners of foreign memory, from 1 on: one for each pair of queues of each vhost-user port.
struct Plan {
  let ports: [Configuration.Port]
  let links: [Configuration.Link]
  let domains: [Configuration.Domain]
  let routes: [Configuration.Route]
  let passthroughs: [Configuration.Passthrough]
  let families: [UnderlayAddress]
  /// Those that a link uses.
  let encapsulations: [Configuration.Encapsulation]
  let sourcePorts: Int
  /// `fused` or `pipeline`.
  let layout: Configuration.Layout
  /// Why this layout and these CPUs, for the log.
  let whyTheseWorkers: String
  private let workerSet: WorkerSet
  private let firstQueueSource: [Int]
  private let sourcesUsed: Int
  private let firstLane: [Int]
  private let portLanes: Int

  /// - Parameter allowed: the CPUs that this process may use, ascending.
  init(_ configuration: Configuration, allowed: [Int]) {
    ports = configuration.ports
    links = configuration.links
    domains = configuration.domains
    routes = configuration.routes
    passthroughs = configuration.passthroughs
    families = configuration.underlay.addresses
    let links = links
    encapsulations = Configuration.Encapsulation.allCases.filter { used in
      links.contains { $0.encapsulation == used }
    }
    sourcePorts = configuration.tuning.sourcePorts
    let choice = WorkerSet.choose(
      layout: configuration.tuning.layout, cpus: configuration.tuning.cpus, dispatch: configuration.tuning.dispatch,
      queuesMax: configuration.ports.map(\.queues).max() ?? 1,
      servesGuests: configuration.ports.contains { $0.kind == .vhostUser }, allowed: allowed)
    workerSet = choice.workers
    layout = choice.layout
    whyTheseWorkers = choice.why
    var next = 1 + families.count * encapsulations.count
    var first: [Int] = []
    for port in ports {
      first.append(next)
      next += port.kind == .vhostUser ? 2 * port.queues : port.queues
    }
    firstQueueSource = first
    var lanes = 0
    firstLane = ports.map { port in
      defer { lanes += port.kind == .vhostUser ? port.queues : 1 }
      return lanes
    }
    portLanes = lanes
    sourcesUsed = next
  }

  // MARK: Workers

  /// By number: the CPU that it is pinned to, and its stages.
  var workers: [WorkerSet.Member] { workerSet.workers }
  var workerCount: Int { workers.count }
  /// The numbers of the workers with a role.
  var receivers: [Int] { workerSet.receivers }
  var routers: [Int] { workerSet.routers }
  var transmitters: [Int] { workerSet.transmitters }

  /// The workers that route what a receiver takes: itself alone, or others over a ring each.
  func routers(ofReceiver receiver: Int) -> [Int] { workerSet.routers(ofReceiver: receiver) }
  /// The workers that send what a router routes: itself alone, or others over a ring each.
  func transmitters(ofRouter router: Int) -> [Int] { workerSet.transmitters(ofRouter: router) }

  /// The workers in the order that frames come to them: those that receive; those that route what others received;
  /// those that only send.
  var stages: [[Int]] {
    [
      receivers, routers.filter { !receivers.contains($0) },
      transmitters.filter { !receivers.contains($0) && !routers.contains($0) },
    ].filter { !$0.isEmpty }
  }

  // MARK: Indices

  func interface(port: Int) -> InterfaceIndex { InterfaceIndex(port) }
  func interface(link: Int) -> InterfaceIndex { InterfaceIndex(ports.count + link) }
  func domain(named name: String) -> DomainIndex { DomainIndex(domains.firstIndex { $0.name == name }!) }
  /// `.none` for an end of a passthrough.
  func domain(ofPort port: Int) -> DomainIndex { ports[port].domain.map(domain(named:)) ?? .none }
  /// The interface of a name in a route.
  func interface(named name: Configuration.InterfaceName) -> InterfaceIndex {
    switch name {
    case .port(let name): interface(port: ports.firstIndex { $0.name == name }!)
    case .link(let name): interface(link: links.firstIndex { $0.name == name }!)
    }
  }
  /// The port that a port is wired to; nil for a port of a domain.
  func partner(ofPort port: Int) -> Int? {
    let name = ports[port].name
    guard let pair = passthroughs.first(where: { $0.a == name || $0.b == name }) else { return nil }
    let other = pair.a == name ? pair.b : pair.a
    return ports.firstIndex { $0.name == other }
  }

  /// - Parameters:
  ///   - family: the place in `families`.
  ///   - encapsulation: the place in `encapsulations`.
  func source(family: Int, encapsulation: Int) -> Int { 1 + family * encapsulations.count + encapsulation }
  /// The places of a source of the underlay's; nil for the waker and for queues.
  func underlay(ofSource source: Int) -> (family: Int, encapsulation: Int)? {
    guard source >= 1, source <= families.count * encapsulations.count else { return nil }
    return ((source - 1) / encapsulations.count, (source - 1) % encapsulations.count)
  }
  /// A vhost-user port has two for a pair of queues: the ring that its guest transmits by, and the kicks of the other.
  func source(port: Int, queue: Int) -> Int { firstQueueSource[port] + queue }
  /// The port and the queue of a source; nil for the waker and the underlay.
  func queue(ofSource source: Int) -> (port: Int, queue: Int)? {
    guard let port = firstQueueSource.lastIndex(where: { $0 <= source }), source < sourcesUsed else { return nil }
    return (port, source - firstQueueSource[port])
  }

  func lane(port: Int) -> Int { firstLane[port] }
  func lane(link: Int, sourcePort: Int) -> Int { portLanes + link * sourcePorts + sourcePort }
  /// The port of a lane; nil for a link's.
  func port(ofLane lane: Int) -> Int? { lane < portLanes ? firstLane.lastIndex { $0 <= lane } : nil }

  /// The rings that guests transmit by, in the order of their owners.
  var guestRings: [(port: Int, pair: Int)] {
    ports.indices.filter { ports[$0].kind == .vhostUser }
      .flatMap { port in (0..<ports[port].queues).map { (port, $0) } }
  }
  /// The owner of the frames of a vhost-user port's first pair of queues; those of the others follow.
  func firstOwner(port: Int) -> Int { 1 + guestRings.firstIndex { $0.port == port }! }

  var interfaceCount: Int { ports.count + links.count }
  var sourceCount: Int { sourcesUsed }
  var laneCount: Int { portLanes + links.count * sourcePorts }

  // MARK: Who does what

  /// The worker that reads a queue, or takes what a guest transmits by a pair of queues: queues go round the receivers,
  /// and ports start at different ones.
  func reader(port: Int, queue: Int) -> Int { receivers[(port + queue) % receivers.count] }

  /// The queue that a transmitter writes a port's frames to: one that it reads where there is one, because the kernel
  /// steers a flow's answers to the queue that the flow was last written to.
  func writtenQueue(port: Int, worker: Int) -> Int {
    let queues = ports[port].queues
    if let own = (0..<queues).first(where: { reader(port: port, queue: $0) == worker }) { return own }
    return (transmitters.firstIndex(of: worker) ?? 0) % queues
  }

  // MARK: MTUs

  /// A port's MTU: what was asked for; a packet port's device's own; or what the underlay carries of the links of its
  /// domain without fragments, and the devices of packet ports there; the kernel's usual one where there is neither.
  /// - Parameter deviceMTUBytes: by port, of the packet ports whose device is there.
  func mtuBytes(port: Int, linkMTUBytes: [Int], deviceMTUBytes: [Int?] = []) -> Int {
    if let asked = ports[port].mtuBytes { return asked }
    let devices = deviceMTUBytes + [Int?](repeating: nil, count: ports.count - deviceMTUBytes.count)
    if let own = devices[port] { return own }
    let beside = ports.indices.filter { other in
      ports[port].domain.map { ports[other].domain == $0 } ?? (partner(ofPort: port) == other)
    }
    let limits = beside.compactMap { devices[$0] } + [carriedBytes(port: port, linkMTUBytes: linkMTUBytes)]
    return min(limits.compactMap { $0 }.min() ?? 1_500, TapDevice.mtuBytesMax)
  }

  /// What the links of a port's domain carry of its frames without fragments; nil in a domain without links.
  func carriedBytes(port: Int, linkMTUBytes: [Int]) -> Int? {
    guard let domain = ports[port].domain else { return nil }
    return links.indices.filter { links[$0].domains.contains(domain) }.map { linkMTUBytes[$0] }.min()
  }

  /// The longest payload of a frame that a link carries without fragments; 0 where the path carries none at all, for a
  /// route may say any MTU.
  /// - Parameter underlayMTUBytes: the MTU of the path to its other end.
  func mtuBytesWithoutFragments(link: Int, underlayMTUBytes: Int) -> Int {
    let link = links[link]
    return max(0, underlayMTUBytes - link.encapsulation.onTheWire.overheadBytes(isIPv4: link.remote.address.isIPv4))
  }

  /// The longest payload of a frame that a link carries at all.
  func mtuBytesMax(link: Int, underlayMTUBytes: Int) -> Int {
    links[link].fragments
      ? links[link].encapsulation.onTheWire.payloadBytesMax
      : mtuBytesWithoutFragments(link: link, underlayMTUBytes: underlayMTUBytes)
  }

  /// The address of this node that a link is sent from; nil where its family has none.
  func local(ofLink link: Int) -> UnderlayAddress? {
    families.first { $0.isIPv4 == links[link].remote.address.isIPv4 }
  }

  /// The MAC address of a device that is made for a port: locally administered, the same after a restart, and another
  /// on every node, because it is a hash of the node's name and addresses and of the port's name (FNV-1a, 64 bits).
  func mac(port: Int, node: String) -> MACAddress {
    let text = ([node] + families.map(\.description) + [ports[port].name]).joined(separator: "|")
    let hash = text.utf8.reduce(0xCBF2_9CE4_8422_2325 as UInt64) { ($0 ^ UInt64($1)) &* 0x0000_0100_0000_01B3 }
    return MACAddress(bits: 0x0200_0000_0000 | (hash ^ hash >> 40) & 0xFF_FFFF_FFFF)
  }

  /// The forwarding state of all of this.
  func snapshot(version: UInt64, tables: [MACTable], mtuBytes: [Int]) throws(Snapshot.Invalid) -> Snapshot {
    let interfaces =
      ports.indices.map { port in
        Snapshot.Interface(interface(port: port), kind(ofPort: port), mtuBytes: mtuBytes[port])
      }
      + links.indices.map { link in
        Snapshot.Interface(interface(link: link), kind(ofLink: link), mtuBytes: FrameMemory.payloadBytesMax)
      }
    return try Snapshot(
      version: version, interfaces: interfaces,
      domains: domains.indices.map { number in
        Snapshot.Domain(
          DomainIndex(number), vni: domains[number].vni, macs: tables[number], forwarding: forwarding(of: number),
          floodFramesPerSecondMax: domains[number].floodFramesPerSecondMax)
      })
  }

  private func forwarding(of number: Int) -> Snapshot.Domain.Forwarding {
    guard domains[number].forwarding == .routes else { return .learning }
    return .routes(
      routes.filter { $0.domain == domains[number].name }.map { route in
        VNETRoute(
          source: route.source, destination: route.destination,
          from: route.from.map { .interface(interface(named: $0)) } ?? .any, to: interface(named: route.to))
      })
  }

  private func kind(ofPort port: Int) -> Snapshot.Interface.Kind {
    if let partner = partner(ofPort: port) { return .passthrough(to: interface(port: partner)) }
    return .port(domain: domain(ofPort: port))
  }

  private func kind(ofLink number: Int) -> Snapshot.Interface.Kind {
    let link = links[number]
    return .link(
      peer: link.remote.address, domains: link.domains.map { domain(named: $0) },
      encapsulation: link.encapsulation.onTheWire, isRelay: link.isRelay, dropsReservedBits: link.reservedBits == .drop)
  }
}

extension Configuration.Encapsulation {
  /// The data path's word for it.
  var onTheWire: Encapsulation {
    switch self {
    case .vxlan: .vxlan
    case .vnetp: .vnetp
    }
  }
}
