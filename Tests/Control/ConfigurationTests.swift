import Datapath
import Testing

@testable import Control

/// A host whose answers a test chooses: addresses by host name, source addresses by destination, and its CPUs.
func fixedEnvironment(
  names: [String: [String]] = [:], routes: [String: String] = [:], cpusOnline: [Int]? = Array(0..<8),
  cpusAllowed: [Int] = Array(0..<8)
) -> ConfigurationEnvironment {
  ConfigurationEnvironment(
    hostName: { "this-host" },
    resolve: { name in
      guard let texts = names[name] else { return .failure("Name or service not known") }
      return .addresses(texts.compactMap { UnderlayAddress($0) })
    },
    localAddress: { remote in routes[remote.description].flatMap { UnderlayAddress($0) } },
    cpusOnline: { cpusOnline }, cpusAllowed: { cpusAllowed })
}

/// What `parse` finds wrong; empty where nothing is wrong.
func allErrors(
  _ text: String, overrides: [String: String] = [:], environment: ConfigurationEnvironment = fixedEnvironment()
) -> [ConfigurationError] {
  do {
    _ = try Configuration.parse(text, file: "f.toml", overrides: overrides, environment: environment)
    return []
  } catch {
    return error.errors
  }
}

/// What `parse` finds wrong, one line each, without lines and columns.
func errors(
  _ text: String, overrides: [String: String] = [:], environment: ConfigurationEnvironment = fixedEnvironment()
) -> [String] {
  allErrors(text, overrides: overrides, environment: environment).map { error in
    var error = error
    error.position = nil
    return error.description
  }
}

/// A whole configuration of learning domains.
let sound = """
  [node]
  name = "host-a"

  [underlay]
  address = ["10.99.0.1", "fd00::1"]

  [[domain]]
  name = "blue"
  vni = 42

  [[domain]]
  name = "green"
  vni = 43
  ageing_s = 60
  macs_max = 100

  [[port]]
  name = "vm1"
  domain = "blue"

  [[port]]
  name = "second"
  device = "vm2"
  domain = "green"
  queues = 2
  mtu = 1400

  [[link]]
  name = "to-b"
  remote = "10.99.0.2"

  [[link]]
  name = "to-c"
  remote = "[fd00::3]:4790"
  domains = ["green"]
  reserved_bits = "drop"

  [tuning]
  cpus = "0,1"
  spin_us = 20
  """

/// The least that is a configuration: one domain, one port, no link.
let least = """
  [[domain]]
  name = "blue"
  vni = 42

  [[port]]
  name = "vm1"
  """

@Suite struct ConfigurationTests {
  @Test func aSoundFileGivesTypedValues() throws {
    let configuration = try Configuration.parse(sound, file: "f.toml", environment: fixedEnvironment())
    #expect(configuration.node.name == "host-a")
    #expect(configuration.underlay.addresses.map(\.description) == ["10.99.0.1", "fd00::1"])
    #expect(configuration.underlay.address(of: .ipv6)?.description == "fd00::1")
    #expect(configuration.domains.map(\.name) == ["blue", "green"])
    #expect(configuration.domains.map(\.vni) == [42, 43])
    #expect(configuration.domains.map(\.ageingSeconds) == [300, 60])
    #expect(configuration.domains.map(\.macsMax) == [8192, 100])
    #expect(configuration.domain(named: "green")?.vni == 43)
    #expect(configuration.ports.map(\.name) == ["vm1", "second"])
    #expect(configuration.ports.map(\.device) == ["vm1", "vm2"])
    #expect(configuration.ports.map(\.queues) == [1, 2])
    #expect(configuration.ports.map(\.mtuBytes) == [nil, 1400])
    #expect(configuration.links.map(\.remote.description) == ["10.99.0.2:4789", "[fd00::3]:4790"])
    #expect(configuration.links.map(\.domains) == [["blue", "green"], ["green"]])
    #expect(configuration.links.map(\.reservedBits) == [.ignore, .drop])
    #expect(configuration.tuning.cpus == .list([0, 1]))
    #expect(configuration.warnings.isEmpty)
    #expect(configuration.tuning.spinMicroseconds == 20)
    #expect(configuration.summary == "host-a: 2 domains, 2 ports, 2 links")
  }

