/// Frames of one received train that follow each other in its slot and go the same way: a descriptor whose `offset` is
/// the first frame's, `trainSegmentBytes` the distance from one to the next, `wireFrames` their number, and `length`
/// the bytes of all, without what is between them.
public struct TrainRun {
  public let descriptor: Descriptor
  private let between: UInt32

  /// A train as it was received, of whole datagrams: nothing is between them.
  @inline(__always)
  init(received train: Descriptor) {
    descriptor = train
    between = 0
  }

  /// Nil for a descriptor of anything else.
  @inline(__always)
  public init?(_ descriptor: Descriptor) {
    guard descriptor.trainSegmentBytes > 0 else { return nil }
    self.descriptor = descriptor
    between = descriptor.encapsulation == .vxlan ? UInt32(VXLANHeader.bytes) : 0
  }

  @inline(__always)
  public var count: Int { Int(descriptor.wireFrames) }

  /// Bytes of every frame but the last, which may be shorter.
  @inline(__always)
  public var frameBytesMax: UInt32 {
    count == 1 ? descriptor.length : UInt32(descriptor.trainSegmentBytes) - between
  }

  /// One of the frames by itself.
  @inline(__always)
  public func frame(_ index: Int) -> Descriptor {
    let number = UInt32(truncatingIfNeeded: index)
    var frame = descriptor
    frame.offset += number * UInt32(descriptor.trainSegmentBytes)
    frame.length = index == count - 1 ? descriptor.length - number * frameBytesMax : frameBytesMax
    frame.wireFrames = 1
    frame.trainSegmentBytes = 0
    return frame
  }

  /// The frames from one on.
  @inline(__always)
  public func from(_ index: Int) -> TrainRun? {
    let number = UInt32(truncatingIfNeeded: index)
    var rest = descriptor
    rest.offset += number * UInt32(descriptor.trainSegmentBytes)
    rest.length -= number * frameBytesMax
    rest.wireFrames -= UInt16(truncatingIfNeeded: index)
    return TrainRun(rest)
  }
}
