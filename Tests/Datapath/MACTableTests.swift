import Testing

@testable import Datapath

/// What a MAC table should do, written with a dictionary and plain fields.
private struct MACTableModel {
  struct Entry {
    var location: InterfaceIndex
    var lastSeen: UInt32
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
      entries[mac] = Entry(location: location, lastSeen: now)
      return .learned
    }
    if entry.location == location {
      entries[mac]!.lastSeen = now
      return entry.frozenSince.map { now - $0 < MACTable.freezeSeconds } ?? false ? .held : .known
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
      entry.frozenSince = now
      entries[mac] = entry
      changes += 1
      return .froze
    }
    entry.moves += 1
    entry.location = location
    entry.lastSeen = now
    entries[mac] = entry
    changes += 1
    return .moved
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

  @Test func `A MAC that flaps is frozen where it is, and followed again when the freeze is over`() {
    let table = MACTable(macsMax: 100)
    let places = [a, b]
    _ = table.reference.learn(testMAC(1), at: a, nowSeconds: 100)
    for move in 1...MACTable.movesMax {
      #expect(table.reference.learn(testMAC(1), at: places[move % 2], nowSeconds: 100) == .moved)
    }
    let here = places[MACTable.movesMax % 2]
    let there = places[(MACTable.movesMax + 1) % 2]
    #expect(table.reference.learn(testMAC(1), at: there, nowSeconds: 101) == .froze)
    #expect(table.reference.lookup(testMAC(1)) == here)
    #expect(table.reference.learn(testMAC(1), at: there, nowSeconds: 101) == .frozen)
    #expect(table.reference.learn(testMAC(1), at: here, nowSeconds: 102) == .held)
    #expect(table.entries(nowSeconds: 102).map(\.isFrozen) == [true])
    #expect(table.reference.learn(testMAC(1), at: there, nowSeconds: 100 + MACTable.freezeSeconds) == .frozen)
    #expect(table.reference.lookup(testMAC(1)) == here)
    #expect(table.entries(nowSeconds: 101 + MACTable.freezeSeconds).map(\.isFrozen) == [false])
    #expect(table.reference.learn(testMAC(1), at: there, nowSeconds: 101 + MACTable.freezeSeconds) == .moved)
    #expect(table.reference.lookup(testMAC(1)) == there)
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
        #expect(table.reference.learn(mac, at: a, nowSeconds: second) == .froze)
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
      var random = RoutingRandom(UInt64(seed))
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
    var random = RoutingRandom(seed)
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
        let expected = model.remove { $0.location == place }
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
    for learned in [MACTable.Learned.known, .held, .learned, .moved, .frozen, .froze, .limited] {
      #expect(seen[learned, default: 0] > 20, "\(learned)")
    }
    #expect(aged > 20)
    #expect(seen[.skipped] == nil)
  }
}
