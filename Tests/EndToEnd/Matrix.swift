import Testing

extension EndToEnd {
  /// Whatever is chosen, guests' traffic passes, in order, and every frame is accounted for.
  @Suite(needsForwarder)
  struct Matrix {
    struct Combination: CustomTestStringConvertible {
      var encapsulation: String
      var layout: String
      var dispatch: String
      var io: String
      var cpus: String

      var testDescription: String { "\(encapsulation), \(layout) (\(cpus)), \(dispatch), \(io)" }
      var flags: [String] {
        ["--layout", layout, "--cpus", cpus, "--dispatch", dispatch, "--io", io]
      }

      /// How a pipeline can lie on the CPUs that there are: a CPU of two stages has one worker for both.
      static let pipelines: [String] = {
        let cpus = cpusAllowed
        guard cpus.count > 1 else { return ["rx=\(cpus[0]) route=\(cpus[0]) tx=\(cpus[0])"] }
        let (a, b) = (cpus[0], cpus[1])
        let shared = ["rx=\(a) route=\(a) tx=\(b)", "rx=\(a) route=\(b) tx=\(b)", "rx=\(a) route=\(b) tx=\(a)"]
        return cpus.count > 2 ? ["rx=\(a) route=\(b) tx=\(cpus[2])"] + shared : shared
      }()

      static let all = ["vxlan", "vnetp"].flatMap { encapsulation in
        ["fused", "pipeline"].flatMap { layout in
          ["guest-driven", "vmm-driven", "adaptive"].flatMap { dispatch in
            ["uring", "syscalls"].map { io in
              Combination(
                encapsulation: encapsulation, layout: layout, dispatch: dispatch, io: io,
                cpus: layout == "fused" ? "\(cpusAllowed[cpusAllowed.count - 1])" : pipelines[0])
            }
          }
        }
      }

      static let placements = pipelines.dropFirst().flatMap { cpus in
        ["uring", "syscalls"].map { io in
          Combination(encapsulation: "vxlan", layout: "pipeline", dispatch: "adaptive", io: io, cpus: cpus)
        }
      }
    }

    /// Two hosts with a guest each, by files: every choice is made in the same way.
    private func nodes(_ lab: Lab, _ combination: Combination, queues: Int = 1) throws -> [Node] {
      let hosts = try lab.hosts(2)
      return try hosts.map { host in
        let configuration = NodeConfiguration(
          host, among: hosts, ports: [.init(name: "vm1", queues: queues)], encapsulation: combination.encapsulation)
        return try lab.node(host, configuration, guests: [host.index + 1], flags: combination.flags)
      }
    }

    private func expectTraffic(_ nodes: [Node]) throws {
      let (a, b) = (nodes[0].guests[0], nodes[1].guests[0])
      #expect(try a.ping(b).isComplete)
      #expect(try a.carriesStream(to: b))
      #expect(try b.carriesStream(to: a))
      let flows = try OrderedFlows(from: a, to: b, flows: 6, payloadBytes: 1000)
      try flows.run(datagramsPerFlow: 200)
      #expect(flows.disorder == [])
      #expect(flows.silentFlows == [])
      #expect(try a.sendNumbered(200, to: b) == Array(0..<200))
      #expect(try b.sendNumbered(200, to: a) == Array(0..<200))
      #expect(try b.checksumErrors() == [:])
      for node in nodes { try expectConservation(node.forwarder.counters()) }
      try stopAll(nodes)
    }

    @Test("each combination carries ping, TCP and UDP, in order", arguments: Combination.all)
    func combination(_ combination: Combination) throws {
      try withLab { lab in try expectTraffic(nodes(lab, combination)) }
    }

    @Test("a pipeline carries the same wherever its stages lie", arguments: Combination.placements)
    func placement(_ combination: Combination) throws {
      try withLab { lab in try expectTraffic(nodes(lab, combination)) }
    }

    @Test(
      "a pipeline with several receivers, over a device with as many queues, keeps the order of every flow",
      .enabled(if: cpusAllowed.count > 2, "needs three CPUs"), arguments: ["uring", "syscalls"])
    func severalReceivers(io: String) throws {
      try withLab { lab in
        let (a, b, c) = (cpusAllowed[0], cpusAllowed[1], cpusAllowed[2])
        let combination = Combination(
          encapsulation: "vxlan", layout: "pipeline", dispatch: "adaptive", io: io,
          cpus: "rx=\(a),\(b) route=\(c) tx=\(c)")
        let nodes = try nodes(lab, combination, queues: 2)
        let flows = try OrderedFlows(from: nodes[0].guests[0], to: nodes[1].guests[0], flows: 32)
        try flows.run(datagramsPerFlow: 500)
        #expect(flows.disorder == [])
        #expect(flows.silentFlows == [])
        try stopAll(nodes)
      }
    }
  }
}
