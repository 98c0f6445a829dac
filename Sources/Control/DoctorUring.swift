import CLinux
import Datapath
import Glibc

/// What this kernel allows of io_uring, found out by using it.
struct UringFindings {
  /// Why no ring can be used at all; nil where one can.
  var refusal: String?
  var features: Set<Configuration.UringFeature> = []

  static func probe() -> UringFindings {
    var findings = UringFindings()
    do {
      let ring = try ProbeRing.make(flags: 0)
      try findings.probe(ring)
    } catch {
      findings.refusal = error.description
    }
    return findings
  }

  private mutating func probe(_ ring: borrowing ProbeRing) throws(SystemError) {
    try ring.runNothing()
    if try ring.registerFiles() { features.insert(.fixedFiles) }
    if ring.features & UInt32(IORING_FEAT_CQE_SKIP) != 0 { features.insert(.cqeSkip) }

    let singleIssuer = UInt32(IORING_SETUP_SINGLE_ISSUER)
    if Self.canMakeRing(flags: singleIssuer) { features.insert(.singleIssuer) }
    if Self.canMakeRing(flags: singleIssuer | UInt32(IORING_SETUP_DEFER_TASKRUN)) { features.insert(.deferTaskrun) }

    guard let buffers = ring.provideBuffers() else { return }
    features.insert(.bufferRings)
    if ring.isReceiveMultishot() { features.insert(.multishotReceive) }
    if ring.isReadMultishot() { features.insert(.multishotRead) }
    // The kernel writes to the buffers until here.
    _ = consume buffers
  }

  private static func canMakeRing(flags: UInt32) -> Bool {
    do {
      _ = try ProbeRing.make(flags: flags)
      return true
    } catch {
      return false
    }
  }
}

/// A small ring to try things on. Only the thread that made it uses it.
@safe private struct ProbeRing: ~Copyable {
  /// On the heap, for liburing takes its address in every call.
  private let ring: UnsafeMutablePointer<io_uring>
  let features: UInt32

  private static let entries: UInt32 = 8
  /// How long any one operation may take; all of them complete at once where they are supported.
  private static let waitSeconds: Int64 = 1
  private static let bufferGroup: UInt16 = 0

  private init(_ ring: UnsafeMutablePointer<io_uring>, features: UInt32) {
    unsafe self.ring = ring
    self.features = features
  }

  static func make(flags: UInt32) throws(SystemError) -> ProbeRing {
    let ring = UnsafeMutablePointer<io_uring>.allocate(capacity: 1)
    unsafe ring.initialize(to: io_uring())
    var parameters = io_uring_params()
    parameters.flags = flags
    let status = unsafe io_uring_queue_init_params(entries, ring, &parameters)
    guard status == 0 else {
      unsafe ring.deallocate()
      throw SystemError(-status, doing: "make a ring (io_uring_setup)")
    }
    return unsafe ProbeRing(ring, features: parameters.features)
  }

  deinit {
    unsafe io_uring_queue_exit(ring)
    unsafe ring.deallocate()
  }

  /// Submits a no-operation and waits for it: a seccomp filter may refuse io_uring_enter only.
  borrowing func runNothing() throws(SystemError) {
    guard let entry = unsafe io_uring_get_sqe(ring) else { throw SystemError(EBUSY, doing: "submit to a ring") }
    unsafe io_uring_prep_nop(entry)
    if case .failed(let code) = submitAndWait() { throw SystemError(code, doing: "use a ring (io_uring_enter)") }
  }

  /// Whether files can be registered sparsely; throws where registration is forbidden altogether.
  borrowing func registerFiles() throws(SystemError) -> Bool {
    let status = unsafe io_uring_register_files_sparse(ring, 4)
    if status == -EPERM || status == -EACCES || status == -ENOSYS {
      throw SystemError(-status, doing: "register with a ring (io_uring_register)")
    }
    return status == 0
  }

  private enum Outcome {
    /// The result, and whether more completions of the same request will come.
    case completed(result: Int32, hasMore: Bool)
    /// With a positive error number.
    case failed(Int32)
  }

  private borrowing func submitAndWait() -> Outcome {
    var timeout = __kernel_timespec(tv_sec: Self.waitSeconds, tv_nsec: 0)
    var completion: UnsafeMutablePointer<io_uring_cqe>?
    let status = unsafe io_uring_submit_and_wait_timeout(ring, &completion, 1, &timeout, nil)
    guard status >= 0, let completion = unsafe completion else { return .failed(status < 0 ? -status : EIO) }
    let outcome = unsafe Outcome.completed(
      result: completion.pointee.res, hasMore: completion.pointee.flags & UInt32(IORING_CQE_F_MORE) != 0)
    unsafe io_uring_cqe_seen(ring, completion)
    return outcome
  }

