import CLinux
import Glibc

/// The system-call side of a worker's I/O: for hosts that forbid io_uring, and what io_uring is measured against.
///
/// The way of a frame here:
///  1. `post` puts slots on a stack, the warmest on top.
///  2. `arm` enters a source in epoll, once: it stays there, level-triggered, so that what one turn leaves unread is
///     told again in the next.
///  3. `send` carries the chain out at once, by `sendmmsg` or one `writev` a frame; its `sent` event waits in
///     `pending` for the next `collect`.
///  4. `collect` asks epoll once which sources have something, then reads each until it is empty, or its share of the
///     turn, the slots or the room for events are used up. The source that goes first changes from turn to turn.
///
/// TAP descriptors must be O_NONBLOCK, as `TapDevice` opens them; sockets are used with MSG_DONTWAIT.
@safe
public struct SyscallIO: ~Copyable, WorkerIO {
  /// Frames of one chain, and of one `sendmmsg` or `recvmmsg`.
  static let messagesMax = 64
  /// Frames that one source may bring in one turn, so that others come to their turn: as many as fill a batch.
  static let receivesPerSourceMax = 64
  /// What a first `recvmmsg` asks for; twice as much as the last one brought after that: messages are prepared for
  /// nothing where fewer come.
  private static let messagesAtFirst = 8
  /// How often a lane is tried again that the kernel could not be asked about (no descriptor or memory left).
  private static let retryNanoseconds = 1_000_000

  private let limits: IOLimits
  public var chainFramesMax: Int { Self.messagesMax }

  private let epoll: Int32
  /// Whether the kernel waits by nanoseconds (`epoll_pwait2`, 5.11); otherwise waits are rounded up to milliseconds.
  private var waitsByNanoseconds: Bool
  private let ready: UnsafeMutablePointer<epoll_event>
  private let readyRoom: Int
  private var turn = 0

  private var sources: FixedArray<Source>
  private var lanes: FixedArray<Lane>
  /// Lanes whose writability epoll could not be asked for.
  private var retryCount = 0

  /// Events that no `collect` has given out yet: for each lane at most the end of its chain and that it is writable,
  /// for each source its end.
  private var pending: FixedArray<IOEvent>
  private var pendingCount = 0

  /// Posted slots, the one posted last on top.
  private var spare: FixedArray<UInt32>
  private var spareCount = 0

  private let messages: UnsafeMutablePointer<clinux_message>
  private let vectors: UnsafeMutablePointer<iovec>
  private var statistics = IOStatistics()

  struct Source: BitwiseCopyable {
    var kind = SourceKind.waker
    var descriptor: Int32 = -1
    var isArmed = false
    /// Whether epoll has it. It may stay there when the receive has ended; it is taken out when it is told of then.
    var isWatched = false
    /// How many messages the next `recvmmsg` asks for.
    var messagesWanted: UInt32 = UInt32(SyscallIO.messagesAtFirst)
  }

  struct Lane: BitwiseCopyable {
    var kind = LaneKind.tap
    var descriptor: Int32 = -1
    /// A duplicate of the descriptor, for epoll alone, made when the lane is full for the first time; or -1. Epoll
    /// takes a descriptor once, and the same one may be a source, or several lanes.
    var watched: Int32 = -1
    var isInEpoll = false
    var awaitsWritable = false
    var isRetried = false
    var hasResult = false
  }

  /// What an entry of epoll belongs to: a lane, or a source.
  private static let laneMark: UInt64 = 1 << 32

