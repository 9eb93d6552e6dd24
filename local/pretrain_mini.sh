#!/usr/bin/env bash
# Remakes the mini configuration's pretrained stand-ins: a Whisper of 13 languages and a Qwen3, both small, from
# synthetic speech and text that the recipe's own train, dev and test sets do not hold. About an hour on two cores.

nj=2                                              # parallel jobs of speech synthesis
out=egs/multilingual12/pretrained/mini            # where the models go
work=egs/multilingual12/data/pretrain             # where their data goes (1.1 GB)
whisper_steps=10000                               # training steps of the Whisper
lm_steps=3000                                     # training steps of the Qwen3
ctc_engine=torch                                  # torch or k2

set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
. path.sh
. utils/parse_options.sh

export OMP_NUM_THREADS=1  # one core for each of the two trainings
python local/pretrain_mini_data.py --out "$work" --tokenizer "$out/lm/tokenizer.model" --nj "$nj"
python local/pretrain_mini_lm.py --data "$work" --out "$out/lm" --steps "$lm_steps" &
python local/pretrain_mini_whisper.py --data "$work" --tokenizer "$out/lm/tokenizer.model" --out "$out/whisper" \
  --steps "$whisper_steps" --ctc-engine "$ctc_engine"
wait $!
