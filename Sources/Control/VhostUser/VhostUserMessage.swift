/// Why a message is not carried out: one line, for the log.
public struct VhostUserRefusal: Error, CustomStringConvertible, Hashable, Sendable {
  public let description: String
  public init(_ description: String) { self.description = description }
}

/// The twelve bytes in front of every message: request, flags, bytes of payload (docs/interop/vhost-user of QEMU,
/// "Header").
///
/// Numbers on this socket are in the order of the machine, which frontend and backend share; all machines that this
/// builds for are little-endian.
public struct VhostUserHeader: Hashable, Sendable {
  public static let byteCount = 12
  /// The longest payload that is read, in bytes. The longest one known is GET_CONFIG's, of 268: what is longer than
  /// this is no message.
  public static let payloadBytesMax = 4_096
  /// Descriptors that one message may bring.
  public static let descriptorsMax = 8

  private static let version: UInt32 = 1
  private static let versionMask: UInt32 = 3
  private static let replyBit: UInt32 = 1 << 2
  private static let needReplyBit: UInt32 = 1 << 3

  /// The number of the request, known or not.
  public let request: UInt32
  /// Whether the frontend waits to be told how it went.
  public let needsReply: Bool
  public let payloadBytes: Int

  public init(request: UInt32, needsReply: Bool = false, payloadBytes: Int) {
    self.request = request
    self.needsReply = needsReply
    self.payloadBytes = payloadBytes
  }

  /// - Parameter bytes: ``byteCount`` bytes, as they came.
  /// - Throws: that this is no request of version 1: nothing behind it can be trusted to start where it should.
  public init(bytes: [UInt8]) throws(VhostUserRefusal) {
    var reader = ByteReader(bytes)
    guard bytes.count == Self.byteCount, let request = reader.next32(), let flags = reader.next32(),
      let size = reader.next32()
    else {
      throw VhostUserRefusal("a header of \(bytes.count) bytes instead of \(Self.byteCount)")
    }
    let name = VhostUserRequest.name(request)
    guard flags & Self.versionMask == Self.version else {
      throw VhostUserRefusal("\(name): protocol version \(flags & Self.versionMask) instead of \(Self.version)")
    }
    guard flags & Self.replyBit == 0 else { throw VhostUserRefusal("\(name): a reply where a request is due") }
    guard flags & ~(Self.versionMask | Self.needReplyBit) == 0 else {
      throw VhostUserRefusal("\(name): flags \(hexadecimal(flags)) have bits without a meaning")
    }
    guard size <= Self.payloadBytesMax else {
      throw VhostUserRefusal("\(name): \(size) bytes of payload, more than the \(Self.payloadBytesMax) of any message")
    }
    self.init(request: request, needsReply: flags & Self.needReplyBit != 0, payloadBytes: Int(size))
  }

  /// As a frontend sends it, or as a backend replies.
  public func bytes(isReply: Bool) -> [UInt8] {
    let flags = Self.version | (isReply ? Self.replyBit : 0) | (needsReply ? Self.needReplyBit : 0)
    return request.littleEndianBytes + flags.littleEndianBytes + UInt32(payloadBytes).littleEndianBytes
  }
}

/// A message of the backend to the frontend.
public struct VhostUserReply: Sendable {
  /// The request that it answers.
  public let request: UInt32
  public let payload: [UInt8]
  /// Goes with the first byte.
  public let descriptor: OwnedDescriptor?

  public init(to request: UInt32, payload: [UInt8], descriptor: OwnedDescriptor? = nil) {
    self.request = request
    self.payload = payload
    self.descriptor = descriptor
  }

  public var bytes: [UInt8] {
    VhostUserHeader(request: request, payloadBytes: payload.count).bytes(isReply: true) + payload
  }
}

