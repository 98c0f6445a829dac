import CLinux
import Glibc
import Synchronization
import Testing

@testable import Datapath

/// Whether a test may make a device.
private let devicesCanBeMade = unsafe geteuid() == 0 && access("/dev/net/tun", R_OK | W_OK) == 0

/// Packet sockets on both sides, on a TAP device of our own: what is written to its queue is what the device receives,
/// and what is sent by the device is read from its queue.
@Suite(.enabled(if: devicesCanBeMade, "needs root and /dev/net/tun"))
struct IOSidesPacketTests {
  @Test("a frame arrives as it is on the wire, its VLAN tags where they were", arguments: IOSide.usable)
  func tags(_ side: IOSide) throws {
    struct Scenario: IOScenario {
      let device: TestDevice
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        let packet = try PacketDevice.open(name: device.name, queues: 1)
        defer { packet.close() }
        #expect(packet.mtuBytes == 1_500)
        bench.post(32)
        bench.open(0, .packet, packet.queues[0])
        let plain = FrameMaker().ethernet(0x88B5)
        let customer = VLANTag(tagProtocol: EtherType.vlan, priority: 5, dropEligible: true, identifier: 4_094)
        let service = VLANTag(tagProtocol: EtherType.vlanService, priority: 0, dropEligible: false, identifier: 1)
        // A tag for no VLAN, which bears a priority only, is a tag nevertheless.
        let nothing = VLANTag(tagProtocol: EtherType.vlan, priority: 0, dropEligible: false, identifier: 0)
        let frames = [
          plain, plain.tagged(customer), plain.tagged(service), plain.tagged(service).tagged(customer),
          plain.tagged(nothing),
        ].map { $0.payload(numbered(1)[0]).bytes }
        for frame in frames { device.give(frame) }
        let events = bench.collectFromGuest(frames.count)
        #expect(events.map(\.vlanTag) == [0, 0x8100_BFFE, 0x88A8_0001, 0x88A8_0001, 0x8100_0000])
        var seen: [[UInt8]] = []
        for event in events {
          let (descriptor, drop) = bench.describe(event)
          #expect(drop == nil && descriptor.wireFrames == 1 && descriptor.offload.isPlain)
          #expect(descriptor.ingress == InterfaceIndex(3) && descriptor.domain == DomainIndex(1))
          seen.append(bench.bytes(descriptor))
        }
        #expect(seen == frames)
        bench.close(0)
      }
    }
    try TestDevice.with { try side.run(Scenario(device: $0)) }
  }

  @Test("a frame longer than the device's MTU allows is refused, those before it are sent", arguments: IOSide.usable)
  func sending(_ side: IOSide) throws {
    struct Scenario: IOScenario {
      let device: TestDevice
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        let packet = try PacketDevice.open(name: device.name, queues: 1)
        defer { packet.close() }
        bench.io.openLane(0, .packet, descriptor: packet.queues[0])
        let tag = VLANTag(tagProtocol: EtherType.vlan, priority: 1, dropEligible: false, identifier: 9)
        let frames = [
          FrameMaker().ethernet(0x88B5).payload([UInt8](repeating: 1, count: 60)).bytes,
          FrameMaker().ethernet(0x88B5).payload([UInt8](repeating: 2, count: 1_500)).bytes,
          FrameMaker().ethernet(0x88B5).tagged(tag).payload([UInt8](repeating: 3, count: 1_500)).bytes,
          FrameMaker().ethernet(0x88B5).payload([UInt8](repeating: 4, count: 1_600)).bytes,
          FrameMaker().ethernet(0x88B5).payload([UInt8](repeating: 5, count: 60)).bytes,
        ]
        bench.send(0, .packet, frames, header: SendPool.Header(count: PacketPort.headerBytes))
        let sent = bench.collect(1, .sent)
        #expect(sent.first?.count == 3 && sent.first?.error == EMSGSIZE)
        #expect(device.take(3).map(\.frame) == Array(frames[0..<3]))
        bench.forgetChains()
        bench.io.closeLane(0)
      }
    }
    try TestDevice.with { try side.run(Scenario(device: $0)) }
  }

  @Test(
    "a super-frame comes in whole, tagged or not, and leaves as its segments", arguments: IOSide.usable, [false, true])
  func superFrame(_ side: IOSide, _ isTagged: Bool) throws {
    struct Scenario: IOScenario {
      let device: TestDevice
      let isTagged: Bool
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        let packet = try PacketDevice.open(name: device.name, queues: 1)
        defer { packet.close() }
        bench.post(32)
        bench.open(0, .packet, packet.queues[0])
        let (header, frame) = makeSuperFrame(isTagged: isTagged)
        device.give(frame, header)
        let events = bench.collectFromGuest(1)
        let event = try #require(events.first)
        let (descriptor, drop) = bench.describe(event)
        #expect(drop == nil)
        #expect(descriptor.wireFrames == 3)
        #expect(descriptor.offload.gsoType == OffloadHeader.Segmentation.tcpv4.rawValue)
        #expect(descriptor.offload.gsoSize == 1_000)
        #expect(descriptor.offload.checksumStart == header.checksumStart)
        #expect(descriptor.offload.checksumOffset == 16)
        let held = bench.bytes(descriptor)
        #expect(held == frame)

        // The device has no offloads: the kernel cuts what is sent by it, by the header that is sent with it.
        bench.io.openLane(0, .packet, descriptor: packet.queues[0])
        bench.send(0, .packet, [frame], header: TapPort.header(descriptor.offload))
        let sent = bench.collect(1, .sent)
        #expect(sent.first?.count == 1 && sent.first?.error == 0)
        let segments = device.take(3)
        let headers = 54 + (isTagged ? 4 : 0)
        #expect(segments.map { $0.frame.count - headers } == [1_000, 1_000, 500])
        #expect(segments.flatMap { $0.frame.dropFirst(headers) } == Array(frame.dropFirst(headers)))
        for segment in segments {
          #expect(segment.header.gsoType == 0 && !segment.header.needsChecksum)
          let sum = segment.frame.withTransport(at: headers - 20) { InternetChecksum.sum($0) }
          let length = segment.frame.count - headers + 20
          let pseudo = InternetChecksum.pseudoHeader(
            source: UInt32(0x0A00_0001), destination: 0x0A00_0002, ipProtocol: IPProtocol.tcp, length: length)
          #expect(InternetChecksum.fold(sum + pseudo) == 0xFFFF)
        }
        bench.forgetChains()
        bench.io.closeLane(0)
        bench.close(0)
      }
    }
    try TestDevice.with { try side.run(Scenario(device: $0, isTagged: isTagged)) }
  }

  @Test("a plain frame whose checksum the sender left to its device gets it", arguments: IOSide.usable)
  func unfinishedChecksum(_ side: IOSide) throws {
    struct Scenario: IOScenario {
      let device: TestDevice
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        let packet = try PacketDevice.open(name: device.name, queues: 1)
        defer { packet.close() }
        bench.post(32)
        bench.open(0, .packet, packet.queues[0])
        var (header, frame) = makeSuperFrame(isTagged: true, payloadBytes: 100)
        header.gsoType = 0
        header.gsoSize = 0
        device.give(frame, header)
        let events = bench.collectFromGuest(1)
        let (descriptor, drop) = bench.describe(try #require(events.first))
        #expect(drop == nil && descriptor.wireFrames == 1 && descriptor.offload.isPlain)
        let isFinished = frame.withMutableRawBytes { header.finishChecksum(in: &$0) }
        #expect(isFinished)
        let held = bench.bytes(descriptor)
        #expect(held == frame)
        bench.close(0)
      }
    }
    try TestDevice.with { try side.run(Scenario(device: $0)) }
  }

  @Test(
    "a port does not hear what is sent by its device, alone or with several queues", arguments: IOSide.usable, [1, 2])
  func outgoing(_ side: IOSide, _ queues: Int) throws {
    struct Scenario: IOScenario {
      let device: TestDevice
      let queues: Int
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        let packet = try PacketDevice.open(name: device.name, queues: queues)
        defer { packet.close() }
        let other = try PacketDevice.open(name: device.name, queues: 1)
        defer { other.close() }
        bench.post(32)
        for (source, queue) in packet.queues.enumerated() { bench.open(source, .packet, queue) }
        bench.io.openLane(0, .packet, descriptor: other.queues[0])
        let outgoing = FrameMaker().ethernet(0x88B5).payload([1]).bytes
        let incoming = FrameMaker().ethernet(0x88B5).payload([2]).bytes
        bench.send(0, .packet, [outgoing], header: SendPool.Header(count: PacketPort.headerBytes))
        let sent = bench.collect { events in events.contains { $0.kind == .sent } } + bench.collectRest()
        #expect(device.take(1).map(\.frame) == [outgoing])
        let heard = sent.filter { $0.kind == .received && bench.isFromGuest($0) }
        #expect(heard.isEmpty)
        for event in sent where event.kind == .received { _ = bench.take(event) }
        device.give(incoming)
        let events = bench.collectFromGuest(1)
        let (descriptor, _) = bench.describe(try #require(events.first))
        let bytes = bench.bytes(descriptor)
        #expect(bytes == incoming)
        bench.forgetChains()
        bench.io.closeLane(0)
        for source in 0..<queues { bench.close(source) }
      }
    }
    try TestDevice.with { try side.run(Scenario(device: $0, queues: queues)) }
  }

  @Test(
    "several queues share a device's frames by flow: each comes once, a flow by one queue", arguments: IOSide.usable)
  func queues(_ side: IOSide) throws {
    struct Scenario: IOScenario {
      let device: TestDevice
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        let packet = try PacketDevice.open(name: device.name, queues: 2)
        defer { packet.close() }
        bench.post(100)
        for (source, queue) in packet.queues.enumerated() { bench.open(source, .packet, queue) }
        for _ in 0..<2 {
          for flow in 0..<40 { device.give(datagram(sourcePort: UInt16(1_000 + flow))) }
        }
        let events = bench.collectFromGuest(80)
        var queueOfFlow: [UInt16: Set<UInt32>] = [:]
        var total = 0
        for event in events {
          let (descriptor, _) = bench.describe(event)
          let frame = bench.bytes(descriptor)
          queueOfFlow[UInt16(frame[34]) << 8 | UInt16(frame[35]), default: []].insert(event.index)
          total += 1
        }
        #expect(total == 80 && queueOfFlow.count == 40)
        #expect(queueOfFlow.values.allSatisfy { $0.count == 1 })
        #expect(queueOfFlow.values.reduce(into: Set()) { $0.formUnion($1) } == [0, 1])
        let none = bench.collectRest().filter { $0.kind == .received && bench.isFromGuest($0) }
        #expect(none.isEmpty)
        bench.close(0, 1)
      }
    }
    try TestDevice.with { try side.run(Scenario(device: $0)) }
  }

  @Test(
    "a device that goes down ends its source with ENETDOWN; one that went away cannot be sent to",
    arguments: IOSide.usable)
  func lostDevice(_ side: IOSide) throws {
    struct Scenario: IOScenario {
      let device: TestDevice
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        let packet = try PacketDevice.open(name: device.name, queues: 1)
        defer { packet.close() }
        bench.post(32)
        bench.open(0, .packet, packet.queues[0])
        bench.io.openLane(0, .packet, descriptor: packet.queues[0])
        let header = SendPool.Header(count: PacketPort.headerBytes)
        let frame = FrameMaker().ethernet(0x88B5).payload([1]).bytes
        device.set("down")
        let all = bench.collect { events in events.contains { $0.kind == .receiveEnded } }
        #expect(all.last?.error == ENETDOWN)
        for event in all where event.kind == .received { _ = bench.take(event) }
        bench.io.closeSource(0)
        bench.send(0, .packet, [frame], header: header)
        let down = bench.collect(1, .sent)
        #expect(down.first?.count == 0 && down.first?.error == ENETDOWN)
        let refused = #expect(throws: PortError.self) { try PacketDevice.open(name: device.name, queues: 1) }
        #expect(refused?.number == ENETDOWN && refused?.mayPass == true)
        device.remove()
        bench.send(0, .packet, [frame], header: header)
        var gone = bench.collect(1, .sent)
        // A device is taken apart a moment after its last user let it go, and is down until then.
        for _ in 0..<200 where gone.first?.error == ENETDOWN {
          usleep(10_000)
          bench.forgetChains()
          bench.send(0, .packet, [frame], header: header)
          gone = bench.collect(1, .sent)
        }
        #expect(gone.first?.count == 0 && gone.first?.error == ENXIO)
        bench.forgetChains()
        bench.io.closeLane(0)
        bench.io.takeBackSlots(&bench.memory)
      }
    }
    try TestDevice.with { try side.run(Scenario(device: $0)) }
  }

  @Test("a TAP device that is removed ends its source and fails its lane with EBADFD", arguments: IOSide.usable)
  func lostTap(_ side: IOSide) throws {
    struct Scenario: IOScenario {
      let device: TestDevice
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        bench.post(32)
        bench.open(0, .tap, device.queue)
        bench.io.openLane(0, .tap, descriptor: device.queue)
        device.delete()
        let all = bench.collect { events in events.contains { $0.kind == .receiveEnded } }
        #expect(all.last?.kind == .receiveEnded && all.last?.error == EBADFD)
        for event in all where event.kind == .received { _ = bench.take(event) }
        bench.io.closeSource(0)
        bench.send(0, .tap, [datagram(sourcePort: 1)], header: SendPool.Header(count: TapPort.headerBytes))
        let gone = bench.collect(1, .sent)
        #expect(gone.first?.count == 0 && gone.first?.error == EBADFD)
        bench.forgetChains()
        // A lane that waits is told, rather than left to wait.
        bench.io.awaitWritable(0)
        let told = bench.collect(1, .writable)
        #expect(told.count == 1)
        bench.io.closeLane(0)
        bench.io.takeBackSlots(&bench.memory)
      }
    }
    try TestDevice.with { try side.run(Scenario(device: $0)) }
  }

  @Test("a device is promiscuous while a port is open on it, and no longer")
  func promiscuous() throws {
    try TestDevice.with { device in
      #expect(!device.isPromiscuous)
      let packet = try PacketDevice.open(name: device.name, queues: 2)
      #expect(device.isPromiscuous)
      packet.close()
      #expect(!device.isPromiscuous)
    }
  }

  @Test("frames that a full receive buffer cost are counted, once")
  func drops() throws {
    try TestDevice.with { device in
      let packet = try PacketDevice.open(name: device.name, queues: 1)
      defer { packet.close() }
      var bytes: Int32 = 4_096
      _ = unsafe setsockopt(packet.queues[0], SOL_SOCKET, SO_RCVBUF, &bytes, 4)
      for _ in 0..<100 { device.give(datagram(sourcePort: 1)) }
      let drops = PacketDevice.dropsSinceLastRead(packet.queues[0])
      #expect(drops > 50)
      #expect(PacketDevice.dropsSinceLastRead(packet.queues[0]) < drops)
      #expect(PacketDevice.dropsSinceLastRead(-1) == 0)
    }
  }

  @Test("what is no Ethernet device is refused for good")
  func notEthernet() throws {
    let error = try #require(throws: PortError.self) { try PacketDevice.open(name: "lo", queues: 1) }
    #expect(!error.mayPass && "\(error)".contains("no Ethernet device"))
  }

  @Test("a device that is not there may come, and the error says what to do")
  func missing() throws {
    let error = try #require(throws: PortError.self) { try PacketDevice.open(name: "vio-nowhere", queues: 1) }
    #expect(error.mayPass && error.number == ENODEV)
    #expect("\(error)".contains("vio-nowhere"))
  }
}

