/// The forwarding state of one moment: which ports and links there are, what domains they belong to, and which peers
/// may send. Immutable.
///
/// Control makes one for every change and publishes it; workers adopt its `view` between batches; control lets the old
/// one go when all of them have. The MAC tables are not of the moment: the same table goes from one snapshot to the
/// next.
public final class Snapshot: Sendable {
  /// A port or a link.
  public struct Interface: Sendable {
    public enum Kind: Sendable {
      case port(domain: DomainIndex)
      /// A port that is wired to another: what comes in by the one leaves by the other, unseen. Both say so, and
      /// neither is in a domain.
      case passthrough(to: InterfaceIndex)
      /// - domains: any number for VXLAN; exactly one for VNET/P, whose frames bear no VNI.
      /// - isRelay: frames from it may leave by other links. Links should then form a tree: in a ring frames go round,
      ///   until their MACs freeze (`MACTable`) or floods meet their limit.
      /// - dropsReservedBits: drop datagrams with a reserved VXLAN bit set, as Linux does; RFC 7348 section 5
      ///   ignores them.
      case link(
        peer: UnderlayAddress, domains: [DomainIndex], encapsulation: Encapsulation = .vxlan, isRelay: Bool = false,
        dropsReservedBits: Bool = false)
    }
    public let index: InterfaceIndex
    public let kind: Kind
    /// The longest payload of a frame, without its Ethernet header.
    public let mtuBytes: Int

    public init(_ index: InterfaceIndex, _ kind: Kind, mtuBytes: Int) {
      self.index = index
      self.kind = kind
      self.mtuBytes = mtuBytes
    }
  }

  /// An isolated Ethernet.
  public struct Domain: Sendable {
    public enum Forwarding: Sendable {
      /// Addresses are learned; what is unknown floods.
      case learning
      /// These rules alone decide; nothing is learned.
      case routes([VNETRoute])
    }
    public let index: DomainIndex
    /// 24 bits (RFC 7348 section 5).
    public let vni: UInt32
    public let macs: MACTable
    public let forwarding: Forwarding
    /// How many frames a second each worker may flood, or send to several places by rules; 0: as many as come.
    public let floodFramesPerSecondMax: Int

    /// - Parameter macs: stays empty in a domain with rules.
    public init(
      _ index: DomainIndex, vni: UInt32, macs: MACTable, forwarding: Forwarding = .learning,
      floodFramesPerSecondMax: Int = 0
    ) {
      self.index = index
      self.vni = vni
      self.macs = macs
      self.forwarding = forwarding
      self.floodFramesPerSecondMax = floodFramesPerSecondMax
    }
  }

  /// What makes a set of interfaces and domains unfit to forward by. Control refuses such configurations before, with
  /// a better text; this is the last line.
  public enum Invalid: Error, Hashable {
    case interfaceTwice(InterfaceIndex)
    case domainTwice(DomainIndex)
    case vniTwice(UInt32)
    case vniOutOfRange(UInt32)
    /// An interface names a domain that is not there, or no interface or domain at all (`.none`).
    case dangling(InterfaceIndex, DomainIndex)
    /// A link names a domain twice.
    case membershipTwice(InterfaceIndex, DomainIndex)
    /// Two links to one peer carry the same domain: what comes from the peer would have two links. So would two VNET/P
    /// links to one peer whatever their domains. A VXLAN and a VNET/P link are told apart, but in a domain that learns
    /// the peer would get every flood twice; where rules decide, both may be.
    case ambiguousPeer(UnderlayAddress, vni: UInt32)
    /// A VNET/P link that does not carry exactly one domain.
    case vnetpDomains(InterfaceIndex, count: Int)
    /// A passthrough port whose other end is not wired back to it, or is itself.
    case wireNotMutual(InterfaceIndex)
    /// A rule that could never fire (`VNETRoute.score`).
    case routeWithoutScore(VNETRoute, DomainIndex)
    /// A rule from or to an interface that does not belong to its domain.
    case danglingRoute(VNETRoute, DomainIndex)
    case mtuOutOfRange(InterfaceIndex)
  }

