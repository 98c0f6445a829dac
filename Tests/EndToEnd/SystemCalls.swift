import Testing

/// Why io_uring cannot be taken from a process here; nil when it can.
private let obstacleToFilter: String? =
  (try? execute(["cc", "--version"])) == nil ? "there is no C compiler to build the filter with" : nil

extension EndToEnd {
  /// Where io_uring is forbidden, plain system calls take over or the reason is said.
  @Suite(needsForwarder, .disabled(if: obstacleToFilter != nil, "\(obstacleToFilter ?? "")"))
  struct SystemCalls {
    /// Runs the command that follows a number with that system call forbidden, as a container's seccomp profile does.
    private static let filter = """
      #include <errno.h>
      #include <linux/filter.h>
      #include <linux/seccomp.h>
      #include <stddef.h>
      #include <stdlib.h>
      #include <sys/prctl.h>
      #include <unistd.h>
      int main(int count, char **arguments) {
        struct sock_filter rules[] = {
          BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
          BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)atoi(arguments[1]), 0, 1),
          BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
          BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        };
        struct sock_fprog program = {sizeof rules / sizeof *rules, rules};
        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) return 126;
        execvp(arguments[2], arguments + 2);
        return 127;
      }
      """

    /// The system calls of io_uring have the same numbers on every architecture.
    static let forbidden = [(name: "io_uring_setup", number: 425), ("io_uring_enter", 426), ("io_uring_register", 427)]

    private func build() throws -> TemporaryText {
      let source = try TemporaryText(Self.filter, suffix: ".c")
      let program = try TemporaryText("", suffix: ".run")
      try execute(["cc", "-O1", "-o", program.path, source.path])
      return program
    }

    @Test("without this call of io_uring auto takes plain system calls and says so", arguments: forbidden)
    func fallsBack(_ name: String, _ number: Int) throws {
      try withLab { lab in
        let program = try build()
        let hosts = try lab.hosts(2)
        let forwarder = try Forwarder(
          on: hosts[0], ["--tap", "vm1", "--address", hosts[0].address, "--peer", hosts[1].address, "--vni", "42"],
          through: [program.path, "\(number)"])
        let log = forwarder.process.standardError
        let warnings = log.split(separator: "\n").filter { $0.hasPrefix("WARN") }
        #expect(warnings.contains { $0.contains("io_uring") && $0.contains("system calls") }, "\(log)")
        let guest = try lab.guest(1)
        try lab.plug(guest, into: "vm1", of: hosts[0])
        let (other, far) = try lab.forwarder(on: hosts[1], peer: hosts[0], guest: 2)
        #expect(try guest.ping(far).isComplete)
        #expect(try guest.tcp(to: far).receivedBytes > 16 << 20)
        #expect(try guest.sendNumbered(500, to: far) == Array(0..<500))
        let report = try forwarder.stop()
        expectConservation(report)
        try expectConservation(other.stop())
      }
    }

    @Test("without this call of io_uring it does not start where io_uring is asked for", arguments: forbidden)
    func refuses(_ name: String, _ number: Int) throws {
      try withLab { lab in
        let program = try build()
        let hosts = try lab.hosts(2)
        let process = try Forwarder.start(
          on: hosts[0],
          [
            "--tap", "vm1", "--address", hosts[0].address, "--peer", hosts[1].address, "--vni", "42", "--io", "uring",
          ], through: [program.path, "\(number)"])
        #expect(process.wait(seconds: 20) == 1)
        let lines = process.standardError.split(separator: "\n").filter { !$0.hasPrefix("INFO ") }
        #expect(lines.count == 1, "\(process.standardError)")
        for word in ["io_uring", "syscalls"] {
          #expect(process.standardError.contains(word), "no '\(word)' in: \(process.standardError)")
        }
        #expect(!hosts[0].namespace.has(device: "vm1"), "a device was left behind")
      }
    }
  }
}
