import Datapath
import FuzzEntry
import TestSupport
import Testing

/// A super-frame by the hand that makes it: all that a cut needs is known here, so that the reference below parses
/// nothing.
struct MadeSuperFrame {
  var bytes: [UInt8] = []
  var offload = OffloadHeader()
  var networkOffset = 0
  var networkHeaderBytes = 0
  var transportOffset = 0
  var headerBytes = 0
  var isIPv4 = false
  var isTCP = false

  static let pshFINAndCWR: TCPFlags = [.ack, .psh, .fin, .cwr, .ece]

  /// - Parameters:
  ///   - options: of IPv4, 0 to 40 bytes, or extension headers of IPv6 (8 bytes each are made), a multiple of 8.
  ///   - transportOptions: of TCP, 0 to 40 bytes, a multiple of 4.
  init(
    isIPv4: Bool, isTCP: Bool, tags: Int = 0, options: Int = 0, transportOptions: Int = 0, payload: [UInt8],
    segmentBytes: Int, flags: TCPFlags = pshFINAndCWR, sequence: UInt32 = 0xffff_fff0, identification: UInt16 = 0xfffe
  ) {
    self.isIPv4 = isIPv4
    self.isTCP = isTCP
    let transportBytes = (isTCP ? 20 + transportOptions : 8) + payload.count
    let ipProtocol = isTCP ? IPProtocol.tcp : IPProtocol.udp
    var maker = FrameMaker().ethernet(isIPv4 ? EtherType.ipv4 : EtherType.ipv6)
    for tag in 0..<tags { maker = maker.tagged(VLANTag(identifier: UInt16(100 + tag))) }
    networkOffset = maker.bytes.count
    if isIPv4 {
      networkHeaderBytes = 20 + options
      maker = maker.ipv4(
        IPv4Header(
          headerBytes: networkHeaderBytes, typeOfService: 0x2a, totalBytes: networkHeaderBytes + transportBytes,
          identification: identification, dontFragment: true, ipProtocol: ipProtocol, source: 0x0a00_0001,
          destination: 0xc0a8_fffe))
    } else {
      networkHeaderBytes = 40
      maker = maker.ipv6(
        IPv6Header(
          trafficClass: 0x2a, payloadBytes: options + transportBytes,
          nextHeader: options > 0 ? IPProtocol.destinationOptions : ipProtocol, source: UInt128(0xfd) << 120 | 1,
          destination: UInt128(0xfd) << 120 | 0xffff))
      for place in stride(from: 0, to: options, by: 8) {
        let next = place + 8 < options ? IPProtocol.destinationOptions : ipProtocol
        maker = maker.payload([next, 0, 1, 4, 0, 0, 0, 0])
      }
    }
    transportOffset = maker.bytes.count
    if isTCP {
      maker = maker.tcp(
        TCPHeader(
          sourcePort: 40000, destinationPort: 5201, sequence: sequence, acknowledgement: 77,
          headerBytes: 20 + transportOptions, flags: flags))
    } else {
      maker = maker.udp(UDPHeader(sourcePort: 40000, destinationPort: 5201, totalBytes: transportBytes))
    }
    headerBytes = maker.bytes.count
    bytes = maker.payload(payload).bytes
    // What a guest leaves in the checksum's place: the sum of the pseudo-header.
    put16(checksumPlace, Self.sum(pseudoHeader(transportBytes: transportBytes)))
    offload = OffloadHeader(
      flags: OffloadHeader.flagNeedsChecksum,
      gsoType: isTCP ? (isIPv4 ? 1 : 4) : 5, headerLength: UInt16(headerBytes), gsoSize: UInt16(segmentBytes),
      checksumStart: UInt16(transportOffset), checksumOffset: UInt16(checksumPlace - transportOffset))
  }

