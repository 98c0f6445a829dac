import Datapath

/// The protocol of one connection with a frontend: what it said so far, and what follows from each message. Pure but
/// for the mappings and memory files that it makes; it neither reads nor writes the socket.
///
/// Some answers have to wait for workers: as long as ``isWaiting`` no message may be given to it, so that replies keep
/// their order. Then ``queueStopped(_:base:)`` or ``adopted(version:)`` brings the reply.
///
/// What is wrong with a message is told to the frontend where the protocol allows it, and to the log; the state stays
/// as it was before the message. Descriptors that came with it are closed when nobody holds them any more.
///
/// Source: docs/interop/vhost-user of QEMU.
public struct VhostUserSession {
  public struct Settings: Sendable {
    /// Pairs of a queue that receives and one that sends.
    public var queuePairsMax: Int
    /// What is offered; nothing outside ``VhostUserFeatures/served``.
    public var features: VhostUserFeatures
    public var protocolFeatures: VhostUserProtocolFeatures
    /// The largest MTU that a frontend may set, in bytes.
    public var mtuBytesMax: Int

    /// Messages name a queue in eight bits.
    public static let queuePairsLimit = 128
    /// What IPv4 needs of every link (RFC 791), in bytes.
    static let mtuBytesMin = 68

    public init(
      queuePairsMax: Int = 1, features: VhostUserFeatures = .served,
      protocolFeatures: VhostUserProtocolFeatures = .served, mtuBytesMax: Int = 65_535
    ) {
      precondition((1...Self.queuePairsLimit).contains(queuePairsMax), "a port has 1 to 128 pairs of queues")
      self.queuePairsMax = queuePairsMax
      self.features = features.intersection(.served)
      self.protocolFeatures = protocolFeatures.intersection(.served)
      self.mtuBytesMax = mtuBytesMax
      // Frontends disagree whether GET_QUEUE_NUM is of pairs (QEMU, DPDK) or of queues (cloud-hypervisor, which finds
      // too few in the answer 1); one pair is what all of them take for granted without the feature.
      if queuePairsMax == 1 {
        self.features.remove(.multiQueue)
        self.protocolFeatures.remove(.multiQueue)
      }
    }
  }

  /// What follows from a message or an answer.
  public struct Outcome: Sendable {
    public var replies: [VhostUserReply] = []
    public var effects: [VhostUserEffect] = []
    public init() {}
  }

  public let settings: Settings
  public private(set) var features: VhostUserFeatures = []
  public private(set) var protocolFeatures: VhostUserProtocolFeatures = []
  public private(set) var memory = VhostUserMemory()
  /// Regions that were removed, the last ones.
  private var regionsRemoved: [VhostUserMessage.RegionDescription] = []
  private var log: VhostUserLog?
  private var inflight: VhostUserInflight?
  private var queues: [VhostUserQueue]
  private var status: UInt8 = 0
  private var version: UInt64 = 0
  /// What was replaced and may still be in use, by the version that replaced it.
  private var retired: [(version: UInt64, what: any AnyObject & Sendable)] = []
  private var waiting = Waiting.nothing
  private var isEnding = false

  private enum Waiting {
    case nothing
    /// For a queue to stop, whose base is then the reply.
    case base(queue: Int, header: VhostUserHeader)
    /// For all queues to stop, before the reset is complete.
    case reset(header: VhostUserHeader)
    case version(UInt64, header: VhostUserHeader)
  }

  /// What the frontend is told.
  private enum Answer {
    /// That it went well, if it asked.
    case done
    case reply([UInt8], OwnedDescriptor? = nil)
    /// Later: `waiting` says when.
    case later
  }

  public init(_ settings: Settings) {
    self.settings = settings
    queues = [VhostUserQueue](repeating: VhostUserQueue(), count: settings.queuePairsMax * 2)
  }

  /// Whether a worker's answer must come before the next message.
  public var isWaiting: Bool {
    if isEnding { return true }
    return if case .nothing = waiting { false } else { true }
  }

