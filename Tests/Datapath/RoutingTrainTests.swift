import FuzzEntry
import TestSupport
import Testing

@testable import Datapath

/// A run of frames of 60 bytes, the last perhaps shorter, of a train whose first frame lies at byte 100 of its slot.
/// - Parameter numbers: which of the train's frames they are.
private func makeRun(_ encapsulation: Encapsulation, _ numbers: [Int], lastBytes: Int = 30) -> Descriptor {
  let headerBytes = encapsulation == .vxlan ? VXLANHeader.bytes : 0
  var run = Descriptor(
    buffer: BufferReference(slot: 3), offset: 100, length: (numbers.count - 1) * 60 + lastBytes,
    ingress: InterfaceIndex(7))
  run.encapsulation = encapsulation
  run.trainSegmentBytes = UInt16(60 + headerBytes)
  run.wireFrames = UInt16(numbers.count)
  run.flowHash = 99
  for number in numbers { run.trainMembers |= 1 << UInt128(number) }
  return run
}

@Suite struct TrainRunTests {
  static let runs = [
    [0, 1, 2, 3], [1, 2, 3], [5, 126, 127], [0, 2, 4, 6, 8], [0, 1, 63, 64, 65, 127], Array(0..<128),
  ]

  @Test(arguments: runs, [Encapsulation.vxlan, .vnetp])
  func `Each frame of a run lies where its number says, and only the last is shorter`(
    _ numbers: [Int], _ encapsulation: Encapsulation
  ) throws {
    let run = try #require(TrainRun(makeRun(encapsulation, numbers)))
    let stride = encapsulation == .vxlan ? 68 : 60
    #expect(run.count == numbers.count && run.frameBytesMax == 60)
    for (index, number) in numbers.enumerated() {
      let frame = run.frame(index)
      #expect(Int(frame.offset) == 100 + number * stride)
      #expect(frame.length == (index == numbers.count - 1 ? 30 : 60))
      #expect(frame.wireFrames == 1 && frame.trainSegmentBytes == 0)
      #expect(frame.buffer == BufferReference(slot: 3) && frame.ingress == InterfaceIndex(7) && frame.flowHash == 99)
    }
  }

  @Test(arguments: runs, [Encapsulation.vxlan, .vnetp])
  func `What is left of a run has the same frames, down to the last alone`(
    _ numbers: [Int], _ encapsulation: Encapsulation
  ) throws {
    let run = try #require(TrainRun(makeRun(encapsulation, numbers)))
    for first in numbers.indices {
      let rest = try #require(run.from(first))
      #expect(rest.count == numbers.count - first)
      #expect(rest.frameBytesMax == (rest.count == 1 ? 30 : 60))
      for index in 0..<rest.count {
        let (frame, same) = (rest.frame(index), run.frame(first + index))
        #expect(frame.offset == same.offset && frame.length == same.length)
      }
    }
  }

  @Test func `Frames of equal length have no shorter last one`() throws {
    let run = try #require(TrainRun(makeRun(.vxlan, [0, 1, 5], lastBytes: 60)))
    #expect((0..<3).map { run.frame($0).length } == [60, 60, 60])
  }

  @Test func `A frame by itself is no run`() {
    #expect(TrainRun(Descriptor(buffer: BufferReference(slot: 0), offset: 0, length: 60, ingress: .none)) == nil)
  }

  @Test func `A received train is its datagrams, headers included`() {
    var train = Descriptor(buffer: BufferReference(slot: 0), offset: 100, length: 3 * 68 + 5, ingress: .none)
    train.trainSegmentBytes = 68
    train.wireFrames = 4
    let datagrams = TrainRun(received: train)
    #expect((0..<4).map { datagrams.frame($0).offset } == [100, 168, 236, 304])
    #expect((0..<4).map { datagrams.frame($0).length } == [68, 68, 68, 5])
  }

