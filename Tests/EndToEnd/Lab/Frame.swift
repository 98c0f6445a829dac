import Datapath

/// A MAC address.
struct MAC: Equatable, CustomStringConvertible {
  let bytes: [UInt8]
  init(_ bytes: UInt8...) { self.bytes = bytes }
  static let broadcast = MAC(0xff, 0xff, 0xff, 0xff, 0xff, 0xff)

  var description: String {
    bytes.map { String($0 >> 4, radix: 16) + String($0 & 15, radix: 16) }.joined(separator: ":")
  }
}

/// The bytes of a number in network order.
func networkOrder(_ value: some FixedWidthInteger) -> [UInt8] {
  stride(from: value.bitWidth - 8, through: 0, by: -8).map { UInt8(truncatingIfNeeded: value >> $0) }
}

/// The frames that tests send: built here by hand, so that they check the forwarder's own reading of the formats.
enum Frame {
  /// IEEE 802's EtherType for local experiments.
  static let experiment: UInt16 = 0x88b5
  static let ipv4: UInt16 = 0x0800
  static let ipv6: UInt16 = 0x86dd
  static let customerTag: UInt16 = 0x8100
  static let serviceTag: UInt16 = 0x88a8

  static func ethernet(
    to destination: MAC, from source: MAC, type: UInt16 = experiment, tags: [(type: UInt16, id: UInt16)] = [],
    payload: [UInt8]
  ) -> [UInt8] {
    destination.bytes + source.bytes + tags.flatMap { networkOrder($0.type) + networkOrder($0.id) }
      + networkOrder(type) + payload
  }

  /// What opens the payload of a numbered frame.
  private static let mark: [UInt8] = Array("numbered".utf8)

  /// A frame, unless it is asked to be longer of the smallest size that Ethernet has, with a number that `number(of:)`
  /// reads again.
  static func numbered(
    _ number: UInt32, to destination: MAC, from source: MAC, tags: [(type: UInt16, id: UInt16)] = [],
    payloadBytes: Int = 46
  ) -> [UInt8] {
    ethernet(
      to: destination, from: source, tags: tags,
      payload: mark + networkOrder(number) + [UInt8](repeating: 0, count: payloadBytes - mark.count - 4))
  }

  /// The number of a numbered frame with any tags; nil for other frames.
  static func number(of frame: [UInt8]) -> UInt32? {
    var offset = 12
    while offset + 4 <= frame.count {
      let type = UInt16(frame[offset]) << 8 | UInt16(frame[offset + 1])
      guard type == customerTag || type == serviceTag else { break }
      offset += 4
    }
    let start = offset + 2 + mark.count
    guard frame.count >= start + 4, Array(frame[(offset + 2)..<start]) == mark else { return nil }
    return frame[start..<(start + 4)].reduce(0) { $0 << 8 | UInt32($1) }
  }

  /// An IPv4 header without options and `payload`. A claimed length stands in the header whatever follows it.
  /// - Parameter fragment: the flags and the fragment's offset (RFC 791 section 3.1).
  static func ipv4Packet(
    from source: [UInt8], to destination: [UInt8], service: UInt8 = 0, protocolNumber: UInt8 = 253,
    claimedLength: Int? = nil, headerWords: UInt8 = 5, fragment: UInt16 = 0, payload: [UInt8]
  ) -> [UInt8] {
    let length = UInt16(claimedLength ?? 20 + payload.count)
    var header: [UInt8] =
      [0x40 | headerWords, service] + networkOrder(length) + [0, 0] + networkOrder(fragment)
      + [64, protocolNumber, 0, 0]
    header += source + destination
    let checksum = ~sum(header)
    header.replaceSubrange(10..<12, with: networkOrder(checksum))
    return header + payload
  }

  /// The port that datagrams and segments of tests come from.
  private static let senderPort: UInt16 = 40_000

  /// An IPv4 packet, not to be fragmented, with a UDP datagram, which is ``Segment``'s to read.
  /// - Parameters:
  ///   - claimedLength: what IPv4's header says, whatever follows it.
  ///   - isSumRight: whether UDP's checksum is; a wrong one differs in one bit.
  static func datagramPacket(
    from source: [UInt8], to destination: [UInt8], port: UInt16, claimedLength: Int? = nil, isSumRight: Bool = true,
    payload: [UInt8]
  ) -> [UInt8] {
    let length = networkOrder(UInt16(8 + payload.count))
    let ports = networkOrder(senderPort) + networkOrder(port)
    let checksum = ~sum(source + destination + [0, 17] + length + ports + length + payload)
    return ipv4Packet(
      from: source, to: destination, protocolNumber: 17, claimedLength: claimedLength, fragment: 0x4000,
      payload: ports + length + networkOrder(isSumRight ? checksum : checksum ^ 0x100) + payload)
  }

  /// The one's complement sum of RFC 1071.
  static func sum(_ bytes: some Collection<UInt8>) -> UInt16 {
    var sum = 0
    for (place, byte) in bytes.enumerated() { sum += place % 2 == 0 ? Int(byte) << 8 : Int(byte) }
    while sum > 0xffff { sum = sum & 0xffff + sum >> 16 }
    return UInt16(sum)
  }

