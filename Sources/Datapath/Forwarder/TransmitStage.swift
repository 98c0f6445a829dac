import CLinux
import Glibc

/// The third stage: frames leave.
///
/// The way of a frame:
/// 1. `transmit`: a routed frame joins the queue of a lane; a flood joins one for each target. The flow's hash
///    picks the lane of a link, so a flow keeps its outer source port, its socket and its order. A guest's ring takes
///    it at once, where nothing waits before it: the rest of the way is for those that it has no buffers for.
/// 2. `flush`: each lane that has frames and no chain out hands the front of its queue to the kernel, as one chain.
/// 3. `finished`: what the kernel took is counted and its buffers go back. Where it stopped, the frame that failed is
///    dropped under its reason, or everything waits, in order, until the lane takes frames again.
struct TransmitStage: ~Copyable {
  /// Frames that may wait on one lane: what one turn may bring, 64 slots of super-frames of 46 segments, and some ms of
  /// a slow underlay. More would only add delay; TCP fills any queue.
  static let laneFramesMax = 4_096

  private var pool: SendPool
  private var lanes: FixedArray<Lane>
  /// Lanes to flush, each once.
  private var dirty: FixedArray<UInt32>
  private var dirtyCount = 0
  private var lastFlushSecond: UInt32 = 0
  /// Whether the frame at hand goes to several places.
  private var isFlooding = false
  /// How many more of control's looks there are until nothing is left of a guest's ring that was taken back.
  private var looksForLeaving: UInt8 = 0
  /// Of each lane that is opened.
  private let trainFramesMax: UInt32

  struct Lane: BitwiseCopyable {
    var kind = LaneKind.tap
    var interface = InterfaceIndex.none
    var state = State.closed
    var closingReason = Counter.dropInterfaceDown
    var isDirty = false
    /// The queue of frames, through `SendPool.next`: first those that are out, then those that wait.
    var head: UInt32 = 0
    var tail: UInt32 = 0
    var count: UInt32 = 0
    /// How many messages of them are out.
    var out: UInt32 = 0
    /// Datagrams of one train: fewer where the kernel takes no longer ones (64 before 6.9).
    var trainFramesMax = UInt32(SendPool.trainFramesMax)
    /// The longest datagram that may be in a train: shorter after the kernel refused one, for some time from
    /// `refusedSecond` on.
    var trainSegmentBytesMax = UInt32.max
    var refusedSecond: UInt32 = 0
    /// How often control had it looked at since it was full.
    var looks: UInt8 = 0
    /// Whether it was full for a second at least, or its I/O said that it takes long.
    var isStuck: Bool { looks >= Self.looksWhenStuck }
    static var looksWhenStuck: UInt8 { 2 }
  }
  enum State: UInt8, BitwiseCopyable {
    case closed
    case open
    /// Full: one `writable` event is asked for.
    case blocked
    /// Waits for its chain to come back, then drops the rest under `closingReason`.
    case closing
    /// Its device is gone: control was told, once, and will close it.
    case failed
  }

  init(laneCount: Int, operationCount: Int, formsTrains: Bool = true) {
    trainFramesMax = formsTrains ? UInt32(SendPool.trainFramesMax) : 1
    pool = SendPool(count: operationCount)
    lanes = FixedArray(repeating: Lane(), count: laneCount)
    dirty = FixedArray(repeating: 0, count: laneCount)
  }

  mutating func open(
    _ lane: Int, _ kind: LaneKind, interface: InterfaceIndex, descriptor: Int32, _ io: inout some WorkerIO & ~Copyable
  ) {
    lanes[lane] = Lane(kind: kind, interface: interface, state: .open, trainFramesMax: trainFramesMax)
    io.openLane(lane, kind, descriptor: descriptor)
  }

  // MARK: 1. A frame joins its lane

