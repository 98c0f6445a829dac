import Foundation
import Synchronization
import Testing

/// The protocol of the underlay, or of what guests say.
enum Family: String, CaseIterable, CustomTestStringConvertible {
  case ipv4 = "IPv4"
  case ipv6 = "IPv6"

  /// What VXLAN puts around a frame's payload: inner Ethernet (14), VXLAN (8), UDP (8), IPv4 (20) or IPv6 (40).
  var overheadBytes: Int { self == .ipv4 ? 50 : 70 }
  var testDescription: String { "\(rawValue) underlay" }

  init(of address: String) { self = address.contains(":") ? .ipv6 : .ipv4 }
  /// As socket(2) takes it.
  var number: Int32 { self == .ipv4 ? AF_INET : AF_INET6 }
}

/// A host of the overlay: a namespace with one underlay device.
struct Host {
  let index: Int
  let family: Family
  let namespace: Namespace
  static let underlayDevice = "underlay"

  var name: String { "host-" + String(UnicodeScalar(UInt8(ascii: "a") + UInt8(index))) }
  /// The address of the underlay device.
  var address: String { family == .ipv4 ? "10.99.0.\(index + 1)" : "fd99::\(index + 1)" }
  var addressWithPrefix: String { address + (family == .ipv4 ? "/24" : "/64") }
}

/// A guest: a namespace with one Ethernet device, `eth0`, that a host plugs into the overlay.
struct Guest {
  let number: Int
  let namespace: Namespace
  /// Its IPv4 address; guests with the same number have the same, in whatever domain they are.
  var address: String { "10.1.0.\(number)" }
  /// Its IPv6 address, once it `speaksIPv6`.
  var addressIPv6: String { "fd01::\(number)" }
  func address(_ family: Family) -> String { family == .ipv4 ? address : addressIPv6 }
  var mac: MAC { MAC(0x02, 0, 0, 0, 0, UInt8(number)) }
  static let device = "eth0"
}

/// Hosts and guests in network namespaces of this machine, with a real kernel between them.
///
/// Everything that it makes has a name with the lab's own prefix and goes away with the lab; `Guard` removes it even
/// when the test process dies.
final class Lab {
  let prefix: String
  private var namespaces: [Namespace] = []
  private var sockets: [String] = []

  private static let labsMade = Atomic<Int>(0)

  init() throws {
    try Guard.start()
    prefix = Guard.prefix + "\(Lab.labsMade.add(1, ordering: .relaxed).newValue)-"
  }

  deinit { remove() }

  func remove() {
    for namespace in namespaces { namespace.remove() }
    namespaces = []
    for path in sockets { try? FileManager.default.removeItem(atPath: path) }
    sockets = []
  }

  /// Where a forwarder may make a socket of its own, in the file system.
  func socketPath(_ name: String) -> String {
    let path = FileManager.default.temporaryDirectory.appendingPathComponent(prefix + name + ".sock").path
    sockets.append(path)
    return path
  }

  func namespace(_ role: String) throws -> Namespace {
    let namespace = try Namespace(name: prefix + role)
    namespaces.append(namespace)
    return namespace
  }

  /// Makes hosts that reach each other on one underlay: a cable between two, a switch between more.
  ///
  /// Unless another is asked for, the underlay's MTU leaves room for guests' frames of 1,500 bytes.
  func hosts(_ count: Int, family: Family = .ipv4, mtu mtuBytes: Int? = nil) throws -> [Host] {
    let mtu = "\(mtuBytes ?? 1500 + family.overheadBytes)"
    let hosts = try (0..<count).map { index in
      Host(index: index, family: family, namespace: try namespace("host\(index)"))
    }
    let device = Host.underlayDevice
    if count == 2 {
      try execute([
        "ip", "link", "add", device, "mtu", mtu, "netns", hosts[0].namespace.name, "type", "veth",
        "peer", "name", device, "mtu", mtu, "netns", hosts[1].namespace.name,
      ])
    } else {
      let fabric = try namespace("fabric")
      try fabric.setKernelParameter("net.ipv6.conf.all.disable_ipv6", "1")
      try fabric.ip("link", "add", "switch", "mtu", mtu, "type", "bridge", "mcast_snooping", "0")
      try fabric.ip("link", "set", "switch", "up")
      for host in hosts {
        let socket = "socket\(host.index)"
        try fabric.ip(
          "link", "add", socket, "mtu", mtu, "type", "veth",
          "peer", "name", device, "mtu", mtu, "netns", host.namespace.name)
        try fabric.ip("link", "set", socket, "master", "switch", "up")
      }
    }
    for host in hosts {
      if family == .ipv4 { try host.namespace.setKernelParameter("net.ipv6.conf.all.disable_ipv6", "1") }
      try host.namespace.ip("link", "set", device, "up")
      // `nodad`: an IPv6 address that is usable at once.
      let options = family == .ipv6 ? ["nodad"] : []
      try execute(["ip", "-n", host.namespace.name, "address", "add", host.addressWithPrefix, "dev", device] + options)
    }
    return hosts
  }

