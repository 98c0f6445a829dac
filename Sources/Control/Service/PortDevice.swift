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

  /// Whether the kernel takes UDP super-frames for it.
  var takesUDPSuperFrames: Bool {
    switch self {
    case .tap(let device): device.offloads == .tcpAndUDP
    // Packet ports need a later kernel than the first one that does.
    case .packet: true
    }
  }

  /// What it could not be given, and so runs without at a cost: one line each, with what to do.
  func shortcomings(offloads: Bool) -> [(what: String, why: String, remedy: String)] {
    guard case .tap(let device) = self, offloads else { return [] }
    return Self.shortcomings(of: device.name, device.offloads, refused: device.superFrameBytesRefused)
  }

  /// The same for what was agreed on for a TAP device that may have all offloads.
  static func shortcomings(
    of device: String, _ offloads: TapDevice.Offloads, refused: (number: Int32, bytes: Int)?
  ) -> [(what: String, why: String, remedy: String)] {
    var found: [(what: String, why: String, remedy: String)] = []
    switch offloads {
    case .tcpAndUDP: break
    case .tcp:
      found.append(
        (
          "a TAP device goes without UDP super-frames: each datagram is read and written by itself",
          "this kernel has no USO", "use Linux 6.2 or later"
        ))
    case .checksums, .none:
      found.append(
        (
          "a TAP device goes without super-frames: each frame is read by itself", "this kernel has no TSO for it",
          "see vnetr doctor"
        ))
    }
    if let refused {
      found.append(
        (
          "the longest super-frame of a TAP device could not be set: some become two trains instead of one",
          SystemError.text(refused.number), "ip link set \(device) gso_max_size \(refused.bytes)"
        ))
    }
    return found
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
  var source: SourceKind {
    switch self {
    case .tap: .tap
    case .packet: .packet
    case .vhostUser: .guest
    }
  }
  var lane: LaneKind {
    switch self {
    case .tap: .tap
    case .packet: .packet
    case .vhostUser: .guest
    }
  }
  var record: InterfaceRecord.Kind {
    switch self {
    case .tap: .tap
    case .packet: .packet
    case .vhostUser: .guest
    }
  }
}
