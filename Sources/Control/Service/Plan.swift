import Datapath

/// Which number everything of a configuration has at the workers, and which worker does what: pure.
///
/// - Interfaces: the ports in order, then the links.
/// - Sources, the same at each worker: control's waker, the underlay's socket of each family, then each queue of
///   each port.
/// - Lanes, the same at each worker: one for each port, then one for each source port of each link.
struct Plan {
  let ports: [Configuration.Port]
  let links: [Configuration.Link]
  let domains: [Configuration.Domain]
  let families: [UnderlayAddress]
  let sourcePorts: Int
  let cpus: [Int]
  private let firstQueueSource: [Int]
  private let sourcesUsed: Int

  var workerCount: Int { cpus.count }

  init(_ configuration: Configuration, cpus: [Int]) {
    ports = configuration.ports
    links = configuration.links
    domains = configuration.domains
    families = configuration.underlay.addresses
    sourcePorts = configuration.tuning.sourcePorts
    self.cpus = cpus
    var next = 1 + families.count
    var first: [Int] = []
    for port in ports {
      first.append(next)
      next += port.queues
    }
    firstQueueSource = first
    sourcesUsed = next
  }

  // MARK: Indices

  func interface(port: Int) -> InterfaceIndex { InterfaceIndex(port) }
  func interface(link: Int) -> InterfaceIndex { InterfaceIndex(ports.count + link) }
  func domain(named name: String) -> DomainIndex { DomainIndex(domains.firstIndex { $0.name == name }!) }

  func source(family: Int) -> Int { 1 + family }
  /// The family of a source of the underlay's.
  func family(ofSource source: Int) -> Int { source - 1 }
  func source(port: Int, queue: Int) -> Int { firstQueueSource[port] + queue }
  /// The port and the queue of a source; nil for the waker and the underlay.
  func queue(ofSource source: Int) -> (port: Int, queue: Int)? {
    guard let port = firstQueueSource.lastIndex(where: { $0 <= source }), source < sourcesUsed else { return nil }
    return (port, source - firstQueueSource[port])
  }

  func lane(port: Int) -> Int { port }
  func lane(link: Int, sourcePort: Int) -> Int { ports.count + link * sourcePorts + sourcePort }
  /// The port of a lane; nil for a link's.
  func port(ofLane lane: Int) -> Int? { lane < ports.count ? lane : nil }

  var interfaceCount: Int { ports.count + links.count }
  var sourceCount: Int { sourcesUsed }
  var laneCount: Int { ports.count + links.count * sourcePorts }

  // MARK: Who does what

  /// The worker that reads a queue: queues go round the workers, and ports start at different ones.
  func reader(port: Int, queue: Int) -> Int { (port + queue) % workerCount }

  /// The queue that a worker writes a port's frames to: one that it reads where there is one, because the kernel steers
  /// a flow's answers to the queue that the flow was last written to.
  func writtenQueue(port: Int, worker: Int) -> Int {
    let queues = ports[port].queues
    return (0..<queues).first { reader(port: port, queue: $0) == worker } ?? worker % queues
  }

  /// The CPUs of the workers: those asked for, or as many of the last allowed ones as the port with the most queues can
  /// use. The first CPU comes last: the kernel's housekeeping is there.
  static func chooseCPUs(_ configuration: Configuration, allowed: [Int]) throws(PortError) -> (cpus: [Int], why: String)
  {
    if let asked = configuration.tuning.cpus {
      let missing = asked.filter { !allowed.contains($0) }
      guard missing.isEmpty else {
        throw PortError(
          doing: "pin workers to CPU \(missing.map(String.init).joined(separator: ", "))", number: 0,
          reason: "this process may use only \(allowed.map(String.init).joined(separator: ", "))",
          remedy: "set tuning.cpus to some of those")
      }
      return (asked, "as asked")
    }
    let queues = configuration.ports.map(\.queues).max() ?? 1
    let count = max(1, min(queues, allowed.count))
    return (
      Array(allowed.suffix(count)),
      count == 1 ? "one worker, no port has several queues" : "one worker for each of \(count) queues"
    )
  }

  /// A port's MTU: what was asked for, or what the underlay carries of the links of its domain without fragments; the
  /// kernel's usual one in a domain without links.
  func mtuBytes(port: Int, linkMTUBytes: [Int]) -> Int {
    ports[port].mtuBytes ?? carriedBytes(port: port, linkMTUBytes: linkMTUBytes) ?? 1_500
  }

  /// What the links of a port's domain carry of its frames without fragments; nil in a domain without links.
  func carriedBytes(port: Int, linkMTUBytes: [Int]) -> Int? {
    links.indices.filter { links[$0].domains.contains(ports[port].domain) }.map { linkMTUBytes[$0] }.min()
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
    var interfaces: [Snapshot.Interface] = []
    for (number, port) in ports.enumerated() {
      interfaces.append(
        Snapshot.Interface(
          interface(port: number), .port(domain: domain(named: port.domain)), mtuBytes: mtuBytes[number]))
    }
    for (number, link) in links.enumerated() {
      interfaces.append(
        Snapshot.Interface(
          interface(link: number),
          .link(
            peer: link.remote.address, domains: link.domains.map { domain(named: $0) },
            dropsReservedBits: link.reservedBits == .drop),
          mtuBytes: FrameMemory.payloadBytesMax))
    }
    return try Snapshot(
      version: version, interfaces: interfaces,
      domains: domains.enumerated().map { Snapshot.Domain(DomainIndex($0), vni: $1.vni, macs: tables[$0]) })
  }
}
