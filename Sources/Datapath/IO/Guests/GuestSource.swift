import CLinux
import Glibc

/// A ring that a guest transmits by, as the worker that polls it has it.
///
/// The way of a frame that may go to another guest at once: `beginPassing`, `pass`, `endPassing`.
///
/// The way of any other chain: `poll` takes it and makes a frame under way of it; `giveBack` returns it when nobody
/// uses its bytes any more. Of a small frame the first bytes, which are copied, are all: its chain goes back at once.
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
  private var singles = VirtioSingles()
  /// The next of them to pass on.
  private var nextSingle = 0
  private var passedOfTurn = 0
  /// Turns that it is not tried in, as what comes does not go to guests.
  private var pause: UInt8 = 0
  private static let pauseTurns: UInt8 = 15
  /// Whether all that was there a moment ago was passed on.
  private var isEmptied = false
  /// By frame under way, what names its chain; or where that stands in the order.
  private var tokens: FixedArray<VirtioChain.Token>
  private var turns: FixedArray<UInt32>
  /// Where chains go back in the order in which they came: those that may not yet.
  private var order: ChainOrder
  private let keepsOrder: Bool
  /// By frame under way, whether its chain went back already.
  private var isCopied: FixedArray<Bool>
  private var free: FixedArray<UInt32>
  private var freeCount: Int
  /// Whether chains were completed that the guest does not see yet.
  private var hasCompleted = false
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
    turns = FixedArray(repeating: 0, count: count)
    keepsOrder = unsafe ring.ring._withUnsafeGuaranteedRef { $0.keepsOrder }
    let chainsMax = unsafe ring.ring._withUnsafeGuaranteedRef { $0.areas.size }
    order = ChainOrder(capacity: keepsOrder ? chainsMax : 0, filler: chain.token)
    isCopied = FixedArray(repeating: false, count: count)
    free = FixedArray(repeating: 0, count: count)
    for index in 0..<count { free[index] = UInt32(count - 1 - index) }
    freeCount = count
    end = GuestRingEnd(isKickEnded: !hasKick)
    self.queue.refuseKicks(memory)
  }

  // MARK: Frames that go to another guest at once

  /// Takes frames in one piece to look at. What `pass` leaves of them `endPassing` gives back, and `poll` takes it.
  mutating func beginPassing(upTo most: Int) {
    nextSingle = 0
    singles.count = 0
    passedOfTurn = 0
    isEmptied = false
    guard pause == 0 else {
      pause -= 1
      return
    }
    guard !end.hasBegun else { return }
    isEmptied = !queue.take(memory, upTo: most, into: &singles)
  }

  /// The addresses of the next frame; nil where none is left, or where it asks for more than to be passed on: an
  /// offload, or a word about its length.
  @inline(__always)
  func nextAddresses() -> FrameAddresses? {
    guard nextSingle < singles.count else { return nil }
    return Self.addresses(singles[nextSingle])
  }

  @inline(__always)
  private static func addresses(_ single: VirtioSingle) -> FrameAddresses? {
    guard !single.isWritable, Int(single.bytes) >= OffloadHeader.bytes + FrameAddresses.bytes,
      unsafe OffloadHeader(first: single.place.loadUnaligned(as: UInt64.self), second: 0).isPlain
    else { return nil }
    return unsafe FrameAddresses(single.place + OffloadHeader.bytes)
  }

  /// Copies the next frames that have the same addresses into a lane's buffers, each once. It stops at the first that
  /// it cannot: another's, one that is no plain frame of at most `frameBytesMax`, or one for which there is no buffer.
  mutating func pass(
    _ addresses: FrameAddresses, frameBytesMax: Int, to lane: inout GuestLane
  ) -> PassedFrames {
    var passed = PassedFrames()
    while nextSingle < singles.count {
      let single = singles[nextSingle]
      // Read again, for only what was read now is what the frame is.
      guard let own = Self.addresses(single), own.areSame(as: addresses) else { break }
      let frameBytes = Int(single.bytes) - OffloadHeader.bytes
      guard frameBytes <= frameBytesMax,
        unsafe lane.deliver(own, single.place + OffloadHeader.bytes, frameBytes: frameBytes)
      else { break }
      complete(single.token)
      nextSingle &+= 1
      passed.frames &+= 1
      passed.bytes &+= frameBytes
    }
    return passed
  }

  mutating func endPassing() {
    passedOfTurn = nextSingle
    if nextSingle < singles.count {
      queue.giveBack(last: singles.count - nextSingle)
      isEmptied = false
      if nextSingle == 0 { pause = Self.pauseTurns }
    }
    singles.count = 0
  }

  mutating func wasEmptied() -> Bool { isEmptied }

  // MARK: Frames that go through the stages

  /// Takes what the guest made available, up to `most` frames, those that were passed on in this turn included.
  mutating func poll(_ source: Int, upTo most: Int, into events: inout EventBatch) -> Int {
    guard !end.hasBegun else { return 0 }
    let most = most - passedOfTurn
    passedOfTurn = 0
    var taken = 0
    while true {
      let room = min(most - taken, freeCount)
      guard room > 0 else { break }
      let isLeft = queue.take(memory, upTo: room, into: &singles)
      for place in 0..<singles.count { bring(singles[place], source, into: &events) }
      taken += singles.count
      if isLeft {
        // In more pieces than one, or broken.
        guard taken < most, freeCount > 0, bringNext(source, into: &events) else { break }
        taken += 1
      } else if singles.count < min(room, VirtioSingles.countMax) {
        break
      }
    }
    return taken
  }

  /// A frame that is one piece.
  @inline(__always)
  private mutating func bring(_ single: VirtioSingle, _ source: Int, into events: inout EventBatch) {
    freeCount &-= 1
    let index = Int(free[freeCount])
    let bytes = single.isWritable ? 0 : Int(single.bytes)
    let segments = unsafe frames.bring(index, single.place, bytes: bytes)
    let isCopied = segments == 1
    self.isCopied[index] = isCopied
    if isCopied { complete(single.token) } else { keep(single.token, for: index) }
    var event = IOEvent(.received, source)
    event.slot = UInt32(truncatingIfNeeded: index)
    event.owner = UInt16(truncatingIfNeeded: owner)
    event.length = UInt32(truncatingIfNeeded: bytes)
    event.count = UInt32(truncatingIfNeeded: segments)
    events.append(event)
  }

  /// The next frame, in any number of pieces; false where none is there, or the ring ends.
  private mutating func bringNext(_ source: Int, into events: inout EventBatch) -> Bool {
    switch queue.next(memory, into: &chain) {
    case .none: return false
    case .broken:
      end.begin(EPROTO)
      return false
    case .chain: break
    }
    freeCount -= 1
    let index = Int(free[freeCount])
    keep(chain.token, for: index)
    isCopied[index] = false
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
    return true
  }

  /// Gives a chain back, in its turn.
  @inline(__always)
  private mutating func complete(_ token: VirtioChain.Token) {
    guard order.isEmpty else {
      order.end(order.append(token))
      return
    }
    queue.complete(token, writtenBytes: 0)
    hasCompleted = true
  }

  /// Keeps a chain until its frame is over.
  @inline(__always)
  private mutating func keep(_ token: VirtioChain.Token, for index: Int) {
    if keepsOrder { turns[index] = order.append(token) } else { tokens[index] = token }
  }

  /// Gives chains back whose frames are over; returns whether the guest is to be called.
  mutating func giveBack() -> Bool {
    while let index = frames.takeReturned() {
      if !isCopied[index] {
        if keepsOrder { order.end(turns[index]) } else { complete(tokens[index]) }
      }
      free[freeCount] = UInt32(truncatingIfNeeded: index)
      freeCount += 1
    }
    while let token = order.takeFirstEnded() {
      queue.complete(token, writtenBytes: 0)
      hasCompleted = true
    }
    guard hasCompleted else { return false }
    hasCompleted = false
    queue.publish(memory)
    return hasCall && queue.mustCall()
  }

  /// Asks for kicks; true when there is something already.
  mutating func askForKicks() -> Bool {
    // With no place for another frame it is woken by those that are under way.
    !end.hasBegun && queue.askForKicks(memory) && freeCount > 0
  }
  mutating func refuseKicks() { if !end.hasBegun { queue.refuseKicks(memory) } }

  mutating func beginEnd(_ error: Int32) { end.begin(error) }
  /// Whether the receive of its kicks is to be ended, once.
  mutating func mustEndKicks() -> Bool { end.mustEndKicks() }
  /// A kick came; whether it was the last, for the ring ends: a kick that comes with its end is not cancelled any more.
  mutating func endsWithKick() -> Bool {
    if end.hasBegun { end.isKickEnded = true }
    return end.hasBegun
  }
  /// What is no eventfd may end in ways that would be none of the ring's: the ring ends all the same.
  mutating func kickEnded(_ error: Int32) {
    end.isKickEnded = true
    end.begin(error == ECANCELED ? error : EPROTO)
  }

  /// Whether its end is about to be told: nobody else would wake the worker for it.
  mutating func isOver() -> Bool { end.hasBegun && freeCount == free.count }

  /// The error that it ended with, once, when no frame of it is under way.
  mutating func takeEnd() -> Int32? {
    guard freeCount == free.count, let error = end.take() else { return nil }
    unsafe ring.ring._withUnsafeGuaranteedRef { $0.base = queue.base }
    return error
  }
}

