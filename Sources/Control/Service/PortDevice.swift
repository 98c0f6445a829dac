import Datapath

/// The device of a port, open: queues that workers read and write.
enum PortDevice {
  case tap(TapDevice)
  case packet(PacketDevice)

  /// One descriptor a queue.
  var queues: [Int32] {
    switch self {
    case .tap(let device): device.queues
    case .packet(let device): device.queues
    }
  }

  /// Whether it was made here, rather than found.
  var wasMade: Bool {
    switch self {
    case .tap(let device): device.wasMade
    case .packet: false
    }
  }

  /// Now; nil when the device is not in this namespace any more.
  var mtuBytes: Int? {
    switch self {
    case .tap(let device): device.mtuBytes
    case .packet(let device): device.mtuBytes
    }
  }

  func close() {
    switch self {
    case .tap(let device): device.close()
    case .packet(let device): device.close()
    }
  }
}

extension Configuration.PortKind {
  var source: SourceKind { self == .tap ? .tap : .packet }
  var lane: LaneKind { self == .tap ? .tap : .packet }
  var record: InterfaceRecord.Kind { self == .tap ? .tap : .packet }
}
