import Datapath
import Glibc
import Testing

@testable import Control

@Suite struct PortDeviceTests {
  @Test func aDeviceWithAllThatItMayHaveIsNotTalkedAbout() {
    #expect(PortDevice.shortcomings(of: "vm1", .tcpAndUDP, refused: nil).isEmpty)
  }

  @Test(arguments: [TapDevice.Offloads.tcp, .checksums, .none])
  func aKernelThatLacksOffloadsIsTold(_ offloads: TapDevice.Offloads) throws {
    let found = PortDevice.shortcomings(of: "vm1", offloads, refused: nil)
    let only = try #require(found.first)
    #expect(found.count == 1)
    #expect(only.what.contains(offloads == .tcp ? "without UDP super-frames" : "without super-frames"))
    #expect(only.remedy == (offloads == .tcp ? "use Linux 6.2 or later" : "see vnetr doctor"))
  }

  @Test func aLongestSuperFrameThatCannotBeSetIsToldWithTheCommandThatSetsIt() throws {
    let found = PortDevice.shortcomings(of: "vm1", .tcpAndUDP, refused: (number: EPERM, bytes: 61_320))
    let only = try #require(found.first)
    #expect(found.count == 1)
    #expect(only.why == "Operation not permitted")
    #expect(only.remedy == "ip link set vm1 gso_max_size 61320")
  }
}
