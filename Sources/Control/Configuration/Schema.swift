import Datapath

/// Every key of a configuration, declared once.
///
/// This table drives the reader (types, ranges, defaults, unknown keys and what was meant instead), the tuning flags of
/// `vnetr run`, and the reference in docs/configuration.md.
public enum Schema {
  /// A section of the file.
  public enum Section: String, CaseIterable, Sendable {
    case node
    case underlay
    case domain
    case port
    case link
    case route
    case passthrough
    case tuning

    /// Whether the section may come several times, as `[[name]]`.
    public var isArray: Bool {
      switch self {
      case .node, .underlay, .tuning: false
      case .domain, .port, .link, .route, .passthrough: true
      }
    }

    /// The header that opens the section in a file.
    public var header: String { isArray ? "[[\(rawValue)]]" : "[\(rawValue)]" }

    /// What the section is for.
    var help: String {
      switch self {
      case .node: "This node."
      case .underlay: "The network between the nodes, seen from here."
      case .domain: "One isolated Ethernet. Ports and links belong to it. At least one is needed, but for passthroughs."
      case .port: "A place where frames enter and leave locally. At least one is needed."
      case .link:
        "A connection to another node. Without any, the node is a local switch. "
          + "Links are neither encrypted nor authenticated."
      case .route:
        "A VNET rule, for domains with `forwarding = \"routes\"`. Of the rules that match a frame all with the highest "
          + "score are followed: exact-exact 8, exact-not and not-exact 7, exact-any and any-exact 6, any-not and "
          + "not-any 5, exact-none 4, any-any 3 (source-destination); other pairs are refused. A frame that no rule "
          + "matches is dropped, and none goes back where it came from."
      case .passthrough: "Two ports wired together, without a lookup: they belong to no domain."
      case .tuning:
        "What makes it fast or slow, never what is right. Every key is also a flag of `vnetr run`, and the flag wins."
      }
    }
  }

  /// What values a key takes.
  public enum Kind: Equatable, Sendable {
    /// Text of a form that the words describe; whether it has that form is checked with the rest.
    case string(String)
    case boolean
    case integer(ClosedRange<Int>)
    /// One of some words.
    case choice([String])
    /// Several texts.
    case strings
    /// One text or several.
    case stringOrStrings
    /// Several of some words, none twice.
    case choices([String])
  }

  /// What holds where a key is not set.
  public enum Default: Equatable, Sendable {
    /// The key must be set.
    case required
    case value(Value)
    /// Worked out from something else; the text says from what.
    case derived(String)
  }

  /// A value of a key.
  public enum Value: Equatable, Sendable, CustomStringConvertible {
    case string(String)
    case boolean(Bool)
    case integer(Int)
    case strings([String])

    /// The value as TOML.
    public var description: String {
      switch self {
      case .string(let text): "\"\(text)\""
      case .boolean(let flag): "\(flag)"
      case .integer(let number): "\(number)"
      case .strings(let texts): "[" + texts.map { "\"\($0)\"" }.joined(separator: ", ") + "]"
      }
    }
  }

  /// One key.
  public struct KeyDefinition: Sendable {
    public var section: Section
    public var key: String
    public var kind: Kind
    public var defaultValue: Default
    /// Values that the design has and this version refuses.
    public var valuesNotYetSupported: [Value]
    /// Whether this version does anything with the key.
    public var isSupported: Bool
    /// What the key does, as whole sentences.
    public var help: String

    init(
      _ section: Section, _ key: String, _ kind: Kind, default defaultValue: Default, later: [Value] = [],
      isSupported: Bool = true, _ help: String
    ) {
      self.section = section
      self.key = key
      self.kind = kind
      self.defaultValue = defaultValue
      valuesNotYetSupported = later
      self.isSupported = isSupported
      self.help = help
    }

    /// A key that the design has and this version refuses.
    static func later(_ section: Section, _ key: String, _ help: String) -> KeyDefinition {
      KeyDefinition(section, key, .string("unset"), default: .derived("unset"), isSupported: false, help)
    }

    /// The key as a flag of `vnetr run`.
    public var flag: String { "--" + key.map { $0 == "_" ? "-" : String($0) }.joined() }
  }

