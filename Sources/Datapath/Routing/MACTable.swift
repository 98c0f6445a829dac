import CLinux
import Glibc
import Synchronization

/// Where each MAC address of one domain was last seen: one table for a domain, shared by all workers and control.
///
/// Every operation may be called by any thread at any time, except that one thread at a time (control) sweeps and
/// removes. Nothing locks. A lookup never waits and never retries; learning tries again a bounded number of times.
/// Nothing is allocated after `init`.
///
/// # Layout
/// A bucket is 16 words of 64 bits, two adjacent cache lines:
/// ```
/// entry  0 … 7   MAC (48 bits) | location (16 bits); 0 = empty, 1 = claimed by a thread that is filling it
/// trace  0 … 7   beside each entry, its `Trace`: last-seen second, the history of its moves and its home
/// ```
/// A MAC has two candidate buckets by a keyed hash (a guest chooses its MACs, and must not be able to choose whom they
/// collide with). Its place in the candidate order (first bucket 0 … 7, second bucket 0 … 7) decides between
/// duplicates.
///
/// # Why it stays right without locks
/// - An entry changes only by compare-and-swap of the whole word, MAC included, so nobody moves or removes an entry
///   that has meanwhile become another MAC's.
/// - Two workers may insert one MAC in two places at once. Each publishes its entry first and then reads all 16
///   candidates, both sequentially consistent: at least one of the two sees both entries. Whoever sees several keeps
///   the earliest in candidate order and removes the others, so all who look agree, and one entry is left.
/// - `generation` is raised after every move, freeze and removal. A decision that was made under a generation read
///   before the lookup is right as long as the generation has not changed. A first learning does not raise it, or a
///   guest that sends from ever new addresses would empty every worker's decision cache; so decisions to flood for want
///   of a location must not be cached (`Router` does not).
/// - A freeze changes two words: the trace says that the MAC is frozen and where its home is, and then the entry is
///   brought there. Who hears a frozen MAC and finds it anywhere else brings it home, so it does not matter which
///   worker comes first, or whether one that was about to move it comes last.
/// - What a race can do at worst: a lookup misses an entry that is being replaced by its duplicate, or an entry is
///   removed just as its MAC is heard again. The frame is flooded, and the next frame from that MAC learns it anew.
@safe
public final class MACTable: @unchecked Sendable {
  /// The most MACs that a table can be made for: 2^20, of which the table takes 32 MiB.
  public static let macsMaxLimit = 1 << 20
  /// Moves that are followed within one window; the next one freezes the MAC at its home, which is where it was before
  /// they began. Not where the last move brought it: in a loop the first of a broadcast's copies came the right
  /// way, and which of the others comes last is chance. RFC 7432 section 15.1 has the same
  /// number for MACs that move between hosts: a live migration is one move, and its announcements that cross with
  /// the last frames from the old host make two or three more.
  public static let movesMax = 5
  /// The window for `movesMax`, from the first move on. RFC 7432 section 15.1 has 180 s, for moves that cost routing
  /// updates in the whole network; here a move costs one word, so only what moves at the pace of frames (a loop, two
  /// guests with one MAC) has to be caught, and a guest that really moves every few seconds is still followed.
  public static let flapWindowSeconds: UInt32 = 10
  /// How long a frozen MAC stays at its home: long enough that a loop costs one burst of `movesMax` moves a minute,
  /// and short against the ageing time, so that a frozen MAC whose guest did move is reachable again soon.
  public static let freezeSeconds: UInt32 = 60

  /// Of x86-64, and of arm64 with pages of 4 KiB: elsewhere the advice is for less than a page, and does nothing.
  private static let hugePageBytes = 2 << 20

