import TestSupport
import Testing

@testable import Datapath

private func domain(_ index: Int, vni: UInt32? = nil) -> Snapshot.Domain {
  Snapshot.Domain(DomainIndex(index), vni: vni ?? UInt32(index + 100), macs: MACTable(macsMax: 16))
}

private func port(_ index: Int, in domain: Int) -> Snapshot.Interface {
  Snapshot.Interface(InterfaceIndex(index), .port(domain: DomainIndex(domain)), mtuBytes: 1450)
}

private func link(_ index: Int, to peer: UnderlayAddress, in domains: [Int], isRelay: Bool = false)
  -> Snapshot.Interface
{
  Snapshot.Interface(
    InterfaceIndex(index), .link(peer: peer, domains: domains.map { DomainIndex($0) }, isRelay: isRelay),
    mtuBytes: 1500)
}

private func host(_ number: Int) -> UnderlayAddress { UnderlayAddress(ipv4: 0x0A00_0000 + UInt32(number)) }

/// The interfaces that a flood reaches, gone through as the forwarder does.
private func targets(_ view: SnapshotView, _ domain: Int, from ingress: Int) -> Set<Int> {
  let set = view.floodSet(domain: DomainIndex(domain), ingress: InterfaceIndex(ingress))
  let reached = Array(set)
  #expect(Set(reached).count == reached.count, "an interface is reached twice")
  #expect(reached.count == set.targetCount)
  return Set(reached.map(\.index))
}

@Suite struct RoutingSnapshotTests {
  @Test func `A flood from a port goes to all others, from a link to the ports only`() throws {
    let snapshot = try Snapshot(
      version: 1,
      interfaces: [
        link(7, to: host(7), in: [0, 1]), port(3, in: 0), port(1, in: 0), link(2, to: host(2), in: [0]),
        port(9, in: 1), link(4, to: host(4), in: [1]), port(5, in: 2), link(6, to: host(6), in: [2], isRelay: true),
        link(8, to: host(8), in: [2]),
      ],
      domains: [domain(0), domain(1), domain(2), domain(3)])
    defer { withExtendedLifetime(snapshot) {} }
    let view = snapshot.view
    #expect(targets(view, 0, from: 3) == [1, 7, 2])
    #expect(targets(view, 0, from: 1) == [3, 7, 2])
    #expect(targets(view, 0, from: 7) == [1, 3])
    #expect(targets(view, 0, from: 2) == [1, 3])
    #expect(targets(view, 1, from: 9) == [7, 4])
    #expect(targets(view, 1, from: 7) == [9])
    // A link that relays is no exception to not going back.
    #expect(targets(view, 2, from: 6) == [5, 8])
    #expect(targets(view, 2, from: 8) == [5])
    // Who is no member reaches nobody.
    #expect(targets(view, 0, from: 9) == [])
    #expect(targets(view, 1, from: 2) == [])
    #expect(targets(view, 3, from: 3) == [])
    #expect(targets(view, 17, from: 3) == [])
    #expect(targets(view, 0, from: 300) == [])
  }

  @Test func `A port alone in its domain has nobody to flood to`() throws {
    let snapshot = try Snapshot(version: 1, interfaces: [port(0, in: 0)], domains: [domain(0)])
    defer { withExtendedLifetime(snapshot) {} }
    let set = snapshot.view.floodSet(domain: DomainIndex(0), ingress: InterfaceIndex(0))
    #expect(set.targetCount == 0)
  }

