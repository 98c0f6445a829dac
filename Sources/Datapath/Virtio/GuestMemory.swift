import CLinux
import Glibc

/// A guest's memory as its frontend shared it: which guest physical address is mapped where with us. It never changes;
/// for another table, or for a dirty log that begins or ends, control makes another one and hands it to the worker.
///
/// Owned by control, which also owns the mappings and keeps both until no worker has a `Reference` any more.
@safe
public final class GuestMemory: @unchecked Sendable {
  /// What QEMU's own library for backends takes when it offers memory slots (VHOST_USER_MAX_RAM_SLOTS).
  public static let regionsMax = 509

  /// Memory that is one run in all three views.
  @safe
  public struct Region: BitwiseCopyable, @unchecked Sendable {
    /// Where the guest sees it (guest physical address).
    public var guestAddress: UInt64
    /// Where the frontend has it mapped in its own process; addresses of rings are given so.
    public var userAddress: UInt64
    public var bytes: UInt64
    /// Where we have it mapped.
    public var mapping: UnsafeMutableRawPointer

    @inline(__always)
    func contains(_ address: UInt64) -> Bool { address &- guestAddress < bytes }

    /// Where a range is with us, which is not empty; nil where it is not all within.
    @unsafe @inline(__always)
    func place(of address: UInt64, bytes count: UInt32) -> UnsafeMutableRawPointer? {
      let offset = address &- guestAddress
      guard count > 0, offset < bytes, UInt64(count) <= bytes &- offset else { return nil }
      return unsafe mapping + Int(truncatingIfNeeded: offset)
    }

    public init(guestAddress: UInt64, userAddress: UInt64, bytes: UInt64, mapping: UnsafeMutableRawPointer) {
      self.guestAddress = guestAddress
      self.userAddress = userAddress
      self.bytes = bytes
      unsafe self.mapping = unsafe mapping
    }
  }

  /// Why a table was refused.
  public enum TableError: Error, Equatable, CustomStringConvertible {
    case tooManyRegions(Int)
    case emptyRegion(guestAddress: UInt64)
    case wrappingRegion(guestAddress: UInt64)
    case overlappingRegions(guestAddress: UInt64)

    public var description: String {
      switch self {
      case .tooManyRegions(let count):
        "cannot use the frontend's memory table: it has \(count) regions, of which \(GuestMemory.regionsMax) are taken"
      case .emptyRegion(let address):
        "cannot use the frontend's memory table: the region at guest address \(address) has no bytes"
      case .wrappingRegion(let address):
        "cannot use the frontend's memory table: the region at guest address \(address) goes beyond 64 bits"
      case .overlappingRegions(let address):
        "cannot use the frontend's memory table: the region at guest address \(address) overlaps another"
      }
    }
  }

  /// By guest address.
  private let regions: UnsafeMutablePointer<Region>
  public let regionCount: Int
  public let log: DirtyLog?

  /// - Parameters:
  ///   - regions: in any order. Frontend addresses may overlap: one memory may have two guest addresses.
  ///   - log: where written pages are noted, for a guest that is about to move to another host.
  public init(_ regions: [Region], log: DirtyLog? = nil) throws(TableError) {
    guard regions.count <= Self.regionsMax else { throw .tooManyRegions(regions.count) }
    let sorted = regions.sorted { $0.guestAddress < $1.guestAddress }
    for region in sorted {
      guard region.bytes > 0 else { throw .emptyRegion(guestAddress: region.guestAddress) }
      let mapped = unsafe UInt64(UInt(bitPattern: region.mapping))
      guard region.bytes <= UInt64(Int.max),
        ![region.guestAddress, region.userAddress, mapped].contains(where: {
          $0.addingReportingOverflow(region.bytes).overflow
        })
      else { throw .wrappingRegion(guestAddress: region.guestAddress) }
    }
    for (lower, upper) in zip(sorted, sorted.dropFirst()) where upper.guestAddress - lower.guestAddress < lower.bytes {
      throw .overlappingRegions(guestAddress: upper.guestAddress)
    }
    unsafe self.regions = .allocate(capacity: max(1, sorted.count))
    for (index, region) in sorted.enumerated() { unsafe (self.regions + index).initialize(to: region) }
    regionCount = sorted.count
    self.log = log
  }

  deinit { unsafe regions.deallocate() }

  public var reference: Reference { unsafe Reference(regions: regions, count: regionCount, log: log) }

  /// The memory at a frontend's address, as SET_VRING_ADDR names rings: the whole of it in one region.
  /// - Returns: where we have it and its guest physical address; nil where it is not mapped, or not in one run.
  @unsafe
  public func translate(userAddress: UInt64, bytes: Int) -> (mapping: UnsafeMutableRawPointer, guestAddress: UInt64)? {
    guard bytes >= 0 else { return nil }
    for index in 0..<regionCount {
      let region = unsafe regions[index]
      let offset = userAddress &- region.userAddress
      if offset < region.bytes, UInt64(bytes) <= region.bytes - offset {
        return unsafe (region.mapping + Int(offset), region.guestAddress + offset)
      }
    }
    return nil
  }

