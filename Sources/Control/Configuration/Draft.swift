import Datapath

/// A configuration on its way: sections whose values are well-formed one by one, before they are checked together.
struct Draft {
  var reader = Reader()
  var node: Fields
  var underlay: Fields
  var domains: [Fields] = []
  var ports: [Fields] = []
  var links: [Fields] = []
  var routes: [Fields] = []
  var passthroughs: [Fields] = []
  var tuning: Fields

  init(sections: [Fields], file: String?, reader: Reader) {
    self.reader = reader
    func one(_ section: Schema.Section) -> Fields {
      sections.first { $0.section == section } ?? Fields(section, at: Place(file: file, keyPath: section.rawValue))
    }
    func all(_ section: Schema.Section) -> [Fields] { sections.filter { $0.section == section } }
    node = one(.node)
    underlay = one(.underlay)
    domains = all(.domain)
    ports = all(.port)
    links = all(.link)
    routes = all(.route)
    passthroughs = all(.passthrough)
    tuning = one(.tuning)
  }

  /// Sets tuning keys that were given as flags, by the keys' names. A name that is none is the caller's error.
  mutating func override(_ overrides: [String: String]) {
    for definition in Schema.tuningKeys {
      guard let text = overrides[definition.key] else { continue }
      reader.set(definition, of: &tuning, toFlagText: text)
    }
  }

  /// Checks everything together and makes the configuration; throws every error that was found from the start.
  mutating func finish(_ environment: ConfigurationEnvironment) throws(ConfigurationErrors) -> Configuration {
    checkNames()
    checkDevices()
    checkSockets()
    checkQueuePairs()
    checkPassthroughs()
    checkDomains()
    let macs = makeMACs()
    let tuning = makeTuning(environment)
    let underlay = makeUnderlay()
    let ends = makeEnds(underlay, environment)
    checkLinksSharingDomains(ends)
    checkLinks()
    checkMTUs()
    let routes = makeRoutes()
    guard reader.errors.isEmpty else { throw ConfigurationErrors(errors: reader.errors) }
    return make(tuning, underlay, ends, macs, routes, environment)
  }
}

// MARK: - Checks across sections

extension Draft {
  private mutating func checkNames() {
    if let name = node.string("name") { checkName(name, at: node.place(of: "name")) }
    checkUnique("name", of: domains, areNames: true)
    // Ports and links share the names of routes: `port:NAME`, `link:NAME`.
    checkUnique("name", of: ports + links, areNames: true)
  }

  private mutating func checkUnique(_ key: String, of sections: [Fields], areNames: Bool) {
    var owners: [String: Place] = [:]
    for fields in sections {
      guard let value = fields.value(key) else { continue }
      let place = fields.place(of: key)
      if areNames, case .string(let name) = value { checkName(name, at: place) }
      if let owner = owners[value.description] {
        reader.report(place, "\(value.description.printable) is taken by \(owner.keyPath)", "use one of its own")
      } else {
        owners[value.description] = place
      }
    }
  }

  private mutating func checkName(_ name: String, at place: Place) {
    let isWellFormed =
      !name.isEmpty && name.utf8.count <= Schema.nameCharactersMax
      && name.utf8.allSatisfy { isLetterOrDigit($0) || "._-:[]".utf8.contains($0) }
    if !isWellFormed {
      reader.report(
        place, "\"\(name.printable)\" is no name",
        "use 1 to \(Schema.nameCharactersMax) letters, digits and . _ - : [ ]")
    }
  }

  /// Of vhost-user ports.
  private mutating func checkSockets() {
    var owners: [String: String] = [:]
    for fields in ports where !fields.isInvalid("socket") {
      let place = fields.place(of: "socket")
      guard fields.string("kind") == "vhost-user" else {
        for key in ["socket", "socket_mode"] where !fields.isAbsent(key) {
          reader.report(
            fields.place(of: key), "only a vhost-user port has a socket", "leave it out, or set kind = \"vhost-user\"")
        }
        continue
      }
      guard let path = fields.string("socket") ?? fields.string("name").map(Schema.socketPath(port:)) else { continue }
      if !path.hasPrefix("/") || path.utf8.count > Schema.socketPathBytesMax {
        reader.report(
          fields.isAbsent("socket") ? fields.place(of: "name") : place, "\"\(path.printable)\" is no socket's path",
          "use an absolute path of at most \(Schema.socketPathBytesMax) bytes")
      } else if let owner = owners[path] {
        reader.report(place, "\(path.printable) is taken by \(owner)", "give each port a socket of its own")
      } else {
        owners[path] = place.keyPath
      }
    }
  }

