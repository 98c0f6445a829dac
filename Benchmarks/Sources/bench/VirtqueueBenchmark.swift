import CBench
import Datapath
import Glibc
import Synchronization

/// A frame from one guest's ring to another's: taken from both rings in batches, copied, given back to both. The guests
/// are drivers in C that poll, in the same thread, where only the device's part is measured; and on another CPU, where
/// all lines cross between the two.
func benchmarkVirtqueue(_ report: Report) {
  let bytes = 64
  report.table("virtqueues, \(bytes) B: pop + push, guests in the same thread, their part left out", item: "frame") {
    table in
    for (name, isPacked) in kinds {
      let scene = VirtqueueScene(isPacked: isPacked, frameBytes: bytes)
      if isPacked { alone(PackedQueue.self, scene, table, name) } else { alone(SplitQueue.self, scene, table, name) }
      report.check(scene.isRight, "virtqueue \(name): every frame comes once, in order, whole")
    }
  }
  let cpus = ProcessorSet.allowed()
  guard cpus.count >= 2 else { return report.skip("virtqueues with guests on another CPU", "there is one CPU") }
  report.table("virtqueues, \(bytes) B: pop + push, both guests on another CPU", item: "frame", rounds: 3) { table in
    for (name, isPacked) in kinds {
      let scene = VirtqueueScene(isPacked: isPacked, frameBytes: bytes)
      if isPacked {
        beside(PackedQueue.self, scene, table, name, cpus)
      } else {
        beside(SplitQueue.self, scene, table, name, cpus)
      }
      report.check(scene.isRight, "virtqueue \(name), two CPUs: every frame comes once, in order, whole")
    }
  }
}

private let kinds = [("virtqueue split", false), ("virtqueue packed", true)]
private let batchFrames = 32

/// Two rings of one guest's memory: one that it transmits by, one that it receives by.
@safe
private final class VirtqueueScene: @unchecked Sendable {
  static let size = 256
  static let base: UInt32 = 0x8000
  /// Of one ring: descriptors, then what the driver writes, then what the device writes, then buffers.
  static let driverOffset = 16 * size
  static let deviceOffset = driverOffset + 4096
  static let buffersOffset = deviceOffset + 4096
  static let ringBytes = buffersOffset + Int(CBENCH_GUEST_BUFFER_BYTES) * size

  let isPacked: Bool
  let frameBytes: Int
  let memory: GuestMemory
  private let storage: UnsafeMutableRawPointer
  private let guests: UnsafeMutablePointer<cbench_guest>

  init(isPacked: Bool, frameBytes: Int) {
    self.isPacked = isPacked
    self.frameBytes = frameBytes
    let bytes = 2 * Self.ringBytes
    unsafe storage = .allocate(byteCount: bytes, alignment: 4096)
    unsafe storage.initializeMemory(as: UInt8.self, repeating: 0, count: bytes)
    unsafe guests = .allocate(capacity: 2)
    let region = unsafe GuestMemory.Region(
      guestAddress: 0x1_0000_0000, userAddress: 0, bytes: UInt64(bytes), mapping: storage)
    do { memory = try GuestMemory([region]) } catch { preconditionFailure("no memory: \(error)") }
    for index in 0..<2 {
      let areas = areas(index)
      let buffers = unsafe storage + index * Self.ringBytes + Self.buffersOffset
      var guest = unsafe cbench_guest()
      unsafe guest.descriptor = areas.descriptor.assumingMemoryBound(to: UInt8.self)
      unsafe guest.driver = areas.driver.assumingMemoryBound(to: UInt8.self)
      unsafe guest.device = areas.device.assumingMemoryBound(to: UInt8.self)
      unsafe guest.buffers = buffers.assumingMemoryBound(to: UInt8.self)
      unsafe guest.buffers_address = region.guestAddress + UInt64(index * Self.ringBytes + Self.buffersOffset)
      unsafe guest.size = UInt32(Self.size)
      unsafe guest.frame_bytes = UInt32(frameBytes)
      unsafe guest.is_packed = isPacked
      unsafe guest.is_receiver = index == 1
      unsafe guest.wrap = true
      unsafe (guests + index).initialize(to: guest)
      unsafe cbench_guest_begin(guests + index)
    }
  }

