import Datapath
import FuzzEntry
import Glibc
import TestSupport
import Testing

/// The fuzzer's committed corpus. Its first inputs were made and their checksums computed by other means than the
/// writers here; crashes that were fixed are added.
enum FramesCorpus {
  static let root: String = {
    let parts = #filePath.split(separator: "/").dropLast(2)
    return "/" + parts.joined(separator: "/") + "/Fuzz/Corpus/"
  }()

  static func names(_ target: String) throws -> [String] {
    let directory = unsafe try #require(opendir(root + target), "no folder \(root + target)")
    defer { unsafe closedir(directory) }
    var names: [String] = []
    while let entry = unsafe readdir(directory) {
      let name = unsafe withUnsafePointer(to: &entry.pointee.d_name.0) { unsafe String(cString: $0) }
      if !name.hasPrefix(".") { names.append(name) }
    }
    return names.sorted()
  }

  static func bytes(_ target: String, _ name: String) throws -> [UInt8] {
    let path = root + target + "/" + name
    let file = unsafe try #require(fopen(path, "rb"), "no file \(path)")
    defer { unsafe fclose(file) }
    // No input of the fuzzer is longer than a frame.
    var bytes = [UInt8](repeating: 0, count: 1 << 17)
    let count = unsafe bytes.withUnsafeMutableBytes { unsafe fread($0.baseAddress, 1, $0.count, file) }
    return Array(bytes.prefix(count))
  }
}

@Suite("Fuzzer's corpus")
struct FramesCorpusReplay {
  /// An invariant that does not hold is a failed precondition, which ends the test run with the input's name last.
  func replay(_ target: String, atLeast: Int, _ fuzz: (RawSpan) -> Void) throws {
    let names = try FramesCorpus.names(target)
    #expect(names.count >= atLeast)
    for name in names {
      let bytes = try FramesCorpus.bytes(target, name)
      fuzz(bytes.rawBytes)
    }
  }

  @Test("every input of the frames target keeps every promise")
  func frames() throws { try replay("frames", atLeast: 43) { fuzzFrames($0) } }

  @Test("every input of the checksum target keeps every promise")
  func checksum() throws { try replay("checksum", atLeast: 8) { fuzzChecksum($0) } }

  @Test("every input of the offload target keeps every promise")
  func offload() throws { try replay("offload", atLeast: 39) { fuzzOffload($0) } }

  @Test("random bytes, and corpus frames with random bytes in them, keep every promise")
  func random() throws {
    var random = SeededRandom(seed: 9)
    let seeds = try FramesCorpus.names("frames").map { try FramesCorpus.bytes("frames", $0) }
    for round in 0..<300 {
      let noise = random.bytes(round)
      fuzzFrames(noise.rawBytes)
      fuzzChecksum(noise.rawBytes)
      fuzzOffload(noise.rawBytes)
      var frame = seeds[round % seeds.count]
      for _ in 0..<3 { frame[Int.random(in: frame.indices, using: &random)] = random.number() }
      fuzzFrames(frame.rawBytes)
      fuzzOffload((random.bytes(12) + frame).rawBytes)
    }
  }

  /// What each frame is, by the hand that made it.
  struct Expected: Sendable {
    let name: String
    var tags = 0
    var vlan = 0
    var version = 0
    var ipProtocol: UInt8 = 0
    /// Behind the network offset; nil: none.
    var transport: Int?
    var isFragment = false
    var isValid = true
    var typeOfService: UInt8 = 0
  }

