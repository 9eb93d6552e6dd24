# shellcheck shell=bash
# Where stages run: on this machine, or as Slurm jobs with the options of sbatch that follow (--name=value). The checkout
# and the data must lie where every node sees them.
#
#   data_cmd    stages 1 and 3. With --num-jobs above 1 it gets an array of so many jobs, and --nj is the number of processes
#   decode_cmd  of each, which should be its --cpus-per-task. So do stages 5 and 7, with decode_cmd, a GPU a process.
#   train_cmd   stages 4 and 6: one job for each run, which has `run.sh --ngpu` ranks on each of its nodes.
#
# Before the time limit or a preemption, --signal=TERM@300 (seconds before it) lets training save and end; with --requeue
# such a job goes back into the queue and on from there. Ctrl-C on run.sh saves and ends the job too.

export data_cmd="utils/run_local.sh"
export train_cmd="utils/run_local.sh"
export decode_cmd="utils/run_local.sh"

# export data_cmd="utils/run_slurm.sh --partition=cpu --cpus-per-task=8 --mem=16G --time=24:00:00"
# export decode_cmd="utils/run_slurm.sh --partition=gpu --gpus-per-node=1 --cpus-per-task=8 --mem=64G --time=12:00:00"
#
# One node of 4 GPUs, run.sh --ngpu 4:
# export train_cmd="utils/run_slurm.sh --partition=gpu --gpus-per-node=4 --cpus-per-task=32 --mem=256G --time=48:00:00 --signal=TERM@300 --requeue"
# Two such nodes: the same with
# export train_cmd="$train_cmd --nodes=2"
