import CLinux
import Glibc
import TestSupport
import Testing

@testable import Control

/// A guest with a network card in a memory file, and the frontend that shares it: all of a virtual machine that a
/// vhost-user port sees. One thread uses it.
@safe
final class SharedGuest {
  static let guestAddress: UInt64 = 0x10_0000
  private static let userOffset: UInt64 = 0x7000_0000_0000
  static let features: VhostUserFeatures = [.version1, .mergeableReceiveBuffers, .protocolFeatures]

  let mac: UInt64
  let size: Int
  let file: SharedFile
  let features: VhostUserFeatures
  /// One for each pair of queues, behind each other in the memory.
  private(set) var cards: [GuestCard] = []
  var card: GuestCard { cards[0] }
  private(set) var frontend: VhostUserFrontend?
  /// By queue.
  private(set) var kicks: [OwnedDescriptor] = []
  private var calls: [OwnedDescriptor] = []
  /// Where chains under way are noted, where they are.
  private var inflight: SharedFile?
  private let mapping: UnsafeMutableRawPointer

  /// - Parameters:
  ///   - size: places of each ring.
  ///   - piecesMax: that a frame lies in when it is sent.
  init(
    _ name: String, mac: UInt64, size: Int = 64, piecesMax: Int = 1, queuePairs: Int = 1,
    features: VhostUserFeatures = SharedGuest.features
  ) {
    self.mac = mac
    self.size = size
    self.features = features
    let bytes = queuePairs * GuestCard.memoryBytes(size: size)
    file = SharedFile(name, byteCount: bytes)
    let place = unsafe mmap(nil, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.descriptor.number, 0)!
    unsafe precondition(place != MAP_FAILED)
    unsafe mapping = place
    makeCards(queuePairs, piecesMax: piecesMax)
  }

  private func makeCards(_ count: Int, piecesMax: Int) {
    let bytes = GuestCard.memoryBytes(size: size)
    cards = (0..<count).map { number in
      let card = unsafe GuestCard(
        mapping + number * bytes, size: size, guestAddress: Self.guestAddress + UInt64(number * bytes))
      card.piecesMax = piecesMax
      return card
    }
  }

  deinit { unsafe munmap(mapping, file.byteCount) }

  // MARK: The frontend

  /// Says something and waits until it is done; the number in the answer.
  @discardableResult
  func ask(_ message: VhostUserMessage, _ descriptors: [OwnedDescriptor] = []) throws -> UInt64 {
    let frontend = try #require(frontend)
    frontend.send(message, needsReply: true, descriptors)
    var answer: UInt64?
    let isAnswered = eventually {
      answer = frontend.replyNumber()
      return answer != nil || frontend.isClosed
    }
    try #require(isAnswered)
    return try #require(answer, "the connection was closed at \(message.request.name)")
  }

  private static func event() -> OwnedDescriptor {
    OwnedDescriptor(eventfd(0, Int32(EFD_CLOEXEC) | Int32(EFD_NONBLOCK)))
  }

  /// Connects where somebody listens.
  func connect(to path: String, notes inflight: SharedFile? = nil) throws {
    let isConnected = eventually {
      frontend = VhostUserFrontend(path: path)
      return frontend != nil
    }
    try #require(isConnected)
    try introduce(notes: inflight)
  }

  /// Takes over a connection that the service made.
  func accept(_ frontend: VhostUserFrontend) throws {
    self.frontend = frontend
    try introduce(notes: nil)
  }

  private func introduce(notes inflight: SharedFile?) throws {
    try ask(.getFeatures)
    let offered = try ask(.getProtocolFeatures)
    let wanted: VhostUserProtocolFeatures = [
      .replyAcknowledge, .inflightInSharedMemory, .status, .resetDevice, .multiQueue,
    ]
    frontend!.send(.setProtocolFeatures(wanted.rawValue & offered))
    try ask(.setOwner)
    try ask(.setFeatures(features.rawValue))
    try shareMemory()
    self.inflight = inflight
    if let inflight {
      let answer = try ask(
        .setInflight(
          .init(
            area: .init(byteCount: UInt64(inflight.byteCount), fileOffset: 0), queues: UInt16(2 * cards.count),
            size: UInt16(size))),
        [inflight.received])
      try #require(answer == 0)
    }
    for queue in 0..<2 * cards.count { try start(queue) }
  }

  func shareMemory() throws {
    let region = file.region(guest: Self.guestAddress, user: Self.userOffset)
    try #require(try ask(.setMemoryTable([region]), [file.received]) == 0)
  }

  /// Of a queue, even ones those that the guest receives by.
  private func ring(_ queue: Int) -> GuestCard.Ring {
    let card = cards[queue / 2]
    return queue % 2 == 0 ? card.receive : card.send
  }

