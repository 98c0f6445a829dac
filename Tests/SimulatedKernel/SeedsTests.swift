import Glibc
import SimulatedKernel
import Testing

@testable import Datapath

/// Two or three hosts with the real worker over the simulated kernel: guests send numbered frames, unicast and
/// broadcast, and super-frames, in one or two domains with the same MACs and over wires, under a mixture of faults.
struct ForwarderRun {
  var problems: [String] = []
  var violations: [Violation] = []
  var counts = SimulatedNetwork.Counts()
  var delivered = 0
  var dropped = 0
  /// The kind of a flow of super-frames.
  private static let superKind = 3
  /// Every counter of domains, underlay and workers, summed.
  var reached: [Counter: Int] = [:]
  var plantedCount = 0
  var nanoseconds: UInt64 = 0

  /// Deliveries that show that a way was taken.
  enum Sight: CaseIterable {
    case superFrame, superFrameOfPipeline, segment, segmentOfPipeline, relayed, relayedBroadcast, byWire, byRules
    case copyByRules, copyByRulesOfPipeline, byVNETP, joined, joinedByPipeline
  }
  var sights: Set<Sight> = []

  /// What was found, by the check that finds it.
  var ordering: [String] = []
  var conservation: [String] = []
  var slots: [String] = []
  var all: [String] { problems + ordering + conservation + slots + violations.map { "\($0)" } }

