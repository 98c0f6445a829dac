import Glibc
import Synchronization

/// A guest's network card with one pair of split rings, as a simple driver plays it: it lays rings and buffers out in
/// one stretch of memory, sends frames, and takes those that come. One thread uses it.
@safe
public final class GuestCard {
  /// Bytes before each frame: `virtio_net_hdr_v1`.
  public static let headerBytes = 12
  public static let bufferBytes = 2_048
  /// Places of each ring.
  public let size: Int
  /// Where the memory begins for the guest.
  public let guestAddress: UInt64
  /// The memory as the guest has it.
  public let memory: UnsafeMutableRawPointer

  public private(set) var send: Ring
  public private(set) var receive: Ring
  /// Pieces that a frame lies in when it is sent.
  public var piecesMax = 1

  /// One of the two rings, by offsets from the start of the memory.
  public struct Ring {
    public let descriptors: Int
    public let available: Int
    public let used: Int
    let buffers: Int
    var nextAvailable: UInt16 = 0
    var nextUsed: UInt16 = 0
    /// Chains that the device has.
    public internal(set) var out = 0
    var free: [Int] = []
  }

  /// Bytes of memory that a card with rings of such a size takes.
  public static func memoryBytes(size: Int) -> Int { 2 * (ringBytes(size: size) + size * bufferBytes) }
  /// Room for the three parts, each on a page of its own.
  private static func ringBytes(size: Int) -> Int { page(16 * size) + page(6 + 2 * size) + page(6 + 8 * size) }
  private static func page(_ bytes: Int) -> Int { (bytes + 4_095) & ~4_095 }

  /// - Parameter memory: `memoryBytes` that stay mapped; all zero, or as another card of the same size left them.
  @unsafe
  public init(_ memory: UnsafeMutableRawPointer, size: Int, guestAddress: UInt64) {
    unsafe self.memory = unsafe memory
    self.size = size
    self.guestAddress = guestAddress
    func ring(at start: Int, buffers: Int) -> Ring {
      let available = start + Self.page(16 * size)
      return Ring(
        descriptors: start, available: available, used: available + Self.page(6 + 2 * size), buffers: buffers)
    }
    let rings = Self.ringBytes(size: size)
    send = ring(at: 0, buffers: 2 * rings)
    receive = ring(at: rings, buffers: 2 * rings + size * Self.bufferBytes)
    send.free = Array((0..<size).reversed())
  }

  public func pointer(_ offset: Int) -> UnsafeMutableRawPointer { unsafe memory + offset }

  private func word16(_ offset: Int) -> UInt16 {
    unsafe (memory + offset).assumingMemoryBound(to: Atomic<UInt16>.self).pointee.load(ordering: .acquiring)
  }
  private func set16(_ value: UInt16, _ offset: Int) {
    unsafe (memory + offset).assumingMemoryBound(to: Atomic<UInt16>.self).pointee
      .store(value, ordering: .sequentiallyConsistent)
  }
  private func setDescriptor(_ ring: Ring, _ number: Int, _ offset: Int, bytes: Int, flags: UInt16, next: Int) {
    let place = ring.descriptors + 16 * number
    unsafe memory.storeBytes(of: guestAddress + UInt64(offset), toByteOffset: place, as: UInt64.self)
    unsafe memory.storeBytes(of: UInt32(bytes), toByteOffset: place + 8, as: UInt32.self)
    unsafe memory.storeBytes(of: flags, toByteOffset: place + 12, as: UInt16.self)
    unsafe memory.storeBytes(of: UInt16(next), toByteOffset: place + 14, as: UInt16.self)
  }
  private func offer(_ head: Int, _ ring: inout Ring) {
    set16(UInt16(head), ring.available + 4 + 2 * (Int(ring.nextAvailable) % size))
    ring.nextAvailable &+= 1
    ring.out += 1
    set16(ring.nextAvailable, ring.available + 2)
  }
  private func reap(_ ring: inout Ring) -> (head: Int, bytes: Int)? {
    guard word16(ring.used + 2) != ring.nextUsed else { return nil }
    let place = ring.used + 4 + 8 * (Int(ring.nextUsed) % size)
    ring.nextUsed &+= 1
    ring.out -= 1
    return unsafe (
      Int(memory.load(fromByteOffset: place, as: UInt32.self)),
      Int(memory.load(fromByteOffset: place + 4, as: UInt32.self))
    )
  }

