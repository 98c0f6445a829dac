/// What a frontend can ask for, by the numbers of docs/interop/vhost-user of QEMU, "Front-end message types". Those
/// that a network backend never offers are here to be refused by name.
public enum VhostUserRequest: UInt32, CaseIterable, Sendable {
  case getFeatures = 1
  case setFeatures
  case setOwner
  case resetOwner
  case setMemoryTable
  case setLogBase
  case setLogDescriptor
  case setQueueSize
  case setQueueAddresses
  case setQueueBase
  case getQueueBase
  case setQueueKick
  case setQueueCall
  case setQueueError
  case getProtocolFeatures
  case setProtocolFeatures
  case getQueuePairsMax
  case setQueueEnabled
  case sendRARP
  case setMTU
  case setBackendRequestDescriptor
  case translation
  case setQueueEndianness
  case getConfiguration
  case setConfiguration
  case createCryptoSession
  case closeCryptoSession
  case postcopyAdvise
  case postcopyListen
  case postcopyEnd
  case getInflight
  case setInflight
  case setGraphicsSocket
  case resetDevice
  case queueKick
  case getMemorySlotsMax
  case addMemoryRegion
  case removeMemoryRegion
  case setStatus
  case getStatus

  /// The protocol's own name, without VHOST_USER_.
  public var name: String {
    switch self {
    case .getFeatures: "GET_FEATURES"
    case .setFeatures: "SET_FEATURES"
    case .setOwner: "SET_OWNER"
    case .resetOwner: "RESET_OWNER"
    case .setMemoryTable: "SET_MEM_TABLE"
    case .setLogBase: "SET_LOG_BASE"
    case .setLogDescriptor: "SET_LOG_FD"
    case .setQueueSize: "SET_VRING_NUM"
    case .setQueueAddresses: "SET_VRING_ADDR"
    case .setQueueBase: "SET_VRING_BASE"
    case .getQueueBase: "GET_VRING_BASE"
    case .setQueueKick: "SET_VRING_KICK"
    case .setQueueCall: "SET_VRING_CALL"
    case .setQueueError: "SET_VRING_ERR"
    case .getProtocolFeatures: "GET_PROTOCOL_FEATURES"
    case .setProtocolFeatures: "SET_PROTOCOL_FEATURES"
    case .getQueuePairsMax: "GET_QUEUE_NUM"
    case .setQueueEnabled: "SET_VRING_ENABLE"
    case .sendRARP: "SEND_RARP"
    case .setMTU: "NET_SET_MTU"
    case .setBackendRequestDescriptor: "SET_BACKEND_REQ_FD"
    case .translation: "IOTLB_MSG"
    case .setQueueEndianness: "SET_VRING_ENDIAN"
    case .getConfiguration: "GET_CONFIG"
    case .setConfiguration: "SET_CONFIG"
    case .createCryptoSession: "CREATE_CRYPTO_SESSION"
    case .closeCryptoSession: "CLOSE_CRYPTO_SESSION"
    case .postcopyAdvise: "POSTCOPY_ADVISE"
    case .postcopyListen: "POSTCOPY_LISTEN"
    case .postcopyEnd: "POSTCOPY_END"
    case .getInflight: "GET_INFLIGHT_FD"
    case .setInflight: "SET_INFLIGHT_FD"
    case .setGraphicsSocket: "GPU_SET_SOCKET"
    case .resetDevice: "RESET_DEVICE"
    case .queueKick: "VRING_KICK"
    case .getMemorySlotsMax: "GET_MAX_MEM_SLOTS"
    case .addMemoryRegion: "ADD_MEM_REG"
    case .removeMemoryRegion: "REM_MEM_REG"
    case .setStatus: "SET_STATUS"
    case .getStatus: "GET_STATUS"
    }
  }

  /// What names a request of any number in a log.
  public static func name(_ number: UInt32) -> String { Self(rawValue: number)?.name ?? "request \(number)" }

  /// How a request is answered where it cannot be done.
  enum Refusal {
    /// With a number that is not zero, if the frontend asked for an answer.
    case ifAsked
    /// The same, always.
    case always
    /// It has an answer of its own, which a frontend waits for: an empty one, whose size it takes for the error that
    /// it is. The protocol says so of GET_CONFIG alone; frontends check the size of every answer.
    case empty
  }

  var refusal: Refusal {
    switch self {
    case .getFeatures, .getProtocolFeatures, .getQueuePairsMax, .getQueueBase, .getConfiguration, .getInflight,
      .getMemorySlotsMax, .getStatus, .setLogBase, .postcopyAdvise, .createCryptoSession:
      .empty
    case .translation, .postcopyEnd: .always
    default: .ifAsked
    }
  }
}
