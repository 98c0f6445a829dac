/// What a worker sees of the kernel: sources that frames come from, lanes that frames leave by, slots that it lends.
///
/// Three sides implement it: io_uring, plain system calls, and a simulated kernel with a seed. Workers are generic over
/// it and specialised at compile time. One worker, on one thread, calls it; no call blocks but `collect`.
///
/// The rules that every side keeps
/// - A posted slot belongs to the kernel until an event brings it back (`received`) or `takeBackSlots` does.
/// - A source that was armed stays so until a `receiveEnded` event; the worker decides whether it is armed again.
/// - A chain of sends on one lane is carried out in order and stops at the first failure. Its one `sent` event says
///   how many were sent, and the error that stopped it. At most one chain is out on a lane: this is what keeps a flow
///   in order when a socket is full, without trusting the order in which a kernel runs unlinked operations.
/// - Chains of different lanes, and completions of any kind, may come in any order.
public protocol WorkerIO: ~Copyable {
  /// Makes a source known under `source`; nothing is received before `arm`.
  mutating func openSource(_ source: Int, _ kind: SourceKind, descriptor: Int32)
  /// Starts to receive. Ends with one `receiveEnded` event.
  mutating func arm(_ source: Int, _ memory: inout FrameMemory)
  /// Asks that the receive ends; the `receiveEnded` event (ECANCELED) still comes.
  mutating func cancel(_ source: Int)
  /// Forgets a source that has ended.
  mutating func closeSource(_ source: Int)

  /// Makes a lane known: a socket or device that frames are sent to.
  mutating func openLane(_ lane: Int, _ kind: LaneKind, descriptor: Int32)
  /// Forgets a lane that has no chain out; a pending `awaitWritable` is cancelled silently.
  mutating func closeLane(_ lane: Int)

  /// Lends a slot, in state posted, to be received into.
  mutating func post(_ slot: Int, _ memory: inout FrameMemory)
  /// Sends the chain of messages that starts at `first` and follows `SendPool.nextMessage`, `count` long, in order.
  /// At most `chainFramesMax` and only when no chain is out on this lane.
  mutating func send(_ lane: Int, first: Int, count: Int, _ pool: borrowing SendPool)
  /// Hands one frame over to a lane of kind `.guest` that has no chain out, `header` before it.
  /// - Returns: whether it took it; if not, nothing of it, and the frame is to be sent.
  mutating func deliver(
    _ lane: Int, _ header: SendPool.Header, _ frame: Descriptor, _ memory: borrowing FrameMemory
  ) -> Bool
  /// Asks for one `writable` event when the lane takes frames again.
  mutating func awaitWritable(_ lane: Int)

  /// Hands what was asked for to the kernel, waits as told, and appends what happened to `events` until it is full.
  mutating func collect(_ wait: Wait, _ memory: inout FrameMemory, into events: inout EventBatch)

  /// What happened since the last call of this function: calls that entered the kernel, completions, waits.
  mutating func takeStatistics() -> IOStatistics
  /// Gives back every slot that is still posted; only after all sources ended.
  mutating func takeBackSlots(_ memory: inout FrameMemory)

  /// The longest chain that `send` takes.
  var chainFramesMax: Int { get }
  /// Monotonic time in nanoseconds.
  func now() -> UInt64
  /// Adds one to the eventfd of a neighbour's waker.
  mutating func wake(_ waker: Int32)
  /// Adds one to the eventfd that a guest waits for, where it has room: at once, or by the next `collect`.
  mutating func call(_ guest: Int32)
  /// The same, at once.
  mutating func callAtOnce(_ guest: Int32)
  /// Lets another thread have this core for a moment, where one wants it.
  func yieldProcessor()
}

extension WorkerIO where Self: ~Copyable {
  /// The kernel takes frames as messages only.
  @inline(__always)
  public mutating func deliver(
    _ lane: Int, _ header: SendPool.Header, _ frame: Descriptor, _ memory: borrowing FrameMemory
  ) -> Bool { false }

  public mutating func call(_ guest: Int32) { Waker.call(guest) }
  public mutating func callAtOnce(_ guest: Int32) { call(guest) }
}