  func start(_ queue: Int, base: UInt32 = 0) throws {
    while kicks.count <= queue {
      kicks.append(Self.event())
      calls.append(Self.event())
    }
    let number = UInt32(queue)
    let start = Self.userOffset + cards[queue / 2].guestAddress
    let ring = ring(queue)
    try ask(.setQueueSize(.init(queue: number, number: UInt32(size))))
    try ask(.setQueueBase(.init(queue: number, number: base)))
    try ask(
      .setQueueAddresses(
        .init(
          queue: number, flags: 0, descriptors: start + UInt64(ring.descriptors), used: start + UInt64(ring.used),
          available: start + UInt64(ring.available), log: 0)))
    try ask(.setQueueCall(.init(queue: queue)), [OwnedDescriptor(dup(calls[queue].number))])
    try ask(.setQueueKick(.init(queue: queue)), [OwnedDescriptor(dup(kicks[queue].number))])
    try #require(try ask(.setQueueEnabled(.init(queue: number, number: 1))) == 0)
  }

  /// Fills the eventfds that it is called by, and has whoever calls wait for room.
  func fillCalls() throws {
    for call in calls {
      let isFull = eventually {
        var count: UInt64 = 0
        _ = unsafe read(call.number, &count, 8)
        count = .max - 1
        // A call may come between.
        return unsafe write(call.number, &count, 8) == 8
      }
      try #require(isFull && fcntl(call.number, F_SETFL, 0) == 0)
    }
  }

  /// Stops a queue; where it stands.
  func stop(_ queue: Int) throws -> UInt32 {
    frontend!.send(.getQueueBase(.init(queue: UInt32(queue))))
    var base: UInt32?
    let isAnswered = eventually {
      guard let payload = frontend!.reply()?.payload else { return frontend!.isClosed }
      var reader = ByteReader(payload)
      _ = reader.next32()
      base = reader.next32()
      return true
    }
    try #require(isAnswered)
    return try #require(base)
  }

  func disconnect() { frontend = nil }

  /// A driver that begins anew: all that was shared is as at first.
  func resetCard() {
    unsafe memset(mapping, 0, file.byteCount)
    makeCards(cards.count, piecesMax: card.piecesMax)
  }

  // MARK: The guest

  func kick(_ queue: Int) { kicks[queue].signal() }

  /// Offers buffers for all that may come.
  func offerBuffers(upTo most: Int? = nil) {
    for (pair, card) in cards.enumerated() {
      card.offerReceiveBuffers(upTo: most)
      kick(2 * pair)
    }
  }

  /// All frames that came, by pair of queues; their buffers are offered again at once.
  func takeReceivedByPair() -> [[[UInt8]]] {
    cards.enumerated().map { pair, card in
      let frames = card.takeReceived()
      if !frames.isEmpty, card.wantsKicks(card.receive) { kick(2 * pair) }
      return frames
    }
  }

  /// A frame to somebody, with a number in it.
  func frame(to destination: UInt64, _ number: UInt32, bytes: Int = 100) -> [UInt8] {
    func big(_ value: UInt64, _ count: Int) -> [UInt8] {
      (0..<count).map { UInt8(truncatingIfNeeded: value >> UInt64(8 * (count - 1 - $0))) }
    }
    let head = big(destination, 6) + big(mac, 6) + [0x88, 0xB5] + big(UInt64(number), 4)
    return head + (0..<bytes - head.count).map { UInt8(truncatingIfNeeded: $0 &+ Int(number)) }
  }

  /// Sends a frame and kicks where that is wanted; false where all places are taken.
  @discardableResult
  func send(_ frame: [UInt8], pair: Int = 0) -> Bool {
    let card = cards[pair]
    guard card.send(frame) != nil else { return false }
    if card.wantsKicks(card.send) { kick(2 * pair + 1) }
    return true
  }

  /// The numbers of the frames that came from somebody, all of them whole.
  /// - Parameter offersAgain: whether their buffers are offered again.
  func takeReceived(from sender: SharedGuest, offersAgain: Bool = true) -> [UInt32] {
    var frames: [[UInt8]] = []
    while let (_, frame) = card.received() { frames.append(frame) }
    if offersAgain { card.offerReceiveBuffers() }
    if offersAgain, !frames.isEmpty, card.wantsKicks(card.receive) { kick(0) }
    return frames.compactMap { frame in
      guard frame.count >= 18 else { return nil }
      let number = frame[14..<18].reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
      return frame == sender.frame(to: mac, number, bytes: frame.count) ? number : nil
    }
  }
}
