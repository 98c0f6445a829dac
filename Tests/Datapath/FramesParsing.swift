import Datapath
import FuzzEntry
import TestSupport
import Testing

@Suite("Parsed frame")
struct FramesParsing {
  @Test("everything that forwarding asks for is read, behind two tags and extension headers")
  func fields() throws {
    let hopByHop = [UInt8](hex: "0600 0502 0000 0100")
    let frame = FrameMaker().ethernet(EtherType.ipv6)
      .tagged(VLANTag(tagProtocol: EtherType.vlanService, priority: 7, identifier: 0xabc))
      .tagged(VLANTag(identifier: 0x123))
      .ipv6(IPv6Header(trafficClass: 0x2e, payloadBytes: 8 + 20 + 3, nextHeader: 0, source: 1, destination: 2))
      .payload(hopByHop).tcp(TCPHeader(sourcePort: 1, destinationPort: 2)).payload([1, 2, 3])
    let parsed = try #require(frame.bytes.parsed)
    #expect(parsed.destination == FrameMaker.guestB && parsed.source == FrameMaker.guestA)
    #expect(parsed.vlanIdentifier == 0xabc && parsed.tagCount == 2 && parsed.etherType == EtherType.ipv6)
    #expect(parsed.networkOffset == 22 && parsed.transportOffset == 22 + 40 + 8)
    #expect(parsed.ipVersion == 6 && parsed.typeOfService == 0x2e && parsed.ipProtocol == IPProtocol.tcp)
    #expect(parsed.networkBytes == 71 && parsed.networkLengthValid && !parsed.isFragment)
  }

  @Test("a frame cut at any length is parsed without a crash, and says that its IP length is not valid")
  func truncation() throws {
    for name in try FramesCorpus.names("frames") {
      let frame = try FramesCorpus.bytes("frames", name)
      for count in 0...frame.count {
        let cut = Array(frame.prefix(count))
        fuzzFrames(cut.rawBytes)
        #expect((cut.parsed == nil) == (count < 14))
        if let whole = frame.parsed, whole.ipVersion != 0, whole.networkLengthValid, let parsed = cut.parsed,
          count >= whole.networkOffset
        {
          let isWhole = count >= whole.networkOffset + whole.networkBytes
          #expect(parsed.networkLengthValid == isWhole, "\(name) cut to \(count)")
        }
      }
    }
  }

  @Test("a copy of a frame's headers parses as the frame, against the frame's length")
  func headersAlone() throws {
    let payload = [UInt8](repeating: 9, count: 1400)
    let frame = FrameMaker().ethernet(EtherType.ipv4)
      .ipv4(IPv4Header(totalBytes: 1428, ipProtocol: IPProtocol.udp, source: 1, destination: 2))
      .udp(UDPHeader(sourcePort: 3, destinationPort: 4, totalBytes: 1408)).payload(payload).bytes
    let whole = try #require(frame.parsed)
    let headers = Array(frame.prefix(42))
    #expect(ParsedFrame(headers: headers.rawBytes, frameBytes: frame.count) == whole)
    #expect(ParsedFrame(headers: headers.rawBytes, frameBytes: frame.count - 1)?.networkLengthValid == false)
    #expect(headers.parsed?.networkLengthValid == false)
    // A transport header that was not copied is not there.
    let short = Array(frame.prefix(41))
    let parsed = try #require(short.read { ParsedFrame(headers: $0, frameBytes: frame.count) })
    #expect(parsed.transportOffset == 0 && parsed.networkLengthValid)
    #expect(ParsedFrame(headers: frame.rawBytes, frameBytes: 13) == nil)
    #expect(ParsedFrame(headers: frame.rawBytes, frameBytes: -1) == nil)
  }
}

@Suite("Flow hash")
struct FramesFlowHash {
  struct Flow: Hashable {
    var source: UInt32 = 0x0a00_0001
    var destination: UInt32 = 0x0a00_0002
    var ipProtocol = IPProtocol.udp
    var sourcePort: UInt16 = 40000
    var destinationPort: UInt16 = 5201
    var vlan: UInt16?
  }

