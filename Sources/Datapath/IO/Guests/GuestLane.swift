import CLinux
import Glibc

/// A ring that a guest receives by, as the worker that sends to it has it.
@safe
struct GuestLane: ~Copyable {
  /// Buffers of one frame: 64 KiB in buffers of 512 bytes.
  private static var buffersMax: Int { 128 }

  private let ring: GuestRing.Reference
  private let memory: GuestMemory.Reference
  private let mergesBuffers: Bool
  /// Whether the guest waits for an eventfd.
  private let hasCall: Bool
  private var queue: GuestQueue
  private var chain = VirtioChain()
  /// Buffers in one piece that were taken before frames for them are there, so that their lines are on the way.
  private var singles = VirtioSingles()
  /// The next one to use.
  private var nextSingle = 0
  /// Where a frame's pieces are listed that goes into several buffers.
  private var pieces: FixedArray<iovec>
  private var headerWords: FixedArray<UInt64>
  /// Whether buffers were completed that the guest does not see yet.
  private var hasCompleted = false
  private var tokens: FixedArray<VirtioChain.Token>
  private var written: FixedArray<UInt32>
  /// What a frame that found too few buffers needs at least; 0: nothing waits.
  private var buffersWanted = 0

  init(
    _ ring: GuestRing.Reference, _ queue: consuming GuestQueue, mergesBuffers: Bool, memory: GuestMemory.Reference,
    hasCall: Bool
  ) {
    self.ring = ring
    self.queue = queue
    self.mergesBuffers = mergesBuffers
    self.memory = memory
    self.hasCall = hasCall
    tokens = FixedArray(repeating: chain.token, count: Self.buffersMax)
    written = FixedArray(repeating: 0, count: Self.buffersMax)
    unsafe pieces = unsafe FixedArray(repeating: iovec(), count: 1 + ForeignMemory.segmentsMax)
    headerWords = FixedArray(repeating: 0, count: 2)
    self.queue.refuseKicks(memory)
  }

  /// Copies a frame, `header` before it, where a buffer in one piece has room for both, or several have.
  /// - Returns: whether it did; if not, nothing was taken.
  @inline(__always)
  mutating func deliver(
    _ header: SendPool.Header, _ frame: Descriptor, _ frames: borrowing FrameMemory
  ) -> Bool {
    guard let buffer = nextBuffer(frameBytes: Int(frame.length)) else { return deliverPieces(header, frame, frames) }
    unsafe Self.writeHeader(header, to: buffer.place)
    unsafe frames.copy(frame, to: buffer.place + OffloadHeader.bytes)
    finish(buffer, frameBytes: Int(frame.length))
    return true
  }

  /// Copies a plain frame that lies in one piece of another guest's memory into a buffer that has room for it.
  /// - Parameters:
  ///   - addresses: its first bytes, as they were read; they are not read again.
  ///   - frame: `frameBytes`, at least as many as `addresses` has.
  /// - Returns: whether it did; if not, nothing was taken.
  @unsafe @inline(__always)
  mutating func deliver(_ addresses: FrameAddresses, _ frame: UnsafeRawPointer, frameBytes: Int) -> Bool {
    guard let buffer = nextBuffer(frameBytes: frameBytes) else { return false }
    unsafe Self.writeHeader(SendPool.Header(count: OffloadHeader.bytes), to: buffer.place)
    let place = unsafe buffer.place + OffloadHeader.bytes
    unsafe addresses.write(to: place)
    unsafe clinux_copy(
      place + FrameAddresses.bytes, frame + FrameAddresses.bytes, frameBytes &- FrameAddresses.bytes)
    finish(buffer, frameBytes: frameBytes)
    return true
  }

  /// The next buffer, in one piece; nil where there is none, or it has no room for a frame of so many bytes.
  @inline(__always)
  private mutating func nextBuffer(frameBytes: Int) -> VirtioSingle? {
    if nextSingle == singles.count { takeSingles() }
    guard nextSingle < singles.count else { return nil }
    let single = singles[nextSingle]
    guard single.isWritable, OffloadHeader.bytes &+ frameBytes <= Int(single.bytes) else { return nil }
    nextSingle &+= 1
    return single
  }

  /// Of a frame in one buffer. The last two bytes are num_buffers (virtio 1.2 §5.1.6.4): 1, whether buffers merge or
  /// not.
  @unsafe @inline(__always)
  private static func writeHeader(_ header: SendPool.Header, to place: UnsafeMutableRawPointer) {
    unsafe place.storeBytes(of: header.first, as: UInt64.self)
    unsafe place.storeBytes(
      of: UInt32(truncatingIfNeeded: header.second) & 0xFFFF | 1 << 16, toByteOffset: 8, as: UInt32.self)
  }

  @inline(__always)
  private mutating func finish(_ buffer: VirtioSingle, frameBytes: Int) {
    let bytes = OffloadHeader.bytes &+ frameBytes
    buffer.markDirty(memory, bytes: bytes)
    queue.complete(buffer.token, writtenBytes: bytes)
    hasCompleted = true
  }

  private mutating func takeSingles() {
    nextSingle = 0
    _ = queue.take(memory, upTo: VirtioSingles.countMax, into: &singles)
  }

  private mutating func giveBackSingles() {
    if nextSingle < singles.count { queue.giveBack(last: singles.count - nextSingle) }
    singles.count = 0
    nextSingle = 0
  }

