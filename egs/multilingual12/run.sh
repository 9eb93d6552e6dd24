#!/usr/bin/env bash
# Usage: ./run.sh [options]
#
# Multilingual speech recognition in twelve languages with Zipper-LoRA (arXiv:2603.17558), from corpora to tables:
#   0 corpora and pretrained models    3 features            6 Stage-2 training
#   1 manifests                        4 Stage-1 training    7 Stage-2 decoding and scoring
#   2 utterance lists                  5 its decoding        8 tables and figures
# Every stage skips what is complete and takes up what was interrupted. Relative paths start where you are.

set -euo pipefail

stage=0             # first stage
stop_stage=8        # last stage
conf=mini           # mini, paper, paper_30h (conf/<name>.yaml), or a YAML file of your own
method=zipper_soft  # encoder adapter of Stage 2: one, several as vanilla,zipper_soft, or all (zipperasr show methods)
encoder=full        # context of the encoder: full or chunked
data_dir=           # corpora, manifests, lists, features (default: data; data/paper for the paper's)
exp_dir=            # runs and report (default: exp/<conf>)
ngpu=               # GPUs of each node (default: 1 if there is any, else 0)
hostfile=           # train on these nodes, by DeepSpeed's launcher: lines "<host> slots=<GPUs>" (for Slurm, see cmd.sh)
nj=                 # processes of a job (default: one per core)
num_jobs=1          # jobs that stages 1, 3, 5 and 7 are split into; cmd.sh says where they run
stress=0            # utterances of each set that stage 7 decodes with every other language's adapter too
beside=             # an experiment with more data, as exp/paper_30h: its gap to vanilla stands beside (Figure 6)

here=$(dirname "$(readlink -f "$0")")
command="./run.sh${*:+$(printf ' %q' "$@")}"
. "$here/utils/parse_options.sh"

fail() {
  echo "run.sh: $*" >&2
  exit 1
}
absolute() { case $1 in '' | /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac }

[ $# -eq 0 ] || fail "unexpected argument '$1'; options begin with -- (see --help)"
for number in "$stage" "$stop_stage"; do
  [[ $number =~ ^[0-8]$ ]] || fail "unknown stage '$number'; stages are 0 to 8 (see --help)"
done
((stage <= stop_stage)) || fail "--stage $stage comes after --stop-stage $stop_stage"
[[ $encoder =~ ^(full|chunked)$ ]] || fail "unknown encoder '$encoder'; known: full, chunked"
: "${nj:=$(env -u OMP_NUM_THREADS nproc)}"
[[ $ngpu =~ ^[0-9]*$ ]] || fail "--ngpu '$ngpu' is not a number"
[ -z "$hostfile" ] || [ -f "$hostfile" ] || fail "no hostfile '$hostfile'"
[[ $stress =~ ^[0-9]+$ ]] || fail "--stress takes a number of utterances, not '$stress'"
[ -z "$beside" ] || [ -d "$beside" ] || fail "--beside: no experiment '$beside'"
for number in "$nj" "$num_jobs"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || fail "--nj and --num-jobs take a number above 0, not '$number'"
done
if [ -f "$here/conf/$conf.yaml" ]; then
  conf=$here/conf/$conf.yaml
else
  [ -f "$conf" ] || fail "no configuration '$conf'; give a file, or one of: $(cd "$here/conf" && echo *.yaml)"
  conf=$(absolute "$conf")
fi
name=$(basename "$conf" .yaml)
data_dir=$(absolute "$data_dir")
exp_dir=$(absolute "$exp_dir")
beside=$(absolute "$beside")
hostfile=$(absolute "$hostfile")

cd "$here"
. ./path.sh
. ./cmd.sh
case $name in mini) : "${data_dir:=data}" ;; *) : "${data_dir:=data/${name%%_*}}" ;; esac
: "${exp_dir:=exp/$name}"
gpus_here=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || true
if [ -z "$hostfile" ] && [[ $train_cmd == *run_local.sh ]]; then
  ((${ngpu:=$((gpus_here > 0))} <= gpus_here)) ||
    fail "--ngpu $ngpu, but this machine has $gpus_here GPUs; give --ngpu $gpus_here, or other nodes (--hostfile, cmd.sh)"