  /// Registers a ring of two buffers; nil where the kernel has no buffer rings.
  borrowing func provideBuffers() -> ProbeBuffers? {
    let buffers = ProbeBuffers()
    var registration = io_uring_buf_reg()
    registration.ring_addr = unsafe UInt64(UInt(bitPattern: buffers.memory))
    registration.ring_entries = UInt32(ProbeBuffers.count)
    registration.bgid = Self.bufferGroup
    guard unsafe io_uring_register_buf_ring(ring, &registration, 0) == 0 else { return nil }
    buffers.publish()
    return buffers
  }

  /// Whether a multishot recvmsg delivers a datagram and stays armed.
  borrowing func isReceiveMultishot() -> Bool {
    var ends: [CInt] = [-1, -1]
    guard unsafe socketpair(AF_UNIX, Int32(SOCK_DGRAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0, &ends) == 0 else {
      return false
    }
    defer { for end in ends { close(end) } }
    let message = UnsafeMutablePointer<msghdr>.allocate(capacity: 1)
    unsafe message.initialize(to: msghdr())
    defer { unsafe message.deallocate() }
    guard let entry = unsafe io_uring_get_sqe(ring) else { return false }
    unsafe io_uring_prep_recvmsg_multishot(entry, ends[0], message, 0)
    return unsafe staysArmed(entry, writingTo: ends[1])
  }

  /// Whether a multishot read (opcode 49) delivers bytes and stays armed.
  borrowing func isReadMultishot() -> Bool {
    var ends: [CInt] = [-1, -1]
    guard unsafe pipe(&ends) == 0 else { return false }
    defer { for end in ends { close(end) } }
    guard let entry = unsafe io_uring_get_sqe(ring) else { return false }
    // From the current position: a pipe has no other.
    unsafe io_uring_prep_read(entry, ends[0], nil, 0, UInt64.max)
    // IORING_OP_READ_MULTISHOT, newer than the packaged liburing.
    unsafe entry.pointee.opcode = 49
    return unsafe staysArmed(entry, writingTo: ends[1])
  }

  /// Submits a multishot request, feeds it one byte, and cancels it.
  @unsafe private borrowing func staysArmed(
    _ entry: UnsafeMutablePointer<io_uring_sqe>, writingTo descriptor: CInt
  ) -> Bool {
    let userData: UInt64 = 1
    // IOSQE_BUFFER_SELECT.
    unsafe entry.pointee.flags |= 1 << 5
    unsafe entry.pointee.buf_group = Self.bufferGroup
    unsafe entry.pointee.user_data = userData
    var byte: UInt8 = 1
    guard unsafe write(descriptor, &byte, 1) == 1 else { return false }
    guard case .completed(let result, let hasMore) = submitAndWait() else { return false }
    guard result > 0, hasMore else { return false }
    guard let cancel = unsafe io_uring_get_sqe(ring) else { return true }
    unsafe io_uring_prep_cancel64(cancel, userData, 0)
    // Two completions: of the cancellation and of what it ended.
    _ = submitAndWait()
    _ = submitAndWait()
    return true
  }
}

/// A page with a buffer ring's entries, and a buffer for each of them.
@safe private struct ProbeBuffers: ~Copyable {
  static let count = 4
  private static let bufferBytes = 1024
  private static let ringBytes = 4096
  /// Of struct io_uring_buf in linux/io_uring.h: address 8, length 4, identifier 2, and 2 that hold the tail in the
  /// first entry.
  private static let entryBytes = 16

  let memory: UnsafeMutableRawPointer

  init() {
    unsafe memory = .allocate(byteCount: Self.ringBytes + Self.count * Self.bufferBytes, alignment: Self.ringBytes)
    unsafe memory.initializeMemory(as: UInt8.self, repeating: 0, count: Self.ringBytes)
  }

  deinit { unsafe memory.deallocate() }

  /// Hands every buffer to the kernel. Called once, before anything is submitted.
  borrowing func publish() {
    for index in 0..<Self.count {
      let entry = unsafe memory + index * Self.entryBytes
      let buffer = unsafe memory + Self.ringBytes + index * Self.bufferBytes
      unsafe entry.storeBytes(of: UInt64(UInt(bitPattern: buffer)), as: UInt64.self)
      unsafe entry.storeBytes(of: UInt32(Self.bufferBytes), toByteOffset: 8, as: UInt32.self)
      unsafe entry.storeBytes(of: UInt16(index), toByteOffset: 12, as: UInt16.self)
    }
    unsafe memory.storeBytes(of: UInt16(Self.count), toByteOffset: 14, as: UInt16.self)
  }
}