  func frame(_ flow: Flow, ipv6: Bool = false, typeOfService: UInt8 = 0, payload: [UInt8] = [1, 2, 3]) -> [UInt8] {
    let transportBytes = (flow.ipProtocol == IPProtocol.tcp ? 20 : 8) + payload.count
    var maker = FrameMaker().ethernet(ipv6 ? EtherType.ipv6 : EtherType.ipv4)
    if let vlan = flow.vlan { maker = maker.tagged(VLANTag(priority: typeOfService >> 5, identifier: vlan)) }
    if ipv6 {
      maker = maker.ipv6(
        IPv6Header(
          trafficClass: typeOfService, flowLabel: UInt32(payload.count), payloadBytes: transportBytes,
          nextHeader: flow.ipProtocol, hopLimit: UInt8(truncatingIfNeeded: payload.count),
          source: UInt128(flow.source) << 96 | 1, destination: UInt128(flow.destination) << 96 | 1))
    } else {
      maker = maker.ipv4(
        IPv4Header(
          typeOfService: typeOfService, totalBytes: 20 + transportBytes, identification: UInt16(payload.count),
          timeToLive: UInt8(truncatingIfNeeded: payload.count), ipProtocol: flow.ipProtocol, source: flow.source,
          destination: flow.destination))
    }
    if flow.ipProtocol == IPProtocol.tcp {
      maker = maker.tcp(
        TCPHeader(
          sourcePort: flow.sourcePort, destinationPort: flow.destinationPort, sequence: UInt32(payload.count)))
    } else {
      maker = maker.udp(
        UDPHeader(
          sourcePort: flow.sourcePort, destinationPort: flow.destinationPort, totalBytes: transportBytes))
    }
    return maker.payload(payload).bytes
  }

