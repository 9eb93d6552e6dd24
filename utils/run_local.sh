#!/usr/bin/env bash
# Usage: utils/run_local.sh [JOB=1:<n>] <log> <command> [argument ...]
# Runs a command on this machine, its output added to the log. With JOB, runs it n times, one after the other, as each may
# use every core itself; JOB in the log's name and in the arguments is then the number of the job, and a log holds one
# job's output. Errors and progress are not in the log.

set -euo pipefail

num_jobs=
if [[ ${1-} =~ ^JOB=1:([1-9][0-9]*)$ ]]; then
  num_jobs=${BASH_REMATCH[1]}
  shift
fi
if [ $# -lt 2 ] || [[ $1 == JOB=* ]]; then
  sed -n '2s/^# //p' "$0" >&2
  exit 1
fi
log=$1 failed=()
shift
mkdir -p "$(dirname "$log")"
[ -n "$num_jobs" ] || exec "$@" >>"$log"
for ((job = 1; job <= num_jobs; job++)); do
  "${@//JOB/$job}" >"${log//JOB/$job}" || failed+=("${log//JOB/$job}")
done
if ((${#failed[@]})); then
  echo "run_local.sh: ${#failed[@]} of $num_jobs jobs failed: ${failed[*]}" >&2
  exit 1
fi