  init(
    seed: UInt64, faults: Faults? = nil, plan: SimulatedHost.Plan? = nil, planted: PlantedFault? = nil,
    frames: Int = 60,
    trains: Double = 0.5
  ) throws {
    var limits = SimulatedNetwork.Limits()
    limits.trains = trains
    if seed % 3 == 0 { limits.trainFramesMax = 64 }
    let network = SimulatedNetwork(seed: seed, limits: limits)
    network.faults = faults ?? Faults.mixture(&network.random)
    network.planted = planted
    let plan = plan ?? SimulatedHost.Plan.mixture(&network.random)
    var hosts = try (0..<plan.hosts).map { try SimulatedHost(network, plan, number: $0) }
    // For the workers to open what they were told to.
    for _ in 0..<50 { for host in hosts { try host.turn() } }

    // A guest is a port of a host; its number within its domain makes its MAC, so domains use the same MACs. Each
    // host's wire counts as a domain of its own, behind those of all hosts.
    struct Guest {
      var host: Int
      var port: Int
      var domain: Int
      var mac: UInt64
      var sent = 0
      var checker = OrderChecker()
    }
    var guests: [Guest] = []
    for host in 0..<plan.hosts {
      for port in 0..<plan.portCount {
        let place = plan.domain(ofPort: port) == nil ? port - plan.memberCount : port / plan.domains
        guests.append(
          Guest(
            host: host, port: port, domain: plan.domain(ofPort: port) ?? plan.domains + host,
            mac: plan.mac(ofGuest: place, host: host)))
      }
    }
    var numbers: [UInt32: UInt32] = [:]

    func see(
      _ frame: NumberedFrame, _ written: SimulatedNetwork.WrittenFrame, from source: Guest, at guest: Guest
    ) {
      let isPipeline = plan.workers > 1
      let isCopy = frame.destination == NumberedFrame.broadcast
      func add(_ sight: Sight, _ isSeen: Bool) { if isSeen { sights.insert(sight) } }
      if NumberedSuperFrame.isOne(written.frame) {
        let isWhole = written.virtioHeader.contains { $0 != 0 }
        add(isWhole ? .superFrame : .segment, true)
        add(isWhole ? .superFrameOfPipeline : .segmentOfPipeline, isPipeline)
        // Links carry segments; those that came in one train are joined again.
        let isJoined = isWhole && source.host != guest.host
        add(.joined, isJoined)
        add(.joinedByPipeline, isJoined && isPipeline)
        if !isWhole && source.host == guest.host { problems.append("a super-frame was cut for a port") }
      }
      add(.relayed, abs(source.host - guest.host) == 2 && plan.isChain)
      add(.relayedBroadcast, abs(source.host - guest.host) == 2 && plan.isChain && isCopy)
      add(.byWire, guest.domain >= plan.domains)
      let isByRules = guest.domain < plan.domainsWithRules
      add(.byRules, isByRules)
      // Beside the other guest there always is a link.
      add(.copyByRules, isByRules && isCopy && plan.guests > 1)
      add(.copyByRulesOfPipeline, isByRules && isCopy && plan.guests > 1 && isPipeline)
      add(.byVNETP, plan.encapsulation == .vnetp && source.host != guest.host)
    }

    /// Takes what arrived at the guests and checks it.
    func look() {
      for place in guests.indices {
        for written in network.takeWritten(device: hosts[guests[place].host].devices[guests[place].port]) {
          let before = guests[place].checker.delivered
          guard let frame = guests[place].checker.check(written) else { continue }
          delivered += guests[place].checker.delivered - before
          see(frame, written, from: guests[Int(frame.flow >> 16 & 0xFF)], at: guests[place])
          if frame.flow >> 24 != guests[place].domain {
            problems.append("a frame of domain \(frame.flow >> 24) reached domain \(guests[place].domain)")
          }
          if frame.source == guests[place].mac { problems.append("guest \(place) got its own frame") }
        }
      }
    }

    /// A datagram that no host sent and none may forward.
    func forge() {
      let host = network.random.below(plan.hosts)
      let peer = plan.address(plan.peers(of: host)[0])
      // Flags, reserved, VNI, reserved; then an inner frame.
      let header: [UInt8] = [8, 0, 0, 0, 0, 0, UInt8(plan.vni(0)), 0]
      let frame = NumberedFrame(destination: NumberedFrame.broadcast, source: 0x0200_0000_0001, flow: 0, number: 0)
        .bytes(count: 80)
      var source = peer
      let bytes: [UInt8]
      switch network.random.below(6) {
      case 0:
        source = plan.address(100)
        bytes = header + frame
      case 1: bytes = Array(header.prefix(network.random.below(8)))
      case 2: bytes = [0] + header.dropFirst() + frame
      case 3: bytes = [8, 0, 0, 0, 0, 99, 0, 0] + frame
      case 4: bytes = header + frame.prefix(network.random.below(14))
      // The inner IP header claims more than there is.
      default: bytes = header + frame.prefix(60)
      }
      send(bytes, from: source, to: host)
    }

    /// The same where the datagram is the frame.
    func forgeVNETP() {
      let host = network.random.below(plan.hosts)
      let peer = plan.address(plan.peers(of: host)[0])
      let frame = NumberedFrame(destination: NumberedFrame.broadcast, source: 0x0200_0000_0001, flow: 0, number: 0)
        .bytes(count: 80)
      switch network.random.below(4) {
      case 0: send(frame, from: plan.address(100), to: host)
      case 1: send(Array(frame.prefix(network.random.below(14))), from: peer, to: host)
      case 2: send([8, 0, 0, 0, 0, 0, UInt8(plan.vni(0)), 0] + frame, from: peer, to: host)
      default: send(Array(frame.prefix(60)), from: peer, to: host)
      }
    }

    func send(_ bytes: [UInt8], from source: UnderlayAddress, to host: Int) {
      let port = UInt16(network.random.number(in: 1...60_000))
      network.forge(bytes, from: source, port: port, to: plan.address(host), port: plan.underlayPort)
    }

    var isFinished = false
    for turn in 0..<200_000 {
      for place in guests.indices where guests[place].sent < frames {
        let sender = guests[place]
        let device = hosts[sender.host].devices[sender.port]
        for _ in 0..<network.random.below(6) where guests[place].sent < frames {
          let isSuper = plan.isPacket(sender.port) && network.random.chance(0.3)
          let kind = isSuper ? Self.superKind : network.random.below(3)
          let others = guests.filter { $0.domain == sender.domain && $0.mac != sender.mac }
          let isBroadcast = network.random.chance(0.1)
          let isForNobody = !isBroadcast && network.random.chance(0.02)
          let other = isBroadcast ? 255 : isForNobody ? 254 : network.random.below(others.count)
          let destination =
            isBroadcast ? NumberedFrame.broadcast : isForNobody ? 0x0200_0000_00FE : others[other].mac
          // Domain, sender, destination, kind: one flow.
          let flow = UInt32(sender.domain) << 24 | UInt32(place) << 16 | UInt32(other) << 8 | UInt32(kind)
          let number = numbers[flow, default: 0]
          // The guest's kernel keeps a flow on one queue.
          let queue = Int(flow % UInt32(plan.receivers.count))
          if isSuper {
            let whole = NumberedSuperFrame(
              destination: destination, source: sender.mac, flow: flow, number: number,
              // Now and then more than a train may have.
              segments: network.random.number(in: network.random.chance(0.1) ? 65...140 : 2...6),
              lastBytes: network.random.number(
                in: NumberedSuperFrame.lastBytesMin...NumberedSuperFrame.segmentBytes(flow: flow)))
            guard network.inject(whole.bytes, virtioHeader: whole.virtioHeader, device: device, queue: queue) else {
              break
            }
            numbers[flow] = number + UInt32(whole.segments)
            guests[place].sent += whole.segments
            continue
          }
          let frame = NumberedFrame(destination: destination, source: sender.mac, flow: flow, number: number)
          let bytes = frame.bytes(count: network.random.number(in: NumberedFrame.bytesMin...300))
          guard network.inject(bytes, device: device, queue: queue) else { break }
          numbers[flow] = number + 1
          guests[place].sent += 1
        }
        if network.isGone(device: device) { guests[place].sent = frames }
      }
      if network.random.chance(0.02), !guests.allSatisfy({ $0.sent >= frames }) {
        if plan.encapsulation == .vxlan { forge() } else { forgeVNETP() }
      }
      if network.random.chance(0.005) { try hosts[network.random.below(hosts.count)].publish() }
      for host in hosts { try host.turn() }
      look()
      // An audit in mid-run holds too.
      if turn % 64 == 63 {
        for host in hosts {
          for audit in host.audits() where !audit.holds { conservation.append("turn \(turn): \(audit)") }
        }
        isFinished =
          guests.allSatisfy { $0.sent >= frames } && network.isIdle && hosts.allSatisfy { $0.inFlight == 0 }
        if isFinished || !conservation.isEmpty { break }
      }
    }
    if !isFinished && conservation.isEmpty {
      problems.append(
        "frames are stuck: queued \(network.framesQueued), on the wire \(network.datagramsInFlight), "
          + "in slots \(network.unreportedCount), at workers \(hosts.map(\.inFlight))")
    }
    for host in hosts { host.drain() }
    for _ in 0..<20_000 {
      if hosts.allSatisfy(\.isStopped) { break }
      for host in hosts { try host.turn() }
    }
    look()
    if !hosts.allSatisfy(\.isStopped) { problems.append("a worker does not stop") }

    // Each host by its own books.
    for host in hosts {
      for audit in host.audits() {
        if audit.slotsLost != 0 || audit.operationsLost != 0 { slots.append("host \(host.number): \(audit)") }
        if !audit.holds { conservation.append("host \(host.number): \(audit)") }
      }
    }
    // The hosts' books against what the network and the guests saw.
    func same(_ what: String, _ left: Int, _ right: Int) {
      if left != right { conservation.append("\(what): \(left), \(right)") }
    }
    func total(_ value: (SimulatedHost) -> Int) -> Int { hosts.reduce(0) { $0 + value($1) } }
    same("frames that devices gave, and ports got", network.counts.framesReceived, total { $0.ports(.inFrames) })
    same("frames that ports sent, and devices took", total { $0.ports(.outFrames) }, network.counts.framesWritten)
    same("frames that links sent, and sockets took", total { $0.links(.outFrames) }, network.counts.datagramsSent)
    same(
      "datagrams that sockets gave, and workers got", network.counts.datagramsReceived, total { $0.underlay(.inFrames) }
    )
    same(
      "frames that devices took, and guests saw", network.counts.framesWritten,
      guests.reduce(0) { $0 + $1.checker.delivered })
    if !network.isConserved { conservation.append("the network lost count: \(network.counts)") }

    for (place, guest) in guests.enumerated() { ordering += guest.checker.problems.map { "guest \(place): \($0)" } }
    for counter in Counter.allCases {
      let value = total { $0.domains(counter) + $0.underlay(counter) + $0.workers(counter) }
      reached[counter, default: 0] += value
      if counter.isDrop { dropped += value }
    }
    // Closes every descriptor: nothing may be out on any.
    hosts.removeAll()
    violations = network.violations
    counts = network.counts
    plantedCount = network.plantedCount
    nanoseconds = network.clock.nanoseconds
  }
}

