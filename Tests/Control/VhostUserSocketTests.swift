import CLinux
import Datapath
import Glibc
import TestSupport
import Testing

@testable import Control

/// A service with one vhost-user port: it does at once what the socket's effects say, unless told to be slow.
private final class Backend {
  let socket: VhostUserSocket
  private(set) var effects: [String] = []
  var now: UInt64 = 1
  /// Whether workers answer at once.
  var isPrompt = true
  private(set) var unanswered: [VhostUserEffect] = []

  init(_ role: VhostUserSocket.Role = .server, path: String) throws {
    socket = try VhostUserSocket(role, path: path, settings: .init(queuePairsMax: 2))
  }

  /// Goes on until there is nothing to do.
  func run() {
    while let watch = socket.watch {
      var watched = pollfd(fd: watch.descriptor, events: watch.events, revents: 0)
      guard unsafe poll(&watched, 1, 0) > 0 else { return }
      handle(socket.ready(nowNanoseconds: now))
    }
    if let retry = socket.retryAtNanoseconds, retry <= now { handle(socket.ready(nowNanoseconds: now)) }
  }

  func handle(_ new: [VhostUserEffect]) {
    effects += new.map(\.name)
    unanswered += new.filter { effect in
      if case .stopQueue = effect { return true }
      return effect.version != nil
    }
    if isPrompt { answer() }
  }

  /// The workers say that they did all that they were told.
  func answer() {
    while !unanswered.isEmpty {
      let effect = unanswered.removeFirst()
      if case .stopQueue(let queue) = effect {
        handle(socket.queueStopped(queue, base: .init(availableIndex: 7), nowNanoseconds: now))
      } else if let version = effect.version {
        handle(socket.adopted(version: version, nowNanoseconds: now))
      }
    }
  }

  /// What happened since the last call.
  func takeEffects() -> [String] {
    defer { effects = [] }
    return effects
  }
}

@Suite struct VhostUserSocketTests {
  private func path(_ name: String) -> String { temporaryFolder + "/vnetr-vu-\(name)-\(getpid())" }

  private func exists(_ path: String) -> Bool {
    var found = stat()
    return unsafe lstat(path, &found) == 0
  }

  /// As far as a queue that runs.
  private func start(_ frontend: VhostUserFrontend, _ file: SharedFile) {
    frontend.send(.setOwner)
    frontend.send(.setProtocolFeatures(VhostUserProtocolFeatures.served.rawValue))
    frontend.send(.setFeatures(VhostUserFeatures([.version1, .protocolFeatures]).rawValue))
    frontend.send(.setMemoryTable([file.region()]), [file.descriptor])
    frontend.send(.setQueueCall(.init(queue: 0)), [file.descriptor])
    frontend.send(.setQueueError(.init(queue: 0)), [file.descriptor])
    frontend.send(.setQueueSize(.init(queue: 0, number: 256)))
    frontend.send(.setQueueAddresses(VhostUserConversation.addresses(0)))
    frontend.send(.setQueueKick(.init(queue: 0)), [file.descriptor])
  }

