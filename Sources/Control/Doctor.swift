import CLinux
import Datapath
import Glibc

/// One thing that the forwarder needs or uses, and whether this machine has it.
public struct DoctorItem: Equatable, Sendable {
  public enum State: String, Sendable {
    case ok
    /// Absent, and the forwarder runs without it at a cost.
    case absent
    /// Absent, and the forwarder cannot run without it.
    case needed
    /// A figure, neither good nor bad.
    case note
  }

  public var name: String
  /// What was found here.
  public var found: String
  public var state: State
  /// What its absence costs, whether or not it is absent here.
  public var cost: String
  /// What to do where it is absent; empty where nothing can be done.
  public var remedy: String

  public init(_ name: String, _ found: String, _ state: State, cost: String = "", remedy: String = "") {
    self.name = name
    self.found = found
    self.state = state
    self.cost = cost
    self.remedy = remedy
  }
}

/// What a machine offers.
public struct DoctorReport: Sendable {
  public var items: [DoctorItem]

  public init(items: [DoctorItem]) {
    self.items = items
  }

  /// Whether the forwarder can run here.
  public var canRun: Bool { !items.contains { $0.state == .needed } }

  /// The items as a table, then what to do about those that are absent.
  public var table: String {
    let header = ["item", "state", "found", "cost of its absence"]
    let rows = [header] + items.map { [$0.name, $0.state.rawValue, $0.found, $0.cost] }
    let widths = header.indices.map { column in rows.map { $0[column].count }.max() ?? 0 }
    var lines = rows.map { row in
      let padded = row.indices.map { column in
        column == row.count - 1
          ? row[column] : row[column] + String(repeating: " ", count: widths[column] - row[column].count)
      }
      let line = padded.joined(separator: "  ")
      return String(line.reversed().drop { $0 == " " }.reversed())
    }
    for item in items where !item.remedy.isEmpty && (item.state == .absent || item.state == .needed) {
      lines.append("\(item.name): \(item.remedy)")
    }
    let needed = items.filter { $0.state == .needed }.map(\.name)
    lines.append(
      needed.isEmpty ? "the forwarder can run here" : "the forwarder cannot run here: \(needed.joined(separator: ", "))"
    )
    return lines.joined(separator: "\n")
  }
}

/// Looks at the machine that it runs on. It changes nothing that lasts: the ring, sockets and TAP device that it tries
/// things on are its own and are gone when it returns.
public enum Doctor {
  public static func examine() -> DoctorReport {
    DoctorReport(
      items: kernel() + uringItems() + tun() + packetSockets() + capabilities() + sockets() + memory() + limits()
        + cpus())
  }

  // MARK: Kernel and io_uring

  private static func kernel() -> [DoctorItem] {
    var name = utsname()
    let release = unsafe uname(&name) == 0 ? text(of: &name.release) : "unknown"
    return [DoctorItem("kernel", release, .note)]
  }

  private static func uringItems() -> [DoctorItem] {
    let setting = firstLine("/proc/sys/kernel/io_uring_disabled")
    var features: UringFeatures?
    var refusal: String?
    do throws(SystemError) {
      features = try UringFeatures.probe()
    } catch {
      refusal = error.description
    }
    var items = [
      DoctorItem(
        "io_uring", refusal.map { "no: \($0)" } ?? "ring, operation and registration work",
        refusal == nil ? .ok : .absent, cost: "plain system calls instead: more CPU time for each frame",
        remedy: setting == "0" || setting == nil
          ? "allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp filter"
          : "sysctl kernel.io_uring_disabled=0"),
      DoctorItem(
        "kernel.io_uring_disabled", setting ?? "no such setting", .note,
        cost: "1 allows only members of kernel.io_uring_group, 2 nobody"),
      DoctorItem(
        "I/O", refusal == nil ? "io = \"auto\" takes uring" : "io = \"auto\" takes syscalls", .note,
        cost: "either way is a value of io in [tuning]"),
    ]
    for (name, feature, cost) in UringFeatures.names {
      guard let features else {
        items.append(DoctorItem("io_uring \(name)", "not tried", .note, cost: cost))
        continue
      }
      let works = features.contains(feature)
      items.append(DoctorItem("io_uring \(name)", works ? "yes" : "no", works ? .ok : .absent, cost: cost))
    }
    return items
  }

  // MARK: TAP

