#!/usr/bin/env bash
# Usage: local/prepare.sh <conf.yaml> <data-dir> <processes> [<job>/<number of jobs>]
# Manifests of every language of every corpus of a configuration, or of those that are a job's share.

set -euo pipefail
set -f  # options may hold patterns

[ $# -ge 3 ] || { sed -n '2s/^# //p' "$0" >&2; exit 1; }
conf=$1 data_dir=$2 nj=$3 share=${4:-1/1}

zipperasr show corpora --conf "$conf" --share "$share" | while read -r corpus prepare _ langs; do
  # shellcheck disable=SC2086
  python "local/prepare_$prepare.py" --corpus "$corpus" --corpus-dir "$data_dir/corpora/$corpus" \
    --out "$data_dir/manifests" --nj "$nj" --langs $langs </dev/null
done