  /// Workers know as many rings that guests transmit by as there are owners of foreign memory.
  private mutating func checkQueuePairs() {
    var pairs = 0
    for fields in ports where fields.string("kind") == Configuration.PortKind.vhostUser.rawValue {
      let before = pairs
      pairs += fields.integer("queues") ?? 1
      guard before <= FrameMemory.foreignOwnersMax, pairs > FrameMemory.foreignOwnersMax else { continue }
      reader.report(
        fields.place(of: fields.isAbsent("queues") ? "kind" : "queues"),
        "the vhost-user ports up to this one have \(pairs) queues",
        "use at most \(FrameMemory.foreignOwnersMax) in all")
    }
  }

  private mutating func checkDevices() {
    var owners: [String: Fields] = [:]
    for fields in ports where !fields.isInvalid("device") && fields.string("kind") != "vhost-user" {
      let name = fields.string("name")
      guard let device = fields.string("device") ?? name else { continue }
      let isFromName = fields.isAbsent("device")
      let place = fields.place(of: isFromName ? "name" : "device")
      if let problem = Self.deviceNameProblem(device) {
        reader.report(
          place, "\"\(device.printable)\" is no device name: \(problem)",
          isFromName ? "set device: a port's name is the device's unless it is set" : "use such as \"vm1\"")
      } else if let owner = owners[device] {
        // Ports of one name whose devices are called as they are: that was reported of the name.
        if name == device && owner.string("name") == device { continue }
        let ownerPlace = owner.place(of: owner.isAbsent("device") ? "name" : "device")
        reader.report(
          place, "device \"\(device)\" is taken by \(ownerPlace.keyPath)", "give each port a device of its own")
      } else {
        owners[device] = fields
      }
    }
  }

  private mutating func checkDomains() {
    // Ports that are wired together need no domain; everything else does.
    let needsDomain = ports.isEmpty || !links.isEmpty || !routes.isEmpty || ports.contains { wiring(of: $0) == nil }
    for (section, isMissing) in [
      (Schema.Section.domain, domains.isEmpty && needsDomain), (.port, ports.isEmpty),
    ] where isMissing {
      // A section that could not be read was reported.
      guard !reader.errors.contains(where: { $0.keyPath == section.rawValue }) else { continue }
      reader.report(
        Place(file: node.place.file, keyPath: section.rawValue), "there is no \(section.header)",
        "add one: without it nothing is forwarded")
    }
    checkUnique("vni", of: domains, areNames: false)
    for fields in ports {
      if let name = fields.string("domain") {
        checkDomainExists(name, at: fields.place(of: "domain"))
      } else if fields.isAbsent("domain") && domains.count > 1 && wiring(of: fields) == nil && !hasDanglingWire {
        reportMissingDomain(fields)
      }
    }
    for fields in links {
      guard let names = fields.strings("domains") else { continue }
      let place = fields.place(of: "domains")
      if names.isEmpty { reader.report(place, "it is empty", "name a domain, or leave it out to carry every domain") }
      for (index, name) in names.enumerated() {
        let elementPlace = place.element(index)
        checkDomainExists(name, at: elementPlace)
        if names[..<index].contains(name) {
          reader.report(elementPlace, "\"\(name.printable)\" comes twice", "name it once")
        }
      }
    }
  }

  mutating func reportMissingDomain(_ fields: Fields) {
    reader.report(
      fields.place(of: "domain"), "it is missing, and there are \(domains.count) domains",
      "set it to one of \(domainNames.joined(separator: ", "))")
  }

  var domainNames: [String] { domains.compactMap { $0.string("name") } }

