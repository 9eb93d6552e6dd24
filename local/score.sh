#!/usr/bin/env bash
# Error rates of decode directories: local/score.sh [--profile whisper|marks] <decode_dir>...
# Writes scores.json, per_utt and align into each, and prints one line a set. Fails if a directory could not be scored.

set -euo pipefail

if [ $# -eq 0 ] || [ "$1" = --help ]; then
  sed -n '2,3s/^# //p' "$0" >&2
  [ $# -ne 0 ]
  exit
fi

# shellcheck disable=SC1091
[ -f path.sh ] && . ./path.sh

zipperasr score "$@"
