import Datapath

/// Which workers there are, on which CPUs, which stages each runs, and who hands frames to whom: pure.
///
/// A worker is named by its place in `workers`.
struct WorkerSet: Equatable, Sendable {
  struct Member: Equatable, Sendable {
    var cpu: Int
    var roles: Roles
  }

  var workers: [Member]

  /// One worker on each CPU, with all stages.
  init(fusedOn cpus: [Int]) {
    workers = cpus.map { Member(cpu: $0, roles: .all) }
  }

  /// The stages that have a CPU in common form one worker there. Receivers come first.
  init(receive: [Int], route: [Int], transmit: [Int]) {
    workers = []
    for (role, cpus) in [(Roles.receive, receive), (.route, route), (.transmit, transmit)] {
      for cpu in cpus {
        if let known = workers.firstIndex(where: { $0.cpu == cpu }) {
          workers[known].roles.insert(role)
        } else {
          workers.append(Member(cpu: cpu, roles: role))
        }
      }
    }
  }

  // MARK: Who hands to whom

  private func having(_ role: Roles) -> [Int] { workers.indices.filter { workers[$0].roles.contains(role) } }

  var roles: [Roles] { workers.map(\.roles) }
  var receivers: [Int] { having(.receive) }
  var routers: [Int] { having(.route) }
  var transmitters: [Int] { having(.transmit) }

  /// The workers that route what a receiver takes: itself alone, or others over a ring each.
  func routers(ofReceiver receiver: Int) -> [Int] { Roles.routers(ofReceiver: receiver, among: roles) }

  /// The workers that send what a router routes, by the same rule.
  func transmitters(ofRouter router: Int) -> [Int] { Roles.transmitters(ofRouter: router, among: roles) }

  /// Whether no worker hands anything to another.
  var isFused: Bool { workers.allSatisfy { $0.roles == .all } }

  /// The stages that would never get a frame, as `(worker, role)`: their CPUs would only cost power.
  var idleStages: [(worker: Int, role: Roles)] {
    let fedRouters = Set(receivers.flatMap { routers(ofReceiver: $0) })
    let fedTransmitters = Set(fedRouters.flatMap { transmitters(ofRouter: $0) })
    return routers.filter { !fedRouters.contains($0) }.map { ($0, .route) }
      + transmitters.filter { !fedTransmitters.contains($0) }.map { ($0, .transmit) }
  }

  /// The stages whose frames would have nowhere to go, as `(worker, role, next)`.
  var deadEnds: [(worker: Int, role: Roles, next: Roles)] {
    receivers.filter { routers(ofReceiver: $0).isEmpty }.map { ($0, .receive, .route) }
      + routers.filter { transmitters(ofRouter: $0).isEmpty }.map { ($0, .route, .transmit) }
  }

  /// The workers with several stages, in words: `route and tx share CPU 1`.
  var sharedCPUs: [String] {
    workers.filter { $0.roles.rawValue.nonzeroBitCount > 1 }
      .map { "\($0.roles == .all ? "all stages" : $0.roles.words) share CPU \($0.cpu)" }
  }
}

// MARK: - The choice

extension WorkerSet {
  /// The fewest CPUs with which `auto` takes a pipeline: one for each stage, and one for all else.
  static let pipelineCPUsMin = 4

  /// The workers of a configuration, and how they came to be.
  struct Choice: Equatable, Sendable {
    var workers: WorkerSet
    /// Why this layout and these CPUs, for the log.
    var why: String
    /// What is probably not meant.
    var warnings: [String] = []

    /// `fused` where no worker hands anything to another, whatever was asked for.
    var layout: Configuration.Layout { workers.isFused ? .fused : .pipeline }
  }

  /// What `layout = "auto"` takes where CPUs are `auto` too: a pipeline costs a wake-up at each hop between sleeping
  /// stages, and none while they poll; below the least of CPUs the stages would only take turns with each other and
  /// with the rest of the host.
  static func chooseLayout(
    _ dispatch: Configuration.Dispatch, allowedCount: Int
  ) -> (layout: Configuration.Layout, why: String) {
    if dispatch != .vmmDriven {
      return (.fused, "dispatch is \(dispatch.rawValue), and a pipeline pays a wake-up at each hop unless it polls")
    }
    if allowedCount < pipelineCPUsMin {
      return (.fused, "a pipeline needs \(pipelineCPUsMin) CPUs, and \(allowedCount) may be used")
    }
    return (.pipeline, "dispatch is vmm-driven and \(allowedCount) CPUs may be used")
  }

  /// The workers of a configuration whose CPUs and layout fit together.
  ///
  /// CPUs are chosen from the last of the allowed ones: the kernel's housekeeping is on the first.
  /// - Parameters:
  ///   - queuesMax: the queues of the port with the most of them.
  ///   - servesGuests: whether there is a vhost-user port: the rings that guests receive by have one worker, which
  ///     sends.
  ///   - allowed: the CPUs that this process may use, ascending; where none is known, the first.
  static func choose(
    layout: Configuration.Layout, cpus: Configuration.CPUs, dispatch: Configuration.Dispatch, queuesMax: Int,
    servesGuests: Bool, allowed: [Int]
  ) -> Choice {
    let allowed = allowed.isEmpty ? [0] : allowed
    switch cpus {
    case .list(let cpus):
      return Choice(workers: WorkerSet(fusedOn: cpus), why: "as asked")
    case .stages(let receive, let route, let transmit):
      let workers = WorkerSet(receive: receive, route: route, transmit: transmit)
      return Choice(
        workers: workers, why: "as asked",
        warnings: workers.sharedCPUs.map { "\($0): they take turns there, as in layout fused" })
    case .auto:
      let (chosen, why) =
        layout == .auto ? chooseLayout(dispatch, allowedCount: allowed.count) : (layout, "as asked")
      return chosen == .pipeline
        ? choosePipeline(why, allowed)
        : chooseFused(why, queuesMax: queuesMax, servesGuests: servesGuests, allowed)
    }
  }

  private static func chooseFused(
    _ why: String, queuesMax: Int, servesGuests: Bool, _ allowed: [Int]
  ) -> Choice {
    if servesGuests, queuesMax > 1 {
      return Choice(
        workers: WorkerSet(fusedOn: [allowed[allowed.count - 1]]),
        why: "\(why); one worker: vhost-user ports are sent to by one")
    }
    let count = max(1, min(queuesMax, allowed.count))
    let number = count == 1 ? "one worker: no port has several queues" : "one worker for each of \(count) queues"
    return Choice(
      workers: WorkerSet(fusedOn: Array(allowed.suffix(count))),
      why: "\(why); \(count == 1 && queuesMax > 1 ? "one worker: one CPU may be used" : number)")
  }

  private static func choosePipeline(_ why: String, _ allowed: [Int]) -> Choice {
    let last = Array(allowed.suffix(3))
    let workers =
      switch last.count {
      case 3: WorkerSet(receive: [last[0]], route: [last[1]], transmit: [last[2]])
      case 2: WorkerSet(receive: [last[0]], route: [last[0]], transmit: [last[1]])
      default: WorkerSet(receive: last, route: last, transmit: last)
      }
    let few = "\(allowed.count) CPU\(allowed.count == 1 ? "" : "s") may be used for 3 stages"
    return Choice(
      workers: workers, why: why,
      warnings: workers.sharedCPUs.map { "\(few): \($0), and take turns there, as in layout fused" })
  }
}

extension Roles {
  /// `rx and route`.
  fileprivate var words: String { description.split(separator: "+").joined(separator: " and ") }
}
