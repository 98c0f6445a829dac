import Glibc
import Testing

/// A real virtual machine on a host, by QEMU's software emulation: Debian's kernel, busybox, iperf3 and ethtool. It is
/// one of the lab's guests, in whose place a namespace stands no more.
final class Machine {
  /// How its network card's frames leave QEMU.
  enum Card {
    /// To a TAP device of the host that is there already.
    case tap(String)
    /// To the forwarder, by this socket; with so many pairs of queues, and as many CPUs.
    case vhostUser(String, isPacked: Bool = false, queuePairs: Int = 1, Side = .connects)

    /// What QEMU does at the socket: connects, or again whenever the forwarder is back; or makes it.
    enum Side: String {
      case connects = ""
      case reconnects = ",reconnect=1"
      case listens = ",server=on,wait=off"
    }

    /// The device's options come last: vectors=0, because QEMU 7.2 crashes with vhost-user and MSI-X under software
    /// emulation.
    fileprivate var arguments: (backend: [String], device: String) {
      switch self {
      case .tap(let device): (["-netdev", "tap,id=net,ifname=\(device),script=no,downscript=no"], "")
      case .vhostUser(let socket, let isPacked, let queuePairs, let side):
        (
          [
            "-smp", "\(queuePairs)", "-chardev", "socket,id=card,path=\(socket)\(side.rawValue)",
            "-netdev", "vhost-user,id=net,chardev=card,queues=\(queuePairs)",
          ], ",vectors=0" + (isPacked ? ",packed=on" : "") + (queuePairs > 1 ? ",mq=on" : "")
        )
      }
    }
  }

  /// Where `tools/setup --vm` puts kernel and initial ramdisk.
  static let folder = ".build/vm"
  /// Software emulation on a busy machine is slow.
  static let bootSeconds = 90.0
  /// Of whatever is sent to it by TCP.
  static let echoPort: UInt16 = 7_000

  /// Its addresses; the namespace is the host's.
  let guest: Guest
  let process: ChildProcess
  private let console: Int32
  private var commandsRun = 0

  /// Starts it. It takes the addresses of guest `number`.
  /// - Parameter incoming: where a machine that moves here comes in, as `-incoming` has it; nil: it boots.
  init(on host: Host, number: Int, _ card: Card, incoming: String? = nil) throws {
    guest = Guest(number: number, namespace: host.namespace)
    var ends: [Int32] = [0, 0]
    let status = unsafe ends.withUnsafeMutableBufferPointer { unsafe pipe($0.baseAddress!) }
    guard status == 0 else { throw LabError("no pipe: \(errorText(errno))") }
    for end in ends { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
    // A machine that ended takes nothing more: that is no end of the tests.
    signal(SIGPIPE, SIG_IGN)
    defer { close(ends[0]) }
    console = ends[1]
    let (backend, deviceOptions) = card.arguments
    process = try ChildProcess(
      [
        "ip", "netns", "exec", host.namespace.name, "qemu-system-x86_64", "-accel", "tcg", "-m", "256", "-nodefaults",
        "-display", "none", "-no-reboot", "-serial", "mon:stdio",
        // Guest memory must be a file that can be shared.
        "-object", "memory-backend-memfd,id=memory,size=256M,share=on", "-machine", "memory-backend=memory",
        "-kernel", Machine.folder + "/vmlinuz", "-initrd", Machine.folder + "/initrd",
        "-append", "console=ttyS0 quiet panic=-1 vm_address=\(guest.address)",
        "-device", "virtio-net-pci,netdev=net,mac=\(guest.mac),romfile=\(deviceOptions)",
      ] + backend + (incoming.map { ["-incoming", $0] } ?? []), standardInput: ends[0])
  }

  deinit {
    kill()
    close(console)
  }

  func kill() { process.kill() }

  /// Waits until it says something on its console.
  func expectText(_ text: String, seconds: Double = Machine.bootSeconds) throws {
    _ = eventually(within: seconds) { process.standardOutput.contains(text) || !process.isRunning }
    guard process.standardOutput.contains(text) else {
      throw LabError("guest \(guest.number) did not say '\(text)': \(process.standardOutput)\(process.standardError)")
    }
  }

  /// Waits until it is up, and has it return on a port whatever comes.
  func awaitBoot() throws {
    try expectText("BOOTED")
    try run("nc -ll -p \(Machine.echoPort) -e cat & until netstat -ltn | grep -q :\(Machine.echoPort); do :; done")
  }

  /// Runs a command of its shell to its end.
  /// - Returns: what it said.
  @discardableResult
  func run(_ command: String, seconds: Double = 60) throws -> String {
    commandsRun += 1
    let (begin, end) = ("BEGIN-\(commandsRun)-", "END-\(commandsRun)-")
    try type("echo \(begin); \(command); echo \(end)\n")
    try expectText(end, seconds: seconds)
    let text = process.standardOutput
    guard let from = text.range(of: begin), let to = text.range(of: end) else { throw LabError("no answer: \(text)") }
    return String(text[from.upperBound..<to.lowerBound])
  }

  /// Has QEMU's monitor carry out a command. It shares the console: control-A and C change to it and back.
  func monitor(_ command: String) throws { try type("\u{1}c\(command)\n\u{1}c") }

  private func type(_ text: String) throws {
    let bytes = Array(text.utf8)
    let written = unsafe bytes.withUnsafeBytes { unsafe write(console, $0.baseAddress!, $0.count) }
    guard written == bytes.count else { throw LabError("guest \(guest.number)'s console takes nothing") }
  }

  /// Pings another guest: no answer is missing.
  func expectPings(_ other: Guest, sourceLocation: SourceLocation = #_sourceLocation) throws {
    let answer = try run("ping -A -q -c 20 \(other.address)")
    #expect(answer.contains(" 0% packet loss"), "\(answer)", sourceLocation: sourceLocation)
  }

  /// How many packets its card's queues carried so far, by queue: those that it received by, and those it sent by.
  func packetsByQueue() throws -> (received: [Int], sent: [Int]) {
    let answer = try run("ethtool -S eth0")
    func counts(_ way: String) -> [Int] {
      // A line is such as "     rx_queue_0_packets: 12", in the order of the queues.
      answer.split(whereSeparator: \.isNewline).compactMap { line in
        let words = line.split(separator: " ")
        guard words.count == 2, words[0].hasPrefix("\(way)_queue_"), words[0].hasSuffix("_packets:") else { return nil }
        return words[0].contains("xdp") ? nil : Int(words[1])
      }
    }
    return (counts("rx"), counts("tx"))
  }

  /// Sends random bytes to another machine, which returns them, over one TCP connection; both ways at once.
  func expectEcho(of other: Machine, mebibytes: Int = 4, sourceLocation: SourceLocation = #_sourceLocation) throws {
    let answer = try run(
      "dd if=/dev/urandom of=/sent bs=64k count=\(mebibytes << 4) 2>/dev/null; "
        + "nc \(other.guest.address) \(Machine.echoPort) </sent >/echoed; "
        + "ls -l /sent /echoed; cmp /sent /echoed && echo SAME")
    #expect(answer.contains("SAME"), "\(answer)", sourceLocation: sourceLocation)
  }
}