  /// - Parameter waitsByNanoseconds: false to wait as a kernel before 5.11 does, although this one may be newer.
  /// - Throws: where no descriptor is left (EMFILE).
  public init(_ limits: IOLimits, waitsByNanoseconds: Bool = true) throws(SystemError) {
    let epoll = epoll_create1(Int32(EPOLL_CLOEXEC))
    guard epoll >= 0 else { throw SystemError(errno, doing: "make an epoll instance") }
    self.epoll = epoll
    self.limits = limits
    self.waitsByNanoseconds = waitsByNanoseconds
    readyRoom = max(1, limits.sources + limits.lanes)
    unsafe ready = .allocate(capacity: readyRoom)
    unsafe ready.initialize(repeating: epoll_event(), count: readyRoom)
    sources = FixedArray(repeating: Source(), count: limits.sources)
    lanes = FixedArray(repeating: Lane(), count: limits.lanes)
    pending = FixedArray(repeating: IOEvent(.woken, 0), count: 2 * limits.lanes + limits.sources)
    spare = FixedArray(repeating: 0, count: limits.slots)
    unsafe messages = .allocate(capacity: Self.messagesMax)
    unsafe messages.initialize(repeating: unsafe clinux_message(), count: Self.messagesMax)
    unsafe vectors = .allocate(capacity: Self.messagesMax)
    unsafe vectors.initialize(repeating: unsafe iovec(), count: Self.messagesMax)
  }

  deinit {
    for lane in 0..<limits.lanes where lanes[lane].watched >= 0 { close(lanes[lane].watched) }
    close(epoll)
    unsafe ready.deallocate()
    unsafe messages.deallocate()
    unsafe vectors.deallocate()
  }

  // MARK: Sources

  public mutating func openSource(_ source: Int, _ kind: SourceKind, descriptor: Int32) {
    sources[source] = Source(kind: kind, descriptor: descriptor)
  }

  public mutating func closeSource(_ source: Int) {
    precondition(!sources[source].isArmed, "a source is closed while it receives")
    unwatch(source)
    sources[source] = Source()
  }

  public mutating func arm(_ source: Int, _ memory: inout FrameMemory) {
    precondition(!sources[source].isArmed, "a source is armed twice")
    sources[source].isArmed = true
    guard !sources[source].isWatched else { return }
    statistics.enters += 1
    if clinux_epoll_watch_readable(epoll, sources[source].descriptor, UInt64(source)) == 0 {
      sources[source].isWatched = true
    } else {
      end(source, errno)
    }
  }

  public mutating func cancel(_ source: Int) {
    guard sources[source].isArmed else { return }
    end(source, ECANCELED)
  }

  private mutating func end(_ source: Int, _ error: Int32) {
    sources[source].isArmed = false
    keep(IOEvent(.receiveEnded, source, error: error))
  }

  private mutating func unwatch(_ source: Int) {
    guard sources[source].isWatched else { return }
    statistics.enters += 1
    _ = clinux_epoll_forget(epoll, sources[source].descriptor)
    sources[source].isWatched = false
  }

  // MARK: Slots

  public mutating func post(_ slot: Int, _ memory: inout FrameMemory) {
    spare[spareCount] = UInt32(truncatingIfNeeded: slot)
    spareCount += 1
  }

  public mutating func takeBackSlots(_ memory: inout FrameMemory) {
    for place in 0..<spareCount { memory.unpost(Int(spare[place])) }
    spareCount = 0
  }

  // MARK: Lanes

  public mutating func openLane(_ lane: Int, _ kind: LaneKind, descriptor: Int32) {
    lanes[lane] = Lane(kind: kind, descriptor: descriptor)
  }

  public mutating func closeLane(_ lane: Int) {
    precondition(!lanes[lane].hasResult, "a lane is closed while a chain is out")
    if lanes[lane].watched >= 0 {
      // Closing the duplicate would not do: epoll forgets a file when its last descriptor is closed.
      statistics.enters += 2
      if lanes[lane].isInEpoll { _ = clinux_epoll_forget(epoll, lanes[lane].watched) }
      close(lanes[lane].watched)
    }
    if lanes[lane].isRetried { retryCount -= 1 }
    lanes[lane] = Lane()
    // That it is writable may be known and not told.
    var kept = 0
    for place in 0..<pendingCount {
      let event = pending[place]
      if event.kind == .writable && Int(event.index) == lane { continue }
      pending[kept] = event
      kept += 1
    }
    pendingCount = kept
  }

