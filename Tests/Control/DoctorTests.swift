import Datapath
import Testing

@testable import Control

@Suite struct DoctorTests {
  @Test func theTableLinesItsColumnsUpAndEndsWithWhatToDo() {
    let report = DoctorReport(items: [
      DoctorItem("kernel", "6.18", .note),
      DoctorItem("io_uring", "no: Operation not permitted", .needed, cost: "cannot run", remedy: "allow it"),
      DoctorItem("huge pages", "none", .absent, cost: "slower", remedy: "make some"),
      DoctorItem("UDP GSO", "yes", .ok, cost: "no trains", remedy: "unused"),
    ])
    #expect(!report.canRun)
    #expect(
      report.table == """
        item        state   found                        cost of its absence
        kernel      note    6.18
        io_uring    needed  no: Operation not permitted  cannot run
        huge pages  absent  none                         slower
        UDP GSO     ok      yes                          no trains
        io_uring: allow it
        huge pages: make some
        the forwarder cannot run here: io_uring
        """)
  }

  @Test func aMachineThatLacksOnlyWhatCanBeDoneWithoutIsGoodEnough() {
    let report = DoctorReport(items: [DoctorItem("huge pages", "none", .absent, cost: "slower")])
    #expect(report.canRun)
    #expect(report.table.hasSuffix("the forwarder can run here"))
  }

  @Test func everyFeatureOfIouringAndEveryLimitIsLookedAt() {
    let names = Doctor.examine().items.map(\.name)
    for (name, _, _) in UringFeatures.names { #expect(names.contains("io_uring \(name)")) }
    for name in [
      "kernel", "io_uring", "kernel.io_uring_disabled", "/dev/net/tun", "CAP_NET_ADMIN", "CAP_NET_RAW", "UDP GSO",
      "UDP GRO", "net.core.rmem_max", "net.core.wmem_max", "huge pages", "transparent huge pages", "RLIMIT_NOFILE",
      "RLIMIT_MEMLOCK", "CPUs allowed", "CPUs isolated", "I/O", "AF_PACKET", "layout",
    ] {
      #expect(names.contains(name), "\(name)")
    }
    #expect(Set(names).count == names.count)
  }

  @Test func itWantsAsManyHugePagesAsTheFrameMemoryOfAWorkerTakes() {
    // 256 slots of 65,728 bytes: just over 16 MiB.
    #expect(Doctor.hugePagesWanted(pageBytes: 2 << 20) == 9)
    #expect(Doctor.hugePagesWanted(pageBytes: 1 << 30) == 1)
  }

  @Test func itSaysWhichLayoutAutoTakesAndWhy() {
    let few = Doctor.layout(allowedCount: 3)
    #expect(few.found == "auto takes fused")
    #expect(few.cost == "a pipeline needs 4 CPUs, and 3 may be used")
    let enough = Doctor.layout(allowedCount: 4)
    #expect(enough.found == "auto takes fused, pipeline with dispatch = \"vmm-driven\"")
    #expect(enough.cost == "dispatch is vmm-driven and 4 CPUs may be used")
  }
}
