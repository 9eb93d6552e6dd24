#!/usr/bin/env bash
# Error rates of decode directories: local/score.sh [--profile whisper|marks] [--lang <code>] <decode_dir>...
# Writes scores.json (with both profiles), per_utt, per_spk and align into each; prints a line a set, then averages over
# each run. Fails if a directory could not be scored.

set -euo pipefail

if [ $# -eq 0 ] || [ "$1" = --help ]; then
  sed -n '2,4s/^# //p' "$0" >&2
  [ $# -ne 0 ]
  exit
fi

# shellcheck disable=SC1091
[ -f path.sh ] && . ./path.sh

zipperasr score "$@"
