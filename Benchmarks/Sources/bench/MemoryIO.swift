import CLinux
import Datapath
import Glibc
import Synchronization

/// A side of a worker's I/O that costs next to nothing: frames lie ready in the slots, every chain of sends is taken at
/// once, and there is no system call but what wakes a neighbour. What is left to measure is the worker.
///
/// Each slot has its bytes before it is posted for the first time, and keeps them: those of flow `slot % flows`. So the
/// copies that a kernel makes are left out, in and out.
struct MemoryIO: ~Copyable, WorkerIO {
  /// What is received, and what is to be sent for it.
  struct Load: Sendable {
    /// By flow what a receive brings, equally long: a virtio header and a frame, a datagram or a train of them.
    var received: [[UInt8]]
    /// By flow what is to be sent for it: one or several units, equally long, each with `sentHeaderBytes` of another
    /// header before its Ethernet header. Units are numbered by the identification of their IPv4 headers.
    var sent: [[UInt8]]
    var sentUnitBytes: Int
    var sentHeaderBytes: Int
    /// Frames on the wire of each receive.
    var wireFrames = 1
    /// Bytes of each datagram of a train; 0 where no trains come.
    var trainSegmentBytes = 0
    /// Receives in one collect, at most.
    var batch = 64

    /// Gives every slot its bytes.
    func fill(_ memory: inout FrameMemory) {
      for slot in 0..<memory.slotCount {
        let bytes = received[slot % received.count]
        var room = memory.mutableHead(
          of: Descriptor(buffer: BufferReference(slot: slot), offset: offset, length: bytes.count, ingress: .none))
        unsafe room.withUnsafeMutableBytes { unsafe $0.copyBytes(from: bytes) }
      }
    }

    /// Where in a slot they lie.
    var offset: Int { FrameMemory.headroomBytes - TapPort.headerBytes }
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
    posted[(postedFirst &+ postedCount) & (posted.count - 1)] = UInt32(truncatingIfNeeded: slot)
    postedCount += 1
  }

  mutating func send(_ lane: Int, first: Int, count: Int, _ pool: borrowing SendPool) {
    chains[chainCount] = Chain(lane: UInt32(truncatingIfNeeded: lane), count: UInt32(truncatingIfNeeded: count))
    chainCount += 1
    var message = first
    for _ in 0..<count {
      // A train is many sends; a super-frame is one, and many frames.
      let isTrain = pool.messageFrames(message) > 1
      counters.add(.outFrames, isTrain ? pool.messageFrames(message) : Int(pool[message].descriptor.wireFrames))
      if sendsToCheck > 0 { check(message, pool) }
      message = pool.nextMessage(message)
    }
  }

  /// Whether what a kernel would read is, unit by unit, what is to be sent.
  @inline(never)
  private mutating func check(_ first: Int, _ pool: borrowing SendPool) {
    let message = unsafe pool.message(first).pointee
    let vectors = unsafe UnsafeBufferPointer(start: message.msg_iov, count: Int(message.msg_iovlen))
    var place = MessagePlace()
    var units = 0
    var isRight = true
    while isRight, place.vector < vectors.count {
      isRight = unsafe isNextUnitRight(vectors, &place)
      units += 1
    }
    if !isRight || units != pool.messageFrames(first) { signal.wrongSends.add(1, ordering: .relaxed) }
    sendsToCheck -= 1
  }

  /// Where in a message the next byte lies.
  private struct MessagePlace {
    var vector = 0
    var offset = 0
  }

  @unsafe
  private func isNextUnitRight(_ vectors: UnsafeBufferPointer<iovec>, _ place: inout MessagePlace) -> Bool {
    // The flow is the source MAC's last byte.
    let flow = unsafe Int(byte(vectors, place, ahead: load.sentHeaderBytes + 11) ?? .max)
    let upper = unsafe Int(byte(vectors, place, ahead: load.sentHeaderBytes + 18) ?? 0)
    let lower = unsafe Int(byte(vectors, place, ahead: load.sentHeaderBytes + 19) ?? 0)
    let start = (upper << 8 + lower - LayoutScene.identificationFirst) * load.sentUnitBytes
    guard load.sent.indices.contains(flow), start >= 0, start + load.sentUnitBytes <= load.sent[flow].count else {
      return false
    }
    return unsafe load.sent[flow].withUnsafeBytes { sent in
      var left = load.sentUnitBytes
      while left > 0 {
        guard place.vector < vectors.count else { return false }
        let vector = unsafe vectors[place.vector]
        let count = unsafe min(left, vector.iov_len - place.offset)
        let expected = unsafe sent.baseAddress! + (start + load.sentUnitBytes - left)
        guard unsafe memcmp(vector.iov_base + place.offset, expected, count) == 0 else { return false }
        left -= count
        place.offset += count
        if unsafe place.offset == vector.iov_len { place = MessagePlace(vector: place.vector + 1) }
      }
      return true
    }
  }

  /// The byte so far behind a place; nil where the message ends before it.
  @unsafe
  private func byte(_ vectors: UnsafeBufferPointer<iovec>, _ place: MessagePlace, ahead: Int) -> UInt8? {
    var left = place.offset + ahead
    for number in place.vector..<vectors.count {
      let vector = unsafe vectors[number]
      if unsafe left < vector.iov_len { return unsafe vector.iov_base.load(fromByteOffset: left, as: UInt8.self) }
      unsafe left -= vector.iov_len
    }
    return nil
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
    let count = min(load.batch, postedCount, events.room - 1)
    guard count > 0 else { return }
    let length = UInt32(truncatingIfNeeded: load.received[0].count)
    let offset = UInt32(truncatingIfNeeded: load.offset)
    for _ in 0..<count {
      var event = IOEvent(.received, source)
      event.slot = posted[postedFirst]
      memory.received(Int(event.slot))
      event.offset = offset
      event.length = length
      if load.trainSegmentBytes > 0 {
        event.trainSegmentBytes = UInt16(truncatingIfNeeded: load.trainSegmentBytes)
        event.sender = LayoutScene.peer
      }
      postedFirst = (postedFirst &+ 1) & (posted.count - 1)
      events.append(event)
    }
    postedCount -= count
    counters.add(.inFrames, count * load.wireFrames)
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
