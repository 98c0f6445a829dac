import TestSupport
import Testing

@testable import Datapath

/// What a MAC table should do, written with a dictionary and plain fields.
private struct MACTableModel {
  struct Entry {
    var location: InterfaceIndex
    var lastSeen: UInt32
    var home: InterfaceIndex
    var windowStart: UInt32 = 0
    var moves = 0
    var frozenSince: UInt32?
  }
  var entries: [UInt64: Entry] = [:]
  let macsMax: Int
  /// Moves, freezes and removals.
  var changes: UInt32 = 0

  mutating func learn(_ mac: UInt64, at location: InterfaceIndex, now: UInt32) -> MACTable.Learned {
    guard var entry = entries[mac] else {
      guard entries.count < macsMax else { return .limited }
      entries[mac] = Entry(location: location, lastSeen: now, home: location)
      return .learned
    }
    if entry.location == location {
      entry.lastSeen = now
      let isFrozen = entry.frozenSince.map { now - $0 < MACTable.freezeSeconds } ?? false
      if !isFrozen && (entry.moves == 0 || now - entry.windowStart >= MACTable.flapWindowSeconds) {
        entry.home = location
        entry.moves = 0
        entry.frozenSince = nil
      }
      entries[mac] = entry
      return isFrozen ? .held : .known
    }
    if let since = entry.frozenSince {
      if now - since < MACTable.freezeSeconds { return .frozen }
      entry.frozenSince = nil
      entry.moves = 0
    }
    if entry.moves == 0 || now - entry.windowStart >= MACTable.flapWindowSeconds {
      entry.moves = 0
      entry.windowStart = now
    }
    if entry.moves == MACTable.movesMax {
      // Brought home, if it is not there, and frozen.
      changes += entry.location == entry.home ? 1 : 2
      entry.frozenSince = now
      entry.moves = 0
      entry.location = entry.home
      entries[mac] = entry
      return location == entry.home ? .frozeHere : .froze
    }
    entry.moves += 1
    entry.location = location
    entry.lastSeen = now
    entries[mac] = entry
    changes += 1
    return .moved
  }

  mutating func removeAll(at location: InterfaceIndex) -> Int {
    for (mac, entry) in entries where entry.home == location {
      entries[mac]!.home = entry.location
      entries[mac]!.moves = 0
      entries[mac]!.frozenSince = nil
    }
    return remove { $0.location == location }
  }

  mutating func remove(where isGone: (Entry) -> Bool) -> Int {
    let gone = entries.filter { isGone($0.value) }.keys
    for mac in gone { entries[mac] = nil }
    changes += UInt32(gone.count)
    return gone.count
  }
}

@Suite struct MACTableTests {
  private let a = InterfaceIndex(1)
  private let b = InterfaceIndex(2)

  @Test func `A MAC is found where it was learned, and others are not`() {
    let table = MACTable(macsMax: 100)
    #expect(table.reference.lookup(testMAC(1)) == .none)
    #expect(table.reference.learn(testMAC(1), at: a, nowSeconds: 1) == .learned)
    #expect(table.reference.learn(testMAC(1), at: a, nowSeconds: 1) == .known)
    #expect(table.reference.lookup(testMAC(1)) == a)
    #expect(table.reference.lookup(testMAC(2)) == .none)
    #expect(table.reference.lookup(0) == .none)
    #expect(table.count == 1)
  }

  @Test func `Location 0 and the highest location are locations like others`() {
    let table = MACTable(macsMax: 100)
    let highest = InterfaceIndex(InterfaceIndex.countMax - 1)
    #expect(table.reference.learn(testMAC(1), at: InterfaceIndex(0), nowSeconds: 1) == .learned)
    #expect(table.reference.learn(testMAC(2), at: highest, nowSeconds: 1) == .learned)
    #expect(table.reference.lookup(testMAC(1)) == InterfaceIndex(0))
    #expect(table.reference.lookup(testMAC(2)) == highest)
    #expect(table.reference.learn(0xFEFF_FFFF_FFFF, at: a, nowSeconds: 1) == .learned)
    #expect(table.reference.lookup(0xFEFF_FFFF_FFFF) == a)
  }

  @Test func `A move is followed at once and raises the generation, a first learning does not`() {
    let table = MACTable(macsMax: 100)
    let before = table.reference.generation
    _ = table.reference.learn(testMAC(1), at: a, nowSeconds: 1)
    #expect(table.reference.generation == before)
    #expect(table.reference.learn(testMAC(1), at: b, nowSeconds: 1) == .moved)
    #expect(table.reference.lookup(testMAC(1)) == b)
    #expect(table.reference.generation == before + 1)
    #expect(table.count == 1)
  }

