import CLinux

/// The log by which a guest moves to another host while it runs: one bit for each page of guest physical memory, from
/// page 0 on. Whoever wrote a page sets its bit after that; the frontend clears bits and then sends these pages again
/// (docs/interop/vhost-user of QEMU, "Migration").
///
/// A worker writes to a page, then marks it: a page that is marked first may have been sent before it was written.
@safe
public struct DirtyLog: BitwiseCopyable, @unchecked Sendable {
  /// What one bit stands for (VHOST_LOG_PAGE).
  public static let pageBytes = 4096

  private let base: UnsafeMutableRawPointer
  private let bytes: Int

  /// - Parameter base: memory shared with the frontend, which stays mapped until no worker has the log any more.
  public init(base: UnsafeMutableRawPointer, bytes: Int) {
    precondition(bytes >= 0, "a log cannot have fewer than no bytes")
    unsafe self.base = unsafe base
    self.bytes = bytes
  }

  /// Marks the pages of a guest physical range as written. Pages beyond the log are left out.
  @inline(never)
  public func mark(_ address: UInt64, bytes count: Int) {
    guard count > 0, bytes > 0 else { return }
    let pageBytes = UInt64(Self.pageBytes)
    let (sum, overflow) = address.addingReportingOverflow(UInt64(count) - 1)
    var page = address / pageBytes
    let last = min((overflow ? .max : sum) / pageBytes, UInt64(bytes) * 8 - 1)
    while page <= last {
      // The bits of one byte at once. Also where they are set already: without the store that waits for all others the
      // frontend might clear a bit before what was written is seen.
      let end = min(last, page | 7)
      let bits = UInt8(truncatingIfNeeded: (UInt16(0xFF) >> (7 - (end - page))) << (page & 7))
      unsafe SharedWord.setBits8(bits, at: base + Int(page / 8))
      page = end + 1
    }
  }
}
