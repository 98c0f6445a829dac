import CLinux
import Glibc
import TestSupport
import Testing

@testable import Datapath

/// Two guests and a worker between them: what one transmits the other receives.
@safe
private final class GuestPair {
  static let size = 16
  static let slotBytes = 2_048
  /// The address that frames are for.
  static let receiver: UInt64 = 0x0200_0000_0002
  /// Without its header, in the first bytes that the worker copies.
  static let smallBytesMax = ForeignMemory.headerCopyBytes - OffloadHeader.bytes

  private let from: any VirtioDriver
  private let to: any VirtioDriver
  private let frames = ForeignMemory(bufferCount: GuestRing.framesMax)
  private let rings: [GuestRing]
  /// Where the sender's chains are noted that are under way.
  private let notes: UnsafeMutableRawPointer?
  private let snapshot: Snapshot
  private let mailbox: Mailbox
  private var commands: SPSCRing<Command>.Producer
  private var reports: SPSCRing<Report>.Consumer
  private let blocks = (0..<5).map { _ in CounterBlock() }
  private var worker: Worker<SyscallIO>
  private var fromSlots = Array(0..<16)
  private var toSlots = Array(0..<16)
  private var offered: [UInt16: Int] = [:]
  private var awaited: [UInt16: Int] = [:]
  private var arrived: [(slot: Int, bytes: Int)] = []

  /// - Parameter learns: whether the two are members of a domain that knows the receiver's address, rather than the
  ///   ends of a wire.
  init(isPacked: Bool, wantsOrder: Bool = false, notesChains: Bool = false, learns: Bool = false) throws {
    var features: VirtqueueFeatures = isPacked ? [.packedRing, .indirectDescriptors] : [.indirectDescriptors]
    if wantsOrder { features.insert(.inOrder) }
    let guests = [try VirtioGuest(), try VirtioGuest()]
    let drivers = guests.map { guest -> any VirtioDriver in
      isPacked
        ? PackedDriver(guest, size: Self.size, features: features, base: 0x8000)
        : SplitDriver(guest, size: Self.size, features: features, base: 0)
    }
    from = drivers[0]
    to = drivers[1]
    let frames = frames
    if notesChains {
      let bytes = isPacked ? PackedQueue.inFlightBytes(size: Self.size) : SplitQueue.inFlightBytes(size: Self.size)
      unsafe notes = .allocate(byteCount: bytes, alignment: 8)
      unsafe notes!.initializeMemory(as: UInt8.self, repeating: 0, count: bytes)
    } else {
      unsafe notes = nil
    }
    let notes = unsafe notes
    rings = drivers.enumerated().map { number, driver in
      unsafe GuestRing(
        driver.areas, features: features, base: isPacked ? 0x8000 : 0, mergesBuffers: true,
        frames: number == 0 ? GuestRing.Frames(frames, owner: 1) : nil, memory: driver.guest.memory, kick: -1, call: -1,
        inFlight: number == 0 ? notes : nil)
    }
    let domain = DomainIndex(0)
    let macs = MACTable(macsMax: 16, seed: 1)
    _ = macs.reference.learn(Self.receiver, at: InterfaceIndex(1), nowSeconds: 1)
    snapshot = try Snapshot(
      version: 1,
      interfaces: [(0, 1), (1, 0)].map {
        Snapshot.Interface(
          InterfaceIndex($0), learns ? .port(domain: domain) : .passthrough(to: InterfaceIndex($1)), mtuBytes: 1_500)
      }, domains: learns ? [Snapshot.Domain(domain, vni: 1, macs: macs)] : [])
    mailbox = try Mailbox(controlWaker: -1)
    commands = mailbox.commands.makeProducer()
    reports = mailbox.reports.makeConsumer()
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
    worker = Worker(
      io: try SyscallIO(IOLimits(entries: 64, slots: 64, posted: 8, sources: 2, lanes: 1, operations: 1_024)),
      memory: FrameMemory(
        arena: try FrameArena(slotCount: 64, hugePages: false), shares: [FrameMemory.ForeignShare(frames, bringer: 0)]),
      mailbox: mailbox, settings: settings,
      view: snapshot.view, workerCounters: blocks[0].writer, underlayCounters: blocks[1].writer)
    let interfaces = (0..<2).map { InterfaceIndex($0) }
    for (number, index) in interfaces.enumerated() {
      let record = InterfaceRecord(
        .guest, laneFirst: 0, laneCount: number, mtuBytes: 1_500, counters: blocks[2 + number].writer)
      _ = commands.push(.addInterface(index, record))
    }
    _ = commands.push(.addDomain(domain, blocks[4].writer))
    _ = commands.push(
      .openGuestSource(1, interface: interfaces[0], domain: learns ? domain : .none, rings[0].reference))
    _ = commands.push(.openGuestLane(0, interface: interfaces[1], rings[1].reference))
    worker.carryOutCommands()
  }