/// Headers that came from nowhere good: no device needed.
@Suite struct PacketPortTests {
  /// Describes a slot that holds `header` and `frame`, with a tag beside.
  private func describe(
    _ header: OffloadHeader, _ frame: [UInt8], vlanTag: UInt32 = 0, isTruncated: Bool = false
  ) throws -> (descriptor: Descriptor, drop: Counter?, bytes: [UInt8]) {
    var memory = try FrameMemory(slotCount: 1, hugePages: false)
    let slot = memory.post()!
    memory.received(slot)
    var bytes = [UInt8](repeating: 0, count: OffloadHeader.bytes)
    _ = bytes.withMutableRawBytes { header.write(into: &$0) }
    bytes += frame
    unsafe (memory.address(ofSlot: slot) + MessageSlot.payloadOffset).copyMemory(from: bytes, byteCount: bytes.count)
    var event = IOEvent(.received, 0)
    event.slot = UInt32(slot)
    event.offset = UInt32(MessageSlot.payloadOffset)
    event.length = UInt32(bytes.count)
    event.vlanTag = vlanTag
    event.isTruncated = isTruncated
    let (descriptor, drop) = PacketPort.describe(event, from: InterfaceIndex(3), domain: DomainIndex(1), &memory)
    let start = unsafe memory.address(ofSlot: slot) + Int(descriptor.offset)
    let held = unsafe Array(UnsafeRawBufferPointer(start: start, count: Int(descriptor.length)))
    return (descriptor, drop, held)
  }

