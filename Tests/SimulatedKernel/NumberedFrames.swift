import Datapath
import SimulatedKernel

/// Frames that can be told apart: each carries the flow that it belongs to and its number there, and bytes that follow
/// from both. Flows of even number are UDP in IPv4, so that ToS, congestion marks and ports have a part; the others are
/// no IP, under an EtherType for experiments (IEEE 802, 0x88B5).
struct NumberedFrame: Equatable {
  var destination: UInt64
  var source: UInt64
  var flow: UInt32
  var number: UInt32

  /// Ethernet, IPv4 and UDP headers, flow and number.
  static let bytesMin = 14 + 20 + 8 + 8
  static let broadcast: UInt64 = 0xFFFF_FFFF_FFFF

  private var isIP: Bool { flow & 1 == 0 }
  private var payloadStart: Int { isIP ? 42 : 14 }
  /// DSCP and ECN of the flow: every ECN codepoint has flows.
  var typeOfService: UInt8 { isIP ? UInt8(truncatingIfNeeded: flow >> 1 & 3 | (flow & 7) << 3) : 0 }

  init(destination: UInt64, source: UInt64, flow: UInt32, number: UInt32) {
    self.destination = destination
    self.source = source
    self.flow = flow
    self.number = number
  }

  func bytes(count: Int) -> [UInt8] { bytes(count: count, typeOfService: typeOfService) }

  private func bytes(count: Int, typeOfService: UInt8) -> [UInt8] {
    precondition(count >= Self.bytesMin)
    let (frame, start) = (self, payloadStart)
    return unsafe [UInt8](unsafeUninitializedCapacity: count) { bytes, used in
      used = count
      func put(_ value: UInt64, _ width: Int, at place: Int) {
        for index in 0..<width {
          unsafe bytes[place + index] = UInt8(truncatingIfNeeded: value >> UInt64(8 * (width - 1 - index)))
        }
      }
      put(frame.destination, 6, at: 0)
      put(frame.source, 6, at: 6)
      if frame.isIP {
        // Version and length, ToS, total length; identification and fragment 0; TTL 64 and UDP; addresses.
        let ports = UInt64(1024 + frame.flow & 0x3FFF)
        let words: [UInt64] = [
          0x4500 | UInt64(typeOfService), UInt64(count - 14), 0, 0, 0x4011, 0, 0x0A0A, frame.source & 0xFFFF, 0x0A0A,
          frame.destination & 0xFFFF,
        ]
        var sum = words.reduce(0, +)
        while sum > 0xFFFF { sum = sum & 0xFFFF + sum >> 16 }
        put(0x0800, 2, at: 12)
        for (index, word) in words.enumerated() { put(index == 5 ? ~sum & 0xFFFF : word, 2, at: 14 + 2 * index) }
        put(ports << 48 | 9 << 32 | UInt64(count - 34) << 16, 8, at: 34)
      } else {
        put(0x88B5, 2, at: 12)
      }
      put(UInt64(frame.flow) << 32 | UInt64(frame.number), 8, at: start)
      var filler = UInt8(truncatingIfNeeded: frame.flow &* 7 &+ frame.number)
      var place = start + 8
      while place < count {
        unsafe bytes[place] = filler
        filler &+= 31
        place += 1
      }
    }
  }

  /// Reads a frame back; nil when any of its bytes is not as it was made. A congestion mark, with the IP checksum that
  /// goes with it, is no change where the flow can carry it.
  init?(_ bytes: [UInt8]) {
    guard bytes.count >= Self.bytesMin else { return nil }
    func number(_ start: Int, _ width: Int) -> UInt64 {
      bytes[start..<start + width].reduce(0) { $0 << 8 | UInt64($1) }
    }
    let isIP = number(12, 2) == 0x0800
    let start = isIP ? 42 : 14
    self.init(
      destination: number(0, 6), source: number(6, 6), flow: UInt32(number(start, 4)),
      number: UInt32(number(start + 4, 4)))
    guard self.isIP == isIP else { return nil }
    var service = typeOfService
    if isIP, service & 3 != 0, bytes[15] == service | 3 { service = bytes[15] }
    guard self.bytes(count: bytes.count, typeOfService: service) == bytes else { return nil }
  }
}

/// TCP frames over IPv4 that can be told apart, sent as one super-frame: each segment carries its flow, its number
/// there and bytes that follow from both.
struct NumberedSuperFrame: Equatable {
  var destination: UInt64
  var source: UInt64
  var flow: UInt32
  /// The first segment's.
  var number: UInt32
  var segments: Int
  /// Payload of the last segment: from 8 to `segmentBytes` of the flow.
  var lastBytes: Int

