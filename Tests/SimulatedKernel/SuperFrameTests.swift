import Glibc
import Testing

@testable import Datapath
@testable import SimulatedKernel

/// A TCP or UDP super-frame over IPv4. That its segments are right is shown where they are made; here they are what
/// must arrive.
struct MadeSuperFrame {
  let headerBytes: Int
  var bytes: [UInt8]
  var offload: OffloadHeader
  private let whole: SuperFrame

  init(destination: UInt64 = 0x02_0000_0000_0B, payloadBytes: Int, segmentBytes: Int, isUDP: Bool = false) throws {
    let transportBytes = (isUDP ? 8 : 20) + payloadBytes
    let ipProtocol = isUDP ? IPProtocol.udp : IPProtocol.tcp
    headerBytes = 14 + 20 + transportBytes - payloadBytes
    var bytes = (0..<headerBytes + payloadBytes).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ $0 >> 8) }
    var elements = bytes.mutableSpan
    var frame = unsafe elements.mutableBytes
    EthernetHeader(
      destination: MACAddress(bits: destination), source: MACAddress(bits: 0x02_0000_0000_0A), etherType: EtherType.ipv4
    ).write(into: &frame)
    IPv4Header(
      typeOfService: 0xB8, totalBytes: 20 + transportBytes, ipProtocol: ipProtocol, source: 1, destination: 2
    ).write(into: &frame, at: 14)
    let pseudoHeader = InternetChecksum.pseudoHeader(
      source: UInt32(1), destination: UInt32(2), ipProtocol: ipProtocol, length: transportBytes)
    let sum = InternetChecksum.fold(pseudoHeader)
    if isUDP {
      UDPHeader(sourcePort: 40000, destinationPort: 5201, totalBytes: transportBytes, checksum: sum)
        .write(into: &frame, at: 34)
    } else {
      TCPHeader(sourcePort: 40000, destinationPort: 5201, checksum: sum).write(into: &frame, at: 34)
    }
    self.bytes = bytes
    offload = OffloadHeader(
      flags: OffloadHeader.flagNeedsChecksum, gsoType: isUDP ? 5 : 1, headerLength: 9999, gsoSize: UInt16(segmentBytes),
      checksumStart: 34, checksumOffset: isUDP ? 6 : 16, bufferCount: 1)
    whole = unsafe try #require(SuperFrame(bytes.span.bytes, offload))
  }

  var count: Int { whole.segmentCount }

  var segments: [[UInt8]] {
    (0..<count).map { number in
      var headers = [UInt8](repeating: 0, count: headerBytes)
      var elements = headers.mutableSpan
      var room = unsafe elements.mutableBytes
      unsafe whole.writeHeaders(ofSegment: number, of: bytes.span.bytes, into: &room)
      let start = whole.payloadOffset(ofSegment: number)
      return headers + bytes[start..<start + whole.payloadBytes(ofSegment: number)]
    }
  }

  /// What is written before the whole: the guest's hint of the headers' length is ours now.
  var virtioHeader: [UInt8] {
    let kind = UInt16(offload.gsoType) << 8 | UInt16(OffloadHeader.flagNeedsChecksum)
    let fields = [kind, UInt16(headerBytes), offload.gsoSize, 34, offload.checksumOffset, 0]
    return fields.flatMap { [UInt8($0 & 0xFF), UInt8($0 >> 8)] }
  }
}

/// A transmit stage before a simulated kernel, with frames in slots of an arena: one port that frames come by, one port
/// and one link that they leave by.
struct Bench: ~Copyable {
  static let ingress = InterfaceIndex(0)
  static let port = InterfaceIndex(1)
  static let link = InterfaceIndex(2)
  static let vni: UInt32 = 42

  let network: SimulatedNetwork
  let device: Int
  let receiver: Int32
  var io: SimulatedIO
  var memory: FrameMemory
  var stage: TransmitStage
  var counters: CounterTable
  var events = EventBatch(capacity: 64)
  let blocks = (0..<3).map { _ in CounterBlock() }
  let domain = CounterBlock()
  let others = [CounterBlock(), CounterBlock()]
  var arrived: [SimulatedNetwork.Datagram] = []