  /// Whether the connection is over and no worker has anything of it: the backend may go.
  public var hasEnded: Bool { isEnding && queues.allSatisfy(\.isStopped) }

  /// The queues that workers serve or are leaving.
  public var queuesInUse: [Int] { queues.indices.filter { !queues[$0].isStopped } }

  /// Why memory that the frontend shared, and that workers may still use, is the frontend's no more; nil: it is. To be
  /// asked when ``MappingFaults/event()`` is readable; what follows is ``end()``, after ``signalErrors()``.
  public var memoryFault: String? {
    let tables = [memory] + retired.compactMap { $0.what as? VhostUserMemory }
    if let region = tables.flatMap(\.regions).first(where: \.mapping.isCut) {
      return "\(region.name): \(SharedMapping.cutText)"
    }
    let logs = [log] + retired.map { $0.what as? VhostUserLog }
    if logs.contains(where: { $0?.mapping.isCut == true }) { return "the log: \(SharedMapping.cutText)" }
    return inflight?.mapping.isCut == true ? "the in-flight memory: \(SharedMapping.cutText)" : nil
  }

  /// Tells the frontend that the queues that run are not served any more.
  public func signalErrors() {
    for queue in queues where !queue.isStopped { queue.error?.signal() }
  }

  // MARK: What comes in

  /// One message. Not to be called while ``isWaiting``.
  /// - Parameters:
  ///   - payload: as many bytes as the header says.
  ///   - descriptors: all that came with it, however many.
  public mutating func receive(
    _ header: VhostUserHeader, payload: [UInt8], descriptors: [OwnedDescriptor]
  ) -> Outcome {
    precondition(!isWaiting, "a message while an answer is waited for")
    var outcome = Outcome()
    do throws(VhostUserRefusal) {
      let message = try VhostUserMessage(header, payload: payload)
      let expected = message.descriptorCounts
      guard expected.contains(descriptors.count) else {
        throw VhostUserRefusal(
          "\(message.request.name) with \(descriptors.count) descriptors instead of "
            + (expected.count == 1 ? "\(expected.lowerBound)" : "\(expected.lowerBound) or \(expected.upperBound)"))
      }
      switch try carryOut(message, header, descriptors, &outcome) {
      case .done: acknowledge(header, &outcome)
      case .reply(let payload, let descriptor):
        outcome.replies.append(VhostUserReply(to: header.request, payload: payload, descriptor: descriptor))
      case .later: break
      }
    } catch {
      refuse(header, error, &outcome)
    }
    return outcome
  }

  /// A worker has left a queue that ``VhostUserEffect/stopQueue(_:)`` named, and given back all that it took of it.
  public mutating func queueStopped(_ queue: Int, base: VhostUserQueueBase) -> Outcome {
    var outcome = Outcome()
    guard queues.indices.contains(queue), case .stopping(let kind) = queues[queue].state else { return outcome }
    queues[queue].state = .stopped
    queues[queue].base = base.rawValue(kind)
    queues[queue].baseBeforeReset = nil
    queues[queue].kick = nil
    guard !isEnding else { return outcome }
    switch waiting {
    case .base(queue, let header):
      waiting = .nothing
      outcome.replies.append(reply(to: header, baseOf: queue))
    case .reset(let header) where queues.allSatisfy(\.isStopped):
      waiting = .nothing
      reset(header, &outcome)
    default: break
    }
    return outcome
  }

  /// Every worker has left what `version`, or one before it, replaced.
  public mutating func adopted(version: UInt64) -> Outcome {
    var outcome = Outcome()
    retired.removeAll { $0.version <= version }
    if !isEnding, case .version(let awaited, let header) = waiting, awaited <= version {
      waiting = .nothing
      if header.request == VhostUserRequest.setLogBase.rawValue {
        outcome.replies.append(Self.reply(to: header, number: 0))
      } else {
        acknowledge(header, &outcome)
      }
    }
    return outcome
  }

