#!/usr/bin/env bash
# Usage: utils/run_slurm.sh [--option=value of sbatch ...] [JOB=1:<n>] <log> <command> [argument ...]
# Runs a command as a Slurm job, once on each of its nodes, its output added to the log; or, with JOB, n times as an array,
# where JOB in the log's name and in the arguments is the number of the job. Waits for it, and ends it at Ctrl-C. The
# checkout and the data must lie where every node sees them. With --requeue, a job that has ended itself at SIGTERM, with
# status 75, is put back into the queue.

set -euo pipefail

options=() num_jobs='' requeue=:
while [[ ${1-} == --* ]]; do
  options+=("$1")
  # shellcheck disable=SC2016  # it is the job that expands it
  [ "$1" != --requeue ] || requeue='scontrol requeue "$SLURM_JOB_ID"'
  shift
done
if [[ ${1-} =~ ^JOB=1:([1-9][0-9]*)$ ]]; then
  num_jobs=${BASH_REMATCH[1]}
  shift
fi
if [ $# -lt 2 ] || [[ $1 == JOB=* || $1 == -* ]]; then
  sed -n '2s/^# //p' "$0" >&2
  exit 1
fi
log=$1
shift
command -v sbatch >/dev/null || {
  echo "run_slurm.sh: no sbatch here; run it where Slurm is, or name utils/run_local.sh in cmd.sh" >&2
  exit 1
}
if [ -n "$num_jobs" ]; then
  options=(--array="1-$num_jobs" --output="${log//JOB/%a}" "${options[@]}")
  stop=(scancel)
else
  options=(--ntasks-per-node=1 --output="$log" --open-mode=append "${options[@]}")
  stop=(scancel --signal=INT)
fi
mkdir -p "$(dirname "$log")"
id=$(mktemp)
sbatch --wait --parsable --job-name="$(basename "$1")" "${options[@]}" >"$id" <<END &
#!/usr/bin/env bash
cd $(printf '%q' "$PWD")
command=($(printf '%q ' "$@"))
if [ -n "\${SLURM_ARRAY_TASK_ID-}" ]; then
  exec "\${command[@]//JOB/\$SLURM_ARRAY_TASK_ID}"
fi
cpus=\${SLURM_CPUS_PER_TASK:+--cpus-per-task=\$SLURM_CPUS_PER_TASK}  # srun must be told again
srun --ntasks-per-node=1 --kill-on-bad-exit=1 \$cpus "\${command[@]}" && exit
status=\$?
[ \$status -ne 75 ] || $requeue
exit \$status
END
trap '"${stop[@]}" --state=RUNNING "$(<"$id")"; scancel --quiet --state=PENDING "$(<"$id")"' INT TERM
status=0
wait $! || status=$?
trap - INT TERM
((status <= 128)) || wait $! || true  # a signal has ended the first wait; the job is ending
rm "$id"
if ((status)); then
  echo "run_slurm.sh: ${num_jobs:+a job of the array }failed; see ${log//JOB/*} (and sacct)" >&2
  exit 1
fi
