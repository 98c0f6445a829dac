import FuzzEntry
import Glibc
import TestSupport
import Testing

@testable import Control

@Suite("Fuzzer's corpus of vhost-user messages")
struct VhostUserFuzzTests {
  private static let folder: String = {
    let parts = #filePath.split(separator: "/").dropLast(2)
    return "/" + parts.joined(separator: "/") + "/Fuzz/Corpus/messages/"
  }()

  private func inputs() throws -> [[UInt8]] {
    let directory = unsafe try #require(opendir(Self.folder), "no folder \(Self.folder)")
    defer { unsafe closedir(directory) }
    var names: [String] = []
    while let entry = unsafe readdir(directory) {
      let name = unsafe withUnsafePointer(to: &entry.pointee.d_name.0) { unsafe String(cString: $0) }
      if !name.hasPrefix(".") { names.append(name) }
    }
    return try names.sorted().map { Array(try readFile(Self.folder + $0, bytesMax: 1 << 17)) }
  }

  @Test("every input keeps every promise, with random bytes in it and cut short too")
  func corpus() throws {
    let inputs = try inputs()
    #expect(inputs.count >= 20)
    var random = SeededRandom(seed: 5)
    for input in inputs {
      fuzzMessages(input.rawBytes)
      for _ in 0..<30 {
        var changed = input
        for _ in 0..<Int.random(in: 1...6, using: &random) {
          let place = Int.random(in: 0..<changed.count, using: &random)
          changed[place] = [0, 1, 2, 4, 8, 9, 0x40, 0x80, 0xff].randomElement(using: &random)!
        }
        fuzzMessages(changed.rawBytes)
        fuzzMessages(Array(changed.prefix(Int.random(in: 0...changed.count, using: &random))).rawBytes)
      }
    }
  }
}
