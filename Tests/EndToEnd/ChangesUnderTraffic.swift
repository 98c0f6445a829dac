import CLinux
import Glibc
import TestSupport
import Testing

extension EndToEnd {
  /// A device or a path that becomes another while a stream runs: the stream's bytes stay right.
  @Suite(needsForwarder)
  struct ChangesUnderTraffic {
    /// Two hosts with a guest each, over an underlay that carries the guests' frames whole.
    private struct Setting {
      let wideBytes: Int
      static let narrowBytes = 1_400
      let hosts: [Host]
      let nodes: [Node]
      var a: Guest { nodes[0].guests[0] }
      var b: Guest { nodes[1].guests[0] }

      /// - Parameter fragment: whether links may let the underlay fragment.
      init(_ lab: Lab, fragment: Bool? = nil, io: String = "uring", family: Family = .ipv4) throws {
        wideBytes = 1_500 + family.overheadBytes
        let hosts = try lab.hosts(2, family: family, mtu: wideBytes)
        nodes = try hosts.map { host in
          var configuration = NodeConfiguration(host, among: hosts)
          configuration.links[0].fragment = fragment
          return try lab.node(host, configuration, guests: [host.index + 1], flags: ["--io", io])
        }
        self.hosts = hosts
        let ping = try a.ping(b)
        guard ping.isComplete else { throw LabError("the guests do not reach each other: \(ping)") }
      }

      /// A counter of the workers, or in another scope, of both hosts.
      func total(_ counter: String, _ scope: CounterReport.Scope = .workers) throws -> Int {
        try nodes.reduce(0) { $0 + (try $1.forwarder.counters().total(counter, scope)) }
      }

      /// How many of a hundred frames to the other host leave in trains while the stream carries some MiB.
      func percentInTrains(_ stream: RunningStream) throws -> Int {
        let (inTrains, frames) = (try total("train_frames"), try total("out_frames", .links))
        let before = stream.receivedBytes
        guard try stream.run(until: { stream.receivedBytes > before + 8 << 20 }) else {
          throw LabError("the stream does not go on: \(stream.difference ?? "nothing arrives")")
        }
        return 100 * (try total("train_frames") - inTrains) / (try total("out_frames", .links) - frames)
      }

      /// Stops the forwarders: each has accounted for every frame, and dropped none since it had dropped so many.
      func expectNoDrops(since before: [[String: Int]]) throws {
        for (node, before) in zip(nodes, before) {
          let report = try node.forwarder.stop()
          expectConservation(report)
          #expect(report.drops == before)
        }
      }

      /// A device that is plugged in is down for a moment: some frames are dropped before a test starts.
      func drops() throws -> [[String: Int]] { try nodes.map { try $0.forwarder.counters().drops } }

      /// Sets the underlay's MTU at both ends while the stream runs.
      func setUnderlay(_ bytes: Int, under stream: RunningStream) throws {
        let commands = hosts.map { "ip -n \($0.namespace.name) link set \(Host.underlayDevice) mtu \(bytes)" }
        try stream.run(beside: ChildProcess(["sh", "-c", commands.joined(separator: " && ")]))
      }

      func expectNoWrongChecksum() throws {
        for guest in [a, b] { #expect(try guest.checksumErrors() == [:]) }
      }
    }

    /// Longer than trains are left out for after one was refused.
    private static let refusalSeconds = 4.0

    @Test(
      "trains that the underlay refuses in mid-flow go datagram by datagram, and come back",
      arguments: ["uring", "syscalls"], Family.allCases)
    func refusedTrains(io: String, family: Family) throws {
      try withLab { lab in
        let setting = try Setting(lab, fragment: true, io: io, family: family)
        let before = try setting.drops()
        let stream = try RunningStream(from: setting.a, to: setting.b, seed: 2)
        let wide = try setting.percentInTrains(stream)
        #expect(wide > 50)
        #expect(try setting.total("train_refusals") == 0)

        try setting.setUnderlay(Setting.narrowBytes, under: stream)
        #expect(try stream.run { try setting.total("train_refusals") > 0 })
        let narrow = try setting.percentInTrains(stream)
        #expect(narrow < wide / 2, "the rest goes in fragments")
        // Another flow, perhaps by another lane.
        var exchange = Exchange(a: setting.a, b: setting.b, random: SeededRandom(seed: 7), name: "narrow")
        try exchange.superDatagrams(.ipv4, count: 20, segmentBytesMax: 1_472)
        let refusals = try setting.total("train_refusals")
        #expect(try stream.run { try setting.total("train_refusals") > refusals }, "it is tried again")

        try setting.setUnderlay(setting.wideBytes, under: stream)
        try stream.run(seconds: Self.refusalSeconds)
        let last = try setting.total("train_refusals")
        let wideAgain = try setting.percentInTrains(stream)
        #expect(wideAgain > wide / 2)
        #expect(try setting.total("train_refusals") == last)

        let found = try stream.finish()
        #expect(found == nil)
        try setting.expectNoWrongChecksum()
        try setting.expectNoDrops(since: before)
      }
    }