  init(
    _ kind: InterfaceRecord.Kind = .vxlan, operations: Int = 600, mtuBytes: Int = FrameMemory.payloadBytesMax,
    trainFramesMax: Int = SendPool.trainFramesMax, formsTrains: Bool = true, takesUDPSuperFrames: Bool = true
  ) throws {
    var limits = SimulatedNetwork.Limits()
    limits.trainFramesMax = trainFramesMax
    network = SimulatedNetwork(seed: 5, limits: limits)
    let (here, there) = (UnderlayAddress(ipv4: 0x0A00_0001), UnderlayAddress(ipv4: 0x0A00_0002))
    device = network.addDevice()
    receiver = network.openSocket(there, port: 4789)
    io = SimulatedIO(network, chainFramesMax: 16)
    memory = try FrameMemory(slotCount: 24, hugePages: false)
    stage = TransmitStage(laneCount: 2, operationCount: operations, formsTrains: formsTrains)
    counters = CounterTable(
      interfaceCount: 3, domainCount: 1, worker: others[0].writer, underlay: others[1].writer)
    counters.set(DomainIndex(0), domain.writer)
    counters.set(Self.ingress, InterfaceRecord(.packet, laneFirst: 0, laneCount: 0, counters: blocks[0].writer))
    counters.set(
      Self.port,
      InterfaceRecord(
        .tap, laneFirst: 0, laneCount: 1, mtuBytes: mtuBytes, takesUDPSuperFrames: takesUDPSuperFrames,
        counters: blocks[1].writer))
    counters.set(
      Self.link, InterfaceRecord(kind, laneFirst: 1, laneCount: 1, mtuBytes: mtuBytes, counters: blocks[2].writer))
    stage.open(0, .tap, interface: Self.port, descriptor: network.openQueue(device: device), &io)
    stage.open(
      1, .datagramIPv4, interface: Self.link, descriptor: network.openSocket(here, connectedTo: there, port: 4789), &io)
  }

  mutating func transmit(_ made: MadeSuperFrame, to egress: InterfaceIndex, wireFrames: Int? = nil) {
    transmit(made, to: .unicast(egress), wireFrames: wireFrames)
  }

  /// Puts a super-frame into a slot and hands it to the stage.
  mutating func transmit(_ made: MadeSuperFrame, to target: RoutedFrame.Target, wireFrames: Int? = nil) {
    let slot = memory.post()!
    memory.received(slot)
    var descriptor = Descriptor(
      buffer: BufferReference(slot: slot), offset: FrameMemory.headroomBytes + 12, length: made.bytes.count,
      ingress: Self.ingress)
    descriptor.domain = DomainIndex(0)
    descriptor.typeOfService = 0xB8
    descriptor.offload = made.offload
    descriptor.wireFrames = UInt16(wireFrames ?? made.count)
    var head = memory.mutableHead(of: descriptor)
    for (place, byte) in made.bytes.enumerated() { head.storeBytes(of: byte, toByteOffset: place, as: UInt8.self) }
    let frame = RoutedFrame(descriptor: descriptor, target: target, vni: Self.vni)
    stage.transmit(frame, canHoldBack: true, &io, &memory, counters)
  }

  /// Puts frames into a slot as a VXLAN train brings them, all as long as the first but perhaps the last, and hands
  /// them to the stage as one run.
  /// - Parameter stepDatagrams: from one of the frames to the next; between them lie others.
  mutating func transmit(run frames: [[UInt8]], to egress: InterfaceIndex, stepDatagrams: Int = 1) {
    let slot = memory.post()!
    memory.received(slot)
    let datagramBytes = VXLANHeader.bytes + frames[0].count
    let between = [UInt8](repeating: 0xEE, count: stepDatagrams * datagramBytes - frames[0].count)
    let bytes = Array(frames.joined(separator: between))
    var descriptor = Descriptor(
      buffer: BufferReference(slot: slot), offset: FrameMemory.headroomBytes, length: bytes.count,
      ingress: Self.ingress)
    var head = memory.mutableHead(of: descriptor)
    for (place, byte) in bytes.enumerated() { head.storeBytes(of: byte, toByteOffset: place, as: UInt8.self) }
    descriptor.length = UInt32(frames.joined().count)
    descriptor.domain = DomainIndex(0)
    descriptor.wireFrames = UInt16(frames.count)
    descriptor.trainSegmentBytes = UInt16(datagramBytes)
    for number in frames.indices { descriptor.trainMembers |= 1 << UInt128(number * stepDatagrams) }
    let frame = RoutedFrame(descriptor: descriptor, target: .unicast(egress), vni: Self.vni)
    stage.transmit(frame, canHoldBack: true, &io, &memory, counters)
  }

