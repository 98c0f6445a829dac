import CLinux
import Datapath

/// A guest's memory with a ring in it: a byte of choices, one of the ring's size, then the memory from its start on.
/// Choices: bit 0 a packed ring; bit 1 event indices; bit 2 indirect descriptors; bit 3 chains come back in order; bit
/// 4 chains in flight are noted, and another device goes on when the first one is gone; bit 5 the notes begin as the
/// second half of the guest's memory, as a frontend might write them.
///
/// The guest has 4096 bytes at address 0, in two regions that lie apart with us. The descriptors are at its start, what
/// the driver writes at 1024, what the device writes at 1280.
public func fuzzVirtqueue(_ input: RawSpan) {
  guard input.byteCount >= 2 else { return }
  let choices = byte(0, of: input)
  let size = Int(byte(1, of: input)) % 64 + 1
  var features: VirtqueueFeatures = []
  if choices & 2 != 0 { features.insert(.eventIndex) }
  if choices & 4 != 0 { features.insert(.indirectDescriptors) }
  if choices & 8 != 0 { features.insert(.inOrder) }
  let content = input.extracting(droppingFirst: 2)
  let guest = FuzzGuest(content)
  if choices & 1 != 0 {
    features.insert(.packedRing)
    let notes = choices & 16 == 0 ? nil : FuzzNotes(PackedQueue.inFlightBytes(size: size))
    if choices & 32 != 0 { notes?.fill(content) }
    use(PackedQueue.self, guest, size: size, features, base: 0x8000, notes)
  } else {
    let notes = choices & 16 == 0 ? nil : FuzzNotes(SplitQueue.inFlightBytes(size: size))
    if choices & 32 != 0 { notes?.fill(content) }
    use(SplitQueue.self, guest, size: size, features, base: 0, notes)
  }
}

/// One device, or, with notes, two of which the second goes on where the first one left: with all chains that the first
/// did not give back.
private func use<Queue: Virtqueue & ~Copyable>(
  _: Queue.Type, _ guest: FuzzGuest, size: Int, _ features: VirtqueueFeatures, base: UInt32, _ notes: FuzzNotes?
) {
  let keepsOrder = features.contains(.inOrder)
  guard var queue = try? Queue(guest.areas(size), features: features, base: base) else { return }
  guard let notes else {
    _ = use(queue, guest, keepsOrder: keepsOrder)
    return
  }
  guard let left = unsafe try? queue.trackInFlight(notes.region) else {
    precondition(notes.isFilled, "empty notes are those of any ring")
    return
  }
  precondition(left <= size && (left == 0 || notes.isFilled))
  let (out, hasTwice) = use(queue, guest, keepsOrder: keepsOrder)
  guard var next = try? Queue(guest.areas(size), features: features, base: base) else { return }
  guard let again = unsafe try? next.trackInFlight(notes.region) else {
    preconditionFailure("notes that were just written are damaged")
  }
  precondition(again == out || hasTwice || notes.isFilled, "chains in flight are taken up again, all of them")
  _ = use(next, guest, keepsOrder: keepsOrder)
}

/// Takes chains, gives some back, completes the others, in order or out of it: every piece lies within the guest's
/// memory, and what is taken again is what was taken before.
/// - Returns: how many were taken and not completed; and whether the guest made one available while the device had it,
///   of which a split ring's notes know once.
private func use<Queue: Virtqueue & ~Copyable>(
  _ given: consuming Queue, _ guest: FuzzGuest, keepsOrder: Bool
) -> (out: Int, hasTwice: Bool) {
  var queue = given
  let memory = guest.memory.reference
  var chain = VirtioChain()
  var singles = VirtioSingles()
  var tokens: [VirtioChain.Token] = []
  var hasTwice = false
  func add(_ token: VirtioChain.Token) {
    hasTwice = hasTwice || tokens.contains(token)
    tokens.append(token)
  }
  for turn in 0..<2 * queue.size {
    let mark = queue.mark
    let base = queue.base
    let result = queue.next(memory, into: &chain)
    guard result == .chain else {
      precondition(queue.base == base, "what is not taken moves nothing")
      break
    }
    guest.check(chain)
    if turn % 3 == 0 {
      let token = chain.token
      let bytes = (chain.readableBytes, chain.writableBytes)
      queue.rewind(to: mark)
      precondition(queue.base == base, "what is given back leaves no trace")
      let again = queue.next(memory, into: &chain)
      precondition(again == .chain && chain.token == token, "what is given back is next")
      precondition((chain.readableBytes, chain.writableBytes) == bytes)
    }
    add(chain.token)
    if turn % 5 == 4 {
      _ = queue.take(memory, upTo: turn, into: &singles)
      for index in 0..<singles.count {
        guest.check(singles[index])
        add(singles[index].token)
      }
      let count = singles.count - singles.count / 2
      queue.giveBack(last: count)
      tokens.removeLast(count)
    }
    precondition(queue.takenCount == tokens.count && tokens.count <= queue.size)
    if turn % 4 == 3 {
      // Which changes what the guest wrote, where that overlaps.
      if keepsOrder { tokens.reverse() }
      while let token = tokens.popLast() { queue.complete(token, writtenBytes: turn) }
      queue.publish(memory)
      _ = queue.mustCall()
      _ = queue.askForKicks(memory)
      queue.refuseKicks(memory)
    }
  }
  return (tokens.count, hasTwice)
}

