/// The device's side of one virtio ring (virtio 1.2 §2.6). One worker uses it; the driver, a guest, is at the other end
/// and is not trusted: whatever stands in its memory, the device stays within the regions of its table.
///
/// The way of a chain: `next` takes it, `complete` stages its return, in any order, `publish` lets the driver see all
/// that was staged, and then `mustCall` tells whether the driver wants to be called.
public protocol Virtqueue: ~Copyable {
  /// - Parameters:
  ///   - areas: within memory that stays mapped as long as the queue is used.
  ///   - base: where to begin, as SET_VRING_BASE has it: see `base`.
  init(_ areas: VirtqueueAreas, features: VirtqueueFeatures, base: UInt32) throws(VirtqueueError)

  /// Bytes of the three areas of a ring.
  static func areaBytes(size: Int, features: VirtqueueFeatures) -> (descriptor: Int, driver: Int, device: Int)

  /// Places on the ring.
  var size: Int { get }

  /// Takes the next chain that the driver made available. After a fault the ring is where it was, and asking again
  /// tells the same as long as the driver leaves it so: the queue is to be stopped.
  mutating func next(_ memory: GuestMemory.Reference, into chain: inout VirtioChain) -> VirtqueueResult

  /// Takes the next chains as long as they are single ones, up to `most`, and asks for the first lines of all of them
  /// at once, so that their misses overlap.
  /// - Returns: whether the next chain is there and was left because it is none of these: `next` takes it, or tells
  ///   what is wrong with it.
  mutating func take(_ memory: GuestMemory.Reference, upTo most: Int, into singles: inout VirtioSingles) -> Bool
  /// Gives back the last of the chains that `take` took, none of which is completed: the next one taken is the first of
  /// them.
  mutating func giveBack(last count: Int)

  /// Where the queue stands, to come back to.
  var mark: VirtqueueMark { get }
  /// Gives back all chains taken since the mark, none of which is completed: the next one taken is the first of them.
  mutating func rewind(to mark: VirtqueueMark)

  /// Stages the return of a chain, of which the device wrote the first `writtenBytes`. The driver does not see it yet.
  mutating func complete(_ token: VirtioChain.Token, writtenBytes: Int)
  /// Lets the driver see all that was completed, at once.
  mutating func publish(_ memory: GuestMemory.Reference)
  /// Whether the driver wants to be called for what was published since this was asked last. Asked after `publish`.
  mutating func mustCall() -> Bool

  /// Asks the driver to kick for the next chain. True when one is there already: for that one perhaps nobody kicks.
  mutating func askForKicks(_ memory: GuestMemory.Reference) -> Bool
  /// Tells the driver that it need not kick, as the ring is polled: once when polling begins, for it costs a store that
  /// the driver reads. It is a hint: kicks may come all the same.
  mutating func refuseKicks(_ memory: GuestMemory.Reference)

  /// Chains that were taken and are not completed.
  var takenCount: Int { get }

  /// Where the queue stands, as GET_VRING_BASE returns it: split, the next index on the available ring (16 bits);
  /// packed, bits 0 to 14 the place of the next available descriptor, bit 15 its wrap counter, bits 16 to 30 and 31 the
  /// same of the next used one (docs/interop/vhost-user of QEMU, vring descriptor index). Chains that are not completed
  /// would be lost to a device that goes on from here.
  var base: UInt32 { get }

  /// Bytes of the notes of one queue in flight, a whole number of cache lines: the notes of the queues lie one behind
  /// the other.
  static func inFlightBytes(size: Int) -> Int
  /// Notes the chains in flight from now on, for a device that goes on when this one ended without a farewell; first
  /// takes up what notes are there. Before any chain is taken.
  /// - Parameter region: `inFlightBytes`, aligned to 8, which stay mapped; all zero where nothing was noted yet. Shared
  ///   with the frontend.
  /// - Returns: how many chains a device before took and did not give back: `next` brings these first.
  /// - Throws: `inFlightNotes` where the notes cannot be of this ring. The queue is as it was.
  mutating func trackInFlight(_ region: UnsafeMutableRawPointer) throws(VirtqueueError) -> Int

  /// Notes writes to the ring itself in the dirty log, from now on or, with nil, no longer.
  mutating func logWrites(_ addresses: VirtqueueLogAddresses?)
}

/// Where a ring lies.
@safe
public struct VirtqueueAreas: BitwiseCopyable, @unchecked Sendable {
  /// Places on the ring, up to `sizeMax`.
  public var size: Int
  /// Split: the descriptor table; packed: the descriptor ring.
  public var descriptor: UnsafeMutableRawPointer
  /// Split: the available ring; packed: the driver's event suppression.
  public var driver: UnsafeMutableRawPointer
  /// Split: the used ring; packed: the device's event suppression.
  public var device: UnsafeMutableRawPointer

  /// virtio 1.2 §2.7 and §2.8: the most that either kind of ring has.
  public static let sizeMax = 32_768

  public init(
    size: Int, descriptor: UnsafeMutableRawPointer, driver: UnsafeMutableRawPointer, device: UnsafeMutableRawPointer
  ) {
    self.size = size
    unsafe self.descriptor = unsafe descriptor
    unsafe self.driver = unsafe driver
    unsafe self.device = unsafe device
  }

  /// virtio 1.2 §2.7 and §2.8.10.1: a descriptor is 16 bytes and so aligned.
  func checkAlignment(driver driverBytes: Int, device deviceBytes: Int) throws(VirtqueueError) {
    guard unsafe Int(bitPattern: descriptor) % 16 == 0 else { throw .misaligned("descriptor", bytes: 16) }
    guard unsafe Int(bitPattern: driver) % driverBytes == 0 else { throw .misaligned("driver", bytes: driverBytes) }
    guard unsafe Int(bitPattern: device) % deviceBytes == 0 else { throw .misaligned("device", bytes: deviceBytes) }
  }
}

