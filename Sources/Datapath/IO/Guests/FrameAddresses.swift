/// The first 16 bytes of a frame, read once: its addresses, its EtherType, and two bytes of what follows.
struct FrameAddresses: BitwiseCopyable, Equatable {
  static var bytes: Int { 16 }

  /// As they lie in memory.
  let first: UInt64
  let second: UInt64

  /// - Parameter frame: at least `bytes` of it.
  @unsafe @inline(__always)
  init(_ frame: UnsafeRawPointer) {
    first = unsafe frame.loadUnaligned(as: UInt64.self)
    second = unsafe frame.loadUnaligned(fromByteOffset: 8, as: UInt64.self)
  }

  @unsafe @inline(__always)
  func write(to frame: UnsafeMutableRawPointer) {
    unsafe frame.storeBytes(of: first, as: UInt64.self)
    unsafe frame.storeBytes(of: second, toByteOffset: 8, as: UInt64.self)
  }

  /// The address in the low 48 bits, the rest zero; so is `source`.
  @inline(__always)
  var destination: UInt64 { UInt64(bigEndian: first) >> 16 }
  @inline(__always)
  var source: UInt64 { UInt64(bigEndian: first >> 48 | second << 16) >> 16 }

  /// Whether both addresses are the other's.
  @inline(__always)
  func areSame(as other: FrameAddresses) -> Bool {
    (first ^ other.first) | (second ^ other.second) & 0xFFFF_FFFF == 0
  }
}

/// Frames that went from one guest's ring to another's.
struct PassedFrames: BitwiseCopyable {
  var frames = 0
  /// From the destination MAC on.
  var bytes = 0
}
