import CLinux
import Datapath
import Glibc

/// Everything that simulated workers share: time, devices (TAPs, or others by packet sockets) with the guests behind
/// them, UDP sockets, and the wire between the hosts. One thread runs all of it; the same seed gives the same run.
///
/// The way of a frame
/// 1. A guest's frame waits in its device queue (`inject`) until a worker's armed source takes it.
/// 2. A datagram that a worker sends waits in its socket's send buffer (full: EAGAIN), which drains at the wire's rate.
/// 3. It travels for a random delay. Datagrams of one 5-tuple never overtake each other; others may.
/// 4. It waits in the receive queue of the socket that it is for (full: dropped and counted here) until a worker
///    takes it.
/// 5. A frame that a worker writes to a device is the guest's at once (`takeWritten`).
///
/// Every datagram is counted once in `counts`, under what became of it: `isConserved` says whether the sums agree.
/// Control's part (opening and closing descriptors) and the guests' part are played by the test.
public final class SimulatedNetwork {
  /// Sizes and times of the world. The defaults are small so that short runs meet every limit.
  public struct Limits: Sendable {
    /// Delay of a datagram from socket to socket.
    public var delayNanoseconds = 5_000...100_000
    /// Rate at which a socket's send buffer drains: 1250 is 10 Gb/s.
    public var bytesPerMicrosecond = 1250
    /// Bytes that a socket's send buffer holds.
    public var sendBufferBytes = 32 << 10
    /// Datagrams that a socket's receive queue holds.
    public var receiveQueueDatagramsMax = 256
    /// Frames that a device queue holds: the txqueuelen of a TAP.
    public var deviceQueueFramesMax = 500
    /// The underlay's MTU: longer datagrams give EMSGSIZE (Don't Fragment is set).
    public var mtuBytes = 65_535
    /// Datagrams that one send takes as a train: 64 before Linux 6.9. More give EINVAL.
    public var trainFramesMax = SendPool.trainFramesMax
    /// For each datagram received: those behind it that are alike come with it, as one train.
    public var trains = 0.0
    /// What one `collect` costs.
    public var collectNanoseconds = 300...2_000

    public init() {}
  }

  /// What became of frames and datagrams, each under exactly one name once it is not in flight any more. A super-frame
  /// counts as the frames that it is on the wire.
  public struct Counts: Sendable, Equatable {
    /// Frames that guests sent into a device that took them.
    public var framesInjected = 0
    /// Frames that guests sent when the device queue was full or the device gone: never taken, not in `framesInjected`.
    public var framesRefused = 0
    /// Injected frames that workers received, or that went with their device.
    public var framesReceived = 0, framesLostWithDevice = 0
    /// Of the received ones, those that arrived cut. A super-frame that is cut is received as one frame; the others of
    /// it are cut off.
    public var framesTruncated = 0, framesCutOff = 0
    /// Frames that workers wrote to devices, all of them.
    public var framesWritten = 0
    /// Writes that the device took only a part of.
    public var shortWrites = 0

    /// Datagrams that sockets took from workers, and those that tests forged.
    public var datagramsSent = 0, datagramsForged = 0
    /// Datagrams that workers received; of those, the ones that arrived cut.
    public var datagramsReceived = 0, datagramsTruncated = 0
    /// Datagrams that ended on their way.
    public var lostOnWire = 0, receiveQueueFull = 0, noListener = 0, closedSocket = 0
    /// Datagrams on which a router marked congestion.
    public var congestionMarks = 0
    /// Sends of workers that failed with an error other than EAGAIN.
    public var failedSends = 0
    /// Of those, trains that were refused as trains: by `Faults.refusedTrain`, or for more than `trainFramesMax`.
    public var trainsRefused = 0, trainsTooLong = 0

    public init() {}
  }

  public let clock = SimulatedClock()
  public var random: SimulatedRandom
  public var faults: Faults
  public let limits: Limits
  public private(set) var counts = Counts()
  /// What workers did against the contract, in order; the first `violationsMax` are kept.
  public private(set) var violations: [Violation] = []
  public static let violationsMax = 100