  @Test func `A frame goes on with what goes the same way in all`() throws {
    var descriptor = makeRun(.vxlan, [0, 1], lastBytes: 60)
    descriptor.domain = DomainIndex(2)
    descriptor.typeOfService = 8
    let run = RoutedFrame(descriptor: descriptor, target: .unicast(InterfaceIndex(1)), vni: 42)
    #expect(run.goesOn(with: run))
    func refuses(_ change: (inout RoutedFrame) -> Void) -> Bool {
      var other = run
      change(&other)
      return !run.goesOn(with: other)
    }
    #expect(refuses { $0.target = .unicast(InterfaceIndex(2)) })
    #expect(refuses { $0.descriptor.typeOfService = 0 })
    #expect(refuses { $0.descriptor.domain = DomainIndex(3) })
    #expect(refuses { $0.descriptor.ingress = InterfaceIndex(8) })
  }

  @Test func `A frame becomes a run, and a run longer, by each frame that is added`() throws {
    let numbers = [2, 3, 7, 127]
    let whole = try #require(TrainRun(makeRun(.vxlan, numbers)))
    func single(_ index: Int) -> Descriptor {
      var frame = whole.frame(index)
      frame.trainMembers = 1 << UInt128(numbers[index])
      return frame
    }
    var run = single(0)
    for index in 1..<4 { TrainRun.append(single(index), to: &run, stride: 68) }
    #expect(run.offset == 100 && run.length == 210 && run.wireFrames == 4 && run.trainSegmentBytes == 68)
    let made = try #require(TrainRun(run))
    for index in 0..<4 {
      #expect(made.frame(index).offset == whole.frame(index).offset)
      #expect(made.frame(index).length == whole.frame(index).length)
    }
  }
}

/// A route stage and a train to give it, from the VXLAN peer of interface 1; guests 1 and 2 are behind interface 0.
private struct TrainStage: ~Copyable {
  static let domain = DomainIndex(0)
  static let peer = UnderlayAddress(ipv4: 1)
  static let link = InterfaceIndex(1)

  let snapshot: Snapshot
  var route: RouteStage
  var memory: FrameMemory
  var counters: CounterTable
  var batch = RoutedBatch(capacity: RouteStage.trainFramesMax)
  let underlay = CounterBlock()
  let worker = CounterBlock()
  let linkBlock = CounterBlock()

  init() throws {
    let memory = try FrameMemory(slotCount: 1, hugePages: false)
    let snapshot = try Snapshot(
      version: 1,
      interfaces: [
        Snapshot.Interface(InterfaceIndex(0), .port(domain: Self.domain), mtuBytes: 1450),
        Snapshot.Interface(Self.link, .link(peer: Self.peer, domains: [Self.domain]), mtuBytes: 1450),
      ],
      domains: [Snapshot.Domain(Self.domain, vni: 42, macs: MACTable(macsMax: 16))])
    route = RouteStage(snapshot.view)
    self.memory = memory
    self.snapshot = snapshot
    counters = CounterTable(interfaceCount: 2, domainCount: 1, worker: worker.writer, underlay: underlay.writer)
    counters.set(Self.link, InterfaceRecord(.vxlan, laneFirst: 0, laneCount: 1, counters: linkBlock.writer))
    for guest in [testMAC(1), testMAC(2)] {
      send([frame(source: guest, to: testMAC(9), number: 0)], from: InterfaceIndex(0))
    }
  }

