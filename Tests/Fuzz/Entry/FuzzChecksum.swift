import Datapath

/// The Internet checksum, against RFC 1071 written down plainly.
public func fuzzChecksum(_ input: RawSpan) {
  // Any start, so any alignment.
  for start in 0..<min(9, input.byteCount + 1) {
    let part = input.extracting(droppingFirst: start)
    precondition(InternetChecksum.fold(InternetChecksum.sum(part)) == referenceSum(part))
  }
  checkPieces(input)
  checkUpdate(input)
}

/// The sum of pieces is the sum of the whole, where all but the last are even.
private func checkPieces(_ input: RawSpan) {
  let cut = (input.isEmpty ? 0 : Int(byte(0, of: input)) % (input.byteCount + 1)) & ~1
  let first = InternetChecksum.sum(input.extracting(first: cut))
  let both = InternetChecksum.sum(input.extracting(droppingFirst: cut), initial: first)
  precondition(InternetChecksum.fold(both) == referenceSum(input))
}

/// A changed word: the updated checksum is the one that is made anew, but for the two zeros of one's complement.
private func checkUpdate(_ input: RawSpan) {
  guard input.byteCount >= 4 else { return }
  let new = UInt16(byte(0, of: input)) << 8 | UInt16(byte(1, of: input))
  let words = (input.byteCount - 2) / 2
  let index = 2 + Int(byte(1, of: input)) % words * 2
  let old = UInt16(byte(index, of: input)) << 8 | UInt16(byte(index + 1, of: input))
  var changed = bytes(of: input)
  changed[index] = UInt8(new >> 8)
  changed[index + 1] = UInt8(new & 0xff)
  let before = InternetChecksum.finish(InternetChecksum.sum(input))
  let after = InternetChecksum.finish(InternetChecksum.sum(changed.rawBytes))
  let updated = InternetChecksum.update(before, from: old, to: new)
  precondition(updated == after || updated == 0 && after == 0xffff)
  precondition(InternetChecksum.finishTransport(InternetChecksum.sum(input)) != 0)
}