  static func random(_ random: inout SeededRandom) -> MadeSuperFrame {
    let isIPv4 = Bool.random(using: &random)
    let isTCP = Bool.random(using: &random)
    let segmentsMax = isTCP ? SuperFrame.segmentsMaxTCP : SuperFrame.segmentsMaxUDP
    let segmentBytes = [1, 2, 7, 100, 536, 1448, 9000].randomElement(using: &random)!
    let payload = random.bytes(Int.random(in: 1...min(20_000, segmentBytes * segmentsMax), using: &random))
    return MadeSuperFrame(
      isIPv4: isIPv4, isTCP: isTCP, tags: Int.random(in: 0...2, using: &random),
      options: isIPv4 ? 4 * Int.random(in: 0...10, using: &random) : 8 * Int.random(in: 0...8, using: &random),
      transportOptions: 4 * Int.random(in: 0...10, using: &random), payload: payload, segmentBytes: segmentBytes,
      flags: TCPFlags(rawValue: random.number()), sequence: random.number(), identification: random.number())
  }

  var checksumPlace: Int { transportOffset + (isTCP ? 16 : 6) }

  mutating func put16(_ place: Int, _ value: Int) {
    bytes[place] = UInt8(value >> 8)
    bytes[place + 1] = UInt8(value & 0xff)
  }

  func pseudoHeader(transportBytes: Int) -> [UInt8] {
    let addresses =
      isIPv4 ? bytes[networkOffset + 12..<networkOffset + 20] : bytes[networkOffset + 8..<networkOffset + 40]
    return addresses + [0, isTCP ? 6 : 17, UInt8(transportBytes >> 8), UInt8(transportBytes & 0xff)]
  }

  /// RFC 1071 as it is written down.
  static func sum(_ bytes: [UInt8]) -> Int {
    var sum = 0
    for (place, byte) in bytes.enumerated() { sum += place % 2 == 0 ? Int(byte) << 8 : Int(byte) }
    while sum > 0xffff { sum = sum & 0xffff + sum >> 16 }
    return sum
  }

  /// The segments, cut the plain way.
  var segments: [[UInt8]] {
    let payload = Array(bytes[headerBytes...])
    let pieces = stride(from: 0, to: payload.count, by: Int(offload.gsoSize)).map {
      Array(payload[$0..<min($0 + Int(offload.gsoSize), payload.count)])
    }
    var sequence = (0..<4).reduce(0) { $0 << 8 | Int(bytes[transportOffset + 4 + $1]) }
    let identification = Int(bytes[networkOffset + 4]) << 8 | Int(bytes[networkOffset + 5])
    return pieces.enumerated().map { number, piece in
      var cut = self
      cut.bytes = bytes[..<headerBytes] + piece
      let transportBytes = cut.bytes.count - transportOffset
      if isIPv4 {
        cut.put16(networkOffset + 2, cut.bytes.count - networkOffset)
        cut.put16(networkOffset + 4, (identification + number) & 0xffff)
        cut.put16(networkOffset + 10, 0)
        let header = Array(cut.bytes[networkOffset..<networkOffset + networkHeaderBytes])
        cut.put16(networkOffset + 10, 0xffff - Self.sum(header))
      } else {
        cut.put16(networkOffset + 4, cut.bytes.count - networkOffset - 40)
      }
      if isTCP {
        for place in 0..<4 { cut.bytes[transportOffset + 4 + place] = UInt8(sequence >> (24 - 8 * place) & 0xff) }
        sequence += piece.count
        if number > 0 { cut.bytes[transportOffset + 13] &= 0x7f }
        if number < pieces.count - 1 { cut.bytes[transportOffset + 13] &= 0xf6 }
      } else {
        cut.put16(transportOffset + 4, transportBytes)
      }
      cut.put16(checksumPlace, 0)
      let pseudoHeader = pseudoHeader(transportBytes: transportBytes)
      let checksum = 0xffff - Self.sum(pseudoHeader + cut.bytes[transportOffset...])
      cut.put16(checksumPlace, checksum == 0 ? 0xffff : checksum)
      return cut.bytes
    }
  }

  var whole: SuperFrame? { SuperFrame(bytes.rawBytes, offload) }
}

@Suite("Segmentation")
struct FramesSegmentation {
  /// What is written for each segment, in room that is larger and not clean, and the payload behind it.
  func cut(_ made: MadeSuperFrame, _ whole: SuperFrame) -> [[UInt8]] {
    (0..<whole.segmentCount).map { number in
      var room = [UInt8](repeating: 0xee, count: 16 + SuperFrame.headerBytesMax)
      let end = room.withMutableRawBytes {
        whole.writeHeaders(ofSegment: number, of: made.bytes.rawBytes, into: &$0, at: 16)
      }
      #expect(room[..<16].allSatisfy { $0 == 0xee } && room[end...].allSatisfy { $0 == 0xee })
      let start = whole.payloadOffset(ofSegment: number)
      return Array(room[16..<end]) + made.bytes[start..<start + whole.payloadBytes(ofSegment: number)]
    }
  }