  @Test func `What the snapshot does not have reads as absent`() throws {
    let snapshot = try Snapshot(version: 3, interfaces: [port(2, in: 1)], domains: [domain(1, vni: 0xFF_FFFF)])
    let nothing = try Snapshot(version: 0, interfaces: [], domains: [])
    defer { withExtendedLifetime((snapshot, nothing)) {} }
    let view = snapshot.view
    #expect(view.version == 3)
    #expect(view.kind(of: InterfaceIndex(2)) == .port)
    #expect(view.domain(ofPort: InterfaceIndex(2)) == DomainIndex(1))
    #expect(view.mtuBytes(of: InterfaceIndex(2)) == 1450)
    #expect(view.vni(of: DomainIndex(1)) == 0xFF_FFFF)
    for index in [0, 1, 3, 0xFFFF] {
      #expect(view.kind(of: InterfaceIndex(index)) == .absent)
      #expect(view.domain(ofPort: InterfaceIndex(index)) == .none)
      #expect(!view.isMember(InterfaceIndex(index), of: DomainIndex(1)))
      #expect(!view.isMember(InterfaceIndex(index), of: .none))
    }
    for index in [0, 2, 0xFFFF] {
      #expect(view.vni(of: DomainIndex(index)) == nil)
      #expect(view.macs(of: DomainIndex(index)) == nil)
    }
    let empty = nothing.view
    #expect(empty.kind(of: InterfaceIndex(0)) == .absent)
    #expect(empty.macs(of: DomainIndex(0)) == nil)
    #expect(empty.carrier(source: host(1), encapsulation: .vxlan, vni: 1) == .unknownSource)
    #expect(empty.floodSet(domain: DomainIndex(0), ingress: InterfaceIndex(0)).targetCount == 0)
  }

  @Test func `A link keeps its policy for reserved bits`() throws {
    let strict = Snapshot.Interface(
      InterfaceIndex(0), .link(peer: host(0), domains: [DomainIndex(0)], dropsReservedBits: true), mtuBytes: 1500)
    let snapshot = try Snapshot(
      version: 1, interfaces: [strict, link(1, to: host(1), in: [0])], domains: [domain(0)])
    defer { withExtendedLifetime(snapshot) {} }
    let view = snapshot.view
    #expect(view.dropsReservedBits(link: InterfaceIndex(0)))
    #expect(!view.dropsReservedBits(link: InterfaceIndex(1)))
  }

  @Test func `A datagram finds its link and domain among 1,000 links and 8 domains, IPv4 and IPv6`() throws {
    var random = SeededRandom(seed: 5)
    let domains = (0..<8).map { domain($0, vni: $0 == 0 ? 0 : UInt32.random(in: 1..<1 << 24, using: &random)) }
    var interfaces: [Snapshot.Interface] = []
    var expected: [UnderlayAddress: [UInt32: SnapshotView.Carrier]] = [:]
    for index in 0..<1000 {
      // Neighbours in one network, as hosts are, and IPv6 addresses that differ in either half.
      let peer: UnderlayAddress =
        switch index % 3 {
        case 0: host(index)
        case 1: UnderlayAddress(high: 0xFD00_0000_0000_0000, low: UInt64(index))
        default: UnderlayAddress(high: 0xFD00_0000_0000_0000 + UInt64(index), low: 1)
        }
      var carried = (0..<8).filter { _ in Bool.random(using: &random) }
      if carried.isEmpty { carried = [index % 8] }
      // Every tenth peer has two links, which share its domains between them.
      let split = index % 10 == 0 ? carried.count / 2 : carried.count
      for (offset, part) in [carried[..<split], carried[split...]].enumerated() where !part.isEmpty {
        interfaces.append(link(index * 2 + offset, to: peer, in: Array(part)))
        for number in part {
          expected[peer, default: [:]][domains[number].vni] =
            .link(InterfaceIndex(index * 2 + offset), DomainIndex(number))
        }
      }
    }
    let snapshot = try Snapshot(version: 1, interfaces: interfaces.shuffled(using: &random), domains: domains)
    defer { withExtendedLifetime(snapshot) {} }
    let view = snapshot.view
    #expect(expected.count == 1000)
    var found = 0
    for (peer, links) in expected {
      for vni in domains.map(\.vni) + [12_345_678, 0xFF_FFFF] {
        let carrier = view.carrier(source: peer, encapsulation: .vxlan, vni: vni)
        try #require(carrier == links[vni] ?? .unknownVNI, "\(peer) \(vni)")
        if case .link(let link, let domain) = carrier {
          found += 1
          try #require(view.isMember(link, of: domain))
        }
      }
    }
    #expect(found > 3500)
    for number in 0..<2000 {
      let stranger = number % 2 == 0 ? host(100_000 + number) : UnderlayAddress(high: 0xFD01 << 48, low: UInt64(number))
      try #require(view.carrier(source: stranger, encapsulation: .vxlan, vni: domains[1].vni) == .unknownSource)
    }
    // The unspecified address is all zero, as an empty place is.
    #expect(view.carrier(source: UnderlayAddress(high: 0, low: 0), encapsulation: .vxlan, vni: 0) == .unknownSource)
  }

