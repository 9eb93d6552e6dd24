#!/usr/bin/env bash
# Usage: tests/run.sh [pytest argument ...]
# Lint (ruff, shellcheck), then pytest, in the checkout's own environment. The import floors are tests/test_floors.py.

set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
. ./path.sh
export OMP_NUM_THREADS=1

ruff check .
ruff format --check .
shellcheck --external-sources --source-path=SCRIPTDIR path.sh .ci/run egs/*/{run,cmd}.sh {local,tests,utils}/*.sh
python -m pytest --quiet --durations=15 "$@"
