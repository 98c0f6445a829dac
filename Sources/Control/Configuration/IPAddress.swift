import Glibc

/// An IPv4 or IPv6 address of the underlay, as a plain value.
public struct IPAddress: Hashable, Sendable, CustomStringConvertible {
  /// The two families that an underlay can have.
  public enum Family: Hashable, Sendable, CustomStringConvertible {
    case ipv4
    case ipv6

    public var description: String { self == .ipv4 ? "IPv4" : "IPv6" }
  }

  public let family: Family
  /// The address in network byte order: the first 4 bytes are an IPv4 address (the rest zero), all 16 an IPv6 one.
  private let high: UInt64
  private let low: UInt64

  /// The address's bytes in network byte order: 4 for IPv4, 16 for IPv6.
  public var bytes: [UInt8] {
    let all = Self.bytes(of: high) + Self.bytes(of: low)
    return family == .ipv4 ? Array(all.prefix(4)) : all
  }

  /// Makes an address of its bytes in network byte order; nil unless there are 4 (IPv4) or 16 (IPv6) of them.
  public init?(bytes: [UInt8]) {
    guard bytes.count == 4 || bytes.count == 16 else { return nil }
    family = bytes.count == 4 ? .ipv4 : .ipv6
    let padded = bytes + [UInt8](repeating: 0, count: 16 - bytes.count)
    high = Self.word(of: padded[0..<8])
    low = Self.word(of: padded[8..<16])
  }

  /// Parses dotted IPv4 or RFC 4291 IPv6 text, without a port, brackets or a zone; nil for anything else.
  public init?(_ text: String) {
    var bytes = [UInt8](repeating: 0, count: 16)
    if unsafe inet_pton(AF_INET, text, &bytes) == 1 {
      self.init(bytes: Array(bytes.prefix(4)))
    } else if unsafe inet_pton(AF_INET6, text, &bytes) == 1 {
      self.init(bytes: bytes)
    } else {
      return nil
    }
  }

  /// The address as inet_ntop writes it (RFC 5952 for IPv6).
  public var description: String {
    var text = [CChar](repeating: 0, count: Int(INET6_ADDRSTRLEN))
    let source = bytes
    let written = unsafe inet_ntop(
      family == .ipv4 ? AF_INET : AF_INET6, source, &text, socklen_t(INET6_ADDRSTRLEN))
    guard unsafe written != nil else { return "unprintable address" }
    return String(decoding: text.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }

  /// Why no link can have this address as an end; nil when one can.
  var reasonNotUnicast: String? {
    let bytes = self.bytes
    if bytes.allSatisfy({ $0 == 0 }) { return "is the unspecified address" }
    switch family {
    case .ipv4:
      if bytes[0] >= 224 && bytes[0] < 240 { return "is a multicast address" }
      if bytes[0] >= 240 { return "is a broadcast or reserved address" }
    case .ipv6:
      if bytes[0] == 0xFF { return "is a multicast address" }
      if bytes[0] == 0xFE && bytes[1] & 0xC0 == 0x80 { return "is link-local, which needs a zone and is not supported" }
      if bytes[0..<10].allSatisfy({ $0 == 0 }) && bytes[10] == 0xFF && bytes[11] == 0xFF {
        return "is an IPv4-mapped address (write it as IPv4)"
      }
    }
    return nil
  }

  private static func word(of bytes: ArraySlice<UInt8>) -> UInt64 {
    bytes.reduce(0) { $0 << 8 | UInt64($1) }
  }

  private static func bytes(of word: UInt64) -> [UInt8] {
    (0..<8).map { UInt8(truncatingIfNeeded: word >> UInt64(56 - 8 * $0)) }
  }
}

/// One end of a link: an address and a UDP port.
public struct Endpoint: Hashable, Sendable, CustomStringConvertible {
  public var address: IPAddress
  public var port: UInt16

  public init(address: IPAddress, port: UInt16) {
    self.address = address
    self.port = port
  }

  public var description: String {
    address.family == .ipv4 ? "\(address):\(port)" : "[\(address)]:\(port)"
  }
}

/// What a `remote` says before any name is resolved: a host and, where it is given, a port.
struct RemoteText: Equatable {
  enum Host: Equatable {
    case address(IPAddress)
    case name(String)
  }

  /// The longest host name, in characters (RFC 1035, section 2.3.4, less the root's length byte and dot).
  static let hostNameCharactersMax = 253

  var host: Host
  var port: UInt16?

  /// Parses `10.0.0.2`, `10.0.0.2:4790`, `fd00::2`, `[fd00::2]`, `[fd00::2]:4790`, `host` and `host:4790`;
  /// nil for anything else, also for what looks like an address and is none, such as `10.0.0.256`.
  init?(_ text: String) {
    if let address = IPAddress(text) {
      self.host = .address(address)
      return
    }
    if text.hasPrefix("[") {
      guard let end = text.firstIndex(of: "]"),
        let address = IPAddress(String(text[text.index(after: text.startIndex)..<end])), address.family == .ipv6
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
    if let address = IPAddress(hostText) {
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

/// ASCII letters and digits.
func isLetterOrDigit(_ byte: UInt8) -> Bool {
  (byte >= 0x30 && byte <= 0x39) || (byte >= 0x41 && byte <= 0x5A) || (byte >= 0x61 && byte <= 0x7A)
}