  @Test func everythingLeftOutHasTheDefaultOfTheTableOfKeys() throws {
    let configuration = try Configuration.parse(least, file: "f.toml", environment: fixedEnvironment())
    #expect(
      configuration
        == Configuration(
          node: .init(name: "this-host"), underlay: .init(addresses: [], vxlanPort: 4789, vnetpPort: 9000),
          domains: [
            .init(
              name: "blue", vni: 42, forwarding: .learning, ageingSeconds: 300, macsMax: 8192,
              floodFramesPerSecondMax: 0)
          ],
          ports: [
            .init(
              name: "vm1", kind: .tap, device: "vm1", socket: "/run/vnetr/vm1.sock", socketMode: .server,
              domain: "blue", queues: 1,
              mtuBytes: nil,
              offloads: true,
              mac: nil)
          ],
          links: [], routes: [], passthroughs: [],
          tuning: .init(
            layout: .auto, cpus: .auto, dispatch: .adaptive, yield: .adaptive, io: .auto, ringEntries: 256,
            batchFrames: 64, batchWaitMicroseconds: 0, spinMicroseconds: 50, slots: 256,
            ringDepthFrames: nil, ringBatchFrames: 64, sendBufferBytes: 7_340_032, receiveBufferBytes: 7_340_032,
            dispatchUpperFramesPerSecond: 10_000,
            dispatchLowerFramesPerSecond: 1_000, dispatchPeriodMilliseconds: 10, sourcePorts: 8, gso: true, gro: true,
            hugePages: .auto,
            without: []),
          warnings: []))
  }

  @Test func aFlagWinsOverTheFile() throws {
    let configuration = try Configuration.parse(
      sound, file: "f.toml",
      overrides: [
        "spin_us": "7", "cpus": "1", "without": "multishot-read,fixed-files", "huge_pages": "off", "gso": "false",
      ],
      environment: fixedEnvironment())
    #expect(configuration.tuning.spinMicroseconds == 7)
    #expect(configuration.tuning.cpus == .list([1]))
    #expect(configuration.tuning.without == [.multishotRead, .fixedFiles])
    #expect(configuration.tuning.hugePages == .off)
    #expect(!configuration.tuning.gso)
    #expect(configuration.tuning.gro)
  }

  @Test(arguments: [
    (["spin_us": "x"], "--spin-us: \"x\" is no integer; give an integer from 0 to 1000000"),
    (["gro": "off"], "--gro: \"off\" is no boolean; give true or false"),
    (["spin_us": "-1"], "--spin-us: -1 is out of range; use an integer from 0 to 1000000"),
    (
      ["layout": "fusd"],
      "--layout: \"fusd\" is no value of it; did you mean \"fused\"? (values: auto, fused, pipeline)"
    ),
    (["cpus": "0,0"], "--cpus: CPU 0 comes twice; name it once: each worker has a CPU of its own"),
    (
      ["dispatch_lower_fps": "20000"],
      "--dispatch-lower-fps: 20000 is above dispatch_upper_fps, which is 10000; use at most 10000"
    ),
  ])
  func anErrorInAFlagNamesTheFlag(_ overrides: [String: String], _ expected: String) {
    #expect(errors(least, overrides: overrides) == [expected])
  }

  @Test func aFlagRepairsABadValueOfTheFileInNothingButItsError() {
    // The file is wrong all the same: `check` says so, and `run` must not differ.
    #expect(
      errors(least + "\n[tuning]\nspin_us = -1", overrides: ["spin_us": "5"])
        == ["f.toml: tuning.spin_us: -1 is out of range; use an integer from 0 to 1000000"])
  }

  @Test func aSyntaxErrorNamesLineAndColumnAndIsTheOnlyError() {
    #expect(
      allErrors("[node]\nname = \"é\" x\n[nodes]").map(\.description)
        == ["f.toml:2:12: expected the end of the line, found \"x\"; see https://toml.io"])
  }

  @Test func everyErrorOfAFileNamesTheLineAndColumnOfItsKey() {
    let text = """
      nodes = 1
      [underlay]
        address = "x"
      [[domain]]
      name = "blue"
      vni = 1
      vnii = 2
      [[port]]
      name = "vm1"
      domain = "green"
      [[port]]
      domain = "blue"
      [[link]]
      name = "l"
      "é" = 1
      remote = "10.0.0.2"
      domains = ["blue", "red"]
      [[route]]
      source = "any"
      destination = "none"
      from = "vm1"
      to = "port:vm2"
      [tuning]
      cpus = "a"
      spin_us = -1
      """
    #expect(
      allErrors(text).map { "\($0.position?.line ?? 0):\($0.position?.column ?? 0) \($0.keyPath)" } == [
        "1:1 nodes", "7:1 domain[0].vnii", "11:1 port[1].name", "15:1 link[0].é", "25:1 tuning.spin_us",
        "10:1 port[0].domain", "17:1 link[0].domains[1]", "24:1 tuning.cpus", "3:3 underlay.address",
        "18:1 route[0].domain", "20:1 route[0].destination", "21:1 route[0].from",
      ])
  }

  @Test func nothingThatAFileHoldsBreaksTheLineOfAnError() {
    #expect(
      errors("[[domain]]\nname = \"a\\nb\"\nvni = 1\n[[port]]\nname = \"vm1\"\ndomain = \"\\u001b[2J\"\n") == [
        "f.toml: domain[0].name: \"a\\u{a}b\" is no name; use 1 to 260 letters, digits and . _ - : [ ]",
        "f.toml: port[0].domain: no domain is called \"\\u{1b}[2J\"; domains: a\\u{a}b",
      ])
  }

  @Test func whatIsMissingFromTheWholeFileHasNoLine() {
    #expect(allErrors("[node]").map(\.position) == [nil, nil])
  }

  @Test func aFileThatCannotBeReadIsOneError() {
    do {
      _ = try Configuration.load(file: "/nonexistent/f.toml", environment: fixedEnvironment())
      Issue.record("it was read")
    } catch {
      #expect(
        error.description == "/nonexistent/f.toml: it cannot be read: No such file or directory; "
          + "check the path and its permissions")
    }
  }

  @Test func anEmptyFileSaysWhatIsMissing() {
    #expect(
      errors("") == [
        "f.toml: domain: there is no [[domain]]; add one: without it nothing is forwarded",
        "f.toml: port: there is no [[port]]; add one: without it nothing is forwarded",
      ])
  }

  @Test func everyErrorIsReportedNotOnlyTheFirst() {
    let text = """
      [[domain]]
      name = "blue"
      vni = 16777216
      [[domain]]
      name = "blue"
      vni = 1
      [[port]]
      name = "a-much-too-long-name"
      domain = "blu"
      [[link]]
      name = "l"
      remot = "x"
      [tuning]
      io = "threads"
      """
    #expect(
      errors(text) == [
        "f.toml: domain[0].vni: 16777216 is out of range; use an integer from 0 to 16777215",
        "f.toml: link[0].remot: there is no such key in [[link]]; did you mean \"remote\"? "
          + "(keys: name, remote, encapsulation, domains, relay, fragment, reserved_bits)",
        "f.toml: tuning.io: \"threads\" is no value of it; values: auto, uring, syscalls",
        "f.toml: domain[1].name: \"blue\" is taken by domain[0].name; use one of its own",
        "f.toml: port[0].name: \"a-much-too-long-name\" is no device name: it has 20 bytes, and 15 is the most; "
          + "set device: a port's name is the device's unless it is set",
        "f.toml: port[0].domain: no domain is called \"blu\"; did you mean \"blue\"? (domains: blue, blue)",
      ])
  }
}

