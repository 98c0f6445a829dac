import Foundation

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
    let report = try namespace.run("nstat", "--zeros", "--ignore", "--json")
    let counters = try JSONDecoder().decode([String: [String: Int]].self, from: Data(report.utf8))["kernel"] ?? [:]
    let wanted = ["TcpInCsumErrors", "UdpInCsumErrors", "IcmpInCsumErrors", "IpInHdrErrors"]
    let found = counters.filter { wanted.contains($0.key) }
    guard found.count == wanted.count else { throw LabError("nstat does not report \(wanted): \(counters.keys)") }
    return found.filter { $0.value != 0 }
  }

  /// Turns the device's transmit offloads on or off: with them off the guest sends whole, small, checksummed frames.
  func setOffloads(_ on: Bool) throws {
    let value = on ? "on" : "off"
    // A device that lacks one of them answers with an error when it is asked to turn it on; the rest still applies.
    for offload in ["tx", "tso", "gso", "sg"] {
      let change = try namespace.start(["ethtool", "-K", Guest.device, offload, value])
      guard change.wait(seconds: 10) != nil else { throw LabError("\(change.commandLine): did not end") }
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
