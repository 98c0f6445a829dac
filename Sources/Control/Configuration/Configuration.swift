import Datapath

/// What one node forwards and how: the checked, resolved, typed form of a configuration file or of a quick start.
///
/// A value of this type is consistent: names are unique, whatever is named exists, every host name is an address, every
/// link's family has an underlay address, and every CPU that is named may be used.
/// `Configuration.parse` and `Configuration.quickStart` are the ways to make one; both report every error that they
/// find.
public struct Configuration: Equatable, Sendable {
  public var node: Node
  public var underlay: Underlay
  /// In the order of the file; empty only where every port is an end of a passthrough.
  public var domains: [Domain]
  /// In the order of the file; at least one.
  public var ports: [Port]
  /// In the order of the file; may be empty: the node is then a local switch.
  public var links: [Link]
  /// In the order of the file; no two are equal.
  public var routes: [Route] = []
  /// In the order of the file; no port is in two of them.
  public var passthroughs: [Passthrough] = []
  public var tuning: Tuning
  /// What is allowed and probably not meant, one line each, in the form of `ConfigurationError`.
  public var warnings: [String] = []

  public struct Node: Equatable, Sendable {
    public var name: String
  }

  /// The network between the nodes, seen from here.
  public struct Underlay: Equatable, Sendable {
    /// This node's addresses, at most one of each family; empty only where there is no link.
    public var addresses: [UnderlayAddress]
    /// The UDP port that VXLAN is received on.
    public var vxlanPort: UInt16
    /// The UDP port that VNET/P is received on.
    public var vnetpPort: UInt16

    /// The UDP port that an encapsulation is received on.
    public func port(of encapsulation: Encapsulation) -> UInt16 {
      switch encapsulation {
      case .vxlan: vxlanPort
      case .vnetp: vnetpPort
      }
    }

    /// This node's address of a family, if it has one.
    public func address(of family: UnderlayAddress.Family) -> UnderlayAddress? {
      addresses.first { $0.family == family }
    }
  }

  /// One isolated Ethernet.
  public struct Domain: Equatable, Sendable {
    public var name: String
    /// 24 bits (RFC 7348, section 5).
    public var vni: UInt32
    public var forwarding: Forwarding
    /// Seconds after which a MAC address that was not seen again is forgotten.
    public var ageingSeconds: Int
    /// The most MAC addresses that are learned.
    public var macsMax: Int
    /// The most frames a second that a worker floods; 0: no limit.
    public var floodFramesPerSecondMax: Int
  }

  /// A place where frames enter and leave locally.
  public struct Port: Equatable, Sendable {
    public var name: String
    public var kind: PortKind
    /// The network device's name: 1 to 15 bytes.
    public var device: String
    /// The path of a vhost-user port's socket; of no meaning for others.
    public var socket: String
    public var socketMode: SocketMode
    /// The name of the domain that it belongs to; nil: it is an end of exactly one passthrough.
    public var domain: String?
    /// How many queues the device has, each read by one worker.
    public var queues: Int
    /// The device's MTU; nil: the underlay's less the encapsulation, found out at start.
    public var mtuBytes: Int?
    /// Whether super-frames are taken from and given to the guest.
    public var offloads: Bool
    /// The guest's address, by which the VNET/P control language names an interface; no two ports have the same.
    public var mac: MACAddress?
  }

  /// A connection to another node.
  public struct Link: Equatable, Sendable {
    public var name: String
    /// The other node's address and UDP port, host names resolved.
    public var remote: Endpoint
    public var encapsulation: Encapsulation
    /// The names of the domains that it carries, at least one, in the order of `Configuration.domains`.
    public var domains: [String]
    /// Whether frames that came over it may leave by other links.
    public var isRelay: Bool
    /// Whether the underlay may fragment what is longer than its MTU.
    public var fragments: Bool
    /// What happens to VXLAN datagrams whose reserved bits are not zero.
    public var reservedBits: ReservedBits
  }

  /// A VNET rule.
  public struct Route: Hashable, Sendable {
    /// The name of a domain whose forwarding is `routes`.
    public var domain: String
    public var source: MACPattern
    public var destination: MACPattern
    /// nil: from any interface.
    public var from: InterfaceName?
    public var to: InterfaceName
  }

  public typealias MACPattern = Datapath.MACPattern

  /// A port or a link by its name.
  public enum InterfaceName: Hashable, Sendable {
    case port(String)
    case link(String)
  }

  /// Two ports wired together, by their names.
  public struct Passthrough: Equatable, Sendable {
    public var a: String
    public var b: String
  }

  /// What makes it fast or slow, never what is right.
  public struct Tuning: Equatable, Sendable {
    public var layout: Layout
    public var cpus: CPUs
    public var dispatch: Dispatch
    public var yield: Yield
    public var io: IO
    public var ringEntries: Int
    public var batchFrames: Int
    public var batchWaitMicroseconds: Int
    public var spinMicroseconds: Int
    public var slots: Int
    /// Descriptors that each ring between two workers holds; nil: as many as ``Wiring`` finds enough.
    public var ringDepthFrames: Int?
    /// The most descriptors that a worker takes from such a ring at a time.
    public var ringBatchFrames: Int
    public var sendBufferBytes: Int
    public var receiveBufferBytes: Int
    public var dispatchUpperFramesPerSecond: Int
    public var dispatchLowerFramesPerSecond: Int
    public var dispatchPeriodMilliseconds: Int
    public var sourcePorts: Int
    /// Whether links send trains (UDP GSO).
    public var gso: Bool
    /// Whether the underlay's sockets take trains (UDP GRO).
    public var gro: Bool
    public var hugePages: HugePages
    /// Features of io_uring that are not used even where the kernel has them.
    public var without: UringFeatures
  }

