import Foundation
import Testing

extension EndToEnd {
  /// Start, signals, end, and devices and peers that come and go meanwhile.
  @Suite(needsForwarder)
  struct Lifecycle {
    @Test("a signal drains, ends with 0 and removes the device that was made", arguments: [SIGTERM, SIGINT])
    func endsWell(signal: Int32) throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        let (forwarder, guest) = try lab.forwarder(on: hosts[0], peer: hosts[1], guest: 1)
        #expect(guest.namespace.has(device: Guest.device))
        forwarder.process.send(signal: signal)
        #expect(forwarder.process.wait(seconds: 15) == 0, "\(forwarder.process.standardError)")
        #expect(forwarder.process.standardOutput.contains("conservation: holds:"))
        #expect(eventually { !guest.namespace.has(device: Guest.device) })
        #expect(!hosts[0].namespace.has(device: "vm1"))
      }
    }

    @Test func aSecondSignalEndsItAtOnce() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        // A link so slow that draining it would take minutes.
        try hosts[0].namespace.run(
          "tc", "qdisc", "add", "dev", Host.underlayDevice, "root", "tbf", "rate", "8kbit", "burst", "2kb", "limit",
          "1mb")
        let (forwarder, guest) = try lab.forwarder(on: hosts[0], peer: hosts[1], guest: 1)
        let socket = try PacketSocket(in: guest.namespace)
        for number in 0..<200 { try socket.send(Frame.numbered(UInt32(number), to: .broadcast, from: guest.mac)) }
        forwarder.process.send(signal: SIGTERM)
        forwarder.process.send(signal: SIGTERM)
        #expect(forwarder.process.wait(seconds: 10) != nil)
        #expect(eventually { !guest.namespace.has(device: Guest.device) })
      }
    }

    @Test func aDeviceThatWasThereBeforeStays() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        try hosts[0].namespace.ip("tuntap", "add", "dev", "vm1", "mode", "tap")
        let forwarder = try Forwarder(
          on: hosts[0], ["--tap", "vm1", "--address", hosts[0].address, "--peer", hosts[1].address, "--vni", "42"])
        try forwarder.stop()
        #expect(hosts[0].namespace.has(device: "vm1"))
      }
    }

    @Test func signalsAskForTheCountersAsOftenAsOneLikes() throws {
      try withLab { lab in
        let pair = try lab.pair()
        var framesBefore = -1
        for _ in 0..<3 {
          #expect(try pair.guestA.ping(pair.guestB).isComplete)
          let report = try pair.forwarders[0].counters()
          expectConservation(report)
          let frames = report.total("in_frames", .ports, of: "vm1")
          #expect(frames >= framesBefore + 5, "five requests came in from the guest")
          framesBefore = frames
        }
        let last = try pair.forwarders[0].stop()
        expectConservation(last)
        #expect(last.total("in_frames", .ports, of: "vm1") >= framesBefore)
      }
    }

    @Test func theServiceManagerIsToldThatItIsReadyAndThatItStops() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        let path = FileManager.default.temporaryDirectory.appendingPathComponent("\(lab.prefix)notify").path
        let manager = try NotificationSocket(path: path)
        let forwarder = try Forwarder(
          on: hosts[0], ["--tap", "vm1", "--address", hosts[0].address, "--peer", hosts[1].address, "--vni", "42"],
          environment: ["NOTIFY_SOCKET": path])
        #expect(manager.receive(seconds: 5)?.contains("READY=1") == true)
        try forwarder.stop()
        #expect(manager.receive(seconds: 5)?.contains("STOPPING=1") == true)
      }
    }

    @Test func aDeviceThatIsDeletedIsMadeAgainAndTheOtherPortsGoOn() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        let ports = [NodeConfiguration.Port(name: "vm1"), NodeConfiguration.Port(name: "vm2")]
        let forwarder = try Forwarder(on: hosts[0], NodeConfiguration(hosts[0], among: hosts, ports: ports))
        let doomed = try lab.guest(1)
        try lab.plug(doomed, into: "vm1", of: hosts[0])
        let bystander = try lab.guest(2)
        try lab.plug(bystander, into: "vm2", of: hosts[0])
        let (other, far) = try lab.forwarder(on: hosts[1], peer: hosts[0], guest: 3)
        #expect(try doomed.ping(far).isComplete)

        try doomed.namespace.ip("link", "delete", Guest.device)
        #expect(try bystander.ping(far).isComplete)
        #expect(eventually { forwarder.isLogged("vm1") }, "\(forwarder.process.standardError)")

        // The port is tried again until its device is there; a guest gets it as the first one did.
        #expect(eventually(within: 30) { hosts[0].namespace.has(device: "vm1") })
        try lab.plug(doomed, into: "vm1", of: hosts[0])
        #expect(try doomed.ping(far).isComplete)
        #expect(try bystander.ping(far).isComplete)
        try expectConservation(forwarder.stop())
        try expectConservation(other.stop())
      }
    }

    @Test func aGuestWhoseNamespaceGoesAwayTakesOnlyItsPortAlong() throws {
      try withLab { lab in
        let pair = try lab.pair()
        #expect(try pair.guestA.ping(pair.guestB).isComplete)
        pair.guestB.namespace.remove()
        // The kernel takes a namespace apart in its own time; from then on frames for it find its port down.
        #expect(try eventually(within: 30) { try pair.guestA.ping(pair.guestB, count: 2).received == 0 })
        for forwarder in pair.forwarders {
          #expect(forwarder.process.isRunning)
          try expectConservation(forwarder.stop())
        }
      }
    }

    @Test func anUnderlayThatWasDownIsUsedAgain() throws {
      try withLab { lab in
        let pair = try lab.pair()
        #expect(try pair.guestA.ping(pair.guestB).isComplete)
        let host = pair.hosts[0].namespace
        try host.ip("link", "set", Host.underlayDevice, "down")
        #expect(try pair.guestA.ping(pair.guestB, count: 3).received == 0)
        try host.ip("link", "set", Host.underlayDevice, "up")
        #expect(try eventually { try pair.guestA.ping(pair.guestB, count: 1).isComplete })
        #expect(try pair.guestB.ping(pair.guestA).isComplete)
        for forwarder in pair.forwarders { try expectConservation(forwarder.stop()) }
      }
    }

    @Test func aPeerThatRestartsIsServedAgain() throws {
      try withLab { lab in
        let pair = try lab.pair()
        #expect(try pair.guestA.ping(pair.guestB).isComplete)
        try pair.forwarders[1].stop()
        // Nobody listens at the peer: its kernel refuses every datagram.
        #expect(try pair.guestA.ping(pair.guestB, count: 3).received == 0)
        let (again, guest) = try lab.forwarder(on: pair.hosts[1], peer: pair.hosts[0], guest: 3)
        #expect(try pair.guestA.ping(guest).isComplete)
        try expectConservation(again.stop())
        try expectConservation(pair.forwarders[0].stop())
      }
    }

    @Test func aRestartOnTheSameDeviceNameWorksAtOnce() throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        for round in 1...3 {
          let (forwarder, _) = try lab.forwarder(on: hosts[0], peer: hosts[1], guest: round)
          try forwarder.stop()
        }
      }
    }
  }
}