/// One mistake in an otherwise sound configuration, and the one error that it gives.
struct Mistake: CustomTestStringConvertible {
  /// What of `sound` is replaced.
  var replaced: String
  var replacement: String
  /// Without the file's name.
  var expected: String

  init(_ replaced: String, _ replacement: String, _ expected: String) {
    self.replaced = replaced
    self.replacement = replacement
    self.expected = expected
  }

  var testDescription: String { replacement }

  /// `text` with the first of `replaced` replaced; nil where there is none.
  func made(in text: String) -> String? {
    guard let range = text.ranges(of: replaced).first else { return nil }
    return text.replacingCharacters(in: range, with: replacement)
  }
}

extension String {
  fileprivate func replacingCharacters(in range: Range<Index>, with text: String) -> String {
    String(self[..<range.lowerBound]) + text + String(self[range.upperBound...])
  }
}

@Suite struct ConfigurationMistakeTests {
  static let unknownKeysAndSections = [
    Mistake(
      "[underlay]\naddress", "[underlay]\nadress",
      "underlay.adress: there is no such key in [underlay]; did you mean \"address\"? (keys: address, vxlan_port, "
        + "vnetp_port)"),
    Mistake(
      "vni = 42", "vni = 42\nspin_us = 5",
      "domain[0].spin_us: there is no such key in [[domain]]; it is a key of [tuning]"),
    Mistake(
      "vni = 42", "vni = 42\nzzzzzz = 5",
      "domain[0].zzzzzz: there is no such key in [[domain]]; keys: name, vni, forwarding, ageing_s, macs_max, "
        + "flood_frames_per_second_max"),
    Mistake(
      "[node]", "[nodes]\n[node]",
      "nodes: there is no such section; did you mean \"node\"? "
        + "(sections: node, underlay, domain, port, link, route, passthrough, tuning)"),
    Mistake("[node]", "vxlan_port = 1\n[node]", "vxlan_port: there is no such section; it is a key of [underlay]"),
    Mistake("[tuning]", "[tuning]\nsqpoll = true", "tuning.sqpoll: there is no such key in [tuning]; \(tuningKeys)"),
  ]