  @Test("random super-frames of every kind are cut as the plain reference cuts them")
  func againstReference() throws {
    var random = SeededRandom(seed: 40)
    for _ in 0..<150 {
      let made = MadeSuperFrame.random(&random)
      let whole = try #require(made.whole)
      #expect(whole.headerBytes == made.headerBytes)
      let expected = made.segments
      #expect(whole.segmentCount == expected.count)
      #expect(whole.segmentBytesMax == expected.map(\.count).max())
      #expect(cut(made, whole) == expected)
    }
  }

  @Test("segments are frames with right checksums, whose payloads together are the whole's")
  func wholeAgain() throws {
    var random = SeededRandom(seed: 41)
    for _ in 0..<60 {
      let made = MadeSuperFrame.random(&random)
      let whole = try #require(made.whole)
      var payload: [UInt8] = []
      for segment in cut(made, whole) {
        let parsed = try #require(segment.parsed)
        #expect(parsed.networkLengthValid && parsed.transportOffset == made.transportOffset)
        #expect(parsed.flowHash == made.bytes.parsed?.flowHash)
        if made.isIPv4 {
          let isValid = segment.read { IPv4View($0.extracting(droppingFirst: made.networkOffset))?.isChecksumValid }
          #expect(isValid == true)
        }
        let transport = Array(segment[made.transportOffset...])
        #expect(MadeSuperFrame.sum(made.pseudoHeader(transportBytes: transport.count) + transport) == 0xffff)
        payload += segment[made.headerBytes...]
      }
      #expect(payload == Array(made.bytes[made.headerBytes...]))
    }
  }

  @Test("identification and sequence count up and over; PSH and FIN are the last segment's, CWR the first's")
  func fields() throws {
    let made = MadeSuperFrame(
      isIPv4: true, isTCP: true, payload: [UInt8](repeating: 1, count: 50), segmentBytes: 20)
    let whole = try #require(made.whole)
    let segments = cut(made, whole)
    let packets = segments.map { $0.read { IPv4View($0.extracting(droppingFirst: 14))?.header } }
    #expect(packets.map(\.?.identification) == [0xfffe, 0xffff, 0])
    #expect(packets.map(\.?.totalBytes) == [60, 60, 50])
    let headers = segments.map { $0.read { TCPView($0.extracting(droppingFirst: 34))?.header } }
    #expect(headers.map(\.?.sequence) == [0xffff_fff0, 4, 24])
    #expect(headers.map(\.?.flags) == [[.ack, .ece, .cwr], [.ack, .ece], [.ack, .ece, .psh, .fin]])
    let datagrams = MadeSuperFrame(
      isIPv4: false, isTCP: false, payload: [UInt8](repeating: 1, count: 50), segmentBytes: 20)
    let lengths = cut(datagrams, try #require(datagrams.whole)).map {
      $0.read { UDPView($0.extracting(droppingFirst: 54))?.totalBytes }
    }
    #expect(lengths == [28, 28, 18])
  }

  @Test("a frame that is no longer than a segment is one segment, with all its flags")
  func single() throws {
    let made = MadeSuperFrame(isIPv4: true, isTCP: true, payload: [1, 2, 3], segmentBytes: 1448)
    let whole = try #require(made.whole)
    #expect(whole.segmentCount == 1 && whole.segmentBytesMax == made.bytes.count)
    #expect(cut(made, whole) == made.segments)
    let flags = cut(made, whole)[0].read { TCPView($0.extracting(droppingFirst: 34))?.flags }
    #expect(flags == MadeSuperFrame.pshFINAndCWR)
  }

