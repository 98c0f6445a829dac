import Datapath
import FuzzEntry
import TestSupport
import Testing

@Suite("MAC addresses")
struct FramesMACAddress {
  @Test("text is read and written the same, the first byte on the wire the most significant")
  func text() throws {
    let address = try #require(MACAddress("02:00:00:00:00:0a"))
    #expect(address.bits == 0x0200_0000_000a)
    #expect(address.description == "02:00:00:00:00:0a")
    #expect(MACAddress("FE:dc:BA:98:76:54")?.bits == 0xfedc_ba98_7654)
    var random = SeededRandom(seed: 1)
    for _ in 0..<1000 {
      let address = MACAddress(bits: random.number())
      #expect(MACAddress(address.description) == address)
    }
  }

  @Test(
    "what is no address is refused",
    arguments: [
      "", ":", "02", "02:00:00:00:00", "02:00:00:00:00:", "02:00:00:00:00:0", "02:00:00:00:00:0a:",
      "02:00:00:00:00:0a:0b", "02-00-00-00-00-0a", "0200:0000:000a", " 02:00:00:00:00:0a", "02:00:00:00:00:0a ",
      "0g:00:00:00:00:0a", "2:0:0:0:0:a", "+2:00:00:00:00:0a", "02:00:00:00:00:０a", "any",
    ])
  func refused(text: String) {
    #expect(MACAddress(text) == nil)
  }

  @Test("group, broadcast and zero addresses are told by their bits; bits above the 48 are ignored")
  func kinds() {
    #expect(MACAddress.broadcast.isBroadcast && MACAddress.broadcast.isMulticast)
    #expect(MACAddress.zero.isZero && !MACAddress.zero.isMulticast)
    let multicast = MACAddress(bits: 0x0100_5e00_0001)
    #expect(multicast.isMulticast && !multicast.isBroadcast && !multicast.isZero)
    // The bit next to it says "locally administered".
    #expect(!MACAddress(bits: 0x0200_0000_000a).isMulticast)
    #expect(MACAddress(bits: 0xffff_0000_0000_0000).isZero)
    #expect(MACAddress(bits: 0xdead_0200_0000_000a) == MACAddress(bits: 0x0200_0000_000a))
  }
}

/// Known bytes: each written out by hand or from the source that is named, not by the writers.
@Suite("Header vectors")
struct FramesVectors {
  @Test("an Ethernet header with two tags is read and written byte by byte")
  func ethernetAndTags() throws {
    let bytes = [UInt8](hex: "ffffffffffff 02000000000a 88a8 60c8 8100 b064 0800 aabb")
    let ethernet = try #require(bytes.read { EthernetView($0)?.header })
    #expect(ethernet.destination == .broadcast && ethernet.source == FrameMaker.guestA)
    #expect(ethernet.etherType == EtherType.vlanService)
    let outer = bytes.read { frame -> VLANTag? in
      guard let ethernet = EthernetView(frame) else { return nil }
      return VLANView(ethernet.etherTypeAndPayload)?.tag
    }
    #expect(outer == VLANTag(tagProtocol: EtherType.vlanService, priority: 3, dropEligible: false, identifier: 200))
    let inner = bytes.read { VLANView($0.extracting(droppingFirst: 16))?.tag }
    #expect(inner == VLANTag(tagProtocol: EtherType.vlan, priority: 5, dropEligible: true, identifier: 100))
    let made = FrameMaker().payload(Array(bytes[0..<12]) + [0x08, 0x00]).tagged(outer!).tagged(inner!)
    #expect(made.bytes == Array(bytes.dropLast(2)))
  }

  @Test("an IPv4 header of a real capture is read, its checksum holds, and it is written the same")
  func ipv4() throws {
    // The header that many textbooks sum up, checksum b861.
    let bytes = [UInt8](hex: "4500 0073 0000 4000 4011 b861 c0a8 0001 c0a8 00c7") + [UInt8](repeating: 0, count: 95)
    let header = try #require(bytes.read { IPv4View($0)?.header })
    #expect(header.totalBytes == 115 && header.headerBytes == 20 && header.timeToLive == 64)
    #expect(header.dontFragment && !header.moreFragments && header.fragmentOffsetBytes == 0)
    #expect(header.ipProtocol == IPProtocol.udp)
    #expect(header.source == 0xc0a8_0001 && header.destination == 0xc0a8_00c7)
    #expect(IPv4View(bytes.rawBytes)?.isChecksumValid == true)
    #expect(IPv4View(bytes.rawBytes)?.headerChecksum == 0xb861)
    #expect(FrameMaker().ipv4(header).bytes == Array(bytes[0..<20]))
    for index in 0..<20 where ![0, 2, 3].contains(index) {
      var wrong = bytes
      wrong[index] ^= 0x10
      #expect(IPv4View(wrong.rawBytes)?.isChecksumValid == false, "byte \(index)")
    }
  }

