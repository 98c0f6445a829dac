import CLinux
import Datapath
import Glibc
import Synchronization

/// A side of a worker's I/O that costs next to nothing: frames lie ready in the slots, every chain of sends is taken at
/// once, and there is no system call but what wakes a neighbour. What is left to measure is the worker.
///
/// A slot gets its frame when it is posted for the first time, and keeps it: the bytes of flow `slot % flows`. So the
/// copies that a kernel makes are left out, in and out.
struct MemoryIO: ~Copyable, WorkerIO {
  /// What a port of the benchmark receives.
  struct Load: Sendable {
    /// Frames by flow, equally long.
    var frames: [[UInt8]]
    /// Received in one collect, at most.
    var batchFrames = 64
  }

  /// What control says to it and what it says to control, beside the mailbox.
  final class Signal: Sendable {
    /// Control wrote to the mailbox: the wake-up without its system call.
    let isWoken = Atomic<Bool>(false)
    /// The first datagrams or writes that did not look as they should.
    let wrongSends = Atomic<Int>(0)
  }

  let chainFramesMax = 64
  private let load: Load
  private let signal: Signal
  /// Frames received and sent, and events: for whoever turns the worker, on the same thread.
  private let counters: CounterBlock.Writer
  private let wakerSource: Int

  /// Posted slots, the one posted first in front; the places are a power of two.
  private var posted: FixedArray<UInt32>
  private var postedFirst = 0
  private var postedCount = 0
  private var isFilled: FixedArray<Bool>

  /// The one source of frames.
  private var source = -1
  private var isArmed = false
  private var hasEnded = false
  /// Chains to report, each lane once.
  private var chains: FixedArray<Chain>
  private var chainCount = 0
  private var statistics = IOStatistics()
  private var sendsToCheck = 256

  struct Chain: BitwiseCopyable {
    var lane: UInt32
    var count: UInt32
  }

  init(_ load: Load, slots: Int, lanes: Int, wakerSource: Int, _ signal: Signal, _ counters: CounterBlock.Writer) {
    self.load = load
    self.signal = signal
    self.counters = counters
    self.wakerSource = wakerSource
    var places = 1
    while places < slots { places <<= 1 }
    posted = FixedArray(repeating: 0, count: places)
    isFilled = FixedArray(repeating: false, count: slots)
    chains = FixedArray(repeating: Chain(lane: 0, count: 0), count: lanes)
  }

  mutating func openSource(_ source: Int, _ kind: SourceKind, descriptor: Int32) {
    if source != wakerSource { self.source = source }
  }
  mutating func arm(_ source: Int, _ memory: inout FrameMemory) { if source != wakerSource { isArmed = true } }
  mutating func cancel(_ source: Int) {
    isArmed = false
    hasEnded = true
  }
  mutating func closeSource(_ source: Int) {}
  mutating func openLane(_ lane: Int, _ kind: LaneKind, descriptor: Int32) {}
  mutating func closeLane(_ lane: Int) {}
  mutating func awaitWritable(_ lane: Int) {}

  mutating func post(_ slot: Int, _ memory: inout FrameMemory) {
    if !isFilled[slot] { fill(slot, &memory) }
    posted[(postedFirst &+ postedCount) & (posted.count - 1)] = UInt32(truncatingIfNeeded: slot)
    postedCount += 1
  }

  @inline(never)
  private mutating func fill(_ slot: Int, _ memory: inout FrameMemory) {
    isFilled[slot] = true
    let frame = load.frames[slot % load.frames.count]
    let descriptor = Descriptor(
      buffer: BufferReference(slot: slot), offset: FrameMemory.headroomBytes - TapPort.headerBytes,
      length: TapPort.headerBytes + frame.count, ingress: .none)
    var head = memory.mutableHead(of: descriptor)
    for place in 0..<TapPort.headerBytes { head.storeBytes(of: 0, toByteOffset: place, as: UInt8.self) }
    for place in frame.indices {
      head.storeBytes(of: frame[place], toByteOffset: TapPort.headerBytes + place, as: UInt8.self)
    }
  }

