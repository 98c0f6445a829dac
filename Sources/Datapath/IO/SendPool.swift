import CLinux

/// The send operations of one worker: for each send that is waiting or out, the structures that the kernel reads
/// (message, I/O vectors, headers, control message), which must not move, and the descriptor that it sends.
///
/// Headers are written here, never in front of a frame in its slot: a flood sends the same bytes with different
/// headers. Free operations form a stack, so that the one used last is used next, while its lines are warm.
///
/// A message is what the kernel takes in one piece: mostly one operation; or a train, operations of datagrams that
/// follow each other on a lane, of equal length but for the last, which leave as one `sendmsg` (UDP_SEGMENT). Its first
/// operation names the gather that lists the parts. A super-frame made of received frames is one operation with a
/// gather of its own.
@safe
public struct SendPool: ~Copyable, @unchecked Sendable {
  /// Datagrams of one train (UDP_MAX_SEGMENTS, linux/udp.h since 6.9; before that 64).
  public static let trainFramesMax = 128
  /// Bytes of one train: near 65,507, the limit of IPv4, the kernel cuts a train up before the device. Measured with
  /// 65,490 and 65,494 bytes.
  public static let trainBytesMax = 65_000

  private let operations: UnsafeMutablePointer<clinux_send>
  private let gathers: UnsafeMutablePointer<clinux_gather>
  private var freeGathers: FixedArray<UInt32>
  private var freeGatherCount: Int
  private let gatherCount: Int
  private static var noGather: UInt32 { .max }
  private var records: FixedArray<Record>
  private var free: FixedArray<UInt32>
  private var freeCount: Int
  public let count: Int

  /// What the worker remembers of one send.
  public struct Record: BitwiseCopyable {
    public var descriptor: Descriptor
    public var egress: InterfaceIndex
    /// The send after this one on its lane; only the list's owner knows where it ends.
    public var next: UInt32
    /// Whether it was sent again after a stale socket error.
    public var wasResent: Bool
    /// Bytes of it for the kernel, headers included.
    public var bytes: UInt32
    /// Whether it may be no part of a train: the kernel refused one that it was in.
    public var isAlone = false
    /// Of the first of a train: how many operations it has, its bytes, and the operation behind it.
    var trainFrames: UInt16 = 1
    var trainBytes: UInt32 = 0
    var behindTrain: UInt32 = 0
    var gather: UInt32 = .max
  }

  /// - Parameters:
  ///   - count: operations.
  ///   - gathers: messages of many parts at once; without a free one frames leave one by one.
  public init(count: Int, gathers gatherCount: Int = 512) {
    precondition(count > 0 && count < Int(UInt32.max))
    self.count = count
    self.gatherCount = gatherCount
    unsafe gathers = .allocate(capacity: max(1, gatherCount))
    unsafe gathers.initialize(repeating: unsafe clinux_gather(), count: gatherCount)
    freeGathers = FixedArray(repeating: 0, count: gatherCount)
    for index in 0..<gatherCount { freeGathers[index] = UInt32(gatherCount - 1 - index) }
    freeGatherCount = gatherCount
    unsafe operations = .allocate(capacity: count)
    unsafe operations.initialize(repeating: unsafe clinux_send(), count: count)
    let empty = Descriptor(buffer: BufferReference(slot: 0), offset: 0, length: 0, ingress: .none)
    records = FixedArray(
      repeating: Record(descriptor: empty, egress: .none, next: 0, wasResent: false, bytes: 0), count: count)
    free = FixedArray(repeating: 0, count: count)
    for index in 0..<count { free[index] = UInt32(count - 1 - index) }
    freeCount = count
  }

  deinit {
    unsafe operations.deallocate()
    unsafe gathers.deallocate()
  }

  public var usedCount: Int { count - freeCount }

  /// Takes a free operation; nil when all are in use.
  @inline(__always)
  public mutating func take() -> Int? {
    guard freeCount > 0 else { return nil }
    freeCount -= 1
    return Int(free[freeCount])
  }

  @inline(__always)
  public mutating func giveBack(_ operation: Int) {
    precondition(freeCount < count, "an operation was given back twice")
    if records[operation].gather != Self.noGather { giveBackGather(of: operation) }
    free[freeCount] = UInt32(truncatingIfNeeded: operation)
    freeCount += 1
  }