@Suite struct SeedsTests {
  /// `VNETR_SEEDS` says how many seeds to run, from 1 on (200 where it says nothing); `VNETR_SEED` runs one alone.
  static var seeds: ClosedRange<UInt64> {
    func number(_ name: String) -> UInt64? {
      guard let text = unsafe getenv(name) else { return nil }
      return unsafe UInt64(String(cString: text))
    }
    if let seed = number("VNETR_SEED") { return seed...seed }
    return 1...max(1, number("VNETR_SEEDS") ?? 200)
  }

  @Test("over many seeds frames are conserved, slots keep one owner and flows their order")
  func manySeeds() throws {
    var delivered = 0
    var reached: [Counter: Int] = [:]
    var sights: Set<ForwarderRun.Sight> = []
    var (trainsRefused, trainsTooLong) = (0, 0)
    var failures = 0
    for seed in Self.seeds {
      let run = try ForwarderRun(seed: seed)
      #expect(run.all == [], "seed \(seed)")
      delivered += run.delivered
      reached.merge(run.reached, uniquingKeysWith: +)
      sights.formUnion(run.sights)
      trainsRefused += run.counts.trainsRefused
      trainsTooLong += run.counts.trainsTooLong
      if !run.all.isEmpty { failures += 1 }
      if failures == 5 { break }
    }
    // The mixtures must neither let nothing through nor be harmless: what they are for is reached.
    #expect(delivered > 50 * Self.seeds.count)
    guard Self.seeds.count >= 200 else { return }
    for sight in ForwarderRun.Sight.allCases { #expect(sights.contains(sight), "\(sight) was never seen") }
    #expect(trainsRefused > 0 && trainsTooLong > 0)
    for counter in Self.mustBeReached { #expect(reached[counter, default: 0] > 0, "\(counter) was never reached") }
  }

  private static let mustBeReached: [Counter] = [
    .copies, .dropUnknownSource, .dropShortHeader, .dropNoVNIFlag, .dropUnknownVNI, .dropOversizedDatagram,
    .dropBadInnerLength, .dropOversizedFrame, .dropInterfaceDown, .dropQueueFull, .dropNoSendOperation, .dropTooBig,
    .dropRefused, .dropSendFailed, .dropShortWrite, .macsLearned, .receiveRearms, .receiveStarved, .laneBlocks,
    .resends, .modeSwitches, .handedOnFrames, .takenOverFrames, .dropRingFull,
    .dropNoRoute, .dropWrongEncapsulation, .trains, .trainRefusals,
  ]

  @Test("without faults nothing is dropped but what has nowhere to go")
  func faultless() throws {
    var plan = SimulatedHost.Plan()
    plan.hosts = 3
    plan.domains = 2
    plan.guests = 2
    let run = try ForwarderRun(seed: 1, faults: Faults.none, plan: plan)
    #expect(run.all == [])
    #expect(run.delivered >= 60 * 12)
  }

  @Test("a super-frame counts as one receive, as does a train")
  func receives() throws {
    func counted(trains: Double, hasPacketPorts: Bool) throws -> (receives: Int, frames: Int) {
      var plan = SimulatedHost.Plan()
      plan.hasPacketPorts = hasPacketPorts
      let run = try ForwarderRun(seed: 1, faults: Faults.none, plan: plan, trains: trains)
      return (run.reached[.receives, default: 0], run.counts.framesReceived + run.counts.datagramsReceived)
    }
    // TAP ports' guests send single frames here.
    let single = try counted(trains: 0, hasPacketPorts: false)
    #expect(single.receives > 0)
    #expect(single.receives == single.frames)
    let trains = try counted(trains: 0.5, hasPacketPorts: false)
    #expect(trains.receives < trains.frames)
    let superFrames = try counted(trains: 0, hasPacketPorts: true)
    #expect(superFrames.receives < superFrames.frames)
  }

  @Test("a slot that the kernel loses is found by the slot audit")
  func lostSlotIsFound() throws {
    var plan = SimulatedHost.Plan()
    plan.roles = [.all, .all]
    let run = try ForwarderRun(seed: 2, faults: Faults.none, plan: plan, planted: .lostSlot)
    #expect(run.plantedCount > 0)
    #expect(
      run.violations.contains { violation in
        if case .slotsUnaccounted(let posted, let lent) = violation { posted > lent } else { false }
      })
    #expect(run.slots.contains { $0.contains("slotsLost: ") }, "the worker's own audit finds it too")
    #expect(run.ordering == [])
  }

  @Test("a flow that the kernel reorders is found by the order checker")
  func reorderedFlowIsFound() throws {
    let run = try ForwarderRun(seed: 3, faults: Faults.none, plan: SimulatedHost.Plan(), planted: .reorderedChain)
    #expect(run.plantedCount > 0)
    #expect(run.ordering.count > 0)
    #expect(run.conservation == [])
    #expect(run.slots == [])
  }

  @Test("a drop that nobody counts is found by conservation")
  func uncountedDropIsFound() throws {
    let run = try ForwarderRun(seed: 4, faults: Faults.none, plan: SimulatedHost.Plan(), planted: .uncountedDrop)
    #expect(run.plantedCount > 0)
    #expect(run.conservation.count > 0)
    #expect(run.ordering == [])
    #expect(run.slots == [])
  }

  @Test("devices that go away and datagrams that are lost leave nothing uncounted")
  func lossAndDeviceLoss() throws {
    for seed in UInt64(1)...10 {
      var random = SimulatedRandom(seed: seed)
      var faults = Faults.mixture(&random)
      faults.lostDatagram = 0.05
      faults.deviceLoss = 0.0005
      let run = try ForwarderRun(seed: seed, faults: faults)
      #expect(run.all == [], "seed \(seed)")
    }
  }
}