  /// Turns until everything is sent and has arrived.
  mutating func settle(nowSeconds: UInt32 = 1) {
    for _ in 0..<10_000 where stage.inFlight > 0 || !network.isIdle {
      stage.flush(&io, counters, nowSeconds: nowSeconds)
      events.removeAll()
      io.collect(.forEvent, &memory, into: &events)
      for place in 0..<events.count {
        switch events[place].kind {
        case .sent: _ = stage.finished(events[place], &io, &memory, counters)
        case .writable: stage.writable(events[place])
        default: break
        }
      }
      while network.readiness(receiver) == .something { arrived.append(network.receive(receiver)) }
    }
  }

  func value(_ interface: InterfaceIndex, _ counter: Counter) -> Int { Int(blocks[interface.index].value(counter)) }

  /// Offered is sent or dropped on the way out, at the interface and in the domain.
  func holds(_ interface: InterfaceIndex) -> Bool {
    func drops(_ block: CounterBlock) -> UInt64 {
      Counter.allCases.filter(\.isEgressDrop).reduce(0) { $0 + block.value($1) }
    }
    let block = blocks[interface.index]
    return block.value(.offeredFrames) == block.value(.outFrames) + drops(block)
      && domain.value(.outFrames) == block.value(.outFrames) && drops(domain) == drops(block)
  }

  var isAllBack: Bool { memory.heldCount == 0 && memory.slotsAstray == 0 && stage.operationsInUse == 0 }
}

@Suite struct SuperFrameTests {
  @Test(
    "a link sends exactly the segments, in order, each with its headers and its ToS",
    arguments: [InterfaceRecord.Kind.vxlan, .vnetp])
  func linkSendsSegments(_ kind: InterfaceRecord.Kind) throws {
    var bench = try Bench(kind)
    let made = try MadeSuperFrame(payloadBytes: 65_000, segmentBytes: 1_448)
    #expect(made.count == 45)
    bench.transmit(made, to: Bench.link)
    let (holds, waiting) = (bench.memory.holdsTotal, bench.stage.inFlight)
    #expect(holds == 45 && waiting == 45, "one hold a send")
    var sums: (frames: Int, bytes: Int) = (0, 0)
    bench.stage.forEachInFlight { _, descriptor in
      sums.frames += Int(descriptor.wireFrames)
      sums.bytes += Int(descriptor.length)
    }
    let segmentBytes = made.segments.reduce(0) { $0 + $1.count }
    #expect(sums == (45, segmentBytes))

    bench.settle()
    let header: [UInt8] = kind == .vxlan ? [8, 0, 0, 0, 0, 0, 42, 0] : []
    let arrived = bench.arrived.map(\.bytes)
    #expect(arrived == made.segments.map { header + $0 })
    let services = Set(bench.arrived.map(\.typeOfService))
    #expect(services == [0xB8])
    let counts = [Counter.offeredFrames, .outFrames, .outBytes].map { bench.value(Bench.link, $0) }
    #expect(counts == [45, 45, segmentBytes])
    let (isAllBack, sumsHold) = (bench.isAllBack, bench.holds(Bench.link))
    #expect(isAllBack && sumsHold)
    #expect(bench.network.violations.isEmpty)
  }

  @Test("segments leave in trains, where these are wanted", arguments: [true, false])
  func trainsAreOptional(formsTrains: Bool) throws {
    var bench = try Bench(formsTrains: formsTrains)
    let made = try MadeSuperFrame(payloadBytes: 60_000, segmentBytes: 1_448)
    bench.transmit(made, to: Bench.link)
    bench.settle()
    let arrived = bench.arrived.map { Array($0.bytes.dropFirst(8)) }
    #expect(arrived == made.segments)
    let counts = [Counter.trains, .trainFrames].map { Int(bench.others[0].value($0)) }
    #expect(counts == (formsTrains ? [1, made.count] : [0, 0]))
    let (isAllBack, sumsHold) = (bench.isAllBack, bench.holds(Bench.link))
    #expect(isAllBack && sumsHold)
  }

