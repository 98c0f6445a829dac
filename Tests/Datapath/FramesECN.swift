import Datapath
import FuzzEntry
import TestSupport
import Testing

@Suite("ECN through a tunnel")
struct FramesECN {
  /// RFC 6040 §4.2, figure 4, row by row: the inner ECN field that arrives, and for each outer one what leaves.
  static let table: [(inner: UInt8, leaving: [(outer: UInt8, ecn: UInt8?)])] = [
    (0b00, [(0b00, 0b00), (0b10, 0b00), (0b01, 0b00), (0b11, nil)]),
    (0b10, [(0b00, 0b10), (0b10, 0b10), (0b01, 0b01), (0b11, 0b11)]),
    (0b01, [(0b00, 0b01), (0b10, 0b01), (0b01, 0b01), (0b11, 0b11)]),
    (0b11, [(0b00, 0b11), (0b10, 0b11), (0b01, 0b11), (0b11, 0b11)]),
  ]

  @Test("decapsulation follows RFC 6040's table of 16, whatever the DSCPs are, and keeps the inner DSCP")
  func decapsulation() {
    for row in Self.table {
      for cell in row.leaving {
        for innerDSCP in UInt8(0)...63 {
          for outerDSCP in [UInt8(0), 46, 63] {
            let inner = innerDSCP << 2 | row.inner
            let result = ECN.decapsulate(outer: outerDSCP << 2 | cell.outer, inner: inner)
            let expected: ECN.Decapsulation =
              switch cell.ecn {
              case nil: .drop
              case row.inner: .keep
              case let ecn?: .mark(innerDSCP << 2 | ecn)
              }
            #expect(result == expected, "inner \(row.inner) outer \(cell.outer)")
          }
        }
      }
    }
  }

  @Test("encapsulation copies DSCP and ECN out")
  func encapsulation() {
    for typeOfService in UInt8.min...UInt8.max {
      #expect(ECN.encapsulate(inner: typeOfService) == typeOfService)
    }
  }

  @Test("a rewritten ToS leaves an IPv4 header whose checksum holds and where nothing else changed")
  func rewriteIPv4() throws {
    var random = SeededRandom(seed: 7)
    for _ in 0..<200 {
      let header = IPv4Header(
        headerBytes: 20 + 4 * Int(random.number(UInt8.self) % 11), typeOfService: random.number(), totalBytes: 60,
        identification: random.number(), ipProtocol: IPProtocol.udp, source: random.number(),
        destination: random.number())
      var frame = FrameMaker().ethernet(EtherType.ipv4).ipv4(header).payload(random.bytes(60 - header.headerBytes))
        .bytes
      let wanted = random.number(UInt8.self)
      var expected = header
      expected.typeOfService = wanted
      let payload = frame[(14 + header.headerBytes)...]
      #expect(frame.withMutableRawBytes { ECN.rewrite(typeOfService: wanted, in: &$0, networkOffset: 14) })
      // The same bytes as if written so at first, the checksum too.
      #expect(frame == FrameMaker().ethernet(EtherType.ipv4).ipv4(expected).payload(Array(payload)).bytes)
    }
  }

  @Test("a rewritten traffic class leaves version and flow label as they were")
  func rewriteIPv6() throws {
    let header = IPv6Header(
      trafficClass: 0xb8, flowLabel: 0xfedcb, payloadBytes: 0, nextHeader: 59, source: 1, destination: 2)
    for wanted in UInt8.min...UInt8.max {
      var frame = FrameMaker().ethernet(EtherType.ipv6).tagged(VLANTag(identifier: 5)).ipv6(header).bytes
      #expect(frame.withMutableRawBytes { ECN.rewrite(typeOfService: wanted, in: &$0, networkOffset: 18) })
      var expected = header
      expected.trafficClass = wanted
      #expect(IPv6View(frame.rawBytes.extracting(droppingFirst: 18))?.header == expected)
    }
  }

  @Test(
    "nothing is written where no whole IP header is", arguments: [-1, 0, 14, 15, 53, 54, 55, 1000, Int.max, Int.min])
  func rewriteRefused(networkOffset: Int) {
    let header = IPv6Header(payloadBytes: 0, nextHeader: 59, source: 1, destination: 2)
    // One byte too short for IPv6, and at other offsets no version at all.
    let original = Array(FrameMaker().ethernet(EtherType.ipv6).ipv6(header).bytes.dropLast())
    var frame = original
    #expect(!frame.withMutableRawBytes { ECN.rewrite(typeOfService: 3, in: &$0, networkOffset: networkOffset) })
    #expect(frame == original)
  }
}
