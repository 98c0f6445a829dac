import CLinux
import Glibc

/// The io_uring side of a worker's I/O.
///
/// Made by its worker, on its own thread, and used there alone: the ring is SINGLE_ISSUER. The way of a frame here:
///  1. `post` lends slots to the kernel through a provided-buffer ring that all sources share.
///  2. `arm` starts one multishot receive a source; every completion brings one filled slot.
///  3. `send` queues a chain of linked operations: the kernel carries them out in order and cancels the rest of the
///     chain when one fails. Measured: a link costs nothing that can be seen beside a send.
///  4. `collect` enters the kernel once: it submits everything queued, runs deferred work, waits as told.
///
/// While chains are out, `collect` waits for as many completions as there are sends out. They never wait for anything
/// (MSG_DONTWAIT, RWF_NOWAIT), so this does not sleep; it makes the kernel run the chains to their end in this call:
/// with a wait of 0 or 1 it runs one link a call (measured: 30 calls for a chain of 32 against 1).
@safe
public struct UringIO: ~Copyable, WorkerIO {
  public typealias Limits = IOLimits

  private static let bufferGroup: Int32 = 0
  private let ring: UnsafeMutablePointer<io_uring>
  private let limits: Limits
  public let features: UringFeatures
  public var chainFramesMax: Int { min(64, limits.entries) }

  private var sources: FixedArray<Source>
  private var lanes: FixedArray<Lane>
  /// What each send operation's result must be for the frame to be out whole, in bytes.
  private var expectedBytes: FixedArray<UInt32>
  /// Sends whose completion has not come.
  private var sendsOut = 0
  private var statistics = IOStatistics()

  private let bufferRing: UnsafeMutableRawPointer
  private let bufferRingBytes: Int
  private let bufferRingEntries: Int
  /// Slots that are posted and not in the buffer ring: what single receives take from.
  private var spare: FixedArray<UInt32>
  private var spareCount = 0
  private var starvedCount = 0
  /// Slots posted by any way, for `takeBackSlots`.
  private var isPosted: FixedArray<Bool>

  private let receiveTemplate: UnsafeMutablePointer<msghdr>
  /// For each source the message of a single receive.
  private let singleMessages: UnsafeMutablePointer<msghdr>
  private let singleVectors: UnsafeMutablePointer<iovec>
  private let wakeValue: UnsafeMutablePointer<UInt64>
  /// What is written to a guest's eventfd: 1, in 8 bytes.
  private let callValue: UnsafeMutablePointer<UInt64>
  private let callVector: UnsafeMutablePointer<iovec>

  struct Source: BitwiseCopyable {
    var kind = SourceKind.waker
    var descriptor: Int32 = -1
    var isArmed = false
    var isCancelled = false
    /// A single receive found no posted slot: its end is still to be reported.
    var isStarved = false
    /// Whether the ring has the descriptor in its table of registered files.
    var isRegistered = false
    /// The slot of a single receive, or none.
    var slot: UInt32 = .max
  }

  struct Lane: BitwiseCopyable {
    var kind = LaneKind.tap
    var descriptor: Int32 = -1
    /// Completions of the chain that have not come.
    var out: UInt32 = 0
    var sent: UInt32 = 0
    var error: Int32 = 0
    var awaitsWritable = false
    /// Whether the ring has the descriptor in its table of registered files.
    var isRegistered = false
  }

  /// What a completion belongs to: the kind, the source or lane, and for a send its operation.
  private enum Tag: UInt64 {
    case receive = 1
    case send, writable, ignored
  }