  @Test("a port gets the whole with its offload header, counted as its segments")
  func portGetsTheWhole() throws {
    var bench = try Bench(mtuBytes: 1_500)
    // The longest segment fits the port's MTU, which is what counts.
    let made = try MadeSuperFrame(payloadBytes: 20_000, segmentBytes: 1_460)
    bench.transmit(made, to: Bench.port)
    bench.settle()
    let written = bench.network.takeWritten(device: bench.device)
    #expect(written.map(\.frame) == [made.bytes])
    #expect(written.first?.virtioHeader == made.virtioHeader)
    let counts = [Counter.offeredFrames, .outFrames, .outBytes].map { bench.value(Bench.port, $0) }
    #expect(counts == [14, 14, made.bytes.count])
    let (isAllBack, sumsHold) = (bench.isAllBack, bench.holds(Bench.port))
    #expect(isAllBack && sumsHold)
  }

  @Test(
    "a port whose kernel knows no UDP super-frames gets their datagrams; TCP's go whole as ever",
    arguments: [true, false], [true, false])
  func portWithoutUDPSuperFrames(isUDP: Bool, takesUDP: Bool) throws {
    let goesWhole = takesUDP || !isUDP
    let made = try MadeSuperFrame(payloadBytes: 20_000, segmentBytes: 1_400, isUDP: isUDP)
    let plainHeader = [UInt8](repeating: 0, count: 12)

    func expectArrived(_ bench: inout Bench) {
      bench.settle()
      let written = bench.network.takeWritten(device: bench.device)
      #expect(written.map(\.frame) == (goesWhole ? [made.bytes] : made.segments))
      #expect(Set(written.map(\.virtioHeader)) == [goesWhole ? made.virtioHeader : plainHeader])
      let sent = bench.value(Bench.port, .outFrames)
      #expect(sent == 15)
      let (isAllBack, sumsHold) = (bench.isAllBack, bench.holds(Bench.port))
      #expect(isAllBack && sumsHold)
    }
    var fromPort = try Bench(takesUDPSuperFrames: takesUDP)
    fromPort.transmit(made, to: Bench.port)
    expectArrived(&fromPort)

    // The same frames from a link: joined only where they may be.
    var fromLink = try Bench(takesUDPSuperFrames: takesUDP)
    fromLink.transmit(run: made.segments, to: Bench.port)
    expectArrived(&fromLink)
  }

  @Test("segments beyond a lane's queue are dropped, the front ones go")
  func laneFull() throws {
    let most = TransmitStage.laneFramesMax
    var bench = try Bench(operations: most + 1)
    let made = try MadeSuperFrame(payloadBytes: 10_000, segmentBytes: 50)
    #expect(made.count == 200 && most % 200 != 0)
    let count = most / 200 + 1
    for _ in 0..<count { bench.transmit(made, to: Bench.link) }
    let waiting = bench.stage.inFlight
    #expect(waiting == TransmitStage.laneFramesMax)
    let dropped = bench.value(Bench.link, .dropQueueFull)
    #expect(dropped == count * 200 - most)
    bench.settle()
    let arrived = bench.arrived.map { Array($0.bytes.dropFirst(8)) }
    let whole = Array(repeating: made.segments, count: most / 200).flatMap(\.self)
    #expect(arrived == whole + made.segments.prefix(most % 200))
    let (isAllBack, sumsHold) = (bench.isAllBack, bench.holds(Bench.link))
    #expect(isAllBack && sumsHold)
  }

  @Test("segments beyond the send operations are dropped, and a buffer that none holds goes back at once")
  func noOperation() throws {
    var bench = try Bench(operations: 5)
    let made = try MadeSuperFrame(payloadBytes: 1_000, segmentBytes: 100)
    bench.transmit(made, to: Bench.link)
    let held = bench.memory.heldCount
    bench.transmit(made, to: Bench.link)
    let heldStill = bench.memory.heldCount
    #expect(held == 1 && heldStill == 1)
    let dropped = bench.value(Bench.link, .dropNoSendOperation)
    #expect(dropped == 15)
    bench.settle()
    let arrived = bench.arrived.map { Array($0.bytes.dropFirst(8)) }
    #expect(arrived == Array(made.segments.prefix(5)))
    let (isAllBack, sumsHold) = (bench.isAllBack, bench.holds(Bench.link))
    #expect(isAllBack && sumsHold)
  }

