/// Where a frame goes: one for each worker, used by it alone.
///
/// The way of a frame:
/// 1. A source that is no unicast address is dropped, and nothing is learned.
/// 2. The decision cache: the same source, destination, ingress and domain in this second, and nothing moved since?
/// 3. In a domain with VNET rules those with the highest score that match decide; without one the frame is dropped.
/// 4. In a domain that learns the source is learned at the ingress.
/// 5. A group destination floods.
/// 6. A destination whose place is known goes there, unless it is where the frame came from, or the frame came over a
///    link and would leave by another (split horizon). One whose place is not known floods.
/// 7. What goes to several places is counted against the domain's limit.
///
/// What cuts a loop of relays: a MAC that is heard from two sides in turn freezes where it was before. From then
/// on floods of it are dropped when they come from elsewhere, and go to ports only when a link brings them from where
/// it is held: a router that froze it relays no flood of it any more. So routers that each have a link to the guest's
/// own get every flood of it once, and reach it meanwhile. Until then, and for what does not flap, there is the limit:
/// a copy that goes round one way comes from the same side each time.
public struct Router: ~Copyable {
  /// Entries of the decision cache: 512 of 32 bytes are a third to half of a core's first-level cache. Measured on
  /// 2 shared cores: 3 ns a hit; 14 to 23 ns a frame without the cache, and as much when it meets 512 pairs of
  /// addresses or more in turn.
  public static let cacheEntries = 512

  /// Sources that need not be learned again in this second: a guest talks to many, and for each of them its own MAC
  /// would be looked up too. 64 of 24 bytes, for a port has few MACs.
  static let knownSourcesMax = 64

  /// The snapshot that the worker forwards by.
  public private(set) var view: SnapshotView
  private var cache: FixedArray<CacheEntry>
  /// Beside each entry of the cache, what rules name if it is more than one target.
  private var cachedTargets: FixedArray<TargetSet>
  private var knownSources: FixedArray<KnownSource>
  private let cacheEnabled: Bool
  /// By domain, for its limit of floods: when the next flood would be in time.
  private var floodsEarliest: FixedArray<UInt64>

  /// - Parameters:
  ///   - domainCount: how many domains may have a limit of floods, now and in later snapshots; floods of a domain
  ///     whose index is not below it are not limited. Nil: those of this snapshot.
  ///   - cacheEnabled: false remembers neither decisions nor sources and makes every decision anew, for benchmarks and
  ///     for tests of the cache.
  public init(_ view: SnapshotView, domainCount: Int? = nil, cacheEnabled: Bool = true) {
    self.view = view
    self.cacheEnabled = cacheEnabled
    cache = FixedArray(repeating: CacheEntry(), count: Self.cacheEntries)
    cachedTargets = FixedArray(
      repeating: view.floodSet(domain: .none, ingress: .none), count: Self.cacheEntries)
    knownSources = FixedArray(repeating: KnownSource(), count: Self.knownSourcesMax)
    floodsEarliest = FixedArray(repeating: 0, count: domainCount ?? view.domainCount)
  }

  /// Forwards by another snapshot from now on; the worker calls it between batches. Control may free the old one when
  /// every worker has done so.
  public mutating func adopt(_ view: SnapshotView) {
    self.view = view
    // Nothing that the old one decided holds: an index may now be another interface.
    for index in 0..<cache.count { cache[index] = CacheEntry() }
    for index in 0..<knownSources.count { knownSources[index] = KnownSource() }
  }

  /// The identifier of a domain, for links; 0 for one that is not there.
  @inline(__always)
  func vni(of domain: DomainIndex) -> UInt32 { view.vni(of: domain) ?? 0 }

  /// What to do with a frame.
  public struct Decision: BitwiseCopyable, Hashable, Sendable {
    public enum Action: BitwiseCopyable, Hashable, Sendable {
      case unicast(InterfaceIndex)
      /// To every target of the set, which is not empty.
      case flood(TargetSet)
      case drop(Counter)
    }
    public let action: Action
    /// For the domain's counters: `learned.counter`.
    public let learned: MACTable.Learned

