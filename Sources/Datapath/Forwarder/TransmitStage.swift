import CLinux
import Glibc

/// The third stage: frames leave.
///
/// The way of a frame:
/// 1. `transmit`: a routed frame joins the queue of a lane; a flood joins one for each member. The flow's hash
///    picks the lane of a link, so a flow keeps its outer source port, its socket and its order.
/// 2. `flush`: each lane that has frames and no chain out hands the front of its queue to the kernel, as one chain.
/// 3. `finished`: what the kernel took is counted and its buffers go back. Where it stopped, the frame that failed is
///    dropped under its reason, or everything waits, in order, until the lane takes frames again.
struct TransmitStage: ~Copyable {
  /// Frames that may wait on one lane for a full socket: a few batches, a few ms of a slow underlay. More would only
  /// add delay; TCP fills any queue.
  static let laneFramesMax = 256

  private var pool: SendPool
  private var lanes: FixedArray<Lane>
  /// Lanes to flush, each once.
  private var dirty: FixedArray<UInt32>
  private var dirtyCount = 0

  struct Lane: BitwiseCopyable {
    var kind = LaneKind.tap
    var interface = InterfaceIndex.none
    var state = State.closed
    var isDirty = false
    /// The queue of frames, through `SendPool.next`: first those that are out, then those that wait.
    var head: UInt32 = 0
    var tail: UInt32 = 0
    var count: UInt32 = 0
    /// How many of them are out.
    var out: UInt32 = 0
  }
  enum State: UInt8, BitwiseCopyable {
    case closed
    case open
    /// Full: one `writable` event is asked for.
    case blocked
    /// Waits for its chain to come back, then drops the rest.
    case closing
    /// Its device is gone: control was told, once, and will close it.
    case failed
  }

  init(laneCount: Int, operationCount: Int) {
    pool = SendPool(count: operationCount)
    lanes = FixedArray(repeating: Lane(), count: laneCount)
    dirty = FixedArray(repeating: 0, count: laneCount)
  }

  mutating func open(
    _ lane: Int, _ kind: LaneKind, interface: InterfaceIndex, descriptor: Int32, _ io: inout some WorkerIO & ~Copyable
  ) {
    lanes[lane] = Lane(kind: kind, interface: interface, state: .open)
    io.openLane(lane, kind, descriptor: descriptor)
  }

  // MARK: 1. A frame joins its lane

  @inline(__always)
  mutating func transmit(
    _ frame: RoutedFrame, canHoldBack: Bool, _ memory: inout FrameMemory, _ counters: borrowing CounterTable
  ) {
    switch frame.target {
    case .unicast(let egress):
      enqueue(frame.descriptor, frame.vni, egress, canHoldBack, &memory, counters)
    case .flood(let members):
      counters[frame.descriptor.domain]?.add(
        .copies, (members.targetCount - 1) * Int(frame.descriptor.wireFrames))
      memory.hold(frame.descriptor.buffer, adding: members.targetCount - 1)
      for place in 0..<members.count where members[place] != frame.descriptor.ingress {
        enqueue(frame.descriptor, frame.vni, members[place], canHoldBack, &memory, counters)
      }
    }
  }

  @inline(__always)
  private mutating func enqueue(
    _ descriptor: Descriptor, _ vni: UInt32, _ egress: InterfaceIndex, _ canHoldBack: Bool,
    _ memory: inout FrameMemory, _ counters: borrowing CounterTable
  ) {
    let record = counters[egress]
    record.counters.add(.offeredFrames, Int(descriptor.wireFrames))
    guard record.laneCount > 0 else { return drop(.dropInterfaceDown, descriptor, egress, &memory, counters) }
    if descriptor.length > record.frameBytesMax { return drop(.dropTooBig, descriptor, egress, &memory, counters) }
    let index = Int(record.laneFirst + descriptor.flowHash % record.laneCount)
    switch lanes[index].state {
    case .open: break
    // A full socket may keep frames back only while receives have slots left.
    case .blocked where canHoldBack: break
    case .blocked: return drop(.dropQueueFull, descriptor, egress, &memory, counters)
    case .closed, .closing, .failed: return drop(.dropInterfaceDown, descriptor, egress, &memory, counters)
    }
    guard lanes[index].count < UInt32(Self.laneFramesMax) else {
      return drop(.dropQueueFull, descriptor, egress, &memory, counters)
    }
    guard let operation = pool.take() else {
      return drop(.dropNoSendOperation, descriptor, egress, &memory, counters)
    }
    let header =
      switch record.kind {
      case .vxlan: VXLANLink.header(vni: vni)
      case .vnetp: SendPool.Header(count: 0)
      case .tap, .packet, .absent: PacketPort.header(for: descriptor)
      }
    guard pool.fill(operation, descriptor, egress: egress, lane: lanes[index].kind, header: header, memory) else {
      pool.giveBack(operation)
      return drop(.dropSendFailed, descriptor, egress, &memory, counters)
    }
    if lanes[index].count == 0 {
      lanes[index].head = UInt32(truncatingIfNeeded: operation)
    } else {
      pool[Int(lanes[index].tail)].next = UInt32(truncatingIfNeeded: operation)
    }
    lanes[index].tail = UInt32(truncatingIfNeeded: operation)
    lanes[index].count += 1
    markDirty(index)
  }