  @Test("frames that are none are dropped by name")
  func runts() throws {
    let short = try describe(OffloadHeader(), [UInt8](repeating: 0, count: 13))
    #expect(short.drop == .dropRunt)
    let nothing = try describe(OffloadHeader(), [], vlanTag: 0x8100_0001)
    #expect(nothing.drop == .dropRunt)
    let cut = try describe(OffloadHeader(), [UInt8](repeating: 0, count: 100), isTruncated: true)
    #expect(cut.drop == .dropOversizedFrame)
  }

  @Test("a tag goes behind the addresses and moves what the header points at")
  func tagMovesOffsets() throws {
    let (header, frame) = makeSuperFrame(isTagged: false)
    let (descriptor, drop, bytes) = try describe(header, frame, vlanTag: 0x8100_2064)
    #expect(drop == nil)
    let tag = VLANTag(tagProtocol: 0x8100, priority: 1, dropEligible: false, identifier: 0x64)
    var expected = frame
    expected.insert(contentsOf: FrameMaker().ethernet(0).tagged(tag).bytes[12..<16], at: 12)
    #expect(bytes == expected)
    #expect(descriptor.offload.checksumStart == header.checksumStart + 4)
    #expect(descriptor.offload.headerLength == header.headerLength + 4)
    #expect(descriptor.wireFrames == 3)
  }