  static let expected: [Expected] = [
    .init(name: "ipv4-tcp", version: 4, ipProtocol: 6, transport: 20),
    .init(name: "ipv4-udp", version: 4, ipProtocol: 17, transport: 20, typeOfService: 0xb9),
    .init(name: "ipv4-udp-padded", version: 4, ipProtocol: 17, transport: 20),
    .init(name: "ipv4-options", version: 4, ipProtocol: 17, transport: 24),
    .init(name: "ipv4-fragment-first", version: 4, ipProtocol: 17, transport: 20, isFragment: true),
    .init(name: "ipv4-fragment-later", version: 4, ipProtocol: 17, isFragment: true),
    .init(name: "ipv4-header-length-4", isValid: false),
    .init(name: "ipv4-length-too-long", version: 4, ipProtocol: 6, isValid: false),
    .init(name: "ipv4-length-too-short", version: 4, ipProtocol: 6, isValid: false),
    .init(name: "ipv4-tcp-truncated", version: 4, ipProtocol: 6),
    .init(name: "ipv4-tcp-data-offset-15", version: 4, ipProtocol: 6, transport: 20),
    .init(name: "ipv4-udp-length-7", version: 4, ipProtocol: 17, transport: 20),
    .init(name: "ipv4-icmp", version: 4, ipProtocol: 1, transport: 20),
    .init(name: "ipv4-sctp", version: 4, ipProtocol: 132, transport: 20),
    .init(name: "ipv4-esp", version: 4, ipProtocol: 50, transport: 20),
    .init(name: "ipv4-says-6", isValid: false),
    .init(name: "arp"),
    .init(name: "llc-stp"),
    .init(name: "vlan-ipv4-udp", tags: 1, vlan: 100, version: 4, ipProtocol: 17, transport: 20),
    .init(name: "vlan-priority-only", tags: 1, version: 4, ipProtocol: 6, transport: 20),
    .init(name: "vlan-truncated"),
    .init(name: "qinq-ipv6-udp", tags: 2, vlan: 200, version: 6, ipProtocol: 17, transport: 40),
    .init(name: "qinq-truncated", tags: 1, vlan: 200),
    .init(name: "vlan-three-tags", tags: 2, vlan: 1),
    .init(name: "ipv6-tcp", version: 6, ipProtocol: 6, transport: 40, typeOfService: 2),
    .init(name: "ipv6-icmp", version: 6, ipProtocol: 58, transport: 40),
    .init(name: "ipv6-extensions", version: 6, ipProtocol: 6, transport: 40 + 8 + 8 + 24 + 8 + 24 + 8),
    .init(name: "ipv6-fragment-first", version: 6, ipProtocol: 17, transport: 56, isFragment: true),
    .init(name: "ipv6-fragment-later", version: 6, ipProtocol: 17, isFragment: true),
    .init(name: "ipv6-fragment-atomic", version: 6, ipProtocol: 17, transport: 48),
    .init(name: "ipv6-too-many-extensions", version: 6, ipProtocol: 60),
    .init(name: "ipv6-extension-overrun", version: 6, ipProtocol: 60, isValid: false),
    .init(name: "ipv6-extension-cut", version: 6, ipProtocol: 60, isValid: false),
    .init(name: "ipv6-no-next-header", version: 6, ipProtocol: 59),
    .init(name: "ipv6-length-too-long", version: 6, ipProtocol: 6, isValid: false),
    .init(name: "vxlan-ipv4", version: 4, ipProtocol: 17, transport: 20),
    .init(name: "vxlan-ipv6", version: 6, ipProtocol: 17, transport: 40),
    .init(name: "ethernet-header-only", isValid: false),
  ]

  @Test("each named frame parses as what its name says", arguments: expected)
  func named(_ expected: Expected) throws {
    let frame = try FramesCorpus.bytes("frames", expected.name)
    let parsed = try #require(frame.parsed)
    #expect(Int(parsed.tagCount) == expected.tags)
    #expect(Int(parsed.vlanIdentifier) == expected.vlan)
    #expect(parsed.networkOffset == 14 + 4 * expected.tags)
    #expect(Int(parsed.ipVersion) == expected.version)
    #expect(parsed.ipProtocol == expected.ipProtocol)
    #expect(parsed.transportOffset == expected.transport.map { parsed.networkOffset + $0 } ?? 0)
    #expect(parsed.isFragment == expected.isFragment)
    #expect(parsed.networkLengthValid == expected.isValid)
    #expect(parsed.typeOfService == expected.typeOfService)
  }

  @Test("less than 14 bytes are no frame")
  func tooShort() throws {
    let frame = try FramesCorpus.bytes("frames", "ethernet-13-bytes")
    #expect(frame.count == 13)
    #expect(frame.parsed == nil)
  }
}
