import CLinux
import Datapath
import Glibc
import TestSupport

/// A guest's memory: regions that lie apart with us, each between pages that trap, so that one byte too far ends the
/// test. Two of them follow each other for the guest.
final class VirtioGuest: @unchecked Sendable {
  static let ringsAddress: UInt64 = 0x10_0000
  static let ringsBytes = 1 << 20
  /// Of the two regions that follow each other, and of the border between them.
  static let buffersAddress: UInt64 = 0x100_0000
  static let buffersBorder: UInt64 = 0x100_0000 + 0x8000
  static let buffersBytes = 0x1_0000
  static let tablesAddress: UInt64 = 0x4000_0000
  static let tablesBytes = 8 << 20
  /// What the frontend's addresses are above the guest's.
  static let userOffset: UInt64 = 0x7000_0000_0000

  let regions: [GuestMemory.Region]
  let memory: GuestMemory
  private let pageBytes = 4096

  init(log: DirtyLog? = nil) throws {
    let sizes: [(UInt64, Int)] = [
      (Self.tablesAddress, Self.tablesBytes), (Self.buffersBorder, 0x8000), (Self.buffersAddress, 0x8000),
      (Self.ringsAddress, Self.ringsBytes),
    ]
    regions = sizes.map { address, bytes in
      let whole = unsafe mmap(nil, bytes + 2 * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)!
      unsafe precondition(whole != MAP_FAILED && mprotect(whole + 4096, bytes, PROT_READ | PROT_WRITE) == 0)
      return unsafe GuestMemory.Region(
        guestAddress: address, userAddress: address + Self.userOffset, bytes: UInt64(bytes), mapping: whole + 4096)
    }
    memory = try GuestMemory(regions, log: log)
  }

  deinit { for region in regions { unsafe munmap(region.mapping - 4096, Int(region.bytes) + 2 * 4096) } }

  /// Where a guest address is with us, found the plain way.
  func place(_ address: UInt64) -> UnsafeMutableRawPointer {
    for region in regions where address >= region.guestAddress && address - region.guestAddress < region.bytes {
      return unsafe region.mapping + Int(address - region.guestAddress)
    }
    preconditionFailure("the test's own address is not mapped")
  }
  func store<Word: BitwiseCopyable>(_ value: Word, at address: UInt64) {
    unsafe place(address).storeBytes(of: value, as: Word.self)
  }
  func load<Word: BitwiseCopyable>(_ type: Word.Type, at address: UInt64) -> Word {
    unsafe place(address).loadUnaligned(as: type)
  }

  /// The pieces of a descriptor as they must come, by their place with us.
  func pieces(of descriptor: VirtioBuffer) -> [VirtioPiece] {
    var pieces: [VirtioPiece] = []
    var address = descriptor.address
    var left = Int(descriptor.bytes)
    while left > 0 {
      let region = regions.first { address >= $0.guestAddress && address - $0.guestAddress < $0.bytes }!
      let count = min(left, Int(region.bytes - (address - region.guestAddress)))
      pieces.append(VirtioPiece(place: unsafe UInt(bitPattern: place(address)), bytes: count))
      address += UInt64(count)
      left -= count
    }
    return pieces
  }

  /// Whether a piece lies within one region.
  func isWithin(_ piece: VirtioPiece) -> Bool {
    regions.contains {
      let start = unsafe UInt(bitPattern: $0.mapping)
      return piece.place >= start && piece.bytes > 0 && piece.place - start <= UInt($0.bytes)
        && UInt(piece.bytes) <= UInt($0.bytes) - (piece.place - start)
    }
  }
}

struct VirtioPiece: Equatable {
  var place: UInt
  var bytes: Int

  init(place: UInt, bytes: Int) {
    self.place = place
    self.bytes = bytes
  }
  init(_ vector: iovec) {
    place = unsafe UInt(bitPattern: vector.iov_base)
    bytes = unsafe Int(vector.iov_len)
  }
}

/// What a driver puts into one descriptor.
struct VirtioBuffer: Equatable {
  var address: UInt64
  var bytes: UInt32
  var isWritable: Bool

  static func random(_ random: inout SeededRandom, isWritable: Bool) -> VirtioBuffer {
    let bytes = Int.random(in: 0..<8, using: &random) == 0 ? 0 : Int.random(in: 1...3_000, using: &random)
    let offset = Int.random(in: 0...VirtioGuest.buffersBytes - bytes, using: &random)
    return VirtioBuffer(
      address: VirtioGuest.buffersAddress + UInt64(offset), bytes: UInt32(bytes), isWritable: isWritable)
  }
}

extension VirtioChain {
  var readablePieces: [VirtioPiece] { unsafe readable.map { unsafe VirtioPiece($0) } }
  var writablePieces: [VirtioPiece] { unsafe writable.map { unsafe VirtioPiece($0) } }
}

