// What joins the workers of one service in the pipeline layout.
//
// The way of a frame between workers
// 1. A stage puts descriptors for a neighbour into that neighbour's `Outlet`, straight onto the ring, and flushes it
//    once a turn: then the neighbour sees the batch. What does not fit on a full ring is dropped and counted: the ring
//    is at least as deep as there are slots, unless it was set smaller, so all but trains of many flows each fits.
// 2. The neighbour's `Inlets` take batches off the rings, each ring in turn.
// 3. When the last send of a slot is done, it goes back to the worker that received into it, by a ring of slot numbers;
//    a frame in a guest's memory likewise to the worker that took it from the guest.
// Each push looks at the neighbour's bell.

/// The rings, bells and arenas of the workers of one service, made by control before any of them starts.
public struct Wiring: ~Copyable {
  public struct Settings: Sendable {
    /// Slots of each receiver's arena.
    public var slots = Self.slotsByDefault
    /// Few, so that they are warm: a pipeline's receiver would run ahead through all of them. In memory, super-frames
    /// to a link by way of two cores cost 120 ns a segment with 256 and 310 with 1,024 (`tools/bench layouts`).
    public static let slotsByDefault = 256
    public var hugePages = true
    /// Descriptors that fit on a ring, at least ``ringFramesMin``; nil: as many as there are slots, or
    /// ``ringFramesByDefault``.
    public var ringFrames: Int?
    /// The frames of one slot cross together, and a train may leave as one run for each datagram.
    public static let ringFramesMin = SendPool.trainFramesMax
    /// Room for trains of many flows beside one descriptor for each slot.
    public static let ringFramesByDefault = 1_024
    /// Descriptors that a worker takes off its rings in one turn, at most.
    public var batchFrames = 64
    public init() {}
  }

  public let roles: [Roles]
  private let settings: Settings
  private let arenas: [FrameArena]
  private let shares: [FrameMemory.ForeignShare]
  private var joints: OwnedArray<Joints?>

  /// - Parameters:
  ///   - roles: by worker.
  ///   - wakers: by worker the eventfd that wakes it.
  ///   - shares: foreign memories whose frames the workers forward, known to all of them under the number that follows
  ///     from their place here: the first is 1. Control keeps them alive.
  /// - Throws: `ENOMEM` where the address space is used up.
  public init(
    roles: [Roles], wakers: [Int32], settings: Settings, shares: [FrameMemory.ForeignShare] = []
  ) throws(SystemError) {
    precondition(roles.count == wakers.count)
    self.roles = roles
    self.settings = settings
    self.shares = shares
    var arenas: [FrameArena] = []
    for roles in roles {
      // A worker that does not receive posts no slot.
      arenas.append(
        try FrameArena(slotCount: roles.contains(.receive) ? settings.slots : 0, hugePages: settings.hugePages))
    }
    self.arenas = arenas
    let bells = wakers.map { Bell(waker: $0) }
    joints = OwnedArray(capacity: roles.count)
    for number in roles.indices {
      let transmitters = roles.count { $0.contains(.transmit) }
      joints.append(
        Joints(
          number: number, roles: roles[number], bell: bells[number], batchFrames: settings.batchFrames,
          holdBackMax: settings.slots / 2 / max(1, transmitters)))
    }
    let depth = settings.ringFrames ?? max(settings.slots, Settings.ringFramesByDefault)
    for number in roles.indices {
      for router in Roles.routers(ofReceiver: number, among: roles) where router != number {
        let ring = FrameRing<Descriptor>(capacity: depth)
        joints[number]!.toRouters.append(Outlet(ring, to: bells[router]))
        joints[router]!.fromReceivers.append(ring)
      }
      for transmitter in Roles.transmitters(ofRouter: number, among: roles) where transmitter != number {
        let capacity = settings.ringFrames ?? depth * max(1, feeders(of: number).count)
        let ring = FrameRing<RoutedFrame>(capacity: capacity)
        joints[number]!.toTransmitters.append(Outlet(ring, to: bells[transmitter]))
        joints[transmitter]!.fromRouters.append(ring)
      }
    }
    for receiver in roles.indices where roles[receiver].contains(.receive) {
      for user in users(of: receiver) where user != receiver {
        let ring = SPSCRing<UInt32>(
          capacity: FrameMemory.returnsMax(of: receiver, arenas[receiver], shares))
        joints[user]!.givesBack.append(SlotOutlet(ring, of: receiver, to: bells[receiver]))
        joints[receiver]!.comesBack.append(ring.makeConsumer())
      }
    }
  }

