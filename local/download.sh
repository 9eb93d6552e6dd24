#!/usr/bin/env bash
# local/download.sh <corpora-dir> <corpus>...: checks that the trees of real corpora are at <corpora-dir>/<corpus>, and
# says how to get those that are not. It downloads nothing: most of these corpora need a form or an account.

set -euo pipefail

[ $# -ge 2 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 1; }
corpora_dir=$1
shift

how_to_get() {
  case $1 in
    commonvoice) echo "Common Voice 18.0 (cv-corpus-18.0-2024-06-14), from Mozilla Data Collective (needs an account)" ;;
    librispeech) echo "LibriSpeech, openslr.org/12: train-*, dev-*, test-*; here: the folder LibriSpeech" ;;
    mls) echo "Multilingual LibriSpeech, openslr.org/94: here: the folder that holds mls_german and so on" ;;
    msr86k) echo "MSR-86K, gated: Alex-Song/MSR-86K on the Hugging Face hub" ;;
    wenetspeech) echo "WenetSpeech, openslr.org/121 (needs a form): here: the folder of WenetSpeech.json and audio" ;;
    *) echo "see the corpus's own page" ;;
  esac
}

missing=0
for corpus in "$@"; do
  if [ ! -d "$corpora_dir/$corpus" ]; then
    echo "download.sh: no $corpora_dir/$corpus: put or link there $(how_to_get "$corpus")" >&2
    missing=1
  fi
done
exit "$missing"