  public mutating func awaitWritable(_ lane: Int) {
    lanes[lane].awaitsWritable = true
    if lanes[lane].watched < 0 {
      statistics.enters += 1
      lanes[lane].watched = fcntl(lanes[lane].descriptor, F_DUPFD_CLOEXEC, 0)
    }
    statistics.enters += 1
    let key = Self.laneMark | UInt64(lane)
    let isKnown: Int32 = lanes[lane].isInEpoll ? 1 : 0
    if lanes[lane].watched >= 0,
      clinux_epoll_watch_writable_once(epoll, lanes[lane].watched, key, isKnown) == 0
    {
      lanes[lane].isInEpoll = true
    } else {
      lanes[lane].isRetried = true
      retryCount += 1
    }
  }

  private mutating func isWritable(_ lane: Int, error: Int32) {
    guard lanes[lane].awaitsWritable else { return }
    lanes[lane].awaitsWritable = false
    statistics.completions += 1
    keep(IOEvent(.writable, lane, error: error))
  }

  // MARK: Sending

  public mutating func send(_ lane: Int, first: Int, count: Int, _ pool: borrowing SendPool) {
    precondition(!lanes[lane].hasResult && count > 0 && count <= chainFramesMax, "a chain does not fit its lane")
    let (sent, error) =
      lanes[lane].kind == .tap
      ? write(lanes[lane].descriptor, first, count, pool) : sendMessages(lanes[lane].descriptor, first, count, pool)
    var event = IOEvent(.sent, lane, error: error)
    event.count = UInt32(truncatingIfNeeded: sent)
    lanes[lane].hasResult = true
    statistics.completions += sent
    keep(event)
  }

  @inline(__always)
  private mutating func write(
    _ descriptor: Int32, _ first: Int, _ count: Int, _ pool: borrowing SendPool
  ) -> (sent: Int, error: Int32) {
    var operation = first
    for sent in 0..<count {
      let message = unsafe pool.message(operation).pointee
      statistics.enters += 1
      let result = unsafe writev(descriptor, message.msg_iov, Int32(truncatingIfNeeded: message.msg_iovlen))
      if result < 0 { return (sent, errno) }
      if result != Int(pool.messageBytes(operation)) { return (sent, IOEvent.shortWrite) }
      operation = pool.nextMessage(operation)
    }
    return (count, 0)
  }

  /// A `sendmmsg` that stops in the middle says how far it came; the next one, from there, says why.
  @inline(__always)
  private mutating func sendMessages(
    _ descriptor: Int32, _ first: Int, _ count: Int, _ pool: borrowing SendPool
  ) -> (sent: Int, error: Int32) {
    var operation = first
    for place in 0..<count {
      unsafe messages[place] = unsafe clinux_message(header: pool.message(operation).pointee, length: 0)
      operation = pool.nextMessage(operation)
    }
    var sent = 0
    operation = first
    while sent < count {
      statistics.enters += 1
      let result = unsafe clinux_send_messages(
        descriptor, messages + sent, UInt32(truncatingIfNeeded: count - sent), Int32(MSG_DONTWAIT))
      if result < 0 { return (sent, errno) }
      // Nothing sent and no error: as a full socket, so that nothing turns in circles here.
      if result == 0 { return (sent, EAGAIN) }
      for _ in 0..<min(result, count - sent) {
        if unsafe messages[sent].length != pool.messageBytes(operation) { return (sent, IOEvent.shortWrite) }
        operation = pool.nextMessage(operation)
        sent += 1
      }
    }
    return (sent, 0)
  }

  // MARK: Collecting

  public mutating func collect(_ wait: Wait, _ memory: inout FrameMemory, into events: inout EventBatch) {
    retryLanes()
    let hasNews = pendingCount > 0 || events.count > 0
    if wait != .sweep && !hasNews { statistics.sleeps += 1 }
    var batch = 0
    var deadline: UInt64 = 0
    if case .forBatch(let completions, let nanoseconds) = wait, !hasNews {
      batch = completions
      deadline = now() + UInt64(max(0, nanoseconds))
    }
    let countBefore = events.count
    var limit = hasNews ? 0 : Self.nanoseconds(wait)
    while true {
      let readyCount = waitForReady(limit)
      handle(readyCount, &memory, &events)
      tell(&events)
      // A fuller batch for a bounded delay, as long as there is room for it.
      guard events.count - countBefore < batch, spareCount > 0, events.room >= 2 else { return }
      let time = now()
      guard time < deadline else { return }
      limit = Int(deadline - time)
    }
  }

