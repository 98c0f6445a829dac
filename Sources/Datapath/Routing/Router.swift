/// Where a frame goes: one for each worker, used by it alone.
///
/// The way of a frame:
/// 1. A source that is no unicast address is dropped, and nothing is learned.
/// 2. The decision cache: the same source, destination, ingress and domain in this second, and nothing moved since?
/// 3. The source is learned at the ingress.
/// 4. A group destination floods.
/// 5. A destination whose place is known goes there, unless it is where the frame came from, or the frame came over a
///    link and would leave by another (split horizon). One whose place is not known floods.
///
/// A flood with nobody to go to is found by whoever goes through the members (`SnapshotView.FloodSet`).
public struct Router: ~Copyable {
  /// Entries of the decision cache: 512 of 32 bytes are a third to half of a core's first-level cache. Measured on
  /// 2 shared cores: 3 ns a hit; 14 to 23 ns a frame without the cache, and as much when it meets 512 pairs of
  /// addresses or more in turn.
  public static let cacheEntries = 512

  /// The snapshot that the worker forwards by.
  public private(set) var view: SnapshotView
  private var cache: FixedArray<CacheEntry>
  private let cacheEnabled: Bool

  /// - Parameter cacheEnabled: false makes every decision anew, for benchmarks and for tests of the cache.
  public init(_ view: SnapshotView, cacheEnabled: Bool = true) {
    self.view = view
    self.cacheEnabled = cacheEnabled
    cache = FixedArray(repeating: CacheEntry(), count: Self.cacheEntries)
  }

  /// Forwards by another snapshot from now on; the worker calls it between batches. Control may free the old one when
  /// every worker has done so.
  public mutating func adopt(_ view: SnapshotView) {
    self.view = view
    // Nothing that the old one decided holds: an index may now be another interface.
    for index in 0..<cache.count { cache[index] = CacheEntry() }
  }

  /// What to do with a frame.
  public struct Decision: BitwiseCopyable, Hashable, Sendable {
    public enum Action: BitwiseCopyable, Hashable, Sendable {
      case unicast(InterfaceIndex)
      /// To every other member of the domain: `view.floodSet(domain:ingress:)`.
      case flood
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

  /// Decides where a frame goes, and learns where it came from.
  /// - Parameters:
  ///   - source: the source MAC in the low 48 bits, the rest zero; so is `destination`.
  ///   - ingress: where it came from.
  ///   - domain: a port's domain, or the one that the VNI named.
  ///   - nowSeconds: a monotonic count of seconds that starts at 1.
  @inline(__always)
  public mutating func decide(
    source: UInt64, destination: UInt64, ingress: InterfaceIndex, domain: DomainIndex, nowSeconds: UInt32
  ) -> Decision {
    if Self.isGroup(source) || source == 0 { return Decision(.drop(.dropBadSource), .skipped) }
    guard let macs = view.macs(of: domain) else { return Decision(.drop(.dropNoDestination), .skipped) }
    // Before the lookups: what changes after this moment changes the generation.
    let generation = macs.generation
    let key = CacheKey(source: source, destination: destination, ingress: ingress, domain: domain)
    if cacheEnabled {
      let entry = cache[key.place]
      if entry.key == key, entry.generation == generation, entry.second == nowSeconds {
        return Decision(entry.action, .known)
      }
    }
    return decideAnew(key, macs, ingress, domain, generation, nowSeconds)
  }

  @inline(never)
  private mutating func decideAnew(
    _ key: CacheKey, _ macs: MACTable.Reference, _ ingress: InterfaceIndex, _ domain: DomainIndex,
    _ generation: UInt32, _ nowSeconds: UInt32
  ) -> Decision {
    // A frame that was on its way when its interface left the domain teaches nothing: control is about to remove
    // all that was learned there.
    guard view.isMember(ingress, of: domain) else { return Decision(.drop(.dropNoDestination), .skipped) }
    let learned = macs.learn(key.source, at: ingress, nowSeconds: nowSeconds)
    let action: Decision.Action
    if Self.isGroup(key.destination) {
      action = .flood
    } else {
      let location = macs.lookup(key.destination)
      // Not known, or known at an interface that has left the domain. Not cached: learning it does not raise the
      // generation, and the next frame must find it.
      guard location != .none, view.isMember(location, of: domain) else { return Decision(.flood, learned) }
      if location == ingress {
        action = .drop(.dropSameInterface)
      } else if view.kind(of: location) == .link, !view.mayLeaveByLinks(from: ingress) {
        action = .drop(.dropSplitHorizon)
      } else {
        action = .unicast(location)
      }
    }
    // A hit claims that the source is known here and was heard this second: so only what makes that true is cached.
    if cacheEnabled, learned == .known || learned == .learned {
      cache[key.place] = CacheEntry(key: key, generation: generation, second: nowSeconds, action: action)
    }
    return Decision(action, learned)
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
    var action = Decision.Action.flood
  }
}
