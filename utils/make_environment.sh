#!/usr/bin/env bash
# Makes the checkout's environment, .venv, from the versions in constraints.txt; does nothing where it is complete.
# Made anew where it was interrupted or the checkout has moved, brought up to date where constraints.txt or setup.py
# have changed. Python is the first of $PYTHON, python3, python3.13, python3.12, python3.11 that is 3.11 or newer.

set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."

wanted="$PWD $(cat constraints.txt setup.py | sha256sum)"
log=.venv/install.log

is_complete() {
  [ -x .venv/bin/python ] && [ -f .venv/.complete ] && [ "$(<.venv/.complete)" = "$wanted" ]
}

fail() {
  echo "path.sh: $*" >&2
  exit 1
}

find_python() {
  local python
  for python in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$python" -c 'import ensurepip, venv' 2>/dev/null \
        || fail "$python has no venv module; on Debian or Ubuntu: sudo apt-get install python3-venv"
      echo "$python"
      return
    fi
  done
  fail "no Python 3.11 or newer; on Debian or Ubuntu: sudo apt-get install python3 python3-venv, or set PYTHON"
}

step() {  # <what> <command ...>: one line on the terminal, the rest in the log
  local what=$1 start=$SECONDS
  shift
  printf 'path.sh: %s ... ' "$what" >&2
  if ! "$@" >>"$log" 2>&1; then
    echo "failed" >&2
    tail -n 12 "$log" >&2
    [ -n "${is_new:-}" ] || rm .venv/.incomplete  # an update that pip gives up leaves the old versions whole
    fail "$what failed, see above and $PWD/$log; mend the network, pip's configuration or the disk (5 GB) and run again"
  fi
  echo "$((SECONDS - start)) s" >&2
}

[ -n "${PIP_CACHE_DIR:-}" ] || export PIP_NO_CACHE_DIR=1  # nothing is written outside the checkout

pip_install() {
  .venv/bin/python -m pip install --no-input --progress-bar off --disable-pip-version-check "$@"
}

pinned() {  # torchaudio's wheels load only beside a torch built with CUDA
  if .venv/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; then
    cat constraints.txt
  else
    grep -v '^torchaudio==' constraints.txt
  fi
}

is_complete && exit 0
exec 9>.venv.lock || fail "$PWD cannot be written; clone into a folder of your own"
if ! flock --nonblock 9; then
  echo "path.sh: another shell is making the environment; waiting for it" >&2
  flock 9
fi
is_complete && exit 0

is_moved() { [[ -f .venv/.complete && $(<.venv/.complete) != "$PWD "* ]]; }
if [ -e .venv/.incomplete ] || [ ! -x .venv/bin/python ] || is_moved; then
  rm -rf .venv
fi
mkdir -p .venv
touch .venv/.incomplete
rm -f .venv/.complete
: >"$log"
if [ ! -x .venv/bin/python ]; then
  python=$(find_python)
  is_new=yes
  echo "path.sh: making the environment in $PWD/.venv, once, with $("$python" --version)" >&2
  step "virtual environment" "$python" -m venv .venv
fi
step "PyTorch" pip_install --constraint constraints.txt setuptools wheel torch
step "everything else" pip_install --no-deps --no-build-isolation --requirement <(pinned)
step "zipperasr" pip_install --no-deps --no-build-isolation --editable .
echo "$wanted" >.venv/.complete
rm .venv/.incomplete
