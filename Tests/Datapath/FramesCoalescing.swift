import Datapath
import FuzzEntry
import TestSupport
import Testing

extension MadeSuperFrame {
  /// Any header, but for what keeps frames apart: flags that end a run stand where they may.
  static func joinable(_ random: inout SeededRandom) -> MadeSuperFrame {
    var made = MadeSuperFrame.random(&random)
    made.fillHeaders(&random)
    return made
  }

  /// Random bytes wherever the coalescer asks for no more than that they stay the same.
  mutating func fillHeaders(_ random: inout SeededRandom) {
    func fill(_ places: Range<Int>) { for place in places { bytes[place] = random.number() } }
    fill(0..<12)
    for tag in 0..<(networkOffset - 14) / 4 { fill(14 + 4 * tag..<16 + 4 * tag) }
    if isIPv4 {
      fill(networkOffset + 1..<networkOffset + 2)
      bytes[networkOffset + 6] = Bool.random(using: &random) ? 0x40 : 0
      fill(networkOffset + 8..<networkOffset + 9)
      fill(networkOffset + 12..<networkOffset + networkHeaderBytes)
    } else {
      bytes[networkOffset] = 0x60 | UInt8.random(in: 0...15, using: &random)
      fill(networkOffset + 1..<networkOffset + 4)
      fill(networkOffset + 7..<networkOffset + 40)
      for place in stride(from: networkOffset + 40, to: transportOffset, by: 8) { fill(place + 2..<place + 8) }
    }
    fill(transportOffset..<transportOffset + 4)
    if isTCP {
      fill(transportOffset + 8..<transportOffset + 12)
      bytes[transportOffset + 12] = bytes[transportOffset + 12] & 0xf0 | UInt8.random(in: 0...15, using: &random)
      bytes[transportOffset + 13] &= ~0x26  // URG, RST, SYN
      fill(transportOffset + 14..<transportOffset + 16)
      fill(transportOffset + 18..<headerBytes)
    }
    finishHeaders()
  }

  /// The checksums that a super-frame has: the IPv4 header's, and the pseudo-header's sum.
  mutating func finishHeaders() {
    finishNetworkHeader()
    put16(checksumPlace, Self.sum(pseudoHeader(transportBytes: bytes.count - transportOffset)))
  }

  private mutating func finishNetworkHeader() {
    guard isIPv4 else { return }
    put16(networkOffset + 10, 0)
    put16(networkOffset + 10, 0xffff - Self.sum(Array(bytes[networkOffset..<transportOffset])))
  }

  /// A changed frame with these headers, its checksums right again. Its lengths are part of the change.
  /// - Parameter ipProtocol: of the pseudo-header, where that is part of the change.
  func finished(_ frame: [UInt8], ipProtocol: UInt8? = nil) -> [UInt8] {
    var made = self
    made.bytes = frame
    made.finishNetworkHeader()
    made.put16(checksumPlace, 0)
    var pseudoHeader = made.pseudoHeader(transportBytes: frame.count - transportOffset)
    if let ipProtocol { pseudoHeader[pseudoHeader.count - 3] = ipProtocol }
    let checksum = 0xffff - Self.sum(pseudoHeader + made.bytes[transportOffset...])
    made.put16(checksumPlace, checksum == 0 ? 0xffff : checksum)
    return made.bytes
  }

  /// A frame with other payload, its lengths and checksums right.
  func finished(_ frame: [UInt8], payload: [UInt8]) -> [UInt8] {
    var made = self
    made.bytes = frame[..<headerBytes] + payload
    let networkBytes = made.bytes.count - networkOffset
    made.put16(networkOffset + (isIPv4 ? 2 : 4), isIPv4 ? networkBytes : networkBytes - 40)
    if !isTCP { made.put16(transportOffset + 4, made.bytes.count - transportOffset) }
    return finished(made.bytes)
  }

  /// How the coalescer has to say it: nothing to cut in a single frame, and the ECN bit with CWR.
  var expectedOffload: OffloadHeader {
    var expected = offload
    if segments.count == 1 {
      expected.gsoType = 0
      expected.gsoSize = 0
    } else if isTCP, bytes[transportOffset + 13] & 0x80 != 0 {
      expected.gsoType |= 0x80
    }
    return expected
  }

