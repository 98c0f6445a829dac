import CLinux
import Datapath
import Testing

@Suite struct MemorySendPoolTests {
  /// A pool, and a frame of `length` bytes in slot 0.
  private struct Bench: ~Copyable {
    var memory: FrameMemory
    var pool: SendPool
    var descriptor: Descriptor

    init(operations: Int = 4, length: Int = 100) throws {
      memory = try FrameMemory(slotCount: 1, hugePages: false)
      pool = SendPool(count: operations)
      descriptor = Descriptor(
        buffer: BufferReference(slot: 0), offset: 140, length: length, ingress: InterfaceIndex(2))
    }

    mutating func fill(_ operation: Int, _ kind: LaneKind, header: SendPool.Header) -> Bool {
      pool.fill(operation, descriptor, egress: InterfaceIndex(5), lane: kind, header: header, memory)
    }
  }

  @Test("every operation is given out once, then none, and the one that came back last goes first")
  func taking() {
    var pool = SendPool(count: 3)
    let taken = [pool.take(), pool.take(), pool.take()]
    #expect(Set(taken) == [0, 1, 2])
    let usedOfAll = pool.usedCount
    #expect(usedOfAll == 3)
    let none = pool.take()
    #expect(none == nil)
    pool.giveBack(1)
    pool.giveBack(2)
    let used = pool.usedCount
    #expect(used == 1)
    let again = pool.take()
    #expect(again == 2)
  }

  @Test("what the kernel reads is the header, then the frame where it lies")
  func vectors() throws {
    var bench = try Bench()
    let operation = bench.pool.take()!
    let isFilled = bench.fill(
      operation, .datagramIPv4, header: SendPool.Header(first: 0x0807_0605_0403_0201, count: 8))
    #expect(isFilled)
    let frame = unsafe bench.memory.address(ofSlot: 0) + 140
    let send = unsafe bench.pool.operation(operation)
    let message = unsafe send.pointee.message
    let count = unsafe message.msg_iovlen
    #expect(count == 2)
    let header = unsafe Array(
      UnsafeRawBufferPointer(start: message.msg_iov[0].iov_base, count: message.msg_iov[0].iov_len))
    #expect(header == [1, 2, 3, 4, 5, 6, 7, 8])
    let isInPlace = unsafe message.msg_iov[1].iov_base == frame && message.msg_iov[1].iov_len == 100
    #expect(isInPlace)
    let name = unsafe message.msg_name == nil
    #expect(name)
  }

  @Test("a virtio header of 12 bytes takes from both words")
  func longHeader() throws {
    var bench = try Bench()
    let operation = bench.pool.take()!
    let header = SendPool.Header(first: 0x0807_0605_0403_0201, second: 0x0C0B_0A09, count: 12)
    let isFilled = bench.fill(operation, .tap, header: header)
    #expect(isFilled)
    let message = unsafe bench.pool.operation(operation).pointee.message
    let bytes = unsafe Array(
      UnsafeRawBufferPointer(start: message.msg_iov[0].iov_base, count: message.msg_iov[0].iov_len))
    #expect(bytes == Array(1...12))
  }

  @Test("the record remembers the frame, where it goes, and how many bytes a whole send is")
  func record() throws {
    var bench = try Bench(length: 1_400)
    let operation = bench.pool.take()!
    bench.pool[operation].wasResent = true
    let isFilled = bench.fill(operation, .datagramIPv6, header: SendPool.Header(count: 8))
    #expect(isFilled)
    let record = bench.pool[operation]
    #expect(record.bytes == 1_408)
    #expect(record.egress == InterfaceIndex(5))
    #expect(record.descriptor.buffer == BufferReference(slot: 0))
    #expect(!record.wasResent)
  }

  @Test("operations form lists by their records")
  func lists() {
    var pool = SendPool(count: 4)
    let taken = [pool.take()!, pool.take()!, pool.take()!, pool.take()!]
    for (operation, next) in zip(taken, taken.dropFirst()) { pool[operation].next = UInt32(next) }
    var operation = taken[0]
    var walked = [operation]
    for _ in 0..<3 {
      operation = pool.next(operation)
      walked.append(operation)
    }
    #expect(walked == taken)
  }

  @Test(
    "the ToS of a frame becomes a control message of the socket's family, and none where there is none",
    arguments: [
      (LaneKind.datagramIPv4, UInt8(0xB9), Int32(IPPROTO_IP), IP_TOS),
      (.datagramIPv6, 0x03, Int32(IPPROTO_IPV6), IPV6_TCLASS),
      (.datagramIPv4, 0, 0, 0),
      (.tap, 0xB9, 0, 0),
    ])
  func typeOfService(_ kind: LaneKind, _ service: UInt8, _ level: Int32, _ type: Int32) throws {
    var bench = try Bench()
    bench.descriptor.typeOfService = service
    let operation = bench.pool.take()!
    // A message of an earlier use must not stay.
    bench.descriptor.typeOfService = 0x55
    var isFilled = bench.fill(operation, .datagramIPv4, header: SendPool.Header(count: 8))
    bench.descriptor.typeOfService = service
    isFilled = isFilled && bench.fill(operation, kind, header: SendPool.Header(count: 8))
    #expect(isFilled)
    let message = unsafe bench.pool.operation(operation).pointee.message
    let controlBytes = unsafe message.msg_controllen
    guard type != 0 else {
      #expect(controlBytes == 0)
      return
    }
    #expect(controlBytes == 24)
    let control = unsafe message.msg_control!
    let length = unsafe control.loadUnaligned(as: Int.self)
    let fields = (0..<3).map { unsafe control.loadUnaligned(fromByteOffset: 8 + 4 * $0, as: Int32.self) }
    #expect(length == 20)
    #expect(fields == [level, type, Int32(service)])
  }

  @Test("operations do not move while the pool lives, and do not overlap")
  func places() {
    let pool = SendPool(count: 8)
    let places = (0..<8).map { unsafe UInt(bitPattern: pool.operation($0)) }
    let stride = unsafe UInt(MemoryLayout<clinux_send>.stride)
    for (one, next) in zip(places, places.dropFirst()) { #expect(next - one == stride) }
  }

  @Test("giving back what is not out traps, and so does an operation that is none")
  func traps() async {
    await #expect(processExitsWith: .failure) {
      var pool = SendPool(count: 2)
      pool.giveBack(0)
    }
    await #expect(processExitsWith: .failure) {
      let pool = SendPool(count: 2)
      print(unsafe pool.operation(2))
    }
    await #expect(processExitsWith: .failure) {
      let pool = SendPool(count: 2)
      print(pool[2].bytes)
    }
  }
}
