"""A reply that grows token by token: which part of the text is settled, and why the reply ends."""

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from sft.prompts import STOP_MARKERS


class Reply(ABC):
    """An answer in pieces; joined, they are the full text.

    Iterating starts the generation; closing the iterator ends it within one token. `finish_reason` is then "eos",
    "length" (the token limit), "marker" (the model began the next turn) or "cancelled". A piece holds all that has
    come since the one before. `seconds` is the time up to the last token; `turns_left_out` and `tokens_left_out` count
    what of the conversation did not fit into the prompt.
    """

    def __init__(self, turns_left_out: int = 0, tokens_left_out: int = 0):
        """Prepare a reply of which nothing is there."""
        self.turns_left_out = turns_left_out
        self.tokens_left_out = tokens_left_out
        self.num_tokens = 0
        self.seconds = 0.0
        self.finish_reason = "cancelled"
        self.is_iterated = False
        self._arrived: queue.SimpleQueue[tuple[Any, float]] = queue.SimpleQueue()
        self._cancelled = threading.Event()

    @abstractmethod
    def generate(self) -> None:
        """Generate, in a thread of its own; call `arrive` with each token, and end soon after `cancel`."""

    @abstractmethod
    def take(self, token: Any) -> None:
        """Add what has arrived."""

    @abstractmethod
    def text(self) -> str:
        """Return the text of what has been taken."""

    @abstractmethod
    def ended_by_itself(self) -> bool:
        """Tell whether the model ended the reply, rather than the token limit."""

    def arrive(self, token: Any) -> None:
        """Hand over a token that has been generated."""
        self._arrived.put((token, time.monotonic()))

    def __iter__(self) -> Iterator[str]:
        """Yield text as soon as it can no longer change; a reply can be iterated only once."""
        assert not self.is_iterated, f"iterated again after {self.num_tokens} tokens"
        self.is_iterated = True
        worker = threading.Thread(target=self._run, daemon=True)
        worker.start()
        sent, start, ended = 0, time.monotonic(), False
        try:
            while not ended:
                ended = self._take(start)
                text, stopped = cut_at_marker(self.text())
                settled = text if stopped else text[: settled_length(text)]
                if len(settled) > sent:
                    yield settled[sent:]
                    sent = len(settled)
                if stopped:
                    self.finish_reason = "marker"
                    return
            if len(text) > sent:
                yield text[sent:]
            self.finish_reason = "eos" if self.ended_by_itself() else "length"
        finally:
            self.cancel()
            worker.join()

    def cancel(self) -> None:
        """End the generation within one token, from any thread."""
        self._cancelled.set()

    def _take(self, start: float) -> bool:
        """Take a token, and all that have come by now; tell whether the generation has ended."""
        for _ in range(max(1, self._arrived.qsize())):
            token, when = self._arrived.get()
            if token is None:
                return True
            if isinstance(token, BaseException):
                raise token
            self.take(token)
            self.num_tokens += 1
            self.seconds = when - start
        return False

    def _run(self) -> None:
        """Generate; at the end None arrives, or the error that was raised."""
        try:
            self.generate()
            self.arrive(None)
        except BaseException as error:
            self.arrive(error)


def settled_length(text: str) -> int:
    """Return how many characters of a growing text can no longer change.

    A final U+FFFD may be the start of a character whose other bytes are still to come (an incomplete tail decodes to
    exactly one), and the last line may be the start of a stop marker.
    """
    settled = len(text) - text.endswith("\ufffd")
    for marker in STOP_MARKERS:
        for length in range(len(marker) - 1, 0, -1):
            if text.endswith(marker[:length]):
                settled = min(settled, len(text) - length)
                break
    return settled


def cut_at_marker(text: str) -> tuple[str, bool]:
    """Cut the text where a stop marker begins; return it, and whether there was a marker."""
    found = [position for marker in STOP_MARKERS if (position := text.find(marker)) >= 0]
    return (text[: min(found)], True) if found else (text, False)
