/// The VNET rules of all domains of a snapshot, compiled so that a lookup costs the same for 10 rules as for 10,000.
/// Immutable.
///
/// # Layout
/// Rules that the same addresses find (same domain, origin, pattern and exact MACs) form a *group*. A group lists its
/// targets in ascending order, each once: rules with one target and the same exception are one rule, and two exceptions
/// for one target cancel, for no frame meets both. So a group is as long as there are interfaces, at most.
///
/// Groups lie in a hash table of buckets one behind the other, two buckets a group and at most
/// `bucketGroupsMax` groups a bucket; most buckets that a frame without a match meets are empty.
///
/// A lookup goes through the six scores from the highest on, one or two patterns each, from any interface and from the
/// frame's: 18 probes at most, and none for a pattern that the domain does not have.
struct RouteTable: ~Copyable {
  /// The most groups in a bucket. With two buckets a group the fullest of 20,000 has 6; a table that has a fuller one
  /// gets more buckets.
  static let bucketGroupsMax = 8
  /// Where the table stops to grow for that: only addresses chosen against the hash come here.
  private static let bucketsPerGroupMax = 64

  struct Group: BitwiseCopyable {
    var key = Key(domain: .none, from: .none, pattern: .anyAny, source: 0, destination: 0)
    /// Its first target.
    var start: UInt32 = 0
    /// The address for which no target is left; `Target.noException` if there is none.
    var exceptedByAll = Target.noException
  }

  struct Target: BitwiseCopyable {
    /// No MAC: those have 48 bits.
    static var noException: UInt64 { .max }

    var excepted = Target.noException
    var interface = InterfaceIndex.none
    /// Whether `excepted` is a source.
    var exceptsSource = false
    var isLast = false
  }

  struct Key: BitwiseCopyable, Hashable {
    let sourceAndOrigin: UInt64
    let destinationAndDomain: UInt64
    let pattern: RoutePattern

    /// - Parameters:
    ///   - from: `.none` for any.
    ///   - source: of a frame or a rule; counts only if the pattern has it exact, as does `destination`.
    @inline(__always)
    init(domain: DomainIndex, from: InterfaceIndex, pattern: RoutePattern, source: UInt64, destination: UInt64) {
      sourceAndOrigin = (pattern.hasExactSource ? source << 16 : 0) | UInt64(from.rawValue)
      destinationAndDomain = (pattern.hasExactDestination ? destination << 16 : 0) | UInt64(domain.rawValue)
      self.pattern = pattern
    }

    @inline(__always)
    var hash: UInt64 {
      let first = Self.fold(sourceAndOrigin ^ 0x2545_F491_4F6C_DD1D, 0x9E37_79B9_7F4A_7C15)
      return Self.fold(first ^ destinationAndDomain ^ UInt64(pattern.rawValue) << 58, 0xD6E8_FEB8_6659_FD93)
    }

    @inline(__always)
    private static func fold(_ a: UInt64, _ b: UInt64) -> UInt64 {
      let product = a.multipliedFullWidth(by: b)
      return product.high ^ product.low
    }
  }

  // Owned here, read through `view`.
  private let bucketStarts: FixedArray<UInt32>
  private let groups: FixedArray<Group>
  private let targets: FixedArray<Target>
  let view: View

  /// - Parameter routes: each with its domain; all have a score.
  init(_ routes: [(domain: DomainIndex, route: VNETRoute)]) {
    var targetsByKey: [Key: [InterfaceIndex: UInt64]] = [:]
    for (domain, route) in routes {
      guard let pattern = route.pattern else { preconditionFailure("a rule without a score") }
      let key = Key(
        domain: domain, from: route.from.interface, pattern: pattern, source: route.source.address,
        destination: route.destination.address)
      let excepted =
        !pattern.exceptsAddress
        ? Target.noException : pattern.exceptsSource ? route.source.address : route.destination.address
      let before = targetsByKey[key]?[route.to] ?? excepted
      targetsByKey[key, default: [:]][route.to] = before == excepted ? excepted : Target.noException
    }

    let keys = Array(targetsByKey.keys)
    let bucketCount = Self.bucketCount(keys)
    var starts = FixedArray(repeating: UInt32(0), count: bucketCount + 1)
    for key in keys { starts[Self.bucket(key, of: bucketCount) + 1] += 1 }
    for bucket in 1...bucketCount { starts[bucket] += starts[bucket - 1] }

    var groupTable = FixedArray(repeating: Group(), count: max(1, keys.count))
    var targetTable = FixedArray(
      repeating: Target(), count: max(1, targetsByKey.values.reduce(0) { $0 + $1.count }))
    var filled = [Int](repeating: 0, count: bucketCount)
    var nextTarget = 0
    for key in keys {
      let bucket = Self.bucket(key, of: bucketCount)
      let targets = targetsByKey[key]!.sorted { $0.key.rawValue < $1.key.rawValue }
      let first = targets[0].value
      groupTable[Int(starts[bucket]) + filled[bucket]] = Group(
        key: key, start: UInt32(nextTarget),
        exceptedByAll: targets.allSatisfy { $0.value == first } ? first : Target.noException)
      filled[bucket] += 1
      for (place, target) in targets.enumerated() {
        targetTable[nextTarget] = Target(
          excepted: target.value, interface: target.key, exceptsSource: key.pattern.exceptsSource,
          isLast: place == targets.count - 1)
        nextTarget += 1
      }
    }
    view = View(
      bucketStarts: starts.reference, groups: groupTable.reference, targets: targetTable.reference,
      bucketMask: UInt64(bucketCount - 1))
    bucketStarts = starts
    groups = groupTable
    targets = targetTable
  }

