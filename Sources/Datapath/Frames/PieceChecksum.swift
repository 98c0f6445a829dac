import CLinux

extension FrameMemory {
  /// Finishes the checksum of a frame, wherever its bytes are: see `OffloadHeader.finishChecksum(in:)`.
  @inline(__always)
  mutating func finishChecksum(_ header: inout OffloadHeader, of descriptor: Descriptor) -> Bool {
    if descriptor.segments > 1 { return finishChecksumOfPieces(&header, of: descriptor) }
    var frame = mutableHead(of: descriptor)
    return header.finishChecksum(in: &frame)
  }

  /// The checksum itself must lie in the first segment, our copy of the headers.
  @inline(never)
  private mutating func finishChecksumOfPieces(_ header: inout OffloadHeader, of descriptor: Descriptor) -> Bool {
    guard header.needsChecksum else { return true }
    let start = Int(header.checksumStart)
    let place = start + Int(header.checksumOffset)
    guard header.checksumFits(frameBytes: Int(descriptor.length)), place + 2 <= head(of: descriptor).byteCount else {
      return false
    }
    let sum = sum(of: descriptor, from: start)
    var head = mutableHead(of: descriptor)
    header.storeChecksum(sum, in: &head)
    return true
  }

  /// The Internet checksum's sum over a frame in several segments, from an offset to its end.
  private func sum(of descriptor: Descriptor, from start: Int) -> UInt64 {
    var sum: UInt64 = 0
    var skip = Int(descriptor.offset) + start
    var left = Int(descriptor.length) - start
    var isOdd = false
    for number in 0..<Int(descriptor.segments) where left > 0 {
      let segment = unsafe segment(number, of: descriptor.buffer)
      guard unsafe skip < segment.iov_len else {
        skip -= unsafe segment.iov_len
        continue
      }
      let count = unsafe min(left, segment.iov_len - skip)
      let bytes = unsafe RawSpan(_unsafeStart: segment.iov_base + skip, byteCount: count)
      let part = InternetChecksum.fold(InternetChecksum.sum(bytes))
      // Behind an odd number of bytes each is the other half of its word (RFC 1071 §2 (B)).
      sum &+= UInt64(isOdd ? part.byteSwapped : part)
      if count % 2 != 0 { isOdd.toggle() }
      left -= count
      skip = 0
    }
    return sum
  }
}
