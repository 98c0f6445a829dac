import Datapath

/// What a layout is measured with: two TAP ports and a VXLAN link in one domain that learns, and what comes in by one
/// of them.
final class LayoutScene: Sendable {
  enum Traffic: Sendable {
    /// Datagrams of UDP from a port, each a frame.
    case frames(bytes: Int, to: InterfaceIndex)
    /// TCP super-frames from a port: to the link each becomes a train, to the other port it goes whole.
    case superFrames(to: InterfaceIndex)
    /// Trains from the link, each of one TCP flow, which become super-frames to a port.
    case trains

    static let all: [Traffic] = [
      .frames(bytes: 14 + 20 + 8 + 64, to: portOut), .frames(bytes: 1_400, to: portOut),
      .frames(bytes: 14 + 20 + 8 + 64, to: linkOut), .frames(bytes: 1_400, to: linkOut),
      .superFrames(to: linkOut), .superFrames(to: portOut), .trains,
    ]

    var isFromLink: Bool { if case .trains = self { true } else { false } }

    var egress: InterfaceIndex {
      switch self {
      case .frames(_, let egress), .superFrames(let egress): egress
      case .trains: portOut
      }
    }
  }

  static let portIn = InterfaceIndex(0)
  static let portOut = InterfaceIndex(1)
  static let linkOut = InterfaceIndex(2)
  static let interfaces = 3
  static let domain = DomainIndex(0)
  static let vni: UInt32 = 42
  /// The other end of the link.
  static let peer = UnderlayAddress("10.99.0.2")!
  /// Pairs of addresses, each a flow: as many MACs on each side.
  static let flows = 64
  /// One for the port, and source ports of the link.
  static let lanes = 1 + linkLanes
  static let linkLanes = 4
  static let sources = 2
  static let source = 1
  /// As the service has them by default.
  static let slots = Wiring.Settings.slotsByDefault
  static let operations = WorkerThread.Plan.operationsMin

  let traffic: Traffic
  let name: String
  let snapshot: Snapshot
  let load: MemoryIO.Load
  /// After so long a turn another thread had the core, which says nothing of the layout: such turns and their frames
  /// are left out. A turn of at most 64 frames takes some 5 µs, one of as many super-frames some 300.
  let turnNanosecondsMax: UInt64

  init?(_ traffic: Traffic) {
    self.traffic = traffic
    let place = traffic.egress == Self.portOut ? "another tap port" : "a vxlan link"
    let ofSegments = "of \(Segments.count) segments"
    switch traffic {
    case .frames(let bytes, _):
      name = "UDP frames of \(bytes) bytes from a tap port to \(place), \(Self.flows) flows"
      turnNanosecondsMax = 50_000
    case .superFrames:
      name = "TCP super-frames \(ofSegments) from a tap port to \(place), \(Self.flows) flows"
      turnNanosecondsMax = 2_000_000
    case .trains:
      name = "trains \(ofSegments) of TCP from a vxlan link to a tap port, \(Self.flows) flows"
      turnNanosecondsMax = 2_000_000
    }
    let table = MACTable(macsMax: 4 * Self.flows, seed: 7)
    guard
      let snapshot = try? Snapshot(
        version: 1,
        interfaces: [
          Snapshot.Interface(Self.portIn, .port(domain: Self.domain), mtuBytes: 1_500),
          Snapshot.Interface(Self.portOut, .port(domain: Self.domain), mtuBytes: 1_500),
          Snapshot.Interface(Self.linkOut, .link(peer: Self.peer, domains: [Self.domain]), mtuBytes: 1_500),
        ], domains: [Snapshot.Domain(Self.domain, vni: Self.vni, macs: table)])
    else { return nil }
    self.snapshot = snapshot
    let ingress = traffic.isFromLink ? Self.linkOut : Self.portIn
    for flow in 0..<Self.flows {
      _ = table.reference.learn(Self.destination(flow), at: traffic.egress, nowSeconds: 1)
      _ = table.reference.learn(Self.source(flow), at: ingress, nowSeconds: 1)
    }
    load = Self.load(traffic)
  }

  private static func source(_ flow: Int) -> UInt64 { 0x0200_0000_1000 + UInt64(flow) }
  private static func destination(_ flow: Int) -> UInt64 { 0x0200_0000_2000 + UInt64(flow) }

  // MARK: Bytes

  private static func load(_ traffic: Traffic) -> MemoryIO.Load {
    let flows = 0..<flows
    let plainHeader = [UInt8](repeating: 0, count: TapPort.headerBytes)
    // RFC 7348 section 5: the I flag, then the VNI in the upper 24 bits of the second word.
    let vxlanHeader: [UInt8] = [0x08, 0, 0, 0] + network(vni << 8)
    let sentHeader = traffic.egress == linkOut ? vxlanHeader : plainHeader
    switch traffic {
    case .frames(let bytes, _):
      let frames = flows.map { datagram($0, count: bytes) }
      return MemoryIO.Load(
        received: frames.map { plainHeader + $0 }, sent: frames.map { sentHeader + $0 },
        sentUnitBytes: sentHeader.count + bytes, sentHeaderBytes: sentHeader.count)
    case .superFrames, .trains:
      let whole = flows.map { Segments.offload + Segments.whole(destination($0), source($0), port: $0) }
      let cut = flows.map { flow in
        (0..<Segments.count).flatMap { vxlanHeader + Segments.segment($0, destination(flow), source(flow), port: flow) }
      }
      let isCut = traffic.egress == linkOut
      return MemoryIO.Load(
        received: traffic.isFromLink ? cut : whole, sent: isCut ? cut : whole,
        sentUnitBytes: isCut ? cut[0].count / Segments.count : whole[0].count, sentHeaderBytes: sentHeader.count,
        wireFrames: Segments.count,
        trainSegmentBytes: traffic.isFromLink ? cut[0].count / Segments.count : 0)
    }
  }

