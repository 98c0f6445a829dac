import Datapath

/// A received train: a byte of flags, two of stride, the outer ToS, then the datagrams, of so many bytes each, the last
/// perhaps shorter. Flags: bit 0 for VNET/P, not VXLAN; bit 1 for a sender that is nobody's peer; bit 2 puts a right
/// VXLAN header before each frame.
///
/// It must go as its datagrams would by themselves, whatever lies around it in its slot.
public func fuzzTrain(_ input: RawSpan) {
  guard let train = ReceivedTrain(input), train.datagrams.count <= RouteStage.trainFramesMax else { return }
  // At the slot's very end, where a look beyond traps; and in the middle of other bytes.
  let atEnd = Station(filler: 0xff).route(train, at: FrameMemory.slotBytes - train.joined.count)
  let inMiddle = Station(filler: 0).route(train, at: FrameMemory.headroomBytes)
  precondition(atEnd == inMiddle, "what lies around a train changes nothing")
  let singly = Station(filler: 0).routeSingly(train)
  precondition(atEnd == singly, "a datagram of a train goes as it would by itself")
}

private struct ReceivedTrain {
  var stride: Int
  var typeOfService: UInt8
  var encapsulation: Encapsulation
  var sender: UnderlayAddress
  var datagrams: [[UInt8]] = []

  var joined: [UInt8] { datagrams.flatMap(\.self) }

  init?(_ input: RawSpan) {
    guard input.byteCount > 4 else { return nil }
    let flags = byte(0, of: input)
    stride = Int(byte(1, of: input)) << 8 | Int(byte(2, of: input))
    typeOfService = byte(3, of: input)
    encapsulation = flags & 1 != 0 ? .vnetp : .vxlan
    sender = flags & 2 != 0 ? Station.stranger : encapsulation == .vnetp ? Station.vnetpHost : Station.vxlanHost
    guard stride > 0 else { return nil }
    for start in Swift.stride(from: 4, to: input.byteCount, by: stride) {
      var datagram = bytes(of: input.extracting(start..<min(start + stride, input.byteCount)))
      let header: [UInt8] = [8, 0, 0, 0, 0, 0, UInt8(Station.vni), 0]
      if flags & 4 != 0, datagram.count >= header.count { datagram.replaceSubrange(..<header.count, with: header) }
      datagrams.append(datagram)
    }
  }
}

/// What routing made of a train.
private struct Outcome: Equatable {
  var frames: [Frame] = []
  /// By who counts and what.
  var counts: [[UInt64]] = []

  struct Frame: Equatable {
    /// Of the datagram in its train, by where it lies.
    var number: Int
    /// Of the frame in its datagram.
    var offset: Int
    var bytes: [UInt8]
    var egresses: [InterfaceIndex]
    var ingress: InterfaceIndex
    var domain: DomainIndex
    var typeOfService: UInt8
    var flowHash: UInt32
    var vni: UInt32
  }
}

/// A route stage that has seen nothing but where its two guests are: interfaces 0 and 1 are their ports, 2 a VXLAN link
/// and 3 a VNET/P link, all in one domain.
private struct Station: ~Copyable {
  static let vxlanHost = UnderlayAddress(ipv4: 1)
  static let vnetpHost = UnderlayAddress(ipv4: 2)
  static let stranger = UnderlayAddress(ipv4: 9)
  static let vni: UInt32 = 42
  private static let domain = DomainIndex(0)
  private static let interfaceCount = 4
  private static let drops = Counter.allCases.filter(\.isDrop)

  private let snapshot: Snapshot
  private var stage: RouteStage
  private var memory: FrameMemory
  private var counters: CounterTable
  private var batch = RoutedBatch(capacity: RouteStage.trainFramesMax)
  /// By interface; the domain's, the underlay's and the worker's.
  private let blocks = (0..<interfaceCount + 3).map { _ in CounterBlock() }
  private let filler: UInt8

