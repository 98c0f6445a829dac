import Datapath
import FuzzEntry
import TestSupport
import Testing

@Suite("Internet checksum")
struct FramesChecksum {
  @Test("RFC 1071 §3: the example sums up to ddf2")
  func rfc1071() {
    let bytes: [UInt8] = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]
    let sum = InternetChecksum.sum(bytes.rawBytes)
    #expect(InternetChecksum.fold(sum) == 0xddf2)
    #expect(InternetChecksum.finish(sum) == 0x220d)
  }

  @Test("RFC 1624 §4: the example's update gives 0000, where RFC 1141's equation gave ffff")
  func rfc1624() {
    #expect(InternetChecksum.update(0xdd2f, from: 0x5555, to: 0x3285) == 0x0000)
  }

  @Test("no bytes sum up to zero, and an odd last byte counts as padded with a zero byte")
  func edges() {
    let bytes: [UInt8] = [0xab, 0xcd, 0xef]
    #expect(InternetChecksum.sum(bytes.rawBytes.extracting(first: 0)) == 0)
    #expect(InternetChecksum.fold(InternetChecksum.sum(bytes.rawBytes.extracting(first: 1))) == 0xab00)
    #expect(InternetChecksum.fold(InternetChecksum.sum(bytes.rawBytes)) == UInt16(0xabcd + 0xef00 - 0xffff))
  }

  @Test("any length and alignment sums up as RFC 1071 written down plainly does")
  func againstReference() {
    var random = SeededRandom(seed: 3)
    for length in 0...300 {
      let bytes = random.bytes(length + 8)
      for start in 0..<8 {
        let part = bytes[start..<start + length]
        let sum = InternetChecksum.sum(bytes.rawBytes.extracting(start..<start + length))
        #expect(InternetChecksum.fold(sum) == reference(part), "\(length) bytes from \(start)")
      }
    }
  }

  @Test("64 KiB of ones, and of everything, do not overflow")
  func long() {
    let ones = [UInt8](repeating: 0xff, count: 65_535)
    #expect(InternetChecksum.fold(InternetChecksum.sum(ones.rawBytes)) == reference(ones[...]))
    #expect(InternetChecksum.fold(InternetChecksum.sum(ones.rawBytes, initial: 1 << 40)) != 0)
    var random = SeededRandom(seed: 4)
    let bytes = random.bytes(65_536)
    #expect(InternetChecksum.fold(InternetChecksum.sum(bytes.rawBytes)) == reference(bytes[...]))
    #expect(InternetChecksum.fold(UInt64.max) == 0xffff)
  }

  @Test("what is longer than any frame, and the extremes of vector code's lanes, sum up right")
  func extremes() {
    // Around what one call of the vector code takes, 1 MiB.
    for length in [1 << 20, (1 << 20) + 47] {
      for byte: UInt8 in [0x00, 0xff] {
        let bytes = [UInt8](repeating: byte, count: length)
        let sum = InternetChecksum.fold(InternetChecksum.sum(bytes.rawBytes))
        #expect(sum == reference(bytes[...]), "\(length) bytes of \(byte)")
      }
    }
  }

  @Test("pseudo-headers sum up as their bytes do, for addresses and lengths of all kinds")
  func pseudoHeaders() {
    var random = SeededRandom(seed: 5)
    for _ in 0..<500 {
      let ipProtocol = random.number(UInt8.self)
      let length = Int(random.number(UInt16.self))
      let lengthBytes = [UInt8(length >> 8), UInt8(length & 0xff)]
      let (source4, destination4) = (random.number(UInt32.self), random.number(UInt32.self))
      let bytes4 = wire(source4) + wire(destination4) + [0, ipProtocol] + lengthBytes
      let sum4 = InternetChecksum.pseudoHeader(
        source: source4, destination: destination4, ipProtocol: ipProtocol, length: length)
      #expect(InternetChecksum.fold(sum4) == reference(bytes4[...]))
      let (source6, destination6) = (random.number(UInt128.self), random.number(UInt128.self))
      let bytes6 = wire(source6) + wire(destination6) + [0, 0] + lengthBytes + [0, 0, 0, ipProtocol]
      let sum6 = InternetChecksum.pseudoHeader(
        source: source6, destination: destination6, ipProtocol: ipProtocol, length: length)
      #expect(InternetChecksum.fold(sum6) == reference(bytes6[...]))
    }
  }

  @Test("a real TCP segment's and a UDP datagram's checksum hold with their pseudo-headers, and break with a bit")
  func transport() throws {
    for name in ["ipv4-tcp", "ipv4-udp", "vlan-ipv4-udp"] {
      var frame = try FramesCorpus.bytes("frames", name)
      let start = try #require(frame.parsed).networkOffset
      #expect(try transportChecksum(frame, start) == 0, "\(name)")
      frame[frame.count - 1] ^= 1
      #expect(try transportChecksum(frame, start) != 0, "\(name)")
    }
  }

  func transportChecksum(_ frame: [UInt8], _ start: Int) throws -> UInt16 {
    let checksum = frame.read { frame -> UInt16? in
      guard let view = IPv4View(frame.extracting(droppingFirst: start)) else { return nil }
      return InternetChecksum.finish(InternetChecksum.sum(view.payload, initial: view.pseudoHeaderSum))
    }
    return try #require(checksum)
  }

  @Test("an updated checksum is the recomputed one, for every word of random IPv4 headers")
  func update() {
    var random = SeededRandom(seed: 6)
    for _ in 0..<300 {
      var header = random.bytes(20)
      header[0] = 0x45
      (header[10], header[11]) = (0, 0)
      let before = InternetChecksum.finish(InternetChecksum.sum(header.rawBytes))
      for index in stride(from: 2, to: 20, by: 2) where index != 10 {
        var changed = header
        let new = random.number(UInt16.self)
        (changed[index], changed[index + 1]) = (UInt8(new >> 8), UInt8(new & 0xff))
        let old = UInt16(header[index]) << 8 | UInt16(header[index + 1])
        let recomputed = InternetChecksum.finish(InternetChecksum.sum(changed.rawBytes))
        #expect(InternetChecksum.update(before, from: old, to: new) == recomputed)
      }
    }
  }

  @Test("the checksum of a datagram is never zero, which would mean none")
  func neverZero() {
    #expect(InternetChecksum.finish(0xffff) == 0)
    #expect(InternetChecksum.finishTransport(0xffff) == 0xffff)
    #expect(InternetChecksum.finishTransport(0x1234) == ~0x1234)
  }

  func wire<Number: FixedWidthInteger>(_ number: Number) -> [UInt8] {
    stride(from: Number.bitWidth - 8, through: 0, by: -8).map { UInt8(truncatingIfNeeded: number >> Number($0)) }
  }

  func reference(_ bytes: ArraySlice<UInt8>) -> UInt16 {
    var sum = 0
    for (index, byte) in bytes.enumerated() { sum += index % 2 == 0 ? Int(byte) << 8 : Int(byte) }
    while sum > 0xffff { sum = (sum & 0xffff) + sum >> 16 }
    return UInt16(sum)
  }
}
