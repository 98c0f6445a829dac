/// An Ethernet address (IEEE 802, EUI-48) as a number: 48 bits in a `UInt64`, the first byte on the wire being
/// the most significant of the 48, the upper 16 bits zero. So a whole address compares, hashes and masks in one
/// instruction.
public struct MACAddress: BitwiseCopyable, Hashable, Sendable {
  /// The 48 bits; the 16 above them are zero.
  public let bits: UInt64

  /// Bytes of an address on the wire.
  @inlinable @inline(always)
  public static var bytes: Int { 6 }

  /// ff:ff:ff:ff:ff:ff
  @inlinable @inline(always)
  public static var broadcast: MACAddress { MACAddress(bits: 0xffff_ffff_ffff) }

  /// 00:00:00:00:00:00, which is nobody's address.
  @inlinable @inline(always)
  public static var zero: MACAddress { MACAddress(bits: 0) }

  /// From the low 48 bits of `bits`; those above are ignored.
  @inlinable @inline(always)
  public init(bits: UInt64) { self.bits = bits & 0xffff_ffff_ffff }

  /// The group bit (IEEE 802, the lowest of the first byte): multicast or broadcast.
  @inlinable @inline(always)
  public var isMulticast: Bool { bits & 0x0100_0000_0000 != 0 }

  /// All 48 bits set.
  @inlinable @inline(always)
  public var isBroadcast: Bool { bits == 0xffff_ffff_ffff }

  /// All 48 bits clear.
  @inlinable @inline(always)
  public var isZero: Bool { bits == 0 }
}

extension MACAddress: LosslessStringConvertible {
  /// Reads "02:00:00:00:00:0a": six pairs of hexadecimal digits, of either case, joined by colons; nothing
  /// before, between or after. nil for anything else. For control only.
  public init?(_ text: String) {
    var bits: UInt64 = 0
    var position = 0
    for character in text.utf8 {
      if position % 3 == 2 {
        guard character == UInt8(ascii: ":") else { return nil }
      } else {
        let digit: UInt8
        switch character {
        case UInt8(ascii: "0")...UInt8(ascii: "9"): digit = character - UInt8(ascii: "0")
        case UInt8(ascii: "a")...UInt8(ascii: "f"): digit = character - UInt8(ascii: "a") + 10
        case UInt8(ascii: "A")...UInt8(ascii: "F"): digit = character - UInt8(ascii: "A") + 10
        default: return nil
        }
        bits = bits << 4 | UInt64(digit)
      }
      position += 1
      guard position <= 17 else { return nil }
    }
    guard position == 17 else { return nil }
    self.init(bits: bits)
  }

  /// "02:00:00:00:00:0a". Allocates: for control only.
  public var description: String {
    var text = ""
    for shift in stride(from: 40, through: 0, by: -8) {
      let byte = bits >> UInt64(shift) & 0xff
      text += byte < 16 ? "0" : ""
      text += String(byte, radix: 16)
      text += shift > 0 ? ":" : ""
    }
    return text
  }
}
