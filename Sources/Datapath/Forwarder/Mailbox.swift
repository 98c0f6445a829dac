import CLinux
import Glibc

/// What control asks of a worker. Carried out between batches, in the order sent.
public enum Command: BitwiseCopyable, Sendable {
  case addInterface(InterfaceIndex, InterfaceRecord)
  case removeInterface(InterfaceIndex)
  case addDomain(DomainIndex, CounterBlock.Writer)
  /// Receives from a descriptor that control owns. `.sourceFailed` reports its end.
  case openSource(Int, SourceKind, interface: InterfaceIndex, domain: DomainIndex, descriptor: Int32)
  /// Receives from a guest's ring, which control keeps until `.sourceClosed`.
  case openGuestSource(Int, interface: InterfaceIndex, domain: DomainIndex, GuestRing.Reference)
  /// Sends into a guest's ring, which control keeps until `.laneClosed`.
  case openGuestLane(Int, interface: InterfaceIndex, GuestRing.Reference)
  /// Drops what waits at full lanes and may not any more: of a guest's ring that is taken back; and, as this comes once
  /// a second, where a lane is stuck.
  case dropWaiting(isSecondOver: Bool)
  /// Answered by `.sourceClosed`: from then on control may close the descriptor.
  case closeSource(Int)
  case openLane(Int, LaneKind, interface: InterfaceIndex, descriptor: Int32)
  /// Answered by `.laneClosed`.
  case closeLane(Int)
  /// Tells a port's domain that a guest of this address is there now: see ``Announcement``.
  case announce(MACAddress, interface: InterfaceIndex, domain: DomainIndex)
  /// Answered by `.adopted`: from then on this worker uses nothing of the snapshot before. Control has all routers
  /// adopt before it asks transmitters: routed frames on the rings may point into the old one.
  case adopt(SnapshotView)
  /// Answered by `.audited`.
  case audit
  /// Ends all receives and hands on or sends what waits, for a bounded time. Answered by `.drained`; the worker goes on
  /// turning. Control drains receivers, then routers, then transmitters: what a worker hands on must find the next one
  /// at work.
  case drain
  /// Stops; what still waits is dropped, under its name. Answered by `.audited` and `.stopped`. Control stops
  /// transmitters, then routers, then receivers: slots must come back before a receiver counts them.
  case stop
}

/// What a worker does its I/O by.
public enum IOSide: BitwiseCopyable, Sendable {
  /// - features: `UringFeatures` that are used.
  case uring(features: UInt32)
  /// - because: why io_uring could not be used, an error number; 0 where system calls were asked for.
  case syscalls(because: Int32)
}

/// What a worker tells control.
public enum Report: BitwiseCopyable, Sendable {
  /// The ring is made and the thread is pinned.
  case started(IOSide, hasHugePages: Bool)
  case couldNotStart(error: Int32)
  /// The receive of a source ended for good: its device is gone.
  case sourceFailed(Int, error: Int32)
  case sourceClosed(Int)
  case laneFailed(Int, error: Int32)
  case laneClosed(Int)
  case adopted(version: UInt64)
  case audited(Audit)
  case drained
  case stopped
}

/// The conservation of frames at one worker at one moment between two turns: received + taken over + copies = sent +
/// dropped + handed on + in flight, over all ports and links, for each of them and for each domain; and every slot and
/// send accounted for. What all workers handed on less what all took over is on the rings between them.
public struct Audit: BitwiseCopyable, Sendable, Equatable {
  public var received: UInt64 = 0
  public var copies: UInt64 = 0
  public var sent: UInt64 = 0
  public var dropped: UInt64 = 0
  public var takenOver: UInt64 = 0
  public var handedOn: UInt64 = 0
  public var inFlight: UInt64 = 0
  /// The first interface and the first domain whose own sums do not hold; `.none` where all do.
  public var brokenInterface = InterfaceIndex.none
  public var brokenDomain = DomainIndex.none
  /// Whether datagrams of the underlay all became a link's or were dropped.
  public var underlayHolds = true
  /// Slots held beyond those that sends in flight hold and, at the end, slots that the kernel did not give back.
  public var slotsLost = 0
  public var operationsLost = 0

  public init() {}

  public var holds: Bool {
    received + takenOver + copies == sent + dropped + handedOn + inFlight && brokenInterface == .none
      && brokenDomain == .none
      && underlayHolds && slotsLost == 0 && operationsLost == 0
  }
}

/// The two rings and the wake-up between control and one worker. Control holds this; the worker takes its ends.
public final class Mailbox: Sendable {
  /// Control makes the producer, the worker the consumer.
  public let commands: SPSCRing<Command>
  /// The other way round.
  public let reports: SPSCRing<Report>
  /// The eventfd that wakes the worker.
  public let workerWaker: Int32
  /// The eventfd that wakes control, shared by all workers.
  public let controlWaker: Int32

  /// Room for messages beyond those that opening or closing everything at once takes.
  static let messagesSpare = 1_024

  /// - Parameter messagesMax: what control may ask for before the worker answers: opening every source and lane.
  public init(controlWaker: Int32, messagesMax: Int = 1_024) throws(SystemError) {
    commands = SPSCRing(capacity: messagesMax + Self.messagesSpare)
    reports = SPSCRing(capacity: messagesMax + Self.messagesSpare)
    workerWaker = try Waker.make()
    self.controlWaker = controlWaker
  }

  deinit { close(workerWaker) }
}