  @Test func aFrontendConnectsStartsAQueueAndGoes() throws {
    let path = path("one")
    let file = SharedFile("vhost-user-one")
    let backend = try Backend(path: path)
    var frontend = VhostUserFrontend(path: path)
    frontend?.send(.getFeatures)
    backend.run()
    #expect(frontend?.replyNumber() == VhostUserFeatures.served.rawValue)
    start(try #require(frontend), file)
    backend.run()
    #expect(backend.takeEffects() == ["connected", "features", "memory 1", "start 0"])
    frontend?.send(.getQueueBase(.init(queue: 0)))
    backend.run()
    #expect(frontend?.reply()?.payload == [0, 0, 0, 0, 7, 0, 0, 0])
    #expect(backend.socket.isConnected)
    frontend = nil
    backend.run()
    #expect(backend.takeEffects() == ["stop 0", "disconnected"])
    #expect(!backend.socket.isConnected)
    #expect(SharedFile.openCount("vhost-user-one") == 1)
    #expect(SharedFile.mappedCount("vhost-user-one") == 0)
  }

  @Test func aThousandFrontendsLeaveNoDescriptorAndNoMapping() throws {
    let path = path("thousand")
    let name = "vhost-user-thousand"
    let file = SharedFile(name)
    let backend = try Backend(path: path)
    let before = SharedFile.socketCount(path)
    for round in 0..<1_000 {
      let frontend = try #require(VhostUserFrontend(path: path))
      start(frontend, file)
      // Some go in the middle of a message, with descriptors that nobody has read yet.
      if round % 3 == 0 {
        let bytes = VhostUserMessage.setQueueCall(.init(queue: 1)).bytes()
        frontend.send(Array(bytes.prefix(round % bytes.count + 1)), [file.descriptor])
      }
      if round % 5 != 0 { backend.run() }
    }
    backend.run()
    #expect(SharedFile.openCount(name) == 1)
    #expect(SharedFile.mappedCount(name) == 0)
    // A process that another test starts may have copies of some for a moment.
    for _ in 0..<1_000 where SharedFile.socketCount(path) != before { usleep(1_000) }
    #expect(SharedFile.socketCount(path) == before)
    let effects = backend.takeEffects()
    #expect(effects.count { $0 == "connected" } == 1_000)
    #expect(effects.count { $0 == "disconnected" } == 1_000)
    #expect(effects.count { $0 == "start 0" } == effects.count { $0 == "stop 0" })
  }

  @Test func messagesInPiecesOfOneByteAreReadAsWholeOnes() throws {
    let (frontend, end) = VhostUserFrontend.pair()
    let stream = VhostUserStream(end)
    let file = SharedFile("vhost-user-pieces")
    for message in VhostUserMessage.oneOfEach {
      let bytes = message.bytes(needsReply: true)
      let count = message.descriptorCounts.lowerBound
      for (number, byte) in bytes.enumerated() {
        if case .message = stream.next() { Issue.record("a message before all of it came") }
        frontend.send([byte], number == 0 ? (0..<count).map { _ in file.descriptor } : [])
      }
      guard case .message(let header, let payload, let descriptors) = stream.next() else {
        Issue.record("no message of \(message.request.name)")
        return
      }
      #expect(try VhostUserMessage(header, payload: payload) == message)
      #expect(descriptors.count == count)
    }
  }

  @Test(arguments: VhostUserMessage.oneOfEach)
  func aConnectionThatEndsWithinAMessageLeavesNothing(_ message: VhostUserMessage) throws {
    let name = "vhost-user-cut-\(message.request.name)"
    let file = SharedFile(name)
    let bytes = message.bytes()
    let count = message.descriptorCounts.lowerBound
    for length in 0..<bytes.count {
      let (frontend, end) = VhostUserFrontend.pair()
      let stream = VhostUserStream(end)
      if length > 0 { frontend.send(Array(bytes.prefix(length)), (0..<count).map { _ in file.descriptor }) }
      guard case .nothing = stream.next() else {
        Issue.record("\(length) bytes are a message")
        return
      }
      shutdown(frontend.socket.number, Int32(SHUT_WR))
      guard case .closed = stream.next() else {
        Issue.record("the end is not seen after \(length) bytes")
        return
      }
    }
    #expect(SharedFile.openCount(name) == 1)
  }

  @Test func everyMessageTwiceDoesNoHarm() throws {
    let path = path("twice")
    let file = SharedFile("vhost-user-twice")
    let backend = try Backend(path: path)
    let frontend = try #require(VhostUserFrontend(path: path))
    start(frontend, file)
    for message in VhostUserMessage.oneOfEach {
      for _ in 0..<2 {
        frontend.send(message, (0..<message.descriptorCounts.lowerBound).map { _ in file.descriptor })
      }
      backend.run()
      #expect(backend.socket.isConnected, "\(message.request.name)")
    }
    backend.handle(backend.socket.close())
    #expect(SharedFile.openCount("vhost-user-twice") == 1)
    #expect(SharedFile.mappedCount("vhost-user-twice") == 0)
  }

  @Test(arguments: [9, 253])
  func moreDescriptorsThanTheProtocolHasEndTheConnectionAndAreClosed(_ count: Int) throws {
    let path = path("many-\(count)")
    let name = "vhost-user-many-\(count)"
    let file = SharedFile(name)
    let backend = try Backend(path: path)
    let frontend = try #require(VhostUserFrontend(path: path))
    frontend.send(VhostUserMessage.setOwner.bytes(), (0..<count).map { _ in file.descriptor })
    backend.run()
    let effects = backend.takeEffects()
    #expect(effects.contains { $0.contains("with \(count) descriptors, more than 8") })
    #expect(effects.last == "disconnected" && frontend.isClosed)
    #expect(SharedFile.openCount(name) == 1)
  }

  @Test func descriptorsWithThePayloadCountTooAndDoNotPileUp() throws {
    let (frontend, end) = VhostUserFrontend.pair()
    let name = "vhost-user-pile"
    let file = SharedFile(name)
    let stream = VhostUserStream(end)
    let bytes = VhostUserMessage.setQueueKick(.init(queue: 0)).bytes()
    for byte in bytes.dropLast() {
      frontend.send([byte], [file.descriptor])
      if case .broken(let why) = stream.next() {
        #expect(why.contains("9 descriptors"))
        return
      }
    }
    Issue.record("descriptors piled up")
  }

  @Test func bytesThatAreNoMessageEndTheConnectionAndTheNextFrontendIsServed() throws {
    let path = path("garbage")
    let backend = try Backend(path: path)
    for bytes in [
      [UInt8](repeating: 0xFF, count: 64), [UInt8](repeating: 0, count: 12), Array("GET / HTTP/1.1\r\n".utf8),
    ] {
      let frontend = try #require(VhostUserFrontend(path: path))
      frontend.send(bytes)
      backend.run()
      let effects = backend.takeEffects()
      #expect(effects.count == 3 && effects[1].hasPrefix("broken ") && effects[2] == "disconnected")
      #expect(frontend.isClosed)
    }
    let frontend = try #require(VhostUserFrontend(path: path))
    frontend.send(.getQueuePairsMax)
    backend.run()
    #expect(frontend.replyNumber() == 2)
  }

  /// Messages that make sense, with bytes changed, cut anywhere, and with descriptors where nobody expects them.
  @Test(arguments: [UInt64](1...4))
  func noBytesBreakASocketOrLeaveSomethingOpen(_ seed: UInt64) throws {
    var random = SeededRandom(seed: seed)
    let path = path("bytes-\(seed)")
    let name = "vhost-user-bytes-\(seed)"
    let file = SharedFile(name)
    let backend = try Backend(path: path)
    for _ in 0..<100 {
      let frontend = try #require(VhostUserFrontend(path: path))
      if Bool.random(using: &random) { start(frontend, file) }
      for _ in 0..<Int.random(in: 1...30, using: &random) {
        let message = VhostUserMessage.oneOfEach.randomElement(using: &random)!
        var bytes = message.bytes(needsReply: .random(using: &random))
        var count = message.descriptorCounts.lowerBound
        switch Int.random(in: 0..<12, using: &random) {
        case 0: bytes[Int.random(in: 0..<12, using: &random)] = .random(in: 0...255, using: &random)
        case 1...3: bytes[bytes.count - 1 - Int.random(in: 0..<bytes.count, using: &random)] ^= 1 << 4
        case 4: bytes = Array(bytes.prefix(Int.random(in: 1...bytes.count, using: &random)))
        case 5: count = Int.random(in: 0...10, using: &random)
        default: break
        }
        let half = Int.random(in: 1...bytes.count, using: &random)
        let descriptors = (0..<count).map { _ in file.descriptor }
        guard frontend.send(Array(bytes[..<half]), descriptors) == half else { break }
        if Bool.random(using: &random) { backend.run() }
        if half < bytes.count { guard frontend.send(Array(bytes[half...])) > 0 else { break } }
        backend.run()
        while !frontend.isClosed, frontend.reply() != nil {}
      }
    }
    backend.run()
    let effects = backend.takeEffects()
    #expect(effects.count { $0 == "connected" } == effects.count { $0 == "disconnected" })
    #expect(effects.contains { $0.hasPrefix("broken") } && effects.contains { $0.hasPrefix("refused") })
    #expect(SharedFile.openCount(name) == 1)
    #expect(SharedFile.mappedCount(name) == 0)
    let next = try #require(VhostUserFrontend(path: path))
    next.send(.getQueuePairsMax)
    backend.run()
    #expect(next.replyNumber() == 2)
  }

  @Test func messagesWaitWhileAWorkerIsSlowAndTheEndIsSeenAllTheSame() throws {
    let path = path("slow")
    let file = SharedFile("vhost-user-slow")
    let backend = try Backend(path: path)
    var frontend = VhostUserFrontend(path: path)
    start(try #require(frontend), file)
    backend.run()
    backend.isPrompt = false
    frontend?.send(.getQueueBase(.init(queue: 0)))
    frontend?.send(.getQueuePairsMax)
    backend.run()
    #expect(frontend?.reply() == nil)
    backend.answer()
    #expect(frontend?.reply()?.request == 11)
    #expect(frontend?.reply()?.request == 17)
    frontend?.send(.setQueueKick(.init(queue: 0)), [file.descriptor])
    frontend?.send(.getQueueBase(.init(queue: 0)))
    frontend?.send(.getQueuePairsMax)
    backend.run()
    _ = backend.takeEffects()
    frontend = nil
    backend.run()
    #expect(!backend.socket.isConnected)
    #expect(backend.socket.watch == nil, "no other frontend before the worker has left the queue")
    #expect(backend.takeEffects() == [])
    backend.answer()
    #expect(backend.takeEffects() == ["disconnected"])
    #expect(backend.socket.watch != nil)
    #expect(SharedFile.mappedCount("vhost-user-slow") == 0)
  }

  @Test func repliesThatFindNoRoomAreSentLaterAndNothingIsReadMeanwhile() throws {
    let path = path("room")
    let backend = try Backend(path: path)
    let frontend = try #require(VhostUserFrontend(path: path))
    backend.run()
    let flags = fcntl(frontend.socket.number, F_GETFL)
    _ = fcntl(frontend.socket.number, F_SETFL, flags | O_NONBLOCK)
    let bytes = VhostUserMessage.getFeatures.bytes()
    var sent = 0
    var isFull = false
    for _ in 0..<100_000 where !isFull {
      let count = frontend.send(bytes)
      if count == bytes.count { sent += 1 } else { isFull = true }
      if sent % 64 == 0 { backend.run() }
    }
    #expect(isFull, "a backend that reads on and on would grow without end")
    var received = 0
    while received < sent {
      guard frontend.reply() != nil else {
        backend.run()
        guard frontend.reply() != nil else { break }
        received += 1
        continue
      }
      received += 1
    }
    #expect(received == sent)
  }

  // MARK: Paths

  @Test func theSocketHasItsModeIsRemovedAtTheEndAndNotShared() throws {
    let path = path("mode")
    do {
      let backend = try Backend(path: path)
      var found = stat()
      #expect(unsafe lstat(path, &found) == 0)
      #expect(found.st_mode & 0o777 == 0o660)
      let error = #expect(throws: PortError.self) { try Backend(path: path) }
      #expect(
        error?.description
          == "cannot listen on the vhost-user socket \(path): another process listens there; "
          + "stop it or choose another path"
      )
      // The question did no harm.
      backend.run()
      #expect(backend.takeEffects() == ["connected", "disconnected"])
    }
    #expect(!exists(path))
  }

  @Test func aSocketThatADeadProcessLeftIsReplaced() throws {
    let path = path("stale")
    _ = VhostUserFrontend.listen(path)
    #expect(exists(path))
    let backend = try Backend(path: path)
    let frontend = try #require(VhostUserFrontend(path: path))
    frontend.send(.getQueuePairsMax)
    backend.run()
    #expect(frontend.replyNumber() == 2)
  }

  @Test func whatIsNoSocketIsLeftAlone() throws {
    let path = path("file")
    unsafe close(open(path, O_CREAT | O_WRONLY, 0o600))
    defer { unsafe unlink(path) }
    let error = #expect(throws: PortError.self) { try Backend(path: path) }
    #expect(
      error?.description.hasSuffix("there is something that is no socket; remove it or choose another path") == true)
    #expect(exists(path))
  }

