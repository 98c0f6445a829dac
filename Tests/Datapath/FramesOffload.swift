import Datapath
import FuzzEntry
import TestSupport
import Testing

@Suite("Offload header")
struct FramesOffload {
  @Test("12 bytes, little endian, each field at its place of virtio 1.x §5.1.6")
  func layout() throws {
    let bytes = [UInt8](hex: "01 81 4200 a805 2200 1000 0100")
    let header = try #require(bytes.read { OffloadHeader($0) })
    #expect(header.flags == 1 && header.gsoType == 0x81 && header.headerLength == 66 && header.gsoSize == 1448)
    #expect(header.checksumStart == 34 && header.checksumOffset == 16 && header.bufferCount == 1)
    #expect(header.needsChecksum && header.isSuperFrame)
    #expect(header.segmentation == .tcpv4, "the ECN bit is masked off")
    var written = [UInt8](repeating: 0xff, count: 12)
    #expect(written.withMutableRawBytes { header.write(into: &$0) } == OffloadHeader.bytes)
    #expect(written == bytes)
  }

  /// A frame as a guest with checksum offload hands it over: the pseudo-header's sum in the checksum's place.
  func unfinished(_ ipProtocol: UInt8, ipv6: Bool, payload: [UInt8]) -> (frame: [UInt8], header: OffloadHeader) {
    let transportBytes = (ipProtocol == IPProtocol.tcp ? 20 : 8) + payload.count
    let partial =
      ipv6
      ? InternetChecksum.pseudoHeader(
        source: UInt128(1), destination: UInt128(2), ipProtocol: ipProtocol, length: transportBytes)
      : InternetChecksum.pseudoHeader(
        source: UInt32(1), destination: UInt32(2), ipProtocol: ipProtocol, length: transportBytes)
    var maker = FrameMaker().ethernet(ipv6 ? EtherType.ipv6 : EtherType.ipv4)
    if ipv6 {
      maker = maker.ipv6(IPv6Header(payloadBytes: transportBytes, nextHeader: ipProtocol, source: 1, destination: 2))
    } else {
      maker = maker.ipv4(IPv4Header(totalBytes: 20 + transportBytes, ipProtocol: ipProtocol, source: 1, destination: 2))
    }
    let start = maker.bytes.count
    let sum = InternetChecksum.fold(partial)
    if ipProtocol == IPProtocol.tcp {
      maker = maker.tcp(TCPHeader(sourcePort: 40000, destinationPort: 5201, checksum: sum))
    } else {
      maker = maker.udp(
        UDPHeader(sourcePort: 40000, destinationPort: 5201, totalBytes: transportBytes, checksum: sum))
    }
    let header = OffloadHeader(
      flags: OffloadHeader.flagNeedsChecksum, checksumStart: UInt16(start),
      checksumOffset: UInt16(ipProtocol == IPProtocol.tcp ? TCPHeader.checksumOffset : UDPHeader.checksumOffset))
    return (maker.payload(payload).bytes, header)
  }

  func finish(_ header: inout OffloadHeader, _ frame: inout [UInt8]) -> Bool {
    frame.withMutableRawBytes { header.finishChecksum(in: &$0) }
  }

  @Test("a finished checksum holds for the receiver, over IPv4 and IPv6, for TCP and UDP, of odd and even length")
  func finished() {
    var random = SeededRandom(seed: 8)
    for ipProtocol in [IPProtocol.tcp, IPProtocol.udp] {
      for ipv6 in [false, true] {
        for count in [0, 1, 2, 7, 8, 99, 1400, 1447] {
          let payload = random.bytes(count)
          var (frame, header) = unfinished(ipProtocol, ipv6: ipv6, payload: payload)
          let isWellFormed = header.isWellFormed(frameBytes: frame.count)
          #expect(isWellFormed)
          let start = Int(header.checksumStart)
          let isDone = finish(&header, &frame)
          #expect(isDone && !header.needsChecksum)
          let pseudo =
            ipv6
            ? InternetChecksum.pseudoHeader(
              source: UInt128(1), destination: UInt128(2), ipProtocol: ipProtocol, length: frame.count - start)
            : InternetChecksum.pseudoHeader(
              source: UInt32(1), destination: UInt32(2), ipProtocol: ipProtocol, length: frame.count - start)
          let sum = InternetChecksum.sum(frame.rawBytes.extracting(droppingFirst: start), initial: pseudo)
          #expect(InternetChecksum.finish(sum) == 0)
          #expect(Array(frame.suffix(count)) == payload)
          // A second time, as when a flood sends one frame to several places.
          let once = frame
          let isDoneAgain = finish(&header, &frame)
          #expect(isDoneAgain && frame == once)
        }
      }
    }
  }

