import Glibc
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

  @Test(
    "a guest is called by the next collect at the latest, once for each call",
    arguments: [UringFeatures(), .silentSuccess])
  func calls(without unwanted: UringFeatures) throws {
    let limits = UringIO.Limits(entries: 4, slots: 8, posted: 8, sources: 1, lanes: 1, operations: 1)
    var io = try UringIO(limits, without: unwanted)
    var memory = FrameMemory(arena: try FrameArena(slotCount: 8, hugePages: false))
    let guest = try Waker.make()
    defer { close(guest) }
    var events = EventBatch(capacity: 8)
    var sum: UInt64 = 0
    // More than the ring has entries.
    for _ in 0..<7 { io.call(guest) }
    io.collect(.sweep, &memory, into: &events)
    #expect(unsafe read(guest, &sum, 8) == 8 && sum == 7)
    io.collect(.sweep, &memory, into: &events)
    #expect(events.count == 0)
    #expect(unsafe read(guest, &sum, 8) == -1 && errno == EAGAIN)
    // Full, and made one that waits: nothing is kept for later.
    var most = UInt64.max - 1
    #expect(unsafe write(guest, &most, 8) == 8)
    #expect(fcntl(guest, F_SETFL, 0) == 0)
    for _ in 0..<3 {
      io.call(guest)
      io.callAtOnce(guest)
      io.collect(.sweep, &memory, into: &events)
    }
    #expect(unsafe read(guest, &sum, 8) == 8 && sum == most)
    io.collect(.sweep, &memory, into: &events)
    var room = pollfd(fd: guest, events: Int16(POLLIN), revents: 0)
    #expect(unsafe poll(&room, 1, 0) == 0)
    #expect(events.count == 0)
  }
}
