import Glibc
import Testing

@testable import Datapath
@testable import SimulatedKernel

extension Bench {
  /// What came of sends since the last look.
  struct Look: Equatable {
    /// Inner frames that arrived by the link.
    var frames: [[UInt8]] = []
    var trains = 0
    var trainFrames = 0
    var refusals = 0
  }

  /// Sends what waits, sees that all of it went or was dropped, by name and with its slot, and looks.
  mutating func settleAndLook(_ egress: InterfaceIndex = link, nowSeconds: UInt32 = 1) -> Look {
    func counts() -> [Int] { [Counter.trains, .trainFrames, .trainRefusals].map { Int(others[0].value($0)) } }
    let before = counts()
    arrived = []
    settle(nowSeconds: nowSeconds)
    let (isAllBack, sumsHold) = (isAllBack, holds(egress))
    #expect(isAllBack && sumsHold && network.violations.isEmpty)
    let news = zip(counts(), before).map { $0 - $1 }
    return Look(
      frames: arrived.map { Array($0.bytes.dropFirst(8)) }, trains: news[0], trainFrames: news[1], refusals: news[2])
  }
}

/// Trains on a link whose kernel refuses them.
@Suite struct TrainRefusalTests {
  @Test(
    "a refused train goes datagram by datagram, in order, and for some time none so long is made",
    arguments: [EMSGSIZE, EINVAL, EIO, EOPNOTSUPP])
  func refused(error: Int32) throws {
    var bench = try Bench()
    let made = try MadeSuperFrame(payloadBytes: 20_000, segmentBytes: 1_000)
    bench.network.faults.refusedTrain = 1
    bench.network.faults.trainErrors = [error]
    bench.transmit(made, to: Bench.link)
    var look = bench.settleAndLook(nowSeconds: 10)
    #expect(look == Bench.Look(frames: made.segments, refusals: 1))
    // EMSGSIZE may be about an earlier datagram: such a train is tried twice.
    #expect(bench.network.counts.trainsRefused == (error == EMSGSIZE ? 2 : 1))

    bench.network.faults.refusedTrain = 0
    bench.transmit(made, to: Bench.link)
    look = bench.settleAndLook(nowSeconds: 12)
    #expect(look == Bench.Look(frames: made.segments), "no train after 2 s")

    let shorter = try MadeSuperFrame(payloadBytes: 20_000, segmentBytes: 999)
    bench.transmit(shorter, to: Bench.link)
    look = bench.settleAndLook(nowSeconds: 12)
    #expect(look == Bench.Look(frames: shorter.segments, trains: 1, trainFrames: 21), "shorter ones make one")

    bench.transmit(made, to: Bench.link)
    look = bench.settleAndLook(nowSeconds: 13)
    #expect(look == Bench.Look(frames: made.segments, trains: 1, trainFrames: 20), "a train again after 3 s")
  }

  @Test("a kernel that takes 64 datagrams of a train gets no more than these, after one refusal")
  func tooLong() throws {
    var bench = try Bench(trainFramesMax: 64)
    let made = try MadeSuperFrame(payloadBytes: 20_000, segmentBytes: 200)
    #expect(made.count == 100)
    for round in 0..<3 {
      bench.transmit(made, to: Bench.link)
      let look = bench.settleAndLook()
      #expect(
        look == Bench.Look(frames: made.segments, trains: 2, trainFrames: 100, refusals: round == 0 ? 1 : 0))
    }
    #expect(bench.network.counts.trainsTooLong == 1)
  }

  @Test("datagrams that a kernel refuses by themselves too are dropped by name")
  func tooBigEach() throws {
    var bench = try Bench()
    let made = try MadeSuperFrame(payloadBytes: 10_000, segmentBytes: 1_000)
    bench.network.faults.tooBigSend = 1
    bench.transmit(made, to: Bench.link)
    let look = bench.settleAndLook()
    #expect(look == Bench.Look(refusals: 1))
    let dropped = bench.value(Bench.link, .dropTooBig)
    #expect(dropped == 10)
  }
}

/// Runs of frames that came in one train.
@Suite struct RunTests {
  @Test(
    "a run goes to a link as a train, to a port as one super-frame, though other frames lie between",
    arguments: [1, 2, 5])
  func whole(stepDatagrams: Int) throws {
    let made = try MadeSuperFrame(payloadBytes: 10_300, segmentBytes: 1_000)
    var bench = try Bench(mtuBytes: 1_500)
    bench.transmit(run: made.segments, to: Bench.link, stepDatagrams: stepDatagrams)
    var look = bench.settleAndLook()
    #expect(look == Bench.Look(frames: made.segments, trains: 1, trainFrames: 11))

    bench = try Bench(mtuBytes: 1_500)
    bench.transmit(run: made.segments, to: Bench.port, stepDatagrams: stepDatagrams)
    look = bench.settleAndLook(Bench.port)
    #expect(look == Bench.Look())
    let written = bench.network.takeWritten(device: bench.device)
    #expect(written.count == 1 && written.first?.frame.count == made.bytes.count)
    let payload = written.first?.frame.dropFirst(made.headerBytes)
    #expect(payload == made.bytes.dropFirst(made.headerBytes))
    let offered = bench.value(Bench.port, .offeredFrames)
    #expect(offered == 11)
  }

  @Test(
    "of a run that is too long for its egress the last frame goes where it fits", arguments: [Bench.port, Bench.link])
  func tooLong(_ egress: InterfaceIndex) throws {
    for (lastBytes, fits) in [(400, true), (1_000, false)] {
      var bench = try Bench(mtuBytes: 600)
      let made = try MadeSuperFrame(payloadBytes: 3_000 + lastBytes, segmentBytes: 1_000)
      bench.transmit(run: made.segments, to: egress)
      let look = bench.settleAndLook(egress)
      let written = bench.network.takeWritten(device: bench.device).map(\.frame)
      #expect(look.frames + written == (fits ? [made.segments[3]] : []))
      let (offered, dropped) = (bench.value(egress, .offeredFrames), bench.value(egress, .dropTooBig))
      #expect(offered == 4 && dropped == (fits ? 3 : 4))
    }
  }
}
