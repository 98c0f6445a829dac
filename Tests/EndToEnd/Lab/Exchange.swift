import Glibc
import TestSupport

/// Random bytes and sizes.
extension SeededRandom {
  /// From 1 on; each power of two is as likely as the others.
  mutating func size(upTo most: Int) -> Int {
    let bits = Int.random(in: 0...(Int.bitWidth - most.leadingZeroBitCount), using: &self)
    return Int.random(in: 1...min(most, 1 << bits), using: &self)
  }

  /// At most as many bytes as there are in ``all``.
  mutating func bytes(_ count: Int) -> [UInt8] {
    let start = Int.random(in: 0...(Self.all.count - count), using: &self)
    return Array(Self.all[start..<start + count])
  }

  /// Made once: tests are built without optimisation. A prime number of them, so that no size on the way divides it.
  static let all: [UInt8] = {
    var random = SeededRandom(seed: 0x5eed)
    let count = 4_194_319
    let words = (0...count / 8).map { _ in random.next() }
    return Array(unsafe words.withUnsafeBytes { unsafe Array($0) }[..<count])
  }()
}

/// Where two sequences of bytes differ first, in words; nil when they are the same.
func firstDifference(_ received: ArraySlice<UInt8>, from sent: ArraySlice<UInt8>) -> String? {
  let common = min(received.count, sent.count)
  let isSame = unsafe received.withUnsafeBytes { received in
    unsafe sent.withUnsafeBytes { sent in
      guard let received = received.baseAddress, let sent = sent.baseAddress else { return true }
      return unsafe memcmp(received, sent, common) == 0
    }
  }
  if isSame { return received.count == sent.count ? nil : "\(received.count) of \(sent.count) bytes" }
  let place = zip(received, sent).enumerated().first { $0.element.0 != $0.element.1 }!.offset
  return "byte \(place) of \(sent.count) differs"
}

/// A TCP connection between two guests that carries random bytes both ways as long as a test lets it, each of them
/// compared with what was sent.
final class RunningStream {
  private struct End {
    let socket: StreamSocket
    var random: SeededRandom
    var sent = 0
    var received: [UInt8] = []
    var receivedCount = 0
    var hasEnded = false
    var isFinished = false
  }
  private var ends: [End]
  /// A difference was found: nothing more is looked at.
  private(set) var difference: String?

  /// - Parameter options: of both sockets.
  init(from a: Guest, to b: Guest, _ family: Family = .ipv4, _ options: [SocketOption] = [], seed: UInt64) throws {
    // Small writes go out as they are, each with PSH.
    let options = options + [SocketOption(IPPROTO_TCP, TCP_NODELAY, 1)]
    let listener = try StreamListener(in: b.namespace, address: b.address(family), options)
    let near = try StreamSocket(in: a.namespace, to: b.address(family), port: listener.port, options)
    let far = try listener.accept(seconds: 10)
    ends = [near, far].enumerated().map { End(socket: $1, random: SeededRandom(seed: seed + UInt64($0))) }
  }

  /// One whose far end is a virtual machine, which returns all that comes.
  init(from a: Guest, echoedBy machine: Machine, seed: UInt64) throws {
    let near = try StreamSocket(
      in: a.namespace, to: machine.guest.address, port: Machine.echoPort, [SocketOption(IPPROTO_TCP, TCP_NODELAY, 1)])
    ends = [End(socket: near, random: SeededRandom(seed: seed))]
  }

  var sentBytes: Int { ends.reduce(0) { $0 + $1.sent } }
  var receivedBytes: Int { ends.reduce(0) { $0 + $1.receivedCount } }

  /// The bytes from a place of the stream on: all random bytes, over and over.
  private func bytes(from place: Int, atMost count: Int) -> ArraySlice<UInt8> {
    let start = place % SeededRandom.all.count
    return SeededRandom.all[start..<min(start + count, SeededRandom.all.count)]
  }

  /// Sends and receives what goes at once, or waits for it a little.
  /// - Parameter bytesMax: what each end sends in all.
  private func advance(bytesMax: [Int]) throws {
    StreamSocket.waitForAny(
      of: ends.indices.map { (ends[$0].socket, ends[$0].sent < bytesMax[$0] && !ends[$0].hasEnded) }, seconds: 0.01)
    for index in ends.indices {
      // A few writes of all sizes, then the other end.
      for _ in 0..<16 {
        let room = bytesMax[index] - ends[index].sent
        guard room > 0 else { break }
        let size = min(room, ends[index].random.size(upTo: 65_536))
        let taken = try ends[index].socket.send(bytes(from: ends[index].sent, atMost: size))
        ends[index].sent += taken
        if taken == 0 { break }
      }
      if !ends[index].isFinished {
        ends[index].isFinished = try ends[index].socket.receive(into: &ends[index].received)
      }
      compare(index)
    }
  }

