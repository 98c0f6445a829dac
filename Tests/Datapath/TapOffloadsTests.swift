import CLinux
import Glibc
import Testing

@testable import Datapath

@Suite struct TapOffloadsTests {
  /// A kernel that knows some bits of TUNSETOFFLOAD, and refuses all others as the real one does.
  private final class Kernel {
    let known: UInt
    let refusal: Int32
    private(set) var asked: [UInt] = []

    init(knows offloads: TapDevice.Offloads, refusal: Int32 = EINVAL) {
      known = offloads.bits
      self.refusal = refusal
    }

    func set(_ bits: UInt) -> Int32 {
      asked.append(bits)
      return bits & ~known == 0 ? 0 : refusal
    }
  }

  @Test("each kernel gives the most that it knows", arguments: TapDevice.Offloads.allCases)
  func mostThatIsKnown(_ most: TapDevice.Offloads) throws {
    let kernel = Kernel(knows: most)
    #expect(try TapDevice.Offloads.agree(isWanted: true, set: kernel.set) == most)
    let asked = TapDevice.Offloads.allCases.reversed().prefix { $0 != most }.map(\.bits) + [most.bits]
    #expect(kernel.asked == asked, "the most first, and no more once it agreed")
  }

  @Test("UDP super-frames are asked for both versions of IP at once")
  func bothVersions() {
    let udp = UInt(CLINUX_TUN_F_USO4 | CLINUX_TUN_F_USO6)
    #expect(TapDevice.Offloads.tcpAndUDP.bits & udp == udp)
    #expect(TapDevice.Offloads.tcp.bits & udp == 0)
    #expect(TapDevice.Offloads.tcp.bits & UInt(TUN_F_CSUM) != 0, "no offload without that of checksums")
  }

  @Test("where none are wanted none are asked for")
  func noneWanted() throws {
    let kernel = Kernel(knows: .tcpAndUDP)
    #expect(try TapDevice.Offloads.agree(isWanted: false, set: kernel.set) == .none)
    #expect(kernel.asked == [0])
  }

  @Test("an error that is no refusal ends it")
  func otherErrors() {
    let kernel = Kernel(knows: .tcp, refusal: EBADFD)
    let error = #expect(throws: SystemError.self) {
      try TapDevice.Offloads.agree(isWanted: true, set: kernel.set)
    }
    #expect(error?.number == EBADFD)
    #expect(kernel.asked.count == 1)
  }
}
