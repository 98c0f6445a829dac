import Glibc

/// How often the simulated kernel does what a real one may do. Every rate is a probability from 0 to 1; what it is
/// drawn for is said with each. All are 0 unless set: the kernel is then prompt, in order and without error.
public struct Faults: Sendable, Equatable {
  // When and in which order things are done.

  /// For each operation (arm, cancel, chain of sends, wait for room): it starts only some `collect` calls later.
  public var delayedOperation = 0.0
  /// The most `collect` calls that an operation is delayed by.
  public var delayCollectsMax = 5
  /// For each send of a chain but its first: the rest of the chain is carried out in a later `collect`.
  public var pausedChain = 0.0
  /// For each `collect`: sources and lanes are carried out in a random order, not by number.
  public var reorderedExecution = 0.0
  /// For each source or lane and each `collect`: its completions are held back until a later one.
  public var delayedCompletion = 0.0
  /// For each completion: it is taken from a random source or lane, not from the one that was done first.
  /// Completions of one source always keep their order.
  public var reorderedCompletion = 0.0
  /// For each `collect` that may wait: it returns at once.
  public var spuriousReturn = 0.0
  /// For each `collect` and armed waker: it reports a wake-up that nobody asked for.
  public var spuriousWake = 0.0

  // Receives.

  /// For each item that an armed source could receive: the receive ends with error 0.
  public var endedReceive = 0.0
  /// For each such item: the receive ends with EIO (a TAP), ENETDOWN or EINVAL (a packet socket) or ECONNREFUSED (a UDP
  /// socket). The item stays queued.
  public var failedReceive = 0.0
  /// For each item received: it arrives cut, and says so.
  public var truncatedReceive = 0.0

  // Sends.

  /// For each send: EAGAIN although there is room.
  public var fullLane = 0.0
  /// For each wait for room: it is reported although the lane is full, or the lane is full again at the next send.
  public var falseWritable = 0.0
  /// For each send: EIO; ENOBUFS from a packet socket.
  public var failedSend = 0.0
  /// For each datagram and each frame to a packet socket: EMSGSIZE.
  public var tooBigSend = 0.0
  /// For each train of datagrams: one of `trainErrors`, which its datagrams by themselves would not meet.
  public var refusedTrain = 0.0
  /// By these a kernel refuses trains: longer than the path's MTU, in another way, too many datagrams, a device that
  /// cannot make the checksums.
  public var trainErrors = [EMSGSIZE, EINVAL, EIO]
  /// For each datagram: ECONNREFUSED, unsent, as after an ICMP message about an earlier one.
  public var refusedSend = 0.0
  /// For each write to a device: EBADFD; ENETDOWN from a packet socket.
  public var badDescriptorSend = 0.0
  /// For each write to a TAP: the kernel takes only a part. The guest gets nothing of it.
  public var shortWrite = 0.0

  // The world.

  /// For each datagram: it is lost on its way, and counted by the network.
  public var lostDatagram = 0.0
  /// For each datagram whose ToS says that it can carry it: a router marks congestion experienced.
  public var congestionMark = 0.0
  /// For each `collect`: a device goes away for good.
  public var deviceLoss = 0.0

  public init() {}

  /// Nothing goes wrong.
  public static var none: Faults { Faults() }

  /// A mixture drawn from `random`: each kind of fault is off in about a third of the mixtures, so that a fault that
  /// hides another does not do so in all of them. Datagrams are not lost and devices stay.
  public static func mixture(_ random: inout SimulatedRandom) -> Faults {
    func rate(_ most: Double) -> Double {
      random.chance(1.0 / 3) ? 0 : most * Double(random.below(1000)) / 1000
    }
    var faults = Faults()
    faults.delayedOperation = rate(0.6)
    faults.delayCollectsMax = random.number(in: 1...8)
    faults.pausedChain = rate(0.4)
    faults.reorderedExecution = rate(1)
    faults.delayedCompletion = rate(0.6)
    faults.reorderedCompletion = rate(1)
    faults.spuriousReturn = rate(0.3)
    faults.spuriousWake = rate(0.05)
    faults.endedReceive = rate(0.1)
    faults.failedReceive = rate(0.05)
    faults.truncatedReceive = rate(0.02)
    faults.fullLane = rate(0.2)
    faults.falseWritable = rate(0.5)
    faults.failedSend = rate(0.03)
    faults.tooBigSend = rate(0.03)
    faults.refusedTrain = rate(0.3)
    faults.refusedSend = rate(0.1)
    faults.badDescriptorSend = rate(0.005)
    faults.shortWrite = rate(0.03)
    faults.congestionMark = rate(0.2)
    return faults
  }
}

/// A bug of the kernel, planted so that a test can show that its checker finds it.
package enum PlantedFault: Sendable, CaseIterable {
  /// The kernel forgets a posted slot: no event brings it back, nor does `takeBackSlots`.
  case lostSlot
  /// The sends of a chain are carried out last to first.
  case reorderedChain
  /// A send is reported as done, and neither arrives nor is counted anywhere.
  case uncountedDrop
}

/// What a worker did that the contract of `WorkerIO` forbids.
public enum Violation: Sendable, Equatable {
  /// A chain was submitted on a lane that has one out.
  case laneHasChain(lane: Int)
  /// A chain is empty or longer than `chainFramesMax`.
  case chainLength(lane: Int, count: Int)
  /// A slot was posted that the kernel already has.
  case slotPostedTwice(slot: Int)
  /// A slot was lent that is not in state posted.
  case slotNotPosted(slot: Int)
  /// What the kernel reads of a send (message, header, frame) changed before its `sent` event.
  case sendChanged(lane: Int, position: Int)
  /// The worker's memory counts more or fewer slots as posted than the kernel has. Recorded once for each worker.
  case slotsUnaccounted(posted: Int, lent: Int)
  /// A send's message is malformed: no vectors, a control message of the wrong family, a TAP write without a header.
  case malformedSend(lane: Int, position: Int)
  /// A source was armed that is armed.
  case sourceArmedTwice(source: Int)
  /// A wait for room was asked for on a lane that has one out.
  case laneAwaitedTwice(lane: Int)
  /// An open number was opened again.
  case openedTwice(index: Int)
  /// A source or lane is used or closed that is not open.
  case notOpen(index: Int)
  /// A source was closed before its `receiveEnded`, or a lane with a chain out.
  case closedInUse(index: Int)
  /// A descriptor was closed with operations of some worker out on it.
  case descriptorClosedInUse(descriptor: Int32)
  /// A descriptor that is not one, or of another kind than the source or lane.
  case wrongDescriptor(descriptor: Int32)
  /// `takeBackSlots` was called while a source was armed.
  case slotsTakenBackWhileArmed(source: Int)
}