  @Test("a super-frame whose header does not fit it is dropped", arguments: [0, 1, 2, 3, 4, 5])
  func malformed(_ fault: Int) throws {
    var (header, frame) = makeSuperFrame(isTagged: false)
    switch fault {
    case 0: header.gsoSize = 0
    case 1: header.flags = 0
    case 2: header.checksumStart = UInt16(frame.count - 10)
    case 3: header.checksumOffset = 6
    case 4: header.gsoType = 3
    // The TCP header says that it is longer than the frame.
    default:
      frame = Array(frame[0..<70])
      frame[14 + 20 + 12] = 0xF0
    }
    let (_, drop, _) = try describe(header, frame)
    #expect(drop == .dropBadOffload)
  }

  @Test("the header that goes out says what came in, in the order of bytes that virtio has")
  func header() throws {
    let (header, frame) = makeSuperFrame(isTagged: false)
    let (descriptor, _, _) = try describe(header, frame)
    let out = TapPort.header(descriptor.offload)
    var words = [out.first, out.second]
    let bytes = unsafe words.withUnsafeMutableBytes { unsafe Array($0.prefix(Int(out.count))) }
    var expected = [UInt8](repeating: 0, count: OffloadHeader.bytes)
    _ = expected.withMutableRawBytes { header.write(into: &$0) }
    #expect(bytes == expected)
    let plain = Descriptor(buffer: BufferReference(slot: 0), offset: 0, length: 60, ingress: .none)
    let none = TapPort.header(plain.offload)
    #expect(none.first == 0 && none.second == 0 && none.count == 12)
  }
}