  /// - Parameter filler: stands around the datagrams.
  init(filler: UInt8) {
    self.filler = filler
    do {
      memory = try FrameMemory(slotCount: 1, hugePages: false)
      let interfaces = [
        Snapshot.Interface(InterfaceIndex(0), .port(domain: Self.domain), mtuBytes: 1450),
        Snapshot.Interface(InterfaceIndex(1), .port(domain: Self.domain), mtuBytes: 1450),
        Snapshot.Interface(InterfaceIndex(2), .link(peer: Self.vxlanHost, domains: [Self.domain]), mtuBytes: 1450),
        Snapshot.Interface(
          InterfaceIndex(3), .link(peer: Self.vnetpHost, domains: [Self.domain], encapsulation: .vnetp),
          mtuBytes: 1450),
      ]
      snapshot = try Snapshot(
        version: 1, interfaces: interfaces,
        domains: [Snapshot.Domain(Self.domain, vni: Self.vni, macs: MACTable(macsMax: 16, seed: 1))])
    } catch {
      preconditionFailure("no station: \(error)")
    }
    stage = RouteStage(snapshot.view)
    counters = CounterTable(
      interfaceCount: Self.interfaceCount, domainCount: 1, worker: blocks[Self.interfaceCount + 2].writer,
      underlay: blocks[Self.interfaceCount + 1].writer)
    for number in 0..<Self.interfaceCount {
      let kind: InterfaceRecord.Kind = number < 2 ? .tap : number == 2 ? .vxlan : .vnetp
      counters.set(
        InterfaceIndex(number), InterfaceRecord(kind, laneFirst: 0, laneCount: 1, counters: blocks[number].writer))
    }
    counters.set(Self.domain, blocks[Self.interfaceCount].writer)
    for number in 0..<2 { learn(number) }
  }

  /// The guest behind a port, 02:00:00:00:00:01 or …:02, says something.
  private mutating func learn(_ number: Int) {
    let slot = fill([2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, UInt8(number + 1), 0x88, 0xb5], at: 0)
    var descriptor = Descriptor(
      buffer: BufferReference(slot: slot), offset: 0, length: EthernetHeader.bytes, ingress: InterfaceIndex(number))
    descriptor.domain = Self.domain
    stage.route(descriptor, now: TurnClock(seconds: 1), &memory, counters, into: &batch)
    for place in 0..<batch.count { memory.release(batch[place].descriptor.buffer) }
    batch.removeAll()
  }

  /// Bytes on either side of a train that are the filler: a look beyond starts with them.
  private static let fillerBytes = 128

  /// A slot that holds bytes at a place, and the filler around them.
  private mutating func fill(_ bytes: [UInt8], at offset: Int) -> Int {
    guard let slot = memory.post() else { preconditionFailure("a slot did not come back") }
    memory.received(slot)
    let before = min(offset, Self.fillerBytes)
    let around = [UInt8](repeating: filler, count: Self.fillerBytes)
    let content = around.prefix(before) + bytes + around.prefix(FrameMemory.slotBytes - offset - bytes.count)
    let whole = Descriptor(
      buffer: BufferReference(slot: slot), offset: offset - before, length: content.count, ingress: .none)
    var head = memory.mutableHead(of: whole)
    for (place, byte) in content.enumerated() { head.storeBytes(of: byte, toByteOffset: place, as: UInt8.self) }
    return slot
  }

  /// As the kernel brings it: in one slot.
  consuming func route(_ train: ReceivedTrain, at offset: Int) -> Outcome {
    var outcome = Outcome()
    receive(train.joined, of: train, at: offset, segmentBytes: train.stride, &outcome, first: 0)
    outcome.counts = counts
    // Flows keep their order; between them there is none.
    var newest: [UInt32: Int] = [:]
    for frame in outcome.frames {
      precondition(frame.number > newest[frame.flowHash] ?? -1, "a flow keeps its order")
      newest[frame.flowHash] = frame.number
    }
    outcome.frames.sort { $0.number < $1.number }
    return outcome
  }

