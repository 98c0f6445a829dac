import Datapath

/// What one node forwards and how: the checked, resolved, typed form of a configuration file or of a quick start.
///
/// A value of this type is consistent: names are unique, every domain that is named exists, every host name is an
/// address, and every link's family has an underlay address. `Configuration.parse` and `Configuration.quickStart` are
/// the ways to make one; both report every error that they find.
public struct Configuration: Equatable, Sendable {
  public var node: Node
  public var underlay: Underlay
  /// In the order of the file; at least one.
  public var domains: [Domain]
  /// In the order of the file; at least one.
  public var ports: [Port]
  /// In the order of the file; may be empty: the node is then a local switch.
  public var links: [Link]
  public var tuning: Tuning

  public struct Node: Equatable, Sendable {
    public var name: String
  }

  /// The network between the nodes, seen from here.
  public struct Underlay: Equatable, Sendable {
    /// This node's addresses, at most one of each family; empty only where there is no link.
    public var addresses: [UnderlayAddress]
    /// The UDP port that VXLAN is received on.
    public var vxlanPort: UInt16

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
  }

  /// A place where frames enter and leave locally.
  public struct Port: Equatable, Sendable {
    public var name: String
    public var kind: PortKind
    /// The network device's name: 1 to 15 bytes.
    public var device: String
    /// The name of the domain that it belongs to.
    public var domain: String
    /// How many queues the device has, each read by one worker.
    public var queues: Int
    /// The device's MTU; nil: the underlay's less the encapsulation, found out at start.
    public var mtuBytes: Int?
  }

  /// A connection to another node.
  public struct Link: Equatable, Sendable {
    public var name: String
    /// The other node's address and UDP port, host names resolved.
    public var remote: Endpoint
    public var encapsulation: Encapsulation
    /// The names of the domains that it carries, at least one, in the order of `Configuration.domains`.
    public var domains: [String]
    /// What happens to VXLAN datagrams whose reserved bits are not zero.
    public var reservedBits: ReservedBits
  }

  /// What makes it fast or slow, never what is right.
  public struct Tuning: Equatable, Sendable {
    public var layout: Layout
    /// The CPUs that workers are pinned to, one worker each; nil: chosen at start.
    public var cpus: [Int]?
    public var dispatch: Dispatch
    public var yield: Yield
    public var io: IO
    public var ringEntries: Int
    public var batchFrames: Int
    public var batchWaitMicroseconds: Int
    public var spinMicroseconds: Int
    public var slots: Int
    public var sendBufferBytes: Int
    public var receiveBufferBytes: Int
    public var dispatchUpperFramesPerSecond: Int
    public var dispatchLowerFramesPerSecond: Int
    public var dispatchPeriodMilliseconds: Int
    public var sourcePorts: Int
    public var hugePages: HugePages
    /// Features of io_uring that are not used even where the kernel has them.
    public var without: UringFeatures
  }

  public enum Forwarding: String, CaseIterable, Sendable {
    case learning
  }

  public enum PortKind: String, CaseIterable, Sendable {
    case tap
  }

  public enum Encapsulation: String, CaseIterable, Sendable {
    case vxlan
  }

  public enum ReservedBits: String, CaseIterable, Sendable {
    case ignore
    case drop
  }

  public enum Layout: String, CaseIterable, Sendable {
    case auto
    case fused
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
  }

  public enum IO: String, CaseIterable, Sendable {
    case auto
    case uring
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
    return
      "\(node.name): \(count(domains.count, "domain")), \(count(ports.count, "port")), \(count(links.count, "link"))"
  }
}
