import Datapath

/// What a frontend's message means for the service, in the order in which it is to be done.
///
/// An effect with a `version` replaces something that workers may be using. What it replaces (memory, log, event
/// descriptors) stays as it is until the service says ``VhostUserSession/adopted(version:)``: after every worker has
/// left it. Versions only grow, and one answer is for all versions up to it.
public enum VhostUserEffect: Sendable {
  /// What driver and device agreed on; `logAll` changes while queues run, all others do not.
  case featuresAgreed(VhostUserFeatures, version: UInt64)
  /// A whole new table, and where the rings of each queue that runs are in it.
  case memoryChanged(VhostUserMemory, rings: [Int: VhostUserRings], version: UInt64)
  case logChanged(VhostUserLog, version: UInt64)
  /// Where writes to a running queue's used ring are marked; nil: nowhere any more.
  case usedLogChanged(queue: Int, address: UInt64?, version: UInt64)
  case startQueue(VhostUserQueueStart)
  /// To be answered by ``VhostUserSession/queueStopped(_:base:)`` when the worker has given back all that it took.
  case stopQueue(Int)
  /// Of a queue that runs.
  case queueEnabled(Int, Bool)
  /// Of a queue that runs, as its start had it.
  case kickChanged(queue: Int, OwnedDescriptor?, version: UInt64)
  case callChanged(queue: Int, OwnedDescriptor?, version: UInt64)
  case errorChanged(queue: Int, OwnedDescriptor?, version: UInt64)
  /// The guest has moved here: a RARP of this source is to be sent into its Ethernet, so that everybody learns where.
  case sendRARP(MACAddress)
  /// The MTU that the frontend tells the guest, in bytes.
  case mtuChanged(bytes: Int)
  /// The device is as before its driver came; memory and protocol features stay. All queues have stopped.
  case reset
  /// A message that was not carried out; for the log.
  case refused(String)
  /// The connection makes no sense any more and is to be closed; for the log. Only ``VhostUserSocket`` says it, and has
  /// closed it.
  case broken(String)
  /// A frontend is there; only ``VhostUserSocket`` says it.
  case connected
  /// The frontend is gone and no worker has anything of it; only ``VhostUserSocket`` says it.
  case disconnected
}
