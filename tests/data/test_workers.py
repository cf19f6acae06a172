"""Answers and errors of processes, and processes that are killed at the worst moment."""

import multiprocessing
import os
import signal
import struct
import threading
from concurrent.futures import FIRST_COMPLETED, wait
from multiprocessing.connection import Connection

import pytest

from sft.data.workers import KilledWorkerError, workers


def add(first: int, second: int) -> int:
    return first + second


def pid() -> int:
    return os.getpid()


def wait_for_ever() -> None:
    threading.Event().wait()


def die_while_answering(answer: bytes) -> bytes:
    """Return an answer of which half is sent when this process is killed."""

    def send_half(self: Connection, message: memoryview) -> None:
        os.write(self.fileno(), struct.pack("!i", len(message)) + bytes(message)[: len(message) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    Connection._send_bytes = send_half
    return answer


def test_calls_are_answered_by_as_many_processes():
    with workers(2, add, 40) as submit:
        assert [future.result() for future in [submit(number) for number in range(50)]] == [*range(40, 90)]
    with workers(3, pid) as submit:
        pids = {submit().result() for _ in range(30)}
        assert 1 <= len(pids) <= 3 and os.getpid() not in pids
    assert not multiprocessing.active_children()


def test_an_error_comes_back_with_its_traceback_and_the_process_goes_on():
    with workers(1, add, 1) as submit:
        with pytest.raises(TypeError) as caught:
            submit("2").result()
        assert "in a worker process:\nTraceback" in caught.value.__notes__[0] and "in add" in caught.value.__notes__[0]
        assert submit(2).result() == 3


def test_what_cannot_be_sent_is_an_error_and_the_process_goes_on():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with workers(1, add, 1) as submit:
        with pytest.raises(RecursionError):
            submit(deep).result()
        assert submit(2).result() == 3
    while deep:  # freed level by level, not by recursion
        deep = deep[0]


def test_a_process_killed_in_the_middle_of_its_answer_is_noticed():
    with workers(2, die_while_answering) as submit:
        futures = [submit(b"x" * 1000) for _ in range(4)]
        for future in futures:
            with pytest.raises(KilledWorkerError):
                future.result(timeout=60)


def test_a_killed_process_does_not_keep_the_others_waiting():
    with workers(2, wait_for_ever) as submit:
        futures = [submit() for _ in range(2)]
        multiprocessing.active_children()[0].kill()
        done, _ = wait(futures, timeout=60, return_when=FIRST_COMPLETED)
        assert len(done) == 1
    assert [type(future.exception(timeout=60)) for future in futures] == [KilledWorkerError] * 2
    assert not multiprocessing.active_children()
