// Plain, slow, checked ways to bytes, for the invariants to be checked with other means than what they check.

func byte(_ index: Int, of span: RawSpan) -> UInt8 {
  unsafe span.unsafeLoadUnaligned(fromByteOffset: index, as: UInt8.self)
}

func bytes(of span: RawSpan) -> [UInt8] {
  span.byteOffsets.map { byte($0, of: span) }
}

func equal(_ left: RawSpan, _ right: RawSpan) -> Bool {
  guard left.byteCount == right.byteCount else { return false }
  for index in left.byteOffsets where byte(index, of: left) != byte(index, of: right) { return false }
  return true
}

/// RFC 1071 as it is written down: one 16-bit word after the other, the carries folded in at once.
func referenceSum(_ span: RawSpan) -> UInt16 {
  var sum: UInt32 = 0
  for index in stride(from: 0, to: span.byteCount, by: 2) {
    let low = index + 1 < span.byteCount ? byte(index + 1, of: span) : 0
    sum += UInt32(byte(index, of: span)) << 8 | UInt32(low)
    if sum > 0xffff { sum -= 0xffff }
  }
  return UInt16(sum)
}

extension [UInt8] {
  /// The bytes as parsers take them.
  public var rawBytes: RawSpan {
    @_lifetime(borrow self) get { unsafe span.bytes }
  }

  /// Lends the bytes to a writer.
  public mutating func withMutableRawBytes<Result>(_ body: (inout MutableRawSpan) -> Result) -> Result {
    var elements = mutableSpan
    var raw = unsafe elements.mutableBytes
    return body(&raw)
  }
}