  private static let tuningKeys =
    "keys: layout, cpus, dispatch, dispatch_upper_fps, dispatch_lower_fps, dispatch_period_ms, yield, spin_us, io, "
    + "ring_entries, batch_frames, batch_wait_us, slots, ring_depth_frames, ring_batch_frames, send_buffer_bytes, "
    + "receive_buffer_bytes, source_ports, gso, gro, huge_pages, without"

  static let sockets = [
    Mistake(
      "name = \"vm1\"", "name = \"vm1\"\nsocket = \"/run/x\"",
      "port[0].socket: only a vhost-user port has a socket; leave it out, or set kind = \"vhost-user\""),
    Mistake(
      "name = \"vm1\"", "name = \"vm1\"\nsocket_mode = \"client\"",
      "port[0].socket_mode: only a vhost-user port has a socket; leave it out, or set kind = \"vhost-user\""),
  ]

  static let typesAndRanges = [
    Mistake(
      "vni = 42", "vni = \"42\"", "domain[0].vni: \"42\" is of the wrong type; write an integer from 0 to 16777215"),
    Mistake(
      "vni = 42", "vni = 42.0", "domain[0].vni: it is a floating-point number; write an integer from 0 to 16777215"),
    Mistake("vni = 42", "vni = -1", "domain[0].vni: -1 is out of range; use an integer from 0 to 16777215"),
    Mistake(
      "vni = 42\n", "\n",
      "domain[0].vni: it is missing; set it: The VXLAN network identifier: the same on every node of the domain."),
    Mistake(
      "macs_max = 100", "macs_max = 1048577",
      "domain[1].macs_max: 1048577 is out of range; use an integer from 1 to 1048576"),
    Mistake("queues = 2", "queues = 17", "port[1].queues: 17 is out of range; use an integer from 1 to 16"),
    Mistake("mtu = 1400", "mtu = 67", "port[1].mtu: 67 is out of range; use an integer from 68 to 65493"),
    Mistake("mtu = 1400", "mtu = 65494", "port[1].mtu: 65494 is out of range; use an integer from 68 to 65493"),
    Mistake(
      "mtu = 1400", "mtu = 65478",
      "port[1].mtu: 65478 is more than link[0] can carry, which is vxlan; use at most 65477"),
    Mistake(
      "spin_us = 20", "ring_batch_frames = 513",
      "tuning.ring_batch_frames: 513 is out of range; use an integer from 1 to 512"),
    Mistake(
      "spin_us = 20", "ring_depth_frames = 127",
      "tuning.ring_depth_frames: 127 is out of range; use an integer from 128 to 65536"),
    Mistake(
      "macs_max = 100", "flood_frames_per_second_max = -1",
      "domain[1].flood_frames_per_second_max: -1 is out of range; use an integer from 0 to 1000000000"),
    Mistake("name = \"host-a\"", "name = 1979-05-27", "node.name: it is a date or time; write a string"),
    Mistake("name = \"host-a\"", "name = {}", "node.name: it is a table; write a string"),
    Mistake("queues = 2", "offloads = 1", "port[1].offloads: 1 is of the wrong type; write true or false"),
    Mistake(
      "domains = [\"green\"]", "domains = \"green\"",
      "link[1].domains: \"green\" is of the wrong type; write an array of strings"),
    Mistake(
      "domains = [\"green\"]", "domains = [\"green\", 1]",
      "link[1].domains: it is an array; write an array of strings"),
    Mistake(
      "reserved_bits = \"drop\"", "reserved_bits = \"dropp\"",
      "link[1].reserved_bits: \"dropp\" is no value of it; did you mean \"drop\"? (values: ignore, drop)"),
    Mistake(
      "reserved_bits = \"drop\"", "reserved_bits = \"xyz\"",
      "link[1].reserved_bits: \"xyz\" is no value of it; values: ignore, drop"),
    Mistake(
      "spin_us = 20", "without = [\"multishot-rea\"]",
      "tuning.without: \"multishot-rea\" is no value of it; did you mean \"multishot-read\"? (values: single-issuer, "
        + "deferred-work, buffer-ring, multishot-receive, multishot-read, fixed-files, restrictions, "
        + "silent-success)"),
    Mistake(
      "spin_us = 20", "without = [\"fixed-files\", \"fixed-files\"]",
      "tuning.without: \"fixed-files\" comes twice; name it once"
    ),
    Mistake("[node]", "[[node]]", "node: it is several tables; open it, once, with [node]"),
  ]

