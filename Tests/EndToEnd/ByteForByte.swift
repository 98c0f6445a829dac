import Datapath
import Glibc
import TestSupport
import Testing

extension EndToEnd {
  /// Random streams and datagrams, every byte compared, whatever the guests' devices leave to be cut and summed.
  @Suite(needsForwarder)
  struct ByteForByte {
    /// What is behind the second guest's device.
    struct Other: CustomTestStringConvertible {
      var isKernel = false
      /// Whether its port gives it super-frames.
      var offloads: Bool?
      var flags: [String] = []
      var encapsulation: String?
      var family = Family.ipv4
      /// All pairs of what the guests' devices do, or as many as there are kinds.
      var pairs = Pairs.all
      enum Pairs { case all, some }

      var testDescription: String {
        let kind = isKernel ? "the kernel" : offloads == false ? "vnetr without offloads" : "vnetr"
        return ([kind, encapsulation, family.testDescription].compactMap { $0 } + flags).joined(separator: ", ")
      }

      static let pipeline = [
        "--layout", "pipeline", "--cpus", Matrix.Combination.pipelines[Matrix.Combination.pipelines.count - 1],
      ]
      static let every = [
        Other(), Other(isKernel: true),
        Other(family: .ipv6, pairs: .some), Other(isKernel: true, family: .ipv6, pairs: .some),
        Other(offloads: false, pairs: .some), Other(isKernel: true, flags: ["--io", "syscalls"], pairs: .some),
        Other(flags: pipeline, encapsulation: "vnetp", pairs: .some),
        Other(isKernel: true, flags: pipeline, pairs: .some),
        Other(flags: withoutTrainsOut, pairs: .some), Other(flags: withoutTrainsIn, pairs: .some),
      ]
      static let withoutTrainsOut = ["--gso", "false"]
      static let withoutTrainsIn = ["--gro", "false"]
      /// Whether each datagram of the underlay is received by itself.
      var isOneByOne: Bool { flags == Self.withoutTrainsOut || flags == Self.withoutTrainsIn }
    }

    /// Two guests that speak IPv4 and IPv6, the first behind vnetr.
    private struct Setting {
      let hosts: [Host]
      let forwarders: [Forwarder]
      let guests: [Guest]
      private let before: [[String: Int]]

      init(_ lab: Lab, _ other: Other) throws {
        hosts = try lab.hosts(2, family: other.family)
        var forwarders: [Forwarder] = []
        var guests: [Guest] = []
        for host in hosts {
          if other.isKernel && host.index == 1 {
            guests.append(try lab.kernelOverlay(on: host, remote: hosts[0], guest: 2))
            continue
          }
          let isOther = host.index == 1
          let configuration = NodeConfiguration(
            host, among: hosts, ports: [.init(name: "vm1", offloads: isOther ? other.offloads : nil)],
            encapsulation: other.encapsulation)
          let node = try lab.node(host, configuration, guests: [host.index + 1], flags: other.flags)
          forwarders.append(node.forwarder)
          guests += node.guests
        }
        self.forwarders = forwarders
        self.guests = guests
        for guest in guests {
          try guest.speakIPv6()
          // Both ask for and grant explicit congestion notification.
          try guest.namespace.setKernelParameter("net.ipv4.tcp_ecn", "1")
        }
        let ping = try guests[0].ping(guests[1])
        guard ping.isComplete else { throw LabError("the guests do not reach each other: \(ping)") }
        // A device that is plugged in is down for a moment.
        before = try forwarders.map { try $0.counters().drops }
      }

      /// How often the first forwarder receives while so many datagrams come, which the second guest hands over at
      /// once: a train is received once.
      func receives(datagrams count: Int) throws -> Int {
        try guests[1].setOffloads(.all)
        let (to, port, bytes) = (guests[0].address, UInt16(5000), 1_000)
        let receiver = try DatagramSocket(in: guests[0].namespace, address: to, port: port)
        let sender = try DatagramSocket(in: guests[1].namespace, address: guests[1].address)
        func receives() throws -> Int { try forwarders[0].counters().total("receives", .workers) }
        let before = try receives()
        try sender.send([UInt8](repeating: 7, count: bytes * count), segmentBytes: bytes, to: to, port: port)
        for number in 0..<count {
          guard try receiver.receive() != nil else { throw LabError("\(number) of \(count) datagrams come") }
        }
        return try receives() - before
      }

