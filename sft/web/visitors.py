"""Who is answered when: first come, first served, as many at once as a model batches, with limits for each user."""

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from sft.web.texts import RefusedError

MINUTE = 60.0  # seconds
PATIENCE = 1.0  # seconds between checks that a waiting visitor is still there


class RateLimit:
    """At most `most` requests under each name in any 60 seconds."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic):
        """Begin with no requests; `clock` returns seconds."""
        self.most = most
        self.clock = clock
        self.times: dict[str, deque[float]] = defaultdict(deque)

    def take(self, name: str) -> float:
        """Count a request and return 0; at the limit count nothing and return the seconds until the next may come."""
        now = self.clock()
        for other in [other for other, times in self.times.items() if times[-1] <= now - MINUTE]:
            del self.times[other]
        times = self.times[name]
        while times and times[0] <= now - MINUTE:
            times.popleft()
        if len(times) >= self.most:
            return times[0] + MINUTE - now
        times.append(now)
        return 0.0


@dataclass(frozen=True)
class Visitor:
    """Who asks: a page or API caller (`session`), the user's name or else the address, and Gradio's event."""

    session: str
    user: str
    event: str = ""


class Ticket:
    """A place in the queue."""

    def __init__(self, line: "WaitingLine", visitor: Visitor):
        self.line = line
        self.visitor = visitor
        self.moved = asyncio.Event()

    @property
    def place(self) -> int:
        """How many are ahead; 0 when it is its turn."""
        return max(0, self.line.tickets.index(self) - self.line.at_once + 1)

    async def wait(self) -> None:
        """Wait until the queue moves, but at most `PATIENCE` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                await self.moved.wait()
                self.moved.clear()


class WaitingLine:
    """First come, first served; everything runs in one event loop.

    It holds at most `max_waiting` requests, including the `at_once` being answered, and one per session; each user may
    join `requests_per_minute` times in any 60 seconds.
    """

    def __init__(
        self,
        max_waiting: int,
        requests_per_minute: int,
        clock: Callable[[], float] = time.monotonic,
        at_once: int = 1,
    ):
        """Begin with an empty queue; `clock` returns seconds."""
        self.max_waiting = max_waiting
        self.at_once = at_once
        self.tickets: list[Ticket] = []
        self.rate = RateLimit(requests_per_minute, clock)

    @asynccontextmanager
    async def join(self, visitor: Visitor) -> AsyncIterator[Ticket]:
        """Take the last place until the end of the block; raises RefusedError if a limit is reached."""
        if any(ticket.visitor.session == visitor.session for ticket in self.tickets):
            raise RefusedError("one_at_a_time")
        if len(self.tickets) >= self.max_waiting:
            raise RefusedError("full", waiting=self.max_waiting)
        if seconds := self.rate.take(visitor.user):
            raise RefusedError("too_many", seconds=round(seconds + 0.5))
        ticket = Ticket(self, visitor)
        self.tickets.append(ticket)
        try:
            yield ticket
        finally:
            self.tickets.remove(ticket)
            for other in self.tickets:
                other.moved.set()
