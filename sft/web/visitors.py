"""Who is answered when: one request at a time, in the order of their coming, within limits that are told."""

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

MINUTE = 60.0  # seconds
PATIENCE = 1.0  # seconds between two looks at whether a waiting visitor is still there


class RefusedError(Exception):
    """A request that is not answered: the `key` of a sentence of `page_text`, and its values."""

    def __init__(self, key: str, **values: object):
        super().__init__(key)
        self.key = key
        self.values = values


@dataclass(frozen=True)
class Visitor:
    """Who asks: one page or caller (`session`), the user's name or, without one, the address, and Gradio's event."""

    session: str
    user: str
    event: str = ""


class Ticket:
    """A place in the line."""

    def __init__(self, line: "WaitingLine", visitor: Visitor):
        self.line = line
        self.visitor = visitor
        self.moved = asyncio.Event()

    @property
    def place(self) -> int:
        """How many are before it; 0: its turn."""
        return self.line.tickets.index(self)

    async def wait(self) -> None:
        """Wait until the line moves, for a second at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                await self.moved.wait()
                self.moved.clear()


class WaitingLine:
    """First come, first served; all in one event loop.

    At most `max_waiting` requests are in it, the one being answered among them, one of each session, and each user
    may join `requests_per_minute` times in a minute.
    """

    def __init__(self, max_waiting: int, requests_per_minute: int, clock: Callable[[], float] = time.monotonic):
        """Open an empty line; `clock` returns seconds."""
        self.max_waiting = max_waiting
        self.requests_per_minute = requests_per_minute
        self.clock = clock
        self.tickets: list[Ticket] = []
        self.joined: dict[str, deque[float]] = defaultdict(deque)

    @asynccontextmanager
    async def join(self, visitor: Visitor) -> AsyncIterator[Ticket]:
        """Take a place at the end and give it up at the end of the block; raises RefusedError where a limit is met."""
        if any(ticket.visitor.session == visitor.session for ticket in self.tickets):
            raise RefusedError("one_at_a_time")
        if len(self.tickets) >= self.max_waiting:
            raise RefusedError("full", waiting=self.max_waiting)
        self._count(visitor.user)
        ticket = Ticket(self, visitor)
        self.tickets.append(ticket)
        try:
            yield ticket
        finally:
            self.tickets.remove(ticket)
            for other in self.tickets:
                other.moved.set()

    def _count(self, user: str) -> None:
        """Count a request of a user's in this minute; raise RefusedError if it is one too many."""
        now = self.clock()
        for name in [name for name, times in self.joined.items() if times[-1] <= now - MINUTE]:
            del self.joined[name]
        times = self.joined[user]
        while times and times[0] <= now - MINUTE:
            times.popleft()
        if len(times) >= self.requests_per_minute:
            raise RefusedError("too_many", seconds=round(times[0] + MINUTE - now + 0.5))
        times.append(now)