  /// The bug that is planted, if any, and how often it struck.
  package var planted: PlantedFault?
  package private(set) var plantedCount = 0

  private var descriptors: [OpenDescriptor] = []
  private var foreignWakers: [(foreign: Int32, own: Int32)] = []
  private var devices: [Device] = []
  private var sockets: [Socket] = []
  private var wire: [WireEvent] = []
  private var wireSequence = 0
  /// When the last datagram of a flow arrives: a later one may not come before it.
  private var flowArrivals: [Flow: UInt64] = [:]
  private var datagramsOnWire = 0

  /// Simulated descriptors start here, so that one never equals a real one by chance.
  private static let descriptorFirst: Int32 = 10_000
  /// Ports of sockets that connect without being bound: the IANA dynamic range.
  private var ephemeralPort: UInt16 = 49_152

  public init(seed: UInt64, faults: Faults = .none, limits: Limits = Limits()) {
    random = SimulatedRandom(seed: seed)
    self.faults = faults
    self.limits = limits
  }

  // MARK: Descriptors

  private struct OpenDescriptor {
    var kind: Kind
    var isOpen = true
    /// Receives, chains and waits of workers that are out on it.
    var operationsOut = 0
    enum Kind {
      case queue(device: Int, queue: Int)
      case socket(Int)
      case waker(count: UInt64)
    }
  }

  private func add(_ kind: OpenDescriptor.Kind) -> Int32 {
    descriptors.append(OpenDescriptor(kind: kind))
    return Self.descriptorFirst + Int32(descriptors.count - 1)
  }

  private func index(_ descriptor: Int32) -> Int? {
    if descriptor < Self.descriptorFirst {
      return foreignWakers.first { $0.foreign == descriptor }.map { Int($0.own - Self.descriptorFirst) }
    }
    let index = Int(descriptor) - Int(Self.descriptorFirst)
    return descriptors.indices.contains(index) ? index : nil
  }

  private func kind(_ descriptor: Int32) -> OpenDescriptor.Kind? {
    guard let index = index(descriptor), descriptors[index].isOpen else { return nil }
    return descriptors[index].kind
  }

  /// Closes a descriptor, as control does when it takes it back. Operations that are out on it are a violation.
  public func close(_ descriptor: Int32) {
    guard let index = index(descriptor), descriptors[index].isOpen else {
      record(.wrongDescriptor(descriptor: descriptor))
      return
    }
    if descriptors[index].operationsOut != 0 { record(.descriptorClosedInUse(descriptor: descriptor)) }
    descriptors[index].isOpen = false
    switch descriptors[index].kind {
    case .queue(let device, let queue):
      counts.framesLostWithDevice += devices[device].framesQueued(queue)
      devices[device].queues[queue].removeAll()
    case .socket(let socket):
      counts.closedSocket += sockets[socket].received.count
      sockets[socket].received.removeAll()
      sockets[socket].isOpen = false
    case .waker: break
    }
  }

  func countOut(_ descriptor: Int32, _ change: Int) {
    guard let index = index(descriptor) else { return }
    descriptors[index].operationsOut += change
  }

  func record(_ violation: Violation) {
    if violations.count < Self.violationsMax { violations.append(violation) }
  }

  /// Whether the planted bug strikes at this opportunity.
  func strikes(_ fault: PlantedFault, rate: Double) -> Bool {
    guard planted == fault, random.chance(rate) else { return false }
    plantedCount += 1
    return true
  }

  // MARK: Devices and guests

  private struct Device {
    /// Frames that guests sent, each with its virtio header before it, by queue.
    var queues: [Queue<[UInt8]>] = []
    var written: [WrittenFrame] = []
    var isGone = false
    var isFull = false

    func framesQueued(_ queue: Int) -> Int { queues[queue].sum(SimulatedNetwork.wireFrames) }
  }

