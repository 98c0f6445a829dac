// A `vnetp` link: raw frames in UDP datagrams to one other host, as VNET/P has them.
//
// The way of a frame
//   in:  a receive of the underlay's socket gives a datagram, described as VXLAN's → routing finds link and domain by
//        the sender alone → the datagram is the frame
//   out: nothing in front of the frame, one `sendmsg` a frame, on the socket that the flow's hash picks
// Control opens the sockets (`UnderlaySocket`) and lends them to workers.

/// The per-frame side of VNET/P's encapsulation.
public enum VNETPLink {
  /// The header before a frame: none.
  @inline(__always)
  static var header: SendPool.Header { SendPool.Header(count: 0) }
}