  private static func tun() -> [DoctorItem] {
    let path = "/dev/net/tun"
    let descriptor = unsafe open(path, O_RDWR | O_CLOEXEC)
    guard descriptor >= 0 else {
      let code = errno
      return [
        DoctorItem(
          path, "no: \(SystemError.text(code))", .needed, cost: "no TAP port",
          remedy: code == EACCES || code == EPERM
            ? "run as root; in a container, allow the device"
            : "modprobe tun; in a container, pass the device in (--device \(path))")
      ]
    }
    defer { close(descriptor) }
    var items = [DoctorItem(path, "opens", .ok, cost: "no TAP port")]
    var features: UInt32 = 0
    guard unsafe clinux_doctor_tun_features(descriptor, &features) == 0 else {
      return items + [DoctorItem("TAP features", "no: \(SystemError.text(errno))", .needed, cost: "no TAP port")]
    }
    let hasHeader = features & UInt32(IFF_VNET_HDR) != 0
    let hasQueues = features & UInt32(IFF_MULTI_QUEUE) != 0
    items += [
      DoctorItem(
        "TAP virtio header", hasHeader ? "yes" : "no", hasHeader ? .ok : .needed, cost: "no TAP port",
        remedy: "use a kernel with IFF_VNET_HDR"),
      DoctorItem(
        "TAP multi-queue", hasQueues ? "yes" : "no", hasQueues ? .ok : .absent,
        cost: "one queue and so one worker for each port"),
    ]
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (hasQueues ? IFF_MULTI_QUEUE : 0)
    guard clinux_doctor_tun_make(descriptor, CShort(truncatingIfNeeded: flags)) == 0 else {
      let code = errno
      return items + [
        DoctorItem(
          "TAP device", "cannot be made: \(SystemError.text(code))", .needed, cost: "no TAP port",
          remedy: "run as root, or with CAP_NET_ADMIN")
      ]
    }
    items.append(DoctorItem("TAP device", "can be made", .ok, cost: "no TAP port"))
    let offloads = TapDevice.Offloads.agreed(on: descriptor)
    let hasUDP = offloads == .tcpAndUDP
    let hasTCP = hasUDP || offloads == .tcp
    items += [
      DoctorItem(
        "TAP TCP offloads", hasTCP ? "yes" : "no", hasTCP ? .ok : .absent,
        cost: "no super-frames: a read for each segment"
      ),
      DoctorItem(
        "TAP UDP offloads", hasUDP ? "yes" : "no", hasUDP ? .ok : .absent,
        cost: "no super-frames of UDP (kernel 6.2)"),
    ]
    return items
  }

  // MARK: Packet ports

  /// PACKET_VNET_HDR_SZ of linux/if_packet.h (kernel 6.4), newer than some headers.
  private static let headerSizeOption: CInt = 24
  /// The header that TAP ports have too: struct virtio_net_hdr_mrg_rxbuf of linux/virtio_net.h, in bytes.
  private static let headerBytes: CInt = 12

