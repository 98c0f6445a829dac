import Datapath

// What must hold for any bytes whatever. The fuzzer calls these with inputs it makes up, the tests with the committed
// corpus and with random bytes. A broken promise is a failed precondition: the input that broke it is the report.

/// Parsers of frames, against one another and against what they promise.
public func fuzzFrames(_ frame: RawSpan) {
  checkParsedFrame(frame)
  checkVXLAN(frame)
  checkRewrite(frame)
}

/// Prefixes that are parsed one by one, as cut-off frames and as copied headers: longer than Ethernet, two tags, IPv6,
/// two extension headers and TCP together.
private let prefixBytesMax = 160

private func checkParsedFrame(_ frame: RawSpan) {
  let whole = ParsedFrame(frame)
  precondition((whole == nil) == (frame.byteCount < EthernetHeader.bytes), "nil means shorter than 14 bytes")
  if let whole {
    checkOffsets(of: whole, readable: frame.byteCount, frameBytes: frame.byteCount)
    checkAgainstViews(whole, frame)
    checkHashIgnoresPayload(whole, frame)
  }
  for count in 0...min(frame.byteCount, prefixBytesMax) {
    let prefix = frame.extracting(first: count)
    if let parsed = ParsedFrame(prefix) {
      checkOffsets(of: parsed, readable: count, frameBytes: count)
      checkAgainstViews(parsed, prefix)
    }
    if let parsed = ParsedFrame(headers: prefix, frameBytes: frame.byteCount), let whole {
      checkOffsets(of: parsed, readable: count, frameBytes: frame.byteCount)
      precondition(parsed.destination == whole.destination && parsed.source == whole.source)
      // Enough for all headers is as good as all: the longest transport header that is looked for has 20 bytes.
      if whole.transportOffset != 0, count >= min(whole.transportOffset + TCPHeader.bytesMin, frame.byteCount) {
        precondition(parsed == whole, "a copy of the headers parses as the frame does")
      }
    } else {
      precondition(count < EthernetHeader.bytes)
    }
  }
  // A caller that says less than it hands over is believed.
  precondition(ParsedFrame(headers: frame, frameBytes: EthernetHeader.bytes - 1) == nil)
}

private func checkOffsets(of parsed: ParsedFrame, readable: Int, frameBytes: Int) {
  precondition(parsed.networkOffset == EthernetHeader.bytes + Int(parsed.tagCount) * VLANTag.bytes)
  precondition(parsed.networkOffset <= readable)
  precondition(Int(parsed.tagCount) <= VLANTag.tagsMax)
  precondition(parsed.vlanIdentifier <= 0xfff)
  switch parsed.ipVersion {
  case 0:
    precondition(parsed.transportOffset == 0 && parsed.networkBytes == 0 && parsed.typeOfService == 0)
    precondition(parsed.ipProtocol == 0 && !parsed.isFragment)
    let isIP = parsed.etherType == EtherType.ipv4 || parsed.etherType == EtherType.ipv6
    precondition(parsed.networkLengthValid == !isIP)
  case 4: precondition(parsed.etherType == EtherType.ipv4)
  case 6: precondition(parsed.etherType == EtherType.ipv6)
  default: preconditionFailure("IP has versions 4 and 6")
  }
  if parsed.networkLengthValid {
    precondition(parsed.networkOffset + parsed.networkBytes <= frameBytes)
  } else {
    precondition(parsed.transportOffset == 0)
  }
  if parsed.transportOffset != 0 {
    precondition(parsed.transportOffset >= parsed.networkOffset + IPv4Header.bytesMin)
    precondition(parsed.transportOffset < parsed.networkOffset + parsed.networkBytes)
    let bytesMin =
      switch parsed.ipProtocol {
      case IPProtocol.tcp: 20
      case IPProtocol.udp: 8
      case IPProtocol.sctp: 12
      default: 1
      }
    precondition(parsed.transportOffset + bytesMin <= readable, "a whole transport header is there")
  }
}

