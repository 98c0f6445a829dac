import Datapath
import Testing

@testable import Control

/// The least configuration with a link.
private func withLink(_ remote: String, underlay: String = "", second: String = "") -> String {
  "\(underlay)\n\(least)\n[[link]]\nname = \"l\"\nremote = \"\(remote)\"\n\(second)"
}

@Suite struct AddressTests {
  @Test(arguments: [
    ("10.0.0.2", "10.0.0.2", UInt16?.none), ("10.0.0.2:4790", "10.0.0.2", 4790), ("fd00::2", "fd00::2", nil),
    ("[fd00::2]", "fd00::2", nil), ("[fd00::2]:65535", "fd00::2", 65535), ("::ffff:10.0.0.2", "10.0.0.2", nil),
  ])
  func aRemoteMayBeAnAddressWithOrWithoutAPort(_ text: String, _ address: String, _ port: UInt16?) throws {
    let remote = try #require(RemoteText(text))
    #expect(remote.host == .address(try #require(UnderlayAddress(address))))
    #expect(remote.port == port)
  }

  @Test(arguments: [("host-b", "host-b", UInt16?.none), ("a.example:1", "a.example", 1), ("_x.local", "_x.local", nil)])
  func aRemoteMayBeAHostName(_ text: String, _ name: String, _ port: UInt16?) throws {
    let remote = try #require(RemoteText(text))
    #expect(remote.host == .name(name))
    #expect(remote.port == port)
  }

  @Test(arguments: [
    "", ":", ":1", "a:", "a:b", "a:65536", "a:+1", "a:-1", "a b", "-a", "a-", "a..b", ".a", "a.", "1.2.3", "1.2.3.4.5",
    "[1.2.3.4]", "[1.2.3.4]:5", "[fd00::2]4789", "[fd00::2]:", "[]", "fe80::1%eth0", "10.0.0.2/24", "a:1:2",
    String(repeating: "a", count: 64), "é",
  ])
  func whatIsNeitherAddressNorHostNameIsRefused(_ text: String) {
    #expect(RemoteText(text) == nil)
  }

  @Test func aHostNameIsResolvedToAnAddressOfAFamilyThatTheUnderlayHas() throws {
    let environment = fixedEnvironment(names: ["b": ["fd00::2", "10.0.0.2"]])
    let configuration = try Configuration.parse(
      withLink("b:1000", underlay: "[underlay]\naddress = \"10.0.0.1\""), file: "f", environment: environment)
    #expect(configuration.links.map(\.remote.description) == ["10.0.0.2:1000"])
  }

  @Test func withoutAnAddressTheKernelsRouteChoosesOneForEachFamily() throws {
    let environment = fixedEnvironment(routes: ["10.0.0.2": "10.0.0.1", "fd00::2": "fd00::1"])
    let text = withLink("10.0.0.2", second: "[[link]]\nname = \"m\"\nremote = \"fd00::2\"")
    let configuration = try Configuration.parse(text, file: "f", environment: environment)
    #expect(configuration.underlay.addresses.map(\.description) == ["10.0.0.1", "fd00::1"])
  }

  @Test func aRemoteWithoutARouteIsAnError() {
    #expect(
      errors(withLink("10.0.0.2"))
        == ["f.toml: link[0].remote: there is no route to 10.0.0.2; add a route, or set address in [underlay]"])
  }

  @Test func routesThatStartFromDifferentAddressesAskWhichOneIsMeant() {
    let environment = fixedEnvironment(routes: ["10.0.0.2": "10.0.0.1", "10.1.0.2": "10.1.0.1"])
    let text = withLink("10.0.0.2", second: "[[link]]\nname = \"m\"\nremote = \"10.1.0.2\"")
    #expect(
      errors(text, environment: environment) == [
        "f.toml: link[1].remote: the route to 10.1.0.2 starts from 10.1.0.1, that of link[0].remote from 10.0.0.1; "
          + "say which one is meant: address in [underlay], or --address"
      ])
  }

  @Test func twoNamesOfOneHostAreFoundToBeOneRemote() {
    let environment = fixedEnvironment(
      names: ["b": ["10.0.0.2"], "c": ["10.0.0.2"]], routes: ["10.0.0.2": "10.0.0.1"])
    let text = withLink("b", second: "[[link]]\nname = \"m\"\nremote = \"c:4790\"")
    #expect(
      errors(text, environment: environment) == [
        "f.toml: link[1].remote: 10.0.0.2 is the remote of link[0].remote too, and both carry domain \"blue\"; "
          + "use one link, or give the links different domains"
      ])
  }

  @Test func thisHostsLoopbackIsReachedFromItselfAndNumericNamesResolve() throws {
    let environment = ConfigurationEnvironment.system
    let loopback = try #require(UnderlayAddress("127.0.0.1"))
    #expect(environment.localAddress(loopback) == loopback)
    #expect(environment.resolve("127.0.0.1") == .addresses([loopback]))
    #expect(!environment.hostName().isEmpty)
    guard case .failure(let reason) = environment.resolve("no-such-host.invalid") else {
      Issue.record("a name of .invalid resolved")
      return
    }
    #expect(!reason.isEmpty)
  }
}

