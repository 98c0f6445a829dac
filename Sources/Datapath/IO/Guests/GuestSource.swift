import CLinux
import Glibc

/// A ring that a guest transmits by, as the worker that polls it has it.
///
/// The way of a chain: `poll` takes it and makes a frame under way of it; `giveBack` returns it when nobody uses its
/// bytes any more.
struct GuestSource: ~Copyable {
  private let ring: GuestRing.Reference
  private let memory: GuestMemory.Reference
  private let frames: ForeignMemory.Reference
  /// The frames' owner, for the worker's memory.
  private let owner: Int
  /// Whether the guest waits for an eventfd.
  private let hasCall: Bool
  private var queue: GuestQueue
  private var chain = VirtioChain()
  /// By frame under way, what names its chain.
  private var tokens: FixedArray<VirtioChain.Token>
  private var free: FixedArray<UInt32>
  private var freeCount: Int
  private var end: GuestRingEnd

  init(
    _ ring: GuestRing.Reference, _ queue: consuming GuestQueue, frames: ForeignMemory.Reference, count: Int, owner: Int,
    memory: GuestMemory.Reference, hasCall: Bool, hasKick: Bool
  ) {
    self.ring = ring
    self.queue = queue
    self.frames = frames
    self.owner = owner
    self.memory = memory
    self.hasCall = hasCall
    tokens = FixedArray(repeating: chain.token, count: count)
    free = FixedArray(repeating: 0, count: count)
    for index in 0..<count { free[index] = UInt32(count - 1 - index) }
    freeCount = count
    end = GuestRingEnd(isKickEnded: !hasKick)
    self.queue.refuseKicks(memory)
  }

  /// Takes what the guest made available, up to `most` frames.
  mutating func poll(_ source: Int, upTo most: Int, into events: inout EventBatch) -> Int {
    guard !end.hasBegun else { return 0 }
    var taken = 0
    while taken < most, freeCount > 0 {
      switch queue.next(memory, into: &chain) {
      case .none: return taken
      case .broken:
        end.begin(EPROTO)
        return taken
      case .chain: break
      }
      freeCount -= 1
      let index = Int(free[freeCount])
      tokens[index] = chain.token
      var event = IOEvent(.received, source)
      event.slot = UInt32(truncatingIfNeeded: index)
      event.owner = UInt16(truncatingIfNeeded: owner)
      event.length = UInt32(clamping: chain.readableBytes)
      if let segments = unsafe frames.bring(index, payload: chain.readable) {
        event.count = UInt32(truncatingIfNeeded: segments)
      } else {
        event.isTruncated = true
      }
      events.append(event)
      taken += 1
    }
    return taken
  }

  /// Gives chains back whose frames are over; returns whether the guest is to be called.
  mutating func giveBack() -> Bool {
    var hasSome = false
    while let index = frames.takeReturned() {
      queue.complete(tokens[index], writtenBytes: 0)
      free[freeCount] = UInt32(truncatingIfNeeded: index)
      freeCount += 1
      hasSome = true
    }
    guard hasSome else { return false }
    queue.publish(memory)
    return queue.mustCall() && hasCall
  }

  /// Asks for kicks; true when there is something already.
  mutating func askForKicks() -> Bool { !end.hasBegun && queue.askForKicks(memory) }
  mutating func refuseKicks() { if !end.hasBegun { queue.refuseKicks(memory) } }

  mutating func beginEnd(_ error: Int32) { end.begin(error) }
  /// Whether the receive of its kicks is to be ended, once.
  mutating func mustEndKicks() -> Bool { end.mustEndKicks() }
  /// A kick came; whether it was the last, for the ring ends: a kick that comes with its end is not cancelled any more.
  mutating func endsWithKick() -> Bool {
    if end.hasBegun { end.isKickEnded = true }
    return end.hasBegun
  }
  mutating func kickEnded(_ error: Int32) {
    end.isKickEnded = true
    end.begin(error)
  }

  /// The error that it ended with, once, when no frame of it is under way.
  mutating func takeEnd() -> Int32? {
    guard queue.takenCount == 0, let error = end.take() else { return nil }
    unsafe ring.ring._withUnsafeGuaranteedRef { $0.base = queue.base }
    return error
  }
}

/// How a ring ends: somebody asks for it or the guest breaks the rules; then its kicks end; then its last frame.
struct GuestRingEnd: BitwiseCopyable {
  private var error: Int32?
  var isKickEnded: Bool
  private var isTold = false
  private var areKicksEnding = false

  init(isKickEnded: Bool) { self.isKickEnded = isKickEnded }

  var hasBegun: Bool { error != nil }

  mutating func begin(_ error: Int32) { if self.error == nil { self.error = error } }

  mutating func mustEndKicks() -> Bool {
    guard hasBegun, !isKickEnded, !areKicksEnding else { return false }
    areKicksEnding = true
    return true
  }

  mutating func take() -> Int32? {
    guard isKickEnded, !isTold, let error else { return nil }
    isTold = true
    return error
  }
}