  /// What learning found out and did.
  public enum Learned: UInt8, BitwiseCopyable, Sendable {
    /// The MAC is known at this location, and was heard of this second.
    case known
    /// The MAC is known at this location, and frozen there.
    case held
    /// A new MAC was entered.
    case learned
    /// The MAC was known elsewhere and is now here.
    case moved
    /// The MAC is frozen elsewhere; the move was not followed.
    case frozen
    /// This move was one too many, and not to the MAC's home: the MAC is frozen there.
    case froze
    /// This move was one too many, and to the MAC's home: the MAC is frozen here.
    case frozeHere
    /// The MAC is new and the table is at its limit.
    case limited
    /// Nothing was learned: the source is no unicast address, or other workers changed the same MAC all the while.
    case skipped

    /// The domain's counter for it, if it has one.
    public var counter: Counter? {
      switch self {
      case .known, .held, .skipped: nil
      case .learned: .macsLearned
      case .moved: .macMoves
      case .frozen: .macFrozenFrames
      case .froze, .frozeHere: .macFreezes
      case .limited: .macLimitFrames
      }
    }
  }

  /// The most MACs that the table takes.
  public let macsMax: Int
  /// The handle for per-frame use. The table must outlive it: its owner is control, which frees a domain only when
  /// every worker has adopted a snapshot without it.
  public let reference: Reference

  private let memory: UnsafeMutableRawPointer

  /// - Parameters:
  ///   - macsMax: the limit, 1 to `macsMaxLimit`.
  ///   - seed: the key of the hash; random unless a test wants the same places each time.
  public init(macsMax: Int, seed: UInt64? = nil) {
    precondition(macsMax >= 1 && macsMax <= Self.macsMaxLimit, "limit of MACs out of range")
    self.macsMax = macsMax
    // At least twice the limit, so that both buckets of a MAC being full is not to be expected at all.
    var bucketCount = Reference.bucketsMin
    while bucketCount * Reference.bucketEntries < 2 * macsMax { bucketCount *= 2 }
    let bytes = (Reference.sharedWords + bucketCount * Reference.bucketWords) * 8
    let isHuge = bytes >= Self.hugePageBytes
    unsafe memory = UnsafeMutableRawPointer.allocate(
      byteCount: bytes, alignment: isHuge ? Self.hugePageBytes : 128)
    // Before the first touch. Where it is refused, lookups in a large table cost more; nothing else depends on it.
    if isHuge { _ = unsafe madvise(memory, bytes & ~(Self.hugePageBytes - 1), MADV_HUGEPAGE) }
    unsafe memory.initializeMemory(as: UInt8.self, repeating: 0, count: bytes)
    // An atomic word has the layout of a plain one, and zero is its valid initial value.
    let words = unsafe memory.assumingMemoryBound(to: Atomic<UInt64>.self)
    reference = unsafe Reference(
      shared: words, buckets: words + Reference.sharedWords, bucketCount: bucketCount, macsMax: macsMax,
      seed: seed ?? UInt64.random(in: .min ... .max))
  }

  deinit {
    unsafe memory.deallocate()
  }

  /// How many MACs are known.
  public var count: Int { reference.count }

  /// Removes every MAC that was last heard `ageingSeconds` ago or longer; control only.
  /// - Returns: how many.
  public func sweep(nowSeconds: UInt32, ageingSeconds: UInt32) -> Int {
    var removed = 0
    reference.forEachEntry { cell, word in
      guard Trace(reference.trace(of: cell)).silenceSeconds(nowSeconds) >= ageingSeconds else { return }
      if reference.remove(cell, word) { removed += 1 }
    }
    return removed
  }

  /// Removes every MAC that is located at an interface; control only, after every worker has adopted a snapshot
  /// in which the interface has left the domain (so that nobody learns there any more), and before its index is used
  /// again. What is frozen or flaps elsewhere and had its home there is free, and has a home where it is heard next.
  /// - Returns: how many.
  public func removeAll(at location: InterfaceIndex) -> Int {
    var removed = 0
    reference.forEachEntry { cell, word in
      reference.forgetHome(location, cell)
      var word = reference.entry(cell)
      while word > Reference.claimed, Reference.location(word) == location {
        if reference.remove(cell, word) {
          removed += 1
          return
        }
        // It moved, or went by itself.
        word = reference.entry(cell)
      }
    }
    return removed
  }

