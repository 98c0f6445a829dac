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
  checkSegments(frame, header, isWellFormed: isWellFormed)
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

/// Segments of what can be cut are frames, of the whole's flow, with right lengths and checksums; their payloads are
/// the whole's, each byte once.
private func checkSegments(_ frame: RawSpan, _ header: OffloadHeader, isWellFormed: Bool) {
  guard let whole = SuperFrame(frame, header) else { return }
  precondition(isWellFormed && header.isSuperFrame)
  precondition(whole.segmentCount >= 1 && whole.segmentCount <= SuperFrame.segmentsMaxTCP)
  precondition(whole.headerBytes <= SuperFrame.headerBytesMax && whole.segmentPayloadBytes <= Int(header.gsoSize))
  let copied = SuperFrame(
    headers: frame.extracting(first: whole.headerBytes), frameBytes: frame.byteCount, header)
  precondition(copied == whole, "a copy of the headers is enough")
  guard let parsed = ParsedFrame(frame) else { preconditionFailure("what is cut is a frame") }
  let transport = parsed.transportOffset
  let isTCP = parsed.ipProtocol == IPProtocol.tcp
  let checksum = transport + (isTCP ? TCPHeader.checksumOffset : UDPHeader.checksumOffset)
  let wholeBytes =
    isTCP ? frame.byteCount - transport : Int(byte(transport + 4, of: frame)) << 8 | Int(byte(transport + 5, of: frame))
  let original = bytes(of: frame)
  var end = whole.headerBytes
  for number in 0..<whole.segmentCount {
    precondition(whole.payloadOffset(ofSegment: number) == end, "no gap and no overlap")
    let payloadBytes = whole.payloadBytes(ofSegment: number)
    precondition(payloadBytes > 0 && payloadBytes <= whole.segmentPayloadBytes)
    var headers = [UInt8](repeating: 0, count: whole.headerBytes)
    let written = headers.withMutableRawBytes { whole.writeHeaders(ofSegment: number, of: frame, into: &$0) }
    precondition(written == whole.headerBytes)
    let segment = headers + original[end..<end + payloadBytes]
    end += payloadBytes
    precondition(segment.count <= whole.segmentBytesMax)
    guard let cut = ParsedFrame(segment.rawBytes) else { preconditionFailure("a segment is a frame") }
    precondition(cut.networkLengthValid && cut.transportOffset == transport && cut.flowHash == parsed.flowHash)
    precondition(cut.networkOffset + cut.networkBytes == segment.count)
    if parsed.ipVersion == 4 {
      let packet = IPv4View(segment.rawBytes.extracting(droppingFirst: parsed.networkOffset))
      precondition(packet?.isChecksumValid == true)
    }
    // With the pseudo-header's sum as the guest made it, for this length, all is ones.
    let sums = [
      Int(referenceSum(segment.rawBytes.extracting(droppingFirst: transport))),
      Int(original[checksum]) << 8 | Int(original[checksum + 1]), ~wholeBytes & 0xffff, segment.count - transport,
    ]
    precondition(sums.reduce(0, +) % 0xffff == 0, "the transport's checksum is right")
  }
  precondition(end == frame.byteCount)
}