  /// The connection is over: nobody waits for replies any more. The backend stays until ``hasEnded``.
  public mutating func end() -> Outcome {
    var outcome = Outcome()
    guard !isEnding else { return outcome }
    isEnding = true
    waiting = .nothing
    stopAll(&outcome)
    return outcome
  }

  // MARK: Answers

  private func acknowledge(_ header: VhostUserHeader, _ outcome: inout Outcome) {
    guard header.needsReply, protocolFeatures.contains(.replyAcknowledge) else { return }
    outcome.replies.append(Self.reply(to: header, number: 0))
  }

  private func refuse(_ header: VhostUserHeader, _ why: VhostUserRefusal, _ outcome: inout Outcome) {
    outcome.effects.append(.refused(why.description))
    var refusal = VhostUserRequest(rawValue: header.request)?.refusal ?? .ifAsked
    // Only then does it have a reply.
    if header.request == VhostUserRequest.setLogBase.rawValue {
      refusal = protocolFeatures.contains(.logInSharedMemory) ? .always : .ifAsked
    }
    switch refusal {
    case .empty: outcome.replies.append(VhostUserReply(to: header.request, payload: []))
    case .always: outcome.replies.append(Self.reply(to: header, number: 1))
    case .ifAsked:
      guard header.needsReply, protocolFeatures.contains(.replyAcknowledge) else { return }
      outcome.replies.append(Self.reply(to: header, number: 1))
    }
  }

  private static func reply(to header: VhostUserHeader, number: UInt64) -> VhostUserReply {
    VhostUserReply(to: header.request, payload: number.littleEndianBytes)
  }

  private func reply(to header: VhostUserHeader, baseOf queue: Int) -> VhostUserReply {
    let base = VhostUserMessage.QueueNumber(
      queue: UInt32(queue), number: queues[queue].baseBeforeReset ?? queues[queue].base)
    return VhostUserReply(to: header.request, payload: base.bytes)
  }

  // MARK: Messages