    @inline(__always)
    init(_ action: Action, _ learned: MACTable.Learned) {
      self.action = action
      self.learned = learned
    }
  }

  /// How many frames ahead of `decide` a batch's destinations are prefetched: that covers the 150 ns of a read that no
  /// cache has, and 4 to 64 measure alike.
  public static let prefetchFrames = 8

  /// Brings near what `decide` will read of a destination, `prefetchFrames` before its turn: a table that no cache
  /// holds is then read while other frames are decided.
  /// - Parameter destination: asked for only where the table is large.
  @inline(__always)
  public func prefetch(domain: DomainIndex, destination: () -> UInt64?) {
    guard let macs = view.macs(of: domain), macs.gainsByPrefetch, let destination = destination() else { return }
    macs.prefetch(destination)
  }

  /// Decides where a frame goes, and learns where it came from.
  /// - Parameters:
  ///   - source: the source MAC in the low 48 bits, the rest zero; so is `destination`.
  ///   - ingress: where it came from.
  ///   - domain: a port's domain, or the one that the VNI named.
  ///   - frames: how many frames on the wire it is, for the limit of floods.
  @inline(__always)
  public mutating func decide(
    source: UInt64, destination: UInt64, ingress: InterfaceIndex, domain: DomainIndex, frames: Int = 1, now: TurnClock
  ) -> Decision {
    if Self.isGroup(source) || source == 0 { return Decision(.drop(.dropBadSource), .skipped) }
    guard let macs = view.macs(of: domain) else { return Decision(.drop(.dropNoDestination), .skipped) }
    // Before the lookups: what changes after this moment changes the generation.
    let generation = macs.generation
    let key = CacheKey(source: source, destination: destination, ingress: ingress, domain: domain)
    if cacheEnabled, let entry = cached(key, generation, now) {
      switch entry.outcome {
      case .unicast(let egress): return Decision(.unicast(egress), entry.learned)
      case .drop(let reason): return Decision(.drop(reason), entry.learned)
      case .members:
        let set = view.floodSet(domain: domain, ingress: ingress)
        return limit(Decision(.flood(set), entry.learned), domain, frames, now)
      case .routes: return limit(Decision(.flood(cachedTargets[key.place]), entry.learned), domain, frames, now)
      }
    }
    if cacheEnabled {
      let location = decideKnown(key, macs, ingress, domain, generation, now.seconds)
      if location != .none { return Decision(.unicast(location), .known) }
    }
    return limit(decideAnew(key, ingress, domain, generation, now.seconds), domain, frames, now)
  }

  /// Where a frame goes that `decide` would send to one place, by what it remembers of this second; `.none` where that
  /// is not known without it. Nothing is learned, and nothing that `decide` counts would be.
  @inline(__always)
  func remembered(
    source: UInt64, destination: UInt64, ingress: InterfaceIndex, domain: DomainIndex, now: TurnClock
  ) -> InterfaceIndex {
    guard let macs = view.macs(of: domain) else { return .none }
    let key = CacheKey(source: source, destination: destination, ingress: ingress, domain: domain)
    guard let entry = cached(key, macs.generation, now), entry.learned.counter == nil,
      case .unicast(let egress) = entry.outcome
    else { return .none }
    return egress
  }

  /// What was decided for a pair of addresses, in this second and under this generation.
  @inline(__always)
  private func cached(_ key: CacheKey, _ generation: UInt32, _ now: TurnClock) -> CacheEntry? {
    let entry = cache[key.place]
    return entry.key == key && entry.generation == generation && entry.second == now.seconds ? entry : nil
  }

  /// The short way of most frames that the cache does not have: from a known source to a known destination elsewhere.
  /// It decides as `decideAnew` would.
  /// - Returns: `.none` for all others.
  @inline(__always)
  private mutating func decideKnown(
    _ key: CacheKey, _ macs: MACTable.Reference, _ ingress: InterfaceIndex, _ domain: DomainIndex,
    _ generation: UInt32, _ nowSeconds: UInt32
  ) -> InterfaceIndex {
    let source = knownSources[KnownSource.place(key)]
    guard source.sourceAndIngress == key.sourceAndIngress, source.generation == generation,
      source.second == nowSeconds, source.domain == domain, !Self.isGroup(key.destination)
    else { return .none }
    let location = macs.lookup(key.destination)
    guard location != ingress,
      view.isMember(location, of: domain, links: source.mayLeaveByLinks)
    else { return .none }
    remember(Outcome.unicast(location), .known, key, generation, nowSeconds)
    return location
  }

