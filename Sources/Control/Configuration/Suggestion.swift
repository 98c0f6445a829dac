/// The nearest of some words to a mistyped one, by edit distance; nil where none is near.
///
/// Near is a third of the word's length, at least one edit: `adress` finds `address`, `foo` finds nothing.
func nearest(to word: String, in candidates: [String]) -> String? {
  let distanceMax = max(1, word.count / 3)
  let word = Array(word.lowercased().utf8)
  // Words much longer than any candidate are never near: no need to compare them.
  return
    candidates
    .filter { abs($0.utf8.count - word.count) <= distanceMax }
    .map { (candidate: $0, distance: editDistance(word, Array($0.lowercased().utf8))) }
    .filter { $0.distance <= distanceMax }
    .min { $0.distance < $1.distance }?
    .candidate
}

/// Insertions, removals, replacements and swaps of neighbours that turn one word into the other.
private func editDistance(_ left: [UInt8], _ right: [UInt8]) -> Int {
  var beforePrevious = [Int](repeating: 0, count: right.count + 1)
  var previous = Array(0...right.count)
  for row in 0..<left.count {
    var current = [row + 1]
    for column in 0..<right.count {
      var best = min(
        previous[column] + (left[row] == right[column] ? 0 : 1), previous[column + 1] + 1, current[column] + 1)
      if row > 0, column > 0, left[row] == right[column - 1], left[row - 1] == right[column] {
        best = min(best, beforePrevious[column - 1] + 1)
      }
      current.append(best)
    }
    beforePrevious = previous
    previous = current
  }
  return previous[right.count]
}

/// What would be right, for one of some words: the one that was probably meant, and all there are.
func remedy(for word: String, in candidates: [String], called what: String) -> String {
  let all = candidates.isEmpty ? "there are no \(what)" : "\(what): \(candidates.joined(separator: ", "))"
  guard let nearest = nearest(to: word, in: candidates) else { return all }
  return candidates.count == 1 ? "did you mean \"\(nearest)\"?" : "did you mean \"\(nearest)\"? (\(all))"
}