  /// One known MAC.
  public struct Entry: Hashable, Sendable {
    /// In the low 48 bits.
    public let mac: UInt64
    public let location: InterfaceIndex
    /// Since it was last heard.
    public let ageSeconds: UInt32
    public let isFrozen: Bool
  }

  /// All known MACs in no order, as they are while workers go on; allocates, so control only.
  public func entries(nowSeconds: UInt32) -> [Entry] {
    var entries: [Entry] = []
    entries.reserveCapacity(count)
    reference.forEachEntry { cell, word in
      let trace = Trace(reference.trace(of: cell))
      entries.append(
        Entry(
          mac: word >> 16, location: Reference.location(word), ageSeconds: trace.silenceSeconds(nowSeconds),
          isFrozen: trace.isFrozen(nowSeconds)))
    }
    return entries
  }
}

extension MACTable {
  /// A table without its ownership: what workers hold, so that no frame costs a reference count. Safe to use as long
  /// as the table lives; every word that it touches is in the table by construction (a masked bucket number and a
  /// place of 0 to 7).
  @safe
  public struct Reference: BitwiseCopyable, @unchecked Sendable {
    /// Entries in a bucket: their words fill one cache line.
    fileprivate static let bucketEntries = 8
    fileprivate static let bucketWords = 2 * bucketEntries
    /// The smallest table, 64 entries: fewer buckets would not spread.
    fileprivate static let bucketsMin = 8
    /// Words before the buckets: the generation and the count, each in a pair of cache lines of its own, for every
    /// frame reads the one and every learned MAC writes the other.
    fileprivate static let sharedWords = 32
    private static let countWord = 16
    /// An entry that a thread is filling. As its MAC is zero, it matches none.
    fileprivate static let claimed: UInt64 = 1
    /// A new MAC goes into its first bucket while that has at most this many entries, else into the emptier one.
    /// Simulated, a table at its limit then has 91 % of its MACs in the first bucket, where a lookup reads one cache
    /// line, and one bucket in 33,000 full, so a MAC with both buckets full is one in 10^9. With 5 it is 95 %, but one
    /// in 17 million; with 7, one in 350.
    private static let firstBucketEntriesMax = 4
    /// 1 MiB, as a second-level cache has at least: 32,000 MACs. In a smaller table a prefetch costs more than it gains
    /// (1,000 MACs: 34 ns a decision without, 39 with; 1 M: 157 and 46).
    private static let prefetchBucketsMin: UInt64 = 1 << 13

    /// How often learning tries again when other workers change the same entry at the same time. Each failure means
    /// that another worker got through.
    private static let attemptsMax = 8

    private let shared: UnsafeMutablePointer<Atomic<UInt64>>
    private let buckets: UnsafeMutablePointer<Atomic<UInt64>>
    private let bucketMask: UInt64
    private let seed: UInt64
    private let macsMax: Int

    fileprivate init(
      shared: UnsafeMutablePointer<Atomic<UInt64>>, buckets: UnsafeMutablePointer<Atomic<UInt64>>, bucketCount: Int,
      macsMax: Int, seed: UInt64
    ) {
      unsafe self.shared = unsafe shared
      unsafe self.buckets = unsafe buckets
      bucketMask = UInt64(bucketCount - 1)
      self.seed = seed
      self.macsMax = macsMax
    }

    /// Raised by every move, freeze and removal. Read it before the lookup that a decision rests on; the decision
    /// is right while it stays the same.
    @inline(__always)
    public var generation: UInt32 {
      UInt32(truncatingIfNeeded: unsafe shared.pointee.load(ordering: .acquiring))
    }

    /// How many MACs are known.
    public var count: Int {
      Int(truncatingIfNeeded: unsafe shared[Self.countWord].load(ordering: .relaxed))
    }

    /// Where a MAC (low 48 bits) is, `.none` if that is not known. One or two cache lines.
    @inline(__always)
    public func lookup(_ mac: UInt64) -> InterfaceIndex {
      let key = mac << 16
      if key == 0 { return .none }
      let pair = candidates(key)
      var location = locate(key, inBucketAt: pair.first)
      if location > 0xFFFF { location = locate(key, inBucketAt: pair.second) }
      return location > 0xFFFF ? .none : InterfaceIndex(rawValue: UInt16(truncatingIfNeeded: location))
    }

