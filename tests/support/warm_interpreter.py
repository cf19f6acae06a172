"""A warm server for as long as a block, and the stand-in for Python that asks it."""

import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from support.project import PROJECT
from support.warm_python import network


@contextmanager
def warm_interpreter(modules: Sequence[str], environment: dict[str, str]) -> Iterator[str]:
    """Yield a stand-in for sys.executable whose programs start with `modules` imported under `environment`."""
    support = PROJECT / "tests" / "support"
    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen(64)
        number = listener.fileno()
        server = subprocess.Popen(
            [sys.executable, support / "warm_server.py", str(number), *modules],
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[number],
        )
        settings = {
            "project": str(PROJECT),
            "python": sys.executable,
            "socket": f"{folder}/socket",
            "environment": environment,
            "network": network(),
        }
        python = Path(folder, "python")
        python.write_text(
            f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(support)!r})\n"
            f"import warm_python\nwarm_python.main({settings!r})\n"
        )
        python.chmod(0o700)
        yield str(python)
        server.stdin.close()
        server.wait()