  /// Makes two hosts with a router between them, whose leg to the second host carries less than all other devices.
  func hostsBehindRouter(mtu: Int, narrowMTU: Int) throws -> [Host] {
    let router = try namespace("router")
    try router.setKernelParameter("net.ipv4.ip_forward", "1")
    // It answers for each host on the other's side, so that the hosts need no routes.
    try router.setKernelParameter("net.ipv4.conf.all.proxy_arp", "1")
    try router.ip("address", "add", "10.99.0.254/32", "dev", "lo")
    return try (0..<2).map { index in
      let host = Host(index: index, family: .ipv4, namespace: try namespace("host\(index)"))
      let leg = "leg\(index)"
      try router.ip(
        "link", "add", leg, "mtu", "\(index == 1 ? narrowMTU : mtu)", "type", "veth",
        "peer", "name", Host.underlayDevice, "mtu", "\(mtu)", "netns", host.namespace.name)
      try router.ip("link", "set", leg, "up")
      try router.ip("route", "add", host.address + "/32", "dev", leg)
      try host.namespace.ip("address", "add", host.addressWithPrefix, "dev", Host.underlayDevice)
      try host.namespace.ip("link", "set", Host.underlayDevice, "up")
      return host
    }
  }

  /// Makes a guest that is plugged in nowhere yet. It speaks no IPv6, so that it sends what a test asks for and ARP.
  func guest(_ number: Int, name: String? = nil) throws -> Guest {
    let namespace = try namespace("guest" + (name ?? "\(number)"))
    try namespace.setKernelParameter("net.ipv6.conf.all.disable_ipv6", "1")
    return Guest(number: number, namespace: namespace)
  }

  /// Gives a host's device to a guest, as its `eth0`, with the guest's addresses.
  func plug(_ guest: Guest, into device: String, of host: Host) throws {
    try host.namespace.ip("link", "set", device, "down")
    try host.namespace.ip("link", "set", device, "netns", guest.namespace.name)
    try guest.namespace.ip("link", "set", device, "name", Guest.device)
    try bringUp(guest)
  }

  private func bringUp(_ guest: Guest) throws {
    try guest.namespace.ip("link", "set", Guest.device, "address", guest.mac.description)
    try guest.namespace.ip("address", "add", guest.address + "/24", "dev", Guest.device)
    try guest.namespace.ip("link", "set", Guest.device, "up")
  }

  /// Makes a guest that is cabled to a new device of a host, as to a NIC of its own. Both ends have all offloads: what
  /// the guest sends arrives at the NIC as super-frames, without checksums.
  func cabledGuest(_ number: Int, to device: String, of host: Host, mtu: Int = 1500) throws -> Guest {
    let guest = try guest(number)
    try host.namespace.ip(
      "link", "add", device, "mtu", "\(mtu)", "type", "veth",
      "peer", "name", Guest.device, "mtu", "\(mtu)", "netns", guest.namespace.name)
    try host.namespace.ip("link", "set", device, "up")
    try bringUp(guest)
    return guest
  }

  /// Joins two hosts by a cable between new devices of that name: a wire beside the underlay.
  func cable(_ a: Host, _ b: Host, device: String, mtu: Int = 1500) throws {
    try a.namespace.ip(
      "link", "add", device, "mtu", "\(mtu)", "type", "veth",
      "peer", "name", device, "mtu", "\(mtu)", "netns", b.namespace.name)
    for host in [a, b] { try host.namespace.ip("link", "set", device, "up") }
  }

  /// Starts a host's forwarder from a file, with a new guest in each of its TAP ports, in their order.
  func node(
    _ host: Host, _ configuration: NodeConfiguration, guests numbers: [Int], flags: [String] = []
  ) throws -> Node {
    let forwarder = try Forwarder(on: host, configuration, flags: flags)
    let guests = try zip(configuration.ports.filter { $0.kind == "tap" }, numbers).map { port, number in
      let guest = try guest(number, name: "\(number)-\(host.index)-\(port.name)")
      try plug(guest, into: port.name, of: host)
      return guest
    }
    return Node(forwarder: forwarder, guests: guests)
  }

