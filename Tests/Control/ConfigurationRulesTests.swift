import Datapath
import Testing

@testable import Control

/// A whole configuration of rules, VNET/P links, packet ports, a relay, a passthrough and a pipeline.
let soundRules = """
  [underlay]
  address = "10.99.0.1"

  [[domain]]
  name = "blue"
  vni = 42
  forwarding = "routes"

  [[domain]]
  name = "green"
  vni = 43
  flood_frames_per_second_max = 1000

  [[port]]
  name = "vm1"
  domain = "blue"
  mac = "02:00:00:00:00:0A"

  [[port]]
  name = "vm2"
  domain = "green"

  [[port]]
  name = "nic"
  kind = "packet"
  device = "eth1"

  [[port]]
  name = "vm3"

  [[link]]
  name = "to-b"
  remote = "10.99.0.2"
  encapsulation = "vnetp"
  domains = ["blue"]

  [[link]]
  name = "to-c"
  remote = "10.99.0.3"
  domains = ["green"]
  relay = true
  fragment = true

  [[route]]
  domain = "blue"
  source = "any"
  destination = "02:00:00:00:00:0a"
  to = "port:vm1"

  [[route]]
  domain = "blue"
  source = "02:00:00:00:00:0a"
  destination = "not-02:00:00:00:00:0a"
  from = "port:vm1"
  to = "link:to-b"

  [[passthrough]]
  a = "vm3"
  b = "nic"

  [tuning]
  layout = "pipeline"
  cpus = "rx=0,1 route=2 tx=3"
  slots = 512
  """

@Suite struct ConfigurationRulesTests {
  private let guest = MACAddress(bits: 0x0200_0000_000a)