/// The other end of a ring, as a guest's driver plays it.
protocol VirtioDriver: AnyObject {
  init(_ guest: VirtioGuest, size: Int, features: VirtqueueFeatures, base: UInt32)
  var guest: VirtioGuest { get }
  var areas: VirtqueueAreas { get }
  var freePlaces: Int { get }
  /// Makes a chain available; the caller has seen that there are places.
  func offer(_ buffers: [VirtioBuffer], isIndirect: Bool) -> UInt16
  /// The next chain that the device gave back.
  func reap() -> (identifier: UInt16, writtenBytes: UInt32)?
  /// Wants a call when the device has used so many chains (split) or places (packed) more than were reaped; no calls
  /// with nil. Without event indices every call for any number.
  func wantCall(after count: Int?)
  /// Whether the device wants a kick for what was offered since this was asked.
  func mustKick() -> Bool
  /// How much of what `wantCall` counts a chain is.
  func weight(of identifier: UInt16) -> Int
}

/// Where the rings of both drivers lie.
private enum Place {
  static let descriptors = VirtioGuest.ringsAddress
  static let driver = VirtioGuest.ringsAddress + 0x8_0000
  static let device = VirtioGuest.ringsAddress + 0xa_0000
  /// Of the indirect table of a chain.
  static let tableBuffersMax = 16
  static func table(_ identifier: UInt16) -> UInt64 {
    VirtioGuest.tablesAddress + UInt64(identifier) * UInt64(16 * tableBuffersMax)
  }
}

final class SplitDriver: VirtioDriver {
  let guest: VirtioGuest
  let size: Int
  let features: VirtqueueFeatures
  private var free: [UInt16]
  private var chains: [UInt16: [UInt16]] = [:]
  private var available: UInt16
  private var reaped: UInt16
  private var kicked: UInt16

  init(_ guest: VirtioGuest, size: Int, features: VirtqueueFeatures, base: UInt32) {
    self.guest = guest
    self.size = size
    self.features = features
    free = (0..<UInt16(size)).reversed()
    available = UInt16(base)
    reaped = available
    kicked = available
    guest.store(available, at: Place.driver + 2)
    guest.store(available, at: Place.device + 2)
  }

  var areas: VirtqueueAreas {
    unsafe VirtqueueAreas(
      size: size, descriptor: guest.place(Place.descriptors), driver: guest.place(Place.driver),
      device: guest.place(Place.device))
  }
  var freePlaces: Int { free.count }

  private func write(_ buffer: VirtioBuffer, flags: UInt16, next: UInt16, at address: UInt64) {
    guest.store(buffer.address, at: address)
    guest.store(buffer.bytes, at: address + 8)
    guest.store(flags | (buffer.isWritable ? 2 : 0), at: address + 12)
    guest.store(next, at: address + 14)
  }

  func offer(_ buffers: [VirtioBuffer], isIndirect: Bool) -> UInt16 {
    let places = (0..<(isIndirect ? 1 : buffers.count)).map { _ in free.removeLast() }
    let head = places[0]
    if isIndirect {
      // The table's chain runs backwards through it but for the first, as a next index may.
      let order = [0] + (1..<UInt16(buffers.count)).reversed()
      for (number, buffer) in buffers.enumerated() {
        let isLast = number + 1 == buffers.count
        write(
          buffer, flags: isLast ? 0 : 1, next: isLast ? 0xffff : order[number + 1],
          at: Place.table(head) + 16 * UInt64(order[number]))
      }
      let table = VirtioBuffer(address: Place.table(head), bytes: UInt32(16 * buffers.count), isWritable: false)
      write(table, flags: 4, next: 0xffff, at: Place.descriptors + 16 * UInt64(head))
    } else {
      for (number, buffer) in buffers.enumerated() {
        let isLast = number + 1 == buffers.count
        write(
          buffer, flags: isLast ? 0 : 1, next: isLast ? 0xffff : places[number + 1],
          at: Place.descriptors + 16 * UInt64(places[number]))
      }
    }
    chains[head] = places
    guest.store(head, at: Place.driver + 4 + 2 * UInt64(Int(available) % size))
    available &+= 1
    guest.store(available, at: Place.driver + 2)
    return head
  }

  func reap() -> (identifier: UInt16, writtenBytes: UInt32)? {
    guard guest.load(UInt16.self, at: Place.device + 2) != reaped else { return nil }
    let place = Place.device + 4 + 8 * UInt64(Int(reaped) % size)
    let head = UInt16(guest.load(UInt32.self, at: place))
    let bytes = guest.load(UInt32.self, at: place + 4)
    reaped &+= 1
    free += chains.removeValue(forKey: head)!
    return (head, bytes)
  }

  func wantCall(after count: Int?) {
    if features.contains(.eventIndex) {
      // None means one that is far away.
      guest.store(reaped &+ UInt16((count ?? 40_000) - 1), at: Place.driver + 4 + 2 * UInt64(size))
    } else {
      guest.store(UInt16(count == nil ? 1 : 0), at: Place.driver)
    }
  }

  func mustKick() -> Bool {
    defer { kicked = available }
    if features.contains(.eventIndex) {
      let event = guest.load(UInt16.self, at: Place.device + 4 + 8 * UInt64(size))
      return available &- event &- 1 < available &- kicked
    }
    return available != kicked && guest.load(UInt16.self, at: Place.device) & 1 == 0
  }