  /// How many frames on the wire one item of a device is: its virtio header, then the frame. A super-frame must be TCP
  /// and its header true, as the tests' are.
  static func wireFrames(_ item: [UInt8]) -> Int {
    func field(_ start: Int) -> Int { Int(item[start]) | Int(item[start + 1]) << 8 }
    // gso_type, but for its ECN bit (0x80); gso_size; csum_start.
    guard item[1] & 0x7F != 0 else { return 1 }
    let transport = virtioHeaderBytes + field(6)
    let payload = item.count - transport - Int(item[transport + 12] >> 4) * 4
    return (payload + field(4) - 1) / field(4)
  }

  /// A frame that a worker wrote to a device.
  public struct WrittenFrame: Sendable, Equatable {
    public let queue: Int
    public let virtioHeader: [UInt8]
    public let frame: [UInt8]
  }

  /// Bytes of the virtio header before each frame of a device (`virtio_net_hdr_v1`, virtio 1.2 section 5.1.6).
  public static let virtioHeaderBytes = 12

  /// Makes a device without queues; returns its number.
  public func addDevice() -> Int {
    devices.append(Device())
    return devices.count - 1
  }

  /// Attaches one more queue to a device; returns its descriptor.
  public func openQueue(device: Int) -> Int32 {
    devices[device].queues.append(Queue())
    return add(.queue(device: device, queue: devices[device].queues.count - 1))
  }

  /// A guest sends a frame; false when the device queue is full or the device is gone.
  @discardableResult
  public func inject(_ frame: [UInt8], virtioHeader: [UInt8]? = nil, device: Int, queue: Int = 0) -> Bool {
    guard !devices[device].isGone, devices[device].queues[queue].count < limits.deviceQueueFramesMax else {
      counts.framesRefused += 1
      return false
    }
    let header = virtioHeader ?? [UInt8](repeating: 0, count: Self.virtioHeaderBytes)
    precondition(header.count == Self.virtioHeaderBytes)
    devices[device].queues[queue].append(header + frame)
    counts.framesInjected += Self.wireFrames(header + frame)
    return true
  }

  /// What workers wrote to a device since the last call, the oldest first.
  public func takeWritten(device: Int) -> [WrittenFrame] {
    defer { devices[device].written.removeAll() }
    return devices[device].written
  }

  /// The device goes away as when its namespace is deleted: receives end with EBADFD, writes fail with EIO.
  public func removeDevice(_ device: Int) {
    guard !devices[device].isGone else { return }
    devices[device].isGone = true
    for queue in devices[device].queues.indices {
      counts.framesLostWithDevice += devices[device].framesQueued(queue)
      devices[device].queues[queue].removeAll()
    }
  }

  /// A device that is full takes no writes until it is told that it is not.
  public func setFull(device: Int, _ isFull: Bool) { devices[device].isFull = isFull }

  public func isGone(device: Int) -> Bool { devices[device].isGone }

  /// Draws whether a device goes away now.
  func drawDeviceLoss() {
    guard random.chance(faults.deviceLoss), !devices.isEmpty else { return }
    removeDevice(random.below(devices.count))
  }

  /// One write of a worker to a device: 0, or an error number. `bytes` starts with the virtio header.
  func write(_ descriptor: Int32, _ bytes: [UInt8]) -> Int32 {
    guard case .queue(let device, let queue)? = kind(descriptor) else { return EBADF }
    if devices[device].isGone { return EIO }
    if devices[device].isFull { return EAGAIN }
    // `tun_get_user` refuses what has no whole Ethernet header.
    if bytes.count < Self.virtioHeaderBytes + 14 { return EINVAL }
    counts.framesWritten += Self.wireFrames(bytes)
    devices[device].written.append(
      WrittenFrame(
        queue: queue, virtioHeader: Array(bytes[..<Self.virtioHeaderBytes]),
        frame: Array(bytes[Self.virtioHeaderBytes...])))
    return 0
  }

  // MARK: Wakers

  /// An eventfd; returns its descriptor.
  public func openWaker() -> Int32 { add(.waker(count: 0)) }

  /// Makes an eventfd of the machine known, one that a worker arms: `wake` takes its number then. Nothing reads it.
  public func addWaker(_ descriptor: Int32) {
    precondition(descriptor >= 0 && descriptor < Self.descriptorFirst)
    foreignWakers.append((descriptor, openWaker()))
  }

