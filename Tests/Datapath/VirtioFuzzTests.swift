import FuzzEntry
import TestSupport
import Testing

@Suite("Fuzzer's corpus of virtio rings")
struct VirtioFuzzTests {
  @Test("every input keeps every promise, with random bytes in it too")
  func corpus() throws {
    let names = try FramesCorpus.names("virtqueue")
    #expect(names.count >= 27)
    var random = SeededRandom(seed: 3)
    for name in names {
      let input = try FramesCorpus.bytes("virtqueue", name)
      fuzzVirtqueue(input.rawBytes)
      for _ in 0..<100 {
        var changed = input
        for _ in 0..<Int.random(in: 1...8, using: &random) {
          let place = Int.random(in: 0..<min(changed.count, 200), using: &random)
          changed[place] = [0, 1, 2, 4, 7, 0x80, 0xff].randomElement(using: &random)!
        }
        fuzzVirtqueue(changed.rawBytes)
      }
    }
  }
}