  static let headerBytes = 14 + 20 + 20
  /// Flow and number.
  static let lastBytesMin = 8
  /// Payload of all segments of a flow but the last ones.
  static func segmentBytes(flow: UInt32) -> Int { 40 + Int(flow >> 8 & 0x7F) }

  private var payloadBytes: Int { (segments - 1) * Self.segmentBytes(flow: flow) + lastBytes }
  /// Every ECN codepoint has flows.
  private var typeOfService: UInt8 { 0x20 | UInt8(truncatingIfNeeded: flow >> 8 & 3) }

  private func payload(ofSegment segment: Int) -> [UInt8] {
    let number = number &+ UInt32(segment)
    let count = segment == segments - 1 ? lastBytes : Self.segmentBytes(flow: flow)
    let start = (0..<4).map { UInt8(truncatingIfNeeded: flow >> (24 - 8 * $0)) }
    let next = (0..<4).map { UInt8(truncatingIfNeeded: number >> (24 - 8 * $0)) }
    return start + next + (8..<count).map { UInt8(truncatingIfNeeded: flow &* 5 &+ number &* 3 &+ UInt32($0)) }
  }

  /// The sum of the pseudo-header of IPv4 and TCP (RFC 9293 section 3.1).
  private static func pseudoHeader(_ words: [UInt8], transportBytes: Int) -> Int {
    sum(words[12..<20]) + 6 + transportBytes
  }

  private static func sum(_ bytes: ArraySlice<UInt8>) -> Int {
    var sum = 0
    for (place, byte) in bytes.enumerated() { sum += place & 1 == 0 ? Int(byte) << 8 : Int(byte) }
    return sum
  }

  private static func fold(_ sum: Int) -> UInt16 {
    var sum = sum
    while sum > 0xFFFF { sum = sum & 0xFFFF + sum >> 16 }
    return UInt16(sum)
  }

  /// The frame as a guest hands it over: with the sum of the pseudo-header in place of the checksum.
  var bytes: [UInt8] {
    func put(_ value: UInt64, _ width: Int) -> [UInt8] {
      (0..<width).map { UInt8(truncatingIfNeeded: value >> UInt64(8 * (width - 1 - $0))) }
    }
    let sequence = UInt64(number) * UInt64(Self.segmentBytes(flow: flow)) & 0xFFFF_FFFF
    var network = [0x45, typeOfService] + put(UInt64(40 + payloadBytes), 2) + put(UInt64(number & 0xFFFF), 2)
    network +=
      [0, 0, 64, 6, 0, 0] + put(0x0A0A << 16 | source & 0xFFFF, 4) + put(0x0A0A << 16 | destination & 0xFFFF, 4)
    network.replaceSubrange(10..<12, with: put(UInt64(~Self.fold(Self.sum(network[...]))), 2))
    let pseudo = Self.fold(Self.pseudoHeader(network, transportBytes: 20 + payloadBytes))
    // Ports, sequence, acknowledgement, length and flags (ACK), window, checksum, urgent.
    let transport =
      put(UInt64(1024 + flow & 0x3FFF), 2) + put(5201, 2) + put(sequence, 4) + put(1, 4) + [0x50, 0x10] + put(500, 2)
      + put(UInt64(pseudo), 2) + [0, 0]
    let ethernet = put(destination, 6) + put(source, 6) + put(0x0800, 2)
    return ethernet + network + transport + (0..<segments).flatMap { payload(ofSegment: $0) }
  }

  /// Little endian: flags (NEEDS_CSUM), type (TCPv4), header bytes, segment bytes, checksum's start and place, buffers.
  var virtioHeader: [UInt8] {
    [1, 1, UInt8(Self.headerBytes), 0, UInt8(Self.segmentBytes(flow: flow)), 0, 34, 0, 16, 0, 0, 0]
  }

  /// Reads a super-frame that arrived whole back; nil when any of its bytes is not as it was made.
  init?(_ bytes: [UInt8], virtioHeader: [UInt8]) {
    guard let (first, payload) = Self.readHeaders(bytes) else { return nil }
    self = first
    let most = Self.segmentBytes(flow: flow)
    segments = (payload + most - 1) / most
    lastBytes = payload - (segments - 1) * most
    var expected = self.bytes
    let service = bytes[15]
    guard service == typeOfService || typeOfService & 3 != 0 && service == typeOfService | 3 else { return nil }
    // A mark that every segment got on its way, and the checksum that goes with it.
    for place in [15, 24, 25] { expected[place] = bytes[place] }
    guard lastBytes >= Self.lastBytesMin, self.virtioHeader == virtioHeader, expected == bytes,
      Self.fold(Self.sum(bytes[14..<34])) == 0xFFFF
    else { return nil }
  }

