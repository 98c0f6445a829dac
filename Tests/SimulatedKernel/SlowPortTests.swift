import SimulatedKernel
import Testing

@testable import Datapath

@Suite struct SlowPortTests {
  /// Three ports of one host, of which the last one's device takes nothing for a while.
  @Test(
    "a slow port does not stall the others",
    arguments: [
      [Roles.receive, .route, .transmit], [[.receive, .route], .transmit], [.receive, [.route, .transmit]],
    ])
  func othersGoOn(roles: [Roles]) throws {
    let network = SimulatedNetwork(seed: 11)
    var plan = SimulatedHost.Plan()
    plan.hosts = 1
    plan.guests = 3
    plan.roles = roles
    let host = try SimulatedHost(network, plan, number: 0)
    let slow = 2
    var checkers = (0..<plan.portCount).map { _ in OrderChecker() }
    func turn(_ count: Int) throws {
      for _ in 0..<count { try host.turn() }
      for port in checkers.indices {
        for written in network.takeWritten(device: host.devices[port]) { _ = checkers[port].check(written) }
      }
    }
    var numbers: [UInt32: UInt32] = [:]
    func send(from port: Int, to other: Int?) -> Bool {
      let flow = UInt32(port) << 8 | UInt32(other ?? 255)
      let number = numbers[flow, default: 0]
      let destination = other.map { plan.mac(ofGuest: $0, host: 0) } ?? NumberedFrame.broadcast
      let frame = NumberedFrame(
        destination: destination, source: plan.mac(ofGuest: port, host: 0), flow: flow, number: number)
      guard network.inject(frame.bytes(count: 100), device: host.devices[port]) else { return false }
      numbers[flow] = number + 1
      return true
    }
    // All are learned, so that from now on each frame has one place.
    try turn(50)
    for port in 0..<plan.portCount { _ = send(from: port, to: nil) }
    try turn(200)
    #expect(checkers.map(\.delivered) == [2, 2, 2])

    network.setFull(device: host.devices[slow], true)
    let frames = 2_000
    // What a transmitter may keep of a receiver's slots, and the batch that it had begun with.
    let waitingMax = plan.slots / 2 + 16
    var waitingMost = 0
    var refused = 0
    for _ in 0..<frames {
      for (port, other) in [(0, 1), (0, slow), (1, 0), (1, slow)] {
        if !send(from: port, to: other) { refused += 1 }
      }
      try turn(4)
      waitingMost = max(waitingMost, host.port(slow, .offeredFrames) - host.port(slow, .dropQueueFull) - 2)
    }
    try turn(500)
    #expect(refused == 0, "receives starved: a device's queue was full")
    #expect(network.framesQueued == 0, "everything was received")
    #expect(checkers.map(\.delivered) == [2 + frames, 2 + frames, 2])
    #expect(waitingMost <= waitingMax)
    let dropped = host.port(slow, .dropQueueFull)
    #expect(dropped > 0)
    #expect(host.ports(.dropQueueFull) == dropped, "only what is for the slow port is dropped")
    #expect(host.inFlight == 2 * frames - dropped)

    network.setFull(device: host.devices[slow], false)
    try turn(500)
    #expect(host.inFlight == 0)
    #expect(checkers[slow].delivered == 2 + 2 * frames - dropped)
    #expect(checkers.flatMap(\.problems) == [])
    for audit in host.audits() { #expect(audit.holds, "\(audit)") }
    #expect(network.violations.isEmpty)
  }
}
