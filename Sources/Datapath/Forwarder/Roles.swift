/// Which stages a worker runs. In the fused layout each worker has all three; in the pipeline layout the stages of one
/// CPU form one worker, and rings join the workers.
public struct Roles: OptionSet, BitwiseCopyable, Hashable, Sendable {
  public let rawValue: UInt8
  public init(rawValue: UInt8) { self.rawValue = rawValue }

  public static let receive = Roles(rawValue: 1)
  public static let route = Roles(rawValue: 2)
  public static let transmit = Roles(rawValue: 4)
  public static let all: Roles = [.receive, .route, .transmit]

  /// The workers, by number, that may get what `worker` received; empty where it does not receive.
  public static func routers(ofReceiver worker: Int, among workers: [Roles]) -> [Int] {
    next(.receive, .route, worker, workers)
  }

  /// The workers, by number, that may get what `worker` routed; empty where it does not route.
  public static func transmitters(ofRouter worker: Int, among workers: [Roles]) -> [Int] {
    next(.route, .transmit, worker, workers)
  }

  /// Itself, if it has the next stage too; else every worker that has the next stage and not this one. So frames go
  /// from who receives to who routes but does not receive, and from there to who sends but does not route: a drain goes
  /// the same way.
  private static func next(_ stage: Roles, _ following: Roles, _ worker: Int, _ workers: [Roles]) -> [Int] {
    guard workers[worker].contains(stage) else { return [] }
    if workers[worker].contains(following) { return [worker] }
    return workers.indices.filter { workers[$0].contains(following) && !workers[$0].contains(stage) }
  }
}

extension Roles: CustomStringConvertible {
  /// The stages by the names that the configuration has for them, such as `rx+route`.
  public var description: String {
    let names: [(role: Roles, name: String)] = [(.receive, "rx"), (.route, "route"), (.transmit, "tx")]
    return names.filter { contains($0.role) }.map(\.name).joined(separator: "+")
  }
}
