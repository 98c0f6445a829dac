// What the stages share: the tables that control fills in through a worker's mailbox.

/// What a worker knows of one port or link, beyond what the snapshot says.
public struct InterfaceRecord: BitwiseCopyable, Sendable {
  public enum Kind: UInt8, BitwiseCopyable, Sendable {
    case absent, tap, packet, guest, vxlan, vnetp

    @inline(__always)
    var isLink: Bool { self == .vxlan || self == .vnetp }
  }
  public var kind: Kind
  /// The first of its lanes at this worker; a link has one for each source port, a TAP one.
  public var laneFirst: UInt32
  /// 0: nothing leaves by it from this worker.
  public var laneCount: UInt32
  /// The longest frame that it takes, in bytes from the destination MAC on; longer ones are dropped as too big.
  public var frameBytesMax: UInt32
  /// Whether super-frames leave by it whole: a port whose other side cuts them or takes them as they are.
  public var takesSuperFrames: Bool
  /// Whether those of UDP do too; not on a kernel that knows none (before 6.2).
  public var takesUDPSuperFrames: Bool
  public var counters: CounterBlock.Writer

  /// - Parameter mtuBytes: the longest payload; the Ethernet header and two VLAN tags come on top, as a switch allows.
  public init(
    _ kind: Kind, laneFirst: Int, laneCount: Int, mtuBytes: Int = FrameMemory.payloadBytesMax,
    takesSuperFrames: Bool = true, takesUDPSuperFrames: Bool = true, counters: CounterBlock.Writer
  ) {
    self.kind = kind
    self.laneFirst = UInt32(laneFirst)
    self.laneCount = UInt32(laneCount)
    self.takesSuperFrames = takesSuperFrames && !kind.isLink
    self.takesUDPSuperFrames = takesUDPSuperFrames
    frameBytesMax = UInt32(mtuBytes + EthernetHeader.bytes + 2 * VLANTag.bytes)
    self.counters = counters
  }

  /// Whether a super-frame of UDP, or one of TCP, leaves by it whole.
  @inline(__always)
  func takesWhole(isUDP: Bool) -> Bool { takesSuperFrames && (takesUDPSuperFrames || !isUDP) }
}

/// The counters of one worker, by what they count. Indices that are not in use count into a block that nobody reads.
public struct CounterTable: ~Copyable {
  private var interfaces: FixedArray<InterfaceRecord>
  private var domains: FixedArray<CounterBlock.Writer>
  public let worker: CounterBlock.Writer
  public let underlay: CounterBlock.Writer
  private let nobody = CounterBlock()

  package init(interfaceCount: Int, domainCount: Int, worker: CounterBlock.Writer, underlay: CounterBlock.Writer) {
    self.worker = worker
    self.underlay = underlay
    interfaces = FixedArray(
      repeating: InterfaceRecord(.absent, laneFirst: 0, laneCount: 0, counters: nobody.writer), count: interfaceCount)
    domains = FixedArray(repeating: nobody.writer, count: domainCount)
  }

  var interfaceCount: Int { interfaces.count }
  var domainCount: Int { domains.count }

  package mutating func set(_ index: InterfaceIndex, _ record: InterfaceRecord) { interfaces[index.index] = record }
  package mutating func set(_ index: DomainIndex, _ counters: CounterBlock.Writer) { domains[index.index] = counters }
  mutating func remove(_ index: InterfaceIndex) {
    interfaces[index.index] = InterfaceRecord(.absent, laneFirst: 0, laneCount: 0, counters: nobody.writer)
  }

  /// The record of an interface; an absent one for an index out of range.
  @inline(__always)
  subscript(index: InterfaceIndex) -> InterfaceRecord {
    index.index < interfaces.count
      ? interfaces[index.index] : InterfaceRecord(.absent, laneFirst: 0, laneCount: 0, counters: worker)
  }
  @inline(__always)
  subscript(index: DomainIndex) -> CounterBlock.Writer? {
    index.index < domains.count ? domains[index.index] : nil
  }