  /// - Parameter without: features not to use although the kernel may have them.
  /// - Throws: why the kernel makes no ring.
  public init(_ limits: Limits, without: UringFeatures = []) throws(SystemError) {
    precondition(limits.slots <= 0xFFFF, "a buffer ring names slots by 16 bits")
    let (ring, setup) = try unsafe Self.makeRing(limits, without)
    var features = UringFeatures.all.subtracting(without)
    if setup & UInt32(IORING_SETUP_SINGLE_ISSUER) == 0 { features.remove(.singleIssuer) }
    if setup & UInt32(IORING_SETUP_DEFER_TASKRUN) == 0 { features.remove(.deferredWork) }

    if features.contains(.restrictions) {
      if unsafe !Self.restrict(ring) { features.remove(.restrictions) }
    }
    if setup & UInt32(IORING_SETUP_R_DISABLED) != 0 {
      let enabled = unsafe clinux_enable_rings(ring)
      if enabled < 0 {
        unsafe Self.freeRing(ring)
        throw SystemError(-enabled, doing: "enable the io_uring")
      }
    }

    // A filter may let a ring be made and forbid its use.
    let entered = unsafe Self.runNothing(ring)
    guard entered == 0 else {
      unsafe Self.freeRing(ring)
      throw SystemError(entered, doing: "use an io_uring")
    }

    if unsafe ring.pointee.features & IORING_FEAT_CQE_SKIP == 0 { features.remove(.silentSuccess) }
    let highest = unsafe Self.highestOperation(ring)
    // Multishot recvmsg came with the same release as SEND_ZC (6.0), and is not in the probe by itself.
    if highest < Int(IORING_OP_SEND_ZC.rawValue) { features.remove(.multishotReceive) }
    if highest < Int(CLINUX_OP_READ_MULTISHOT) { features.remove(.multishotRead) }

    var entries = 1
    while entries < limits.posted { entries <<= 1 }
    let bufferRingBytes = max(4096, entries * MemoryLayout<io_uring_buf>.stride)
    guard
      let memory = unsafe mmap(
        nil, bufferRingBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), unsafe memory != MAP_FAILED
    else {
      let error = errno
      unsafe Self.freeRing(ring)
      throw SystemError(error, doing: "map the ring of provided buffers")
    }
    if features.isSuperset(of: [.bufferRing, .multishotReceive]) {
      let group = Self.bufferGroup
      if unsafe clinux_register_buffer_ring(ring, memory, UInt32(entries), group) < 0 {
        features.remove(.bufferRing)
      } else {
        unsafe io_uring_buf_ring_init(memory.assumingMemoryBound(to: io_uring_buf_ring.self))
      }
    }
    // Multishot receives need the buffer ring, and datagrams use it by multishot alone.
    if !features.isSuperset(of: [.bufferRing, .multishotReceive]) {
      features.subtract([.bufferRing, .multishotReceive, .multishotRead])
    }
    if features.contains(.fixedFiles) {
      let slots = UInt32(limits.sources + limits.lanes)
      if unsafe io_uring_register_files_sparse(ring, slots) < 0 { features.remove(.fixedFiles) }
    }

    unsafe self.ring = unsafe ring
    self.limits = limits
    self.features = features
    unsafe bufferRing = memory
    self.bufferRingBytes = bufferRingBytes
    bufferRingEntries = entries
    sources = FixedArray(repeating: Source(), count: limits.sources)
    lanes = FixedArray(repeating: Lane(), count: limits.lanes)
    expectedBytes = FixedArray(repeating: 0, count: limits.operations)
    spare = FixedArray(repeating: 0, count: limits.slots)
    isPosted = FixedArray(repeating: false, count: limits.slots)
    unsafe receiveTemplate = .allocate(capacity: 1)
    unsafe receiveTemplate.initialize(to: unsafe msghdr())
    unsafe receiveTemplate.pointee.msg_namelen = socklen_t(MessageSlot.nameBytes)
    unsafe receiveTemplate.pointee.msg_controllen = MessageSlot.controlBytes
    unsafe singleMessages = .allocate(capacity: limits.sources)
    unsafe singleMessages.initialize(repeating: unsafe msghdr(), count: limits.sources)
    unsafe singleVectors = .allocate(capacity: limits.sources)
    unsafe singleVectors.initialize(repeating: unsafe iovec(), count: limits.sources)
    unsafe wakeValue = .allocate(capacity: 1)
    unsafe wakeValue.initialize(to: 0)
    unsafe callValue = .allocate(capacity: 1)
    unsafe callValue.initialize(to: 1)
    unsafe callVector = .allocate(capacity: 1)
    unsafe callVector.initialize(to: unsafe iovec(iov_base: callValue, iov_len: 8))
  }

