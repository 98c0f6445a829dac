import Datapath
import Testing

extension EndToEnd {
  /// What a forwarder must survive: datagrams that nobody should send, and starts that cannot work.
  @Suite(needsForwarder)
  struct BadInput {
    /// A datagram of the underlay that must not reach a guest.
    struct BadDatagram: CustomTestStringConvertible {
      let testDescription: String
      let bytes: [UInt8]
      /// The counters, one of which has to count it, and where.
      let counters: [String]
      let scope: CounterReport.Scope
      /// The ToS byte of the outer header.
      var service: UInt8 = 0
      /// Whether it comes from an address that no link has.
      var fromStranger = false

      static let innerSource = MAC(0x02, 0, 0, 0, 0, 0x66)

      static func carrying(_ packet: [UInt8], type: UInt16 = Frame.ipv4, from source: MAC = innerSource) -> [UInt8] {
        Frame.vxlan(vni: 42, inner: Frame.ethernet(to: .broadcast, from: source, type: type, payload: packet))
      }

      static let goodFrame = Frame.numbered(1, to: .broadcast, from: innerSource)
      static let packet = Frame.ipv4Packet(
        from: [10, 1, 0, 9], to: [10, 1, 0, 1], payload: [UInt8](repeating: 7, count: 40))

      static let all = [
        BadDatagram(
          testDescription: "an empty datagram", bytes: [], counters: ["drop_short_header"], scope: .underlay),
        BadDatagram(
          testDescription: "a datagram that ends inside the VXLAN header", bytes: [0x08, 0, 0, 0, 0, 0, 42],
          counters: ["drop_short_header"], scope: .underlay),
        BadDatagram(
          testDescription: "no I flag", bytes: Frame.vxlan(vni: 42, flags: 0, inner: goodFrame),
          counters: ["drop_no_vni_flag"], scope: .underlay),
        BadDatagram(
          testDescription: "a VNI of no domain", bytes: Frame.vxlan(vni: 43, inner: goodFrame),
          counters: ["drop_unknown_vni"], scope: .underlay),
        BadDatagram(
          testDescription: "a source address of no link", bytes: Frame.vxlan(vni: 42, inner: goodFrame),
          counters: ["drop_unknown_source"], scope: .underlay, fromStranger: true),
        BadDatagram(
          testDescription: "nothing behind the VXLAN header", bytes: Frame.vxlan(vni: 42, inner: []),
          counters: ["drop_bad_inner_length"], scope: .links),
        BadDatagram(
          testDescription: "an inner frame shorter than an Ethernet header",
          bytes: Frame.vxlan(vni: 42, inner: Array(goodFrame.prefix(13))),
          counters: ["drop_bad_inner_length"], scope: .links),
        BadDatagram(
          testDescription: "an inner IPv4 packet that claims more bytes than came",
          bytes: carrying(
            Frame.ipv4Packet(from: [10, 1, 0, 9], to: [10, 1, 0, 1], claimedLength: 1400, payload: [1, 2, 3, 4])),
          counters: ["drop_bad_inner_length"], scope: .links),
        BadDatagram(
          testDescription: "an inner IPv4 header of 16 bytes",
          bytes: carrying(
            Frame.ipv4Packet(from: [10, 1, 0, 9], to: [10, 1, 0, 1], headerWords: 4, payload: [1, 2, 3, 4])),
          counters: ["drop_bad_inner_length"], scope: .links),
        BadDatagram(
          testDescription: "an inner IPv4 header that ends with the datagram",
          bytes: carrying(Array(packet.prefix(12))), counters: ["drop_bad_inner_length"], scope: .links),
        BadDatagram(
          testDescription: "65,000 bytes",
          bytes: carrying([UInt8](repeating: 0, count: 65_000 - 8 - 14), type: Frame.experiment),
          counters: ["drop_oversized_datagram", "drop_bad_inner_length", "drop_too_big"], scope: .underlay),
        BadDatagram(
          testDescription: "a group address as the inner source",
          bytes: carrying(packet, from: MAC(0x01, 0, 0x5e, 0, 0, 1)), counters: ["drop_bad_source"], scope: .links),
        BadDatagram(
          testDescription: "congestion marked on the way of a packet that cannot say so",
          bytes: carrying(packet), counters: ["drop_not_ecn_capable"], scope: .links, service: 3),
      ]
    }

