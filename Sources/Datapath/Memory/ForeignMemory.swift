import CLinux
import Glibc
import Synchronization

/// Buffers that belong to somebody else: chains in a guest's memory, or a test's. The port that brings them fills in
/// the segments of a buffer and holds it; when its last send is done the buffer appears among the returned ones and
/// the port gives it back.
///
/// Owned by control; workers use it through a `Reference`: one brings buffers and takes the returned ones back; a
/// buffer on its way belongs to whoever has its descriptor, as a slot does. The first segment of a buffer is private
/// memory of ours: the port copies the frame's headers there once, so that the guest cannot change what was parsed.
@safe
public final class ForeignMemory: @unchecked Sendable {
  /// Segments of one buffer: the header copy and up to 20 pieces of payload, together one less than the 22 vectors that
  /// a send takes. Linux sends a super-frame in up to 18 pieces (`MAX_SKB_FRAGS` of linux/skbuff.h, and the head).
  public static let segmentsMax = 21
  /// Private copy of a frame's headers: Ethernet, two tags, IPv6 with extension headers, TCP with options.
  public static let headerCopyBytes = 256

  fileprivate let buffers: UnsafeMutablePointer<Buffer>
  fileprivate let headers: UnsafeMutableRawPointer
  fileprivate let returned: UnsafeMutablePointer<UInt32>
  fileprivate let returnedCount: UnsafeMutablePointer<Int>
  fileprivate let waitingMax: Atomic<Int>
  public let bufferCount: Int

  @unsafe
  fileprivate struct Buffer {
    var holds: UInt32 = 0
    var segmentCount: UInt16 = 0
    var segments = unsafe InlineArray<21, iovec>(repeating: unsafe iovec())
  }

  public init(bufferCount: Int) {
    precondition(bufferCount > 0)
    self.bufferCount = bufferCount
    unsafe buffers = .allocate(capacity: bufferCount)
    unsafe buffers.initialize(repeating: unsafe Buffer(), count: bufferCount)
    unsafe headers = .allocate(byteCount: bufferCount * Self.headerCopyBytes, alignment: 128)
    unsafe returned = .allocate(capacity: bufferCount)
    unsafe returned.initialize(repeating: 0, count: bufferCount)
    unsafe returnedCount = .allocate(capacity: 1)
    unsafe returnedCount.initialize(to: 0)
    waitingMax = Atomic(bufferCount / 4)
  }

  deinit {
    unsafe buffers.deallocate()
    unsafe headers.deallocate()
    unsafe returned.deallocate()
    unsafe returnedCount.deallocate()
  }

  /// Control: from now on no buffer may wait for a full lane, until the memory is brought from anew.
  public func endWaiting() { waitingMax.store(-1, ordering: .relaxed) }

  public var reference: Reference { unsafe Reference(memory: Unmanaged.passUnretained(self)) }

  /// The worker's handle, free of reference counting.
  @safe
  public struct Reference: BitwiseCopyable {
    fileprivate let memory: Unmanaged<ForeignMemory>?
    public static var none: Reference { unsafe Reference(memory: nil) }

    @inline(__always)
    private func at<Result>(_ index: Int, _ body: (UnsafeMutablePointer<Buffer>, ForeignMemory) -> Result) -> Result {
      unsafe memory!._withUnsafeGuaranteedRef { owner in
        precondition(UInt(bitPattern: index) < UInt(bitPattern: owner.bufferCount), "foreign buffer out of range")
        return unsafe body(owner.buffers + index, owner)
      }
    }

    /// Fills in a buffer that is not held: copies the first `headerBytes` of `payload[0]` as the private header, names
    /// the rest by reference, and holds it once. Returns the number of segments, or nil when they are too many.
    @unsafe
    public func bring(_ index: Int, payload: UnsafeBufferPointer<iovec>, headerBytes: Int) -> Int? {
      unsafe at(index) { buffer, owner in
        unsafe precondition(buffer.pointee.holds == 0, "a foreign buffer is brought while it is held")
        guard payload.count > 0, payload.count < ForeignMemory.segmentsMax else { return nil }
        let copied = unsafe min(headerBytes, ForeignMemory.headerCopyBytes, payload[0].iov_len)
        let header = unsafe owner.headers + index * ForeignMemory.headerCopyBytes
        unsafe header.copyMemory(from: payload[0].iov_base, byteCount: copied)
        unsafe buffer.pointee.segments[0] = unsafe iovec(iov_base: header, iov_len: copied)
        var count = 1
        if unsafe payload[0].iov_len > copied {
          unsafe buffer.pointee.segments[1] = unsafe iovec(
            iov_base: payload[0].iov_base + copied, iov_len: payload[0].iov_len - copied)
          count = 2
        }
        for number in 1..<max(1, payload.count) {
          unsafe buffer.pointee.segments[count] = unsafe payload[number]
          count += 1
        }
        unsafe buffer.pointee.segmentCount = UInt16(count)
        unsafe buffer.pointee.holds = 1
        return count
      }
    }