  /// The same for any buffers and any frame.
  @inline(never)
  private mutating func deliverPieces(
    _ header: SendPool.Header, _ frame: Descriptor, _ frames: borrowing FrameMemory
  ) -> Bool {
    headerWords[0] = header.first
    headerWords[1] = header.second
    unsafe pieces[0] = unsafe iovec(iov_base: headerWords.address(of: 0), iov_len: OffloadHeader.bytes)
    guard let count = unsafe frames.vectors(of: frame, into: pieces.address(of: 1), room: pieces.count - 1) else {
      return false
    }
    let bytes = OffloadHeader.bytes + Int(frame.length)
    return unsafe deliver(pieces.address(of: 0), count: 1 + count, bytes: bytes) == 0
  }

  /// Copies one message, a virtio header and a frame, into buffers of the guest.
  /// - Returns: 0; EAGAIN where the guest has too few; `IOEvent.shortWrite` where no buffer of it would do; EPROTO
  ///   where it broke the rules.
  @unsafe
  mutating func deliver(_ pieces: UnsafeMutablePointer<iovec>, count pieceCount: Int, bytes: Int) -> Int32 {
    giveBackSingles()
    let start = queue.mark
    var from = unsafe PieceReader(pieces, count: pieceCount)
    var left = bytes
    var count = 0
    var countPlace: UnsafeMutableRawPointer?
    var countAddress: UInt64 = 0
    while left > 0 {
      guard count < (mergesBuffers ? Self.buffersMax : 1) else { return refuse(start, IOEvent.shortWrite) }
      switch queue.next(memory, into: &chain) {
      case .chain: break
      case .none:
        buffersWanted = count + 1
        return refuse(start, EAGAIN)
      case .broken: return refuse(start, EPROTO)
      }
      // The header lies in one piece, as every driver has it.
      if count == 0 {
        guard chain.writableCount > 0, unsafe chain.writable[0].iov_len >= OffloadHeader.bytes else {
          return refuse(start, IOEvent.shortWrite)
        }
        unsafe countPlace = unsafe chain.writable[0].iov_base + 10
        countAddress = chain.writableAddress + 10
      }
      let room = min(left, chain.writableBytes)
      guard room > 0 else { return refuse(start, EPROTO) }
      unsafe from.copy(room, to: chain.writable)
      chain.markDirty(memory, bytes: room)
      tokens[count] = chain.token
      written[count] = UInt32(truncatingIfNeeded: room)
      count += 1
      left -= room
    }
    // num_buffers (virtio 1.2 §5.1.6.4), little-endian as this machine is; 1 where buffers do not merge.
    unsafe countPlace?.storeBytes(of: UInt16(truncatingIfNeeded: count).littleEndian, as: UInt16.self)
    // Only what is marked after it was written is sure to migrate.
    if memory.isLogged { memory.markDirty(countAddress, bytes: 2) }
    for place in 0..<count { queue.complete(tokens[place], writtenBytes: Int(written[place])) }
    hasCompleted = true
    return 0
  }

  private mutating func refuse(_ start: VirtqueueMark, _ error: Int32) -> Int32 {
    queue.rewind(to: start)
    return error
  }

  /// Lets the guest see what was delivered; returns whether it is to be called.
  mutating func publish() -> Bool {
    guard hasCompleted else { return false }
    hasCompleted = false
    queue.publish(memory)
    return hasCall && queue.mustCall()
  }

  /// Whether there are as many buffers as the frame that waits needs at least.
  mutating func hasBuffers() -> Bool {
    giveBackSingles()
    let start = queue.mark
    var count = 0
    while count < buffersWanted {
      switch queue.next(memory, into: &chain) {
      case .chain: count += 1
      case .none:
        queue.rewind(to: start)
        return false
      case .broken:
        // The frame that waits is told.
        queue.rewind(to: start)
        return true
      }
    }
    queue.rewind(to: start)
    return true
  }

  /// Asks for kicks, for a frame waits; true when there is something already.
  mutating func askForKicks() -> Bool { queue.askForKicks(memory) && hasBuffers() }
  mutating func refuseKicks() { queue.refuseKicks(memory) }

  /// The worker lets go of it.
  mutating func leave() {
    giveBackSingles()
    let base = queue.base
    unsafe ring.ring._withUnsafeGuaranteedRef { $0.base = base }
  }
}

/// Goes through the pieces of a message, for copying.
@safe
struct PieceReader {
  private let pieces: UnsafeMutablePointer<iovec>
  private let count: Int
  private var piece = 0
  private var offset = 0

  @unsafe
  init(_ pieces: UnsafeMutablePointer<iovec>, count: Int) {
    unsafe self.pieces = unsafe pieces
    self.count = count
  }

  /// Copies the next `bytes` to pieces that have room for them; traps where there are fewer left.
  @unsafe @inline(__always)
  mutating func copy(_ bytes: Int, to places: UnsafeBufferPointer<iovec>) {
    var left = bytes
    var place = 0
    var placeOffset = 0
    while left > 0 {
      precondition(piece < count && place < places.count, "a message is copied that is longer than its pieces")
      let from = unsafe pieces[piece]
      let to = unsafe places[place]
      let run = unsafe min(left, from.iov_len - offset, to.iov_len - placeOffset)
      unsafe (to.iov_base + placeOffset).copyMemory(from: from.iov_base + offset, byteCount: run)
      left -= run
      offset += run
      placeOffset += run
      if unsafe offset == from.iov_len {
        piece += 1
        offset = 0
      }
      if unsafe placeOffset == to.iov_len {
        place += 1
        placeOffset = 0
      }
    }
  }
}
