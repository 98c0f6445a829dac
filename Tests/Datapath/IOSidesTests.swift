import CLinux
import Glibc
import Testing

@testable import Datapath

/// What a worker may trust in, on each real side, on the real kernel.
@Suite struct IOSidesTests {
  @Test(
    "a chain of datagrams arrives whole, in order, each with its sender and its ToS",
    arguments: IOSide.usable, ["127.0.0.1", "::1"])
  func datagrams(_ side: IOSide, _ address: String) throws {
    struct Scenario: IOScenario {
      let path: DatagramPath
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        bench.post(64)
        bench.open(0, .vxlan, path.receiver)
        bench.io.openLane(1, path.lane, descriptor: path.sender)
        let payloads = numbered(40)
        bench.send(1, path.lane, payloads, typeOfService: 0xB9)
        let all = bench.collect { events in
          events.contains { $0.kind == .sent } && events.count { $0.kind == .received } == 40
        }
        let sent = try #require(all.first { $0.kind == .sent })
        #expect(sent.index == 1 && sent.count == 40 && sent.error == 0)
        let received = all.filter { $0.kind == .received }
        #expect(received.allSatisfy { $0.index == 0 && $0.sender == path.address && $0.typeOfService == 0xB9 })
        #expect(received.allSatisfy { !$0.isTruncated && $0.vlanTag == 0 })
        var bytes: [[UInt8]] = []
        for event in received { bytes.append(bench.take(event)) }
        #expect(bytes == payloads)
        bench.forgetChains()
        bench.io.closeLane(1)
        bench.close(0)
        let free = bench.memory.freeSlots
        #expect(free == 128)
      }
    }
    guard let path = try? DatagramPath(address) else {
      // A machine without IPv6 has nothing to show here; IPv4's loopback is everywhere.
      #expect(address != "127.0.0.1")
      return
    }
    defer { path.close() }
    try side.run(Scenario(path: path))
  }

  @Test("a datagram of 65,507 bytes fits a slot", arguments: IOSide.usable)
  func longestDatagram(_ side: IOSide) throws {
    struct Scenario: IOScenario {
      let path: DatagramPath
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        bench.post(4)
        bench.open(0, .vnetp, path.receiver)
        let payload = (0..<65_507).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ $0 >> 8) }
        path.sendPlainly(payload)
        let received = bench.collect(1, .received)
        let event = try #require(received.first)
        #expect(!event.isTruncated)
        let bytes = bench.take(event)
        #expect(bytes == payload)
        bench.close(0)
      }
    }
    let path = try DatagramPath()
    defer { path.close() }
    try side.run(Scenario(path: path))
  }

  @Test(
    "a source that finds no slot ends with ENOBUFS, and loses nothing when it is armed again", arguments: IOSide.usable)
  func starved(_ side: IOSide) throws {
    struct Scenario: IOScenario {
      let path: DatagramPath
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        bench.post(2)
        bench.open(0, .vxlan, path.receiver)
        let payloads = numbered(5)
        for payload in payloads { path.sendPlainly(payload) }
        let all = bench.collect { events in events.contains { $0.kind == .receiveEnded } }
        let ended = try #require(all.last)
        #expect(ended.kind == .receiveEnded && ended.error == ENOBUFS)
        var bytes: [[UInt8]] = []
        for event in all where event.kind == .received { bytes.append(bench.take(event)) }
        #expect(bytes.count == 2)
        // It ended once, and says nothing more.
        let silence = bench.collectRest()
        #expect(silence.isEmpty)
        bench.post(8)
        bench.io.arm(0, &bench.memory)
        for event in bench.collect(3, .received) { bytes.append(bench.take(event)) }
        #expect(bytes == payloads)
        bench.close(0)
      }
    }
    let path = try DatagramPath()
    defer { path.close() }
    try side.run(Scenario(path: path))
  }

  @Test("a cancelled source ends with ECANCELED and takes no more; its slots come back", arguments: IOSide.usable)
  func cancelled(_ side: IOSide) throws {
    struct Scenario: IOScenario {
      let path: DatagramPath
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        bench.post(8)
        bench.open(2, .vxlan, path.receiver)
        path.sendPlainly([1, 2, 3])
        let received = bench.collect(1, .received)
        #expect(received.count == 1)
        for event in received { _ = bench.take(event) }
        bench.io.cancel(2)
        let ended = bench.collect(1, .receiveEnded)
        #expect(ended.first?.error == ECANCELED && ended.first?.index == 2)
        path.sendPlainly([4])
        let silence = bench.collectRest()
        #expect(silence.isEmpty)
        bench.io.closeSource(2)
        bench.io.takeBackSlots(&bench.memory)
        let free = bench.memory.freeSlots
        #expect(free == 128)
      }
    }
    let path = try DatagramPath()
    defer { path.close() }
    try side.run(Scenario(path: path))
  }

  @Test("a chain stops at the first frame that fails, and what follows is not sent", arguments: IOSide.usable)
  func chainStops(_ side: IOSide) throws {
    struct Scenario: IOScenario {
      let path: DatagramPath
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        bench.post(16)
        bench.open(0, .vxlan, path.receiver)
        bench.io.openLane(0, path.lane, descriptor: path.sender)
        var payloads = numbered(6)
        // Over the longest datagram of IPv4 (65,507 bytes).
        payloads[3] = [UInt8](repeating: 3, count: 65_520)
        bench.send(0, path.lane, payloads)
        let sent = bench.collect { events in
          events.contains { $0.kind == .sent } && events.count { $0.kind == .received } == 3
        }
        let end = try #require(sent.first { $0.kind == .sent })
        #expect(end.count == 3 && end.error == EMSGSIZE)
        let rest = bench.collectRest()
        #expect(rest.isEmpty)
        var bytes: [[UInt8]] = []
        for event in sent where event.kind == .received { bytes.append(bench.take(event)) }
        #expect(bytes == Array(payloads[0..<3]))
        bench.forgetChains()
        bench.io.closeLane(0)
        bench.close(0)
      }
    }
    let path = try DatagramPath()
    defer { path.close() }
    try side.run(Scenario(path: path))
  }

  @Test(
    "a full lane says EAGAIN and then, once, that it takes frames again", arguments: IOSide.usable,
    [LaneKind.tap, .datagramIPv4])
  func fullLane(_ side: IOSide, _ kind: LaneKind) throws {
    struct Scenario: IOScenario {
      let kind: LaneKind
      let pair: MessagePair
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        bench.io.openLane(3, kind, descriptor: pair.ours)
        let payloads = numbered(64, bytes: 1_000)
        bench.send(3, kind, payloads)
        let sent = bench.collect(1, .sent)
        let end = try #require(sent.first)
        #expect(end.error == EAGAIN && end.count > 0 && end.count < 64)
        bench.forgetChains()
        for _ in 0..<2 {
          bench.io.awaitWritable(3)
          let tooEarly = bench.collectRest()
          #expect(tooEarly.isEmpty)
          let arrived = pair.drain()
          #expect(arrived.count > 0)
          let writable = bench.collectRest()
          #expect(writable.count == 1)
          #expect(writable.first?.kind == .writable && writable.first?.index == 3 && writable.first?.error == 0)
          bench.send(3, kind, payloads)
          let full = bench.collect(1, .sent)
          #expect(full.first?.error == EAGAIN)
          bench.forgetChains()
        }
        // A lane that is closed while it waits is silent.
        bench.io.awaitWritable(3)
        _ = bench.collectRest()
        bench.io.closeLane(3)
        _ = pair.drain()
        let silence = bench.collectRest()
        #expect(silence.isEmpty)
      }
    }
    let pair = MessagePair()
    defer { pair.close() }
    try side.run(Scenario(kind: kind, pair: pair))
  }

  @Test("one descriptor is a source and two lanes at once, as a TAP queue is", arguments: IOSide.usable)
  func sharedDescriptor(_ side: IOSide) throws {
    struct Scenario: IOScenario {
      let pair: MessagePair
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        bench.post(16)
        bench.open(0, .tap, pair.ours)
        for lane in 0..<2 {
          bench.io.openLane(lane, .tap, descriptor: pair.ours)
          bench.send(lane, .tap, numbered(50, bytes: 1_000))
          let full = bench.collect(1, .sent)
          #expect(full.first?.error == EAGAIN)
          bench.io.awaitWritable(lane)
        }
        pair.give([7, 7])
        let received = bench.collect(1, .received)
        #expect(received.first?.index == 0 && received.first?.length == 2)
        for event in received { _ = bench.take(event) }
        _ = pair.drain()
        let writable = bench.collect(2, .writable)
        #expect(Set(writable.map(\.index)) == [0, 1])
        bench.forgetChains()
        bench.io.closeLane(0)
        bench.io.closeLane(1)
        pair.give([8])
        let again = bench.collect(1, .received)
        #expect(again.count == 1)
        for event in again { _ = bench.take(event) }
        bench.close(0)
      }
    }
    let pair = MessagePair()
    defer { pair.close() }
    try side.run(Scenario(pair: pair))
  }

  @Test("however often it is woken, a worker hears of it once for each time that it listens", arguments: IOSide.usable)
  func waker(_ side: IOSide) throws {
    struct Scenario: IOScenario {
      let waker: Int32
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        bench.open(1, .waker, waker)
        let nothing = bench.collect(.sweep)
        #expect(nothing.isEmpty)
        for _ in 0..<5 { bench.io.wake(waker) }
        let woken = bench.collectRest()
        #expect(woken.count == 1 && woken.first?.kind == .woken && woken.first?.index == 1)
        bench.io.wake(waker)
        let deaf = bench.collectRest()
        #expect(deaf.isEmpty)
        bench.io.arm(1, &bench.memory)
        let again = bench.collect(.forEvent)
        #expect(again.map(\.kind) == [.woken])
        bench.io.arm(1, &bench.memory)
        bench.close(1)
      }
    }
    let waker = try Waker.make()
    defer { close(waker) }
    try side.run(Scenario(waker: waker))
  }

  @Test("a batch is waited for until it is full", arguments: IOSide.usable)
  func batch(_ side: IOSide) throws {
    struct Scenario: IOScenario {
      let path: DatagramPath
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        bench.post(16)
        bench.open(0, .vxlan, path.receiver)
        for payload in numbered(4) { path.sendPlainly(payload) }
        // Far longer than a test may take: it returns because four came. A multishot counts once for all that it
        // brings at once, so what is asked for may be less than what comes.
        let received = bench.collect(.forBatch(completions: 1, nanoseconds: 60_000_000_000))
        #expect(!received.isEmpty)
        for event in received { _ = bench.take(event) }
        let left = 4 - received.count
        for event in bench.collect(left, .received) { _ = bench.take(event) }
        let none = bench.collect(.forBatch(completions: 3, nanoseconds: 3_000_000))
        #expect(none.isEmpty)
        bench.close(0)
      }
    }
    let path = try DatagramPath()
    defer { path.close() }
    try side.run(Scenario(path: path))
  }

  @Test("a descriptor that is none ends its source, and fails its lane", arguments: IOSide.usable)
  func badDescriptor(_ side: IOSide) throws {
    struct Scenario: IOScenario {
      let descriptor: Int32
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        bench.post(4)
        bench.open(0, .tap, descriptor)
        let ended = bench.collect(1, .receiveEnded)
        #expect(ended.first?.error == EBADF)
        bench.io.closeSource(0)
        bench.io.openLane(0, .packet, descriptor: descriptor)
        bench.send(0, .packet, numbered(2))
        let sent = bench.collect(1, .sent)
        #expect(sent.first?.error == EBADF && sent.first?.count == 0)
        bench.forgetChains()
        bench.io.closeLane(0)
      }
    }
    // A number that no descriptor can have (fs.nr_open is at most 2,147,483,584).
    try side.run(Scenario(descriptor: .max))
  }

  @Test("where there is room for few events, none is lost and no source is left out", arguments: IOSide.usable)
  func fairness(_ side: IOSide) throws {
    struct Scenario: IOScenario {
      let paths: [DatagramPath]
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        bench.post(100)
        for (source, path) in paths.enumerated() { bench.open(source, .vxlan, path.receiver) }
        for payload in numbered(30) {
          for path in paths { path.sendPlainly(payload) }
        }
        var seen: [[[UInt8]]] = [[], []]
        for _ in 0..<200 where seen[0].count + seen[1].count < 60 {
          let events = bench.collect(.atMost(nanoseconds: 10_000_000))
          #expect(events.count <= 8)
          for event in events where event.kind == .received { seen[Int(event.index)].append(bench.take(event)) }
        }
        #expect(seen == [numbered(30), numbered(30)])
        bench.close(0, 1)
      }
    }
    let paths = [try DatagramPath(), try DatagramPath()]
    defer { for path in paths { path.close() } }
    try side.run(Scenario(paths: paths), eventRoom: 8)
  }

  @Test("a flooded source leaves others their turn, with system calls")
  func turns() throws {
    struct Scenario: IOScenario {
      let paths: [DatagramPath]
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        bench.post(100)
        for (source, path) in paths.enumerated() { bench.open(source, .vxlan, path.receiver) }
        for payload in numbered(40) {
          for path in paths { path.sendPlainly(payload) }
        }
        // Each turn has room for eight: in two turns both must have had one.
        var seen: Set<UInt32> = []
        for _ in 0..<2 {
          for event in bench.collect(.sweep) where event.kind == .received {
            seen.insert(event.index)
            _ = bench.take(event)
          }
        }
        #expect(seen == [0, 1])
        for event in bench.collect(64, .received) { _ = bench.take(event) }
        bench.close(0, 1)
      }
    }
    let paths = [try DatagramPath(), try DatagramPath()]
    defer { for path in paths { path.close() } }
    try IOSide.systemCalls.run(Scenario(paths: paths), eventRoom: 8)
  }

  @Test("a lane that is closed before it was told that it is writable is not told later, with system calls")
  func closedBeforeTold() throws {
    struct Scenario: IOScenario {
      let pairs: [MessagePair]
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        for (lane, pair) in pairs.enumerated() {
          bench.io.openLane(lane, .datagramIPv4, descriptor: pair.ours)
          bench.send(lane, .datagramIPv4, numbered(50, bytes: 1_000))
          _ = bench.collect(1, .sent)
          bench.io.awaitWritable(lane)
        }
        for pair in pairs { _ = pair.drain() }
        // Both are writable, and there is room for one event.
        let first = bench.collect(1, .writable)
        #expect(first.count == 1)
        let told = Int(first.first?.index ?? 0)
        bench.io.closeLane(1 - told)
        let silence = bench.collectRest()
        #expect(silence.isEmpty)
        bench.forgetChains()
        bench.io.closeLane(told)
      }
    }
    let pairs = [MessagePair(), MessagePair()]
    defer { for pair in pairs { pair.close() } }
    try IOSide.systemCalls.run(Scenario(pairs: pairs), eventRoom: 1)
  }

  @Test("a source that ended keeps no worker awake, whatever comes to it", arguments: IOSide.usable)
  func endedSourceIsQuiet(_ side: IOSide) throws {
    struct Scenario: IOScenario {
      let path: DatagramPath
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        bench.open(0, .vxlan, path.receiver)
        path.sendPlainly([1])
        let ended = bench.collect(1, .receiveEnded)
        #expect(ended.first?.error == ENOBUFS)
        path.sendPlainly([2])
        _ = bench.collectRest()
        // A wait may be cut short (EINTR) where this thread had a ring before, whose end is still being worked at; with
        // something that keeps it awake none would last.
        var longest: UInt64 = 0
        for _ in 0..<10 {
          let start = bench.io.now()
          let silence = bench.collect(.atMost(nanoseconds: 5_000_000))
          #expect(silence.isEmpty)
          longest = max(longest, bench.io.now() - start)
        }
        #expect(longest >= 4_000_000)
        bench.io.closeSource(0)
      }
    }
    let path = try DatagramPath()
    defer { path.close() }
    try side.run(Scenario(path: path))
  }

  @Test("system calls and frames are counted, and a call that waited as a sleep")
  func statistics() throws {
    struct Scenario: IOScenario {
      let path: DatagramPath
      func run(_ bench: inout IOBench<some WorkerIO & ~Copyable>) throws {
        bench.post(64)
        bench.open(0, .vxlan, path.receiver)
        bench.io.openLane(0, path.lane, descriptor: path.sender)
        _ = bench.io.takeStatistics()
        bench.send(0, path.lane, numbered(32))
        let sending = bench.io.takeStatistics()
        #expect(sending.enters == 1 && sending.completions == 32)
        for event in bench.collect(32, .received) { _ = bench.take(event) }
        let receiving = bench.io.takeStatistics()
        #expect(receiving.completions == 32 && receiving.enters < 32)
        let sleepsBefore = receiving.sleeps
        #expect(sleepsBefore == 0)
        _ = bench.collect(.atMost(nanoseconds: 1_000))
        let waiting = bench.io.takeStatistics()
        #expect(waiting.sleeps == 1 && waiting.enters == 1 && waiting.completions == 0)
        bench.forgetChains()
        bench.io.closeLane(0)
        bench.close(0)
      }
    }
    let path = try DatagramPath()
    defer { path.close() }
    try IOSide.systemCalls.run(Scenario(path: path))
  }
}
