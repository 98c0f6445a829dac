import Foundation
import Testing

/// What `ping` reported.
struct PingResult {
  let sent: Int
  let received: Int
  let duplicates: Int
  /// Every request was answered once.
  var isComplete: Bool { sent > 0 && received == sent && duplicates == 0 }
}

/// What `iperf3` reported of one flow. The receiver's report may end a little before the last bytes arrive.
struct FlowResult {
  let receivedBytes: Int
  let receivedBitsPerSecond: Double
}

extension Guest {
  /// Pings another guest. The first answer may wait for ARP; none is lost for it.
  func ping(
    _ other: Guest, count: Int = 5, payloadBytes: Int = 56, mayFragment: Bool = true, to address: String? = nil
  ) throws -> PingResult {
    var arguments = ["ping", "-q", "-c", "\(count)", "-i", "0.05", "-W", "2", "-s", "\(payloadBytes)"]
    if !mayFragment { arguments += ["-M", "do"] }
    let process = try namespace.start(arguments + [address ?? other.address])
    guard process.wait(seconds: 30) != nil else { throw LabError("\(process.commandLine): did not end") }
    let report = process.standardOutput
    func number(before words: String) -> Int? {
      guard let end = report.range(of: words)?.lowerBound else { return nil }
      return Int(report[..<end].reversed().prefix { $0.isNumber }.reversed().map(String.init).joined())
    }
    guard let sent = number(before: " packets transmitted"), let received = number(before: " received") else {
      throw LabError("\(process.commandLine): \(report)\(process.standardError)")
    }
    return PingResult(sent: sent, received: received, duplicates: number(before: " duplicates") ?? 0)
  }

  /// Runs one iperf3 flow to another guest, whose server ends with it; the options tell kind, length and direction.
  func flow(to other: Guest, _ options: [String], seconds: Double = 60) throws -> FlowResult {
    let server = try other.namespace.start(["iperf3", "--server", "--one-off", "--forceflush"])
    guard eventually({ server.standardOutput.contains("listening") }) else {
      throw LabError("\(server.commandLine): \(server.standardOutput)\(server.standardError)")
    }
    let report = try execute(
      ["ip", "netns", "exec", namespace.name, "iperf3", "--client", other.address, "--json"] + options,
      seconds: seconds)
    let decoder = JSONDecoder()
    decoder.keyDecodingStrategy = .convertFromSnakeCase
    let received = try decoder.decode(FlowReport.self, from: Data(report.utf8)).end.sumReceived
    return FlowResult(receivedBytes: received.bytes, receivedBitsPerSecond: received.bitsPerSecond)
  }

  /// A TCP flow of so many bytes; with `reverse` the other guest sends. Throws when the flow does not reach its end.
  func tcp(to other: Guest, mebibytes: Int = 32, reverse: Bool = false) throws -> FlowResult {
    try flow(to: other, ["--bytes", "\(mebibytes)M"] + (reverse ? ["--reverse"] : []))
  }

  /// The checksum errors that the guest's kernel has counted since it exists, by counter.
  func checksumErrors() throws -> [String: Int] {
    let wanted = [
      "TcpInCsumErrors", "UdpInCsumErrors", "Udp6InCsumErrors", "IcmpInCsumErrors", "IpInHdrErrors", "Ip6InHdrErrors",
    ]
    return try kernelCounters(wanted).filter { $0.value != 0 }
  }

  /// Some of what the guest's kernel has counted since it exists.
  func kernelCounters(_ wanted: [String]) throws -> [String: Int] {
    let report = try namespace.run("nstat", "--zeros", "--ignore", "--json")
    let counters = try JSONDecoder().decode([String: [String: Int]].self, from: Data(report.utf8))["kernel"] ?? [:]
    let found = counters.filter { wanted.contains($0.key) }
    guard found.count == wanted.count else { throw LabError("nstat does not report \(wanted): \(counters.keys)") }
    return found
  }

  /// Sets what the device does for the guest's kernel, and returns what it does now, by ethtool's names: a device that
  /// lacks something does without.
  @discardableResult
  func setOffloads(_ offloads: Offloads) throws -> Offloads.State {
    try namespace.run(["ethtool", "-K", Guest.device] + offloads.settings)
    let features = try namespace.run("ethtool", "-k", Guest.device).split(separator: "\n")
    func isOn(_ feature: String) -> Bool { features.contains { $0.hasPrefix("\(feature): on") } }
    return Offloads.State(
      finishesChecksums: isOn("tx-checksumming"), cutsTCP: isOn("tcp-segmentation-offload"),
      cutsUDP: isOn("tx-udp-segmentation"))
  }

  /// Gives it an IPv6 address that is usable at once. From now on its kernel speaks by itself, too.
  func speakIPv6() throws {
    try namespace.setKernelParameter("net.ipv6.conf.\(Guest.device).disable_ipv6", "0")
    try namespace.ip("address", "add", addressIPv6 + "/64", "dev", Guest.device, "nodad")
  }
}

/// What a guest's device does for its kernel: cut super-frames, finish and check checksums.
enum Offloads: String, CaseIterable {
  case all = "all on"
  case noSegmentation = "TSO and USO off"
  case noChecksums = "checksums off"
  case none = "all off"

  /// What ethtool says of a device.
  struct State: Equatable {
    var finishesChecksums: Bool
    var cutsTCP: Bool
    var cutsUDP: Bool
  }

  /// What a device is set to that can do everything. The kernel leaves nothing to cut to one that makes no checksums.
  var state: State {
    State(
      finishesChecksums: self == .all || self == .noSegmentation, cutsTCP: self == .all, cutsUDP: self == .all)
  }