/// Notes of chains in flight, in memory that the address sanitizer watches.
@safe
private final class FuzzNotes {
  let region: UnsafeMutableRawPointer
  private let bytes: Int
  private(set) var isFilled = false

  init(_ bytes: Int) {
    self.bytes = bytes
    unsafe region = .allocate(byteCount: bytes, alignment: 64)
    unsafe region.initializeMemory(as: UInt8.self, repeating: 0, count: bytes)
  }

  deinit { unsafe region.deallocate() }

  func fill(_ content: RawSpan) {
    isFilled = true
    for index in 0..<max(0, min(bytes, content.byteCount - 2048)) {
      unsafe region.storeBytes(of: byte(2048 + index, of: content), toByteOffset: index, as: UInt8.self)
    }
  }
}

/// The guest's memory: two allocations, so that the address sanitizer sees one byte too far.
@safe
private final class FuzzGuest {
  private static let bytes = 4096
  private let low = UnsafeMutableRawPointer.allocate(byteCount: bytes / 2, alignment: 16)
  private let high = UnsafeMutableRawPointer.allocate(byteCount: bytes / 2, alignment: 16)
  let memory: GuestMemory

  init(_ content: RawSpan) {
    let half = UInt64(Self.bytes / 2)
    unsafe low.initializeMemory(as: UInt8.self, repeating: 0, count: Self.bytes / 2)
    unsafe high.initializeMemory(as: UInt8.self, repeating: 0, count: Self.bytes / 2)
    for index in 0..<min(content.byteCount, Self.bytes) {
      let half = unsafe index < Self.bytes / 2 ? low : high
      unsafe half.storeBytes(of: byte(index, of: content), toByteOffset: index % (Self.bytes / 2), as: UInt8.self)
    }
    let regions = unsafe [
      GuestMemory.Region(guestAddress: 0, userAddress: 0, bytes: half, mapping: low),
      GuestMemory.Region(guestAddress: half, userAddress: half, bytes: half, mapping: high),
    ]
    do { memory = try GuestMemory(regions) } catch { preconditionFailure("no memory: \(error)") }
  }

  deinit {
    unsafe low.deallocate()
    unsafe high.deallocate()
  }

  func areas(_ size: Int) -> VirtqueueAreas {
    unsafe VirtqueueAreas(size: size, descriptor: low, driver: low + 1024, device: low + 1280)
  }

  func check(_ chain: borrowing VirtioChain) {
    let bytes = unsafe check(chain.readable) + check(chain.writable)
    precondition(bytes == chain.readableBytes + chain.writableBytes)
  }

  func check(_ single: VirtioSingle) {
    let start = unsafe UInt(bitPattern: single.place)
    let isWithin = unsafe isWithin(start, UInt(single.bytes), of: low) || isWithin(start, UInt(single.bytes), of: high)
    precondition(single.bytes > 0 && isWithin, "a chain of one piece lies within the guest's memory")
  }

  private func check(_ pieces: UnsafeBufferPointer<iovec>) -> Int {
    var bytes = 0
    for index in pieces.indices {
      let start = unsafe UInt(bitPattern: pieces[index].iov_base)
      let count = unsafe UInt(pieces[index].iov_len)
      let isWithin = unsafe isWithin(start, count, of: low) || isWithin(start, count, of: high)
      precondition(count > 0 && isWithin, "a piece lies within the guest's memory")
      bytes += Int(count)
    }
    return bytes
  }

  private func isWithin(_ start: UInt, _ count: UInt, of half: UnsafeMutableRawPointer) -> Bool {
    let offset = start &- UInt(bitPattern: half)
    let bytes = UInt(Self.bytes / 2)
    return offset < bytes && count <= bytes - offset
  }
}