  @inline(__always)
  mutating func transmit(
    _ frame: RoutedFrame, canHoldBack: Bool, _ io: inout some WorkerIO & ~Copyable, _ memory: inout FrameMemory,
    _ counters: borrowing CounterTable
  ) {
    switch frame.target {
    case .unicast(let egress):
      enqueue(frame.descriptor, frame.vni, egress, canHoldBack, &io, &memory, counters)
    case .flood(let targets):
      let copies = targets.targetCount - 1
      memory.hold(frame.descriptor.buffer, adding: copies)
      counters[frame.descriptor.domain]?.add(.copies, copies * Int(frame.descriptor.wireFrames))
      isFlooding = true
      for egress in targets { enqueue(frame.descriptor, frame.vni, egress, canHoldBack, &io, &memory, counters) }
      isFlooding = false
    }
  }

  /// Whether a frame may take send operations: the last quarter is not for floods, or one super-frame to many links
  /// would leave none for the frames behind it.
  @inline(__always)
  private var mayTakeOperations: Bool { !isFlooding || pool.usedCount <= pool.count - pool.count / 4 }

  @inline(__always)
  private mutating func enqueue(
    _ descriptor: Descriptor, _ vni: UInt32, _ egress: InterfaceIndex, _ canHoldBack: Bool,
    _ io: inout some WorkerIO & ~Copyable, _ memory: inout FrameMemory, _ counters: borrowing CounterTable
  ) {
    if descriptor.offload.isSuperFrame {
      return enqueueSuperFrame(descriptor, vni, egress, canHoldBack, &io, &memory, counters)
    }
    if let run = TrainRun(descriptor) { return enqueueRun(run, vni, egress, canHoldBack, &io, &memory, counters) }
    enqueueFrame(descriptor, vni, egress, canHoldBack, &io, &memory, counters)
  }

  @inline(__always)
  private mutating func enqueueFrame(
    _ descriptor: Descriptor, _ vni: UInt32, _ egress: InterfaceIndex, _ canHoldBack: Bool,
    _ io: inout some WorkerIO & ~Copyable, _ memory: inout FrameMemory, _ counters: borrowing CounterTable
  ) {
    let record = counters[egress]
    guard let index = lane(for: descriptor, descriptor.length, egress, record, canHoldBack, &memory, counters)
    else { return }
    let header = Self.header(record.kind, vni)
    if deliver(index, descriptor, record, header, &io, &memory, counters) { return }
    join(index, descriptor, egress, header, &memory, counters)
  }

  /// The lane that takes all frames for a guest at once, for nothing waits there; nil where there is none.
  @inline(__always)
  func laneAtOnce(_ record: InterfaceRecord) -> Int? {
    guard record.kind == .guest, record.laneCount == 1 else { return nil }
    let index = Int(record.laneFirst)
    return lanes[index].state == .open && lanes[index].count == 0 ? index : nil
  }

  /// Hands a frame to a lane that takes it at once, before which nothing waits; false where it has to join the queue.
  @inline(__always)
  private func deliver(
    _ index: Int, _ descriptor: Descriptor, _ record: InterfaceRecord, _ header: SendPool.Header,
    _ io: inout some WorkerIO & ~Copyable, _ memory: inout FrameMemory, _ counters: borrowing CounterTable
  ) -> Bool {
    guard record.kind == .guest, lanes[index].count == 0, lanes[index].state == .open,
      io.deliver(index, header, descriptor, memory)
    else { return false }
    counters.countOut(descriptor, record)
    memory.release(descriptor.buffer)
    return true
  }

  /// A super-frame goes whole to a port that takes it, and else as its segments, which join one lane in order.
  /// Its length is judged by the longest of them.
  @inline(never)
  private mutating func enqueueSuperFrame(
    _ descriptor: Descriptor, _ vni: UInt32, _ egress: InterfaceIndex, _ canHoldBack: Bool,
    _ io: inout some WorkerIO & ~Copyable, _ memory: inout FrameMemory, _ counters: borrowing CounterTable
  ) {
    let record = counters[egress]
    let goesWhole = record.takesWhole(isUDP: descriptor.offload.segmentation == .udp)
    guard let whole = superFrame(descriptor, memory) else {
      // Whoever sent it is to blame, not where it would go: it was never offered here.
      return drop(.dropBadOffload, descriptor, descriptor.ingress, &memory, counters)
    }
    let longest = UInt32(truncatingIfNeeded: whole.segmentBytesMax)
    guard let index = lane(for: descriptor, longest, egress, record, canHoldBack, &memory, counters) else { return }
    if !goesWhole {
      joinSegments(of: whole, index, descriptor, egress, Self.header(record.kind, vni), &memory, counters)
    } else {
      var offload = descriptor.offload
      offload.headerLength = UInt16(truncatingIfNeeded: whole.headerBytes)
      offload.bufferCount = 0
      let header = TapPort.header(offload)
      if deliver(index, descriptor, record, header, &io, &memory, counters) { return }
      join(index, descriptor, egress, header, &memory, counters)
    }
  }

