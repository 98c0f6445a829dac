import CLinux
import Control
import Datapath
import Glibc

/// What a frontend says by a vhost-user socket: messages one behind the other, each with a byte before it of what goes
/// with it. Bits 0 to 3: how many descriptors; bits 4 and 5: of which kind they are; bit 6: workers answer only before
/// the next message; bit 7: the connection ends before this message, and this is the first of the next one.
///
/// A header that makes no sense ends the connection, as it does on the socket.
public func fuzzMessages(_ input: RawSpan) {
  var traces = FuzzTraces()
  converse(input, &traces)
  precondition(traces.areGone, "a descriptor or a mapping outlives the connection that brought it")
}

private func converse(_ input: RawSpan, _ traces: inout FuzzTraces) {
  var place = 0
  var service = FuzzService()
  while place + 1 + VhostUserHeader.byteCount <= input.byteCount {
    let choices = byte(place, of: input)
    place += 1
    service.answer()
    if choices & 0x80 != 0 { service.end() }
    guard
      let header = try? VhostUserHeader(
        bytes: bytes(of: input.extracting(place..<place + VhostUserHeader.byteCount)))
    else { break }
    place += VhostUserHeader.byteCount
    let end = min(place + header.payloadBytes, input.byteCount)
    var payload = bytes(of: input.extracting(place..<end))
    payload += [UInt8](repeating: 0, count: header.payloadBytes - payload.count)
    place = end
    let descriptors = (0..<Int(choices & 0xF)).map { _ in FuzzTraces.make(choices >> 4 & 3) }
    for descriptor in descriptors { traces.add(descriptor) }
    service.receive(header, payload, descriptors, &traces)
    if choices & 0x40 == 0 { service.answer() }
  }
  service.end()
}

/// The service with workers that do what they are told, and the promises of the backend.
private struct FuzzService {
  private var backend = VhostUserSession(.init(queuePairsMax: 2))
  private var running: Set<Int> = []
  private var toStop: [(queue: Int, kind: VhostUserQueueKind)] = []
  private var kinds: [Int: VhostUserQueueKind] = [:]
  private var version: UInt64 = 0

  mutating func receive(
    _ header: VhostUserHeader, _ payload: [UInt8], _ descriptors: [OwnedDescriptor], _ traces: inout FuzzTraces
  ) {
    let outcome = backend.receive(header, payload: payload, descriptors: descriptors)
    for reply in outcome.replies {
      precondition(reply.request == header.request, "a reply is to what was asked")
      if let descriptor = reply.descriptor { traces.add(descriptor) }
    }
    precondition(outcome.replies.count <= 1, "a message has at most one reply")
    precondition(!backend.isWaiting || outcome.replies.isEmpty, "there is no reply before it is due")
    carryOut(outcome.effects, &traces)
  }

  private mutating func carryOut(_ effects: [VhostUserEffect], _ traces: inout FuzzTraces) {
    for effect in effects {
      switch effect {
      case .startQueue(let start):
        precondition(running.insert(start.number).inserted, "a queue starts that runs")
        precondition(start.number < 4 && start.size > 0 && start.size <= VirtqueueAreas.sizeMax)
        check(start.rings, start, in: start.memory)
        if let inflight = start.inflight {
          precondition(inflight.part.upperBound <= inflight.memory.mapping.byteCount, "notes lie within their memory")
        }
        kinds[start.number] = start.kind
      case .stopQueue(let queue):
        precondition(running.contains(queue), "a queue is stopped that does not run")
        toStop.append((queue, kinds[queue]!))
      case .memoryChanged(let memory, let rings, let version):
        precondition(memory.regions.count <= VhostUserMemory.regionsMax)
        for region in memory.regions { traces.add(region.mapping) }
        precondition(Set(rings.keys) == running, "all that run are told where their rings are")
        note(version)
      case .featuresAgreed(_, let version), .logChanged(_, let version), .usedLogChanged(_, _, let version),
        .kickChanged(_, _, let version), .callChanged(_, _, let version), .errorChanged(_, _, let version):
        note(version)
      case .queueEnabled(let queue, _): precondition(running.contains(queue), "of a queue that runs")
      case .sendRARP(let address): precondition(!address.isMulticast && !address.isZero)
      case .mtuChanged(let bytes): precondition((68...65_535).contains(bytes))
      case .reset: precondition(running.isEmpty, "a reset is over when no queue runs")
      case .refused: break
      case .broken, .connected, .disconnected: preconditionFailure("the socket says this")
      }
    }
  }

  private mutating func note(_ version: UInt64) {
    precondition(version >= self.version, "versions only grow")
    self.version = version
  }

  /// Each part of a ring lies within the guest's memory.
  private func check(_ rings: VhostUserRings, _ start: VhostUserQueueStart, in memory: VhostUserMemory) {
    let features = VirtqueueFeatures(rawValue: start.features.rawValue)
    let bytes =
      start.kind == .split
      ? SplitQueue.areaBytes(size: start.size, features: features)
      : PackedQueue.areaBytes(size: start.size, features: features)
    let places = [
      (rings.descriptors, bytes.descriptor), (rings.available, bytes.driver), (rings.used, bytes.device),
    ]
    for (address, count) in places {
      let isThere = unsafe memory.pointer(guest: address, byteCount: count) != nil
      precondition(isThere, "a ring lies within the guest's memory")
    }
  }

  /// What workers have to say.
  mutating func answer() {
    var traces = FuzzTraces()
    while !toStop.isEmpty {
      let (queue, kind) = toStop.removeFirst()
      running.remove(queue)
      let base = VhostUserQueueBase(availableIndex: kind == .packed ? 0 : 7)
      carryOut(backend.queueStopped(queue, base: base).effects, &traces)
    }
    carryOut(backend.adopted(version: version).effects, &traces)
  }

  /// The connection is over, and the next one begins.
  mutating func end() {
    var traces = FuzzTraces()
    answer()
    carryOut(backend.end().effects, &traces)
    answer()
    precondition(backend.hasEnded && running.isEmpty, "a connection ends when all its queues have stopped")
    self = FuzzService()
  }
}

/// What must be gone at the end.
private struct FuzzTraces {
  private struct Trace {
    weak var what: AnyObject?
  }
  private var traces: [Trace] = []

  mutating func add(_ what: AnyObject) { traces.append(Trace(what: what)) }
  var areGone: Bool { traces.allSatisfy { $0.what == nil } }

  /// Bytes of a memory file: as many as rings of 64 places take.
  private static let fileBytes = 1 << 16

  static func make(_ kind: UInt8) -> OwnedDescriptor {
    switch kind {
    case 0, 1:
      let number = unsafe clinux_make_memory_file("vnetr-fuzz")
      let isMade = number >= 0 && ftruncate(number, kind == 0 ? fileBytes : 100) == 0
      precondition(isMade, "no memory file")
      return OwnedDescriptor(number)
    case 2: return OwnedDescriptor(eventfd(0, Int32(EFD_CLOEXEC)))
    default: return OwnedDescriptor(unsafe open("/dev/null", O_RDWR | O_CLOEXEC))
    }
  }
}
