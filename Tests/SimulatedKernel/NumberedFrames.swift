import Datapath

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

/// Looks at what arrives at one place: whole, in order within each flow, and nothing twice. Gaps are for the
/// conservation check to explain.
struct OrderChecker {
  private(set) var delivered = 0
  private(set) var problems: [String] = []
  private var last: [UInt32: UInt32] = [:]

  /// Returns the frame when it arrived whole.
  @discardableResult
  mutating func check(_ bytes: [UInt8]) -> NumberedFrame? {
    delivered += 1
    guard let frame = NumberedFrame(bytes) else {
      problems.append("a frame of \(bytes.count) bytes arrived changed")
      return nil
    }
    if let last = last[frame.flow], frame.number <= last {
      problems.append("flow \(frame.flow): frame \(frame.number) came after \(last)")
    }
    last[frame.flow] = max(frame.number, last[frame.flow] ?? 0)
    return frame
  }
}