/// The one-pass parser and the chain of views were written apart: they must say the same.
private func checkAgainstViews(_ parsed: ParsedFrame, _ frame: RawSpan) {
  guard let ethernet = EthernetView(frame) else { preconditionFailure("14 bytes are a frame") }
  precondition(parsed.destination == ethernet.destination && parsed.source == ethernet.source)
  precondition(ethernet.payload.byteCount + EthernetHeader.bytes == frame.byteCount)
  var etherType = ethernet.etherType
  var packet = ethernet.payload
  var rest = ethernet.etherTypeAndPayload
  var tagCount = 0
  while tagCount < VLANTag.tagsMax, let tag = VLANView(rest) {
    precondition(tagCount > 0 || parsed.vlanIdentifier == tag.identifier)
    precondition(tag.tag.identifier == tag.identifier && tag.tag.priority <= 7)
    etherType = tag.etherType
    packet = tag.payload
    rest = tag.etherTypeAndPayload
    tagCount += 1
  }
  precondition(Int(parsed.tagCount) == tagCount && parsed.etherType == etherType)
  precondition(frame.byteCount - packet.byteCount == parsed.networkOffset)
  switch etherType {
  case EtherType.ipv4:
    let view = IPv4View(packet)
    precondition((view != nil) == parsed.networkLengthValid)
    if let view { checkIPv4(view, parsed) }
  case EtherType.ipv6:
    if let view = IPv6View(packet) {
      checkIPv6(view, parsed)
    } else {
      precondition(!parsed.networkLengthValid)
    }
  default:
    precondition(parsed.ipVersion == 0)
  }
}

private func checkIPv4(_ view: borrowing IPv4View, _ parsed: ParsedFrame) {
  precondition(parsed.ipVersion == 4 && parsed.networkBytes == view.totalBytes)
  precondition(parsed.typeOfService == view.typeOfService && parsed.ipProtocol == view.ipProtocol)
  precondition(parsed.isFragment == view.isFragment)
  precondition(view.isFragment == (view.moreFragments || view.fragmentOffsetBytes != 0))
  precondition(view.headerBytes + view.payload.byteCount == view.totalBytes)
  _ = view.isChecksumValid
  if parsed.transportOffset != 0 {
    precondition(view.fragmentOffsetBytes == 0)
    precondition(parsed.transportOffset == parsed.networkOffset + view.headerBytes)
  }
  checkTransport(view.payload, view.fragmentOffsetBytes == 0 ? view.ipProtocol : 0xff, parsed)
}

private func checkIPv6(_ view: borrowing IPv6View, _ parsed: ParsedFrame) {
  let upper = view.upperLayer
  precondition(parsed.ipVersion == 6 && parsed.networkBytes == IPv6Header.bytes + view.payloadBytes)
  precondition(parsed.typeOfService == view.trafficClass && parsed.ipProtocol == upper.ipProtocol)
  precondition(parsed.isFragment == upper.isFragment && parsed.networkLengthValid == upper.isWellFormed)
  precondition(upper.isFragment == (upper.moreFragments || upper.fragmentOffsetBytes != 0))
  precondition(upper.offset == 0 || upper.offset >= IPv6Header.bytes && upper.offset < view.bytes.byteCount)
  precondition(upper.offset == 0 || upper.fragmentOffsetBytes == 0, "a later fragment has no transport header")
  if parsed.transportOffset != 0 { precondition(parsed.transportOffset == parsed.networkOffset + upper.offset) }
  if upper.offset != 0, upper.isWellFormed {
    checkTransport(view.bytes.extracting(droppingFirst: upper.offset), upper.ipProtocol, parsed)
  }
}

private func checkTransport(_ bytes: RawSpan, _ ipProtocol: UInt8, _ parsed: ParsedFrame) {
  switch ipProtocol {
  case IPProtocol.tcp:
    precondition((parsed.transportOffset != 0) == (bytes.byteCount >= TCPHeader.bytesMin))
    guard let view = TCPView(bytes) else { return }
    precondition(view.headerBytes >= TCPHeader.bytesMin && view.headerBytes <= TCPHeader.bytesMax)
    precondition(view.options.byteCount + TCPHeader.bytesMin + view.payload.byteCount == bytes.byteCount)
    precondition(view.header.headerBytes == view.headerBytes)
  case IPProtocol.udp:
    precondition((parsed.transportOffset != 0) == (bytes.byteCount >= UDPHeader.bytes))
    guard let view = UDPView(bytes) else { return }
    precondition(view.totalBytes <= bytes.byteCount)
    precondition(view.payload.byteCount + UDPHeader.bytes == view.totalBytes)
    if let vxlan = VXLANView(view.payload) { checkVXLANView(vxlan) }
  default:
    break
  }
}

/// A flow's frames differ behind the ports: its hash must not.
private func checkHashIgnoresPayload(_ parsed: ParsedFrame, _ frame: RawSpan) {
  guard parsed.transportOffset != 0 else { return }
  var copy = bytes(of: frame)
  for index in min(parsed.transportOffset + 4, copy.count)..<copy.count { copy[index] = ~copy[index] }
  precondition(ParsedFrame(copy.rawBytes)?.flowHash == parsed.flowHash)
}