    @Test("a bad datagram is counted by its reason and goes nowhere", arguments: BadDatagram.all)
    func badDatagram(datagram: BadDatagram) throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        let (forwarder, guest) = try lab.forwarder(on: hosts[0], peer: hosts[1], guest: 1)
        let ears = try PacketSocket(in: guest.namespace)
        let stranger = "10.99.0.77"
        try hosts[1].namespace.ip("address", "add", stranger + "/24", "dev", Host.underlayDevice)
        let peer = try DatagramSocket(in: hosts[1].namespace, address: hosts[1].address)
        let sender =
          datagram.fromStranger ? try DatagramSocket(in: hosts[1].namespace, address: stranger) : peer
        try sender.setService(datagram.service)

        let count = 10
        for _ in 0..<count { try sender.send(datagram.bytes, to: hosts[0].address, port: 4789) }
        var report = try forwarder.counters()
        func counted() -> Int {
          // What is too big for a slot never gets to a link; what is too big for a device is counted there.
          let scopes = datagram.counters.count == 1 ? [datagram.scope] : [.underlay, .links, .ports]
          return scopes.reduce(0) { sum, scope in
            sum + datagram.counters.reduce(0) { $0 + report.total($1, scope) }
          }
        }
        let isCounted = try eventually {
          report = try forwarder.counters()
          return counted() >= count
        }
        #expect(isCounted, "\(counted()) of \(count) counted by \(datagram.counters)")
        #expect(counted() == count)
        expectConservation(report)
        #expect(try ears.receive(seconds: 0.3) == nil, "it was forwarded")

