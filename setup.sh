# Sourced by the scripts, which set `here` to this folder first:
#   here=$(CDPATH="" cd "$(dirname "$(readlink -f "$0")")" && pwd); . "$here/setup.sh"; set_up "$here/requirements.txt"
# Afterwards PYTHON is the path of an interpreter that holds every pinned requirement: $PYTHON or the active one if
# it does, otherwise that of .venv, which is made and filled once.

pins_met='
import sys
from importlib.metadata import PackageNotFoundError, version
for path in sys.argv[1:]:
    for line in open(path, encoding="utf-8"):
        requirement, _, some_machines = line.split("#")[0].partition(";")
        name, _, pinned = requirement.strip().partition("==")
        try:
            met = not pinned or version(name).split("+")[0] == pinned  # +cpu and the like name a build
        except PackageNotFoundError:
            met = bool(some_machines)
        if not met:
            sys.exit(1)
print(sys.executable)
'

set_up() {
    for candidate in "${PYTHON:-python3}" python3 python python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            active=$candidate
            break
        fi
        active=
    done
    if [ -z "$active" ]; then
        echo "error: no Python 3.11 or newer found; install one, or give its path: PYTHON=/path/to/python3 sh $0" >&2
        exit 2
    fi
    for candidate in "$active" "$here/.venv/bin/python"; do
        if PYTHON=$("$candidate" -c "$pins_met" "$@" 2>/dev/null); then
            export PYTHON
            return 0
        fi
    done
    echo "installing what requirements.txt pins into $here/.venv: once, some minutes, about 5 GB of disk (2 GB with PyTorch's CPU build)"
    [ -x "$here/.venv/bin/python" ] || "$active" -m venv "$here/.venv" || {
        echo "error: $active cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 2
    }
    PYTHON=$here/.venv/bin/python
    for requirements in "$@"; do
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    done
    export PYTHON
}