  @Test(arguments: ["relative", "/nonexistent/vnetr.sock", "/" + String(repeating: "x", count: 200)])
  func aPathThatCannotBeUsedIsAnErrorThatSaysWhatToDo(_ path: String) {
    let error = #expect(throws: PortError.self) { try Backend(path: path) }
    #expect(error?.description.contains(path) == true)
    #expect(error?.remedy.isEmpty == false)
  }

  @Test func aClientConnectsAgainAndAgainWithGrowingPauses() throws {
    let path = path("client")
    let backend = try Backend(.client, path: path)
    var pauses: [UInt64] = []
    for _ in 0..<8 {
      backend.run()
      let retry = try #require(backend.socket.retryAtNanoseconds)
      pauses.append((retry - backend.now) / 1_000_000)
      backend.now = retry
    }
    #expect(pauses == [100, 200, 400, 800, 1600, 3200, 5000, 5000])
    #expect(backend.socket.problem?.contains("start the process that listens there") == true)

    let listener = VhostUserFrontend.listen(path)
    defer { unsafe unlink(path) }
    backend.run()
    for _ in 0..<3 {
      let frontend = VhostUserFrontend.accept(listener)
      frontend.send(.getQueuePairsMax)
      backend.run()
      #expect(frontend.replyNumber() == 2)
      #expect(backend.socket.problem == nil && backend.socket.retryAtNanoseconds == nil)
      shutdown(frontend.socket.number, Int32(SHUT_RDWR))
      backend.run()
      #expect(backend.socket.retryAtNanoseconds == backend.now + 100_000_000, "a frontend that talked is soon back")
      backend.now += 100_000_000
      backend.run()
    }
  }

