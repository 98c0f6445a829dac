/// Pseudo-random numbers from a seed, the same on every machine: xoshiro256** (Blackman and Vigna, 2018), its state
/// filled by splitmix64 as its authors advise.
public struct SimulatedRandom: RandomNumberGenerator, Sendable {
  private var a, b, c, d: UInt64

  public init(seed: UInt64) {
    var mix = seed
    func splitmix(_ state: inout UInt64) -> UInt64 {
      state &+= 0x9E37_79B9_7F4A_7C15
      var word = state
      word = (word ^ (word >> 30)) &* 0xBF58_476D_1CE4_E5B9
      word = (word ^ (word >> 27)) &* 0x94D0_49BB_1331_11EB
      return word ^ (word >> 31)
    }
    a = splitmix(&mix)
    b = splitmix(&mix)
    c = splitmix(&mix)
    d = splitmix(&mix)
  }

  public mutating func next() -> UInt64 {
    func rotate(_ word: UInt64, _ bits: UInt64) -> UInt64 { (word << bits) | (word >> (64 - bits)) }
    let result = rotate(b &* 5, 7) &* 9
    let shifted = b << 17
    c ^= a
    d ^= b
    b ^= c
    a ^= d
    c ^= shifted
    d = rotate(d, 45)
    return result
  }

  /// A number in 0 ..< `bound`.
  public mutating func below(_ bound: Int) -> Int {
    precondition(bound > 0)
    return Int(next().multipliedFullWidth(by: UInt64(bound)).high)
  }

  /// A number in `range`, both ends included.
  public mutating func number(in range: ClosedRange<Int>) -> Int {
    range.lowerBound + below(range.upperBound - range.lowerBound + 1)
  }

  /// True with the probability `rate`. Draws nothing for a rate of 0, so that a fault that is off costs no number.
  public mutating func chance(_ rate: Double) -> Bool {
    rate > 0 && Double(next() >> 11) * 0x1p-53 < rate
  }
}
