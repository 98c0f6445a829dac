import Datapath

/// An offload header and the frame behind it: the first 12 bytes and the rest, as a guest's would come.
public func fuzzOffload(_ input: RawSpan) {
  guard let header = OffloadHeader(input) else {
    precondition(input.byteCount < OffloadHeader.bytes)
    return
  }
  var written = [UInt8](repeating: 0, count: OffloadHeader.bytes)
  let end = written.withMutableRawBytes { header.write(into: &$0) }
  precondition(end == OffloadHeader.bytes)
  precondition(equal(written.rawBytes, input.extracting(first: OffloadHeader.bytes)), "read and written is the same")

  let frame = input.extracting(droppingFirst: OffloadHeader.bytes)
  let isWellFormed = header.isWellFormed(frameBytes: frame.byteCount)
  if isWellFormed { precondition(header.segmentation != nil && header.segmentation != .udpFragments) }
  let original = bytes(of: frame)
  var copy = original
  var finished = header
  guard finish(&finished, &copy) else {
    precondition(header.needsChecksum && !isWellFormed, "refused is malformed")
    precondition(copy == original && finished == header, "what is refused is not touched")
    return
  }
  precondition(!finished.needsChecksum)
  guard header.needsChecksum else {
    precondition(copy == original && finished == header)
    return
  }
  let start = Int(header.checksumStart)
  let field = start + Int(header.checksumOffset)
  for index in copy.indices where copy[index] != original[index] {
    precondition(index == field || index == field + 1, "only the checksum is written")
  }
  precondition(copy[field] != 0 || copy[field + 1] != 0, "zero would mean none")
  let sum = referenceSum(original.rawBytes.extracting(droppingFirst: start))
  let checksum = UInt16(copy[field]) << 8 | UInt16(copy[field + 1])
  precondition(checksum == ~sum || checksum == 0xffff && sum == 0xffff)
  let once = copy
  precondition(finish(&finished, &copy) && copy == once, "a second time does nothing")
}

private func finish(_ header: inout OffloadHeader, _ frame: inout [UInt8]) -> Bool {
  frame.withMutableRawBytes { header.finishChecksum(in: &$0) }
}