  /// A TCP or UDP super-frame over IPv4 or IPv6 and its offload header, with all that is treated in its own way when it
  /// is cut: TCP's CWR, PSH and FIN, an identification that overflows, and TCP options.
  /// - Parameters:
  ///   - segmentBytes: payload of each segment but the last.
  ///   - sequence: TCP's, of the first byte of payload.
  static func superFrame(
    isIPv4: Bool, isTCP: Bool, to destination: MAC, from source: MAC, tags: [(type: UInt16, id: UInt16)] = [],
    segmentBytes: Int, sequence: UInt32, payload: [UInt8]
  ) -> (offload: OffloadHeader, frame: [UInt8]) {
    let ipProtocol: UInt8 = isTCP ? 6 : 17
    let transportBytes = (isTCP ? 32 : 8) + payload.count
    let addresses: [UInt8] =
      isIPv4
      ? [10, 1, 2, 3, 10, 1, 2, 4]
      : [0xfd] + [UInt8](repeating: 0, count: 14) + [1, 0xfd] + [UInt8](repeating: 0, count: 14) + [2]
    let partial = sum(addresses + [0, ipProtocol] + networkOrder(UInt16(transportBytes)))
    var transport = networkOrder(senderPort) + networkOrder(UInt16(5_201))
    if isTCP {
      transport += networkOrder(sequence) + networkOrder(UInt32(7)) + [0x80, 0xd9, 1, 0]
      transport += networkOrder(partial) + [0, 0, 1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]
    } else {
      transport += networkOrder(UInt16(transportBytes)) + networkOrder(partial)
    }
    var packet: [UInt8]
    if isIPv4 {
      packet = [0x45, 0xb8] + networkOrder(UInt16(20 + transportBytes)) + [0xff, 0xfe, 0x40, 0, 64, ipProtocol, 0, 0]
      packet += addresses
      packet.replaceSubrange(10..<12, with: networkOrder(~sum(packet)))
    } else {
      packet = [0x6b, 0x80, 0, 5] + networkOrder(UInt16(transportBytes)) + [ipProtocol, 64] + addresses
    }
    let frame = ethernet(
      to: destination, from: source, type: isIPv4 ? ipv4 : ipv6, tags: tags, payload: packet + transport + payload)
    let start = frame.count - transportBytes
    let offload = OffloadHeader(
      flags: OffloadHeader.flagNeedsChecksum, gsoType: isTCP ? (isIPv4 ? 1 : 4) : 5,
      headerLength: UInt16(start + transport.count), gsoSize: UInt16(segmentBytes), checksumStart: UInt16(start),
      checksumOffset: isTCP ? 16 : 6)
    return (offload, frame)
  }

  /// What a segment, or several in one, of a super-frame carries.
  struct Segment {
    /// From the destination's MAC to the EtherType.
    let head: ArraySlice<UInt8>
    /// ToS byte or traffic class.
    let service: UInt8
    /// TCP's.
    let sequence: UInt32
    let payload: ArraySlice<UInt8>
    /// Whether the checksums of IPv4 and of the transport are right.
    let isSumRight: Bool

    /// Nil for other frames.
    init?(_ frame: [UInt8], isIPv4: Bool, isTCP: Bool, tagCount: Int) {
      let network = 14 + 4 * tagCount
      let transport = network + (isIPv4 ? 20 : 40)
      let start = transport + (isTCP ? 32 : 8)
      func number(_ place: Int) -> UInt16 { UInt16(frame[place]) << 8 | UInt16(frame[place + 1]) }
      guard frame.count > start, number(network - 2) == (isIPv4 ? ipv4 : ipv6),
        frame[network + (isIPv4 ? 9 : 6)] == (isTCP ? 6 : 17), number(transport) == senderPort
      else { return nil }
      let end = isIPv4 ? network + Int(number(network + 2)) : transport + Int(number(network + 4))
      guard end > start, end <= frame.count else { return nil }
      head = frame[..<network]
      service = isIPv4 ? frame[network + 1] : frame[network] << 4 | frame[network + 1] >> 4
      sequence = UInt32(number(transport + 4)) << 16 | UInt32(number(transport + 6))
      payload = frame[start..<end]
      let addresses = frame[(transport - (isIPv4 ? 8 : 32))..<transport]
      let pseudoHeader = addresses + [0, isTCP ? 6 : 17] + networkOrder(UInt16(end - transport))
      isSumRight =
        sum(pseudoHeader + frame[transport..<end]) == 0xffff && (!isIPv4 || sum(frame[network..<transport]) == 0xffff)
    }
  }

  /// A VXLAN header (RFC 7348 section 5) and what it carries.
  static func vxlan(vni: UInt32, flags: UInt8 = 0x08, reserved: UInt8 = 0, inner: [UInt8]) -> [UInt8] {
    [flags, 0, 0, 0] + networkOrder(vni << 8 | UInt32(reserved)) + inner
  }
}