  // MARK: Sending

  /// The offset of the buffer that a chain's frame lies in, header first.
  private func sendBuffer(_ head: Int) -> Int { send.buffers + head * Self.bufferBytes }

  /// Makes a frame available; nil when the device has all places, else the offset of its header.
  @discardableResult
  public func send(_ frame: [UInt8], header: [UInt8] = [UInt8](repeating: 0, count: headerBytes)) -> Int? {
    reapSent()
    let bytes = header + frame
    precondition(bytes.count <= Self.bufferBytes, "the frame is longer than a buffer")
    let pieces = min(piecesMax, bytes.count)
    guard send.free.count >= pieces else { return nil }
    let places = (0..<pieces).map { _ in send.free.removeLast() }
    let start = sendBuffer(places[0])
    unsafe (memory + start).copyMemory(from: bytes, byteCount: bytes.count)
    var offset = 0
    for (number, place) in places.enumerated() {
      let isLast = number + 1 == pieces
      let count = isLast ? bytes.count - offset : bytes.count / pieces
      setDescriptor(
        send, place, start + offset, bytes: count, flags: isLast ? 0 : 1, next: isLast ? 0 : places[number + 1])
      offset += count
    }
    offer(places[0], &send)
    return start
  }

  /// Takes back what was sent; returns how many frames.
  @discardableResult
  public func reapSent() -> Int {
    var count = 0
    while let (head, _) = reap(&send) {
      count += 1
      var place = head
      while true {
        send.free.append(place)
        let flags = unsafe memory.load(fromByteOffset: send.descriptors + 16 * place + 12, as: UInt16.self)
        guard flags & 1 != 0 else { break }
        place = Int(unsafe memory.load(fromByteOffset: send.descriptors + 16 * place + 14, as: UInt16.self))
      }
    }
    return count
  }

  // MARK: Receiving

  /// Makes the buffers available that the device does not have, up to so many in all.
  public func offerReceiveBuffers(upTo most: Int? = nil) {
    if receive.free.isEmpty && receive.nextAvailable == 0 { receive.free = Array((0..<size).reversed()) }
    while receive.out < most ?? size, let place = receive.free.popLast() {
      setDescriptor(
        receive, place, receive.buffers + place * Self.bufferBytes, bytes: Self.bufferBytes, flags: 2, next: 0)
      offer(place, &receive)
    }
  }

  /// The next frame that came, with its header; its buffer is offered again by ``offerReceiveBuffers(upTo:)``.
  public func received() -> (header: [UInt8], frame: [UInt8])? {
    guard let (place, bytes) = reap(&receive) else { return nil }
    receive.free.append(place)
    let start = receive.buffers + place * Self.bufferBytes
    let all = unsafe Array(UnsafeRawBufferPointer(start: memory + start, count: bytes))
    return (Array(all.prefix(Self.headerBytes)), Array(all.dropFirst(Self.headerBytes)))
  }

  /// All frames that came; their buffers are offered again at once.
  public func takeReceived() -> [[UInt8]] {
    var frames: [[UInt8]] = []
    while let (_, frame) = received() { frames.append(frame) }
    if !frames.isEmpty { offerReceiveBuffers() }
    return frames
  }

  /// Whether the device asks for kicks of a ring.
  public func wantsKicks(_ ring: Ring) -> Bool { word16(ring.used) & 1 == 0 }
}