  mutating func checkDomainExists(_ name: String, at place: Place) {
    // Where a domain's own name could not be read, it may be the one that is meant.
    guard !domainNames.contains(name), !domains.contains(where: { $0.isInvalid("name") }) else { return }
    reader.report(
      place, "no domain is called \"\(name.printable)\"", remedy(for: name, in: domainNames, called: "domains"))
  }

  /// A datagram's source address is all that says which link it came over.
  private mutating func checkLinksSharingDomains(_ ends: Ends) {
    for (index, fields) in links.enumerated() {
      guard let end = ends.remotes[index], let mine = carried(by: fields) else { continue }
      for (earlierIndex, earlier) in links[..<index].enumerated() {
        guard ends.remotes[earlierIndex]?.address == end.address, let theirs = carried(by: earlier) else { continue }
        if isVNETP(fields), isVNETP(earlier) {
          reader.report(
            fields.place(of: "remote"),
            "\(end.address) is the remote of \(earlier.place(of: "remote").keyPath) too, and a vnetp link is known by "
              + "its remote's address alone",
            "use one vnetp link for each address, or encapsulation = \"vxlan\"")
          break
        }
        guard let shared = mine.first(where: theirs.contains) else { continue }
        reader.report(
          fields.place(of: "remote"),
          "\(end.address) is the remote of \(earlier.place(of: "remote").keyPath) too, and both carry domain "
            + "\"\(shared)\"",
          "use one link, or give the links different domains")
        break
      }
    }
  }

  func carried(by link: Fields) -> [String]? {
    link.isInvalid("domains") ? nil : link.strings("domains") ?? domainNames
  }

  private func isVNETP(_ link: Fields) -> Bool {
    link.string("encapsulation") == Configuration.Encapsulation.vnetp.rawValue
  }

  /// What a link's encapsulation has no place for.
  private mutating func checkLinks() {
    for fields in links where isVNETP(fields) {
      if let names = fields.strings("domains"), names.count > 1 {
        reader.report(
          fields.place(of: "domains"), "a vnetp link carries one domain, for its frames bear no VNI",
          "name one domain, use a link for each, or encapsulation = \"vxlan\"")
      } else if fields.isAbsent("domains"), domains.count > 1 {
        reader.report(
          fields.place(of: "domains"),
          "it is missing, and a vnetp link carries one domain of the \(domains.count)",
          "set it to one of \(domainNames.map { "[\"\($0)\"]" }.joined(separator: ", "))")
      }
      if fields.isWritten("reserved_bits") {
        reader.report(
          fields.place(of: "reserved_bits"), "a vnetp link has no header with reserved bits", "leave it out")
      }
    }
    let port = underlay.integer("vnetp_port")
    if let port, port == underlay.integer("vxlan_port"),
      underlay.isWritten("vnetp_port") || links.contains(where: isVNETP)
    {
      let key = underlay.isWritten("vnetp_port") ? "vnetp_port" : "vxlan_port"
      let other = key == "vnetp_port" ? "vxlan_port" : "vnetp_port"
      reader.report(
        underlay.place(of: key), "\(port) is \(other) too, and a datagram's port says how it is encapsulated",
        "use another port")
    }
    for fields in links where fields.boolean("relay") == true {
      let ruled = (carried(by: fields) ?? []).filter { forwarding(of: $0) == .routes }
      guard !ruled.isEmpty else { continue }
      reader.warn(
        fields.place(of: "relay"),
        "it does nothing in \(ruled.map { "\"\($0)\"" }.joined(separator: " and ")), where rules alone decide",
        "leave it out, or use forwarding = \"learning\"")
    }
    for fields in domains where fields.integer("flood_frames_per_second_max") == 0 {
      guard let link = relay(of: fields) else { continue }
      reader.warn(
        fields.place(of: "flood_frames_per_second_max"),
        "\(link.place.keyPath) relays, and without a limit a frame in a loop of links goes round for ever",
        "leave it out to have \(Schema.relayFloodFramesPerSecondMax), or set a limit")
    }
  }

  /// A link that relays floods of the domain; nil where none does.
  private func relay(of domain: Fields) -> Fields? {
    // Where rules alone decide nothing is flooded, and no link relays.
    guard let name = domain.string("name"), forwarding(of: name) == .learning else { return nil }
    return links.first { $0.boolean("relay") == true && carried(by: $0)?.contains(name) == true }
  }

  /// How a domain forwards; nil where there is none of the name.
  func forwarding(of domain: String) -> Configuration.Forwarding? {
    domains.first { $0.string("name") == domain }?.string("forwarding").flatMap(
      Configuration.Forwarding.init(rawValue:))
  }

  /// A VXLAN link takes less than VNET/P, whose limit is the table's.
  private mutating func checkMTUs() {
    for fields in ports {
      guard let bytes = fields.integer("mtu"), bytes > Schema.mtuBytesMaxVXLAN, let domain = domain(of: fields),
        let link = links.first(where: { !isVNETP($0) && carried(by: $0)?.contains(domain) == true })
      else { continue }
      reader.report(
        fields.place(of: "mtu"), "\(bytes) is more than \(link.place.keyPath) can carry, which is vxlan",
        "use at most \(Schema.mtuBytesMaxVXLAN)")
    }
  }

  /// The domain that a port belongs to; nil where it has none or it is not known.
  func domain(of port: Fields) -> String? {
    if port.isInvalid("domain") || (port.isAbsent("domain") && wiring(of: port) != nil) { return nil }
    return port.string("domain") ?? (domains.count == 1 ? domainNames.first : nil)
  }

  /// The guests' addresses, by the index of the port.
  private mutating func makeMACs() -> [MACAddress?] {
    var owners: [MACAddress: Place] = [:]
    return ports.map { fields -> MACAddress? in
      guard let text = fields.string("mac") else { return nil }
      let place = fields.place(of: "mac")
      guard let mac = MACAddress(text) else {
        reader.report(place, "\"\(text.printable)\" is no MAC address", "use such as \"02:00:00:00:00:0a\"")
        return nil
      }
      if mac.isMulticast || mac.isZero {
        reader.report(
          place, "\(mac) is \(mac.isZero ? "nobody's address" : "a group address")", "use the guest's own address")
      } else if let owner = owners[mac] {
        reader.report(place, "\(mac) is taken by \(owner.keyPath)", "give each guest an address of its own")
      } else {
        owners[mac] = place
      }
      return mac
    }
  }
}

