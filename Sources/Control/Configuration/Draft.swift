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

  private mutating func checkDevices() {
    var owners: [String: Fields] = [:]
    for fields in ports where !fields.isInvalid("device") {
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
      } else if fields.isAbsent("domain") && domains.count > 1 && wiring(of: fields) == nil {
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

  private mutating func reportMissingDomain(_ fields: Fields) {
    reader.report(
      fields.place(of: "domain"), "it is missing, and there are \(domains.count) domains",
      "set it to one of \(domainNames.joined(separator: ", "))")
  }

  private var domainNames: [String] { domains.compactMap { $0.string("name") } }

  private mutating func checkDomainExists(_ name: String, at place: Place) {
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

  private func carried(by link: Fields) -> [String]? {
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
  }

  /// How a domain forwards; nil where there is none of the name.
  private func forwarding(of domain: String) -> Configuration.Forwarding? {
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
  private func domain(of port: Fields) -> String? {
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

// MARK: - Passthroughs

extension Draft {
  /// The first passthrough that a port is an end of; nil where there is none.
  private func wiring(of port: Fields) -> Fields? {
    guard let name = port.string("name") else { return nil }
    return passthroughs.first { $0.string("a") == name || $0.string("b") == name }
  }

  private mutating func checkPassthroughs() {
    let names = ports.compactMap { $0.string("name") }
    var ends: [String: Place] = [:]
    for fields in passthroughs {
      for key in ["a", "b"] {
        guard let name = fields.string(key) else { continue }
        let place = fields.place(of: key)
        guard let port = ports.first(where: { $0.string("name") == name }) else {
          // Where a port's own name could not be read, it may be the one that is meant.
          guard !ports.contains(where: { $0.isInvalid("name") }) else { continue }
          let isLink = links.contains { $0.string("name") == name }
          reader.report(
            place, isLink ? "\"\(name)\" is a link" : "no port is called \"\(name.printable)\"",
            isLink ? "name a port: a link needs a domain" : remedy(for: name, in: names, called: "ports"))
          continue
        }
        if key == "b", fields.string("a") == name {
          reader.report(place, "\"\(name)\" is wired to itself", "name another port")
          continue
        }
        if let other = ends[name] {
          reader.report(
            place, "\"\(name)\" is wired at \(other.keyPath) already", "name a port once: a passthrough has two ends")
          continue
        }
        ends[name] = place
        if let domain = port.string("domain") {
          reader.report(
            place, "\"\(name)\" is in domain \"\(domain.printable)\" (\(port.place(of: "domain").keyPath))",
            "take the port's domain out, or the passthrough: it is one or the other")
        }
      }
    }
  }
}

// MARK: - Routes

extension Draft {
  private mutating func makeRoutes() -> [Configuration.Route] {
    var owners: [Configuration.Route: Place] = [:]
    var made: [Configuration.Route] = []
    for fields in routes {
      let domain = makeDomain(ofRoute: fields)
      let patterns = makePatterns(ofRoute: fields)
      var from: Configuration.InterfaceName?
      var isFromKnown = fields.string("from") == "any"
      if !isFromKnown, let name = makeInterface(fields, "from", ["any", "port:NAME", "link:NAME"], domain: domain) {
        from = name
        isFromKnown = true
      }
      let to = makeInterface(fields, "to", ["port:NAME", "link:NAME"], domain: domain)
      if let to, from == to {
        reader.report(
          fields.place(of: "to"), "\(to) is where the frame came from, and none goes back there",
          "name another port or link")
        continue
      }
      guard let domain, let patterns, isFromKnown, let to else { continue }
      let route = Configuration.Route(
        domain: domain, source: patterns.source, destination: patterns.destination, from: from, to: to)
      if let owner = owners[route] {
        reader.report(fields.place, "it is the same rule as \(owner.keyPath)", "leave one of them out")
      } else {
        owners[route] = fields.place
      }
      made.append(route)
    }
    for fields in domains where fields.string("forwarding") == Configuration.Forwarding.routes.rawValue {
      // A rule whose domain could not be read may be for this one.
      guard let name = fields.string("name"), !made.contains(where: { $0.domain == name }), reader.errors.isEmpty else {
        continue
      }
      reader.warn(
        fields.place(of: "forwarding"), "\"\(name)\" has no rule: it drops every frame",
        "add a [[route]] for it, or use forwarding = \"learning\"")
    }
    return made
  }

  /// The domain that a rule is for; nil where it is not known, which was reported.
  private mutating func makeDomain(ofRoute fields: Fields) -> String? {
    guard !fields.isInvalid("domain") else { return nil }
    guard let name = fields.string("domain") ?? (domains.count == 1 ? domainNames.first : nil) else {
      if domains.count > 1 { reportMissingDomain(fields) }
      return nil
    }
    let place = fields.place(of: "domain")
    guard domainNames.contains(name) else {
      checkDomainExists(name, at: place)
      return nil
    }
    if let forwarding = forwarding(of: name), forwarding != .routes {
      reader.report(
        place, "domain \"\(name)\" has forwarding = \"\(forwarding.rawValue)\", which follows no rules",
        "set its forwarding to \"routes\", or leave the rule out")
      return nil
    }
    return name
  }

  private mutating func makePatterns(
    ofRoute fields: Fields
  ) -> (source: Configuration.MACPattern, destination: Configuration.MACPattern)? {
    let source = makePattern(fields, "source")
    let destination = makePattern(fields, "destination")
    guard let source, let destination else { return nil }
    guard Configuration.MACPattern.haveScore(source: source, destination: destination) else {
      reader.report(
        fields.place(of: source == .none ? "source" : "destination"),
        "VNET/P has no rule with source \(source.qualifier) and destination \(destination.qualifier)",
        source == .none
          ? "use an address, not-ADDRESS or any"
          : "with source \(source.qualifier) use \(source == .any ? "an address, not-ADDRESS or any" : "an address or any")"
      )
      return nil
    }
    return (source, destination)
  }

  private mutating func makePattern(_ fields: Fields, _ key: String) -> Configuration.MACPattern? {
    guard let text = fields.string(key) else { return nil }
    guard let pattern = Configuration.MACPattern(text) else {
      reader.report(
        fields.place(of: key), "\"\(text.printable)\" is no MAC pattern",
        "use \"any\", \"none\", such as \"02:00:00:00:00:0a\", or \"not-02:00:00:00:00:0a\"")
      return nil
    }
    if key == "source", case .exact(let mac) = pattern, mac.isMulticast || mac.isZero {
      reader.report(
        fields.place(of: key), "no frame comes from \(mac), which is \(mac.isZero ? "nobody's" : "a group") address",
        "use a guest's address")
      return nil
    }
    return pattern
  }

  /// A port or a link of the domain; nil where it is none, which was reported.
  private mutating func makeInterface(
    _ fields: Fields, _ key: String, _ forms: [String], domain: String?
  ) -> Configuration.InterfaceName? {
    guard let text = fields.string(key) else { return nil }
    let place = fields.place(of: key)
    guard let interface = Configuration.InterfaceName(text) else {
      let words = forms.map { "\"\($0)\"" }
      reader.report(
        place, "\"\(text.printable)\" is no \(key == "from" ? "origin" : "port or link")",
        "use \(words.dropLast().joined(separator: ", ")) or \(words[words.count - 1])")
      return nil
    }
    let (sections, name, what) =
      switch interface {
      case .port(let name): (ports, name, "port")
      case .link(let name): (links, name, "link")
      }
    guard let section = sections.first(where: { $0.string("name") == name }) else {
      // Where a name could not be read, it may be the one that is meant.
      guard !sections.contains(where: { $0.isInvalid("name") }) else { return nil }
      let isOther = (ports + links).contains { $0.string("name") == name }
      let other = what == "port" ? "link" : "port"
      reader.report(
        place, isOther ? "\"\(name)\" is a \(other)" : "no \(what) is called \"\(name.printable)\"",
        isOther
          ? "write \"\(other):\(name)\""
          : remedy(for: name, in: sections.compactMap { $0.string("name") }, called: "\(what)s"))
      return nil
    }
    guard let domain else { return interface }
    switch interface {
    case .port:
      guard !section.isInvalid("domain"), self.domain(of: section) != domain else { return interface }
      let its = self.domain(of: section).map { "it is in \"\($0.printable)\"" } ?? "it is in none"
      reader.report(
        place, "port \"\(name)\" is not in domain \"\(domain)\": \(its)", "name a port or link of that domain")
    case .link:
      guard let carried = carried(by: section), !carried.contains(domain) else { return interface }
      reader.report(
        place, "link \"\(name)\" does not carry domain \"\(domain)\"",
        "add it to \(section.place(of: "domains").keyPath), or name a port or link of that domain")
    }
    return nil
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

// MARK: - Tuning

extension Draft {
  /// nil where something was reported.
  private mutating func makeTuning(_ environment: ConfigurationEnvironment) -> Configuration.Tuning? {
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
      let sourcePorts = tuning.integer("source_ports")
    else { return nil }
    return Configuration.Tuning(
      layout: layout, cpus: cpus, dispatch: dispatch, yield: yield, io: io, ringEntries: ringEntries,
      batchFrames: batchFrames, batchWaitMicroseconds: batchWait, spinMicroseconds: spin, slots: slots,
      ringDepthFrames: tuning.integer("ring_depth_frames") ?? slots, ringBatchFrames: ringBatch,
      sendBufferBytes: sendBuffer, receiveBufferBytes: receiveBuffer, dispatchUpperFramesPerSecond: upper,
      dispatchLowerFramesPerSecond: lower, dispatchPeriodMilliseconds: period, sourcePorts: sourcePorts,
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
      for (worker, role) in workers.idleStages {
        let before = role == .route ? Roles.receive : .route
        reader.report(
          place,
          "\(role) on CPU \(workers.workers[worker].cpu) would get no frames: each CPU that runs \(before) runs "
            + "\(role) too, and keeps its frames",
          "take that CPU out of \(role), or give \(before) a CPU without \(role)")
      }
    }
    if let dispatch = choice("dispatch", Configuration.Dispatch.self) {
      // The queues decide how many workers a fused layout has, which is never a reason to warn.
      let choice = WorkerSet.choose(layout: layout, cpus: cpus, dispatch: dispatch, queuesMax: 1, allowed: allowed)
      for warning in choice.warnings {
        reader.warn(place, warning, "give each stage CPUs of its own, or use layout = \"fused\"")
      }
    }
    return cpus
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
        place,
        "\(numbers(absent)): this machine does not have it, or it is offline: it runs \(kernelList(ofCPUs: online))",
        remedy)
    }
    if !forbidden.isEmpty {
      reader.report(
        place,
        "\(numbers(forbidden)): this process may not use it: its affinity or its cgroup's cpuset has "
          + kernelList(ofCPUs: allowed),
        "\(remedy), or let it use more (taskset, AllowedCPUs= of the unit, the container's cpuset)")
    }
    return absent.isEmpty && forbidden.isEmpty
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
          floodFramesPerSecondMax: fields.known("flood_frames_per_second_max", Fields.integer))
      },
      ports: zip(ports, macs).map { fields, mac in
        let name = fields.known("name", Fields.string)
        return Configuration.Port(
          name: name, kind: fields.word("kind"), device: fields.string("device") ?? name,
          domain: domain(of: fields), queues: fields.known("queues", Fields.integer),
          mtuBytes: fields.integer("mtu"), mac: mac)
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
