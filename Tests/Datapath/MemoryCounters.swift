import Datapath
import Glibc
import TestSupport
import Testing

@Suite struct MemoryCountersTests {
  @Test("a block starts at zero and adds to the counter meant, and to no other")
  func adding() {
    let block = CounterBlock()
    let writer = block.writer
    for counter in Counter.allCases { #expect(block.value(counter) == 0) }
    for (place, counter) in Counter.allCases.enumerated() {
      writer.add(counter)
      writer.add(counter, place * 1_000)
    }
    for (place, counter) in Counter.allCases.enumerated() {
      #expect(block.value(counter) == UInt64(place * 1_000 + 1))
      #expect(writer.value(counter) == block.value(counter))
    }
  }

  @Test("a reader on another thread sees a counter only grow, and at the end all of it")
  func reading() throws {
    let block = CounterBlock()
    let additions = 200_000
    let thread = TestThread {
      let writer = block.writer
      for _ in 0..<additions { writer.add(.inBytes, 3) }
    }
    var last: UInt64 = 0
    var hasShrunk = false
    while last < UInt64(additions * 3) {
      let value = block.value(.inBytes)
      if value < last || value % 3 != 0 { hasShrunk = true }
      last = value
      sched_yield()
    }
    thread.join()
    #expect(!hasShrunk)
    #expect(block.value(.inBytes) == UInt64(additions * 3))
  }
}

@Suite struct MemoryCounterRegistryTests {
  @Test("every counter has a name of its own, in snake case")
  func names() {
    let names = Counter.allCases.map(\.definition.name)
    #expect(Set(names).count == names.count)
    for name in names {
      #expect(name.first?.isLowercase == true, "\(name)")
      #expect(name.allSatisfy { $0.isASCII && ($0.isLowercase || $0.isNumber || $0 == "_") }, "\(name)")
      #expect(!name.contains("__") && !name.hasSuffix("_"), "\(name)")
    }
  }

  @Test("every counter says where it is kept, in what unit, and what it counts, in a sentence")
  func definitions() {
    for counter in Counter.allCases {
      let definition = counter.definition
      #expect(!definition.scopes.isEmpty, "\(counter)")
      #expect(Set(definition.scopes).count == definition.scopes.count, "\(counter)")
      #expect(!definition.unit.isEmpty, "\(counter)")
      #expect(definition.help.last == "." && definition.help.first?.isUppercase == true, "\(counter)")
    }
  }

  @Test("raw values are places in a block: from 0 on, without gaps")
  func rawValues() {
    #expect(Counter.allCases.map(\.rawValue) == Array(0..<Counter.allCases.count))
  }

  @Test("what is called a drop is one, and nothing else is")
  func drops() {
    for counter in Counter.allCases {
      #expect(counter.isDrop == counter.definition.name.hasPrefix("drop_"), "\(counter)")
      if counter.isEgressDrop { #expect(counter.isDrop, "\(counter)") }
    }
  }

  @Test("a drop after routing is kept by every kind of egress, one before is not charged to an egress")
  func egressDrops() {
    for counter in Counter.allCases where counter.isDrop {
      let scopes = Set(counter.definition.scopes)
      if counter.isEgressDrop {
        #expect(scopes == [.port, .link, .domain], "\(counter)")
      } else {
        #expect(!scopes.contains(.worker), "\(counter)")
        #expect(scopes.contains(.underlay) || scopes.contains(.domain) || scopes == [.link], "\(counter)")
      }
    }
    #expect(Counter.dropInterfaceDown.isEgressDrop)
    #expect(Counter.dropStopped.isEgressDrop)
    #expect(!Counter.dropNoDestination.isEgressDrop)
    #expect(!Counter.inFrames.isDrop && !Counter.macsLearned.isDrop)
  }
}
