#!/usr/bin/env bash
# Stage 0: corpora and pretrained models. local/download.sh --help explains the options.

set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
# shellcheck disable=SC1091
. "$here/../path.sh"

exec python "$here/download.py" "$@"