  /// Which region was hit last, for the next look-up to begin with; any value is safe with any table.
  public struct Hint: BitwiseCopyable, Sendable {
    fileprivate var index = 0
    public init() {}
  }

  /// The worker's handle, free of reference counting.
  @safe
  public struct Reference: BitwiseCopyable, @unchecked Sendable {
    fileprivate let regions: UnsafeMutablePointer<Region>?
    fileprivate let count: Int
    fileprivate let log: DirtyLog?

    /// Nothing is mapped.
    public static var none: Reference { unsafe Reference(regions: nil, count: 0, log: nil) }

    /// Whether written pages are to be marked: the one branch that a log costs where there is none.
    @inline(__always)
    public var isLogged: Bool { log != nil }

    /// The memory from a guest physical address on: `bytes`, or fewer where its region ends before.
    /// - Returns: nil where the address is not mapped. `bytes` is positive.
    @unsafe @inline(__always)
    public func piece(at address: UInt64, bytes: Int, hint: inout Hint) -> iovec? {
      if hint.index < count {
        let region = unsafe regions.unsafelyUnwrapped + hint.index
        let offset = unsafe address &- region.pointee.guestAddress
        if unsafe offset < region.pointee.bytes {
          return unsafe Self.piece(of: region, offset: offset, bytes: bytes)
        }
      }
      return unsafe search(address, bytes: bytes, hint: &hint)
    }

    @unsafe @inline(__always)
    private static func piece(of region: UnsafeMutablePointer<Region>, offset: UInt64, bytes: Int) -> iovec {
      unsafe iovec(
        iov_base: region.pointee.mapping + Int(truncatingIfNeeded: offset),
        iov_len: Int(truncatingIfNeeded: min(UInt64(bytes), region.pointee.bytes - offset)))
    }

    /// The region that was hit last; one without bytes where there is none.
    @inline(__always)
    func region(_ hint: Hint) -> Region {
      guard hint.index < count else {
        return unsafe Region(
          guestAddress: 0, userAddress: 0, bytes: 0, mapping: UnsafeMutableRawPointer(bitPattern: 1).unsafelyUnwrapped)
      }
      return unsafe regions.unsafelyUnwrapped[hint.index]
    }

    /// The same, once it is the one that has an address; where none has, it is another.
    @inline(never)
    func region(at address: UInt64, _ hint: inout Hint) -> Region {
      _ = unsafe search(address, bytes: 1, hint: &hint)
      return region(hint)
    }

    @unsafe @inline(never)
    private func search(_ address: UInt64, bytes: Int, hint: inout Hint) -> iovec? {
      // The last region that begins at the address or before.
      var low = 0
      var high = count
      while low < high {
        let middle = (low + high) / 2
        if unsafe regions.unsafelyUnwrapped[middle].guestAddress <= address { low = middle + 1 } else { high = middle }
      }
      guard low > 0 else { return nil }
      let region = unsafe regions.unsafelyUnwrapped + (low - 1)
      let offset = unsafe address - region.pointee.guestAddress
      guard unsafe offset < region.pointee.bytes else { return nil }
      hint.index = low - 1
      return unsafe Self.piece(of: region, offset: offset, bytes: bytes)
    }

    /// What became of a translation.
    public enum Translation: BitwiseCopyable, Equatable, Sendable {
      case pieces(Int)
      case notMapped
      case noRoom
    }

    /// The memory of a guest physical range as I/O vectors: one, and one more for each border of regions within.
    /// No bytes are no pieces, at any address.
    @unsafe @inline(__always)
    public func translate(
      _ address: UInt64, bytes: Int, hint: inout Hint, into pieces: UnsafeMutablePointer<iovec>, room: Int
    ) -> Translation {
      var place = address
      var left = bytes
      var count = 0
      while left > 0 {
        guard let piece = unsafe self.piece(at: place, bytes: left, hint: &hint) else { return .notMapped }
        guard count < room else { return .noRoom }
        unsafe pieces[count] = unsafe piece
        count += 1
        // Never beyond 64 bits: no region is.
        place += unsafe UInt64(piece.iov_len)
        left -= unsafe piece.iov_len
      }
      return .pieces(count)
    }

    /// Notes in the dirty log, where there is one, that a range was written, after it was.
    @inline(__always)
    public func markDirty(_ address: UInt64, bytes: Int) {
      guard let log else { return }
      log.mark(address, bytes: bytes)
    }
  }
}