  /// What worker `number` has of it; to be taken once.
  public mutating func takeJoints(of number: Int) -> Joints {
    var taken: Joints?
    swap(&taken, &joints[number])
    guard let taken else { preconditionFailure("the joints of a worker are taken twice") }
    return taken
  }

  /// The memory of worker `number`: its own arena, and those of the receivers whose frames come to it.
  public func makeMemory(of number: Int) -> FrameMemory {
    let neighbours = arenas.indices.map { receiver in
      receiver != number && users(of: receiver).contains(number) ? arenas[receiver] : nil
    }
    return FrameMemory(
      arena: arenas[number], number: number, neighbours: neighbours.contains { $0 != nil } ? neighbours : [],
      shares: shares)
  }

  public func hasHugePages(_ number: Int) -> Bool { arenas[number].hasHugePages }

  /// The receivers whose frames come to a router.
  private func feeders(of router: Int) -> [Int] {
    roles.indices.filter { Roles.routers(ofReceiver: $0, among: roles).contains(router) }
  }

  /// The workers that frames of a receiver come to.
  private func users(of receiver: Int) -> Set<Int> {
    let routers = Roles.routers(ofReceiver: receiver, among: roles)
    return Set(routers).union(routers.flatMap { Roles.transmitters(ofRouter: $0, among: roles) })
  }
}

/// The ends of rings that one worker has.
public struct Joints: ~Copyable {
  public let number: Int
  public let roles: Roles
  let bell: Bell
  /// Descriptors that are taken off the rings in one turn, at most.
  let batchFrames: Int
  /// Slots of one neighbour that may wait here for full sockets: the rest is for its receives.
  let holdBackMax: Int
  var toRouters: OwnedArray<Outlet<Descriptor>>
  var toTransmitters: OwnedArray<Outlet<RoutedFrame>>
  var fromReceivers: Inlets<Descriptor>
  var fromRouters: Inlets<RoutedFrame>
  var givesBack: OwnedArray<SlotOutlet>
  var comesBack: SlotInlets

  /// More neighbours than any machine has cores for workers.
  static var neighboursMax: Int { 256 }

  init(number: Int, roles: Roles, bell: Bell, batchFrames: Int, holdBackMax: Int) {
    self.number = number
    self.roles = roles
    self.bell = bell
    self.batchFrames = batchFrames
    self.holdBackMax = holdBackMax
    toRouters = OwnedArray(capacity: Self.neighboursMax)
    toTransmitters = OwnedArray(capacity: Self.neighboursMax)
    fromReceivers = Inlets()
    fromRouters = Inlets()
    givesBack = OwnedArray(capacity: Self.neighboursMax)
    comesBack = SlotInlets()
  }

  /// Whether neighbours hand frames on to this worker.
  var hasInlets: Bool { fromReceivers.count + fromRouters.count > 0 }

  /// Whether frames wait on the rings to this worker.
  @inline(__always)
  mutating func haveFrames() -> Bool { !fromReceivers.isEmpty() || !fromRouters.isEmpty() }

  /// A worker of the fused layout: it has no neighbours.
  public static func alone(waker: Int32) -> Joints {
    Joints(number: 0, roles: .all, bell: Bell(waker: waker), batchFrames: 1, holdBackMax: 0)
  }
}

/// The way of frames to one neighbour.
struct Outlet<Frame: Crosses>: ~Copyable {
  private var ring: SPSCRing<Crossing>.Producer
  /// For frames that cross whole: as many places, so that there is room where `ring` has some.
  private var beside: SPSCRing<Frame>.Producer
  private let bell: Bell
  private var hasStaged = false

  init(_ ring: FrameRing<Frame>, to bell: Bell) {
    self.ring = ring.crossings.makeProducer()
    beside = ring.beside.makeProducer()
    self.bell = bell
  }