  /// Nanoseconds to wait for the first thing that happens; nil for as long as it takes.
  private static func nanoseconds(_ wait: Wait) -> Int? {
    switch wait {
    case .sweep: 0
    case .forEvent: nil
    case .atMost(let nanoseconds): max(0, nanoseconds)
    case .forBatch(_, let nanoseconds): max(0, nanoseconds)
    }
  }

  /// How many entries epoll has ready; 0 when the time is over or a signal came.
  private mutating func waitForReady(_ nanoseconds: Int?) -> Int {
    var limit = nanoseconds
    if retryCount > 0 { limit = min(limit ?? .max, Self.retryNanoseconds) }
    statistics.enters += 1
    let room = Int32(truncatingIfNeeded: readyRoom)
    guard let limit, limit > 0 else {
      return unsafe Int(max(0, epoll_wait(epoll, ready, room, limit == nil ? -1 : 0)))
    }
    if waitsByNanoseconds {
      let count = unsafe clinux_epoll_wait_nanoseconds(epoll, ready, room, limit)
      if count >= 0 { return Int(count) }
      // Before 5.11 (ENOSYS), or where a filter does not know it.
      if errno == EINTR { return 0 }
      waitsByNanoseconds = false
    }
    let milliseconds = min(limit / 1_000_000 + (limit % 1_000_000 == 0 ? 0 : 1), Int(Int32.max))
    return unsafe Int(max(0, epoll_wait(epoll, ready, room, Int32(milliseconds))))
  }

  /// Goes through what epoll told, from another place each turn, so that no source always comes last.
  private mutating func handle(_ count: Int, _ memory: inout FrameMemory, _ events: inout EventBatch) {
    turn &+= 1
    // Where slots ran out within this turn, a source that comes later waits for the next, first of all then.
    let hadSlots = spareCount > 0
    for step in 0..<count {
      let place = Int32(truncatingIfNeeded: (step + turn) % count)
      let key = unsafe clinux_epoll_key(ready, place)
      let flags = unsafe clinux_epoll_events(ready, place)
      if key & Self.laneMark != 0 {
        // Neither room nor a reason: the device behind a TAP queue is gone (tun_chr_poll of drivers/net/tun.c).
        let isGone = flags & EPOLLOUT.rawValue == 0 && flags & (EPOLLERR.rawValue | EPOLLHUP.rawValue) != 0
        isWritable(Int(key & 0xFFFF_FFFF), error: isGone ? EBADFD : 0)
      } else {
        receive(Int(key), hadSlots, &memory, &events)
      }
    }
  }

  private mutating func retryLanes() {
    guard retryCount > 0 else { return }
    for lane in 0..<limits.lanes where lanes[lane].isRetried {
      lanes[lane].isRetried = false
      retryCount -= 1
      isWritable(lane, error: 0)
    }
  }

  /// Keeps an event for `tell`.
  @inline(__always)
  private mutating func keep(_ event: IOEvent) {
    pending[pendingCount] = event
    pendingCount += 1
  }

  /// Gives out what was kept, as far as there is room.
  @inline(__always)
  private mutating func tell(_ events: inout EventBatch) {
    let count = min(pendingCount, events.room)
    for place in 0..<count {
      let event = pending[place]
      if event.kind == .sent { lanes[Int(event.index)].hasResult = false }
      events.append(event)
    }
    for place in count..<pendingCount { pending[place - count] = pending[place] }
    pendingCount -= count
  }

  // MARK: Receiving

  @inline(__always)
  private mutating func receive(
    _ source: Int, _ hadSlots: Bool, _ memory: inout FrameMemory, _ events: inout EventBatch
  ) {
    // The receive ended and was not armed again since: it is told of no more, or epoll would never sleep.
    guard sources[source].isArmed else { return unwatch(source) }
    if sources[source].kind == .waker { return receiveWake(source, &events) }
    guard spareCount > 0 else {
      if !hadSlots { end(source, ENOBUFS) }
      return
    }
    var room = min(Self.receivesPerSourceMax, events.room - pendingCount)
    while room > 0, spareCount > 0 {
      let isDevice = sources[source].kind == .tap
      let wanted = isDevice ? 1 : min(room, spareCount, Int(sources[source].messagesWanted))
      let received =
        isDevice ? read(source, &memory, &events) : receiveMessages(source, wanted, &memory, &events)
      statistics.completions += received
      room -= received
      // It is empty, or over.
      if received < wanted { return }
    }
  }