  @Test func `Membership is exactly what was configured`() throws {
    var random = SeededRandom(seed: 6)
    var interfaces: [Snapshot.Interface] = []
    var expected: Set<[Int]> = []
    for index in 0..<200 {
      if index % 4 == 0 {
        let number = Int.random(in: 0..<20, using: &random)
        interfaces.append(port(index, in: number))
        expected.insert([index, number])
      } else {
        let carried = (0..<20).filter { _ in Bool.random(using: &random) }
        interfaces.append(link(index, to: host(index), in: carried))
        for number in carried { expected.insert([index, number]) }
      }
    }
    let snapshot = try Snapshot(version: 1, interfaces: interfaces, domains: (0..<20).map { domain($0) })
    defer { withExtendedLifetime(snapshot) {} }
    let view = snapshot.view
    for index in 0..<200 {
      for number in 0..<20 {
        try #require(
          view.isMember(InterfaceIndex(index), of: DomainIndex(number)) == expected.contains([index, number]))
      }
    }
    for number in 0..<20 {
      let members = Set(expected.filter { $0[1] == number }.map { $0[0] })
      for index in members {
        let reached = index % 4 == 0 ? members.subtracting([index]) : members.filter { $0 % 4 == 0 }
        try #require(targets(view, number, from: index) == reached)
      }
    }
  }

  @Test func `What cannot be forwarded by is refused`() throws {
    func refusal(_ interfaces: [Snapshot.Interface], _ domains: [Snapshot.Domain]) -> Snapshot.Invalid? {
      do throws(Snapshot.Invalid) {
        _ = try Snapshot(version: 1, interfaces: interfaces, domains: domains)
        return nil
      } catch {
        return error
      }
    }
    let zero = InterfaceIndex(0)
    #expect(refusal([port(0, in: 0)], [domain(0)]) == nil)
    #expect(refusal([port(0, in: 0), port(0, in: 0)], [domain(0)]) == .interfaceTwice(zero))
    #expect(refusal([], [domain(0), domain(0, vni: 5)]) == .domainTwice(DomainIndex(0)))
    #expect(refusal([], [domain(0, vni: 5), domain(1, vni: 5)]) == .vniTwice(5))
    #expect(refusal([], [domain(0, vni: 1 << 24)]) == .vniOutOfRange(1 << 24))
    #expect(refusal([port(0, in: 1)], [domain(0)]) == .dangling(zero, DomainIndex(1)))
    #expect(refusal([link(0, to: host(1), in: [3])], [domain(0)]) == .dangling(zero, DomainIndex(3)))
    #expect(refusal([port(0xFFFF, in: 0)], [domain(0)]) == .dangling(.none, .none))
    #expect(refusal([link(0, to: host(1), in: [0, 0])], [domain(0)]) == .membershipTwice(zero, DomainIndex(0)))
    #expect(
      refusal([link(0, to: host(1), in: [0]), link(1, to: host(1), in: [0])], [domain(0)])
        == .ambiguousPeer(host(1), vni: 100))
    #expect(refusal([link(0, to: host(1), in: [0]), link(1, to: host(1), in: [1])], [domain(0), domain(1)]) == nil)
    let negative = Snapshot.Interface(zero, .port(domain: DomainIndex(0)), mtuBytes: -1)
    #expect(refusal([negative], [domain(0)]) == .mtuOutOfRange(zero))
  }
}