  @Test("segments that are longer than the egress takes are dropped as too big", arguments: [Bench.port, Bench.link])
  func tooBig(_ egress: InterfaceIndex) throws {
    var bench = try Bench(mtuBytes: 1_500)
    let made = try MadeSuperFrame(payloadBytes: 20_000, segmentBytes: 8_960)
    bench.transmit(made, to: egress)
    let (dropped, sumsHold, isAllBack) = (bench.value(egress, .dropTooBig), bench.holds(egress), bench.isAllBack)
    #expect(dropped == 3 && sumsHold && isAllBack)
  }

  @Test(
    "a super-frame that cannot be cut as it was counted is dropped where it came in",
    arguments: [Bench.port, Bench.link])
  func badOffload(_ egress: InterfaceIndex) throws {
    var bench = try Bench()
    var made = try MadeSuperFrame(payloadBytes: 1_000, segmentBytes: 100)
    bench.transmit(made, to: egress, wireFrames: 9)
    made.offload.gsoType = 4
    bench.transmit(made, to: egress, wireFrames: 10)
    let dropped = bench.value(Bench.ingress, .dropBadOffload)
    #expect(dropped == 19)
    #expect(bench.domain.value(.dropBadOffload) == 19)
    let (offered, isAllBack) = (bench.value(egress, .offeredFrames), bench.isAllBack)
    #expect(offered == 0 && isAllBack)
  }
}

/// Super-frames on their way through a whole worker, from the memory of a guest.
@Suite struct SuperFrameWorkerTests {
  /// A super-frame that is short enough to be copied in one piece, or is left in two.
  @safe
  private final class FakePort {
    let memory = ForeignMemory(bufferCount: 4)
    private let owner: Int
    private let made: MadeSuperFrame
    private let page: UnsafeMutableRawPointer
    private let copiedBytes: Int

    init(_ host: SimulatedHost, _ made: MadeSuperFrame, copiedBytes: Int) {
      self.made = made
      self.copiedBytes = copiedBytes
      owner = host.adopt(memory)
      unsafe page = .allocate(byteCount: made.bytes.count, alignment: 64)
      unsafe page.copyMemory(from: made.bytes, byteCount: made.bytes.count)
    }
    deinit { unsafe page.deallocate() }

    func descriptor(_ index: Int) throws -> Descriptor {
      let pieces = unsafe [iovec(iov_base: page, iov_len: made.bytes.count)]
      let segments = unsafe pieces.withUnsafeBufferPointer { pieces in
        unsafe memory.reference.bring(index, payload: pieces, headerBytes: copiedBytes)
      }
      var descriptor = Descriptor(
        buffer: BufferReference(owner: owner, index: index), offset: 0, length: made.bytes.count,
        segments: try #require(segments), ingress: InterfaceIndex(0))
      descriptor.domain = DomainIndex(0)
      descriptor.offload = made.offload
      descriptor.wireFrames = UInt16(made.count)
      return descriptor
    }
  }

  private func makeFrame() throws -> MadeSuperFrame {
    let made = try MadeSuperFrame(destination: NumberedFrame.broadcast, payloadBytes: 200, segmentBytes: 60)
    #expect(made.count == 4 && made.bytes.count <= ForeignMemory.headerCopyBytes)
    return made
  }

  private func run(_ hosts: [SimulatedHost], until isDone: () -> Bool) throws {
    for _ in 0..<10_000 where !isDone() { for host in hosts { try host.turn() } }
  }