  deinit { unsafe notes?.deallocate() }

  /// Frames that went from ring to ring at once.
  private(set) var passed = 0

  func turn() {
    _ = worker.turn()
    passed += worker.passed
  }

  private func address(_ slot: Int) -> UInt64 { VirtioGuest.buffersAddress + UInt64(slot * Self.slotBytes) }

  /// Whether the sender has room for another frame.
  var canTransmit: Bool { from.freePlaces >= 2 && !fromSlots.isEmpty }

  /// - Parameter pieces: 1, or 2: the header alone, then the frame.
  func transmit(_ frame: [UInt8], pieces: Int, isIndirect: Bool) {
    let slot = fromSlots.removeLast()
    let start = address(slot)
    for (place, byte) in ([UInt8](repeating: 0, count: OffloadHeader.bytes) + frame).enumerated() {
      from.guest.store(byte, at: start + UInt64(place))
    }
    let first = pieces == 1 ? OffloadHeader.bytes + frame.count : OffloadHeader.bytes
    var buffers = [VirtioBuffer(address: start, bytes: UInt32(first), isWritable: false)]
    if pieces == 2 {
      buffers.append(VirtioBuffer(address: start + UInt64(first), bytes: UInt32(frame.count), isWritable: false))
    }
    offered[from.offer(buffers, isIndirect: isIndirect)] = slot
  }

  /// Takes back what the worker gave back of the sender's; how many frames that is.
  func reap() -> Int { reapSlots().count }

  /// The same by the slots of the frames.
  func reapSlots() -> [Int] {
    var slots: [Int] = []
    while let (identifier, _) = from.reap() { slots.append(offered.removeValue(forKey: identifier)!) }
    fromSlots += slots
    return slots
  }

  /// Of the next frame to be transmitted.
  var nextSlot: Int? { fromSlots.last }

  func offerBuffer(bytes: Int) {
    guard to.freePlaces > 0, let slot = toSlots.popLast() else { return }
    let buffer = VirtioBuffer(address: address(slot), bytes: UInt32(bytes), isWritable: true)
    awaited[to.offer([buffer], isIndirect: false)] = slot
  }

  /// The frames that arrived since this was asked.
  func receive() -> [[UInt8]] {
    while let (identifier, bytes) = to.reap() {
      arrived.append((awaited.removeValue(forKey: identifier)!, Int(bytes)))
    }
    var frames: [[UInt8]] = []
    while let first = arrived.first {
      let count = Int(to.guest.load(UInt16.self, at: address(first.slot) + 10))
      guard arrived.count >= count else { break }
      let bytes = arrived.prefix(count).flatMap { part in
        (0..<part.bytes).map { to.guest.load(UInt8.self, at: address(part.slot) + UInt64($0)) }
      }
      toSlots += arrived.prefix(count).map(\.slot)
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

@Suite struct GuestRingsTests {
  private func frame(_ number: Int, bytes: Int) -> [UInt8] {
    let header: [UInt8] = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xB5]
    return header + (header.count..<bytes).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ number &* 13 &+ number >> 8) }
  }

  @Test(
    "frames go from guest to guest in order, byte for byte, also those that wait for buffers",
    arguments: [false, true], 1...8)
  func inOrder(isPacked: Bool, seed: Int) throws {
    var random = SeededRandom(seed: UInt64(seed))
    let pair = try GuestPair(isPacked: isPacked)
    var sent: [[UInt8]] = []
    var received: [[UInt8]] = []
    let count = 500
    for _ in 0..<200_000 where received.count < count {
      for _ in 0..<Int.random(in: 0...6, using: &random) where sent.count < count && pair.canTransmit {
        let bytes = Int.random(in: 14...(Bool.random(using: &random) ? 100 : 1_500), using: &random)
        sent.append(frame(sent.count, bytes: bytes))
        pair.transmit(
          sent[sent.count - 1], pieces: Int.random(in: 1...2, using: &random),
          isIndirect: Int.random(in: 0..<4, using: &random) == 0)
      }
      for _ in 0..<Int.random(in: 0...5, using: &random) {
        pair.offerBuffer(bytes: Int.random(in: 0..<3, using: &random) == 0 ? 256 : GuestPair.slotBytes)
      }
      pair.turn()
      _ = pair.reap()
      if Bool.random(using: &random) { received += pair.receive() }
    }
    #expect(received == sent && sent.count == count)
    let audit = try #require(pair.stop())
    #expect(audit.holds && audit.sent == UInt64(count), "\(audit)")
  }

