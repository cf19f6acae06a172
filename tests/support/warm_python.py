"""Stands for a Python interpreter: a program of this project is forked from a warm server, all else is run as it is.

Started often, so it imports little. What the server's modules took from the environment while they were imported must
be as it was; else the program starts cold.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

# Read while Python starts or modules are imported.
AT_IMPORT = (
    "HF_",
    "TRANSFORMERS_",
    "OMP_",
    "GOMP_",
    "MKL_",
    "TORCH_LOGS",
    "PYTHONPATH",
    "PYTHONWARNINGS",
    "LD_",
    "THP_",
)


def network() -> str:
    """Return which network namespace this process is in: a server's forks are in the server's."""
    return str(Path("/proc/self/ns/net").readlink())


def is_warm(argv: list[str], settings: dict) -> bool:
    """Tell whether a server can run a program just as Python would."""
    project, at_start = settings["project"], settings["environment"]
    is_ours = argv[:1] in (["train_sft.py"], [f"{project}/train_sft.py"], ["app.py"])
    is_ours |= argv[:1] == ["-m"] and argv[1].startswith(("sft.", "benchmarks."))
    if not is_ours or str(Path.cwd()) != project or network() != settings["network"]:
        return False
    given = {name: value for name, value in os.environ.items() if name.startswith(AT_IMPORT)}
    if given.get("PYTHONPATH") == project:  # as ds_all.sh sets it
        del given["PYTHONPATH"]
    return given == {name: value for name, value in at_start.items() if name.startswith(AT_IMPORT)}


def main(settings: dict) -> None:
    """Run `python ARGV` and end as it ends, by its exit code or its signal."""
    argv = [word for word in sys.argv[1:] if word != "-u"] if sys.argv[1:2] == ["-u"] else sys.argv[1:]
    if not is_warm(argv, settings):
        os.execv(settings["python"], [settings["python"], *sys.argv[1:]])
    server = socket.socket(socket.AF_UNIX)
    server.connect(settings["socket"])
    program = {"argv": argv, "environment": dict(os.environ), "folder": str(Path.cwd())}
    message = (json.dumps(program) + "\n").encode()
    sent = socket.send_fds(server, [message], [0, 1, 2])
    server.sendall(message[sent:])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: server.send(bytes([number])))
    code = int(server.recv(16))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
