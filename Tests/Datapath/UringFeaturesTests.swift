import Testing

@testable import Datapath

/// Whether this machine lets a ring be made at all.
private let ringsAreAllowed = (try? UringFeatures.probe()) != nil

@Suite(.enabled(if: ringsAreAllowed, "io_uring is forbidden here"))
struct UringFeaturesTests {
  @Test func whatThisKernelHasFitsTogether() throws {
    let features = try UringFeatures.probe()
    // Multishot receives take their buffers from the buffer ring: they cannot work without.
    if !features.contains(.bufferRing) { #expect(features.isDisjoint(with: [.multishotReceive, .multishotRead])) }
    if features.contains(.deferredWork) { #expect(features.contains(.singleIssuer)) }
  }

  @Test(arguments: UringFeatures.names.map(\.feature.rawValue))
  func aFeatureThatIsNotWantedIsNotUsed(raw: UInt32) throws {
    let unwanted = UringFeatures(rawValue: raw)
    let limits = UringIO.Limits(entries: 8, slots: 8, posted: 8, sources: 1, lanes: 1, operations: 1)
    let io = try UringIO(limits, without: unwanted)
    #expect(io.features.isDisjoint(with: unwanted))
  }
}
