import Datapath
import Testing

@testable import Control

@Suite struct PlanTests {
  private func plan(
    _ text: String = soundRules, overrides: [String: String] = [:], allowed: [Int] = Array(0..<8)
  ) throws -> Plan {
    let environment = fixedEnvironment(cpusAllowed: allowed)
    let configuration = try Configuration.parse(text, file: "f.toml", overrides: overrides, environment: environment)
    return Plan(configuration, allowed: allowed)
  }

  @Test func aPipelineHasItsWorkersByRole() throws {
    let plan = try plan()
    #expect(plan.layout == .pipeline)
    #expect(plan.workers.map(\.cpu) == [0, 1, 2, 3])
    #expect(plan.workers.map(\.roles) == [.receive, .receive, .route, .transmit])
    #expect(plan.receivers == [0, 1])
    #expect(plan.routers == [2])
    #expect(plan.transmitters == [3])
    #expect(plan.routers(ofReceiver: 1) == [2])
    #expect(plan.transmitters(ofRouter: 2) == [3])
  }

  @Test func sourcesAreTheWakerThenTheUnderlayThenTheQueuesAndEachFindsItsWayBack() throws {
    // Two families, both encapsulations, and a port with three queues.
    let text = soundRules.replacing("\"10.99.0.1\"", with: "[\"10.99.0.1\", \"fd00::1\"]")
      .replacing("name = \"vm2\"", with: "name = \"vm2\"\nqueues = 3")
    let plan = try plan(text)
    #expect(plan.encapsulations == [.vxlan, .vnetp])
    #expect(plan.queue(ofSource: 0) == nil && plan.underlay(ofSource: 0) == nil, "control's waker")
    var next = 1
    for family in 0..<2 {
      for encapsulation in 0..<2 {
        #expect(plan.source(family: family, encapsulation: encapsulation) == next)
        let found = try #require(plan.underlay(ofSource: next))
        #expect(found == (family, encapsulation))
        #expect(plan.queue(ofSource: next) == nil)
        next += 1
      }
    }
    for port in plan.ports.indices {
      for queue in 0..<plan.ports[port].queues {
        #expect(plan.source(port: port, queue: queue) == next)
        let found = try #require(plan.queue(ofSource: next))
        #expect(found == (port, queue))
        #expect(plan.underlay(ofSource: next) == nil)
        next += 1
      }
    }
    #expect(plan.sourceCount == next)
    #expect(plan.queue(ofSource: next) == nil)
  }

  @Test func onlyEncapsulationsThatALinkUsesHaveSockets() throws {
    #expect(try plan(sound).encapsulations == [.vxlan])
    let alone = try plan(least)
    #expect(alone.encapsulations.isEmpty)
    #expect(alone.source(port: 0, queue: 0) == 1)
  }

  @Test func queuesGoRoundTheReceiversAndATransmitterWritesAQueueThatItReads() throws {
    let text = soundRules.replacing("name = \"vm2\"", with: "name = \"vm2\"\nqueues = 3")
    let pipeline = try plan(text, overrides: ["cpus": "rx=4,5 route=6 tx=7,5"])
    #expect((0..<3).map { pipeline.reader(port: 1, queue: $0) } == [1, 0, 1])
    #expect(pipeline.reader(port: 0, queue: 0) == 0)
    #expect(pipeline.transmitters == [1, 3])
    #expect(pipeline.writtenQueue(port: 1, worker: 1) == 0, "it reads queue 0")
    #expect(pipeline.writtenQueue(port: 1, worker: 3) == 1, "the second transmitter")
    #expect(pipeline.writtenQueue(port: 0, worker: 3) == 0, "there is one")
    let fused = try plan(text, overrides: ["layout": "fused", "cpus": "0,1"])
    #expect(fused.workers.map(\.roles) == [.all, .all])
    #expect((0..<3).map { fused.reader(port: 1, queue: $0) } == [1, 0, 1])
    #expect((0..<2).map { fused.writtenQueue(port: 1, worker: $0) } == [1, 0])
  }

  @Test func lanesAreOneForEachPortAndOneForEachSourcePortOfALink() throws {
    let plan = try plan(overrides: ["source_ports": "3"])
    #expect(plan.ports.indices.map { plan.lane(port: $0) } == [0, 1, 2, 3])
    #expect(plan.lane(link: 1, sourcePort: 2) == 9)
    #expect(plan.laneCount == 10)
    #expect(plan.port(ofLane: 3) == 3)
    #expect(plan.port(ofLane: 4) == nil)
  }

  @Test func thePortsOfAPassthroughAreEachOthersPartnersAndInNoDomain() throws {
    let plan = try plan()
    #expect(plan.ports.indices.map { plan.partner(ofPort: $0) } == [nil, nil, 3, 2])
    #expect(plan.ports.indices.map { plan.domain(ofPort: $0) } == [DomainIndex(0), DomainIndex(1), .none, .none])
    #expect(plan.interface(named: .port("nic")) == InterfaceIndex(2))
    #expect(plan.interface(named: .link("to-c")) == InterfaceIndex(5))
  }