  /// Frames of one train go to a link one by one, as another train; to a port as few super-frames as they make.
  @inline(never)
  private mutating func enqueueRun(
    _ run: TrainRun, _ vni: UInt32, _ egress: InterfaceIndex, _ canHoldBack: Bool,
    _ io: inout some WorkerIO & ~Copyable, _ memory: inout FrameMemory, _ counters: borrowing CounterTable
  ) {
    let record = counters[egress]
    if run.frameBytesMax > record.frameBytesMax {
      // The last may be shorter, and fit.
      memory.hold(run.descriptor.buffer, adding: run.count - 1)
      for number in 0..<run.count {
        enqueueFrame(run.frame(number), vni, egress, canHoldBack, &io, &memory, counters)
      }
      return
    }
    guard let index = lane(for: run.descriptor, run.frameBytesMax, egress, record, canHoldBack, &memory, counters)
    else { return }
    let header = Self.header(record.kind, vni)
    // Each send holds the slot once, beside the run itself until all are queued.
    var number = 0
    while number < run.count {
      guard lanes[index].count < UInt32(Self.laneFramesMax), mayWait(index) else {
        countRest(of: run, from: number, .dropQueueFull, egress, counters)
        break
      }
      memory.hold(run.descriptor.buffer, adding: 1)
      let joined = record.takesSuperFrames ? joinFrames(of: run, from: number, index, egress, record, &memory) : 1
      if joined == 1 { join(index, run.frame(number), egress, header, &memory, counters) }
      number += joined
    }
    memory.release(run.descriptor.buffer)
  }

  private func countRest(
    of run: TrainRun, from number: Int, _ reason: Counter, _ egress: InterfaceIndex, _ counters: borrowing CounterTable
  ) {
    var rest = run.descriptor
    rest.wireFrames = UInt16(truncatingIfNeeded: run.count - number)
    counters.countDrop(reason, rest, at: egress)
  }

  /// Queues the longest super-frame that the frames from one on make; returns how many they are. 1: it makes none, and
  /// nothing was queued.
  private mutating func joinFrames(
    of run: TrainRun, from number: Int, _ index: Int, _ egress: InterfaceIndex, _ record: InterfaceRecord,
    _ memory: inout FrameMemory
  ) -> Int {
    guard number + 1 < run.count, pool.mayJoin, let rest = run.from(number),
      var joined = Coalescer(memory.head(of: rest.frame(0))), record.takesWhole(isUDP: !joined.isTCP)
    else { return 1 }
    while joined.frameCount < rest.count, !joined.isComplete,
      joined.join(memory.head(of: rest.frame(0)), memory.head(of: rest.frame(joined.frameCount)))
    {}
    guard joined.frameCount > 1, let operation = pool.take() else { return 1 }
    guard pool.fill(operation, joining: joined, of: rest, egress: egress, &memory) else {
      pool.giveBack(operation)
      return 1
    }
    append(operation, to: index)
    return joined.frameCount
  }

  /// Where the parts of a super-frame lie; nil when it cannot be cut into as many frames as it is counted as.
  private func superFrame(_ descriptor: Descriptor, _ memory: borrowing FrameMemory) -> SuperFrame? {
    let head = memory.head(of: descriptor)
    guard let whole = SuperFrame(headers: head, frameBytes: Int(descriptor.length), descriptor.offload),
      whole.segmentCount == Int(descriptor.wireFrames)
    else { return nil }
    return whole
  }

