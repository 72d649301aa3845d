# shellcheck shell=bash
# Sourced by the other scripts: goes to the repository's root and makes .venv with the project in it, once.
# Usage: source environment.sh EXTRAS   (such as "test"; may be empty)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

make_environment() {
  local extras=$1 python=${PYTHON:-python3} stamp want
  stamp=.venv/.made-from
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is $("$python" --version 2>&1 || echo missing); expected Python 3.11 or newer (set PYTHON)" >&2
    exit 2
  fi
  # The environment is made again when what it was made from has changed, and used as it is otherwise.
  want="$extras $("$python" --version) $(cksum <setup.py)"
  if [ -f "$stamp" ] && grep -qxF "$want" "$stamp"; then
    return
  fi
  echo "[environment] making .venv with $("$python" --version) and installing the project; about a minute"
  "$python" -m venv .venv
  local log=.venv/pip.log
  if ! .venv/bin/python -m pip install --disable-pip-version-check -q -e ".${extras:+[$extras]}" >"$log" 2>&1; then
    echo "error: pip could not install the project; the end of .venv/pip.log:" >&2
    tail -n 15 "$log" >&2
    exit 1
  fi
  echo "$want" >>"$stamp"
  echo "[environment] ready in ${SECONDS} s"
}
