import SimulatedKernel
import Testing

@testable import Datapath

/// A guest that has moved to a port is announced there, as if it had sent a frame.
@Suite struct AnnouncementTests {
  private static let guest: UInt64 = 0x0200_0000_00AB

  private func run(_ hosts: [SimulatedHost], turns: Int = 400) throws {
    for _ in 0..<turns { for host in hosts { try host.turn() } }
  }

  @Test(
    "an announcement goes everywhere once, frames for the guest follow it to its new host, and all is counted",
    arguments: [[.all], [.receive, .route, .transmit], [[.receive, .route], .transmit]] as [[Roles]])
  func announcement(roles: [Roles]) throws {
    var plan = SimulatedHost.Plan()
    plan.hosts = 3
    plan.roles = roles
    let network = SimulatedNetwork(seed: 3)
    let hosts = try (0..<plan.hosts).map { try SimulatedHost(network, plan, number: $0) }
    try run(hosts)
    func written(_ host: Int) -> [[UInt8]] { network.takeWritten(device: hosts[host].devices[0]).map(\.frame) }

    // RFC 903: a request for the address of the guest itself.
    let address: [UInt8] = [0x02, 0, 0, 0, 0, 0xAB]
    let frame =
      [UInt8](repeating: 0xFF, count: 6) + address + [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3] + address + [0, 0, 0, 0]
      + address + [UInt8](repeating: 0, count: 22)
    for place in [0, 1] {
      hosts[place].announce(MACAddress(bits: Self.guest))
      try run(hosts)
      for host in 0..<3 { #expect(written(host) == (host == place ? [] : [frame])) }

      let forGuest = NumberedFrame(destination: Self.guest, source: 0x02_0000_0000_0C, flow: 1, number: UInt32(place))
        .bytes(count: 100)
      #expect(network.inject(forGuest, device: hosts[2].devices[0]))
      try run(hosts)
      for host in 0..<3 { #expect(written(host) == (host == place ? [forGuest] : []), "host \(host)") }
    }
    for host in hosts {
      #expect(host.inFlight == 0)
      for audit in host.audits() { #expect(audit.holds, "\(audit)") }
    }
    #expect(network.violations.isEmpty)
  }
}
