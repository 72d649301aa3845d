# shellcheck shell=bash
# Sourced by the scripts that start runs elsewhere: their flags, and commands that are shown or run.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

# The help of a script is the comment at its head.
usage() {
  sed -n '2,/^[^#]/{ s/^# \{0,1\}//p; }' "$0"
  exit 0
}

# Words as a shell reads them back: spaces, quotes and dollars survive.
quoted() {
  local word text=""
  for word in "$@"; do
    printf -v word '%q' "$word"
    text+=" $word"
  done
  echo "${text# }"
}

# Shows a command under --print, and runs it otherwise.
run() {
  if [ -n "$print" ]; then
    quoted "$@"
  else
    "$@"
  fi
}

# need TOOL HINT: the tool is there, unless commands are only shown.
need() {
  [ -n "$print" ] || command -v "$1" >/dev/null || fail "$1 is not installed; $2"
}

# Flags with a value, and switches, are set as variables of the same name: --run-time=5 is run_time. What follows -- is
# the experiment's command, in the array `experiment`. Its own variables begin with _, as flags may be called anything.
# Usage: flags "name zone ..." "spot ..." "$@"
flags() {
  local _values=$1 _switches=$2 _flag _value
  shift 2
  print="" experiment=()
  while [ $# -gt 0 ]; do
    case $1 in
    --)
      shift
      experiment=("$@")
      return
      ;;
    --print)
      print=yes
      shift
      continue
      ;;
    --help | -h) usage ;;
    --*) ;;
    *) fail "$1 is no flag; the experiment and its flags follow --" ;;
    esac
    _flag=${1#--} _value=""
    if [[ $_flag == *=* ]]; then
      _value=${_flag#*=} _flag=${_flag%%=*}
    fi
    if [[ " $_switches " == *" $_flag "* ]]; then
      printf -v "${_flag//-/_}" yes
      shift
    elif [[ " $_values " == *" $_flag "* ]]; then
      if [[ $1 != *=* ]]; then
        [ $# -gt 1 ] || fail "--$_flag has no value"
        _value=$2
        shift
      fi
      shift
      printf -v "${_flag//-/_}" '%s' "$_value"
    else
      fail "--$_flag is unknown; known: $_values $_switches print help"
    fi
  done
}

# required NAME...: these flags have values.
required() {
  local _flag _variable
  for _flag in "$@"; do
    _variable=${_flag//-/_}
    [ -n "${!_variable}" ] || fail "--$_flag is missing; see --help"
  done
}

# The command of the experiment, one word after another, in the array `words`: after -- stands what follows `python -m`.
experiment_words() {
  [ ${#experiment[@]} -gt 0 ] || fail "no experiment; expected after --: experiments.sft qwen2 --workdir gs://… "
  [[ ${experiment[0]} == experiments.* ]] || fail "${experiment[0]} is no experiment; expected experiments.NAME"
  # shellcheck disable=SC2034 # read by the scripts that source this
  words=(python -m "${experiment[@]}")
}