// MARK: - Addresses

/// The addresses of both ends of the links.
struct Ends {
  /// This node's.
  var locals: [UnderlayAddress]
  /// By the index of the link; nil where it is not known, which was reported.
  var remotes: [Endpoint?]
}

extension Draft {
  /// The underlay's addresses as they were written, those that are well-formed.
  private mutating func makeUnderlay() -> [UnderlayAddress] {
    guard let texts = underlay.strings("address") else { return [] }
    let place = underlay.place(of: "address")
    if texts.isEmpty { reader.report(place, "it is empty", "give an address, or leave it out") }
    var addresses: [UnderlayAddress] = []
    for (index, text) in texts.enumerated() {
      let elementPlace = texts.count == 1 ? place : place.element(index)
      guard let address = UnderlayAddress(text) else {
        reader.report(
          elementPlace, "\"\(text.printable)\" is no IP address",
          "use such as \"10.99.0.1\" or \"fd00::1\", without a port")
        continue
      }
      if let reason = address.reasonNotUnicast {
        reader.report(elementPlace, "\(address) \(reason)", "use an address of this node that the others can reach")
      } else if let other = addresses.first(where: { $0.family == address.family }) {
        reader.report(
          elementPlace, "\(address) is the second \(address.family) address after \(other)", "give one of each family")
      } else {
        addresses.append(address)
      }
    }
    return addresses
  }