  private func compare(_ index: Int) {
    while !ends[index].received.isEmpty {
      let expected = bytes(from: ends[index].receivedCount, atMost: ends[index].received.count)
      if let found = firstDifference(ends[index].received.prefix(expected.count), from: expected) {
        difference = difference ?? "after \(ends[index].receivedCount) bytes to end \(index): \(found)"
      }
      ends[index].receivedCount += expected.count
      ends[index].received.removeFirst(expected.count)
    }
  }

  /// Lets it run until the condition holds, which is asked now and then, and says whether it did in time.
  func run(within seconds: Double = 10, until condition: () throws -> Bool) throws -> Bool {
    let deadline = ContinuousClock.now + .seconds(seconds)
    while ContinuousClock.now < deadline, difference == nil {
      let pause = ContinuousClock.now + .milliseconds(50)
      while ContinuousClock.now < pause { try advance(bytesMax: [.max, .max]) }
      if try condition() { return true }
    }
    return false
  }

  /// Lets it run for so long.
  func run(seconds: Double) throws { _ = try run(within: seconds) { false } }

  /// Lets it run beside a command, to whose end it waits.
  func run(beside process: ChildProcess) throws {
    guard try run(within: 30, until: { !process.isRunning }), process.exitCode == 0 else {
      throw LabError("\(process.commandLine): \(process.standardOutput)\(process.standardError)\(difference ?? "")")
    }
  }

  /// Sends so many bytes from each end, ends each direction by itself, and waits for all that is under way.
  /// - Returns: what is wrong with what arrived; nil when nothing is.
  func finish(bytes: [Int] = [0, 0], within seconds: Double = 20) throws -> String? {
    let bytesMax = zip(ends, bytes).map { $0.sent + $1 }
    let isWhole = try eventually(within: seconds, pollMicroseconds: 0) {
      try advance(bytesMax: bytesMax)
      for index in ends.indices where ends[index].sent >= bytesMax[index] && !ends[index].hasEnded {
        ends[index].socket.end()
        ends[index].hasEnded = true
      }
      return ends.allSatisfy { $0.hasEnded && $0.isFinished }
    }
    if let difference { return difference }
    let counts = "\(sentBytes) bytes sent, \(receivedBytes) received"
    if !isWhole { return "it does not come to its end: \(counts)" }
    return sentBytes == receivedBytes ? nil : counts
  }
}

/// What travels between two guests and is compared, byte for byte, with what was sent: a difference throws.
struct Exchange {
  let a: Guest
  let b: Guest
  var random: SeededRandom
  /// Tells one run from another in what failed.
  var name = ""

  /// Payload of the longest datagrams: what IPv4 (65,535 bytes with its header) and IPv6 (without) have room for.
  private static func datagramBytesMax(_ family: Family) -> Int { family == .ipv4 ? 65_507 : 65_527 }
  /// What may be under way at once: less than the shortest queue of a device or socket takes, in fragments too.
  private static let burstBytes = 150_000
  private static let burstDatagrams = 32

  /// A TCP connection of writes of all sizes, each direction of which ends by itself.
  mutating func stream(_ family: Family, bytes: Int, _ options: [SocketOption] = []) throws {
    let stream = try RunningStream(from: a, to: b, family, options, seed: random.next())
    if let found = try stream.finish(bytes: [bytes, bytes / 2]) {
      throw LabError("\(name): TCP, \(family.rawValue): \(found)")
    }
  }

  /// Urgent bytes at the end of each of some writes, read out of turn.
  mutating func urgentBytes(_ family: Family) throws {
    let listener = try StreamListener(in: b.namespace, address: b.address(family))
    let sender = try StreamSocket(in: a.namespace, to: b.address(family), port: listener.port)
    let receiver = try listener.accept(seconds: 10)
    for size in [1, 2, 1_000, 4_000, 20_000] {
      let bytes = random.bytes(size)
      guard try sender.send(bytes[...], isUrgent: true) == size else { throw LabError("\(size) bytes find no room") }
      guard try receiver.receiveUrgent() == bytes[size - 1] else {
        throw LabError("\(name): TCP, \(family.rawValue): another urgent byte, or none")
      }
      var received: [UInt8] = []
      _ = try eventually { try receiver.receive(into: &received) || received.count >= size - 1 }
      if let found = firstDifference(received[...], from: bytes.dropLast()) {
        throw LabError("\(name): TCP, \(family.rawValue), before an urgent byte: \(found)")
      }
    }
  }