@Suite struct QuickStartTests {
  @Test func aQuickStartIsOneDomainWithAPortForEachTapAndALinkForEachPeer() throws {
    let environment = fixedEnvironment(
      names: ["host-b": ["10.0.0.2"]], routes: ["10.0.0.2": "10.0.0.1", "fd00::3": "fd00::1"])
    let configuration = try Configuration.quickStart(
      taps: ["vm1", "vm2"], peers: ["host-b", "[fd00::3]:4790"], vni: 42, overrides: ["slots": "32"],
      environment: environment)
    #expect(configuration.node.name == "this-host")
    #expect(configuration.domains.map(\.name) == ["default"])
    #expect(configuration.domains.map(\.vni) == [42])
    #expect(configuration.ports.map(\.device) == ["vm1", "vm2"])
    #expect(configuration.ports.map(\.domain) == ["default", "default"])
    #expect(configuration.links.map(\.name) == ["host-b", "[fd00::3]:4790"])
    #expect(configuration.links.map(\.remote.description) == ["10.0.0.2:4789", "[fd00::3]:4790"])
    #expect(configuration.underlay.addresses.map(\.description) == ["10.0.0.1", "fd00::1"])
    #expect(configuration.tuning.slots == 32)
  }

  @Test func aGivenAddressIsUsedAsItIs() throws {
    let configuration = try Configuration.quickStart(
      taps: ["vm1"], peers: ["10.0.0.2"], vni: 1, address: "10.9.9.9", environment: fixedEnvironment())
    #expect(configuration.underlay.addresses.map(\.description) == ["10.9.9.9"])
  }

  @Test func errorsNameTheFlags() {
    do {
      _ = try Configuration.quickStart(
        taps: ["much-too-long-name", "a", "a"], peers: ["a b", "10.0.0.2", "10.0.0.2", "a"], vni: 1 << 24,
        address: "x", overrides: ["io": "threads"], environment: fixedEnvironment())
      Issue.record("it was taken")
    } catch {
      #expect(
        error.errors.map(\.description) == [
          "--vni: 16777216 is out of range; use an integer from 0 to 16777215",
          "--io: \"threads\" is no value of it; values: auto, uring, syscalls",
          "--tap a: \"a\" is taken by --tap a; use one of its own",
          "--peer 10.0.0.2: \"10.0.0.2\" is taken by --peer 10.0.0.2; use one of its own",
          "--peer a: \"a\" is taken by --tap a; use one of its own",
          "--tap much-too-long-name: \"much-too-long-name\" is no device name: it has 18 bytes, and 15 is the most; "
            + "use such as \"vm1\"",
          "--address: \"x\" is no IP address; use such as \"10.99.0.1\" or \"fd00::1\", without a port",
          "--peer a b: \"a b\" is no address or host name; use such as \"10.99.0.2\", \"10.99.0.2:4790\", "
            + "\"[fd00::2]:4790\" or \"host-b\"",
          "--peer a: host name \"a\" does not resolve: Name or service not known; check it, or use the other node's "
            + "address",
        ])
    }
  }

  @Test func tuningFlagsAreReadWithASpaceOrAnEqualsSign() throws {
    #expect(
      try TuningFlags.parse(["--spin-us", "5", "--layout=fused", "--without="])
        == ["spin_us": "5", "layout": "fused", "without": ""])
    #expect(try TuningFlags.parse([]).isEmpty)
  }

  @Test(arguments: [
    (["--layot", "fused"], "there is no option --layot; did you mean --layout?"),
    (["--zzz"], "there is no option --zzz; see vnetr run --help"),
    (["extra"], "unexpected argument \"extra\""),
    (["--spin-us"], "--spin-us has no value; give 0…1000000 (default 50)"),
    (["--spin-us=1", "--spin-us", "2"], "--spin-us comes twice; give it once"),
  ])
  func argumentsThatAreNoTuningFlagsAreWrongUsage(_ arguments: [String], _ expected: String) {
    #expect(throws: TuningFlags.UsageError(description: expected)) { try TuningFlags.parse(arguments) }
  }

  @Test func everyTuningKeyIsAFlag() throws {
    for definition in Schema.tuningKeys {
      #expect(try TuningFlags.parse([definition.flag, "x"]) == [definition.key: "x"])
      #expect(TuningFlags.help.contains(definition.flag + " "))
    }
  }
}