  func weight(of identifier: UInt16) -> Int { 1 }
}

final class PackedDriver: VirtioDriver {
  let guest: VirtioGuest
  let size: Int
  let features: VirtqueueFeatures
  private(set) var freePlaces: Int
  private var identifiers: [UInt16]
  private var chains: [UInt16: Int] = [:]
  private var available: Int
  private var availableWrap: Bool
  private var used: Int
  private var usedWrap: Bool
  /// Places offered, and those before the last look for kicks.
  private var offered = 0
  private var kicked = 0

  init(_ guest: VirtioGuest, size: Int, features: VirtqueueFeatures, base: UInt32) {
    self.guest = guest
    self.size = size
    self.features = features
    freePlaces = size
    identifiers = (0..<UInt16(size)).reversed()
    available = Int(base & 0x7fff)
    availableWrap = base & 0x8000 != 0
    used = available
    usedWrap = availableWrap
    // As if all rounds before had been: every place was used in its round.
    for index in 0..<size {
      guest.store(flags(wrap: (index < used) == usedWrap, isUsed: true), at: place(index) + 14)
    }
  }

  var areas: VirtqueueAreas {
    unsafe VirtqueueAreas(
      size: size, descriptor: guest.place(Place.descriptors), driver: guest.place(Place.driver),
      device: guest.place(Place.device))
  }
  private func place(_ index: Int) -> UInt64 { Place.descriptors + 16 * UInt64(index) }
  private func flags(wrap: Bool, isUsed: Bool) -> UInt16 {
    (wrap ? 1 << 7 : 0) | (wrap == isUsed ? 1 << 15 : 0)
  }

  func offer(_ buffers: [VirtioBuffer], isIndirect: Bool) -> UInt16 {
    let identifier = identifiers.removeLast()
    var parts = buffers
    if isIndirect {
      for (number, buffer) in buffers.enumerated() {
        let entry = Place.table(identifier) + 16 * UInt64(number)
        guest.store(buffer.address, at: entry)
        guest.store(buffer.bytes, at: entry + 8)
        guest.store(UInt16(0xdead), at: entry + 12)
        // Linux leaves the next flag in, which means nothing here.
        guest.store(UInt16(buffer.isWritable ? 2 : 0) | 1, at: entry + 14)
      }
      parts = [VirtioBuffer(address: Place.table(identifier), bytes: UInt32(16 * buffers.count), isWritable: false)]
    }
    let head = place(available)
    var headFlags: UInt16 = 0
    for (number, part) in parts.enumerated() {
      let isLast = number + 1 == parts.count
      guest.store(part.address, at: place(available))
      guest.store(part.bytes, at: place(available) + 8)
      guest.store(isLast ? identifier : 0xbeef, at: place(available) + 12)
      let flags =
        flags(wrap: availableWrap, isUsed: false) | (isLast ? 0 : 1) | (part.isWritable ? 2 : 0) | (isIndirect ? 4 : 0)
      if number == 0 { headFlags = flags } else { guest.store(flags, at: place(available) + 14) }
      available += 1
      if available == size {
        available = 0
        availableWrap.toggle()
      }
    }
    guest.store(headFlags, at: head + 14)
    chains[identifier] = parts.count
    freePlaces -= parts.count
    offered += parts.count
    return identifier
  }

  func reap() -> (identifier: UInt16, writtenBytes: UInt32)? {
    let flags = guest.load(UInt16.self, at: place(used) + 14)
    guard flags & 0x8080 == (usedWrap ? 0x8080 : 0) else { return nil }
    let identifier = guest.load(UInt16.self, at: place(used) + 12)
    let bytes = guest.load(UInt32.self, at: place(used) + 8)
    precondition((flags & 2 != 0) == (bytes > 0), "the write flag says whether the length means anything")
    let count = chains.removeValue(forKey: identifier)!
    identifiers.append(identifier)
    freePlaces += count
    used += count
    if used >= size {
      used -= size
      usedWrap.toggle()
    }
    return (identifier, bytes)
  }

  func wantCall(after count: Int?) {
    guard features.contains(.eventIndex), let count else {
      guest.store(UInt16(count == nil ? 1 : 0), at: Place.driver + 2)
      return
    }
    let place = used + count - 1
    let wrap = place >= size ? !usedWrap : usedWrap
    guest.store(UInt16(place % size) | (wrap ? 1 << 15 : 0), at: Place.driver)
    guest.store(UInt16(2), at: Place.driver + 2)
  }

  func mustKick() -> Bool {
    defer { kicked = offered }
    guard offered != kicked else { return false }
    let flags = guest.load(UInt16.self, at: Place.device + 2)
    guard flags == 2 else { return flags == 0 }
    let event = guest.load(UInt16.self, at: Place.device)
    var distance = available - Int(event & 0x7fff)
    if (event & 0x8000 != 0) != availableWrap { distance += size }
    return distance > 0 && distance <= offered - kicked
  }

  func weight(of identifier: UInt16) -> Int { chains[identifier]! }
}