/// A request with its payload, of the right size. What it says is not yet judged.
public enum VhostUserMessage: Hashable, Sendable {
  case getFeatures
  case setFeatures(UInt64)
  case setOwner
  case resetOwner
  case setMemoryTable([RegionDescription])
  case setLogBase(AreaDescription)
  case setLogDescriptor
  case setQueueSize(QueueNumber)
  case setQueueAddresses(QueueAddresses)
  case setQueueBase(QueueNumber)
  case getQueueBase(QueueNumber)
  case setQueueKick(QueueDescriptor)
  case setQueueCall(QueueDescriptor)
  case setQueueError(QueueDescriptor)
  case getProtocolFeatures
  case setProtocolFeatures(UInt64)
  case getQueuePairsMax
  case setQueueEnabled(QueueNumber)
  case sendRARP(UInt64)
  case setMTU(UInt64)
  case getInflight(InflightDescription)
  case setInflight(InflightDescription)
  case resetDevice
  case getMemorySlotsMax
  case addMemoryRegion(RegionDescription)
  case removeMemoryRegion(RegionDescription)
  case setStatus(UInt64)
  case getStatus

  /// A part of guest memory: where the guest and the frontend see it, and where it is in its file; all in bytes.
  public struct RegionDescription: Hashable, Sendable {
    public var guestAddress: UInt64
    public var byteCount: UInt64
    public var userAddress: UInt64
    public var fileOffset: UInt64

    public init(guestAddress: UInt64, byteCount: UInt64, userAddress: UInt64, fileOffset: UInt64) {
      self.guestAddress = guestAddress
      self.byteCount = byteCount
      self.userAddress = userAddress
      self.fileOffset = fileOffset
    }

    var bytes: [UInt8] {
      guestAddress.littleEndianBytes + byteCount.littleEndianBytes + userAddress.littleEndianBytes
        + fileOffset.littleEndianBytes
    }
  }

  /// A part of a file, in bytes.
  public struct AreaDescription: Hashable, Sendable {
    public var byteCount: UInt64
    public var fileOffset: UInt64

    public init(byteCount: UInt64, fileOffset: UInt64) {
      self.byteCount = byteCount
      self.fileOffset = fileOffset
    }
  }

  /// A queue, and a number: its size, its base, or whether it is enabled.
  public struct QueueNumber: Hashable, Sendable {
    public var queue: UInt32
    public var number: UInt32

    public init(queue: UInt32, number: UInt32 = 0) {
      self.queue = queue
      self.number = number
    }

    var bytes: [UInt8] { queue.littleEndianBytes + number.littleEndianBytes }
  }

  /// Where a queue's rings are in the frontend's address space, and where the used ring is in the log.
  public struct QueueAddresses: Hashable, Sendable {
    public var queue: UInt32
    public var flags: UInt32
    public var descriptors: UInt64
    public var used: UInt64
    public var available: UInt64
    public var log: UInt64

    public init(queue: UInt32, flags: UInt32, descriptors: UInt64, used: UInt64, available: UInt64, log: UInt64) {
      self.queue = queue
      self.flags = flags
      self.descriptors = descriptors
      self.used = used
      self.available = available
      self.log = log
    }

    var bytes: [UInt8] {
      queue.littleEndianBytes + flags.littleEndianBytes + descriptors.littleEndianBytes + used.littleEndianBytes
        + available.littleEndianBytes + log.littleEndianBytes
    }
  }

  /// A queue by its number, with whether a descriptor comes with it.
  public struct QueueDescriptor: Hashable, Sendable {
    private static let queueMask: UInt64 = 0xFF
    private static let noDescriptorBit: UInt64 = 1 << 8
    public let rawValue: UInt64

    public init(rawValue: UInt64) { self.rawValue = rawValue }
    public init(queue: Int, hasDescriptor: Bool = true) {
      rawValue = UInt64(queue) & Self.queueMask | (hasDescriptor ? 0 : Self.noDescriptorBit)
    }

