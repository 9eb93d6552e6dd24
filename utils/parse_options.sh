# shellcheck shell=bash
# Sourced by a script after its defaults: `--stop-stage 3` or `--stop-stage=3` sets the variable stop_stage.
# The options of a script are its lines `name=default  # meaning` above the one that sources this file; --help prints
# them below the script's first comment. Positional arguments stay in "$@".

_options() {  # a line an option: name, default, meaning, between tabs
  sed -n '/parse_options\.sh/q; s/^\([a-z][a-z0-9_]*\)=\([^#]*[^# ]\|\) *# *\(.*\)/\1\t\2\t\3/p' "$0"
}

_help() {
  sed -n '1d; /^#/!q; s/^# \{0,1\}//p' "$0"
  _options | awk -F '\t' '
    { gsub("_", "-", $1); printf "  --%-12s %s%s\n", $1, $3, $2 == "" ? "" : " (default: " $2 ")" }'
}

_usage_error() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

_known=$(_options | sed 's/\t.*//; s/_/-/g; s/^/--/' | tr '\n' ' ')
while [[ ${1-} == -* ]]; do
  if [[ $1 == -h || $1 == --help ]]; then
    _help
    exit 0
  fi
  _name=${1%%=*}
  [[ " $_known" == *" $_name "* ]] || _usage_error "unknown option '$1'; known: $_known(--help explains them)"
  if [[ $1 == *=* ]]; then
    _value=${1#*=}
  else
    [[ $# -ge 2 ]] || _usage_error "option $_name needs a value"
    _value=$2
    shift
  fi
  _name=${_name#--}
  printf -v "${_name//-/_}" %s "$_value"
  shift
done
unset _known _name _value