  @Test("a sum of zero is sent as ffff")
  func neverZero() {
    var frame = [UInt8](repeating: 0, count: 34) + [0xff, 0xff, 0, 0, 0, 0, 0, 0]
    var header = OffloadHeader(flags: 1, checksumStart: 34, checksumOffset: 6)
    let isDone = finish(&header, &frame)
    #expect(isDone && frame[40...] == [0xff, 0xff])
  }

  @Test("nothing is done, and all is well, when the header asks for nothing")
  func nothingToDo() {
    var frame = [UInt8](repeating: 7, count: 60)
    var header = OffloadHeader(flags: OffloadHeader.flagDataValid, checksumStart: 9999, checksumOffset: 9999)
    let isDone = finish(&header, &frame)
    #expect(isDone && frame == [UInt8](repeating: 7, count: 60) && header.flags == OffloadHeader.flagDataValid)
  }

  @Test("a checksum outside of the frame, or over its Ethernet and IP headers, is refused and nothing written")
  func bounds() {
    let places: [UInt16] = [0, 1, 13, 14, 33, 34, 35, 57, 58, 59, 60, 61, 1000, 0x7fff, 0xffff]
    for start in places {
      for offset in places {
        var frame = [UInt8](repeating: 7, count: 60)
        let original = frame
        var header = OffloadHeader(flags: 1, checksumStart: start, checksumOffset: offset)
        let fits = start >= 34 && Int(start) + Int(offset) + 2 <= 60
        #expect(header.isWellFormed(frameBytes: 60) == fits)
        let isDone = finish(&header, &frame)
        #expect(isDone == fits, "start \(start) offset \(offset)")
        #expect((frame == original) == !fits)
        #expect(header.needsChecksum == !fits)
      }
    }
  }

  @Test("a super-frame needs a known type, a size, a checksum and something to cut")
  func segmentation() {
    let good = OffloadHeader(
      flags: 1, gsoType: 1, headerLength: 54, gsoSize: 1448, checksumStart: 34, checksumOffset: 16)
    func isWellFormed(_ frameBytes: Int = 3000, _ change: (inout OffloadHeader) -> Void = { _ in }) -> Bool {
      var header = good
      change(&header)
      return header.isWellFormed(frameBytes: frameBytes)
    }
    #expect(isWellFormed())
    #expect(isWellFormed { $0.gsoType = 0x81 } && isWellFormed { $0.gsoType = 4 } && isWellFormed { $0.gsoType = 0x84 })
    #expect(isWellFormed { $0.gsoType = 5 })
    #expect(isWellFormed { $0.gsoType = 0 })
    for gsoType in UInt8.min...UInt8.max where ![0, 1, 4, 5, 0x81, 0x84].contains(gsoType) {
      #expect(!isWellFormed { $0.gsoType = gsoType }, "type \(gsoType)")
    }
    #expect(!isWellFormed { $0.gsoSize = 0 })
    #expect(!isWellFormed { $0.flags = 0 })
    #expect(!isWellFormed(54) && isWellFormed(55), "headers alone are nothing to cut")
    // What the guest says of the headers' length is not asked.
    #expect(isWellFormed { $0.headerLength = 0xffff })
  }
}
