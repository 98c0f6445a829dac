# Reads the event stream of one run of Swift Testing (JSON lines, version 0; --slurp) and counts it.
# A parameterised test counts once for each of its cases; a skipped or cancelled test counts once.
# A planned test that neither ended nor was skipped did not survive the run: it counts as failed.

def is_failure: (.isKnown | not) and ((.severity // ._severity // "error") != "warning");

[.[] | select(.kind == "test").payload | select(.kind == "function") | .id] as $planned
| [.[] | select(.kind == "event").payload] as $events
| [$events[] | select(.kind == "testSkipped" or .kind == "testCancelled") | .testID] as $skipped
| [$events[] | select(.kind == "testEnded") | .testID] as $ended
| [$events[] | select(.kind == "issueRecorded" and (.issue | is_failure))] as $issues
| reduce $planned[] as $test (
    {passed: 0, failed: 0, skipped: 0};
    [$issues[] | select(.testID == $test)] as $mine
    | ([$events[] | select(.kind == "testCaseEnded" and .testID == $test)] | length) as $cases
    | ([$mine[]._testCase.id | values] | unique | length) as $failedCases
    | if ($skipped | index([$test])) and ($mine == []) then .skipped += 1
      elif $ended | index([$test]) | not then .failed += 1
      elif $mine == [] then .passed += ([$cases, 1] | max)
      else
        ([$failedCases, 1] | max) as $failed
        | .failed += $failed | .passed += ([$cases - $failed, 0] | max)
      end)
# Issues that belong to no test (a run that could not start one) are failures of their own.
| .failed += ([$issues[] | select(.testID == null)] | length)
| "\(.passed) \(.failed) \(.skipped)"