  @inline(never)
  private mutating func decideAnew(
    _ key: CacheKey, _ ingress: InterfaceIndex, _ domain: DomainIndex, _ generation: UInt32, _ nowSeconds: UInt32
  ) -> Decision {
    // A frame that was on its way when its interface left the domain teaches nothing: control is about to remove
    // all that was learned there.
    guard view.isMember(ingress, of: domain), let macs = view.macs(of: domain) else {
      return Decision(.drop(.dropNoDestination), .skipped)
    }
    if view.isRouted(domain) {
      let decision = Decision(routeByRules(key, ingress, domain), .skipped)
      remember(decision, key, generation, nowSeconds, isByRules: true)
      return decision
    }
    let learned = macs.learn(key.source, at: ingress, nowSeconds: nowSeconds)
    let action: Decision.Action
    if Self.isGroup(key.destination) {
      action = flood(from: ingress, domain, learned)
    } else {
      let location = macs.lookup(key.destination)
      // Not known, or known at an interface that has left the domain. Not cached: learning it does not raise the
      // generation, and the next frame must find it.
      guard location != .none, view.isMember(location, of: domain) else {
        return Decision(flood(from: ingress, domain, learned), learned)
      }
      if location == ingress {
        action = .drop(.dropSameInterface)
      } else if view.kind(of: location) == .link, !view.mayLeaveByLinks(from: ingress) {
        action = .drop(.dropSplitHorizon)
      } else {
        action = .unicast(location)
      }
    }
    let decision = Decision(action, learned)
    if learned == .known || learned == .learned {
      knownSources[KnownSource.place(key)] = KnownSource(
        sourceAndIngress: key.sourceAndIngress, generation: generation, second: nowSeconds, domain: domain,
        mayLeaveByLinks: view.mayLeaveByLinks(from: ingress))
    }
    // A hit claims that the source is known here and was heard this second: so only what makes that true is cached.
    if learned == .known || learned == .learned { remember(decision, key, generation, nowSeconds, isByRules: false) }
    return decision
  }

  /// VNET/P's way: all rules that tie at the highest score fire, and none sends a frame back.
  private func routeByRules(_ key: CacheKey, _ ingress: InterfaceIndex, _ domain: DomainIndex) -> Decision.Action {
    var groupsRead = 0
    guard
      let match = view.matchRoutes(
        domain: domain, source: key.source, destination: key.destination, ingress: ingress, groupsRead: &groupsRead)
    else { return .drop(.dropNoRoute) }
    if let target = match.onlyTarget { return target == ingress ? .drop(.dropSameInterface) : .unicast(target) }
    let targets = TargetSet(match, ingress: ingress)
    switch targets.targetCount {
    case 0: return .drop(.dropSameInterface)
    case 1:
      var iterator = targets.makeIterator()
      return iterator.next().map { .unicast($0) } ?? .drop(.dropSameInterface)
    default: return .flood(targets)
    }
  }

  /// A frame for all: where it may still go, by what is known of its source.
  private func flood(from ingress: InterfaceIndex, _ domain: DomainIndex, _ learned: MACTable.Learned)
    -> Decision.Action
  {
    if learned == .frozen || learned == .froze { return .drop(.dropFrozenSource) }
    let isHeld = learned == .held || learned == .frozeHere
    let set = view.floodSet(domain: domain, ingress: ingress, isRelayed: !isHeld)
    return set.targetCount > 0 ? .flood(set) : .drop(.dropNoDestination)
  }