  static let names = [
    Mistake("name = \"host-a\"", "name = \"\"", "node.name: \"\" is no name; \(nameRemedy)"),
    Mistake("name = \"to-b\"", "name = \"to b\"", "link[0].name: \"to b\" is no name; \(nameRemedy)"),
    Mistake("name = \"to-b\"", "name = \"a\\nb\"", "link[0].name: \"a\\u{a}b\" is no name; \(nameRemedy)"),
    Mistake(
      "name = \"second\"", "name = \"vm1\"", "port[1].name: \"vm1\" is taken by port[0].name; use one of its own"),
    Mistake("name = \"to-b\"", "name = \"vm1\"", "link[0].name: \"vm1\" is taken by port[0].name; use one of its own"),
    Mistake(
      "name = \"to-c\"", "name = \"to-b\"", "link[1].name: \"to-b\" is taken by link[0].name; use one of its own"),
    Mistake("vni = 43", "vni = 42", "domain[1].vni: 42 is taken by domain[0].vni; use one of its own"),
    Mistake(
      "device = \"vm2\"", "device = \"vm1\"",
      "port[1].device: device \"vm1\" is taken by port[0].name; give each port a device of its own"),
    Mistake(
      "device = \"vm2\"", "device = \"sixteen-bytes-xx\"",
      "port[1].device: \"sixteen-bytes-xx\" is no device name: it has 16 bytes, and 15 is the most; use such as \"vm1\""
    ),
    Mistake(
      "device = \"vm2\"", "device = \"a/b\"",
      "port[1].device: \"a/b\" is no device name: it holds a space, / : % or a character outside of ASCII; use "
        + "such as \"vm1\""
    ),
    Mistake(
      "device = \"vm2\"", "device = \"tap%d\"",
      "port[1].device: \"tap%d\" is no device name: it holds a space, / : % or a character outside of ASCII; use "
        + "such as "
        + "\"vm1\""),
    Mistake(
      "device = \"vm2\"", "device = \"\"", "port[1].device: \"\" is no device name: it is empty; use such as \"vm1\""),
    Mistake(
      "device = \"vm2\"", "device = \"..\"",
      "port[1].device: \"..\" is no device name: the kernel refuses it; use such as \"vm1\""),
  ]

  private static let nameRemedy = "use 1 to 260 letters, digits and . _ - : [ ]"