  @Test("a copy of the headers is enough, and less is not")
  func headersAlone() throws {
    var random = SeededRandom(seed: 42)
    for _ in 0..<50 {
      let made = MadeSuperFrame.random(&random)
      let whole = try #require(made.whole)
      for count in 0...made.headerBytes {
        let copied = made.bytes.read {
          SuperFrame(headers: $0.extracting(first: count), frameBytes: made.bytes.count, made.offload)
        }
        #expect(copied == (count == made.headerBytes ? whole : nil), "\(count) of \(made.headerBytes)")
      }
    }
  }

  @Test("more segments than the limit are refused: a guest cannot make one frame 65,000")
  func limits() {
    func isTaken(isTCP: Bool, payload: Int, segmentBytes: Int) -> Bool {
      MadeSuperFrame(
        isIPv4: true, isTCP: isTCP, payload: [UInt8](repeating: 0, count: payload), segmentBytes: segmentBytes
      ).whole != nil
    }
    #expect(!isTaken(isTCP: true, payload: 65_000, segmentBytes: 1))
    #expect(isTaken(isTCP: true, payload: 256, segmentBytes: 1) && !isTaken(isTCP: true, payload: 257, segmentBytes: 1))
    #expect(
      isTaken(isTCP: false, payload: 128, segmentBytes: 1) && !isTaken(isTCP: false, payload: 129, segmentBytes: 1))
    #expect(isTaken(isTCP: true, payload: 65_000, segmentBytes: 536))
    #expect(isTaken(isTCP: true, payload: 65_000, segmentBytes: 65_535))
  }

  @Test("headers as long as the room are taken, and longer ones are not")
  func headerRoom() throws {
    // 14 of Ethernet, 40 of IPv6, 8 of UDP: 130 are left; 20 of TCP and its options make the rest.
    let fitting = MadeSuperFrame(
      isIPv4: false, isTCP: true, options: 96, transportOptions: 20, payload: [1, 2], segmentBytes: 1)
    #expect(fitting.headerBytes == 190 && fitting.whole == nil, "more extension headers than are followed")
    let tagged = MadeSuperFrame(
      isIPv4: false, isTCP: true, tags: 2, options: 64, transportOptions: 40, payload: [1, 2], segmentBytes: 1)
    #expect(tagged.headerBytes == 186 && tagged.whole != nil)
    // One extension header of 80 bytes instead of eight of 8.
    var long = MadeSuperFrame(
      isIPv4: false, isTCP: true, tags: 2, options: 80, transportOptions: 28, payload: [1, 2], segmentBytes: 1)
    long.bytes[long.networkOffset + 40] = IPProtocol.tcp
    long.bytes[long.networkOffset + 41] = 9
    #expect(long.headerBytes == 190 && long.whole != nil)
    long = MadeSuperFrame(
      isIPv4: false, isTCP: true, tags: 2, options: 80, transportOptions: 32, payload: [1, 2], segmentBytes: 1)
    long.bytes[long.networkOffset + 40] = IPProtocol.tcp
    long.bytes[long.networkOffset + 41] = 9
    #expect(long.headerBytes == 194 && long.whole == nil)
  }

  @Test("what the frame and the offload header do not agree on is refused")
  func disagreements() {
    var random = SeededRandom(seed: 43)
    let payload = random.bytes(3000)
    for isIPv4 in [false, true] {
      for isTCP in [false, true] {
        let good = MadeSuperFrame(isIPv4: isIPv4, isTCP: isTCP, payload: payload, segmentBytes: 1000)
        func isTaken(_ change: (inout MadeSuperFrame) -> Void) -> Bool {
          var made = good
          change(&made)
          return made.whole != nil
        }
        #expect(isTaken { _ in })
        for gsoType in UInt8.min...UInt8.max where gsoType != good.offload.gsoType {
          // The ECN bit may stand beside a TCP type.
          let isGood = isTCP && gsoType == good.offload.gsoType | 0x80
          #expect(isTaken { $0.offload.gsoType = gsoType } == isGood, "type \(gsoType)")
        }
        #expect(!isTaken { $0.offload.flags = 0 })
        #expect(!isTaken { $0.offload.gsoSize = 0 })
        #expect(!isTaken { $0.offload.checksumStart += 2 } && !isTaken { $0.offload.checksumOffset -= 2 })
        #expect(!isTaken { $0.bytes.append(0) }, "padding")
        #expect(!isTaken { $0.bytes.removeLast() }, "cut")
        #expect(!isTaken { $0.bytes.removeLast(3000) }, "nothing to cut")
        #expect(isTaken { $0.offload.headerLength = 0xffff }, "a hint")
        if isTCP {
          for words in 0...15 {
            let isWhole = words >= 5
            let change: (inout MadeSuperFrame) -> Void = { $0.bytes[$0.transportOffset + 12] = UInt8(words << 4) }
            #expect(isTaken(change) == isWhole, "data offset \(words)")
          }
        }
        if isIPv4 {
          #expect(!isTaken { $0.bytes[$0.networkOffset + 6] |= 0x20 }, "a fragment")
          #expect(!isTaken { $0.bytes[$0.networkOffset + 9] = IPProtocol.icmp })
        } else {
          #expect(!isTaken { $0.bytes[$0.networkOffset + 6] = IPProtocol.fragment })
        }
      }
    }
  }

  @Test("super-frames with random bytes in their headers keep every promise")
  func hostile() {
    var random = SeededRandom(seed: 44)
    for _ in 0..<150 {
      let made = MadeSuperFrame.random(&random)
      var input = [UInt8](repeating: 0, count: OffloadHeader.bytes)
      _ = input.withMutableRawBytes { made.offload.write(into: &$0) }
      input += made.bytes
      fuzzOffload(input.rawBytes)
      for _ in 0..<Int.random(in: 1...3, using: &random) {
        input[Int.random(in: 0..<12 + made.headerBytes, using: &random)] = random.number()
      }
      fuzzOffload(input.rawBytes)
    }
  }

  @Test("another frame, another segment, and too little room trap")
  func traps() async {
    await #expect(processExitsWith: .failure) {
      let made = MadeSuperFrame(isIPv4: true, isTCP: true, payload: [1, 2, 3, 4], segmentBytes: 2)
      var room = [UInt8](repeating: 0, count: 53)
      _ = room.withMutableRawBytes { made.whole!.writeHeaders(ofSegment: 0, of: made.bytes.rawBytes, into: &$0) }
    }
    await #expect(processExitsWith: .failure) {
      let made = MadeSuperFrame(isIPv4: true, isTCP: true, payload: [1, 2, 3, 4], segmentBytes: 2)
      var room = [UInt8](repeating: 0, count: 192)
      let other = made.bytes + [0]
      _ = room.withMutableRawBytes { made.whole!.writeHeaders(ofSegment: 0, of: other.rawBytes, into: &$0) }
    }
    await #expect(processExitsWith: .failure) {
      let made = MadeSuperFrame(isIPv4: true, isTCP: true, payload: [1, 2, 3, 4], segmentBytes: 2)
      print(made.whole!.payloadOffset(ofSegment: 2))
    }
  }
}