  /// The plain definition of what may be joined, without a look at a single rule of the coalescer's: the whole of
  /// `frames`, made the plain way, is cut the plain way into exactly these.
  /// - Parameter frames: with headers as long as this one's.
  func isWhole(_ frames: [[UInt8]]) -> Bool {
    var whole = self
    let first = frames[0]
    guard frames.allSatisfy({ $0.count > headerBytes }) else { return false }
    whole.bytes = first[..<headerBytes] + frames.flatMap { $0[headerBytes...] }
    let networkBytes = whole.bytes.count - networkOffset
    guard networkBytes <= 65_535, frames.count <= (isTCP ? 256 : 128) else { return false }
    whole.offload.gsoSize = UInt16(first.count - headerBytes)
    whole.put16(networkOffset + (isIPv4 ? 2 : 4), isIPv4 ? networkBytes : networkBytes - 40)
    if isTCP {
      let flags = first[transportOffset + 13]
      // PSH and FIN of any but the last would have been lost.
      whole.bytes[transportOffset + 13] = flags | frames.last![transportOffset + 13] & 0x09
      guard flags & 0x26 == 0 else { return false }
    } else {
      whole.put16(transportOffset + 4, whole.bytes.count - transportOffset)
    }
    if isIPv4 {
      guard first[networkOffset + 6] & ~0x40 == 0, first[networkOffset + 7] == 0 else { return false }
    }
    whole.finishHeaders()
    return whole.segments == withCountedIdentifications(frames)
  }

  /// Datagrams with DF, with identifications that count up from the first's; all others as they are, wrong checksums
  /// included.
  func withCountedIdentifications(_ frames: [[UInt8]]) -> [[UInt8]] {
    let place = networkOffset + 4
    guard isIPv4, !isTCP, frames[0][place + 2] & 0x40 != 0 else { return frames }
    return frames.enumerated().map { number, frame in
      var made = self
      made.bytes = frame
      made.finishNetworkHeader()
      guard made.bytes == frame else { return frame }
      made.put16(place, ((Int(frames[0][place]) << 8 | Int(frames[0][place + 1])) + number) & 0xffff)
      made.finishNetworkHeader()
      return made.bytes
    }
  }
}

@Suite("Coalescing")
struct FramesCoalescing {
  /// The frames that join from the first on, and the coalescer after them; nil when the first may not.
  func joined(_ frames: [[UInt8]]) -> (coalescer: Coalescer, count: Int)? {
    guard var coalescer = frames[0].read({ Coalescer($0) }) else { return nil }
    // Its headers are all that is needed of the first.
    let headers = Array(frames[0][..<coalescer.headerBytes])
    for (number, frame) in frames.enumerated().dropFirst() {
      let before = coalescer
      guard coalescer.join(headers.rawBytes, frame.rawBytes) else {
        #expect(coalescer == before, "what is refused changes nothing")
        return (coalescer, number)
      }
      #expect(!before.isComplete)
    }
    return (coalescer, frames.count)
  }

  /// The whole's headers, in room that is larger and not clean.
  func headers(_ coalescer: Coalescer, _ first: [UInt8]) -> [UInt8] {
    var room = [UInt8](repeating: 0xee, count: 16 + SuperFrame.headerBytesMax)
    let end = room.withMutableRawBytes { coalescer.writeHeaders(first.rawBytes, into: &$0, at: 16) }
    #expect(end == 16 + coalescer.headerBytes)
    #expect(room[..<16].allSatisfy { $0 == 0xee } && room[end...].allSatisfy { $0 == 0xee })
    return Array(room[16..<end])
  }

  func canJoin(_ first: [UInt8], _ next: [UInt8]) -> Bool { joined([first, next])?.count == 2 }

