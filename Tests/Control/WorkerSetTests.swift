import Datapath
import Testing

@testable import Control

/// CPUs, the workers that they give, and who hands to whom.
struct StageCase: CustomTestStringConvertible, Sendable {
  var receive: [Int]
  var route: [Int]
  var transmit: [Int]
  /// CPU and stages of each worker.
  var workers: [String]
  /// For each receiver, as `worker: routers`.
  var routers: [Int: [Int]]
  /// For each router.
  var transmitters: [Int: [Int]]

  init(
    _ receive: [Int], _ route: [Int], _ transmit: [Int], _ workers: [String], _ routers: [Int: [Int]],
    _ transmitters: [Int: [Int]]
  ) {
    (self.receive, self.route, self.transmit) = (receive, route, transmit)
    (self.workers, self.routers, self.transmitters) = (workers, routers, transmitters)
  }

  var testDescription: String { "rx=\(receive) route=\(route) tx=\(transmit)" }
}

private func text(_ workers: WorkerSet) -> [String] { workers.workers.map { "\($0.cpu) \($0.roles)" } }

@Suite struct WorkerSetTests {
  static let cases = [
    StageCase([0], [1], [2], ["0 rx", "1 route", "2 tx"], [0: [1]], [1: [2]]),
    StageCase(
      [0, 1], [2], [3, 4], ["0 rx", "1 rx", "2 route", "3 tx", "4 tx"], [0: [2], 1: [2]], [2: [3, 4]]),
    StageCase(
      [0], [1, 2], [3], ["0 rx", "1 route", "2 route", "3 tx"], [0: [1, 2]], [1: [3], 2: [3]]),
    StageCase([0], [0], [1], ["0 rx+route", "1 tx"], [0: [0]], [0: [1]]),
    StageCase([0], [1], [1], ["0 rx", "1 route+tx"], [0: [1]], [1: [1]]),
    StageCase([0], [1], [0], ["0 rx+tx", "1 route"], [0: [1]], [1: [0]]),
    StageCase([3], [3], [3], ["3 rx+route+tx"], [0: [0]], [0: [0]]),
    StageCase([0, 1], [0, 1], [0, 1], ["0 rx+route+tx", "1 rx+route+tx"], [0: [0], 1: [1]], [0: [0], 1: [1]]),
    // A router that does not receive takes from the receiver that does not route.
    StageCase(
      [0, 1], [0, 2], [3], ["0 rx+route", "1 rx", "2 route", "3 tx"], [0: [0], 1: [2]], [0: [3], 2: [3]]),
    StageCase([0], [1], [0, 2], ["0 rx+tx", "1 route", "2 tx"], [0: [1]], [1: [0, 2]]),
    StageCase([0, 1], [2], [0, 1], ["0 rx+tx", "1 rx+tx", "2 route"], [0: [2], 1: [2]], [2: [0, 1]]),
  ]

  @Test(arguments: cases)
  func stagesOfOneCPUFormOneWorkerAndEachHandsToTheNext(_ given: StageCase) {
    let workers = WorkerSet(receive: given.receive, route: given.route, transmit: given.transmit)
    #expect(text(workers) == given.workers)
    #expect(workers.receivers == given.routers.keys.sorted())
    #expect(workers.routers == given.transmitters.keys.sorted())
    for (receiver, expected) in given.routers { #expect(workers.routers(ofReceiver: receiver) == expected) }
    for (router, expected) in given.transmitters { #expect(workers.transmitters(ofRouter: router) == expected) }
    #expect(workers.idleStages.isEmpty)
    #expect(workers.deadEnds.isEmpty)
  }

  @Test(arguments: [
    // A receiver without routing beside one that routes its own: nobody routes who does not receive.
    ([0, 1], [0], [2], ["1 rx to route"]),
    ([0], [1, 2], [1], ["2 route to tx"]),
  ])
  func aStageWhoseFramesHaveNowhereToGoIsFound(
    _ receive: [Int], _ route: [Int], _ transmit: [Int], _ expected: [String]
  ) {
    let workers = WorkerSet(receive: receive, route: route, transmit: transmit)
    #expect(workers.deadEnds.map { "\(workers.workers[$0.worker].cpu) \($0.role) to \($0.next)" } == expected)
  }

  @Test(arguments: [
    ([0], [1], [1, 2], ["2 tx"]),
    ([0], [0], [0, 1], ["1 tx"]),
    ([0], [0, 1], [0, 1], ["1 route", "1 tx"]),
  ])
  func aStageThatNobodyHandsFramesToIsFound(
    _ receive: [Int], _ route: [Int], _ transmit: [Int], _ expected: [String]
  ) {
    let workers = WorkerSet(receive: receive, route: route, transmit: transmit)
    #expect(workers.idleStages.map { "\(workers.workers[$0.worker].cpu) \($0.role)" } == expected)
  }

  @Test func everyFrameOfEveryReceiverHasAWayOutOrADeadEndIsTold() {
    let sets: [[Int]] = [[0], [1], [2], [0, 1], [1, 2], [0, 2], [0, 1, 2]]
    for receive in sets {
      for route in sets {
        for transmit in sets {
          let workers = WorkerSet(receive: receive, route: route, transmit: transmit)
          guard workers.deadEnds.isEmpty else { continue }
          for receiver in workers.receivers {
            let routers = workers.routers(ofReceiver: receiver)
            #expect(!routers.isEmpty && routers.allSatisfy { workers.workers[$0].roles.contains(.route) })
            for router in routers {
              let transmitters = workers.transmitters(ofRouter: router)
              #expect(!transmitters.isEmpty)
              #expect(transmitters.allSatisfy { workers.workers[$0].roles.contains(.transmit) })
            }
          }
        }
      }
    }
  }

  private func choose(
    _ layout: Configuration.Layout, _ dispatch: Configuration.Dispatch = .adaptive, queues: Int = 1,
    guests: Bool = false,
    on allowed: [Int]
  ) -> WorkerSet.Choice {
    WorkerSet.choose(
      layout: layout, cpus: .auto, dispatch: dispatch, queuesMax: queues, servesGuests: guests, allowed: allowed)
  }

  @Test func autoTakesAPipelineOnlyWhereItPollsAndThereAreCPUsForItAndSaysWhy() {
    for dispatch in Configuration.Dispatch.allCases {
      for count in 1...8 {
        let choice = choose(.auto, dispatch, on: Array(0..<count))
        let isPipeline = dispatch == .vmmDriven && count >= 4
        #expect(choice.layout == (isPipeline ? .pipeline : .fused), "\(dispatch), \(count) CPUs")
        #expect(choice.warnings.isEmpty)
      }
    }
    #expect(choose(.auto, .vmmDriven, on: [0, 1, 2, 3]).why == "dispatch is vmm-driven and 4 CPUs may be used")
    #expect(
      choose(.auto, .vmmDriven, on: [0, 1]).why
        == "a pipeline needs 4 CPUs, and 2 may be used; one worker: no port has several queues")
    #expect(
      choose(.auto, .adaptive, queues: 2, on: [0, 1]).why
        == "dispatch is adaptive, and a pipeline pays a wake-up at each hop unless it polls; one worker for each of 2 "
        + "queues")
    #expect(choose(.fused, queues: 2, on: [1]).why == "as asked; one worker: one CPU may be used")
  }