fi
[ -n "$ngpu" ] || ((stage > 7 || stop_stage < 4)) || fail "say with --ngpu how many GPUs each node has"
((${ngpu:=0})) || export CUDA_VISIBLE_DEVICES=
ranks=$((ngpu > 0 ? ngpu : 2))  # of training; on a CPU always two, so that results do not depend on the machine
share=$( ((num_jobs == 1)) && echo 1/1 || echo "JOB/$num_jobs")
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
methods=${method//,/ }
[ "$method" != all ] || methods=$(zipperasr show methods --conf "$conf")
method_settings() {  # <method>: sets `adapter`; <zipper>_initial_b is Initial-B, the zipper begun from the soft one's banks
  adapter=("model.adapter.method=${1%_initial_b}")
  [[ $1 != *_initial_b ]] || adapter+=("model.adapter.init_from=$exp_dir/zipper_soft_$encoder")
}
for method in $methods; do
  method_settings "$method"
  zipperasr check-config --conf "$conf" "${adapter[@]}" >/dev/null
done
mapfile -t sets < <(zipperasr show sets --conf "$conf")
mkdir -p "$exp_dir/log"
touch "$exp_dir/log/commands.txt"
grep -qxF -- "$command" "$exp_dir/log/commands.txt" || echo "$command" >>"$exp_dir/log/commands.txt"
exec 3>&1

begin() {  # <stage> <title>: ends the stage before and says whether this one is wanted; its output goes to a log
  end
  ((stage <= $1 && $1 <= stop_stage)) || return
  current=$1 title=$2 started=$SECONDS
  echo "stage $1: $2 (log: $exp_dir/log/stage$1.log)"
  exec >>"$exp_dir/log/stage$1.log"
}

end() {
  exec >&3
  [ -n "${current:-}" ] || return 0
  echo "stage $current: done in $((SECONDS - started)) s"
  printf '%s\t%s\t%s\n' "$current" "$title" $((SECONDS - started)) >>"$exp_dir/times.tsv"
  current=
}

train() {  # <stage 1 or 2> <run> [option ...]
  $train_cmd "$exp_dir/log/stage$current.log" zipperasr train --conf "$conf" --stage "$1" --run-dir "$exp_dir/$2" \
    --data-dir "$data_dir" --ranks "$ranks" ${hostfile:+--hostfile "$hostfile"} "${@:3}" "model.encoder.context=$encoder"
}

spread() {  # <runner of cmd.sh> <command, with $share if it has one>: as one job, or as --num-jobs
  local log=$exp_dir/log/stage$current
  if ((num_jobs == 1)); then
    $1 "$log.log" "${@:2}"
  else
    $1 JOB=1:"$num_jobs" "$log.JOB.log" "${@:2}"
  fi
}

share_out() {  # <runner of cmd.sh> <command that takes --share>: as one job, or as --num-jobs and one that ends their work
  if ((num_jobs == 1)); then
    spread "$@"
  else
    spread "$@" --share "$share"
    "${@:2}"
  fi
}

decode_and_score() {  # <run>: word times too, where the run has an aligner
  local run=$exp_dir/$1
  share_out "$decode_cmd" zipperasr decode --run-dir "$run" --data-dir "$data_dir" --nj "$nj" --sets "${sets[@]}"
  local/score.sh "${sets[@]/#/$run/decode_}"
  [ ! -f "$run/aligner/settings.json" ] || $decode_cmd "$exp_dir/log/stage$current.log" \
    zipperasr align --run-dir "$run" --data-dir "$data_dir" --format json --sets "${sets[@]}"
}

stress_test() {  # <run>: decode the beginning of every set with every language's adapter and prompt
  local run=$exp_dir/$1
  zipperasr decode --run-dir "$run" --data-dir "$data_dir" --nj "$nj" --sets "${sets[@]}" --as all --first "$stress"
  local/score.sh "$run"/as_*/decode_*
}

if begin 0 "corpora and pretrained models"; then
  zipperasr show corpora --conf "$conf" | awk '$3 != "real" { print $1, $3 }' | while read -r corpus scale; do
    python local/make_mini.py --out "$data_dir/corpora" --corpora "$corpus" --scale "$scale" --nj "$nj" </dev/null
  done
  mapfile -t wanted < <(zipperasr show downloads --conf "$conf" | tr ' ' '\n')
  local/download.sh --dir "$data_dir/corpora" "${wanted[@]}"
fi

if begin 1 "manifests"; then
  spread "$data_cmd" local/prepare.sh "$conf" "$data_dir" "$nj" "$share"
  zipperasr validate --conf "$conf" --data-dir "$data_dir" --nj "$nj"
  echo "  what was kept and what was dropped: $data_dir/manifests/REPORT.md" >&3
fi

if begin 2 "utterance lists"; then
  zipperasr lists --conf "$conf" --data-dir "$data_dir"
  echo "  where each list comes from: $data_dir/lists/*/REPORT.md" >&3
fi

if begin 3 "features"; then
  share_out "$data_cmd" zipperasr features --conf "$conf" --data-dir "$data_dir" --nj "$nj"
fi

if begin 4 "Stage-1 training"; then
  train 1 "stage1_$encoder"
fi

if begin 5 "Stage-1 decoding and scoring"; then
  decode_and_score "stage1_$encoder"
fi

if begin 6 "Stage-2 training"; then
  for method in $methods; do
    method_settings "$method"
    train 2 "${method}_$encoder" --init "$exp_dir/stage1_$encoder" "${adapter[@]}"
  done
fi

if begin 7 "Stage-2 decoding and scoring"; then
  for method in $methods; do
    decode_and_score "${method}_$encoder"
    ((stress == 0)) || stress_test "${method}_$encoder"
  done
fi

if begin 8 "tables and figures"; then
  zipperasr report --exp-dir "$exp_dir" --data-dir "$data_dir" --out "$exp_dir/report" ${beside:+--beside "$beside"} >&3
fi

end
echo "seconds of each stage (kept in $exp_dir/times.tsv):"
tail -n $((stop_stage - stage + 1)) "$exp_dir/times.tsv" | awk -F '\t' '
  { printf "  %s  %-32s %6d\n", $1, $2, $3; all += $3 }
  END { printf "  %-35s %6d\n", "all", all }'