    var queue: UInt32 { UInt32(rawValue & Self.queueMask) }
    var hasDescriptor: Bool { rawValue & Self.noDescriptorBit == 0 }
    var hasOtherBits: Bool { rawValue & ~(Self.queueMask | Self.noDescriptorBit) != 0 }
  }

  /// Shared memory in which a backend notes what it has taken and not yet given back, for `queues` queues of `size`
  /// places each.
  public struct InflightDescription: Hashable, Sendable {
    /// C pads the structure to a multiple of eight bytes, and frontends in C send it so.
    public static let byteCounts = [20, 24]
    public var area: AreaDescription
    public var queues: UInt16
    public var size: UInt16
    /// As it came, for the reply to be as long.
    public var payloadBytes: Int

    public init(area: AreaDescription, queues: UInt16, size: UInt16, payloadBytes: Int = 24) {
      self.area = area
      self.queues = queues
      self.size = size
      self.payloadBytes = payloadBytes
    }

    var bytes: [UInt8] {
      let fields =
        area.byteCount.littleEndianBytes + area.fileOffset.littleEndianBytes + queues.littleEndianBytes
        + size.littleEndianBytes
      return fields + [UInt8](repeating: 0, count: max(0, payloadBytes - fields.count))
    }
  }

  /// - Parameter payload: as many bytes as the header says.
  /// - Throws: that nobody knows the request, that no network backend serves it, or that its payload has another size.
  public init(_ header: VhostUserHeader, payload: [UInt8]) throws(VhostUserRefusal) {
    guard let request = VhostUserRequest(rawValue: header.request) else {
      throw VhostUserRefusal("\(VhostUserRequest.name(header.request)) is unknown")
    }
    var reader = ByteReader(payload)
    guard payload.count == header.payloadBytes, let message = Self.read(request, &reader), reader.isAtEnd else {
      if Self.isServed(request) {
        throw VhostUserRefusal("\(request.name): a payload of \(payload.count) bytes does not fit the request")
      }
      throw VhostUserRefusal("\(request.name) belongs to a feature that was not offered")
    }
    self = message
  }

  /// Descriptors that may come with it.
  var descriptorCounts: ClosedRange<Int> {
    switch self {
    case .setMemoryTable(let regions): regions.count...regions.count
    case .setQueueKick(let queue), .setQueueCall(let queue), .setQueueError(let queue):
      queue.hasDescriptor ? 1...1 : 0...0
    case .setLogBase, .setLogDescriptor, .addMemoryRegion, .setInflight: 1...1
    // Some frontends send the region's; the protocol wants it closed unused.
    case .removeMemoryRegion: 0...1
    default: 0...0
    }
  }

  private static func isServed(_ request: VhostUserRequest) -> Bool {
    switch request {
    case .setBackendRequestDescriptor, .translation, .setQueueEndianness, .getConfiguration, .setConfiguration,
      .createCryptoSession, .closeCryptoSession, .postcopyAdvise, .postcopyListen, .postcopyEnd, .setGraphicsSocket,
      .queueKick:
      false
    default: true
    }
  }

