import Datapath
import Glibc
import Testing

@testable import SimulatedKernel

/// Two hosts, a guest each, joined by relays: what the simulated kernel does to them, and that the checkers see what
/// goes wrong.
struct RelayRun {
  var delivered = 0
  var injected = 0
  var dropped = 0
  var lostInNetwork = 0
  var leakedSlots = 0
  var orderProblems: [String] = []
  var violations: [Violation] = []
  var isConserved = false
  var hasEnded = false
  var counts = SimulatedNetwork.Counts()
  var nanoseconds: UInt64 = 0
  /// Of both relays together.
  var drops: [String: Int] = [:]
  var receiveEnds: [Int32: Int] = [:]
  var blocks = 0
  var wakeups = 0

  /// Frames that nobody accounts for: more than 0 is a loss, less than 0 a frame from nowhere.
  var missing: Int { injected - delivered - dropped - lostInNetwork }

  /// - Parameter frames: frames that each guest sends, over four flows.
  init(
    seed: UInt64, faults: Faults?, planted: PlantedFault? = nil, frames: Int = 150, wakes: Bool = true,
    limits: SimulatedNetwork.Limits = SimulatedNetwork.Limits()
  ) throws {
    let network = SimulatedNetwork(seed: seed, limits: limits)
    network.faults = faults ?? Faults.mixture(&network.random)
    network.planted = planted
    let first = UnderlayAddress(ipv4: 0x0A00_0001)
    let second = UnderlayAddress(ipv4: 0x0A00_0002)
    let devices = [network.addDevice(), network.addDevice()]
    let descriptors = [
      [
        network.openQueue(device: devices[0]), network.openSocket(first, port: 4789),
        network.openSocket(first, connectedTo: second, port: 4789), network.openWaker(),
      ],
      [
        network.openQueue(device: devices[1]), network.openSocket(second, port: 4789),
        network.openSocket(second, connectedTo: first, port: 4789), network.openWaker(),
      ],
    ]
    func makeRelay(_ host: Int) throws -> Relay {
      try Relay(
        network, device: descriptors[host][0], receive: descriptors[host][1], send: descriptors[host][2],
        waker: descriptors[host][3])
    }
    var left = try makeRelay(0)
    var right = try makeRelay(1)
    var checkers = [OrderChecker(), OrderChecker()]

    var numbers = [[UInt32]](repeating: [0, 0, 0, 0], count: 2)
    var sent = [0, 0]
    // Until every frame is accounted for, or for so long that something must be stuck.
    for turn in 0..<100_000 {
      for guest in 0..<2 where sent[guest] < frames {
        if network.isGone(device: devices[guest]) { sent[guest] = frames }
        for _ in 0..<network.random.below(8) where sent[guest] < frames {
          let flow = network.random.below(4)
          let frame = NumberedFrame(
            destination: 0x0200_0000_0000 | UInt64(1 - guest), source: 0x0200_0000_0000 | UInt64(guest),
            flow: UInt32(guest * 4 + flow), number: numbers[guest][flow])
          let bytes = frame.bytes(count: network.random.number(in: NumberedFrame.bytesMin...400))
          guard network.inject(bytes, device: devices[guest]) else { break }
          numbers[guest][flow] += 1
          sent[guest] += 1
        }
      }
      if wakes, network.random.chance(0.02) { network.wake(descriptors[turn % 2][3]) }
      left.turn(network.random.chance(0.5) ? .forEvent : .atMost(nanoseconds: 20_000))
      right.turn(network.random.chance(0.5) ? .sweep : .forBatch(completions: 4, nanoseconds: 20_000))
      for guest in 0..<2 {
        for written in network.takeWritten(device: devices[guest]) { checkers[guest].check(written.frame) }
      }
      if sent == [frames, frames], network.isIdle, left.isQuiet, right.isQuiet { break }
    }
    left.stop()
    right.stop()
    for _ in 0..<10_000 {
      if left.hasEnded && right.hasEnded { break }
      left.turn()
      right.turn()
    }
    for guest in 0..<2 {
      for written in network.takeWritten(device: devices[guest]) { checkers[guest].check(written.frame) }
    }
    hasEnded = left.hasEnded && right.hasEnded
    left.close()
    right.close()
    for host in descriptors { for descriptor in host { network.close(descriptor) } }

    counts = network.counts
    nanoseconds = network.clock.nanoseconds
    delivered = checkers[0].delivered + checkers[1].delivered
    injected = counts.framesInjected
    dropped = left.dropCount + right.dropCount
    drops = left.drops.merging(right.drops, uniquingKeysWith: +)
    receiveEnds = left.receiveEnds.merging(right.receiveEnds, uniquingKeysWith: +)
    blocks = left.blocks + right.blocks
    wakeups = left.wakeups + right.wakeups
    lostInNetwork =
      counts.lostOnWire + counts.receiveQueueFull + counts.noListener + counts.closedSocket
      + counts.framesLostWithDevice
    leakedSlots = left.memory.slotCount - left.memory.freeSlots + right.memory.slotCount - right.memory.freeSlots
    orderProblems = checkers[0].problems + checkers[1].problems
    violations = network.violations
    isConserved = network.isConserved
  }
}

