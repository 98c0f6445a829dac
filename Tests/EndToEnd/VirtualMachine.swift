import Testing

extension EndToEnd {
  /// A real virtual machine, whose monitor holds its TAP device: the service takes the device's other side.
  @Suite(needsForwarder, .disabled(if: Obstacle.toVirtualMachine != nil, "\(Obstacle.toVirtualMachine ?? "")"))
  struct VirtualMachine {
    /// Boots Linux with a network card behind a TAP device of a host; it takes the address of guest `number`, runs
    /// shell commands and stays up.
    private func boot(_ host: Host, tap: String, number: Int, commands: String) throws -> ChildProcess {
      let guest = Guest(number: number, namespace: host.namespace)
      return try host.namespace.start([
        "qemu-system-x86_64", "-accel", "tcg", "-m", "256", "-nodefaults", "-display", "none", "-serial", "stdio",
        "-no-reboot", "-kernel", VirtualMachine.folder + "/vmlinuz", "-initrd", VirtualMachine.folder + "/initrd",
        "-append",
        // The initial ramdisk's `init` reads these; a command line has no other way to bear spaces.
        "console=ttyS0 quiet panic=-1 vm_address=\(guest.address) "
          + "vm_commands=\(commands.replacing(" ", with: "~"))",
        "-netdev", "tap,id=n,ifname=\(tap),script=no,downscript=no",
        "-device", "virtio-net-pci,netdev=n,mac=\(guest.mac),romfile=",
      ])
    }

    /// Where `tools/setup --vm` puts kernel and initial ramdisk.
    static let folder = ".build/vm"

    @Test(
      "a virtual machine's TAP device as a packet port carries ping and TCP with super-frames",
      arguments: ["uring", "syscalls"])
    func tapOfAMonitor(io: String) throws {
      // Software emulation on a busy machine is slow.
      let bootSeconds = 90.0
      let bytes = 4 << 20
      try withLab { lab in
        let hosts = try lab.hosts(2)
        try hosts[0].namespace.ip("tuntap", "add", "dev", "vm1", "mode", "tap")
        try hosts[0].namespace.ip("link", "set", "vm1", "up")
        let a = try lab.node(
          hosts[0], NodeConfiguration(hosts[0], among: hosts, ports: [.packet("vm1")]), guests: [],
          flags: ["--io", io])
        let b = try lab.node(hosts[1], NodeConfiguration(hosts[1], among: hosts), guests: [2], flags: ["--io", io])
        let far = b.guests[0]
        let listener = try StreamListener(in: far.namespace, address: far.address)
        let large = try Capture(in: hosts[0].namespace, device: "vm1", "tcp and greater 3000", framesMax: 1)

        let machine = try boot(
          hosts[0], tap: "vm1", number: 9,
          commands: "ping -c 5 \(far.address) && echo PINGS; "
            + "dd if=/dev/zero bs=64k count=\(bytes >> 16) | nc \(far.address) \(listener.port)")
        defer { machine.kill() }
        let receiver = try listener.accept(seconds: bootSeconds)
        #expect(machine.standardOutput.contains("PINGS"), "\(machine.standardOutput)\(machine.standardError)")
        var received: [UInt8] = []
        _ = try eventually(within: bootSeconds) {
          if received.count == bytes { return true }
          return try receiver.receive(into: &received)
        }
        #expect(received.count == bytes)
        #expect(received.allSatisfy { $0 == 0 })
        #expect(large.isFull(), "the machine sent no super-frames: the test shows less than it should")
        let machineItself = Guest(number: 9, namespace: hosts[0].namespace)
        #expect(try far.ping(machineItself).isComplete)
        #expect(try far.checksumErrors() == [:])

        // The device stays the monitor's.
        let report = try a.forwarder.stop()
        expectConservation(report)
        #expect(machine.isRunning)
        #expect(hosts[0].namespace.has(device: "vm1"))
        try stopAll([b])
      }
    }
  }
}
