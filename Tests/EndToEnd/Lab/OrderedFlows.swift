/// Many UDP flows from one guest to another, their datagrams numbered, to see whether each keeps its order.
final class OrderedFlows {
  private let senders: [DatagramSocket]
  private let receiver: DatagramSocket
  private let destination: String
  private let port: UInt16 = 5000
  private let payloadBytes: Int
  /// The number that each flow's next datagram must at least have.
  private var nextNumbers: [UInt32]

  /// How many datagrams of each flow have arrived.
  private(set) var received: [Int]
  /// What arrived after something that was sent later, or twice.
  private(set) var disorder: [String] = []

  init(from a: Guest, to b: Guest, flows: Int, payloadBytes: Int = 64) throws {
    destination = b.address
    self.payloadBytes = payloadBytes
    receiver = try DatagramSocket(in: b.namespace, address: b.address, port: port)
    senders = try (0..<flows).map { _ in try DatagramSocket(in: a.namespace, address: a.address) }
    nextNumbers = Array(repeating: 0, count: flows)
    received = Array(repeating: 0, count: flows)
    guard try a.ping(b, count: 1).isComplete else { throw LabError("\(b.address) does not answer \(a.address)") }
  }

  var silentFlows: [Int] { received.indices.filter { received[$0] == 0 } }

  /// Sends the datagrams, a few of each flow in turn and reads what has arrived in between, then what is under way.
  ///
  /// It does not wait for them: datagrams may get lost where a queue is full, but never overtake each other.
  func run(datagramsPerFlow: Int) throws {
    let burst = 4
    for first in stride(from: 0, to: datagramsPerFlow, by: burst) {
      for (flow, sender) in senders.enumerated() {
        for number in first..<min(first + burst, datagramsPerFlow) {
          let head = networkOrder(UInt32(flow)) + networkOrder(UInt32(number))
          try sender.send(head + [UInt8](repeating: 0, count: payloadBytes - 8), to: destination, port: port)
        }
      }
      try read(quietSeconds: 0)
    }
    try read(quietSeconds: 1)
  }

  private func read(quietSeconds: Double) throws {
    while let datagram = try receiver.receive(seconds: quietSeconds) {
      guard datagram.count == payloadBytes else { throw LabError("a datagram of \(datagram.count) bytes") }
      let values = [0, 4].map { datagram[$0..<($0 + 4)].reduce(UInt32(0)) { $0 << 8 | UInt32($1) } }
      let flow = Int(values[0])
      let number = values[1]
      if number < nextNumbers[flow] {
        disorder.append("flow \(flow): \(number) after \(nextNumbers[flow] - 1)")
      }
      nextNumbers[flow] = max(nextNumbers[flow], number + 1)
      received[flow] += 1
    }
  }
}