  private static func read(_ request: VhostUserRequest, _ reader: inout ByteReader) -> Self? {
    switch request {
    case .getFeatures: .getFeatures
    case .setFeatures: reader.next64().map(Self.setFeatures)
    case .setOwner: .setOwner
    case .resetOwner: .resetOwner
    case .setMemoryTable: memoryTable(&reader).map(Self.setMemoryTable)
    case .setLogBase: area(&reader).map(Self.setLogBase)
    case .setLogDescriptor: .setLogDescriptor
    case .setQueueSize: queueNumber(&reader).map(Self.setQueueSize)
    case .setQueueAddresses: queueAddresses(&reader).map(Self.setQueueAddresses)
    case .setQueueBase: queueNumber(&reader).map(Self.setQueueBase)
    case .getQueueBase: queueNumber(&reader).map(Self.getQueueBase)
    case .setQueueKick: reader.next64().map { .setQueueKick(QueueDescriptor(rawValue: $0)) }
    case .setQueueCall: reader.next64().map { .setQueueCall(QueueDescriptor(rawValue: $0)) }
    case .setQueueError: reader.next64().map { .setQueueError(QueueDescriptor(rawValue: $0)) }
    case .getProtocolFeatures: .getProtocolFeatures
    case .setProtocolFeatures: reader.next64().map(Self.setProtocolFeatures)
    case .getQueuePairsMax: .getQueuePairsMax
    case .setQueueEnabled: queueNumber(&reader).map(Self.setQueueEnabled)
    case .sendRARP: reader.next64().map(Self.sendRARP)
    case .setMTU: reader.next64().map(Self.setMTU)
    case .getInflight: inflight(&reader).map(Self.getInflight)
    case .setInflight: inflight(&reader).map(Self.setInflight)
    case .resetDevice: .resetDevice
    case .getMemorySlotsMax: .getMemorySlotsMax
    case .addMemoryRegion: paddedRegion(&reader).map(Self.addMemoryRegion)
    case .removeMemoryRegion: paddedRegion(&reader).map(Self.removeMemoryRegion)
    case .setStatus: reader.next64().map(Self.setStatus)
    case .getStatus: .getStatus
    case .setBackendRequestDescriptor, .translation, .setQueueEndianness, .getConfiguration, .setConfiguration,
      .createCryptoSession, .closeCryptoSession, .postcopyAdvise, .postcopyListen, .postcopyEnd, .setGraphicsSocket,
      .queueKick:
      nil
    }
  }

  private static func memoryTable(_ reader: inout ByteReader) -> [RegionDescription]? {
    guard let count = reader.next32(), reader.next32() != nil, count <= VhostUserHeader.descriptorsMax else {
      return nil
    }
    var regions: [RegionDescription] = []
    for _ in 0..<count {
      guard let region = region(&reader) else { return nil }
      regions.append(region)
    }
    return regions
  }

  private static func region(_ reader: inout ByteReader) -> RegionDescription? {
    guard let guest = reader.next64(), let count = reader.next64(), let user = reader.next64(),
      let offset = reader.next64()
    else {
      return nil
    }
    return RegionDescription(guestAddress: guest, byteCount: count, userAddress: user, fileOffset: offset)
  }

  private static func paddedRegion(_ reader: inout ByteReader) -> RegionDescription? {
    reader.next64() == nil ? nil : region(&reader)
  }

  private static func area(_ reader: inout ByteReader) -> AreaDescription? {
    guard let count = reader.next64(), let offset = reader.next64() else { return nil }
    return AreaDescription(byteCount: count, fileOffset: offset)
  }

  private static func queueNumber(_ reader: inout ByteReader) -> QueueNumber? {
    guard let queue = reader.next32(), let number = reader.next32() else { return nil }
    return QueueNumber(queue: queue, number: number)
  }

  private static func queueAddresses(_ reader: inout ByteReader) -> QueueAddresses? {
    guard let queue = reader.next32(), let flags = reader.next32(), let descriptors = reader.next64(),
      let used = reader.next64(), let available = reader.next64(), let log = reader.next64()
    else {
      return nil
    }
    return QueueAddresses(
      queue: queue, flags: flags, descriptors: descriptors, used: used, available: available, log: log)
  }

  private static func inflight(_ reader: inout ByteReader) -> InflightDescription? {
    let payloadBytes = reader.bytesLeft
    guard InflightDescription.byteCounts.contains(payloadBytes), let area = area(&reader),
      let queues = reader.next16(), let size = reader.next16()
    else {
      return nil
    }
    reader.skip()
    return InflightDescription(area: area, queues: queues, size: size, payloadBytes: payloadBytes)
  }
}

