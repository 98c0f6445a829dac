import CLinux
import Glibc

/// One buffer that a driver made available: the pieces of memory that the device may read, then those that it may
/// write, as they were when the chain was taken. Made once and used again for every chain.
///
/// The bytes in the pieces are the guest's, which may write them at any time.
@safe
public struct VirtioChain: ~Copyable, @unchecked Sendable {
  /// Pieces of one chain. DPDK's own backend takes as many (BUF_VECTOR_MAX); a super-frame of 64 KiB in buffers of
  /// 2 KiB has 33.
  public static let piecesMax = 256

  /// What names a chain to its queue until it is completed.
  public struct Token: BitwiseCopyable, Hashable, Sendable {
    /// Split: the first descriptor's index. Packed: the driver's buffer ID.
    public let identifier: UInt16
    /// Places on the ring; of a split queue one.
    let places: UInt16
    /// Packed, where chains in flight are noted: its first note.
    let note: UInt16

    init(identifier: UInt16, places: Int, note: UInt16 = 0) {
      self.identifier = identifier
      self.places = UInt16(truncatingIfNeeded: places)
      self.note = note
    }
  }

  private var pieces: FixedArray<iovec>
  private var guestAddresses = FixedArray<UInt64>(repeating: 0, count: piecesMax)
  /// Of the chain that was taken last; means nothing before and after a fault.
  public internal(set) var token = Token(identifier: 0, places: 0)
  public private(set) var readableCount = 0
  public private(set) var writableCount = 0
  /// Byte sums of the pieces.
  public private(set) var readableBytes = 0
  public private(set) var writableBytes = 0

  public init() { unsafe pieces = unsafe FixedArray(repeating: iovec(), count: Self.piecesMax) }

  /// The pieces for the device to read; they stay until the next chain is taken.
  @unsafe @inline(__always)
  public var readable: UnsafeBufferPointer<iovec> {
    unsafe UnsafeBufferPointer(start: pieces.address(of: 0), count: readableCount)
  }
  /// The pieces for the device to write.
  @unsafe @inline(__always)
  public var writable: UnsafeBufferPointer<iovec> {
    unsafe UnsafeBufferPointer(start: UnsafePointer(pieces.address(of: 0)) + readableCount, count: writableCount)
  }

  /// Where the guest sees the first of these; traps where there is none.
  var writableAddress: UInt64 {
    precondition(writableCount > 0, "a chain with nothing to write")
    return guestAddresses[readableCount]
  }

  /// Notes in the dirty log that the first `bytes` of the writable pieces were written.
  public func markDirty(_ memory: GuestMemory.Reference, bytes: Int) {
    guard memory.isLogged else { return }
    var left = bytes
    for index in readableCount..<readableCount + writableCount where left > 0 {
      let count = unsafe min(left, pieces[index].iov_len)
      memory.markDirty(guestAddresses[index], bytes: count)
      left -= count
    }
  }

  /// Forgets the chain.
  @inline(__always)
  mutating func begin() {
    readableCount = 0
    writableCount = 0
    readableBytes = 0
    writableBytes = 0
  }

  /// Adds the memory of one descriptor.
  @inline(__always)
  mutating func append(
    _ address: UInt64, bytes: Int, isWritable: Bool, memory: GuestMemory.Reference, hint: inout GuestMemory.Hint
  ) -> VirtqueueFault? {
    if !isWritable, writableCount > 0 { return .readableAfterWritable }
    var place = address
    var left = bytes
    while left > 0 {
      guard let piece = unsafe memory.piece(at: place, bytes: left, hint: &hint) else { return .notMapped }
      let index = readableCount + writableCount
      guard index < Self.piecesMax else { return .tooManyPieces }
      unsafe pieces[index] = unsafe piece
      guestAddresses[index] = place
      if isWritable { writableCount += 1 } else { readableCount += 1 }
      place += unsafe UInt64(piece.iov_len)
      left -= unsafe piece.iov_len
    }
    if isWritable { writableBytes += bytes } else { readableBytes += bytes }
    return nil
  }
}
