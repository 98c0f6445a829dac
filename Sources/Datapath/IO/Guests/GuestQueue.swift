/// A ring of either kind.
struct GuestQueue: ~Copyable {
  private var split: SplitQueue?
  private var packed: PackedQueue?

  init(_ ring: borrowing GuestRing) throws(VirtqueueError) {
    if ring.features.contains(.packedRing) {
      split = nil
      var queue = try PackedQueue(ring.areas, features: ring.features, base: ring.base)
      if let region = unsafe ring.inFlight { _ = unsafe try queue.trackInFlight(region) }
      packed = consume queue
    } else {
      var queue = try SplitQueue(ring.areas, features: ring.features, base: ring.base)
      if let region = unsafe ring.inFlight { _ = unsafe try queue.trackInFlight(region) }
      split = consume queue
      packed = nil
    }
    if split != nil { split!.logWrites(ring.logAddresses) } else { packed!.logWrites(ring.logAddresses) }
  }

  @inline(__always)
  mutating func next(_ memory: GuestMemory.Reference, into chain: inout VirtioChain) -> VirtqueueResult {
    if split != nil { return split!.next(memory, into: &chain) }
    return packed!.next(memory, into: &chain)
  }

  @inline(__always)
  mutating func take(
    _ memory: GuestMemory.Reference, upTo most: Int, into singles: inout VirtioSingles
  ) -> Bool {
    if split != nil { return split!.take(memory, upTo: most, into: &singles) }
    return packed!.take(memory, upTo: most, into: &singles)
  }

  mutating func giveBack(last count: Int) {
    if split != nil { split!.giveBack(last: count) } else { packed!.giveBack(last: count) }
  }

  @inline(__always)
  var mark: VirtqueueMark { read({ $0.mark }, { $0.mark }) }
  var takenCount: Int { read({ $0.takenCount }, { $0.takenCount }) }
  var base: UInt32 { read({ $0.base }, { $0.base }) }

  @inline(__always)
  private borrowing func read<Value>(
    _ ofSplit: (borrowing SplitQueue) -> Value, _ ofPacked: (borrowing PackedQueue) -> Value
  ) -> Value {
    switch split {
    case .some(let queue): return ofSplit(queue)
    case .none: break
    }
    switch packed {
    case .some(let queue): return ofPacked(queue)
    case .none: preconditionFailure("a ring is neither split nor packed")
    }
  }

  mutating func rewind(to mark: VirtqueueMark) {
    if split != nil { split!.rewind(to: mark) } else { packed!.rewind(to: mark) }
  }

  @inline(__always)
  mutating func complete(_ token: VirtioChain.Token, writtenBytes: Int) {
    if split != nil {
      split!.complete(token, writtenBytes: writtenBytes)
    } else {
      packed!.complete(token, writtenBytes: writtenBytes)
    }
  }

  @inline(__always)
  mutating func publish(_ memory: GuestMemory.Reference) {
    if split != nil { split!.publish(memory) } else { packed!.publish(memory) }
  }

  @inline(__always)
  mutating func mustCall() -> Bool { split != nil ? split!.mustCall() : packed!.mustCall() }

  mutating func askForKicks(_ memory: GuestMemory.Reference) -> Bool {
    split != nil ? split!.askForKicks(memory) : packed!.askForKicks(memory)
  }

  mutating func refuseKicks(_ memory: GuestMemory.Reference) {
    if split != nil { split!.refuseKicks(memory) } else { packed!.refuseKicks(memory) }
  }
}