// MARK: - Frames

/// A TCP super-frame of three segments, of 1,000, 1,000 and 500 bytes, and its header.
private func makeSuperFrame(isTagged: Bool, payloadBytes: Int = 2_500) -> (header: OffloadHeader, frame: [UInt8]) {
  var ethernet = FrameMaker().ethernet(EtherType.ipv4)
  if isTagged {
    ethernet = ethernet.tagged(
      VLANTag(tagProtocol: EtherType.vlan, priority: 1, dropEligible: false, identifier: 100))
  }
  let pseudo = InternetChecksum.pseudoHeader(
    source: UInt32(0x0A00_0001), destination: 0x0A00_0002, ipProtocol: IPProtocol.tcp, length: 20 + payloadBytes)
  let frame =
    ethernet
    .ipv4(
      IPv4Header(
        totalBytes: 40 + payloadBytes, dontFragment: true, ipProtocol: IPProtocol.tcp, source: 0x0A00_0001,
        destination: 0x0A00_0002)
    )
    .tcp(
      TCPHeader(
        sourcePort: 1_234, destinationPort: 80, sequence: 7, acknowledgement: 9, headerBytes: 20, flags: [.ack],
        window: 500, checksum: InternetChecksum.fold(pseudo), urgentPointer: 0)
    )
    .payload((0..<payloadBytes).map { UInt8(truncatingIfNeeded: $0 &* 3 &+ $0 >> 8) })
  let start = ethernet.bytes.count + 20
  let header = OffloadHeader(
    flags: OffloadHeader.flagNeedsChecksum, gsoType: OffloadHeader.Segmentation.tcpv4.rawValue,
    headerLength: UInt16(start + 20), gsoSize: 1_000, checksumStart: UInt16(start), checksumOffset: 16)
  return (header, frame.bytes)
}