public enum SourceKind: UInt8, BitwiseCopyable, Sendable {
  /// A TAP queue: each receive is a virtio header of 12 bytes and a frame.
  case tap
  /// An AF_PACKET socket with PACKET_VNET_HDR: each receive is a virtio header of 12 bytes and a frame, the VLAN tag
  /// that the kernel took out of it beside.
  case packet
  /// The underlay's UDP socket of an encapsulation: each receive is a datagram with its sender and its ToS.
  case vxlan, vnetp
  /// A ring that a guest transmits by, in its memory: each receive is a virtio header of 12 bytes and a frame.
  case guest
  /// The eventfd that control and neighbours write to: each receive is a wake-up and takes no slot.
  case waker

  @inline(__always)
  public var isDatagram: Bool { self == .vxlan || self == .vnetp }
  /// Whether it is a socket, received from by `recvmsg`, rather than a device that is read.
  @inline(__always)
  var isMessage: Bool { isDatagram || self == .packet }
}

public enum LaneKind: UInt8, BitwiseCopyable, Sendable {
  /// A TAP queue, by `writev`.
  case tap
  /// An AF_PACKET socket, by `sendmsg`: a virtio header of 12 bytes and a frame.
  case packet
  /// A ring that a guest receives by: a virtio header of 12 bytes and a frame, copied into its memory.
  case guest
  /// A connected UDP socket, by `sendmsg`; the family settles the control message of the ToS.
  case datagramIPv4, datagramIPv6

  @inline(__always)
  public var isDatagram: Bool { self == .datagramIPv4 || self == .datagramIPv6 }
}

/// How long `collect` may stay in the kernel.
public enum Wait: Sendable, Equatable {
  /// Not at all: take what there is.
  case sweep
  /// Until something happens.
  case forEvent
  /// Until something happens, at most so long.
  case atMost(nanoseconds: Int)
  /// Until `completions` happened, at most so long: a fuller batch for a bounded delay.
  case forBatch(completions: Int, nanoseconds: Int)
}

public struct IOStatistics: Sendable {
  public var enters = 0
  public var completions = 0
  public var overflows = 0
  /// Collects that waited in the kernel for something to happen.
  public var sleeps = 0
  public init() {}
}

/// One thing that happened. Which fields mean something depends on the kind.
public struct IOEvent: BitwiseCopyable, Sendable {
  public enum Kind: UInt8, BitwiseCopyable, Sendable {
    /// `slot` holds `length` bytes from `offset` on, from `source`.
    case received
    /// The receive of `source` ended with `error` (0: the kernel ended a multishot for reasons of its own).
    case receiveEnded
    /// The chain of `lane` is over: `count` messages were sent; `error` stopped it, or 0.
    case sent
    /// `lane` takes frames again; `error` tells when the device is gone instead.
    case writable
    /// `lane` awaits that, and it takes long.
    case stuck
    /// Control wrote to the waker.
    case woken
  }
  /// The `error` of a chain that ended because the kernel took only a part of a frame; no number of the system's.
  public static var shortWrite: Int32 { 4_096 }

  public var kind: Kind
  public var isTruncated = false
  /// The outer header's ToS or traffic class, of a datagram.
  public var typeOfService: UInt8 = 0
  /// Size of each datagram of a train, in bytes; 0 where it is one datagram.
  public var trainSegmentBytes: UInt16 = 0
  /// The source or the lane.
  public var index: UInt32
  /// A positive error number, or 0.
  public var error: Int32 = 0
  public var count: UInt32 = 0
  /// A slot of one's own; a frame of a guest's memory where `owner` is not 0. Such a frame has `count` segments.
  public var slot: UInt32 = 0
  public var owner: UInt16 = 0
  public var offset: UInt32 = 0
  public var length: UInt32 = 0
  /// The VLAN tag that the kernel took out of a packet socket's frame: TPID in the upper half, TCI in the lower; 0 for
  /// none (PACKET_AUXDATA, linux/if_packet.h).
  public var vlanTag: UInt32 = 0
  /// The sender of a datagram.
  public var sender = UnderlayAddress(high: 0, low: 0)

  /// What holds the bytes that were received.
  @inline(__always)
  var buffer: BufferReference { BufferReference(owner: Int(owner), index: Int(slot)) }

  @inline(__always)
  public init(_ kind: Kind, _ index: Int, error: Int32 = 0) {
    self.kind = kind
    self.index = UInt32(truncatingIfNeeded: index)
    self.error = error
  }
}

/// The events of one turn.
public typealias EventBatch = Batch<IOEvent>

extension Batch<IOEvent> {
  public init(capacity: Int) {
    self.init(capacity: capacity, filler: IOEvent(.woken, 0))
  }
}