  deinit {
    unsafe storage.deallocate()
    unsafe guests.deallocate()
  }

  func areas(_ index: Int) -> VirtqueueAreas {
    let start = unsafe storage + index * Self.ringBytes
    return unsafe VirtqueueAreas(
      size: Self.size, descriptor: start, driver: start + Self.driverOffset, device: start + Self.deviceOffset)
  }

  /// Both drivers take back what came and offer it again.
  @inline(__always)
  func turn() {
    unsafe cbench_guest_turn(guests, UInt32(batchFrames))
    unsafe cbench_guest_turn(guests + 1, UInt32(batchFrames))
  }

  var isRight: Bool {
    unsafe guests[0].wrong == 0 && guests[1].wrong == 0 && guests[1].frames > Self.size
  }
}

/// The device's side.
private struct Device<Queue: Virtqueue & ~Copyable>: ~Copyable {
  var from: Queue
  var to: Queue
  var fromSingles = VirtioSingles()
  var toSingles = VirtioSingles()
  let memory: GuestMemory.Reference
  var calls = 0

  init(_ scene: VirtqueueScene) {
    let base = scene.isPacked ? VirtqueueScene.base : 0
    do {
      from = try Queue(scene.areas(0), features: [], base: base)
      to = try Queue(scene.areas(1), features: [], base: base)
    } catch { preconditionFailure("no queue: \(error)") }
    memory = scene.memory.reference
  }

  /// How many frames crossed.
  @inline(__always)
  mutating func turn() -> Int {
    _ = from.take(memory, upTo: batchFrames, into: &fromSingles)
    _ = to.take(memory, upTo: fromSingles.count, into: &toSingles)
    let count = toSingles.count
    if count < fromSingles.count { from.giveBack(last: fromSingles.count - count) }
    for index in 0..<count {
      let source = fromSingles[index]
      let target = toSingles[index]
      precondition(target.bytes >= source.bytes)
      unsafe target.place.copyMemory(from: source.place, byteCount: Int(source.bytes))
      from.complete(source.token, writtenBytes: 0)
      to.complete(target.token, writtenBytes: Int(source.bytes))
    }
    from.publish(memory)
    to.publish(memory)
    if from.mustCall() { calls += 1 }
    if to.mustCall() { calls += 1 }
    return count
  }
}

@inline(__always)
private func alone<Queue: Virtqueue & ~Copyable>(
  _: Queue.Type, _ scene: VirtqueueScene, _ table: Table, _ name: String
) {
  var device = Device<Queue>(scene)
  let items = table.items(3_000_000)
  let allocations = cbench_allocations()
  var nanoseconds: UInt64 = 0
  var done = 0
  while done < items {
    let start = Report.now()
    done += device.turn()
    nanoseconds += Report.now() - start
    scene.turn()
  }
  table.add(name, Double(nanoseconds) / Double(done), allocations: cbench_allocations() - allocations)
}

@inline(__always)
private func beside<Queue: Virtqueue & SendableMetatype & ~Copyable>(
  _: Queue.Type, _ scene: VirtqueueScene, _ table: Table, _ name: String, _ cpus: [Int]
) {
  let items = table.items(3_000_000)
  let isOver = Flag()
  let parcel = Parcel(Device<Queue>(scene))
  let guests = BenchmarkThread(cpu: cpus[0]) { while !isOver.isSet { scene.turn() } }
  let switching = BenchmarkThread(cpu: cpus[1]) {
    var device = parcel.open()
    let allocations = cbench_allocations()
    let start = Report.now()
    var done = 0
    while done < items { done += device.turn() }
    isOver.nanoseconds = Double(Report.now() - start) / Double(done)
    isOver.allocations = cbench_allocations() - allocations
    isOver.set()
    parcel.close(device)
  }
  switching.join()
  guests.join()
  scene.turn()
  table.add(name, isOver.nanoseconds, allocations: isOver.allocations)
}

/// That a run is over, and what it gave.
private final class Flag: @unchecked Sendable {
  private let value = Atomic<Bool>(false)
  var nanoseconds = 0.0
  var allocations: UInt64 = 0
  var isSet: Bool { value.load(ordering: .acquiring) }
  func set() { value.store(true, ordering: .releasing) }
}