  static let domains = [
    Mistake(
      "domain = \"blue\"", "domain = \"blu\"",
      "port[0].domain: no domain is called \"blu\"; did you mean \"blue\"? (domains: blue, green)"),
    Mistake(
      "domain = \"blue\"", "domain = \"purple\"",
      "port[0].domain: no domain is called \"purple\"; domains: blue, green"),
    Mistake(
      "domain = \"blue\"\n", "\n",
      "port[0].domain: it is missing, and there are 2 domains; set it to one of blue, green"),
    Mistake(
      "domains = [\"green\"]", "domains = [\"green\", \"grene\"]",
      "link[1].domains[1]: no domain is called \"grene\"; did you mean \"green\"? (domains: blue, green)"),
    Mistake(
      "domains = [\"green\"]", "domains = [\"green\", \"green\"]",
      "link[1].domains[1]: \"green\" comes twice; name it once"),
    Mistake(
      "domains = [\"green\"]", "domains = []",
      "link[1].domains: it is empty; name a domain, or leave it out to carry every domain"),
  ]

  static let addresses = [
    Mistake(
      "[\"10.99.0.1\", \"fd00::1\"]", "[\"10.99.0.1\", \"10.99.0.4\", \"fd00::1\"]",
      "underlay.address[1]: 10.99.0.4 is the second IPv4 address after 10.99.0.1; give one of each family"),
    Mistake(
      "\"fd00::1\"]", "\"fd00::1/64\", \"fd00::1\"]",
      "underlay.address[1]: \"fd00::1/64\" is no IP address; use such as \"10.99.0.1\" or \"fd00::1\", without a port"),
    Mistake(
      "[\"10.99.0.1\", \"fd00::1\"]", "[\"10.99.0.1\"]",
      "link[1].remote: fd00::3 is an IPv6 address, and underlay.address has none; add an IPv6 address there"),
    Mistake(
      "[\"10.99.0.1\", \"fd00::1\"]", "\"fd00::1\"",
      "link[0].remote: 10.99.0.2 is an IPv4 address, and underlay.address has none; add an IPv4 address there"),
    Mistake(
      "[\"10.99.0.1\", \"fd00::1\"]", "[]", "underlay.address: it is empty; give an address, or leave it out"),
    Mistake(
      "\"10.99.0.2\"", "\"10.99.0.256\"",
      "link[0].remote: \"10.99.0.256\" is no address or host name; \(remoteRemedy)"),
    Mistake(
      "\"10.99.0.2\"", "\"10.99.0.2:0\"",
      "link[0].remote: \"10.99.0.2:0\" is no address or host name; \(remoteRemedy)"),
    Mistake(
      "\"10.99.0.2\"", "\"[fd00::3\"", "link[0].remote: \"[fd00::3\" is no address or host name; \(remoteRemedy)"),
    Mistake(
      "\"10.99.0.2\"", "\"224.0.0.1\"",
      "link[0].remote: 224.0.0.1 is a multicast address; use the other node's own address"),
    Mistake(
      "\"10.99.0.2\"", "\"255.255.255.255\"",
      "link[0].remote: 255.255.255.255 is a broadcast or reserved address; use the other node's own address"),
    Mistake(
      "\"10.99.0.2\"", "\"fe80::1\"",
      "link[0].remote: fe80::1 is link-local, which needs a zone and is not supported; use the other node's own address"
    ),
    Mistake(
      "\"10.99.0.2\"", "\"0.0.0.0\"",
      "link[0].remote: 0.0.0.0 is the unspecified address; use the other node's own address"),
    Mistake(
      "\"10.99.0.2\"", "\"host-x\"",
      "link[0].remote: host name \"host-x\" does not resolve: Name or service not known; check it, or use the other "
        + "node's address"),
    Mistake(
      "\"10.99.0.2\"", "\"10.99.0.1\"",
      "link[0].remote: 10.99.0.1:4789 is this node itself; use the other node's address"),
    Mistake(
      "\"10.99.0.2\"", "\"fd00::3\"",
      "link[1].remote: fd00::3 is the remote of link[0].remote too, and both carry domain \"green\"; use one "
        + "link, or give "
        + "the links different domains"),
  ]

  private static let remoteRemedy =
    "use such as \"10.99.0.2\", \"10.99.0.2:4790\", \"[fd00::2]:4790\" or \"host-b\""