    @Test("on a path that carries less now only what is too long is dropped, and it comes back in trains")
    func narrowedPath() throws {
      try withLab { lab in
        let setting = try Setting(lab)
        let stream = try RunningStream(from: setting.a, to: setting.b, seed: 3)
        let wide = try setting.percentInTrains(stream)
        try setting.setUnderlay(Setting.narrowBytes, under: stream)
        #expect(try stream.run { try setting.total("train_refusals") > 0 })
        #expect(try stream.run { try setting.total("drop_too_big", .links) > 0 })
        #expect(try stream.run { setting.nodes.allSatisfy { $0.forwarder.isLogged("carries less now") } })

        // What fits goes on, in trains, each datagram once and whole.
        var exchange = Exchange(a: setting.a, b: setting.b, random: SeededRandom(seed: 4), name: "narrow")
        let frames = try setting.total("train_frames")
        let refusals = try setting.total("train_refusals")
        try exchange.superDatagrams(.ipv4, count: 20, segmentBytesMax: 1_300)
        #expect(try setting.total("train_frames") > frames + 1_000)
        #expect(try setting.total("train_refusals") == refusals)

        // The stream waits for a path, and goes on by itself.
        try setting.setUnderlay(setting.wideBytes, under: stream)
        let received = stream.receivedBytes
        #expect(try stream.run(within: 30) { stream.receivedBytes > received + 4 << 20 })
        try stream.run(seconds: Self.refusalSeconds)
        let last = try setting.total("train_refusals")
        let wideAgain = try setting.percentInTrains(stream)
        #expect(wideAgain > wide / 2)
        exchange.name = "wide again"
        try exchange.superDatagrams(.ipv4, count: 20, segmentBytesMax: 1_472)
        #expect(try setting.total("train_refusals") == last)

        let found = try stream.finish()
        #expect(found == nil)
        try setting.expectNoWrongChecksum()
        try stopAll(setting.nodes)
      }
    }

    @Test("a guest's offloads change under a stream", arguments: ["uring", "syscalls"])
    func changingOffloads(io: String) throws {
      try withLab { lab in
        let setting = try Setting(lab, io: io)
        let before = try setting.drops()
        let stream = try RunningStream(from: setting.a, to: setting.b, seed: 5)
        let changes = [setting.a, setting.b].enumerated().flatMap { number, guest in
          // Not in step with each other.
          Offloads.allCases.indices.map { place in
            let offloads = Offloads.allCases[(place * (number == 0 ? 1 : 3)) % Offloads.allCases.count]
            return "ip netns exec \(guest.namespace.name) ethtool -K \(Guest.device) "
              + offloads.settings.joined(separator: " ")
          }
        }
        let rounds =
          "for round in 1 2 3 4 5; do \(changes.map { "\($0) && sleep 0.02" }.joined(separator: " && ")); done"
        try stream.run(beside: ChildProcess(["sh", "-ec", rounds]))
        #expect(stream.receivedBytes > 16 << 20)

        let found = try stream.finish(bytes: [1_000_003, 500_009])
        #expect(found == nil)
        try setting.expectNoWrongChecksum()
        try setting.expectNoDrops(since: before)
      }
    }

    @Test("what a device offers to its guest changes under a stream")
    func changingDevice() throws {
      try withLab { lab in
        let setting = try Setting(lab)
        let before = try setting.drops()
        let stream = try RunningStream(from: setting.a, to: setting.b, seed: 6)
        let queue = try BorrowedDescriptor(of: setting.nodes[0].forwarder.process, path: "/dev/net/tun")
        let tcp = UInt(TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN)
        for offloads in [0, UInt(TUN_F_CSUM), tcp, 0, tcp | UInt(CLINUX_TUN_F_USO4 | CLINUX_TUN_F_USO6)] {
          #expect(clinux_tap_set_offloads(queue.number, offloads) == 0, "\(errorText(errno))")
          let state = try setting.a.setOffloads(.all)
          #expect(state.finishesChecksums == (offloads & UInt(TUN_F_CSUM) != 0))
          #expect(state.cutsTCP == (offloads & UInt(TUN_F_TSO4) != 0))
          let received = stream.receivedBytes
          #expect(try stream.run { stream.receivedBytes > received + 4 << 20 })
        }
        let found = try stream.finish()
        #expect(found == nil)
        try setting.expectNoWrongChecksum()
        try setting.expectNoDrops(since: before)
      }
    }
  }
}