  /// Reads one segment back; nil when it is not as it must be cut. A congestion mark is no change where the flow can
  /// carry it.
  init?(segment bytes: [UInt8]) {
    guard let (segment, payload) = Self.readHeaders(bytes) else { return nil }
    self = segment
    lastBytes = payload
    guard payload <= Self.segmentBytes(flow: flow) else { return nil }
    var expected = self.bytes
    let service = bytes[15]
    guard service == typeOfService || typeOfService & 3 != 0 && service == typeOfService | 3 else { return nil }
    // Of the headers all but the ToS and the checksums is as a guest would have made it; those must be right.
    for place in [15, 24, 25, 50, 51] { expected[place] = bytes[place] }
    let transport = Self.sum(bytes[34...]) + Self.pseudoHeader(Array(bytes[14..<34]), transportBytes: bytes.count - 34)
    guard expected == bytes, Self.fold(Self.sum(bytes[14..<34])) == 0xFFFF, Self.fold(transport) == 0xFFFF else {
      return nil
    }
  }

  init(destination: UInt64, source: UInt64, flow: UInt32, number: UInt32, segments: Int, lastBytes: Int) {
    self.destination = destination
    self.source = source
    self.flow = flow
    self.number = number
    self.segments = segments
    self.lastBytes = lastBytes
  }

  /// Whether a frame can be nothing else.
  static func isOne(_ bytes: [UInt8]) -> Bool { bytes.count > 23 && bytes[12] == 8 && bytes[13] == 0 && bytes[23] == 6 }

  /// What the headers and the first bytes of the payload say, and how long the payload is.
  private static func readHeaders(_ bytes: [UInt8]) -> (NumberedSuperFrame, payloadBytes: Int)? {
    guard bytes.count >= headerBytes + lastBytesMin else { return nil }
    func number(_ start: Int, _ width: Int) -> UInt64 {
      bytes[start..<start + width].reduce(0) { $0 << 8 | UInt64($1) }
    }
    let frame = NumberedSuperFrame(
      destination: number(0, 6), source: number(6, 6), flow: UInt32(number(headerBytes, 4)),
      number: UInt32(number(headerBytes + 4, 4)), segments: 1, lastBytes: lastBytesMin)
    return (frame, bytes.count - headerBytes)
  }
}

/// Looks at what arrives at one place: whole, in order within each flow, and nothing twice. Gaps are for the
/// conservation check to explain.
struct OrderChecker {
  private(set) var delivered = 0
  private(set) var problems: [String] = []
  private var last: [UInt32: UInt32] = [:]

  /// Looks at what a worker wrote to a device; returns it, a segment or super-frame as a frame of its first number,
  /// when it arrived whole.
  mutating func check(_ written: SimulatedNetwork.WrittenFrame) -> NumberedFrame? {
    guard NumberedSuperFrame.isOne(written.frame) else { return check(written.frame) }
    let isWhole = written.virtioHeader.contains { $0 != 0 }
    let frame =
      isWhole
      ? NumberedSuperFrame(written.frame, virtioHeader: written.virtioHeader)
      : NumberedSuperFrame(segment: written.frame)
    guard let frame else {
      delivered += 1
      problems.append("a \(isWhole ? "super-frame" : "segment") of \(written.frame.count) bytes arrived changed")
      return nil
    }
    delivered += frame.segments
    follow(flow: frame.flow, number: frame.number, count: UInt32(frame.segments))
    return NumberedFrame(
      destination: frame.destination, source: frame.source, flow: frame.flow, number: frame.number)
  }

  /// Returns the frame when it arrived whole.
  @discardableResult
  mutating func check(_ bytes: [UInt8]) -> NumberedFrame? {
    delivered += 1
    guard let frame = NumberedFrame(bytes) else {
      problems.append("a frame of \(bytes.count) bytes arrived changed")
      return nil
    }
    follow(flow: frame.flow, number: frame.number, count: 1)
    return frame
  }

  private mutating func follow(flow: UInt32, number: UInt32, count: UInt32) {
    if let last = last[flow], number <= last {
      problems.append("flow \(flow): frame \(number) came after \(last)")
    }
    last[flow] = max(number + count - 1, last[flow] ?? 0)
  }
}
