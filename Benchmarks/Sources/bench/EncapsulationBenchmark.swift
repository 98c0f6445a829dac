import CLinux
import Datapath

/// What a frame costs between its receive and its send but for the lookup: parse, flow hash, VXLAN header, and the
/// message that the kernel reads. The payload is not touched, so the length should not matter.
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
      let bytes = frame(number: Int(descriptor.buffer.index), count: frameBytes)
      var head = memory.mutableHead(of: descriptor)
      for place in bytes.indices { head.storeBytes(of: bytes[place], toByteOffset: place, as: UInt8.self) }
    }

    report.table("encapsulation of UDP frames of \(frameBytes) bytes in \(slots) slots", item: "frame")
    var wrong = 0
    report.measure("parse, with the flow hash", items: 10_000_000) { items in
      for item in 0..<items {
        let parsed = parse(descriptors[item & (slots - 1)], memory)
        if parsed?.ipProtocol != 17 { wrong += 1 }
      }
    }
    report.check(wrong == 0, "encapsulation: every frame is parsed as UDP")

    var pool = SendPool(count: slots)
    let operations = (0..<slots).map { _ in pool.take()! }
    var failed = 0
    report.measure("parse, VXLAN header, message to send", items: 10_000_000) { items in
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
    report.check(failed == 0, "encapsulation: every frame gets its message")

    // What the kernel would send.
    for slot in 0..<slots {
      let message = unsafe pool.operation(operations[slot]).pointee.message
      var bytes: [UInt8] = []
      for index in unsafe 0..<message.msg_iovlen {
        let vector = unsafe message.msg_iov[index]
        unsafe bytes.append(contentsOf: UnsafeRawBufferPointer(start: vector.iov_base, count: vector.iov_len))
      }
      let isRight = bytes == [8, 0, 0, 0, 0, 0, 42, 0] + frame(number: slot, count: frameBytes)
      let controlBytes = unsafe message.msg_controllen
      report.check(isRight && controlBytes > 0, "encapsulation: the datagram of slot \(slot)")
    }
  }
}

@inline(__always)
private func parse(_ descriptor: Descriptor, _ memory: borrowing FrameMemory) -> ParsedFrame? {
  ParsedFrame(headers: memory.head(of: descriptor), frameBytes: Int(descriptor.length))
}

/// Ethernet, IPv4, UDP; a flow for each number.
private func frame(number: Int, count: Int) -> [UInt8] {
  var bytes: [UInt8] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x00]
  let total = count - 14
  bytes += [0x45, 0xB8, UInt8(total >> 8), UInt8(total & 0xFF), 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]
  bytes += [0x40, UInt8(number), 0x13, 0x88, UInt8((total - 20) >> 8), UInt8((total - 20) & 0xFF), 0, 0]
  while bytes.count < count { bytes.append(UInt8(truncatingIfNeeded: bytes.count &+ number)) }
  return bytes
}
