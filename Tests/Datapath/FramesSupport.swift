import Datapath
import FuzzEntry
import TestSupport
import Testing

extension SeededRandom {
  mutating func bytes(_ count: Int) -> [UInt8] { (0..<count).map { _ in UInt8.random(in: 0...255, using: &self) } }

  mutating func number<Number: FixedWidthInteger & UnsignedInteger>(_ type: Number.Type = Number.self) -> Number {
    Number.random(in: 0...Number.max, using: &self)
  }
}

/// A frame under construction: each header is written where the last one ended.
struct FrameMaker {
  var bytes: [UInt8] = []

  static let guestA = MACAddress(bits: 0x02_00_00_00_00_0a)
  static let guestB = MACAddress(bits: 0x02_00_00_00_00_0b)

  mutating func append(_ count: Int, _ write: (inout MutableRawSpan, Int) -> Int) {
    let start = bytes.count
    bytes += [UInt8](repeating: 0xee, count: count)
    let end = bytes.withMutableRawBytes { write(&$0, start) }
    precondition(end == bytes.count, "a writer says where its header ends")
  }

  func ethernet(_ etherType: UInt16) -> FrameMaker {
    var made = self
    made.append(EthernetHeader.bytes) {
      EthernetHeader(destination: Self.guestB, source: Self.guestA, etherType: etherType).write(into: &$0, at: $1)
    }
    return made
  }

  /// A tag after the last EtherType, which moves behind the tag.
  func tagged(_ tag: VLANTag) -> FrameMaker {
    var made = self
    let etherType = made.bytes.suffix(2)
    made.bytes.removeLast(2)
    made.append(VLANTag.bytes) { tag.write(into: &$0, at: $1) }
    made.bytes += etherType
    return made
  }

  func ipv4(_ header: IPv4Header) -> FrameMaker {
    var made = self
    made.append(header.headerBytes) { header.write(into: &$0, at: $1) }
    return made
  }

  func ipv6(_ header: IPv6Header) -> FrameMaker {
    var made = self
    made.append(IPv6Header.bytes) { header.write(into: &$0, at: $1) }
    return made
  }

  func fragment(_ header: IPv6FragmentHeader) -> FrameMaker {
    var made = self
    made.append(IPv6FragmentHeader.bytes) { header.write(into: &$0, at: $1) }
    return made
  }

  func tcp(_ header: TCPHeader) -> FrameMaker {
    var made = self
    made.append(header.headerBytes) { header.write(into: &$0, at: $1) }
    return made
  }

  func udp(_ header: UDPHeader) -> FrameMaker {
    var made = self
    made.append(UDPHeader.bytes) { header.write(into: &$0, at: $1) }
    return made
  }

  func payload(_ payload: [UInt8]) -> FrameMaker {
    var made = self
    made.bytes += payload
    return made
  }
}

extension [UInt8] {
  /// "45 00 00 73": hexadecimal digits; spaces do not count.
  init(hex: String) {
    let digits = hex.utf8.filter { $0 != UInt8(ascii: " ") }.map { UInt8(String(UnicodeScalar($0)), radix: 16)! }
    self = stride(from: 0, to: digits.count, by: 2).map { digits[$0] << 4 | digits[$0 + 1] }
  }

  /// What `body` reads from the bytes: for macros, which do not take values that may not escape.
  func read<Value>(_ body: (RawSpan) -> Value) -> Value { body(rawBytes) }

  var parsed: ParsedFrame? { ParsedFrame(rawBytes) }
}
