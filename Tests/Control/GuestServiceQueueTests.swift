import Testing

@testable import Control

extension GuestServiceTests {
  /// Frames of many flows from one guest to another that has two pairs of queues.
  private struct ManyFlows {
    static let count = 32
    let sender: SharedGuest
    let receiver: SharedGuest
    static let firstSource: UInt64 = 0x0200_0000_1000
    private var round: UInt32 = 0

    init(from sender: SharedGuest, to receiver: SharedGuest) {
      self.sender = sender
      self.receiver = receiver
    }

    /// Sends one frame of each flow; how many came by each pair of queues, within a while.
    mutating func burst(pair: Int = 0, seconds: Int = 10) -> [Int] {
      round += 1
      var frames: [[UInt8]] = []
      for flow in 0..<UInt64(Self.count) {
        var frame = sender.frame(to: receiver.mac, round, bytes: 400)
        let source = Self.firstSource + flow
        for place in 0..<6 { frame[6 + place] = UInt8(truncatingIfNeeded: source >> UInt64(40 - 8 * place)) }
        frames.append(frame)
      }
      var unsent = frames[...]
      var received = [0, 0]
      _ = eventually(seconds: seconds) {
        sender.cards[pair].reapSent()
        while let frame = unsent.first, sender.send(frame, pair: pair) { unsent.removeFirst() }
        for (pair, came) in receiver.takeReceivedByPair().enumerated() {
          // Of an earlier burst, where the pair was just turned off, some may come late.
          received[pair] += came.count { frames.contains($0) }
        }
        return received[0] + received[1] >= Self.count
      }
      return received
    }
  }

  private func turn(_ isOn: Bool, _ pair: Int, of guest: SharedGuest) throws {
    for queue in [2 * pair, 2 * pair + 1] {
      let answer = try guest.ask(.setQueueEnabled(.init(queue: UInt32(queue), number: isOn ? 1 : 0)))
      try #require(answer == 0)
    }
  }

  @Test(
    "a second pair of queues takes its share of the flows while it is on, and nothing while it is off",
    arguments: layouts[..<2])
  func secondPair(layout: [String]) throws {
    let ports = ["a", "b", "c"]
    let service = try ServiceProcess(ports: ports, portKeys: "queues = 2", flags: layout)
    let guests = ports.enumerated().map { number, port in
      SharedGuest(
        "guest-pairs-\(port)", mac: 0x0200_0000_0001 + UInt64(number), queuePairs: 2,
        features: SharedGuest.features.union(.multiQueue))
    }
    try connect(guests, to: service, ports)
    var flows = ManyFlows(from: guests[0], to: guests[1])
    var back = ManyFlows(from: guests[1], to: guests[2])
    for isOn in [true, false, true, false, true] {
      try turn(isOn, 1, of: guests[1])
      let hasChanged = eventually {
        let came = flows.burst(seconds: 1)
        return came[0] + came[1] == ManyFlows.count && (came[1] > 0) == isOn
      }
      try #require(hasChanged, "a pair that is turned \(isOn ? "on" : "off") stays as it was")
      for _ in 0..<20 {
        let came = flows.burst()
        let isRight = came[0] + came[1] == ManyFlows.count && came[0] > 0 && (came[1] > 0) == isOn
        try #require(isRight, "\(came) frames by pair, the second \(isOn ? "on" : "off")")
      }
      // What it sends by: the first pair at any time, the second while it is on.
      let sent = [back.burst(), isOn ? back.burst(pair: 1) : [ManyFlows.count, 0]]
      #expect(sent.allSatisfy { $0[0] + $0[1] == ManyFlows.count }, "\(sent)")
    }
    #expect(try service.count("ring_faults", ofPort: "b") == 0)
    try expectGoodEnd(service)
  }

  @Test(
    "a second pair of queues is turned on and off in mid-traffic: the first and other ports go on",
    arguments: layouts[..<2])
  func secondPairInMidTraffic(layout: [String]) throws {
    let ports = ["a", "b", "c"]
    let service = try ServiceProcess(ports: ports, portKeys: "queues = 2", flags: layout)
    let guests = ports.enumerated().map { number, port in
      SharedGuest(
        "guest-toggled-\(port)", mac: 0x0200_0000_0001 + UInt64(number), queuePairs: port == "b" ? 2 : 1,
        features: SharedGuest.features.union(.multiQueue))
    }
    try connect(guests, to: service, ports)
    var flows = ManyFlows(from: guests[2], to: guests[1])
    var round = 0
    try exchange(3_000, from: guests[2], to: guests[0]) {
      guard round < 60 else { return }
      let came = flows.burst(seconds: 0)
      #expect(came[0] <= ManyFlows.count && came[1] <= ManyFlows.count)
      // Its second pair sends, too: what is on the ring when it is turned off comes back later.
      for number in 0..<UInt32(8) { guests[1].send(guests[1].frame(to: guests[2].mac ^ 0xFF00, number), pair: 1) }
      try turn(round % 2 == 1, 1, of: guests[1])
      round += 1
    }
    #expect(round == 60)
    let isBack = eventually {
      guests[1].cards[1].reapSent()
      return guests[1].cards[1].send.out == 0
    }
    #expect(isBack, "\(guests[1].cards[1].send.out) chains are still out")
    let isSpread = eventually {
      let came = flows.burst(seconds: 1)
      return came[0] > 0 && came[1] > 0 && came[0] + came[1] == ManyFlows.count
    }
    #expect(isSpread)
    try expectGoodEnd(service)
  }
}