  /// For `ethtool -K`.
  var settings: [String] {
    func set(_ features: [String], _ isOn: Bool) -> [String] { features.flatMap { [$0, isOn ? "on" : "off"] } }
    return set(["rx", "tx"], state.finishesChecksums) + set(["tso", "tx-udp-segmentation"], state.cutsTCP)
      + set(["sg", "gso", "gro"], self != .none)
  }
}

extension Guest {
  /// Sends numbered frames to another guest, in bursts that no queue on the way is too short for, and returns the
  /// numbers in the order in which they arrived.
  func sendNumbered(_ count: Int, to other: Guest, payloadBytes: Int = 46) throws -> [UInt32] {
    let sender = try PacketSocket(in: namespace)
    let receiver = try PacketSocket(in: other.namespace)
    let burst = 16
    var numbers: [UInt32] = []
    for first in stride(from: 0, to: count, by: burst) {
      for number in first..<min(first + burst, count) {
        try sender.send(Frame.numbered(UInt32(number), to: other.mac, from: mac, payloadBytes: payloadBytes))
      }
      while numbers.count < min(first + burst, count), let frame = try receiver.receive(seconds: 2) {
        if let number = Frame.number(of: frame) { numbers.append(number) }
      }
    }
    return numbers + (try receiver.receiveNumbers(quietSeconds: 0.2))
  }

  /// Sends random bytes to another guest over a TCP connection, and says whether the same arrived there.
  /// - Parameter bytes: how many; by default a number that no segment size divides.
  func carriesStream(to other: Guest, bytes count: Int = 1_000_003) throws -> Bool {
    var random = SystemRandomNumberGenerator()
    let words = (0...count / 8).map { _ in random.next() }
    let bytes = Array(unsafe words.withUnsafeBytes { unsafe Array($0) }[..<count])
    let listener = try StreamListener(in: other.namespace, address: other.address)
    let sender = try StreamSocket(in: namespace, to: other.address, port: listener.port)
    let receiver = try listener.accept(seconds: 10)
    var sent = 0
    var received: [UInt8] = []
    let isWhole = try eventually(within: 30) {
      if sent < bytes.count {
        sent += try sender.send(bytes[sent...])
        if sent == bytes.count { sender.end() }
      }
      return try receiver.receive(into: &received)
    }
    guard isWhole else { throw LabError("\(sent) of \(bytes.count) bytes sent, \(received.count) received") }
    return received == bytes
  }
}

/// Every guest in turn sends broadcasts: every other one must receive each exactly once, itself none.
func expectEachBroadcastOnce(
  _ guests: [Guest], perGuest: Int = 50, sourceLocation: SourceLocation = #_sourceLocation
) throws {
  let sockets = try guests.map { try PacketSocket(in: $0.namespace) }
  for (sender, guest) in guests.enumerated() {
    let numbers = (0..<perGuest).map { UInt32(sender * perGuest + $0) }
    let witness = sender == guests.count - 1 ? 0 : guests.count - 1
    for number in numbers {
      try sockets[sender].send(Frame.numbered(number, to: .broadcast, from: guest.mac))
      // One at a time: what is checked is copies, not queues.
      #expect(try sockets[witness].receives(number: number), sourceLocation: sourceLocation)
    }
    for (receiver, socket) in sockets.enumerated() {
      let arrived = try socket.receiveNumbers(quietSeconds: 0.2)
      // The witness has read its copies already: whatever it still gets is one too many.
      let expected = receiver == sender || receiver == witness ? [] : numbers
      #expect(arrived == expected, "from guest \(sender) to guest \(receiver)", sourceLocation: sourceLocation)
    }
  }
}

/// What tcpdump sees at a device from now on.
final class Capture {
  private let process: ChildProcess

  /// - Parameters:
  ///   - filter: what to look for, by pcap-filter(7).
  ///   - direction: `in` or `out` alone.
  init(
    in namespace: Namespace, device: String, _ filter: String, direction: String? = nil, framesMax: Int? = nil
  ) throws {
    var arguments = ["tcpdump", "-i", device, "--immediate-mode", "-l", "-nvv"]
    // Else it goes by ports, and takes a datagram from 49152 for another protocol's (BCM-LI).
    if filter.contains("port 4789") { arguments += ["-T", "vxlan"] }
    if let direction { arguments += ["--direction", direction] }
    if let framesMax { arguments += ["-c", "\(framesMax)"] }
    process = try namespace.start(arguments + [filter])
    guard eventually({ process.standardError.contains("listening on") }) else {
      throw LabError("\(process.commandLine): \(process.standardError)")
    }
  }

  /// Waits until `framesMax` frames were seen; false when they did not come in time.
  func isFull(seconds: Double = 10) -> Bool { process.wait(seconds: seconds) == 0 }

  /// Ends it and returns what it said: a frame begins a line that is not indented.
  func stop() throws -> String {
    process.send(signal: SIGINT)
    guard process.wait(seconds: 10) == 0 else { throw LabError("\(process.commandLine): \(process.standardError)") }
    // It answers the signal with a line break.
    return process.standardOutput.trimmingCharacters(in: .newlines)
  }

  /// What tcpdump says where it recomputed a checksum and found another; nothing when all are right.
  static func wrongChecksums(in report: String) -> [Substring] {
    report.split(separator: "\n").filter {
      $0.contains("incorrect") || $0.contains("bad cksum") || $0.contains("bad udp cksum")
    }
  }
}

/// The part of iperf3's report that the tests read.
private struct FlowReport: Decodable {
  struct Sum: Decodable {
    let bytes: Int
    let bitsPerSecond: Double
  }
  struct End: Decodable {
    let sumReceived: Sum
  }
  let end: End
}
