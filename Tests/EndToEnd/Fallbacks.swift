import Testing

extension EndToEnd {
  /// A kernel that lacks a feature of io_uring gets a slower way, not an error.
  @Suite(needsForwarder)
  struct Fallbacks {
    @Test(
      "without a feature of io_uring traffic passes all the same",
      arguments: [
        "multishot-read", "multishot-receive", "buffer-ring", "fixed-files", "deferred-work", "single-issuer",
        "restrictions", "single-issuer,deferred-work,buffer-ring,multishot-receive,multishot-read,fixed-files,restrictions",
      ])
    func withoutAFeature(features: String) throws {
      try withLab { lab in
        let pair = try lab.pair(flags: ["--without", features])
        #expect(pair.forwarders.allSatisfy { $0.isLogged("without=") }, "it says what it does without")
        #expect(try pair.guestA.ping(pair.guestB).isComplete)
        #expect(try pair.guestA.tcp(to: pair.guestB, mebibytes: 16).receivedBytes > 8 << 20)
        _ = try pair.guestB.flow(to: pair.guestA, ["--udp", "--length", "1400", "--bitrate", "20M", "--time", "1"])
        for forwarder in pair.forwarders { try expectConservation(forwarder.stop()) }
      }
    }
  }
}