private func datagram(sourcePort: UInt16) -> [UInt8] {
  FrameMaker().ethernet(EtherType.ipv4)
    .ipv4(IPv4Header(totalBytes: 128, ipProtocol: IPProtocol.udp, source: 0x0A00_0001, destination: 0x0A00_0002))
    .udp(UDPHeader(sourcePort: sourcePort, destinationPort: 9, totalBytes: 108))
    .payload([UInt8](repeating: 0, count: 100))
    .bytes
}

extension [UInt8] {
  fileprivate func withTransport<Value>(at start: Int, _ body: (RawSpan) -> Value) -> Value {
    Array(self[start...]).read(body)
  }
}

extension IOBench where IO: ~Copyable {
  /// Whether it holds a frame that a test made: the system says things of its own by every device.
  fileprivate func isFromGuest(_ event: IOEvent) -> Bool {
    let start = unsafe memory.address(ofSlot: Int(event.slot)) + Int(event.offset) + PacketPort.headerBytes
    let source = unsafe Array(UnsafeRawBufferPointer(start: start + 6, count: 6))
    return source == [2, 0, 0, 0, 0, 0x0A]
  }

  /// Frames that a test made; others go back at once.
  fileprivate mutating func collectFromGuest(_ count: Int) -> [IOEvent] {
    var found: [IOEvent] = []
    for _ in 0..<200 where found.count < count {
      for event in collect(.atMost(nanoseconds: 10_000_000)) where event.kind == .received {
        if isFromGuest(event) {
          found.append(event)
        } else {
          _ = take(event)
        }
      }
    }
    #expect(found.count == count)
    return found
  }