  @inline(__always)
  private mutating func markDirty(_ index: Int) {
    guard !lanes[index].isDirty else { return }
    lanes[index].isDirty = true
    dirty[dirtyCount] = UInt32(truncatingIfNeeded: index)
    dirtyCount += 1
  }

  // MARK: 2. Lanes hand their queues to the kernel

  @inline(__always)
  mutating func flush(_ io: inout some WorkerIO & ~Copyable, _ counters: borrowing CounterTable) {
    for place in 0..<dirtyCount {
      let index = Int(dirty[place])
      lanes[index].isDirty = false
      let lane = lanes[index]
      guard lane.state == .open, lane.out == 0, lane.count > 0 else { continue }
      let count = min(Int(lane.count), io.chainFramesMax)
      lanes[index].out = UInt32(truncatingIfNeeded: count)
      io.send(index, first: Int(lane.head), count: count, pool)
      counters.worker.add(.sendChains)
    }
    dirtyCount = 0
  }

  // MARK: 3. The kernel answers

  /// A chain is over. Returns what control must be told, if anything.
  @inline(__always)
  mutating func finished(
    _ event: IOEvent, _ io: inout some WorkerIO & ~Copyable, _ memory: inout FrameMemory,
    _ counters: borrowing CounterTable
  ) -> Report? {
    let index = Int(event.index)
    precondition(event.count <= lanes[index].out, "more frames were sent than were out")
    lanes[index].out = 0
    for _ in 0..<event.count {
      let operation = pop(index)
      let record = pool[operation]
      counters.countOut(record.descriptor, egress: record.egress)
      memory.release(record.descriptor.buffer)
      pool.giveBack(operation)
    }
    var report: Report?
    if event.error != 0 { report = failed(index, event.error, &io, &memory, counters) }
    if lanes[index].state == .closing {
      empty(index, .dropInterfaceDown, &memory, counters)
      return close(index, &io)
    }
    if lanes[index].count > 0 { markDirty(index) }
    return report
  }

  /// What stopped a chain; the frame that it stopped at is at the head of the lane's queue.
  private mutating func failed(
    _ index: Int, _ error: Int32, _ io: inout some WorkerIO & ~Copyable, _ memory: inout FrameMemory,
    _ counters: borrowing CounterTable
  ) -> Report? {
    let operation = Int(lanes[index].head)
    switch error {
    case EAGAIN:
      guard lanes[index].state == .open else { return nil }
      counters.worker.add(.laneBlocks)
      lanes[index].state = .blocked
      io.awaitWritable(index)
      return nil
    case EINTR:
      return nil
    case _ where lanes[index].kind.isDatagram && Self.mayBeStale(error) && !pool[operation].wasResent:
      // Perhaps an ICMP answer to an earlier datagram, which a connected socket tells once: this one was not sent.
      pool[operation].wasResent = true
      counters.worker.add(.resends)
      return nil
    default: break
    }
    let isDeviceGone = !lanes[index].kind.isDatagram && (error == EBADFD || error == ENODEV || error == EBADF)
    let reason: Counter =
      switch error {
      case ECONNREFUSED: .dropRefused
      case EMSGSIZE: .dropTooBig
      case IOEvent.shortWrite: .dropShortWrite
      // A device that is set down answers EIO, and may come up again.
      case EIO where !lanes[index].kind.isDatagram: .dropInterfaceDown
      // A packet socket's device is down, or gone (ENXIO): its source ends by it, and control is told by that.
      case ENETDOWN, ENXIO: .dropInterfaceDown
      // The queue of a packet socket's device was full, and the kernel dropped the frame.
      case ENOBUFS: .dropQueueFull
      case ENETUNREACH, EHOSTUNREACH: .dropUnreachable
      default: isDeviceGone ? .dropInterfaceDown : .dropSendFailed
      }
    guard isDeviceGone else {
      dropHead(index, reason, &memory, counters)
      return nil
    }
    empty(index, reason, &memory, counters)
    guard lanes[index].state != .closing else { return nil }
    lanes[index].state = .failed
    return .laneFailed(index, error: error)
  }

