import Datapath

extension Draft {
  /// nil where something was reported.
  mutating func makeTuning(_ environment: ConfigurationEnvironment) -> Configuration.Tuning? {
    if let upper = tuning.integer("dispatch_upper_fps"), let lower = tuning.integer("dispatch_lower_fps"), lower > upper
    {
      reader.report(
        tuning.place(of: "dispatch_lower_fps"), "\(lower) is above dispatch_upper_fps, which is \(upper)",
        "use at most \(upper)")
    }
    let cpus = makeCPUs(environment)
    guard let cpus, let layout = choice("layout", Configuration.Layout.self),
      let dispatch = choice("dispatch", Configuration.Dispatch.self),
      let yield = choice("yield", Configuration.Yield.self),
      let io = choice("io", Configuration.IO.self),
      let hugePages = choice("huge_pages", Configuration.HugePages.self),
      let without = tuning.strings("without"),
      let ringEntries = tuning.integer("ring_entries"),
      let batchFrames = tuning.integer("batch_frames"),
      let batchWait = tuning.integer("batch_wait_us"),
      let spin = tuning.integer("spin_us"),
      let slots = tuning.integer("slots"),
      let ringBatch = tuning.integer("ring_batch_frames"),
      let sendBuffer = tuning.integer("send_buffer_bytes"),
      let receiveBuffer = tuning.integer("receive_buffer_bytes"),
      let upper = tuning.integer("dispatch_upper_fps"),
      let lower = tuning.integer("dispatch_lower_fps"),
      let period = tuning.integer("dispatch_period_ms"),
      let sourcePorts = tuning.integer("source_ports"),
      let gso = tuning.boolean("gso"),
      let gro = tuning.boolean("gro")
    else { return nil }
    return Configuration.Tuning(
      layout: layout, cpus: cpus, dispatch: dispatch, yield: yield, io: io, ringEntries: ringEntries,
      batchFrames: batchFrames, batchWaitMicroseconds: batchWait, spinMicroseconds: spin, slots: slots,
      ringDepthFrames: tuning.integer("ring_depth_frames"), ringBatchFrames: ringBatch,
      sendBufferBytes: sendBuffer, receiveBufferBytes: receiveBuffer, dispatchUpperFramesPerSecond: upper,
      dispatchLowerFramesPerSecond: lower, dispatchPeriodMilliseconds: period, sourcePorts: sourcePorts,
      gso: gso, gro: gro,
      hugePages: hugePages,
      without: UringFeatures(UringFeatures.names.filter { without.contains($0.name) }.map(\.feature)))
  }

  private func choice<Words: RawRepresentable<String>>(_ key: String, _ type: Words.Type) -> Words? {
    tuning.string(key).flatMap(Words.init(rawValue:))
  }