    /// `find` for who wants no more than the location: the least difference to the key, which is the location where
    /// there is one, and more than 16 bits where there is none. Of two entries for a moment, either is right.
    @inline(__always)
    private func locate(_ key: UInt64, inBucketAt start: Int) -> UInt64 {
      var least = UInt64.max
      for place in 0..<Self.bucketEntries { least = min(least, entry(start &+ place) ^ key) }
      return least
    }

    /// Whether the table is larger than what a core keeps near anyway.
    @inline(__always)
    public var gainsByPrefetch: Bool { bucketMask >= Self.prefetchBucketsMin }

    /// Brings near what looking up a MAC will read.
    @inline(__always)
    public func prefetch(_ mac: UInt64) {
      let pair = candidates(mac << 16)
      unsafe clinux_prefetch(cell(pair.first))
      unsafe clinux_prefetch(cell(pair.second))
    }

    /// Notes that a frame came from a MAC (low 48 bits, unicast, not zero) at a location.
    ///
    /// A move is followed at once, unless the MAC is frozen. A MAC that is already here and was heard this second is
    /// only read, so that workers which hear the same MAC do not take its cache line from each other.
    /// - Parameter nowSeconds: a monotonic count of seconds that starts at 1; workers may differ by a second or two.
    @inline(__always)
    public func learn(_ mac: UInt64, at location: InterfaceIndex, nowSeconds: UInt32) -> Learned {
      let key = mac << 16
      precondition(key != 0 && location != .none, "learning needs an address and a place")
      let pair = candidates(key)
      let found = find(key, pair)
      if found.word == key | UInt64(location.rawValue) {
        let trace = Trace(trace(of: found.cell))
        let isFrozen = trace.isFrozen(nowSeconds)
        if !isFrozen || trace.home == location {
          if trace.lastSeenSeconds != nowSeconds { refresh(found.cell, trace, location, nowSeconds) }
          return isFrozen ? .held : .known
        }
      }
      return learnChange(key, pair, key | UInt64(location.rawValue), nowSeconds)
    }

    // MARK: Learning something new

    @inline(never)
    private func learnChange(_ key: UInt64, _ pair: Candidates, _ word: UInt64, _ nowSeconds: UInt32) -> Learned {
      for _ in 0..<Self.attemptsMax {
        let found = find(key, pair)
        let learned =
          found.word == 0 ? insert(key, pair, word, nowSeconds) : hear(found, key, at: Self.location(word), nowSeconds)
        if let learned { return learned }
      }
      return .skipped
    }

    /// What hearing a known MAC at a location does. Nil: somebody else changed the entry, look again.
    private func hear(_ found: Match, _ key: UInt64, at location: InterfaceIndex, _ nowSeconds: UInt32) -> Learned? {
      let trace = Trace(trace(of: found.cell))
      if trace.isFrozen(nowSeconds) { return hearFrozen(found.cell, key, trace, at: location, nowSeconds) }
      if Self.location(found.word) == location {
        refresh(found.cell, trace, location, nowSeconds)
        return .known
      }
      if trace.movesInWindow(nowSeconds) >= MACTable.movesMax {
        let froze = unsafe cell(found.cell + Self.bucketEntries).pointee.compareExchange(
          expected: trace.bits, desired: trace.frozen(nowSeconds).bits, ordering: .sequentiallyConsistent)
        guard froze.exchanged else { return nil }
        bringHome(found.cell, key, trace.home)
        // What was decided while the MAC was merely known does not hold for a frozen one.
        raiseGeneration()
        return location == trace.home ? .frozeHere : .froze
      }
      // The entry first and its trace after it, so that only the worker that moves it counts the move: when several
      // hear of one migration at once, it is one move.
      let moved = unsafe cell(found.cell).pointee.compareExchange(
        expected: found.word, desired: key | UInt64(location.rawValue), ordering: .sequentiallyConsistent)
      guard moved.exchanged else { return nil }
      raiseGeneration()
      let counted = countMove(found.cell, key, trace, nowSeconds)
      // Another worker froze it between our look at its trace and our move.
      if counted.isFrozen(nowSeconds) { return hearFrozen(found.cell, key, counted, at: location, nowSeconds) }
      return .moved
    }

