import Datapath
import Glibc
import Testing

extension EndToEnd {
  /// A super-frame that one device takes and another, without offloads, hands out is cut by the kernel on its way over
  /// a bridge: what comes out is what `SuperFrame` must make.
  @Suite(needsLab)
  struct KernelSegmentation {
    struct Kind: Sendable, CustomTestStringConvertible {
      var isIPv4: Bool
      var isTCP: Bool
      var isTagged = false
      var testDescription: String { "\(isTCP ? "TCP" : "UDP")v\(isIPv4 ? 4 : 6)\(isTagged ? ", tagged" : "")" }
    }

    static let kinds = [
      Kind(isIPv4: true, isTCP: true), Kind(isIPv4: false, isTCP: true), Kind(isIPv4: true, isTCP: false),
      Kind(isIPv4: false, isTCP: false), Kind(isIPv4: true, isTCP: true, isTagged: true),
      Kind(isIPv4: false, isTCP: false, isTagged: true),
    ]
    private static let source = MAC(0x02, 0, 0, 0, 0, 0x0a)

    /// The offload header and the super-frame: 4 segments of 1,000 bytes and one of 777.
    private func made(_ kind: Kind) -> (offload: OffloadHeader, frame: [UInt8]) {
      Frame.superFrame(
        isIPv4: kind.isIPv4, isTCP: kind.isTCP, to: .broadcast, from: Self.source,
        tags: kind.isTagged ? [(type: Frame.customerTag, id: UInt16(7))] : [], segmentBytes: 1_000,
        sequence: UInt32.max - 1_500,
        payload: (0..<4_777).map { UInt8(truncatingIfNeeded: $0 &* 31) })
    }

    /// The segments as they are cut here.
    private func cut(_ frame: [UInt8], _ offload: OffloadHeader) throws -> [[UInt8]] {
      let whole = unsafe try #require(SuperFrame(frame.span.bytes, offload))
      return (0..<whole.segmentCount).map { number in
        var headers = [UInt8](repeating: 0, count: whole.headerBytes)
        var elements = headers.mutableSpan
        var room = unsafe elements.mutableBytes
        unsafe whole.writeHeaders(ofSegment: number, of: frame.span.bytes, into: &room)
        let start = whole.payloadOffset(ofSegment: number)
        return headers + frame[start..<start + whole.payloadBytes(ofSegment: number)]
      }
    }

    /// What the device hands out of our frames, without the header before each.
    private func read(_ queue: Int32, count: Int) -> [[UInt8]] {
      var frames: [[UInt8]] = []
      var request = pollfd(fd: queue, events: Int16(POLLIN), revents: 0)
      while frames.count < count, unsafe poll(&request, 1, 2_000) > 0 {
        var bytes = [UInt8](repeating: 0, count: 1 << 17)
        let length = unsafe Glibc.read(queue, &bytes, bytes.count)
        guard length > TapPort.headerBytes else { break }
        let frame = Array(bytes[TapPort.headerBytes..<length])
        // The namespace itself speaks too (IPv6 neighbour discovery).
        if Array(frame[6..<12]) == Self.source.bytes { frames.append(frame) }
      }
      return frames
    }

    @Test("the kernel cuts a super-frame into the same segments", arguments: kinds)
    func agrees(_ kind: Kind) throws {
      try withLab { lab in
        let namespace = try lab.namespace("cut")
        let devices = try namespace.inside {
          try ["in", "out"].enumerated().map { number, name in
            try TapDevice.open(
              name: name, queues: 1, mtuBytes: 1_500, mac: MACAddress(bits: 0x02_00_00_00_01_00 + UInt64(number)),
              offloads: false)
          }
        }
        defer { for device in devices { device.close() } }
        try namespace.ip("link", "add", "bridge", "type", "bridge")
        for device in devices { try namespace.ip("link", "set", device.name, "master", "bridge") }
        try namespace.ip("link", "set", "bridge", "up")
        let (offload, frame) = made(kind)
        let expected = try cut(frame, offload)
        #expect(expected.count == 5)

        var header = [UInt8](repeating: 0, count: OffloadHeader.bytes)
        var elements = header.mutableSpan
        var room = unsafe elements.mutableBytes
        offload.write(into: &room)
        let message = header + frame
        let written = unsafe write(devices[0].queues[0], message, message.count)
        #expect(written == message.count, "\(errorText(errno))")
        let frames = read(devices[1].queues[0], count: expected.count)
        #expect(frames == expected)
      }
    }
  }
}