  @Test(arguments: [2, 3, 4, 5])
  func `A MAC that flaps is frozen where it was at first, and followed again when that is over`(placeCount: Int) {
    let table = MACTable(macsMax: 100)
    let places = (0..<placeCount).map { InterfaceIndex($0) }
    let home = places[0]
    #expect(table.reference.learn(testMAC(1), at: home, nowSeconds: 100) == .learned)
    for move in 1...MACTable.movesMax {
      #expect(table.reference.learn(testMAC(1), at: places[move % placeCount], nowSeconds: 100) == .moved)
    }
    let last = places[MACTable.movesMax % placeCount]
    #expect(table.reference.learn(testMAC(1), at: last, nowSeconds: 101) == .known)
    let before = table.reference.generation
    let next = places[(MACTable.movesMax + 1) % placeCount]
    #expect(table.reference.learn(testMAC(1), at: next, nowSeconds: 101) == (next == home ? .frozeHere : .froze))
    #expect(table.reference.generation != before)
    #expect(table.reference.lookup(testMAC(1)) == home)
    for place in places {
      #expect(table.reference.learn(testMAC(1), at: place, nowSeconds: 102) == (place == home ? .held : .frozen))
      #expect(table.reference.lookup(testMAC(1)) == home)
    }
    #expect(table.entries(nowSeconds: 102).map(\.isFrozen) == [true])
    let last60 = 100 + MACTable.freezeSeconds
    #expect(table.reference.learn(testMAC(1), at: places[1], nowSeconds: last60) == .frozen)
    #expect(table.reference.lookup(testMAC(1)) == home)
    #expect(table.entries(nowSeconds: last60 + 1).map(\.isFrozen) == [false])
    #expect(table.reference.learn(testMAC(1), at: places[1], nowSeconds: last60 + 1) == .moved)
    #expect(table.reference.lookup(testMAC(1)) == places[1])
  }

