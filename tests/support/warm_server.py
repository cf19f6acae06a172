"""A process that has imported what training needs, and forks each program from itself: seconds saved a run.

    python warm_server.py LISTENER MODULE ...       (LISTENER: the number of an open file, a Unix socket that listens)

Each connection asks for one program: a JSON object (argv, environment, folder) with standard input, output and error.
The fork runs it as Python would, but for one second of the interpreter's end: taking down what the server imported.
The connection carries signals one way and the exit code the other; where it breaks, the asker was killed, and so is
the program. The end of standard input ends the server.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

GREETING_BYTES = 1_000_000
own_environment = dict(os.environ)


def read_greeting(connection: socket.socket) -> tuple[dict, list[int]]:
    """Return what is asked for, and the three standard streams."""
    message, streams, _, _ = socket.recv_fds(connection, GREETING_BYTES, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(GREETING_BYTES)
    return json.loads(message), streams


class Server:
    """Forks programs and waits for them; `serve` returns only in a fork, with its program."""

    def __init__(self, listener: int):
        self.listener = socket.socket(fileno=listener)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, self.fork)
        self.selector.register(0, selectors.EVENT_READ, lambda: os._exit(0))

    def serve(self) -> dict:
        while True:
            for key, _ in self.selector.select():
                if key.fd in self.selector.get_map() and (program := key.data()):
                    return program

    def fork(self) -> dict | None:
        connection, _ = self.listener.accept()
        program, streams = read_greeting(connection)
        process = os.fork()
        if process == 0:
            self.leave(connection, streams)
            return program
        for stream in streams:
            os.close(stream)
        alive = os.pidfd_open(process)
        self.selector.register(connection, selectors.EVENT_READ, lambda: self.pass_on(connection, process))
        self.selector.register(alive, selectors.EVENT_READ, lambda: self.report(connection, alive, process))
        return None

    def leave(self, connection: socket.socket, streams: list[int]) -> None:
        """In a fork: keep nothing of the server's but its modules."""
        for key in list(self.selector.get_map().values()):
            if key.fd > 2:
                os.close(key.fd)
        self.selector.close()
        connection.close()
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
            setattr(sys, name, os.fdopen(number, mode, 1, encoding="utf-8", closefd=False))

    def pass_on(self, connection: socket.socket, process: int) -> None:
        """Send the program a signal, or SIGKILL where nobody waits for it any more."""
        message = connection.recv(1)
        os.kill(process, message[0] if message else signal.SIGKILL)
        if not message:
            self.selector.unregister(connection)

    def report(self, connection: socket.socket, alive: int, process: int) -> None:
        _, status = os.waitpid(process, 0)
        for each in (connection, alive):
            if each in self.selector.get_map():
                self.selector.unregister(each)
        with suppress(BrokenPipeError):
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        connection.close()
        os.close(alive)


def run(argv: list[str], environment: dict[str, str], folder: str) -> None:
    """Run a program as `python ARGV` does."""
    by_imports = {name: value for name, value in os.environ.items() if own_environment.get(name) != value}
    os.environ.clear()
    os.environ.update({**by_imports, **environment})
    os.chdir(folder)
    if argv[0] == "-m":
        module, sys.argv = argv[1], argv[1:]
        sys.modules.pop(module, None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


def end(code: int) -> None:
    """End as Python does, but for the modules: threads, atexit, streams."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path[0] = str(Path.cwd())
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.freeze()  # a collection in a fork would write to every page of these modules, and so copy it
    program = Server(int(sys.argv[1])).serve()
    try:
        run(**program)
    except SystemExit as ending:
        if not isinstance(ending.code, int | None):
            raise
        end(ending.code or 0)
    end(0)
