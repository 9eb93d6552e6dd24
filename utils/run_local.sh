#!/usr/bin/env bash
# Usage: utils/run_local.sh JOB=1:<n> <log> <command> [argument ...]
# Runs a command n times on this machine, one after the other, as each may use every core itself. JOB in the log's name
# and in the arguments is the number of the job. What a job prints is in its log, but for errors and progress.

set -euo pipefail

if ! [[ ${1-} =~ ^JOB=1:([1-9][0-9]*)$ ]] || [ $# -lt 3 ]; then
  sed -n '2s/^# //p' "$0" >&2
  exit 1
fi
num_jobs=${BASH_REMATCH[1]} log=$2 failed=()
shift 2
mkdir -p "$(dirname "$log")"
for ((job = 1; job <= num_jobs; job++)); do
  "${@//JOB/$job}" >"${log//JOB/$job}" || failed+=("${log//JOB/$job}")
done
if ((${#failed[@]})); then
  echo "run_local.sh: ${#failed[@]} of $num_jobs jobs failed: ${failed[*]}" >&2
  exit 1
fi
