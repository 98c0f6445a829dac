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
      /// - isRelay: frames from it may leave by other links. Links must then form a tree, or frames go round.
      /// - dropsReservedBits: drop datagrams with a reserved VXLAN bit set, as Linux does; RFC 7348 section 5
      ///   ignores them.
      case link(peer: UnderlayAddress, domains: [DomainIndex], isRelay: Bool = false, dropsReservedBits: Bool = false)
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
    public let index: DomainIndex
    /// 24 bits (RFC 7348 section 5).
    public let vni: UInt32
    public let macs: MACTable

    public init(_ index: DomainIndex, vni: UInt32, macs: MACTable) {
      self.index = index
      self.vni = vni
      self.macs = macs
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
    /// Two links to one peer carry the same domain: what comes from the peer would have two links.
    case ambiguousPeer(UnderlayAddress, vni: UInt32)
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
    }

    // Interfaces by index, and the members of each domain.
    let interfaceCount = (interfaces.map(\.index.index).max() ?? 0) + 1
    var interfaceTable = FixedArray(repeating: SnapshotView.InterfaceEntry(), count: interfaceCount)
    var ports = [[InterfaceIndex]](repeating: [], count: domainCount)
    var links = [[InterfaceIndex]](repeating: [], count: domainCount)
    var peerNumbers: [UnderlayAddress: UInt32] = [:]
    var linkDomains: [(link: InterfaceIndex, domain: DomainIndex, peerNumber: UInt32)] = []
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
      case .link(let peer, let carried, let isRelay, let dropsReservedBits):
        entry.kind = .link
        entry.isRelay = isRelay
        entry.dropsReservedBits = dropsReservedBits
        let peerNumber = peerNumbers[peer] ?? UInt32(peerNumbers.count)
        peerNumbers[peer] = peerNumber
        for domain in carried {
          guard domainsThere.contains(domain) else { throw .dangling(index, domain) }
          guard links[domain.index].last != index else { throw .membershipTwice(index, domain) }
          links[domain.index].append(index)
          linkDomains.append((index, domain, peerNumber))
        }
      }
      interfaceTable[index.index] = entry
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
    for (link, domain, peerNumber) in linkDomains {
      let vni = domainTable[domain.index].vni
      let carrier = SnapshotView.PairEntry(
        key: SnapshotView.carrierKey(peerNumber, vni), link: link, domain: domain)
      guard Self.insert(carrier, into: &carrierTable) else {
        throw .ambiguousPeer(peerNumbers.first { $0.value == peerNumber }!.key, vni: vni)
      }
      let membership = SnapshotView.PairEntry(
        key: SnapshotView.membershipKey(link, domain), link: link, domain: domain)
      let isNew = Self.insert(membership, into: &membershipTable)
      precondition(isNew, "a link is a member of a domain once")
    }

    view = SnapshotView(
      version: version, interfaces: interfaceTable.reference, domains: domainTable.reference,
      members: memberTable.reference, peers: peerTable.reference, carriers: carrierTable.reference,
      memberships: membershipTable.reference)
    self.interfaces = interfaceTable
    self.domains = domainTable
    self.members = memberTable
    self.peers = peerTable
    carriers = carrierTable
    self.memberships = membershipTable
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
  public let version: UInt64
  let interfaces: FixedArray<InterfaceEntry>.Reference
  let domains: FixedArray<DomainEntry>.Reference
  let members: FixedArray<InterfaceIndex>.Reference
  let peers: FixedArray<PeerEntry>.Reference
  let carriers: FixedArray<PairEntry>.Reference
  let memberships: FixedArray<PairEntry>.Reference

  public enum InterfaceKind: UInt8, BitwiseCopyable, Sendable { case absent, port, link }

  struct InterfaceEntry: BitwiseCopyable {
    var kind = InterfaceKind.absent
    var isRelay = false
    var dropsReservedBits = false
    /// A port's.
    var domain = DomainIndex.none
    var mtuBytes: UInt32 = 0
  }

  struct DomainEntry: BitwiseCopyable {
    var macs: MACTable.Reference?
    var vni: UInt32 = 0
    var membersStart: UInt32 = 0
    var portCount: UInt32 = 0
    var linkCount: UInt32 = 0
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

  /// Whether an interface belongs to a domain.
  @inline(__always)
  public func isMember(_ interface: InterfaceIndex, of domain: DomainIndex) -> Bool {
    let entry = entry(interface)
    switch entry.kind {
    case .absent: return false
    case .port: return entry.domain == domain
    case .link: return find(Self.membershipKey(interface, domain), in: memberships) != nil
    }
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

  /// The members of a domain that a flood from one interface may reach. The ingress itself is among them where it is
  /// a member: whoever goes through it leaves it out.
  public struct FloodSet: BitwiseCopyable, Sendable {
    let members: FixedArray<InterfaceIndex>.Reference
    let start: Int
    /// How many to go through, the ingress included if it is among them.
    public let count: Int
    /// How many the frame goes to: `count` without the ingress.
    public let targetCount: Int

    @inline(__always)
    public subscript(_ place: Int) -> InterfaceIndex {
      precondition(place >= 0 && place < count, "no such member")
      return members[start + place]
    }
  }

  /// Where a flood goes: from a port, or a link that relays, to all other members of the domain; from another link to
  /// its ports only (split horizon). Empty if the interface is not a member of the domain.
  @inline(__always)
  public func floodSet(domain: DomainIndex, ingress: InterfaceIndex) -> FloodSet {
    let entry = entry(domain)
    let portCount = Int(entry.portCount)
    let start = Int(entry.membersStart)
    guard isMember(ingress, of: domain) else {
      return FloodSet(members: members, start: start, count: 0, targetCount: 0)
    }
    guard mayLeaveByLinks(from: ingress) else {
      return FloodSet(members: members, start: start, count: portCount, targetCount: portCount)
    }
    let count = portCount + Int(entry.linkCount)
    return FloodSet(members: members, start: start, count: count, targetCount: count - 1)
  }

  // MARK: The underlay

  /// Whose a datagram is.
  public enum Carrier: BitwiseCopyable, Hashable, Sendable {
    case link(InterfaceIndex, DomainIndex)
    /// No link has this address as its other end: `dropUnknownSource`.
    case unknownSource
    /// Links do, and none of them carries this VNI: `dropUnknownVNI`.
    case unknownVNI
  }

  /// The link and the domain of a datagram from `source` with a VNI (24 bits). An address is no proof of who sent it.
  @inline(__always)
  public func carrier(source: UnderlayAddress, vni: UInt32) -> Carrier {
    let mask = peers.count - 1
    var slot = Self.hash(source) & mask
    // Ends, as at least half of the places are empty.
    while peers[slot].isUsed {
      let peer = peers[slot]
      if peer.address == source {
        guard let pair = find(Self.carrierKey(peer.number, vni), in: carriers) else { return .unknownVNI }
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

  /// Never 0.
  @inline(__always)
  static func carrierKey(_ peerNumber: UInt32, _ vni: UInt32) -> UInt64 {
    (UInt64(peerNumber) + 1) << 32 | UInt64(vni)
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
  fileprivate var reference: Reference { unsafe Reference(base: UnsafePointer(address(of: 0)), count: count) }
}
