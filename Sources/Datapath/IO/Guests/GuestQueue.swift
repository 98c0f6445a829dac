/// A ring of either kind.
struct GuestQueue: ~Copyable {
  /// One of the two has the ring. An optional would be asked, by a call, before every use, and moved for some.
  private var split: OwnedArray<SplitQueue>
  private var packed: OwnedArray<PackedQueue>
  private let isSplit: Bool

  init(_ ring: borrowing GuestRing) throws(VirtqueueError) {
    let isSplit = !ring.features.contains(.packedRing)
    var split = OwnedArray<SplitQueue>(capacity: 1)
    var packed = OwnedArray<PackedQueue>(capacity: 1)
    if isSplit {
      var queue = try SplitQueue(ring.areas, features: ring.features, base: ring.base)
      if let region = unsafe ring.inFlight { _ = unsafe try queue.trackInFlight(region) }
      queue.logWrites(ring.logAddresses)
      split.append(queue)
    } else {
      var queue = try PackedQueue(ring.areas, features: ring.features, base: ring.base)
      if let region = unsafe ring.inFlight { _ = unsafe try queue.trackInFlight(region) }
      queue.logWrites(ring.logAddresses)
      // What a device before began to give back.
      queue.publish(ring.memory.reference)
      packed.append(queue)
    }
    self.split = split
    self.packed = packed
    self.isSplit = isSplit
  }

  @inline(__always)
  mutating func next(_ memory: GuestMemory.Reference, into chain: inout VirtioChain) -> VirtqueueResult {
    isSplit ? split[0].next(memory, into: &chain) : packed[0].next(memory, into: &chain)
  }

  @inline(__always)
  mutating func take(_ memory: GuestMemory.Reference, upTo most: Int, into singles: inout VirtioSingles) -> Bool {
    isSplit
      ? split[0].take(memory, upTo: most, into: &singles) : packed[0].take(memory, upTo: most, into: &singles)
  }

  mutating func giveBack(last count: Int) {
    if isSplit { split[0].giveBack(last: count) } else { packed[0].giveBack(last: count) }
  }

  var mark: VirtqueueMark { isSplit ? split[0].mark : packed[0].mark }
  var base: UInt32 { isSplit ? split[0].base : packed[0].base }

  mutating func rewind(to mark: VirtqueueMark) {
    if isSplit { split[0].rewind(to: mark) } else { packed[0].rewind(to: mark) }
  }

  @inline(__always)
  mutating func complete(_ token: VirtioChain.Token, writtenBytes: Int) {
    if isSplit {
      split[0].complete(token, writtenBytes: writtenBytes)
    } else {
      packed[0].complete(token, writtenBytes: writtenBytes)
    }
  }

  @inline(__always)
  mutating func publish(_ memory: GuestMemory.Reference) {
    if isSplit { split[0].publish(memory) } else { packed[0].publish(memory) }
  }

  @inline(__always)
  mutating func mustCall() -> Bool { isSplit ? split[0].mustCall() : packed[0].mustCall() }

  mutating func askForKicks(_ memory: GuestMemory.Reference) -> Bool {
    isSplit ? split[0].askForKicks(memory) : packed[0].askForKicks(memory)
  }

  mutating func refuseKicks(_ memory: GuestMemory.Reference) {
    if isSplit { split[0].refuseKicks(memory) } else { packed[0].refuseKicks(memory) }
  }
}
