import CLinux

/// A chain of one descriptor that lies in one piece, as nearly all chains of small frames are.
@safe
public struct VirtioSingle: BitwiseCopyable, @unchecked Sendable {
  /// Where its memory is with us. The bytes are the guest's, which may write them at any time.
  public let place: UnsafeMutableRawPointer
  /// Guest physical, for the dirty log.
  public let guestAddress: UInt64
  /// At least 1.
  public let bytes: UInt32
  /// For the device to write; else to read.
  public let isWritable: Bool
  /// What names it to its queue until it is completed.
  public let token: VirtioChain.Token

  private static var lineBytes: UInt32 { 64 }

  /// Notes in the dirty log that its first `bytes` were written.
  @inline(__always)
  public func markDirty(_ memory: GuestMemory.Reference, bytes: Int) {
    memory.markDirty(guestAddress, bytes: min(bytes, Int(self.bytes)))
  }

  /// Asks for the lines that a small frame and the header before it have.
  @inline(__always)
  fileprivate func prefetch() {
    let second = unsafe place + Int(min(bytes &- 1, Self.lineBytes))
    if isWritable {
      unsafe clinux_prefetch_to_write(place)
      unsafe clinux_prefetch_to_write(second)
    } else {
      unsafe clinux_prefetch(place)
      unsafe clinux_prefetch(second)
    }
  }
}

/// Such chains, as many as were taken at once. Made once and used again for every batch.
@safe
public struct VirtioSingles: ~Copyable, @unchecked Sendable {
  /// As many as a small batch has: each costs two lines of the first-level cache, which has room for a few hundred.
  public static let countMax = 64

  private let entries: FixedArray<VirtioSingle>
  /// Where they begin.
  private let first: UnsafeMutablePointer<VirtioSingle>
  public internal(set) var count = 0

  public init() {
    let none = unsafe VirtioSingle(
      place: UnsafeMutableRawPointer(bitPattern: 1)!, guestAddress: 0, bytes: 1, isWritable: false,
      token: VirtioChain.Token(identifier: 0, places: 1))
    entries = FixedArray(repeating: none, count: Self.countMax)
    unsafe first = unsafe entries.address(of: 0)
  }

  @inline(__always)
  public subscript(index: Int) -> VirtioSingle {
    precondition(index < count, "a chain is used that was not taken")
    return entries[index]
  }

  /// Sets a chain and asks for its first lines, while the others are still on their way. `index` is below `countMax`.
  @unsafe @inline(__always)
  func set(
    _ index: Int, _ place: UnsafeMutableRawPointer, guestAddress: UInt64, bytes: UInt32, isWritable: Bool,
    token: VirtioChain.Token
  ) {
    let single = unsafe VirtioSingle(
      place: place, guestAddress: guestAddress, bytes: bytes, isWritable: isWritable, token: token)
    unsafe (first + index).pointee = single
    single.prefetch()
  }
}
