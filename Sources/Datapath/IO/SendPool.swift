import CLinux

/// The send operations of one worker: for each send that is waiting or out, the structures that the kernel reads
/// (message, I/O vectors, headers, control message), which must not move, and the descriptor that it sends.
///
/// Headers are written here, never in front of a frame in its slot: a flood sends the same bytes with different
/// headers. Free operations form a stack, so that the one used last is used next, while its lines are warm.
@safe
public struct SendPool: ~Copyable, @unchecked Sendable {
  private let operations: UnsafeMutablePointer<clinux_send>
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
    /// Bytes handed to the kernel, headers included: a smaller result is a short write.
    public var bytes: UInt32
  }

  public init(count: Int) {
    precondition(count > 0 && count < Int(UInt32.max))
    self.count = count
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
  ///   - whole: what `descriptor` names, all of whose bytes are in one piece: traps where they are not.
  /// - Returns: false when the payload is in more pieces than a send takes.
  public mutating func fill(
    _ operation: Int, segment number: Int, of whole: SuperFrame, _ descriptor: Descriptor, egress: InterfaceIndex,
    lane kind: LaneKind, header: Header, _ memory: borrowing FrameMemory
  ) -> Bool {
    store(header, operation)
    var room = unsafe MutableRawSpan(
      _unsafeStart: clinux_send_header(self.operation(operation))!, byteCount: Int(CLINUX_SEND_HEADER_BYTES))
    let headerBytes = whole.writeHeaders(
      ofSegment: number, of: memory.head(of: descriptor), into: &room, at: Int(header.count))
    var payload = descriptor
    payload.offset += UInt32(truncatingIfNeeded: whole.payloadOffset(ofSegment: number))
    payload.length = UInt32(truncatingIfNeeded: whole.payloadBytes(ofSegment: number))
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
