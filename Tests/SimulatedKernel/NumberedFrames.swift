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
    let (destination, source, flow, number) = (destination, source, flow, number)
    return unsafe [UInt8](unsafeUninitializedCapacity: count) { bytes, used in
      used = count
      for place in 0..<6 {
        unsafe bytes[place] = UInt8(truncatingIfNeeded: destination >> UInt64(40 - 8 * place))
        unsafe bytes[6 + place] = UInt8(truncatingIfNeeded: source >> UInt64(40 - 8 * place))
      }
      unsafe bytes[12] = 0x88
      unsafe bytes[13] = 0xB5
      for place in 0..<4 {
        unsafe bytes[14 + place] = UInt8(truncatingIfNeeded: flow >> UInt32(24 - 8 * place))
        unsafe bytes[18 + place] = UInt8(truncatingIfNeeded: number >> UInt32(24 - 8 * place))
      }
      var filler = UInt8(truncatingIfNeeded: flow &* 7 &+ number)
      var place = Self.bytesMin
      while place < count {
        unsafe bytes[place] = filler
        filler &+= 31
        place += 1
      }
    }
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
