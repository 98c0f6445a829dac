import CLinux
import Glibc
import TestSupport
import Testing

@testable import Datapath

/// A guest at one ring of its network card, with all that a ring may have besides its descriptors.
@safe
private final class CardEnd {
  static let size = 16
  /// Buffers lie across the borders of pages, none across that of two regions, and at odd addresses.
  static let slotBytes = 2_731
  /// More than the guest has pages below its buffers' end.
  private static let logBytes = 1_024

  let driver: any VirtioDriver
  let features: VirtqueueFeatures
  /// The eventfd that the guest waits for.
  let call = eventfd(0, Int32(EFD_CLOEXEC) | Int32(EFD_NONBLOCK))
  private let log: UnsafeMutableRawPointer
  private let notes: UnsafeMutableRawPointer
  private let notesChains: Bool
  private(set) var free = Array(0..<16)
  private var out: [UInt16: Int] = [:]

  init(_ features: VirtqueueFeatures, isLogged: Bool, notesChains: Bool) throws {
    self.features = features
    self.notesChains = notesChains
    unsafe log = .allocate(byteCount: Self.logBytes, alignment: 8)
    unsafe memset(log, 0, Self.logBytes)
    let isPacked = features.contains(.packedRing)
    let noteBytes =
      isPacked ? PackedQueue.inFlightBytes(size: Self.size) : SplitQueue.inFlightBytes(size: Self.size)
    unsafe notes = .allocate(byteCount: noteBytes, alignment: 64)
    unsafe memset(notes, 0, noteBytes)
    let guest = try VirtioGuest(log: isLogged ? unsafe DirtyLog(base: log, bytes: Self.logBytes) : nil)
    driver =
      isPacked
      ? PackedDriver(guest, size: Self.size, features: features, base: 0x8000)
      : SplitDriver(guest, size: Self.size, features: features, base: 0)
  }

  deinit {
    close(call)
    unsafe log.deallocate()
    unsafe notes.deallocate()
  }

  /// The ring as control hands it over, from where it began at first, as a frontend whose device died says.
  func ring(_ frames: ForeignMemory?) -> GuestRing {
    let areas = driver.areas
    return unsafe GuestRing(
      areas, features: features, base: features.contains(.packedRing) ? 0x8000 : 0, mergesBuffers: true,
      frames: frames.map { GuestRing.Frames($0, owner: 1) }, memory: driver.guest.memory, kick: -1, call: call,
      logAddresses: VirtqueueLogAddresses(
        descriptor: guestAddress(areas.descriptor), device: guestAddress(areas.device)),
      inFlight: notesChains ? notes : nil)
  }

  private func guestAddress(_ place: UnsafeMutableRawPointer) -> UInt64 {
    for region in driver.guest.regions {
      let offset = unsafe UInt(bitPattern: place) &- UInt(bitPattern: region.mapping)
      if offset < UInt(region.bytes) { return region.guestAddress + UInt64(offset) }
    }
    preconditionFailure("the test's ring is not in the guest's memory")
  }

  func address(_ slot: Int) -> UInt64 { VirtioGuest.buffersAddress + UInt64(slot * Self.slotBytes) }

  var hasRoom: Bool { driver.freePlaces >= 2 && !free.isEmpty }

  /// Makes a slot available that is free.
  /// - Parameter pieces: lengths of what it is offered in.
  func offer(_ pieces: [Int], isWritable: Bool, fill: (UInt64) -> Void = { _ in }) {
    let slot = free.removeLast()
    fill(address(slot))
    var start = address(slot)
    let buffers = pieces.map { bytes in
      defer { start += UInt64(bytes) }
      return VirtioBuffer(address: start, bytes: UInt32(bytes), isWritable: isWritable)
    }
    out[driver.offer(buffers, isIndirect: false)] = slot
  }

  /// Takes back what the device is done with.
  func reap() -> [(slot: Int, bytes: Int)] {
    var slots: [(slot: Int, bytes: Int)] = []
    while let (identifier, bytes) = driver.reap() {
      slots.append((out.removeValue(forKey: identifier)!, Int(bytes)))
    }
    return slots
  }

  func release(_ slots: some Sequence<Int>) { free += slots }

  /// Whether the guest was called since this was asked.
  func takeCall() -> Bool {
    var count: UInt64 = 0
    return unsafe read(call, &count, 8) == 8
  }

  // MARK: The dirty log