  /// Counts the snapshots of one forwarder up; for `show` and for tests.
  public let version: UInt64
  /// For per-frame use; valid as long as the snapshot lives.
  public let view: SnapshotView

  // Owned here, read through `view`.
  private let interfaces: FixedArray<SnapshotView.InterfaceEntry>
  private let domains: FixedArray<SnapshotView.DomainEntry>
  private let members: FixedArray<InterfaceIndex>
  private let peers: FixedArray<SnapshotView.PeerEntry>
  private let carriers: FixedArray<SnapshotView.PairEntry>
  private let memberships: FixedArray<SnapshotView.PairEntry>
  private let contents: FixedArray<SnapshotView.Contents>
  private let routes: RouteTable
  private let tables: [MACTable]

  public init(version: UInt64, interfaces: [Interface], domains: [Domain]) throws(Invalid) {
    self.version = version
    tables = domains.map(\.macs)

    // Domains by index, dense; an index that is not in use has no table.
    let domainCount = (domains.map(\.index.index).max() ?? 0) + 1
    var domainTable = FixedArray(repeating: SnapshotView.DomainEntry(), count: domainCount)
    var vnis: Set<UInt32> = []
    for domain in domains {
      guard domain.index != .none else { throw .dangling(.none, .none) }
      guard domain.vni < 1 << 24 else { throw .vniOutOfRange(domain.vni) }
      guard domainTable[domain.index.index].macs == nil else { throw .domainTwice(domain.index) }
      guard vnis.insert(domain.vni).inserted else { throw .vniTwice(domain.vni) }
      domainTable[domain.index.index].vni = domain.vni
      domainTable[domain.index.index].macs = domain.macs.reference
      domainTable[domain.index.index].floodLimit = FloodLimit(framesPerSecondMax: domain.floodFramesPerSecondMax)
      if case .routes = domain.forwarding { domainTable[domain.index.index].isRouted = true }
    }

    // Interfaces by index, and the members of each domain.
    let interfaceCount = (interfaces.map(\.index.index).max() ?? 0) + 1
    var interfaceTable = FixedArray(repeating: SnapshotView.InterfaceEntry(), count: interfaceCount)
    var ports = [[InterfaceIndex]](repeating: [], count: domainCount)
    var links = [[InterfaceIndex]](repeating: [], count: domainCount)
    var peerNumbers: [UnderlayAddress: UInt32] = [:]
    var linkDomains: [LinkDomain] = []
    let domainsThere = Set(domains.map(\.index))
    for interface in interfaces.sorted(by: { $0.index.rawValue < $1.index.rawValue }) {
      let index = interface.index
      guard index != .none else { throw .dangling(.none, .none) }
      guard interfaceTable[index.index].kind == .absent else { throw .interfaceTwice(index) }
      guard interface.mtuBytes >= 0, interface.mtuBytes <= Int(UInt32.max) else { throw .mtuOutOfRange(index) }
      var entry = SnapshotView.InterfaceEntry()
      entry.mtuBytes = UInt32(interface.mtuBytes)
      switch interface.kind {
      case .port(let domain):
        guard domainsThere.contains(domain) else { throw .dangling(index, domain) }
        entry.kind = .port
        entry.domain = domain
        ports[domain.index].append(index)
      case .passthrough(let end):
        entry.kind = .passthrough
        entry.wire = end
      case .link(let peer, let carried, let encapsulation, let isRelay, let dropsReservedBits):
        entry.kind = .link
        entry.isRelay = isRelay
        entry.dropsReservedBits = dropsReservedBits
        let peerNumber = peerNumbers[peer] ?? UInt32(peerNumbers.count)
        peerNumbers[peer] = peerNumber
        for domain in carried {
          guard domainsThere.contains(domain) else { throw .dangling(index, domain) }
          guard links[domain.index].last != index else { throw .membershipTwice(index, domain) }
          links[domain.index].append(index)
          linkDomains.append(
            LinkDomain(link: index, domain: domain, peer: peer, peerNumber: peerNumber, encapsulation: encapsulation))
        }
        if encapsulation == .vnetp && carried.count != 1 { throw .vnetpDomains(index, count: carried.count) }
      }
      interfaceTable[index.index] = entry
    }
    for interface in interfaces {
      guard case .passthrough(let end) = interface.kind else { continue }
      let isMutual = end.index < interfaceCount && interfaceTable[end.index].wire == interface.index
      guard isMutual, end != interface.index else { throw .wireNotMutual(interface.index) }
    }

    // Flood members: for each domain its ports, then its links, so that either and both are one range.
    var memberTable = FixedArray(
      repeating: InterfaceIndex.none, count: max(1, ports.joined().count + links.joined().count))
    var next = 0
    for domain in 0..<domainCount {
      domainTable[domain].membersStart = UInt32(next)
      domainTable[domain].portCount = UInt32(ports[domain].count)
      domainTable[domain].linkCount = UInt32(links[domain].count)
      for member in ports[domain] + links[domain] {
        memberTable[next] = member
        next += 1
      }
    }

    // What comes from the underlay: address → peer, (peer, VNI) → link and domain. And (link, domain): is it a member?
    var peerTable = FixedArray(
      repeating: SnapshotView.PeerEntry(), count: SnapshotView.slotCount(peerNumbers.count))
    for (address, number) in peerNumbers {
      var slot = SnapshotView.hash(address) & (peerTable.count - 1)
      while peerTable[slot].isUsed { slot = (slot + 1) & (peerTable.count - 1) }
      peerTable[slot] = SnapshotView.PeerEntry(address: address, number: number, isUsed: true)
    }
    var carrierTable = FixedArray(
      repeating: SnapshotView.PairEntry(), count: SnapshotView.slotCount(linkDomains.count))
    var membershipTable = FixedArray(
      repeating: SnapshotView.PairEntry(), count: SnapshotView.slotCount(linkDomains.count))
    var peersOfLearning: Set<[UInt32]> = []
    for entry in linkDomains {
      let (link, domain) = (entry.link, entry.domain)
      let vni = domainTable[domain.index].vni
      let carrier = SnapshotView.PairEntry(
        key: SnapshotView.carrierKey(entry.peerNumber, entry.encapsulation, vni: vni), link: link, domain: domain)
      var isClear = Self.insert(carrier, into: &carrierTable)
      if !domainTable[domain.index].isRouted {
        isClear = peersOfLearning.insert([entry.peerNumber, UInt32(domain.rawValue)]).inserted && isClear
      }
      guard isClear else { throw .ambiguousPeer(entry.peer, vni: vni) }
      let membership = SnapshotView.PairEntry(
        key: SnapshotView.membershipKey(link, domain), link: link, domain: domain)
      let isNew = Self.insert(membership, into: &membershipTable)
      precondition(isNew, "a link is a member of a domain once")
    }

    // VNET rules.
    var rules: [(domain: DomainIndex, route: VNETRoute)] = []
    for domain in domains {
      guard case .routes(let routes) = domain.forwarding else { continue }
      let members = Set(ports[domain.index.index] + links[domain.index.index])
      for route in routes {
        guard let pattern = route.pattern else { throw .routeWithoutScore(route, domain.index) }
        let from = route.from.interface
        guard members.contains(route.to), from == .none || members.contains(from) else {
          throw .danglingRoute(route, domain.index)
        }
        domainTable[domain.index.index].routePatterns |= RouteTable.patternBit(pattern, isFromOne: from != .none)
        rules.append((domain.index, route))
      }
    }
    let routeTable = RouteTable(rules)

    let contents = SnapshotView.Contents(
      version: version, interfaces: interfaceTable.reference, domains: domainTable.reference,
      members: memberTable.reference, peers: peerTable.reference, carriers: carrierTable.reference,
      memberships: membershipTable.reference, routes: routeTable.view)
    self.contents = FixedArray(repeating: contents, count: 1)
    view = SnapshotView(contents: self.contents.reference)
    self.interfaces = interfaceTable
    self.domains = domainTable
    self.members = memberTable
    self.peers = peerTable
    carriers = carrierTable
    self.memberships = membershipTable
    routes = routeTable
  }