    private func hearFrozen(
      _ index: Int, _ key: UInt64, _ trace: Trace, at location: InterfaceIndex, _ nowSeconds: UInt32
    ) -> Learned {
      bringHome(index, key, trace.home)
      guard location == trace.home else { return .frozen }
      refresh(index, trace, location, nowSeconds)
      return .held
    }

    /// Puts a frozen MAC where its home is, if it is elsewhere. When another worker changes the entry at once, that one
    /// brings it home, or has removed it.
    private func bringHome(_ index: Int, _ key: UInt64, _ home: InterfaceIndex) {
      let word = unsafe cell(index).pointee.load(ordering: .sequentiallyConsistent)
      let wordAtHome = key | UInt64(home.rawValue)
      guard Self.matches(word, key), word != wordAtHome else { return }
      let brought = unsafe cell(index).pointee.compareExchange(
        expected: word, desired: wordAtHome, ordering: .sequentiallyConsistent)
      if brought.exchanged { raiseGeneration() }
    }

    /// Counts a move that was made, unless another worker froze the MAC meanwhile.
    /// - Returns: the trace as it is now.
    private func countMove(_ index: Int, _ key: UInt64, _ seen: Trace, _ nowSeconds: UInt32) -> Trace {
      var trace = seen
      for _ in 0..<Self.attemptsMax {
        let moved = trace.moved(nowSeconds)
        let result = unsafe cell(index + Self.bucketEntries).pointee.compareExchange(
          expected: trace.bits, desired: moved.bits, ordering: .sequentiallyConsistent)
        if result.exchanged { return moved }
        trace = Trace(result.original)
        // The move is no other MAC's. A trace is written before its entry is published, so the one that was read is
        // ours if the entry still is.
        if trace.isFrozen(nowSeconds) || !Self.matches(entry(index), key) { break }
      }
      return trace
    }

    /// Enters a MAC that no candidate holds. Nil: somebody else was faster, look again.
    private func insert(_ key: UInt64, _ pair: Candidates, _ word: UInt64, _ nowSeconds: UInt32) -> Learned? {
      // Read first: at the limit every frame from an unknown MAC comes here, and none of them should write.
      guard count < macsMax else { return .limited }
      // Reserved before it is entered, so that the table never holds more than its limit.
      guard addToCount(1) <= macsMax else {
        addToCount(-1)
        return .limited
      }
      guard let place = emptyCell(pair) else {
        addToCount(-1)
        return .limited
      }
      let claim = unsafe cell(place).pointee.compareExchange(
        expected: 0, desired: Self.claimed, ordering: .acquiringAndReleasing)
      guard claim.exchanged else {
        addToCount(-1)
        return nil
      }
      unsafe cell(place + Self.bucketEntries).pointee.store(
        Trace(home: Self.location(word), lastSeenSeconds: nowSeconds).bits, ordering: .relaxed)
      unsafe cell(place).pointee.store(word, ordering: .sequentiallyConsistent)
      return removeDuplicates(key, pair, of: place) ? .learned : nil
    }

    /// Keeps the earliest entry of a MAC in candidate order and removes the others; false if the one at `own` is
    /// no longer there.
    private func removeDuplicates(_ key: UInt64, _ pair: Candidates, of own: Int) -> Bool {
      var kept = -1
      for place in 0..<Self.bucketWords {
        let index = pair.cell(place)
        var word = unsafe cell(index).pointee.load(ordering: .sequentiallyConsistent)
        guard Self.matches(word, key) else { continue }
        if kept < 0 {
          kept = index
          continue
        }
        // It may move while we try: each failure is another worker's move, and those end in a freeze.
        while Self.matches(word, key), !remove(index, word) { word = entry(index) }
      }
      return kept == own
    }

