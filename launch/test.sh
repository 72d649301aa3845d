#!/usr/bin/env bash
# The tests, in parallel on all cores; makes the environment if needed.
#   bash launch/test.sh [pytest flags], such as tests/models or -k packing
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment "test"
echo "[test] running pytest on all cores"
exec .venv/bin/python -m pytest -n auto "$@"