  /// The CPUs that workers are pinned to.
  public enum CPUs: Equatable, Sendable {
    /// Chosen at start.
    case auto
    /// One worker on each, with all stages: the layout `fused`.
    case list([Int])
    /// The CPUs of each stage, at least one each: the layout `pipeline`.
    case stages(receive: [Int], route: [Int], transmit: [Int])
  }

  public enum Forwarding: String, CaseIterable, Sendable {
    case learning
    /// VNET rules alone decide.
    case routes
  }

  public enum PortKind: String, CaseIterable, Sendable {
    case tap
    case packet
    case vhostUser = "vhost-user"
  }

  /// Which side a vhost-user port's socket is.
  public enum SocketMode: String, CaseIterable, Sendable {
    /// The VMM connects to a socket that is made here.
    case server
    /// The VMM makes the socket, and is connected to, again and again.
    case client
  }

  public enum Encapsulation: String, CaseIterable, Sendable {
    case vxlan
    case vnetp
  }

  public enum ReservedBits: String, CaseIterable, Sendable {
    case ignore
    case drop
  }

  public enum Layout: String, CaseIterable, Sendable {
    case auto
    case fused
    case pipeline
  }

  public enum Dispatch: String, CaseIterable, Sendable {
    case adaptive
    case guestDriven = "guest-driven"
    case vmmDriven = "vmm-driven"
  }

  public enum Yield: String, CaseIterable, Sendable {
    case adaptive
    case immediate
    case timed
    case never
  }

  public enum IO: String, CaseIterable, Sendable {
    case auto
    case uring
    case syscalls
  }

  public enum HugePages: String, CaseIterable, Sendable {
    case auto
    case on
    case off
  }

  /// The domain of a name; nil when there is none.
  public func domain(named name: String) -> Domain? {
    domains.first { $0.name == name }
  }
}

extension Configuration.MACPattern {
  /// Reads `any`, `none`, `02:00:00:00:00:0a` and `not-02:00:00:00:00:0a`; nil for anything else.
  init?(_ text: String) {
    switch text {
    case "any": self = .any
    case "none": self = .none
    default:
      let isNegated = text.hasPrefix("not-")
      guard let mac = MACAddress(isNegated ? String(text.dropFirst(4)) : text) else { return nil }
      self = isNegated ? .not(mac) : .exact(mac)
    }
  }

  /// Its name in VNET/P's table of scores.
  var qualifier: String {
    switch self {
    case .any: "any"
    case .none: "none"
    case .exact: "exact"
    case .not: "not"
    }
  }
}

extension Configuration.InterfaceName: CustomStringConvertible {
  /// Reads `port:NAME` and `link:NAME`; nil for anything else.
  init?(_ text: String) {
    let parts = text.split(separator: ":", maxSplits: 1, omittingEmptySubsequences: false).map(String.init)
    guard parts.count == 2, !parts[1].isEmpty else { return nil }
    switch parts[0] {
    case "port": self = .port(parts[1])
    case "link": self = .link(parts[1])
    default: return nil
    }
  }

  public var description: String {
    switch self {
    case .port(let name): "port:\(name)"
    case .link(let name): "link:\(name)"
    }
  }
}

/// One thing that is wrong with a configuration.
public struct ConfigurationError: Error, Equatable, Sendable, CustomStringConvertible {
  /// Line and column, both from 1, the column in characters.
  public struct Position: Equatable, Sendable {
    public var line: Int
    public var column: Int
  }

  /// The file; nil where the command line is meant.
  public var file: String?
  /// Where in the file; nil for what is missing from the whole of it.
  public var position: Position?
  /// Where in the file, such as `port[1].domain` (arrays count from 0), or which flag; empty for the file as a whole.
  public var keyPath: String
  /// What is wrong.
  public var problem: String
  /// What would be right.
  public var remedy: String

  public init(file: String?, position: Position? = nil, keyPath: String, problem: String, remedy: String) {
    self.file = file
    self.position = position
    // What is quoted from a file or the command line must neither break the line nor reach a terminal as a command.
    self.keyPath = keyPath.escaped
    self.problem = problem.escaped
    self.remedy = remedy.escaped
  }

  /// One line: `FILE[:LINE:COLUMN]: KEY PATH: what is wrong; what would be right`.
  public var description: String {
    var place = file.map { [$0] } ?? []
    if let position { place = ["\(file ?? ""):\(position.line):\(position.column)"] }
    if !keyPath.isEmpty { place.append(keyPath) }
    return (place + ["\(problem); \(remedy)"]).joined(separator: ": ")
  }
}

/// Everything that is wrong with a configuration: at least one error.
public struct ConfigurationErrors: Error, Equatable, Sendable, CustomStringConvertible {
  public var errors: [ConfigurationError]

  public var description: String {
    errors.map(\.description).joined(separator: "\n")
  }
}

extension Configuration {
  /// The whole in one line, such as `host-a: 1 domain, 2 ports, 1 link`.
  public var summary: String {
    func count(_ count: Int, _ what: String) -> String { "\(count) \(what)\(count == 1 ? "" : "s")" }
    var parts = [count(domains.count, "domain"), count(ports.count, "port"), count(links.count, "link")]
    if !routes.isEmpty { parts.append(count(routes.count, "route")) }
    if !passthroughs.isEmpty { parts.append(count(passthroughs.count, "passthrough")) }
    return "\(node.name): " + parts.joined(separator: ", ")
  }
}