  private struct LinkDomain {
    let link: InterfaceIndex
    let domain: DomainIndex
    let peer: UnderlayAddress
    let peerNumber: UInt32
    let encapsulation: Encapsulation
  }

  /// False if the key is there already.
  private static func insert(
    _ entry: SnapshotView.PairEntry, into table: inout FixedArray<SnapshotView.PairEntry>
  ) -> Bool {
    var slot = SnapshotView.hash(entry.key) & (table.count - 1)
    while table[slot].key != 0 {
      if table[slot].key == entry.key { return false }
      slot = (slot + 1) & (table.count - 1)
    }
    table[slot] = entry
    return true
  }
}

/// A snapshot as workers read it: plain references into its tables, so that no frame costs a reference count.
///
/// Every access is bounds-checked, and an interface or domain that is not there reads as absent: what is in flight may
/// name one that a later snapshot no longer has. The snapshot must outlive the view: control keeps it until every
/// worker has adopted a later one.
public struct SnapshotView: BitwiseCopyable, Sendable {
  /// The version of the snapshot.
  public var version: UInt64 { @inline(__always) get { contents[0].version } }
  var interfaces: FixedArray<InterfaceEntry>.Reference { @inline(__always) get { contents[0].interfaces } }
  var domains: FixedArray<DomainEntry>.Reference { @inline(__always) get { contents[0].domains } }
  var members: FixedArray<InterfaceIndex>.Reference { @inline(__always) get { contents[0].members } }
  var peers: FixedArray<PeerEntry>.Reference { @inline(__always) get { contents[0].peers } }
  var carriers: FixedArray<PairEntry>.Reference { @inline(__always) get { contents[0].carriers } }
  var memberships: FixedArray<PairEntry>.Reference { @inline(__always) get { contents[0].memberships } }
  var routes: RouteTable.View { @inline(__always) get { contents[0].routes } }

