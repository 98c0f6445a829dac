import CLinux
import Datapath

/// What a frame costs between its receive and its send but for the lookup, one way: parse, flow hash, VXLAN header, and
/// the message that the kernel reads; and the other: VXLAN header, whose datagram it is, parse, congestion mark. The
/// payload is not touched, so the length should not matter.
func benchmarkEncapsulation(_ report: Report) {
  let slots = 64
  guard var memory = try? FrameMemory(slotCount: slots) else {
    return report.check(false, "encapsulation: an arena is made")
  }
  for frameBytes in [64, 1_400] {
    let descriptors = (0..<slots).map { slot in
      Descriptor(
        buffer: BufferReference(slot: slot), offset: FrameMemory.headroomBytes, length: frameBytes,
        ingress: InterfaceIndex(0))
    }
    for descriptor in descriptors {
      let bytes = udpFrame(number: Int(descriptor.buffer.index), count: frameBytes)
      var head = memory.mutableHead(of: descriptor)
      for place in bytes.indices { head.storeBytes(of: bytes[place], toByteOffset: place, as: UInt8.self) }
    }

    var wrong = 0
    var pool = SendPool(count: slots)
    let operations = (0..<slots).map { _ in pool.take()! }
    var failed = 0
    report.table("encapsulation of UDP frames of \(frameBytes) bytes in \(slots) slots", item: "frame") { table in
      table.measure("parse, with the flow hash", items: 10_000_000) { items in
        for item in 0..<items {
          let parsed = parse(descriptors[item & (slots - 1)], memory)
          if parsed?.ipProtocol != 17 { wrong += 1 }
        }
      }
      table.measure("parse, VXLAN header, message to send", items: 10_000_000) { items in
        for item in 0..<items {
          var descriptor = descriptors[item & (slots - 1)]
          guard let parsed = parse(descriptor, memory) else {
            failed += 1
            continue
          }
          descriptor.flowHash = parsed.flowHash
          descriptor.typeOfService = parsed.typeOfService
          let header = SendPool.Header(first: VXLANHeader.networkOrder(vni: 42), count: VXLANHeader.bytes)
          let isFilled = pool.fill(
            operations[item & (slots - 1)], descriptor, egress: InterfaceIndex(1), lane: .datagramIPv4, header: header,
            memory)
          if !isFilled { failed += 1 }
        }
      }
    }
    report.check(wrong == 0, "encapsulation: every frame is parsed as UDP")
    report.check(failed == 0, "encapsulation: every frame gets its message")

    // What the kernel would send.
    for slot in 0..<slots {
      let message = unsafe pool.operation(operations[slot]).pointee.message
      var bytes: [UInt8] = []
      for index in unsafe 0..<message.msg_iovlen {
        let vector = unsafe message.msg_iov[index]
        unsafe bytes.append(contentsOf: UnsafeRawBufferPointer(start: vector.iov_base, count: vector.iov_len))
      }
      let isRight = bytes == [8, 0, 0, 0, 0, 0, 42, 0] + udpFrame(number: slot, count: frameBytes)
      let controlBytes = unsafe message.msg_controllen
      report.check(isRight && controlBytes > 0, "encapsulation: the datagram of slot \(slot)")
    }
  }
  benchmarkDecapsulation(report)
}

/// The way in, over datagrams as they came: what the route stage does with them before it looks up.
private func benchmarkDecapsulation(_ report: Report) {
  let slots = 64
  guard var memory = try? FrameMemory(slotCount: slots), let scene = RoutingScene(macs: 64),
    let peer = UnderlayAddress("10.99.0.1")
  else { return report.check(false, "decapsulation: an arena and a snapshot are made") }
  for frameBytes in [64, 1_400] {
    let descriptors = (0..<slots).map { slot in
      Descriptor(
        buffer: BufferReference(slot: slot), offset: FrameMemory.headroomBytes,
        length: VXLANHeader.bytes + frameBytes, ingress: .none)
    }
    for descriptor in descriptors {
      let bytes = udpFrame(number: Int(descriptor.buffer.index), count: frameBytes)
      var head = memory.mutableHead(of: descriptor)
      let start = VXLANHeader(vni: RoutingScene.vni).write(into: &head)
      for place in bytes.indices { head.storeBytes(of: bytes[place], toByteOffset: start + place, as: UInt8.self) }
    }
    var wrong = 0
    report.table("decapsulation of UDP frames of \(frameBytes) bytes in \(slots) slots", item: "frame") { table in
      table.measure("VXLAN header, link and domain of the sender", items: 10_000_000) { items in
        for item in 0..<items {
          guard let datagram = VXLANView(memory.head(of: descriptors[item & (slots - 1)])), datagram.hasVNI,
            case .link = scene.view.carrier(source: peer, encapsulation: .vxlan, vni: datagram.vni)
          else {
            wrong += 1
            continue
          }
        }
      }
      table.measure("the same, parse with the flow hash, congestion mark", items: 10_000_000) { items in
        for item in 0..<items {
          // An outer congestion mark, as a router sets it, every other time.
          let outer: UInt8 = item & 1 == 0 ? 0xB8 : 0xB8 | 3
          guard let datagram = VXLANView(memory.head(of: descriptors[item & (slots - 1)])), datagram.hasVNI,
            case .link(let link, let domain) = scene.view.carrier(
              source: peer, encapsulation: .vxlan, vni: datagram.vni),
            link == InterfaceIndex(1), domain == RoutingScene.domain, let parsed = ParsedFrame(datagram.payload),
            parsed.networkLengthValid, parsed.ipProtocol == 17,
            // The inner frame is of a sender that takes no marks: RFC 6040 has it dropped.
            isKept(outer: outer, inner: parsed.typeOfService) == (item & 1 == 0)
          else {
            wrong += 1
            continue
          }
        }
      }
    }
    report.check(wrong == 0, "decapsulation: every frame is its link's and its domain's, and parsed as UDP")
  }
}

@inline(__always)
private func isKept(outer: UInt8, inner: UInt8) -> Bool {
  if case .drop = ECN.decapsulate(outer: outer, inner: inner) { false } else { true }
}

@inline(__always)
private func parse(_ descriptor: Descriptor, _ memory: borrowing FrameMemory) -> ParsedFrame? {
  ParsedFrame(headers: memory.head(of: descriptor), frameBytes: Int(descriptor.length))
}

/// Ethernet, IPv4, UDP; a flow for each number.
func udpFrame(number: Int, count: Int) -> [UInt8] {
  var bytes: [UInt8] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x00]
  let total = count - 14
  bytes += [0x45, 0xB8, UInt8(total >> 8), UInt8(total & 0xFF), 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]
  bytes += [0x40, UInt8(number), 0x13, 0x88, UInt8((total - 20) >> 8), UInt8((total - 20) & 0xFF), 0, 0]
  while bytes.count < count { bytes.append(UInt8(truncatingIfNeeded: bytes.count &+ number)) }
  return bytes
}
