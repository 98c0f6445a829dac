import CLinux
import Datapath
import Glibc

/// A part of a file that another process shares with us, mapped for reading and writing until the last reference to it
/// is gone. The other process may change its bytes at any time, and may cut the file: an access behind its new end
/// finds zeroes in all of the mapping from then on (``MappingFaults``).
@safe
public final class SharedMapping: @unchecked Sendable {
  /// The first wanted byte.
  public let base: UnsafeMutableRawPointer
  /// Bytes from there on.
  public let byteCount: Int
  private let mapped: UnsafeMutableRawPointer
  private let mappedBytes: Int
  private let place: Int

  /// Whether the file was cut, or had no page for a byte, and somebody noticed by an access: nothing here is the other
  /// process's any more.
  public var isCut: Bool { MappingFaults.isCut(place) }

  /// What to say when it is.
  static let cutText =
    "its file was cut short, or had no page left, while it was shared; the frontend must keep its files as they are"

  /// The largest page that a mapping is aligned to, in bytes: the largest huge page of the machines this builds for.
  private static let pageBytesMax = 1 << 30

  /// Maps `area` of a file; the descriptor may be closed afterwards.
  /// - Throws: that the file has no such bytes, or may not be mapped for writing.
  public init(
    _ descriptor: borrowing OwnedDescriptor, _ area: VhostUserMessage.AreaDescription
  ) throws(VhostUserRefusal) {
    var status = stat()
    guard unsafe fstat(descriptor.number, &status) == 0 else {
      throw VhostUserRefusal("its descriptor cannot be looked at: \(SystemError.text(errno))")
    }
    guard status.st_mode & S_IFMT == S_IFREG, descriptor.isInMemory else {
      throw VhostUserRefusal("its descriptor is no memory file (memfd, tmpfs or hugetlbfs)")
    }
    let (end, overflows) = area.fileOffset.addingReportingOverflow(area.byteCount)
    guard area.byteCount > 0, !overflows, end <= UInt64(max(0, status.st_size)) else {
      throw VhostUserRefusal(
        "\(area.byteCount) bytes from \(hexadecimal(area.fileOffset)) are not within its file, which has "
          + "\(status.st_size)"
      )
    }
    // A file of huge pages is only mapped in whole ones; it tells their size as the best size of a read.
    let page = max(Int(getpagesize()), Self.pageBytes(preferred: Int(status.st_blksize)))
    let offset = Int(area.fileOffset)
    let start = offset & ~(page - 1)
    let (rounded, overflowsRounded) = (Int(area.byteCount) + offset - start).addingReportingOverflow(page - 1)
    guard !overflowsRounded else { throw VhostUserRefusal("\(area.byteCount) bytes are more than can be mapped") }
    let wanted = rounded & ~(page - 1)
    let mapped = unsafe mmap(nil, wanted, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor.number, start)
    guard let mapped = unsafe mapped, unsafe mapped != MAP_FAILED else {
      throw VhostUserRefusal("its file cannot be mapped for writing: \(SystemError.text(errno))")
    }
    // A core dump is for our own memory, not for a guest's.
    _ = unsafe madvise(mapped, wanted, MADV_DONTDUMP)
    do throws(SystemError) {
      place = try unsafe MappingFaults.register(start: mapped, byteCount: wanted)
    } catch {
      unsafe munmap(mapped, wanted)
      throw VhostUserRefusal("\(error)")
    }
    unsafe self.mapped = unsafe mapped
    mappedBytes = wanted
    unsafe base = unsafe mapped + (offset - start)
    byteCount = Int(area.byteCount)
  }

  deinit {
    MappingFaults.forget(place)
    unsafe munmap(mapped, mappedBytes)
  }

  private static func pageBytes(preferred: Int) -> Int {
    preferred > 0 && preferred <= pageBytesMax && preferred & (preferred - 1) == 0 ? preferred : 1
  }
}