  deinit {
    unsafe Self.freeRing(ring)
    unsafe munmap(bufferRing, bufferRingBytes)
    unsafe receiveTemplate.deallocate()
    unsafe singleMessages.deallocate()
    unsafe singleVectors.deallocate()
    unsafe wakeValue.deallocate()
    unsafe callValue.deallocate()
    unsafe callVector.deallocate()
  }

  // MARK: The ring

  /// Makes a ring with the most flags that the kernel knows: EINVAL means one is unknown, and the newest goes first.
  @unsafe
  private static func makeRing(
    _ limits: Limits, _ without: UringFeatures
  ) throws(SystemError) -> (UnsafeMutablePointer<io_uring>, UInt32) {
    let base = UInt32(IORING_SETUP_CQSIZE) | UInt32(IORING_SETUP_CLAMP)
    let submitAll = UInt32(IORING_SETUP_SUBMIT_ALL)
    let disabled = without.contains(.restrictions) ? 0 : UInt32(IORING_SETUP_R_DISABLED)
    let single = UInt32(IORING_SETUP_SINGLE_ISSUER)
    let deferred = UInt32(IORING_SETUP_DEFER_TASKRUN) | UInt32(IORING_SETUP_TASKRUN_FLAG)
    let cooperative = UInt32(IORING_SETUP_COOP_TASKRUN) | UInt32(IORING_SETUP_TASKRUN_FLAG)
    var tries: [UInt32] = []
    if without.isDisjoint(with: [.singleIssuer, .deferredWork]) {
      tries.append(base | submitAll | disabled | single | deferred)
    }
    if !without.contains(.singleIssuer) { tries.append(base | submitAll | disabled | single | cooperative) }
    tries += [base | submitAll | disabled | cooperative, base | submitAll | disabled, base | disabled, base]

    let ring = UnsafeMutablePointer<io_uring>.allocate(capacity: 1)
    var error: Int32 = 0
    for flags in tries {
      var parameters = io_uring_params()
      parameters.flags = flags
      parameters.cq_entries = UInt32(limits.completions)
      unsafe ring.initialize(to: unsafe io_uring())
      error = unsafe -io_uring_queue_init_params(UInt32(limits.entries), ring, &parameters)
      if error == 0 { return unsafe (ring, flags) }
      if error != EINVAL { break }
    }
    unsafe ring.deallocate()
    throw SystemError(error, doing: "make an io_uring")
  }

  @unsafe
  private static func freeRing(_ ring: UnsafeMutablePointer<io_uring>) {
    unsafe io_uring_queue_exit(ring)
    unsafe ring.deallocate()
  }

  /// Carries out a no-operation; returns 0 or the error number of entering the kernel.
  @unsafe
  private static func runNothing(_ ring: UnsafeMutablePointer<io_uring>) -> Int32 {
    guard let entry = unsafe io_uring_get_sqe(ring) else { return EBUSY }
    unsafe io_uring_prep_nop(entry)
    let entered = unsafe io_uring_submit_and_wait(ring, 1)
    guard entered >= 0 else { return -entered }
    unsafe io_uring_cq_advance(ring, io_uring_cq_ready(ring))
    return 0
  }