  /// Whether so many more frames fit.
  @inline(__always)
  mutating func hasRoom(for count: Int) -> Bool {
    let places = count * Crossing.placesMax
    return ring.room(for: places) >= places
  }

  /// Says that so many frames are about to be staged.
  @inline(__always)
  func prefetch(_ count: Int) { ring.prefetch(count * Frame.placesUsual) }

  /// Puts a frame on the ring, where there is room, with the name that its buffer has there; the neighbour sees it
  /// after `flush`.
  @inline(__always)
  mutating func stage(_ frame: borrowing Frame, _ buffer: BufferReference) {
    hasStaged = true
    guard frame.fits(buffer) else { return stageBeside(frame, buffer) }
    let crossing = Crossing(frame.descriptor, buffer)
    guard let addition = frame.addition else { return ring.stage(crossing) }
    ring.stage(crossing.goingOn)
    ring.stage(addition)
  }

  @inline(never)
  private mutating func stageBeside(_ frame: borrowing Frame, _ buffer: BufferReference) {
    var frame = copy frame
    frame.descriptor.buffer = buffer
    let isPushed = beside.push(frame)
    precondition(isPushed, "the ring beside is full")
    ring.stage(.beside)
  }

  /// Hands over what was staged, and wakes the neighbour if it sleeps; true if it did.
  @inline(__always)
  mutating func flush(_ io: inout some WorkerIO & ~Copyable) -> Bool {
    guard hasStaged else { return false }
    hasStaged = false
    ring.publish()
    return bell.wakeSleeper(&io)
  }
}

/// The two rings from one worker to another.
struct FrameRing<Frame: Crosses> {
  let crossings: SPSCRing<Crossing>
  let beside: SPSCRing<Frame>

  init(capacity: Int) {
    crossings = SPSCRing(capacity: capacity * Crossing.placesMax)
    // As many places, for each mark takes one.
    beside = SPSCRing(capacity: capacity * Crossing.placesMax)
  }
}

/// The way back of a neighbour's slots, and of the foreign buffers that it brings.
struct SlotOutlet: ~Copyable {
  /// The worker whose they are.
  let receiver: Int
  private var ring: SPSCRing<UInt32>.Producer
  private let bell: Bell

  init(_ ring: SPSCRing<UInt32>, of receiver: Int, to bell: Bell) {
    self.receiver = receiver
    self.ring = ring.makeProducer()
    self.bell = bell
  }

  @inline(__always)
  mutating func flush(_ memory: inout FrameMemory, _ io: inout some WorkerIO & ~Copyable) -> Bool {
    let count = memory.returnedCount(of: receiver)
    guard count > 0 else { return false }
    let pushed = ring.push(memory.returnedBuffers(of: receiver))
    precondition(pushed == count, "the ring has not as many places as may come back")
    memory.forgetReturned(of: receiver)
    return bell.wakeSleeper(&io)
  }
}

extension Bell {
  /// After a push: wakes the neighbour if it sleeps; true if it did.
  @inline(__always)
  fileprivate func wakeSleeper(_ io: inout some WorkerIO & ~Copyable) -> Bool {
    guard mustRing() else { return false }
    io.wake(waker)
    return true
  }
}

/// What comes from all neighbours of one kind.
struct Inlets<Frame: Crosses>: ~Copyable {
  private var rings: OwnedArray<Inlet<Frame>>
  /// The ring to begin with: they take turns.
  private var first = 0

  init() { rings = OwnedArray(capacity: Joints.neighboursMax) }

  mutating func append(_ ring: FrameRing<Frame>) { rings.append(Inlet(ring)) }

  var count: Int { rings.count }

  /// Frames that all rings together hold.
  var capacity: Int {
    var sum = 0
    for index in 0..<rings.count { sum += rings[index].capacity }
    return sum
  }

