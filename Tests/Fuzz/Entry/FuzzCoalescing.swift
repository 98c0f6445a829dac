import Datapath

/// A train of frames: a byte of flags, two of stride, then frames of so many bytes each, the last perhaps shorter.
/// Bit 0 of the flags has all checksums put right first, which no fuzzer would hit upon.
public func fuzzCoalescing(_ input: RawSpan) {
  guard input.byteCount > 3 else { return }
  let repairs = byte(0, of: input) & 1 != 0
  let stride = Int(byte(1, of: input)) << 8 | Int(byte(2, of: input))
  guard stride > 0 else { return }
  var run: [[UInt8]] = []
  var coalescer: Coalescer?
  for start in Swift.stride(from: 3, to: input.byteCount, by: stride) {
    var frame = bytes(of: input.extracting(start..<min(start + stride, input.byteCount)))
    if repairs { repairChecksums(of: &frame) }
    if var joining = coalescer {
      let before = joining
      let first = run[0]
      if joining.join(first.rawBytes, frame.rawBytes) {
        precondition(!before.isComplete && joining.frameCount == before.frameCount + 1)
        coalescer = joining
        run.append(frame)
        continue
      }
      precondition(joining == before, "what is refused changes nothing")
      checkRun(joining, run)
    }
    coalescer = Coalescer(frame.rawBytes)
    run = [frame]
  }
  if let coalescer { checkRun(coalescer, run) }
}

/// Frames that were joined come out again when the whole is cut, and when a single one's checksum is finished.
private func checkRun(_ coalescer: Coalescer, _ run: [[UInt8]]) {
  let expected = withCountedIdentifications(run)
  precondition(coalescer.frameCount == run.count && coalescer.headerBytes <= SuperFrame.headerBytesMax)
  let payload = run.flatMap { $0[coalescer.headerBytes...] }
  precondition(coalescer.payloadBytes == payload.count)
  var whole = [UInt8](repeating: 0xee, count: coalescer.headerBytes)
  let firstHeaders = Array(run[0][..<coalescer.headerBytes])
  let end = whole.withMutableRawBytes { coalescer.writeHeaders(firstHeaders.rawBytes, into: &$0) }
  precondition(end == whole.count)
  whole += payload
  precondition(whole.count == coalescer.frameBytes)
  var offload = coalescer.offload
  precondition(offload.isWellFormed(frameBytes: whole.count) && Int(offload.headerLength) == end)
  guard run.count > 1 else {
    precondition(!offload.isSuperFrame)
    let isFinished = whole.withMutableRawBytes { offload.finishChecksum(in: &$0) }
    precondition(isFinished && whole == run[0], "a frame alone comes out as it was")
    return
  }
  guard let cut = SuperFrame(whole.rawBytes, offload) else { preconditionFailure("the whole can be cut") }
  precondition(cut.segmentCount == run.count && cut.headerBytes == end)
  for (number, frame) in expected.enumerated() {
    var segment = [UInt8](repeating: 0, count: end)
    _ = segment.withMutableRawBytes { cut.writeHeaders(ofSegment: number, of: whole.rawBytes, into: &$0) }
    let start = cut.payloadOffset(ofSegment: number)
    segment += whole[start..<start + cut.payloadBytes(ofSegment: number)]
    precondition(segment == frame, "each frame comes out as it was")
  }
}

/// UDP datagrams over IPv4 with DF come out with identifications that count up; all others as they are.
private func withCountedIdentifications(_ run: [[UInt8]]) -> [[UInt8]] {
  let first = run[0]
  guard run.count > 1, let parsed = ParsedFrame(first.rawBytes), parsed.ipVersion == 4,
    parsed.ipProtocol == IPProtocol.udp
  else { return run }
  let place = parsed.networkOffset + 4
  guard run[0][place + 2] & 0x40 != 0 else { return run }
  return run.enumerated().map { number, frame in
    var frame = frame
    let identification = (Int(run[0][place]) << 8 | Int(run[0][place + 1])) + number
    frame[place] = UInt8(identification >> 8 & 0xff)
    frame[place + 1] = UInt8(identification & 0xff)
    repairChecksums(of: &frame)
    return frame
  }
}

/// IPv4 header's and transport's checksum, where there are any, as a sender makes them.
private func repairChecksums(of frame: inout [UInt8]) {
  guard let parsed = ParsedFrame(frame.rawBytes), parsed.transportOffset != 0 else { return }
  let network = parsed.networkOffset
  let transport = parsed.transportOffset
  func put(_ sum: UInt16, at place: Int) {
    frame[place] = UInt8(sum >> 8)
    frame[place + 1] = UInt8(sum & 0xff)
  }
  let addresses: Range<Int>
  if parsed.ipVersion == 4 {
    put(0, at: network + 10)
    put(~referenceSum(frame.rawBytes.extracting(network..<transport)), at: network + 10)
    addresses = network + 12..<network + 20
  } else {
    addresses = network + 8..<network + 40
  }
  let place: Int
  switch parsed.ipProtocol {
  case IPProtocol.tcp: place = transport + TCPHeader.checksumOffset
  case IPProtocol.udp: place = transport + UDPHeader.checksumOffset
  default: return
  }
  put(0, at: place)
  let end = network + parsed.networkBytes
  let transportBytes = end - transport
  let covered =
    frame[addresses] + [0, parsed.ipProtocol, UInt8(transportBytes >> 8), UInt8(transportBytes & 0xff)]
    + frame[transport..<end]
  let sum = ~referenceSum(Array(covered).rawBytes)
  put(sum == 0 ? 0xffff : sum, at: place)
}
