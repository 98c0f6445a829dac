import Glibc
import Synchronization
import TestSupport
import Testing

@testable import Datapath

/// A location that says which MAC and which thread it was written for, so that a wrong one shows.
private func place(mac: Int, thread: Int) -> InterfaceIndex { InterfaceIndex(mac * 8 + thread) }

private final class Shared: Sendable {
  let now = Atomic<UInt32>(1)
  let wrong = Atomic<Int>(0)
  let arrived = Atomic<Int>(0)
  let moves = Atomic<Int>(0)
  let inserts = Atomic<Int>(0)
  let removed = Atomic<Int>(0)
}

/// Every MAC once, found where the table says, and the count right: what must hold when all is quiet.
private func expectConverged(_ table: MACTable, now: UInt32) {
  let entries = table.entries(nowSeconds: now)
  #expect(Set(entries.map(\.mac)).count == entries.count, "a MAC is there twice")
  #expect(table.count == entries.count)
  #expect(table.count <= table.macsMax)
  for entry in entries { #expect(table.reference.lookup(entry.mac) == entry.location) }
}

@Suite struct MACTableThreadTests {
  @Test(arguments: [1, 2, 3] as [UInt64])
  func `Four threads that learn, move, look up and remove the same MACs leave each MAC once`(seed: UInt64) {
    let macCount = 48
    // More MACs than the limit, in a table of 8 buckets: inserts, removals and the limit all meet.
    let table = MACTable(macsMax: 32, seed: seed)
    let shared = Shared()
    let generation = table.reference.generation
    onThreads(4) { thread in
      var random = SeededRandom(seed: seed * 100 + UInt64(thread))
      let macs = table.reference
      for step in 0..<60_000 {
        let index = Int.random(in: 0..<macCount, using: &random)
        let now = shared.now.load(ordering: .relaxed)
        switch Int.random(in: 0..<100, using: &random) {
        case 0..<55:
          switch macs.learn(testMAC(index), at: place(mac: index, thread: thread), nowSeconds: now) {
          case .moved: shared.moves.wrappingAdd(1, ordering: .relaxed)
          case .learned: shared.inserts.wrappingAdd(1, ordering: .relaxed)
          default: break
          }
        case 55..<90:
          let location = macs.lookup(testMAC(index))
          if location != .none, location.index / 8 != index || location.index % 8 > 3 {
            shared.wrong.wrappingAdd(1, ordering: .relaxed)
          }
        case 90..<92:
          // Long steps, so that freezes thaw and the MACs go on moving.
          if thread == 0 { shared.now.wrappingAdd(7, ordering: .relaxed) }
        default:
          // One thread is control.
          guard thread == 0 else { continue }
          let removed =
            step % 2 == 0
            ? table.removeAll(at: place(mac: index, thread: Int.random(in: 0..<4, using: &random)))
            : table.sweep(nowSeconds: now, ageingSeconds: 20)
          shared.removed.wrappingAdd(removed, ordering: .relaxed)
        }
      }
    }
    #expect(shared.wrong.load(ordering: .relaxed) == 0)
    #expect(shared.moves.load(ordering: .relaxed) > 100)
    #expect(shared.inserts.load(ordering: .relaxed) > 100)
    #expect(shared.removed.load(ordering: .relaxed) > 100)
    // Every move and every removal raised it, those of duplicates too.
    let raised = Int(table.reference.generation &- generation)
    #expect(raised >= shared.moves.load(ordering: .relaxed) + shared.removed.load(ordering: .relaxed))
    let now = shared.now.load(ordering: .relaxed)
    expectConverged(table, now: now)
    // No place is left claimed: everything can be removed and the table filled again.
    _ = table.sweep(nowSeconds: now &+ 1000, ageingSeconds: 1)
    #expect(table.count == 0)
    for index in 0..<32 {
      #expect(table.reference.learn(testMAC(index), at: place(mac: index, thread: 0), nowSeconds: now) == .learned)
    }
  }

  @Test func `Threads that insert the same new MACs while places free up leave each MAC once, in every round`() {
    let threads = 4
    let rounds = 1500
    let table = MACTable(macsMax: 32, seed: 7)
    let shared = Shared()
    let twice = Atomic<Int>(0)
    let miscounted = Atomic<Int>(0)
    @Sendable func waitForAll(_ phase: Int) {
      shared.arrived.wrappingAdd(1, ordering: .acquiringAndReleasing)
      while shared.arrived.load(ordering: .acquiring) < phase * threads { sched_yield() }
    }
    onThreads(threads) { thread in
      let macs = table.reference
      for round in 0..<rounds {
        // The places of the last round's MACs free up while this round's are entered.
        if thread == 0 { _ = table.sweep(nowSeconds: UInt32(round * 2 + 2), ageingSeconds: 1) }
        for index in 0..<12 {
          let mac = round * 12 + index
          _ = macs.learn(
            testMAC(mac), at: place(mac: mac % 1024, thread: thread), nowSeconds: UInt32(round * 2 + 2))
        }
        waitForAll(round * 2 + 1)
        if thread == 0 {
          let entries = table.entries(nowSeconds: UInt32(round * 2 + 2))
          if Set(entries.map(\.mac)).count != entries.count { twice.wrappingAdd(1, ordering: .relaxed) }
          if table.count != entries.count { miscounted.wrappingAdd(1, ordering: .relaxed) }
        }
        waitForAll(round * 2 + 2)
      }
    }
    #expect(twice.load(ordering: .relaxed) == 0)
    #expect(miscounted.load(ordering: .relaxed) == 0)
  }

  @Test func `Several workers that hear of one migration count one move`() {
    let table = MACTable(macsMax: 64)
    let shared = Shared()
    for round in 0..<300 {
      // Two places in turn, far apart in time, so that nothing freezes.
      let now = UInt32(1 + round) * MACTable.flapWindowSeconds
      let location = InterfaceIndex(round % 2)
      onThreads(3) { _ in
        if table.reference.learn(testMAC(1), at: location, nowSeconds: now) == .moved {
          shared.moves.wrappingAdd(1, ordering: .relaxed)
        }
      }
    }
    #expect(shared.moves.load(ordering: .relaxed) == 299)
  }

  @Test func `Several workers that hear a MAC flap freeze it once, at the place where it was at first`() {
    let places = 6
    let rounds = 2_000
    let table = MACTable(macsMax: 64)
    let shared = Shared()
    let freezes = Atomic<Int>(0)
    for round in 0..<rounds {
      let mac = testMAC(round)
      let home = InterfaceIndex(round % places)
      _ = table.reference.learn(mac, at: home, nowSeconds: 1)
      onThreads(3) { thread in
        var random = SeededRandom(seed: UInt64(round * 3 + thread))
        for _ in 0..<12 {
          let place = InterfaceIndex(Int.random(in: 0..<places, using: &random))
          switch table.reference.learn(mac, at: place, nowSeconds: 1) {
          case .moved: shared.moves.wrappingAdd(1, ordering: .relaxed)
          case .froze, .frozeHere: freezes.wrappingAdd(1, ordering: .relaxed)
          case .held: if place != home { shared.wrong.wrappingAdd(1, ordering: .relaxed) }
          case .frozen: if place == home { shared.wrong.wrappingAdd(1, ordering: .relaxed) }
          default: break
          }
        }
      }
      // Nobody hears it again: the last who moved it has brought it home.
      if table.reference.lookup(mac) != home { shared.wrong.wrappingAdd(1, ordering: .relaxed) }
      _ = table.removeAll(at: home)
    }
    #expect(shared.wrong.load(ordering: .relaxed) == 0)
    #expect(freezes.load(ordering: .relaxed) == rounds)
    // Two workers at most move it between the last that was counted and the freeze.
    let moves = shared.moves.load(ordering: .relaxed)
    #expect(moves >= rounds * MACTable.movesMax && moves <= rounds * (MACTable.movesMax + 2))
  }

  @Test func `The limit holds when several threads learn more than it allows`() {
    let table = MACTable(macsMax: 500)
    let over = Atomic<Int>(0)
    onThreads(4) { thread in
      for index in 0..<1000 {
        _ = table.reference.learn(testMAC(thread * 1000 + index), at: InterfaceIndex(thread), nowSeconds: 1)
        if index % 100 == 0, table.entries(nowSeconds: 1).count > 500 { over.wrappingAdd(1, ordering: .relaxed) }
      }
    }
    #expect(over.load(ordering: .relaxed) == 0)
    #expect(table.count == 500)
    expectConverged(table, now: 1)
  }
}