  /// One. Behind a reference, so that using one table of it does not copy all.
  let contents: FixedArray<Contents>.Reference

  @usableFromInline
  struct Contents: BitwiseCopyable {
    let version: UInt64
    let interfaces: FixedArray<InterfaceEntry>.Reference
    let domains: FixedArray<DomainEntry>.Reference
    let members: FixedArray<InterfaceIndex>.Reference
    let peers: FixedArray<PeerEntry>.Reference
    let carriers: FixedArray<PairEntry>.Reference
    let memberships: FixedArray<PairEntry>.Reference
    let routes: RouteTable.View
  }

  public enum InterfaceKind: UInt8, BitwiseCopyable, Sendable { case absent, port, passthrough, link }

  struct InterfaceEntry: BitwiseCopyable {
    var kind = InterfaceKind.absent
    var isRelay = false
    var dropsReservedBits = false
    /// A port's.
    var domain = DomainIndex.none
    /// The other end of a passthrough port.
    var wire = InterfaceIndex.none
    var mtuBytes: UInt32 = 0
  }

  struct DomainEntry: BitwiseCopyable {
    var macs: MACTable.Reference?
    var vni: UInt32 = 0
    var membersStart: UInt32 = 0
    var portCount: UInt32 = 0
    var linkCount: UInt32 = 0
    /// Whether rules decide.
    var isRouted = false
    /// The patterns that its rules have (`RouteTable.patternBit`).
    var routePatterns: UInt32 = 0
    var floodLimit = FloodLimit(framesPerSecondMax: 0)
  }

  struct PeerEntry: BitwiseCopyable {
    var address = UnderlayAddress(high: 0, low: 0)
    var number: UInt32 = 0
    var isUsed = false
  }

  /// An entry of a set of pairs; key 0 is an empty place.
  struct PairEntry: BitwiseCopyable {
    var key: UInt64 = 0
    var link = InterfaceIndex.none
    var domain = DomainIndex.none
  }

  // MARK: Interfaces and domains

  /// `.absent` for an index that the snapshot does not have.
  @inline(__always)
  public func kind(of interface: InterfaceIndex) -> InterfaceKind { entry(interface).kind }

  /// A port's domain; `.none` for anything else.
  @inline(__always)
  public func domain(ofPort port: InterfaceIndex) -> DomainIndex { entry(port).domain }

  /// The other end of a passthrough port; `.none` for anything else.
  @inline(__always)
  public func wire(of port: InterfaceIndex) -> InterfaceIndex { entry(port).wire }

