import CLinux
import Glibc

/// A worker's I/O with the rings of guests beside the kernel's files. A ring is one more source or lane, so the stages
/// know of them by their kind alone.
///
/// The way of a frame from a guest:
///  1. `collect` takes chains off the ring: each is a `received` event. The frame's first bytes are copied, once, and
///     only that copy is read and sent; the rest stays where it is in the guest's memory.
///  2. When its last send is over, the next `collect` gives the chain back to the guest, and calls it if it wants that.
///
/// To a guest: `deliver` copies a frame into buffers that the guest made available; the next `collect` shows them to
/// it, all of a turn at once. Where it has none the frame is sent as to a socket: `send` copies each message of a
/// chain, the `sent` event comes with the next `collect`; the chain stops as at a full socket, and `writable` comes
/// when there are buffers; `stuck` before it, where that takes more than 20 ms.
///
/// While a worker polls, no guest kicks. Before it waits it asks all of them to, and looks a last time. A guest that
/// cannot kick is looked at every 50 µs.
struct GuestIO<Kernel: WorkerIO & ~Copyable>: ~Copyable, WorkerIO {
  private var kernel: Kernel
  /// By source and by lane; nil for those of the kernel.
  private var sources: OwnedArray<GuestSource?>
  private var lanes: OwnedArray<GuestLane?>
  /// What the kernel's side must know of them.
  private var sourceNotes: FixedArray<GuestNote>
  private var laneNotes: FixedArray<GuestNote>
  /// The owner of a source's frames, for the worker's memory.
  private var owners: FixedArray<UInt16>
  /// The numbers of those that are guests', in front.
  private var guestSources: FixedArray<UInt32>
  private var guestSourceCount = 0
  private var guestLanes: FixedArray<UInt32>
  private var guestLaneCount = 0
  /// By lane: what its last chain came to, untold.
  private var results: FixedArray<DeliveryResult>
  private var resultCount = 0
  /// By lane: whether buffers are awaited, and until when nobody is told that it takes long.
  private var awaitsWritable: FixedArray<Bool>
  private var stuckFrom: FixedArray<UInt64>
  /// When it was last told.
  private var stuckAt: FixedArray<UInt64>
  private var awaitCount = 0
  /// Lanes of them of which it was not told yet.
  private var patientCount = 0
  /// Frames that one ring may bring in one turn, so that others come to their turn.
  private let framesOfTurnMax: Int
  private var framesTaken = 0
  private static var pollNanoseconds: Int { 50_000 }
  /// How long a guest may take nothing before frames stop to wait for it.
  private let patienceNanoseconds: UInt64
  /// After it did, the share of the time since that frames may wait for it again: a guest that takes one buffer now and
  /// then keeps the others no longer than that.
  private static var patienceShare: UInt64 { 8 }

  init(
    _ kernel: consuming Kernel, sources sourceCount: Int, lanes laneCount: Int, framesOfTurnMax: Int,
    patienceNanoseconds: UInt64
  ) {
    self.kernel = kernel
    self.patienceNanoseconds = patienceNanoseconds
    self.framesOfTurnMax = framesOfTurnMax
    sources = OwnedArray(capacity: sourceCount)
    lanes = OwnedArray(capacity: laneCount)
    for _ in 0..<sourceCount { sources.append(nil) }
    for _ in 0..<laneCount { lanes.append(nil) }
    owners = FixedArray(repeating: 0, count: sourceCount)
    sourceNotes = FixedArray(repeating: GuestNote(), count: sourceCount)
    laneNotes = FixedArray(repeating: GuestNote(), count: laneCount)
    guestSources = FixedArray(repeating: 0, count: sourceCount)
    guestLanes = FixedArray(repeating: 0, count: laneCount)
    results = FixedArray(repeating: DeliveryResult(), count: laneCount)
    awaitsWritable = FixedArray(repeating: false, count: laneCount)
    stuckFrom = FixedArray(repeating: 0, count: laneCount)
    stuckAt = FixedArray(repeating: 0, count: laneCount)
  }

  // MARK: Rings

