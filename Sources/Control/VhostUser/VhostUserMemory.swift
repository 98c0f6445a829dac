import CLinux
import Datapath
import Glibc

/// The memory of a guest as the frontend lent it: regions that do not overlap, each mapped. Immutable; a change makes a
/// new table, which shares the mappings that stay. A mapping ends with the last table that has it, so whoever lends
/// pointers to a worker keeps the table until the worker has left it.
public final class VhostUserMemory: Sendable {
  /// Regions that a table can have, by SET_MEM_TABLE (8) or one by one: as many as other backends offer, and few enough
  /// to be searched one after the other.
  public static let regionsMax = 32

  /// The smallest page of any guest, in bytes.
  private static let pageBytes: UInt64 = 4_096

  public struct Region: Sendable {
    /// What the rings' descriptors name.
    public let guestAddress: UInt64
    /// What SET_VRING_ADDR names.
    public let userAddress: UInt64
    public let mapping: SharedMapping

    public var byteCount: UInt64 { UInt64(mapping.byteCount) }

    var name: String { VhostUserMemory.name(guestAddress: guestAddress) }

    /// Whether it is the one that a REM_MEM_REG names.
    func isNamed(by description: VhostUserMessage.RegionDescription) -> Bool {
      guestAddress == description.guestAddress && userAddress == description.userAddress
        && byteCount == description.byteCount
    }
  }

  /// In the order of their guest addresses.
  public let regions: [Region]

  init(_ regions: [Region] = []) { self.regions = regions.sorted { $0.guestAddress < $1.guestAddress } }

  private static func name(guestAddress: UInt64) -> String {
    "the region at guest address \(hexadecimal(guestAddress))"
  }

  /// Maps a region.
  static func map(
    _ description: VhostUserMessage.RegionDescription, _ descriptor: OwnedDescriptor
  ) throws(VhostUserRefusal) -> Region {
    let name = name(guestAddress: description.guestAddress)
    let bases = [description.guestAddress, description.userAddress]
    guard bases.allSatisfy({ !$0.addingReportingOverflow(description.byteCount).overflow }) else {
      throw VhostUserRefusal("\(name) goes beyond the last address")
    }
    // What is aligned for the guest must be so for us.
    guard (bases + [description.fileOffset]).allSatisfy({ $0 % pageBytes == 0 }) else {
      throw VhostUserRefusal("\(name) does not start at a page of guest, frontend and file")
    }
    do throws(VhostUserRefusal) {
      return Region(
        guestAddress: description.guestAddress, userAddress: description.userAddress,
        mapping: try SharedMapping(
          descriptor, .init(byteCount: description.byteCount, fileOffset: description.fileOffset)))
    } catch {
      throw VhostUserRefusal("\(name): \(error)")
    }
  }

  /// That no two of the regions overlap, to be asked before any is mapped.
  static func check(_ descriptions: [VhostUserMessage.RegionDescription]) throws(VhostUserRefusal) {
    guard descriptions.count <= regionsMax else {
      throw VhostUserRefusal("\(descriptions.count) regions are more than the \(regionsMax) that a table has")
    }
    for (number, one) in descriptions.enumerated() {
      for other in descriptions[..<number]
      where overlap(one.guestAddress, one.byteCount, other.guestAddress, other.byteCount)
        || overlap(one.userAddress, one.byteCount, other.userAddress, other.byteCount)
      {
        throw VhostUserRefusal(
          "the regions at guest addresses \(hexadecimal(other.guestAddress)) and "
            + "\(hexadecimal(one.guestAddress)) overlap"
        )
      }
    }
  }

  private static func overlap(_ start: UInt64, _ count: UInt64, _ otherStart: UInt64, _ otherCount: UInt64) -> Bool {
    start < otherStart ? otherStart - start < count : start - otherStart < otherCount
  }

