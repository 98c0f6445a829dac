import CLinux
import Datapath
import Glibc
import TestSupport
import Testing

@testable import Control

@Suite struct VhostUserSessionTests {
  // MARK: Frontends as they are

  /// hw/virtio/vhost-user.c and hw/virtio/vhost.c of QEMU 7.2: for each pair of queues a device of its own, over one
  /// connection.
  @Test func qemuStartsMigratesAndStopsTwoPairsOfQueues() throws {
    let file = SharedFile("vhost-user-qemu")
    let log = SharedFile("vhost-user-qemu-log", byteCount: 4_096)
    var frontend = VhostUserConversation()
    for pair in 0..<2 {
      frontend.send(.getFeatures)
      #expect(frontend.lastNumber == VhostUserFeatures.served.rawValue)
      frontend.send(.getProtocolFeatures)
      #expect(frontend.lastNumber == VhostUserProtocolFeatures.served.rawValue)
      frontend.send(.setProtocolFeatures(VhostUserProtocolFeatures.served.rawValue))
      frontend.send(.getQueuePairsMax)
      #expect(frontend.lastNumber == 2)
      frontend.send(.getMemorySlotsMax)
      #expect(frontend.lastNumber == 32)
      if pair == 0 { frontend.send(.setOwner) }
      for queue in pair * 2..<pair * 2 + 2 {
        frontend.send(.setQueueCall(.init(queue: queue)), [file.received])
        frontend.send(.setQueueError(.init(queue: queue)), [file.received])
      }
    }
    #expect(frontend.effects.isEmpty)

    let features = VhostUserFeatures.served.subtracting([.logAll, .packedRing])
    for pair in 0..<2 {
      let queues = pair * 2..<pair * 2 + 2
      frontend.send(.setFeatures(features.rawValue))
      frontend.send(.getStatus)
      frontend.send(.setStatus(8))
      if pair == 0 {
        frontend.send(.addMemoryRegion(file.region(bytes: 0xa0000)), needsReply: true, [file.received])
        #expect(frontend.lastNumber == 0)
        frontend.send(
          .addMemoryRegion(file.region(guest: 0xc0000, offset: 0xc0000, bytes: 0x40000)), needsReply: true,
          [file.received])
      }
      for queue in queues {
        frontend.prepare(queue)
        frontend.send(.setQueueKick(.init(queue: queue)), [file.received])
        frontend.send(.setQueueCall(.init(queue: queue)), [file.received])
      }
      for queue in queues { frontend.send(.setQueueEnabled(.init(queue: UInt32(queue), number: 1))) }
    }
    frontend.send(.setStatus(15))
    #expect(
      frontend.effects == [
        "features", "memory 1", "memory 2", "start 0", "call 0", "start 1", "call 1", "enable 0", "enable 1",
        "start 2", "call 2", "start 3", "call 3", "enable 2", "enable 3",
      ])
    let start = try #require(frontend.starts.last)
    #expect(start.rings == VhostUserRings(descriptors: 0x18000, available: 0x1a000, used: 0x1c000))
    #expect(start.size == 256 && start.kind == .split && start.features == features && !start.isEnabled)
    #expect(start.kick != nil && start.call != nil && start.error != nil && start.inflight == nil)

