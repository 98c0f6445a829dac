import CBench
import Datapath

/// The Internet checksum, over what one frame, one full Ethernet frame and one super-frame have, beside DPDK's.
func benchmarkChecksum(_ report: Report) {
  var random = BenchmarkRandom(seed: 3)
  if !report.hasDPDK { report.skip("checksum beside rte_raw_cksum", dpdkIsMissing) }
  for (bytes, items) in [(20, 40_000_000), (64, 20_000_000), (1_400, 4_000_000), (65_536, 100_000)] {
    let buffer = (0..<bytes).map { _ in UInt8(truncatingIfNeeded: random.next() >> 32) }
    let expected = plainChecksum(buffer)
    var wrong = 0
    report.table("Internet checksum of \(bytes) bytes", item: "buffer") { table in
      if report.hasDPDK {
        table.measure("rte_raw_cksum", items: items, bytes: bytes) { items in
          unsafe buffer.withUnsafeBytes { buffer in
            for item in 0..<items {
              let sum = UInt32(unsafe cbench_rte_raw_cksum(buffer.baseAddress, bytes)) + (item & 1 == 0 ? 0 : 0xFFFF)
              if ~UInt16(bigEndian: InternetChecksum.fold(UInt64(sum))) != expected { wrong += 1 }
            }
          }
        }
      }
      table.measure("InternetChecksum", items: items, bytes: bytes) { items in
        for item in 0..<items {
          // An initial sum that changes and adds nothing: 0xffff is the other zero.
          let initial: UInt64 = item & 1 == 0 ? 0 : 0xFFFF
          let sum = InternetChecksum.sum(unsafe buffer.span.bytes, initial: initial)
          if InternetChecksum.finish(sum) != expected { wrong += 1 }
        }
      }
    }
    report.check(wrong == 0, "checksum: \(bytes) bytes sum as word by word")
    // A start and a length of any kind.
    for start in 0..<9 {
      for cut in 0..<9 where start + cut <= bytes {
        let part = Array(buffer[start..<bytes - cut])
        let sum = InternetChecksum.sum(unsafe buffer.span.bytes.extracting(start..<bytes - cut))
        report.check(InternetChecksum.finish(sum) == plainChecksum(part), "checksum: bytes \(start) to \(bytes - cut)")
      }
    }
  }
}

let dpdkIsMissing = "DPDK is not installed: tools/setup --bench"

/// RFC 1071 section 4.1, word by word.
private func plainChecksum(_ bytes: [UInt8]) -> UInt16 {
  var sum: UInt64 = 0
  for place in stride(from: 0, to: bytes.count, by: 2) {
    sum += UInt64(bytes[place]) << 8 | (place + 1 < bytes.count ? UInt64(bytes[place + 1]) : 0)
  }
  while sum > 0xFFFF { sum = sum & 0xFFFF + sum >> 16 }
  return ~UInt16(sum)
}
