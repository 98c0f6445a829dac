/// The second stage: where does a frame go?
///
/// The way of a frame:
/// 1. `identify`: a datagram's header gives its VNI; sender and VNI give link and domain, for VNET/P the sender alone.
///    A frame from a port has them.
/// 2. `decapsulate`: the congestion mark of the outer header is carried over to the inner frame.
/// 3. The frame is parsed, once.
/// 4. `Router.decide`: the source is learned, the destination looked up, or VNET rules decide. A frame from a
///    passthrough port goes to the other end of its wire.
/// 5. The frame goes on with its target; or it ends here, counted.
///
/// A received train is several datagrams in one slot: each goes this way by itself, and those of one flow that go the
/// same way leave as one run.
package struct RouteStage: ~Copyable {
  /// Datagrams of one received train at most: no kernel makes longer ones than it sends.
  package static var trainFramesMax: Int { SendPool.trainFramesMax }
  private var router: Router

  /// - Parameter domainCount: how many domains there may be, now and in later snapshots; nil: those of this one.
  package init(_ view: SnapshotView, domainCount: Int? = nil) { router = Router(view, domainCount: domainCount) }

  mutating func adopt(_ view: SnapshotView) { router.adopt(view) }

  /// How many frames ahead of `route` a batch is announced by `prefetch`.
  static var prefetchFrames: Int { Router.prefetchFrames }

  /// Brings near what routing a frame from a port will read of a large table. What a link brings names its domain only
  /// by a header that is yet to be judged; it goes to few MACs, the local ones.
  @inline(__always)
  func prefetch(_ descriptor: Descriptor, _ memory: borrowing FrameMemory) {
    guard descriptor.domain != .none else { return }
    router.prefetch(domain: descriptor.domain) { EthernetView(memory.head(of: descriptor))?.destination.bits }
  }

  /// Where the decision that is remembered sends a frame of a port; `.none` where it takes `route` to know.
  @inline(__always)
  func remembered(
    _ addresses: FrameAddresses, ingress: InterfaceIndex, domain: DomainIndex, now: TurnClock
  ) -> InterfaceIndex {
    router.remembered(
      source: addresses.source, destination: addresses.destination, ingress: ingress, domain: domain, now: now)
  }

  /// Routes a frame or a train; appends it to `batch`, which has room for `trainFramesMax`, or drops it.
  @inline(__always)
  package mutating func route(
    _ descriptor: Descriptor, now: TurnClock, _ memory: inout FrameMemory, _ counters: borrowing CounterTable,
    into batch: inout RoutedBatch
  ) {
    if descriptor.trainSegmentBytes == 0 { return routeOne(descriptor, now: now, &memory, counters, into: &batch) }
    routeTrain(descriptor, now: now, &memory, counters, into: &batch)
  }

  private mutating func routeTrain(
    _ train: Descriptor, now: TurnClock, _ memory: inout FrameMemory, _ counters: borrowing CounterTable,
    into batch: inout RoutedBatch
  ) {
    precondition(train.wireFrames <= UInt16(Self.trainFramesMax), "such a train ends in the receive stage")
    let datagrams = TrainRun(received: train)
    let start = batch.count
    // Each datagram holds the slot, once; the train itself until all of them went.
    for number in 0..<datagrams.count {
      let datagram = datagrams.frame(number)
      memory.hold(datagram.buffer, adding: 1)
      let before = batch.count
      routeOne(datagram, now: now, &memory, counters, into: &batch)
      guard batch.count > before else { continue }
      batch[before].descriptor.trainMembers = 1 << UInt128(number)
      guard let run = runOfLast(in: batch, from: start) else { continue }
      TrainRun.append(batch[before].descriptor, to: &batch[run].descriptor, stride: train.trainSegmentBytes)
      batch.removeLast()
      memory.release(datagram.buffer)
    }
    memory.release(train.buffer)
  }

  /// Runs of one train that are looked at for the next frame's. A link has 8 source ports unless set, each of which
  /// brings trains of its own: with 16, as many as 128 flows find theirs.
  private static var openRunsMax: Int { 16 }

  /// The run that the last frame of a batch belongs to: the newest of its flow, so that flows keep their order.
  @inline(__always)
  private func runOfLast(in batch: borrowing RoutedBatch, from start: Int) -> Int? {
    let last = batch.count - 1
    let flowHash = batch[last].descriptor.flowHash
    var place = last - 1
    let end = max(start, last - Self.openRunsMax)
    while place >= end {
      if batch[place].descriptor.flowHash == flowHash {
        return batch[place].goesOn(with: batch[last]) ? place : nil
      }
      place -= 1
    }
    return nil
  }

  @inline(__always)
  private mutating func routeOne(
    _ descriptor: Descriptor, now: TurnClock, _ memory: inout FrameMemory, _ counters: borrowing CounterTable,
    into batch: inout RoutedBatch
  ) {
    var descriptor = descriptor
    let isFromUnderlay = descriptor.ingress == .none
    if isFromUnderlay {
      guard identify(&descriptor, &memory, counters) else { return }
    }
    guard let parsed = parse(descriptor, &memory) else {
      // A port's runts ended in the receive stage.
      return drop(.dropBadInnerLength, descriptor, &memory, counters)
    }
    descriptor.flowHash = parsed.flowHash
    if isFromUnderlay {
      if !parsed.networkLengthValid { return drop(.dropBadInnerLength, descriptor, &memory, counters) }
      guard mergeCongestionMark(&descriptor, parsed, &memory) else {
        return drop(.dropNotECNCapable, descriptor, &memory, counters)
      }
    } else {
      descriptor.typeOfService = parsed.typeOfService
      if descriptor.domain == .none { return passThrough(descriptor, &memory, counters, into: &batch) }
    }

    let decision = router.decide(
      source: parsed.source.bits, destination: parsed.destination.bits, ingress: descriptor.ingress,
      domain: descriptor.domain, frames: Int(descriptor.wireFrames), now: now)
    if let learned = decision.learned.counter {
      let isOfFrames = learned == .macFrozenFrames || learned == .macLimitFrames
      counters[descriptor.domain]?.add(learned, isOfFrames ? Int(descriptor.wireFrames) : 1)
    }
    let vni = router.vni(of: descriptor.domain)
    switch decision.action {
    case .unicast(let egress):
      batch.append(RoutedFrame(descriptor: descriptor, target: .unicast(egress), vni: vni))
    case .flood(let targets):
      batch.append(RoutedFrame(descriptor: descriptor, target: .flood(targets), vni: vni))
    case .drop(let reason):
      drop(reason, descriptor, &memory, counters)
    }
  }

  /// A frame of a port that is in no domain: to the other end of its wire, whatever it says.
  @inline(__always)
  private func passThrough(
    _ descriptor: Descriptor, _ memory: inout FrameMemory, _ counters: borrowing CounterTable,
    into batch: inout RoutedBatch
  ) {
    let end = router.view.wire(of: descriptor.ingress)
    guard end != .none else { return drop(.dropNoDestination, descriptor, &memory, counters) }
    batch.append(RoutedFrame(descriptor: descriptor, target: .unicast(end), vni: 0))
  }

  @inline(__always)
  private func parse(_ descriptor: Descriptor, _ memory: inout FrameMemory) -> ParsedFrame? {
    ParsedFrame(headers: memory.head(of: descriptor), frameBytes: Int(descriptor.length))
  }

  /// Finds link and domain of a datagram and steps over its header; false when it was dropped.
  @inline(__always)
  private func identify(
    _ descriptor: inout Descriptor, _ memory: inout FrameMemory, _ counters: borrowing CounterTable
  ) -> Bool {
    if descriptor.encapsulation == .vnetp { return identifyVNETP(&descriptor, &memory, counters) }
    guard let header = VXLANLink.readHeader(memory.head(of: descriptor)) else {
      return dropUnidentified(.dropShortHeader, descriptor, &memory, counters)
    }
    switch router.view.carrier(source: descriptor.sender, encapsulation: .vxlan, vni: header.vni) {
    case .unknownSource:
      return dropUnidentified(.dropUnknownSource, descriptor, &memory, counters)
    case .unknownVNI:
      return dropUnidentified(header.hasVNI ? .dropUnknownVNI : .dropNoVNIFlag, descriptor, &memory, counters)
    case .link(let link, let domain):
      if !header.hasVNI { return dropUnidentified(.dropNoVNIFlag, descriptor, &memory, counters) }
      descriptor.ingress = link
      descriptor.domain = domain
      VXLANLink.decapsulate(&descriptor)
      counters.countIn(descriptor)
      if header.hasReservedBits && router.view.dropsReservedBits(link: link) {
        drop(.dropReservedBits, descriptor, &memory, counters)
        return false
      }
      return true
    }
  }

  /// The same for a datagram that is the frame itself.
  @inline(__always)
  private func identifyVNETP(
    _ descriptor: inout Descriptor, _ memory: inout FrameMemory, _ counters: borrowing CounterTable
  ) -> Bool {
    let carrier = router.view.carrier(source: descriptor.sender, encapsulation: .vnetp, vni: 0)
    if carrier == .unknownSource { return dropUnidentified(.dropUnknownSource, descriptor, &memory, counters) }
    if descriptor.length < UInt32(EthernetHeader.bytes) {
      return dropUnidentified(.dropShortHeader, descriptor, &memory, counters)
    }
    if VNETPFrame.looksLikeVXLAN(memory.head(of: descriptor)) {
      return dropUnidentified(.dropWrongEncapsulation, descriptor, &memory, counters)
    }
    // The peer is known, but by a VXLAN link.
    guard case .link(let link, let domain) = carrier else {
      return dropUnidentified(.dropUnknownSource, descriptor, &memory, counters)
    }
    descriptor.ingress = link
    descriptor.domain = domain
    counters.countIn(descriptor)
    return true
  }

  /// Drops a datagram that is no link's; always false.
  private func dropUnidentified(
    _ reason: Counter, _ descriptor: Descriptor, _ memory: inout FrameMemory, _ counters: borrowing CounterTable
  ) -> Bool {
    counters.underlay.add(reason, Int(descriptor.wireFrames))
    memory.release(descriptor.buffer)
    return false
  }

  /// RFC 6040 section 4.2; false when the frame must be dropped. Leaves the inner ToS in the descriptor.
  @inline(__always)
  private func mergeCongestionMark(
    _ descriptor: inout Descriptor, _ parsed: ParsedFrame, _ memory: inout FrameMemory
  ) -> Bool {
    let outer = descriptor.typeOfService
    descriptor.typeOfService = parsed.typeOfService
    // Only IP can carry a mark; what is no IP was never marked by its sender and keeps going.
    guard parsed.ipVersion != 0, outer & ECN.mask != 0 else { return true }
    switch ECN.decapsulate(outer: outer, inner: parsed.typeOfService) {
    case .keep: return true
    case .drop: return false
    case .mark(let marked):
      var frame = memory.mutableHead(of: descriptor)
      descriptor.typeOfService = marked
      return ECN.rewrite(typeOfService: marked, in: &frame, networkOffset: parsed.networkOffset)
    }
  }

  @inline(__always)
  private func drop(
    _ reason: Counter, _ descriptor: Descriptor, _ memory: inout FrameMemory, _ counters: borrowing CounterTable
  ) {
    counters.countDrop(reason, descriptor, at: descriptor.ingress)
    memory.release(descriptor.buffer)
  }
}
