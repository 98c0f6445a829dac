import Datapath
import Testing

@testable import Control

/// A host whose answers a test chooses.
func fixedEnvironment(
  names: [String: [String]] = [:], routes: [String: String] = [:]
) -> ConfigurationEnvironment {
  ConfigurationEnvironment(
    hostName: { "this-host" },
    resolve: { name in
      guard let texts = names[name] else { return .failure("Name or service not known") }
      return .addresses(texts.compactMap { UnderlayAddress($0) })
    },
    localAddress: { remote in routes[remote.description].flatMap { UnderlayAddress($0) } })
}

/// What `parse` finds wrong, one line each; empty where nothing is wrong.
func errors(
  _ text: String, overrides: [String: String] = [:], environment: ConfigurationEnvironment = fixedEnvironment()
) -> [String] {
  do {
    _ = try Configuration.parse(text, file: "f.toml", overrides: overrides, environment: environment)
    return []
  } catch {
    return error.errors.map(\.description)
  }
}

/// A whole configuration, with every section that this version has.
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
  """

@Suite struct ConfigurationTests {
  @Test func aSoundFileGivesTypedValuesAndDefaults() throws {
    let configuration = try Configuration.parse(sound, file: "f.toml", environment: fixedEnvironment())
    #expect(configuration.node.name == "host-a")
    #expect(configuration.underlay.addresses.map(\.description) == ["10.99.0.1", "fd00::1"])
    #expect(configuration.underlay.vxlanPort == 4789)
    #expect(configuration.domains.map(\.name) == ["blue", "green"])
    #expect(configuration.domains.map(\.vni) == [42, 43])
    #expect(configuration.domains.map(\.ageingSeconds) == [300, 60])
    #expect(configuration.domains.map(\.macsMax) == [8192, 100])
    #expect(configuration.ports.map(\.device) == ["vm1", "vm2"])
    #expect(configuration.ports.map(\.queues) == [1, 2])
    #expect(configuration.ports.map(\.mtuBytes) == [nil, 1400])
    #expect(configuration.links.map(\.remote.description) == ["10.99.0.2:4789", "[fd00::3]:4790"])
    #expect(configuration.links.map(\.domains) == [["blue", "green"], ["green"]])
    #expect(configuration.links.map(\.reservedBits) == [.ignore, .drop])
  }
}