  /// Writes to an eventfd: any number of writes before it is read make one wake-up.
  public func wake(_ descriptor: Int32) {
    guard let index = index(descriptor), case .waker(let count) = descriptors[index].kind else {
      record(.wrongDescriptor(descriptor: descriptor))
      return
    }
    descriptors[index].kind = .waker(count: count + 1)
  }

  // MARK: Sockets

  private struct Socket {
    var address: UnderlayAddress
    var port: UInt16
    var peer: Peer?
    var isOpen = true
    var received = Queue<Datagram>()
    var bufferedBytes = 0
    /// When the last byte that is buffered leaves.
    var drainedAt: UInt64 = 0
    /// ECONNREFUSED of an ICMP message, reported by the next send.
    var pendingError: Int32 = 0
  }

  private struct Peer: Hashable {
    var address: UnderlayAddress
    var port: UInt16
  }

  private struct Flow: Hashable {
    var source: Peer
    var destination: Peer
  }

  struct Datagram {
    var sender: UnderlayAddress
    var typeOfService: UInt8
    var bytes: [UInt8]
  }

  private struct WireEvent {
    var time: UInt64
    /// Settles the order of events of one time: first come, first served.
    var sequence: Int
    var what: What
    enum What {
      case departed(socket: Int, bytes: Int)
      case arrived(Flow, Datagram, from: Int?)
    }
  }

  /// Binds a UDP socket. Several may be bound to one address and port (`SO_REUSEPORT`): a flow always goes to the same.
  public func openSocket(_ address: UnderlayAddress, port: UInt16) -> Int32 {
    sockets.append(Socket(address: address, port: port))
    return add(.socket(sockets.count - 1))
  }

  /// Makes a connected UDP socket with a port of its own: what a lane sends by.
  public func openSocket(_ address: UnderlayAddress, connectedTo remote: UnderlayAddress, port: UInt16) -> Int32 {
    sockets.append(Socket(address: address, port: ephemeralPort, peer: Peer(address: remote, port: port)))
    ephemeralPort = ephemeralPort == .max ? 49_152 : ephemeralPort + 1
    return add(.socket(sockets.count - 1))
  }

  /// Sends a datagram that no worker sent: what a stranger, a broken peer or a test puts on the wire.
  public func forge(
    _ bytes: [UInt8], typeOfService: UInt8 = 0, from source: UnderlayAddress, port sourcePort: UInt16,
    to destination: UnderlayAddress, port: UInt16
  ) {
    counts.datagramsForged += 1
    launch(
      Datagram(sender: source, typeOfService: typeOfService, bytes: bytes),
      Flow(
        source: Peer(address: source, port: sourcePort), destination: Peer(address: destination, port: port)),
      at: clock.nanoseconds, from: nil)
  }

  /// One send of a worker: 0, or an error number.
  func send(_ descriptor: Int32, _ bytes: [UInt8], typeOfService: UInt8, segmentBytes: Int = 0) -> Int32 {
    guard case .socket(let number)? = kind(descriptor) else { return EBADF }
    guard let peer = sockets[number].peer else { return EDESTADDRREQ }
    if sockets[number].pendingError != 0 {
      defer { sockets[number].pendingError = 0 }
      return sockets[number].pendingError
    }
    // IP header (20 or 40 bytes) and UDP header (8).
    let headerBytes = peer.address.isIPv4 ? 28 : 48
    let pieceBytes = segmentBytes == 0 ? bytes.count : segmentBytes
    let pieces = max(1, (bytes.count + pieceBytes - 1) / max(1, pieceBytes))
    if min(pieceBytes, bytes.count) + headerBytes > limits.mtuBytes { return EMSGSIZE }
    if pieces > limits.trainFramesMax {
      counts.trainsTooLong += 1
      return EINVAL
    }
    if segmentBytes > 0 && bytes.count > SendPool.trainBytesMax { return EINVAL }
    let buffered = sockets[number].bufferedBytes
    let packetBytes = bytes.count + pieces * headerBytes
    if buffered > 0 && buffered + packetBytes > limits.sendBufferBytes { return EAGAIN }
    for piece in 0..<pieces {
      let end = min(bytes.count, (piece + 1) * pieceBytes)
      leave(number, peer, Array(bytes[piece * pieceBytes..<end]), headerBytes, typeOfService)
    }
    return 0
  }