  /// Errors that a connected UDP socket passes on from an ICMP message about an earlier datagram (`icmp_err_convert` of
  /// the kernel's net/ipv4/icmp.c).
  private static func mayBeStale(_ error: Int32) -> Bool {
    switch error {
    case ECONNREFUSED, EHOSTUNREACH, ENETUNREACH, EMSGSIZE, EHOSTDOWN, ENOPROTOOPT: true
    default: false
    }
  }

  /// A full lane takes frames again.
  mutating func writable(_ event: IOEvent) {
    let index = Int(event.index)
    guard lanes[index].state == .blocked else { return }
    lanes[index].state = .open
    if lanes[index].count > 0 { markDirty(index) }
  }

  // MARK: Closing

  /// Closes a lane; what waits is dropped under `reason`. Returns the report, or nil while a chain is out.
  mutating func beginClose(
    _ index: Int, _ reason: Counter, _ io: inout some WorkerIO & ~Copyable, _ memory: inout FrameMemory,
    _ counters: borrowing CounterTable
  ) -> Report? {
    guard lanes[index].state != .closed else { return .laneClosed(index) }
    guard lanes[index].out == 0 else {
      lanes[index].state = .closing
      return nil
    }
    empty(index, reason, &memory, counters)
    return close(index, &io)
  }

  private mutating func close(_ index: Int, _ io: inout some WorkerIO & ~Copyable) -> Report {
    lanes[index].state = .closed
    io.closeLane(index)
    return .laneClosed(index)
  }

  private mutating func empty(
    _ index: Int, _ reason: Counter, _ memory: inout FrameMemory, _ counters: borrowing CounterTable
  ) {
    while lanes[index].count > 0 { dropHead(index, reason, &memory, counters) }
  }

  /// Frames that wait or are out, on all lanes.
  var inFlight: Int {
    var total = 0
    for index in 0..<lanes.count { total += Int(lanes[index].count) }
    return total
  }

  /// Calls `body` with the egress and the descriptor of every send that waits or is out.
  func forEachInFlight(_ body: (InterfaceIndex, Descriptor) -> Void) {
    for index in 0..<lanes.count {
      var operation = Int(lanes[index].head)
      for _ in 0..<lanes[index].count {
        body(pool[operation].egress, pool[operation].descriptor)
        operation = pool.next(operation)
      }
    }
  }

  var laneCount: Int { lanes.count }
  /// Send operations in use: equal to `inFlight`, or one was lost.
  var operationsInUse: Int { pool.usedCount }

  // MARK: Parts

  /// Takes the head off a lane's queue.
  @inline(__always)
  private mutating func pop(_ index: Int) -> Int {
    let operation = Int(lanes[index].head)
    lanes[index].head = UInt32(truncatingIfNeeded: pool.next(operation))
    lanes[index].count -= 1
    return operation
  }

  private mutating func dropHead(
    _ index: Int, _ reason: Counter, _ memory: inout FrameMemory, _ counters: borrowing CounterTable
  ) {
    let operation = pop(index)
    let record = pool[operation]
    pool.giveBack(operation)
    drop(reason, record.descriptor, record.egress, &memory, counters)
  }

  @inline(__always)
  private func drop(
    _ reason: Counter, _ descriptor: Descriptor, _ egress: InterfaceIndex, _ memory: inout FrameMemory,
    _ counters: borrowing CounterTable
  ) {
    counters.countDrop(reason, descriptor, at: egress)
    memory.release(descriptor.buffer)
  }
}