  private static let listRemedy =
    "list numbers from 0 to 1023, such as \"0,1\" or \"rx=0 route=1 tx=2\", or use \"auto\""

  static let tuning = [
    Mistake("cpus = \"0,1\"", "cpus = \"0,,1\"", "tuning.cpus: \"0,,1\" is no list of CPUs; \(listRemedy)"),
    Mistake("cpus = \"0,1\"", "cpus = \"1024\"", "tuning.cpus: \"1024\" is no list of CPUs; \(listRemedy)"),
    Mistake("cpus = \"0,1\"", "cpus = \"-1\"", "tuning.cpus: \"-1\" is no list of CPUs; \(listRemedy)"),
    Mistake(
      "cpus = \"0,1\"", "cpus = \"1,1\"",
      "tuning.cpus: CPU 1 comes twice; name it once: each worker has a CPU of its own"),
    Mistake(
      "spin_us = 20", "dispatch_upper_fps = 5",
      "tuning.dispatch_lower_fps: 1000 is above dispatch_upper_fps, which is 5; use at most 5"),
  ]

  @Test(
    arguments: unknownKeysAndSections + sockets + typesAndRanges + names + domains + addresses + tuning)
  func oneMistakeGivesOneErrorWithItsKeyPathAndWhatWouldBeRight(_ mistake: Mistake) throws {
    let text = try #require(mistake.made(in: sound), "nothing to replace")
    #expect(errors(text) == ["f.toml: " + mistake.expected])
  }

  @Test(
    arguments: [
      (
        "socket = \"x.sock\"", [:],
        "f.toml: port[0].socket: \"x.sock\" is no socket's path; use an absolute path of at most 107 bytes"
      ),
      (
        "socket_mode = \"clint\"", [:],
        "f.toml: port[0].socket_mode: \"clint\" is no value of it; did you mean \"client\"? (values: server, client)"
      ),
      (
        "queues = 2", ["cpus": "0,1"],
        "--cpus: a vhost-user port is sent to by one worker, and here 2 would send; use one CPU, such as \"0\", or one "
          + "that sends, such as \"rx=0 route=0 tx=1\""
      ),
      (
        "", ["cpus": "rx=0 route=1 tx=2,3"],
        "--cpus: a vhost-user port is sent to by one worker, and here 2 would send; use one CPU for tx, such as tx=2"
      ),
      ("socket_mode = \"client\"", ["cpus": "rx=0,1 route=2 tx=3"], nil), ("", ["layout": "pipeline"], nil),
    ] as [(String, [String: String], String?)])
  func aVhostUserPortIsCheckedWithTheWorkersThatServeIt(
    _ lines: String, _ overrides: [String: String], _ expected: String?
  ) throws {
    let text = try #require(
      Mistake("name = \"vm1\"", "name = \"vm1\"\nkind = \"vhost-user\"\n\(lines)", "").made(in: least))
    #expect(errors(text, overrides: overrides) == (expected.map { [$0] } ?? []))
  }

  @Test func moreQueuesOfVhostUserPortsThanWorkersKnowAreRefused() {
    let ports = (0..<17).map {
      "[[port]]\nname = \"vm\($0)\"\nkind = \"vhost-user\"\ndomain = \"blue\"\nqueues = 16\n"
    }
    let found = errors("[[domain]]\nname = \"blue\"\nvni = 1\n" + ports.joined())
    #expect(
      found == ["f.toml: port[16].queues: the vhost-user ports up to this one have 272 queues; use at most 256 in all"])
  }

  @Test func aSectionThatMayComeSeveralTimesNeedsDoubleBrackets() {
    #expect(
      errors("[[domain]]\nname = \"a\"\nvni = 1\n[port]\nname = \"vm1\"")
        == ["f.toml: port: it is a table; open each one with [[port]]"])
  }

  @Test func aValueInPlaceOfASectionIsRefused() {
    #expect(errors("tuning = 1\n" + least) == ["f.toml: tuning: it is an integer; open it, once, with [tuning]"])
    #expect(
      errors("domain = [1, 2]\n[[port]]\nname = \"vm1\"\ndomain = \"a\"").first
        == "f.toml: domain: it is an array; open each one with [[domain]]")
  }
}