  /// Makes a ring the source that is opened next under this number; false where it cannot be one.
  mutating func lend(_ reference: GuestRing.Reference, toSource source: Int) -> Bool {
    unsafe reference.ring._withUnsafeGuaranteedRef { ring in
      guard let frames = ring.frames else { return false }
      do throws(VirtqueueError) {
        let queue = try GuestQueue(ring)
        owners[source] = UInt16(frames.owner)
        let count = min(ring.areas.size, frames.memory.bufferCount)
        // Where chains go back in order, one that waits keeps all behind it: none may wait for a stuck lane.
        frames.memory.reference.waitingMax = ring.keepsOrder ? 0 : count / 4
        sources[source] = GuestSource(
          reference, queue, frames: frames.memory.reference, count: count, owner: frames.owner,
          memory: ring.memory.reference, hasCall: ring.call >= 0, hasKick: ring.kick >= 0)
        sourceNotes[source] = GuestNote(isGuest: true, hasKick: ring.kick >= 0, call: ring.call)
        callAtStart(ring)
        return true
      } catch {
        return false
      }
    }
  }

  /// The same for a lane.
  mutating func lend(_ reference: GuestRing.Reference, toLane lane: Int) -> Bool {
    unsafe reference.ring._withUnsafeGuaranteedRef { ring in
      do throws(VirtqueueError) {
        lanes[lane] = GuestLane(
          reference, try GuestQueue(ring), mergesBuffers: ring.mergesBuffers, memory: ring.memory.reference,
          hasCall: ring.call >= 0)
        laneNotes[lane] = GuestNote(isGuest: true, hasKick: ring.kick >= 0, call: ring.call)
        callAtStart(ring)
        return true
      } catch {
        return false
      }
    }
  }

  /// What was completed before may have been told to an eventfd that the VMM replaced meanwhile.
  private mutating func callAtStart(_ ring: borrowing GuestRing) { if ring.call >= 0 { kernel.callAtOnce(ring.call) } }

  @inline(__always)
  private func isGuest(source: Int) -> Bool { sourceNotes[source].isGuest }
  @inline(__always)
  private func isGuest(lane: Int) -> Bool { laneNotes[lane].isGuest }

  // MARK: Sources

  mutating func openSource(_ source: Int, _ kind: SourceKind, descriptor: Int32) {
    guard kind == .guest else { return kernel.openSource(source, kind, descriptor: descriptor) }
    precondition(sourceNotes[source].isGuest, "a guest's source is opened without its ring")
    guestSources[guestSourceCount] = UInt32(truncatingIfNeeded: source)
    guestSourceCount += 1
    if descriptor >= 0 { kernel.openSource(source, .waker, descriptor: descriptor) }
  }

  mutating func arm(_ source: Int, _ memory: inout FrameMemory) {
    if isGuest(source: source), !sourceNotes[source].hasKick || sources[source]!.endsWithKick() { return }
    kernel.arm(source, &memory)
  }

  mutating func cancel(_ source: Int) {
    guard isGuest(source: source) else { return kernel.cancel(source) }
    sources[source]!.beginEnd(ECANCELED)
  }

  mutating func closeSource(_ source: Int) {
    guard isGuest(source: source) else { return kernel.closeSource(source) }
    if sourceNotes[source].hasKick { kernel.closeSource(source) }
    sources[source] = nil
    sourceNotes[source] = GuestNote()
    Self.remove(source, from: &guestSources, &guestSourceCount)
  }

  mutating func post(_ slot: Int, _ memory: inout FrameMemory) { kernel.post(slot, &memory) }
  mutating func takeBackSlots(_ memory: inout FrameMemory) { kernel.takeBackSlots(&memory) }

  // MARK: Lanes

  mutating func openLane(_ lane: Int, _ kind: LaneKind, descriptor: Int32) {
    guard kind == .guest else { return kernel.openLane(lane, kind, descriptor: descriptor) }
    precondition(laneNotes[lane].isGuest, "a guest's lane is opened without its ring")
    guestLanes[guestLaneCount] = UInt32(truncatingIfNeeded: lane)
    guestLaneCount += 1
  }

  mutating func closeLane(_ lane: Int) {
    guard isGuest(lane: lane) else { return kernel.closeLane(lane) }
    precondition(!results[lane].isThere, "a lane is closed while a chain is out")
    if awaitsWritable[lane] { endAwaiting(lane) }
    // Its eventfd may be closed before the next collect.
    if lanes[lane]!.publish() { kernel.callAtOnce(laneNotes[lane].call) }
    lanes[lane]!.leave()
    lanes[lane] = nil
    laneNotes[lane] = GuestNote()
    Self.remove(lane, from: &guestLanes, &guestLaneCount)
  }

