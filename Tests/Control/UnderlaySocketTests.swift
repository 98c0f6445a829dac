import Glibc
import Testing

@testable import Datapath

@Suite struct UnderlaySocketTests {
  private let local = UnderlayAddress("127.0.0.1")!
  private let localIPv6 = UnderlayAddress("::1")!
  /// Of no service: the discard port.
  private let discardPort: UInt16 = 9

  private static let hasIPv6: Bool = {
    let descriptor = try? UnderlaySocket.transmit(
      from: UnderlayAddress("::1")!, to: UnderlayAddress("::1")!, port: 9, spread: 900, fragments: false,
      bufferBytes: 65_536)
    guard let descriptor else { return false }
    close(descriptor)
    return true
  }()

  private func option(_ descriptor: Int32, _ level: Int32, _ name: Int32) -> Int32 {
    var value: Int32 = -1
    var size = socklen_t(MemoryLayout<Int32>.size)
    _ = unsafe getsockopt(descriptor, level, name, &value, &size)
    return value
  }

  private func withSocket<Value>(
    _ address: UnderlayAddress, fragments: Bool, bufferBytes: Int = 65_536, _ body: (Int32) throws -> Value
  ) throws -> Value {
    let descriptor = try UnderlaySocket.transmit(
      from: address, to: address, port: discardPort, spread: 901, fragments: fragments, bufferBytes: bufferBytes)
    defer { close(descriptor) }
    return try body(descriptor)
  }

  @Test func aSocketFragmentsOnlyWhereItIsTold() throws {
    let level = Int32(IPPROTO_IP)
    #expect(
      try withSocket(local, fragments: false) { option($0, level, IP_MTU_DISCOVER) } == Int32(IP_PMTUDISC_DO))
    #expect(
      try withSocket(local, fragments: true) { option($0, level, IP_MTU_DISCOVER) } == Int32(IP_PMTUDISC_DONT))
  }

  @Test(.enabled(if: hasIPv6, "this host has no IPv6"))
  func onIPv6ItFragmentsToThePathsMTUOnlyWhereItIsTold() throws {
    let level = Int32(IPPROTO_IPV6)
    #expect(
      try withSocket(localIPv6, fragments: false) { option($0, level, IPV6_MTU_DISCOVER) }
        == Int32(IPV6_PMTUDISC_DO))
    #expect(
      try withSocket(localIPv6, fragments: true) { option($0, level, IPV6_MTU_DISCOVER) }
        == Int32(IPV6_PMTUDISC_WANT))
  }

  @Test func aSocketTakesTrainsOnlyWhereItIsTold() throws {
    // UDP_GRO of linux/udp.h.
    for takesTrains in [true, false] {
      let receiver = try UnderlaySocket.receive(
        on: local, port: 0, encapsulation: .vxlan, isShared: false, bufferBytes: 65_536, takesTrains: takesTrains)
      defer { close(receiver) }
      #expect(option(receiver, Int32(IPPROTO_UDP), 104) == (takesTrains ? 1 : 0))
    }
  }

  @Test func theLongestDatagramLeavesASocketThatFragmentsHoweverSmallItsBufferWasAsked() throws {
    let bytes = [UInt8](repeating: 0, count: UnderlaySocket.datagramBytesMax)
    let sent = try withSocket(local, fragments: true, bufferBytes: 4_096) {
      unsafe send($0, bytes, bytes.count, 0)
    }
    #expect(sent == bytes.count)
  }

  @Test func theMTUOfAConnectedSocketsPathIsThatOfTheRoute() throws {
    let route = try #require(UnderlaySocket.pathMTUBytes(from: local, to: local))
    #expect(try withSocket(local, fragments: false) { UnderlaySocket.pathMTUBytes(of: $0) } == route)
    let receiver = try UnderlaySocket.receive(
      on: local, port: 0, encapsulation: .vxlan, isShared: false, bufferBytes: 65_536)
    defer { close(receiver) }
    #expect(UnderlaySocket.pathMTUBytes(of: receiver) == nil, "it is not connected")
  }

  @Test func aPortThatIsTakenIsBlamedOnTheKeyThatItComesFrom() throws {
    let taken = try UnderlaySocket.receive(
      on: local, port: 0, encapsulation: .vxlan, isShared: false, bufferBytes: 65_536)
    defer { close(taken) }
    var address = sockaddr_in()
    var length = socklen_t(MemoryLayout<sockaddr_in>.size)
    let status = unsafe withUnsafeMutablePointer(to: &address) { pointer in
      unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { unsafe getsockname(taken, $0, &length) }
    }
    try #require(status == 0)
    for (encapsulation, key) in [(Encapsulation.vxlan, "underlay.vxlan_port"), (.vnetp, "underlay.vnetp_port")] {
      let error = #expect(throws: PortError.self) {
        try UnderlaySocket.receive(
          on: local, port: UInt16(bigEndian: address.sin_port), encapsulation: encapsulation, isShared: false,
          bufferBytes: 65_536)
      }
      #expect(error?.remedy == "another program uses this UDP port; stop it or set \(key)")
    }
  }

  @Test func whatAnEncapsulationAddsAndTakesIsKnown() {
    #expect(Encapsulation.vxlan.overheadBytes(isIPv4: true) == 50)
    #expect(Encapsulation.vxlan.overheadBytes(isIPv4: false) == 70)
    #expect(Encapsulation.vnetp.overheadBytes(isIPv4: true) == 42)
    #expect(Encapsulation.vnetp.overheadBytes(isIPv4: false) == 62)
    #expect(Encapsulation.vnetp.payloadBytesMax == 65_493)
    #expect(Encapsulation.vxlan.payloadBytesMax == 65_485)
  }

  @Test func failuresToReassembleAreReadFromTheKernelsTables() {
    let snmp = """
      Ip: Forwarding DefaultTTL ReasmTimeout ReasmReqds ReasmOKs ReasmFails FragOKs
      Ip: 1 64 3 40 5 7 0
      Icmp: InMsgs ReasmFails
      Icmp: 12 100
      """
    let snmp6 = "Ip6ReasmTimeout                 \t1\nIp6ReasmFails                   \t20\nIp6FragOKs  \t9\n"
    #expect(UnderlaySocket.reassemblyFailures(snmp: snmp, snmp6: snmp6) == 27)
    #expect(UnderlaySocket.reassemblyFailures(snmp: snmp, snmp6: "") == 7, "a host without IPv6")
    #expect(UnderlaySocket.reassemblyFailures(snmp: "Ip: ReasmFails\n", snmp6: "Ip6ReasmFails x\n") == 0)
    #expect(UnderlaySocket.reassemblyFailures() >= 0)
  }
}