  private mutating func makeEnds(_ written: [UnderlayAddress], _ environment: ConfigurationEnvironment) -> Ends {
    let isLocalGiven = !underlay.isAbsent("address")
    let isLocalKnown = isLocalGiven && !underlay.isInvalid("address") && !written.isEmpty
    var ends = Ends(locals: written, remotes: [])
    /// Which link a local address was found for.
    var finders: [UnderlayAddress.Family: String] = [:]
    for fields in links {
      let place = fields.place(of: "remote")
      guard let text = fields.string("remote"), let candidates = makeCandidates(text, at: place, environment) else {
        ends.remotes.append(nil)
        continue
      }
      let port = candidates.port ?? UInt16(receivePort(of: fields) ?? 0)
      guard isLocalGiven else {
        let routed = candidates.addresses.lazy.compactMap { remote in
          environment.localAddress(remote).map { (remote: remote, local: $0) }
        }.first
        guard let routed else {
          reader.report(
            place, "there is no route to \(candidates.addresses[0])", "add a route, or set address in [underlay]")
          ends.remotes.append(nil)
          continue
        }
        if let local = ends.locals.first(where: { $0.family == routed.local.family }) {
          if local != routed.local {
            reader.report(
              place,
              "the route to \(routed.remote) starts from \(routed.local), that of "
                + "\(finders[local.family] ?? "another link") from \(local)",
              "say which one is meant: address in [underlay], or --address")
          }
        } else {
          ends.locals.append(routed.local)
          finders[routed.local.family] = place.keyPath
        }
        ends.remotes.append(Endpoint(address: routed.remote, port: port))
        continue
      }
      let families = written.map(\.family)
      guard let address = candidates.addresses.first(where: { families.contains($0.family) }) else {
        if isLocalKnown {
          let family = candidates.addresses[0].family
          reader.report(
            place,
            "\(candidates.addresses[0]) is an \(family) address, and \(underlay.place(of: "address").keyPath) has none",
            "add an \(family) address there")
        }
        ends.remotes.append(nil)
        continue
      }
      ends.remotes.append(Endpoint(address: address, port: port))
    }
    checkLinksToSelf(ends)
    return ends
  }

  /// The addresses that a remote may mean, and its port; nil where there is none, which was reported.
  private mutating func makeCandidates(
    _ text: String, at place: Place, _ environment: ConfigurationEnvironment
  ) -> (addresses: [UnderlayAddress], port: UInt16?)? {
    guard let remote = RemoteText(text) else {
      reader.report(
        place, "\"\(text.printable)\" is no address or host name",
        "use such as \"10.99.0.2\", \"10.99.0.2:4790\", \"[fd00::2]:4790\" or \"host-b\"")
      return nil
    }
    switch remote.host {
    case .address(let address):
      if let reason = address.reasonNotUnicast {
        reader.report(place, "\(address) \(reason)", "use the other node's own address")
        return nil
      }
      return ([address], remote.port)
    case .name(let name):
      switch environment.resolve(name) {
      case .failure(let reason):
        reader.report(
          place, "host name \"\(name)\" does not resolve: \(reason)", "check it, or use the other node's address")
        return nil
      case .addresses(let addresses):
        let usable = addresses.filter { $0.reasonNotUnicast == nil }
        guard !usable.isEmpty else {
          reader.report(
            place, "host name \"\(name)\" has no address that a link can use", "use the other node's address")
          return nil
        }
        return (usable, remote.port)
      }
    }
  }

  /// The port that a link's encapsulation is received on.
  private func receivePort(of link: Fields) -> Int? {
    underlay.integer(isVNETP(link) ? "vnetp_port" : "vxlan_port")
  }

  private mutating func checkLinksToSelf(_ ends: Ends) {
    for (fields, end) in zip(links, ends.remotes) {
      guard let end, ends.locals.contains(end.address), Int(end.port) == receivePort(of: fields) else {
        continue
      }
      reader.report(fields.place(of: "remote"), "\(end) is this node itself", "use the other node's address")
    }
  }
}

// MARK: - The result

