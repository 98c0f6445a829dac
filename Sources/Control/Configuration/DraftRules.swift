import Datapath

// MARK: - Passthroughs

extension Draft {
  /// The first passthrough that a port is an end of; nil where there is none.
  func wiring(of port: Fields) -> Fields? {
    guard let name = port.string("name") else { return nil }
    return passthroughs.first { $0.string("a") == name || $0.string("b") == name }
  }

  /// Whether a passthrough has an end that is no port: any port may be the one that is meant.
  var hasDanglingWire: Bool {
    passthroughs.contains { fields in
      ["a", "b"].contains { key in !ports.contains { $0.string("name") == fields.string(key) } }
    }
  }

  mutating func checkPassthroughs() {
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
  mutating func makeRoutes() -> [Configuration.Route] {
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
    guard VNETRoute(source: source, destination: destination, to: .none).score != nil else {
      let better = source == .any ? "an address, not-ADDRESS or any" : "an address or any"
      reader.report(
        fields.place(of: source == .none ? "source" : "destination"),
        "VNET/P has no rule with source \(source.qualifier) and destination \(destination.qualifier)",
        source == .none
          ? "use an address, not-ADDRESS or any"
          : "with source \(source.qualifier) use \(better)"
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