  private func leave(_ number: Int, _ peer: Peer, _ bytes: [UInt8], _ headerBytes: Int, _ typeOfService: UInt8) {
    let packetBytes = bytes.count + headerBytes
    counts.datagramsSent += 1
    sockets[number].bufferedBytes += packetBytes
    let start = max(clock.nanoseconds, sockets[number].drainedAt)
    let departure = start + UInt64(packetBytes * 1000 / limits.bytesPerMicrosecond)
    sockets[number].drainedAt = departure
    schedule(departure, .departed(socket: number, bytes: packetBytes))

    var service = typeOfService
    // ECT(0), ECT(1) may become CE; Not-ECT may not (RFC 3168 section 5).
    if service & 3 == 1 || service & 3 == 2, random.chance(faults.congestionMark) {
      service |= 3
      counts.congestionMarks += 1
    }
    let flow = Flow(source: Peer(address: sockets[number].address, port: sockets[number].port), destination: peer)
    launch(
      Datagram(sender: sockets[number].address, typeOfService: service, bytes: bytes), flow, at: departure,
      from: number)
  }

  private func launch(_ datagram: Datagram, _ flow: Flow, at departure: UInt64, from socket: Int?) {
    if random.chance(faults.lostDatagram) {
      counts.lostOnWire += 1
      return
    }
    let delay = UInt64(random.number(in: limits.delayNanoseconds))
    let arrival = max(departure + delay, flowArrivals[flow] ?? 0)
    flowArrivals[flow] = arrival
    datagramsOnWire += 1
    schedule(arrival, .arrived(flow, datagram, from: socket))
  }

  /// Whether a socket's send buffer is at most half full: what the kernel calls writable (`sock_writeable`).
  private func hasRoom(socket: Int) -> Bool { sockets[socket].bufferedBytes * 2 <= limits.sendBufferBytes }

  // MARK: The wire

  /// When the next thing happens by itself; nil when nothing will.
  public var nextDue: UInt64? { wire.first?.time }

  /// Lets happen what is due by now.
  public func run() {
    while let event = wire.first, event.time <= clock.nanoseconds {
      popWire()
      switch event.what {
      case .departed(let socket, let bytes): sockets[socket].bufferedBytes -= bytes
      case .arrived(let flow, let datagram, let sender):
        datagramsOnWire -= 1
        arrive(datagram, flow, from: sender)
      }
    }
  }

  private func arrive(_ datagram: Datagram, _ flow: Flow, from sender: Int?) {
    var bound: [Int] = []
    var target: Int?
    for number in sockets.indices {
      let socket = sockets[number]
      guard socket.isOpen, socket.address == flow.destination.address, socket.port == flow.destination.port else {
        continue
      }
      if socket.peer == flow.source {
        target = number
        break
      }
      if socket.peer == nil { bound.append(number) }
    }
    if target == nil, !bound.isEmpty {
      // One flow, one socket, as SO_REUSEPORT picks by a hash of the 4-tuple.
      let word = flow.source.address.low ^ flow.source.address.high ^ UInt64(flow.source.port) &* 0x9E37_79B9_7F4A_7C15
      target = bound[Int((word &* 0xBF58_476D_1CE4_E5B9) >> 33) % bound.count]
    }
    guard let target else {
      counts.noListener += 1
      if let sender { sockets[sender].pendingError = ECONNREFUSED }
      return
    }
    guard sockets[target].received.count < limits.receiveQueueDatagramsMax else {
      counts.receiveQueueFull += 1
      return
    }
    sockets[target].received.append(datagram)
  }

  // The events of the wire: a binary heap, the earliest on top.

