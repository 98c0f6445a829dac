import Testing

@testable import Datapath

@Suite("Dispatch decides when a worker sleeps, polls and yields")
struct DispatchTests {
  private static let second: UInt64 = 1_000_000_000

  private func dispatch(_ change: (inout Dispatch.Settings) -> Void) -> Dispatch {
    var settings = Dispatch.Settings()
    change(&settings)
    return Dispatch(settings, now: Self.second)
  }

  @Test("guest-driven sleeps after every turn, and never yields")
  func guestDriven() {
    var dispatch = dispatch { $0.mode = .guestDriven }
    for frames in [0, 1, 64, 4_096] {
      let (wait, yields) = dispatch.next(now: Self.second, frames: frames, didWork: frames > 0)
      #expect(wait == .forEvent && !yields)
    }
  }

  @Test("vmm-driven polls, and lets others run after a full turn and when nothing came")
  func vmmDriven() {
    var dispatch = dispatch {
      $0.mode = .vmmDriven
      $0.yield = .immediate
    }
    for (frames, yields) in [(1, false), (31, false), (32, true), (4_096, true), (0, true)] {
      let next = dispatch.next(now: Self.second, frames: frames, didWork: frames > 0)
      #expect(next.wait == .sweep && next.yields == yields, "\(frames) frames")
    }
  }

  @Test("adaptive polls above the upper rate until the rate is below the lower one")
  func adaptive() {
    var dispatch = dispatch { _ in }
    var now = Self.second
    /// One period in which so many frames come, in one turn.
    func period(_ frames: Int) -> Bool {
      now += 10_000_000
      _ = dispatch.next(now: now, frames: frames, didWork: true)
      return dispatch.isPolling
    }
    // 10 ms: 10,000 frames a second are 100, 1,000 are 10.
    #expect(period(100) == false)
    #expect(period(101) == true)
    #expect(period(10) == true)
    #expect(period(9) == false)
    #expect(period(100) == false)
  }

  @Test("an adaptive yield spins for its time, then sleeps; a timed one sleeps at once")
  func yields() {
    var spinning = dispatch { $0.mode = .vmmDriven }
    var next = spinning.next(now: Self.second, frames: 1, didWork: true)
    #expect(next.wait == .sweep)
    next = spinning.next(now: Self.second + 49_999, frames: 0, didWork: false)
    #expect(next.wait == .sweep && next.yields)
    next = spinning.next(now: Self.second + 50_000, frames: 0, didWork: false)
    #expect(next.wait == .forEvent && !next.yields)

    var timed = dispatch {
      $0.mode = .vmmDriven
      $0.yield = .timed
    }
    next = timed.next(now: Self.second, frames: 0, didWork: false)
    #expect(next.wait == .atMost(nanoseconds: 50_000) && !next.yields)
  }

  @Test("who never yields polls again, after a poll that found nothing and after a crowd")
  func neverYields() {
    var dispatch = dispatch {
      $0.mode = .vmmDriven
      $0.yield = .never
    }
    var next = dispatch.next(now: Self.second, frames: 0, didWork: false)
    #expect(next.wait == .sweep && !next.yields)
    next = dispatch.next(now: Self.second, frames: 500, didWork: true)
    #expect(next.wait == .sweep && !next.yields)
  }

  @Test("a batch is waited for only while it is not full")
  func batchWait() {
    var dispatch = dispatch {
      $0.mode = .vmmDriven
      $0.batchWaitNanoseconds = 20_000
    }
    var next = dispatch.next(now: Self.second, frames: 63, didWork: true)
    #expect(next.wait == .forBatch(completions: 64, nanoseconds: 20_000) && !next.yields)
    next = dispatch.next(now: Self.second, frames: 64, didWork: true)
    #expect(next.wait == .sweep && next.yields)
  }
}