  private static func remove(_ number: Int, from numbers: inout FixedArray<UInt32>, _ count: inout Int) {
    for place in 0..<count where Int(numbers[place]) == number {
      count -= 1
      numbers[place] = numbers[count]
      return
    }
  }

  var chainFramesMax: Int { kernel.chainFramesMax }

  @inline(__always)
  mutating func send(_ lane: Int, first: Int, count: Int, _ pool: borrowing SendPool) {
    guard isGuest(lane: lane) else { return kernel.send(lane, first: first, count: count, pool) }
    var operation = first
    var result = DeliveryResult(isThere: true)
    while result.sent < count {
      let message = unsafe pool.message(operation)
      result.error = unsafe lanes[lane]!.deliver(
        message.pointee.msg_iov, count: message.pointee.msg_iovlen, bytes: Int(pool.messageBytes(operation)))
      guard result.error == 0 else { break }
      result.sent += 1
      operation = pool.nextMessage(operation)
    }
    results[lane] = result
    resultCount += 1
  }

  @inline(__always)
  mutating func deliver(
    _ lane: Int, _ header: SendPool.Header, _ frame: Descriptor, _ memory: borrowing FrameMemory
  ) -> Bool {
    lanes[lane]!.deliver(header, frame, memory)
  }

  // MARK: From guest to guest at once

  /// Sources that are guests' and open; `guestSource` names them.
  var openGuestSourceCount: Int { @inline(__always) get { guestSourceCount } }
  @inline(__always)
  func guestSource(_ place: Int) -> Int { Int(guestSources[place]) }

  mutating func beginPassing(_ source: Int) { sources[source]!.beginPassing(upTo: framesOfTurnMax) }

  /// The addresses of the next frame that could go to another guest at once.
  mutating func nextAddresses(_ source: Int) -> FrameAddresses? { sources[source]!.nextAddresses() }

  /// Copies the next frames with these addresses to a guest; the next `collect` shows them to it.
  mutating func pass(
    _ source: Int, _ addresses: FrameAddresses, frameBytesMax: Int, to lane: Int
  ) -> PassedFrames {
    let passed = sources[source]!.pass(addresses, frameBytesMax: frameBytesMax, to: &lanes[lane]!)
    framesTaken += passed.frames
    return passed
  }

  /// What was not passed on is there for `collect`.
  mutating func endPassing(_ source: Int) { sources[source]!.endPassing() }

  /// Shows a guest what was copied for it, and calls it if it wants that.
  private mutating func publish(_ lane: Int) {
    if lanes[lane]!.publish() { kernel.call(laneNotes[lane].call) }
  }

  mutating func awaitWritable(_ lane: Int) {
    guard isGuest(lane: lane) else { return kernel.awaitWritable(lane) }
    awaitsWritable[lane] = true
    awaitCount += 1
    let now = kernel.now()
    stuckFrom[lane] = now + min(patienceNanoseconds, (now - stuckAt[lane]) / Self.patienceShare)
    patientCount += 1
  }

  private mutating func endAwaiting(_ lane: Int) {
    awaitsWritable[lane] = false
    awaitCount -= 1
    if stuckFrom[lane] != .max { patientCount -= 1 }
  }

  // MARK: Collecting

  @inline(__always)
  mutating func collect(_ wait: Wait, _ memory: inout FrameMemory, into events: inout EventBatch) {
    guard guestSourceCount + guestLaneCount > 0 else { return kernel.collect(wait, &memory, into: &events) }
    collectWithGuests(wait, &memory, into: &events)
  }

  @inline(never)
  private mutating func collectWithGuests(_ wait: Wait, _ memory: inout FrameMemory, into events: inout EventBatch) {
    var wait = wait
    for place in 0..<guestLaneCount { publish(Int(guestLanes[place])) }
    for place in 0..<guestSourceCount {
      let source = Int(guestSources[place])
      if sources[source]!.giveBack() { kernel.call(sourceNotes[source].call) }
      if sources[source]!.mustEndKicks() { kernel.cancel(source) }
      if sources[source]!.isOver() { wait = .sweep }
    }
    if wait == .forEvent {
      if mustPoll {
        wait = .atMost(nanoseconds: Self.pollNanoseconds)
      } else if patientCount > 0 {
        wait = .atMost(nanoseconds: patienceLeft)
      }
    }
    if resultCount > 0 { wait = .sweep }
    let asksForKicks = wait != .sweep
    if asksForKicks, askForKicks() { wait = .sweep }
    let before = events.count
    kernel.collect(wait, &memory, into: &events)
    if asksForKicks { refuseKicks() }
    keepEndsOfKicks(from: before, &events)
    tellResults(&events)
    for place in 0..<guestSourceCount where events.room > 1 {
      let source = Int(guestSources[place])
      // After a wait there may be more; else what was passed on a moment ago was all.
      if asksForKicks || !sources[source]!.wasEmptied() {
        let count = sources[source]!.poll(source, upTo: min(framesOfTurnMax, events.room - 1), into: &events)
        framesTaken += count
        memory.brought(count, of: Int(owners[source]))
      }
      if let error = sources[source]!.takeEnd() { events.append(IOEvent(.receiveEnded, source, error: error)) }
    }
  }

