import CLinux
import Datapath
import Glibc
import Synchronization

/// What keeps this process alive when another one cuts a file short that it shares with us: an access behind the new
/// end raises SIGBUS, on whatever thread makes it, and would end the service for one guest's sake.
///
/// For the whole process, once: a handler of SIGBUS that looks the address up among the mappings that are registered.
/// It puts memory of zeroes in the place of the whole mapping, so that the access and all that follow it go on,
/// marks the mapping as cut, and makes ``event()`` readable: control then closes the port. A SIGBUS of any other cause
/// is left to whoever had it before: by default it ends the process, as ever.
///
/// What the kernel accesses on our behalf (a send from such memory) fails with EFAULT instead and cuts nothing.
public enum MappingFaults {
  /// Readable when a mapping was cut, until ``acknowledge()``. Never closed.
  /// - Throws: that the handler could not be put in place.
  public static func event() throws(SystemError) -> OwnedDescriptor { try handler.get() }

  /// To be called before the ports are asked for what was cut.
  public static func acknowledge() {
    guard let event = try? event() else { return }
    var count: UInt64 = 0
    _ = unsafe read(event.number, &count, 8)
  }

  /// In place as soon as anybody asks for it.
  private static let handler: Result<OwnedDescriptor, SystemError> = Result { () throws(SystemError) in
    let number = eventfd(0, Int32(EFD_CLOEXEC) | Int32(EFD_NONBLOCK))
    guard number >= 0 else { throw SystemError(errno, doing: "make an eventfd for cut memory files") }
    let event = OwnedDescriptor(number)
    let state = UnsafeMutablePointer<MappingTable>.allocate(capacity: 1)
    unsafe state.initialize(to: MappingTable(event: number))
    // Before the handler can run.
    unsafe table = unsafe state
    guard unsafe clinux_catch_bus_error(handle, state.pointee.before) == 0 else {
      throw SystemError(errno, doing: "handle SIGBUS, which a cut memory file raises")
    }
    return event
  }

  /// Makes a mapping one that may be cut; its place, by which it is asked and forgotten.
  static func register(start: UnsafeMutableRawPointer, byteCount: Int) throws(SystemError) -> Int {
    _ = try event()
    guard let place = unsafe table!.pointee.add(UInt(bitPattern: start), byteCount) else {
      throw SystemError(ENOSPC, doing: "watch over more than \(MappingTable.placesMax) shared mappings")
    }
    return place
  }

  /// To be called before it is unmapped, when nobody accesses it any more.
  static func forget(_ place: Int) { unsafe table!.pointee.remove(place) }

  static func isCut(_ place: Int) -> Bool { unsafe table!.pointee.isCut(place) }
}

/// The handler's only way to what it needs. Written once, before the handler is in place.
nonisolated(unsafe) private var table: UnsafeMutablePointer<MappingTable>?

/// Runs in the middle of anything, on any thread: it takes no lock and no memory.
private let handle: @convention(c) (Int32, UnsafeMutablePointer<siginfo_t>?, UnsafeMutableRawPointer?) -> Void = {
  _, information, _ in
  guard let table = unsafe table else { return }
  let isFault = unsafe clinux_is_fault(information) != 0
  if isFault, unsafe table.pointee.cut(at: UInt(bitPattern: clinux_fault_address(information))) { return }
  // The same access faults again as soon as this returns; what was sent has to be sent again.
  unsafe clinux_restore_bus_error(table.pointee.before)
  if !isFault { clinux_raise_bus_error() }
}

/// The mappings that may be cut, for one reader that may come at any moment: the handler.
///
/// A place is written by whoever took it, while its sequence is odd; a reader that finds it odd, or changed when it has
/// read the place, knows that this is not the mapping that it came for, which nobody changes while it is accessed.
@safe
private struct MappingTable: ~Copyable {
  /// All memory of 64 ports with 32 regions, twice while it changes, each with a log and in-flight memory, and as much
  /// again.
  static let placesMax = 8_192

  /// What SIGBUS did before.
  let before = UnsafeMutablePointer<sigaction>.allocate(capacity: 1)
  private let event: Int32
  private let places = UnsafeMutablePointer<Place>.allocate(capacity: placesMax)

  private struct Place: ~Copyable {
    let isTaken = Atomic<Bool>(false)
    let sequence = Atomic<UInt>(0)
    let start = Atomic<UInt>(0)
    let byteCount = Atomic<Int>(0)
    let isCut = Atomic<Bool>(false)
  }

  init(event: Int32) {
    self.event = event
    unsafe before.initialize(to: sigaction())
    for place in 0..<Self.placesMax { unsafe (places + place).initialize(to: Place()) }
  }

  /// The place that was free; nil when none was.
  func add(_ start: UInt, _ byteCount: Int) -> Int? {
    for place in 0..<Self.placesMax {
      guard
        unsafe places[place].isTaken.compareExchange(expected: false, desired: true, ordering: .acquiring).exchanged
      else { continue }
      unsafe places[place].isCut.store(false, ordering: .sequentiallyConsistent)
      set(place, start, byteCount)
      return place
    }
    return nil
  }

  func remove(_ place: Int) {
    precondition(place >= 0 && place < Self.placesMax)
    set(place, 0, 0)
    unsafe places[place].isTaken.store(false, ordering: .releasing)
  }

  func isCut(_ place: Int) -> Bool {
    precondition(place >= 0 && place < Self.placesMax)
    return unsafe places[place].isCut.load(ordering: .acquiring)
  }

  /// Replaces the mapping that has an address by zeroes; false when there is none, or when it cannot be done.
  ///
  /// Several threads may do so at once: what one of them writes before the other is done may be lost, in memory that
  /// nobody reads any more.
  func cut(at address: UInt) -> Bool {
    guard let place = find(address) else { return false }
    let start = unsafe UnsafeMutableRawPointer(bitPattern: places[place].start.load(ordering: .sequentiallyConsistent))
    let byteCount = unsafe places[place].byteCount.load(ordering: .sequentiallyConsistent)
    guard unsafe clinux_map_zeroes(start, byteCount) == 0 else { return false }
    unsafe places[place].isCut.store(true, ordering: .releasing)
    clinux_add_to_event(event)
    return true
  }

  @_noLocks @_noAllocation
  private func find(_ address: UInt) -> Int? {
    var place = 0
    while place < Self.placesMax {
      let sequence = unsafe places[place].sequence.load(ordering: .sequentiallyConsistent)
      let start = unsafe places[place].start.load(ordering: .sequentiallyConsistent)
      let byteCount = unsafe places[place].byteCount.load(ordering: .sequentiallyConsistent)
      if address &- start < UInt(bitPattern: byteCount), sequence & 1 == 0,
        unsafe places[place].sequence.load(ordering: .sequentiallyConsistent) == sequence
      {
        return place
      }
      place += 1
    }
    return nil
  }

  private func set(_ place: Int, _ start: UInt, _ byteCount: Int) {
    unsafe places[place].sequence.add(1, ordering: .sequentiallyConsistent)
    unsafe places[place].start.store(start, ordering: .sequentiallyConsistent)
    unsafe places[place].byteCount.store(byteCount, ordering: .sequentiallyConsistent)
    unsafe places[place].sequence.add(1, ordering: .sequentiallyConsistent)
  }
}