  @Test func `A guest that moved has its home at the new place once it was heard there after the window`() {
    for rests in [true, false] {
      let table = MACTable(macsMax: 100)
      func learn(_ place: Int, _ second: UInt32) -> MACTable.Learned {
        table.reference.learn(testMAC(1), at: InterfaceIndex(place), nowSeconds: second)
      }
      _ = learn(1, 1)
      #expect(learn(2, 1) == .moved)
      #expect(table.reference.lookup(testMAC(1)) == InterfaceIndex(2))
      let later = rests ? 1 + MACTable.flapWindowSeconds : MACTable.flapWindowSeconds
      #expect(learn(2, later) == .known)
      // Within the window the first move counts.
      for move in 0..<MACTable.movesMax - (rests ? 0 : 1) { #expect(learn(move % 2 + 3, later) == .moved) }
      #expect(learn(5, later) == .froze)
      #expect(table.reference.lookup(testMAC(1)) == InterfaceIndex(rests ? 2 : 1))
    }
  }

  @Test func `A flap that came to rest somewhere leaves the home where it was`() {
    let table = MACTable(macsMax: 100)
    _ = table.reference.learn(testMAC(1), at: a, nowSeconds: 1)
    for move in 1...3 { _ = table.reference.learn(testMAC(1), at: InterfaceIndex(10 + move), nowSeconds: 1) }
    for move in 1...MACTable.movesMax {
      #expect(table.reference.learn(testMAC(1), at: InterfaceIndex(20 + move), nowSeconds: 100) == .moved)
    }
    #expect(table.reference.learn(testMAC(1), at: a, nowSeconds: 100) == .frozeHere)
    #expect(table.reference.lookup(testMAC(1)) == a)
  }

  @Test func `A MAC whose home leaves is free, and frozen only where it is heard from then on`() {
    for isFrozen in [true, false] {
      let table = MACTable(macsMax: 100)
      func learn(_ place: InterfaceIndex) -> MACTable.Learned {
        table.reference.learn(testMAC(1), at: place, nowSeconds: 1)
      }
      _ = learn(a)
      let places = [b, InterfaceIndex(3), InterfaceIndex(4)]
      for move in 0..<MACTable.movesMax { #expect(learn(places[move % 3]) == .moved) }
      if isFrozen { #expect(learn(places[2]) == .froze) }
      #expect(table.removeAll(at: a) == (isFrozen ? 1 : 0))
      let home = places[(MACTable.movesMax - 1) % 3]
      #expect(learn(home) == (isFrozen ? .learned : .known))
      for move in 0..<MACTable.movesMax { #expect(learn(InterfaceIndex(move + 10)) == .moved) }
      #expect(learn(InterfaceIndex(20)) == .froze)
      #expect(table.reference.lookup(testMAC(1)) == home)
    }
  }

  @Test func `A freeze is over after any silence, also where the count of seconds in the table comes round`() {
    for silence in [60, 61, 1_000, 1_023, 1_024, 2_048, 4_095, 4_096, 4_097, 4_150, 8_192, 1 << 20] as [UInt32] {
      for start in [1, 4_090, 4_096, 100_000] as [UInt32] {
        let table = MACTable(macsMax: 100)
        for move in 0...MACTable.movesMax + 1 {
          _ = table.reference.learn(testMAC(1), at: InterfaceIndex(move), nowSeconds: start)
        }
        #expect(table.entries(nowSeconds: start + 59).map(\.isFrozen) == [true])
        #expect(table.reference.learn(testMAC(1), at: b, nowSeconds: start + 59) == .frozen)
        #expect(table.entries(nowSeconds: start + silence).map(\.isFrozen) == [false])
        #expect(table.reference.learn(testMAC(1), at: b, nowSeconds: start + silence) == .moved)
      }
    }
  }

  @Test func `Moves further apart than the window never freeze`() {
    let table = MACTable(macsMax: 100)
    _ = table.reference.learn(testMAC(1), at: a, nowSeconds: 1)
    for move in 1...40 {
      let second = UInt32(move) * MACTable.flapWindowSeconds / UInt32(MACTable.movesMax) + 1
      #expect(table.reference.learn(testMAC(1), at: InterfaceIndex(move + 10), nowSeconds: second) == .moved)
    }
  }

  @Test func `A worker whose clock is a second behind sees a fresh freeze`() {
    let table = MACTable(macsMax: 100)
    for move in 0...MACTable.movesMax {
      _ = table.reference.learn(testMAC(1), at: InterfaceIndex(move), nowSeconds: 50)
    }
    #expect(table.reference.learn(testMAC(1), at: InterfaceIndex(99), nowSeconds: 50) == .froze)
    #expect(table.reference.learn(testMAC(1), at: InterfaceIndex(99), nowSeconds: 49) == .frozen)
  }

  @Test func `Silent MACs age and heard ones stay`() {
    let table = MACTable(macsMax: 100)
    _ = table.reference.learn(testMAC(1), at: a, nowSeconds: 10)
    _ = table.reference.learn(testMAC(2), at: a, nowSeconds: 10)
    _ = table.reference.learn(testMAC(2), at: a, nowSeconds: 11)
    #expect(table.sweep(nowSeconds: 309, ageingSeconds: 300) == 0)
    let before = table.reference.generation
    #expect(table.sweep(nowSeconds: 310, ageingSeconds: 300) == 1)
    #expect(table.reference.generation != before)
    #expect(table.reference.lookup(testMAC(1)) == .none)
    #expect(table.reference.lookup(testMAC(2)) == a)
    #expect(
      table.entries(nowSeconds: 310) == [
        MACTable.Entry(mac: testMAC(2), location: a, ageSeconds: 299, isFrozen: false)
      ])
    // By a clock that is behind, it is not older than the beginning of time.
    #expect(table.sweep(nowSeconds: 9, ageingSeconds: 300) == 0)
  }

  @Test func `A place that another MAC had before tells nothing of the new one`() {
    // One bucket pair's worth of MACs, again and again.
    let table = MACTable(macsMax: 8)
    for round in 0..<50 {
      let second = UInt32(1 + round * 2)
      for index in 0..<8 {
        let mac = testMAC(round * 8 + index)
        #expect(table.reference.learn(mac, at: a, nowSeconds: second) == .learned)
        for move in 1...MACTable.movesMax {
          #expect(table.reference.learn(mac, at: InterfaceIndex(move + 1), nowSeconds: second) == .moved)
        }
        #expect(table.reference.learn(mac, at: a, nowSeconds: second) == .frozeHere)
      }
      #expect(table.sweep(nowSeconds: second + 1, ageingSeconds: 1) == 8)
    }
  }

  @Test func `What leaves with an interface is only what was there`() {
    let table = MACTable(macsMax: 100)
    for index in 0..<50 { _ = table.reference.learn(testMAC(index), at: index % 2 == 0 ? a : b, nowSeconds: 1) }
    #expect(table.removeAll(at: a) == 25)
    #expect(table.removeAll(at: a) == 0)
    #expect(table.count == 25)
    for index in 0..<50 { #expect(table.reference.lookup(testMAC(index)) == (index % 2 == 0 ? .none : b)) }
  }

  @Test(arguments: [1, 7, 64, 1000]) func `The limit holds, and a place that frees up is used again`(macsMax: Int) {
    let table = MACTable(macsMax: macsMax)
    for index in 0..<macsMax {
      #expect(table.reference.learn(testMAC(index), at: a, nowSeconds: 1) == .learned)
    }
    #expect(table.reference.learn(testMAC(macsMax), at: a, nowSeconds: 1) == .limited)
    #expect(table.reference.lookup(testMAC(macsMax)) == .none)
    #expect(table.count == macsMax)
    #expect(table.reference.learn(testMAC(0), at: b, nowSeconds: 1) == .moved)
    #expect(table.removeAll(at: b) == 1)
    #expect(table.reference.learn(testMAC(macsMax), at: a, nowSeconds: 1) == .learned)
    #expect(table.reference.learn(testMAC(0), at: a, nowSeconds: 1) == .limited)
  }

  @Test func `A full table has room for every MAC, in order or at random`() {
    for seed in 1...3 {
      let macsMax = 1 << 15
      let table = MACTable(macsMax: macsMax, seed: UInt64(seed))
      var random = SeededRandom(seed: UInt64(seed))
      var missed = 0
      var macs: Set<UInt64> = []
      while macs.count < macsMax {
        let mac = seed == 1 ? testMAC(macs.count) : random.next() >> 16 & 0xFEFF_FFFF_FFFF | 2
        if !macs.insert(mac).inserted { continue }
        if table.reference.learn(mac, at: a, nowSeconds: 1) != .learned { missed += 1 }
      }
      #expect(missed == 0)
      #expect(table.count == macsMax)
      #expect(Set(table.entries(nowSeconds: 1).map(\.mac)) == macs)
    }
  }

  @Test(arguments: [1, 2, 3, 4] as [UInt64])
  func `The table does what a dictionary would, for 40,000 random operations`(seed: UInt64) throws {
    var random = SeededRandom(seed: seed)
    // So few MACs and so small a limit that moves, freezes, ageing and the limit all come often: 4 MACs that flap,
    // 16 that are heard often, 40 that are heard so seldom that they age.
    let kinds = [0..<4, 4..<20, 4..<20, 4..<20, 20..<60]
    let places = (0..<6).map { InterfaceIndex($0) }
    let table = MACTable(macsMax: 40, seed: seed)
    var model = MACTableModel(macsMax: 40)
    let generation = table.reference.generation
    var now: UInt32 = 1
    var seen: [MACTable.Learned: Int] = [:]
    var aged = 0
    for step in 0..<40_000 {
      let index = kinds.randomElement(using: &random)!.randomElement(using: &random)!
      let mac = testMAC(index)
      let place = places.randomElement(using: &random)!
      switch Int.random(in: 0..<1000, using: &random) {
      case 0..<600:
        let stays = index >= 4 && Int.random(in: 0..<10, using: &random) < 8
        let here = stays ? model.entries[mac]?.location ?? place : place
        let expected = model.learn(mac, at: here, now: now)
        let learned = table.reference.learn(mac, at: here, nowSeconds: now)
        seen[learned, default: 0] += 1
        try #require(learned == expected, "step \(step)")
      case 600..<980:
        try #require(table.reference.lookup(mac) == model.entries[mac]?.location ?? .none, "step \(step)")
      case 980..<990:
        now += UInt32.random(in: 0...8, using: &random)
      case 990..<998:
        let at = now
        let expected = model.remove { at - $0.lastSeen >= 30 }
        aged += expected
        try #require(table.sweep(nowSeconds: now, ageingSeconds: 30) == expected, "step \(step)")
      default:
        let expected = model.removeAll(at: place)
        try #require(table.removeAll(at: place) == expected, "step \(step)")
      }
      try #require(table.count == model.entries.count, "step \(step)")
      try #require(table.reference.generation == generation &+ model.changes, "step \(step)")
      guard step % 500 == 0 else { continue }
      let expected = model.entries.map { mac, entry in
        MACTable.Entry(
          mac: mac, location: entry.location, ageSeconds: now - entry.lastSeen,
          isFrozen: entry.frozenSince.map { now - $0 < MACTable.freezeSeconds } ?? false)
      }
      try #require(Set(table.entries(nowSeconds: now)) == Set(expected), "step \(step)")
    }
    // The run is worth something only if everything came up.
    for learned in [MACTable.Learned.known, .held, .learned, .moved, .frozen, .froze, .frozeHere, .limited] {
      #expect(seen[learned, default: 0] > 10, "\(learned)")
    }
    #expect(aged > 20)
    #expect(seen[.skipped] == nil)
  }
}