  @inline(__always)
  public subscript(operation: Int) -> Record {
    _read { yield records[operation] }
    _modify { yield &records[operation] }
  }

  /// The operation after `operation` in its list.
  @inline(__always)
  public func next(_ operation: Int) -> Int { Int(records[operation].next) }

  // MARK: Messages

  /// The message that starts at an operation, as the kernel reads it.
  @unsafe @inline(__always)
  public func message(_ operation: Int) -> UnsafeMutablePointer<msghdr> {
    let gather = records[operation].gather
    if gather == Self.noGather { return unsafe clinux_send_message(self.operation(operation))! }
    return unsafe clinux_gather_message(gathers + Int(gather))!
  }

  /// Bytes that the kernel takes of it: a smaller result is a short write.
  @inline(__always)
  public func messageBytes(_ operation: Int) -> UInt32 {
    records[operation].trainFrames > 1 ? records[operation].trainBytes : records[operation].bytes
  }

  /// How many operations it is.
  @inline(__always)
  public func messageFrames(_ operation: Int) -> Int { Int(records[operation].trainFrames) }

  /// The operation that the message behind it starts at.
  @inline(__always)
  public func nextMessage(_ operation: Int) -> Int {
    records[operation].trainFrames > 1 ? Int(records[operation].behindTrain) : Int(records[operation].next)
  }

  /// Makes a train of the operation at the front of a lane's queue and those behind it that fit: of the same length
  /// and ToS, the last perhaps shorter.
  /// - Parameters:
  ///   - most: operations in the queue, from `first` on.
  ///   - segmentBytesMax: the longest datagram that may be in a train.
  @inline(__always)
  public mutating func formTrain(from first: Int, upTo most: Int, _ kind: LaneKind, segmentBytesMax: UInt32) {
    let bytes = records[first].bytes
    guard most > 1, !records[first].isAlone, bytes <= segmentBytesMax, records[Int(records[first].next)].bytes <= bytes
    else { return }
    gatherTrain(from: first, upTo: most, kind)
  }

  private mutating func gatherTrain(from first: Int, upTo most: Int, _ kind: LaneKind) {
    guard freeGatherCount > 0, records[first].gather == Self.noGather else { return }
    let segmentBytes = records[first].bytes
    let service = records[first].descriptor.typeOfService
    let gather = unsafe gathers + Int(freeGathers[freeGatherCount - 1])
    let vectors = unsafe clinux_gather_vectors(gather)!
    let vectorsMax = Int(CLINUX_GATHER_VECTORS_MAX)
    var used = 0
    var total: UInt32 = 0
    var frames = 0
    var operation = first
    let framesMax = min(most, Self.trainFramesMax)
    while frames < framesMax {
      let record = records[operation]
      let message = unsafe clinux_send_message(self.operation(operation))!
      let parts = unsafe message.pointee.msg_iovlen
      guard record.bytes <= segmentBytes, record.descriptor.typeOfService == service, !record.isAlone,
        total + record.bytes <= UInt32(Self.trainBytesMax), used + parts <= vectorsMax
      else { break }
      for part in 0..<parts { unsafe vectors[used + part] = unsafe message.pointee.msg_iov[part] }
      used += parts
      total += record.bytes
      frames += 1
      operation = Int(record.next)
      if record.bytes < segmentBytes { break }
    }
    guard frames > 1 else { return }
    freeGatherCount -= 1
    records[first].gather = freeGathers[freeGatherCount]
    records[first].trainFrames = UInt16(truncatingIfNeeded: frames)
    records[first].trainBytes = total
    records[first].behindTrain = UInt32(truncatingIfNeeded: operation)
    unsafe gather.pointee.message = unsafe msghdr()
    unsafe gather.pointee.message.msg_iov = vectors
    unsafe gather.pointee.message.msg_iovlen = used
    let (level, type) =
      kind == .datagramIPv4 ? (Int32(IPPROTO_IP), IP_TOS) : (Int32(IPPROTO_IPV6), IPV6_TCLASS)
    unsafe clinux_gather_set_train(
      gather, UInt16(truncatingIfNeeded: segmentBytes), service == 0 ? 0 : 1, level, type, Int32(service))
  }