  private static func packetSockets() -> [DoctorItem] {
    let descriptor = socket(AF_PACKET, Int32(SOCK_RAW.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
    guard descriptor >= 0 else {
      let code = errno
      return [
        DoctorItem(
          "AF_PACKET", "no: \(SystemError.text(code))", .absent, cost: "no packet ports",
          remedy: code == EPERM || code == EACCES
            ? "run as root, or with CAP_NET_RAW" : "use a kernel with CONFIG_PACKET, or modprobe af_packet")
      ]
    }
    defer { close(descriptor) }
    let hasHeader = setOption(descriptor, level: SOL_PACKET, name: headerSizeOption, to: headerBytes)
    return [
      DoctorItem("AF_PACKET", "opens", .ok, cost: "no packet ports"),
      DoctorItem(
        "AF_PACKET virtio header", hasHeader ? "yes" : "no", hasHeader ? .ok : .absent,
        cost: "no packet ports: frames would come without their offloads (PACKET_VNET_HDR_SZ, kernel 6.4)",
        remedy: "use a newer kernel"),
    ]
  }

  // MARK: Capabilities

  private static func capabilities() -> [DoctorItem] {
    let effective =
      lines("/proc/self/status").first { $0.hasPrefix("CapEff:") }
      .flatMap { UInt64($0.dropFirst(7).trimmed, radix: 16) } ?? 0
    // Numbers of linux/capability.h.
    let hasAdmin = effective & 1 << 12 != 0
    let hasRaw = effective & 1 << 13 != 0
    return [
      DoctorItem(
        "CAP_NET_ADMIN", hasAdmin ? "yes" : "no", hasAdmin ? .ok : .needed, cost: "no devices, no large socket buffers",
        remedy: "run as root, or give it to the command: setcap cap_net_admin+ep vnetr"),
      DoctorItem(
        "CAP_NET_RAW", hasRaw ? "yes" : "no", hasRaw ? .ok : .absent, cost: "no packet ports",
        remedy: "run as root, or give it to the command: setcap cap_net_admin,cap_net_raw+ep vnetr"),
    ]
  }

  // MARK: Sockets

  private static func sockets() -> [DoctorItem] {
    let datagram = Int32(SOCK_DGRAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue)
    var items: [DoctorItem] = []
    let four = socket(AF_INET, datagram, 0)
    let six = socket(AF_INET6, datagram, 0)
    defer {
      if four >= 0 { close(four) }
      if six >= 0 { close(six) }
    }
    let any = four >= 0 ? four : six
    guard any >= 0 else {
      return [DoctorItem("UDP socket", "no: \(SystemError.text(errno))", .needed, cost: "no links")]
    }
    items += [
      DoctorItem("IPv4 underlay", four >= 0 ? "yes" : "no", four >= 0 ? .ok : .absent, cost: "no links over IPv4"),
      DoctorItem("IPv6 underlay", six >= 0 ? "yes" : "no", six >= 0 ? .ok : .absent, cost: "no links over IPv6"),
    ]
    let hasGSO = UnderlaySocket.kernelCutsTrains()
    let hasGRO = setOption(any, level: Int32(IPPROTO_UDP), name: CLINUX_UDP_GRO, to: 1)
    items += [
      DoctorItem(
        "UDP GSO", hasGSO ? "yes" : "no", hasGSO ? .ok : .absent,
        cost: "no trains: a send costs about 20 times what it does in a train of 40 (kernel 4.18)"),
      DoctorItem(
        "UDP GRO", hasGRO ? "yes" : "no", hasGRO ? .ok : .absent,
        cost: "no trains on receipt: a completion for each datagram (kernel 5.0)"),
    ]
    let wanted = 7 << 20
    for (name, key) in [("net.core.rmem_max", "receive_buffer_bytes"), ("net.core.wmem_max", "send_buffer_bytes")] {
      let path = "/proc/sys/" + name.map { $0 == "." ? "/" : String($0) }.joined()
      guard let value = firstLine(path).flatMap({ Int($0) }) else {
        items.append(DoctorItem(name, "not readable here", .note))
        continue
      }
      items.append(
        DoctorItem(
          name, "\(value)", .note,
          cost: "without CAP_NET_ADMIN it caps \(key)\(value < wanted ? ", by default \(wanted)" : "")"
        ))
    }
    return items
  }

  private static func setOption(_ descriptor: CInt, level: CInt, name: CInt, to value: CInt) -> Bool {
    var value = value
    return unsafe setsockopt(descriptor, level, name, &value, socklen_t(MemoryLayout<CInt>.size)) == 0
  }

  // MARK: Memory and limits

  private static let slotsByDefault = Wiring.Settings.slotsByDefault

  /// Huge pages that the frame memory of one worker takes by default.
  static func hugePagesWanted(pageBytes: Int) -> Int {
    (slotsByDefault * FrameMemory.slotStrideBytes + pageBytes - 1) / pageBytes
  }

  private static func memory() -> [DoctorItem] {
    let information = lines("/proc/meminfo")
    func figure(_ key: String) -> Int? {
      information.first { $0.hasPrefix(key + ":") }
        .flatMap { Int($0.dropFirst(key.count + 1).trimmed.prefix { $0.isNumber }) }
    }
    let free = figure("HugePages_Free") ?? 0
    let wanted = hugePagesWanted(pageBytes: (figure("Hugepagesize") ?? 2_048) << 10)
    let total = figure("HugePages_Total") ?? 0
    let size = figure("Hugepagesize").map { "\($0) kB" } ?? "unknown size"
    let transparent = firstLine("/sys/kernel/mm/transparent_hugepage/enabled") ?? "not in this kernel"
    let mayBeTransparent = transparent.contains("[always]") || transparent.contains("[madvise]")
    return [
      DoctorItem(
        "huge pages", "\(free) free of \(total) (\(size))", free >= wanted ? .ok : .absent,
        cost: "more TLB misses over the frame memory",
        remedy: "sysctl vm.nr_hugepages=\(wanted), so many for each worker that receives into \(slotsByDefault) slots"),
      DoctorItem(
        "transparent huge pages", transparent, mayBeTransparent ? .ok : .absent,
        cost: "no second choice where there are no huge pages",
        remedy: "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"),
    ]
  }

  /// Sockets and devices of some dozens of ports and links; more need more.
  private static let descriptorsWanted: UInt = 1024
  /// What rings and registered memory of a worker may pin on kernels that count it, in bytes.
  private static let lockedBytesWanted: UInt = 8 << 20

  private static func limits() -> [DoctorItem] {
    func limit(_ resource: __rlimit_resource_t) -> UInt? {
      var limit = rlimit()
      guard unsafe getrlimit(resource, &limit) == 0 else { return nil }
      return UInt(limit.rlim_cur)
    }
    func found(_ limit: UInt?) -> String {
      guard let limit else { return "unknown" }
      // RLIM_INFINITY of sys/resource.h.
      return limit == UInt.max ? "unlimited" : "\(limit)"
    }
    let descriptors = limit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue))
    let locked = limit(__rlimit_resource_t(__RLIMIT_MEMLOCK.rawValue))
    return [
      DoctorItem(
        "RLIMIT_NOFILE", found(descriptors), (descriptors ?? 0) >= descriptorsWanted ? .ok : .absent,
        cost: "fewer ports and links: each worker has a descriptor for each queue and source port",
        remedy: "ulimit -n \(descriptorsWanted), or LimitNOFILE= in the unit"),
      DoctorItem(
        "RLIMIT_MEMLOCK", found(locked), (locked ?? 0) >= lockedBytesWanted ? .ok : .absent,
        cost: "rings may not start without CAP_IPC_LOCK, on kernels before 5.12",
        remedy: "ulimit -l \(lockedBytesWanted >> 10), or LimitMEMLOCK= in the unit"),
    ]
  }