  /// 0 for an index that the snapshot does not have.
  @inline(__always)
  public func mtuBytes(of interface: InterfaceIndex) -> Int { Int(entry(interface).mtuBytes) }

  /// Whether datagrams of a link with a reserved VXLAN bit set are to be dropped.
  @inline(__always)
  public func dropsReservedBits(link: InterfaceIndex) -> Bool { entry(link).dropsReservedBits }

  /// Whether frames from an interface may leave by links: all but those of links that do not relay.
  @inline(__always)
  public func mayLeaveByLinks(from ingress: InterfaceIndex) -> Bool {
    let entry = entry(ingress)
    return entry.kind == .port || entry.isRelay
  }

  /// A domain's VNI; nil if the snapshot does not have it.
  @inline(__always)
  public func vni(of domain: DomainIndex) -> UInt32? {
    let entry = entry(domain)
    return entry.macs == nil ? nil : entry.vni
  }

  /// A domain's MAC table; nil if the snapshot does not have it.
  @inline(__always)
  public func macs(of domain: DomainIndex) -> MACTable.Reference? { entry(domain).macs }

  /// Whether VNET rules decide in a domain, and nothing is learned.
  @inline(__always)
  func isRouted(_ domain: DomainIndex) -> Bool { entry(domain).isRouted }

  @inline(__always)
  func floodLimit(of domain: DomainIndex) -> FloodLimit { entry(domain).floodLimit }

  /// How long a table has to be that domain indices of this snapshot fit in.
  public var domainCount: Int { domains.count }

  /// Whether an interface belongs to a domain.
  @inline(__always)
  public func isMember(_ interface: InterfaceIndex, of domain: DomainIndex) -> Bool {
    let entry = entry(interface)
    switch entry.kind {
    case .absent, .passthrough: return false
    case .port: return entry.domain == domain
    case .link: return find(Self.membershipKey(interface, domain), in: memberships) != nil
    }
  }

  /// The same for a port, and for a link only if frames may leave by `links`.
  @inline(__always)
  func isMember(_ interface: InterfaceIndex, of domain: DomainIndex, links: Bool) -> Bool {
    guard interface.index < interfaces.count else { return false }
    let entry = interfaces[interface.index]
    if entry.kind == .port { return entry.domain == domain }
    return links && entry.kind == .link && find(Self.membershipKey(interface, domain), in: memberships) != nil
  }

  @inline(__always)
  private func entry(_ interface: InterfaceIndex) -> InterfaceEntry {
    interface.index < interfaces.count ? interfaces[interface.index] : InterfaceEntry()
  }

  @inline(__always)
  private func entry(_ domain: DomainIndex) -> DomainEntry {
    domain.index < domains.count ? domains[domain.index] : DomainEntry()
  }

  // MARK: Floods

  /// Where a flood goes: from a port, or a link that relays, to all other members of the domain; from another link to
  /// its ports only (split horizon). Empty if the interface is not a member of the domain.
  /// - Parameter isRelayed: false keeps what a link brought from other links even if it relays.
  @inline(__always)
  public func floodSet(domain: DomainIndex, ingress: InterfaceIndex, isRelayed: Bool = true) -> TargetSet {
    let entry = entry(domain)
    let start = entry.membersStart
    func set(count: UInt32, targetCount: UInt32) -> TargetSet {
      TargetSet(members: members, start: start, count: count, ingress: ingress, targetCount: targetCount)
    }
    guard isMember(ingress, of: domain) else { return set(count: 0, targetCount: 0) }
    let isPort = kind(of: ingress) == .port
    guard isPort || isRelayed && mayLeaveByLinks(from: ingress) else {
      return set(count: entry.portCount, targetCount: entry.portCount)
    }
    let count = entry.portCount + entry.linkCount
    return set(count: count, targetCount: count - 1)
  }

  // MARK: VNET rules