@Suite struct SimulatedKernelTests {
  /// Seeds of the tests over many: few enough for every run of the tests.
  static let seeds: Range<UInt64> = 0..<100

  @Test("without faults every frame arrives, in order, and every slot comes back")
  func faultless() throws {
    let run = try RelayRun(seed: 1, faults: Faults.none)
    #expect(run.delivered == 300)
    #expect(run.dropped == 0)
    #expect(run.missing == 0)
    #expect(run.orderProblems == [])
    #expect(run.violations == [])
    #expect(run.leakedSlots == 0)
    #expect(run.hasEnded)
    #expect(run.isConserved)
  }

  @Test("with any mixture of faults frames are conserved, flows stay in order and slots come back")
  func mixtures() throws {
    var delivered = 0
    var dropped = 0
    for seed in Self.seeds {
      let run = try RelayRun(seed: seed, faults: nil)
      #expect(run.hasEnded, "seed \(seed)")
      #expect(run.missing == 0, "seed \(seed)")
      #expect(run.orderProblems == [], "seed \(seed)")
      #expect(run.violations == [], "seed \(seed)")
      #expect(run.leakedSlots == 0, "seed \(seed)")
      #expect(run.isConserved, "seed \(seed)")
      delivered += run.delivered
      dropped += run.dropped
    }
    // The mixtures must neither let nothing through nor be harmless.
    #expect(delivered > 300 * Self.seeds.count / 2)
    #expect(dropped > Self.seeds.count)
  }

  @Test("one seed gives one run")
  func repeatable() throws {
    for seed in [UInt64(3), 4, 5] {
      let first = try RelayRun(seed: seed, faults: nil)
      let second = try RelayRun(seed: seed, faults: nil)
      #expect(first.counts == second.counts)
      #expect(first.nanoseconds == second.nanoseconds)
      #expect(first.dropped == second.dropped)
    }
  }

  /// One fault alone, and what shows that it struck.
  struct OneFault: Sendable, CustomTestStringConvertible {
    var name: String
    var set: @Sendable (inout Faults) -> Void
    /// Nil where only the order and the time of things change: `SimulatedIOTests` shows those.
    var struck: (@Sendable (RelayRun) -> Bool)?
    var testDescription: String { name }
  }

  static let oneFaults = [
    OneFault(name: "delayed operations", set: { $0.delayedOperation = 0.5 }),
    OneFault(name: "paused chains", set: { $0.pausedChain = 0.5 }),
    OneFault(name: "reordered execution", set: { $0.reorderedExecution = 1 }),
    OneFault(name: "delayed completions", set: { $0.delayedCompletion = 0.5 }),
    OneFault(name: "reordered completions", set: { $0.reorderedCompletion = 1 }),
    OneFault(name: "spurious returns", set: { $0.spuriousReturn = 0.5 }),
    OneFault(name: "spurious wake-ups", set: { $0.spuriousWake = 0.1 }, struck: { $0.wakeups > 0 }),
    OneFault(name: "ended receives", set: { $0.endedReceive = 0.1 }, struck: { $0.receiveEnds[0] ?? 0 > 0 }),
    OneFault(
      name: "failed receives", set: { $0.failedReceive = 0.1 },
      struck: { $0.receiveEnds[EIO] ?? 0 > 0 && $0.receiveEnds[ECONNREFUSED] ?? 0 > 0 }),
    OneFault(
      name: "truncated receives", set: { $0.truncatedReceive = 0.1 }, struck: { $0.drops["truncated"] ?? 0 > 0 }),
    OneFault(name: "full lanes", set: { $0.fullLane = 0.2 }, struck: { $0.blocks > 0 }),
    OneFault(
      name: "false writable",
      set: {
        $0.fullLane = 0.1
        $0.falseWritable = 0.5
      }, struck: { $0.blocks > 0 }),
    OneFault(name: "failed sends", set: { $0.failedSend = 0.1 }, struck: { $0.drops["error \(EIO)"] ?? 0 > 0 }),
    OneFault(name: "too big sends", set: { $0.tooBigSend = 0.1 }, struck: { $0.drops["error \(EMSGSIZE)"] ?? 0 > 0 }),
    OneFault(
      name: "refused sends", set: { $0.refusedSend = 0.1 }, struck: { $0.drops["error \(ECONNREFUSED)"] ?? 0 > 0 }),
    OneFault(
      name: "bad descriptors", set: { $0.badDescriptorSend = 0.1 }, struck: { $0.drops["error \(EBADFD)"] ?? 0 > 0 }),
    OneFault(
      name: "short writes", set: { $0.shortWrite = 0.1 },
      struck: { $0.drops["error \(IOEvent.shortWrite)"] ?? 0 == $0.counts.shortWrites && $0.counts.shortWrites > 0 }),
    OneFault(name: "congestion marks", set: { $0.congestionMark = 0.2 }, struck: { $0.counts.congestionMarks > 0 }),
    OneFault(name: "lost datagrams", set: { $0.lostDatagram = 0.1 }, struck: { $0.counts.lostOnWire > 0 }),
  ]

