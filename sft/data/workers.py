"""Processes that work for this one, and whose end is noticed whatever they were doing when they were killed.

concurrent.futures has one pipe for the results of all its processes: one that is killed while it writes there, as
Linux does where memory runs out, leaves a message broken off that is waited for without end. Here each has its own.
"""

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from queue import SimpleQueue

from sft.program import end_with_parent


class KilledWorkerError(Exception):
    """One of the processes has ended."""


@contextmanager
def workers(num_workers: int, function: Callable, *first: object) -> Iterator[Callable[..., Future]]:
    """Start processes and yield a function that lets one of them call `function(*first, *arguments)`.

    `first` is sent once, and where processes are forked only inherited. The future that the function returns raises
    what `function` raised, or KilledWorkerError if its process has ended. At the end all processes are killed.
    """
    # A fork begins at once and shares this process's memory; elsewhere processes are started anew.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    processes, connections, idle = [], [], SimpleQueue()
    for _ in range(num_workers):
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, function, first), daemon=True)
        process.start()
        there.close()  # so that the pipe ends with the process
        processes.append(process), connections.append(here), idle.put(here)
    threads = ThreadPoolExecutor(num_workers)
    try:
        yield lambda *arguments: threads.submit(_ask, idle, arguments)
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process, connection in zip(processes, connections, strict=True):
            process.join(), connection.close()


def _ask(idle: SimpleQueue, arguments: tuple) -> object:
    """Let an idle process work, in a thread that waits for it."""
    connection = idle.get()
    try:
        connection.send(arguments)
        is_done, result = connection.recv()
    except (EOFError, OSError):
        raise KilledWorkerError from None
    finally:
        idle.put(connection)
    if is_done:
        return result
    raise result


def _work(connection: Connection, function: Callable, first: tuple) -> None:
    """Answer calls until this process is killed, or its parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to answer
    end_with_parent()
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(*first, *arguments)))
        except Exception as error:
            error.add_note(f"in a worker process:\n{traceback.format_exc()}")
            connection.send((False, error))
