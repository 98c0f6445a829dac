/// Frames of one received train that are of one flow and go the same way, in order, perhaps with others between them: a
/// descriptor whose `offset` is where the train's first frame starts, `trainSegmentBytes` the distance from one to the
/// next, `trainMembers` which of them are in the run, `wireFrames` their number, and `length` the bytes of these,
/// without what is between them.
public struct TrainRun {
  public let descriptor: Descriptor
  /// Of each frame but the train's last, which may be shorter.
  private let frameBytes: UInt32
  private let members: UInt128
  private let hasOthersBetween: Bool

  /// A train as it was received, of whole datagrams: nothing is between them.
  @inline(__always)
  init(received train: Descriptor) {
    descriptor = train
    frameBytes = UInt32(train.trainSegmentBytes)
    members = .max
    hasOthersBetween = false
  }

  /// Nil for a descriptor of anything else.
  @inline(__always)
  public init?(_ descriptor: Descriptor) {
    guard descriptor.trainSegmentBytes > 0 else { return nil }
    self.descriptor = descriptor
    frameBytes =
      UInt32(descriptor.trainSegmentBytes) - (descriptor.encapsulation == .vxlan ? UInt32(VXLANHeader.bytes) : 0)
    members = descriptor.trainMembers
    let spread = UInt128.bitWidth - members.leadingZeroBitCount - members.trailingZeroBitCount
    hasOthersBetween = spread != Int(descriptor.wireFrames)
  }

  @inline(__always)
  public var count: Int { Int(descriptor.wireFrames) }

  /// Bytes of every frame but the last, which may be shorter.
  @inline(__always)
  public var frameBytesMax: UInt32 { count == 1 ? descriptor.length : frameBytes }

  /// One of the frames by itself.
  @inline(__always)
  public func frame(_ index: Int) -> Descriptor {
    var frame = descriptor
    frame.offset += UInt32(truncatingIfNeeded: number(of: index)) * UInt32(descriptor.trainSegmentBytes)
    frame.length =
      index == count - 1 ? descriptor.length - UInt32(truncatingIfNeeded: index) * frameBytesMax : frameBytesMax
    frame.wireFrames = 1
    frame.trainSegmentBytes = 0
    return frame
  }

  /// The frames from one on.
  @inline(__always)
  public func from(_ index: Int) -> TrainRun? {
    var rest = descriptor
    rest.trainMembers = members & (UInt128.max << UInt128(number(of: index)))
    rest.length -= UInt32(truncatingIfNeeded: index) * frameBytesMax
    rest.wireFrames -= UInt16(truncatingIfNeeded: index)
    return TrainRun(rest)
  }

  /// The number in the train of one of the frames.
  @inline(__always)
  private func number(of index: Int) -> Int {
    if !hasOthersBetween { return members.trailingZeroBitCount + index }
    // By halves: the lower one has it, or the upper one has it with so many fewer before it.
    var number = 0
    var rank = index
    var halfBits = UInt128.bitWidth / 2
    while halfBits > 0 {
      let lowerCount = (members &>> UInt128(number) & (1 &<< UInt128(halfBits) &- 1)).nonzeroBitCount
      if rank >= lowerCount {
        rank -= lowerCount
        number += halfBits
      }
      halfBits /= 2
    }
    return number
  }

  /// Adds a frame to a run, or to a single frame that becomes one. Both are of the same train, each with its own place
  /// there in `trainMembers`, and the run has none behind the frame.
  @inline(__always)
  static func append(_ frame: Descriptor, to run: inout Descriptor, stride: UInt16) {
    if run.trainSegmentBytes == 0 {
      run.trainSegmentBytes = stride
      run.offset -= UInt32(truncatingIfNeeded: run.trainMembers.trailingZeroBitCount) * UInt32(stride)
    }
    run.trainMembers |= frame.trainMembers
    run.wireFrames += 1
    run.length += frame.length
  }
}
