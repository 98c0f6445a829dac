# Shared by the commands in tools/: source it, do not run it. It moves to the top of the project.
# shellcheck shell=bash
set -euo pipefail
self=$(realpath "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

say() { printf '%s: %s\n' "${self##*/}" "$*" >&2; }

# Exit codes as the forwarder has them: 1 failed, 2 wrong usage.
die() { say "$*"; exit 1; }
wrong_usage() { say "$* (-h shows the options)"; exit 2; }

# The usage text of a command is the comment that follows its first line.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$self"; }

# `swift build`, its progress only where somebody watches.
build() {
  local quiet=()
  [ -t 2 ] || quiet=(--quiet)
  swift build "${quiet[@]}" "$@" >&2
}

# Builds the release forwarder and prints its path.
build_release() {
  build --configuration release --product vnetr || return
  echo "$(swift build --configuration release --show-bin-path)/vnetr"
}
