import Glibc
import Synchronization
import TestSupport
import Testing

@testable import Control

/// What guests, well-behaved and hostile, do to a service that runs: with our own frontend and driver, against the
/// command itself.
@Suite(.serialized, .enabled(if: BuiltCommand.isBuilt, "the command is not built beside the tests"))
struct GuestServiceTests {
  static let layouts = [
    ["--layout", "fused"], ["--layout", "pipeline", "--cpus", "rx=0 route=0 tx=1"],
    ["--layout", "pipeline", "--cpus", "rx=0 route=1 tx=0"],
  ]
  private static let canPin =
    (try? String(decoding: readFile("/sys/devices/system/cpu/online", bytesMax: 64), as: UTF8.self))?
    .hasPrefix("0-") == true

  private func guests(_ count: Int, size: Int = 64, name: String = #function) -> [SharedGuest] {
    (0..<count).map { number in
      SharedGuest(
        "guest-\(name.prefix { $0.isLetter })-\(number)", mac: 0x0200_0000_0001 + UInt64(number), size: size,
        piecesMax: number + 1)
    }
  }

  /// Connects all, and makes each known to all others.
  func connect(_ guests: [SharedGuest], to service: ServiceProcess, _ ports: [String]) throws {
    for (guest, port) in zip(guests, ports) {
      try guest.connect(to: service.socketPath(ofPort: port))
      guest.offerBuffers()
    }
    try introduce(guests)
  }

  /// What is said before another's lane is open is lost, as on any switch: it is said again until all heard all.
  private func introduce(_ guests: [SharedGuest]) throws {
    var heard = guests.map { _ in Set<ArraySlice<UInt8>>() }
    var looks = 0
    let isKnown = eventually {
      if looks % 1_000 == 0 { for guest in guests { guest.send(guest.frame(to: 0xFFFF_FFFF_FFFF, 0)) } }
      looks += 1
      for (number, guest) in guests.enumerated() {
        for frame in guest.takeReceivedByPair().joined() { heard[number].insert(frame[6..<12]) }
      }
      return heard.allSatisfy { $0.count == guests.count - 1 }
    }
    try #require(isKnown, "a broadcast did not come: \(heard.map(\.count)) of \(guests.count - 1)")
    // What was said twice comes twice.
    guard looks > 1_000 else { return }
    usleep(200_000)
    for guest in guests { _ = guest.takeReceivedByPair() }
  }

  /// Sends so many frames from one guest to another, and waits until all came, in order.
  func exchange(
    _ count: UInt32, from sender: SharedGuest, to receiver: SharedGuest, meanwhile: () throws -> Void = {}
  ) throws {
    var sent: UInt32 = 0
    var expected: UInt32 = 0
    let areThere = try eventually {
      while sent < count, sent < expected + 32,
        sender.send(sender.frame(to: receiver.mac, sent, bytes: 60 + Int(sent % 1_000)))
      {
        sent += 1
      }
      for number in receiver.takeReceived(from: sender) {
        #expect(number == expected)
        expected = number + 1
      }
      try meanwhile()
      return expected == count
    }
    try #require(areThere, "\(expected) of \(count) frames came, \(sent) were sent")
  }

  func expectGoodEnd(_ service: ServiceProcess) throws {
    let (status, report) = try service.stop()
    #expect(status == 0, "\(service.log)")
    #expect(report.contains("conservation: holds"), "\(report)")
  }

  @Test(
    "frames go between guests in every layout, by either side of I/O and in every dispatch mode",
    .enabled(if: canPin, "there is one CPU"), arguments: layouts,
    [
      ["--dispatch", "guest-driven"], ["--dispatch", "adaptive"], ["--dispatch", "vmm-driven"],
      ["--dispatch", "adaptive", "--io", "syscalls"], ["--dispatch", "vmm-driven", "--yield", "timed"],
    ])
  func framesGoBetweenGuests(layout: [String], mode: [String]) throws {
    let ports = ["a", "b", "c"]
    let service = try ServiceProcess(ports: ports, flags: layout + mode)
    let guests = guests(3)
    try connect(guests, to: service, ports)
    try exchange(500, from: guests[0], to: guests[1])
    try exchange(500, from: guests[2], to: guests[0])
    for guest in guests {
      let isBack = eventually {
        guest.card.reapSent()
        return guest.card.send.out == 0
      }
      #expect(isBack, "every chain comes back though nothing more is sent")
    }
    try expectGoodEnd(service)
  }