  private mutating func remember(
    _ decision: Decision, _ key: CacheKey, _ generation: UInt32, _ nowSeconds: UInt32, isByRules: Bool
  ) {
    guard cacheEnabled else { return }
    let outcome: Outcome
    switch decision.action {
    case .unicast(let egress): outcome = .unicast(egress)
    case .drop(let reason): outcome = .drop(reason)
    case .flood(let targets):
      outcome = isByRules ? .routes : .members
      if isByRules { cachedTargets[key.place] = targets }
    }
    remember(outcome, decision.learned == .learned ? .known : decision.learned, key, generation, nowSeconds)
  }

  @inline(__always)
  private mutating func remember(
    _ outcome: Outcome, _ learned: MACTable.Learned, _ key: CacheKey, _ generation: UInt32, _ nowSeconds: UInt32
  ) {
    cache[key.place] = CacheEntry(
      key: key, generation: generation, second: nowSeconds, outcome: outcome, learned: learned)
  }

  /// Holds what goes to several places against the domain's limit.
  @inline(__always)
  private mutating func limit(_ decision: Decision, _ domain: DomainIndex, _ frames: Int, _ now: TurnClock) -> Decision
  {
    guard case .flood = decision.action else { return decision }
    let limit = view.floodLimit(of: domain)
    guard limit.nanosecondsPerFrame > 0, domain.index < floodsEarliest.count else { return decision }
    guard limit.allows(frames: frames, now: now.nanoseconds, earliest: &floodsEarliest[domain.index]) else {
      return Decision(.drop(.dropFloodLimit), decision.learned)
    }
    return decision
  }

  @inline(__always)
  private static func isGroup(_ mac: UInt64) -> Bool { mac >> 40 & 1 != 0 }

  struct CacheKey: BitwiseCopyable, Equatable {
    let sourceAndIngress: UInt64
    let destinationAndDomain: UInt64

    @inline(__always)
    init(source: UInt64, destination: UInt64, ingress: InterfaceIndex, domain: DomainIndex) {
      sourceAndIngress = source << 16 | UInt64(ingress.rawValue)
      destinationAndDomain = destination << 16 | UInt64(domain.rawValue)
    }

    @inline(__always) var source: UInt64 { sourceAndIngress >> 16 }
    @inline(__always) var destination: UInt64 { destinationAndDomain >> 16 }

    /// Its only place in the cache.
    @inline(__always)
    var place: Int {
      let mixed =
        (sourceAndIngress &* 0x9E37_79B9_7F4A_7C15 &+ destinationAndDomain) &* 0xD6E8_FEB8_6659_FD93
      return Int(truncatingIfNeeded: mixed >> 32) & (Router.cacheEntries - 1)
    }
  }

  /// 32 bytes. Second 0 never comes, so an empty entry matches nothing.
  ///
  /// Usable from inline only because other modules destroy routers, and with them a `FixedArray` of it: the compiler
  /// (6.3.1) fails to name a private type there.
  @usableFromInline
  struct CacheEntry: BitwiseCopyable {
    var key = CacheKey(source: 0, destination: 0, ingress: .none, domain: .none)
    var generation: UInt32 = 0
    var second: UInt32 = 0
    var outcome = Outcome.members
    var learned = MACTable.Learned.known
  }

  /// A decision's action as the cache has it: small, so that its entries are.
  @usableFromInline
  enum Outcome: BitwiseCopyable {
    case unicast(InterfaceIndex)
    /// All members that the ingress may reach.
    case members
    /// `cachedTargets` has them.
    case routes
    case drop(Counter)
  }

  /// A source that was learned, or known, in a second and under a generation. Second 0 never comes.
  ///
  /// Usable from inline for the same reason as `CacheEntry`.
  @usableFromInline
  struct KnownSource: BitwiseCopyable {
    var sourceAndIngress: UInt64 = 0
    var generation: UInt32 = 0
    var second: UInt32 = 0
    var domain = DomainIndex.none
    /// Of the ingress.
    var mayLeaveByLinks = false

    @inline(__always)
    static func place(_ key: CacheKey) -> Int {
      Int(truncatingIfNeeded: (key.sourceAndIngress &* 0x9E37_79B9_7F4A_7C15) >> 32) & (Router.knownSourcesMax - 1)
    }
  }
}
