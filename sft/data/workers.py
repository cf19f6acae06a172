"""Worker processes whose death is noticed, whatever they were doing when they were killed.

concurrent.futures shares one pipe for the results of all processes: when one is killed while writing, as Linux does
when memory runs out, the reader waits for the rest of the message for ever. Here each process has a pipe of its own.
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
    """A worker process has died."""


@contextmanager
def workers(num_workers: int, function: Callable, *first: object) -> Iterator[Callable[..., Future]]:
    """Start processes and yield a function that submits a call `function(*first, *arguments)` to an idle one.

    `first` is sent once, or inherited when processes are forked. The future that is returned raises what `function`
    raised, or KilledWorkerError if its process died. All processes are killed on exit.
    """
    # A fork starts at once and shares this process's memory; other systems start fresh processes.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    processes, connections, idle = [], [], SimpleQueue()
    for _ in range(num_workers):
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, function, first), daemon=True)
        process.start()
        there.close()  # so that the pipe closes with the process
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
    """Let an idle process do a call, and wait for it."""
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
    """Answer calls until this process is killed or its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
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
