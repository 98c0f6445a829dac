import CBench
import Datapath
import Glibc
import Synchronization

/// The SPSC ring: one item a call and batches of 32, within one thread and between two pinned ones, there beside
/// DPDK's.
func benchmarkRing(_ report: Report) {
  report.table("SPSC ring in one thread, items of 8 bytes", item: "item") { table in
    for batch in [32, 1] {
      report.check(
        alone(table, name(batch), items: 20_000_000, batch: batch), "ring, one thread, \(name(batch)): order")
    }
  }

  let cpus = ProcessorSet.allowed()
  guard cpus.count >= 2 else {
    return report.skip("SPSC ring between two threads", "there is one CPU")
  }
  if !report.hasDPDK { report.skip("SPSC ring beside rte_ring", dpdkIsMissing) }
  let batch = 32
  compare(UInt64(0), batch: batch, items: 40_000_000, cpus, report)
  compare(Line(), batch: batch, items: 8_000_000, cpus, report)
  compare(UInt64(0), batch: 1, items: 10_000_000, cpus, report)
}

/// An item of a cache line.
private struct Line: BitwiseCopyable, Sendable {
  var words = InlineArray<8, UInt64>(repeating: 0)
}

private let capacity = 1_024

private func name(_ batch: Int) -> String { batch == 1 ? "one a call" : "batches of \(batch)" }

private func compare<Item: BitwiseCopyable & Sendable>(
  _ zero: Item, batch: Int, items: Int, _ cpus: [Int], _ report: Report
) {
  let bytes = MemoryLayout<Item>.stride
  let title =
    "SPSC ring of \(capacity) places, items of \(bytes) bytes, \(name(batch)), two threads on CPU \(cpus[0]) and "
    + "\(cpus[1])"
  // What two cores cost each other depends on where the machine has them at the moment.
  report.table(title, item: "item", rounds: 3) { table in
    let items = table.items(items) / batch * batch
    func add(_ name: String, _ crossing: Crossing) {
      report.check(crossing.isOrdered, "\(title): \(name): order")
      table.add(name, crossing.nanoseconds / Double(items), allocations: crossing.allocations)
    }
    if report.hasDPDK, let ring = unsafe cbench_rte_ring_make(UInt32(bytes), UInt32(capacity)) {
      add("rte_ring", crossDPDK(unsafe Address(ring), UInt64(items), itemBytes: bytes, batch: batch, cpus))
      unsafe cbench_rte_ring_free(ring)
    }
    add("SPSCRing", cross(zero, items, batch: batch, cpus))
  }
}

/// Pushes and pops in turn; false when any came out of order.
@inline(__always)
private func alone(_ table: Table, _ name: String, items: Int, batch: Int) -> Bool {
  let ring = SPSCRing<UInt64>(capacity: capacity)
  var producer = ring.makeProducer()
  var consumer = ring.makeConsumer()
  var room = FixedArray<UInt64>(repeating: 0, count: batch)
  var wrong: UInt64 = 0
  var next: UInt64 = 0
  var expected: UInt64 = 0
  table.measure(name, items: items) { items in
    for _ in 0..<items / batch {
      if batch == 1 {
        if producer.push(next) { next &+= 1 }
        if let item = consumer.pop() {
          wrong |= item ^ expected
          expected &+= 1
        }
      } else {
        unsafe cbench_number(room.address(of: 0), batch, next)
        next &+= UInt64(producer.push(room.span(count: batch)))
        var places = room.mutableSpan(count: batch)
        let popped = consumer.pop(into: &places)
        wrong |= unsafe cbench_differences(room.address(of: 0), popped, expected)
        expected &+= UInt64(popped)
      }
    }
  }
  return wrong | (next ^ expected) == 0 && next > 0
}

/// What one run between two threads gave.
private struct Crossing {
  var isOrdered = false
  var nanoseconds = 0.0
  /// Of both threads.
  var allocations: UInt64 = 0
}

/// The ends of a run: both threads start together, and each says what it saw.
private final class Ends: Sendable {
  private let arrived = Atomic<Int>(0)
  private let allocations = Atomic<UInt64>(0)
  private let nanoseconds = Atomic<UInt64>(0)
  private let wrong = Atomic<UInt64>(0)