    // A migration: log memory, all writes logged, used rings too; then back.
    frontend.effects = []
    frontend.send(.setLogBase(.init(byteCount: 4_096, fileOffset: 0)), [log.received])
    #expect(frontend.replies.last?.request == 6)
    for isLogged in [true, false] {
      for pair in 0..<2 {
        let all = isLogged ? features.union(.logAll) : features
        frontend.send(.setFeatures(all.rawValue), needsReply: true)
        #expect(frontend.lastNumber == 0)
        for queue in pair * 2..<pair * 2 + 2 {
          let addresses = VhostUserConversation.addresses(queue, flags: isLogged ? 1 : 0)
          frontend.send(.setQueueAddresses(addresses), needsReply: true)
          #expect(frontend.lastNumber == 0)
        }
      }
    }
    #expect(
      frontend.effects == [
        "log", "features", "used log 0 16384", "used log 1 49152", "used log 2 81920", "used log 3 114688",
        "features", "used log 0 off", "used log 1 off", "used log 2 off", "used log 3 off",
      ])

    frontend.effects = []
    for queue in 0..<UInt32(4) {
      frontend.send(.setQueueEnabled(.init(queue: queue, number: 0)))
      frontend.send(.getQueueBase(.init(queue: queue)))
      #expect(frontend.replies.last?.payload == queue.littleEndianBytes + UInt32(7).littleEndianBytes)
    }
    frontend.send(.setStatus(0))
    frontend.send(.sendRARP(0x0a00_0000_0002))
    frontend.send(.setMTU(9_000), needsReply: true)
    #expect(frontend.lastNumber == 0)
    #expect(
      frontend.effects == [
        "disable 0", "stop 0", "disable 1", "stop 1", "disable 2", "stop 2", "disable 3", "stop 3", "reset",
        "rarp 02:00:00:00:00:0a", "mtu 9000",
      ])
    #expect(frontend.backend.memory.regions.count == 2, "QEMU only says what changes")
  }

  /// drivers/net/virtio/virtio_user of DPDK 22.11.
  @Test(arguments: [VhostUserQueueKind.split, .packed])
  func virtioUserStartsOnePairOfQueues(_ kind: VhostUserQueueKind) throws {
    let file = SharedFile("vhost-user-dpdk")
    var frontend = VhostUserConversation()
    frontend.base = VhostUserQueueBase(availableIndex: 3, availableWrap: false, usedIndex: 3, usedWrap: false)
    frontend.send(.setOwner)
    frontend.send(.getFeatures)
    frontend.send(.getProtocolFeatures)
    frontend.send(
      .setProtocolFeatures(VhostUserProtocolFeatures([.multiQueue, .replyAcknowledge, .status]).rawValue))
    frontend.send(.getQueuePairsMax)
    for status in [0, 1, 3] as [UInt64] {
      frontend.send(.setStatus(status), needsReply: true)
      #expect(frontend.lastNumber == 0)
    }
    for queue in 0..<2 { frontend.send(.setQueueCall(.init(queue: queue)), [file.received]) }
    var features: VhostUserFeatures = [.version1, .mergeableReceiveBuffers, .protocolFeatures, .indirectDescriptors]
    if kind == .packed { features.insert(.packedRing) }
    frontend.send(.setFeatures(features.rawValue))
    frontend.send(.setStatus(11), needsReply: true)
    frontend.send(.getStatus)
    #expect(frontend.lastNumber == 11)
    // Guest addresses are the process's own.
    let own: UInt64 = 0x7f00_0000_0000
    frontend.send(.setMemoryTable([file.region(guest: own, user: 0)]), needsReply: true, [file.received])
    #expect(frontend.lastNumber == 0)
    for queue in 0..<2 {
      frontend.prepare(queue, base: kind == .packed ? 1 << 15 : 0)
      frontend.send(.setQueueKick(.init(queue: queue)), [file.received])
    }
    for queue in 0..<UInt32(2) { frontend.send(.setQueueEnabled(.init(queue: queue, number: 1))) }
    frontend.send(.setStatus(15), needsReply: true)
    #expect(
      frontend.effects == ["reset", "features", "memory 1", "start 0", "start 1", "enable 0", "enable 1"])
    let start = try #require(frontend.starts.first)
    #expect(start.kind == kind)
    #expect(start.rings.descriptors == own)
    #expect(start.base.availableIndex == 0 && start.base.availableWrap && start.base.usedWrap)

    for queue in 0..<UInt32(2) {
      frontend.send(.getQueueBase(.init(queue: queue)))
      let base: UInt32 = kind == .packed ? 0x0003_0003 : 3
      #expect(frontend.replies.last?.payload == queue.littleEndianBytes + base.littleEndianBytes)
    }
    #expect(!frontend.effects.contains { $0.hasPrefix("refused") })
  }

  @Test func withoutProtocolFeaturesAQueueStartsEnabledAndNothingIsAcknowledged() throws {
    let file = SharedFile("vhost-user-plain")
    var frontend = VhostUserConversation()
    frontend.send(.setFeatures(VhostUserFeatures.version1.rawValue), needsReply: true)
    frontend.lend(file)
    frontend.start(0, file)
    #expect(frontend.replies.isEmpty)
    #expect(try #require(frontend.starts.first).isEnabled)
  }

  @Test func aQueueWithoutDescriptorsIsPolledByBothSides() throws {
    let file = SharedFile("vhost-user-polled")
    var frontend = VhostUserConversation()
    frontend.agree()
    frontend.lend(file)
    frontend.prepare(1)
    frontend.send(.setQueueCall(.init(queue: 1, hasDescriptor: false)))
    #expect(frontend.send(.setQueueKick(.init(queue: 1, hasDescriptor: false))) == ["start 1"])
    let start = try #require(frontend.starts.first)
    #expect(start.kick == nil && start.call == nil)
  }

  /// virtio-devices/src/vhost_user of cloud-hypervisor: every message is to be answered, and in-flight memory is kept.
  @Test func cloudHypervisorStartsPausesAndStopsOnePairOfQueues() throws {
    let file = SharedFile("vhost-user-cloud-hypervisor")
    var frontend = VhostUserConversation(.init(queuePairsMax: 1))
    frontend.send(.setOwner)
    frontend.send(.getFeatures)
    let offered = VhostUserFeatures(rawValue: try #require(frontend.lastNumber))
    frontend.send(.getProtocolFeatures)
    let extensions = VhostUserProtocolFeatures(rawValue: try #require(frontend.lastNumber))
    // It then takes two queues for granted, and would take the answer 1 of GET_QUEUE_NUM for too few.
    #expect(!extensions.contains(.multiQueue) && !offered.contains(.multiQueue))
    let wanted: VhostUserProtocolFeatures = [
      .multiQueue, .configureMemorySlots, .replyAcknowledge, .inflightInSharedMemory, .logInSharedMemory,
    ]
    frontend.send(.setProtocolFeatures(wanted.intersection(extensions).rawValue))
    frontend.replies = []
    let features: VhostUserFeatures = [.version1, .eventIndex, .mergeableReceiveBuffers, .checksum, .protocolFeatures]
    frontend.send(.setFeatures(features.rawValue), needsReply: true)
    frontend.send(.setMemoryTable([file.region()]), needsReply: true, [file.received])
    for queue in 0..<UInt32(2) { frontend.send(.setQueueSize(.init(queue: queue, number: 256)), needsReply: true) }
    #expect(frontend.replies.map(\.payload) == [[UInt8]](repeating: [0, 0, 0, 0, 0, 0, 0, 0], count: 4))
    frontend.send(
      .getInflight(
        .init(area: .init(byteCount: 0, fileOffset: 0), queues: 2, size: 256, payloadBytes: 20)), needsReply: true)
    let reply = try #require(frontend.replies.last)
    #expect(reply.payload.count == 20)
    let made = try VhostUserMessage(.init(request: 31, payloadBytes: 20), payload: reply.payload)
    guard case .getInflight(let inflight) = made else { return }
    frontend.send(
      .setInflight(inflight), needsReply: true, [OwnedDescriptor(dup(try #require(reply.descriptor).number))])
    #expect(frontend.lastNumber == 0)
    for queue in 0..<2 {
      frontend.send(.setQueueAddresses(VhostUserConversation.addresses(queue)), needsReply: true)
      frontend.send(.setQueueBase(.init(queue: UInt32(queue))), needsReply: true)
      frontend.send(.setQueueCall(.init(queue: queue)), needsReply: true, [file.received])
      frontend.send(.setQueueKick(.init(queue: queue)), needsReply: true, [file.received])
      #expect(frontend.lastNumber == 0)
    }
    for isEnabled in [1, 0, 1, 0] as [UInt32] {
      for queue in 0..<UInt32(2) {
        frontend.send(.setQueueEnabled(.init(queue: queue, number: isEnabled)), needsReply: true)
        #expect(frontend.lastNumber == 0)
      }
    }
    for queue in 0..<UInt32(2) {
      frontend.send(.getQueueBase(.init(queue: queue)), needsReply: true)
      #expect(frontend.replies.last?.payload == queue.littleEndianBytes + UInt32(7).littleEndianBytes)
    }
    #expect(
      frontend.effects == [
        "features", "memory 1", "start 0", "start 1", "enable 0", "enable 1", "disable 0", "disable 1", "enable 0",
        "enable 1", "disable 0", "disable 1", "stop 0", "stop 1",
      ])
    #expect(frontend.starts.count { $0.inflight != nil && !$0.isEnabled } == 2)
  }

  @Test func aQueueThatWasEnabledFirstStartsEnabled() throws {
    let file = SharedFile("vhost-user-enabled")
    var frontend = VhostUserConversation()
    frontend.agree()
    frontend.lend(file)
    #expect(frontend.send(.setQueueEnabled(.init(queue: 0, number: 1))) == [])
    #expect(frontend.send(.setQueueEnabled(.init(queue: 1, number: 0))) == [])
    for queue in 0..<3 { frontend.start(queue, file) }
    #expect(frontend.starts.map(\.isEnabled) == [true, false, false])
  }

  @Test func theBaseOfAQueueThatDoesNotRunIsToldAtOnce() {
    var frontend = VhostUserConversation()
    frontend.send(.setQueueBase(.init(queue: 1, number: 12)))
    #expect(frontend.send(.getQueueBase(.init(queue: 1))) == [])
    #expect(frontend.replies.last?.payload == [1, 0, 0, 0, 12, 0, 0, 0])
  }

  @Test func ownersComeAndGoWithoutTouchingAQueue() {
    let file = SharedFile("vhost-user-owner")
    var frontend = VhostUserConversation()
    frontend.agree()
    frontend.lend(file)
    frontend.start(0, file)
    for message in [VhostUserMessage.setOwner, .resetOwner, .setOwner, .resetOwner] {
      #expect(frontend.send(message, needsReply: true) == [])
      #expect(frontend.lastNumber == 0)
    }
    #expect(frontend.backend.queuesInUse == [0])
  }

  @Test func theDescriptorOfTheLogIsTakenAndClosed() {
    let event = SharedFile("vhost-user-log-event")
    var frontend = VhostUserConversation()
    frontend.agree()
    #expect(frontend.send(.setLogDescriptor, needsReply: true, [event.received]) == [])
    #expect(frontend.lastNumber == 0)
    #expect(SharedFile.openCount("vhost-user-log-event") == 1)
  }

  @Test(arguments: VhostUserMessage.oneOfEach)
  func whoAsksForAnAnswerIsGivenExactlyOne(_ message: VhostUserMessage) {
    let file = SharedFile("vhost-user-answer")
    for isRunning in [false, true] {
      var frontend = VhostUserConversation()
      frontend.agree()
      frontend.lend(file)
      if isRunning { for queue in 0..<4 { frontend.start(queue, file) } }
      for _ in 0..<2 {
        frontend.replies = []
        frontend.send(
          message, needsReply: true, (0..<message.descriptorCounts.lowerBound).map { _ in file.received })
        #expect(frontend.replies.map(\.request) == [message.request.rawValue])
        #expect(!frontend.backend.isWaiting)
      }
    }
  }

  // MARK: What is refused

  @Test func whatWasNotOfferedCannotBeSet() {
    var settings = VhostUserSession.Settings()
    settings.features = [.version1, .protocolFeatures]
    settings.protocolFeatures = [.replyAcknowledge]
    var frontend = VhostUserConversation(settings)
    frontend.send(.setProtocolFeatures(1 << 3))
    #expect(frontend.refusal(.setFeatures(1 << 34)) == "SET_FEATURES: 0x400000000 was not offered")
    #expect(frontend.refusal(.setFeatures(1 << 17)) == "SET_FEATURES: 0x20000 was not offered")
    #expect(frontend.refusal(.setProtocolFeatures(1 << 9)) == "SET_PROTOCOL_FEATURES: 0x200 was not offered")
    for message in [VhostUserMessage.sendRARP(2), .setMTU(1500)] {
      #expect(frontend.refusal(message).hasSuffix("belongs to a feature that was not offered"))
    }
    for message in [VhostUserMessage.setStatus(1), .resetDevice] {
      #expect(frontend.refusal(message).hasSuffix("belongs to a feature that was not agreed on"))
    }
    // Those with an answer of their own are given an empty one.
    for message in [VhostUserMessage.getQueuePairsMax, .getMemorySlotsMax, .getStatus] {
      #expect(frontend.send(message).first?.hasPrefix("refused") == true)
      #expect(frontend.replies.last?.payload == [])
    }
    #expect(frontend.backend.features.isEmpty)
  }

  @Test func anUnknownRequestIsAnsweredWhereThatIsAskedFor() {
    var frontend = VhostUserConversation()
    let unknown = VhostUserHeader(request: 4_242, needsReply: true, payloadBytes: 3)
    #expect(frontend.send(unknown, [1, 2, 3]) == ["refused request 4242 is unknown"])
    #expect(frontend.replies.isEmpty, "not before it was agreed on")
    frontend.agree()
    #expect(frontend.send(unknown, [1, 2, 3]) == ["refused request 4242 is unknown"])
    #expect(frontend.replies.last?.request == 4_242)
    #expect(frontend.lastNumber == 1)
  }

  @Test(arguments: VhostUserRequest.allCases)
  func aRefusedRequestIsNeverLeftWithoutTheAnswerThatItsFrontendWaitsFor(_ request: VhostUserRequest) {
    var frontend = VhostUserConversation()
    frontend.agree()
    for needsReply in [false, true] {
      let before = frontend.replies.count
      let header = VhostUserHeader(request: request.rawValue, needsReply: needsReply, payloadBytes: 3)
      let effects = frontend.send(header, [1, 2, 3])
      #expect(effects.count == 1 && effects[0].hasPrefix("refused \(request.name)"))
      let hasOwnReply = request.refusal != .ifAsked
      #expect(frontend.replies.count - before == (needsReply || hasOwnReply ? 1 : 0))
    }
  }

  @Test func tooFewAndTooManyDescriptorsAreRefusedAndClosed() {
    let name = "vhost-user-counts"
    let file = SharedFile(name)
    var frontend = VhostUserConversation()
    frontend.agree()
    for message in VhostUserMessage.oneOfEach {
      for count in 0...8 where !message.descriptorCounts.contains(count) {
        let why = frontend.send(message, (0..<count).map { _ in file.received })
        #expect(why.count == 1 && why[0].hasPrefix("refused \(message.request.name) with \(count) descriptors"))
        #expect(SharedFile.openCount(name) == 1)
      }
    }
    #expect(SharedFile.mappedCount(name) == 0)
  }

  @Test func aMemoryTableThatCannotBeUsedIsRefusedAndTheOldOneStays() {
    let name = "vhost-user-table"
    let file = SharedFile(name)
    var frontend = VhostUserConversation()
    frontend.agree()
    frontend.lend(file)
    func table(_ regions: VhostUserMessage.RegionDescription...) -> String {
      frontend.refusal(.setMemoryTable(regions), regions.map { _ in file.received })
    }
    #expect(table(file.region(), file.region()).contains("overlap"))
    #expect(table(file.region(bytes: 0x2000), file.region(guest: 0x1000, user: 0)).contains("overlap"))
    #expect(table(file.region(user: 0), file.region(guest: 1 << 40, user: UInt64(0) &- (1 << 40))).contains("overlap"))
    #expect(table(file.region(bytes: file.byteCount + 1)).contains("not within its file"))
    #expect(table(file.region(offset: 0x1000)).contains("not within its file"))
    #expect(table(file.region(offset: UInt64.max - 0xfff)).contains("not within its file"))
    #expect(table(file.region(bytes: 0)).contains("not within its file"))
    #expect(table(file.region(guest: UInt64.max - 0xfff, user: 0)).contains("goes beyond the last address"))
    #expect(table(file.region(guest: 0x10)).contains("does not start at a page"))
    var ends: [Int32] = [0, 0]
    #expect(unsafe pipe(&ends) == 0)
    let pipes = ends.map(OwnedDescriptor.init)
    #expect(frontend.refusal(.setMemoryTable([file.region()]), [pipes[0]]).contains("no memory file"))
    let readOnly = OwnedDescriptor(unsafe open("/proc/self/fd/\(file.descriptor.number)", O_RDONLY | O_CLOEXEC))
    #expect(frontend.refusal(.setMemoryTable([file.region()]), [readOnly]).contains("mapped for writing"))
    #expect(frontend.backend.memory.regions.count == 1)
    #expect(SharedFile.mappedCount(name) == 1)
  }

  @Test func aQueueCannotChangeWhileItRunsNorLoseItsMemory() {
    let file = SharedFile("vhost-user-running")
    var frontend = VhostUserConversation()
    frontend.agree()
    frontend.lend(file)
    frontend.start(0, file)
    #expect(frontend.refusal(.setQueueSize(.init(queue: 0, number: 128))).contains("stop it first"))
    #expect(frontend.refusal(.setQueueBase(.init(queue: 0, number: 1))).contains("stop it first"))
    var addresses = VhostUserConversation.addresses(0)
    addresses.used += 0x1000
    #expect(frontend.refusal(.setQueueAddresses(addresses)).contains("stop it first"))
    #expect(frontend.refusal(.setFeatures(0)).contains("cannot change while queues run"))
    #expect(frontend.refusal(.setMemoryTable([])).contains("queue 0 runs: no region has"))
    #expect(frontend.refusal(.removeMemoryRegion(file.region())).contains("queue 0 runs: no region has"))
    let inflight = VhostUserMessage.InflightDescription(
      area: .init(byteCount: 0, fileOffset: 0), queues: 2, size: 256)
    #expect(frontend.refusal(.getInflight(inflight)).contains("cannot change while queues run"))
    // What may change: descriptors, and being enabled.
    #expect(frontend.send(.setQueueKick(.init(queue: 0)), [file.received]) == ["kick 0"])
    #expect(frontend.send(.setQueueCall(.init(queue: 0, hasDescriptor: false))) == ["call 0"])
    #expect(frontend.send(.setQueueError(.init(queue: 0)), [file.received]) == ["error 0"])
    #expect(frontend.send(.setQueueAddresses(VhostUserConversation.addresses(0))) == [])
    #expect(frontend.send(.setQueueSize(.init(queue: 1, number: 128))) == [])
  }

  @Test func aQueueThatIsNotThereOrNotReadyIsRefused() {
    let file = SharedFile("vhost-user-queues")
    var frontend = VhostUserConversation(.init(queuePairsMax: 1))
    frontend.agree()
    for message in [
      VhostUserMessage.setQueueSize(.init(queue: 2, number: 256)), .setQueueBase(.init(queue: .max)),
      .setQueueAddresses(VhostUserConversation.addresses(2)), .setQueueEnabled(.init(queue: 2, number: 1)),
    ] {
      #expect(frontend.refusal(message).contains("is not one of the 2"))
    }
    for message in [VhostUserMessage.setQueueKick(.init(queue: 2)), .setQueueCall(.init(queue: 255))] {
      #expect(frontend.refusal(message, [file.received]).contains("is not one of the 2"))
    }
    #expect(frontend.send(.getQueueBase(.init(queue: 2))).first?.contains("is not one of the 2") == true)
    #expect(frontend.replies.last?.payload == [])
    #expect(frontend.refusal(.setQueueEnabled(.init(queue: 0, number: 2))).contains("neither 0 nor 1"))
    #expect(frontend.refusal(.setQueueCall(.init(rawValue: 1 << 9)), [file.received]).contains("without a meaning"))

    func kick() -> String { frontend.refusal(.setQueueKick(.init(queue: 0)), [file.received]) }
    #expect(kick().contains("size is to be set first"))
    #expect(frontend.refusal(.setQueueSize(.init(queue: 0, number: 0))).contains("has 1 to 32768"))
    #expect(frontend.refusal(.setQueueSize(.init(queue: 0, number: 32_769))).contains("has 1 to 32768"))
    frontend.send(.setQueueSize(.init(queue: 0, number: 256)))
    #expect(kick().contains("addresses are to be set first"))
    frontend.send(.setQueueAddresses(VhostUserConversation.addresses(0)))
    #expect(kick().contains("no region has"))
    frontend.lend(file)
    var addresses = VhostUserConversation.addresses(0)
    addresses.used = 0x7f00_0000_0000 + UInt64(file.byteCount) - 6 - 8 * 256 + 4
    #expect(frontend.refusal(.setQueueAddresses(addresses)).contains("no region has the 2054 bytes of its used ring"))
    addresses = VhostUserConversation.addresses(0)
    addresses.descriptors += 8
    #expect(frontend.refusal(.setQueueAddresses(addresses)).contains("not aligned to 16 bytes"))
    addresses = VhostUserConversation.addresses(0, flags: 2)
    #expect(frontend.refusal(.setQueueAddresses(addresses)).contains("without a meaning"))
    frontend.send(.setQueueSize(.init(queue: 0, number: 255)))
    #expect(kick().contains("no power of two"))
    frontend.send(.setQueueSize(.init(queue: 0, number: 256)))
    frontend.send(.setQueueBase(.init(queue: 0, number: 0x1_0000)))
    #expect(kick().contains("its base"))
    frontend.send(.setQueueBase(.init(queue: 0, number: 0xFFFF)))
    #expect(frontend.send(.setQueueKick(.init(queue: 0)), [file.received]) == ["start 0"])
  }

  @Test func aTableHasNoMoreRegionsThanItSays() {
    let file = SharedFile("vhost-user-slots")
    var frontend = VhostUserConversation()
    frontend.agree()
    frontend.send(.getMemorySlotsMax)
    let most = Int(frontend.lastNumber ?? 0)
    func region(_ number: Int) -> VhostUserMessage.RegionDescription {
      file.region(guest: UInt64(number) << 30, offset: 0x1000, bytes: 0x10000)
    }
    for number in 0..<most {
      #expect(frontend.send(.addMemoryRegion(region(number)), [file.received]) == ["memory \(number + 1)"])
    }
    #expect(frontend.refusal(.addMemoryRegion(region(most)), [file.received]).contains("33 regions are more than"))
    // With and without the descriptor that some send.
    #expect(frontend.send(.removeMemoryRegion(region(7)), [file.received]) == ["memory 31"])
    #expect(frontend.send(.removeMemoryRegion(region(8))) == ["memory 30"])
    #expect(frontend.send(.addMemoryRegion(region(most)), [file.received]) == ["memory 31"])
    // QEMU before 8.0 says both again for each further pair of queues: what is so already is done.
    for message in [VhostUserMessage.addMemoryRegion(region(most)), .removeMemoryRegion(region(8))] {
      #expect(frontend.send(message, needsReply: true, [file.received]) == [])
      #expect(frontend.lastNumber == 0)
    }
    #expect(frontend.refusal(.removeMemoryRegion(region(most + 1))).contains("no such region"))
    let shorter = file.region(guest: UInt64(most) << 30, bytes: 0x8000)
    #expect(frontend.refusal(.addMemoryRegion(shorter), [file.received]).contains("overlap"))
    #expect(SharedFile.mappedCount("vhost-user-slots") == 31)
    #expect(SharedFile.openCount("vhost-user-slots") == 1)
  }

  @Test func memoryOfADiskIsRefused() throws {
    let path = temporaryFolder + "/vnetr-vu-disk-\(getpid())"
    let disk = OwnedDescriptor(unsafe open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0o600))
    defer { unsafe unlink(path) }
    try #require(ftruncate(disk.number, 1 << 20) == 0)
    if disk.isInMemory { return }
    var frontend = VhostUserConversation()
    frontend.agree()
    let region = SharedFile("vhost-user-disk").region()
    #expect(frontend.refusal(.setMemoryTable([region]), [disk]).contains("is no memory file"))
    #expect(frontend.refusal(.setQueueCall(.init(queue: 0)), [disk]).contains("neither an eventfd nor a pipe"))
  }

  @Test func noEventDescriptorCanMakeAWorkerWait() throws {
    var frontend = VhostUserConversation()
    frontend.agree()
    var ends: [Int32] = [0, 0]
    try #require(unsafe pipe(&ends) == 0)
    let pipes = ends.map(OwnedDescriptor.init)
    let event = OwnedDescriptor(eventfd(0, 0))
    for (number, descriptor) in [event, pipes[1]].enumerated() {
      #expect(fcntl(descriptor.number, F_GETFL) & O_NONBLOCK == 0)
      #expect(frontend.send(.setQueueCall(.init(queue: number)), [descriptor]) == [])
      #expect(fcntl(descriptor.number, F_GETFL) & O_NONBLOCK != 0)
    }
    #expect(frontend.send(.setQueueKick(.init(queue: 0)), [event]).count == 1)
    // Full: it returns all the same.
    var most: UInt64 = .max - 1
    #expect(unsafe write(event.number, &most, 8) == 8)
    event.signal()
    // Nor where the frontend takes that back.
    #expect(fcntl(event.number, F_SETFL, 0) == 0)
    event.signal()
  }

  @Test func aNumberWithoutSenseIsRefused() {
    var frontend = VhostUserConversation(.init(mtuBytesMax: 9_000))
    frontend.agree()
    for bytes in [0, 67, 9_001, .max] as [UInt64] { #expect(frontend.refusal(.setMTU(bytes)).contains("not within")) }
    for address in [0, 1] as [UInt64] { #expect(frontend.refusal(.sendRARP(address)).contains("no guest's address")) }
    #expect(frontend.refusal(.setStatus(256)).contains("more than the eight bits"))
  }

  // MARK: What has to wait

  @Test func theBaseIsOnlyToldWhenTheWorkerHasStopped() {
    let file = SharedFile("vhost-user-stop")
    var frontend = VhostUserConversation()
    frontend.agree()
    frontend.lend(file)
    frontend.start(0, file)
    let message = VhostUserMessage.getQueueBase(.init(queue: 0))
    let asked = frontend.backend.receive(message.header(), payload: message.payload, descriptors: [])
    #expect(asked.effects.map(\.name) == ["stop 0"])
    #expect(asked.replies.isEmpty && frontend.backend.isWaiting)
    #expect(frontend.backend.queueStopped(1, base: .init(availableIndex: 1)).replies.isEmpty)
    #expect(frontend.backend.queueStopped(9, base: .init(availableIndex: 1)).replies.isEmpty)
    #expect(frontend.backend.isWaiting)
    let answered = frontend.backend.queueStopped(0, base: .init(availableIndex: 99))
    #expect(answered.replies.map(\.payload) == [UInt32(0).littleEndianBytes + UInt32(99).littleEndianBytes])
    #expect(!frontend.backend.isWaiting)
    // It goes on from there.
    #expect(frontend.send(.setQueueKick(.init(queue: 0)), [file.received]) == ["start 0"])
    #expect(frontend.starts.last?.base.availableIndex == 99)
  }

  @Test func oldMemoryStaysMappedUntilWorkersHaveLeftIt() {
    let old = SharedFile("vhost-user-old")
    let new = SharedFile("vhost-user-new")
    var frontend = VhostUserConversation()
    frontend.agree()
    frontend.lend(old)
    frontend.start(0, old)
    frontend.starts = []
    let message = VhostUserMessage.setMemoryTable([new.region(guest: 1 << 30, user: 0x7f00_0000_0000 - (1 << 30))])
    let version: UInt64? = {
      let outcome = frontend.backend.receive(
        message.header(needsReply: true), payload: message.payload, descriptors: [new.received])
      #expect(outcome.replies.isEmpty)
      guard case .memoryChanged(_, let rings, let version) = outcome.effects.first else { return nil }
      #expect(rings[0]?.descriptors == 1 << 30)
      return version
    }()
    #expect(SharedFile.mappedCount("vhost-user-old") == 1)
    #expect(SharedFile.mappedCount("vhost-user-new") == 1)
    #expect(frontend.backend.adopted(version: (version ?? 1) - 1).replies.isEmpty)
    #expect(frontend.backend.isWaiting)
    #expect(frontend.backend.adopted(version: version ?? 0).replies.count == 1)
    #expect(SharedFile.mappedCount("vhost-user-old") == 0)
    #expect(SharedFile.openCount("vhost-user-new") == 1, "a mapping needs no descriptor")
  }

  @Test func anOldCallDescriptorStaysOpenUntilWorkersHaveLeftIt() {
    let name = "vhost-user-call"
    let file = SharedFile("vhost-user-call-memory")
    let event = SharedFile(name)
    var frontend = VhostUserConversation()
    frontend.agree()
    frontend.lend(file)
    frontend.send(.setQueueCall(.init(queue: 0)), [event.received])
    #expect(SharedFile.openCount(name) == 2)
    frontend.send(.setQueueCall(.init(queue: 0)), [event.received])
    #expect(SharedFile.openCount(name) == 2, "no worker has the one before")
    frontend.start(0, file)
    frontend.starts = []
    let message = VhostUserMessage.setQueueCall(.init(queue: 0, hasDescriptor: false))
    let version = frontend.backend.receive(message.header(), payload: message.payload, descriptors: [])
      .effects.first?.version
    #expect(SharedFile.openCount(name) == 2)
    _ = frontend.backend.adopted(version: version ?? 0)
    #expect(SharedFile.openCount(name) == 1)
  }

  @Test(arguments: [VhostUserMessage.resetDevice, .setStatus(0)])
  func aResetStopsAllQueuesFirstAndKeepsMemory(_ message: VhostUserMessage) {
    let file = SharedFile("vhost-user-reset")
    var frontend = VhostUserConversation()
    frontend.agree()
    frontend.lend(file)
    frontend.start(0, file)
    frontend.start(3, file)
    let asked = frontend.backend.receive(message.header(needsReply: true), payload: message.payload, descriptors: [])
    #expect(asked.effects.map(\.name) == ["stop 0", "stop 3"] && asked.replies.isEmpty)
    #expect(frontend.backend.queueStopped(3, base: .init(availableIndex: 1)).replies.isEmpty)
    let answered = frontend.backend.queueStopped(0, base: .init(availableIndex: 1))
    #expect(answered.effects.map(\.name) == ["reset"] && answered.replies.count == 1)
    #expect(frontend.backend.features.isEmpty && frontend.backend.memory.regions.count == 1)
    #expect(frontend.backend.protocolFeatures == .served)
    frontend.send(.getQueueBase(.init(queue: 0)))
    let base = (0 as UInt32).littleEndianBytes + (1 as UInt32).littleEndianBytes
    #expect(frontend.replies.last?.payload == base, "some ask only now where it stood")
    #expect(frontend.refusal(.setQueueKick(.init(queue: 0)), [file.received]).contains("size is to be set"))
    frontend.agree()
    #expect(frontend.start(0, file) == ["start 0"])
  }

  @Test func theEndOfAConnectionWaitsForWorkersAndLeavesNothingOpen() {
    let name = "vhost-user-end"
    let file = SharedFile(name)
    var frontend = VhostUserConversation()
    frontend.agree()
    frontend.lend(file)
    for queue in 0..<4 {
      frontend.send(.setQueueCall(.init(queue: queue)), [file.received])
      frontend.start(queue, file)
    }
    frontend.starts = []
    let message = VhostUserMessage.getQueueBase(.init(queue: 2))
    _ = frontend.backend.receive(message.header(), payload: message.payload, descriptors: [])
    #expect(frontend.backend.end().effects.map(\.name) == ["stop 0", "stop 1", "stop 3"])
    #expect(frontend.backend.end().effects.isEmpty)
    for queue in 0..<4 {
      #expect(!frontend.backend.hasEnded)
      #expect(frontend.backend.queueStopped(queue, base: .init(availableIndex: 0)).replies.isEmpty)
    }
    #expect(frontend.backend.hasEnded)
    frontend = VhostUserConversation()
    #expect(SharedFile.openCount(name) == 1)
    #expect(SharedFile.mappedCount(name) == 0)
  }

  // MARK: In-flight memory

  @Test(arguments: [VhostUserQueueKind.split, .packed])
  func inflightMemoryIsMadeAndTakenBack(_ kind: VhostUserQueueKind) throws {
    let file = SharedFile("vhost-user-inflight-memory")
    var frontend = VhostUserConversation(.init(queuePairsMax: 1))
    frontend.agree(without: kind == .packed ? [] : .packedRing)
    let asked = VhostUserMessage.InflightDescription(area: .init(byteCount: 0, fileOffset: 0), queues: 2, size: 256)
    frontend.send(.getInflight(asked))
    let reply = try #require(frontend.replies.last)
    let descriptor = try #require(reply.descriptor)
    guard
      case .getInflight(var made) = try VhostUserMessage(
        VhostUserHeader(request: 31, payloadBytes: 24), payload: reply.payload)
    else {
      Issue.record("the reply has another size")
      return
    }
    let queueBytes = kind == .split ? 16 + 256 * 16 + 48 : 32 + 256 * 32 + 32
    #expect(made.area.byteCount == UInt64(2 * queueBytes) && made.queues == 2 && made.size == 256)

    var next = VhostUserConversation(.init(queuePairsMax: 1))
    next.agree(without: kind == .packed ? [] : .packedRing)
    made.area.byteCount -= 1
    #expect(
      next.refusal(.setInflight(made), [OwnedDescriptor(dup(descriptor.number))]).contains("2 queues need"))
    made.area.byteCount += 1
    #expect(next.send(.setInflight(made), [OwnedDescriptor(dup(descriptor.number))]) == [])
    next.lend(file)
    #expect(next.start(1, file) == ["start 1"])
    #expect(next.starts.first?.inflight?.part == queueBytes..<2 * queueBytes)
    next.prepare(0, size: 512)
    #expect(
      next.refusal(.setQueueKick(.init(queue: 0)), [file.received]).contains("too small for its 512 places"))
    for (queues, size) in [(0, 256), (3, 256), (2, 0), (2, 32_769)] as [(UInt16, UInt16)] {
      let wrong = VhostUserMessage.InflightDescription(
        area: made.area, queues: queues, size: size)
      #expect(frontend.send(.getInflight(wrong)).first?.hasPrefix("refused GET_INFLIGHT_FD") == true)
      #expect(frontend.replies.last?.payload == [])
    }
  }

  // MARK: Anything at all

  @Test(arguments: [UInt64](1...10))
  func noSequenceOfMessagesBreaksASessionOrLeavesSomethingOpen(_ seed: UInt64) {
    var random = SeededRandom(seed: seed)
    let name = "vhost-user-random-\(seed)"
    let file = SharedFile(name)
    var starts = 0
    for _ in 0..<20 {
      var frontend = VhostUserConversation()
      if Bool.random(using: &random) { frontend.agree() }
      for _ in 0..<500 {
        let message = randomMessage(&random, file)
        var payload = message.payload
        if Int.random(in: 0..<20, using: &random) == 0 {
          payload = Array((payload + [0, 1, 2, 3]).prefix(Int.random(in: 0...payload.count + 4, using: &random)))
        }
        if !payload.isEmpty, Int.random(in: 0..<10, using: &random) == 0 {
          payload[Int.random(in: payload.indices, using: &random)] = .random(in: 0...255, using: &random)
        }
        let request =
          Int.random(in: 0..<50, using: &random) == 0
          ? UInt32.random(in: 0...50, using: &random) : message.request.rawValue
        var count = message.descriptorCounts.lowerBound
        if Int.random(in: 0..<20, using: &random) == 0 { count = Int.random(in: 0...8, using: &random) }
        let header = VhostUserHeader(
          request: request, needsReply: .random(using: &random), payloadBytes: payload.count)
        frontend.send(header, payload, (0..<count).map { _ in file.received })
        for start in frontend.starts {
          let (memory, rings) = (start.memory, start.rings)
          let ringBytes = 16 * start.size
          #expect(unsafe memory.pointer(guest: rings.descriptors, byteCount: ringBytes) != nil)
          #expect(unsafe memory.pointer(guest: rings.used, byteCount: 4) != nil)
          #expect(unsafe memory.pointer(guest: rings.available, byteCount: 4) != nil)
        }
        starts += frontend.starts.count
        frontend.starts = []
        frontend.replies = []
      }
      #expect(!frontend.backend.isWaiting)
    }
    #expect(starts > 20, "the messages make sense often enough to get somewhere")
    #expect(SharedFile.openCount(name) == 1)
    #expect(SharedFile.mappedCount(name) == 0)
  }

  private func randomMessage(_ random: inout SeededRandom, _ file: SharedFile) -> VhostUserMessage {
    let queue = Int.random(in: 0..<5, using: &random)
    let number = UInt32(queue)
    switch Int.random(in: 0..<28, using: &random) {
    case 0: return .setFeatures(VhostUserFeatures.served.rawValue & random.next())
    case 1: return .setFeatures(VhostUserFeatures.version1.rawValue)
    case 2: return .setMemoryTable([])
    case 3, 4: return .setMemoryTable([file.region()])
    case 5:
      let half = file.byteCount / 2
      return .setMemoryTable([
        file.region(bytes: half), file.region(guest: UInt64(half), offset: UInt64(half), bytes: half),
      ])
    case 6: return .setLogBase(.init(byteCount: 4_096, fileOffset: 0))
    case 7...10: return .setQueueSize(.init(queue: number, number: [64, 256, 255].randomElement(using: &random)!))
    case 11...14:
      return .setQueueAddresses(VhostUserConversation.addresses(queue, flags: .random(in: 0...1, using: &random)))
    case 15: return .setQueueBase(.init(queue: number, number: .random(in: 0...300, using: &random)))
    case 16: return .getQueueBase(.init(queue: number))
    case 17...19: return .setQueueKick(.init(queue: queue))
    case 20: return .setQueueEnabled(.init(queue: number, number: .random(in: 0...1, using: &random)))
    case 21:
      return .addMemoryRegion(file.region(guest: UInt64.random(in: 0...4, using: &random) << 30))
    case 22:
      return .removeMemoryRegion(file.region(guest: UInt64.random(in: 0...4, using: &random) << 30))
    case 23:
      return .getInflight(.init(area: .init(byteCount: 0, fileOffset: 0), queues: 4, size: 256))
    case 24: return .setQueueCall(.init(queue: queue))
    case 25: return Int.random(in: 0..<5, using: &random) == 0 ? .resetDevice : .getStatus
    default: return VhostUserMessage.oneOfEach.randomElement(using: &random)!
    }
  }
}
