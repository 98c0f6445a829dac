import CLinux
import Glibc

/// A ring that a guest receives by, as the worker that sends to it has it.
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
    self.queue.refuseKicks(memory)
  }

  /// Copies one message, a virtio header and a frame, into buffers of the guest.
  /// - Returns: 0; EAGAIN where the guest has too few; `IOEvent.shortWrite` where no buffer of it would do; EPROTO
  ///   where it broke the rules.
  @unsafe
  mutating func deliver(_ message: UnsafePointer<msghdr>, bytes: Int) -> Int32 {
    let start = queue.mark
    var from = unsafe PieceReader(message.pointee.msg_iov, count: message.pointee.msg_iovlen)
    var left = bytes
    var count = 0
    var countPlace: UnsafeMutableRawPointer?
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
    for place in 0..<count { queue.complete(tokens[place], writtenBytes: Int(written[place])) }
    return 0
  }

  private mutating func refuse(_ start: VirtqueueMark, _ error: Int32) -> Int32 {
    queue.rewind(to: start)
    return error
  }

  /// Lets the guest see what was delivered; returns whether it is to be called.
  mutating func publish() -> Bool {
    queue.publish(memory)
    return queue.mustCall() && hasCall
  }

  /// Whether there are as many buffers as the frame that waits needs at least.
  mutating func hasBuffers() -> Bool {
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
