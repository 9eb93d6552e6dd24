# shellcheck shell=bash
# Where the jobs of stages 1 and 3 run when --num-jobs is above 1: on this machine, or as a Slurm array. With Slurm, --nj
# is the number of processes of a job, and should be its --cpus-per-task.

export data_cmd="utils/run_local.sh"
# export data_cmd="utils/run_slurm.sh --partition=cpu --cpus-per-task=8 --mem=16G --time=24:00:00"
