import Testing

@testable import Datapath

/// A route stage with frames to give it: interface 0 is a port of the blue domain, 1 a VXLAN link and 2 a VNET/P link
/// to different hosts, both with the blue domain; 3 and 4 are wired to each other.
private struct Stage: ~Copyable {
  static let blue = DomainIndex(0)
  static let vxlanHost = UnderlayAddress(ipv4: 1)
  static let vnetpHost = UnderlayAddress(ipv4: 2)
  static let stranger = UnderlayAddress(ipv4: 9)

  let snapshot: Snapshot
  var route: RouteStage
  var memory: FrameMemory
  let counters: CounterTable
  var batch = RoutedBatch(capacity: 16)
  let underlay = CounterBlock()
  let worker = CounterBlock()

  init() throws {
    let memory = try FrameMemory(slotCount: 16, hugePages: false)
    let snapshot = try Snapshot(
      version: 1,
      interfaces: [
        Snapshot.Interface(InterfaceIndex(0), .port(domain: Self.blue), mtuBytes: 1450),
        Snapshot.Interface(InterfaceIndex(1), .link(peer: Self.vxlanHost, domains: [Self.blue]), mtuBytes: 1450),
        Snapshot.Interface(
          InterfaceIndex(2), .link(peer: Self.vnetpHost, domains: [Self.blue], encapsulation: .vnetp), mtuBytes: 1450),
        Snapshot.Interface(InterfaceIndex(3), .passthrough(to: InterfaceIndex(4)), mtuBytes: 1450),
        Snapshot.Interface(InterfaceIndex(4), .passthrough(to: InterfaceIndex(3)), mtuBytes: 1450),
      ],
      domains: [Snapshot.Domain(Self.blue, vni: 42, macs: MACTable(macsMax: 16))])
    route = RouteStage(snapshot.view)
    self.memory = memory
    self.snapshot = snapshot
    counters = CounterTable(interfaceCount: 5, domainCount: 1, worker: worker.writer, underlay: underlay.writer)
  }

  /// Routes one frame or datagram; returns where it goes, and whether its slot came back.
  mutating func send(
    _ bytes: [UInt8], from ingress: InterfaceIndex = .none, domain: DomainIndex = .none,
    sender: UnderlayAddress = Self.vnetpHost, _ encapsulation: Encapsulation = .vnetp
  ) -> (frame: RoutedFrame?, isReleased: Bool) {
    guard let slot = memory.post() else { return (nil, false) }
    memory.received(slot)
    var descriptor = Descriptor(
      buffer: BufferReference(slot: slot), offset: 0, length: bytes.count, ingress: ingress)
    descriptor.domain = domain
    descriptor.sender = sender
    descriptor.encapsulation = encapsulation
    var head = memory.mutableHead(of: descriptor)
    for (place, byte) in bytes.enumerated() { head.storeBytes(of: byte, toByteOffset: place, as: UInt8.self) }
    let freeBefore = memory.freeSlots
    batch.removeAll()
    route.route(descriptor, now: TurnClock(seconds: 1), &memory, counters, into: &batch)
    return (batch.count > 0 ? batch[0] : nil, memory.freeSlots > freeBefore)
  }
}

private func frame(_ source: UInt64, _ destination: UInt64, bytes count: Int = 60) -> [UInt8] {
  var bytes = [UInt8](repeating: 0, count: count)
  for place in 0..<6 {
    bytes[place] = UInt8(truncatingIfNeeded: destination >> UInt64(40 - 8 * place))
    bytes[6 + place] = UInt8(truncatingIfNeeded: source >> UInt64(40 - 8 * place))
  }
  // No type that is parsed further.
  (bytes[12], bytes[13]) = (0x88, 0xB5)
  return bytes
}

private func vxlan(_ vni: UInt8, _ inner: [UInt8]) -> [UInt8] { [8, 0, 0, 0, 0, 0, vni, 0] + inner }