  /// Whether something is to be awaited of a guest that cannot kick.
  private var mustPoll: Bool {
    for place in 0..<guestSourceCount where !sourceNotes[Int(guestSources[place])].hasKick { return true }
    for place in 0..<guestLaneCount {
      let lane = Int(guestLanes[place])
      if awaitsWritable[lane], !laneNotes[lane].hasKick { return true }
    }
    return false
  }

  /// Until the next lane is to be told of, in nanoseconds, at least 1.
  private var patienceLeft: Int {
    var next = UInt64.max
    for place in 0..<guestLaneCount {
      let lane = Int(guestLanes[place])
      if awaitsWritable[lane] { next = min(next, stuckFrom[lane]) }
    }
    let now = kernel.now()
    return next > now ? Int(next - now) : 1
  }

  private mutating func askForKicks() -> Bool {
    var isThere = false
    for place in 0..<guestSourceCount where sources[Int(guestSources[place])]!.askForKicks() { isThere = true }
    for place in 0..<guestLaneCount {
      let lane = Int(guestLanes[place])
      if awaitsWritable[lane], lanes[lane]!.askForKicks() { isThere = true }
    }
    return isThere
  }

  private mutating func refuseKicks() {
    for place in 0..<guestSourceCount { sources[Int(guestSources[place])]!.refuseKicks() }
    for place in 0..<guestLaneCount {
      let lane = Int(guestLanes[place])
      if awaitsWritable[lane] { lanes[lane]!.refuseKicks() }
    }
  }

  /// The end of a kick's receive is not yet the end of its ring.
  private mutating func keepEndsOfKicks(from first: Int, _ events: inout EventBatch) {
    var kept = first
    for place in first..<events.count {
      let event = events[place]
      if event.kind == .receiveEnded, sourceNotes[Int(event.index)].isGuest {
        sources[Int(event.index)]!.kickEnded(event.error)
        continue
      }
      if kept != place { events[kept] = event }
      kept += 1
    }
    while events.count > kept { events.removeLast() }
  }

  private mutating func tellResults(_ events: inout EventBatch) {
    guard resultCount + awaitCount > 0 else { return }
    let now = patientCount > 0 ? kernel.now() : 0
    for place in 0..<guestLaneCount where events.room > 0 {
      let lane = Int(guestLanes[place])
      if results[lane].isThere {
        var event = IOEvent(.sent, lane, error: results[lane].error)
        event.count = results[lane].sent
        results[lane] = DeliveryResult()
        resultCount -= 1
        events.append(event)
      } else if awaitsWritable[lane] {
        if lanes[lane]!.hasBuffers() {
          endAwaiting(lane)
          events.append(IOEvent(.writable, lane))
        } else if stuckFrom[lane] <= now {
          stuckFrom[lane] = .max
          stuckAt[lane] = now
          patientCount -= 1
          events.append(IOEvent(.stuck, lane))
        }
      }
    }
  }

  mutating func takeStatistics() -> IOStatistics {
    var statistics = kernel.takeStatistics()
    statistics.completions += framesTaken
    framesTaken = 0
    return statistics
  }

  func now() -> UInt64 { kernel.now() }
  mutating func wake(_ waker: Int32) { kernel.wake(waker) }
  func yieldProcessor() { kernel.yieldProcessor() }
}

/// What a chain of sends to a guest came to.
struct DeliveryResult: BitwiseCopyable {
  var isThere = false
  var sent: UInt32 = 0
  var error: Int32 = 0
}

/// What there is to know of a source's or lane's ring without looking into it.
struct GuestNote: BitwiseCopyable {
  var isGuest = false
  var hasKick = false
  /// The eventfd that the guest waits for; -1: none.
  var call: Int32 = -1
}
