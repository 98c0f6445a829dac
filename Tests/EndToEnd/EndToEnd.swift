import Testing

/// All tests that need a real kernel. One at a time: each uses the machine's cores as if they were its own.
///
/// The parts that the tests stand on are in Lab/.
@Suite(.serialized, .timeLimit(.minutes(3)))
enum EndToEnd {}

/// The design's first rule: received + copies = sent + dropped + in flight, everywhere.
func expectConservation(_ report: CounterReport, sourceLocation: SourceLocation = #_sourceLocation) {
  #expect(report.conservation.holds, "\(report.conservation)", sourceLocation: sourceLocation)
}

/// The way from skipping reasons to traits: a suite that needs the forwarder, or the lab alone.
let needsLab: ConditionTrait = .disabled(if: Obstacle.toLab != nil, "\(Obstacle.toLab ?? "")")
let needsForwarder: ConditionTrait = .disabled(if: Obstacle.toForwarder != nil, "\(Obstacle.toForwarder ?? "")")
