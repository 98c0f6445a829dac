import FuzzEntry
import Testing

@testable import Datapath

/// A train as it lies in a slot from byte 100 on: what routing makes of five datagrams of 68 bytes, the last of 38, of
/// which the first is not in the run.
private func makeRun(_ encapsulation: Encapsulation, count: Int = 4, lastBytes: Int = 30) -> Descriptor {
  let headerBytes = encapsulation == .vxlan ? VXLANHeader.bytes : 0
  var run = Descriptor(
    buffer: BufferReference(slot: 3), offset: 168 + headerBytes, length: (count - 1) * 60 + lastBytes,
    ingress: InterfaceIndex(7))
  run.encapsulation = encapsulation
  run.trainSegmentBytes = UInt16(60 + headerBytes)
  run.wireFrames = UInt16(count)
  run.flowHash = 99
  return run
}

@Suite struct TrainRunTests {
  @Test(arguments: [Encapsulation.vxlan, .vnetp])
  func `Each frame of a run lies a stride further on, and only the last is shorter`(
    _ encapsulation: Encapsulation
  ) throws {
    let run = try #require(TrainRun(makeRun(encapsulation)))
    let stride = encapsulation == .vxlan ? 68 : 60
    #expect(run.count == 4 && run.frameBytesMax == 60)
    for number in 0..<4 {
      let frame = run.frame(number)
      #expect(Int(frame.offset) == Int(run.descriptor.offset) + number * stride)
      #expect(frame.length == (number == 3 ? 30 : 60))
      #expect(frame.wireFrames == 1 && frame.trainSegmentBytes == 0)
      #expect(frame.buffer == BufferReference(slot: 3) && frame.ingress == InterfaceIndex(7) && frame.flowHash == 99)
    }
  }

  @Test(arguments: [Encapsulation.vxlan, .vnetp])
  func `What is left of a run has the same frames, down to the last alone`(_ encapsulation: Encapsulation) throws {
    let run = try #require(TrainRun(makeRun(encapsulation)))
    for first in 0..<4 {
      let rest = try #require(run.from(first))
      #expect(rest.count == 4 - first)
      #expect(rest.frameBytesMax == (first == 3 ? 30 : 60))
      for number in 0..<rest.count {
        let (frame, same) = (rest.frame(number), run.frame(first + number))
        #expect(frame.offset == same.offset && frame.length == same.length)
      }
    }
  }

  @Test func `Frames of equal length have no shorter last one`() throws {
    let run = try #require(TrainRun(makeRun(.vxlan, lastBytes: 60)))
    #expect((0..<4).map { run.frame($0).length } == [60, 60, 60, 60])
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

  @Test func `A frame goes on a run that ends where it starts, and goes the same way in all`() throws {
    var descriptor = makeRun(.vxlan, count: 3, lastBytes: 60)
    descriptor.domain = DomainIndex(2)
    descriptor.typeOfService = 8
    let run = RoutedFrame(descriptor: descriptor, target: .unicast(InterfaceIndex(1)), vni: 42)
    var next = run
    next.descriptor = try #require(TrainRun(makeRun(.vxlan))).frame(3)
    next.descriptor.domain = DomainIndex(2)
    next.descriptor.typeOfService = 8
    let stride = descriptor.trainSegmentBytes
    #expect(run.goesOn(with: next, stride: stride))

    func refuses(_ change: (inout RoutedFrame) -> Void) -> Bool {
      var other = next
      change(&other)
      return !run.goesOn(with: other, stride: stride)
    }
    #expect(refuses { $0.target = .unicast(InterfaceIndex(2)) })
    #expect(refuses { $0.descriptor.flowHash += 1 })
    #expect(refuses { $0.descriptor.typeOfService = 0 })
    #expect(refuses { $0.descriptor.domain = DomainIndex(3) })
    #expect(refuses { $0.descriptor.ingress = InterfaceIndex(8) })
    #expect(refuses { $0.descriptor.offset += UInt32(stride) })

    var joined = run
    joined.append(next, stride: stride)
    let whole = try #require(TrainRun(joined.descriptor))
    #expect(whole.count == 4 && whole.descriptor.length == 210)
    #expect(whole.frame(3).offset == next.descriptor.offset && whole.frame(3).length == 30)
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
private func frame(source: UInt64 = testMAC(9), to destination: UInt64 = testMAC(1), number: UInt8) -> [UInt8] {
  var bytes = [UInt8](repeating: number, count: 60)
  for place in 0..<6 {
    bytes[place] = UInt8(truncatingIfNeeded: destination >> UInt64(40 - 8 * place))
    bytes[6 + place] = UInt8(truncatingIfNeeded: source >> UInt64(40 - 8 * place))
  }
  bytes.replaceSubrange(
    12..<34, with: [8, 0, 0x45, 0, 0, 46, 0, number, 0x40, 0, 64, 253, 0, 0, 10, 0, 0, 9, 10, 0, 0, bytes[5]])
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
    #expect(runs == [[0, 1], [2, 3], [4]] && stage.drops == 0)
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
      #expect(runs == [[0, 1], [3, 4, 5]], "\(name)")
      #expect(stage.dropped(reason) == 1 && stage.drops == 1, "\(name)")
      // At either end it splits nothing.
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
    var random = FramesRandom(seed: 31)
    for name in try FramesCorpus.names("train") {
      var input = try FramesCorpus.bytes("train", name)
      for _ in 0..<4 {
        input[Int.random(in: input.indices, using: &random)] = random.number()
        fuzzTrain(input.rawBytes)
      }
    }
  }
}
