import Glibc
import SimulatedKernel
import Testing

@testable import Datapath

/// A port whose frames lie in a guest's memory goes the same way through a worker as one that the kernel fills slots
/// for.
@Suite struct ForeignPortTests {
  /// One guest's memory: a frame in two pieces, of which the port copied the headers.
  @safe
  private final class FakePort {
    let memory = ForeignMemory(bufferCount: 4)
    let owner: Int
    private let page: UnsafeMutableRawPointer
    private let count: Int
    private let split = 100

    init(_ host: SimulatedHost, frame: [UInt8]) {
      owner = host.adopt(memory)
      count = frame.count
      unsafe page = .allocate(byteCount: frame.count, alignment: 64)
      unsafe page.copyMemory(from: frame, byteCount: frame.count)
    }
    deinit { unsafe page.deallocate() }

    /// The frame as buffer `index`, from the host's first port.
    func descriptor(_ index: Int) throws -> Descriptor {
      let pieces = unsafe [
        iovec(iov_base: page, iov_len: split), iovec(iov_base: page + split, iov_len: count - split),
      ]
      let segments = unsafe pieces.withUnsafeBufferPointer { pieces in
        unsafe memory.reference.bring(index, payload: pieces, headerBytes: 64)
      }
      var descriptor = Descriptor(
        buffer: BufferReference(owner: owner, index: index), offset: 0, length: count, segments: try #require(segments),
        ingress: InterfaceIndex(0))
      descriptor.domain = DomainIndex(0)
      return descriptor
    }

    /// The guest turns the frame's headers, which it still can write to, into nonsense.
    func rewriteHeaders() {
      for place in 0..<14 { unsafe page.storeBytes(of: 0xEE, toByteOffset: place, as: UInt8.self) }
    }
  }

  private func run(_ hosts: [SimulatedHost], until isDone: () -> Bool) throws {
    for _ in 0..<10_000 where !isDone() { for host in hosts { try host.turn() } }
  }

  @Test("a flood from a guest's memory gives the buffer back after its last send, with the bytes that were parsed")
  func floodReturnsTheBufferAfterItsLastSend() throws {
    var plan = SimulatedHost.Plan()
    plan.hosts = 3
    let network = SimulatedNetwork(seed: 7)
    let hosts = try (0..<plan.hosts).map { try SimulatedHost(network, plan, number: $0) }
    for _ in 0..<50 { for host in hosts { try host.turn() } }
    let frame = NumberedFrame(destination: NumberedFrame.broadcast, source: 0x02_0000_0000_0A, flow: 1, number: 0)
      .bytes(count: 300)
    let port = FakePort(hosts[0], frame: frame)

    hosts[0].bring(try port.descriptor(2))
    #expect(port.memory.reference.holds(2) == 2, "one hold for each link")
    #expect(port.memory.reference.takeReturned() == nil)
    port.rewriteHeaders()

    var written: [[[UInt8]]] = [[], []]
    try run(hosts) {
      for host in [1, 2] { written[host - 1] += network.takeWritten(device: hosts[host].devices[0]).map(\.frame) }
      return written.allSatisfy { !$0.isEmpty } && hosts[0].inFlight == 0
    }
    #expect(port.memory.reference.takeReturned() == 2)
    #expect(port.memory.reference.takeReturned() == nil, "returned once")
    for frames in written {
      #expect(frames.count == 1)
      #expect(frames.first == frame, "as it was when it was parsed")
    }
    for host in hosts { for audit in host.audits() { #expect(audit.holds, "\(audit)") } }
    #expect(network.violations.isEmpty)
  }

  @Test("with every fault of the kernel a guest's buffers all come back, each once", arguments: UInt64(1)...UInt64(50))
  func buffersComeBackUnderFaults(seed: UInt64) throws {
    var random = SimulatedRandom(seed: seed)
    var plan = SimulatedHost.Plan.mixture(&random)
    plan.roles = [.all]
    let network = SimulatedNetwork(seed: seed, faults: .mixture(&random))
    let hosts = try (0..<plan.hosts).map { try SimulatedHost(network, plan, number: $0) }
    let frame = NumberedFrame(destination: NumberedFrame.broadcast, source: 0x02_0000_0000_0A, flow: 1, number: 0)
      .bytes(count: 300)
    let port = FakePort(hosts[0], frame: frame)
    var isOut = [Bool](repeating: false, count: 4)
    func takeBack() {
      while let index = port.memory.reference.takeReturned() {
        #expect(isOut[index], "a buffer came back that was not out")
        isOut[index] = false
      }
    }
    for turn in 0..<400 {
      for host in hosts { try host.turn() }
      takeBack()
      let index = turn % 4
      guard !isOut[index] else { continue }
      isOut[index] = true
      hosts[0].bring(try port.descriptor(index))
    }
    try run(hosts) { hosts[0].inFlight == 0 }
    takeBack()
    #expect(!isOut.contains(true))
    for audit in hosts[0].audits() { #expect(audit.holds, "\(audit)") }
  }
}
