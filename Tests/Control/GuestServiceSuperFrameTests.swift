import TestSupport
import Testing

@testable import Control

extension GuestServiceTests {
  /// A super-frame of one kind, as a guest's driver leaves it to the card.
  struct GuestSuperFrame: CustomTestStringConvertible, Sendable {
    let isTCP: Bool
    let isIPv6: Bool

    static let all = [(true, false), (true, true), (false, false), (false, true)].map {
      GuestSuperFrame(isTCP: $0, isIPv6: $1)
    }
    static let segmentBytes = 300
    /// The last segment is shorter.
    static let payloadBytes = 1_150
    static let segmentCount = 4

    var testDescription: String { (isTCP ? "TCP" : "UDP") + (isIPv6 ? " over IPv6" : " over IPv4") }
    var transport: Int { isIPv6 ? 54 : 34 }
    var headerBytes: Int { transport + (isTCP ? 20 : 8) }
    private var checksumOffset: Int { isTCP ? 16 : 6 }
    private var ipProtocol: UInt8 { isTCP ? 6 : 17 }

    /// virtio 1.2 §5.1.6: the checksum is to be made, and segments of so many bytes.
    var header: [UInt8] {
      let type: UInt8 = !isTCP ? 5 : isIPv6 ? 4 : 1
      return [1, type] + little(headerBytes) + little(Self.segmentBytes) + little(transport) + little(checksumOffset)
        + [0, 0]
    }

    func frame(from sender: SharedGuest, to receiver: SharedGuest) -> [UInt8] {
      let transportBytes = headerBytes - transport + Self.payloadBytes
      let ports = big(1_000, 2) + big(2_000, 2)
      var ip: [UInt8]
      if isIPv6 {
        ip = [0x60, 0, 0, 0] + big(transportBytes, 2) + [ipProtocol, 64] + Self.addresses(16)
      } else {
        ip = [0x45, 0] + big(20 + transportBytes, 2) + big(7, 2) + [0, 0, 64, ipProtocol, 0, 0] + Self.addresses(4)
        ip.replaceSubrange(10..<12, with: big(Int(~sum(ip)), 2))
      }
      let pseudoSum = big(Int(sum(Self.addresses(isIPv6 ? 16 : 4) + [0, ipProtocol] + big(transportBytes, 2))), 2)
      let rest =
        isTCP
        ? big(0, 4) + big(0, 4) + [0x50, 0x18, 0xFF, 0xFF] + pseudoSum + [0, 0] : big(transportBytes, 2) + pseudoSum
      let ethernet = big(Int(receiver.mac), 6) + big(Int(sender.mac), 6) + (isIPv6 ? [0x86, 0xDD] : [0x08, 0x00])
      return ethernet + ip + ports + rest + (0..<Self.payloadBytes).map { UInt8(truncatingIfNeeded: $0 &* 3) }
    }

    /// Both ends' addresses, of so many bytes each.
    private static func addresses(_ bytes: Int) -> [UInt8] {
      [1, 2].flatMap { [10] + [UInt8](repeating: 0, count: bytes - 2) + [$0] }
    }

    /// Whether a segment's checksums and lengths are right.
    func isFinished(_ frame: [UInt8]) -> Bool {
      let transportBytes = frame.count - transport
      let length = isIPv6 ? Array(frame[18..<20]) : Array(frame[16..<18])
      guard length == big(isIPv6 ? transportBytes : transportBytes + 20, 2) else { return false }
      if !isIPv6, sum(Array(frame[14..<34])) != 0xFFFF { return false }
      if !isTCP, Array(frame[transport + 4..<transport + 6]) != big(transportBytes, 2) { return false }
      let addresses = Self.addresses(isIPv6 ? 16 : 4)
      return sum(addresses + [0, ipProtocol] + big(transportBytes, 2) + frame[transport...]) == 0xFFFF
    }

    private func big(_ value: Int, _ count: Int) -> [UInt8] {
      (0..<count).map { UInt8(truncatingIfNeeded: value >> (8 * (count - 1 - $0))) }
    }
    private func little(_ value: Int) -> [UInt8] { big(value, 2).reversed() }

    /// The ones' complement sum of words (RFC 1071).
    private func sum(_ bytes: [UInt8]) -> UInt16 {
      var sum = 0
      for (number, byte) in bytes.enumerated() { sum += number % 2 == 0 ? Int(byte) << 8 : Int(byte) }
      while sum > 0xFFFF { sum = sum & 0xFFFF + sum >> 16 }
      return UInt16(sum)
    }
  }

  @Test(
    "a guest's super-frame goes whole to a guest that takes its kind, and as finished segments to another",
    arguments: GuestSuperFrame.all, layouts[..<2])
  func superFrames(kind: GuestSuperFrame, layout: [String]) throws {
    let ports = ["sender", "taker", "other"]
    let service = try ServiceProcess(ports: ports, flags: layout)
    let host: VhostUserFeatures = [.checksum, .hostTSO4, .hostTSO6, .hostUSO]
    let guest: VhostUserFeatures = [.guestChecksum, .guestTSO4, .guestTSO6, .guestUSO4, .guestUSO6]
    let features = [SharedGuest.features.union(host), SharedGuest.features.union(guest), SharedGuest.features]
    let guests = ports.enumerated().map { number, port in
      SharedGuest("guest-super-\(port)", mac: 0x0200_0000_0001 + UInt64(number), features: features[number])
    }
    try connect(guests, to: service, ports)
    func arrivals(at receiver: SharedGuest, _ count: Int) throws -> [(header: [UInt8], frame: [UInt8])] {
      try #require(guests[0].card.send(kind.frame(from: guests[0], to: receiver), header: kind.header) != nil)
      guests[0].kick(1)
      var arrived: [(header: [UInt8], frame: [UInt8])] = []
      let isThere = eventually {
        while let next = receiver.card.received() { arrived.append(next) }
        return arrived.count >= count
      }
      try #require(isThere, "\(arrived.count) of \(count) frames came")
      return arrived
    }

    let whole = try arrivals(at: guests[1], 1)[0]
    #expect(whole.frame == kind.frame(from: guests[0], to: guests[1]))
    #expect(Array(whole.header[..<10]) == Array(kind.header[..<10]))

    let payload = kind.frame(from: guests[0], to: guests[2])[kind.headerBytes...]
    let segments = try arrivals(at: guests[2], GuestSuperFrame.segmentCount)
    #expect(segments.count == GuestSuperFrame.segmentCount)
    #expect(segments.flatMap { $0.frame[kind.headerBytes...] } == Array(payload))
    for (header, frame) in segments {
      #expect(Array(header[..<10]) == [UInt8](repeating: 0, count: 10))
      #expect(kind.isFinished(frame), "\(frame)")
    }
    try expectGoodEnd(service)
  }
}
