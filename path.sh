# shellcheck shell=bash
# Sourced by every script: puts the checkout's own environment, made in .venv on first use, first in PATH.

zipperasr_root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
"$zipperasr_root/utils/make_environment.sh" || return 1
case ":$PATH:" in
  *":$zipperasr_root/.venv/bin:"*) ;;
  *) export PATH="$zipperasr_root/.venv/bin:$PATH" ;;
esac
# UTF-8 whatever the locale, and the caches of libraries inside the checkout.
export PYTHONUTF8=1
export MPLCONFIGDIR="$zipperasr_root/.venv/cache/matplotlib" TRITON_HOME="$zipperasr_root/.venv/cache"
unset zipperasr_root