  /// The VNI has 24 bits (RFC 7348, section 5).
  static let vniMax = 1 << 24 - 1
  /// The most MAC addresses that a domain may learn: 16 MiB of table at 16 bytes an entry.
  static let macsMax = 1 << 20
  /// A day: an address that is silent for longer is not worth keeping.
  static let ageingSecondsMax = 86_400
  /// Frames a second that a worker floods where links relay, unless the domain has a limit of its own. A loop of such
  /// links is mostly cut by addresses that flap and are frozen; but a copy that goes round one way comes from the same
  /// side each time, so nothing flaps, and would circulate for ever. At 10,000 a second, of 3.1 µs a send, it costs
  /// 3 % of a core for each place that it goes to; ARP and the like of thousands of guests stay below.
  static let relayFloodFramesPerSecondMax = 10_000
  /// More queues than the largest host has cores for forwarding only cost memory.
  static let queuesMax = 16
  /// RFC 791: every IPv4 host takes 68 bytes; the kernel takes no smaller MTU for an Ethernet device.
  static let mtuBytesMin = 68
  /// What VNET/P carries: an IPv4 datagram's 65,535 bytes less IPv4 (20) and UDP (8) headers and the inner Ethernet
  /// header (14).
  static let mtuBytesMax = 65_535 - 20 - 8 - 14
  /// What VXLAN carries: its header (8) and two VLAN tags (8) less.
  static let mtuBytesMaxVXLAN = mtuBytesMax - 8 - 8
  /// IORING_MAX_ENTRIES of the kernel's io_uring/io_uring.h.
  static let ringEntriesMax = 32_768
  /// `sun_path` of linux/un.h, with its zero.
  static let socketPathBytesMax = 107
  /// Where sockets are unless they are set; made where it is missing.
  static let socketFolder = "/run/vnetr"
  static func socketPath(port name: String) -> String { "\(socketFolder)/\(name).sock" }
  /// The largest buffer that a 32-bit socket option, which the kernel doubles, can ask for.
  static let socketBufferBytesMax = 1 << 30 - 1
  /// Room for a host name of 253 characters, brackets or a colon, and a port.
  static let nameCharactersMax = 260
  /// IFNAMSIZ of linux/if.h, less the byte that ends the name.
  static let deviceNameBytesMax = 15
  /// CPU_SETSIZE of sched.h, less one: the highest CPU that a worker can be pinned to.
  static let cpuMax = 1023

  private static func words<Words: CaseIterable & RawRepresentable<String>>(_ type: Words.Type) -> [String] {
    type.allCases.map(\.rawValue)
  }

