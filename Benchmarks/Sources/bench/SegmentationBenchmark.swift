import CBench
import Datapath

/// A 64 KiB TSO super-frame cut into its segments, headers with finished checksums, and the segments joined again, each
/// checksum verified. Payloads stay where they lie.
func benchmarkSegmentation(_ report: Report) {
  let payloadBytes = 1_448
  let segments = 45
  let headerBytes = 14 + 20 + 32
  let frame = superFrame(segments: segments, payloadBytes: payloadBytes)
  let offload = OffloadHeader(
    flags: OffloadHeader.flagNeedsChecksum, gsoType: OffloadHeader.Segmentation.tcpv4.rawValue,
    headerLength: UInt16(headerBytes), gsoSize: UInt16(payloadBytes), checksumStart: 34, checksumOffset: 16)
  var room = FixedArray<UInt64>(repeating: 0, count: segments * 256 / 8)
  var wrong = 0
  report.table("segmentation of a super-frame of \(frame.count) bytes", item: "super-frame") { table in
    table.measure("looked at only", items: 5_000_000, bytes: frame.count) { items in
      for _ in 0..<items {
        if SuperFrame(unsafe frame.span.bytes, offload)?.segmentCount != segments { wrong += 1 }
      }
    }
    table.measure(
      "\(segments) segments of \(payloadBytes) bytes of payload, checksums finished", items: 100_000, bytes: frame.count
    ) { items in
      for _ in 0..<items {
        guard let whole = SuperFrame(unsafe frame.span.bytes, offload), whole.segmentCount == segments else {
          wrong += 1
          continue
        }
        var words = room.mutableSpan(count: room.count)
        var headers = unsafe words.mutableBytes
        for number in 0..<segments {
          let end = whole.writeHeaders(ofSegment: number, of: unsafe frame.span.bytes, into: &headers, at: number * 256)
          if end != number * 256 + headerBytes { wrong += 1 }
        }
      }
    }
  }
  report.check(wrong == 0, "segmentation: every super-frame is cut into \(segments) segments")

  // The segments, one behind the other, as a train brings them.
  var train: [UInt8] = []
  for number in 0..<segments {
    for place in 0..<headerBytes {
      let word = room[(number * 256 + place) / 8]
      train.append(UInt8(truncatingIfNeeded: word >> UInt64(place % 8 * 8)))
    }
    train += frame[headerBytes + number * payloadBytes..<headerBytes + (number + 1) * payloadBytes]
  }
  let stride = headerBytes + payloadBytes
  func segment(_ number: Int) -> Range<Int> { number * stride..<(number + 1) * stride }

  // What the receiver would check.
  for number in 0..<segments {
    let bytes = unsafe train.span.bytes.extracting(segment(number))
    let network = InternetChecksum.finish(InternetChecksum.sum(bytes.extracting(14..<34)))
    let pseudoHeader = InternetChecksum.pseudoHeader(
      source: UInt32(0x0A00_0001), destination: 0x0A00_0002, ipProtocol: 6, length: stride - 34)
    let transport = InternetChecksum.finish(
      InternetChecksum.sum(bytes.extracting(34..<stride), initial: pseudoHeader))
    report.check(network == 0 && transport == 0, "segmentation: the checksums of segment \(number)")
  }

  var headers = FixedArray<UInt64>(repeating: 0, count: 256 / 8)
  report.table("coalescing of \(segments) segments to a super-frame of \(frame.count) bytes", item: "super-frame") {
    table in
    table.measure("checksums verified, headers written", items: 100_000, bytes: frame.count) { items in
      for _ in 0..<items {
        let bytes = unsafe train.span.bytes
        let first = bytes.extracting(segment(0))
        guard var whole = Coalescer(first) else {
          wrong += 1
          continue
        }
        for number in 1..<segments { if !whole.join(first, bytes.extracting(segment(number))) { wrong += 1 } }
        var words = headers.mutableSpan(count: headers.count)
        var room = unsafe words.mutableBytes
        let end = whole.writeHeaders(first, into: &room)
        if whole.offload != offload || end != headerBytes || whole.frameBytes != frame.count { wrong += 1 }
      }
    }
  }
  report.check(wrong == 0, "coalescing: every train becomes one super-frame")
  let isWhole = (0..<headerBytes).allSatisfy { place in
    UInt8(truncatingIfNeeded: headers[place / 8] >> UInt64(place % 8 * 8)) == frame[place]
  }
  report.check(isWhole, "coalescing: the headers are those that were cut")
}

/// Ethernet, IPv4, TCP with timestamps, the pseudo-header's sum in the checksum's place.
private func superFrame(segments: Int, payloadBytes: Int) -> [UInt8] {
  let payload = segments * payloadBytes
  let total = 20 + 32 + payload
  var bytes: [UInt8] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x00]
  bytes += [0x45, 0, UInt8(total >> 8), UInt8(total & 0xFF), 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]
  let networkSum = InternetChecksum.finish(InternetChecksum.sum(unsafe bytes.span.bytes.extracting(14..<34)))
  bytes[24] = UInt8(networkSum >> 8)
  bytes[25] = UInt8(networkSum & 0xFF)
  bytes += [0x9C, 0x40, 0x14, 0x51, 0, 0, 0, 1, 0, 0, 0, 2, 0x80, 0x10, 0x01, 0xF5]
  let sum = InternetChecksum.fold(
    InternetChecksum.pseudoHeader(
      source: UInt32(0x0A00_0001), destination: 0x0A00_0002, ipProtocol: 6, length: total - 20))
  bytes += [UInt8(sum >> 8), UInt8(sum & 0xFF), 0, 0]
  bytes += [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]
  for place in 0..<payload { bytes.append(UInt8(truncatingIfNeeded: place &* 7)) }
  return bytes
}
