import Testing

extension EndToEnd {
  /// Real virtual machines, by QEMU's software emulation.
  @Suite(needsForwarder, .disabled(if: Obstacle.toVirtualMachine != nil, "\(Obstacle.toVirtualMachine ?? "")"))
  struct VirtualMachine {
    @Test(
      "a virtual machine's TAP device as a packet port carries ping and TCP with super-frames",
      arguments: ["uring", "syscalls"])
    func tapOfAMonitor(io: String) throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        try hosts[0].namespace.ip("tuntap", "add", "dev", "vm1", "mode", "tap")
        try hosts[0].namespace.ip("link", "set", "vm1", "up")
        let a = try lab.node(
          hosts[0], NodeConfiguration(hosts[0], among: hosts, ports: [.packet("vm1")]), guests: [],
          flags: ["--io", io])
        let b = try lab.node(hosts[1], NodeConfiguration(hosts[1], among: hosts), guests: [2], flags: ["--io", io])
        let far = b.guests[0]
        let machine = try Machine(on: hosts[0], number: 9, .tap("vm1"))
        try machine.awaitBoot()
        let large = try Capture(in: hosts[0].namespace, device: "vm1", "tcp and greater 3000", framesMax: 1)

        try machine.expectPings(far)
        let stream = try RunningStream(from: far, echoedBy: machine, seed: 1)
        let difference = try stream.finish(bytes: [4_000_003])
        #expect(difference == nil)
        #expect(large.isFull(), "the machine sent no super-frames: the test shows less than it should")
        #expect(try far.ping(machine.guest).isComplete)
        #expect(try far.checksumErrors() == [:])

