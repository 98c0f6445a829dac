import SimulatedKernel
import Testing

@testable import Datapath

@Suite struct StopTests {
  /// 16 sockets of 1 byte a µs, and 256 frames of 9 ms each before every one: more than a stop waits for.
  @Test("a stop while full sockets still send loses no slot and no send", arguments: 1...4 as ClosedRange<UInt64>)
  func stopUnderLoad(seed: UInt64) throws {
    var limits = SimulatedNetwork.Limits()
    limits.bytesPerMicrosecond = 1
    let network = SimulatedNetwork(seed: seed, limits: limits)
    var plan = SimulatedHost.Plan()
    plan.roles = [[.receive, .route], .transmit]
    plan.linkLanes = 16
    plan.slots = 9_000
    plan.operations = 5_000
    var hosts = [try SimulatedHost(network, plan, number: 0)]
    plan.roles = [.all]
    hosts.append(try SimulatedHost(network, plan, number: 1))
    for _ in 0..<50 { for host in hosts { try host.turn() } }

    for number in 0..<6_000 {
      let frame = NumberedFrame(
        destination: NumberedFrame.broadcast, source: 0x0200_0000_0001, flow: UInt32(number % 64),
        number: UInt32(number / 64))
      _ = network.inject(frame.bytes(count: 9_000), device: hosts[0].devices[0], queue: 0)
      if number % 8 == 7 { for host in hosts { try host.turn() } }
    }
    hosts[0].drain()
    var turns = 0
    while !hosts[0].isStopped, turns < 100_000 {
      for host in hosts { try host.turn() }
      turns += 1
    }
    #expect(hosts[0].isStopped)
    #expect(hosts[0].links(.dropStopped) > 0, "the sockets were to be full")
    #expect(hosts[0].links(.outFrames) == network.counts.datagramsSent)
    for audit in hosts[0].audits() {
      #expect(audit.holds, "\(audit)")
      #expect(audit.inFlight == 0)
    }
  }
}