  /// Starts a forwarder with one TAP on a host, from flags alone, and plugs a new guest into it.
  func forwarder(
    on host: Host, peer: Host, guest number: Int, vni: Int = 42, flags: [String] = []
  ) throws -> (forwarder: Forwarder, guest: Guest) {
    let forwarder = try Forwarder(
      on: host, ["--tap", "vm1", "--address", host.address, "--peer", peer.address, "--vni", "\(vni)"] + flags)
    let guest = try guest(number)
    try plug(guest, into: "vm1", of: host)
    return (forwarder, guest)
  }

  /// Two hosts, a forwarder on each and a guest behind each.
  func pair(family: Family = .ipv4, flags: [String] = []) throws -> Pair {
    let hosts = try hosts(2, family: family)
    let (forwarderA, guestA) = try forwarder(on: hosts[0], peer: hosts[1], guest: 1, flags: flags)
    let (forwarderB, guestB) = try forwarder(on: hosts[1], peer: hosts[0], guest: 2, flags: flags)
    return Pair(hosts: hosts, forwarders: [forwarderA, forwarderB], guestA: guestA, guestB: guestB)
  }

  /// Makes the kernel fill in all that a card would before a packet enters the underlay.
  ///
  /// On a veth it leaves checksums and segmentation to a card that never comes: the far end would get super-frames,
  /// and inner checksums that nobody filled in, as it never would from a wire.
  func likeAWire(_ host: Host) throws {
    try host.namespace.run(
      "ethtool", "-K", Host.underlayDevice, "tx", "off", "tso", "off", "gso", "off", "tx-udp-segmentation", "off",
      "tx-udp_tnl-segmentation", "off", "tx-udp_tnl-csum-segmentation", "off")
  }

  /// Says of some VXLAN datagrams that leave a namespace that they met congestion, where their sender takes that.
  static func markCongestion(in namespace: Namespace) throws {
    let rule = "add rule inet marks out udp dport 4789"
    let rules = ["ip", "ip6"].map { "\(rule) \($0) ecn ect0 numgen random mod 8 0 \($0) ecn set ce" }
    let chain = "add chain inet marks out { type filter hook output priority 0; }"
    try namespace.run(["nft", (["add table inet marks", chain] + rules).joined(separator: "; ")])
  }

  /// The kernel's own overlay on a host: a VXLAN device and a bridge, with a new guest in it.
  func kernelOverlay(on host: Host, remote: Host, guest number: Int, vni: Int = 42) throws -> Guest {
    let namespace = host.namespace
    try likeAWire(host)
    try namespace.ip(
      "link", "add", "bridge", "type", "bridge", "mcast_snooping", "0", "forward_delay", "0")
    try namespace.ip(
      "link", "add", "vxlan", "mtu", "1500", "type", "vxlan", "id", "\(vni)", "local", host.address,
      "remote", remote.address, "dstport", "4789", "dev", Host.underlayDevice)
    try namespace.ip("link", "add", "vm1", "mtu", "1500", "type", "veth", "peer", "name", "vm1-host")
    for device in ["bridge", "vxlan", "vm1-host"] {
      if device != "bridge" { try namespace.ip("link", "set", device, "master", "bridge") }
      try namespace.ip("link", "set", device, "up")
    }
    let guest = try guest(number)
    try plug(guest, into: "vm1", of: host)
    return guest
  }
}

/// A host's forwarder and the guests in its TAP ports.
struct Node {
  let forwarder: Forwarder
  let guests: [Guest]
}

/// Stops forwarders and expects that each has accounted for every frame.
func stopAll(_ nodes: [Node], sourceLocation: SourceLocation = #_sourceLocation) throws {
  for node in nodes { expectConservation(try node.forwarder.stop(), sourceLocation: sourceLocation) }
}

/// The CPUs that this process may use, ascending: Cpus_allowed_list of proc(5).
let cpusAllowed: [Int] = {
  let status = (try? execute(["cat", "/proc/self/status"])) ?? ""
  let line = status.split(separator: "\n").first { $0.hasPrefix("Cpus_allowed_list:") }
  let cpus = (line?.split(separator: "\t").last ?? "").split(separator: ",").flatMap { run in
    let ends = run.split(separator: "-").compactMap { Int($0) }
    return ends.isEmpty ? [] : Array(ends[0]...ends[ends.count - 1])
  }
  return cpus.isEmpty ? [0] : cpus
}()

