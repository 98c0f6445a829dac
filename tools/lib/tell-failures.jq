# Reads the event stream of one run of Swift Testing (JSON lines, version 0; --slurp) and tells what failed: a line for
# each test, then its messages. $what names the run.

def is_failure: (.isKnown | not) and ((.severity // ._severity // "error") != "warning");

[.[] | select(.kind == "test").payload | select(.kind == "function")] as $planned
| [.[] | select(.kind == "event").payload] as $events
| [$events[] | select(.kind == "testSkipped" or .kind == "testCancelled" or .kind == "testEnded") | .testID] as $ended
| [$events[] | select(.kind == "issueRecorded" and (.issue | is_failure))] as $issues
| ($issues | group_by(.testID)[]
    | "✘ \($what): \(.[0].testID // "no test")",
      (.[:5][] | "    \([.messages[].text] | join(" | ") | .[:600])")),
  ($planned[] | select(.id as $id | $ended | index([$id]) | not) | "✘ \($what): \(.id) did not end")