  /// All that a device may write to, as it is now; the log is empty from now on.
  func beginLook() -> [[UInt8]] {
    unsafe memset(log, 0, Self.logBytes)
    return writableRegions.map { unsafe Array(UnsafeRawBufferPointer(start: $0.mapping, count: Int($0.bytes))) }
  }

  private var writableRegions: [GuestMemory.Region] {
    driver.guest.regions.filter { $0.guestAddress < VirtioGuest.tablesAddress }
  }

  /// The pages that changed since.
  func changedPages(since before: [[UInt8]]) -> Set<UInt64> {
    var changed: Set<UInt64> = []
    for (region, before) in zip(writableRegions, before) {
      for offset in stride(from: 0, to: before.count, by: DirtyLog.pageBytes) {
        let isSame = unsafe before.withUnsafeBytes {
          unsafe memcmp($0.baseAddress! + offset, region.mapping + offset, DirtyLog.pageBytes) == 0
        }
        if !isSame { changed.insert((region.guestAddress + UInt64(offset)) / UInt64(DirtyLog.pageBytes)) }
      }
    }
    return changed
  }

  func isMarked(_ page: UInt64) -> Bool {
    unsafe log.load(fromByteOffset: Int(page / 8), as: UInt8.self) & 1 << UInt8(page % 8) != 0
  }
}

/// Two guests of one domain and a worker between them: what one transmits the other receives, mostly from ring to ring
/// at once.
@safe
private final class ShortWay {
  static let receiver: UInt64 = 0x0200_0000_0002

  let from: CardEnd
  let to: CardEnd
  private let snapshot: Snapshot
  private var frames: ForeignMemory
  private var rings: [GuestRing]
  private var mailbox: Mailbox
  private var blocks: [CounterBlock]
  private var commands: SPSCRing<Command>.Producer
  private var reports: SPSCRing<Report>.Consumer
  private var worker: Worker<SyscallIO>
  private var arrived: [(slot: Int, bytes: Int)] = []
  /// Frames that went from ring to ring at once.
  private(set) var passed = 0

  init(_ features: VirtqueueFeatures, isLogged: Bool = false, notesChains: Bool = false) throws {
    from = try CardEnd(features, isLogged: isLogged, notesChains: notesChains)
    to = try CardEnd(features, isLogged: isLogged, notesChains: notesChains)
    let domain = DomainIndex(0)
    let macs = MACTable(macsMax: 16, seed: 1)
    _ = macs.reference.learn(Self.receiver, at: InterfaceIndex(1), nowSeconds: 1)
    snapshot = try Snapshot(
      version: 1,
      interfaces: [0, 1].map { Snapshot.Interface(InterfaceIndex($0), .port(domain: domain), mtuBytes: 1_500) },
      domains: [Snapshot.Domain(domain, vni: 1, macs: macs)])
    frames = ForeignMemory(bufferCount: GuestRing.framesMax)
    rings = [from.ring(frames), to.ring(nil)]
    mailbox = try Mailbox(controlWaker: -1)
    commands = mailbox.commands.makeProducer()
    reports = mailbox.reports.makeConsumer()
    blocks = (0..<5).map { _ in CounterBlock() }
    worker = try Self.worker(mailbox, snapshot, frames, blocks)
    start()
  }

  private static func worker(
    _ mailbox: Mailbox, _ snapshot: Snapshot, _ frames: ForeignMemory, _ blocks: [CounterBlock]
  ) throws -> Worker<SyscallIO> {
    var settings = WorkerSettings()
    settings.dispatch.mode = .vmmDriven
    settings.dispatch.yield = .never
    settings.postedSlots = 8
    settings.sources = 2
    settings.lanes = 1
    settings.interfaces = 2
    settings.domains = 1
    // More than frames can be under way: what waits for buffers is not dropped.
    settings.operations = 1_024
    // Nor what waits long, on a machine that is slow.
    settings.guestPatienceNanoseconds = .max
    return Worker(
      io: try SyscallIO(IOLimits(entries: 64, slots: 64, posted: 8, sources: 2, lanes: 1, operations: 1_024)),
      memory: FrameMemory(
        arena: try FrameArena(slotCount: 64, hugePages: false), shares: [FrameMemory.ForeignShare(frames, bringer: 0)]),
      mailbox: mailbox, settings: settings, view: snapshot.view, workerCounters: blocks[0].writer,
      underlayCounters: blocks[1].writer)
  }

