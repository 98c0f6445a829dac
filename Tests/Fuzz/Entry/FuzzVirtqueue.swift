import CLinux
import Datapath

/// A guest's memory with a ring in it: a byte of choices, one of the ring's size, then the memory from its start on.
/// Choices: bit 0 a packed ring; bit 1 event indices; bit 2 indirect descriptors.
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
  let guest = FuzzGuest(input.extracting(droppingFirst: 2))
  if choices & 1 != 0 {
    if let queue = try? PackedQueue(guest.areas(size), features: features, base: 0x8000) { use(queue, guest) }
  } else {
    if let queue = try? SplitQueue(guest.areas(size), features: features, base: 0) { use(queue, guest) }
  }
}

/// Takes chains, gives some back, completes the others out of order: every piece lies within the guest's memory, and
/// what is taken again is what was taken before.
private func use<Queue: Virtqueue & ~Copyable>(_ given: consuming Queue, _ guest: FuzzGuest) {
  var queue = given
  let memory = guest.memory.reference
  var chain = VirtioChain()
  var singles = VirtioSingles()
  var tokens: [VirtioChain.Token] = []
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
    tokens.append(chain.token)
    if turn % 5 == 4 {
      _ = queue.take(memory, upTo: turn, into: &singles)
      for index in 0..<singles.count { guest.check(singles[index]) }
      let keptCount = singles.count / 2
      queue.giveBack(last: singles.count - keptCount)
      for index in 0..<keptCount { tokens.append(singles[index].token) }
    }
    precondition(queue.takenCount == tokens.count && tokens.count <= queue.size)
    if turn % 4 == 3 {
      // Which changes what the guest wrote, where that overlaps.
      while let token = tokens.popLast() { queue.complete(token, writtenBytes: turn) }
      queue.publish(memory)
      _ = queue.mustCall()
      _ = queue.askForKicks(memory)
      queue.refuseKicks(memory)
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