  @Test func rulesLinksAndWiresHaveTypedValues() throws {
    let configuration = try Configuration.parse(soundRules, file: "f.toml", environment: fixedEnvironment())
    #expect(configuration.domains.map(\.forwarding) == [.routes, .learning])
    #expect(configuration.domains.map(\.floodFramesPerSecondMax) == [0, 1000])
    #expect(configuration.ports.map(\.kind) == [.tap, .tap, .packet, .tap])
    #expect(configuration.ports.map(\.domain) == ["blue", "green", nil, nil])
    #expect(configuration.ports.map(\.mac) == [guest, nil, nil, nil])
    #expect(configuration.links.map(\.encapsulation) == [.vnetp, .vxlan])
    #expect(configuration.links.map(\.remote.description) == ["10.99.0.2:9000", "10.99.0.3:4789"])
    #expect(configuration.links.map(\.isRelay) == [false, true])
    #expect(configuration.links.map(\.fragments) == [true, true])
    #expect(
      configuration.routes == [
        .init(domain: "blue", source: .any, destination: .exact(guest), from: nil, to: .port("vm1")),
        .init(domain: "blue", source: .exact(guest), destination: .not(guest), from: .port("vm1"), to: .link("to-b")),
      ])
    #expect(configuration.passthroughs == [.init(a: "vm3", b: "nic")])
    #expect(configuration.tuning.layout == .pipeline)
    #expect(configuration.tuning.cpus == .stages(receive: [0, 1], route: [2], transmit: [3]))
    #expect(configuration.tuning.ringDepthFrames == nil, "the forwarder decides")
    #expect(configuration.tuning.ringBatchFrames == 64)
    #expect(configuration.warnings.isEmpty)
    #expect(configuration.summary == "this-host: 2 domains, 4 ports, 2 links, 2 routes, 1 passthrough")
  }

  @Test func aVnetpLinkCarriesTheOnlyDomainAndFragmentsUnlessItSaysOtherwise() throws {
    func links(_ more: String) throws -> [Configuration.Link] {
      let text = least + "\n[[link]]\nname = \"l\"\nremote = \"10.0.0.2\"\n" + more
      let environment = fixedEnvironment(routes: ["10.0.0.2": "10.0.0.1"])
      return try Configuration.parse(text, file: "f.toml", environment: environment).links
    }
    #expect(try links("encapsulation = \"vnetp\"").map(\.domains) == [["blue"]])
    #expect(try links("encapsulation = \"vnetp\"").map(\.fragments) == [true])
    #expect(try links("encapsulation = \"vnetp\"\nfragment = false").map(\.fragments) == [false])
    #expect(try links("").map(\.fragments) == [false])
  }

  @Test func portsThatAreWiredTogetherNeedNoDomain() throws {
    let text = "[[port]]\nname = \"x\"\n[[port]]\nname = \"y\"\n[[passthrough]]\na = \"x\"\nb = \"y\"\n"
    let configuration = try Configuration.parse(text, file: "f.toml", environment: fixedEnvironment())
    #expect(configuration.domains.isEmpty)
    #expect(configuration.ports.map(\.domain) == [nil, nil])
    #expect(
      errors(text + "[[port]]\nname = \"z\"\n")
        == ["f.toml: domain: there is no [[domain]]; add one: without it nothing is forwarded"])
  }

  @Test func twoLinksOfDifferentEncapsulationToOneRemoteMayCarryDifferentDomains() {
    #expect(errors(soundRules.replacing("10.99.0.3", with: "10.99.0.2")).isEmpty)
  }

  @Test func aPortThatNoLinkUsesMayBeTheOtherEncapsulations() {
    #expect(errors(sound.replacing("[underlay]", with: "[underlay]\nvxlan_port = 9000")).isEmpty)
  }

  @Test func everyPairOfQualifiersIsARuleExactlyWhereTheTableOfScoresHasIt() {
    let patterns = ["02:00:00:00:00:01", "not-02:00:00:00:00:01", "any", "none"]
    let scored = [[true, true, true, true], [true, false, true, false], [true, true, true, false], []]
    for (row, source) in patterns.enumerated() {
      for (column, destination) in patterns.enumerated() {
        let text = soundRules.replacing(
          "source = \"any\"\ndestination = \"02:00:00:00:00:0a\"",
          with: "source = \"\(source)\"\ndestination = \"\(destination)\"")
        let isScored = column < scored[row].count && scored[row][column]
        #expect(errors(text).count == (isScored ? 0 : 1), "\(source), \(destination): \(errors(text))")
      }
    }
  }

  static let macRemedy =
    "use \"any\", \"none\", such as \"02:00:00:00:00:0a\", or \"not-02:00:00:00:00:0a\""

  static let routes = [
    Mistake(
      "domain = \"blue\"\nsource = \"any\"", "domain = \"blu\"\nsource = \"any\"",
      "route[0].domain: no domain is called \"blu\"; did you mean \"blue\"? (domains: blue, green)"),
    Mistake(
      "domain = \"blue\"\nsource = \"any\"", "source = \"any\"",
      "route[0].domain: it is missing, and there are 2 domains; set it to one of blue, green"),
    Mistake(
      "domain = \"blue\"\nsource = \"any\"", "domain = \"green\"\nsource = \"any\"",
      "route[0].domain: domain \"green\" has forwarding = \"learning\", which follows no rules; set its forwarding to "
        + "\"routes\", or leave the rule out"),
    Mistake(
      "source = \"any\"", "source = \"02:00:00:00:00\"",
      "route[0].source: \"02:00:00:00:00\" is no MAC pattern; \(macRemedy)"),
    Mistake("source = \"any\"", "source = \"Any\"", "route[0].source: \"Any\" is no MAC pattern; \(macRemedy)"),
    Mistake(
      "source = \"any\"", "source = \"ff:ff:ff:ff:ff:ff\"",
      "route[0].source: no frame comes from ff:ff:ff:ff:ff:ff, which is a group address; use a guest's address"),
    Mistake(
      "source = \"any\"", "source = \"none\"",
      "route[0].source: VNET/P has no rule with source none and destination exact; use an address, not-ADDRESS or any"),
    Mistake(
      "source = \"any\"\ndestination = \"02:00:00:00:00:0a\"", "source = \"any\"\ndestination = \"none\"",
      "route[0].destination: VNET/P has no rule with source any and destination none; with source any use an address, "
        + "not-ADDRESS or any"),
    Mistake(
      "source = \"02:00:00:00:00:0a\"", "source = \"not-02:00:00:00:00:0b\"",
      "route[1].destination: VNET/P has no rule with source not and destination not; with source not use an address or "
        + "any"),
    Mistake(
      "to = \"port:vm1\"", "to = \"port:vm\"",
      "route[0].to: no port is called \"vm\"; did you mean \"vm1\"? (ports: vm1, vm2, nic, vm3)"),
    Mistake(
      "to = \"port:vm1\"", "to = \"any\"",
      "route[0].to: \"any\" is no port or link; use \"port:NAME\" or \"link:NAME\""),
    Mistake(
      "to = \"port:vm1\"", "to = \"port:to-b\"", "route[0].to: \"to-b\" is a link; write \"link:to-b\""),
    Mistake(
      "to = \"port:vm1\"", "to = \"port:vm2\"",
      "route[0].to: port \"vm2\" is not in domain \"blue\": it is in \"green\"; name a port or link of that domain"),
    Mistake(
      "to = \"port:vm1\"", "to = \"port:nic\"",
      "route[0].to: port \"nic\" is not in domain \"blue\": it is in none; name a port or link of that domain"),
    Mistake(
      "to = \"port:vm1\"", "to = \"link:to-c\"",
      "route[0].to: link \"to-c\" does not carry domain \"blue\"; add it to link[1].domains, or name a port or link of "
        + "that domain"),
    Mistake(
      "from = \"port:vm1\"", "from = \"vm1\"",
      "route[1].from: \"vm1\" is no origin; use \"any\", \"port:NAME\" or \"link:NAME\""),
    Mistake(
      "from = \"port:vm1\"", "from = \"link:to-x\"",
      "route[1].from: no link is called \"to-x\"; did you mean \"to-b\"? (links: to-b, to-c)"),
    Mistake(
      "from = \"port:vm1\"", "from = \"port:vm2\"",
      "route[1].from: port \"vm2\" is not in domain \"blue\": it is in \"green\"; name a port or link of that domain"),
    Mistake(
      "to = \"port:vm1\"", "from = \"port:vm1\"\nto = \"port:vm1\"",
      "route[0].to: port:vm1 is where the frame came from, and none goes back there; name another port or link"),
    Mistake(
      "[[passthrough]]",
      "[[route]]\ndomain = \"blue\"\nsource = \"any\"\ndestination = \"02:00:00:00:00:0A\"\nto = \"port:vm1\"\n"
        + "[[passthrough]]",
      "route[2]: it is the same rule as route[0]; leave one of them out"),
    Mistake(
      "source = \"any\"\n", "",
      "route[0].source: it is missing; set it: Which source addresses: `any`, `02:00:00:00:00:0a`, or "
        + "`not-02:00:00:00:00:0a` for any but that one."),
  ]

  static let passthroughs = [
    Mistake(
      "b = \"nic\"", "b = \"nix\"",
      "passthrough[0].b: no port is called \"nix\"; did you mean \"nic\"? (ports: vm1, vm2, nic, vm3)"),
    Mistake(
      "b = \"nic\"", "b = \"to-b\"", "passthrough[0].b: \"to-b\" is a link; name a port: a link needs a domain"),
    Mistake(
      "device = \"eth1\"", "device = \"eth1\"\ndomain = \"green\"",
      "passthrough[0].b: \"nic\" is in domain \"green\" (port[2].domain); take the port's domain out, or the "
        + "passthrough: it is one or the other"),
    Mistake(
      "b = \"nic\"", "b = \"nic\"\n[[passthrough]]\na = \"nic\"\nb = \"vm4\"\n[[port]]\nname = \"vm4\"",
      "passthrough[1].a: \"nic\" is wired at passthrough[0].b already; name a port once: a passthrough has two ends"),
    Mistake(
      "name = \"vm3\"", "name = \"vm3\"\n[[port]]\nname = \"vm4\"",
      "port[4].domain: it is missing, and there are 2 domains; set it to one of blue, green"),
  ]

  static let links = [
    Mistake(
      "domains = [\"blue\"]", "domains = [\"blue\", \"green\"]",
      "link[0].domains: a vnetp link carries one domain, for its frames bear no VNI; name one domain, use a link for "
        + "each, or encapsulation = \"vxlan\""),
    Mistake(
      "domains = [\"blue\"]\n", "",
      "link[0].domains: it is missing, and a vnetp link carries one domain of the 2; set it to one of [\"blue\"], "
        + "[\"green\"]"),
    Mistake(
      "domains = [\"blue\"]", "domains = [\"blue\"]\nreserved_bits = \"ignore\"",
      "link[0].reserved_bits: a vnetp link has no header with reserved bits; leave it out"),
    Mistake(
      "\"10.99.0.3\"", "\"10.99.0.2:9001\"\nencapsulation = \"vnetp\"",
      "link[1].remote: 10.99.0.2 is the remote of link[0].remote too, and a vnetp link is known by its remote's "
        + "address alone; use one vnetp link for each address, or encapsulation = \"vxlan\""),
    Mistake(
      "\"10.99.0.3\"\ndomains = [\"green\"]", "\"10.99.0.2\"",
      "link[1].remote: 10.99.0.2 is the remote of link[0].remote too, and both carry domain \"blue\"; use one link, or "
        + "give the links different domains"),
    Mistake(
      "\"10.99.0.2\"", "\"10.99.0.1\"",
      "link[0].remote: 10.99.0.1:9000 is this node itself; use the other node's address"),
    Mistake(
      "[underlay]", "[underlay]\nvnetp_port = 4789",
      "underlay.vnetp_port: 4789 is vxlan_port too, and a datagram's port says how it is encapsulated; use another "
        + "port"),
    Mistake(
      "[underlay]", "[underlay]\nvxlan_port = 9000",
      "underlay.vxlan_port: 9000 is vnetp_port too, and a datagram's port says how it is encapsulated; use another "
        + "port"),
  ]

  static let ports = [
    Mistake(
      "\"02:00:00:00:00:0A\"", "\"02-00-00-00-00-0A\"",
      "port[0].mac: \"02-00-00-00-00-0A\" is no MAC address; use such as \"02:00:00:00:00:0a\""),
    Mistake(
      "\"02:00:00:00:00:0A\"", "\"03:00:00:00:00:0a\"",
      "port[0].mac: 03:00:00:00:00:0a is a group address; use the guest's own address"),
    Mistake(
      "\"02:00:00:00:00:0A\"", "\"00:00:00:00:00:00\"",
      "port[0].mac: 00:00:00:00:00:00 is nobody's address; use the guest's own address"),
    Mistake(
      "name = \"vm2\"", "name = \"vm2\"\nmac = \"02:00:00:00:00:0a\"",
      "port[1].mac: 02:00:00:00:00:0a is taken by port[0].mac; give each guest an address of its own"),
  ]

  private static let stagesRemedy = "give each stage its CPUs, such as \"rx=0 route=1 tx=2,3\", or use \"auto\""

  static let cpus = [
    Mistake(
      "layout = \"pipeline\"", "layout = \"fused\"",
      "tuning.cpus: CPUs by stage do not go with layout = \"fused\", in which each worker runs all stages; list them, "
        + "such as \"0,1,2,3\", or use layout = \"pipeline\""),
    Mistake(
      "\"rx=0,1 route=2 tx=3\"", "\"0,1\"",
      "tuning.cpus: a plain list does not say which stage is where, as layout = \"pipeline\" needs; name the stages, "
        + "such as \"rx=0 route=1 tx=1\", or use layout = \"fused\""),
    Mistake(
      "\"rx=0,1 route=2 tx=3\"", "\"rx=0 tx=3\"",
      "tuning.cpus: it has no CPU for route; give each stage at least one; stages may share CPUs: \"rx=0 route=0 "
        + "tx=1\""),
    Mistake(
      "\"rx=0,1 route=2 tx=3\"", "\"rx=0\"",
      "tuning.cpus: it has no CPU for route and tx; give each stage at least one; stages may share CPUs: \"rx=0 "
        + "route=0 tx=1\""),
    Mistake(
      "\"rx=0,1 route=2 tx=3\"", "\"rx=0 rx=1\"",
      "tuning.cpus: rx comes twice; name it once, with all its CPUs: rx=0,1"),
    Mistake(
      "\"rx=0,1 route=2 tx=3\"", "\"rx=0 rout=1 tx=2\"",
      "tuning.cpus: \"rout=1\" is no stage with its CPUs; \(stagesRemedy)"),
    Mistake(
      "\"rx=0,1 route=2 tx=3\"", "\"rx=0 1 tx=2\"",
      "tuning.cpus: \"1\" is no stage with its CPUs; \(stagesRemedy)"),
    Mistake(
      "\"rx=0,1 route=2 tx=3\"", "\"rx=0,0 route=1 tx=2\"",
      "tuning.cpus: CPU 0 comes twice; name it once for rx"),
    Mistake(
      "\"rx=0,1 route=2 tx=3\"", "\"rx= route=1 tx=2\"",
      "tuning.cpus: \"rx= route=1 tx=2\" is no list of CPUs; list numbers from 0 to 1023, such as \"0,1\" or \"rx=0 "
        + "route=1 tx=2\", or use \"auto\""),
    Mistake(
      "\"rx=0,1 route=2 tx=3\"", "\"rx=0 route=0,1 tx=1\"",
      "tuning.cpus: route on CPU 0 would have nobody to hand frames to: each CPU that runs tx runs route too, and is "
        + "busy with its own; give tx a CPU without route, or run tx on that CPU too"),
    Mistake(
      "\"rx=0,1 route=2 tx=3\"", "\"rx=0 route=1 tx=1,2\"",
      "tuning.cpus: tx on CPU 2 would get no frames: each CPU that runs route runs tx too, and keeps its frames; take "
        + "that CPU out of tx, or give route a CPU without tx"),
    Mistake(
      "\"rx=0,1 route=2 tx=3\"", "\"rx=0 route=9 tx=8\"",
      "tuning.cpus: CPU 8, 9: not on this machine, or offline: it runs 0-7; use some of 0-7, or \"auto\""),
  ]

  @Test(arguments: routes + passthroughs + links + ports + cpus)
  func oneMistakeGivesOneErrorWithItsKeyPathAndWhatWouldBeRight(_ mistake: Mistake) throws {
    let text = try #require(mistake.made(in: soundRules), "nothing to replace")
    #expect(errors(text) == ["f.toml: " + mistake.expected])
  }

  @Test func aPassthroughOfAPortWithItselfSaysSo() {
    #expect(
      errors("[[port]]\nname = \"x\"\n[[passthrough]]\na = \"x\"\nb = \"x\"")
        == ["f.toml: passthrough[0].b: \"x\" is wired to itself; name another port"])
  }

  @Test func aCPUThatThisProcessMayNotUseIsToldApartFromOneThatIsNotThere() {
    let environment = fixedEnvironment(cpusOnline: [0, 1, 2, 3], cpusAllowed: [0, 1, 3])
    #expect(
      errors(least, overrides: ["cpus": "2,3,5"], environment: environment) == [
        "--cpus: CPU 5: not on this machine, or offline: it runs 0-3; use some of 0-1,3, or \"auto\"",
        "--cpus: CPU 2: not for this process: its affinity or its cgroup's cpuset has 0-1,3; use some of 0-1,3, or "
          + "\"auto\", or let it use more (taskset, AllowedCPUs= of the unit, the container's cpuset)",
      ])
    // A machine that does not say which CPUs it runs.
    #expect(errors(least, overrides: ["cpus": "1"], environment: fixedEnvironment(cpusOnline: nil)).isEmpty)
  }

  @Test func anErrorOfARuleNamesTheLineAndColumnOfItsKey() {
    #expect(
      allErrors(soundRules.replacing("to = \"port:vm1\"", with: "  to = \"port:x\"")).map(\.description) == [
        "f.toml:48:3: route[0].to: no port is called \"x\"; ports: vm1, vm2, nic, vm3"
      ])
  }

  @Test func whatIsProbablyNotMeantIsAWarning() throws {
    #expect(
      try warnings(least.replacing("vni = 42", with: "vni = 42\nforwarding = \"routes\""))
        == [
          "f.toml:4:1: domain[0].forwarding: \"blue\" has no rule: it drops every frame; add a [[route]] for it, or "
            + "use forwarding = \"learning\""
        ])
    #expect(
      try warnings(soundRules.replacing("encapsulation = \"vnetp\"", with: "encapsulation = \"vnetp\"\nrelay = true"))
        == [
          "f.toml:35:1: link[0].relay: it does nothing in \"blue\", where rules alone decide; leave it out, or use "
            + "forwarding = \"learning\""
        ])
    #expect(
      try warnings(soundRules.replacing("rx=0,1 route=2 tx=3", with: "rx=0 route=1 tx=1"))
        == [
          "f.toml:63:1: tuning.cpus: route and tx share CPU 1: they take turns there, as in layout fused; give each "
            + "stage CPUs of its own, or use layout = \"fused\""
        ])
    #expect(
      try warnings(soundRules.replacing("second_max = 1000", with: "second_max = 0"))
        == [
          "f.toml:12:1: domain[1].flood_frames_per_second_max: link[1] relays, and without a limit a frame in a loop "
            + "of links goes round for ever; leave it out to have 10000, or set a limit"
        ])
  }

  @Test func floodsAreLimitedByDefaultWhereALinkRelays() throws {
    func limits(_ text: String) throws -> [Int] {
      let configuration = try Configuration.parse(text, file: "f.toml", environment: fixedEnvironment())
      return configuration.domains.map(\.floodFramesPerSecondMax)
    }
    let limit = Schema.relayFloodFramesPerSecondMax
    let unset = soundRules.replacing("flood_frames_per_second_max = 1000\n", with: "")
    // In "blue" rules decide, so nothing is relayed there, whatever its link says.
    #expect(try limits(unset) == [0, limit])
    #expect(
      try limits(unset.replacing("domains = [\"blue\"]", with: "domains = [\"blue\"]\nrelay = true")) == [0, limit])
    #expect(try limits(unset.replacing("relay = true", with: "relay = false")) == [0, 0])
    // A link that names no domain carries all of them.
    #expect(try limits(unset.replacing("domains = [\"green\"]\n", with: "")) == [0, limit])
    #expect(try warnings(unset) == [])
    // What is written is kept.
    for written in [0, 1, 1_000_000_000] {
      #expect(try limits(soundRules.replacing("second_max = 1000", with: "second_max = \(written)")) == [0, written])
    }
    #expect(
      try warnings(
        soundRules.replacing("second_max = 1000", with: "second_max = 0")
          .replacing("relay = true", with: "relay = false")) == [])
  }

  @Test(arguments: [
    ([0, 1], "2 CPUs may be used for 3 stages: rx and route share CPU 0, and take turns there"),
    ([5], "1 CPU may be used for 3 stages: all stages share CPU 5, and take turns there"),
  ])
  func aPipelineOnFewerCPUsThanStagesIsAWarningThatSaysHowTheyWerePutTogether(
    _ allowed: [Int], _ expected: String
  ) throws {
    let environment = fixedEnvironment(cpusAllowed: allowed)
    let found = try warnings(least, overrides: ["layout": "pipeline"], environment: environment)
    #expect(
      found == [
        "--layout: \(expected), as in layout fused; give each stage CPUs of its own, or use layout = \"fused\""
      ])
    #expect(try warnings(least, overrides: ["layout": "pipeline"]).isEmpty)
  }

  private func warnings(
    _ text: String, overrides: [String: String] = [:], environment: ConfigurationEnvironment = fixedEnvironment()
  ) throws -> [String] {
    try Configuration.parse(text, file: "f.toml", overrides: overrides, environment: environment).warnings
  }
}