  @Test("segments of random super-frames join to the super-frame that they were cut from")
  func identity() throws {
    var random = SeededRandom(seed: 50)
    for _ in 0..<200 {
      let made = MadeSuperFrame.joinable(&random)
      let segments = made.segments
      let (coalescer, count) = try #require(joined(segments))
      #expect(count == segments.count && coalescer.frameCount == count)
      #expect(
        coalescer.headerBytes == made.headerBytes && coalescer.payloadBytes == made.bytes.count - made.headerBytes)
      #expect(coalescer.frameBytes == made.bytes.count)
      #expect(headers(coalescer, segments[0]) == Array(made.bytes[..<made.headerBytes]))
      #expect(coalescer.offload == made.expectedOffload)
      #expect(coalescer.offload.isWellFormed(frameBytes: made.bytes.count))
      let payload = segments.flatMap { $0[coalescer.headerBytes...] }
      #expect(payload == Array(made.bytes[made.headerBytes...]), "where each payload starts")
      guard count > 1 else { continue }
      var whole = made
      whole.offload = coalescer.offload
      let cut = try #require(whole.whole)
      #expect(FramesSegmentation().cut(whole, cut) == segments, "and comes out again")
    }
  }

  @Test("changed, dropped, doubled and swapped frames join where the plain definition has them join, and only there")
  func againstReference() throws {
    var random = SeededRandom(seed: 51)
    var joins = 0
    var refusals = 0
    for _ in 0..<400 {
      var made = MadeSuperFrame(
        isIPv4: Bool.random(using: &random), isTCP: Bool.random(using: &random),
        tags: Int.random(in: 0...1, using: &random),
        options: 8 * Int.random(in: 0...1, using: &random), transportOptions: 4 * Int.random(in: 0...3, using: &random),
        payload: random.bytes(Int.random(in: 4...60, using: &random)),
        segmentBytes: Int.random(in: 4...20, using: &random),
        flags: TCPFlags(rawValue: random.number()))
      made.fillHeaders(&random)
      var frames = made.segments
      for _ in 0..<Int.random(in: 0...2, using: &random) {
        let place = frames.indices.randomElement(using: &random)!
        switch Int.random(in: 0...4, using: &random) {
        case 0: if frames.count > 1 { frames.remove(at: place) }
        case 1: frames.insert(frames[place], at: place)
        case 2: frames.swapAt(place, frames.indices.randomElement(using: &random)!)
        default:
          // A changed byte, most often of the headers, the checksums made right again as often as not.
          let isHeader = Int.random(in: 0...3, using: &random) > 0
          let byte = isHeader ? Int.random(in: 0..<made.headerBytes, using: &random) : frames[place].count - 1
          frames[place][byte] ^= 1 << UInt8.random(in: 0...7, using: &random)
          if Bool.random(using: &random) { frames[place] = made.finished(frames[place]) }
        }
      }
      // Only where the first still has the headers that the reference is told of.
      guard var coalescer = frames[0].read({ Coalescer($0) }), coalescer.headerBytes == made.headerBytes else {
        continue
      }
      #expect(made.isWhole([frames[0]]))
      var run = [frames[0]]
      for frame in frames.dropFirst() {
        let first = run[0]
        let isJoined = coalescer.join(first.rawBytes, frame.rawBytes)
        #expect(isJoined == made.isWhole(run + [frame]), "\(run + [frame])")
        if isJoined { run.append(frame) }
        joins += isJoined ? 1 : 0
        refusals += isJoined ? 0 : 1
      }
    }
    #expect(joins > 100 && refusals > 100, "both sides were seen: \(joins) and \(refusals)")
  }

  /// One of each kind, three frames of 24 bytes of payload and one of 8.
  static func kinds(flags: TCPFlags = [.ack]) -> [MadeSuperFrame] {
    var random = SeededRandom(seed: 52)
    var kinds: [MadeSuperFrame] = []
    for isIPv4 in [true, false] {
      for isTCP in [true, false] {
        kinds.append(
          MadeSuperFrame(
            isIPv4: isIPv4, isTCP: isTCP, tags: 1, options: 8, transportOptions: 12, payload: random.bytes(80),
            segmentBytes: 24, flags: flags))
      }
    }
    return kinds
  }

  @Test("no frame with a flipped bit joins; none whose IP header checksum or transport covers it begins")
  func flippedBits() {
    for made in Self.kinds() {
      let frames = made.segments
      #expect(canJoin(frames[0], frames[1]))
      for place in frames[1].indices {
        for bit in 0..<8 {
          var next = frames[1]
          next[place] ^= 1 << UInt8(bit)
          #expect(!canJoin(frames[0], next), "byte \(place) bit \(bit)")
          guard place >= (made.isIPv4 ? made.networkOffset : made.transportOffset) else { continue }
          var first = frames[0]
          first[place] ^= 1 << UInt8(bit)
          #expect(first.read { Coalescer($0) } == nil, "byte \(place) bit \(bit)")
        }
      }
    }
  }

  /// A change to a frame that has its checksums made right again.
  struct Change: Sendable {
    let name: String
    var isIPv4: Bool?
    var isTCP: Bool?
    let apply: @Sendable (_ made: MadeSuperFrame, _ frame: inout [UInt8]) -> Void

    init(
      _ name: String, isIPv4: Bool? = nil, isTCP: Bool? = nil,
      _ apply: @escaping @Sendable (_ made: MadeSuperFrame, _ frame: inout [UInt8]) -> Void
    ) {
      self.name = name
      self.isIPv4 = isIPv4
      self.isTCP = isTCP
      self.apply = apply
    }

    func fits(_ made: MadeSuperFrame) -> Bool {
      (isIPv4 ?? made.isIPv4) == made.isIPv4 && (isTCP ?? made.isTCP) == made.isTCP
    }
  }

  static let keptApart: [Change] = [
    Change("destination MAC") { $1[5] ^= 1 },
    Change("source MAC") { $1[11] ^= 1 },
    Change("VLAN identifier") { $1[15] ^= 1 },
    Change("VLAN priority") { $1[14] ^= 0x20 },
    Change("VLAN tag's protocol") {
      $1[12] = 0x88
      $1[13] = 0xa8
    },
    Change("DSCP", isIPv4: true) { $1[$0.networkOffset + 1] ^= 4 },
    Change("ECN", isIPv4: true) { $1[$0.networkOffset + 1] ^= 1 },
    Change("identification is the same", isIPv4: true, isTCP: true) { $1[$0.networkOffset + 5] &-= 1 },
    Change("identification leaps", isIPv4: true, isTCP: true) { $1[$0.networkOffset + 5] &+= 1 },
    Change("DF", isIPv4: true) { $1[$0.networkOffset + 6] ^= 0x40 },
    Change("reserved flag", isIPv4: true) { $1[$0.networkOffset + 6] ^= 0x80 },
    Change("a fragment", isIPv4: true) { $1[$0.networkOffset + 6] ^= 0x20 },
    Change("TTL", isIPv4: true) { $1[$0.networkOffset + 8] &-= 1 },
    Change("source address", isIPv4: true) { $1[$0.networkOffset + 15] ^= 1 },
    Change("destination address", isIPv4: true) { $1[$0.networkOffset + 19] ^= 1 },
    Change("IPv4 options", isIPv4: true) { $1[$0.networkOffset + 27] ^= 1 },
    Change("traffic class", isIPv4: false) { $1[$0.networkOffset + 1] ^= 0x10 },
    Change("flow label", isIPv4: false) { $1[$0.networkOffset + 3] ^= 1 },
    Change("hop limit", isIPv4: false) { $1[$0.networkOffset + 7] &-= 1 },
    Change("next header", isIPv4: false) { $1[$0.networkOffset + 6] = IPProtocol.routing },
    Change("source address", isIPv4: false) { $1[$0.networkOffset + 23] ^= 1 },
    Change("destination address", isIPv4: false) { $1[$0.networkOffset + 39] ^= 1 },
    Change("extension header", isIPv4: false) { $1[$0.networkOffset + 47] ^= 1 },
    Change("source port") { $1[$0.transportOffset + 1] ^= 1 },
    Change("destination port") { $1[$0.transportOffset + 3] ^= 1 },
    Change("sequence", isTCP: true) { $1[$0.transportOffset + 7] &+= 1 },
    Change("acknowledgement", isTCP: true) { $1[$0.transportOffset + 11] &+= 1 },
    Change("reserved bits", isTCP: true) { $1[$0.transportOffset + 12] ^= 1 },
    Change("window", isTCP: true) { $1[$0.transportOffset + 15] ^= 1 },
    Change("urgent pointer", isTCP: true) { $1[$0.transportOffset + 19] ^= 1 },
    Change("timestamp", isTCP: true) { $1[$0.transportOffset + 31] ^= 1 },
    Change("ACK", isTCP: true) { $1[$0.transportOffset + 13] ^= 0x10 },
    Change("ECE", isTCP: true) { $1[$0.transportOffset + 13] ^= 0x40 },
    Change("CWR on another than the first", isTCP: true) { $1[$0.transportOffset + 13] |= 0x80 },
    Change("UDP length too long", isTCP: false) { $1[$0.transportOffset + 5] += 1 },
    Change("UDP length too short", isTCP: false) { $1[$0.transportOffset + 5] -= 1 },
  ]

  /// These may not be the first either.
  static let neverJoined: [Change] = [
    Change("SYN", isTCP: true) { $1[$0.transportOffset + 13] |= 0x02 },
    Change("RST", isTCP: true) { $1[$0.transportOffset + 13] |= 0x04 },
    Change("URG", isTCP: true) { $1[$0.transportOffset + 13] |= 0x20 },
    Change("reserved flag", isIPv4: true) { $1[$0.networkOffset + 6] ^= 0x80 },
    Change("the first fragment", isIPv4: true) { $1[$0.networkOffset + 6] ^= 0x20 },
    Change("a later fragment", isIPv4: true) { $1[$0.networkOffset + 7] ^= 0x20 },
    Change("another protocol", isIPv4: true) { $1[$0.networkOffset + 9] = IPProtocol.sctp },
    Change("ICMPv6", isIPv4: false) { $1[$0.networkOffset + 40] = IPProtocol.icmpv6 },
    Change("a whole datagram with a fragment header", isIPv4: false) {
      $1[$0.networkOffset + 6] = IPProtocol.fragment
      for place in 1..<8 { $1[$0.networkOffset + 40 + place] = 0 }
    },
    Change("an authentication header", isIPv4: false) {
      $1[$0.networkOffset + 6] = IPProtocol.authentication
      $1[$0.networkOffset + 41] = 0
    },
    Change("IPv4 length too long", isIPv4: true) { $1[$0.networkOffset + 3] += 1 },
    Change("IPv4 length too short", isIPv4: true) { $1[$0.networkOffset + 3] -= 1 },
    Change("IPv6 length too long", isIPv4: false) { $1[$0.networkOffset + 5] += 1 },
    Change("IPv6 length too short", isIPv4: false) { $1[$0.networkOffset + 5] -= 1 },
    Change("UDP length too long", isTCP: false) { $1[$0.transportOffset + 5] += 1 },
    Change("UDP length too short", isTCP: false) { $1[$0.transportOffset + 5] -= 1 },
    Change("TCP header shorter than one", isTCP: true) { $1[$0.transportOffset + 12] = 0x40 },
    Change("no IP") {
      $1[$0.networkOffset - 2] = 0x12
      $1[$0.networkOffset - 1] = 0x34
    },
  ]

  @Test("a frame that differs in one field, its checksums right, stays apart", arguments: keptApart.map(\.name))
  func staysApart(_ name: String) {
    var tried = 0
    for change in Self.keptApart where change.name == name {
      for made in Self.kinds() where change.fits(made) {
        let frames = made.segments
        var next = frames[1]
        change.apply(made, &next)
        next = made.finished(next)
        #expect(next != frames[1] && canJoin(frames[0], frames[1]))
        #expect(!canJoin(frames[0], next))
        tried += 1
      }
    }
    #expect(tried > 0)
  }

  @Test("what can be no part of a super-frame neither begins nor joins one", arguments: neverJoined.map(\.name))
  func takesNoPart(_ name: String) {
    var tried = 0
    for change in Self.neverJoined where change.name == name {
      for made in Self.kinds() where change.fits(made) {
        let frames = made.segments
        var first = frames[0]
        change.apply(made, &first)
        first = made.finished(first)
        #expect(first.read { Coalescer($0) } == nil)
        var next = frames[1]
        change.apply(made, &next)
        next = made.finished(next)
        #expect(!canJoin(frames[0], next))
        tried += 1
      }
    }
    #expect(tried > 0)
  }

  @Test("UDP datagrams with DF join whatever their identifications, and come out with ones that count up")
  func anyIdentification() throws {
    for (dontFragment, identification) in [(true, 0), (true, 0xffff), (false, 0)] {
      let made = MadeSuperFrame(
        isIPv4: true, isTCP: false, payload: [UInt8](repeating: 7, count: 80), segmentBytes: 24)
      func numbered(_ frame: [UInt8], _ identification: Int) -> [UInt8] {
        var frame = frame
        frame[made.networkOffset + 4] = UInt8(identification >> 8)
        frame[made.networkOffset + 5] = UInt8(identification & 0xff)
        frame[made.networkOffset + 6] = dontFragment ? 0x40 : 0
        return made.finished(frame)
      }
      let frames = made.segments.map { numbered($0, identification) }
      let (coalescer, count) = try #require(joined(frames))
      #expect(count == (dontFragment ? 4 : 1))
      guard dontFragment else { continue }
      var whole = made
      whole.bytes = headers(coalescer, frames[0]) + frames.flatMap { $0[coalescer.headerBytes...] }
      whole.offload = coalescer.offload
      let cut = try #require(whole.whole)
      let counted = frames.enumerated().map { numbered($1, (identification + $0) & 0xffff) }
      #expect(FramesSegmentation().cut(whole, cut) == counted)
      #expect(joined([frames[0], counted[2], frames[1]])?.count == 3)
      #expect(joined([counted[2], counted[1], counted[0]])?.count == 3)
    }
  }

  @Test("padding behind the IP packet, no payload, no checksum, and the other zero keep a frame out")
  func lengthsAndZeros() {
    for made in Self.kinds() {
      let frames = made.segments
      let unfit: [(String, ([UInt8]) -> [UInt8])] = [
        ("padding", { $0 + [0] }),
        ("cut", { $0.dropLast() }),
        ("headers alone", { Array($0[..<made.headerBytes]) }),
        (
          "no transport checksum",
          {
            var frame = $0
            frame[made.checksumPlace] = 0
            frame[made.checksumPlace + 1] = 0
            return frame
          }
        ),
      ]
      for (name, change) in unfit {
        #expect(change(frames[0]).read { Coalescer($0) } == nil, "\(name)")
        #expect(!canJoin(frames[0], change(frames[1])), "\(name)")
      }
      let empty = frames.map { made.finished($0, payload: []) }
      #expect(empty[1].parsed?.transportOffset == made.transportOffset && empty[1].parsed?.networkLengthValid == true)
      #expect(empty[0].read { Coalescer($0) } == nil && !canJoin(frames[0], empty[1]))
    }
  }

  @Test("a checksum that is zero is right for TCP, but would come out as ffff: it keeps a frame out")
  func otherZero() throws {
    var made = MadeSuperFrame(isIPv4: true, isTCP: true, payload: [UInt8](repeating: 7, count: 48), segmentBytes: 24)
    made.bytes[made.transportOffset + 13] = 0x10
    var first = made.segments[0]
    #expect(first.read { Coalescer($0) } != nil)
    // The payload's first word takes on what the checksum has: then the sum of all else is ffff.
    let old = Int(first[made.headerBytes]) << 8 | Int(first[made.headerBytes + 1])
    let checksum = Int(first[made.checksumPlace]) << 8 | Int(first[made.checksumPlace + 1])
    let word = (old + checksum) % 0xffff
    first[made.headerBytes] = UInt8(word >> 8)
    first[made.headerBytes + 1] = UInt8(word & 0xff)
    first = made.finished(first)
    #expect(first[made.checksumPlace] == 0xff && first[made.checksumPlace + 1] == 0xff)
    #expect(first.read { Coalescer($0) } != nil)
    first[made.checksumPlace] = 0
    first[made.checksumPlace + 1] = 0
    #expect(first.read { Coalescer($0) } == nil)
    // The identification does the same for the IPv4 header.
    var header = made.segments[0]
    let identification = Int(header[18]) << 8 | Int(header[19])
    let headerChecksum = Int(header[24]) << 8 | Int(header[25])
    let other = (identification + headerChecksum) % 0xffff
    header[18] = UInt8(other >> 8)
    header[19] = UInt8(other & 0xff)
    header = made.finished(header)
    #expect(header[24] == 0 && header[25] == 0 && header.read { Coalescer($0) } != nil)
    header[24] = 0xff
    header[25] = 0xff
    let isValid = header.read { IPv4View($0.extracting(droppingFirst: 14))?.isChecksumValid }
    #expect(isValid == true && header.read { Coalescer($0) } == nil)
  }

  @Test("PSH, FIN or less payload end a run; more payload never joins")
  func ends() throws {
    for made in Self.kinds() {
      let frames = made.segments
      let (three, _) = try #require(joined(Array(frames[..<3])))
      #expect(three.frameCount == 3 && !three.isComplete && three.payloadBytes == 72)
      let (all, count) = try #require(joined(frames))
      #expect(count == 4 && all.isComplete && all.segmentPayloadBytes == 24, "the last is shorter")
      let payload = Array(frames[1][made.headerBytes...])
      #expect(canJoin(frames[0], made.finished(frames[1], payload: payload)))
      #expect(canJoin(frames[0], made.finished(frames[1], payload: payload.dropLast())))
      #expect(!canJoin(frames[0], made.finished(frames[1], payload: payload + [0])))
      guard made.isTCP else { continue }
      for flag: UInt8 in [0x08, 0x01] {
        var ended = frames
        ended[0][made.transportOffset + 13] |= flag
        ended[0] = made.finished(ended[0])
        let first = try #require(ended[0].read { Coalescer($0) })
        #expect(first.isComplete && !canJoin(ended[0], ended[1]))
        #expect(headers(first, ended[0])[made.transportOffset + 13] == 0x10 | flag)
        ended = frames
        ended[1][made.transportOffset + 13] |= flag
        ended[1] = made.finished(ended[1])
        let (run, count) = try #require(joined(ended))
        #expect(count == 2 && run.isComplete)
        #expect(headers(run, ended[0])[made.transportOffset + 13] == 0x10 | flag)
      }
    }
  }

  @Test("CWR on the first frame stays there, and sets the offload header's ECN bit")
  func congestionWindowReduced() throws {
    for made in Self.kinds(flags: [.ack, .cwr, .ece, .psh]) where made.isTCP {
      let frames = made.segments
      #expect(frames.map { $0[made.transportOffset + 13] & 0x80 } == [0x80, 0, 0, 0])
      let (run, count) = try #require(joined(frames))
      #expect(count == 4 && run.offload.gsoType == (made.isIPv4 ? 0x81 : 0x84))
      #expect(headers(run, frames[0])[made.transportOffset + 13] == 0xd8)
      let (rest, restCount) = try #require(joined(Array(frames[1...])))
      #expect(restCount == 3 && rest.offload.gsoType == (made.isIPv4 ? 1 : 4))
      let (single, _) = try #require(joined([frames[0]]))
      #expect(single.offload.gsoType == 0)
    }
  }

  @Test("a frame alone asks for its checksum, which finished is the frame's again")
  func single() throws {
    for made in Self.kinds() {
      let frame = made.segments[0]
      let coalescer = try #require(frame.read { Coalescer($0) })
      var whole = headers(coalescer, frame) + frame[made.headerBytes...]
      #expect(whole != frame)
      var offload = coalescer.offload
      #expect(!offload.isSuperFrame && offload.gsoSize == 0)
      let isFinished = whole.withMutableRawBytes { offload.finishChecksum(in: &$0) }
      #expect(isFinished && whole == frame)
    }
  }

  @Test("a run has as many frames as a super-frame may have", arguments: [true, false], [true, false])
  func frameLimits(isIPv4: Bool, isTCP: Bool) throws {
    let most = isTCP ? SuperFrame.segmentsMaxTCP : SuperFrame.segmentsMaxUDP
    let made = MadeSuperFrame(
      isIPv4: isIPv4, isTCP: isTCP, payload: [UInt8](repeating: 3, count: most + 2), segmentBytes: 1, flags: .ack)
    let frames = made.segments
    #expect(frames.count == most + 2)
    let (run, count) = try #require(joined(frames))
    #expect(count == most && run.isComplete)
    let whole = headers(run, frames[0]) + frames[..<most].flatMap { $0[made.headerBytes...] }
    #expect(whole.read { SuperFrame($0, run.offload) }?.segmentCount == most)
    #expect(!isRunComplete(frames, most - 1))
  }

  func isRunComplete(_ frames: [[UInt8]], _ count: Int) -> Bool {
    joined(Array(frames[..<count]))?.0.isComplete == true
  }

  @Test("the whole IP packet has at most 65,535 bytes, and may have so many", arguments: [true, false], [true, false])
  func byteLimits(isIPv4: Bool, isTCP: Bool) throws {
    let room = 65_535 - (isIPv4 ? 20 : 40) - (isTCP ? 20 : 8)
    for (payload, segmentBytes, fits) in [(room, 1448, true), (room + 1, 1448, false), (room, room / 5, true)] {
      // Made as several, since the frame of one would be too long for its length field.
      let segments = Self.stream(isIPv4: isIPv4, isTCP: isTCP, payloadBytes: payload, segmentBytes: segmentBytes)
      let (run, count) = try #require(joined(segments))
      #expect(count == (fits ? segments.count : segments.count - 1))
      #expect(run.isComplete == (fits || count == segments.count))
      let whole = headers(run, segments[0]) + segments[..<count].flatMap { $0[run.headerBytes...] }
      #expect(whole.count - 14 <= 65_535)
      #expect(whole.read { SuperFrame($0, run.offload) }?.segmentCount == count)
    }
  }

  @Test("an IPv6 packet alone that is longer than that begins nothing")
  func longFirst() {
    for isTCP in [true, false] {
      let room = 65_535 - 40 - (isTCP ? 20 : 8)
      for (payload, fits) in [(room, true), (room + 1, false)] {
        let made = MadeSuperFrame(
          isIPv4: false, isTCP: isTCP, payload: [UInt8](repeating: 3, count: payload), segmentBytes: payload,
          flags: .ack)
        #expect(made.segments[0].read { Coalescer($0) }?.isComplete == (fits ? true : nil))
      }
    }
  }

  @Test("a transport that only looks like UDP or TCP keeps a frame out", arguments: [UInt8(136), 33, 1])
  func otherTransport(ipProtocol: UInt8) {
    for made in Self.kinds() {
      var frame = made.segments[0]
      let place = made.networkOffset + (made.isIPv4 ? 9 : 40)
      #expect(frame[place] == (made.isTCP ? IPProtocol.tcp : IPProtocol.udp))
      frame[place] = ipProtocol
      #expect(made.finished(frame, ipProtocol: ipProtocol).read { Coalescer($0) } == nil)
    }
  }

  /// Segments of more than one super-frame's payload.
  static func stream(isIPv4: Bool, isTCP: Bool, payloadBytes: Int, segmentBytes: Int) -> [[UInt8]] {
    stride(from: 0, to: payloadBytes, by: segmentBytes).enumerated().map { number, start in
      let payload = [UInt8](repeating: UInt8(number), count: min(segmentBytes, payloadBytes - start))
      return MadeSuperFrame(
        isIPv4: isIPv4, isTCP: isTCP, payload: payload, segmentBytes: segmentBytes, flags: .ack,
        sequence: UInt32(start), identification: UInt16(number)
      ).segments[0]
    }
  }

  @Test("a stream that is too long for one goes on in the next")
  func nextRun() throws {
    var segments = Self.stream(isIPv4: true, isTCP: true, payloadBytes: 150_000, segmentBytes: 1448)
    var counts: [Int] = []
    while !segments.isEmpty {
      let (_, count) = try #require(joined(segments))
      counts.append(count)
      segments.removeFirst(count)
    }
    #expect(counts == [45, 45, 14])
  }

  @Test("headers longer than a send has room for keep a frame out")
  func headerRoom() throws {
    // One extension header of 80 bytes: 14 of Ethernet, 8 of tags, 40 of IPv6, 80, and TCP with its options.
    for (transportOptions, fits) in [(28, true), (32, false)] {
      var made = MadeSuperFrame(
        isIPv4: false, isTCP: true, tags: 2, options: 80, transportOptions: transportOptions, payload: [1, 2],
        segmentBytes: 1, flags: .ack)
      made.bytes[made.networkOffset + 40] = IPProtocol.tcp
      made.bytes[made.networkOffset + 41] = 9
      #expect(made.headerBytes == (fits ? 190 : 194))
      #expect(canJoin(made.segments[0], made.segments[1]) == fits)
    }
  }

  @Test("every input of the corpus keeps every promise, and joins as its name says")
  func corpus() throws {
    try FramesCorpusReplay().replay("coalescing", atLeast: 31) { fuzzCoalescing($0) }
    let expected: [(name: String, runs: [Int])] = [
      ("tcp4", [4]), ("tcp4-timestamps", [4]), ("tcp6", [4]), ("udp4", [4]), ("udp6", [4]), ("tcp4-vlan", [4]),
      ("udp6-qinq", [4]), ("tcp4-options", [4]), ("tcp6-extensions", [4]), ("tcp6-authentication", [0, 0, 0, 0]),
      ("tcp6-atomic-fragment", [0, 0, 0, 0]), ("tcp4-cwr", [4]), ("tcp4-cwr-last", [3, 1]), ("tcp4-fin", [4, 4]),
      ("tcp4-syn", [0, 3]), ("tcp4-wraps", [4]), ("tcp4-two-runs", [4, 4]), ("tcp4-gap", [2, 2]),
      ("tcp4-equal-identifications", [1, 1, 1]), ("tcp4-corrupt-payload", [2, 0, 1]),
      ("tcp4-corrupt-header", [1, 0, 2]), ("udp4-no-checksum", [0, 0, 0, 0]), ("udp4-other-port", [2, 2]),
      ("udp4-equal-identifications", [4]), ("udp4-equal-identifications-fragmentable", [1, 1, 1, 1]),
      ("udp4-equal-then-counting", [4]),
      ("tcp4-padded", [0, 0, 0, 0]), ("tcp4-acknowledgements", [0, 0, 0, 0]), ("tcp4-many-bytes", [40]),
    ]
    for (name, runs) in expected {
      let bytes = try FramesCorpus.bytes("coalescing", name)
      let size = Int(bytes[1]) << 8 | Int(bytes[2])
      var frames = stride(from: 3, to: bytes.count, by: size).map { Array(bytes[$0..<min($0 + size, bytes.count)]) }
      var found: [Int] = []
      while !frames.isEmpty {
        let count = joined(frames)?.count ?? 0
        found.append(count)
        frames.removeFirst(max(count, 1))
      }
      #expect(found == runs, "\(name)")
    }
  }

  @Test("trains with random bytes in them keep every promise")
  func hostile() {
    var random = SeededRandom(seed: 53)
    for _ in 0..<150 {
      var made = MadeSuperFrame.joinable(&random)
      let payload = made.bytes.count - made.headerBytes
      if payload > 2000 { made.bytes.removeLast(payload - 2000) }
      made.offload.gsoSize = max(made.offload.gsoSize, 100)
      let segments = made.segments
      let size = segments[0].count
      for repair: UInt8 in [0, 1] {
        var input = [repair, UInt8(size >> 8), UInt8(size & 0xff)] + segments.joined()
        fuzzCoalescing(input.rawBytes)
        for _ in 0..<Int.random(in: 1...4, using: &random) {
          input[Int.random(in: input.indices, using: &random)] = random.number()
        }
        fuzzCoalescing(input.rawBytes)
      }
    }
  }

  @Test("too little of the first frame, and too little room, trap")
  func traps() async {
    await #expect(processExitsWith: .failure) {
      let frames = FramesCoalescing.kinds()[0].segments
      var coalescer = frames[0].read { Coalescer($0) }!
      let cut = Array(frames[0][..<(coalescer.headerBytes - 1)])
      let next = frames[1]
      print(coalescer.join(cut.rawBytes, next.rawBytes))
    }
    await #expect(processExitsWith: .failure) {
      let frames = FramesCoalescing.kinds()[0].segments
      let coalescer = frames[0].read { Coalescer($0) }!
      let cut = Array(frames[0][..<(coalescer.headerBytes - 1)])
      var room = [UInt8](repeating: 0, count: 192)
      _ = room.withMutableRawBytes { coalescer.writeHeaders(cut.rawBytes, into: &$0) }
    }
    await #expect(processExitsWith: .failure) {
      let frames = FramesCoalescing.kinds()[0].segments
      let coalescer = frames[0].read { Coalescer($0) }!
      var room = [UInt8](repeating: 0, count: coalescer.headerBytes - 1)
      let first = frames[0]
      _ = room.withMutableRawBytes { coalescer.writeHeaders(first.rawBytes, into: &$0) }
    }
  }
}