extension VhostUserMessage {
  /// What a frontend sends for it.
  public var request: VhostUserRequest {
    switch self {
    case .getFeatures: .getFeatures
    case .setFeatures: .setFeatures
    case .setOwner: .setOwner
    case .resetOwner: .resetOwner
    case .setMemoryTable: .setMemoryTable
    case .setLogBase: .setLogBase
    case .setLogDescriptor: .setLogDescriptor
    case .setQueueSize: .setQueueSize
    case .setQueueAddresses: .setQueueAddresses
    case .setQueueBase: .setQueueBase
    case .getQueueBase: .getQueueBase
    case .setQueueKick: .setQueueKick
    case .setQueueCall: .setQueueCall
    case .setQueueError: .setQueueError
    case .getProtocolFeatures: .getProtocolFeatures
    case .setProtocolFeatures: .setProtocolFeatures
    case .getQueuePairsMax: .getQueuePairsMax
    case .setQueueEnabled: .setQueueEnabled
    case .sendRARP: .sendRARP
    case .setMTU: .setMTU
    case .getInflight: .getInflight
    case .setInflight: .setInflight
    case .resetDevice: .resetDevice
    case .getMemorySlotsMax: .getMemorySlotsMax
    case .addMemoryRegion: .addMemoryRegion
    case .removeMemoryRegion: .removeMemoryRegion
    case .setStatus: .setStatus
    case .getStatus: .getStatus
    }
  }

  /// The payload as a frontend sends it.
  public var payload: [UInt8] {
    switch self {
    case .getFeatures, .setOwner, .resetOwner, .setLogDescriptor, .getProtocolFeatures, .getQueuePairsMax,
      .resetDevice, .getMemorySlotsMax, .getStatus:
      []
    case .setFeatures(let number), .setProtocolFeatures(let number), .sendRARP(let number), .setMTU(let number),
      .setStatus(let number):
      number.littleEndianBytes
    case .setQueueKick(let queue), .setQueueCall(let queue), .setQueueError(let queue): queue.rawValue.littleEndianBytes
    case .setQueueSize(let queue), .setQueueBase(let queue), .getQueueBase(let queue), .setQueueEnabled(let queue):
      queue.bytes
    case .setQueueAddresses(let addresses): addresses.bytes
    case .setMemoryTable(let regions):
      UInt64(regions.count).littleEndianBytes + regions.flatMap(\.bytes)
    case .addMemoryRegion(let region), .removeMemoryRegion(let region): UInt64(0).littleEndianBytes + region.bytes
    case .setLogBase(let area): area.byteCount.littleEndianBytes + area.fileOffset.littleEndianBytes
    case .getInflight(let inflight), .setInflight(let inflight): inflight.bytes
    }
  }
}

extension FixedWidthInteger {
  /// Its bytes, the lowest first.
  var littleEndianBytes: [UInt8] {
    (0..<Self.bitWidth / 8).map { UInt8(truncatingIfNeeded: self >> ($0 * 8)) }
  }
}

/// A number as addresses and flags are written.
func hexadecimal(_ number: some BinaryInteger) -> String { "0x" + String(number, radix: 16) }

/// Takes numbers off the front of bytes, the lowest byte first.
struct ByteReader {
  private var rest: ArraySlice<UInt8>

  init(_ bytes: [UInt8]) { rest = bytes[...] }

  var isAtEnd: Bool { rest.isEmpty }
  var bytesLeft: Int { rest.count }

  mutating func next16() -> UInt16? { next(UInt16.self) }
  mutating func next32() -> UInt32? { next(UInt32.self) }
  mutating func next64() -> UInt64? { next(UInt64.self) }
  /// Passes over all that is left.
  mutating func skip() { rest = [] }

  private mutating func next<Number: FixedWidthInteger>(_: Number.Type) -> Number? {
    let count = Number.bitWidth / 8
    guard rest.count >= count else { return nil }
    let number = rest.prefix(count).reversed().reduce(Number(0)) { $0 << 8 | Number(truncatingIfNeeded: $1) }
    rest = rest.dropFirst(count)
    return number
  }
}