  private func schedule(_ time: UInt64, _ what: WireEvent.What) {
    wire.append(WireEvent(time: time, sequence: wireSequence, what: what))
    wireSequence += 1
    var child = wire.count - 1
    while child > 0 {
      let parent = (child - 1) / 2
      guard isBefore(child, parent) else { break }
      wire.swapAt(child, parent)
      child = parent
    }
  }

  private func popWire() {
    wire.swapAt(0, wire.count - 1)
    wire.removeLast()
    var parent = 0
    while true {
      var least = parent
      for child in [2 * parent + 1, 2 * parent + 2] where child < wire.count && isBefore(child, least) {
        least = child
      }
      guard least != parent else { return }
      wire.swapAt(parent, least)
      parent = least
    }
  }

  private func isBefore(_ left: Int, _ right: Int) -> Bool {
    (wire[left].time, wire[left].sequence) < (wire[right].time, wire[right].sequence)
  }

  // MARK: What a worker's side of I/O asks

  /// What waits to be received from a descriptor.
  enum Readiness {
    case nothing, something, gone
  }

  func readiness(_ descriptor: Int32) -> Readiness {
    guard let kind = kind(descriptor) else { return .gone }
    switch kind {
    case .queue(let device, let queue):
      if devices[device].isGone { return .gone }
      return devices[device].queues[queue].isEmpty ? .nothing : .something
    case .socket(let socket): return sockets[socket].received.isEmpty ? .nothing : .something
    case .waker(let count): return count == 0 ? .nothing : .something
    }
  }

  /// Whether a descriptor takes sends: true also for a lost device, whose sends fail at once.
  func isWritable(_ descriptor: Int32) -> Bool {
    switch kind(descriptor) {
    case .socket(let socket)?: return hasRoom(socket: socket)
    case .queue(let device, _)?: return devices[device].isGone || !devices[device].isFull
    default: return true
    }
  }

  func isGone(_ descriptor: Int32) -> Bool {
    guard let kind = kind(descriptor) else { return true }
    if case .queue(let device, _) = kind { return devices[device].isGone }
    return false
  }

  func fits(_ descriptor: Int32, _ source: SourceKind) -> Bool {
    switch (kind(descriptor), source) {
    case (.queue, .tap), (.queue, .packet), (.socket, .vxlan), (.socket, .vnetp), (.waker, .waker): true
    default: false
    }
  }

  func fits(_ descriptor: Int32, _ lane: LaneKind) -> Bool {
    switch (kind(descriptor), lane) {
    case (.queue, .tap), (.queue, .packet): true
    case (.socket(let socket), .datagramIPv4): sockets[socket].peer?.address.isIPv4 == true
    case (.socket(let socket), .datagramIPv6): sockets[socket].peer?.address.isIPv4 == false
    default: false
    }
  }

  /// The next item of a device queue or socket; only after `readiness` said that there is something.
  func receive(_ descriptor: Int32) -> Datagram {
    switch kind(descriptor) {
    case .queue(let device, let queue):
      let bytes = devices[device].queues[queue].popFirst()
      counts.framesReceived += Self.wireFrames(bytes)
      return Datagram(sender: UnderlayAddress(high: 0, low: 0), typeOfService: 0, bytes: bytes)
    case .socket(let socket):
      counts.datagramsReceived += 1
      return sockets[socket].received.popFirst()
    default: preconditionFailure("nothing to receive")
    }
  }

  /// The first datagram and those behind it that make a train with it: from the same sender, with the same ToS, of
  /// the same length, the last perhaps shorter. Also the length of each but the last; 0 where it stays alone.
  func receiveTrain(_ descriptor: Int32) -> (Datagram, segmentBytes: Int) {
    var train = receive(descriptor)
    guard case .socket(let socket)? = kind(descriptor), !train.bytes.isEmpty else { return (train, 0) }
    let segmentBytes = train.bytes.count
    var count = 1
    while count < SendPool.trainFramesMax, let next = sockets[socket].received.first,
      next.sender == train.sender, next.typeOfService == train.typeOfService, !next.bytes.isEmpty,
      next.bytes.count <= segmentBytes, train.bytes.count + next.bytes.count <= SendPool.trainBytesMax
    {
      train.bytes += receive(descriptor).bytes
      count += 1
      if next.bytes.count < segmentBytes { break }
    }
    return (train, count > 1 ? segmentBytes : 0)
  }