  private static func bucketCount(_ keys: [Key]) -> Int {
    var count = SnapshotView.slotCount(keys.count)
    while true {
      var sizes = [Int](repeating: 0, count: count)
      for key in keys { sizes[bucket(key, of: count)] += 1 }
      if sizes.max()! <= bucketGroupsMax || count >= bucketsPerGroupMax * keys.count { return count }
      count *= 2
    }
  }

  private static func bucket(_ key: Key, of count: Int) -> Int {
    Int(truncatingIfNeeded: key.hash & UInt64(count - 1))
  }

  /// The most ranges of targets that fire together: two patterns of one score, each from any and from one interface.
  static var rangesMax: Int { 4 }

  /// The rules that fire for one frame: up to four ranges of targets.
  struct Match: BitwiseCopyable {
    static var noRange: UInt32 { .max }

    let targets: FixedArray<Target>.Reference
    /// Where each range starts; `noRange` for none.
    var starts = InlineArray<4, UInt32>(repeating: noRange)
    let source: UInt64
    let destination: UInt64

    /// The target, where it is the only one: one range of one target, which is not excepted, or it were no match.
    @inline(__always)
    var onlyTarget: InterfaceIndex? {
      guard starts[1] == Self.noRange else { return nil }
      let first = targets[Int(starts[0])]
      return first.isLast ? first.interface : nil
    }

    /// Whether a target's exception is for this frame.
    @inline(__always)
    func excepts(_ target: Target) -> Bool { target.excepted == (target.exceptsSource ? source : destination) }
  }

  /// The table as workers read it.
  struct View: BitwiseCopyable, Sendable {
    let bucketStarts: FixedArray<UInt32>.Reference
    let groups: FixedArray<Group>.Reference
    let targets: FixedArray<Target>.Reference
    let bucketMask: UInt64

    /// The rules with the highest score that match a frame; nil if none does.
    /// - Parameters:
    ///   - patterns: those that the domain has, as `RouteTable.patternBit` says.
    ///   - groupsRead: counts the groups that were compared, for tests.
    @inline(__always)
    func match(
      domain: DomainIndex, patterns: UInt32, source: UInt64, destination: UInt64, ingress: InterfaceIndex,
      groupsRead: inout Int
    ) -> Match? {
      var match = Match(targets: targets, source: source, destination: destination)
      var count = 0
      for level in 0..<RoutePattern.levels {
        let (first, second) = RoutePattern.level(level)
        probe(first, domain, patterns, ingress, &match, &count, &groupsRead)
        if let second { probe(second, domain, patterns, ingress, &match, &count, &groupsRead) }
        if count > 0 { return match }
      }
      return nil
    }

    /// Looks up one pattern, for rules from any interface and for those from the frame's.
    @inline(__always)
    private func probe(
      _ pattern: RoutePattern, _ domain: DomainIndex, _ patterns: UInt32, _ ingress: InterfaceIndex,
      _ match: inout Match, _ count: inout Int, _ groupsRead: inout Int
    ) {
      if patterns & RouteTable.patternBit(pattern, isFromOne: false) != 0 {
        probe(pattern, domain, from: .none, &match, &count, &groupsRead)
      }
      if patterns & RouteTable.patternBit(pattern, isFromOne: true) != 0 {
        probe(pattern, domain, from: ingress, &match, &count, &groupsRead)
      }
    }

    @inline(never)
    private func probe(
      _ pattern: RoutePattern, _ domain: DomainIndex, from: InterfaceIndex, _ match: inout Match, _ count: inout Int,
      _ groupsRead: inout Int
    ) {
      let key = Key(
        domain: domain, from: from, pattern: pattern, source: match.source, destination: match.destination)
      let bucket = Int(truncatingIfNeeded: key.hash & bucketMask)
      for place in Int(bucketStarts[bucket])..<Int(bucketStarts[bucket + 1]) {
        let group = groups[place]
        groupsRead += 1
        guard group.key == key else { continue }
        if group.exceptedByAll == (pattern.exceptsSource ? match.source : match.destination) { return }
        match.starts[count] = group.start
        count += 1
        return
      }
    }
  }

  /// A pattern in a set of patterns: from any interface, or from one.
  @inline(__always)
  static func patternBit(_ pattern: RoutePattern, isFromOne: Bool) -> UInt32 {
    1 << (UInt32(pattern.rawValue) * 2 + (isFromOne ? 1 : 0))
  }
}

extension VNETRoute.Origin {
  /// `.none` for any.
  var interface: InterfaceIndex {
    switch self {
    case .any: .none
    case .interface(let index): index
    }
  }
}

extension MACPattern {
  /// The address that it names; 0 for none.
  fileprivate var address: UInt64 {
    switch self {
    case .exact(let address), .not(let address): address.bits
    case .any, .none: 0
    }
  }
}