  /// Datagrams of all sizes, the longest in fragments, with every ECN mark and any DSCP, both ways.
  /// - Parameter headerBytes: what the options take of the longest datagram.
  mutating func datagrams(
    _ family: Family, bytes: Int, _ options: [SocketOption] = [], headerBytes: Int = 0
  ) throws {
    // Linux counts the options of IPv6 twice here.
    let most = Self.datagramBytesMax(family) - 2 * headerBytes
    var sizes = [1, most]
    while sizes.reduce(0, +) < bytes { sizes.append(random.size(upTo: most)) }
    try bothWays(family, options, headerBytes: headerBytes, times: sizes.count, "UDP") { number, random, socket, to in
      let payload = random.bytes(sizes[number])
      let service = UInt8(truncatingIfNeeded: random.next())
      try socket.setService(service)
      try socket.send(payload, to: to, port: Self.port)
      return [(payload[...], service)]
    }
  }

  /// Datagrams that the sender hands to its kernel many at once (USO), of all sizes that one packet carries.
  /// - Parameter segmentBytesMax: the longest payload that needs no fragments.
  mutating func superDatagrams(_ family: Family, count: Int, segmentBytesMax: Int = 1_400) throws {
    try bothWays(family, [], times: count, "USO") { number, random, socket, to in
      let segmentBytes = number % 2 == 0 ? segmentBytesMax : random.size(upTo: segmentBytesMax)
      // As many as every kernel cuts (UDP_MAX_SEGMENTS before 6.9), the last shorter mostly.
      let segments = Int.random(in: 2...min(64, 65_000 / segmentBytes), using: &random)
      let payload = random.bytes((segments - 1) * segmentBytes + Int.random(in: 1...segmentBytes, using: &random))
      try socket.send(payload, segmentBytes: segmentBytes, to: to, port: Self.port)
      return stride(from: 0, to: payload.count, by: segmentBytes).map {
        (payload[$0..<min($0 + segmentBytes, payload.count)], 0)
      }
    }
  }

  private typealias Datagram = (payload: ArraySlice<UInt8>, service: UInt8)

  private static let port: UInt16 = 5000

  /// Sends in bursts, waits for each, and compares: first from `a`, then from `b`.
  /// - Parameters:
  ///   - headerBytes: what options take of a packet.
  ///   - send: sends to an address once, and returns what has to arrive.
  private mutating func bothWays(
    _ family: Family, _ options: [SocketOption], headerBytes: Int = 0, times: Int, _ what: String,
    _ send: (_ number: Int, inout SeededRandom, DatagramSocket, _ to: String) throws -> [Datagram]
  ) throws {
    // 1,500 bytes less the headers of IPv4 or IPv6 and of UDP.
    let wholeBytesMax = (family == .ipv4 ? 1_472 : 1_452) - headerBytes
    for (from, to) in [(a, b), (b, a)] {
      let sender = try DatagramSocket(in: from.namespace, address: from.address(family), options)
      let receiver = try DatagramSocket(in: to.namespace, address: to.address(family), port: Self.port)
      let words = "\(name): \(what), \(family.rawValue), from guest \(from.number)"
      var burst: [Datagram] = []
      var burstBytes = 0
      for number in 0..<times {
        let sent = try send(number, &random, sender, to.address(family))
        burst += sent
        burstBytes += sent.reduce(0) { $0 + $1.payload.count }
        guard number == times - 1 || burst.count > Self.burstDatagrams || burstBytes > Self.burstBytes else { continue }
        // Fragments have no ports, so they are a flow of their own: only within either is there an order.
        var fragmented = burst.filter { $0.payload.count > wholeBytesMax }[...]
        var whole = burst.filter { $0.payload.count <= wholeBytesMax }[...]
        while !fragmented.isEmpty || !whole.isEmpty {
          guard let received = try receiver.receiveWithService(seconds: 2) else {
            let missing = (fragmented + whole).map(\.payload.count)
            throw LabError("\(words): of these bytes each nothing comes: \(missing)")
          }
          let isWhole = received.payload.count <= wholeBytesMax
          guard let expected = isWhole ? whole.popFirst() : fragmented.popFirst() else {
            throw LabError("\(words): one more of \(received.payload.count) bytes")
          }
          if let found = firstDifference(received.payload[...], from: expected.payload) {
            throw LabError("\(words): \(found)")
          }
          guard received.service == expected.service else {
            throw LabError("\(words): sent with ToS \(expected.service), received with \(received.service)")
          }
        }
        burst = []
        burstBytes = 0
      }
    }
  }
}