extension Draft {
  /// Called with nothing wrong: every key has a value or a derived default.
  private func make(
    _ tuning: Configuration.Tuning?, _ underlayWritten: [UnderlayAddress], _ ends: Ends, _ macs: [MACAddress?],
    _ routes: [Configuration.Route], _ environment: ConfigurationEnvironment
  ) -> Configuration {
    guard let tuning else { preconditionFailure("a tuning key without a value was not reported") }
    let names = domainNames
    return Configuration(
      node: .init(name: node.string("name") ?? environment.hostName()),
      underlay: .init(
        addresses: ends.locals, vxlanPort: UInt16(underlay.known("vxlan_port", Fields.integer)),
        vnetpPort: UInt16(underlay.known("vnetp_port", Fields.integer))),
      domains: domains.map { fields in
        Configuration.Domain(
          name: fields.known("name", Fields.string), vni: UInt32(fields.known("vni", Fields.integer)),
          forwarding: fields.word("forwarding"), ageingSeconds: fields.known("ageing_s", Fields.integer),
          macsMax: fields.known("macs_max", Fields.integer),
          floodFramesPerSecondMax: fields.integer("flood_frames_per_second_max")
            ?? (relay(of: fields) == nil ? 0 : Schema.relayFloodFramesPerSecondMax))
      },
      ports: zip(ports, macs).map { fields, mac in
        let name = fields.known("name", Fields.string)
        return Configuration.Port(
          name: name, kind: fields.word("kind"), device: fields.string("device") ?? name,
          socket: fields.string("socket") ?? Schema.socketPath(port: name),
          socketMode: fields.string("socket_mode").flatMap(Configuration.SocketMode.init(rawValue:)) ?? .server,
          domain: domain(of: fields), queues: fields.known("queues", Fields.integer),
          mtuBytes: fields.integer("mtu"), offloads: fields.known("offloads", Fields.boolean), mac: mac)
      },
      links: zip(links, ends.remotes).map { fields, remote in
        guard let remote else { preconditionFailure("a link without a remote was not reported") }
        let carried = fields.strings("domains") ?? names
        return Configuration.Link(
          name: fields.known("name", Fields.string), remote: remote, encapsulation: fields.word("encapsulation"),
          domains: names.filter(carried.contains), isRelay: fields.known("relay", Fields.boolean),
          fragments: fields.boolean("fragment") ?? isVNETP(fields), reservedBits: fields.word("reserved_bits"))
      },
      routes: routes,
      passthroughs: passthroughs.map { fields in
        Configuration.Passthrough(a: fields.known("a", Fields.string), b: fields.known("b", Fields.string))
      },
      tuning: tuning, warnings: reader.warnings.map(\.description))
  }
}

extension Fields {
  /// The value of a key that is required or has a default, once nothing is wrong.
  fileprivate func known<Value>(_ key: String, _ read: (Fields) -> (String) -> Value?) -> Value {
    guard let value = read(self)(key) else { preconditionFailure("\(section).\(key) has no value") }
    return value
  }

  fileprivate func word<Words: RawRepresentable<String>>(_ key: String) -> Words {
    guard let word = Words(rawValue: known(key, Fields.string)) else {
      preconditionFailure("\(section).\(key) has a value outside of the schema")
    }
    return word
  }
}

extension Draft {
  /// Why a text can be no network device's name; nil where it can. Follows dev_valid_name of the kernel's
  /// net/core/dev.c; `%` would be a pattern to TUNSETIFF.
  static func deviceNameProblem(_ name: String) -> String? {
    if name.isEmpty { return "it is empty" }
    if name.utf8.count > Schema.deviceNameBytesMax {
      return "it has \(name.utf8.count) bytes, and \(Schema.deviceNameBytesMax) is the most"
    }
    if name == "." || name == ".." { return "the kernel refuses it" }
    let isAllowed = { (byte: UInt8) in byte > 0x20 && byte < 0x7F && !"/:%".utf8.contains(byte) }
    return name.utf8.allSatisfy(isAllowed) ? nil : "it holds a space, / : % or a character outside of ASCII"
  }
}

extension String {
  /// The text with its control characters written as escape sequences, so that it is one line.
  var escaped: String {
    unicodeScalars.map { scalar in
      let isControl = scalar.properties.generalCategory == .control || scalar == "\u{2028}" || scalar == "\u{2029}"
      return isControl ? "\\u{\(String(scalar.value, radix: 16))}" : String(scalar)
    }.joined()
  }

  /// The text cut where it is very long: what is quoted in an error.
  var printable: String {
    let lengthMax = 80
    return unicodeScalars.count > lengthMax
      ? String(String.UnicodeScalarView(unicodeScalars.prefix(lengthMax))) + "…" : self
  }
}
