import CLinux

/// The Internet checksum (RFC 1071): the complement of the one's complement sum of 16-bit words.
///
/// A running sum is a `UInt64` of whole words read in network order, not yet folded: sums add with `+`.
/// Only the last of several pieces may have an odd length, for an odd piece counts as padded with a zero byte.
public enum InternetChecksum {
  /// `initial` plus the sum of `bytes`, from any alignment and of any length.
  ///
  /// The sum does not depend on the order of bytes (RFC 1071 §2 B), so it is made of the machine's own words and
  /// swapped once at the end.
  @inlinable
  public static func sum(_ bytes: RawSpan, initial: UInt64 = 0) -> UInt64 {
    var sum: UInt128 = 0
    var offset = 0
    if bytes.byteCount >= blockwiseBytesMin {
      offset = bytes.byteCount & ~(blockBytes &- 1)
      sum = UInt128(sumOfBlocks(unsafe bytes.extracting(unchecked: 0..<offset)))
    }
    // 128 bits, so that the carries of a step need not be in before the next one.
    let wordsEnd = bytes.byteCount & ~7
    while offset < wordsEnd {
      sum &+= UInt128(unsafe bytes.unsafeLoadUnaligned(fromUncheckedByteOffset: offset, as: UInt64.self))
      offset &+= 8
    }
    if bytes.byteCount & 4 != 0 {
      sum &+= UInt128(unsafe bytes.unsafeLoadUnaligned(fromUncheckedByteOffset: offset, as: UInt32.self))
      offset &+= 4
    }
    if bytes.byteCount & 2 != 0 {
      sum &+= UInt128(unsafe bytes.unsafeLoadUnaligned(fromUncheckedByteOffset: offset, as: UInt16.self))
      offset &+= 2
    }
    if bytes.byteCount & 1 != 0 {
      // Its neighbour in the last word is the padding: the byte comes first in memory on any machine.
      sum &+= UInt128(UInt16(littleEndian: UInt16(unsafe bytes.networkUInt8(at: offset))))
    }
    // Less than 2^34, as 2^64 counts as 1 like every power of 2^16.
    let low = UInt64(truncatingIfNeeded: sum)
    let folded = (low & 0xffff_ffff) &+ (low &>> 32) &+ UInt64(truncatingIfNeeded: sum &>> 64)
    return initial &+ UInt64(UInt16(bigEndian: fold(folded)))
  }

  /// What vector code sums at a time.
  @usableFromInline static var blockBytes: Int { Int(CLINUX_SUM_BLOCK_BYTES) }

  /// From here on vector code pays for its start and its end.
  @usableFromInline static var blockwiseBytesMin: Int { 128 }

  /// The sum of 16-bit words in the machine's order.
  /// - Parameter bytes: a multiple of ``blockBytes``.
  @usableFromInline
  static func sumOfBlocks(_ bytes: RawSpan) -> UInt64 {
    let blocks = bytes.byteCount / blockBytes
    // No frame is too long: the shim takes 1 MiB.
    guard clinux_can_sum_blocks(), blocks <= Int(CLINUX_SUM_BLOCKS_MAX) else { return sumOfWords(bytes) }
    return unsafe bytes.withUnsafeBytes { unsafe clinux_sum_blocks($0.baseAddress, blocks) }
  }

  /// The same in plain words. Each goes as two 32-bit halves into two sums, which needs no carry and which the
  /// compiler turns into the vector code that every processor of the architecture has.
  static func sumOfWords(_ bytes: RawSpan) -> UInt64 {
    var even: UInt64 = 0
    var odd: UInt64 = 0
    var offset = 0
    let wordsEnd = bytes.byteCount & ~7
    while offset < wordsEnd {
      let word = unsafe bytes.unsafeLoadUnaligned(fromUncheckedByteOffset: offset, as: UInt64.self)
      even &+= word & 0xffff_ffff
      odd &+= word &>> 32
      offset &+= 8
    }
    return even &+ odd
  }

  /// A running sum as one 16-bit word: the carries added back in.
  @inlinable @inline(always)
  public static func fold(_ sum: UInt64) -> UInt16 {
    var folded = (sum & 0xffff_ffff) &+ (sum &>> 32)
    folded = (folded & 0xffff) &+ (folded &>> 16)
    folded = (folded & 0xffff) &+ (folded &>> 16)
    folded = (folded & 0xffff) &+ (folded &>> 16)
    return UInt16(truncatingIfNeeded: folded)
  }

  /// The checksum to store for a running sum: folded and complemented. What is covered together with a right
  /// checksum finishes as zero. UDP must send 0xffff instead of zero (RFC 768): see ``finishTransport(_:)``.
  @inlinable @inline(always)
  public static func finish(_ sum: UInt64) -> UInt16 { ~fold(sum) }

  /// As ``finish(_:)``, but never zero, which for UDP means "none" (RFC 768, RFC 8200 §8.1). Right for TCP too,
  /// since 0 and 0xffff are the same number in one's complement; Linux does the same.
  @inlinable @inline(always)
  public static func finishTransport(_ sum: UInt64) -> UInt16 {
    let checksum = finish(sum)
    return checksum == 0 ? 0xffff : checksum
  }

  /// The running sum of the IPv4 pseudo-header (RFC 768, RFC 9293 §3.1).
  /// - Parameter length: bytes of transport header and payload, 0 to 65,535.
  @inlinable @inline(always)
  public static func pseudoHeader(
    source: UInt32, destination: UInt32, ipProtocol: UInt8, length: Int
  ) -> UInt64 {
    UInt64(source) &+ UInt64(destination) &+ UInt64(ipProtocol) &+ UInt64(UInt32(truncatingIfNeeded: length))
  }

  /// The running sum of the IPv6 pseudo-header (RFC 8200 §8.1).
  /// - Parameter ipProtocol: the upper layer's, not that of an extension header.
  /// - Parameter length: bytes of transport header and payload, at most 32 bits.
  @inlinable @inline(always)
  public static func pseudoHeader(
    source: UInt128, destination: UInt128, ipProtocol: UInt8, length: Int
  ) -> UInt64 {
    let addresses = words(of: source) &+ words(of: destination)
    return addresses &+ UInt64(ipProtocol) &+ UInt64(UInt32(truncatingIfNeeded: length))
  }

  /// The checksum after one of the words that it covers has changed from `old` to `new`, without reading the
  /// rest (RFC 1624 §3, equation 3). The word must stand at an even offset of what is covered. A checksum that
  /// was wrong stays wrong.
  @inlinable @inline(always)
  public static func update(_ checksum: UInt16, from old: UInt16, to new: UInt16) -> UInt16 {
    finish(UInt64(~checksum) &+ UInt64(~old) &+ UInt64(new))
  }

  /// The four 32-bit words of an address, added: they cannot overflow 64 bits.
  @inlinable @inline(always)
  static func words(of address: UInt128) -> UInt64 {
    let high = UInt64(truncatingIfNeeded: address &>> 64)
    let low = UInt64(truncatingIfNeeded: address)
    return (high &>> 32) &+ (high & 0xffff_ffff) &+ (low &>> 32) &+ (low & 0xffff_ffff)
  }
}