  @Test("memory that is cut under traffic takes its own port down, and no other", arguments: layouts)
  func cutMemory(layout: [String]) throws {
    let ports = ["a", "b", "cut"]
    let service = try ServiceProcess(ports: ports, flags: layout)
    let guests = guests(3)
    try connect(guests, to: service, ports)
    // Chains of the third are about to be read when its file ends.
    var isCut = false
    try exchange(2_000, from: guests[0], to: guests[1]) {
      guard !isCut else { return }
      for number in 0..<UInt32(10) { guests[2].send(guests[2].frame(to: guests[0].mac, number)) }
      isCut = true
      // The driver of this test has it mapped too, and touches it no more.
      ftruncate(guests[2].file.descriptor.number, 0)
      guests[2].kick(1)
    }
    let isClosed = eventually { guests[2].frontend?.isClosed == true }
    #expect(isClosed, "\(service.log)")
    #expect(try service.count("memory_faults", ofPort: "cut") == 1)
    for port in ports[..<2] { #expect(try service.count("memory_faults", ofPort: port) == 0) }
    #expect(service.log.contains("its file was cut short"))
    while !guests[0].card.takeReceived().isEmpty {}
    try exchange(500, from: guests[1], to: guests[0])

    // Its VMM comes back with memory that is whole.
    let again = SharedGuest("guest-whole", mac: guests[2].mac)
    try again.connect(to: service.socketPath(ofPort: "cut"))
    again.offerBuffers()
    try exchange(100, from: guests[0], to: again)
    try expectGoodEnd(service)
  }

  /// What a guest writes to its ring that makes no sense.
  enum Nonsense: CaseIterable {
    case jumpingIndex, headOutOfRange, receiveHeadOutOfRange

    func write(_ guest: SharedGuest) {
      let ring = self == .receiveHeadOutOfRange ? guest.card.receive : guest.card.send
      let index = unsafe guest.card.pointer(ring.available + 2)
      let now = unsafe index.load(as: UInt16.self)
      switch self {
      case .jumpingIndex: unsafe index.storeBytes(of: now &+ 1_000, as: UInt16.self)
      case .headOutOfRange, .receiveHeadOutOfRange:
        for place in 0..<guest.size {
          unsafe guest.card.pointer(ring.available + 4 + 2 * place).storeBytes(of: 0xFFFF, as: UInt16.self)
        }
        unsafe index.storeBytes(of: now &+ 1, as: UInt16.self)
      }
      guest.kick(self == .receiveHeadOutOfRange ? 0 : 1)
    }
  }

  @Test(
    "a ring that makes no sense is stopped, logged and counted; the other ports go on, and it can be started again",
    arguments: Nonsense.allCases, layouts[..<2])
  func nonsense(_ what: Nonsense, layout: [String]) throws {
    let ports = ["a", "b", "mad"]
    let service = try ServiceProcess(ports: ports, flags: layout)
    let guests = guests(3)
    try connect(guests, to: service, ports)
    var number: UInt32 = 0
    what.write(guests[2])
    try exchange(500, from: guests[0], to: guests[1]) {
      // A ring that is received by is only looked at for a frame, and some of its buffers were taken before.
      for _ in 0..<8 {
        guests[0].send(guests[0].frame(to: guests[2].mac, number))
        number += 1
      }
    }
    let isCounted = try eventually(seconds: 10) { try service.count("ring_faults", ofPort: "mad") == 1 }
    #expect(isCounted, "\(service.log)")
    #expect(service.log.contains("a guest's ring makes no sense"))
    for port in ports[..<2] { #expect(try service.count("ring_faults", ofPort: port) == 0) }

    // The driver begins anew, as after a reset.
    try #require(try guests[2].ask(.setStatus(0)) == 0)
    guests[2].resetCard()
    try guests[2].ask(.setFeatures(SharedGuest.features.rawValue))
    for queue in 0..<2 { try guests[2].start(queue) }
    guests[2].offerBuffers()
    try exchange(200, from: guests[0], to: guests[2])
    try exchange(200, from: guests[2], to: guests[1])
    try expectGoodEnd(service)
  }

  @Test("a guest that rewrites a frame's addresses while it is parsed: each frame goes where the copy of it says")
  func rewrittenHeaders() throws {
    let ports = ["a", "b", "liar"]
    let service = try ServiceProcess(ports: ports, flags: ["--dispatch", "vmm-driven"])
    let guests = guests(3)
    try connect(guests, to: service, ports)
    let liar = guests[2]
    // The last byte of the destination is that of the one guest or of the other, and changes all the time.
    let bytes = [UInt8(truncatingIfNeeded: guests[0].mac), UInt8(truncatingIfNeeded: guests[1].mac)]
    let place = Atomic<Int>(0)
    let isOver = Atomic<Bool>(false)
    let memory = unsafe Scribbled(memory: liar.card.memory)
    let scribbler = TestThread {
      var turn = 0
      while !isOver.load(ordering: .relaxed) {
        let offset = place.load(ordering: .acquiring)
        turn ^= 1
        if offset > 0 { unsafe memory.memory.storeBytes(of: bytes[turn], toByteOffset: offset, as: UInt8.self) }
      }
    }
    var received = [0, 0]
    var sent = 0
    let hasSeenBoth = eventually {
      if sent < 20_000, let start = liar.card.send(liar.frame(to: guests[sent % 2].mac, UInt32(sent), bytes: 300)) {
        place.store(start + GuestCard.headerBytes + 5, ordering: .releasing)
        sent += 1
        if liar.card.wantsKicks(liar.card.send) { liar.kick(1) }
      }
      for (number, guest) in guests[..<2].enumerated() {
        for frame in guest.card.takeReceived() {
          received[number] += 1
          #expect(frame[5] == bytes[number], "the frame that came is not the one that was judged")
        }
      }
      return sent == 20_000 && received[0] + received[1] >= 19_000
    }
    isOver.store(true, ordering: .relaxed)
    scribbler.join()
    #expect(hasSeenBoth, "\(received) of \(sent)")
    #expect(received[0] > 0 && received[1] > 0)
    try expectGoodEnd(service)
  }

  @safe
  private struct Scribbled: @unchecked Sendable { let memory: UnsafeMutableRawPointer }

  @Test("a guest that takes nothing keeps no other guest from sending elsewhere", arguments: layouts[..<2])
  func deafGuest(layout: [String]) throws {
    let ports = ["a", "b", "deaf"]
    let service = try ServiceProcess(ports: ports, flags: layout)
    let guests = guests(3)
    try connect(guests, to: service, ports)
    // It has as many buffers as it offered, and offers no more.
    var number: UInt32 = 0
    try exchange(1_000, from: guests[0], to: guests[1]) {
      for _ in 0..<4 {
        guests[0].send(guests[0].frame(to: guests[2].mac, number))
        number += 1
      }
    }
    #expect(number > 100)
    // What waits for it is dropped.
    let isDropped = eventually { (try? service.counters())?.contains("drop_queue_full") ?? false }
    #expect(isDropped)
    guests[2].disconnect()
    let isGone = eventually { service.log.contains("the guest is gone") }
    #expect(isGone)
    try exchange(100, from: guests[0], to: guests[1])
    try expectGoodEnd(service)
  }

  @Test("eventfds that are full, and made to wait for room, hold up nobody", arguments: ["uring", "syscalls"])
  func fullCalls(io: String) throws {
    let ports = ["a", "b", "spiteful"]
    let service = try ServiceProcess(ports: ports, flags: ["--io", io])
    let guests = guests(3)
    try connect(guests, to: service, ports)
    try guests[2].fillCalls()
    var round = 0
    try exchange(1_000, from: guests[0], to: guests[1]) {
      round += 1
      guests[2].send(guests[2].frame(to: guests[0].mac, UInt32(round)))
      guests[0].send(guests[0].frame(to: guests[2].mac, UInt32(round)))
      guard round % 10 == 0 else { return }
      // A ring that is handed over is called at once, and the last time when it is taken back.
      for isEnabled in [0, 1] as [UInt32] {
        for queue in 0..<UInt32(2) {
          try guests[2].ask(.setQueueEnabled(.init(queue: queue, number: isEnabled)))
        }
      }
    }
    #expect(round >= 10)
    guests[2].disconnect()
    try exchange(100, from: guests[0], to: guests[1])
    try expectGoodEnd(service)
  }

  @Test("a thousand reconnects under another port's traffic leave no descriptor and no mapping behind")
  func reconnects() throws {
    let ports = ["a", "b", "fickle"]
    let service = try ServiceProcess(ports: ports)
    let guests = guests(3, size: 16)
    try connect(Array(guests[..<2]), to: service, Array(ports[..<2]))
    let before = try service.holdings()
    for round in 0..<1_000 {
      guests[2].resetCard()
      try guests[2].connect(to: service.socketPath(ofPort: "fickle"))
      guests[2].offerBuffers()
      guests[2].send(guests[2].frame(to: guests[0].mac, UInt32(round)))
      guests[2].disconnect()
      if round % 10 == 0 { try exchange(20, from: guests[0], to: guests[1]) }
      while !guests[0].card.takeReceived().isEmpty {}
    }
    var after = before
    let isSame = try eventually {
      after = try service.holdings()
      return after == before
    }
    #expect(isSame, "\(before), then \(after)")
    #expect(try service.count("guest_connections", ofPort: "fickle") == 1_000)
    try expectGoodEnd(service)
  }

  @Test("queues that stop, change and start again, resets and new memory in mid-traffic", arguments: layouts[..<2])
  func changesInMidTraffic(layout: [String]) throws {
    let ports = ["a", "b", "c"]
    let service = try ServiceProcess(ports: ports, flags: layout)
    let guests = guests(3)
    try connect(guests, to: service, ports)
    var round = 0
    func change() throws {
      guard round < 60 else { return }
      let guest = guests[2]
      for number in 0..<UInt32(8) { guest.send(guest.frame(to: guests[1].mac ^ 0xFF00, number)) }
      switch round % 4 {
      case 0:
        for queue in [1, 0] {
          let base = try guest.stop(queue)
          try guest.start(queue, base: base)
          guest.kick(queue)
        }
      case 1: try guest.shareMemory()
      case 2:
        try #require(try guest.ask(.setStatus(0)) == 0)
        guest.resetCard()
        try guest.ask(.setFeatures(SharedGuest.features.rawValue))
        for queue in 0..<2 { try guest.start(queue) }
        guest.offerBuffers()
      default:
        try guest.ask(.setQueueEnabled(.init(queue: 0, number: 0)))
        try guest.ask(.setQueueEnabled(.init(queue: 0, number: 1)))
      }
      round += 1
    }
    try exchange(3_000, from: guests[0], to: guests[1], meanwhile: change)
    #expect(round == 60)
    while !guests[2].card.takeReceived().isEmpty {}
    try exchange(300, from: guests[0], to: guests[2])
    try exchange(300, from: guests[2], to: guests[1])
    try expectGoodEnd(service)
  }

  @Test("a service that takes a killed one's place sends the frames that were under way", arguments: layouts[..<2])
  func framesUnderWay(layout: [String]) throws {
    let ports = ["a", "b"]
    let service = try ServiceProcess(ports: ports, flags: layout)
    let guests = guests(2)
    let notes = SharedFile("guest-notes", byteCount: 1 << 16)
    try guests[0].connect(to: service.socketPath(ofPort: "a"), notes: notes)
    guests[0].offerBuffers()
    try guests[1].connect(to: service.socketPath(ofPort: "b"))
    // One buffer, so that what follows has to wait.
    guests[1].offerBuffers(upTo: 2)
    guests[1].send(guests[1].frame(to: 0xFFFF_FFFF_FFFF, 0))
    try #require(eventually { !guests[0].card.takeReceived().isEmpty })
    // Longer than what is copied at once, so that their chains are under way.
    for number in 0..<UInt32(12) { guests[0].send(guests[0].frame(to: guests[1].mac, number, bytes: 400)) }
    var early: [UInt32] = []
    let waits = eventually {
      early += guests[1].takeReceived(from: guests[0], offersAgain: false)
      guests[0].card.reapSent()
      return guests[0].card.send.out == 10 && early.count == 2
    }
    try #require(waits, "\(early), \(guests[0].card.send.out) out")
    service.end(SIGKILL)
    for guest in guests { guest.disconnect() }

    try service.startAnew(flags: layout)
    guests[1].resetCard()
    try guests[1].connect(to: service.socketPath(ofPort: "b"))
    guests[1].offerBuffers()
    try guests[0].connect(to: service.socketPath(ofPort: "a"), notes: notes)
    guests[0].offerBuffers()
    var late: [UInt32] = []
    let areThere = eventually {
      late += guests[1].takeReceived(from: guests[0])
      return late.count >= 10
    }
    #expect(areThere)
    #expect(late == Array(2..<12))
    let areBack = eventually {
      guests[0].card.reapSent()
      return guests[0].card.send.out == 0
    }
    #expect(areBack, "each chain is given back, once")
    try exchange(200, from: guests[0], to: guests[1])
    try expectGoodEnd(service)
  }

  @Test("a port that is a client connects to the VMM's socket, and again when the VMM was away")
  func clientMode() throws {
    var name = Array((temporaryFolder + "/vnetr-client-XXXXXX").utf8CString)
    try #require(unsafe mkdtemp(&name) != nil)
    let folder = String(decoding: name.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    let ports = ["a", "b"]
    let listeners = ports.map { VhostUserFrontend.listen(folder + "/" + $0) }
    let service = try ServiceProcess(ports: ports, portKeys: "socket_mode = \"client\"", folder: folder)
    let guests = guests(2)
    for (guest, listener) in zip(guests, listeners) {
      try guest.accept(VhostUserFrontend.accept(listener))
      guest.offerBuffers()
    }
    try introduce(guests)
    try exchange(100, from: guests[0], to: guests[1])
    for _ in 0..<3 {
      guests[1].disconnect()
      guests[1].resetCard()
      try guests[1].accept(VhostUserFrontend.accept(listeners[1]))
      guests[1].offerBuffers()
      try exchange(100, from: guests[0], to: guests[1])
    }
    #expect(try service.count("guest_connections", ofPort: "b") == 4)
    try expectGoodEnd(service)
  }
}