  func hash(_ flow: Flow, ipv6: Bool = false) throws -> UInt32 { try #require(frame(flow, ipv6: ipv6).parsed).flowHash }

  @Test(
    "a flow keeps its hash, whatever its frames carry, their ToS, length, TTL and sequence", arguments: [false, true])
  func constant(ipv6: Bool) throws {
    for ipProtocol in [IPProtocol.tcp, IPProtocol.udp] {
      let flow = Flow(ipProtocol: ipProtocol, vlan: 7)
      var hashes: Set<UInt32> = []
      for count in 0..<50 {
        let frame = frame(
          flow, ipv6: ipv6, typeOfService: UInt8(count * 5), payload: [UInt8](repeating: UInt8(count), count: count))
        hashes.insert(try #require(frame.parsed).flowHash)
      }
      #expect(hashes.count == 1)
    }
  }

  @Test("each of VLAN, addresses, protocol and ports tells flows apart", arguments: [false, true])
  func apart(ipv6: Bool) throws {
    let base = Flow()
    var flows: [Flow] = [base]
    for bit in 0..<32 {
      var flow = base
      flow.source ^= 1 << bit
      flows.append(flow)
      flow = base
      flow.destination ^= 1 << bit
      flows.append(flow)
    }
    for bit in 0..<16 {
      var flow = base
      flow.sourcePort ^= 1 << bit
      flows.append(flow)
      flow = base
      flow.destinationPort ^= 1 << bit
      flows.append(flow)
    }
    for vlan in UInt16(1)...100 { flows.append(Flow(vlan: vlan)) }
    flows.append(Flow(ipProtocol: IPProtocol.tcp))
    let hashes = Set(try flows.map { try hash($0, ipv6: ipv6) })
    #expect(hashes.count == flows.count)
  }

  @Test("all fragments of a datagram hash alike, the first too, and not by ports", arguments: [false, true])
  func fragments(ipv6: Bool) throws {
    var hashes: Set<UInt32> = []
    for port in [UInt16(1000), 2000] {
      // The first fragment has the ports, the later ones have what may look like others.
      for (offset, more) in [(0, true), (1400, true), (2800, false)] {
        let start = offset == 0 ? [UInt8](hex: "1234 1451 1000 0000") : [UInt8(port >> 8), UInt8(port & 0xff), 0, 7]
        let body = start + [UInt8](repeating: 5, count: 40 + offset / 100)
        var maker = FrameMaker().ethernet(ipv6 ? EtherType.ipv6 : EtherType.ipv4)
        if ipv6 {
          maker = maker.ipv6(IPv6Header(payloadBytes: 8 + body.count, nextHeader: 44, source: 1, destination: 2))
            .fragment(
              // A later fragment may name another next header (RFC 8200 §4.5).
              IPv6FragmentHeader(
                nextHeader: offset == 0 ? 17 : 60, fragmentOffsetBytes: offset, moreFragments: more, identification: 9))
        } else {
          maker = maker.ipv4(
            IPv4Header(
              totalBytes: 20 + body.count, identification: port, moreFragments: more, fragmentOffsetBytes: offset,
              ipProtocol: 17, source: 1, destination: 2))
        }
        let parsed = try #require(maker.payload(body).bytes.parsed)
        #expect(parsed.isFragment && parsed.networkLengthValid)
        #expect((parsed.transportOffset != 0) == (offset == 0))
        hashes.insert(parsed.flowHash)
      }
    }
    #expect(hashes.count == 1)
  }

  /// How unevenly items fall into buckets: near the count of buckets for chance, far above for a poor hash.
  func chiSquared(_ hashes: [UInt32], buckets: Int, bucket: (UInt32) -> Int) -> Double {
    var counts = [Int](repeating: 0, count: buckets)
    for hash in hashes { counts[bucket(hash)] += 1 }
    let mean = Double(hashes.count) / Double(buckets)
    return counts.map { (Double($0) - mean) * (Double($0) - mean) / mean }.reduce(0, +)
  }

  @Test("1,000 flows that differ by a counter only spread over 8 buckets, by low, middle and high bits")
  func spread() throws {
    for ipv6 in [false, true] {
      let kinds: [(Int) -> Flow] = [
        { Flow(sourcePort: UInt16(30000 + $0)) },
        { Flow(destinationPort: UInt16(2 * $0)) },
        { Flow(source: 0x0a00_0000 + UInt32($0)) },
        { Flow(destination: 0x0a00_0000 + UInt32($0) << 8, ipProtocol: IPProtocol.tcp) },
        { Flow(source: 0x0a00_0000 + UInt32($0), destination: 0x0a00_0000 + UInt32($0)) },
        { Flow(vlan: UInt16($0)) },
      ]
      for kind in kinds {
        let hashes = try (0..<1000).map { try hash(kind($0), ipv6: ipv6) }
        #expect(Set(hashes).count >= 998, "32 bits, 1,000 flows: a collision is one in 8,600")
        // 7 degrees of freedom: above 30 in one of 10,000 fair cases, and these are fixed.
        for bucket: (UInt32) -> Int in [{ Int($0 % 8) }, { Int($0 >> 13 & 7) }, { Int($0 >> 29) }] {
          #expect(chiSquared(hashes, buckets: 8, bucket: bucket) < 30)
        }
        #expect(chiSquared(hashes, buckets: 7) { Int($0 % 7) } < 30)
      }
    }
  }

  @Test("a changed bit of the flow changes half of the hash's bits, whichever it is")
  func avalanche() throws {
    var random = SeededRandom(seed: 10)
    var changed = [Int](repeating: 0, count: 32)
    let rounds = 2000
    for _ in 0..<rounds {
      let flow = Flow(
        source: random.number(), destination: random.number(), sourcePort: random.number(),
        destinationPort: random.number())
      var other = flow
      other.sourcePort ^= 1 << (random.number(UInt16.self) % 16)
      let difference = try hash(flow) ^ hash(other)
      for bit in 0..<32 where difference >> UInt32(bit) & 1 == 1 { changed[bit] += 1 }
    }
    for (bit, count) in changed.enumerated() {
      #expect((rounds * 4 / 10...rounds * 6 / 10).contains(count), "bit \(bit) changed in \(count) of \(rounds)")
    }
  }

  @Test("frames that are not IP hash by their MAC addresses and EtherType")
  func notIP() throws {
    func hash(_ destination: UInt64, _ source: UInt64, _ etherType: UInt16, _ payload: [UInt8]) throws -> UInt32 {
      var frame = [UInt8](repeating: 0, count: 14) + payload
      frame.withMutableRawBytes {
        _ = EthernetHeader(
          destination: MACAddress(bits: destination), source: MACAddress(bits: source), etherType: etherType
        ).write(into: &$0)
      }
      return try #require(frame.parsed).flowHash
    }
    let one = try hash(1, 2, EtherType.arp, [1, 2, 3])
    #expect(try hash(1, 2, EtherType.arp, [4, 5, 6, 7]) == one)
    #expect(
      try Set([one, hash(3, 2, EtherType.arp, []), hash(1, 3, EtherType.arp, []), hash(1, 2, 0x88cc, [])]).count == 4)
    let hashes = try (0..<1000).map { try hash(0xffff_ffff_ffff, 0x0200_0000_0000 + UInt64($0), EtherType.arp, []) }
    #expect(chiSquared(hashes, buckets: 8) { Int($0 % 8) } < 30)
  }
}