  /// A frame came in by an interface of a domain.
  @inline(__always)
  func countIn(_ descriptor: Descriptor) {
    countIn(
      Int(descriptor.wireFrames), bytes: Int(descriptor.length), self[descriptor.ingress], self[descriptor.domain])
  }

  @inline(__always)
  private func countIn(_ frames: Int, bytes: Int, _ ingress: InterfaceRecord, _ domain: CounterBlock.Writer?) {
    ingress.counters.add(.inFrames, frames)
    ingress.counters.add(.inBytes, bytes)
    domain?.add(.inFrames, frames)
    domain?.add(.inBytes, bytes)
  }

  /// The kernel, or a guest, took a frame.
  @inline(__always)
  func countOut(_ descriptor: Descriptor, egress: InterfaceIndex) { countOut(descriptor, self[egress]) }

  /// The same, where the egress' record is at hand.
  @inline(__always)
  func countOut(_ descriptor: Descriptor, _ egress: InterfaceRecord) {
    countOut(Int(descriptor.wireFrames), bytes: Int(descriptor.length), egress, self[descriptor.domain])
  }

  @inline(__always)
  private func countOut(_ frames: Int, bytes: Int, _ egress: InterfaceRecord, _ domain: CounterBlock.Writer?) {
    egress.counters.add(.outFrames, frames)
    egress.counters.add(.outBytes, bytes)
    domain?.add(.outFrames, frames)
    domain?.add(.outBytes, bytes)
  }

  /// Frames came in by one guest's port, and another guest took them.
  @inline(__always)
  func countPassed(
    _ run: PassedFrames, from ingress: InterfaceIndex, to egress: InterfaceRecord, _ domain: DomainIndex
  ) {
    countIn(run.frames, bytes: run.bytes, self[ingress], self[domain])
    egress.counters.add(.offeredFrames, run.frames)
    countOut(run.frames, bytes: run.bytes, egress, self[domain])
  }

  /// The kernel took a train.
  @inline(__always)
  func countTrain(_ frames: Int) {
    worker.add(.trains)
    worker.add(.trainFrames, frames)
  }

  /// A frame ends here, under one name: charged to the interface (its ingress, or the egress that it did not get out
  /// of) and to its domain.
  @inline(__always)
  func countDrop(_ reason: Counter, _ descriptor: Descriptor, at interface: InterfaceIndex) {
    let frames = Int(descriptor.wireFrames)
    self[interface].counters.add(reason, frames)
    self[descriptor.domain]?.add(reason, frames)
  }
}

/// A frame on its way from routing to transmission.
public struct RoutedFrame: BitwiseCopyable, Sendable {
  public enum Target: BitwiseCopyable, Sendable {
    case unicast(InterfaceIndex)
    /// To every target of the set.
    case flood(TargetSet)
  }
  public var descriptor: Descriptor
  public var target: Target
  /// The domain's identifier, for links.
  public var vni: UInt32
  /// Where it crosses to another worker: how many frames of its slot do together. 0: it is of those that follow the one
  /// that has the number.
  var crossesWith: UInt16 = 1

  public init(descriptor: Descriptor, target: Target, vni: UInt32) {
    self.descriptor = descriptor
    self.target = target
    self.vni = vni
  }

  /// Whether `next`, a later frame of the same flow and train, goes the same way.
  @inline(__always)
  func goesOn(with next: RoutedFrame) -> Bool {
    guard case .unicast(let egress) = target, case .unicast(let other) = next.target else { return false }
    let run = descriptor
    let frame = next.descriptor
    return egress == other && run.typeOfService == frame.typeOfService && run.domain == frame.domain
      && run.ingress == frame.ingress
  }
}

public typealias RoutedBatch = Batch<RoutedFrame>

extension Batch<RoutedFrame> {
  public init(capacity: Int) {
    let empty = Descriptor(buffer: BufferReference(slot: 0), offset: 0, length: 0, ingress: .none)
    self.init(
      capacity: capacity, filler: RoutedFrame(descriptor: empty, target: .unicast(.none), vni: 0))
  }
}
