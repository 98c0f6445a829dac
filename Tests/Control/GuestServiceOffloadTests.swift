import Glibc
import Synchronization
import TestSupport
import Testing

@testable import Control

extension GuestServiceTests {
  /// A guest's TCP segment, longer than what is copied of it at once, with the header that says what is left to do.
  private enum Segment {
    static let headerBytes = 54
    static let payloadBytes = 1_200
    static let checksumPlace = 50

    /// Its checksum is still to be made: there is the sum of the pseudo-header only.
    static func frame(from sender: SharedGuest, to receiver: SharedGuest, _ number: UInt32) -> [UInt8] {
      func big(_ value: some FixedWidthInteger, _ count: Int) -> [UInt8] {
        (0..<count).map { UInt8(truncatingIfNeeded: value >> (8 * (count - 1 - $0))) }
      }
      let addresses: [UInt8] = [10, 0, 0, UInt8(truncatingIfNeeded: sender.mac), 10, 0, 0, 9]
      let tcpBytes = headerBytes - 34 + payloadBytes
      var ip: [UInt8] = [0x45, 0] + big(20 + tcpBytes, 2) + big(number, 2) + [0x40, 0, 64, 6, 0, 0] + addresses
      ip.replaceSubrange(10..<12, with: big(~sum(ip[...]), 2))
      let pseudoSum = sum((addresses + [0, 6] + big(tcpBytes, 2))[...])
      let tcp = [0x03, 0xE8, 0x07, 0xD0] + big(number << 16, 4) + [0, 0, 0, 0, 0x50, 0x18, 0xFF, 0xFF]
      let payload = (0..<payloadBytes).map { byte(number, at: $0) }
      let ethernet = big(receiver.mac, 6) + big(sender.mac, 6) + [0x08, 0x00]
      return ethernet + ip + tcp + big(pseudoSum, 2) + [0, 0] + payload
    }

    static func byte(_ number: UInt32, at place: Int) -> UInt8 {
      UInt8(truncatingIfNeeded: place &* 3 &+ Int(number))
    }

    /// The ones' complement sum of words (RFC 1071).
    static func sum(_ bytes: ArraySlice<UInt8>) -> UInt16 {
      var sum = 0
      for (number, byte) in bytes.enumerated() { sum += number % 2 == 0 ? Int(byte) << 8 : Int(byte) }
      while sum > 0xFFFF { sum = sum & 0xFFFF + sum >> 16 }
      return UInt16(sum)
    }

    static func hasGoodChecksum(_ frame: [UInt8]) -> Bool {
      let tcp = frame[34...]
      let pseudo = Array(frame[26..<34]) + [0, 6, UInt8(tcp.count >> 8), UInt8(tcp.count & 0xFF)]
      return sum((pseudo + tcp)[...]) == 0xFFFF
    }
  }

  /// The first ten bytes of a virtio header (virtio 1.2 §5.1.6).
  private struct Asked {
    var flags: UInt8 = 0
    var type: UInt8 = 0
    var headerBytes: UInt16 = 0
    var segmentBytes: UInt16 = 0
    var start: UInt16 = 0
    var offset: UInt16 = 0

    var first: UInt64 {
      UInt64(flags) | UInt64(type) << 8 | UInt64(headerBytes) << 16 | UInt64(segmentBytes) << 32 | UInt64(start) << 48
    }
    var bytes: [UInt8] { first.littleEndianBytes + offset.littleEndianBytes }

    static let superFrames = [300, 400].map {
      Asked(flags: 1, type: 1, headerBytes: 54, segmentBytes: $0, start: 34, offset: 16)
    }
    /// What makes sense, and what does not: another protocol, no length, a checksum in the addresses or outside.
    static let all =
      superFrames + [
        Asked(), Asked(flags: 1, start: 34, offset: 16),
        Asked(flags: 1, type: 5, headerBytes: 54, segmentBytes: 400, start: 34, offset: 16),
        Asked(flags: 1, type: 1, headerBytes: 54, start: 34, offset: 16),
        Asked(flags: 0, type: 1, headerBytes: 54, segmentBytes: 400, start: 34, offset: 16),
        Asked(flags: 1, start: 4, offset: 2), Asked(flags: 1, start: 0xFFFF, offset: 0xFFFF),
        Asked(flags: 0xFF, type: 0xFF, headerBytes: 0xFFFF, segmentBytes: 1, start: 0xFFFF, offset: 0xFFFF),
      ]
  }

  @safe
  private struct Scribbled: @unchecked Sendable { let memory: UnsafeMutableRawPointer }

  /// Writes one of all headers over the one at `place` as long as it runs.
  private static func scribbler(_ liar: SharedGuest, _ place: Place) -> TestThread {
    let memory = unsafe Scribbled(memory: liar.card.memory)
    let words = Asked.all.map { ($0.first, $0.offset) }
    return TestThread {
      var random = SeededRandom(seed: 11)
      while !place.isOver.load(ordering: .relaxed) {
        let offset = place.offset.load(ordering: .acquiring)
        guard offset >= 0 else { continue }
        let (first, second) = words[Int(random.next() % UInt64(words.count))]
        unsafe memory.memory.storeBytes(of: first, toByteOffset: offset, as: UInt64.self)
        unsafe memory.memory.storeBytes(of: second, toByteOffset: offset + 8, as: UInt16.self)
      }
    }
  }