  private mutating func carryOut(
    _ message: VhostUserMessage, _ header: VhostUserHeader, _ descriptors: [OwnedDescriptor],
    _ outcome: inout Outcome
  ) throws(VhostUserRefusal) -> Answer {
    let name = message.request.name
    switch message {
    case .getFeatures: return .reply(settings.features.rawValue.littleEndianBytes)
    case .setFeatures(let bits): return try setFeatures(bits, header, &outcome)
    case .setOwner: return .done
    // Ignored, as the protocol recommends: what it once meant was never agreed on.
    case .resetOwner: return .done
    case .getProtocolFeatures: return .reply(settings.protocolFeatures.rawValue.littleEndianBytes)
    case .setProtocolFeatures(let bits):
      let unknown = bits & ~settings.protocolFeatures.rawValue
      guard unknown == 0 else { throw VhostUserRefusal("\(name): \(hexadecimal(unknown)) was not offered") }
      protocolFeatures = VhostUserProtocolFeatures(rawValue: bits)
      return .done
    case .getQueuePairsMax:
      try require(offered: .multiQueue, name)
      return .reply(UInt64(settings.queuePairsMax).littleEndianBytes)
    case .setMemoryTable(let regions): return try setMemoryTable(regions, descriptors, header, &outcome)
    case .getMemorySlotsMax:
      try require(offered: .configureMemorySlots, name)
      return .reply(UInt64(VhostUserMemory.regionsMax).littleEndianBytes)
    case .addMemoryRegion(let region): return try addMemoryRegion(region, descriptors[0], header, &outcome)
    case .removeMemoryRegion(let region): return try removeMemoryRegion(region, header, &outcome)
    case .setLogBase(let area): return try setLogBase(area, descriptors[0], header, &outcome)
    // Who has it may tell the frontend that the log changed; no frontend needs to be told.
    case .setLogDescriptor: return .done
    case .setQueueSize(let size): return try setQueueSize(size)
    case .setQueueAddresses(let addresses): return try setQueueAddresses(addresses, header, &outcome)
    case .setQueueBase(let base): return try setQueueBase(base)
    case .getQueueBase(let queue): return try getQueueBase(queue, header, &outcome)
    case .setQueueKick(let event): return try setQueueKick(event, descriptors.first, &outcome)
    case .setQueueCall(let event):
      let queue = try queue(of: event, descriptors.first, name)
      retire(queues[queue].call)
      queues[queue].call = descriptors.first
      if queues[queue].isStarted {
        outcome.effects.append(.callChanged(queue: queue, descriptors.first, version: version))
      }
      return .done
    case .setQueueError(let event):
      let queue = try queue(of: event, descriptors.first, name)
      retire(queues[queue].error)
      queues[queue].error = descriptors.first
      if queues[queue].isStarted {
        outcome.effects.append(.errorChanged(queue: queue, descriptors.first, version: version))
      }
      return .done
    case .setQueueEnabled(let state): return try setQueueEnabled(state, &outcome)
    case .sendRARP(let bits):
      try require(offered: .rarp, name)
      let bytes = bits.littleEndianBytes.prefix(MACAddress.bytes)
      let address = MACAddress(bits: bytes.reduce(0) { $0 << 8 | UInt64($1) })
      guard !address.isMulticast, !address.isZero else {
        throw VhostUserRefusal("\(name): \(address) is no guest's address")
      }
      outcome.effects.append(.sendRARP(address))
      return .done
    case .setMTU(let bytes):
      try require(offered: .mtu, name)
      guard bytes >= UInt64(Settings.mtuBytesMin), bytes <= UInt64(settings.mtuBytesMax) else {
        throw VhostUserRefusal("\(name): \(bytes) is not within \(Settings.mtuBytesMin) and \(settings.mtuBytesMax)")
      }
      outcome.effects.append(.mtuChanged(bytes: Int(bytes)))
      return .done
    case .getInflight(let description): return try getInflight(description)
    case .setInflight(let description): return try setInflight(description, descriptors[0])
    case .setStatus(let bits): return try setStatus(bits, header, &outcome)
    case .getStatus:
      try require(offered: .status, name)
      return .reply(UInt64(status).littleEndianBytes)
    case .resetDevice:
      try require(agreed: .resetDevice, name)
      return startReset(header, &outcome)
    }
  }

  private func require(offered feature: VhostUserProtocolFeatures, _ name: String) throws(VhostUserRefusal) {
    guard settings.protocolFeatures.contains(feature) else {
      throw VhostUserRefusal("\(name) belongs to a feature that was not offered")
    }
  }

  private func require(agreed feature: VhostUserProtocolFeatures, _ name: String) throws(VhostUserRefusal) {
    guard protocolFeatures.contains(feature) else {
      throw VhostUserRefusal("\(name) belongs to a feature that was not agreed on")
    }
  }

  private func queue(_ number: UInt32, _ name: String) throws(VhostUserRefusal) -> Int {
    guard number < UInt32(queues.count) else {
      throw VhostUserRefusal("\(name): queue \(number) is not one of the \(queues.count)")
    }
    return Int(number)
  }

  private func queue(
    of event: VhostUserMessage.QueueDescriptor, _ descriptor: OwnedDescriptor?, _ name: String
  ) throws(VhostUserRefusal) -> Int {
    guard !event.hasOtherBits else {
      throw VhostUserRefusal("\(name): \(hexadecimal(event.rawValue)) has bits without a meaning")
    }
    let queue = try queue(event.queue, name)
    do throws(VhostUserRefusal) {
      try descriptor?.becomeEvent()
    } catch {
      throw VhostUserRefusal("\(name): queue \(queue): \(error)")
    }
    return queue
  }

  private func stoppedQueue(_ number: UInt32, _ name: String) throws(VhostUserRefusal) -> Int {
    let queue = try queue(number, name)
    guard queues[queue].isStopped else { throw VhostUserRefusal("\(name): queue \(queue) runs; stop it first") }
    return queue
  }