  /// - Returns: the runs that it left as, each by the numbers of its datagrams.
  @discardableResult
  mutating func send(_ datagrams: [[UInt8]], from ingress: InterfaceIndex = .none) -> [[Int]] {
    guard let slot = memory.post() else { return [] }
    memory.received(slot)
    var event = IOEvent(.received, 0)
    event.slot = UInt32(slot)
    event.offset = 200
    event.length = UInt32(datagrams.joined().count)
    event.sender = Self.peer
    event.trainSegmentBytes = datagrams.count > 1 ? UInt16(datagrams[0].count) : 0
    var descriptor = VXLANLink.describe(event)
    if ingress != .none {
      descriptor.ingress = ingress
      descriptor.domain = Self.domain
    }
    var head = memory.mutableHead(of: descriptor)
    for (place, byte) in datagrams.joined().enumerated() {
      head.storeBytes(of: byte, toByteOffset: place, as: UInt8.self)
    }
    route.route(descriptor, now: TurnClock(seconds: 1), &memory, counters, into: &batch)
    #expect(memory.holdsTotal == batch.count, "each run holds the slot once")
    var runs: [[Int]] = []
    for place in 0..<batch.count {
      let descriptor = batch[place].descriptor
      let frames = TrainRun(descriptor).map { run in (0..<run.count).map { run.frame($0) } } ?? [descriptor]
      let stride = max(1, UInt32(datagrams[0].count))
      runs.append(frames.map { Int(($0.offset - 200) / stride) })
      memory.release(descriptor.buffer)
    }
    batch.removeAll()
    #expect(memory.freeSlots == 1)
    return runs
  }

  func dropped(_ reason: Counter) -> Int { Int(linkBlock.value(reason) + underlay.value(reason)) }

  /// All that was dropped, whatever for.
  var drops: Int { Counter.allCases.filter(\.isDrop).reduce(0) { $0 + dropped($1) } }
}

/// An IPv4 frame of 60 bytes, with no known protocol in it: its addresses alone make its flow.
private func frame(source: UInt64 = testMAC(9), to destination: UInt64 = testMAC(1), number: UInt8, flow: UInt8 = 9)
  -> [UInt8]
{
  var bytes = [UInt8](repeating: number, count: 60)
  for place in 0..<6 {
    bytes[place] = UInt8(truncatingIfNeeded: destination >> UInt64(40 - 8 * place))
    bytes[6 + place] = UInt8(truncatingIfNeeded: source >> UInt64(40 - 8 * place))
  }
  bytes.replaceSubrange(
    12..<34, with: [8, 0, 0x45, 0, 0, 46, 0, number, 0x40, 0, 64, 253, 0, 0, 10, 0, 0, flow, 10, 0, 0, bytes[5]])
  return bytes
}

private func datagram(_ inner: [UInt8]) -> [UInt8] { [8, 0, 0, 0, 0, 0, 42, 0] + inner }
private func datagrams(_ count: Int) -> [[UInt8]] { (0..<count).map { datagram(frame(number: UInt8($0))) } }

@Suite struct RoutingTrainTests {
  @Test func `A train of one flow leaves as one run`() throws {
    var stage = try TrainStage()
    let runs = stage.send(datagrams(6))
    #expect(runs == [[0, 1, 2, 3, 4, 5]] && stage.drops == 0)
    #expect(stage.linkBlock.value(.inFrames) == 6 && stage.linkBlock.value(.inBytes) == 360)
  }

  @Test func `Of datagrams for two guests each run is one guest's`() throws {
    var stage = try TrainStage()
    var train = datagrams(5)
    for number in 2...3 { train[number] = datagram(frame(to: testMAC(2), number: UInt8(number))) }
    // Both are behind one port: their flows differ.
    let runs = stage.send(train)
    #expect(runs == [[0, 1, 4], [2, 3]] && stage.drops == 0)
  }

  @Test func `Flows that take turns in a train leave as one run each, each in order`() throws {
    for flows in [2, 3, 16] {
      var stage = try TrainStage()
      let count = RouteStage.trainFramesMax
      let train = (0..<count).map { datagram(frame(number: UInt8($0), flow: UInt8($0 % flows))) }
      let runs = stage.send(train)
      #expect(runs == (0..<flows).map { flow in (0..<count).filter { $0 % flows == flow } })
      #expect(stage.drops == 0)
    }
  }

