import Datapath
import Glibc
import TestSupport
import Testing

/// Carries an end of a ring into a thread: a closure that escapes cannot consume it.
private final class Parcel<Content: ~Copyable>: @unchecked Sendable {
  private var content: Content?
  init(_ content: consuming Content) { self.content = consume content }
  func open() -> Content { content.take()! }
}

@Suite struct SPSCRingTests {
  /// Items that cross between two threads; a few times that under a sanitizer is slow enough.
  static let itemCount = 10_000_000

  @Test("capacity is rounded up to a power of two, and is what fits", arguments: [(1, 1), (2, 2), (3, 4), (100, 128)])
  func capacity(_ asked: Int, _ given: Int) {
    let ring = SPSCRing<Int>(capacity: asked)
    #expect(ring.capacity == given)
    var producer = ring.makeProducer()
    var pushed = 0
    while producer.push(pushed) { pushed += 1 }
    #expect(pushed == given)
  }

  @Test("items come out in the order they went in, one at a time, round the end many times")
  func singles() {
    let ring = SPSCRing<Int>(capacity: 8)
    var producer = ring.makeProducer()
    var consumer = ring.makeConsumer()
    var next = 0
    var expected = 0
    var wrong = 0
    for round in 0..<1_000 {
      for _ in 0..<round % 9 { if producer.push(next) { next += 1 } }
      for _ in 0..<(round * 7) % 9 {
        guard let item = consumer.pop() else { break }
        if item != expected { wrong += 1 }
        expected += 1
      }
    }
    while let item = consumer.pop() {
      if item != expected { wrong += 1 }
      expected += 1
    }
    #expect(wrong == 0)
    #expect(expected == next)
    #expect(next > 2_000)
  }

  @Test("batches of any size keep order, and a batch that does not fit goes in part, the first items first")
  func batches() {
    let ring = SPSCRing<Int>(capacity: 16)
    var producer = ring.makeProducer()
    var consumer = ring.makeConsumer()
    var random = SystemRandomNumberGenerator()
    var next = 0
    var expected = 0
    var wrong = 0
    var partial = 0
    for _ in 0..<5_000 {
      let batch = Array(next..<next + Int.random(in: 0...24, using: &random))
      let fill = next - expected
      let pushed = producer.push(batch.span)
      if pushed != min(batch.count, 16 - fill) { wrong += 1 }
      if pushed < batch.count { partial += 1 }
      next += pushed
      let wanted = Int.random(in: 0...24, using: &random)
      var room = [Int](repeating: 0, count: wanted)
      var places = room.mutableSpan
      let popped = consumer.pop(into: &places)
      if popped != min(wanted, next - expected) { wrong += 1 }
      for place in 0..<popped {
        if room[place] != expected { wrong += 1 }
        expected += 1
      }
    }
    #expect(wrong == 0)
    #expect(partial > 0)
    #expect(expected > 16 * 100)
  }

  @Test("staged items are seen when they are published, in order, round the end of the ring, and take up room before")
  func staged() {
    let ring = SPSCRing<UInt16>(capacity: 4)
    var producer = ring.makeProducer()
    var consumer = ring.makeConsumer()
    let items: [UInt16] = [10, 11, 12]
    for _ in 0..<3 {
      let roomBefore = producer.room(for: 3)
      #expect(roomBefore == 4)
      for item in items { producer.stage(item) }
      let roomLeft = producer.room(for: 2)
      #expect(roomLeft == 1)
      let early = consumer.pop()
      #expect(early == nil)
      producer.publish()
      var popped: [UInt16] = []
      while let item = consumer.pop() { popped.append(item) }
      #expect(popped == items)
    }
  }

  @Test("an empty ring gives nothing, and an empty batch moves nothing")
  func empty() {
    let ring = SPSCRing<UInt8>(capacity: 4)
    var producer = ring.makeProducer()
    var consumer = ring.makeConsumer()
    let none = consumer.pop()
    #expect(none == nil)
    var room: [UInt8] = [9, 9]
    var places = room.mutableSpan
    let popped = consumer.pop(into: &places)
    #expect(popped == 0)
    #expect(room == [9, 9])
    let nothing: [UInt8] = []
    let pushed = producer.push(nothing.span)
    #expect(pushed == 0)
    let isPushed = producer.push(3)
    #expect(isPushed)
    var noRoom: [UInt8] = []
    var noPlaces = noRoom.mutableSpan
    let poppedNone = consumer.pop(into: &noPlaces)
    #expect(poppedNone == 0)
    let item = consumer.pop()
    #expect(item == 3)
  }