/// Two hosts joined by the overlay, with a guest behind each.
struct Pair {
  let hosts: [Host]
  let forwarders: [Forwarder]
  let guestA: Guest
  let guestB: Guest
}

/// Runs `body` in a lab of its own and removes everything at its end, however it ends.
func withLab<R>(_ body: (Lab) throws -> R) throws -> R {
  let lab = try Lab()
  defer { lab.remove() }
  return try body(lab)
}

/// What keeps the end-to-end tests from running here; nil when nothing does.
enum Obstacle {
  static let toLab: String? = {
    if geteuid() != 0 { return "needs root, to make network namespaces" }
    for command in ["ip", "ping", "iperf3", "ethtool", "sysctl", "tcpdump", "nstat"] {
      if (try? execute(["sh", "-c", "command -v \(command)"])) == nil {
        return "needs \(command), which tools/setup installs"
      }
    }
    let probe = "vnetr-test-\(getpid())-probe"
    guard (try? execute(["ip", "netns", "add", probe])) != nil else {
      return "this machine allows no network namespaces"
    }
    _ = try? execute(["ip", "netns", "delete", probe])
    return nil
  }()

  static let toVLANDevices: String? = {
    if let toForwarder { return toForwarder }
    let devices = ["vnetr-\(getpid() % 100_000)a", "vnetr-\(getpid() % 100_000)b"]
    defer { _ = try? execute(["ip", "link", "delete", devices[0]]) }
    let makes = try? execute(["ip", "link", "add", devices[0], "type", "veth", "peer", "name", devices[1]])
    let tags = try? execute([
      "ip", "link", "add", "link", devices[0], "name", devices[0] + ".7", "type", "vlan", "id", "7",
    ])
    return makes == nil || tags == nil ? "this kernel makes no VLAN devices" : nil
  }()

  static let toCongestionMarks: String? = {
    if let toForwarder { return toForwarder }
    if (try? execute(["sh", "-c", "command -v nft"])) == nil { return "needs nft, which tools/setup installs" }
    guard let namespace = try? Namespace(name: "vnetr-test-\(getpid())-marks"),
      (try? Lab.markCongestion(in: namespace)) != nil
    else { return "this kernel's nftables mark no packets" }
    return nil
  }()

  static let toVirtualMachine: String? = {
    let folder = Machine.folder
    let isThere = ["vmlinuz", "initrd"].allSatisfy { unsafe access("\(folder)/\($0)", R_OK) == 0 }
    let runs = (try? execute(["qemu-system-x86_64", "--version"])) != nil
    return isThere && runs ? nil : "there is no QEMU, or nothing for it to boot: `tools/setup --vm` gets both"
  }()

  static let toForwarder: String? = {
    if let toLab { return toLab }
    guard unsafe access("/dev/net/tun", R_OK | W_OK) == 0 else { return "this machine has no /dev/net/tun" }
    guard Forwarder.path != nil else {
      return "no vnetr is built: `swift build -c release --product vnetr`, or name one in VNETR"
    }
    return nil
  }()
}

/// A process beside the tests that removes what they left behind, when the test process ends in whatever way.
private enum Guard {
  static let prefix = "vnetr-test-\(getpid())-"

  static func start() throws { _ = try process.get() }

  /// It waits for the end of its standard input, whose other end only the test process holds.
  private static let process = Result { () throws -> pid_t in
    var ends: [Int32] = [0, 0]
    let status = unsafe ends.withUnsafeMutableBufferPointer { unsafe pipe($0.baseAddress!) }
    guard status == 0 else { throw LabError("no pipe: \(errorText(errno))") }
    for end in ends { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
    let script = """
      cat
      for namespace in $(ip netns list | cut -d ' ' -f 1 | grep '^\(prefix)'); do
        for process in $(ip netns pids "$namespace"); do kill -KILL "$process"; done
        ip netns delete "$namespace"
      done
      """
    // A process group of its own: an interrupt from the terminal must not end it with the tests.
    let child = try ChildProcess(["sh", "-c", script], standardInput: ends[0], ownTerminalGroup: true)
    close(ends[0])
    // Never released: releasing it would end it, and it has to outlive the test process.
    _ = unsafe Unmanaged.passRetained(child)
    return child.id
  }
}