  /// Allows this ring only what this file does: whoever took over the process could not open a file through it.
  @unsafe
  private static func restrict(_ ring: UnsafeMutablePointer<io_uring>) -> Bool {
    let operations: [UInt32] = [
      IORING_OP_NOP.rawValue, IORING_OP_READ.rawValue, UInt32(CLINUX_OP_READ_MULTISHOT), IORING_OP_RECVMSG.rawValue,
      IORING_OP_SENDMSG.rawValue, IORING_OP_WRITEV.rawValue, IORING_OP_POLL_ADD.rawValue,
      IORING_OP_ASYNC_CANCEL.rawValue,
    ]
    let registrations: [Int] = [
      Int(IORING_REGISTER_PROBE), Int(IORING_REGISTER_FILES), Int(IORING_REGISTER_FILES2),
      Int(IORING_REGISTER_FILES_UPDATE), Int(IORING_REGISTER_PBUF_RING),
    ]
    var rules = [io_uring_restriction](
      repeating: io_uring_restriction(), count: operations.count + registrations.count + 1)
    var used = 0
    let highest = unsafe highestOperation(ring)
    for operation in operations where Int(operation) <= highest {
      unsafe clinux_allow(&rules[used], UInt16(IORING_RESTRICTION_SQE_OP), UInt8(operation))
      used += 1
    }
    for registration in registrations {
      unsafe clinux_allow(&rules[used], UInt16(IORING_RESTRICTION_REGISTER_OP), UInt8(registration))
      used += 1
    }
    let flags =
      UInt8(1 << IOSQE_FIXED_FILE_BIT | 1 << IOSQE_IO_LINK_BIT | 1 << IOSQE_BUFFER_SELECT_BIT) | Self.silentFlag
    unsafe clinux_allow(&rules[used], UInt16(IORING_RESTRICTION_SQE_FLAGS_ALLOWED), flags)
    used += 1
    return unsafe clinux_register_restrictions(ring, &rules, UInt32(used)) == 0
  }

  @unsafe
  private static func highestOperation(_ ring: UnsafeMutablePointer<io_uring>) -> Int {
    guard let probe = unsafe io_uring_get_probe_ring(ring) else { return 0 }
    defer { unsafe io_uring_free_probe(probe) }
    return unsafe Int(probe.pointee.last_op)
  }

  /// A free submission entry; where the queue is full what is in it goes to the kernel first.
  @unsafe @inline(__always)
  private mutating func entry() -> UnsafeMutablePointer<io_uring_sqe> {
    while true {
      if let entry = unsafe io_uring_get_sqe(ring) { return unsafe entry }
      statistics.enters += 1
      unsafe io_uring_submit(ring)
    }
  }

  @inline(__always)
  private func tag(_ tag: Tag, _ index: Int, _ operation: Int = 0) -> UInt64 {
    tag.rawValue << 60 | UInt64(UInt32(truncatingIfNeeded: index)) << 32 | UInt64(UInt32(truncatingIfNeeded: operation))
  }

  private static var silentFlag: UInt8 { UInt8(1 << IOSQE_CQE_SKIP_SUCCESS_BIT) }
  private static var fixedFlag: UInt8 { UInt8(1 << IOSQE_FIXED_FILE_BIT) }

  /// A source's or lane's file as a submission names it: its place among the registered files, or its descriptor.
  @inline(__always)
  private func file(ofSource source: Int) -> (number: Int32, flags: UInt8) {
    sources[source].isRegistered ? (Int32(source), Self.fixedFlag) : (sources[source].descriptor, 0)
  }
  @inline(__always)
  private func file(ofLane lane: Int) -> (number: Int32, flags: UInt8) {
    lanes[lane].isRegistered ? (Int32(limits.sources + lane), Self.fixedFlag) : (lanes[lane].descriptor, 0)
  }

  /// Puts a descriptor in the table of registered files. False where the kernel refuses (no memory, a file that may
  /// not be registered): it is named by its number then, for a little more work in the kernel.
  private mutating func register(_ place: Int, _ descriptor: Int32) -> Bool {
    guard features.contains(.fixedFiles) else { return false }
    var value = descriptor
    return unsafe io_uring_register_files_update(ring, UInt32(place), &value, 1) == 1
  }

  // MARK: Sources and lanes

  public mutating func openSource(_ source: Int, _ kind: SourceKind, descriptor: Int32) {
    sources[source] = Source(kind: kind, descriptor: descriptor)
    sources[source].isRegistered = register(source, descriptor)
  }

  public mutating func closeSource(_ source: Int) {
    precondition(!sources[source].isArmed, "a source is closed while it receives")
    if sources[source].isRegistered { _ = register(source, -1) }
    sources[source] = Source()
  }

