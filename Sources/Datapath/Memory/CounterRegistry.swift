/// Every counter of the forwarder, declared once. The table that `run` prints, the generated reference in
/// `docs/counters.md` and the conservation check all read this list.
///
/// A counter counts frames as they are on the wire (a super-frame counts as its segments) unless its unit says
/// otherwise.
public enum Counter: Int, BitwiseCopyable, CaseIterable, Sendable {
  // Traffic of ports, links and domains.
  case inFrames, inBytes, outFrames, outBytes
  /// Frames that routing sent towards this interface, before any egress drop.
  case offeredFrames
  /// Extra sends of a flood or of several rules: a frame sent to n places is n - 1 copies.
  case copies
  /// Frames, or datagrams of the underlay, that went from one worker to the next.
  case handedOnFrames, takenOverFrames

  // Drops on the way in from the underlay.
  case dropUnknownSource, dropShortHeader, dropNoVNIFlag, dropReservedBits, dropUnknownVNI
  case dropOversizedDatagram, dropWrongEncapsulation, dropBadInnerLength, dropNotECNCapable
  // Drops on the way in from a port.
  case dropRunt, dropOversizedFrame, dropBadOffload
  // Drops by routing.
  case dropBadSource, dropSameInterface, dropSplitHorizon, dropNoDestination, dropNoRoute
  case dropFrozenSource, dropFloodLimit
  // Drops between workers.
  case dropRingFull
  // Drops on the way out.
  case dropInterfaceDown, dropQueueFull, dropNoSendOperation, dropTooBig, dropRefused, dropUnreachable, dropSendFailed
  case dropShortWrite
  case dropStopped

  /// Counted by the kernel, before a worker could receive them.
  case receiveBufferDrops
  /// Counted by the kernel, for the whole network namespace.
  case reassemblyFailures

  // Guests of vhost-user ports, counted by control.
  case guestConnections, ringFaults, memoryFaults

  // Learning, by domain.
  case macsLearned, macMoves, macFreezes, macFrozenFrames, macLimitFrames, macsAged

  // Workers.
  case enters, completions, receives, turns, sleeps, wakeups, neighbourWakes, commands
  case batches1, batches2to3, batches4to7, batches8to15, batches16to31, batches32to63, batches64up
  case receiveRearms, receiveStarved, completionOverflows
  case sendChains, laneBlocks, resends
  case trains, trainFrames, trainRefusals
  case modeSwitches

  /// Where a counter is kept.
  public enum Scope: String, CaseIterable, Sendable {
    /// Datagrams of the underlay before their link is known.
    case underlay
    case port, link, domain, worker
  }

  public struct Definition: Sendable {
    /// The name in tables, JSON and docs.
    public let name: String
    public let unit: String
    public let scopes: [Scope]
    public let help: String
  }

  /// Whether the counter is a drop under a named reason.
  @inline(always)
  public var isDrop: Bool {
    rawValue >= Counter.dropUnknownSource.rawValue && rawValue <= Counter.dropStopped.rawValue
  }
  /// Whether the drop happens after routing chose an egress: it is charged to that egress.
  @inline(always)
  public var isEgressDrop: Bool {
    rawValue >= Counter.dropInterfaceDown.rawValue && rawValue <= Counter.dropStopped.rawValue
  }