  private func start() {
    for (number, ring) in rings.enumerated() {
      let record = InterfaceRecord(
        .guest, laneFirst: 0, laneCount: number, mtuBytes: 1_500, counters: blocks[2 + number].writer)
      _ = commands.push(.addInterface(InterfaceIndex(number), record))
      if number == 0 {
        _ = commands.push(.addDomain(DomainIndex(0), blocks[4].writer))
        _ = commands.push(
          .openGuestSource(1, interface: InterfaceIndex(0), domain: DomainIndex(0), ring.reference))
      } else {
        _ = commands.push(.openGuestLane(0, interface: InterfaceIndex(1), ring.reference))
      }
    }
    worker.carryOutCommands()
  }

  /// The worker ends without a farewell, and another takes its place.
  func killAndStartAnew() throws {
    // What the one that ends has is kept until it is over.
    let before = (frames, rings, mailbox, blocks)
    frames = ForeignMemory(bufferCount: GuestRing.framesMax)
    rings = [from.ring(frames), to.ring(nil)]
    mailbox = try Mailbox(controlWaker: -1)
    commands = mailbox.commands.makeProducer()
    reports = mailbox.reports.makeConsumer()
    blocks = (0..<5).map { _ in CounterBlock() }
    worker = try Self.worker(mailbox, snapshot, frames, blocks)
    withExtendedLifetime(before) {}
    start()
  }

  func turn() {
    _ = worker.turn()
    passed += worker.passed
  }

  /// - Parameter pieces: 1, or 2: then it does not go the short way.
  func transmit(_ frame: [UInt8], pieces: Int = 1) {
    let bytes = [UInt8](repeating: 0, count: OffloadHeader.bytes) + frame
    let lengths = pieces == 1 ? [bytes.count] : [OffloadHeader.bytes, frame.count]
    from.offer(lengths, isWritable: false) { start in
      for (place, byte) in bytes.enumerated() { from.driver.guest.store(byte, at: start + UInt64(place)) }
    }
  }

  func reap() { from.release(from.reap().map(\.slot)) }

  func offerBuffer(bytes: Int = 2_048) { if to.hasRoom { to.offer([bytes], isWritable: true) } }

  /// The frames that arrived since this was asked.
  func receive() -> [[UInt8]] {
    arrived += to.reap()
    var frames: [[UInt8]] = []
    while let first = arrived.first {
      let count = Int(to.driver.guest.load(UInt16.self, at: to.address(first.slot) + 10))
      guard arrived.count >= count else { break }
      let bytes = arrived.prefix(count).flatMap { part in
        (0..<part.bytes).map { to.driver.guest.load(UInt8.self, at: to.address(part.slot) + UInt64($0)) }
      }
      to.release(arrived.prefix(count).map(\.slot))
      arrived.removeFirst(count)
      frames.append(Array(bytes.dropFirst(OffloadHeader.bytes)))
    }
    return frames
  }

  /// Stops the worker; its last sums.
  func stop() -> Audit? {
    _ = commands.push(.stop)
    worker.carryOutCommands()
    for _ in 0..<1_000_000 where !worker.turn() { break }
    var audit: Audit?
    while let report = reports.pop() { if case .audited(let sums) = report { audit = sums } }
    return audit
  }
}

