import CLinux
import Glibc

/// The first stage: what the kernel received becomes descriptors.
///
/// The way of a frame:
/// 1. `take`: a filled slot, from a TAP queue or from the underlay's socket, becomes a descriptor for routing.
/// 2. A frame that cannot be one (cut, too short) ends here, counted.
/// 3. `replenish`: slots that came back are posted again, the warmest first.
/// 4. `ended`: a receive that ended is armed again: at once, or when there are slots, or never.
struct ReceiveStage: ~Copyable {
  /// Slots that the kernel holds at most: few, so that they stay warm in the cache; more than a batch, so that none
  /// waits. Measured for the original prototype: 32 to 64 slots beat hundreds.
  let postedMax: Int
  private var sources: FixedArray<Source>
  private var starvedCount = 0

  struct Source: BitwiseCopyable {
    var kind = SourceKind.waker
    var interface = InterfaceIndex.none
    var domain = DomainIndex.none
    var state = State.closed
  }
  enum State: UInt8, BitwiseCopyable { case closed, armed, starved, closing }

  init(sourceCount: Int, postedMax: Int) {
    sources = FixedArray(repeating: Source(), count: sourceCount)
    self.postedMax = postedMax
  }

  mutating func open(
    _ source: Int, _ kind: SourceKind, interface: InterfaceIndex, domain: DomainIndex, descriptor: Int32,
    _ io: inout some WorkerIO & ~Copyable, _ memory: inout FrameMemory
  ) {
    sources[source] = Source(kind: kind, interface: interface, domain: domain, state: .armed)
    io.openSource(source, kind, descriptor: descriptor)
    io.arm(source, &memory)
  }

  /// Appends the frame of one `received` event to `batch`, or drops it.
  @inline(__always)
  mutating func take(
    _ event: IOEvent, _ memory: inout FrameMemory, _ counters: borrowing CounterTable, into batch: inout DescriptorBatch
  ) {
    let source = sources[Int(event.index)]
    if !source.kind.isDatagram {
      let (descriptor, drop) =
        source.kind != .packet
        ? TapPort.describe(event, from: source.interface, domain: source.domain, &memory)
        : PacketPort.describe(event, from: source.interface, domain: source.domain, &memory)
      counters.countIn(descriptor)
      guard let drop else { return batch.append(descriptor) }
      counters.countDrop(drop, descriptor, at: descriptor.ingress)
      memory.release(descriptor.buffer)
    } else {
      var descriptor = VXLANLink.describe(event)
      descriptor.encapsulation = source.kind == .vnetp ? .vnetp : .vxlan
      counters.underlay.add(.inFrames, Int(descriptor.wireFrames))
      counters.underlay.add(.inBytes, Int(descriptor.length))
      if !descriptor.isTruncated && descriptor.wireFrames <= UInt16(RouteStage.trainFramesMax) {
        return batch.append(descriptor)
      }
      counters.underlay.add(.dropOversizedDatagram, Int(descriptor.wireFrames))
      memory.release(descriptor.buffer)
    }
  }

  /// Where frames of a source belong; `.none` twice where it brings none any more.
  @inline(__always)
  func place(of source: Int) -> (interface: InterfaceIndex, domain: DomainIndex) {
    let source = sources[source]
    return source.state == .armed ? (source.interface, source.domain) : (.none, .none)
  }

  /// Posts free slots up to the target, and arms what waited for them.
  @inline(__always)
  mutating func replenish(_ io: inout some WorkerIO & ~Copyable, _ memory: inout FrameMemory) {
    while memory.postedCount < postedMax, let slot = memory.post() { io.post(slot, &memory) }
    guard starvedCount > 0, memory.postedCount > 0 else { return }
    for index in 0..<sources.count where sources[index].state == .starved {
      sources[index].state = .armed
      starvedCount -= 1
      io.arm(index, &memory)
    }
  }

  /// The kernel ended a receive. Returns what control must be told, if anything.
  mutating func ended(
    _ event: IOEvent, _ io: inout some WorkerIO & ~Copyable, _ memory: inout FrameMemory,
    _ counters: borrowing CounterTable
  ) -> Report? {
    let index = Int(event.index)
    if sources[index].state == .closing {
      sources[index] = Source()
      io.closeSource(index)
      return .sourceClosed(index)
    }
    switch event.error {
    case ENOBUFS:
      counters.worker.add(.receiveStarved)
      sources[index].state = .starved
      starvedCount += 1
      return nil
    case 0, EINTR, EAGAIN, ECONNREFUSED, ENOMEM:
      // The kernel ends a multishot when its completion queue is full, or for reasons of its own.
      counters.worker.add(.receiveRearms)
      io.arm(index, &memory)
      return nil
    case EINVAL where sources[index].kind == .packet:
      // A super-frame of a kind that no virtio header can tell (SCTP): the kernel dropped it, and the socket works on.
      counters.worker.add(.receiveRearms)
      io.arm(index, &memory)
      return nil
    default:
      // The device is gone; of a packet port perhaps down (ENETDOWN tells both, once). Control closes it and tries to
      // get it back.
      sources[index] = Source()
      io.closeSource(index)
      return .sourceFailed(index, error: event.error)
    }
  }

  /// An eventfd was written to. Where its source is being closed, that ended its receive before it could be cancelled.
  mutating func woken(_ event: IOEvent, _ io: inout some WorkerIO & ~Copyable, _ memory: inout FrameMemory) -> Report? {
    let index = Int(event.index)
    guard sources[index].state == .closing, sources[index].kind == .waker else {
      io.arm(index, &memory)
      return nil
    }
    sources[index] = Source()
    io.closeSource(index)
    return .sourceClosed(index)
  }

  /// Ends the receive of a source; true when it has ended already and no event will follow.
  mutating func close(_ index: Int, _ io: inout some WorkerIO & ~Copyable) -> Bool {
    switch sources[index].state {
    case .closed: return true
    case .closing: return false
    case .starved:
      starvedCount -= 1
      sources[index] = Source()
      io.closeSource(index)
      return true
    case .armed:
      sources[index].state = .closing
      io.cancel(index)
      return false
    }
  }

  /// Sources that still receive or whose receive is being cancelled, the waker not counted.
  var openCount: Int {
    var count = 0
    for index in 0..<sources.count where sources[index].state != .closed && sources[index].kind != .waker { count += 1 }
    return count
  }

  var sourceCount: Int { sources.count }
  func isWaker(_ index: Int) -> Bool { sources[index].kind == .waker }
}