    /// Fills in a buffer that is not held: copies the first bytes, over as many pieces as they lie in, names the rest
    /// by reference, and holds it once. Returns the number of segments; or nil when they are too many: then it is held
    /// with the copied bytes alone.
    @unsafe
    func bring(_ index: Int, payload: UnsafeBufferPointer<iovec>) -> Int? {
      unsafe at(index) { buffer, owner in
        unsafe precondition(buffer.pointee.holds == 0, "a foreign buffer is brought while it is held")
        unsafe buffer.pointee.holds = 1
        let header = unsafe owner.headers + index * ForeignMemory.headerCopyBytes
        var copied = 0
        var count = 1
        for number in 0..<payload.count {
          let piece = unsafe payload[number]
          guard unsafe piece.iov_len > 0 else { continue }
          let run = unsafe min(piece.iov_len, ForeignMemory.headerCopyBytes - copied)
          if run > 0 { unsafe (header + copied).copyMemory(from: piece.iov_base, byteCount: run) }
          copied += run
          guard unsafe run < piece.iov_len else { continue }
          guard count < ForeignMemory.segmentsMax else {
            count = 0
            break
          }
          unsafe buffer.pointee.segments[count] = unsafe iovec(
            iov_base: piece.iov_base + run, iov_len: piece.iov_len - run)
          count += 1
        }
        unsafe buffer.pointee.segments[0] = unsafe iovec(iov_base: header, iov_len: copied)
        unsafe buffer.pointee.segmentCount = UInt16(max(1, count))
        return count == 0 ? nil : count
      }
    }

    /// The same of a frame in one piece, of any length: 1 segment where all of it was copied, else 2.
    @unsafe @inline(__always)
    func bring(_ index: Int, _ piece: UnsafeMutableRawPointer, bytes: Int) -> Int {
      unsafe at(index) { buffer, owner in
        unsafe precondition(buffer.pointee.holds == 0, "a foreign buffer is brought while it is held")
        unsafe buffer.pointee.holds = 1
        let header = unsafe owner.headers + index * ForeignMemory.headerCopyBytes
        let copied = min(bytes, ForeignMemory.headerCopyBytes)
        unsafe clinux_copy(header, piece, copied)
        unsafe buffer.pointee.segments[0] = unsafe iovec(iov_base: header, iov_len: copied)
        guard copied < bytes else {
          unsafe buffer.pointee.segmentCount = 1
          return 1
        }
        unsafe buffer.pointee.segments[1] = unsafe iovec(iov_base: piece + copied, iov_len: bytes - copied)
        unsafe buffer.pointee.segmentCount = 2
        return 2
      }
    }

    @unsafe @inline(__always)
    func segment(_ number: Int, of index: Int) -> iovec {
      unsafe at(index) { buffer, _ in
        unsafe precondition(number < Int(buffer.pointee.segmentCount), "segment out of range")
        return unsafe buffer.pointee.segments[number]
      }
    }

    func hold(_ index: Int, adding count: Int) {
      unsafe at(index) { buffer, _ in
        unsafe precondition(buffer.pointee.holds != 0, "hold of a foreign buffer not held")
        unsafe buffer.pointee.holds += UInt32(truncatingIfNeeded: count)
      }
    }

    /// One send is done; whether it was the last: then whoever brought the buffer is to be told, by `giveBack` there.
    func release(_ index: Int) -> Bool {
      unsafe at(index) { buffer, _ in
        unsafe precondition(buffer.pointee.holds != 0, "release of a foreign buffer not held")
        unsafe buffer.pointee.holds -= 1
        return unsafe buffer.pointee.holds == 0
      }
    }

    /// To be called by the worker that brought the buffer: nobody holds it any more.
    func giveBack(_ index: Int) {
      unsafe at(index) { buffer, owner in
        unsafe precondition(buffer.pointee.holds == 0, "a foreign buffer is given back while it is held")
        unsafe owner.returned[owner.returnedCount.pointee] = UInt32(truncatingIfNeeded: index)
        unsafe owner.returnedCount.pointee += 1
      }
    }

    /// How many buffers of it a worker may have for one of them to wait for a lane that is stuck; -1 where none may
    /// wait for any lane any more. To be set while none is under way, by the worker that brings them.
    var waitingMax: Int {
      get { unsafe memory!._withUnsafeGuaranteedRef { $0.waitingMax.load(ordering: .relaxed) } }
      nonmutating set {
        unsafe memory!._withUnsafeGuaranteedRef { $0.waitingMax.store(newValue, ordering: .relaxed) }
      }
    }

    /// How many sends of the buffer are still out.
    public func holds(_ index: Int) -> Int {
      unsafe at(index) { buffer, _ in unsafe Int(buffer.pointee.holds) }
    }

    /// Takes one returned buffer, to be given back to its guest; nil when there is none.
    public func takeReturned() -> Int? {
      unsafe memory!._withUnsafeGuaranteedRef { owner in
        guard unsafe owner.returnedCount.pointee > 0 else { return nil }
        unsafe owner.returnedCount.pointee -= 1
        return unsafe Int(owner.returned[owner.returnedCount.pointee])
      }
    }
  }
}
