import Datapath
import TestSupport
import Testing

/// A ring between the device's side, which is tested, and a driver; a plain list of what was offered says what must
/// come. Everything that a driver and a device may do is done in random order.
@safe
private struct Exercise<Queue: Virtqueue & ~Copyable, Driver: VirtioDriver>: ~Copyable {
  let guest: VirtioGuest
  let driver: Driver
  var queue: Queue
  var random: SeededRandom
  let features: VirtqueueFeatures
  var chain = VirtioChain()
  var singles = VirtioSingles()

  struct Offer {
    var identifier: UInt16
    var buffers: [VirtioBuffer]
    var weight: Int
    var isIndirect: Bool
  }
  var offered: [Offer] = []
  /// With the number by which it was taken.
  var taken: [(offer: Offer, number: Int, token: VirtioChain.Token)] = []
  var completed: [(offer: Offer, number: Int, writtenBytes: UInt32)] = []
  /// Published and not reaped.
  var published: [(identifier: UInt16, writtenBytes: UInt32)] = []
  /// What the driver waits for, in what is still to be published; nil where it wants no call, 0 or less once it was.
  var callAfter: Int?
  var isFirstCall = true
  var isArmed = false
  var chainCount = 0
  var callCount = 0
  var kickCount = 0
  var rewindCount = 0
  var againCount = 0
  var singleCount = 0
  /// Chains in front of those offered that a device before took.
  var againLeft = 0
  /// Where chains in flight are noted; empty where they are not.
  var notes: UnsafeMutableRawBufferPointer

  init(
    _ guest: VirtioGuest, _ driver: Driver, _ queue: consuming Queue, features: VirtqueueFeatures, seed: UInt64,
    notesBytes: Int = 0
  ) {
    unsafe notes = .allocate(byteCount: notesBytes, alignment: 64)
    unsafe notes.initializeMemory(as: UInt8.self, repeating: 0)
    self.guest = guest
    self.driver = driver
    self.features = features
    self.queue = queue
    random = SeededRandom(seed: seed)
    driver.wantCall(after: nil)
  }

  deinit { unsafe notes.deallocate() }

  private mutating func number(_ range: ClosedRange<Int>) -> Int { Int.random(in: range, using: &random) }

  mutating func step() throws {
    switch number(0...9) {
    case 0, 1: offer()
    case 2, 3, 4: try take(number(1...5))
    case 5: try takeSingles(number(1...80))
    case 6: try giveBack()
    case 7: for _ in 0..<number(0...taken.count) { complete() }
    case 8: try publish()
    default: try arm()
    }
  }