  /// Keeps something that is replaced until workers have left it; the version that does so is now `version`.
  private mutating func retire(_ what: (any AnyObject & Sendable)?) {
    version += 1
    if let what, queues.contains(where: { !$0.isStopped }) { retired.append((version, what)) }
  }

  private var kind: VhostUserQueueKind { features.contains(.packedRing) ? .packed : .split }

  /// The answer comes when every worker uses the newest version.
  private mutating func later(_ header: VhostUserHeader) -> Answer {
    waiting = .version(version, header: header)
    return .later
  }

  // MARK: Features, status

  private mutating func setFeatures(
    _ bits: UInt64, _ header: VhostUserHeader, _ outcome: inout Outcome
  ) throws(VhostUserRefusal) -> Answer {
    let name = VhostUserRequest.setFeatures.name
    let unknown = bits & ~settings.features.rawValue
    guard unknown == 0 else { throw VhostUserRefusal("\(name): \(hexadecimal(unknown)) was not offered") }
    let new = VhostUserFeatures(rawValue: bits)
    let change = new.symmetricDifference(features)
    let runs = queues.contains { !$0.isStopped }
    // Each pair of queues says its features, those that follow while the first ones run.
    guard change.isSubset(of: .logAll) || !runs else {
      throw VhostUserRefusal("\(name): \(hexadecimal(change.rawValue)) cannot change while queues run")
    }
    guard !change.isEmpty else { return .done }
    features = new
    retire(nil)
    outcome.effects.append(.featuresAgreed(new, version: version))
    // Writes from now on must be in the log: a frontend asks, by any message, when that is so.
    return later(header)
  }

  private mutating func setStatus(
    _ bits: UInt64, _ header: VhostUserHeader, _ outcome: inout Outcome
  ) throws(VhostUserRefusal) -> Answer {
    let name = VhostUserRequest.setStatus.name
    try require(agreed: .status, name)
    guard let new = UInt8(exactly: bits) else {
      throw VhostUserRefusal("\(name): \(hexadecimal(bits)) is more than the eight bits of a status")
    }
    guard new != 0 else { return startReset(header, &outcome) }
    status = new
    return .done
  }

  private mutating func startReset(_ header: VhostUserHeader, _ outcome: inout Outcome) -> Answer {
    stopAll(&outcome)
    guard queues.allSatisfy(\.isStopped) else {
      waiting = .reset(header: header)
      return .later
    }
    reset(header, &outcome)
    return .later
  }

  private mutating func reset(_ header: VhostUserHeader, _ outcome: inout Outcome) {
    status = 0
    features = []
    inflight = nil
    for queue in queues.indices { queues[queue].reset() }
    outcome.effects.append(.reset)
    acknowledge(header, &outcome)
  }

  private mutating func stopAll(_ outcome: inout Outcome) {
    for queue in queues.indices { stop(queue, &outcome) }
  }

  private mutating func stop(_ queue: Int, _ outcome: inout Outcome) {
    guard case .started(let kind) = queues[queue].state else { return }
    queues[queue].state = .stopping(kind)
    outcome.effects.append(.stopQueue(queue))
  }

  // MARK: Memory

  private mutating func setMemoryTable(
    _ descriptions: [VhostUserMessage.RegionDescription], _ descriptors: [OwnedDescriptor],
    _ header: VhostUserHeader, _ outcome: inout Outcome
  ) throws(VhostUserRefusal) -> Answer {
    let name = VhostUserRequest.setMemoryTable.name
    do throws(VhostUserRefusal) {
      try VhostUserMemory.check(descriptions)
      var regions: [VhostUserMemory.Region] = []
      for (description, descriptor) in zip(descriptions, descriptors) {
        regions.append(try VhostUserMemory.map(description, descriptor))
      }
      try adopt(VhostUserMemory(regions), &outcome)
    } catch {
      throw VhostUserRefusal("\(name): \(error)")
    }
    return later(header)
  }

