extension Configuration {
  /// The largest file that is read, in bytes: far above any real configuration, far below what would hurt.
  static let fileBytesMax = 1 << 20

  /// Reads, parses and checks a file.
  ///
  /// - Parameters:
  ///   - file: the path.
  ///   - overrides: values of tuning keys by name, as they were given on the command line; they win.
  ///   - environment: the host that it is for.
  public static func load(
    file: String, overrides: [String: String] = [:], environment: ConfigurationEnvironment = .system
  ) throws(ConfigurationErrors) -> Configuration {
    func failure(_ problem: String, _ remedy: String) -> ConfigurationErrors {
      ConfigurationErrors(errors: [.init(file: file, keyPath: "", problem: problem, remedy: remedy)])
    }
    let bytes: [UInt8]
    do {
      bytes = try readFile(file, bytesMax: fileBytesMax)
    } catch {
      throw failure("it cannot be read: \(error.text)", "check the path and its permissions")
    }
    guard let text = String(validating: bytes, as: UTF8.self) else {
      throw failure("it is not UTF-8 text", "save it as UTF-8")
    }
    return try parse(text, file: file, overrides: overrides, environment: environment)
  }

  /// Parses and checks the text of a file; pure but for what it asks of the environment.
  ///
  /// - Parameters:
  ///   - text: TOML.
  ///   - file: the name that errors say.
  ///   - overrides: values of tuning keys by name, as they were given on the command line; they win.
  ///   - environment: the host that it is for.
  public static func parse(
    _ text: String, file: String, overrides: [String: String] = [:],
    environment: ConfigurationEnvironment = .system
  ) throws(ConfigurationErrors) -> Configuration {
    var reader = Reader()
    let sections = reader.read(text, file: file)
    // After a syntax error every further complaint would be about what was not read.
    if sections.isEmpty { throw ConfigurationErrors(errors: reader.errors) }
    var draft = Draft(sections: sections, file: file, reader: reader)
    draft.override(overrides)
    return try draft.finish(environment)
  }

  /// The configuration of a quick start, without a file: one domain called `default`, a port for each TAP device and a
  /// link for each peer, named as they were given.
  ///
  /// - Parameters:
  ///   - taps: names of TAP devices; at least one.
  ///   - peers: addresses or host names, as `remote` has them.
  ///   - vni: the domain's.
  ///   - address: this node's; nil: the source address of the kernel's route to the peers.
  ///   - overrides: values of tuning keys by name.
  ///   - environment: the host that it is for.
  public static func quickStart(
    taps: [String], peers: [String], vni: Int, address: String? = nil, overrides: [String: String] = [:],
    environment: ConfigurationEnvironment = .system
  ) throws(ConfigurationErrors) -> Configuration {
    var reader = Reader()
    func place(_ flag: String) -> Place { Place(file: nil, keyPath: flag) }

    var underlay = Fields(.underlay, at: place("--address"))
    if let address { underlay.set("address", to: .strings([address]), at: place("--address")) }

    var domain = Fields(.domain, at: place("--vni"))
    domain.set("name", to: .string("default"))
    if let vniKey = Schema.keys(of: .domain).first(where: { $0.key == "vni" }) {
      reader.set(vniKey, of: &domain, toFlagText: String(vni))
    }
    let ports = taps.map { tap in
      var fields = Fields(.port, at: place("--tap"))
      let tapPlace = place("--tap \(tap.printable)")
      fields.set("device", to: .string(tap), at: tapPlace)
      fields.set("name", to: .string(tap), at: tapPlace)
      // One mistake, one error: the device's is the more exact one.
      if Draft.deviceNameProblem(tap) != nil { fields.setInvalid("name") }
      return fields
    }
    let links = peers.map { peer in
      var fields = Fields(.link, at: place("--peer"))
      let peerPlace = place("--peer \(peer.printable)")
      fields.set("remote", to: .string(peer), at: peerPlace)
      fields.set("name", to: .string(peer), at: peerPlace)
      if RemoteText(peer) == nil { fields.setInvalid("name") }
      return fields
    }
    var draft = Draft(
      sections: [underlay, domain] + ports + links, file: nil, reader: reader)
    draft.override(overrides)
    return try draft.finish(environment)
  }
}