  /// Measures one end; `body` says what was wrong.
  func run(_ body: () -> UInt64) {
    arrived.add(1, ordering: .relaxed)
    while arrived.load(ordering: .relaxed) < 2 {}
    let allocationsBefore = cbench_allocations()
    let start = Report.now()
    let differences = body()
    let end = Report.now()
    allocations.add(cbench_allocations() - allocationsBefore, ordering: .relaxed)
    nanoseconds.max(end - start, ordering: .relaxed)
    wrong.bitwiseOr(differences, ordering: .relaxed)
  }

  var crossing: Crossing {
    Crossing(
      isOrdered: wrong.load(ordering: .relaxed) == 0, nanoseconds: Double(nanoseconds.load(ordering: .relaxed)),
      allocations: allocations.load(ordering: .relaxed))
  }
}

/// Carries `items` of numbered words, a multiple of `batch`, from one thread to another.
private func cross<Item: BitwiseCopyable & Sendable>(_ zero: Item, _ items: Int, batch: Int, _ cpus: [Int]) -> Crossing
{
  let ring = SPSCRing<Item>(capacity: capacity)
  let producer = Parcel(ring.makeProducer())
  let consumer = Parcel(ring.makeConsumer())
  let ends = Ends()
  let pushing = BenchmarkThread(cpu: cpus[0]) {
    var producer = producer.open()
    var room = Room(zero, batch)
    ends.run {
      produce(&producer, &room, items, batch)
      return 0
    }
  }
  let popping = BenchmarkThread(cpu: cpus[1]) {
    var consumer = consumer.open()
    var room = Room(zero, batch)
    ends.run { consume(&consumer, &room, items, batch) }
  }
  pushing.join()
  popping.join()
  return ends.crossing
}

/// A batch, as items and as the words that they are made of.
private struct Room<Item: BitwiseCopyable>: ~Copyable {
  var items: FixedArray<Item>
  static var wordsPerItem: Int { MemoryLayout<Item>.stride / 8 }

  init(_ zero: Item, _ batch: Int) { items = FixedArray(repeating: zero, count: batch) }

  @unsafe @inline(__always)
  var words: UnsafeMutablePointer<UInt64> {
    unsafe UnsafeMutableRawPointer(items.address(of: 0)).assumingMemoryBound(to: UInt64.self)
  }
}

@inline(__always)
private func produce<Item: BitwiseCopyable & Sendable>(
  _ producer: inout SPSCRing<Item>.Producer, _ room: inout Room<Item>, _ items: Int, _ batch: Int
) {
  let words = Room<Item>.wordsPerItem
  var next = 0
  while next < items {
    unsafe cbench_number(room.words, batch * words, UInt64(next * words))
    if batch == 1 {
      while !producer.push(room.items[0]) {}
    } else {
      var done = 0
      while done < batch { done += producer.push(room.items.span(from: done, count: batch - done)) }
    }
    next += batch
  }
}

@inline(__always)
private func consume<Item: BitwiseCopyable & Sendable>(
  _ consumer: inout SPSCRing<Item>.Consumer, _ room: inout Room<Item>, _ items: Int, _ batch: Int
) -> UInt64 {
  let words = Room<Item>.wordsPerItem
  var wrong: UInt64 = 0
  var next = 0
  while next < items {
    var popped = 0
    if batch == 1 {
      guard let item = consumer.pop() else { continue }
      room.items[0] = item
      popped = 1
    } else {
      var places = room.items.mutableSpan(count: batch)
      popped = consumer.pop(into: &places)
    }
    wrong |= unsafe cbench_differences(room.words, popped * words, UInt64(next * words))
    next += popped
  }
  return wrong
}

/// An address for another thread.
@safe
private struct Address: @unchecked Sendable {
  let raw: UnsafeMutableRawPointer
  @unsafe init(_ raw: UnsafeMutableRawPointer) { unsafe self.raw = raw }
}

/// The same over DPDK's ring, in C.
private func crossDPDK(_ ring: Address, _ items: UInt64, itemBytes: Int, batch: Int, _ cpus: [Int]) -> Crossing {
  let ends = Ends()
  let pushing = BenchmarkThread(cpu: cpus[0]) {
    ends.run {
      unsafe cbench_rte_ring_produce(ring.raw, UInt32(itemBytes), items, UInt32(batch))
      return 0
    }
  }
  let popping = BenchmarkThread(cpu: cpus[1]) {
    ends.run { unsafe cbench_rte_ring_consume(ring.raw, UInt32(itemBytes), items, UInt32(batch)) }
  }
  pushing.join()
  popping.join()
  return ends.crossing
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
