import Foundation
import Testing

/// Why allocations cannot be counted here; nil when they can.
private let obstacleToCounting: String? =
  (try? execute(["cc", "--version"])) == nil ? "there is no C compiler to build the counter of allocations with" : nil

extension EndToEnd {
  /// Once its ports and links are up a worker allocates nothing.
  @Suite(needsForwarder, .disabled(if: obstacleToCounting != nil, "\(obstacleToCounting ?? "")"))
  struct Allocations {
    /// Stands in front of the C library's allocator and counts, in a file that it maps, the calls of all threads and
    /// those of workers.
    private static let counter = """
      #define _GNU_SOURCE
      #include <fcntl.h>
      #include <stdatomic.h>
      #include <stdlib.h>
      #include <string.h>
      #include <sys/mman.h>
      #include <sys/prctl.h>
      #include <unistd.h>
      extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
      extern void *__libc_memalign(size_t, size_t);
      static _Atomic unsigned long *counts;
      static void count(void) {
        if (!counts) return;
        char name[16] = {0};
        prctl(PR_GET_NAME, name);
        atomic_fetch_add(&counts[0], 1);
        if (strncmp(name, "vnetr-worker", 12) == 0) atomic_fetch_add(&counts[1], 1);
      }
      void *malloc(size_t n) { count(); return __libc_malloc(n); }
      void *calloc(size_t m, size_t n) { count(); return __libc_calloc(m, n); }
      void *realloc(void *p, size_t n) { count(); return __libc_realloc(p, n); }
      void *aligned_alloc(size_t a, size_t n) { count(); return __libc_memalign(a, n); }
      int posix_memalign(void **p, size_t a, size_t n) { count(); *p = __libc_memalign(a, n); return *p ? 0 : 12; }
      __attribute__((constructor)) static void start(void) {
        const char *path = getenv("ALLOCATION_COUNTS");
        int file = path ? open(path, O_RDWR) : -1;
        if (file < 0) return;
        void *mapped = mmap(0, 16, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (mapped != MAP_FAILED) counts = mapped;
        close(file);
      }
      """

    /// The calls so far: of all threads, and of workers.
    private func counts(_ file: TemporaryText) throws -> (all: UInt64, workers: UInt64) {
      let bytes = try Data(contentsOf: URL(fileURLWithPath: file.path))
      let words = [0, 8].map { start in (0..<8).reduce(UInt64(0)) { $0 | UInt64(bytes[start + $1]) << (8 * $1) } }
      return (words[0], words[1])
    }

    @Test func aWorkerUnderLoadAllocatesNothing() throws {
      try withLab { lab in
        let source = try TemporaryText(Self.counter, suffix: ".c")
        let library = try TemporaryText("", suffix: ".so")
        try execute(["cc", "-shared", "-fPIC", "-O1", "-o", library.path, source.path])
        let file = try TemporaryText(String(repeating: "\0", count: 16))
        let hosts = try lab.hosts(2)
        let counted = try Forwarder(
          on: hosts[0],
          ["--tap", "vm1", "--address", hosts[0].address, "--peer", hosts[1].address, "--vni", "42"],
          environment: ["LD_PRELOAD": library.path, "ALLOCATION_COUNTS": file.path])
        let guestA = try lab.guest(1)
        try lab.plug(guestA, into: "vm1", of: hosts[0])
        let (other, guestB) = try lab.forwarder(on: hosts[1], peer: hosts[0], guest: 2)
        #expect(try guestA.ping(guestB).isComplete)

        let before = try counts(file)
        #expect(before.workers > 0, "the start of a worker allocates: otherwise nothing is counted")
        _ = try guestA.tcp(to: guestB, mebibytes: 64)
        _ = try guestA.flow(to: guestB, ["--udp", "--length", "200", "--bitrate", "0", "--time", "1"])
        let after = try counts(file)
        #expect(after.workers == before.workers, "\(after.workers - before.workers) allocations on a worker's thread")
        try expectConservation(counted.stop())
        try expectConservation(other.stop())
        #expect(try counts(file).all > after.all, "control allocates when it prints")
      }
    }
  }
}