/// Chains in the order in which they were taken, for a ring that they go back to in that order
/// (`GuestRing.keepsOrder`; virtio 1.2 §2.7.9, §2.8.16: VIRTIO_F_IN_ORDER).
struct ChainOrder: ~Copyable {
  private var tokens: FixedArray<VirtioChain.Token>
  private var isEnded: FixedArray<Bool>
  private var first = 0
  private var count = 0

  init(capacity: Int, filler: VirtioChain.Token) {
    tokens = FixedArray(repeating: filler, count: capacity)
    isEnded = FixedArray(repeating: false, count: capacity)
  }

  @inline(__always)
  var isEmpty: Bool { count == 0 }

  /// A chain was taken; returns its place, which is its until it is taken from here. There are no more than the ring
  /// has.
  mutating func append(_ token: VirtioChain.Token) -> UInt32 {
    precondition(count < tokens.count, "more chains are under way than a ring has")
    var place = first + count
    if place >= tokens.count { place -= tokens.count }
    tokens[place] = token
    isEnded[place] = false
    count += 1
    return UInt32(truncatingIfNeeded: place)
  }

  /// Nobody uses a chain any more.
  mutating func end(_ place: UInt32) { isEnded[Int(place)] = true }

  /// The oldest chain, if nobody uses it any more.
  mutating func takeFirstEnded() -> VirtioChain.Token? {
    guard count > 0, isEnded[first] else { return nil }
    defer {
      first = first + 1 == tokens.count ? 0 : first + 1
      count -= 1
    }
    return tokens[first]
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