  /// Items larger than a cache line keep their parts together.
  struct Wide: BitwiseCopyable, Equatable {
    var words: InlineArray<9, UInt64>
    init(_ number: Int) { words = InlineArray(repeating: UInt64(number)) }
    var isWhole: Bool {
      for place in 1..<9 where words[place] != words[0] { return false }
      return true
    }
    static func == (left: Wide, right: Wide) -> Bool {
      left.words[0] == right.words[0] && left.isWhole && right.isWhole
    }
  }

  @Test("between two threads every item arrives once, in order", arguments: [1, 32, 0])
  func twoThreads(_ batchMax: Int) {
    let ring = SPSCRing<Int>(capacity: 1_024)
    let producer = Parcel(ring.makeProducer())
    var consumer = ring.makeConsumer()
    let thread = TestThread {
      var producer = producer.open()
      if batchMax == 1 {
        for item in 0..<Self.itemCount { while !producer.push(item) { sched_yield() } }
        return
      }
      // 0: batches of a size that changes all the time, longer than the ring is at times.
      var items = [Int](repeating: 0, count: max(batchMax, 1_500))
      var next = 0
      var state: UInt64 = 88_172_645_463_325_252
      while next < Self.itemCount {
        state ^= state << 13
        state ^= state >> 7
        state ^= state << 17
        let wanted = batchMax == 0 ? Int(state % 1_500) + 1 : batchMax
        let count = min(wanted, Self.itemCount - next)
        for place in 0..<count { items[place] = next + place }
        var done = 0
        while done < count {
          let pushed = producer.push(items.span.extracting(done..<count))
          if pushed == 0 { sched_yield() }
          done += pushed
        }
        next += count
      }
    }
    var expected = 0
    var wrong = 0
    var rooms = (batchMax == 0 ? [1, 7, 32, 333, 700] : [batchMax]).map { [Int](repeating: 0, count: $0) }
    while expected < Self.itemCount {
      if batchMax == 1 {
        guard let item = consumer.pop() else {
          sched_yield()
          continue
        }
        if item != expected { wrong += 1 }
        expected += 1
      } else {
        let chosen = expected % rooms.count
        var places = rooms[chosen].mutableSpan
        let popped = consumer.pop(into: &places)
        if popped == 0 { sched_yield() }
        for place in 0..<popped {
          if rooms[chosen][place] != expected { wrong += 1 }
          expected += 1
        }
      }
    }
    thread.join()
    #expect(wrong == 0)
    let rest = consumer.pop()
    #expect(rest == nil)
  }

  @Test("wide items cross between two threads unbroken")
  func wideItems() {
    let ring = SPSCRing<Wide>(capacity: 64)
    let count = 500_000
    let producer = Parcel(ring.makeProducer())
    var consumer = ring.makeConsumer()
    let thread = TestThread {
      var producer = producer.open()
      for number in 0..<count { while !producer.push(Wide(number)) { sched_yield() } }
    }
    var wrong = 0
    for number in 0..<count {
      var item = consumer.pop()
      while item == nil {
        sched_yield()
        item = consumer.pop()
      }
      if item != Wide(number) { wrong += 1 }
    }
    thread.join()
    #expect(wrong == 0)
  }

  @Test("each end is made once")
  func oneEach() async {
    await #expect(processExitsWith: .failure) {
      let ring = SPSCRing<Int>(capacity: 4)
      _ = ring.makeProducer()
      _ = ring.makeProducer()
    }
    await #expect(processExitsWith: .failure) {
      let ring = SPSCRing<Int>(capacity: 4)
      _ = ring.makeConsumer()
      _ = ring.makeConsumer()
    }
    await #expect(processExitsWith: .failure) { _ = SPSCRing<Int>(capacity: 0) }
  }
}
