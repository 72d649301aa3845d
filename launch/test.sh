#!/usr/bin/env bash
# The tests, in parallel on all cores; makes the environment if needed.
#   bash launch/test.sh [pytest flags], such as tests/models or -k packing
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment "test"
echo "[test] running pytest on all cores"
# In order, so that a file's tests share what was made for them in one worker; an idle worker takes half of what is left.
exec .venv/bin/python -m pytest -n auto --dist worksteal "$@"