        // The device stays the monitor's.
        expectConservation(try a.forwarder.stop())
        #expect(machine.process.isRunning)
        #expect(hosts[0].namespace.has(device: "vm1"))
        try stopAll([b])
      }
    }

    @Test(
      "two virtual machines on two hosts reach each other by vhost-user: ping, and TCP both ways byte for byte",
      arguments: [
        (["--io", "uring"], false), (["--io", "uring"], true), (["--io", "syscalls"], false),
        (["--layout", "pipeline"], false), (["--layout", "pipeline", "--io", "syscalls"], true),
      ])
    func twoMachines(flags: [String], isPacked: Bool) throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        let sockets = hosts.map { lab.socketPath("\($0.name)-vm1") }
        let nodes = try hosts.map { host in
          try lab.node(
            host, NodeConfiguration(host, among: hosts, ports: [.vhostUser("vm1", sockets[host.index])]), guests: [],
            flags: flags)
        }
        let machines = try hosts.map { host in
          try Machine(on: host, number: host.index + 1, .vhostUser(sockets[host.index], isPacked: isPacked))
        }
        for machine in machines { try machine.awaitBoot() }
        try machines[0].expectPings(machines[1].guest)
        try machines[0].expectEcho(of: machines[1])
        try machines[1].expectEcho(of: machines[0])
        try stopAll(nodes)
      }
    }

    @Test("a virtual machine and a namespace with a TAP device of the same host exchange a stream", arguments: [1, 4])
    func besideTap(streamCount: Int) throws {
      try withLab { lab in
        let host = try lab.hosts(1)[0]
        let socket = lab.socketPath("vm1")
        let node = try lab.node(
          host, NodeConfiguration(ports: [.vhostUser("vm1", socket), NodeConfiguration.Port(name: "tap1")]),
          guests: [2])
        let machine = try Machine(on: host, number: 1, .vhostUser(socket))
        try machine.awaitBoot()
        try machine.expectPings(node.guests[0])
        #expect(try node.guests[0].ping(machine.guest, payloadBytes: 1_472, mayFragment: false).isComplete)
        let streams = try (1...streamCount).map {
          try RunningStream(from: node.guests[0], echoedBy: machine, seed: UInt64($0))
        }
        for stream in streams {
          let difference = try stream.finish(bytes: [4_000_003])
          #expect(difference == nil)
        }
        #expect(try node.guests[0].checksumErrors() == [:])
        try stopAll([node])
      }
    }

    /// One worker that does everything, and a pipeline; with two that each receive by one ring where there are CPUs.
    private static let placesOfPairs: [[String]] = [
      [],
      ["--layout", "pipeline"]
        + (cpusAllowed.count > 2
          ? ["--cpus", "rx=\(cpusAllowed[0]),\(cpusAllowed[1]) route=\(cpusAllowed[2]) tx=\(cpusAllowed[2])"] : []),
    ]

    @Test(
      "a virtual machine with two CPUs uses two pairs of queues, then one, then both again, under a stream",
      arguments: placesOfPairs, [false, true])
    func twoQueuePairs(flags: [String], isPacked: Bool) throws {
      try withLab { lab in
        let host = try lab.hosts(1)[0]
        let socket = lab.socketPath("vm1")
        var port = NodeConfiguration.Port.vhostUser("vm1", socket)
        port.queues = 2
        let node = try lab.node(
          host, NodeConfiguration(ports: [port, .init(name: "tap1")]), guests: [2],
          flags: flags + ["--log-level", "debug"])
        let near = node.guests[0]
        let machine = try Machine(on: host, number: 1, .vhostUser(socket, isPacked: isPacked, queuePairs: 2))
        try machine.awaitBoot()
        for queue in 0..<4 {
          #expect(node.forwarder.isLogged("a ring runs port=vm1 queue=\(queue)"))
        }
        let devices = try machine.run("ls /sys/class/net/eth0/queues").split(whereSeparator: \.isWhitespace).sorted()
        #expect(devices == ["rx-0", "rx-1", "tx-0", "tx-1"])

        // Each CPU sends by a queue of its own; what comes is spread by its flow.
        let before = try machine.packetsByQueue()
        for cpu in 0...1 {
          let answer = try machine.run("taskset \(1 << cpu) ping -A -q -c 20 \(near.address)")
          #expect(answer.contains(" 0% packet loss"), "\(answer)")
        }
        let streams = try (0..<16).map { try RunningStream(from: near, echoedBy: machine, seed: $0) }
        for stream in streams {
          let difference = try stream.finish(bytes: [200_003])
          #expect(difference == nil)
        }
        let after = try machine.packetsByQueue()
        for (before, after) in [(before.received, after.received), (before.sent, after.sent)] {
          #expect(before.count == 2 && after.count == 2)
          for (before, after) in zip(before, after) { #expect(after >= before + 20, "\(before), then \(after)") }
        }
        if flags.contains("--cpus") {
          for worker in ["0", "1"] {
            #expect(try node.forwarder.counters().total("receives", .workers, of: worker) >= 20)
          }
        }

        // The driver turns queues off and on.
        let stream = try RunningStream(from: near, echoedBy: machine, seed: 17)
        for pairs in [1, 2, 1, 2] {
          #expect(try stream.run { stream.receivedBytes > 1 << 20 })
          try machine.run("ethtool -L eth0 combined \(pairs)")
          let received = stream.receivedBytes
          #expect(try stream.run(within: 30) { stream.receivedBytes > received + 1 << 20 }, "with \(pairs) pairs")
          #expect(try near.ping(machine.guest).isComplete)
        }
        let starts = node.forwarder.process.standardError.split(separator: "\n").count {
          $0.contains("a ring runs port=vm1 queue=3")
        }
        #expect(starts >= 3, "the second pair was not turned off and on twice")
        let difference = try stream.finish()
        #expect(difference == nil)
        #expect(try near.checksumErrors() == [:])
        try stopAll([node])
      }
    }

    @Test("a virtual machine is killed and started anew while another one's stream goes on")
    func killedAndStartedAnew() throws {
      try withLab { lab in
        let host = try lab.hosts(1)[0]
        let sockets = ["vm1", "vm2"].map { lab.socketPath($0) }
        let node = try lab.node(
          host,
          NodeConfiguration(
            ports: [.vhostUser("vm1", sockets[0]), .vhostUser("vm2", sockets[1]), NodeConfiguration.Port(name: "tap1")]
          ),
          guests: [3])
        let victim = try Machine(on: host, number: 1, .vhostUser(sockets[0]))
        let other = try Machine(on: host, number: 2, .vhostUser(sockets[1]))
        for machine in [victim, other] { try machine.awaitBoot() }
        let stream = try RunningStream(from: node.guests[0], echoedBy: other, seed: 1)
        let lost = try RunningStream(from: node.guests[0], echoedBy: victim, seed: 2)
        #expect(try lost.run { lost.receivedBytes > 1 << 20 })

        victim.kill()
        #expect(try stream.run { node.forwarder.isLogged("the guest is gone") })
        let anew = try Machine(on: host, number: 1, .vhostUser(sockets[0]))
        #expect(try stream.run(within: Machine.bootSeconds) { anew.process.standardOutput.contains("BOOTED") })
        try anew.awaitBoot()
        try anew.expectPings(node.guests[0])
        try anew.expectEcho(of: other)
        let received = stream.receivedBytes
        #expect(try stream.run { stream.receivedBytes > received + 1 << 20 })
        let difference = try stream.finish()
        #expect(difference == nil)
        try stopAll([node])
      }
    }

    @Test(
      "a forwarder is killed and started anew, and a virtual machine's connection goes on",
      arguments: [[], ["--layout", "pipeline"]] as [[String]], [false, true])
    func restartedForwarder(flags: [String], isPacked: Bool) throws {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        let socket = lab.socketPath("vm1")
        let far = try lab.node(hosts[1], NodeConfiguration(hosts[1], among: hosts), guests: [2])
        let guest = far.guests[0]
        let configuration = NodeConfiguration(hosts[0], among: hosts, ports: [.vhostUser("vm1", socket)])
        let first = try lab.node(hosts[0], configuration, guests: [], flags: flags)
        let machine = try Machine(on: hosts[0], number: 1, .vhostUser(socket, isPacked: isPacked, .reconnects))
        try machine.awaitBoot()
        try machine.expectPings(guest)
        let stream = try RunningStream(from: guest, echoedBy: machine, seed: 1)
        #expect(try stream.run { stream.receivedBytes > 1 << 20 })

        first.forwarder.process.kill()
        let second = try lab.node(hosts[0], configuration, guests: [], flags: flags)
        #expect(try stream.run(within: 20) { second.forwarder.isLogged("a guest is connected") })
        let received = stream.receivedBytes
        #expect(try stream.run(within: 60) { stream.receivedBytes > received + 1 << 20 })
        let difference = try stream.finish()
        #expect(difference == nil)
        try machine.expectPings(guest)
        try stopAll([second, far])
      }
    }

    @Test("QEMU makes the socket, and the forwarder connects again when another machine is there")
    func machineListens() throws {
      try withLab { lab in
        let host = try lab.hosts(1)[0]
        let socket = lab.socketPath("vm1")
        let node = try lab.node(
          host,
          NodeConfiguration(ports: [.vhostUser("vm1", socket, mode: "client"), NodeConfiguration.Port(name: "tap1")]),
          guests: [2])
        for _ in 1...2 {
          let machine = try Machine(on: host, number: 1, .vhostUser(socket, .listens))
          try machine.awaitBoot()
          try machine.expectPings(node.guests[0])
          machine.kill()
        }
        #expect(node.forwarder.isLogged("a guest's VMM is not there, will be retried"))
        try stopAll([node])
      }
    }

    @Test("a virtual machine moves to another host under a stream, and frames follow it", arguments: [false, true])
    func migration(isPacked: Bool) throws {
      // Software emulation of a busy machine forgets writes now and then while it migrates, whatever the network card's
      // other side is, and the machine stands still.
      var triesLeft = 5
      while try !move(isPacked: isPacked) {
        triesLeft -= 1
        try #require(triesLeft > 0, "no machine lived on after it moved")
      }
    }

    /// Has a machine move under two streams.
    /// - Returns: whether it lived on where it moved to; if not, nothing was seen of its network.
    private func move(isPacked: Bool) throws -> Bool {
      try withLab { lab in
        let hosts = try lab.hosts(2)
        let sockets = hosts.map { lab.socketPath("\($0.name)-vm1") }
        let nodes = try hosts.map { host in
          try lab.node(
            host,
            NodeConfiguration(
              host, among: hosts, ports: [.vhostUser("vm1", sockets[host.index]), .init(name: "tap1")]),
            guests: [host.index + 2])
        }
        let (near, far) = (nodes[0].guests[0], nodes[1].guests[0])
        let before = try Machine(on: hosts[0], number: 1, .vhostUser(sockets[0], isPacked: isPacked))
        try before.awaitBoot()
        let destination = "tcp:\(hosts[1].address):4444"
        let after = try Machine(
          on: hosts[1], number: 1, .vhostUser(sockets[1], isPacked: isPacked), incoming: destination)
        let streams = try [near, far].enumerated().map {
          try RunningStream(from: $1, echoedBy: before, seed: UInt64($0))
        }
        func expectProgress(sourceLocation: SourceLocation = #_sourceLocation) throws {
          let received = streams.map(\.receivedBytes)
          for (stream, bytes) in zip(streams, received) {
            #expect(
              try stream.run(within: 30) { stream.receivedBytes > bytes + 1 << 20 }, sourceLocation: sourceLocation)
          }
        }
        try expectProgress()

        try before.monitor("migrate -d \(destination)")
        let hasMoved = try streams[1].run(within: 60) {
          try before.monitor("info migrate")
          return ["completed", "failed"].contains { before.process.standardOutput.contains("status: \($0)") }
        }
        #expect(
          hasMoved && !before.process.standardOutput.contains("status: failed"), "\(before.process.standardOutput)")
        before.kill()
        guard (try? after.run("true", seconds: 20)) != nil else { return false }
        #expect(eventually { nodes[1].forwarder.isLogged("a guest has moved here") })
        try expectProgress()
        for stream in streams {
          let difference = try stream.finish()
          #expect(difference == nil)
        }

        // Its frames come by the new host's port, and others' go there.
        let port = try nodes[1].forwarder.counters().total("in_frames", .ports, of: "vm1")
        try after.expectPings(near)
        #expect(try far.ping(after.guest).isComplete)
        #expect(try nodes[1].forwarder.counters().total("in_frames", .ports, of: "vm1") >= port + 20)
        #expect(try nodes[0].forwarder.counters().total("in_frames", .links) > 0)
        for guest in [near, far] { #expect(try guest.checksumErrors() == [:]) }
        try stopAll(nodes)
        return true
      }
    }
  }
}