  public var definition: Definition {
    func define(_ name: String, _ scopes: [Scope], _ help: String, unit: String = "frames") -> Definition {
      Definition(name: name, unit: unit, scopes: scopes, help: help)
    }
    let traffic: [Scope] = [.underlay, .port, .link, .domain]
    let egress: [Scope] = [.port, .link, .domain]
    return switch self {
    case .inFrames: define("in_frames", traffic, "Received from a guest or, for a link, from its other end.")
    case .inBytes:
      define(
        "in_bytes", traffic,
        "Bytes of those, from destination MAC to the end of payload, as they were handed over: a super-frame's as a "
          + "whole; for the underlay with the encapsulation's header.",
        unit: "bytes")
    case .outFrames: define("out_frames", egress, "Handed to the kernel, which took them.")
    case .outBytes:
      define(
        "out_bytes", egress,
        "Bytes of those, from destination MAC to the end of payload, as they were handed over: a super-frame's as a "
          + "whole to a port, each segment's with its own headers to a link.",
        unit: "bytes")
    case .offeredFrames:
      define(
        "offered_frames", [.port, .link], "Routed to this interface: sent, dropped on the way out, or in flight.")
    case .copies: define("copies", [.domain], "Copies that floods and rules made: a frame sent to n places adds n - 1.")
    case .handedOnFrames:
      define(
        "handed_on_frames", [.underlay, .domain, .worker],
        "Frames that a worker handed on to the next (layout pipeline); for the underlay, datagrams.")
    case .takenOverFrames:
      define(
        "taken_over_frames", [.underlay, .domain, .worker],
        "Frames that a worker took over from the one before: handed_on_frames less those on a ring now.")

    case .dropUnknownSource:
      define("drop_unknown_source", [.underlay], "The datagram's source address is no configured link's.")
    case .dropShortHeader:
      define(
        "drop_short_header", [.underlay],
        "The datagram ends before its encapsulation header does, or, for VNET/P, before an Ethernet header.")
    case .dropNoVNIFlag: define("drop_no_vni_flag", [.underlay], "The VXLAN I flag is not set (RFC 7348 section 5).")
    case .dropReservedBits:
      define(
        "drop_reserved_bits", [.link, .domain],
        "A reserved VXLAN bit is set and the link says reserved_bits = \"drop\".")
    case .dropUnknownVNI:
      define("drop_unknown_vni", [.underlay], "No link with this source address carries a domain with this VNI.")
    case .dropOversizedDatagram:
      define(
        "drop_oversized_datagram", [.underlay],
        "The datagram is longer than a slot and arrived cut, or came in a train of more than 128.")
    case .dropWrongEncapsulation:
      define(
        "drop_wrong_encapsulation", [.underlay],
        "A VXLAN datagram of a configured link's other end came to the VNET/P port.")
    case .dropBadInnerLength:
      define(
        "drop_bad_inner_length", [.link, .domain],
        "The inner frame is shorter than an Ethernet header, or its IP header is malformed or claims more bytes "
          + "than came."
      )
    case .dropNotECNCapable:
      define(
        "drop_not_ecn_capable", [.link, .domain],
        "The outer header says congestion experienced, the inner one cannot carry it (RFC 6040 section 4.2).")
    case .dropRunt: define("drop_runt", [.port, .domain], "Shorter than an Ethernet header.")
    case .dropOversizedFrame: define("drop_oversized_frame", [.port, .domain], "Longer than a slot, and arrived cut.")
    case .dropBadOffload:
      define(
        "drop_bad_offload", [.port, .domain],
        "The virtio header asks for an offload that was not agreed on or is malformed, or for more segments than are "
          + "made; a frame that is flooded counts once for each place.")
    case .dropBadSource:
      define("drop_bad_source", [.port, .link, .domain], "The source MAC is a group address or all zero.")
    case .dropSameInterface:
      define("drop_same_interface", [.port, .link, .domain], "The destination is where the frame came from.")
    case .dropSplitHorizon:
      define(
        "drop_split_horizon", [.port, .link, .domain],
        "The frame came over a link and its destination is behind a link: links do not relay.")
    case .dropNoDestination:
      define(
        "drop_no_destination", [.port, .link, .domain],
        "A flood in a domain that has no other member, or a frame of an interface that just left its domain.")
    case .dropNoRoute:
      define("drop_no_route", [.port, .link, .domain], "No VNET rule of the domain matches the frame.")
    case .dropFrozenSource:
      define(
        "drop_frozen_source", [.port, .link, .domain],
        "A flood whose source is frozen elsewhere: this cuts a loop. Other frames of such a source are forwarded.")
    case .dropFloodLimit:
      define(
        "drop_flood_limit", [.port, .link, .domain],
        "More frames to several places than the domain's limit lets through.")
    case .dropRingFull:
      define(
        "drop_ring_full", [.underlay, .port, .link, .domain],
        "The ring to the next worker was full: that worker is overloaded, and ring_depth_frames is too small for it.")
    case .dropInterfaceDown:
      define("drop_interface_down", egress, "The port's device or the link's socket is gone or down.")
    case .dropQueueFull:
      define(
        "drop_queue_full", egress, "The socket or device was full and so was the queue of frames that wait for it.")
    case .dropNoSendOperation:
      define("drop_no_send_operation", egress, "Every send operation of the worker was in use.")
    case .dropTooBig:
      define("drop_too_big", egress, "Longer than the port's MTU, or than the underlay's path MTU (EMSGSIZE).")
    case .dropRefused:
      define("drop_refused", egress, "The other end answered that nobody listens there (ECONNREFUSED), twice.")
    case .dropUnreachable:
      define(
        "drop_unreachable", egress,
        "The underlay has no route to the other end, or nobody answers for its address (ENETUNREACH, EHOSTUNREACH)."
      )
    case .dropSendFailed: define("drop_send_failed", egress, "The kernel refused the send for another reason.")
    case .dropShortWrite: define("drop_short_write", egress, "The kernel took only a part of the frame.")
    case .dropStopped: define("drop_stopped", egress, "Still waiting for a full socket when the service stopped.")

    case .receiveBufferDrops:
      define(
        "receive_buffer_drops", [.underlay, .port],
        "Datagrams, or frames of a packet port, that the kernel dropped because a socket's receive buffer was full: "
          + "not among in_frames.", unit: "datagrams or frames")
    case .reassemblyFailures:
      define(
        "reassembly_failures", [.underlay],
        "Datagrams whose fragments never became whole, of all programs in this network namespace since start: not "
          + "among in_frames.", unit: "datagrams")

    case .guestConnections:
      define(
        "guest_connections", [.port], "Connections with the VMM of a vhost-user port's guest.", unit: "connections")
    case .ringFaults:
      define(
        "ring_faults", [.port],
        "Rings of a vhost-user port's guest that broke the rules, and were not served any more until the VMM started "
          + "them again.", unit: "rings")
    case .memoryFaults:
      define(
        "memory_faults", [.port],
        "Connections of a vhost-user port that were closed because a memory file of the VMM was cut short.",
        unit: "connections")

    case .macsLearned: define("macs_learned", [.domain], "MAC addresses entered in the table.", unit: "addresses")
    case .macMoves: define("mac_moves", [.domain], "MAC addresses seen at a new place and followed.", unit: "moves")
    case .macFreezes:
      define(
        "mac_freezes", [.domain], "MAC addresses that moved too often and were frozen where they were before.",
        unit: "freezes"
      )
    case .macFrozenFrames:
      define("mac_frozen_frames", [.domain], "Frames whose frozen source was seen elsewhere; only floods are dropped.")
    case .macLimitFrames:
      define(
        "mac_limit_frames", [.domain], "Frames (forwarded) whose source was not learned: the table is at its limit.")
    case .macsAged: define("macs_aged", [.domain], "MAC addresses removed because they were silent.", unit: "addresses")

    case .enters:
      define(
        "enters", [.worker], "Calls into the kernel: io_uring_enter, or every system call with io = \"syscalls\".",
        unit: "calls")
    case .completions: define("completions", [.worker], "Completions handled.", unit: "completions")
    case .receives:
      define(
        "receives", [.worker],
        "Frames received, where a super-frame, or a train of the underlay's datagrams, counts as one.")
    case .turns: define("turns", [.worker], "Turns of the run loop.", unit: "turns")
    case .sleeps: define("sleeps", [.worker], "Turns that slept in the kernel.", unit: "turns")
    case .wakeups: define("wakeups", [.worker], "Wake-ups by control and by neighbours.", unit: "wake-ups")
    case .neighbourWakes:
      define("neighbour_wakes", [.worker], "Sleeping neighbours that this worker woke.", unit: "wake-ups")
    case .commands: define("commands", [.worker], "Commands of control carried out.", unit: "commands")
    case .batches1: define("batches_1", [.worker], "Turns that received 1 frame.", unit: "turns")
    case .batches2to3: define("batches_2_3", [.worker], "Turns that received 2 to 3 frames.", unit: "turns")
    case .batches4to7: define("batches_4_7", [.worker], "Turns that received 4 to 7 frames.", unit: "turns")
    case .batches8to15: define("batches_8_15", [.worker], "Turns that received 8 to 15 frames.", unit: "turns")
    case .batches16to31: define("batches_16_31", [.worker], "Turns that received 16 to 31 frames.", unit: "turns")
    case .batches32to63: define("batches_32_63", [.worker], "Turns that received 32 to 63 frames.", unit: "turns")
    case .batches64up: define("batches_64_up", [.worker], "Turns that received 64 frames or more.", unit: "turns")
    case .receiveRearms:
      define("receive_rearms", [.worker], "Multishot receives that ended and were armed again.", unit: "receives")
    case .receiveStarved:
      define(
        "receive_starved", [.worker], "Receives that ended because no slot was posted (ENOBUFS).", unit: "receives")
    case .completionOverflows:
      define(
        "completion_overflows", [.worker],
        "Turns that found the completion queue overflown; the kernel kept what did not fit.", unit: "turns")
    case .sendChains: define("send_chains", [.worker], "Chains of sends submitted.", unit: "chains")
    case .laneBlocks:
      define("lane_blocks", [.worker], "Times that a socket or device was full (EAGAIN).", unit: "times")
    case .resends:
      define("resends", [.worker], "Sends repeated after a stale error of the socket (ECONNREFUSED).", unit: "sends")
    case .trains:
      define("trains", [.worker], "Datagrams sent as one message (UDP_SEGMENT): so many messages.", unit: "messages")
    case .trainFrames: define("train_frames", [.worker], "Frames that left in those.")
    case .trainRefusals:
      define(
        "train_refusals", [.worker],
        "Trains that the kernel refused, whose frames were then sent one by one: the path's MTU fell, or a device "
          + "cannot make checksums.", unit: "messages")
    case .modeSwitches:
      define(
        "mode_switches", [.worker], "Switches of adaptive dispatch between sleeping and polling.", unit: "switches")
    }
  }

  /// The bucket of a turn that received `count` frames.
  @inline(always)
  public static func batchBucket(_ count: Int) -> Counter {
    let log2 = min(6, Int.bitWidth - 1 - max(1, count).leadingZeroBitCount)
    return Counter(rawValue: Counter.batches1.rawValue + log2)!
  }
}