  @Test("an IPv6 header is read and written byte by byte")
  func ipv6() throws {
    let bytes = [UInt8](
      hex:
        "6 b9 beef5 0003 3b 07 fd00 0000 0000 0000 0000 0000 0000 0001 fd00 0000 0000 0000 0000 0000 0000 0002 aabbcc")
    let header = try #require(bytes.read { IPv6View($0)?.header })
    #expect(header.trafficClass == 0xb9 && header.flowLabel == 0xbeef5 && header.payloadBytes == 3)
    #expect(header.nextHeader == IPProtocol.noNextHeader && header.hopLimit == 7)
    #expect(header.source == 0xfd00_0000_0000_0000_0000_0000_0000_0001)
    #expect(header.destination == 0xfd00_0000_0000_0000_0000_0000_0000_0002)
    #expect(IPv6View(bytes.rawBytes)?.ecn == 1)
    #expect(FrameMaker().ipv6(header).bytes == Array(bytes[0..<40]))
  }

  @Test("TCP and UDP headers are read and written byte by byte")
  func transport() throws {
    let tcpBytes = [UInt8](hex: "9c40 1451 000003e8 000007d0 80 99 01f6 abcd 0011 0101080a 00000001 00000002 aa")
    let tcp = try #require(tcpBytes.read { TCPView($0)?.header })
    #expect(tcp.sourcePort == 40000 && tcp.destinationPort == 5201)
    #expect(tcp.sequence == 1000 && tcp.acknowledgement == 2000 && tcp.headerBytes == 32)
    #expect(tcp.flags == [.cwr, .ack, .psh, .fin] && tcp.window == 502)
    #expect(tcp.checksum == 0xabcd && tcp.urgentPointer == 17)
    #expect(TCPView(tcpBytes.rawBytes)?.payload.byteCount == 1)
    #expect(TCPView(tcpBytes.rawBytes)?.options.byteCount == 12)
    #expect(FrameMaker().tcp(tcp).bytes == Array(tcpBytes[0..<20]) + [UInt8](repeating: 0, count: 12))

    let udpBytes = [UInt8](hex: "c000 12b5 000a beef 0102 99")
    let udp = try #require(udpBytes.read { UDPView($0)?.header })
    #expect(udp == UDPHeader(sourcePort: 49152, destinationPort: 4789, totalBytes: 10, checksum: 0xbeef))
    #expect(UDPView(udpBytes.rawBytes)?.payload.byteCount == 2)
    #expect(FrameMaker().udp(udp).bytes == Array(udpBytes[0..<8]))
  }

  @Test("a VXLAN header is 08 00 00 00, the VNI, 00 (RFC 7348 §5), written or stored as one number")
  func vxlan() throws {
    let bytes = [UInt8](hex: "08 000000 00002a 00")
    var written = [UInt8](repeating: 0xff, count: 8)
    #expect(written.withMutableRawBytes { VXLANHeader(vni: 42).write(into: &$0) } == VXLANHeader.bytes)
    #expect(written == bytes)
    var stored = [UInt8](repeating: 0xff, count: 8)
    stored.withMutableRawBytes { $0.storeBytes(of: VXLANHeader.networkOrder(vni: 42), as: UInt64.self) }
    #expect(stored == bytes)
    let view = VXLANView(bytes.rawBytes)
    #expect(view?.vni == 42)
    #expect(view?.hasVNI == true)
    #expect(view?.reservedBitsAreZero == true)
    #expect(VXLANHeader(vni: 0x1_00_002a).vni == 42)
  }

  @Test("each reserved bit of a VXLAN header is seen, and changes neither VNI nor flag")
  func vxlanReservedBits() {
    for bit in 0..<64 {
      var bytes = [UInt8](hex: "08 000000 123456 00")
      bytes[bit / 8] ^= 0x80 >> UInt8(bit % 8)
      let isFlag = bit == 4
      let isVNI = (32..<56).contains(bit)
      #expect(VXLANView(bytes.rawBytes)?.reservedBitsAreZero == (isFlag || isVNI), "bit \(bit)")
      #expect(VXLANView(bytes.rawBytes)?.hasVNI == !isFlag, "bit \(bit)")
      #expect((VXLANView(bytes.rawBytes)?.vni == 0x123456) == !isVNI, "bit \(bit)")
    }
  }
}