  @Test func aPipelineTakesTheLastCPUsAndPutsStagesTogetherWhereThereAreFewer() {
    #expect(text(choose(.pipeline, on: Array(0..<8)).workers) == ["5 rx", "6 route", "7 tx"])
    #expect(text(choose(.pipeline, on: [1, 4, 9]).workers) == ["1 rx", "4 route", "9 tx"])
    let two = choose(.pipeline, on: [2, 3])
    #expect(text(two.workers) == ["2 rx+route", "3 tx"])
    #expect(two.layout == .pipeline)
    let one = choose(.pipeline, on: [6])
    #expect(text(one.workers) == ["6 rx+route+tx"])
    #expect(one.layout == .fused)
  }

  @Test func aFusedLayoutTakesAsManyOfTheLastCPUsAsQueuesCanUse() {
    #expect(text(choose(.fused, on: [0, 1, 2, 3]).workers) == ["3 rx+route+tx"])
    #expect(text(choose(.fused, queues: 2, on: [0, 1, 2, 3]).workers) == ["2 rx+route+tx", "3 rx+route+tx"])
    #expect(text(choose(.fused, queues: 4, on: [0, 1]).workers) == ["0 rx+route+tx", "1 rx+route+tx"])
  }

  @Test func withAVhostUserPortAutoTakesASetInWhichOneWorkerSendsAndSaysWhy() {
    for dispatch in Configuration.Dispatch.allCases {
      for layout in Configuration.Layout.allCases {
        for count in 1...6 {
          let choice = choose(layout, dispatch, queues: 4, guests: true, on: Array(0..<count))
          #expect(choice.workers.transmitters.count == 1, "\(layout), \(dispatch), \(count) CPUs")
        }
      }
    }
    let fused = choose(.auto, queues: 2, guests: true, on: [0, 1])
    #expect(text(fused.workers) == ["1 rx+route+tx"])
    #expect(fused.why.hasSuffix("; one worker: vhost-user ports are sent to by one"))
  }

  @Test func theCPUsThatWereAskedForAreTaken() {
    let list = WorkerSet.choose(
      layout: .auto, cpus: .list([3, 1]), dispatch: .vmmDriven, queuesMax: 1, servesGuests: false,
      allowed: Array(0..<8))
    #expect(text(list.workers) == ["3 rx+route+tx", "1 rx+route+tx"])
    #expect(list.layout == .fused)
    let stages = WorkerSet.choose(
      layout: .auto, cpus: .stages(receive: [0], route: [1], transmit: [2]), dispatch: .adaptive, queuesMax: 1,
      servesGuests: false,
      allowed: Array(0..<8))
    #expect(text(stages.workers) == ["0 rx", "1 route", "2 tx"])
    #expect(stages.layout == .pipeline)
    #expect(stages.why == "as asked")
  }

  @Test func aSetOfCPUsIsReadAndWrittenInTheKernelsForm() {
    #expect(cpus(ofKernelList: "0-2,5,7-8\n") == [0, 1, 2, 5, 7, 8])
    #expect(cpus(ofKernelList: "0\n") == [0])
    #expect(cpus(ofKernelList: "\n") == [])
    for text in ["2-1", "0-", "-1", "x", "0-1-2", "99999"] { #expect(cpus(ofKernelList: text) == nil, "\(text)") }
    #expect(kernelList(ofCPUs: [0, 1, 2, 5, 7, 8]) == "0-2,5,7-8")
    #expect(kernelList(ofCPUs: []) == "")
  }
}
