#!/bin/sh
# All tests and the linter: sh tests/run.sh [any pytest argument]
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/setup.sh"
set_up "$here/requirements.txt" "$here/tests/requirements.txt"
cd "$here"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# Two workers of one thread each: the models are too small to share out over threads.
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n 2 --dist worksteal "$@" tests
