import Synchronization

/// Loads and stores of memory that a guest writes at the same time: each happens once, whole, as written here. The
/// compiler may not repeat it, so what was checked is what is used. Addresses are of the word's own alignment, within
/// memory that is mapped. All numbers are little-endian, as is every machine that this runs on (virtio 1.2 §1.4).
@unsafe
enum SharedWord {
  @inline(__always)
  static func load16(_ place: UnsafeMutableRawPointer) -> UInt16 {
    unsafe place.assumingMemoryBound(to: Atomic<UInt16>.self).pointee.load(ordering: .relaxed)
  }
  @inline(__always)
  static func load16Acquiring(_ place: UnsafeMutableRawPointer) -> UInt16 {
    unsafe place.assumingMemoryBound(to: Atomic<UInt16>.self).pointee.load(ordering: .acquiring)
  }
  @inline(__always)
  static func load32(_ place: UnsafeMutableRawPointer) -> UInt32 {
    unsafe place.assumingMemoryBound(to: Atomic<UInt32>.self).pointee.load(ordering: .relaxed)
  }
  @inline(__always)
  static func load64(_ place: UnsafeMutableRawPointer) -> UInt64 {
    unsafe place.assumingMemoryBound(to: Atomic<UInt64>.self).pointee.load(ordering: .relaxed)
  }
  @inline(__always)
  static func store16(_ value: UInt16, at place: UnsafeMutableRawPointer) {
    unsafe place.assumingMemoryBound(to: Atomic<UInt16>.self).pointee.store(value, ordering: .relaxed)
  }
  @inline(__always)
  static func store16Releasing(_ value: UInt16, at place: UnsafeMutableRawPointer) {
    unsafe place.assumingMemoryBound(to: Atomic<UInt16>.self).pointee.store(value, ordering: .releasing)
  }
  @inline(__always)
  static func store32(_ value: UInt32, at place: UnsafeMutableRawPointer) {
    unsafe place.assumingMemoryBound(to: Atomic<UInt32>.self).pointee.store(value, ordering: .relaxed)
  }
  @inline(__always)
  static func load8(_ place: UnsafeMutableRawPointer) -> UInt8 {
    unsafe place.assumingMemoryBound(to: Atomic<UInt8>.self).pointee.load(ordering: .relaxed)
  }
  @inline(__always)
  static func store8(_ value: UInt8, at place: UnsafeMutableRawPointer) {
    unsafe place.assumingMemoryBound(to: Atomic<UInt8>.self).pointee.store(value, ordering: .relaxed)
  }
  @inline(__always)
  static func store64(_ value: UInt64, at place: UnsafeMutableRawPointer) {
    unsafe place.assumingMemoryBound(to: Atomic<UInt64>.self).pointee.store(value, ordering: .relaxed)
  }
  /// Sets bits of a byte; what was stored before is seen by whoever then clears them.
  @inline(__always)
  static func setBits8(_ bits: UInt8, at place: UnsafeMutableRawPointer) {
    _ = unsafe place.assumingMemoryBound(to: Atomic<UInt8>.self).pointee
      .bitwiseOr(bits, ordering: .sequentiallyConsistent)
  }
}
