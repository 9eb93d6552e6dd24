#!/usr/bin/env bash
# Usage: utils/run_slurm.sh [option of sbatch ...] JOB=1:<n> <log> <command> [argument ...]
# Runs a command n times as one Slurm array, and waits for it. JOB in the log's name and in the arguments is the number of
# the job. The checkout and the data must lie where every node sees them.

set -euo pipefail

options=()
while (($#)) && [[ $1 != JOB=* ]]; do
  options+=("$1")
  shift
done
if ! [[ ${1-} =~ ^JOB=1:([1-9][0-9]*)$ ]] || [ $# -lt 3 ]; then
  sed -n '2s/^# //p' "$0" >&2
  exit 1
fi
num_jobs=${BASH_REMATCH[1]} log=$2
shift 2
command -v sbatch >/dev/null || {
  echo "run_slurm.sh: no sbatch here; run it where Slurm is, or set data_cmd=utils/run_local.sh in cmd.sh" >&2
  exit 1
}
mkdir -p "$(dirname "$log")"
sbatch --wait --array="1-$num_jobs" --job-name="$(basename "$1")" --output="${log//JOB/%a}" "${options[@]}" <<EOF || {
#!/usr/bin/env bash
cd $(printf '%q' "$PWD")
command=($(printf '%q ' "$@"))
exec "\${command[@]//JOB/\$SLURM_ARRAY_TASK_ID}"
EOF
  echo "run_slurm.sh: jobs failed; see ${log//JOB/*} (and sacct)" >&2
  exit 1
}