  public mutating func openLane(_ lane: Int, _ kind: LaneKind, descriptor: Int32) {
    lanes[lane] = Lane(kind: kind, descriptor: descriptor)
    lanes[lane].isRegistered = register(limits.sources + lane, descriptor)
  }

  public mutating func closeLane(_ lane: Int) {
    precondition(lanes[lane].out == 0, "a lane is closed while a chain is out")
    if lanes[lane].awaitsWritable {
      let entry = unsafe entry()
      unsafe io_uring_prep_cancel64(entry, tag(.writable, lane), 0)
      unsafe clinux_sqe_finish(entry, 0, tag(.ignored, lane))
    }
    if lanes[lane].isRegistered { _ = register(limits.sources + lane, -1) }
    lanes[lane] = Lane()
  }

  // MARK: Receiving

  public mutating func post(_ slot: Int, _ memory: inout FrameMemory) {
    isPosted[slot] = true
    guard features.contains(.bufferRing) else { return keepSpare(slot) }
    let shared = unsafe bufferRing.assumingMemoryBound(to: io_uring_buf_ring.self)
    unsafe io_uring_buf_ring_add(
      shared, memory.address(ofSlot: slot), UInt32(FrameMemory.slotBytes), UInt16(truncatingIfNeeded: slot),
      io_uring_buf_ring_mask(UInt32(bufferRingEntries)), 0)
    unsafe io_uring_buf_ring_advance(shared, 1)
  }

  private mutating func keepSpare(_ slot: Int) {
    spare[spareCount] = UInt32(truncatingIfNeeded: slot)
    spareCount += 1
  }

  public mutating func arm(_ source: Int, _ memory: inout FrameMemory) {
    precondition(!sources[source].isArmed, "a source is armed twice")
    sources[source].isArmed = true
    let file = file(ofSource: source)
    let user = tag(.receive, source)
    switch sources[source].kind {
    case .waker:
      let entry = unsafe entry()
      unsafe io_uring_prep_read(entry, file.number, wakeValue, 8, 0)
      unsafe clinux_sqe_finish(entry, file.flags, user)
    case .tap where features.contains(.multishotRead):
      let entry = unsafe entry()
      unsafe clinux_prep_read_multishot(entry, file.number, Self.bufferGroup)
      unsafe clinux_sqe_finish(entry, file.flags, user)
    case .vxlan where features.contains(.multishotReceive), .vnetp where features.contains(.multishotReceive),
      .packet where features.contains(.multishotReceive):
      let entry = unsafe entry()
      unsafe clinux_prep_recvmsg_multishot(entry, file.number, receiveTemplate, Self.bufferGroup)
      unsafe clinux_sqe_finish(entry, file.flags, user)
    case .tap where features.contains(.bufferRing):
      let entry = unsafe entry()
      unsafe io_uring_prep_read(entry, file.number, nil, UInt32(FrameMemory.slotBytes), .max)
      unsafe clinux_sqe_select_buffer(entry, Self.bufferGroup)
      unsafe clinux_sqe_finish(entry, file.flags, user)
    case .guest: preconditionFailure("a guest's ring is no file")
    case .tap, .packet, .vxlan, .vnetp:
      armSingle(source, file, user, memory)
    }
  }

