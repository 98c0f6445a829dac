import Datapath

extension UnderlayAddress {
  /// The two families that an underlay can have.
  public enum Family: Hashable, Sendable, CustomStringConvertible {
    case ipv4
    case ipv6

    public var description: String { self == .ipv4 ? "IPv4" : "IPv6" }
  }

  public var family: Family { isIPv4 ? .ipv4 : .ipv6 }

  /// Why no link can have this address as an end; nil when one can.
  var reasonNotUnicast: String? {
    if isUnspecified { return "is the unspecified address" }
    if isMulticast { return "is a multicast address" }
    // RFC 1112, section 4: 240.0.0.0/4 is reserved, and ends with the limited broadcast address.
    if isIPv4 && (low >> 28) & 0xF == 0xF { return "is a broadcast or reserved address" }
    // RFC 4291, section 2.5.6: fe80::/10.
    if high >> 54 == 0xFE80 >> 6 { return "is link-local, which needs a zone and is not supported" }
    return nil
  }
}

/// One end of a link: an address and a UDP port.
public struct Endpoint: Hashable, Sendable, CustomStringConvertible {
  public var address: UnderlayAddress
  public var port: UInt16

  public init(address: UnderlayAddress, port: UInt16) {
    self.address = address
    self.port = port
  }

  public var description: String {
    address.isIPv4 ? "\(address):\(port)" : "[\(address)]:\(port)"
  }
}

/// What a `remote` says before any name is resolved: a host and, where it is given, a port.
struct RemoteText: Equatable {
  enum Host: Equatable {
    case address(UnderlayAddress)
    case name(String)
  }

  /// The longest host name, in characters (RFC 1035, section 2.3.4, less the root's length byte and dot).
  static let hostNameCharactersMax = 253

  var host: Host
  var port: UInt16?

  /// Parses `10.0.0.2`, `10.0.0.2:4790`, `fd00::2`, `[fd00::2]`, `[fd00::2]:4790`, `host` and `host:4790`;
  /// nil for anything else, also for what looks like an address and is none, such as `10.0.0.256`.
  init?(_ text: String) {
    if let address = UnderlayAddress(text) {
      self.host = .address(address)
      return
    }
    if text.hasPrefix("[") {
      guard let end = text.firstIndex(of: "]"),
        let address = UnderlayAddress(String(text[text.index(after: text.startIndex)..<end])), address.family == .ipv6
      else { return nil }
      self.host = .address(address)
      let rest = text[text.index(after: end)...]
      if rest.isEmpty { return }
      guard rest.hasPrefix(":"), let port = Self.port(rest.dropFirst()) else { return nil }
      self.port = port
      return
    }
    let parts = text.split(separator: ":", omittingEmptySubsequences: false)
    guard parts.count <= 2 else { return nil }
    if parts.count == 2 {
      guard let port = Self.port(parts[1]) else { return nil }
      self.port = port
    }
    let hostText = String(parts[0])
    if let address = UnderlayAddress(hostText) {
      self.host = .address(address)
    } else if Self.isHostName(hostText) {
      self.host = .name(hostText)
    } else {
      return nil
    }
  }

  private static func port(_ text: Substring) -> UInt16? {
    guard !text.isEmpty, text.utf8.allSatisfy({ $0 >= 0x30 && $0 <= 0x39 }), let port = UInt16(text), port > 0
    else { return nil }
    return port
  }

  /// RFC 1123, section 2.1, with underscores, which real host names have. A name whose last label is a number is a
  /// mistyped address.
  private static func isHostName(_ text: String) -> Bool {
    guard !text.isEmpty, text.utf8.count <= hostNameCharactersMax else { return false }
    let labels = text.split(separator: ".", omittingEmptySubsequences: false)
    let wellFormed = labels.allSatisfy { label in
      !label.isEmpty && label.utf8.count <= 63 && !label.hasPrefix("-") && !label.hasSuffix("-")
        && label.utf8.allSatisfy { isLetterOrDigit($0) || $0 == UInt8(ascii: "-") || $0 == UInt8(ascii: "_") }
    }
    return wellFormed && !labels[labels.count - 1].utf8.allSatisfy { $0 >= 0x30 && $0 <= 0x39 }
  }
}

/// Whether a byte is an ASCII letter or digit.
func isLetterOrDigit(_ byte: UInt8) -> Bool {
  (byte >= 0x30 && byte <= 0x39) || (byte >= 0x41 && byte <= 0x5A) || (byte >= 0x61 && byte <= 0x7A)
}
