import Datapath
import Glibc

/// The SPSC ring: one item a call and batches of 32, within one thread and between two pinned ones.
func benchmarkRing(_ report: Report) {
  let capacity = 1_024
  report.table("SPSC ring, \(capacity) places of 8 bytes", item: "item")

  for batch in [1, 32] {
    let ring = SPSCRing<UInt64>(capacity: capacity)
    var producer = ring.makeProducer()
    var consumer = ring.makeConsumer()
    var wrong: UInt64 = 0
    var count: UInt64 = 0
    report.measure("one thread, \(name(batch))", items: 40_000_000) { items in
      var room = [UInt64](repeating: 0, count: batch)
      var next = count
      var expected = count
      for _ in 0..<items / batch {
        if batch == 1 {
          if producer.push(next) { next &+= 1 }
          if let item = consumer.pop() {
            wrong |= item ^ expected
            expected &+= 1
          }
        } else {
          number(&room, from: next)
          next &+= UInt64(producer.push(room.span))
          var places = room.mutableSpan
          let popped = consumer.pop(into: &places)
          wrong |= differences(room, popped, from: expected)
          expected &+= UInt64(popped)
        }
      }
      wrong |= next ^ expected
      count = expected
    }
    report.check(wrong == 0 && count > 0, "ring, one thread, \(name(batch)): order")
  }

  let cpus = ProcessorSet.allowed()
  guard cpus.count >= 2 else {
    return report.note("two threads: left out, there is one CPU")
  }
  for batch in [1, 32] {
    var isOrdered = true
    report.measure("two threads on CPU \(cpus[0]) and \(cpus[1]), \(name(batch))", items: 40_000_000) { items in
      isOrdered = cross(items / batch * batch, batch: batch, capacity: capacity, cpus: cpus) && isOrdered
    }
    report.check(isOrdered, "ring, two threads, \(name(batch)): order")
  }
}

private func name(_ batch: Int) -> String { batch == 1 ? "one a call" : "batches of \(batch)" }

/// Writes numbers that count up.
@inline(__always)
private func number(_ room: inout [UInt64], from first: UInt64) {
  for place in room.indices { room[place] = first &+ UInt64(truncatingIfNeeded: place) }
}

/// 0 when the first `count` places hold numbers that count up from `first`.
@inline(__always)
private func differences(_ room: [UInt64], _ count: Int, from first: UInt64) -> UInt64 {
  var all: UInt64 = 0
  for place in room.indices.prefix(count) { all |= room[place] ^ (first &+ UInt64(truncatingIfNeeded: place)) }
  return all
}

/// Carries `items` numbers, a multiple of `batch`, from one thread to another; false when any came out of order.
private func cross(_ items: Int, batch: Int, capacity: Int, cpus: [Int]) -> Bool {
  let ring = SPSCRing<UInt64>(capacity: capacity)
  let producer = Parcel(ring.makeProducer())
  let consumer = Parcel(ring.makeConsumer())
  let result = Parcel<UInt64>(0)
  let last = UInt64(items)
  let pushing = BenchmarkThread(cpu: cpus[0]) {
    var producer = producer.open()
    var next: UInt64 = 0
    if batch == 1 {
      while next < last { if producer.push(next) { next &+= 1 } }
      return
    }
    var room = [UInt64](repeating: 0, count: batch)
    while next < last {
      number(&room, from: next)
      var done = 0
      while done < batch { done += producer.push(room.span.extracting(done..<batch)) }
      next &+= UInt64(batch)
    }
  }
  let popping = BenchmarkThread(cpu: cpus[1]) {
    var consumer = consumer.open()
    var wrong = result.open()
    var expected: UInt64 = 0
    var room = [UInt64](repeating: 0, count: batch)
    while expected < last {
      if batch == 1 {
        guard let item = consumer.pop() else { continue }
        wrong |= item ^ expected
        expected &+= 1
      } else {
        var places = room.mutableSpan
        let popped = consumer.pop(into: &places)
        wrong |= differences(room, popped, from: expected)
        expected &+= UInt64(popped)
      }
    }
    result.close(wrong)
  }
  pushing.join()
  popping.join()
  return result.open() == 0
}

/// Carries something into a thread, or out of it: a closure that escapes cannot consume a non-copyable value.
final class Parcel<Content: ~Copyable>: @unchecked Sendable {
  private var content: Content?
  init(_ content: consuming Content) { self.content = consume content }
  func open() -> Content { content.take()! }
  func close(_ content: consuming Content) { self.content = consume content }
}

/// A thread that stays on one CPU.
final class BenchmarkThread {
  private var thread = pthread_t()

  private final class Body {
    let run: @Sendable () -> Void
    init(_ run: @escaping @Sendable () -> Void) { self.run = run }
  }

  init(cpu: Int, _ run: @escaping @Sendable () -> Void) {
    let body = Body {
      _ = ProcessorSet([cpu]).pinThisThread()
      run()
    }
    let context = unsafe Unmanaged.passRetained(body).toOpaque()
    let error = unsafe pthread_create(
      &thread, nil,
      { context in
        unsafe Unmanaged<Body>.fromOpaque(context!).takeRetainedValue().run()
        return nil
      }, context)
    precondition(error == 0, "no thread")
  }

  func join() { pthread_join(thread, nil) }
}