  @Test(
    "a flood gives the whole to a port and the segments to each link, and the accounts hold",
    arguments: [Int.max, 64, 77])
  func flood(copiedBytes: Int) throws {
    var plan = SimulatedHost.Plan()
    plan.hosts = 3
    plan.guests = 2
    let network = SimulatedNetwork(seed: 8)
    let hosts = try (0..<plan.hosts).map { try SimulatedHost(network, plan, number: $0) }
    for _ in 0..<50 { for host in hosts { try host.turn() } }
    let made = try makeFrame()
    let port = FakePort(hosts[0], made, copiedBytes: min(copiedBytes, made.bytes.count))
    hosts[0].bring(try port.descriptor(1))
    #expect(port.memory.reference.holds(1) == 1 + 2 * 4, "one send to the port, four to each link")
    #expect(hosts[0].inFlight == 4 + 2 * 4)

    var written = [[SimulatedNetwork.WrittenFrame]](repeating: [], count: 4)
    let devices = [hosts[1].devices, hosts[2].devices].flatMap(\.self)
    try run(hosts) {
      for (place, device) in devices.enumerated() { written[place] += network.takeWritten(device: device) }
      return written.allSatisfy { $0.count >= 4 } && hosts[0].inFlight == 0
    }
    for frames in written {
      #expect(frames.map(\.frame) == made.segments)
      #expect(frames.allSatisfy { $0.virtioHeader.allSatisfy { $0 == 0 } })
    }
    let local = network.takeWritten(device: hosts[0].devices[1])
    #expect(local.map(\.frame) == [made.bytes])
    #expect(local.first?.virtioHeader == made.virtioHeader)
    #expect(network.takeWritten(device: hosts[0].devices[0]).isEmpty, "not back to where it came from")

    #expect(port.memory.reference.takeReturned() == 1)
    #expect(hosts[0].ports(.inFrames) == 4 && hosts[0].ports(.inBytes) == made.bytes.count)
    #expect(hosts[0].ports(.outFrames) == 4 && hosts[0].ports(.outBytes) == made.bytes.count)
    #expect(hosts[0].links(.outFrames) == 8)
    #expect(hosts[0].links(.outBytes) == 2 * made.segments.reduce(0) { $0 + $1.count })
    #expect(hosts[0].domains(.copies) == 8)
    for host in hosts { for audit in host.audits() { #expect(audit.holds, "\(audit)") } }
    #expect(network.violations.isEmpty)
  }

  @Test("a flooded super-frame leaves send operations for the frames behind it")
  func floodLeavesOperations() throws {
    let made = try MadeSuperFrame(payloadBytes: 1_200, segmentBytes: 100)
    var bench = try Bench(operations: 40)
    let links = FixedArray(repeating: Bench.link, count: 5)
    let refused = 2 * made.count
    bench.transmit(
      made,
      to: .flood(
        TargetSet(members: links.reference, start: 0, count: 5, ingress: Bench.ingress, targetCount: 5)))
    #expect(bench.stage.operationsInUse == 36, "the segments of three")
    #expect(bench.blocks[2].value(.dropNoSendOperation) == UInt64(refused), "of two")
    bench.transmit(made, to: Bench.port)
    #expect(bench.stage.operationsInUse == 37)
    #expect(bench.blocks[1].value(.dropNoSendOperation) == 0)
    extendLifetime(links)
  }

  @Test("with every fault of the kernel the accounts hold and buffers come back", arguments: UInt64(1)...UInt64(20))
  func faults(seed: UInt64) throws {
    var random = SimulatedRandom(seed: seed)
    var plan = SimulatedHost.Plan.mixture(&random)
    plan.roles = [.all]
    let network = SimulatedNetwork(seed: seed, faults: .mixture(&random))
    let hosts = try (0..<plan.hosts).map { try SimulatedHost(network, plan, number: $0) }
    let made = try makeFrame()
    let port = FakePort(hosts[0], made, copiedBytes: made.bytes.count)
    var isOut = [Bool](repeating: false, count: 4)
    func takeBack() {
      while let index = port.memory.reference.takeReturned() {
        #expect(isOut[index], "a buffer came back that was not out")
        isOut[index] = false
      }
    }
    // The accounts begin with the configuration.
    for _ in 0..<50 { for host in hosts { try host.turn() } }
    for turn in 0..<200 {
      for host in hosts { try host.turn() }
      takeBack()
      let index = turn % 4
      guard !isOut[index] else { continue }
      isOut[index] = true
      hosts[0].bring(try port.descriptor(index))
      if turn % 16 == 0 { for audit in hosts[0].audits() { #expect(audit.holds, "\(audit)") } }
    }
    try run(hosts) { hosts[0].inFlight == 0 }
    takeBack()
    #expect(!isOut.contains(true))
    for audit in hosts[0].audits() { #expect(audit.holds, "\(audit)") }
    #expect(network.violations.isEmpty)
  }
}
