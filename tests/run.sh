#!/bin/sh
# The linter and the tests:
#   sh tests/run.sh                       all but the slow ones
#   sh tests/run.sh --all                 every one, in thirteen minutes on two cores
#   sh tests/run.sh [pytest arguments]    those that the arguments select, slow or not
line_ends=LF
[ "$line_ends" = LF ] || { printf '%s\n' "error: $0 has Windows line ends; type sed -i 's/\r\$//' *.sh" >&2; exit 2; } #
set -eu
here=$(CDPATH="" cd "$(dirname "$0")/.." && pwd)
. "$here/setup.sh"
set_up "$here/requirements.txt" "$here/tests/requirements.txt"
# The chat page is tested in a browser; where none can be installed, those tests are skipped and say so.
if ! command -v chromium >/dev/null && ! command -v google-chrome >/dev/null && [ "$(id -u)" = 0 ] &&
    command -v apt-get >/dev/null; then
    echo "installing chromium for the tests of the chat page"
    { apt-get update && apt-get install --yes --no-install-recommends chromium; } >/dev/null 2>&1 ||
        echo "chromium cannot be installed" >&2
fi
cd "$here"
# Beside the other packages: its import takes seconds, which the tests without it should not pay.
beside=$("$PYTHON" -c 'import sys; print(sys.prefix)')/bitsandbytes
[ -d "$beside" ] || "$PYTHON" -m pip install --quiet --no-deps --target "$beside" \
    "$("$PYTHON" -c 'from sft.training.optimization import BITSANDBYTES; print(BITSANDBYTES)')" ||
    echo "bitsandbytes cannot be installed: its tests are skipped" >&2
# Triton too, to interpret the kernels of a GPU without one: PyTorch's CPU build should not find it elsewhere.
triton_beside=$("$PYTHON" -c 'import sys; print(sys.prefix)')/triton
[ -d "$triton_beside" ] || "$PYTHON" -m pip install --quiet --no-deps --target "$triton_beside" "triton==3.7.1" ||
    echo "Triton cannot be installed: the tests of kernels are skipped" >&2
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
case ${1-} in
    "") set -- -m "not slow" ;;
    --all) shift ;;
esac
# Two workers of one thread each: the models are too small to share out over threads.
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n 2 --dist worksteal "$@" tests
