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
    let checksum = internetChecksum(header)
    header.replaceSubrange(10..<12, with: networkOrder(checksum))
    return header + payload
  }

  /// RFC 1071, for an even number of bytes.
  private static func internetChecksum(_ bytes: [UInt8]) -> UInt16 {
    var sum = stride(from: 0, to: bytes.count, by: 2).reduce(UInt32(0)) {
      $0 + (UInt32(bytes[$1]) << 8 | UInt32(bytes[$1 + 1]))
    }
    while sum > 0xffff { sum = sum & 0xffff + sum >> 16 }
    return ~UInt16(sum)
  }

  /// A VXLAN header (RFC 7348 section 5) and what it carries.
  static func vxlan(vni: UInt32, flags: UInt8 = 0x08, reserved: UInt8 = 0, inner: [UInt8]) -> [UInt8] {
    [flags, 0, 0, 0] + networkOrder(vni << 8 | UInt32(reserved)) + inner
  }
}