  fileprivate mutating func describe(_ event: IOEvent) -> (descriptor: Descriptor, drop: Counter?) {
    PacketPort.describe(event, from: InterfaceIndex(3), domain: DomainIndex(1), &memory)
  }

  /// The frame; its slot goes back.
  fileprivate mutating func bytes(_ descriptor: Descriptor) -> [UInt8] {
    let start = unsafe memory.address(ofSlot: Int(descriptor.buffer.index)) + Int(descriptor.offset)
    let bytes = unsafe Array(UnsafeRawBufferPointer(start: start, count: Int(descriptor.length)))
    memory.release(descriptor.buffer)
    return bytes
  }
}

// MARK: - The device

/// A TAP device with a name of its own, which ends with the test.
private final class TestDevice {
  let name: String
  private let tap: TapDevice
  private var isOpen = true
  private static let made = Atomic(0)

  static func with(_ body: (TestDevice) throws -> Void) throws {
    let device = try TestDevice()
    defer { device.remove() }
    try body(device)
  }

  private init() throws {
    let number = Self.made.wrappingAdd(1, ordering: .relaxed).newValue
    name = "vio\(getpid() % 1_000_000)x\(number)"
    // Without offloads the kernel cuts what is sent to it.
    tap = try TapDevice.open(name: name, queues: 1, mtuBytes: 1_500, mac: FrameMaker.guestB, offloads: false)
    // So that the system says less by it.
    let setting = unsafe open("/proc/sys/net/ipv6/conf/\(name)/disable_ipv6", O_WRONLY)
    if setting >= 0 {
      _ = unsafe write(setting, "1", 1)
      close(setting)
    }
  }

  func remove() {
    guard isOpen else { return }
    isOpen = false
    tap.close()
  }

  var queue: Int32 { tap.queues[0] }

  func set(_ state: String) {
    let result = unsafe system("ip link set \(name) \(state)")
    precondition(result == 0, "ip link failed")
  }

  /// Removes the device while its queue is open.
  func delete() {
    let result = unsafe system("ip link delete \(name)")
    precondition(result == 0, "ip link failed")
  }

  /// The device's own flags: `ip link` shows those that were set by a user.
  var isPromiscuous: Bool {
    let file = unsafe open("/sys/class/net/\(name)/flags", O_RDONLY)
    defer { close(file) }
    var text = [UInt8](repeating: 0, count: 32)
    let count = unsafe read(file, &text, text.count)
    let digits = String(decoding: text[0..<max(0, count)], as: UTF8.self).dropFirst(2).filter { $0.isHexDigit }
    return (Int(digits, radix: 16) ?? 0) & Int(IFF_PROMISC) != 0
  }

  /// The device receives `frame`.
  func give(_ frame: [UInt8], _ header: OffloadHeader = OffloadHeader()) {
    var bytes = [UInt8](repeating: 0, count: OffloadHeader.bytes)
    _ = bytes.withMutableRawBytes { header.write(into: &$0) }
    bytes += frame
    let count = unsafe write(tap.queues[0], bytes, bytes.count)
    precondition(count == bytes.count, "the device did not take a frame")
  }

  /// What the device sent of what tests made: `count` frames, or as many as come within two seconds.
  func take(_ count: Int) -> [(header: OffloadHeader, frame: [UInt8])] {
    var found: [(header: OffloadHeader, frame: [UInt8])] = []
    var buffer = [UInt8](repeating: 0, count: 70_000)
    for _ in 0..<200 where found.count < count {
      let length = unsafe read(tap.queues[0], &buffer, buffer.count)
      if length < 26 {
        usleep(10_000)
      } else if Array(buffer[18..<24]) == [2, 0, 0, 0, 0, 0x0A] {
        let header = Array(buffer[0..<12]).read { OffloadHeader($0)! }
        found.append((header, Array(buffer[12..<length])))
      }
    }
    return found
  }
}