  /// Reads one frame; returns 1, or 0 when there is none.
  @inline(__always)
  private mutating func read(_ source: Int, _ memory: inout FrameMemory, _ events: inout EventBatch) -> Int {
    let slot = Int(spare[spareCount - 1])
    statistics.enters += 1
    let result = unsafe Glibc.read(sources[source].descriptor, memory.address(ofSlot: slot), FrameMemory.slotBytes)
    // A read of 0 bytes ends the source as an error does: a device never says end of file.
    guard result > 0 else {
      failed(source, result < 0 ? errno : 0)
      return 0
    }
    spareCount -= 1
    memory.received(slot)
    var event = IOEvent(.received, source)
    event.slot = UInt32(truncatingIfNeeded: slot)
    event.length = UInt32(truncatingIfNeeded: result)
    event.isTruncated = result >= FrameMemory.slotBytes
    events.append(event)
    return 1
  }

  /// Receives up to `wanted` messages with one call; returns how many.
  @inline(__always)
  private mutating func receiveMessages(
    _ source: Int, _ wanted: Int, _ memory: inout FrameMemory, _ events: inout EventBatch
  ) -> Int {
    for place in 0..<wanted {
      let start = unsafe memory.address(ofSlot: Int(spare[spareCount - 1 - place]))
      unsafe vectors[place] = unsafe iovec(
        iov_base: start + MessageSlot.payloadOffset, iov_len: MessageSlot.payloadBytes)
      unsafe messages[place].header = unsafe msghdr(
        msg_name: start + MessageSlot.nameOffset, msg_namelen: socklen_t(MessageSlot.nameBytes),
        msg_iov: vectors + place, msg_iovlen: 1, msg_control: start + MessageSlot.controlOffset,
        msg_controllen: MessageSlot.controlBytes, msg_flags: 0)
    }
    statistics.enters += 1
    let result = unsafe clinux_receive_messages(
      sources[source].descriptor, messages, UInt32(truncatingIfNeeded: wanted), Int32(MSG_DONTWAIT))
    guard result > 0 else {
      failed(source, result < 0 ? errno : 0)
      return 0
    }
    for place in 0..<result {
      spareCount -= 1
      let slot = Int(spare[spareCount])
      memory.received(slot)
      let message = unsafe messages[place]
      unsafe events.append(
        MessageSlot.describe(
          memory.address(ofSlot: slot), source, sources[source].kind, slot: slot, length: Int(message.length),
          controlCount: message.header.msg_controllen, flags: UInt32(bitPattern: message.header.msg_flags)))
    }
    sources[source].messagesWanted = UInt32(
      truncatingIfNeeded: min(Self.messagesMax, max(Self.messagesAtFirst, 2 * result)))
    return result
  }

  /// One read brings everything that was added to the eventfd.
  private mutating func receiveWake(_ source: Int, _ events: inout EventBatch) {
    var count: UInt64 = 0
    statistics.enters += 1
    // A frontend that has a hand in a kick may have emptied it and made it wait.
    guard unsafe clinux_read_at_once(sources[source].descriptor, &count, 8) == 8 else { return failed(source, errno) }
    statistics.completions += 1
    sources[source].isArmed = false
    // A waker makes one event for each time it is armed: it has its source's place among the pending ones.
    keep(IOEvent(.woken, source))
  }

  /// A receive brought nothing: that the source is empty is no end.
  private mutating func failed(_ source: Int, _ error: Int32) {
    guard error != EAGAIN && error != EINTR else { return }
    end(source, error)
  }

  public func now() -> UInt64 { MonotonicClock.now() }

  public mutating func wake(_ waker: Int32) { Waker.wake(waker) }

  public func yieldProcessor() {
    sched_yield()
  }

  public mutating func takeStatistics() -> IOStatistics {
    defer { statistics = IOStatistics() }
    return statistics
  }
}