/// Frames that one guest sends another, copied from ring to ring, beside what else their rings have agreed on.
@Suite struct GuestShortWayTests {
  private func frame(_ number: Int, bytes: Int) -> [UInt8] {
    let header: [UInt8] = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xB5]
    return header + (header.count..<bytes).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ number &* 13 &+ number >> 8) }
  }

  private func features(isPacked: Bool, seed: Int) -> VirtqueueFeatures {
    var features: VirtqueueFeatures = isPacked ? [.packedRing] : []
    if seed % 2 == 0 { features.insert(.eventIndex) }
    if seed % 3 == 0 { features.insert(.inOrder) }
    return features
  }

  /// Some frames are sent, some buffers offered.
  private func random(_ way: ShortWay, sent: inout [[UInt8]], upTo most: Int, _ random: inout SeededRandom) {
    for _ in 0..<Int.random(in: 0...8, using: &random) where sent.count < most && way.from.hasRoom {
      let kind = Int.random(in: 0..<40, using: &random)
      sent.append(frame(sent.count, bytes: Int.random(in: 14...(kind < 20 ? 100 : 1_500), using: &random)))
      way.transmit(sent[sent.count - 1], pieces: kind == 0 ? 2 : 1)
    }
    for _ in 0..<Int.random(in: 0...12, using: &random) {
      way.offerBuffer(bytes: Int.random(in: 0..<12, using: &random) == 0 ? 256 : 2_048)
    }
  }

  @Test(
    "with event indices both guests are called when as much is done as they wait for, and only then",
    arguments: [false, true], [false, true])
  func calls(isPacked: Bool, keepsOrder: Bool) throws {
    var features: VirtqueueFeatures = isPacked ? [.packedRing, .eventIndex] : [.eventIndex]
    if keepsOrder { features.insert(.inOrder) }
    let way = try ShortWay(features)
    var random = SeededRandom(seed: 5)
    var sent = 0
    for round in 0..<400 {
      while way.to.hasRoom { way.offerBuffer() }
      let wanted = (0..<2).map { _ in Bool.random(using: &random) ? Int.random(in: 1...8, using: &random) : nil }
      for (end, count) in zip([way.from, way.to], wanted) { end.driver.wantCall(after: count) }
      let count = Int.random(in: 1...8, using: &random)
      let frames = (0..<count).map { frame(sent + $0, bytes: Int.random(in: 60...1_500, using: &random)) }
      for frame in frames { way.transmit(frame) }
      sent += count
      #expect(!way.from.driver.mustKick(), "the ring is polled")
      for _ in 0..<4 { way.turn() }
      // The first ones are called whatever they wait for: a worker before may not have done it.
      for (end, wanted) in zip([way.from, way.to], wanted) {
        let isCalled = end.takeCall()
        let isWanted = wanted.map { $0 <= count } ?? false
        #expect(isCalled == isWanted || round == 0, "round \(round): \(count) frames, \(wanted ?? 0) waited for")
      }
      way.reap()
      #expect(way.receive() == frames)
    }
    #expect(way.passed > 0, "\(way.passed) of \(sent) at once")
    let audit = try #require(way.stop())
    #expect(audit.holds && audit.sent == UInt64(sent), "\(audit)")
  }

  @Test(
    "while guests migrate all that is written to their memory is in the log: frames, and the rings of both",
    arguments: [false, true], 1...6)
  func dirtyLog(isPacked: Bool, seed: Int) throws {
    var random = SeededRandom(seed: UInt64(seed))
    let way = try ShortWay(features(isPacked: isPacked, seed: seed), isLogged: true)
    var sent: [[UInt8]] = []
    var received: [[UInt8]] = []
    var changed = [0, 0]
    // What was staged on a ring is in the log when the guest is let see it: with the next turn.
    var staged: [Set<UInt64>] = [[], []]
    for _ in 0..<5_000 where received.count < 500 {
      self.random(way, sent: &sent, upTo: 500, &random)
      let before = [way.from, way.to].map { $0.beginLook() }
      way.turn()
      for (number, end) in [way.from, way.to].enumerated() {
        let pages = end.changedPages(since: before[number])
        changed[number] += pages.count
        #expect(staged[number].allSatisfy(end.isMarked), "end \(number): \(staged[number]) of the ring")
        let unmarked = pages.filter { !end.isMarked($0) }
        staged[number] = unmarked.filter { $0 < VirtioGuest.buffersAddress / UInt64(DirtyLog.pageBytes) }
        #expect(unmarked == staged[number], "end \(number): a frame's pages")
      }
      way.reap()
      received += way.receive()
    }
    #expect(received == sent && sent.count == 500)
    #expect(way.passed > 0, "\(way.passed) at once")
    #expect(changed[0] > 10 && changed[1] > 100, "the test looks where nothing is written: \(changed)")
    let audit = try #require(way.stop())
    #expect(audit.holds, "\(audit)")
  }

  @Test(
    "a worker that is killed between turns leaves notes by which the next sends each frame once, in order",
    arguments: [false, true], 1...8)
  func notes(isPacked: Bool, seed: Int) throws {
    var random = SeededRandom(seed: UInt64(seed))
    let way = try ShortWay(features(isPacked: isPacked, seed: seed), notesChains: true)
    var sent: [[UInt8]] = []
    var received: [[UInt8]] = []
    var kills = 0
    for turn in 1...20_000 where received.count < 1_000 {
      // None has to wait for a buffer: small ones would be lost with the worker.
      while way.to.hasRoom { way.offerBuffer() }
      self.random(way, sent: &sent, upTo: 1_000, &random)
      way.turn()
      way.reap()
      received += way.receive()
      if turn % 10 == 0, Bool.random(using: &random) {
        try way.killAndStartAnew()
        kills += 1
      }
    }
    #expect(received == sent && sent.count == 1_000, "\(received.count) of \(sent.count)")
    #expect(kills > 5 && way.passed > 0, "\(kills) killed, \(way.passed) at once")
    let audit = try #require(way.stop())
    #expect(audit.holds, "\(audit)")
  }
}