  // MARK: CPUs

  private static func cpus() -> [DoctorItem] {
    let allowed =
      lines("/proc/self/status").first { $0.hasPrefix("Cpus_allowed_list:") }?.dropFirst(18).trimmed ?? "unknown"
    let isolated = firstLine("/sys/devices/system/cpu/isolated") ?? ""
    return [
      DoctorItem("CPUs allowed", allowed, .note),
      DoctorItem(
        "CPUs isolated", isolated.isEmpty ? "none" : isolated, isolated.isEmpty ? .absent : .ok,
        cost: "other processes may run on a worker's CPU: jitter",
        remedy: "boot with isolcpus=, and set cpus in [tuning]"),
      layout(allowedCount: ProcessorSet.allowed().count),
    ]
  }

  /// What `layout = "auto"` takes for each way of dispatch.
  static func layout(allowedCount: Int) -> DoctorItem {
    let usual = WorkerSet.chooseLayout(.adaptive, allowedCount: allowedCount)
    let polling = WorkerSet.chooseLayout(.vmmDriven, allowedCount: allowedCount)
    let found =
      usual.layout == polling.layout
      ? "auto takes \(usual.layout)" : "auto takes \(usual.layout), \(polling.layout) with dispatch = \"vmm-driven\""
    return DoctorItem("layout", found, .note, cost: polling.why)
  }

  // MARK: Files

  private static func lines(_ path: String) -> [String] {
    let bytes = (try? readFile(path, bytesMax: 1 << 20)) ?? []
    return String(decoding: bytes, as: UTF8.self).split(separator: "\n").map(String.init)
  }

  private static func firstLine(_ path: String) -> String? {
    guard let bytes = try? readFile(path, bytesMax: 1 << 16) else { return nil }
    return String(decoding: bytes.prefix { $0 != UInt8(ascii: "\n") }, as: UTF8.self).trimmed
  }

  /// The text in a fixed array of C characters, up to its first zero.
  private static func text<Characters>(of characters: inout Characters) -> String {
    unsafe withUnsafeBytes(of: &characters) { unsafe String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
  }
}

extension StringProtocol {
  fileprivate var trimmed: String {
    String(drop { $0.isWhitespace }.reversed().drop { $0.isWhitespace }.reversed())
  }
}