  /// The slowest way: one receive, into a slot chosen now.
  private mutating func armSingle(
    _ source: Int, _ file: (number: Int32, flags: UInt8), _ user: UInt64, _ memory: borrowing FrameMemory
  ) {
    guard spareCount > 0 else {
      // No slot is posted: the source ends as a multishot would. The event is made by `collect`.
      sources[source].isStarved = true
      starvedCount += 1
      return
    }
    spareCount -= 1
    let slot = Int(spare[spareCount])
    sources[source].slot = UInt32(slot)
    let start = unsafe memory.address(ofSlot: slot)
    let entry = unsafe entry()
    if sources[source].kind == .tap {
      unsafe io_uring_prep_read(entry, file.number, start, UInt32(FrameMemory.slotBytes), .max)
    } else {
      let vector = unsafe singleVectors + source
      unsafe vector.pointee = unsafe iovec(
        iov_base: start + MessageSlot.payloadOffset, iov_len: MessageSlot.payloadBytes)
      let message = unsafe singleMessages + source
      unsafe message.pointee = unsafe msghdr(
        msg_name: start + MessageSlot.nameOffset, msg_namelen: socklen_t(MessageSlot.nameBytes), msg_iov: vector,
        msg_iovlen: 1, msg_control: start + MessageSlot.controlOffset,
        msg_controllen: MessageSlot.controlBytes, msg_flags: 0)
      unsafe io_uring_prep_recvmsg(entry, file.number, message, 0)
    }
    unsafe clinux_sqe_finish(entry, file.flags, user)
  }

  public mutating func cancel(_ source: Int) {
    guard sources[source].isArmed, !sources[source].isStarved else { return }
    sources[source].isCancelled = true
    let entry = unsafe entry()
    unsafe io_uring_prep_cancel64(entry, tag(.receive, source), 0)
    unsafe clinux_sqe_finish(entry, 0, tag(.ignored, source))
  }

  public mutating func takeBackSlots(_ memory: inout FrameMemory) {
    for slot in 0..<limits.slots where isPosted[slot] {
      isPosted[slot] = false
      memory.unpost(slot)
    }
    spareCount = 0
  }

  // MARK: Sending

  public mutating func send(_ lane: Int, first: Int, count: Int, _ pool: borrowing SendPool) {
    precondition(lanes[lane].out == 0 && count > 0 && count <= chainFramesMax, "a chain does not fit its lane")
    // A chain must reach the kernel in one piece: links end where a submission ends.
    if unsafe Int(io_uring_sq_space_left(ring)) < count {
      statistics.enters += 1
      unsafe io_uring_submit(ring)
    }
    let file = file(ofLane: lane)
    let kind = lanes[lane].kind
    let link = UInt8(1 << IOSQE_IO_LINK_BIT)
    var operation = first
    for position in 0..<count {
      let message = unsafe pool.message(operation)
      let entry = unsafe entry()
      if kind == .tap {
        unsafe io_uring_prep_writev2(
          entry, file.number, message.pointee.msg_iov, UInt32(message.pointee.msg_iovlen), .max, Int32(RWF_NOWAIT))
      } else {
        unsafe io_uring_prep_sendmsg(entry, file.number, message, UInt32(MSG_DONTWAIT))
      }
      let isLast = position == count - 1
      unsafe clinux_sqe_finish(entry, isLast ? file.flags : file.flags | link, tag(.send, lane, operation))
      expectedBytes[operation] = pool.messageBytes(operation)
      operation = pool.nextMessage(operation)
    }
    lanes[lane].out = UInt32(count)
    lanes[lane].sent = 0
    lanes[lane].error = 0
    sendsOut += count
  }

  public mutating func awaitWritable(_ lane: Int) {
    lanes[lane].awaitsWritable = true
    let file = file(ofLane: lane)
    let entry = unsafe entry()
    unsafe io_uring_prep_poll_add(entry, file.number, UInt32(POLLOUT))
    unsafe clinux_sqe_finish(entry, file.flags, tag(.writable, lane))
  }

  // MARK: Collecting