      /// Nothing was dropped since the start, nothing was lost uncounted, and no checksum was wrong where it arrived.
      func expectNothingLost() throws {
        for (forwarder, before) in zip(forwarders, before) {
          let report = try forwarder.stop()
          expectConservation(report)
          #expect(report.drops == before, "\(forwarder.host.name)")
        }
        for guest in guests { #expect(try guest.checksumErrors() == [:]) }
      }
    }

    /// 40 bytes, as many as there may be: no operation, and recording the route (RFC 791 section 3.1).
    private static let optionsIPv4 = [
      SocketOption(IPPROTO_IP, IP_OPTIONS, bytes: [1, 7, 39, 4] + [UInt8](repeating: 0, count: 36))
    ]
    /// Destination options: one for experiments, to be skipped where it is not known (RFC 8200 section 4.2, RFC 4727
    /// section 3.1).
    private static let optionsIPv6 = [
      SocketOption(IPPROTO_IPV6, IPV6_DSTOPTS, bytes: [0, 1, 0x1e, 12] + (1...12).map { UInt8($0) })
    ]

    @Test("what guests say arrives byte for byte, whatever their devices do for them", arguments: Other.every)
    func everyOffload(other: Other) throws {
      try withLab { lab in
        let setting = try Setting(lab, other)
        let (a, b) = (setting.guests[0], setting.guests[1])
        var exchange = Exchange(a: a, b: b, random: SeededRandom(seed: 1))
        for (number, near) in Offloads.allCases.enumerated() {
          for (place, far) in Offloads.allCases.enumerated() {
            // Some: each once on either side, never the same on both.
            if other.pairs == .some && place != (number + 1) % Offloads.allCases.count { continue }
            exchange.name = "\(near.rawValue) here, \(far.rawValue) there"
            #expect(try a.setOffloads(near) == near.state, "here")
            let state = try b.setOffloads(far)
            if other.offloads != false { #expect(state == far.state, "there") }

            try exchange.stream(.ipv4, bytes: 400_000)
            try exchange.stream(.ipv6, bytes: 300_000)
            try exchange.datagrams(.ipv4, bytes: 200_000)
            try exchange.datagrams(.ipv6, bytes: 100_000)
            try exchange.superDatagrams(.ipv4, count: 6)
            try exchange.superDatagrams(.ipv6, count: 6)
            try exchange.stream(.ipv4, bytes: 100_000, Self.optionsIPv4)
            try exchange.stream(.ipv6, bytes: 100_000, Self.optionsIPv6)
            try exchange.datagrams(.ipv4, bytes: 70_000, Self.optionsIPv4, headerBytes: 40)
            try exchange.datagrams(.ipv6, bytes: 70_000, Self.optionsIPv6, headerBytes: 16)
            try exchange.urgentBytes(number % 2 == 0 ? .ipv4 : .ipv6)
          }
        }
        // That it was super-frames and trains that all this went by, or that it was not.
        let counters = try setting.forwarders[0].counters()
        if other.flags == Other.withoutTrainsOut {
          #expect(counters.total("trains", .workers) == 0)
        } else {
          #expect(counters.total("train_frames", .workers) > 1_000)
        }
        let receives = try setting.receives(datagrams: 40)
        if other.isOneByOne {
          #expect(receives >= 40)
        } else if !other.isKernel && other.offloads != false {
          #expect(receives < 40)
        }
        try setting.expectNothingLost()
      }
    }

    @Test(
      "congestion on the way is told to the guests, and what they say stays right",
      .disabled(if: Obstacle.toCongestionMarks != nil, "\(Obstacle.toCongestionMarks ?? "")"),
      arguments: Family.allCases)
    func congestionMarks(family: Family) throws {
      try withLab { lab in
        let setting = try Setting(lab, Other(family: family))
        for host in setting.hosts { try Lab.markCongestion(in: host.namespace) }
        var exchange = Exchange(a: setting.guests[0], b: setting.guests[1], random: SeededRandom(seed: 8))
        for inner in Family.allCases { try exchange.stream(inner, bytes: 4_000_000) }
        try exchange.superDatagrams(.ipv4, count: 6)
        for guest in setting.guests {
          // Marked packets that came, and the other end's word that marked packets of ours had come (ECE).
          let counters = try guest.kernelCounters(["IpExtInCEPkts", "Ip6InCEPkts", "TcpExtTCPDeliveredCE"])
          #expect(counters.values.allSatisfy { $0 > 0 }, "\(counters)")
        }
        try setting.expectNothingLost()
      }
    }

    @Test("tagged super-frames arrive whole and with their tags", arguments: [Other(), Other(isKernel: true)])
    func taggedSuperFrames(other: Other) throws {
      try withLab { lab in
        let setting = try Setting(lab, other)
        let sockets = try setting.guests.map { try PacketSocket(in: $0.namespace, takesOffloads: true) }
        var random = SeededRandom(seed: 9)
        func received() throws -> Int { try setting.forwarders[0].counters().total("in_bytes", .ports) }
        let before = try received()
        var sentBytes = 0
        for types in [[], [Frame.customerTag], [Frame.serviceTag], [Frame.serviceTag, Frame.customerTag]] {
          // Priority 5, VLAN 7, 8, …: all the tag's 16 bits have to stay.
          let tags = types.enumerated().map { (type: $0.element, id: UInt16(5 << 13 | (7 + $0.offset))) }
          for (isIPv4, isTCP) in [(true, true), (false, true), (true, false), (false, false)] {
            for (from, to) in [(0, 1), (1, 0)] {
              for _ in 0..<3 {
                let segmentBytes = Int.random(in: 500...1_400, using: &random)
                let payload = random.bytes(
                  segmentBytes * Int.random(in: 1...40, using: &random) + random.size(upTo: 500))
                let sequence = UInt32(truncatingIfNeeded: random.next())
                let (offload, frame) = Frame.superFrame(
                  isIPv4: isIPv4, isTCP: isTCP, to: setting.guests[to].mac, from: setting.guests[from].mac, tags: tags,
                  segmentBytes: segmentBytes, sequence: sequence, payload: payload)
                try sockets[from].send(frame, offload)
                if from == 0 { sentBytes += frame.count }
                let words =
                  "\(isTCP ? "TCP" : "UDP"), IPv\(isIPv4 ? 4 : 6), \(types.count) tags, from guest \(from + 1)"
                let arrived = try segments(of: payload.count, from: sockets[to]) {
                  Frame.Segment($0, isIPv4: isIPv4, isTCP: isTCP, tagCount: types.count)
                }
                var next = sequence
                for segment in arrived {
                  #expect(segment.head == frame[..<(14 + 4 * types.count)], "\(words)")
                  #expect(segment.service == 0xb8, "\(words)")
                  if isTCP { #expect(segment.sequence == next, "\(words)") }
                  next &+= UInt32(segment.payload.count)
                }
                let found = firstDifference(arrived.flatMap(\.payload)[...], from: payload[...])
                #expect(found == nil, "\(words): \(payload.count) bytes in segments of \(segmentBytes)")
              }
            }
          }
        }
        // They came in whole, with their headers once; the guest's kernel speaks a little by itself.
        #expect(try received() - before < sentBytes + 5_000)
        try setting.expectNothingLost()
      }
    }

    /// Takes segments until they carry so many bytes, or none comes any more. Where the checksum stands, it is right.
    private func segments(
      of bytes: Int, from socket: PacketSocket, _ parse: ([UInt8]) -> Frame.Segment?
    ) throws -> [Frame.Segment] {
      var segments: [Frame.Segment] = []
      var left = bytes
      while left > 0, let (frame, offload) = try socket.receiveWithOffload() {
        guard let segment = parse(frame) else { continue }
        if !offload.needsChecksum { #expect(segment.isSumRight) }
        left -= segment.payload.count
        segments.append(segment)
      }
      return segments
    }
  }
}