/// Guest physical addresses of what the device writes of a ring.
public struct VirtqueueLogAddresses: BitwiseCopyable, Sendable {
  public var descriptor: UInt64
  public var device: UInt64

  public init(descriptor: UInt64, device: UInt64) {
    self.descriptor = descriptor
    self.device = device
  }
}

/// What both sides agreed on that changes the rings (virtio 1.2 §6).
public struct VirtqueueFeatures: OptionSet, BitwiseCopyable, Sendable {
  public let rawValue: UInt64

  /// - Parameter rawValue: the feature bits, as both sides agreed on them.
  public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// VIRTIO_F_INDIRECT_DESC.
  public static let indirectDescriptors = VirtqueueFeatures(rawValue: 1 << 28)
  /// VIRTIO_F_EVENT_IDX.
  public static let eventIndex = VirtqueueFeatures(rawValue: 1 << 29)
  /// VIRTIO_F_RING_PACKED: which kind of queue is to be made.
  public static let packedRing = VirtqueueFeatures(rawValue: 1 << 34)
  /// VIRTIO_F_IN_ORDER: the device completes chains in the order in which it took them. Whoever completes sees to it.
  public static let inOrder = VirtqueueFeatures(rawValue: 1 << 35)
}

/// Why a queue cannot be made.
public enum VirtqueueError: Error, Equatable, CustomStringConvertible {
  case size(Int)
  case misaligned(String, bytes: Int)
  case base(UInt32)
  case inFlightNotes

  public var description: String {
    switch self {
    case .size(let size):
      "cannot use a ring of \(size) places: it must have 1 to \(VirtqueueAreas.sizeMax), a split one a power of two"
    case .misaligned(let area, let bytes):
      "cannot use the ring: its \(area) area is not aligned to \(bytes) bytes"
    case .base(let base):
      "cannot go on with the ring at \(base): that is not on it"
    case .inFlightNotes:
      "cannot take up the chains in flight: their notes are not of this ring, or are damaged; reset the device"
    }
  }
}

/// What `next` found.
public enum VirtqueueResult: BitwiseCopyable, Equatable, Sendable {
  /// The driver has made nothing more available.
  case none
  case chain
  /// The driver broke the rules.
  case broken(VirtqueueFault)
}

/// What a driver did that no driver may.
public enum VirtqueueFault: UInt8, BitwiseCopyable, CaseIterable, Sendable, CustomStringConvertible {
  case availableIndexJumped, headOutOfRange, nextOutOfRange, chainTooLong, tooManyTaken, tooManyPieces, notMapped
  case readableAfterWritable
  case indirectNotAgreed, indirectWithNext, indirectNested, indirectSize, indirectTooLong, indirectNotMapped

  public var description: String {
    switch self {
    case .availableIndexJumped: "the available index went ahead by more than the ring's size"
    case .headOutOfRange: "the first descriptor's index is beyond the ring"
    case .nextOutOfRange: "a next descriptor's index is beyond its table"
    case .chainTooLong: "a chain has more descriptors than its table, or is a loop"
    case .tooManyTaken: "more is available than the ring has places"
    case .tooManyPieces: "a chain has more than \(VirtioChain.piecesMax) pieces"
    case .notMapped: "a descriptor names memory that was not shared"
    case .readableAfterWritable: "a readable descriptor follows a writable one"
    case .indirectNotAgreed: "a descriptor is indirect, which was not agreed on"
    case .indirectWithNext: "an indirect descriptor is not the last one"
    case .indirectNested: "an indirect table names another one"
    case .indirectSize: "an indirect table is empty or not a whole number of descriptors"
    case .indirectTooLong: "an indirect table has more descriptors than the ring"
    case .indirectNotMapped: "an indirect table is not in one run of shared memory, or not aligned to 8 bytes"
    }
  }
}

/// A queue's place, for `rewind`.
public struct VirtqueueMark: BitwiseCopyable, Sendable {
  /// Split: the index; packed: the place.
  var available: UInt16
  /// Packed: the bits of an available descriptor in this round.
  var availableBits: UInt16 = 0
  /// Chains that were ever taken.
  var takenTotal: Int
}

/// The words of a descriptor, which both kinds of rings share (virtio 1.2 §2.7.5 and §2.8.13).
enum VirtioDescriptor {
  static var bytes: Int { 16 }
  static var next: UInt16 { 1 }
  static var write: UInt16 { 2 }
  static var indirect: UInt16 { 4 }

  /// The table that an indirect descriptor names, and its descriptors.
  @unsafe @inline(__always)
  static func table(
    at address: UInt64, bytes: UInt32, size: Int, memory: GuestMemory.Reference, hint: inout GuestMemory.Hint,
    _ table: inout UnsafeMutableRawPointer, _ count: inout Int
  ) -> VirtqueueFault? {
    guard bytes > 0, bytes % UInt32(Self.bytes) == 0 else { return .indirectSize }
    count = Int(bytes) / Self.bytes
    guard count <= size else { return .indirectTooLong }
    guard let piece = unsafe memory.piece(at: address, bytes: Int(bytes), hint: &hint), unsafe piece.iov_len == bytes,
      let start = unsafe piece.iov_base, UInt(bitPattern: start) % 8 == 0
    else { return .indirectNotMapped }
    unsafe table = unsafe start
    return nil
  }
}

/// What both kinds of queues share.
enum Virtqueues {
  /// As if so much had been published before: what a device before us published and did not announce is so announced
  /// with the first call, wherever the driver's event index stands.
  static var unannouncedFirst: Int { 1 << 16 }
}