@Suite("Headers, random")
struct FramesRoundTrips {
  @Test("what a writer wrote the view reads, at any offset and alignment, and nothing around it is touched")
  func writerToView() {
    var random = SeededRandom(seed: 2)
    for _ in 0..<500 {
      let offset = Int(random.number(UInt8.self) % 17)
      let ethernet = EthernetHeader(
        destination: MACAddress(bits: random.number()), source: MACAddress(bits: random.number()),
        etherType: random.number())
      let tag = VLANTag(
        tagProtocol: Bool.random(using: &random) ? EtherType.vlan : EtherType.vlanService, priority: random.number(),
        dropEligible: Bool.random(using: &random), identifier: random.number())
      let ipv4 = IPv4Header(
        headerBytes: 20 + 4 * Int(random.number(UInt8.self) % 11), typeOfService: random.number(), totalBytes: 80,
        identification: random.number(), dontFragment: Bool.random(using: &random),
        moreFragments: Bool.random(using: &random), fragmentOffsetBytes: Int(random.number(UInt16.self) & 0xfff8),
        timeToLive: random.number(), ipProtocol: random.number(), source: random.number(),
        destination: random.number())
      let ipv6 = IPv6Header(
        trafficClass: random.number(), flowLabel: random.number(), payloadBytes: 40, nextHeader: random.number(),
        hopLimit: random.number(), source: random.number(), destination: random.number())
      let udp = UDPHeader(
        sourcePort: random.number(), destinationPort: random.number(), totalBytes: 80, checksum: random.number())
      let tcp = TCPHeader(
        sourcePort: random.number(), destinationPort: random.number(), sequence: random.number(),
        acknowledgement: random.number(), headerBytes: 20 + 4 * Int(random.number(UInt8.self) % 11),
        flags: TCPFlags(rawValue: random.number()), window: random.number(), checksum: random.number(),
        urgentPointer: random.number())
      let vni = random.number(UInt32.self) & VXLANHeader.vniMax

      check(offset, EthernetHeader.bytes) {
        ethernet.write(into: &$0, at: $1)
      } read: {
        #expect(EthernetView($0)?.header == ethernet)
      }
      // The EtherType behind a tag belongs to it when read, not when written.
      check(offset, VLANTag.bytes) {
        tag.write(into: &$0, at: $1)
      } read: {
        #expect(VLANView($0)?.tag == tag)
      }
      check(offset, ipv4.headerBytes) {
        ipv4.write(into: &$0, at: $1)
      } read: {
        #expect(IPv4View($0)?.header == ipv4)
        #expect(IPv4View($0)?.isChecksumValid == true)
      }
      check(offset, IPv6Header.bytes) {
        ipv6.write(into: &$0, at: $1)
      } read: {
        #expect(IPv6View($0)?.header == ipv6)
      }
      check(offset, UDPHeader.bytes) {
        udp.write(into: &$0, at: $1)
      } read: {
        #expect(UDPView($0)?.header == udp)
      }
      check(offset, tcp.headerBytes) {
        tcp.write(into: &$0, at: $1)
      } read: {
        #expect(TCPView($0)?.header == tcp)
      }
      check(offset, VXLANHeader.bytes) {
        VXLANHeader(vni: vni).write(into: &$0, at: $1)
      } read: {
        #expect(VXLANView($0)?.vni == vni)
      }
    }
  }

  func check(
    _ offset: Int, _ count: Int, write: (inout MutableRawSpan, Int) -> Int, read: (RawSpan) -> Void
  ) {
    let background: UInt8 = 0xa5
    var bytes = [UInt8](repeating: background, count: offset + 80)
    #expect(bytes.withMutableRawBytes { write(&$0, offset) } == offset + count)
    #expect(bytes[..<offset].allSatisfy { $0 == background })
    #expect(bytes[(offset + count)...].allSatisfy { $0 == background })
    read(bytes.rawBytes.extracting(droppingFirst: offset))
  }
}