  /// nil where something was reported.
  private mutating func makeCPUs(_ environment: ConfigurationEnvironment) -> Configuration.CPUs? {
    guard let text = tuning.string("cpus") else { return nil }
    let place = tuning.place(of: "cpus")
    let cpus: Configuration.CPUs
    do throws(Configuration.CPUs.Objection) {
      cpus = try Configuration.CPUs(text)
    } catch {
      reader.report(place, error.problem, error.remedy)
      return nil
    }
    let layout = choice("layout", Configuration.Layout.self) ?? .auto
    switch (cpus, layout) {
    case (.stages, .fused):
      reader.report(
        place, "CPUs by stage do not go with layout = \"fused\", in which each worker runs all stages",
        "list them, such as \"\(cpus.all.map(String.init).joined(separator: ","))\", or use layout = \"pipeline\"")
      return nil
    case (.list(let list), .pipeline):
      reader.report(
        place, "a plain list does not say which stage is where, as layout = \"pipeline\" needs",
        "name the stages, such as \"\(Self.stagesExample(list))\", or use layout = \"fused\"")
      return nil
    default: break
    }
    let allowed = environment.cpusAllowed()
    guard checkUsable(cpus.all, allowed: allowed, online: environment.cpusOnline(), at: place) else { return nil }
    if case .stages(let receive, let route, let transmit) = cpus {
      let workers = WorkerSet(receive: receive, route: route, transmit: transmit)
      for (worker, role, next) in workers.deadEnds {
        reader.report(
          place,
          "\(role) on CPU \(workers.workers[worker].cpu) would have nobody to hand frames to: each CPU that runs "
            + "\(next) runs \(role) too, and is busy with its own",
          "give \(next) a CPU without \(role), or run \(next) on that CPU too")
      }
      for (worker, role) in workers.deadEnds.isEmpty ? workers.idleStages : [] {
        let before = role == .route ? Roles.receive : .route
        reader.report(
          place,
          "\(role) on CPU \(workers.workers[worker].cpu) would get no frames: each CPU that runs \(before) runs "
            + "\(role) too, and keeps its frames",
          "take that CPU out of \(role), or give \(before) a CPU without \(role)")
      }
    }
    checkGuests(cpus, at: place)
    if let dispatch = choice("dispatch", Configuration.Dispatch.self) {
      // The queues decide how many workers a fused layout has, which is never a reason to warn.
      let choice = WorkerSet.choose(
        layout: layout, cpus: cpus, dispatch: dispatch, queuesMax: 1, servesGuests: servesGuests,
        allowed: allowed)
      // What was written: the CPUs, or the layout that wants more of them than there are.
      let cause = cpus == .auto ? tuning.place(of: "layout") : place
      for warning in choice.warnings {
        reader.warn(cause, warning, "give each stage CPUs of its own, or use layout = \"fused\"")
      }
    }
    return cpus
  }

  /// Whether there is a vhost-user port.
  private var servesGuests: Bool { ports.contains { $0.string("kind") == Configuration.PortKind.vhostUser.rawValue } }

  /// A ring in a guest's memory has one producer, so what a guest receives by is one worker's.
  private mutating func checkGuests(_ cpus: Configuration.CPUs, at place: Place) {
    guard servesGuests else { return }
    let what = "a vhost-user port is sent to by one worker, and here"
    switch cpus {
    case .list(let list) where list.count > 1:
      reader.report(
        place, "\(what) \(list.count) would send",
        "use one CPU, such as \"\(list[0])\", or one that sends, such as "
          + "\"rx=\(list[0]) route=\(list[0]) tx=\(list[1])\"")
    case .stages(_, _, let transmit) where transmit.count > 1:
      reader.report(place, "\(what) \(transmit.count) would send", "use one CPU for tx, such as tx=\(transmit[0])")
    default: break
    }
  }

  /// A form by stage of a plain list: the stages share its CPUs where there are too few.
  private static func stagesExample(_ cpus: [Int]) -> String {
    let names = Configuration.CPUs.stageNames
    return names.indices.map { "\(names[$0])=\(cpus[min($0, cpus.count - 1)])" }.joined(separator: " ")
  }

  /// Whether workers can be pinned to all of these.
  private mutating func checkUsable(_ cpus: [Int], allowed: [Int], online: [Int]?, at place: Place) -> Bool {
    func numbers(_ cpus: [Int]) -> String { "CPU \(cpus.map(String.init).joined(separator: ", "))" }
    let remedy = "use some of \(kernelList(ofCPUs: allowed)), or \"auto\""
    let absent = cpus.filter { online?.contains($0) == false }
    let forbidden = cpus.filter { !absent.contains($0) && !allowed.contains($0) && !allowed.isEmpty }
    if let online, !absent.isEmpty {
      reader.report(
        place, "\(numbers(absent)): not on this machine, or offline: it runs \(kernelList(ofCPUs: online))",
        remedy)
    }
    if !forbidden.isEmpty {
      reader.report(
        place,
        "\(numbers(forbidden)): not for this process: its affinity or its cgroup's cpuset has "
          + kernelList(ofCPUs: allowed),
        "\(remedy), or let it use more (taskset, AllowedCPUs= of the unit, the container's cpuset)")
    }
    return absent.isEmpty && forbidden.isEmpty
  }
}
