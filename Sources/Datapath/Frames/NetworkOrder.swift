// Loads and stores of numbers in network order. Everything in this folder reads and writes through these.
//
// They do not check the offset in release builds: a view or a writer checks the length once, at its border,
// and what it then does inside that length cannot fail. In debug builds they assert it, so that the tests and
// the fuzzer find a border that checked too little.

extension RawSpan {
  @unsafe @inlinable @inline(always)
  func networkUInt8(at offset: Int) -> UInt8 {
    assert(offset >= 0 && offset + 1 <= byteCount, "load outside of the span")
    return unsafe unsafeLoadUnaligned(fromUncheckedByteOffset: offset, as: UInt8.self)
  }

  @unsafe @inlinable @inline(always)
  func networkUInt16(at offset: Int) -> UInt16 {
    assert(offset >= 0 && offset + 2 <= byteCount, "load outside of the span")
    return UInt16(bigEndian: unsafe unsafeLoadUnaligned(fromUncheckedByteOffset: offset, as: UInt16.self))
  }

  @unsafe @inlinable @inline(always)
  func networkUInt32(at offset: Int) -> UInt32 {
    assert(offset >= 0 && offset + 4 <= byteCount, "load outside of the span")
    return UInt32(bigEndian: unsafe unsafeLoadUnaligned(fromUncheckedByteOffset: offset, as: UInt32.self))
  }

  @unsafe @inlinable @inline(always)
  func networkUInt64(at offset: Int) -> UInt64 {
    assert(offset >= 0 && offset + 8 <= byteCount, "load outside of the span")
    return UInt64(bigEndian: unsafe unsafeLoadUnaligned(fromUncheckedByteOffset: offset, as: UInt64.self))
  }

  /// Two 64-bit loads: an IPv6 address.
  @unsafe @inlinable @inline(always)
  func networkUInt128(at offset: Int) -> UInt128 {
    let high = unsafe networkUInt64(at: offset)
    let low = unsafe networkUInt64(at: offset &+ 8)
    return UInt128(high) &<< 64 | UInt128(low)
  }
}

extension MutableRawSpan {
  @unsafe @inlinable @inline(always)
  mutating func storeNetwork(_ value: UInt8, at offset: Int) {
    assert(offset >= 0 && offset + 1 <= byteCount, "store outside of the span")
    unsafe storeBytes(of: value, toUncheckedByteOffset: offset, as: UInt8.self)
  }

  @unsafe @inlinable @inline(always)
  mutating func storeNetwork(_ value: UInt16, at offset: Int) {
    assert(offset >= 0 && offset + 2 <= byteCount, "store outside of the span")
    unsafe storeBytes(of: value.bigEndian, toUncheckedByteOffset: offset, as: UInt16.self)
  }

  @unsafe @inlinable @inline(always)
  mutating func storeNetwork(_ value: UInt32, at offset: Int) {
    assert(offset >= 0 && offset + 4 <= byteCount, "store outside of the span")
    unsafe storeBytes(of: value.bigEndian, toUncheckedByteOffset: offset, as: UInt32.self)
  }

  @unsafe @inlinable @inline(always)
  mutating func storeNetwork(_ value: UInt64, at offset: Int) {
    assert(offset >= 0 && offset + 8 <= byteCount, "store outside of the span")
    unsafe storeBytes(of: value.bigEndian, toUncheckedByteOffset: offset, as: UInt64.self)
  }

  @unsafe @inlinable @inline(always)
  mutating func storeNetwork(_ value: UInt128, at offset: Int) {
    unsafe storeNetwork(UInt64(truncatingIfNeeded: value &>> 64), at: offset)
    unsafe storeNetwork(UInt64(truncatingIfNeeded: value), at: offset &+ 8)
  }

  /// Copies the first `count` bytes of `source` to `offset`; the caller checked both ends. Headers are short: words
  /// one by one are cheaper than a call.
  @inlinable @inline(always)
  mutating func copy(_ count: Int, of source: RawSpan, to offset: Int) {
    let wordsEnd = count & ~7
    var place = 0
    while place < wordsEnd {
      unsafe storeNetwork(unsafe source.networkUInt64(at: place), at: offset &+ place)
      place &+= 8
    }
    while place < count {
      unsafe storeNetwork(unsafe source.networkUInt8(at: place), at: offset &+ place)
      place &+= 1
    }
  }

  /// The border of every writer: traps where the header does not fit, for that is a mistake of the caller's,
  /// who chose the buffer; nothing from a guest or the wire decides it.
  @inlinable @inline(always)
  func preconditionFits(_ bytes: Int, at offset: Int) {
    precondition(
      offset >= 0 && bytes >= 0 && offset <= byteCount && bytes <= byteCount - offset, "no room for a header")
  }
}
