import Testing

@testable import Control

@Suite struct VhostUserMessageTests {
  @Test(arguments: VhostUserMessage.oneOfEach)
  func aMessageIsReadAsItWasWritten(_ message: VhostUserMessage) throws {
    for needsReply in [false, true] {
      let bytes = message.bytes(needsReply: needsReply)
      let header = try VhostUserHeader(bytes: Array(bytes.prefix(VhostUserHeader.byteCount)))
      #expect(header.needsReply == needsReply)
      #expect(header.payloadBytes == bytes.count - VhostUserHeader.byteCount)
      #expect(try VhostUserMessage(header, payload: Array(bytes.dropFirst(VhostUserHeader.byteCount))) == message)
    }
  }

  @Test func everyRequestIsEitherServedOrRefusedByName() throws {
    let served = Set(VhostUserMessage.oneOfEach.map(\.request))
    #expect(served.count == VhostUserMessage.oneOfEach.count)
    for request in VhostUserRequest.allCases where !served.contains(request) {
      let header = VhostUserHeader(request: request.rawValue, payloadBytes: 8)
      let error = #expect(throws: VhostUserRefusal.self) {
        try VhostUserMessage(header, payload: [UInt8](repeating: 0, count: 8))
      }
      #expect(error?.description == "\(request.name) belongs to a feature that was not offered")
    }
    #expect(Set(VhostUserRequest.allCases.map(\.name)).count == VhostUserRequest.allCases.count)
  }

  @Test(arguments: VhostUserMessage.oneOfEach)
  func aPayloadOfAnotherSizeIsRefusedWithTheNameOfTheRequest(_ message: VhostUserMessage) {
    for count in 0...message.payload.count + 40 where count != message.payload.count {
      let payload = Array((message.payload + [UInt8](repeating: 0, count: 40)).prefix(count))
      // The two sizes of in-flight messages.
      if count == 20, message.payload.count == 24 { continue }
      let header = VhostUserHeader(request: message.request.rawValue, payloadBytes: count)
      let error = #expect(throws: VhostUserRefusal.self) { try VhostUserMessage(header, payload: payload) }
      #expect(error?.description == "\(message.request.name): a payload of \(count) bytes does not fit the request")
    }
  }

  @Test func inflightMessagesHaveTwoSizesAndTheReplyIsAsLong() throws {
    for count in [20, 24] {
      let description = VhostUserMessage.InflightDescription(
        area: .init(byteCount: 5, fileOffset: 6), queues: 7, size: 8, payloadBytes: count)
      let message = VhostUserMessage.getInflight(description)
      #expect(message.payload.count == count)
      #expect(try VhostUserMessage(message.header(), payload: message.payload) == message)
    }
  }

  private static let wrongFlags: [(UInt32, String)] = [
    (0, "protocol version 0"), (2, "protocol version 2"), (3, "protocol version 3"),
    (5, "a reply where a request is due"), (1 | 1 << 4, "bits without a meaning"), (1 | 1 << 31, "without a meaning"),
  ]

  @Test(arguments: wrongFlags)
  func aHeaderOfAnotherProtocolIsRefused(_ flags: UInt32, _ why: String) {
    let bytes = UInt32(1).littleEndianBytes + flags.littleEndianBytes + UInt32(0).littleEndianBytes
    let error = #expect(throws: VhostUserRefusal.self) { try VhostUserHeader(bytes: bytes) }
    #expect(error?.description.hasPrefix("GET_FEATURES: ") == true)
    #expect(error?.description.contains(why) == true)
  }

  @Test func aPayloadLongerThanAnyIsRefusedByItsHeader() throws {
    func header(_ size: UInt32) throws -> VhostUserHeader {
      try VhostUserHeader(bytes: UInt32(5).littleEndianBytes + UInt32(1).littleEndianBytes + size.littleEndianBytes)
    }
    #expect(try header(4_096).payloadBytes == 4_096)
    #expect(throws: VhostUserRefusal.self) { try header(4_097) }
    #expect(throws: VhostUserRefusal.self) { try header(.max) }
  }

  @Test func aTableOfMoreRegionsThanItsPayloadHasIsRefused() {
    for count in [UInt32(2), 8, 9, .max] {
      let payload =
        count.littleEndianBytes + UInt32(0).littleEndianBytes + [UInt8](repeating: 0, count: 32)
      let header = VhostUserHeader(request: 5, payloadBytes: payload.count)
      #expect(throws: VhostUserRefusal.self) { try VhostUserMessage(header, payload: payload) }
    }
  }

  @Test func aReplySaysThatItIsOne() {
    let bytes = VhostUserReply(to: 11, payload: [1, 2]).bytes
    #expect(bytes == [11, 0, 0, 0, 5, 0, 0, 0, 2, 0, 0, 0, 1, 2])
  }

  @Test(arguments: [UInt32(0), 0x8000_8000, 0x0005_0003, 0x8005_8005, 0x0000_8000])
  func theBaseOfAPackedQueueIsTheSameThereAndBack(_ raw: UInt32) throws {
    let base = try #require(VhostUserQueueBase(rawValue: raw, .packed))
    // Without an upper half it is the lower's, which DPDK sends alone.
    #expect(base.rawValue(.packed) == (raw >> 16 == 0 ? raw | raw << 16 : raw))
    #expect(base.availableIndex == UInt16(raw & 0x7FFF))
    #expect(base.availableWrap == (raw & 0x8000 != 0))
  }

  @Test func theBaseOfASplitQueueHasSixteenBits() {
    #expect(VhostUserQueueBase(rawValue: 0xFFFF, .split)?.rawValue(.split) == 0xFFFF)
    #expect(VhostUserQueueBase(rawValue: 0x1_0000, .split) == nil)
  }
}