@Suite("VNET/P frames")
struct FramesVNETP {
  @Test("the largest guest MTU fills the outer packet's length field")
  func sizes() {
    #expect(VNETPFrame.portDefault == 9000)
    #expect(VNETPFrame.overheadBytesIPv4 == 42 && VNETPFrame.overheadBytesIPv6 == 62)
    #expect(VNETPFrame.mtuBytesMaxIPv4 == 65_493 && VNETPFrame.mtuBytesMaxIPv6 == 65_513)
  }

  @Test("a VXLAN datagram is told from a frame by flags, reserved bits and length")
  func looksLikeVXLAN() {
    let datagram = [UInt8](hex: "08000000 00002a00") + [UInt8](repeating: 0, count: 14)
    func looksLike(_ bytes: [UInt8]) -> Bool { bytes.read { VNETPFrame.looksLikeVXLAN($0) } }
    #expect(looksLike(datagram))
    #expect(looksLike([UInt8](hex: "08000000 ffffff00") + FrameMaker().ethernet(EtherType.arp).bytes))
    #expect(!looksLike(Array(datagram.dropLast())) && !looksLike([]))
    for place in [0, 1, 2, 3, 7] {
      for bit in 0..<8 {
        var other = datagram
        other[place] ^= 1 << bit
        #expect(!looksLike(other), "byte \(place) bit \(bit)")
      }
    }
    #expect(!looksLike(FrameMaker().ethernet(EtherType.ipv4).payload([UInt8](repeating: 0, count: 46)).bytes))
  }
}