  mutating func offer() {
    let before = offered.count
    for _ in 0..<number(1...4) {
      let isIndirect = features.contains(.indirectDescriptors) && number(0...2) == 0
      // No chain is longer than the ring, and no table either.
      let most = number(0...1) == 0 ? 1 : 12
      let room = min(isIndirect ? queue.size : driver.freePlaces, most)
      guard driver.freePlaces > 0, room > 0 else { break }
      let readable = number(0...room)
      let writable = number((readable == 0 ? 1 : 0)...room - readable)
      let buffers = (0..<readable + writable).map { index in
        VirtioBuffer.random(&random, isWritable: index >= readable)
      }
      let identifier = driver.offer(buffers, isIndirect: isIndirect)
      offered.append(
        Offer(
          identifier: identifier, buffers: buffers, weight: driver.weight(of: identifier), isIndirect: isIndirect))
    }
    let mustKick = driver.mustKick()
    if isArmed, offered.count > before { #expect(mustKick, "the driver kicks a device that asked for it") }
    if mustKick {
      kickCount += 1
      isArmed = false
    }
  }

  mutating func take(_ most: Int) throws {
    for _ in 0..<most {
      let result = queue.next(guest.memory.reference, into: &chain)
      guard !offered.isEmpty else {
        try #require(result == .none)
        return
      }
      try #require(result == .chain)
      let offer = offered.removeFirst()
      againLeft = max(0, againLeft - 1)
      try check(offer)
      taken.append((offer, chainCount, chain.token))
      chainCount += 1
    }
  }

  /// Takes those in front that are single, and gives some of them back.
  mutating func takeSingles(_ most: Int) throws {
    let expected =
      againLeft > 0 ? [] : offered.prefix(min(most, VirtioSingles.countMax)).prefix { isSingle($0) }
    let isLeft = queue.take(guest.memory.reference, upTo: most, into: &singles)
    try #require(singles.count == expected.count)
    try #require(isLeft == (singles.count < min(most, offered.count, VirtioSingles.countMax)))
    for (index, offer) in expected.enumerated() {
      let single = singles[index]
      let piece = VirtioPiece(place: unsafe UInt(bitPattern: single.place), bytes: Int(single.bytes))
      try #require(single.token.identifier == offer.identifier && single.isWritable == offer.buffers[0].isWritable)
      try #require(guest.pieces(of: offer.buffers[0]) == [piece] && single.guestAddress == offer.buffers[0].address)
    }
    let kept = number(0...2) > 0 ? expected.count : number(0...expected.count)
    if kept < expected.count { queue.giveBack(last: expected.count - kept) }
    for index in 0..<kept {
      taken.append((offered.removeFirst(), chainCount, singles[index].token))
      chainCount += 1
    }
    singleCount += kept
  }

  func isSingle(_ offer: Offer) -> Bool {
    !offer.isIndirect && offer.buffers.count == 1 && guest.pieces(of: offer.buffers[0]).count == 1
  }

  func check(_ offer: Offer) throws {
    try #require(chain.token.identifier == offer.identifier)
    let readable = offer.buffers.filter { !$0.isWritable }
    let writable = offer.buffers.filter(\.isWritable)
    let readablePieces = chain.readablePieces
    let writablePieces = chain.writablePieces
    try #require(readablePieces == readable.flatMap(guest.pieces(of:)))
    try #require(writablePieces == writable.flatMap(guest.pieces(of:)))
    let sums = (chain.readableBytes, chain.writableBytes)
    try #require(sums == (readable.reduce(0) { $0 + Int($1.bytes) }, writable.reduce(0) { $0 + Int($1.bytes) }))
  }

  /// Takes some and gives them back, while others that were taken before are completed.
  mutating func giveBack() throws {
    let mark = queue.mark
    let before = queue.takenCount
    let count = min(number(1...4), offered.count)
    for index in 0..<count {
      try #require(queue.next(guest.memory.reference, into: &chain) == .chain)
      try check(offered[index])
    }
    var done = 0
    if number(0...1) == 0, !taken.isEmpty {
      complete()
      done = 1
      if number(0...1) == 0 { try publish() }
    }
    queue.rewind(to: mark)
    try #require(queue.takenCount == before - done)
    rewindCount += count
  }

  mutating func complete() {
    guard !taken.isEmpty else { return }
    let (offer, number, token) = taken.remove(at: self.number(0...taken.count - 1))
    let written = self.number(0...2) == 0 ? 0 : self.number(1...70_000)
    queue.complete(token, writtenBytes: written)
    completed.append((offer, number, UInt32(written)))
  }

  mutating func publish() throws {
    // Nothing of a batch is seen before it is published.
    if published.isEmpty { try #require(driver.reap() == nil) }
    queue.publish(guest.memory.reference)
    let weight = completed.reduce(0) { $0 + $1.offer.weight }
    let mustCall = queue.mustCall()
    if completed.isEmpty, !isFirstCall {
      #expect(!mustCall, "nothing was published, nobody is called")
    } else if !completed.isEmpty {
      if !isFirstCall {
        let wanted =
          features.contains(.eventIndex)
          ? callAfter.map { $0 > 0 && $0 <= weight } ?? false : callAfter != nil
        #expect(mustCall == wanted)
      }
      if mustCall { callCount += 1 }
    }
    // The first time it is asked, it announces what a device before may have published.
    isFirstCall = false
    callAfter = callAfter.map { $0 - weight }
    published += completed.map { ($0.offer.identifier, $0.writtenBytes) }
    completed = []
    if number(0...2) > 0 { try reap() }
  }

  mutating func reap() throws {
    while let back = driver.reap() {
      try #require(!published.isEmpty)
      let expected = published.removeFirst()
      try #require(back == expected)
    }
    try #require(published.isEmpty)
    // From here the driver has seen all: it says when it wants to be called next.
    callAfter = number(0...3) == 0 ? nil : number(1...max(1, min(6, queue.size)))
    driver.wantCall(after: callAfter)
  }

  mutating func arm() throws {
    if number(0...2) == 0 {
      queue.refuseKicks(guest.memory.reference)
      isArmed = false
    } else {
      let isThere = queue.askForKicks(guest.memory.reference)
      #expect(isThere == !offered.isEmpty, "what came before the driver could see the wish is told")
      // Also where chains are there: they may be too few for who asks.
      isArmed = true
    }
    _ = driver.mustKick()
  }

  /// All chains come back, and another queue goes on where this one stood.
  mutating func resume() throws {
    try take(offered.count)
    while !taken.isEmpty { complete() }
    try publish()
    try reap()
    try #require(queue.takenCount == 0 && driver.freePlaces == queue.size)
    queue = try Queue(driver.areas, features: features, base: queue.base)
    isFirstCall = true
    isArmed = false
    try trackInFlight(0)
  }

  mutating func trackInFlight(_ expected: Int) throws {
    guard let start = unsafe notes.baseAddress, unsafe !notes.isEmpty else { return }
    let count = unsafe try queue.trackInFlight(start)
    try #require(count == expected)
  }

  /// Where the device ends.
  enum Crash: CaseIterable { case anywhere, beforeTheDriverSeesABatch, afterTheDriverSawIt }

  /// The device ends without a farewell, and another one takes up what it left: what it had taken, and the driver had
  /// not seen back comes again, in order, before all else.
  mutating func crash(_ moment: Crash) throws {
    if moment != .anywhere {
      // The stores of `publish` that come before the one that the driver sees, without those behind it.
      let batchFields = Driver.self == PackedDriver.self ? [12, 13, 16, 17, 20] : [12, 13]
      let (entries, entryBytes, next) = Driver.self == PackedDriver.self ? (32, 32, 2) : (16, 16, 6)
      let bytes = Queue.areaBytes(size: queue.size, features: features)
      let rings = unsafe [(driver.areas.descriptor, bytes.descriptor), (driver.areas.device, bytes.device)].map {
        unsafe UnsafeMutableRawBufferPointer(start: $0.0, count: $0.1)
      }
      let ringsBefore = unsafe rings.map { unsafe [UInt8]($0) }
      let before = unsafe [UInt8](notes)
      queue.publish(guest.memory.reference)
      for index in before.indices {
        let isLink = index >= entries && [next, next + 1].contains((index - entries) % entryBytes)
        if !isLink, !batchFields.contains(index) { unsafe notes[index] = before[index] }
      }
      if moment == .beforeTheDriverSeesABatch {
        for index in unsafe 0..<rings.count { unsafe rings[index].copyBytes(from: ringsBefore[index]) }
      } else {
        published += completed.map { ($0.offer.identifier, $0.writtenBytes) }
        completed = []
      }
    }
    let left = taken.map { ($0.number, $0.offer) } + completed.map { ($0.number, $0.offer) }
    taken = []
    completed = []
    callAfter = nil
    queue = try Queue(driver.areas, features: features, base: 0x8000)
    againLeft += left.count
    try trackInFlight(againLeft)
    offered = left.sorted { $0.0 < $1.0 }.map(\.1) + offered
    againCount += left.count
    isFirstCall = true
    isArmed = false
    // Nothing is seen back twice, and nothing that was not published.
    try reap()
  }
}

@Suite("Virtio rings")
struct VirtioQueueTests {
  static let featureSets: [VirtqueueFeatures] = [[], [.eventIndex], [.indirectDescriptors, .eventIndex]]
  static let stepCount = 6_000

  private func exercise<Queue: Virtqueue & ~Copyable, Driver: VirtioDriver>(
    _ queue: Queue.Type, _ driver: Driver.Type, size: Int, base: UInt32
  ) throws {
    for (number, features) in Self.featureSets.enumerated() {
      let guest = try VirtioGuest()
      let driver = Driver(guest, size: size, features: features, base: base)
      var exercise = Exercise(
        guest, driver, try Queue(driver.areas, features: features, base: base), features: features,
        seed: UInt64(size * 10 + number))
      for count in 1...Self.stepCount {
        try exercise.step()
        if count % 500 == 0 { try exercise.resume() }
      }
      let counts = [
        exercise.chainCount, exercise.callCount, exercise.kickCount, exercise.rewindCount, exercise.singleCount,
      ]
      #expect(counts.allSatisfy { $0 > 20 }, "chains, calls, kicks and chains given back were all seen: \(counts)")
    }
  }

  @Test("a split ring gives each chain once, in order, and back in any order", arguments: [1, 2, 4, 16, 256, 32_768])
  func split(size: Int) throws {
    // The index wraps on the way.
    try exercise(SplitQueue.self, SplitDriver.self, size: size, base: 65_000)
  }

  @Test("a packed ring gives each chain once, in order, and back in any order", arguments: [1, 2, 3, 7, 64, 1_000])
  func packed(size: Int) throws {
    try exercise(PackedQueue.self, PackedDriver.self, size: size, base: 0x8000)
    try exercise(PackedQueue.self, PackedDriver.self, size: size, base: UInt32(size / 2) * 0x1_0001)
  }

  private func crashes<Queue: Virtqueue & ~Copyable, Driver: VirtioDriver>(
    _ queue: Queue.Type, _ driver: Driver.Type, size: Int
  ) throws {
    for (number, features) in Self.featureSets.enumerated() {
      let guest = try VirtioGuest()
      let driver = Driver(guest, size: size, features: features, base: 0x8000)
      var exercise = Exercise(
        guest, driver, try Queue(driver.areas, features: features, base: 0x8000), features: features,
        seed: UInt64(size * 10 + number), notesBytes: Queue.inFlightBytes(size: size))
      try exercise.trackInFlight(0)
      var random = SeededRandom(seed: 1)
      for count in 1...Self.stepCount {
        try exercise.step()
        if count % 13 == 0 { try exercise.crash(.allCases.randomElement(using: &random)!) }
        if count % 500 == 0 { try exercise.resume() }
      }
      #expect(exercise.againCount > 100, "chains were left in flight: \(exercise.againCount)")
    }
  }

  @Test("what a device leaves in flight on a split ring comes again, whenever it ends", arguments: [1, 2, 16, 256])
  func splitCrashes(size: Int) throws { try crashes(SplitQueue.self, SplitDriver.self, size: size) }

  @Test("what a device leaves in flight on a packed ring comes again, whenever it ends", arguments: [1, 3, 7, 64, 250])
  func packedCrashes(size: Int) throws { try crashes(PackedQueue.self, PackedDriver.self, size: size) }

  @Test("the largest packed ring goes round")
  func packedLargest() throws {
    let base: UInt32 = 0x7ff0
    try exercise(PackedQueue.self, PackedDriver.self, size: 32_768, base: base | base << 16)
  }

  @Test("a packed base without a used half begins where the available half does, as DPDK's virtio-user sends it")
  func packedHalfBase() throws {
    let guest = try VirtioGuest()
    let driver = PackedDriver(guest, size: 8, features: [], base: 0x8000)
    let queue = try PackedQueue(driver.areas, features: [], base: 0x8000)
    #expect(queue.base == 0x8000_8000)
  }

  @Test(
    "a packed ring of single places tells where it stands to a device that is told where it began",
    arguments: [1, 7, 64])
  func packedStaleBase(size: Int) throws {
    let guest = try VirtioGuest()
    let driver = PackedDriver(guest, size: size, features: [], base: 0x8000)
    var random = SeededRandom(seed: UInt64(size))
    var chain = VirtioChain()
    var offered: [UInt16] = []
    var givenTotal = 0
    var begunCount = 0
    for _ in 0..<300 {
      var queue = try PackedQueue(driver.areas, features: [], base: 0x8000_8000)
      queue.publish(guest.memory.reference)
      while driver.reap() != nil {}
      try #require(driver.freePlaces == size - offered.count)
      for _ in 0..<Int.random(in: 0...driver.freePlaces, using: &random) {
        offered.append(driver.offer([VirtioBuffer.random(&random, isWritable: false)], isIndirect: false))
      }
      // The device takes some, gives back fewer, and is gone.
      let taken = Int.random(in: 0...offered.count, using: &random)
      var tokens: [VirtioChain.Token] = []
      for number in 0..<taken {
        let result = queue.next(guest.memory.reference, into: &chain)
        try #require(result == .chain)
        try #require(chain.token.identifier == offered[number])
        tokens.append(chain.token)
      }
      var given = Int.random(in: 0...taken, using: &random)
      // A last place of every other round may be the rest of a chain, for all that the ring tells.
      let end = givenTotal + given
      if given > 0, size > 1, end % size == size - 1, end / size % 2 == 1 { given -= 1 }
      givenTotal += given
      for token in tokens.prefix(given) {
        queue.complete(token, writtenBytes: 0)
        offered.removeFirst()
      }
      queue.publish(guest.memory.reference)
      while driver.reap() != nil {}
      try #require(driver.freePlaces == size - offered.count)
      // A batch may be begun.
      let begun = Int.random(in: 0...taken - given, using: &random)
      guard begun > 0, (givenTotal + begun) % size != size - 1 else { continue }
      for token in tokens[given..<given + begun] {
        queue.complete(token, writtenBytes: 0)
        offered.removeFirst()
      }
      givenTotal += begun
      begunCount += 1
      try #require(driver.reap() == nil)
    }
    #expect(size == 1 || begunCount > 20)
  }

  @Test("a packed ring with chains of several places goes on at the base that it is told")
  func packedLongChains() throws {
    let guest = try VirtioGuest()
    let driver = PackedDriver(guest, size: 8, features: [], base: 0x8000)
    var random = SeededRandom(seed: 1)
    var chain = VirtioChain()
    var queue = try PackedQueue(driver.areas, features: [], base: 0x8000_8000)
    for _ in 0..<2 {
      _ = driver.offer((0..<3).map { _ in VirtioBuffer.random(&random, isWritable: false) }, isIndirect: false)
      let result = queue.next(guest.memory.reference, into: &chain)
      try #require(result == .chain)
      queue.complete(chain.token, writtenBytes: 0)
    }
    queue.publish(guest.memory.reference)
    for base in [queue.base, 0x8000_8000] {
      let next = try PackedQueue(driver.areas, features: [], base: base)
      #expect(next.base == base)
    }
  }

  @Test("a ring of a wrong size, base or alignment is refused")
  func refused() throws {
    let guest = try VirtioGuest()
    var areas = SplitDriver(guest, size: 8, features: [], base: 0).areas
    for size in [0, -1, 3, 65_536] {
      areas.size = size
      #expect(throws: VirtqueueError.size(size)) { _ = try SplitQueue(areas, features: [], base: 0) }
    }
    for size in [0, -1, 32_769] {
      areas.size = size
      #expect(throws: VirtqueueError.size(size)) { _ = try PackedQueue(areas, features: [], base: 0) }
    }
    areas.size = 8
    #expect(throws: VirtqueueError.base(65_536)) { _ = try SplitQueue(areas, features: [], base: 65_536) }
    for base: UInt32 in [8, 9 << 16, 0x7fff, 1 << 16 | 0, 3 << 16 | 0x8004] {
      #expect(throws: VirtqueueError.base(base)) { _ = try PackedQueue(areas, features: [], base: base) }
    }
    for (descriptor, driver, device) in [(8, 0, 0), (0, 1, 0), (0, 0, 2)] {
      var moved = areas
      unsafe moved.descriptor += descriptor
      unsafe moved.driver += driver
      unsafe moved.device += device
      #expect(throws: VirtqueueError.self) { _ = try SplitQueue(moved, features: [], base: 0) }
      #expect(throws: VirtqueueError.self) { _ = try PackedQueue(moved, features: [], base: 0) }
    }
    unsafe areas.driver += 2
    #expect(throws: VirtqueueError.misaligned("driver", bytes: 4)) {
      _ = try PackedQueue(areas, features: [], base: 0)
    }
    _ = try SplitQueue(areas, features: [], base: 0)
  }
}