  /// Ethernet, IPv4, UDP.
  private static func datagram(_ flow: Int, count: Int) -> [UInt8] {
    let total = count - 14
    var bytes = ethernet(destination(flow), source(flow)) + ipv4(total: total, number: 0, ipProtocol: 17)
    bytes += network(UInt16(0x4000 + flow)) + network(UInt16(5_000)) + network(UInt16(total - 20)) + [0, 0]
    while bytes.count < count { bytes.append(UInt8(truncatingIfNeeded: bytes.count &+ flow)) }
    return bytes
  }

  /// The identification of the first of a flow's packets; those that follow count up.
  static let identificationFirst = 1

  fileprivate static func ethernet(_ destination: UInt64, _ source: UInt64) -> [UInt8] {
    [destination, source].flatMap { network(UInt16($0 >> 32)) + network(UInt32(truncatingIfNeeded: $0)) } + [
      0x08, 0x00,
    ]
  }

  fileprivate static let sourceAddress: UInt32 = 0x0A00_0001
  fileprivate static let destinationAddress: UInt32 = 0x0A00_0002

  /// An IPv4 header, its checksum right.
  fileprivate static func ipv4(total: Int, number: Int, ipProtocol: UInt8) -> [UInt8] {
    var bytes: [UInt8] = [0x45, 0] + network(UInt16(total)) + network(UInt16(identificationFirst + number))
    bytes += [0x40, 0, 64, ipProtocol, 0, 0] + network(sourceAddress) + network(destinationAddress)
    let checksum = InternetChecksum.finish(InternetChecksum.sum(unsafe bytes.span.bytes))
    bytes.replaceSubrange(10..<12, with: network(checksum))
    return bytes
  }

  fileprivate static func network<Number: FixedWidthInteger>(_ number: Number) -> [UInt8] {
    (0..<Number.bitWidth / 8).reversed().map { UInt8(truncatingIfNeeded: number >> (8 * $0)) }
  }
}

/// A super-frame of TCP, and the segments that it is cut into or made of: as a guest's kernel and a wire have them.
private enum Segments {
  /// With timestamps, a segment, its headers and those of VXLAN are 1,442 bytes: 45 of them are just one train.
  static let payloadBytes = 1_368
  static let count = 45
  private static let headerBytes = 14 + 20 + 32

  /// `struct virtio_net_hdr_v1`, little endian: a checksum to finish, TCP over IPv4.
  static let offload: [UInt8] =
    [
      OffloadHeader.flagNeedsChecksum, OffloadHeader.Segmentation.tcpv4.rawValue, UInt8(headerBytes), 0,
      UInt8(payloadBytes & 0xFF), UInt8(payloadBytes >> 8), 34, 0, 16, 0, 0, 0,
    ]

  /// The pseudo-header's sum stands in the checksum's place.
  static func whole(_ destination: UInt64, _ source: UInt64, port: Int) -> [UInt8] {
    packet(destination, source, port, payload: 0..<count * payloadBytes, number: 0, isFinished: false)
  }

  static func segment(_ number: Int, _ destination: UInt64, _ source: UInt64, port: Int) -> [UInt8] {
    let start = number * payloadBytes
    return packet(destination, source, port, payload: start..<start + payloadBytes, number: number, isFinished: true)
  }

  private static func packet(
    _ destination: UInt64, _ source: UInt64, _ port: Int, payload: Range<Int>, number: Int, isFinished: Bool
  ) -> [UInt8] {
    let tcpBytes = 32 + payload.count
    var tcp = LayoutScene.network(UInt16(40_000 + port)) + LayoutScene.network(UInt16(5_201))
    // Sequence and acknowledgement numbers, data offset, ACK, window, checksum, urgent pointer, timestamps.
    tcp += LayoutScene.network(UInt32(1 + payload.lowerBound)) + [0, 0, 0, 2, 0x80, 0x10, 0x01, 0xF5, 0, 0, 0, 0]
    tcp += [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]
    for place in payload { tcp.append(UInt8(truncatingIfNeeded: place &* 7 &+ port)) }
    let pseudoHeader = InternetChecksum.pseudoHeader(
      source: LayoutScene.sourceAddress, destination: LayoutScene.destinationAddress, ipProtocol: 6,
      length: tcpBytes)
    let checksum =
      isFinished
      ? InternetChecksum.finishTransport(InternetChecksum.sum(unsafe tcp.span.bytes, initial: pseudoHeader))
      : InternetChecksum.fold(pseudoHeader)
    tcp.replaceSubrange(16..<18, with: LayoutScene.network(checksum))
    return LayoutScene.ethernet(destination, source)
      + LayoutScene.ipv4(total: 20 + tcpBytes, number: number, ipProtocol: 6) + tcp
  }
}
