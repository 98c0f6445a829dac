import Datapath

/// Frames that can be told apart: each carries the flow that it belongs to and its number there, under an EtherType for
/// experiments (IEEE 802, 0x88B5), and bytes that follow from both.
struct NumberedFrame: Equatable {
  var destination: UInt64
  var source: UInt64
  var flow: UInt32
  var number: UInt32

  static let headerBytes = 14
  static let bytesMin = headerBytes + 8

  func bytes(count: Int) -> [UInt8] {
    precondition(count >= Self.bytesMin)
    var bytes: [UInt8] = []
    bytes.reserveCapacity(count)
    for address in [destination, source] {
      for shift in stride(from: 40, through: 0, by: -8) { bytes.append(UInt8(truncatingIfNeeded: address >> UInt64(shift))) }
    }
    bytes += [0x88, 0xB5]
    for word in [flow, number] {
      for shift in stride(from: 24, through: 0, by: -8) { bytes.append(UInt8(truncatingIfNeeded: word >> UInt32(shift))) }
    }
    while bytes.count < count { bytes.append(Self.pattern(flow, number, bytes.count)) }
    return bytes
  }

  private static func pattern(_ flow: UInt32, _ number: UInt32, _ position: Int) -> UInt8 {
    UInt8(truncatingIfNeeded: UInt32(truncatingIfNeeded: position) &* 31 &+ flow &* 7 &+ number)
  }

  init(destination: UInt64, source: UInt64, flow: UInt32, number: UInt32) {
    self.destination = destination
    self.source = source
    self.flow = flow
    self.number = number
  }

  /// Reads a frame back; nil when any of its bytes is not as it was made.
  init?(_ bytes: [UInt8]) {
    guard bytes.count >= Self.bytesMin else { return nil }
    func number(_ range: Range<Int>) -> UInt64 { bytes[range].reduce(0) { $0 << 8 | UInt64($1) } }
    self.init(
      destination: number(0..<6), source: number(6..<12), flow: UInt32(number(14..<18)),
      number: UInt32(number(18..<22)))
    guard self.bytes(count: bytes.count) == bytes else { return nil }
  }
}

/// Looks at what arrives at one place: whole, in order within each flow, and nothing twice. Gaps are for the
/// conservation check to explain.
struct OrderChecker {
  private(set) var delivered = 0
  private(set) var problems: [String] = []
  private var last: [UInt32: UInt32] = [:]

  mutating func check(_ bytes: [UInt8]) {
    delivered += 1
    guard let frame = NumberedFrame(bytes) else {
      problems.append("a frame of \(bytes.count) bytes arrived changed")
      return
    }
    if let last = last[frame.flow], frame.number <= last {
      problems.append("flow \(frame.flow): frame \(frame.number) came after \(last)")
    }
    last[frame.flow] = max(frame.number, last[frame.flow] ?? 0)
  }
}
