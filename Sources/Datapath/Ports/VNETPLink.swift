// A `vnetp` link: raw frames in UDP datagrams to one other host, as VNET/P has them.
//
// The way of a frame
//   in:  a receive of the underlay's socket gives a datagram → `VNETPLink.describe` → routing finds link and domain by
//        the sender alone → the datagram is the frame
//   out: nothing in front of the frame, one `sendmsg` a frame, on the socket that the flow's hash picks
// Control opens the sockets (`UnderlaySocket`) and lends them to workers.

/// The per-frame side of VNET/P's encapsulation.
public enum VNETPLink {
  /// The datagram in a filled slot, before anything of it was looked at.
  @inline(__always)
  static func describe(_ event: IOEvent) -> Descriptor {
    var descriptor = VXLANLink.describe(event)
    descriptor.encapsulation = .vnetp
    return descriptor
  }

  /// The header before a frame: none.
  @inline(__always)
  static var header: SendPool.Header { SendPool.Header(count: 0) }
}
