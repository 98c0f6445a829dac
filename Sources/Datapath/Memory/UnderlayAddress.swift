import CLinux

/// An IPv4 or IPv6 address of the underlay as 128 bits, an IPv4 one in its mapped form `::ffff:a.b.c.d`
/// (RFC 4291 section 2.5.5.2), so that both families share one table.
public struct UnderlayAddress: BitwiseCopyable, Hashable, Sendable, CustomStringConvertible {
  /// The first and the last eight bytes, each as a number in host order.
  public let high: UInt64
  public let low: UInt64

  @usableFromInline static var mappedPrefix: UInt64 { 0xFFFF_0000_0000 }

  @inline(always)
  public init(high: UInt64, low: UInt64) {
    self.high = high
    self.low = low
  }

  /// An IPv4 address in host order: 10.0.0.1 is 0x0A000001.
  @inline(always)
  public init(ipv4 bits: UInt32) {
    high = 0
    low = Self.mappedPrefix | UInt64(bits)
  }

  /// Parses "10.0.0.1" or "fd00::1"; nil for anything else, names and ports included.
  public init?(_ text: String) {
    var four = in_addr()
    if unsafe inet_pton(AF_INET, text, &four) == 1 {
      self.init(ipv4: UInt32(bigEndian: four.s_addr))
      return
    }
    var words: (UInt64, UInt64) = (0, 0)
    guard unsafe inet_pton(AF_INET6, text, &words) == 1 else { return nil }
    self.init(high: UInt64(bigEndian: words.0), low: UInt64(bigEndian: words.1))
  }

  public var isIPv4: Bool { high == 0 && low >> 32 == Self.mappedPrefix >> 32 }
  /// Multicast (224.0.0.0/4, ff00::/8), never a link's other end.
  public var isMulticast: Bool { isIPv4 ? (low >> 28) & 0xF == 0xE : high >> 56 == 0xFF }
  /// 0.0.0.0 or `::`.
  public var isUnspecified: Bool { isIPv4 ? UInt32(truncatingIfNeeded: low) == 0 : high == 0 && low == 0 }

  public var description: String {
    if isIPv4 {
      let bits = UInt32(truncatingIfNeeded: low)
      return "\(bits >> 24).\(bits >> 16 & 0xFF).\(bits >> 8 & 0xFF).\(bits & 0xFF)"
    }
    var words = (high.bigEndian, low.bigEndian)
    var text = [CChar](repeating: 0, count: Int(INET6_ADDRSTRLEN))
    guard unsafe inet_ntop(AF_INET6, &words, &text, socklen_t(text.count)) != nil else { return "?" }
    return String(decoding: text.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }
}