  /// Takes over up to `most` frames into `batch`, an equal share of each ring first. They are held once from now on, by
  /// worker `own`, this one.
  @inline(__always)
  mutating func take(
    _ most: Int, by own: Int, _ memory: inout FrameMemory, _ counters: borrowing CounterTable,
    into batch: inout Batch<Frame>
  ) {
    guard rings.count > 0 else { return }
    var left = min(most, batch.room)
    var share = max(1, left / rings.count)
    for _ in 0..<(rings.count > 1 ? 2 : 1) {
      for step in 0..<rings.count where left > 0 {
        var index = first + step
        if index >= rings.count { index -= rings.count }
        left -= rings[index].take(min(share, left), by: own, &memory, counters, into: &batch)
      }
      // What some did not use, the others may.
      share = left
    }
    first = first + 1 >= rings.count ? 0 : first + 1
  }

  /// Whether no ring has anything now.
  @inline(__always)
  mutating func isEmpty() -> Bool {
    for index in 0..<rings.count where !rings[index].isEmpty() { return false }
    return true
  }
}

/// What comes from one neighbour.
struct Inlet<Frame: Crosses>: ~Copyable {
  private var ring: SPSCRing<Crossing>.Consumer
  private var beside: SPSCRing<Frame>.Consumer

  init(_ ring: FrameRing<Frame>) {
    self.ring = ring.crossings.makeConsumer()
    beside = ring.beside.makeConsumer()
  }

  var capacity: Int { ring.capacity / Crossing.placesMax }

  @inline(__always)
  mutating func isEmpty() -> Bool { ring.isEmpty() }

  /// Appends up to `most` frames to `batch`, which has room; returns how many. The frames of one slot that cross
  /// together are taken over together.
  @inline(__always)
  mutating func take(
    _ most: Int, by own: Int, _ memory: inout FrameMemory, _ counters: borrowing CounterTable,
    into batch: inout Batch<Frame>
  ) -> Int {
    // Room for the whole of what crosses together with the last.
    let most = min(most, batch.room - RouteStage.trainFramesMax)
    guard most > 0 else { return 0 }
    // A batch is published as a whole, so all of a frame's places are there.
    var ready = ring.ready((most + RouteStage.trainFramesMax) * Crossing.placesMax)
    guard ready > 0 else { return 0 }
    ring.prefetch(min(ready, most * Crossing.placesMax))
    var takenOver = CrossingCount(.takenOverFrames)
    var count = 0
    var following = 0
    while ready > 0, count < most || following > 0 {
      let crossing = ring.read()
      count += 1
      ready -= 1
      if crossing.isBeside {
        takeBeside(by: own, &memory, into: &batch)
        let together = Int(batch[batch.count - 1].crossesWith)
        following = together > 0 ? together - 1 : following - 1
      } else {
        let addition = crossing.goesOn ? ring.read() : nil
        if addition != nil { ready -= 1 }
        batch.append(Frame(crossing, addition, memory.takeOver(crossing.buffer, by: own)))
      }
      takenOver.count(batch[batch.count - 1].descriptor, counters)
    }
    ring.free()
    takenOver.flush(counters)
    return count
  }

  @inline(never)
  private mutating func takeBeside(by own: Int, _ memory: inout FrameMemory, into batch: inout Batch<Frame>) {
    guard var frame = beside.pop() else { preconditionFailure("a mark on the ring, and nothing beside") }
    frame.descriptor.buffer = memory.takeOver(
      frame.descriptor.buffer, by: own, holds: Int(frame.crossesWith))
    batch.append(frame)
  }
}

/// Slots and foreign buffers that neighbours give back.
struct SlotInlets: ~Copyable {
  private var rings: OwnedArray<SPSCRing<UInt32>.Consumer>

  init() { rings = OwnedArray(capacity: Joints.neighboursMax) }

  mutating func append(_ ring: consuming SPSCRing<UInt32>.Consumer) { rings.append(ring) }

  @inline(__always)
  mutating func isEmpty() -> Bool {
    for index in 0..<rings.count where !rings[index].isEmpty() { return false }
    return true
  }

  /// All that are there come back.
  @inline(__always)
  mutating func take(_ memory: inout FrameMemory) {
    for index in 0..<rings.count {
      let count = rings[index].ready(rings[index].capacity)
      guard count > 0 else { continue }
      rings[index].prefetch(count)
      for _ in 0..<count { memory.comeBack(rings[index].read()) }
      rings[index].free()
    }
  }
}