  /// A train that was not sent is operations again.
  @inline(__always)
  public mutating func dissolveTrain(_ first: Int) {
    guard records[first].trainFrames > 1 else { return }
    records[first].trainFrames = 1
    giveBackGather(of: first)
  }

  private mutating func giveBackGather(of operation: Int) {
    precondition(freeGatherCount < gatherCount, "a gather was given back twice")
    freeGathers[freeGatherCount] = records[operation].gather
    freeGatherCount += 1
    records[operation].gather = Self.noGather
    records[operation].trainFrames = 1
  }

  /// Whether received frames may be joined now: half of the gathers are for trains.
  @inline(__always)
  public var mayJoin: Bool { freeCount > 0 && freeGatherCount > gatherCount / 2 }

  /// Fills in an operation with a super-frame made of frames that came in one train: its own headers, and the payloads
  /// where they lie.
  /// - Parameters:
  ///   - run: its first frames are these.
  ///   - joined: how they are one.
  /// - Returns: false when no gather is free.
  public mutating func fill(
    _ operation: Int, joining joined: Coalescer, of run: TrainRun, egress: InterfaceIndex, _ memory: inout FrameMemory
  ) -> Bool {
    guard freeGatherCount > 0, joined.frameCount < Int(CLINUX_GATHER_VECTORS_MAX) else { return false }
    let send = unsafe self.operation(operation)
    var room = unsafe MutableRawSpan(
      _unsafeStart: clinux_send_header(send)!, byteCount: Int(CLINUX_SEND_HEADER_BYTES))
    joined.offload.write(into: &room)
    let headerBytes = joined.writeHeaders(
      memory.head(of: run.frame(0)), into: &room, at: OffloadHeader.bytes)
    freeGatherCount -= 1
    let number = freeGathers[freeGatherCount]
    let gather = unsafe gathers + Int(number)
    let vectors = unsafe clinux_gather_vectors(gather)!
    unsafe vectors[0] = unsafe iovec(iov_base: clinux_send_header(send), iov_len: headerBytes)
    for index in 0..<joined.frameCount {
      var payload = run.frame(index)
      payload.offset += UInt32(truncatingIfNeeded: joined.headerBytes)
      payload.length -= UInt32(truncatingIfNeeded: joined.headerBytes)
      let isPlaced = unsafe memory.vectors(of: payload, into: vectors + 1 + index, room: 1) != nil
      precondition(isPlaced, "a received frame is in one piece")
    }
    unsafe gather.pointee.message = unsafe msghdr()
    unsafe gather.pointee.message.msg_iov = vectors
    unsafe gather.pointee.message.msg_iovlen = 1 + joined.frameCount
    var whole = run.frame(0)
    whole.length = UInt32(truncatingIfNeeded: joined.frameBytes)
    whole.wireFrames = UInt16(truncatingIfNeeded: joined.frameCount)
    records[operation] = Record(
      descriptor: whole, egress: egress, next: 0, wasResent: false,
      bytes: UInt32(truncatingIfNeeded: headerBytes + joined.payloadBytes))
    records[operation].gather = number
    return true
  }

  /// Bytes in front of a frame: at most 16, as two words in memory order.
  public struct Header: BitwiseCopyable {
    public var first: UInt64
    public var second: UInt64
    public var count: UInt8
    @inline(__always)
    public init(first: UInt64 = 0, second: UInt64 = 0, count: Int) {
      self.first = first
      self.second = second
      self.count = UInt8(truncatingIfNeeded: count)
    }
  }

  /// Fills in an operation: `header`, then the frame's segments, with the frame's ToS on the outer header of a
  /// datagram. False when the frame has more segments than a send takes.
  @inline(__always)
  public mutating func fill(
    _ operation: Int, _ descriptor: Descriptor, egress: InterfaceIndex, lane kind: LaneKind, header: Header,
    _ memory: borrowing FrameMemory
  ) -> Bool {
    let headerBytes = Int(header.count)
    store(header, operation)
    guard setMessage(operation, headerBytes, payload: descriptor, kind, memory) else { return false }
    records[operation] = Record(
      descriptor: descriptor, egress: egress, next: 0, wasResent: false,
      bytes: descriptor.length + UInt32(truncatingIfNeeded: headerBytes))
    return true
  }

