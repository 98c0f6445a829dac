import CLinux
import Glibc

/// A worker on a pinned thread of its own, and the end of its mailbox that control holds.
///
/// Ring and worker are made on that thread, so the ring has its one submitter; the memory is touched there first, so
/// its pages are near that core.
/// Control's side is used by one thread.
public final class WorkerThread: @unchecked Sendable {
  public enum IOChoice: Sendable {
    /// io_uring, or system calls where it is forbidden.
    case auto
    case uring, syscalls
  }

  public struct Plan: Sendable {
    public var number: Int
    /// The CPU to stay on.
    public var cpu: Int
    public var worker = WorkerSettings()
    public var ringEntries = 512
    public var slots = Wiring.Settings.slotsByDefault
    /// Send operations of a worker at least: the segments of 64 slots of super-frames, and as many that wait.
    public static let operationsMin = 2 * TransmitStage.laneFramesMax
    public var without: UringFeatures = []
    public var io = IOChoice.auto

    public init(number: Int, cpu: Int) {
      self.number = number
      self.cpu = cpu
    }
  }

  public let plan: Plan
  public let counters: CounterBlock
  public let underlayCounters: CounterBlock

  private let mailbox: Mailbox
  private var commands: SPSCRing<Command>.Producer
  private var reports: SPSCRing<Report>.Consumer
  /// Kept alive here until the worker has adopted it.
  private let firstSnapshot: Snapshot
  private var joints: Joints?
  private var memory: FrameMemory?
  private var thread = pthread_t()
  /// Whether there is a thread to join.
  public private(set) var isStarted = false

  /// - Parameter controlWaker: the eventfd that a report wakes control by.
  public init(_ plan: Plan, controlWaker: Int32, snapshot: Snapshot) throws(SystemError) {
    self.plan = plan
    let mailbox = try Mailbox(
      controlWaker: controlWaker,
      messagesMax: plan.worker.sources + plan.worker.lanes + plan.worker.interfaces + plan.worker.domains)
    self.mailbox = mailbox
    commands = mailbox.commands.makeProducer()
    reports = mailbox.reports.makeConsumer()
    firstSnapshot = snapshot
    counters = CounterBlock()
    underlayCounters = CounterBlock()
  }

  /// The eventfd that wakes the worker.
  public var waker: Int32 { mailbox.workerWaker }

  /// Starts the thread. Its first report is `.started` or `.couldNotStart`.
  /// - Parameters:
  ///   - joints: what joins it with its neighbours.
  ///   - memory: of the same wiring.
  public func start(joints: consuming Joints, memory: consuming FrameMemory) throws(SystemError) {
    self.joints = consume joints
    self.memory = consume memory
    let context = unsafe Unmanaged.passRetained(self).toOpaque()
    let error = unsafe pthread_create(
      &thread, nil,
      { context in
        let own = unsafe Unmanaged<WorkerThread>.fromOpaque(context!).takeRetainedValue()
        own.main()
        return nil
      }, context)
    guard error == 0 else {
      unsafe Unmanaged<WorkerThread>.fromOpaque(context).release()
      throw SystemError(error, doing: "start the thread of worker \(plan.number)")
    }
    isStarted = true
  }

  /// Waits for the thread to end, after `.stopped` or `.couldNotStart`.
  public func join() { pthread_join(thread, nil) }

  /// Sends a command; wakes the worker unless more follow at once.
  /// - Returns: false when the mailbox is full: the worker hangs.
  @discardableResult
  public func send(_ command: Command, wakes: Bool = true) -> Bool {
    let isSent = commands.push(command)
    if wakes { Waker.wake(mailbox.workerWaker) }
    return isSent
  }

  /// Wakes the worker for commands that were sent without.
  public func wake() { Waker.wake(mailbox.workerWaker) }

  /// The next report, if there is one.
  public func nextReport() -> Report? { reports.pop() }

  // MARK: On the worker's thread

  private func main() {
    unsafe clinux_set_thread_name("vnetr-worker-\(plan.number)")
    let pinned = ProcessorSet([plan.cpu]).pinThisThread()
    guard pinned == 0 else { return fail(pinned) }
    var joints: Joints?
    var memory: FrameMemory?
    swap(&joints, &self.joints)
    swap(&memory, &self.memory)
    guard let joints, let memory else { preconditionFailure("a worker's thread starts once") }
    let limits = IOLimits(
      entries: plan.ringEntries, slots: memory.slotCount, posted: plan.worker.postedSlots, sources: plan.worker.sources,
      lanes: plan.worker.lanes, operations: plan.worker.operations)
    var whyNot: Int32 = 0
    if plan.io != .syscalls {
      do throws(SystemError) {
        let io = try UringIO(limits, without: plan.without)
        var settings = plan.worker
        // One receive at a time takes a slot for each source before anything has come.
        if !io.features.contains(.bufferRing) { settings.postedSlots += settings.sources }
        let side = IOSide.uring(features: io.features.rawValue)
        return run(io, side, settings, joints, memory)
      } catch {
        guard plan.io == .auto else { return fail(error.number) }
        whyNot = error.number
      }
    }
    do throws(SystemError) {
      run(try SyscallIO(limits), .syscalls(because: whyNot), plan.worker, joints, memory)
    } catch {
      fail(error.number)
    }
  }

  private func run<IO: WorkerIO & ~Copyable>(
    _ io: consuming IO, _ side: IOSide, _ settings: WorkerSettings, _ joints: consuming Joints,
    _ memory: consuming FrameMemory
  ) {
    let started = Report.started(side, hasHugePages: memory.hasHugePages)
    var worker = Worker(
      io: io, memory: memory, joints: joints, mailbox: mailbox, settings: settings, view: firstSnapshot.view,
      workerCounters: counters.writer, underlayCounters: underlayCounters.writer)
    worker.report(started)
    worker.run()
  }

  /// No worker was made, so this thread has the report ring for itself.
  private func fail(_ error: Int32) {
    var reports = mailbox.reports.makeProducer()
    _ = reports.push(.couldNotStart(error: error))
    Waker.wake(mailbox.controlWaker)
  }
}

/// A set of CPUs by their numbers.
public struct ProcessorSet: Sendable {
  private var words: [UInt]

  public init(_ cpus: [Int]) {
    words = [UInt](repeating: 0, count: Int(CLINUX_CPU_WORDS))
    for cpu in cpus where cpu >= 0 && cpu < words.count * 64 { words[cpu / 64] |= 1 << UInt(cpu % 64) }
  }

  /// The CPUs that the calling thread may use (the cgroup's included), ascending.
  public static func allowed() -> [Int] {
    var set = ProcessorSet([])
    guard unsafe clinux_get_affinity(&set.words) > 0 else { return [] }
    return set.cpus
  }

  public var cpus: [Int] {
    (0..<words.count * 64).filter { words[$0 / 64] >> UInt($0 % 64) & 1 == 1 }
  }

  /// Keeps the calling thread on these CPUs; returns 0 or the error number (EINVAL: none of them may be used).
  public func pinThisThread() -> Int32 {
    unsafe clinux_set_affinity(words) == 0 ? 0 : errno
  }
}