  /// The rules with the highest score that match a frame; nil if none does.
  /// - Parameter groupsRead: grows by the entries of the table that were compared, for tests.
  @inline(__always)
  func matchRoutes(
    domain: DomainIndex, source: UInt64, destination: UInt64, ingress: InterfaceIndex, groupsRead: inout Int
  ) -> RouteTable.Match? {
    routes.match(
      domain: domain, patterns: entry(domain).routePatterns, source: source, destination: destination,
      ingress: ingress, groupsRead: &groupsRead)
  }

  // MARK: The underlay

  /// Whose a datagram is.
  public enum Carrier: BitwiseCopyable, Hashable, Sendable {
    case link(InterfaceIndex, DomainIndex)
    /// No link has this address as its other end: `dropUnknownSource`.
    case unknownSource
    /// Links do, and none of them carries this VNI, or none has this encapsulation.
    case unknownVNI
  }

  /// The link and the domain of a datagram from `source`. An address is no proof of who sent it.
  /// - Parameter vni: 24 bits; means nothing for VNET/P, where the sender alone names link and domain.
  @inline(__always)
  public func carrier(source: UnderlayAddress, encapsulation: Encapsulation, vni: UInt32) -> Carrier {
    let mask = peers.count - 1
    var slot = Self.hash(source) & mask
    // Ends, as at least half of the places are empty.
    while peers[slot].isUsed {
      let peer = peers[slot]
      if peer.address == source {
        let key = Self.carrierKey(peer.number, encapsulation, vni: vni)
        guard let pair = find(key, in: carriers) else { return .unknownVNI }
        return .link(pair.link, pair.domain)
      }
      slot = (slot + 1) & mask
    }
    return .unknownSource
  }

  // MARK: Hash tables: a power of two of places, at most half of them used, searched from the hash on

  static func slotCount(_ entries: Int) -> Int {
    var count = 2
    while count < 2 * entries { count *= 2 }
    return count
  }

  /// What stands for the VNI of a VNET/P link, which has none: no VNI of 24 bits.
  private static let vnetpVNI: UInt32 = 1 << 24

  /// Never 0.
  @inline(__always)
  static func carrierKey(_ peerNumber: UInt32, _ encapsulation: Encapsulation, vni: UInt32) -> UInt64 {
    (UInt64(peerNumber) + 1) << 32 | UInt64(encapsulation == .vnetp ? vnetpVNI : vni)
  }

  /// Never 0.
  @inline(__always)
  static func membershipKey(_ link: InterfaceIndex, _ domain: DomainIndex) -> UInt64 {
    1 << 32 | UInt64(link.rawValue) << 16 | UInt64(domain.rawValue)
  }

  @inline(__always)
  private func find(_ key: UInt64, in table: FixedArray<PairEntry>.Reference) -> PairEntry? {
    let mask = table.count - 1
    var slot = Self.hash(key) & mask
    while true {
      let entry = table[slot]
      if entry.key == key { return entry }
      if entry.key == 0 { return nil }
      slot = (slot + 1) & mask
    }
  }

  /// Only configured keys are ever in the tables, so a stranger cannot lengthen a search: the hash needs no secret.
  @inline(__always)
  static func hash(_ key: UInt64) -> Int {
    let product = (key ^ 0x2545_F491_4F6C_DD1D).multipliedFullWidth(by: 0x9E37_79B9_7F4A_7C15)
    return Int(truncatingIfNeeded: product.high ^ product.low)
  }

  @inline(__always)
  static func hash(_ address: UnderlayAddress) -> Int {
    hash(address.low ^ UInt64(truncatingIfNeeded: hash(address.high)))
  }
}

extension FixedArray {
  /// The elements without their ownership, for reading; every access is bounds-checked. The array must outlive it.
  @safe
  struct Reference: BitwiseCopyable, @unchecked Sendable {
    private let base: UnsafePointer<Element>
    let count: Int

    fileprivate init(base: UnsafePointer<Element>, count: Int) {
      unsafe self.base = unsafe base
      self.count = count
    }

    @inline(__always)
    subscript(index: Int) -> Element {
      precondition(UInt(bitPattern: index) < UInt(bitPattern: count), "index out of range")
      return unsafe base[index]
    }
  }

  /// Of an array with at least one element.
  var reference: Reference { unsafe Reference(base: UnsafePointer(address(of: 0)), count: count) }
}