    /// An empty place for a new MAC; nil if both buckets are full.
    private func emptyCell(_ pair: Candidates) -> Int? {
      let first = emptyCell(inBucketAt: pair.first)
      if let cell = first.cell, first.entries <= Self.firstBucketEntriesMax { return cell }
      let second = emptyCell(inBucketAt: pair.second)
      guard let cell = second.cell, second.entries < first.entries else { return first.cell ?? second.cell }
      return cell
    }

    private func emptyCell(inBucketAt start: Int) -> (cell: Int?, entries: Int) {
      var empty: Int?
      var entries = 0
      for index in start..<start + Self.bucketEntries {
        if entry(index) == 0 {
          if empty == nil { empty = index }
        } else {
          entries += 1
        }
      }
      return (empty, entries)
    }

    /// Notes that a MAC was heard where it is known to be. When another worker does so at once, one of them suffices.
    @inline(never)
    private func refresh(_ index: Int, _ old: Trace, _ location: InterfaceIndex, _ nowSeconds: UInt32) {
      let heard = old.heard(at: location, nowSeconds)
      if heard.bits == old.bits { return }
      _ = unsafe cell(index + Self.bucketEntries).pointee.compareExchange(
        expected: old.bits, desired: heard.bits, ordering: .relaxed)
    }

    /// Takes a home out of an entry's history, and with it the history; control only.
    fileprivate func forgetHome(_ home: InterfaceIndex, _ index: Int) {
      var trace = Trace(trace(of: index))
      while trace.home == home, trace.hasHistory {
        let free = Trace(home: Self.location(entry(index)), lastSeenSeconds: trace.lastSeenSeconds)
        let result = unsafe cell(index + Self.bucketEntries).pointee.compareExchange(
          expected: trace.bits, desired: free.bits, ordering: .sequentiallyConsistent)
        if result.exchanged { return }
        // Each failure is another worker's move or freeze.
        trace = Trace(result.original)
      }
    }

    /// Removes an entry if it is still the given word.
    fileprivate func remove(_ index: Int, _ word: UInt64) -> Bool {
      let removed = unsafe cell(index).pointee.compareExchange(
        expected: word, desired: 0, ordering: .acquiringAndReleasing)
      guard removed.exchanged else { return false }
      raiseGeneration()
      addToCount(-1)
      return true
    }

    private func raiseGeneration() {
      unsafe shared.pointee.wrappingAdd(1, ordering: .acquiringAndReleasing)
    }

    @discardableResult
    private func addToCount(_ change: Int) -> Int {
      let result = unsafe shared[Self.countWord].wrappingAdd(
        UInt64(bitPattern: Int64(change)), ordering: .relaxed)
      return Int(truncatingIfNeeded: result.newValue)
    }

    // MARK: Finding

    /// The word numbers at which the two candidate buckets of a MAC start.
    private struct Candidates: BitwiseCopyable {
      let first: Int
      let second: Int
      /// The entry at a place, 0 to 15, of the candidate order.
      @inline(__always)
      func cell(_ place: Int) -> Int {
        place < Reference.bucketEntries ? first + place : second + place - Reference.bucketEntries
      }
    }

    private struct Match: BitwiseCopyable {
      let cell: Int
      /// The entry as it was read, 0 if there was none.
      let word: UInt64
    }

    @inline(__always)
    private func candidates(_ key: UInt64) -> Candidates {
      // Two rounds of a folded 128-bit product: every bit of the MAC and of the seed reaches both bucket numbers.
      let hash = Self.fold(Self.fold(key ^ seed, 0x9E37_79B9_7F4A_7C15) ^ seed, 0xD6E8_FEB8_6659_FD93)
      let first = hash & bucketMask
      let second = (hash >> 32) & bucketMask
      let other = second == first ? first ^ 1 : second
      return Candidates(
        first: Int(truncatingIfNeeded: first) &* Self.bucketWords,
        second: Int(truncatingIfNeeded: other) &* Self.bucketWords)
    }