@Suite struct RoutingStageTests {
  @Test func `A raw frame of a VNET/P peer is routed as it is, in its link's domain`() throws {
    var stage = try Stage()
    let (sent, _) = stage.send(frame(testMAC(1), testBroadcast))
    let routed = try #require(sent)
    #expect(routed.descriptor.ingress == InterfaceIndex(2))
    #expect(routed.descriptor.domain == Stage.blue)
    #expect(routed.descriptor.offset == 0 && routed.descriptor.length == 60)
    guard case .flood(let targets) = routed.target else {
      Issue.record("a broadcast floods")
      return
    }
    #expect(Array(targets) == [InterfaceIndex(0)])
    let (answer, _) = stage.send(frame(testMAC(2), testMAC(1)), from: InterfaceIndex(0), domain: Stage.blue)
    guard case .unicast(InterfaceIndex(2))? = answer?.target else {
      Issue.record("the answer goes where its destination was learned")
      return
    }
  }

  @Test func `The same peer's VXLAN datagrams still come by VXLAN, and nobody's by either`() throws {
    var stage = try Stage()
    let inner = vxlan(42, frame(testMAC(1), testBroadcast))
    let (sent, _) = stage.send(inner, sender: Stage.vxlanHost, .vxlan)
    #expect(sent?.descriptor.ingress == InterfaceIndex(1))
    #expect(sent?.descriptor.offset == 8)
    let cases: [(UnderlayAddress, Encapsulation, Counter)] = [
      (Stage.stranger, .vxlan, .dropUnknownSource), (Stage.stranger, .vnetp, .dropUnknownSource),
      // Known by a VNET/P link, on the VXLAN port.
      (Stage.vnetpHost, .vxlan, .dropUnknownVNI),
    ]
    for (sender, encapsulation, reason) in cases {
      let before = stage.underlay.value(reason)
      let (sent, isReleased) = stage.send(inner, sender: sender, encapsulation)
      #expect(sent == nil && isReleased)
      #expect(stage.underlay.value(reason) == before + 1)
    }
  }

  @Test func `VXLAN at the VNET/P port, and less than an Ethernet header, are dropped by name`() throws {
    var stage = try Stage()
    let inner = frame(testMAC(1), testBroadcast)
    for sender in [Stage.vnetpHost, Stage.vxlanHost] {
      let before = stage.underlay.value(.dropWrongEncapsulation)
      let (sent, isReleased) = stage.send(vxlan(42, inner), sender: sender)
      #expect(sent == nil && isReleased)
      #expect(stage.underlay.value(.dropWrongEncapsulation) == before + 1)
    }
    // A raw frame of a host that has only a VXLAN link.
    let (foreign, _) = stage.send(inner, sender: Stage.vxlanHost)
    #expect(foreign == nil && stage.underlay.value(.dropUnknownSource) == 1)
    for count in [0, 1, 13] {
      let before = stage.underlay.value(.dropShortHeader)
      let (sent, isReleased) = stage.send([UInt8](repeating: 2, count: count))
      #expect(sent == nil && isReleased)
      #expect(stage.underlay.value(.dropShortHeader) == before + 1)
    }
    // Nearly VXLAN: a reserved bit set, or too short to hold a frame.
    var reserved = vxlan(42, inner)
    reserved[1] = 1
    for bytes in [reserved, Array(vxlan(42, inner).prefix(21))] {
      _ = stage.send(bytes)
      #expect(stage.underlay.value(.dropWrongEncapsulation) == 2)
    }
  }

  @Test func `A frame of a wired port leaves by the other end, whatever its addresses`() throws {
    var stage = try Stage()
    for (from, to) in [(3, 4), (4, 3)] {
      for source in [testMAC(1), testBroadcast, 0] {
        let (sent, _) = stage.send(frame(source, testMAC(7)), from: InterfaceIndex(from))
        let routed = try #require(sent)
        guard case .unicast(InterfaceIndex(to)) = routed.target else {
          Issue.record("\(from) is wired to \(to)")
          continue
        }
        #expect(routed.descriptor.domain == .none && routed.vni == 0)
      }
    }
    // A flow's frames have one hash, so that they leave in order.
    let (one, _) = stage.send(frame(testMAC(1), testMAC(2)), from: InterfaceIndex(3))
    let (two, _) = stage.send(frame(testMAC(1), testMAC(2), bytes: 90), from: InterfaceIndex(3))
    #expect(one?.descriptor.flowHash == two?.descriptor.flowHash && one?.descriptor.flowHash != 0)
    #expect(stage.snapshot.view.macs(of: Stage.blue)?.count == 0)
  }