  @Test func theSnapshotHasRulesWiresAndEncapsulations() throws {
    let plan = try plan()
    let snapshot = try plan.snapshot(
      version: 1, tables: plan.domains.map { MACTable(macsMax: $0.macsMax) }, mtuBytes: [1_500, 1_500, 1_500, 1_500])
    // A view lives as long as its snapshot.
    try withExtendedLifetime(snapshot) {
      let view = snapshot.view
      #expect(view.kind(of: InterfaceIndex(3)) == .passthrough)
      #expect(view.wire(of: InterfaceIndex(3)) == InterfaceIndex(2))
      #expect(view.domain(ofPort: InterfaceIndex(0)) == DomainIndex(0))
      let peer = try #require(UnderlayAddress("10.99.0.2"))
      let relay = try #require(UnderlayAddress("10.99.0.3"))
      #expect(
        view.carrier(source: peer, encapsulation: .vnetp, vni: 0) == .link(InterfaceIndex(4), DomainIndex(0)))
      #expect(view.carrier(source: peer, encapsulation: .vxlan, vni: 42) == .unknownVNI)
      #expect(
        view.carrier(source: relay, encapsulation: .vxlan, vni: 43) == .link(InterfaceIndex(5), DomainIndex(1)))
      #expect(view.mayLeaveByLinks(from: InterfaceIndex(5)) && !view.mayLeaveByLinks(from: InterfaceIndex(4)))
      // The rules: anything to the guest goes to its port; what it sends elsewhere goes over the link.
      func targets(_ source: UInt64, _ destination: UInt64, from ingress: Int) -> [InterfaceIndex]? {
        var router = Router(view)
        let decision = router.decide(
          source: source, destination: destination, ingress: InterfaceIndex(ingress), domain: DomainIndex(0),
          now: TurnClock(seconds: 1))
        return switch decision.action {
        case .unicast(let target): [target]
        case .flood(let targets): Array(targets)
        case .drop: nil
        }
      }
      #expect(targets(0x0200_0000_000b, 0x0200_0000_000a, from: 4) == [InterfaceIndex(0)])
      #expect(targets(0x0200_0000_000a, 0xFFFF_FFFF_FFFF, from: 0) == [InterfaceIndex(4)])
      #expect(targets(0x0200_0000_000a, 0xFFFF_FFFF_FFFF, from: 4) == nil, "the rule is for what comes from its port")
      #expect(targets(0x0200_0000_000b, 0x0200_0000_000c, from: 4) == nil)
    }
  }

  @Test(arguments: [
    // Encapsulation, family, fragment, what fits without fragments under 1,500 bytes, what fits at all.
    ("vxlan", "10.99.0.2", "false", 1_450, 1_450), ("vxlan", "fd00::2", "false", 1_430, 1_430),
    ("vnetp", "10.99.0.2", "false", 1_458, 1_458), ("vnetp", "fd00::2", "false", 1_438, 1_438),
    ("vnetp", "10.99.0.2", "true", 1_458, 65_493), ("vnetp", "fd00::2", "true", 1_438, 65_493),
    ("vxlan", "10.99.0.2", "true", 1_450, 65_485),
  ])
  func aLinkCarriesTheUnderlaysMTULessWhatItAdds(
    _ encapsulation: String, _ remote: String, _ fragment: String, _ withoutFragments: Int, _ atAll: Int
  ) throws {
    let text =
      "[underlay]\naddress = [\"10.99.0.1\", \"fd00::1\"]\n" + least
      + "\n[[link]]\nname = \"l\"\nremote = \"\(remote)\""
      + "\nencapsulation = \"\(encapsulation)\"\nfragment = \(fragment)\n"
    let plan = try plan(text)
    #expect(plan.mtuBytesWithoutFragments(link: 0, underlayMTUBytes: 1_500) == withoutFragments)
    #expect(plan.mtuBytesMax(link: 0, underlayMTUBytes: 1_500) == atAll)
    #expect(plan.mtuBytes(port: 0, linkMTUBytes: [withoutFragments]) == withoutFragments, "the port's default")
    #expect(plan.mtuBytesWithoutFragments(link: 0, underlayMTUBytes: 20) == 0, "a route may say any MTU")
  }

  @Test func aPortsMTUIsThatOfTheSmallestLinkOfItsDomain() throws {
    let plan = try plan(sound)
    #expect(plan.mtuBytes(port: 0, linkMTUBytes: [1_450, 1_000]) == 1_450, "to-c carries another domain")
    #expect(plan.mtuBytes(port: 1, linkMTUBytes: [1_450, 1_000]) == 1_400, "as asked")
    #expect(plan.carriedBytes(port: 1, linkMTUBytes: [1_450, 1_000]) == 1_000)
    #expect(try self.plan().carriedBytes(port: 3, linkMTUBytes: [1_450, 1_000]) == nil, "a wired port has no links")
  }
}