  /// Fills in an operation with one segment of a super-frame: `header`, the segment's own headers, and its payload
  /// where it lies. The operation's record counts as one frame of the segment's length; of where its bytes are it says
  /// the buffer only.
  /// - Parameters:
  ///   - number: of the segment.
  ///   - whole: what `descriptor` names.
  /// - Returns: false when the payload is in more pieces than a send takes.
  public mutating func fill(
    _ operation: Int, segment number: Int, of whole: SuperFrame, _ descriptor: Descriptor, egress: InterfaceIndex,
    lane kind: LaneKind, header: Header, _ memory: borrowing FrameMemory
  ) -> Bool {
    store(header, operation)
    var room = unsafe MutableRawSpan(
      _unsafeStart: clinux_send_header(self.operation(operation))!, byteCount: Int(CLINUX_SEND_HEADER_BYTES))
    let payloadOffset = whole.payloadOffset(ofSegment: number)
    var payload = descriptor
    payload.offset += UInt32(truncatingIfNeeded: payloadOffset)
    payload.length = UInt32(truncatingIfNeeded: whole.payloadBytes(ofSegment: number))
    let head = memory.head(of: descriptor)
    let headerBytes =
      head.byteCount == whole.frameBytes
      ? whole.writeHeaders(ofSegment: number, of: head, into: &room, at: Int(header.count))
      : whole.writeHeaders(
        ofSegment: number, of: head, payloadSum: memory.sum(of: payload), into: &room, at: Int(header.count))
    guard setMessage(operation, headerBytes, payload: payload, kind, memory) else { return false }
    var segment = descriptor
    segment.wireFrames = 1
    segment.offload = OffloadHeader()
    segment.length = UInt32(truncatingIfNeeded: whole.headerBytes) + payload.length
    records[operation] = Record(
      descriptor: segment, egress: egress, next: 0, wasResent: false,
      bytes: UInt32(truncatingIfNeeded: headerBytes) + payload.length)
    return true
  }

  @inline(__always)
  private func store(_ header: Header, _ operation: Int) {
    let bytes = unsafe UnsafeMutableRawPointer(clinux_send_header(self.operation(operation))!)
    unsafe bytes.storeBytes(of: header.first, as: UInt64.self)
    unsafe bytes.storeBytes(of: header.second, toByteOffset: 8, as: UInt64.self)
  }

  /// What the kernel reads: the first `headerBytes` of the header's room, then the bytes that `payload` names.
  @inline(__always)
  private func setMessage(
    _ operation: Int, _ headerBytes: Int, payload: Descriptor, _ kind: LaneKind, _ memory: borrowing FrameMemory
  ) -> Bool {
    let send = unsafe self.operation(operation)
    let vectors = unsafe clinux_send_vectors(send)!
    unsafe vectors[0] = unsafe iovec(iov_base: clinux_send_header(send), iov_len: headerBytes)
    guard
      let segments = unsafe memory.vectors(of: payload, into: vectors + 1, room: Int(CLINUX_SEND_VECTORS_MAX) - 1)
    else { return false }
    unsafe send.pointee.message.msg_iov = vectors
    unsafe send.pointee.message.msg_iovlen = 1 + segments
    if !kind.isDatagram || payload.typeOfService == 0 {
      unsafe send.pointee.message.msg_control = nil
      unsafe send.pointee.message.msg_controllen = 0
    } else if kind == .datagramIPv4 {
      unsafe clinux_send_set_service(send, Int32(IPPROTO_IP), IP_TOS, Int32(payload.typeOfService))
    } else {
      unsafe clinux_send_set_service(send, Int32(IPPROTO_IPV6), IPV6_TCLASS, Int32(payload.typeOfService))
    }
    return true
  }

  /// The operation as the kernel reads it.
  @unsafe @inline(__always)
  public func operation(_ operation: Int) -> UnsafeMutablePointer<clinux_send> {
    precondition(UInt(bitPattern: operation) < UInt(bitPattern: count), "send operation out of range")
    return unsafe operations + operation
  }
}