  var descriptions: [VhostUserMessage.RegionDescription] {
    regions.map {
      VhostUserMessage.RegionDescription(
        guestAddress: $0.guestAddress, byteCount: $0.byteCount, userAddress: $0.userAddress, fileOffset: 0)
    }
  }

  /// The guest address of bytes that the frontend names by its own address; nil unless one region has all of them.
  public func guestAddress(user address: UInt64, byteCount: Int) -> UInt64? {
    for region in regions where address >= region.userAddress {
      let offset = address - region.userAddress
      if offset < region.byteCount, region.byteCount - offset >= UInt64(byteCount) {
        return region.guestAddress + offset
      }
    }
    return nil
  }

  /// Where bytes of a guest address are mapped; nil unless one region has all of them.
  @unsafe
  public func pointer(guest address: UInt64, byteCount: Int) -> UnsafeMutableRawPointer? {
    for region in regions where address >= region.guestAddress {
      let offset = address - region.guestAddress
      if offset < region.byteCount, region.byteCount - offset >= UInt64(byteCount) {
        return unsafe region.mapping.base + Int(offset)
      }
    }
    return nil
  }
}

/// The log of a migration: one bit a page of guest memory, which a backend sets (atomically, the frontend clears it)
/// after it wrote to the page. The lowest bit of the first byte is the page at guest address 0.
///
/// It may be too short for an address: who marks compares first.
public final class VhostUserLog: Sendable {
  /// Bytes of guest memory for each bit (`VHOST_LOG_PAGE`).
  public static let pageBytes = 4_096
  public let mapping: SharedMapping

  init(mapping: SharedMapping) { self.mapping = mapping }
}

/// Memory that outlives a backend: in it a backend notes which descriptors it has taken and not yet given back, so that
/// the next one can take them again (docs/interop/vhost-user of QEMU, "Inflight I/O tracking").
public final class VhostUserInflight: Sendable {
  /// Each queue's part starts at a multiple of this, as other backends have it.
  private static let alignmentBytes = 64
  public let mapping: SharedMapping
  let queues: Int
  /// Places of each queue.
  let size: Int

  init(mapping: SharedMapping, queues: Int, size: Int) {
    self.mapping = mapping
    self.queues = queues
    self.size = size
  }

  /// Bytes of one queue's part: `QueueRegionSplit` or `QueueRegionPacked`, and so many descriptors' states.
  static func queueBytes(size: Int, _ kind: VhostUserQueueKind) -> Int {
    let bytes =
      switch kind {
      case .split: 16 + 16 * size
      case .packed: 32 + 32 * size
      }
    return (bytes + alignmentBytes - 1) & ~(alignmentBytes - 1)
  }

  /// Makes memory for so many queues, all zero, which nobody can cut shorter.
  static func makeFile(queues: Int, size: Int, _ kind: VhostUserQueueKind) throws(VhostUserRefusal) -> (
    descriptor: OwnedDescriptor, area: VhostUserMessage.AreaDescription
  ) {
    let number = unsafe clinux_make_memory_file("vnetr-inflight")
    guard number >= 0 else { throw VhostUserRefusal("no memory file could be made: \(SystemError.text(errno))") }
    let descriptor = OwnedDescriptor(number)
    let bytes = queues * queueBytes(size: size, kind)
    guard ftruncate(number, bytes) == 0, clinux_seal_length(number) == 0 else {
      throw VhostUserRefusal("a memory file of \(bytes) bytes could not be made: \(SystemError.text(errno))")
    }
    return (descriptor, .init(byteCount: UInt64(bytes), fileOffset: 0))
  }

  /// Where a queue's part is, in bytes from the start of the mapping; nil when it has none or one that is too small.
  func part(ofQueue queue: Int, size: Int, _ kind: VhostUserQueueKind) -> Range<Int>? {
    let bytes = Self.queueBytes(size: self.size, kind)
    guard queue < queues, size <= self.size, (queue + 1) * bytes <= mapping.byteCount else { return nil }
    return queue * bytes..<(queue + 1) * bytes
  }
}
