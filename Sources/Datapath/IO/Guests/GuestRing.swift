/// One ring of a guest's network device, as control hands it over to the worker that polls it. Control keeps it, the
/// memory behind it and its eventfds until the worker has told that it let go of them.
@safe
public final class GuestRing: @unchecked Sendable {
  public let areas: VirtqueueAreas
  public let features: VirtqueueFeatures
  /// Where to begin, and, once the worker let go of it, where it ended: see ``Virtqueue/base``.
  public internal(set) var base: UInt32
  /// VIRTIO_NET_F_MRG_RXBUF: a frame may be spread over several of the guest's buffers.
  public let mergesBuffers: Bool
  public let memory: GuestMemory
  /// The eventfd that the guest writes to when it made buffers available; -1: the ring is polled.
  public let kick: Int32
  /// The eventfd that the guest waits for; -1: it polls.
  public let call: Int32
  /// Where the guest sees the ring, for the dirty log of `memory`; nil: writes to the ring itself are not logged.
  let logAddresses: VirtqueueLogAddresses?
  /// Where the chains that are under way are noted, for a process that takes this one's place: `inFlightBytes` of the
  /// ring's kind; nil: nowhere.
  let inFlight: UnsafeMutableRawPointer?
  /// Whether chains go back in the order in which they came. Where nothing notes which are under way, a process that
  /// takes this one's place has only the count of those that went back, and goes on behind them.
  var keepsOrder: Bool { unsafe features.contains(.inOrder) || inFlight == nil }
  /// Of a ring that the guest transmits by: what its frames that are under way lie in.
  let frames: Frames?

  /// The frames of one ring that are under way, whatever guest it has: the workers know them from the start, as a
  /// foreign memory under the number that a wiring gave it.
  public struct Frames: Sendable {
    public let memory: ForeignMemory
    public let owner: Int

    public init(_ memory: ForeignMemory, owner: Int) {
      self.memory = memory
      self.owner = owner
    }
  }

  /// Frames of one ring that may be under way at once: beyond them the guest waits.
  public static let framesMax = 1_024

  /// - Parameters:
  ///   - frames: of a ring that the guest transmits by; none of them is under way.
  ///   - inFlight: stays mapped as long as the ring is used, and is aligned to 8 bytes.
  public init(
    _ areas: VirtqueueAreas, features: VirtqueueFeatures, base: UInt32, mergesBuffers: Bool, frames: Frames?,
    memory: GuestMemory, kick: Int32, call: Int32, logAddresses: VirtqueueLogAddresses? = nil,
    inFlight: UnsafeMutableRawPointer? = nil
  ) {
    self.areas = areas
    self.features = features
    self.base = base
    self.mergesBuffers = mergesBuffers
    self.memory = memory
    self.kick = kick
    self.call = call
    self.logAddresses = logAddresses
    self.frames = frames
    unsafe self.inFlight = unsafe inFlight
  }

  /// The worker's handle, free of reference counting.
  @safe
  public struct Reference: BitwiseCopyable, @unchecked Sendable {
    let ring: Unmanaged<GuestRing>

    var kick: Int32 { unsafe ring._withUnsafeGuaranteedRef { $0.kick } }
  }
  public var reference: Reference { unsafe Reference(ring: Unmanaged.passUnretained(self)) }
}