  private mutating func addMemoryRegion(
    _ description: VhostUserMessage.RegionDescription, _ descriptor: OwnedDescriptor, _ header: VhostUserHeader,
    _ outcome: inout Outcome
  ) throws(VhostUserRefusal) -> Answer {
    let name = VhostUserRequest.addMemoryRegion.name
    try require(agreed: .configureMemorySlots, name)
    // QEMU before 8.0 says it once for each pair of queues.
    if memory.regions.contains(where: { $0.isNamed(by: description) }) { return .done }
    do throws(VhostUserRefusal) {
      try VhostUserMemory.check(memory.descriptions + [description])
      let region = try VhostUserMemory.map(description, descriptor)
      try adopt(VhostUserMemory(memory.regions + [region]), &outcome)
    } catch {
      throw VhostUserRefusal("\(name): \(error)")
    }
    return later(header)
  }

  private mutating func removeMemoryRegion(
    _ description: VhostUserMessage.RegionDescription, _ header: VhostUserHeader, _ outcome: inout Outcome
  ) throws(VhostUserRefusal) -> Answer {
    let name = VhostUserRequest.removeMemoryRegion.name
    try require(agreed: .configureMemorySlots, name)
    guard memory.regions.contains(where: { $0.isNamed(by: description) }) else {
      // So it does this.
      if regionsRemoved.contains(description) { return .done }
      throw VhostUserRefusal("\(name): there is no such region at \(hexadecimal(description.guestAddress))")
    }
    do throws(VhostUserRefusal) {
      try adopt(VhostUserMemory(memory.regions.filter { !$0.isNamed(by: description) }), &outcome)
      regionsRemoved = regionsRemoved.suffix(VhostUserMemory.regionsMax - 1) + [description]
    } catch {
      throw VhostUserRefusal("\(name): \(error)")
    }
    return later(header)
  }

  /// Makes it the table, if it has the rings of every queue that runs.
  private mutating func adopt(_ new: VhostUserMemory, _ outcome: inout Outcome) throws(VhostUserRefusal) {
    var rings: [Int: VhostUserRings] = [:]
    for (number, queue) in queues.enumerated() {
      guard case .started(let kind) = queue.state, let size = queue.size, let addresses = queue.addresses else {
        continue
      }
      do throws(VhostUserRefusal) {
        rings[number] = try VhostUserQueue.resolve(addresses, size: size, kind, new)
      } catch {
        throw VhostUserRefusal("queue \(number) runs: \(error)")
      }
    }
    retire(memory)
    memory = new
    outcome.effects.append(.memoryChanged(new, rings: rings, version: version))
  }

  private mutating func setLogBase(
    _ area: VhostUserMessage.AreaDescription, _ descriptor: OwnedDescriptor, _ header: VhostUserHeader,
    _ outcome: inout Outcome
  ) throws(VhostUserRefusal) -> Answer {
    let name = VhostUserRequest.setLogBase.name
    try require(agreed: .logInSharedMemory, name)
    let new: VhostUserLog
    do throws(VhostUserRefusal) {
      new = VhostUserLog(mapping: try SharedMapping(descriptor, area))
    } catch {
      throw VhostUserRefusal("\(name): \(error)")
    }
    retire(log)
    log = new
    outcome.effects.append(.logChanged(new, version: version))
    return later(header)
  }

  // MARK: Queues

  private mutating func setQueueSize(_ size: VhostUserMessage.QueueNumber) throws(VhostUserRefusal) -> Answer {
    let name = VhostUserRequest.setQueueSize.name
    let queue = try stoppedQueue(size.queue, name)
    guard size.number > 0, size.number <= VhostUserQueue.sizeMax else {
      throw VhostUserRefusal("\(name): a queue of \(size.number) places; it has 1 to \(VhostUserQueue.sizeMax)")
    }
    queues[queue].size = Int(size.number)
    return .done
  }