  @Test func `A port that is in no domain and not wired any more forwards nothing`() throws {
    var stage = try Stage()
    let (sent, isReleased) = stage.send(frame(testMAC(1), testMAC(2)), from: InterfaceIndex(0))
    #expect(sent == nil && isReleased)
  }
}

@Suite struct RoutingWireTests {
  private func refusal(_ interfaces: [(Int, Snapshot.Interface.Kind)], routed: Bool = false) -> Snapshot.Invalid? {
    do throws(Snapshot.Invalid) {
      _ = try Snapshot(
        version: 1, interfaces: interfaces.map { Snapshot.Interface(InterfaceIndex($0.0), $0.1, mtuBytes: 1450) },
        domains: (0..<2).map {
          Snapshot.Domain(
            DomainIndex($0), vni: UInt32(10 + $0), macs: MACTable(macsMax: 16),
            forwarding: routed ? .routes([]) : .learning)
        })
      return nil
    } catch {
      return error
    }
  }

  @Test func `A wire has two ends that name each other`() throws {
    func wire(_ end: Int) -> Snapshot.Interface.Kind { .passthrough(to: InterfaceIndex(end)) }
    #expect(refusal([(0, wire(1)), (1, wire(0))]) == nil)
    #expect(refusal([(0, wire(1)), (1, wire(0)), (2, wire(0))]) == .wireNotMutual(InterfaceIndex(2)))
    #expect(refusal([(0, wire(0))]) == .wireNotMutual(InterfaceIndex(0)))
    #expect(refusal([(0, wire(7))]) == .wireNotMutual(InterfaceIndex(0)))
    #expect(refusal([(0, wire(0xFFFF))]) == .wireNotMutual(InterfaceIndex(0)))
    #expect(refusal([(0, wire(1)), (1, .port(domain: DomainIndex(0)))]) == .wireNotMutual(InterfaceIndex(0)))
    let snapshot = try Snapshot(
      version: 1, interfaces: [0, 1].map { Snapshot.Interface(InterfaceIndex($0), wire(1 - $0), mtuBytes: 1450) },
      domains: [])
    defer { withExtendedLifetime(snapshot) {} }
    #expect(snapshot.view.kind(of: InterfaceIndex(0)) == .passthrough)
    #expect(snapshot.view.wire(of: InterfaceIndex(0)) == InterfaceIndex(1))
    #expect(snapshot.view.wire(of: InterfaceIndex(9)) == .none)
    #expect(!snapshot.view.isMember(InterfaceIndex(0), of: .none))
  }

  @Test func `A VNET/P link carries one domain, and is its peer's only one`() {
    func link(_ peer: UInt32, _ domains: [Int], _ encapsulation: Encapsulation) -> Snapshot.Interface.Kind {
      .link(
        peer: UnderlayAddress(ipv4: peer), domains: domains.map { DomainIndex($0) }, encapsulation: encapsulation)
    }
    #expect(refusal([(0, link(1, [0], .vnetp))]) == nil)
    #expect(refusal([(0, link(1, [0, 1], .vnetp))]) == .vnetpDomains(InterfaceIndex(0), count: 2))
    #expect(refusal([(0, link(1, [], .vnetp))]) == .vnetpDomains(InterfaceIndex(0), count: 0))
    let peer = UnderlayAddress(ipv4: 1)
    #expect(refusal([(0, link(1, [0], .vnetp)), (1, link(1, [1], .vnetp))]) == .ambiguousPeer(peer, vni: 11))
    #expect(refusal([(0, link(1, [0], .vnetp)), (1, link(2, [0], .vnetp))]) == nil)
    // Both encapsulations to one peer: told apart on the way in, but a flood would go there twice.
    #expect(refusal([(0, link(1, [0], .vnetp)), (1, link(1, [1], .vxlan))]) == nil)
    #expect(refusal([(0, link(1, [0], .vnetp)), (1, link(1, [0, 1], .vxlan))]) == .ambiguousPeer(peer, vni: 10))
    #expect(refusal([(0, link(1, [0], .vnetp)), (1, link(1, [0, 1], .vxlan))], routed: true) == nil)
    #expect(
      refusal([(0, link(1, [0], .vxlan)), (1, link(1, [0], .vxlan))], routed: true) == .ambiguousPeer(peer, vni: 10))
  }
}