  public mutating func collect(_ wait: Wait, _ memory: inout FrameMemory, into events: inout EventBatch) {
    reportStarved(&events)
    if unsafe io_uring_cq_ready(ring) > 0 || events.count > 0 {
      // What is left of the last turn goes first; what was queued is submitted, and nothing is waited for but sends.
      enterIfUseful(waitingFor: sendsOut)
    } else if sendsOut > 0 {
      enterIfUseful(waitingFor: sendsOut)
    } else {
      if wait != .sweep { statistics.sleeps += 1 }
      switch wait {
      case .sweep: enterIfUseful(waitingFor: 0)
      case .forEvent: enter(waitingFor: 1, nanoseconds: nil)
      case .atMost(let nanoseconds): enter(waitingFor: 1, nanoseconds: nanoseconds)
      case .forBatch(let completions, let nanoseconds): enter(waitingFor: completions, nanoseconds: nanoseconds)
      }
    }
    if unsafe clinux_has_overflown(ring) { statistics.overflows += 1 }
    let ready = unsafe Int(io_uring_cq_ready(ring))
    var used = 0
    // A completion makes at most two events.
    while used < ready, events.room >= 2 {
      let completion = unsafe clinux_cqe_at(ring, UInt32(used))!.pointee
      used += 1
      handle(completion, &memory, &events)
    }
    unsafe io_uring_cq_advance(ring, UInt32(used))
    statistics.completions += used
  }

  @inline(__always)
  private mutating func enterIfUseful(waitingFor count: Int) {
    if count > 0 { return enter(waitingFor: count, nanoseconds: nil) }
    // Without deferred work the kernel completes by itself; with it, a flag tells when there is something to run.
    guard unsafe io_uring_sq_ready(ring) > 0 || clinux_work_is_pending(ring) else { return }
    statistics.enters += 1
    unsafe io_uring_submit_and_get_events(ring)
  }

  @inline(__always)
  private mutating func enter(waitingFor count: Int, nanoseconds: Int?) {
    statistics.enters += 1
    // EINTR, EAGAIN, EBUSY, ETIME: nothing is lost; the next turn comes back here.
    if let nanoseconds {
      var limit = __kernel_timespec(
        tv_sec: Int64(nanoseconds / 1_000_000_000), tv_nsec: Int64(nanoseconds % 1_000_000_000))
      var first: UnsafeMutablePointer<io_uring_cqe>?
      _ = unsafe io_uring_submit_and_wait_timeout(ring, &first, UInt32(count), &limit, nil)
    } else {
      _ = unsafe io_uring_submit_and_wait(ring, UInt32(count))
    }
  }

  @inline(__always)
  private mutating func handle(
    _ completion: io_uring_cqe, _ memory: inout FrameMemory, _ events: inout EventBatch
  ) {
    let user = completion.user_data
    let index = Int(user >> 32 & 0x0FFF_FFFF)
    switch Tag(rawValue: user >> 60) {
    case .receive: received(index, completion.res, completion.flags, &memory, &events)
    case .send: sent(index, Int(user & 0xFFFF_FFFF), completion.res, &events)
    case .writable:
      guard lanes[index].awaitsWritable else { return }
      lanes[index].awaitsWritable = false
      var event = IOEvent(.writable, index)
      if completion.res < 0 { event.error = -completion.res }
      events.append(event)
    case .ignored, nil: return
    }
  }

  @inline(__always)
  private mutating func received(
    _ source: Int, _ result: Int32, _ flags: UInt32, _ memory: inout FrameMemory, _ events: inout EventBatch
  ) {
    let hasMore = flags & UInt32(IORING_CQE_F_MORE) != 0
    if sources[source].kind == .waker {
      sources[source].isArmed = false
      var event = IOEvent(result == 8 ? .woken : .receiveEnded, source)
      if result < 0 { event.error = -result }
      events.append(event)
      return
    }
    var slot = UInt32.max
    if flags & UInt32(IORING_CQE_F_BUFFER) != 0 {
      slot = flags >> UInt32(IORING_CQE_BUFFER_SHIFT)
      if result < 0 {
        // Taken and not filled: it comes back unused.
        isPosted[Int(slot)] = false
        memory.unpost(Int(slot))
      }
    } else if sources[source].slot != .max {
      slot = sources[source].slot
      sources[source].slot = .max
      if result < 0 { keepSpare(Int(slot)) }
    }
    if result >= 0, slot != .max {
      isPosted[Int(slot)] = false
      memory.received(Int(slot))
      events.append(describe(source, Int(slot), Int(result), memory))
    }
    guard !hasMore else { return }
    sources[source].isArmed = false
    let isSingle =
      sources[source].kind == .tap ? !features.contains(.multishotRead) : !features.contains(.multishotReceive)
    if isSingle, result >= 0, !sources[source].isCancelled { return arm(source, &memory) }
    // A read of 0 bytes or of none at all ends the source as an error does: a device never says end of file.
    let error = result < 0 ? -result : sources[source].isCancelled ? ECANCELED : 0
    sources[source].isCancelled = false
    events.append(IOEvent(.receiveEnded, source, error: error))
  }