@Suite("Malformed headers")
struct FramesMalformed {
  @Test("each view is there from its shortest length on, and at no length below")
  func truncation() {
    let bytes = [UInt8](hex: "4500 0014") + [UInt8](repeating: 0x55, count: 100)
    for count in 0...bytes.count {
      let span = bytes.rawBytes.extracting(first: count)
      #expect((EthernetView(span) != nil) == (count >= 14))
      #expect((IPv4View(span) != nil) == (count >= 20))
      #expect((VXLANView(span) != nil) == (count >= 8))
      #expect((OffloadHeader(span) != nil) == (count >= 12))
    }
    let tag = [UInt8](hex: "8100 0064 0800")
    let ipv6 = [UInt8](hex: "6000 0000 0008 3b40") + [UInt8](repeating: 0, count: 40)
    let udp = [UInt8](hex: "0001 0002 0010 0000") + [UInt8](repeating: 0, count: 8)
    let tcp = [UInt8](hex: "0001 0002 00000000 00000000 7010 0000 0000 0000") + [UInt8](repeating: 0, count: 8)
    for count in 0...tag.count { #expect((VLANView(tag.rawBytes.extracting(first: count)) != nil) == (count >= 6)) }
    for count in 0...ipv6.count { #expect((IPv6View(ipv6.rawBytes.extracting(first: count)) != nil) == (count >= 48)) }
    for count in 0...udp.count { #expect((UDPView(udp.rawBytes.extracting(first: count)) != nil) == (count >= 16)) }
    for count in 0...tcp.count { #expect((TCPView(tcp.rawBytes.extracting(first: count)) != nil) == (count >= 28)) }
  }

  @Test("a wrong version, header length or total length is no IPv4 datagram")
  func ipv4() {
    let good =
      [UInt8](hex: "4600 0020 0000 0000 4011 0000 0a000001 0a000002 00000000") + [UInt8](repeating: 1, count: 8)
    #expect(IPv4View(good.rawBytes)?.payload.byteCount == 8)
    let changes: [(Int, UInt8)] = [
      (0, 0x56), (0, 0x66), (0, 0x44), (0, 0x40), (0, 0x49), (3, 23), (3, 0), (3, 33), (2, 1),
    ]
    for (index, value) in changes {
      var bytes = good
      bytes[index] = value
      #expect(bytes.read { IPv4View($0)?.header } == nil, "byte \(index) = \(value)")
    }
  }

  @Test("what the link layer padded behind a datagram does not belong to it")
  func padding() {
    let bytes = [UInt8](hex: "4500 0016 0000 0000 4011 0000 0a000001 0a000002 aabb") + [UInt8](repeating: 0, count: 24)
    #expect(IPv4View(bytes.rawBytes)?.payload.byteCount == 2)
    #expect(IPv4View(bytes.rawBytes)?.totalBytes == 22)
  }

  @Test("a wrong version or a payload that is not there is no IPv6 packet")
  func ipv6() {
    let good = [UInt8](hex: "6000 0000 0000 3b40") + [UInt8](repeating: 0, count: 32)
    #expect(IPv6View(good.rawBytes)?.payload.byteCount == 0)
    for (index, value) in [(0, UInt8(0x40)), (0, 0x70), (5, 1), (4, 0xff)] {
      var bytes = good
      bytes[index] = value
      #expect(bytes.read { IPv6View($0)?.header } == nil, "byte \(index) = \(value)")
    }
  }

  @Test("a UDP length below 8 or above what is there, and a TCP data offset below 5 or above, are refused")
  func transport() {
    for length in 0...255 {
      let bytes = [UInt8](hex: "0001 0002 0000 0000 00000000 00000000 00000000")
      var changed = bytes
      changed[5] = UInt8(length)
      #expect((UDPView(changed.rawBytes) != nil) == (8...20).contains(length))
    }
    for offset in 0...15 {
      var bytes = [UInt8](repeating: 0, count: 40)
      bytes[12] = UInt8(offset << 4 | 0xf)
      #expect((TCPView(bytes.rawBytes) != nil) == (5...10).contains(offset))
    }
  }

  @Test("only the EtherTypes of 802.1Q and 802.1ad are tags")
  func tags() {
    for etherType in UInt16.min...UInt16.max {
      let bytes = [UInt8(etherType >> 8), UInt8(etherType & 0xff), 0, 1, 8, 0]
      let isTag = etherType == 0x8100 || etherType == 0x88a8
      if (VLANView(bytes.rawBytes) != nil) != isTag { Issue.record("EtherType \(etherType)") }
    }
  }
}

@Suite("IPv6 extension headers")
struct FramesExtensionHeaders {
  func upper(_ nextHeader: UInt8, _ payload: [UInt8]) -> IPv6UpperLayer? {
    let packet = FrameMaker().ipv6(
      IPv6Header(payloadBytes: payload.count, nextHeader: nextHeader, source: 1, destination: 2)
    ).payload(payload)
    return IPv6View(packet.bytes.rawBytes)?.upperLayer
  }

  @Test("hop-by-hop, routing, destination options and AH are followed, each by its own length")
  func chain() throws {
    let hopByHop = [UInt8](hex: "2b00 0502 0000 0100")  // 8 bytes, then routing
    let routing = [UInt8](hex: "3c02 0400") + [UInt8](repeating: 0, count: 20)  // 24 bytes, then destination options
    let options = [UInt8](hex: "3301 010c") + [UInt8](repeating: 0, count: 12)  // 16 bytes, then AH
    let authentication = [UInt8](hex: "0604 0000") + [UInt8](repeating: 7, count: 20)  // (4 + 2) * 4 bytes, then TCP
    let found = try #require(upper(0, hopByHop + routing + options + authentication + [UInt8](repeating: 0, count: 20)))
    #expect(found.ipProtocol == IPProtocol.tcp && found.offset == 40 + 8 + 24 + 16 + 24)
    #expect(found.isWellFormed && !found.isFragment)
  }

  @Test("a later fragment ends the walk, the first one does not, and a whole packet in a fragment header is none")
  func fragments() throws {
    let udp = [UInt8](hex: "0001 0002 0008 0000")
    let later = try #require(upper(44, [UInt8](hex: "1100 0018 0000abcd") + udp))
    #expect(later.isFragment && later.offset == 0 && later.fragmentOffsetBytes == 24 && !later.moreFragments)
    #expect(later.ipProtocol == IPProtocol.udp && later.isWellFormed)
    let first = try #require(upper(44, [UInt8](hex: "1100 0001 0000abcd") + udp))
    #expect(first.isFragment && first.offset == 48 && first.fragmentOffsetBytes == 0 && first.moreFragments)
    let atomic = try #require(upper(44, [UInt8](hex: "1100 0000 0000abcd") + udp))
    #expect(!atomic.isFragment && atomic.offset == 48 && atomic.ipProtocol == IPProtocol.udp)
    // Each bit of the offset alone makes a later fragment.
    for bit in 3..<16 {
      let field = UInt16(1) << UInt16(bit)
      let header = [17, 0, UInt8(field >> 8), UInt8(field & 0xff), 0, 0, 0, 1]
      let found = try #require(upper(44, header + udp))
      #expect(found.isFragment && found.offset == 0 && found.fragmentOffsetBytes == 1 << bit)
    }
    // The two reserved bits beside M do not make a fragment.
    let reserved = try #require(upper(44, [UInt8](hex: "11ff 0006 0000abcd") + udp))
    #expect(!reserved.isFragment && reserved.offset == 48)
  }

  @Test("a chain is followed to its limit and no further")
  func limit() throws {
    for count in 0...12 {
      let options = [UInt8](hex: "3c00 0104 0000 0000")
      var chain = (0..<count).flatMap { _ in options }
      if count > 0 { chain[(count - 1) * 8] = IPProtocol.udp }
      let found = try #require(upper(count == 0 ? IPProtocol.udp : 60, chain + [UInt8](repeating: 0, count: 8)))
      #expect(found.isWellFormed)
      if count <= IPv6UpperLayer.extensionHeadersMax {
        #expect(found.ipProtocol == IPProtocol.udp && found.offset == 40 + count * 8)
      } else {
        #expect(found.ipProtocol == IPProtocol.destinationOptions && found.offset == 0)
      }
    }
  }

  @Test("an extension header that claims more than the packet has is malformed, wherever it is cut")
  func cutOff() throws {
    let chain = [UInt8](hex: "2b00 0502 0000 0100 3c00 0000 0000 0000 0601 0000") + [UInt8](repeating: 0, count: 12)
    for count in 0..<32 {
      let found = try #require(upper(0, Array(chain.prefix(count))))
      #expect(!found.isWellFormed && found.offset == 0, "cut at \(count)")
    }
    // All headers there and nothing behind them: well-formed, but no transport.
    let whole = try #require(upper(0, chain))
    #expect(whole.isWellFormed && whole.offset == 0 && whole.ipProtocol == IPProtocol.tcp)
  }

  @Test("nothing follows No Next Header, and nothing is read behind ESP")
  func ends() throws {
    let none = try #require(upper(59, [1, 2, 3]))
    #expect(none.offset == 0 && none.ipProtocol == IPProtocol.noNextHeader && none.isWellFormed)
    let encrypted = try #require(upper(50, [UInt8](repeating: 0x3c, count: 16)))
    #expect(encrypted.offset == 40 && encrypted.ipProtocol == IPProtocol.encapsulatingSecurity)
  }
}