  /// Each datagram in a slot of its own, the one after the other.
  consuming func routeSingly(_ train: ReceivedTrain) -> Outcome {
    var outcome = Outcome()
    for (number, datagram) in train.datagrams.enumerated() {
      receive(datagram, of: train, at: FrameMemory.headroomBytes, segmentBytes: 0, &outcome, first: number)
    }
    outcome.counts = counts
    return outcome
  }

  private var counts: [[UInt64]] { blocks.map { block in Counter.allCases.map { block.value($0) } } }

  private var dropped: UInt64 {
    // Each drop counts at the domain, or at the underlay where none was found.
    (Self.interfaceCount...Self.interfaceCount + 1).reduce(0) { sum, place in
      Self.drops.reduce(sum) { $0 + blocks[place].value($1) }
    }
  }

  private mutating func receive(
    _ bytes: [UInt8], of train: ReceivedTrain, at offset: Int, segmentBytes: Int, _ outcome: inout Outcome,
    first: Int
  ) {
    var event = IOEvent(.received, 0)
    event.slot = UInt32(fill(bytes, at: offset))
    event.offset = UInt32(offset)
    event.length = UInt32(bytes.count)
    event.sender = train.sender
    event.typeOfService = train.typeOfService
    event.trainSegmentBytes = UInt16(segmentBytes)
    var descriptor = VXLANLink.describe(event)
    descriptor.encapsulation = train.encapsulation
    let datagrams = segmentBytes == 0 ? 1 : train.datagrams.count
    precondition(Int(descriptor.wireFrames) == datagrams, "each datagram counts")
    precondition((descriptor.trainSegmentBytes != 0) == (datagrams > 1), "only several make a train")

    let droppedBefore = dropped
    stage.route(descriptor, now: TurnClock(seconds: 1), &memory, counters, into: &batch)
    precondition(memory.holdsTotal == batch.count, "each run holds the slot once")
    let framesBefore = outcome.frames.count
    for place in 0..<batch.count { append(batch[place], of: train, from: offset, first, &outcome) }
    let routed = outcome.frames.count - framesBefore
    precondition(routed + Int(dropped - droppedBefore) == datagrams, "each datagram is routed or dropped, once")
    for place in 0..<batch.count { memory.release(batch[place].descriptor.buffer) }
    batch.removeAll()
    precondition(memory.heldCount == 0 && memory.slotsAstray == 0, "the slot comes back")
  }

  /// The frames of one run, by themselves.
  private func append(
    _ routed: RoutedFrame, of train: ReceivedTrain, from start: Int, _ first: Int, _ outcome: inout Outcome
  ) {
    let egresses: [InterfaceIndex] =
      switch routed.target {
      case .unicast(let egress): [egress]
      case .flood(let targets): Array(targets)
      }
    var frames = [routed.descriptor]
    if let run = TrainRun(routed.descriptor) {
      precondition(run.count > 1, "a frame alone is no run")
      frames = (0..<run.count).map { run.frame($0) }
      precondition(frames.allSatisfy { $0.length <= run.frameBytesMax })
      precondition(frames.reduce(0) { $0 + $1.length } == run.descriptor.length)
      checkRests(of: run, frames)
    }
    for frame in frames {
      precondition(frame.wireFrames == 1 && frame.trainSegmentBytes == 0)
      let place = Int(frame.offset) - start
      outcome.frames.append(
        Outcome.Frame(
          number: first + place / train.stride, offset: place % train.stride, bytes: bytes(of: memory.head(of: frame)),
          egresses: egresses, ingress: frame.ingress, domain: frame.domain, typeOfService: frame.typeOfService,
          flowHash: frame.flowHash, vni: routed.vni))
    }
  }

  /// What is left of a run from each of its frames on has the same frames.
  private func checkRests(of run: TrainRun, _ frames: [Descriptor]) {
    for first in frames.indices {
      guard let rest = run.from(first) else { preconditionFailure("a rest is a run") }
      precondition(rest.count == frames.count - first)
      for number in 0..<rest.count {
        let (frame, same) = (rest.frame(number), frames[first + number])
        precondition(frame.offset == same.offset && frame.length == same.length)
      }
    }
  }
}