  mutating func send(_ lane: Int, first: Int, count: Int, _ pool: borrowing SendPool) {
    chains[chainCount] = Chain(lane: UInt32(truncatingIfNeeded: lane), count: UInt32(truncatingIfNeeded: count))
    chainCount += 1
    var message = first
    for _ in 0..<count {
      counters.add(.outFrames, pool.messageFrames(message))
      if sendsToCheck > 0 { check(message, pool) }
      message = pool.nextMessage(message)
    }
  }

  /// Whether what a kernel would read is, once or for each frame of a train, a header and one of the frames.
  @inline(never)
  private mutating func check(_ first: Int, _ pool: borrowing SendPool) {
    let message = unsafe pool.message(first).pointee
    let frames = pool.messageFrames(first)
    var isRight = unsafe message.msg_iovlen == 2 * frames
    for frame in 0..<(isRight ? frames : 0) {
      let header = unsafe message.msg_iov[2 * frame].iov_len
      let payload = unsafe message.msg_iov[2 * frame + 1]
      let bytes = unsafe UnsafeRawBufferPointer(start: payload.iov_base, count: payload.iov_len)
      let isFrame = load.frames.contains { unsafe $0.elementsEqual(bytes) }
      isRight = isRight && isFrame && (header == TapPort.headerBytes || header == VXLANHeader.bytes)
    }
    if !isRight { signal.wrongSends.add(1, ordering: .relaxed) }
    sendsToCheck -= 1
  }

  mutating func collect(_ wait: Wait, _ memory: inout FrameMemory, into events: inout EventBatch) {
    statistics.enters += 1
    let before = events.count
    if signal.isWoken.load(ordering: .relaxed), signal.isWoken.exchange(false, ordering: .acquiring) {
      events.append(IOEvent(.woken, wakerSource))
    }
    for place in 0..<chainCount {
      var event = IOEvent(.sent, Int(chains[place].lane))
      event.count = chains[place].count
      events.append(event)
    }
    chainCount = 0
    if isArmed { receive(&memory, into: &events) }
    if hasEnded {
      hasEnded = false
      events.append(IOEvent(.receiveEnded, source, error: ECANCELED))
    }
    statistics.completions += events.count - before
    counters.add(.completions, events.count - before)
    if events.count == before, wait != .sweep {
      statistics.sleeps += 1
      sched_yield()
    }
  }

  @inline(__always)
  private mutating func receive(_ memory: inout FrameMemory, into events: inout EventBatch) {
    let count = min(load.batchFrames, postedCount, events.room - 1)
    guard count > 0 else { return }
    let length = UInt32(truncatingIfNeeded: TapPort.headerBytes + load.frames[0].count)
    let offset = UInt32(truncatingIfNeeded: FrameMemory.headroomBytes - TapPort.headerBytes)
    for _ in 0..<count {
      var event = IOEvent(.received, source)
      event.slot = posted[postedFirst]
      memory.received(Int(event.slot))
      event.offset = offset
      event.length = length
      postedFirst = (postedFirst &+ 1) & (posted.count - 1)
      events.append(event)
    }
    postedCount -= count
    counters.add(.inFrames, count)
  }

  mutating func takeStatistics() -> IOStatistics {
    defer { statistics = IOStatistics() }
    return statistics
  }

  mutating func takeBackSlots(_ memory: inout FrameMemory) {
    while postedCount > 0 {
      memory.unpost(Int(posted[postedFirst]))
      postedFirst = (postedFirst &+ 1) & (posted.count - 1)
      postedCount -= 1
    }
  }

  func now() -> UInt64 { Report.now() }
  mutating func wake(_ waker: Int32) { Waker.wake(waker) }
  /// The workers that are measured have their cores to themselves.
  func yieldProcessor() {}
}