  /// What goes before a frame.
  @inline(__always)
  private static func header(_ kind: InterfaceRecord.Kind, _ vni: UInt32) -> SendPool.Header {
    switch kind {
    case .vxlan: VXLANLink.header(vni: vni)
    case .vnetp: VNETPLink.header
    case .tap, .packet, .guest, .absent: TapPort.plainHeader
    }
  }

  /// The lane that takes a frame of which `frameBytes` must fit, offered to `egress` from now on; nil when the frame
  /// was dropped.
  @inline(__always)
  private mutating func lane(
    for descriptor: Descriptor, _ frameBytes: UInt32, _ egress: InterfaceIndex, _ record: InterfaceRecord,
    _ canHoldBack: Bool, _ memory: inout FrameMemory, _ counters: borrowing CounterTable
  ) -> Int? {
    record.counters.add(.offeredFrames, Int(descriptor.wireFrames))
    var reason = Counter.dropInterfaceDown
    if record.laneCount > 0 {
      // A division costs more than the rest of this.
      let index = Int(record.laneFirst + (record.laneCount == 1 ? 0 : descriptor.flowHash % record.laneCount))
      if frameBytes > record.frameBytesMax {
        reason = .dropTooBig
      } else {
        switch lanes[index].state {
        // A full socket may keep frames back only while receives have slots left.
        case .open where !mayTakeOperations, .blocked where !mayTakeOperations: reason = .dropNoSendOperation
        case .blocked
        where !canHoldBack || !mayWait(index) || !memory.mayWait(descriptor.buffer, forStuckLane: lanes[index].isStuck):
          reason = .dropQueueFull
        case .open, .blocked:
          if lanes[index].count < UInt32(Self.laneFramesMax) { return index }
          reason = .dropQueueFull
        case .closed, .closing, .failed: break
        }
      }
    }
    drop(reason, descriptor, egress, &memory, counters)
    return nil
  }

  /// Whether a full lane may keep another frame: half of the operations are for the other lanes.
  @inline(__always)
  private func mayWait(_ index: Int) -> Bool {
    lanes[index].state != .blocked || pool.usedCount <= pool.count / 2
  }

  /// A frame joins the queue of a lane, with `header` before it.
  @inline(__always)
  private mutating func join(
    _ index: Int, _ descriptor: Descriptor, _ egress: InterfaceIndex, _ header: SendPool.Header,
    _ memory: inout FrameMemory, _ counters: borrowing CounterTable
  ) {
    guard let operation = pool.take() else {
      return drop(.dropNoSendOperation, descriptor, egress, &memory, counters)
    }
    guard pool.fill(operation, descriptor, egress: egress, lane: lanes[index].kind, header: header, memory) else {
      pool.giveBack(operation)
      return drop(.dropSendFailed, descriptor, egress, &memory, counters)
    }
    append(operation, to: index)
  }

  /// The segments of a super-frame join the queue of a lane, each with `header` before it; those that find no room are
  /// dropped. Each send holds the buffer once, so that it is held by no more sends than there are operations, whatever
  /// a guest asks for.
  private mutating func joinSegments(
    of whole: SuperFrame, _ index: Int, _ descriptor: Descriptor, _ egress: InterfaceIndex, _ header: SendPool.Header,
    _ memory: inout FrameMemory, _ counters: borrowing CounterTable
  ) {
    let room = min(whole.segmentCount, Self.laneFramesMax - Int(lanes[index].count))
    var reason = Counter.dropQueueFull
    var joined = 0
    while joined < room {
      guard let operation = pool.take() else {
        reason = .dropNoSendOperation
        break
      }
      guard
        pool.fill(
          operation, segment: joined, of: whole, descriptor, egress: egress, lane: lanes[index].kind, header: header,
          memory)
      else {
        pool.giveBack(operation)
        reason = .dropSendFailed
        break
      }
      append(operation, to: index)
      joined += 1
    }
    if joined < whole.segmentCount {
      var rest = descriptor
      rest.wireFrames = UInt16(truncatingIfNeeded: whole.segmentCount - joined)
      counters.countDrop(reason, rest, at: egress)
    }
    if joined > 0 {
      memory.hold(descriptor.buffer, adding: joined - 1)
    } else {
      memory.release(descriptor.buffer)
    }
  }

