/// The several places that one frame goes to: the members of its domain, or the targets of the VNET rules that fire.
///
/// A value that refers only to its snapshot, and is good for as long as that lives: nothing that a worker decides later
/// changes it, so another thread may go through it. The frame's ingress is never among the targets, and each comes
/// once.
public struct TargetSet: BitwiseCopyable, Sendable, Sequence {
  enum Content: BitwiseCopyable {
    /// `count` of the members from `start` on, the ingress included if it is among them.
    case members(FixedArray<InterfaceIndex>.Reference, start: UInt32, count: UInt32)
    case routes(RouteTable.Match)
  }
  let content: Content
  let ingress: InterfaceIndex
  private let count: UInt32

  /// How many the frame goes to.
  @inline(__always)
  public var targetCount: Int { Int(count) }

  @inline(__always)
  init(
    members: FixedArray<InterfaceIndex>.Reference, start: UInt32, count: UInt32, ingress: InterfaceIndex,
    targetCount: UInt32
  ) {
    content = .members(members, start: start, count: count)
    self.ingress = ingress
    self.count = targetCount
  }

  /// Goes through the targets once, to count them.
  init(_ match: RouteTable.Match, ingress: InterfaceIndex) {
    content = .routes(match)
    self.ingress = ingress
    var count: UInt32 = 0
    var targets = RouteTargets(match)
    while let target = targets.next() { count += target == ingress ? 0 : 1 }
    self.count = count
  }

  @inline(__always)
  public func makeIterator() -> Iterator { Iterator(self) }

  public struct Iterator: IteratorProtocol {
    private let ingress: InterfaceIndex
    private var content: Remaining

    private enum Remaining {
      case members(FixedArray<InterfaceIndex>.Reference, next: UInt32, end: UInt32)
      case routes(RouteTargets)
    }

    @inline(__always)
    fileprivate init(_ set: TargetSet) {
      ingress = set.ingress
      switch set.content {
      case .members(let members, let start, let count):
        content = .members(members, next: start, end: start + count)
      case .routes(let match): content = .routes(RouteTargets(match))
      }
    }

    @inline(__always)
    public mutating func next() -> InterfaceIndex? {
      switch content {
      case .members(let members, var next, let end):
        while next < end {
          let member = members[Int(next)]
          next += 1
          if member == ingress { continue }
          content = .members(members, next: next, end: end)
          return member
        }
        return nil
      case .routes(var targets):
        var target = targets.next()
        if target == ingress { target = targets.next() }
        content = .routes(targets)
        return target
      }
    }
  }
}

/// Sets are equal when they name the same targets.
extension TargetSet: Hashable {
  public static func == (one: TargetSet, other: TargetSet) -> Bool {
    one.targetCount == other.targetCount && one.elementsEqual(other)
  }
  public func hash(into hasher: inout Hasher) {
    for target in self { hasher.combine(target) }
  }
}

/// The targets of the rules that fire for a frame, ascending and each once; the ingress is among them if a rule says
/// so.
struct RouteTargets: BitwiseCopyable {
  private var match: RouteTable.Match

  @inline(__always)
  init(_ match: RouteTable.Match) { self.match = match }

  /// Merges the ranges: each is ascending, so the least of their fronts is the next.
  mutating func next() -> InterfaceIndex? {
    var least = InterfaceIndex.none
    for range in 0..<RouteTable.rangesMax {
      skipExcepted(range)
      guard match.starts[range] != RouteTable.Match.noRange else { continue }
      let target = match.targets[Int(match.starts[range])].interface
      if target.rawValue < least.rawValue { least = target }
    }
    guard least != .none else { return nil }
    for range in 0..<RouteTable.rangesMax where match.starts[range] != RouteTable.Match.noRange {
      let target = match.targets[Int(match.starts[range])]
      if target.interface == least { advance(range, past: target) }
    }
    return least
  }

  private mutating func skipExcepted(_ range: Int) {
    while match.starts[range] != RouteTable.Match.noRange {
      let target = match.targets[Int(match.starts[range])]
      guard match.excepts(target) else { return }
      advance(range, past: target)
    }
  }

  @inline(__always)
  private mutating func advance(_ range: Int, past target: RouteTable.Target) {
    match.starts[range] = target.isLast ? RouteTable.Match.noRange : match.starts[range] + 1
  }
}