        // The service goes on: the next good frame passes.
        try peer.setService(0)
        try peer.send(
          Frame.vxlan(vni: 42, inner: BadDatagram.goodFrame), to: hosts[0].address, port: 4789)
        #expect(try ears.receives(number: 1))
        try expectConservation(forwarder.stop())
      }
    }

    /// A datagram to the VNET/P port that must not reach a guest.
    struct BadRawFrame: CustomTestStringConvertible {
      let testDescription: String
      let bytes: [UInt8]
      let counter: String

      static let all = [
        BadRawFrame(
          testDescription: "a VXLAN datagram", bytes: Frame.vxlan(vni: 42, inner: BadDatagram.goodFrame),
          counter: "drop_wrong_encapsulation"),
        BadRawFrame(testDescription: "an empty datagram", bytes: [], counter: "drop_short_header"),
        BadRawFrame(
          testDescription: "a frame shorter than an Ethernet header", bytes: Array(BadDatagram.goodFrame.prefix(13)),
          counter: "drop_short_header"),
      ]
    }

    @Test("a bad datagram at the VNET/P port is counted by its reason and goes nowhere", arguments: BadRawFrame.all)
    func badRawFrame(frame: BadRawFrame) throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        let node = try lab.node(
          hosts[0], NodeConfiguration(hosts[0], among: hosts, encapsulation: "vnetp"), guests: [1])
        let ears = try PacketSocket(in: node.guests[0].namespace)
        let stranger = "10.99.0.77"
        try hosts[1].namespace.ip("address", "add", stranger + "/24", "dev", Host.underlayDevice)
        let peer = try DatagramSocket(in: hosts[1].namespace, address: hosts[1].address)
        let nobody = try DatagramSocket(in: hosts[1].namespace, address: stranger)
        for _ in 0..<10 { try peer.send(frame.bytes, to: hosts[0].address, port: 9000) }
        for _ in 0..<10 { try nobody.send(BadDatagram.goodFrame, to: hosts[0].address, port: 9000) }
        let isCounted = try eventually {
          let report = try node.forwarder.counters()
          return report.total(frame.counter, .underlay) == 10 && report.total("drop_unknown_source", .underlay) == 10
        }
        #expect(isCounted)
        #expect(try ears.receive(seconds: 0.3) == nil, "it was forwarded")
        try peer.send(BadDatagram.goodFrame, to: hosts[0].address, port: 9000)
        #expect(try ears.receives(number: 1))
        try stopAll([node])
      }
    }

    /// What is wrong with one datagram of a train.
    enum Flaw: String, CaseIterable, CustomTestStringConvertible {
      case length = "a length longer than what came"
      case checksum = "a wrong transport checksum"
      var testDescription: String { rawValue }
    }

    @Test("one bad datagram of a train harms no other, and nobody makes its checksum right", arguments: Flaw.allCases)
    func badDatagramOfTrain(flaw: Flaw) throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        let (forwarder, guest) = try lab.forwarder(on: hosts[0], peer: hosts[1], guest: 1)
        let device = try PacketSocket(in: guest.namespace, takesOffloads: true)
        let port: UInt16 = 5000
        let ears = try DatagramSocket(in: guest.namespace, address: guest.address, port: port)
        let peer = try DatagramSocket(in: hosts[1].namespace, address: hosts[1].address, port: 4789)
        // Whom the train is for is known: it goes to one port, and what can be joined is.
        try device.send(Frame.numbered(1, to: .broadcast, from: guest.mac), OffloadHeader())
        #expect(try peer.receive(seconds: 5) != nil)
        let before = try forwarder.counters()

        let payloads = (1...6).map { [UInt8](repeating: UInt8($0), count: 200) }
        let bad = 2
        let datagrams = payloads.enumerated().map { number, payload in
          let packet = Frame.datagramPacket(
            from: [10, 1, 0, 9], to: [10, 1, 0, 1], port: port,
            claimedLength: number == bad && flaw == .length ? 1_400 : nil,
            isSumRight: number != bad || flaw == .length, payload: payload)
          let inner = Frame.ethernet(to: guest.mac, from: BadDatagram.innerSource, type: Frame.ipv4, payload: packet)
          return Frame.vxlan(vni: 42, inner: inner)
        }
        try peer.send(
          datagrams.flatMap { $0 }, segmentBytes: datagrams[0].count, to: hosts[0].address, port: 4789)

        // The guest's kernel hands on the good ones, in order.
        let good = payloads.enumerated().filter { $0.offset != bad }.map(\.element)
        for payload in good { #expect(try ears.receive() == payload) }
        #expect(try ears.receive(seconds: 0.3) == nil)

        // The corrupt one gets as far as the guest's device, by itself and as it came.
        var arrived: [[UInt8]] = []
        var wrong: [[UInt8]] = []
        var count = 0
        while let (frame, offload) = try device.receiveWithOffload(seconds: 0.3) {
          guard let segment = Frame.Segment(frame, isIPv4: true, isTCP: false, tagCount: 0) else { continue }
          let payload = Array(segment.payload)
          count += 1
          arrived += stride(from: 0, to: payload.count, by: 200).map {
            Array(payload[$0..<min($0 + 200, payload.count)])
          }
          if !offload.needsChecksum && !segment.isSumRight { wrong.append(payload) }
        }
        #expect(arrived == (flaw == .length ? good : payloads))
        #expect(wrong == (flaw == .length ? [] : [payloads[bad]]))
        #expect(count < arrived.count, "nothing was joined: no run, so nothing that could go wrong")
        #expect(try guest.checksumErrors() == (flaw == .length ? [:] : ["UdpInCsumErrors": 1]))

        let report = try forwarder.stop()
        #expect(report.total("receives", .workers) - before.total("receives", .workers) == 1, "it came as one train")
        #expect(report.total("drop_bad_inner_length", .links) == (flaw == .length ? 1 : 0))
        #expect(report.total("in_frames", .links) == payloads.count)
        #expect(report.drops.filter { $0.key != "drop_bad_inner_length" } == before.drops)
        expectConservation(report)
      }
    }

    @Test("reserved bits are ignored, or dropped where the link says so", arguments: ["ignore", "drop"])
    func reservedBits(choice: String) throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        var configuration = NodeConfiguration(hosts[0], among: hosts)
        configuration.links[0].reservedBits = choice
        let forwarder = try Forwarder(on: hosts[0], configuration)
        let guest = try lab.guest(1)
        try lab.plug(guest, into: "vm1", of: hosts[0])
        let ears = try PacketSocket(in: guest.namespace)
        let peer = try DatagramSocket(in: hosts[1].namespace, address: hosts[1].address)
        let inner = BadDatagram.goodFrame
        try peer.send(Frame.vxlan(vni: 42, flags: 0x88, inner: inner), to: hosts[0].address, port: 4789)
        try peer.send(Frame.vxlan(vni: 42, reserved: 1, inner: inner), to: hosts[0].address, port: 4789)
        #expect(try ears.receiveNumbers().count == (choice == "ignore" ? 2 : 0))
        let report = try forwarder.stop()
        #expect(report.total("drop_reserved_bits", .links) == (choice == "drop" ? 2 : 0))
        expectConservation(report)
      }
    }

    @Test func aFrameTooBigForTheUnderlayIsCountedAndOthersPass() throws {
      try withLab { lab in
        let pair = try lab.pair()
        // The guest's owner may raise its MTU at any time.
        try pair.guestA.namespace.ip("link", "set", Guest.device, "mtu", "3000")
        #expect(try pair.guestA.ping(pair.guestB).isComplete)
        let result = try pair.guestA.ping(pair.guestB, count: 3, payloadBytes: 2000, mayFragment: false)
        #expect(result.received == 0)
        let report = try pair.forwarders[0].stop()
        #expect(report.total("drop_too_big", .links) == result.sent)
        expectConservation(report)
      }
    }

    @Test func aStormOfNonsenseLeavesTheServiceWorking() throws {
      try withLab { lab in
        let pair = try lab.pair()
        let peer = try DatagramSocket(in: pair.hosts[1].namespace, address: pair.hosts[1].address)
        var random = SystemRandomNumberGenerator()
        for _ in 0..<5_000 {
          let length = Int.random(in: 0...200, using: &random)
          var bytes = (0..<length).map { _ in UInt8.random(in: 0...255, using: &random) }
          // Half of them get as far as the inner frame.
          if Bool.random(using: &random) { bytes = Frame.vxlan(vni: 42, inner: bytes) }
          try peer.send(bytes, to: pair.hosts[0].address, port: 4789)
        }
        #expect(try pair.guestA.ping(pair.guestB).isComplete)
        for forwarder in pair.forwarders { try expectConservation(forwarder.stop()) }
      }
    }

    // MARK: - Starts that cannot work

    /// Starts a forwarder that must fail: exit code 1, one line that has these words, no device left.
    private func expectFailure(
      on host: Host, _ arguments: [String], through wrapper: [String] = [], says words: [String]
    ) throws {
      let process = try Forwarder.start(on: host, arguments, through: wrapper)
      #expect(process.wait(seconds: 20) == 1, "\(process.standardError)")
      let lines = process.standardError.split(separator: "\n").filter { !$0.hasPrefix("INFO ") }
      #expect(lines.count == 1, "\(process.standardError)")
      for word in words {
        #expect(lines.last?.lowercased().contains(word.lowercased()) == true, "no '\(word)' in: \(lines)")
      }
      #expect(process.standardOutput == "")
      #expect(!host.namespace.has(device: "vm1"), "a device was left behind")
    }

    private func quickStart(_ hosts: [Host], address: String? = nil) -> [String] {
      ["--tap", "vm1", "--address", address ?? hosts[0].address, "--peer", hosts[1].address, "--vni", "42"]
    }

    @Test func aPortInUseIsSaid() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        let holder = try DatagramSocket(in: hosts[0].namespace, address: hosts[0].address, port: 4789)
        try expectFailure(on: hosts[0], quickStart(hosts), says: ["4789", "in use"])
        withExtendedLifetime(holder) {}
      }
    }

    @Test func anAddressOfAnotherHostIsSaid() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        try expectFailure(
          on: hosts[0], quickStart(hosts, address: "10.99.0.200"), says: ["10.99.0.200", "address"])
      }
    }

    @Test func missingPrivilegeIsSaid() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        // Root without the capability, so that the binary can be read wherever it was built.
        let wrapper = ["setpriv", "--bounding-set", "-net_admin,-net_raw", "--inh-caps", "-net_admin,-net_raw"]
        try expectFailure(on: hosts[0], quickStart(hosts), through: wrapper, says: ["CAP_NET_ADMIN"])
      }
    }

    @Test func aMissingTunDeviceIsSaid() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        // A mount namespace in which /dev/net is empty.
        let wrapper = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /dev/net && exec \"$@\"", "sh"]
        try expectFailure(on: hosts[0], quickStart(hosts), through: wrapper, says: ["/dev/net/tun", "modprobe tun"])
      }
    }

    @Test("a bad configuration is refused with its place, and nothing starts", arguments: ["run", "check"])
    func badConfiguration(command: String) throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        let good = NodeConfiguration(hosts[0], among: hosts).toml
        let cases: [(text: String, says: [String])] = [
          (good.replacing("vni = 42", with: "vnii = 42"), ["vnii", "vni"]),
          (good.replacing("vni = 42", with: "vni = 99999999"), ["vni", "16777215"]),
          (good.replacing("domain = \"blue\"", with: "domain = \"bleu\""), ["domain", "bleu", "blue"]),
          (good.replacing("queues = 1", with: "queues = \"one\""), ["queues"]),
          (good + "\n[tuning]\ndispatch = \"sometimes\"\n", ["tuning.dispatch", "guest-driven"]),
          (good.replacing("[underlay]", with: "[underlay"), ["1"]),
          (
            good.replacing("remote =", with: "encapsulation = \"vnetp\"\ndomains = [\"blue\", \"red\"]\nremote =")
              + "\n[[domain]]\nname = \"red\"\nvni = 43\n", ["link[0].domains", "vnetp", "one domain"]
          ),
          (
            good.replacing("vni = 42", with: "vni = 42\nforwarding = \"routes\"")
              + "\n[[route]]\nsource = \"any\"\ndestination = \"any\"\nto = \"port:vm9\"\n", ["route[0].to", "vm9"]
          ),
          (
            good + "\n[[port]]\nname = \"nic\"\nkind = \"packet\"\n\n[[passthrough]]\na = \"nic\"\nb = \"vm1\"\n",
            ["passthrough[0].b", "vm1", "domain"]
          ),
        ]
        for (text, words) in cases {
          let file = try TemporaryText(text, suffix: ".toml")
          let arguments = command == "run" ? ["run", "--config", file.path] : ["check", file.path]
          let process = try hosts[0].namespace.start([Forwarder.path!] + arguments)
          #expect(process.wait(seconds: 20) == 1)
          for word in words + [file.path] {
            #expect(process.standardError.contains(word), "no '\(word)' in: \(process.standardError)")
          }
          #expect(!host(hosts[0], startedAnything: process))
        }
      }
    }

    private func host(_ host: Host, startedAnything process: ChildProcess) -> Bool {
      host.namespace.has(device: "vm1") || process.standardError.contains("ready")
    }

    @Test func aGoodConfigurationIsChecked() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        let file = try TemporaryText(NodeConfiguration(hosts[0], among: hosts).toml, suffix: ".toml")
        let process = try hosts[0].namespace.start([Forwarder.path!, "check", file.path])
        #expect(process.wait(seconds: 20) == 0, "\(process.standardError)")
        #expect(!host(hosts[0], startedAnything: process))
      }
    }

    @Test(
      "CPUs that may not be used are refused with the ones that may",
      .enabled(if: cpusAllowed.count > 1, "needs two CPUs"), arguments: [false, true])
    func cpusThatMayNotBeUsed(isThere: Bool) throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        let wanted = isThere ? "\(cpusAllowed[1])" : "999"
        try expectFailure(
          on: hosts[0], quickStart(hosts) + ["--cpus", wanted], through: ["taskset", "-c", "\(cpusAllowed[0])"],
          says: ["cpus", "CPU \(wanted)", "\(cpusAllowed[0])"])
      }
    }

    @Test func morePipelineStagesThanCPUsIsWarnedOfAndWorks() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        let forwarder = try Forwarder(
          on: hosts[0], quickStart(hosts) + ["--layout", "pipeline"],
          through: ["taskset", "-c", "\(cpusAllowed[0])"])
        let warnings = forwarder.process.standardError.split(separator: "\n").filter { $0.hasPrefix("WARN") }
        #expect(warnings.contains { $0.contains("1 CPU may be used for 3 stages") }, "\(warnings)")
        let guest = try lab.guest(1)
        try lab.plug(guest, into: "vm1", of: hosts[0])
        let (other, far) = try lab.forwarder(on: hosts[1], peer: hosts[0], guest: 2)
        #expect(try guest.ping(far).isComplete)
        try expectConservation(forwarder.stop())
        try expectConservation(other.stop())
      }
    }

    @Test func aPacketPortWhoseDeviceIsNotThereYetIsSaidAndTriedAgain() throws {
      try withLab { lab in
        let host = try lab.hosts(2)[0]
        let node = try lab.node(
          host, NodeConfiguration(ports: [.init(name: "vm1"), .packet("nic")]), guests: [1])
        let warnings = node.forwarder.process.standardError.split(separator: "\n").filter { $0.hasPrefix("WARN") }
        #expect(warnings.contains { $0.contains("nic") && $0.contains("retried") }, "\(warnings)")
        let far = try lab.cabledGuest(2, to: "nic", of: host)
        #expect(try eventually(within: 30) { try node.guests[0].ping(far, count: 1).isComplete })
        try stopAll([node])
      }
    }

    @Test("wrong usage exits with 2", arguments: [["run", "--nosuch"], ["run"], ["run", "--tap", "vm1"], ["nosuch"]])
    func wrongUsage(arguments: [String]) throws {
      let process = try ChildProcess([Forwarder.path!] + arguments)
      #expect(process.wait(seconds: 20) == 2)
      #expect(!process.standardError.isEmpty)
    }

    @Test func doctorTellsWhatThisMachineOffers() throws {
      let process = try ChildProcess([Forwarder.path!, "doctor"])
      #expect(process.wait(seconds: 20) == 0, "\(process.standardOutput)\(process.standardError)")
      #expect(process.standardOutput.contains("io_uring"))
    }
  }
}
