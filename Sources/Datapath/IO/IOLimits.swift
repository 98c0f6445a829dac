/// How much a worker's I/O is made for; settled when it is made, so that nothing is allocated later.
public struct IOLimits: Sendable {
  /// Submission queue entries of io_uring; system calls have no use for it.
  public var entries: Int
  /// Slots of the worker's memory; a buffer ring names them by 16 bits.
  public var slots: Int
  /// The most slots posted at once.
  public var posted: Int
  public var sources: Int
  public var lanes: Int
  /// Send operations of the worker's pool.
  public var operations: Int

  public init(entries: Int, slots: Int, posted: Int, sources: Int, lanes: Int, operations: Int) {
    self.entries = entries
    self.slots = slots
    self.posted = posted
    self.sources = sources
    self.lanes = lanes
    self.operations = operations
  }
}