    @inline(__always)
    private static func fold(_ a: UInt64, _ b: UInt64) -> UInt64 {
      let product = a.multipliedFullWidth(by: b)
      return product.high ^ product.low
    }

    @inline(__always)
    private func find(_ key: UInt64, _ pair: Candidates) -> Match {
      if key == 0 { return Match(cell: 0, word: 0) }
      let found = find(key, inBucketAt: pair.first)
      return found.word != 0 ? found : find(key, inBucketAt: pair.second)
    }

    @inline(__always)
    private func find(_ key: UInt64, inBucketAt start: Int) -> Match {
      // All eight words, from the last to the first, without a branch on what is found: where in the bucket a MAC
      // is cannot be predicted, and one wrong guess costs more than the loads (random MACs, 1,024 known: 10 ns a
      // lookup, 20 when it stops at the match). Frames of one flow, which could be, are the decision cache's.
      var cell = 0
      var found: UInt64 = 0
      for place in 0..<Self.bucketEntries {
        let index = start &+ Self.bucketEntries &- 1 &- place
        let word = entry(index)
        let isMatch = Self.matches(word, key)
        found = isMatch ? word : found
        cell = isMatch ? index : cell
      }
      return Match(cell: cell, word: found)
    }

    @inline(__always)
    private static func matches(_ word: UInt64, _ key: UInt64) -> Bool { word ^ key <= 0xFFFF }

    @inline(__always)
    fileprivate static func location(_ word: UInt64) -> InterfaceIndex {
      InterfaceIndex(rawValue: UInt16(truncatingIfNeeded: word))
    }

    // MARK: Words

    /// A word of the buckets. `index` comes from `candidates` or `forEachEntry`, so it is in range.
    @unsafe @inline(__always)
    private func cell(_ index: Int) -> UnsafeMutablePointer<Atomic<UInt64>> { unsafe buckets + index }

    /// Acquires what the inserting thread wrote before it published the entry: its trace.
    @inline(__always)
    fileprivate func entry(_ index: Int) -> UInt64 { unsafe cell(index).pointee.load(ordering: .acquiring) }

    @inline(__always)
    fileprivate func trace(of index: Int) -> UInt64 {
      unsafe cell(index + Self.bucketEntries).pointee.load(ordering: .acquiring)
    }

    fileprivate func forEachEntry(_ body: (_ cell: Int, _ word: UInt64) -> Void) {
      for bucket in 0...Int(bucketMask) {
        for place in 0..<Self.bucketEntries {
          let index = bucket * Self.bucketWords + place
          let word = entry(index)
          if word > Self.claimed { body(index, word) }
        }
      }
    }
  }
}

/// What is known of an entry beside its location, in one word:
/// ```
/// 63 … 32  the second in which the MAC was last heard where it is
/// 31       frozen
/// 30 … 28  moves in the window
/// 27 … 16  the second, modulo 4,096, in which the window or the freeze began
/// 15 … 0   the home: where the MAC was last heard while it did not move; without a history, where it is
/// ```
/// A trace and its entry are two words and change one after the other. The worst that comes of it is one move
/// more or less in the count of a MAC that just took another's place, or a home at an interface that went a moment ago.
private struct Trace: BitwiseCopyable {
  let bits: UInt64

  private static let frozenBit: UInt64 = 1 << 31
  private static let movesShift: UInt64 = 28
  /// Above `movesMax`: workers that move a MAC at the same time are counted beyond it.
  private static let movesLimit: UInt64 = 7
  private static let sinceShift: UInt64 = 16
  private static let sinceMask: UInt64 = 1 << 12 - 1
  /// Half of the range of `since`: what is further away is ahead, by the clock of another worker.
  private static let elapsedSecondsMax: UInt64 = 1 << 11
  /// Who was silent for this long has no history, whatever `since` says: a window and a freeze after it, 70 s, are
  /// over. Each time a MAC is heard a history that is over is forgotten, so one that is left began at most a freeze
  /// before that, and is told from one to come.
  private static let silenceSecondsMax: UInt32 = 1 << 10

