/// What a VNET rule says of one address of a frame.
public enum MACPattern: Hashable, Sendable {
  /// This address.
  case exact(MACAddress)
  case any
  /// Every address but this one.
  case not(MACAddress)
  /// As a destination: the source's default route, which takes what no better rule does. As a source it is in no
  /// scored combination.
  case none
}

/// A VNET rule: frames from and to these addresses go there. VNET/P's routes, with the source type matched.
public struct VNETRoute: Hashable, Sendable {
  /// Which interface a frame must have come by.
  public enum Origin: Hashable, Sendable {
    case any
    case interface(InterfaceIndex)
  }
  public let source: MACPattern
  public let destination: MACPattern
  public let from: Origin
  public let to: InterfaceIndex

  public init(source: MACPattern, destination: MACPattern, from: Origin = .any, to: InterfaceIndex) {
    self.source = source
    self.destination = destination
    self.from = from
    self.to = to
  }

  /// How specific the rule is: of the rules that match a frame, all with the highest score fire. The score does not
  /// depend on `from`. Nil for a combination that VNET/P does not score (not and not, any or not with a destination of
  /// none, a source of none): such a rule could never fire, and is to be refused.
  public var score: Int? { pattern?.score }

  var pattern: RoutePattern? {
    switch (source, destination) {
    case (.exact, .exact): .exactExact
    case (.exact, .not): .exactNot
    case (.not, .exact): .notExact
    case (.exact, .any): .exactAny
    case (.any, .exact): .anyExact
    case (.any, .not): .anyNot
    case (.not, .any): .notAny
    case (.exact, .none): .exactNone
    case (.any, .any): .anyAny
    default: nil
    }
  }
}

/// The scored combinations, source first.
enum RoutePattern: UInt8, BitwiseCopyable, CaseIterable {
  case exactExact, exactNot, notExact, exactAny, anyExact, anyNot, notAny, exactNone, anyAny

  /// VNET/P release 1.3.
  var score: Int {
    switch self {
    case .exactExact: 8
    case .exactNot, .notExact: 7
    case .exactAny, .anyExact: 6
    case .anyNot, .notAny: 5
    case .exactNone: 4
    case .anyAny: 3
    }
  }

  static let levels = 6

  /// The patterns of one score, level 0 being the highest.
  @inline(__always)
  static func level(_ level: Int) -> (RoutePattern, RoutePattern?) {
    switch level {
    case 0: (.exactExact, nil)
    case 1: (.exactNot, .notExact)
    case 2: (.exactAny, .anyExact)
    case 3: (.anyNot, .notAny)
    case 4: (.exactNone, nil)
    default: (.anyAny, nil)
    }
  }

  /// Whether rules of the pattern are found by a frame's source.
  @inline(__always)
  var hasExactSource: Bool {
    switch self {
    case .exactExact, .exactNot, .exactAny, .exactNone: true
    default: false
    }
  }
  /// Whether they are found by its destination.
  @inline(__always)
  var hasExactDestination: Bool {
    switch self {
    case .exactExact, .notExact, .anyExact: true
    default: false
    }
  }
  /// Whether they except a source, and not a destination.
  @inline(__always)
  var exceptsSource: Bool { self == .notExact || self == .notAny }
  /// Whether they except an address.
  var exceptsAddress: Bool {
    switch self {
    case .exactNot, .notExact, .anyNot, .notAny: true
    default: false
    }
  }
}