private func checkVXLANView(_ view: borrowing VXLANView) {
  precondition(view.vni <= VXLANHeader.vniMax)
  precondition(view.payload.byteCount + VXLANHeader.bytes == view.bytes.byteCount)
  let isCanonical = view.hasVNI && view.reservedBitsAreZero
  let word = unsafe view.bytes.unsafeLoadUnaligned(fromByteOffset: 0, as: UInt64.self)
  precondition(isCanonical == (word == VXLANHeader.networkOrder(vni: view.vni)))
}

/// Encapsulation, then decapsulation, is the frame again.
private func checkVXLAN(_ frame: RawSpan) {
  if let view = VXLANView(frame) { checkVXLANView(view) }
  var vni: UInt32 = 0
  for index in 0..<min(4, frame.byteCount) { vni = vni << 8 | UInt32(byte(index, of: frame)) }
  let headers = IPv4Header.bytesMin + UDPHeader.bytes + VXLANHeader.bytes
  guard frame.byteCount <= 0xffff - headers else { return }
  var packet = [UInt8](repeating: 0, count: headers) + bytes(of: frame)
  let written = packet.withMutableRawBytes { raw in
    let count = raw.byteCount
    var offset = IPv4Header(totalBytes: count, ipProtocol: IPProtocol.udp, source: vni, destination: ~vni)
      .write(into: &raw, at: 0)
    offset = UDPHeader(
      sourcePort: 49152, destinationPort: VXLANHeader.portDefault, totalBytes: count - IPv4Header.bytesMin
    ).write(into: &raw, at: offset)
    return VXLANHeader(vni: vni).write(into: &raw, at: offset)
  }
  precondition(written == headers)
  guard let network = IPv4View(packet.rawBytes) else { preconditionFailure("what was written is IPv4") }
  precondition(network.isChecksumValid && network.source == vni)
  guard let datagram = UDPView(network.payload) else { preconditionFailure("what was written is UDP") }
  guard let tunnel = VXLANView(datagram.payload) else { preconditionFailure("what was written is VXLAN") }
  precondition(tunnel.hasVNI && tunnel.reservedBitsAreZero && tunnel.vni == vni & VXLANHeader.vniMax)
  precondition(equal(tunnel.payload, frame), "decapsulated is what was encapsulated")
}

/// A new ToS byte changes the ToS byte and the checksum that covers it, and nothing else.
private func checkRewrite(_ frame: RawSpan) {
  guard let parsed = ParsedFrame(frame) else { return }
  let original = bytes(of: frame)
  let start = parsed.networkOffset
  let wanted = ~parsed.typeOfService
  var copy = original
  guard rewrite(wanted, in: &copy, networkOffset: start) else {
    precondition(copy == original, "what is refused is not touched")
    precondition(parsed.ipVersion == 0)
    return
  }
  // It goes by the version nibble, as the caller says where IP starts: look at IP only.
  if parsed.ipVersion != 0 {
    guard let changed = ParsedFrame(copy.rawBytes) else { preconditionFailure("still a frame") }
    precondition(changed.typeOfService == wanted && changed.flowHash == parsed.flowHash)
    precondition(changed.transportOffset == parsed.transportOffset && changed.networkBytes == parsed.networkBytes)
  }
  if let before = IPv4View(frame.extracting(droppingFirst: start)) {
    guard let after = IPv4View(copy.rawBytes.extracting(droppingFirst: start)) else {
      preconditionFailure("still IPv4")
    }
    precondition(before.isChecksumValid == after.isChecksumValid, "right stays right and wrong stays wrong")
  }
  for index in copy.indices where copy[index] != original[index] {
    let inHeader = index - start
    precondition(inHeader == 0 || inHeader == 1 || inHeader == 10 || inHeader == 11)
  }
  precondition(
    rewrite(
      original[start] >> 4 == 6 ? trafficClass(original, start) : original[start + 1],
      in: &copy, networkOffset: start))
  // 0xffff, which no IPv4 header sums up to, comes back as zero, the same number.
  if original[start] >> 4 == 4, original[start + 10] == 0xff, original[start + 11] == 0xff {
    precondition(copy[start + 10] == copy[start + 11])
    copy[start + 10] = 0xff
    copy[start + 11] = 0xff
  }
  precondition(copy == original, "there and back again")
}

private func trafficClass(_ frame: [UInt8], _ start: Int) -> UInt8 { frame[start] << 4 | frame[start + 1] >> 4 }

private func rewrite(_ typeOfService: UInt8, in frame: inout [UInt8], networkOffset: Int) -> Bool {
  frame.withMutableRawBytes { ECN.rewrite(typeOfService: typeOfService, in: &$0, networkOffset: networkOffset) }
}