  @Test func `Of more flows than are looked for each still keeps its order`() throws {
    var stage = try TrainStage()
    var random = SeededRandom(seed: 77)
    let flows = (0..<RouteStage.trainFramesMax).map { _ in UInt8.random(in: 0..<40, using: &random) }
    let runs = stage.send(flows.enumerated().map { datagram(frame(number: UInt8($0), flow: $1)) })
    #expect(runs.joined().sorted() == Array(flows.indices) && stage.drops == 0)
    for run in runs { #expect(Set(run.map { flows[$0] }).count == 1) }
    for flow in Set(flows) {
      #expect(runs.joined().filter { flows[$0] == flow } == flows.indices.filter { flows[$0] == flow })
    }
  }

  @Test func `A flow whose frames are not alike in all keeps its order too`() throws {
    var stage = try TrainStage()
    var train = datagrams(6)
    // The ToS of every second one differs; the flow's hash does not look at it.
    for number in [1, 3, 5] { train[number][8 + 15] = 8 }
    let runs = stage.send(train)
    #expect(runs == [[0], [1], [2], [3], [4], [5]])
  }

  @Test func `One malformed datagram among good ones is dropped alone, under its name`() throws {
    func change(_ place: Int, _ value: UInt8) -> ([UInt8]) -> [UInt8] {
      {
        var datagram = $0
        datagram[place] = value
        return datagram
      }
    }
    let cases: [(name: String, reason: Counter, malform: ([UInt8]) -> [UInt8])] = [
      ("no VNI flag", .dropNoVNIFlag, change(0, 0)),
      ("a VNI that nobody has", .dropUnknownVNI, change(6, 43)),
      ("an inner length beyond the datagram", .dropBadInnerLength, change(8 + 17, 200)),
      ("an inner header longer than its packet", .dropBadInnerLength, change(8 + 14, 0x4f)),
      ("a group address as source", .dropBadSource, change(8 + 6, 0xff)),
    ]
    for (name, reason, malform) in cases {
      var stage = try TrainStage()
      var train = datagrams(6)
      train[2] = malform(train[2])
      let runs = stage.send(train)
      #expect(runs == [[0, 1, 3, 4, 5]], "\(name)")
      #expect(stage.dropped(reason) == 1 && stage.drops == 1, "\(name)")
      for place in [0, 5] {
        var train = datagrams(6)
        train[place] = malform(train[place])
        let runs = stage.send(train)
        #expect(runs == [(0..<6).filter { $0 != place }], "\(name)")
      }
      #expect(stage.dropped(reason) == 3 && stage.drops == 3, "\(name)")
    }
  }

  @Test func `A train that was cut short loses its last datagram only`() throws {
    let cases: [(bytes: Int, reason: Counter)] = [
      (1, .dropShortHeader), (7, .dropShortHeader), (8, .dropBadInnerLength), (21, .dropBadInnerLength),
      // The inner IP header says more than there is.
      (67, .dropBadInnerLength),
    ]
    for (bytes, reason) in cases {
      var stage = try TrainStage()
      var train = datagrams(4)
      train[3] = Array(train[3].prefix(bytes))
      let runs = stage.send(train)
      #expect(runs == [[0, 1, 2]], "\(bytes) bytes")
      #expect(stage.dropped(reason) == 1 && stage.drops == 1, "\(bytes) bytes")
    }
  }

  @Test func `A train whose every datagram is malformed leaves nothing and gives its slot back`() throws {
    var stage = try TrainStage()
    let runs = stage.send((0..<100).map { [UInt8($0)] })
    #expect(runs == [] && stage.dropped(.dropShortHeader) == 100)
  }
}

extension FramesCorpusReplay {
  @Test("every input of the train target keeps every promise, and so do trains with random bytes in them")
  func train() throws {
    try replay("train", atLeast: 30) { fuzzTrain($0) }
    var random = SeededRandom(seed: 31)
    for name in try FramesCorpus.names("train") {
      var input = try FramesCorpus.bytes("train", name)
      for _ in 0..<4 {
        input[Int.random(in: input.indices, using: &random)] = random.number()
        fuzzTrain(input.rawBytes)
      }
    }
  }
}
