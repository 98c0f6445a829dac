import Testing

extension EndToEnd {
  /// One host runs vnetr, the other the Linux kernel's own VXLAN and bridge.
  @Suite(needsForwarder)
  struct Interoperation {
    struct Case: CustomTestStringConvertible {
      let family: Family
      let offloads: Bool
      var testDescription: String { "\(family.testDescription), guest offloads \(offloads ? "on" : "off")" }
      static let all = Family.allCases.flatMap { family in
        [true, false].map { Case(family: family, offloads: $0) }
      }
    }

    /// Guest 1 behind vnetr, guest 2 behind the kernel.
    private func mixedPair(
      _ lab: Lab, _ variant: Case
    ) throws -> (forwarder: Forwarder, ours: Guest, kernels: Guest) {
      let hosts = try lab.hosts(2, family: variant.family)
      let (forwarder, ours) = try lab.forwarder(on: hosts[0], peer: hosts[1], guest: 1)
      let kernels = try lab.kernelOverlay(on: hosts[1], remote: hosts[0], guest: 2)
      for guest in [ours, kernels] { try guest.setOffloads(variant.offloads ? .all : .none) }
      return (forwarder, ours, kernels)
    }

    @Test("ping and TCP in both directions pass with the kernel's VXLAN, every checksum right", arguments: Case.all)
    func traffic(variant: Case) throws {
      try withLab { lab in
        let (forwarder, ours, kernels) = try mixedPair(lab, variant)
        // 1,400 bytes of IPv4: 20 of header and 8 of ICMP's.
        #expect(try ours.ping(kernels, payloadBytes: 1372).isComplete)
        #expect(try kernels.ping(ours, payloadBytes: 1372).isComplete)
        #expect(try ours.ping(kernels, payloadBytes: 1472, mayFragment: false).isComplete)
        #expect(try ours.tcp(to: kernels).receivedBytes > 16 << 20)
        #expect(try ours.tcp(to: kernels, reverse: true).receivedBytes > 16 << 20)
        let udp = ["--udp", "--length", "1400", "--bitrate", "20M", "--time", "1"]
        #expect(try ours.flow(to: kernels, udp).receivedBytes > 0)
        #expect(try kernels.flow(to: ours, udp).receivedBytes > 0)
        #expect(try ours.checksumErrors() == [:])
        #expect(try kernels.checksumErrors() == [:])
        try expectConservation(forwarder.stop())
      }
    }

    /// The guests' kernels check only what they are not told is right; this reads the bytes between the hosts.
    @Test("packets carry right checksums on the wire, inside and outside", arguments: Case.all)
    func checksumsOnTheWire(variant: Case) throws {
      try withLab { lab in
        let (forwarder, ours, kernels) = try mixedPair(lab, variant)
        try lab.likeAWire(forwarder.host)
        #expect(try ours.ping(kernels, count: 1).isComplete)
        for (sender, receiver, direction) in [(kernels, ours, "in"), (ours, kernels, "out")] {
          let capture = try Capture(
            in: forwarder.host.namespace, device: Host.underlayDevice, "udp port 4789", direction: direction,
            framesMax: 400)
          _ = try sender.tcp(to: receiver, mebibytes: 8)
          #expect(capture.isFull(seconds: 15))
          let report = try capture.stop()
          #expect(report.contains("VXLAN"))
          #expect(report.contains("(correct)"), "no inner TCP checksum was seen")
          #expect(Capture.wrongChecksums(in: report) == [], "\(direction)")
        }
      }
    }

    @Test("numbered frames pass both ways once, in order and unchanged", arguments: Family.allCases)
    func numberedFrames(family: Family) throws {
      try withLab { lab in
        let (forwarder, ours, kernels) = try mixedPair(lab, Case(family: family, offloads: true))
        for (a, b) in [(ours, kernels), (kernels, ours)] {
          let sender = try PacketSocket(in: a.namespace)
          let receiver = try PacketSocket(in: b.namespace)
          // The kernel's bridge multicasts by itself (listener reports): only numbered frames count.
          func nextNumbered() throws -> [UInt8]? {
            while let frame = try receiver.receive(seconds: 2) {
              if Frame.number(of: frame) != nil { return frame }
            }
            return nil
          }
          for destination in [MAC.broadcast, b.mac] {
            for number in 0..<50 {
              try sender.send(Frame.numbered(UInt32(number), to: destination, from: a.mac))
              #expect(try nextNumbered() == Frame.numbered(UInt32(number), to: destination, from: a.mac))
            }
          }
          let tagged = Frame.numbered(50, to: b.mac, from: a.mac, tags: [(Frame.customerTag, 7)])
          try sender.send(tagged)
          #expect(try nextNumbered() == tagged)
          #expect(try receiver.receiveNumbers(quietSeconds: 0.2) == [])
        }
        try expectConservation(forwarder.stop())
      }
    }
  }
}