  private mutating func setQueueAddresses(
    _ addresses: VhostUserMessage.QueueAddresses, _ header: VhostUserHeader, _ outcome: inout Outcome
  ) throws(VhostUserRefusal) -> Answer {
    let name = VhostUserRequest.setQueueAddresses.name
    let queue = try queue(addresses.queue, name)
    do throws(VhostUserRefusal) {
      try VhostUserQueue.check(addresses)
      if queues[queue].isStarted {
        return try changeUsedLog(queue, addresses, header, &outcome)
      }
      // Where size and memory are not there yet, the start finds out.
      if let size = queues[queue].size, !memory.regions.isEmpty {
        _ = try VhostUserQueue.resolve(addresses, size: size, kind, memory)
      }
    } catch {
      throw VhostUserRefusal("\(name): queue \(queue): \(error)")
    }
    queues[queue].addresses = addresses
    return .done
  }

  /// A queue that runs is given its addresses again when a migration starts or ends.
  private mutating func changeUsedLog(
    _ queue: Int, _ addresses: VhostUserMessage.QueueAddresses, _ header: VhostUserHeader, _ outcome: inout Outcome
  ) throws(VhostUserRefusal) -> Answer {
    guard let now = queues[queue].addresses, now.descriptors == addresses.descriptors, now.used == addresses.used,
      now.available == addresses.available
    else {
      throw VhostUserRefusal("its addresses cannot change while it runs; stop it first")
    }
    let before = queues[queue].usedLogAddress
    queues[queue].addresses = addresses
    guard queues[queue].usedLogAddress != before else { return .done }
    retire(nil)
    outcome.effects.append(
      .usedLogChanged(queue: queue, address: queues[queue].usedLogAddress, version: version))
    return later(header)
  }

  private mutating func setQueueBase(_ base: VhostUserMessage.QueueNumber) throws(VhostUserRefusal) -> Answer {
    let queue = try stoppedQueue(base.queue, VhostUserRequest.setQueueBase.name)
    queues[queue].base = base.number
    queues[queue].baseBeforeReset = nil
    return .done
  }

  private mutating func getQueueBase(
    _ named: VhostUserMessage.QueueNumber, _ header: VhostUserHeader, _ outcome: inout Outcome
  ) throws(VhostUserRefusal) -> Answer {
    let queue = try queue(named.queue, VhostUserRequest.getQueueBase.name)
    guard queues[queue].isStarted else { return .reply(reply(to: header, baseOf: queue).payload) }
    stop(queue, &outcome)
    waiting = .base(queue: queue, header: header)
    return .later
  }

  private mutating func setQueueKick(
    _ event: VhostUserMessage.QueueDescriptor, _ descriptor: OwnedDescriptor?, _ outcome: inout Outcome
  ) throws(VhostUserRefusal) -> Answer {
    let name = VhostUserRequest.setQueueKick.name
    let queue = try queue(of: event, descriptor, name)
    if queues[queue].isStarted {
      retire(queues[queue].kick)
      queues[queue].kick = descriptor
      outcome.effects.append(.kickChanged(queue: queue, descriptor, version: version))
      return .done
    }
    do throws(VhostUserRefusal) {
      let start = try start(queue, kick: descriptor)
      queues[queue].kick = descriptor
      queues[queue].state = .started(start.kind)
      outcome.effects.append(.startQueue(start))
    } catch {
      throw VhostUserRefusal("\(name): queue \(queue): \(error)")
    }
    return .done
  }