  /// Every key, in the order of the reference.
  public static let keys: [KeyDefinition] = [
    KeyDefinition(
      .node, "name", .string("name"), default: .derived("the host's name"), "What this node is called in logs."),

    KeyDefinition(
      .underlay, "address", .stringOrStrings,
      default: .derived("the source address of the kernel's route to the links"),
      "This node's IPv4 or IPv6 address, or an array with at most one of each family; links of both can then run "
        + "at once."
    ),
    KeyDefinition(
      .underlay, "vxlan_port", .integer(1...65_535), default: .value(.integer(4789)),
      "The UDP port that VXLAN is received on, and sent to where a link's `remote` has no port of its own."),
    KeyDefinition(
      .underlay, "vnetp_port", .integer(1...65_535), default: .value(.integer(9000)),
      "The UDP port that VNET/P is received on, and sent to where a link's `remote` has no port of its own; not the "
        + "same as `vxlan_port`."),

    KeyDefinition(
      .domain, "name", .string("name"), default: .required, "What the domain is called by ports and links."),
    KeyDefinition(
      .domain, "vni", .integer(0...vniMax), default: .required,
      "The VXLAN network identifier: the same on every node of the domain."),
    KeyDefinition(
      .domain, "forwarding", .choice(words(Configuration.Forwarding.self)), default: .value(.string("learning")),
      "How the way of a frame is found. `learning`: from the source addresses of the frames that came before; what is "
        + "unknown, broadcast or multicast is flooded. `routes`: by the rules of its `[[route]]` sections alone, "
        + "without learning and without floods."),
    KeyDefinition(
      .domain, "ageing_s", .integer(1...ageingSecondsMax), default: .value(.integer(300)),
      "Seconds after which a MAC address that was not seen again is forgotten."),
    KeyDefinition(
      .domain, "macs_max", .integer(1...macsMax), default: .value(.integer(8192)),
      "The most MAC addresses that are learned; frames to further ones are flooded."),
    KeyDefinition(
      .domain, "flood_frames_per_second_max", .integer(0...1_000_000_000),
      default: .derived("`\(relayFloodFramesPerSecondMax)` where a link with `relay` carries the domain, else `0`"),
      "The most frames a second that each worker floods, so that a loop or a noisy guest does not take the domain "
        + "down; 0: no limit."),

    KeyDefinition(
      .port, "name", .string("name"), default: .required,
      "What the port is called in logs and counters; no other port or link has the name."),
    KeyDefinition(
      .port, "kind", .choice(words(Configuration.PortKind.self)), default: .value(.string("tap")),
      "What the port is. `tap`: a TAP device, made at start and removed at the end unless it was there before. "
        + "`packet`: a network device that is there already (a NIC, a veth's end, a VMM's TAP), by AF_PACKET. "
        + "`vhost-user`: a virtual machine's network card, by a socket that is shared with its VMM."),
    KeyDefinition(
      .port, "device", .string("device name"), default: .derived("the port's name"),
      "The network device's name: 1 to \(deviceNameBytesMax) bytes."),
    KeyDefinition(
      .port, "socket", .string("absolute path"), default: .derived("`/run/vnetr/NAME.sock`, NAME the port's"),
      "The socket of a vhost-user port, by which its VMM is talked to; with `socket_mode = \"server\"` its folder must "
        + "be there unless it is `\(socketFolder)`."),
    KeyDefinition(
      .port, "socket_mode", .choice(words(Configuration.SocketMode.self)), default: .derived("`server`"),
      "Who makes a vhost-user port's socket. `server`: it is made at start, removed at the end, and the VMM connects "
        + "to it. `client`: the VMM makes it (QEMU with `server=on`), and is connected to, again whenever it is gone."),
    KeyDefinition(
      .port, "domain", .string("name of a domain"),
      default: .derived("the only domain, where there is just one and the port is no end of a passthrough"),
      "The name of the domain that the port belongs to; not for an end of a passthrough."),
    KeyDefinition(
      .port, "mac", .string("MAC address"), default: .derived("unknown"),
      "The guest's MAC address, by which the VNET/P control language names an interface; no other port has it."),
    KeyDefinition(
      .port, "queues", .integer(1...queuesMax), default: .value(.integer(1)),
      "How many queues the device has, or sockets share a packet port's flows; each is read by one worker."),
    KeyDefinition(
      .port, "mtu", .integer(mtuBytesMin...mtuBytesMax),
      default: .derived(
        "what the links of the domain carry without fragments: the underlay's MTU less 50 (VXLAN over IPv4), 70 (VXLAN "
          + "over IPv6), 42 (VNET/P over IPv4) or 62 (VNET/P over IPv6)"),
      "The device's MTU in bytes; at most \(mtuBytesMaxVXLAN) where a VXLAN link is in the domain."),
    KeyDefinition(
      .port, "offloads", .boolean, default: .value(.boolean(true)),
      "Whether super-frames are given to the guest, and taken from a TAP's with unfinished checksums (TSO, USO)."),

    KeyDefinition(
      .link, "name", .string("name"), default: .required,
      "What the link is called in logs and counters; no other port or link has the name."),
    KeyDefinition(
      .link, "remote", .string("address or host name"), default: .required,
      "The other node's address or host name, with a UDP port where it is not `vxlan_port` or `vnetp_port`: "
        + "`10.99.0.2`, `10.99.0.2:4790`, `fd00::2`, `[fd00::2]:4790`, `host-b`. A name is resolved once, at start."),
    KeyDefinition(
      .link, "encapsulation", .choice(words(Configuration.Encapsulation.self)), default: .value(.string("vxlan")),
      "How frames travel. `vxlan`: RFC 7348. `vnetp`: the raw frame in UDP, as VNET/P has it; such a link carries one "
        + "domain, for its frames bear no VNI, and is known by the other node's address alone."),
    KeyDefinition(
      .link, "domains", .strings, default: .derived("every domain; for `vnetp` the only one, where there is just one"),
      "The names of the domains that the link carries."),
    KeyDefinition(
      .link, "relay", .boolean, default: .value(.boolean(false)),
      "Whether frames from this link may leave by other links. Links that relay must form a tree, or frames go round; "
        + "so floods of their domains are limited, see `flood_frames_per_second_max`."),
    KeyDefinition(
      .link, "fragment", .boolean, default: .derived("`true` for `vnetp`, `false` for `vxlan`"),
      "Whether the underlay may fragment what is over its MTU. `false`: such frames are dropped and counted."),
    KeyDefinition(
      .link, "reserved_bits", .choice(words(Configuration.ReservedBits.self)), default: .value(.string("ignore")),
      "What happens to VXLAN datagrams whose reserved bits are not zero. `ignore`: forwarded, as RFC 7348 has it; "
        + "`drop`: dropped and counted, as Linux does."),

    KeyDefinition(
      .route, "domain", .string("name of a domain"), default: .derived("the only domain, where there is just one"),
      "The domain that the rule is for; its `forwarding` is `routes`."),
    KeyDefinition(
      .route, "source", .string("MAC pattern"), default: .required,
      "Which source addresses: `any`, `02:00:00:00:00:0a`, or `not-02:00:00:00:00:0a` for any but that one."),
    KeyDefinition(
      .route, "destination", .string("MAC pattern"), default: .required,
      "Which destination addresses, as `source` has them, or `none`: the rule is then the default route of its source."
    ),
    KeyDefinition(
      .route, "from", .string("`any`, `port:NAME` or `link:NAME`"), default: .value(.string("any")),
      "Where the frame came in."),
    KeyDefinition(
      .route, "to", .string("`port:NAME` or `link:NAME`"), default: .required, "Where the frame goes."),

    KeyDefinition(.passthrough, "a", .string("name of a port"), default: .required, "One port."),
    KeyDefinition(.passthrough, "b", .string("name of a port"), default: .required, "The other port."),

    KeyDefinition(
      .tuning, "layout", .choice(words(Configuration.Layout.self)), default: .value(.string("auto")),
      "How the stages are spread over workers. `fused`: each worker runs all stages over its own queues; `pipeline`: "
        + "receive, route and transmit have CPUs of their own, with rings between; `auto`: `pipeline` with "
        + "`dispatch = \"vmm-driven\"` and at least \(WorkerSet.pipelineCPUsMin) CPUs, else `fused`."),
    KeyDefinition(
      .tuning, "cpus", .string("auto, a list such as 0,1, or CPUs by stage such as rx=0 route=1 tx=2,3"),
      default: .value(.string("auto")),
      "The CPUs that workers are pinned to. A list such as \"0,1\": one worker each, for `fused`. By stage, such as "
        + "\"rx=0 route=1 tx=2,3\": for `pipeline`; stages that share a CPU run there in turn. `auto`: chosen at start."
    ),
    KeyDefinition(
      .tuning, "dispatch", .choice(words(Configuration.Dispatch.self)), default: .value(.string("adaptive")),
      "When a worker looks for frames. `guest-driven`: sleeps in the kernel and handles each event at once, for "
        + "latency; "
        + "`vmm-driven`: polls, for throughput; `adaptive`: changes between them with the rate of frames."),
    KeyDefinition(
      .tuning, "dispatch_upper_fps", .integer(1...1_000_000_000), default: .value(.integer(10_000)),
      "Frames per second above which `dispatch = \"adaptive\"` polls."),
    KeyDefinition(
      .tuning, "dispatch_lower_fps", .integer(0...1_000_000_000), default: .value(.integer(1_000)),
      "Frames per second below which it sleeps again; not above `dispatch_upper_fps`."),
    KeyDefinition(
      .tuning, "dispatch_period_ms", .integer(1...10_000), default: .value(.integer(10)),
      "Milliseconds over which it measures the rate."),
    KeyDefinition(
      .tuning, "yield", .choice(words(Configuration.Yield.self)), default: .value(.string("adaptive")),
      "What a poll that finds nothing does. `immediate`: gives the CPU away and polls again; `timed`: sleeps for a "
        + "moment; `never`: polls again at once, for a CPU that is the worker's alone; `adaptive`: spins and gives way "
        + "until it was idle for `spin_us`, then sleeps until an event."),
    KeyDefinition(
      .tuning, "spin_us", .integer(0...1_000_000), default: .value(.integer(50)),
      "Microseconds without a frame after which `yield = \"adaptive\"` sleeps. More costs CPU time while idle, less "
        + "costs latency."),
    KeyDefinition(
      .tuning, "io", .choice(words(Configuration.IO.self)), default: .value(.string("auto")),
      "How workers talk to the kernel. `uring`: io_uring; `syscalls`: plain system calls, for hosts that forbid it; "
        + "`auto`: io_uring where this kernel allows it."),
    KeyDefinition(
      .tuning, "ring_entries", .integer(8...ringEntriesMax), default: .value(.integer(256)),
      "Entries of a worker's submission queue; the kernel rounds up to a power of two."),
    KeyDefinition(
      .tuning, "batch_frames", .integer(1...1024), default: .value(.integer(64)),
      "The most frames that a worker takes through its stages at a time: as many buffers are lent to the kernel, at "
        + "most half of `slots`."),
    KeyDefinition(
      .tuning, "batch_wait_us", .integer(0...10_000), default: .value(.integer(0)),
      "Microseconds that a worker may wait for a fuller batch while it polls; 0: it never waits."),
    KeyDefinition(
      .tuning, "slots", .integer(16...65_535), default: .value(.integer(Wiring.Settings.slotsByDefault)),
      "Buffers of each worker, of 64 KiB of address space each. What `batch_frames` leaves of them may wait for "
        + "full sockets."
    ),
    KeyDefinition(
      .tuning, "ring_depth_frames", .integer(Wiring.Settings.ringFramesMin...65_536),
      default: .derived("\(Wiring.Settings.ringFramesByDefault), or as many as there are slots"),
      "Frames that each ring between two workers of a pipeline holds; it is rounded up to a power of two."),
    KeyDefinition(
      .tuning, "ring_batch_frames", .integer(1...512), default: .value(.integer(64)),
      "The most frames that a worker takes from such a ring at a time."),
    KeyDefinition(
      .tuning, "send_buffer_bytes", .integer(4096...socketBufferBytesMax), default: .value(.integer(7 << 20)),
      "The send buffer of each link's sockets, in bytes."),
    KeyDefinition(
      .tuning, "receive_buffer_bytes", .integer(4096...socketBufferBytesMax), default: .value(.integer(7 << 20)),
      "The receive buffer of each underlay socket, in bytes."),
    KeyDefinition(
      .tuning, "source_ports", .integer(1...64), default: .value(.integer(8)),
      "UDP source ports, one socket each, that a link spreads its flows over."),
    KeyDefinition(
      .tuning, "gso", .boolean, default: .value(.boolean(true)),
      "Whether frames of equal length leave a link in trains, one send for many datagrams (UDP GSO). `false`: one by "
        + "one."),
    KeyDefinition(
      .tuning, "gro", .boolean, default: .value(.boolean(true)),
      "Whether the underlay's sockets take trains, one receive for many datagrams of a flow (UDP GRO), which become "
        + "super-frames at ports. `false`: one by one."),
    KeyDefinition(
      .tuning, "huge_pages", .choice(words(Configuration.HugePages.self)), default: .value(.string("auto")),
      "Whether frame memory is huge pages. `auto`: where there are any; `on`: it does not start without; `off`: never."
    ),
    KeyDefinition(
      .tuning, "without", .choices(UringFeatures.names.map(\.name)), default: .value(.strings([])),
      "Features of io_uring that are not used even where the kernel has them, to test and to diagnose."),
  ]

  /// The keys of a section, in the order of the reference.
  public static func keys(of section: Section) -> [KeyDefinition] {
    keys.filter { $0.section == section }
  }

  /// The keys that are flags of `vnetr run`.
  public static var tuningKeys: [KeyDefinition] { keys(of: .tuning).filter(\.isSupported) }
}