  @inline(__always)
  private mutating func append(_ operation: Int, to index: Int) {
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
  mutating func flush(
    _ io: inout some WorkerIO & ~Copyable, _ counters: borrowing CounterTable, nowSeconds: UInt32
  ) {
    lastFlushSecond = nowSeconds
    for place in 0..<dirtyCount {
      let index = Int(dirty[place])
      lanes[index].isDirty = false
      let lane = lanes[index]
      guard lane.state == .open, lane.out == 0, lane.count > 0 else { continue }
      if lane.refusedSecond != 0, lane.refusedSecond &+ Self.trainRefusalSeconds < nowSeconds {
        lanes[index].refusedSecond = 0
        lanes[index].trainSegmentBytesMax = .max
      }
      let count = formMessages(index, io.chainFramesMax)
      lanes[index].out = UInt32(truncatingIfNeeded: count)
      io.send(index, first: Int(lane.head), count: count, pool)
      counters.worker.add(.sendChains)
    }
    dirtyCount = 0
  }

  /// How long a lane makes no trains of datagrams as long as those of one that the kernel refused.
  private static let trainRefusalSeconds: UInt32 = 2

  /// Makes messages of what waits on a lane, at most so many; returns how many.
  @inline(__always)
  private mutating func formMessages(_ index: Int, _ most: Int) -> Int {
    let lane = lanes[index]
    guard lane.kind.isDatagram else { return min(Int(lane.count), most) }
    var left = Int(lane.count)
    var operation = Int(lane.head)
    var count = 0
    while left > 0, count < most {
      pool.formTrain(
        from: operation, upTo: min(left, Int(lane.trainFramesMax)), lane.kind,
        segmentBytesMax: lane.trainSegmentBytesMax)
      left -= pool.messageFrames(operation)
      operation = pool.nextMessage(operation)
      count += 1
    }
    return count
  }

  // MARK: 3. The kernel answers

  /// A chain is over. Returns what control must be told, if anything.
  @inline(__always)
  mutating func finished(
    _ event: IOEvent, _ io: inout some WorkerIO & ~Copyable, _ memory: inout FrameMemory,
    _ counters: borrowing CounterTable
  ) -> Report? {
    let index = Int(event.index)
    precondition(event.count <= lanes[index].out, "more messages were sent than were out")
    let unsent = lanes[index].out - event.count
    lanes[index].out = 0
    var framesRefused = 1
    for _ in 0..<event.count {
      let frames = pool.messageFrames(Int(lanes[index].head))
      if frames > 1 { counters.countTrain(frames) }
      for _ in 0..<frames {
        let operation = pop(index)
        let record = pool[operation]
        counters.countOut(record.descriptor, egress: record.egress)
        memory.release(record.descriptor.buffer)
        pool.giveBack(operation)
      }
    }
    var report: Report?
    var wasTrain = false
    if unsent > 0 {
      framesRefused = pool.messageFrames(Int(lanes[index].head))
      wasTrain = framesRefused > 1 && Self.isRefusal(event.error)
      if wasTrain { refuseTrain(index, event.error, counters) }
      dissolve(index, unsent)
    }
    if event.error != 0 && !wasTrain {
      report = failed(index, event.error, framesRefused, &io, &memory, counters)
    }
    if lanes[index].state == .closing {
      empty(index, lanes[index].closingReason, &memory, counters)
      return close(index, &io)
    }
    if lanes[index].count > 0 { markDirty(index) }
    return report
  }

  /// UDP_MAX_SEGMENTS before Linux 6.9.
  private static let trainFramesMaxOfOldKernels = 64

  /// Errors by which the kernel refuses a train and may take its datagrams: longer than the path's MTU (EMSGSIZE;
  /// EINVAL where the socket may fragment), or a device that cannot make the checksums (EIO, EOPNOTSUPP).
  private static func isRefusal(_ error: Int32) -> Bool {
    error == EMSGSIZE || error == EINVAL || error == EIO || error == EOPNOTSUPP
  }

  /// The datagrams of the train at the head of a lane go one by one, and for some time no train is made of any that are
  /// as long.
  private mutating func refuseTrain(_ index: Int, _ error: Int32, _ counters: borrowing CounterTable) {
    let first = Int(lanes[index].head)
    let frames = pool.messageFrames(first)
    if error == EMSGSIZE, !pool[first].wasResent {
      // Perhaps of an earlier datagram that a router found too long, which a connected socket tells once.
      pool[first].wasResent = true
      counters.worker.add(.resends)
      return
    }
    counters.worker.add(.trainRefusals)
    if error == EINVAL, frames > Self.trainFramesMaxOfOldKernels {
      lanes[index].trainFramesMax = UInt32(Self.trainFramesMaxOfOldKernels)
      return
    }
    lanes[index].trainSegmentBytesMax = pool[first].bytes - 1
    lanes[index].refusedSecond = max(1, lastFlushSecond)
    var operation = first
    for _ in 0..<frames {
      pool[operation].isAlone = true
      operation = pool.next(operation)
    }
  }

  /// The messages at the front of a lane's queue, which were not sent, are operations again.
  private mutating func dissolve(_ index: Int, _ messages: UInt32) {
    guard lanes[index].kind.isDatagram else { return }
    var operation = Int(lanes[index].head)
    for _ in 0..<messages {
      let next = pool.nextMessage(operation)
      pool.dissolveTrain(operation)
      operation = next
    }
  }

  /// What stopped a chain; the frames that it stopped at, of one message, are at the head of the lane's queue.
  private mutating func failed(
    _ index: Int, _ error: Int32, _ frames: Int, _ io: inout some WorkerIO & ~Copyable, _ memory: inout FrameMemory,
    _ counters: borrowing CounterTable
  ) -> Report? {
    let operation = Int(lanes[index].head)
    switch error {
    case EAGAIN:
      guard lanes[index].state == .open else { return nil }
      counters.worker.add(.laneBlocks)
      lanes[index].state = .blocked
      lanes[index].looks = 0
      if looksForLeaving > 0 { dropWaiting(at: index, &memory, counters) }
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
    // A guest whose ring makes no sense is as gone as a device.
    let isDeviceGone =
      !lanes[index].kind.isDatagram
      && (error == EBADFD || error == ENODEV || error == EBADF || error == EPROTO && lanes[index].kind == .guest)
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
      for _ in 0..<frames { dropHead(index, reason, &memory, counters) }
      return nil
    }
    empty(index, reason, &memory, counters)
    guard lanes[index].state != .closing else { return nil }
    lanes[index].state = .failed
    return .laneFailed(index, error: error)
  }

  /// Drops what waits at full lanes and may not: frames of a guest's ring that is taken back, and all but a part of a
  /// ring's where the lane is stuck.
  /// - Parameter isSecondOver: whether this is control's look of once a second, by which lanes become stuck; else a
  ///   ring is taken back.
  mutating func dropWaiting(isSecondOver: Bool, _ memory: inout FrameMemory, _ counters: borrowing CounterTable) {
    // What of that ring is still on its way here is looked for until the second look from now.
    looksForLeaving = isSecondOver ? looksForLeaving - min(1, looksForLeaving) : 2
    for index in 0..<lanes.count where lanes[index].state == .blocked {
      if isSecondOver, !lanes[index].isStuck { lanes[index].looks += 1 }
      dropWaiting(at: index, &memory, counters)
    }
  }

  /// A full lane takes nothing for longer than its I/O has patience.
  mutating func stuck(_ event: IOEvent, _ memory: inout FrameMemory, _ counters: borrowing CounterTable) {
    let index = Int(event.index)
    guard lanes[index].state == .blocked else { return }
    lanes[index].looks = Lane.looksWhenStuck
    dropWaiting(at: index, &memory, counters)
  }

  private mutating func dropWaiting(
    at index: Int, _ memory: inout FrameMemory, _ counters: borrowing CounterTable
  ) {
    for _ in 0..<lanes[index].count {
      let buffer = pool[Int(lanes[index].head)].descriptor.buffer
      if memory.mayWait(buffer, forStuckLane: lanes[index].isStuck) {
        append(pop(index), to: index)
      } else {
        dropHead(index, .dropQueueFull, &memory, counters)
      }
    }
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
    lanes[index].looks = 0
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
      lanes[index].closingReason = reason
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