  func readWaker(_ descriptor: Int32) {
    guard let index = index(descriptor) else { return }
    descriptors[index].kind = .waker(count: 0)
  }

  /// One item of a source arrives cut.
  func countTruncated(_ item: Datagram, _ source: SourceKind) {
    guard source.isDevice else {
      counts.datagramsTruncated += 1
      return
    }
    let cutOff = Self.wireFrames(item.bytes) - 1
    counts.framesTruncated += 1
    counts.framesReceived -= cutOff
    counts.framesCutOff += cutOff
  }

  func countRefusedTrain() { counts.trainsRefused += 1 }

  func countSend(error: Int32, isShort: Bool) {
    if isShort {
      counts.shortWrites += 1
    } else if error != EAGAIN {
      counts.failedSends += 1
    }
  }

  // Draws for the workers' sides. (Calling `network.random` from there crashes the compiler, 6.3.1, under the thread
  // sanitizer.)

  func chance(_ rate: Double) -> Bool { random.chance(rate) }
  func below(_ bound: Int) -> Int { random.below(bound) }
  func number(in range: ClosedRange<Int>) -> Int { random.number(in: range) }
  func shuffle(_ items: inout [Int]) { items.shuffle(using: &random) }

  func countUnreported(_ change: Int) { unreportedCount += change }

  // MARK: Accounts

  /// Frames and datagrams that lie in slots, received and counted as such, and whose event no worker has seen yet.
  public private(set) var unreportedCount = 0

  /// Frames that guests sent and no worker has received yet.
  public var framesQueued: Int {
    devices.reduce(0) { sum, device in sum + device.queues.indices.reduce(0) { $0 + device.framesQueued($1) } }
  }
  /// Datagrams that were sent and no worker has received yet.
  public var datagramsInFlight: Int { datagramsOnWire + sockets.reduce(0) { $0 + $1.received.count } }
  /// Whether nothing waits in the network.
  public var isIdle: Bool { framesQueued == 0 && datagramsInFlight == 0 && wire.isEmpty && unreportedCount == 0 }

  /// Whether every frame and datagram is where the counts say: the network's own conservation.
  public var isConserved: Bool {
    counts.framesInjected
      == counts.framesReceived + counts.framesCutOff + counts.framesLostWithDevice + framesQueued
      && counts.datagramsSent + counts.datagramsForged
        == counts.datagramsReceived + counts.lostOnWire + counts.receiveQueueFull + counts.noListener
        + counts.closedSocket + datagramsInFlight
  }
}

extension SourceKind {
  /// Whether guests are behind it, and a virtio header before each frame.
  var isDevice: Bool { self == .tap || self == .packet }
}

extension LaneKind {
  /// Whether guests are behind it, and a virtio header before each frame.
  var isDevice: Bool { self == .tap || self == .packet }
}

/// A queue over an array: first in, first out, its front freed in bulk.
struct Queue<Element> {
  private var items: [Element] = []
  private var head = 0

  var count: Int { items.count - head }
  var isEmpty: Bool { count == 0 }
  var first: Element? { isEmpty ? nil : items[head] }
  mutating func append(_ item: Element) { items.append(item) }
  mutating func popFirst() -> Element {
    precondition(!isEmpty, "a queue is empty")
    let item = items[head]
    head += 1
    if head * 2 > items.count && head > 16 {
      items.removeFirst(head)
      head = 0
    }
    return item
  }
  func sum(_ value: (Element) -> Int) -> Int { items[head...].reduce(0) { $0 + value($1) } }
  mutating func removeAll() {
    items.removeAll()
    head = 0
  }
  mutating func removeAll(where isUnwanted: (Element) -> Bool) {
    items = items[head...].filter { !isUnwanted($0) }
    head = 0
  }
}