  private mutating func reportStarved(_ events: inout EventBatch) {
    guard starvedCount > 0 else { return }
    for source in 0..<limits.sources where sources[source].isStarved && !events.isFull {
      sources[source].isStarved = false
      sources[source].isArmed = false
      starvedCount -= 1
      events.append(IOEvent(.receiveEnded, source, error: ENOBUFS))
    }
  }

  /// Finds the frame or datagram in a filled slot.
  @inline(__always)
  private func describe(_ source: Int, _ slot: Int, _ result: Int, _ memory: borrowing FrameMemory) -> IOEvent {
    let kind = sources[source].kind
    guard kind.isMessage else {
      var event = IOEvent(.received, source)
      event.slot = UInt32(truncatingIfNeeded: slot)
      event.length = UInt32(truncatingIfNeeded: result)
      event.isTruncated = result >= FrameMemory.slotBytes
      return event
    }
    let start = unsafe UnsafeRawPointer(memory.address(ofSlot: slot))
    guard features.contains(.multishotReceive) else {
      let message = unsafe singleMessages[source]
      return unsafe MessageSlot.describe(
        start, source, kind, slot: slot, length: result, controlCount: message.msg_controllen,
        flags: UInt32(bitPattern: message.msg_flags))
    }
    // struct io_uring_recvmsg_out, then the name and the control messages, each in the room that the template gave.
    let header = unsafe start.loadUnaligned(as: io_uring_recvmsg_out.self)
    return unsafe MessageSlot.describe(
      start, source, kind, slot: slot, length: result - MessageSlot.payloadOffset,
      controlCount: Int(header.controllen), flags: header.flags)
  }

  @inline(__always)
  private mutating func sent(_ lane: Int, _ operation: Int, _ result: Int32, _ events: inout EventBatch) {
    precondition(lanes[lane].out > 0, "a send completed twice")
    lanes[lane].out -= 1
    sendsOut -= 1
    if result == Int32(bitPattern: expectedBytes[operation]) {
      lanes[lane].sent += 1
    } else if result >= 0 {
      lanes[lane].error = IOEvent.shortWrite
    } else if result != -ECANCELED {
      lanes[lane].error = -result
    }
    guard lanes[lane].out == 0 else { return }
    var event = IOEvent(.sent, lane, error: lanes[lane].error)
    event.count = lanes[lane].sent
    events.append(event)
  }

  public func now() -> UInt64 { MonotonicClock.now() }

  public mutating func wake(_ waker: Int32) { Waker.wake(waker) }

  /// The eventfd is a frontend's, who may have filled it and made it wait: so the kernel is told not to.
  public mutating func call(_ guest: Int32) {
    let entry = unsafe entry()
    unsafe io_uring_prep_writev2(entry, guest, callVector, 1, 0, Int32(RWF_NOWAIT))
    unsafe clinux_sqe_finish(entry, features.contains(.silentSuccess) ? Self.silentFlag : 0, tag(.ignored, 0))
  }

  public mutating func callAtOnce(_ guest: Int32) {
    call(guest)
    statistics.enters += 1
    unsafe io_uring_submit(ring)
  }

  public func yieldProcessor() {
    sched_yield()
  }

  public mutating func takeStatistics() -> IOStatistics {
    defer { statistics = IOStatistics() }
    return statistics
  }
}

extension IOLimits {
  /// Completion queue entries: everything that can be out at once completes without an overflow: each posted slot,
  /// each send, for each source its end and a cancellation, for each lane a poll and a cancellation.
  var completions: Int { max(2 * entries, posted + operations + 2 * sources + 2 * lanes) }
}