  @Test("each fault strikes, and a worker that keeps the contract bears it", arguments: oneFaults)
  func eachFault(_ fault: OneFault) throws {
    var faults = Faults.none
    fault.set(&faults)
    let run = try RelayRun(seed: 21, faults: faults, wakes: false)
    if let struck = fault.struck { #expect(struck(run)) }
    #expect(run.hasEnded)
    #expect(run.missing == 0)
    #expect(run.orderProblems == [])
    #expect(run.violations == [])
    #expect(run.leakedSlots == 0)
  }

  @Test("a device that goes away ends its receive with EBADFD and loses nothing uncounted")
  func deviceLoss() throws {
    var faults = Faults.none
    faults.deviceLoss = 0.002
    var ends = 0
    for seed in UInt64(0)..<10 {
      let run = try RelayRun(seed: seed, faults: faults)
      ends += run.receiveEnds[EBADFD] ?? 0
      #expect(run.hasEnded, "seed \(seed)")
      #expect(run.missing == 0, "seed \(seed)")
      #expect(run.leakedSlots == 0, "seed \(seed)")
      #expect(run.violations == [], "seed \(seed)")
    }
    #expect(ends > 0)
  }

  @Test("a full socket answers EAGAIN, drains, and keeps order")
  func fullSocket() throws {
    var limits = SimulatedNetwork.Limits()
    limits.sendBufferBytes = 1_000
    limits.bytesPerMicrosecond = 10
    let run = try RelayRun(seed: 31, faults: Faults.none, limits: limits)
    #expect(run.blocks > 10)
    #expect(run.delivered == 300)
    #expect(run.orderProblems == [])
    #expect(run.missing == 0)
  }

  @Test("a receive queue that overflows loses datagrams under a name")
  func fullReceiveQueue() throws {
    var limits = SimulatedNetwork.Limits()
    limits.receiveQueueDatagramsMax = 2
    limits.delayNanoseconds = 0...0
    limits.collectNanoseconds = 50_000...50_000
    let run = try RelayRun(seed: 32, faults: Faults.none, limits: limits)
    #expect(run.counts.receiveQueueFull > 0)
    #expect(run.missing == 0)
    #expect(run.isConserved)
  }

  @Test("lost datagrams are counted by the network and so conserved")
  func lossIsCounted() throws {
    var faults = Faults.none
    faults.lostDatagram = 0.1
    let run = try RelayRun(seed: 7, faults: faults)
    #expect(run.counts.lostOnWire > 0)
    #expect(run.delivered == 300 - run.counts.lostOnWire)
    #expect(run.missing == 0)
  }

  @Test("a slot that the kernel loses is found by the slot audit")
  func lostSlotIsFound() throws {
    let run = try RelayRun(seed: 11, faults: Faults.none, planted: .lostSlot)
    #expect(run.leakedSlots > 0)
    #expect(
      run.violations.contains { violation in
        if case .slotsUnaccounted(let posted, let lent) = violation { posted > lent } else { false }
      })
    #expect(run.orderProblems == [])
    #expect(run.missing == 0)
  }

  @Test("a chain carried out in the wrong order is found by the order checker")
  func reorderedChainIsFound() throws {
    let run = try RelayRun(seed: 12, faults: Faults.none, planted: .reorderedChain)
    #expect(run.orderProblems.count > 0)
    #expect(run.missing == 0)
    #expect(run.leakedSlots == 0)
  }

  @Test("a send that is reported and does not arrive is found by conservation")
  func uncountedDropIsFound() throws {
    let run = try RelayRun(seed: 13, faults: Faults.none, planted: .uncountedDrop)
    #expect(run.missing > 0)
    #expect(run.orderProblems == [])
    #expect(run.leakedSlots == 0)
  }
}
