import Datapath
import Testing

@Suite struct MemoryFixedArrayTests {
  @Test("every element starts as the one given, and keeps what is written")
  func elements() {
    var array = FixedArray(repeating: UInt32(7), count: 100)
    let count = array.count
    #expect(count == 100)
    let before = (0..<100).allSatisfy { array[$0] == 7 }
    #expect(before)
    for index in 0..<100 { array[index] = UInt32(index * index) }
    let after = (0..<100).allSatisfy { array[$0] == UInt32($0 * $0) }
    #expect(after)
    array[5] += 1
    let changed = array[5]
    #expect(changed == 26)
  }

  @Test("the base is aligned to two cache lines, for elements of any size")
  func alignment() {
    for count in [1, 3, 1000] {
      var bytes = FixedArray(repeating: UInt8(0), count: count)
      let byteBase = unsafe UInt(bitPattern: bytes.address(of: 0))
      #expect(byteBase % 128 == 0)
      bytes[count - 1] = 1
      let words = FixedArray(repeating: SIMD4<UInt64>.zero, count: count)
      let wordBase = unsafe UInt(bitPattern: words.address(of: 0))
      #expect(wordBase % 128 == 0)
      let last = unsafe UInt(bitPattern: words.address(of: count - 1))
      #expect(last == wordBase + UInt(32 * (count - 1)))
    }
  }

  @Test("a span shows a part of the array, an empty one too")
  func spans() {
    var array = FixedArray(repeating: 0, count: 10)
    for index in 0..<10 { array[index] = index }
    let part = array.span(from: 3, count: 4)
    let partCount = part.count
    let partEnds = [part[0], part[3]]
    #expect(partCount == 4)
    #expect(partEnds == [3, 6])
    let wholeCount = array.span(count: 10).count
    let emptyCount = array.span(from: 10, count: 0).count
    #expect(wholeCount == 10)
    #expect(emptyCount == 0)
  }

  @Test("an array of no elements is one")
  func empty() {
    let array = FixedArray(repeating: 1, count: 0)
    let count = array.count
    #expect(count == 0)
  }

  @Test("an index out of range traps, also a negative one")
  func indexTraps() async {
    await #expect(processExitsWith: .failure) {
      let array = FixedArray(repeating: 1, count: 4)
      print(array[4])
    }
    await #expect(processExitsWith: .failure) {
      let array = FixedArray(repeating: 1, count: 4)
      print(array[-1])
    }
    await #expect(processExitsWith: .failure) {
      var array = FixedArray(repeating: 1, count: 4)
      array[4] = 2
    }
  }

  @Test("a span out of range traps, also where the sum would overflow")
  func spanTraps() async {
    await #expect(processExitsWith: .failure) {
      let array = FixedArray(repeating: 1, count: 4)
      print(array.span(from: 2, count: 3).count)
    }
    await #expect(processExitsWith: .failure) {
      let array = FixedArray(repeating: 1, count: 4)
      print(array.span(from: 1, count: .max).count)
    }
  }
}

@Suite struct MemoryBatchTests {
  @Test("a batch takes as many items as it was made for, and starts anew when emptied")
  func filling() {
    var batch = Batch(capacity: 3, filler: 0)
    for item in 1...3 {
      let room = batch.room
      #expect(room == 4 - item)
      batch.append(item * 10)
    }
    let isFull = batch.isFull
    #expect(isFull)
    let items = (0..<batch.count).map { batch[$0] }
    #expect(items == [10, 20, 30])
    batch.removeAll()
    let emptied = (batch.count, batch.isFull)
    #expect(emptied == (0, false))
    batch.append(40)
    let first = batch[0]
    #expect(first == 40)
  }

  @Test("one item too many traps, and so does reading a place that is not in use")
  func traps() async {
    await #expect(processExitsWith: .failure) {
      var batch = Batch(capacity: 1, filler: 0)
      batch.append(1)
      batch.append(2)
    }
    await #expect(processExitsWith: .failure) {
      var batch = Batch(capacity: 2, filler: 0)
      batch.append(1)
      print(batch[1])
    }
  }
}
