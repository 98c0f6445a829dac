/// Names for the entries of the tables that control and workers share. An index stays the same from the
/// moment its entry is added until it is removed, whatever snapshot is current.

/// A port or a link, by its place in the interface table.
public struct InterfaceIndex: BitwiseCopyable, Hashable, Sendable, CustomStringConvertible {
  public let rawValue: UInt16
  /// The most ports and links together: indices are 16 bits wide because the MAC table keeps one beside 48 bits of MAC.
  public static let countMax = 0xFFFF
  /// No interface: a frame of the underlay whose link is not known yet.
  public static var none: InterfaceIndex { InterfaceIndex(rawValue: 0xFFFF) }

  @inline(always)
  public init(_ index: Int) {
    precondition(index >= 0 && index <= 0xFFFF, "interface index out of range")
    rawValue = UInt16(truncatingIfNeeded: index)
  }
  @inline(always)
  public init(rawValue: UInt16) { self.rawValue = rawValue }
  @inline(always)
  public var index: Int { Int(rawValue) }
  public var description: String { self == .none ? "none" : "\(rawValue)" }
}

/// How frames travel over a link.
public enum Encapsulation: UInt8, BitwiseCopyable, Sendable, CaseIterable {
  /// RFC 7348.
  case vxlan
  /// The raw frame in UDP, as VNET/P has it.
  case vnetp
}

/// A domain, by its place in the domain table (not its VNI).
public struct DomainIndex: BitwiseCopyable, Hashable, Sendable, CustomStringConvertible {
  public let rawValue: UInt16
  /// The domain is not known: a datagram whose VNI has not been looked up.
  public static var none: DomainIndex { DomainIndex(rawValue: 0xFFFF) }

  @inline(always)
  public init(rawValue: UInt16) { self.rawValue = rawValue }
  @inline(always)
  public init(_ index: Int) {
    precondition(index >= 0 && index <= 0xFFFF, "domain index out of range")
    rawValue = UInt16(truncatingIfNeeded: index)
  }
  @inline(always)
  public var index: Int { Int(rawValue) }
  public var description: String { self == .none ? "none" : "\(rawValue)" }
}