  @Test(
    "frames of a domain go from ring to ring at once or through the stages, in order, byte for byte",
    arguments: [false, true], 1...8)
  func atOnce(isPacked: Bool, seed: Int) throws {
    var random = SeededRandom(seed: UInt64(seed))
    let pair = try GuestPair(isPacked: isPacked, wantsOrder: seed % 2 == 0, notesChains: seed % 3 == 0, learns: true)
    var sent: [[UInt8]] = []
    var received: [[UInt8]] = []
    var tooBig = 0
    for _ in 0..<200_000 where received.count < 2_000 {
      for _ in 0..<Int.random(in: 0...12, using: &random) where sent.count < 2_000 && pair.canTransmit {
        let kind = Int.random(in: 0..<40, using: &random)
        if kind == 0 {
          // The interface does not take it, the same address or not.
          pair.transmit(frame(0, bytes: 1_600), pieces: 1, isIndirect: false)
          tooBig += 1
          continue
        }
        // Shorter than what is read at once, of one piece or several.
        let bytes = Int.random(in: 14...(kind < 20 ? 100 : 1_500), using: &random)
        sent.append(frame(sent.count, bytes: bytes))
        pair.transmit(
          sent[sent.count - 1], pieces: kind < 4 ? 2 : 1, isIndirect: Int.random(in: 0..<8, using: &random) == 0)
      }
      for _ in 0..<Int.random(in: 0...12, using: &random) {
        pair.offerBuffer(bytes: Int.random(in: 0..<8, using: &random) == 0 ? 256 : GuestPair.slotBytes)
      }
      pair.turn()
      _ = pair.reap()
      received += pair.receive()
    }
    #expect(received == sent && sent.count == 2_000)
    #expect(pair.passed > 0 && pair.passed < 2_000, "\(pair.passed) at once")
    let audit = try #require(pair.stop())
    #expect(audit.holds && audit.sent == 2_000 && audit.dropped == UInt64(tooBig), "\(audit)")
  }

  @Test(
    "chains go back in order, however long each frame is under way, unless it is noted which are and any order is good",
    arguments: [false, true], [(true, false), (false, false), (true, true), (false, true)])
  func givesBackInOrder(isPacked: Bool, _ ring: (wantsOrder: Bool, notesChains: Bool)) throws {
    let pair = try GuestPair(isPacked: isPacked, wantsOrder: ring.wantsOrder, notesChains: ring.notesChains)
    var random = SeededRandom(seed: 7)
    var transmitted: [Int] = []
    var reaped: [Int] = []
    var number = 0
    for _ in 0..<2_000 {
      for _ in 0..<Int.random(in: 0...3, using: &random) where pair.canTransmit {
        transmitted.append(pair.nextSlot!)
        // Long frames wait for buffers, small ones are copied.
        let bytes = Bool.random(using: &random) ? 60 : 1_400
        pair.transmit(frame(number, bytes: bytes), pieces: Int.random(in: 1...2, using: &random), isIndirect: false)
        number += 1
      }
      if Int.random(in: 0...2, using: &random) == 0 { pair.offerBuffer(bytes: GuestPair.slotBytes) }
      pair.turn()
      _ = pair.receive()
      reaped += pair.reapSlots()
    }
    #expect(reaped.count > 300)
    let isInOrder = reaped == Array(transmitted.prefix(reaped.count))
    #expect(isInOrder == (ring.wantsOrder || !ring.notesChains), "small frames overtake where they may")
    let audit = pair.stop()
    #expect(audit?.holds == true)
  }

  @Test("a small frame's memory goes back at once, a long one's when the frame has left", arguments: [false, true])
  func givesBack(isPacked: Bool) throws {
    let pair = try GuestPair(isPacked: isPacked)
    let small = frame(1, bytes: GuestPair.smallBytesMax)
    let long = frame(2, bytes: GuestPair.smallBytesMax + 1)
    pair.transmit(small, pieces: 1, isIndirect: false)
    pair.transmit(long, pieces: 1, isIndirect: false)
    for _ in 0..<3 { pair.turn() }
    #expect(pair.reap() == 1)
    for _ in 0..<2 { pair.offerBuffer(bytes: GuestPair.slotBytes) }
    for _ in 0..<4 { pair.turn() }
    #expect(pair.reap() == 1)
    #expect(pair.receive() == [small, long])
  }
}