  private func start(_ number: Int, kick: OwnedDescriptor?) throws(VhostUserRefusal) -> VhostUserQueueStart {
    let queue = queues[number]
    guard let size = queue.size else { throw VhostUserRefusal("its size is to be set first") }
    guard let addresses = queue.addresses else { throw VhostUserRefusal("its addresses are to be set first") }
    guard kind == .packed || size & (size - 1) == 0 else {
      throw VhostUserRefusal("its size of \(size) is no power of two, as a split queue's is")
    }
    guard let base = VhostUserQueueBase(rawValue: queue.base, kind), kind == .split || Int(base.availableIndex) < size,
      kind == .split || Int(base.usedIndex) < size
    else {
      throw VhostUserRefusal("its base \(hexadecimal(queue.base)) is no place of \(size)")
    }
    let rings = try VhostUserQueue.resolve(addresses, size: size, kind, memory)
    var part: (memory: VhostUserInflight, part: Range<Int>)?
    if let inflight {
      guard let range = inflight.part(ofQueue: number, size: size, kind) else {
        throw VhostUserRefusal("the in-flight memory is too small for its \(size) places")
      }
      part = (inflight, range)
    }
    return VhostUserQueueStart(
      number: number, kind: kind, size: size, rings: rings, base: base, features: features,
      isEnabled: queue.enabled ?? !features.contains(.protocolFeatures), kick: kick, call: queue.call,
      error: queue.error, memory: memory, usedLogAddress: queue.usedLogAddress, inflight: part)
  }

  private mutating func setQueueEnabled(
    _ named: VhostUserMessage.QueueNumber, _ outcome: inout Outcome
  ) throws(VhostUserRefusal) -> Answer {
    let name = VhostUserRequest.setQueueEnabled.name
    // Some frontends send it though they left the feature out of SET_FEATURES.
    guard settings.features.contains(.protocolFeatures) else {
      throw VhostUserRefusal("\(name) belongs to a feature that was not offered")
    }
    let queue = try queue(named.queue, name)
    guard named.number <= 1 else { throw VhostUserRefusal("\(name): \(named.number) is neither 0 nor 1") }
    queues[queue].enabled = named.number == 1
    if queues[queue].isStarted { outcome.effects.append(.queueEnabled(queue, named.number == 1)) }
    return .done
  }

  // MARK: What is out while a backend dies

  private func check(_ description: VhostUserMessage.InflightDescription, _ name: String) throws(VhostUserRefusal) {
    try require(agreed: .inflightInSharedMemory, name)
    guard description.queues > 0, Int(description.queues) <= queues.count, description.size > 0,
      Int(description.size) <= VhostUserQueue.sizeMax
    else {
      throw VhostUserRefusal(
        "\(name): \(description.queues) queues of \(description.size) places, where there are \(queues.count) of at "
          + "most \(VhostUserQueue.sizeMax)")
    }
    guard queues.allSatisfy(\.isStopped) else {
      throw VhostUserRefusal("\(name): the in-flight memory cannot change while queues run")
    }
  }

  private mutating func getInflight(
    _ description: VhostUserMessage.InflightDescription
  ) throws(VhostUserRefusal) -> Answer {
    let name = VhostUserRequest.getInflight.name
    try check(description, name)
    var made = description
    let descriptor: OwnedDescriptor
    do throws(VhostUserRefusal) {
      (descriptor, made.area) = try VhostUserInflight.makeFile(
        queues: Int(description.queues), size: Int(description.size), kind)
      inflight = VhostUserInflight(
        mapping: try SharedMapping(descriptor, made.area), queues: Int(description.queues),
        size: Int(description.size))
    } catch {
      throw VhostUserRefusal("\(name): \(error)")
    }
    return .reply(made.bytes, descriptor)
  }

  private mutating func setInflight(
    _ description: VhostUserMessage.InflightDescription, _ descriptor: OwnedDescriptor
  ) throws(VhostUserRefusal) -> Answer {
    let name = VhostUserRequest.setInflight.name
    try check(description, name)
    let queues = Int(description.queues)
    let size = Int(description.size)
    do throws(VhostUserRefusal) {
      let mapping = try SharedMapping(descriptor, description.area)
      let needed = queues * VhostUserInflight.queueBytes(size: size, kind)
      guard mapping.byteCount >= needed else {
        throw VhostUserRefusal("\(mapping.byteCount) bytes where \(queues) queues need \(needed)")
      }
      inflight = VhostUserInflight(mapping: mapping, queues: queues, size: size)
    } catch {
      throw VhostUserRefusal("\(name): \(error)")
    }
    return .done
  }
}