  @Test func inflightMemoryGoesOutWithItsReply() throws {
    let path = path("inflight")
    let backend = try Backend(path: path)
    let frontend = try #require(VhostUserFrontend(path: path))
    frontend.send(.setProtocolFeatures(VhostUserProtocolFeatures.served.rawValue))
    frontend.send(.getInflight(.init(area: .init(byteCount: 0, fileOffset: 0), queues: 4, size: 256)))
    backend.run()
    // A stream of the frontend's own would take it for a request: so it looks at the bytes.
    var bytes = [UInt8](repeating: 0, count: 64)
    var control = [UInt8](repeating: 0, count: 64)
    var controlBytes = 0
    let number = frontend.socket.number
    let count = unsafe bytes.withUnsafeMutableBytes { bytes in
      unsafe control.withUnsafeMutableBytes { control in
        var vector = unsafe iovec(iov_base: bytes.baseAddress, iov_len: bytes.count)
        return unsafe withUnsafeMutablePointer(to: &vector) { vector in
          var message = unsafe msghdr()
          unsafe message.msg_iov = vector
          unsafe message.msg_iovlen = 1
          unsafe message.msg_control = control.baseAddress
          unsafe message.msg_controllen = control.count
          let count = unsafe recvmsg(number, &message, 0)
          unsafe controlBytes = Int(message.msg_controllen)
          return count
        }
      }
    }
    #expect(count == 36 && bytes[0] == 31 && controlBytes == 24)
    let received = OwnedDescriptor(
      control[16..<20].reversed().reduce(Int32(0)) { $0 << 8 | Int32($1) })
    var found = stat()
    #expect(unsafe fstat(received.number, &found) == 0)
    #expect(found.st_size == 4 * (16 + 256 * 16 + 48))
    #expect(ftruncate(received.number, 0) != 0, "the memory that both write cannot be cut")
  }
}