  private final class Place: Sendable {
    let offset = Atomic<Int>(-1)
    let isOver = Atomic<Bool>(false)
  }

  /// What came of the liar's frames to one guest.
  private struct Arrivals {
    /// By number, the pieces of its payload as they came.
    var pieces: [UInt32: [Range<Int>]] = [:]
    var wholeSuperFrames = 0
    var cutFrames = 0

    mutating func take(_ header: [UInt8], _ frame: [UInt8], takesSuperFrames: Bool) {
      #expect(header[10] == 1 && header[11] == 0, "each frame fits one buffer")
      guard frame.count > Segment.headerBytes else {
        Issue.record("a frame of \(frame.count) bytes")
        return
      }
      let sequence = frame[38..<42].reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
      let (number, offset) = (sequence >> 16, Int(sequence & 0xFFFF))
      let payload = frame[Segment.headerBytes...]
      let isRight = payload.enumerated().allSatisfy { $1 == Segment.byte(number, at: offset + $0) }
      #expect(isRight, "bytes \(offset) on of frame \(number) are others")
      pieces[number, default: []].append(offset..<offset + payload.count)
      if header[1] != 0 {
        // What was judged is what is told.
        let isOneOfThem = Asked.superFrames.contains { $0.bytes == Array(header[..<10]) }
        #expect(takesSuperFrames && isOneOfThem, "\(header)")
        wholeSuperFrames += 1
        return
      }
      #expect(header[0] & 1 == 0, "a checksum is left to a guest that makes none: \(header)")
      guard payload.count < Segment.payloadBytes else { return }
      cutFrames += 1
      #expect(Segment.hasGoodChecksum(frame))
    }

    /// Each frame came as it was, or cut into equal pieces, all of them, in their order.
    func expectWholeFrames() {
      for (number, pieces) in pieces {
        let bytes = pieces[0].count
        let starts = Array(stride(from: 0, to: Segment.payloadBytes, by: bytes))
        let isWhole =
          [300, 400, Segment.payloadBytes].contains(bytes) && pieces.map(\.lowerBound) == starts
          && pieces.allSatisfy { $0.count == bytes }
        #expect(isWhole, "frame \(number) came as \(pieces)")
      }
    }
  }

  @Test(
    "a guest that rewrites what its frames ask for while they are under way: each is what the copy of it says",
    arguments: layouts[..<2], [1, 3])
  func rewrittenOffloads(layout: [String], pieces: Int) throws {
    let ports = ["plain", "super", "liar"]
    let service = try ServiceProcess(ports: ports, flags: layout + ["--dispatch", "vmm-driven"])
    let offloads: VhostUserFeatures = [
      .checksum, .hostTSO4, .hostTSO6, .guestChecksum, .guestTSO4, .guestTSO6,
    ]
    let guests = ports.enumerated().map { number, port in
      SharedGuest(
        "guest-offloads-\(port)", mac: 0x0200_0000_0001 + UInt64(number), piecesMax: port == "liar" ? pieces : 1,
        features: number == 0 ? SharedGuest.features : SharedGuest.features.union(offloads))
    }
    try connect(guests, to: service, ports)
    let liar = guests[2]
    let place = Place()
    let scribbler = Self.scribbler(liar, place)
    var arrivals = [Arrivals(), Arrivals()]
    func takeAll() {
      for number in arrivals.indices {
        while let (header, frame) = guests[number].card.received() {
          arrivals[number].take(header, frame, takesSuperFrames: number == 1)
        }
        guests[number].offerBuffers()
      }
    }
    var sent: UInt32 = 0
    let frames: UInt32 = 6_000
    let isDone = eventually(seconds: 60) {
      if sent < frames,
        let start = liar.card.send(Segment.frame(from: liar, to: guests[Int(sent % 2)], sent))
      {
        place.offset.store(start, ordering: .releasing)
        sent += 1
        if liar.card.wantsKicks(liar.card.send) { liar.kick(1) }
      }
      takeAll()
      liar.card.reapSent()
      return sent == frames && liar.card.send.out == 0
    }
    place.isOver.store(true, ordering: .relaxed)
    scribbler.join()
    #expect(isDone, "\(sent) sent, \(liar.card.send.out) out")
    #expect(try service.counters().contains("drop_bad_offload"), "no header was found to make no sense")
    #expect(service.log.contains("makes no sense") == false, "a header is no ring")
    try expectGoodEnd(service)
    takeAll()
    for arrival in arrivals {
      arrival.expectWholeFrames()
      #expect(arrival.pieces.count > 100)
    }
    #expect(arrivals[0].cutFrames > 10 && arrivals[0].wholeSuperFrames == 0, "\(arrivals[0].cutFrames)")
    #expect(arrivals[1].wholeSuperFrames > 10 && arrivals[1].cutFrames == 0, "\(arrivals[1].wholeSuperFrames)")
  }
}