  @inline(__always)
  init(_ bits: UInt64) { self.bits = bits }

  /// A MAC that has not moved.
  init(home: InterfaceIndex, lastSeenSeconds: UInt32) {
    bits = UInt64(lastSeenSeconds) << 32 | UInt64(home.rawValue)
  }

  private init(home: InterfaceIndex, lastSeenSeconds: UInt32, frozen: Bool, moves: UInt64, sinceSeconds: UInt64) {
    bits =
      UInt64(lastSeenSeconds) << 32 | (frozen ? Self.frozenBit : 0) | min(moves, Self.movesLimit) << Self.movesShift
      | (sinceSeconds & Self.sinceMask) << Self.sinceShift | UInt64(home.rawValue)
  }

  @inline(__always)
  var lastSeenSeconds: UInt32 { UInt32(truncatingIfNeeded: bits >> 32) }
  @inline(__always)
  var home: InterfaceIndex { InterfaceIndex(rawValue: UInt16(truncatingIfNeeded: bits)) }
  private var moves: UInt64 { bits >> Self.movesShift & Self.movesLimit }
  private var sinceSeconds: UInt64 { bits >> Self.sinceShift & Self.sinceMask }
  private var hasFrozenBit: Bool { bits & Self.frozenBit != 0 }
  var hasHistory: Bool { hasFrozenBit || moves != 0 }

  /// Whether less than `seconds` have gone since the window or the freeze began; so it is when by another worker's
  /// clock it begins in a second or two.
  private func isWithin(_ seconds: UInt32, _ nowSeconds: UInt32) -> Bool {
    guard silenceSeconds(nowSeconds) < Self.silenceSecondsMax else { return false }
    let elapsed = (UInt64(nowSeconds) &- sinceSeconds) & Self.sinceMask
    return elapsed < UInt64(seconds) || elapsed >= Self.elapsedSecondsMax
  }

  /// Seconds since the MAC was last heard; 0 if another worker, whose clock is ahead, heard it.
  func silenceSeconds(_ nowSeconds: UInt32) -> UInt32 {
    let silence = Int32(bitPattern: nowSeconds &- lastSeenSeconds)
    return silence > 0 ? UInt32(silence) : 0
  }

  func isFrozen(_ nowSeconds: UInt32) -> Bool {
    hasFrozenBit && isWithin(MACTable.freezeSeconds, nowSeconds)
  }

  func movesInWindow(_ nowSeconds: UInt32) -> Int {
    !hasFrozenBit && isWithin(MACTable.flapWindowSeconds, nowSeconds) ? Int(moves) : 0
  }

  /// Heard where it is. The later of two workers' clocks stays; a history that is over is forgotten.
  func heard(at location: InterfaceIndex, _ nowSeconds: UInt32) -> Trace {
    let latest = Int32(bitPattern: nowSeconds &- lastSeenSeconds) > 0 ? nowSeconds : lastSeenSeconds
    return hasHistory && !isFrozen(nowSeconds) && movesInWindow(nowSeconds) == 0
      ? Trace(home: location, lastSeenSeconds: latest) : Trace(UInt64(latest) << 32 | bits & 0xFFFF_FFFF)
  }

  /// Moved, and the move was followed. The home stays until it is heard somewhere after its window: a loop that came
  /// to rest before a freeze leaves the MAC anywhere, and the next one must not take that for its home.
  func moved(_ nowSeconds: UInt32) -> Trace {
    let moves = UInt64(movesInWindow(nowSeconds))
    return Trace(
      home: home, lastSeenSeconds: nowSeconds, frozen: false, moves: moves + 1,
      sinceSeconds: moves == 0 ? UInt64(nowSeconds) : sinceSeconds)
  }

  /// Frozen at its home. It may have been heard elsewhere, so its age goes on.
  func frozen(_ nowSeconds: UInt32) -> Trace {
    Trace(home: home, lastSeenSeconds: lastSeenSeconds, frozen: true, moves: 0, sinceSeconds: UInt64(nowSeconds))
  }
}
