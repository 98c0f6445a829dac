/// Features of a virtio network device, as bits of the 64-bit word that device and driver agree on (virtio 1.2 §5.1.3
/// and §6), and the two that vhost-user puts into its unused places (docs/interop/vhost-user of QEMU).
public struct VhostUserFeatures: OptionSet, Hashable, Sendable {
  public let rawValue: UInt64
  public init(rawValue: UInt64) { self.rawValue = rawValue }
  private init(bit: Int) { rawValue = 1 << UInt64(bit) }

  /// The device takes frames whose checksum is still to be made.
  public static let checksum = Self(bit: 0)
  /// The driver takes such frames.
  public static let guestChecksum = Self(bit: 1)
  public static let mtu = Self(bit: 3)
  /// What the driver takes: super-frames of TCP over IPv4 and IPv6, with ECN.
  public static let guestTSO4 = Self(bit: 7)
  public static let guestTSO6 = Self(bit: 8)
  public static let guestECN = Self(bit: 9)
  /// What the device takes of the same.
  public static let hostTSO4 = Self(bit: 11)
  public static let hostTSO6 = Self(bit: 12)
  public static let hostECN = Self(bit: 13)
  public static let mergeableReceiveBuffers = Self(bit: 15)
  public static let multiQueue = Self(bit: 22)
  /// Every write to guest memory is marked in the log (`VHOST_F_LOG_ALL`): the frontend's, never the driver's.
  public static let logAll = Self(bit: 26)
  public static let indirectDescriptors = Self(bit: 28)
  public static let eventIndex = Self(bit: 29)
  /// The frontend knows protocol features, and so enables queues (`VHOST_USER_F_PROTOCOL_FEATURES`).
  public static let protocolFeatures = Self(bit: 30)
  public static let version1 = Self(bit: 32)
  public static let packedRing = Self(bit: 34)
  /// Chains are used in the order in which they were made available.
  public static let inOrder = Self(bit: 35)
  public static let guestUSO4 = Self(bit: 54)
  public static let guestUSO6 = Self(bit: 55)
  public static let hostUSO = Self(bit: 56)

  /// All that a port of ours can be offered with.
  ///
  /// Not among them: CTRL_VQ, because the frontend answers the control queue itself (QEMU and virtio-user both do where
  /// the backend has none) and what it says about queues reaches us as SET_VRING_ENABLE; GUEST_ANNOUNCE, because it
  /// needs a control queue, and a frontend whose backend lacks it asks for the announcement by SEND_RARP.
  public static let served: Self = [
    .checksum, .guestChecksum, .mtu, .guestTSO4, .guestTSO6, .guestECN, .hostTSO4, .hostTSO6, .hostECN,
    .mergeableReceiveBuffers, .multiQueue, .logAll, .indirectDescriptors, .eventIndex, .protocolFeatures, .version1,
    .packedRing, .inOrder, .guestUSO4, .guestUSO6, .hostUSO,
  ]

  /// Checksums and super-frames that the other side finishes.
  public static let offloads: Self = [
    .checksum, .guestChecksum, .guestTSO4, .guestTSO6, .guestECN, .hostTSO4, .hostTSO6, .hostECN, .guestUSO4,
    .guestUSO6, .hostUSO,
  ]

  /// Bytes of the header in front of each frame on the rings: `virtio_net_hdr_v1`, or the shorter one of drivers from
  /// before virtio 1.0 that do not merge receive buffers (virtio 1.2 §5.1.6.1).
  public var headerBytes: Int { isDisjoint(with: [.version1, .mergeableReceiveBuffers]) ? 10 : 12 }
}

/// Extensions of the vhost-user protocol that frontend and backend agree on (docs/interop/vhost-user of QEMU, "Protocol
/// features").
public struct VhostUserProtocolFeatures: OptionSet, Hashable, Sendable {
  public let rawValue: UInt64
  public init(rawValue: UInt64) { self.rawValue = rawValue }
  private init(bit: Int) { rawValue = 1 << UInt64(bit) }

  public static let multiQueue = Self(bit: 0)
  public static let logInSharedMemory = Self(bit: 1)
  public static let rarp = Self(bit: 2)
  public static let replyAcknowledge = Self(bit: 3)
  public static let mtu = Self(bit: 4)
  public static let inflightInSharedMemory = Self(bit: 12)
  public static let resetDevice = Self(bit: 13)
  public static let configureMemorySlots = Self(bit: 15)
  public static let status = Self(bit: 16)

  /// All that ``VhostUserSession`` does.
  public static let served: Self = [
    .multiQueue, .logInSharedMemory, .rarp, .replyAcknowledge, .mtu, .inflightInSharedMemory, .resetDevice,
    .configureMemorySlots, .status,
  ]
}
