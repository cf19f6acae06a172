"""Who may join the line, in which order, and that every place is given up."""

import asyncio
import contextlib
from collections.abc import Coroutine

import pytest

from sft.web.texts import RefusedError
from sft.web.visitors import MINUTE, RateLimit, Visitor, WaitingLine


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def visitor(session: str, user: str = "me") -> Visitor:
    return Visitor(session, user)


def run(test: Coroutine) -> object:
    async def timed() -> object:
        return await asyncio.wait_for(test, 30)

    return asyncio.run(timed())


async def refusal(line: WaitingLine, session: str, user: str = "me") -> RefusedError | None:
    """What a visitor who joins and leaves at once is told."""
    try:
        async with line.join(visitor(session, user)):
            return None
    except RefusedError as error:
        return error


def test_rate_limit_counts_each_name_in_any_minute_and_says_how_long_to_wait():
    clock = Clock()
    rate = RateLimit(2, clock)
    assert [rate.take("a"), rate.take("a"), rate.take("b")] == [0, 0, 0]
    clock.now += 20
    assert rate.take("a") == MINUTE - 20
    assert len(rate.times["a"]) == 2  # what was refused does not count
    clock.now += MINUTE - 20
    assert [rate.take("a"), rate.take("a")] == [0, 0]
    assert rate.take("a") == MINUTE and list(rate.times) == ["a"]


def test_first_come_first_served():
    async def test() -> list[str]:
        line, order = WaitingLine(50, 100), []

        async def come(name: str) -> None:
            async with line.join(visitor(name)) as ticket:
                places = [ticket.place]
                while ticket.place:
                    await ticket.wait()
                    places.append(ticket.place)
                assert places == sorted(places, reverse=True)
                order.append(name)
                await asyncio.sleep(0)

        await asyncio.gather(*(come(str(number)) for number in range(50)))
        assert line.tickets == []
        return order

    assert run(test()) == [str(number) for number in range(50)]


@pytest.mark.parametrize("at_once", [1, 3])
def test_so_many_are_answered_at_once_and_the_next_when_one_leaves(at_once: int):
    async def test() -> tuple[int, list[str]]:
        line, answered, busy, most = WaitingLine(50, 100, at_once=at_once), [], 0, 0

        async def come(name: str) -> None:
            nonlocal busy, most
            async with line.join(visitor(name)) as ticket:
                while ticket.place:
                    await ticket.wait()
                busy += 1
                most = max(most, busy)
                answered.append(name)
                await asyncio.sleep(0.001)
                busy -= 1

        await asyncio.gather(*(come(str(number)) for number in range(10)))
        return most, answered

    assert run(test()) == (at_once, [str(number) for number in range(10)])


def test_who_waits_is_woken_when_the_line_moves_and_not_later():
    async def test() -> None:
        line = WaitingLine(3, 100)
        async with line.join(visitor("second")) as before, line.join(visitor("third")) as ticket:
            assert (before.place, ticket.place) == (0, 1)
            waiting = asyncio.create_task(ticket.wait())
            await asyncio.sleep(0)
            assert not waiting.done()
            line.tickets.remove(before)
            ticket.moved.set()
            await asyncio.wait_for(waiting, 0.9)
            assert ticket.place == 0 and not ticket.moved.is_set()
            line.tickets.insert(0, before)

    run(test())


def test_waiting_ends_by_itself_so_that_somebody_can_look_whether_the_visitor_is_there(monkeypatch):
    monkeypatch.setattr("sft.web.visitors.PATIENCE", 0.01)

    async def test() -> int:
        line = WaitingLine(3, 100)
        async with line.join(visitor("first")), line.join(visitor("second")) as ticket:
            await ticket.wait()
            return ticket.place

    assert run(test()) == 1


def test_a_full_line_takes_nobody_until_somebody_leaves():
    async def test() -> None:
        line = WaitingLine(2, 100)
        async with line.join(visitor("1")):
            async with line.join(visitor("2")):
                refused = await refusal(line, "3")
                assert (refused.key, refused.values) == ("full", {"waiting": 2})
                assert refused.sentence("en").startswith("2 questions are already waiting")
            assert await refusal(line, "3") is None

    run(test())


def test_a_session_has_one_place_and_a_user_several():
    async def test() -> None:
        line = WaitingLine(5, 100)
        async with line.join(visitor("a")):
            assert (await refusal(line, "a", "another")).key == "one_at_a_time"
            assert await refusal(line, "b") is None
        assert await refusal(line, "a") is None

    run(test())


def test_the_window_of_a_minute_moves():
    async def test() -> None:
        clock = Clock()
        line = WaitingLine(5, 3, clock)
        for now in (1000.0, 1010.0, 1020.0):
            clock.now = now
            assert await refusal(line, "a") is None
        told = {}
        for now in (1020.0, 1059.4, 1059.99):
            clock.now = now
            refused = await refusal(line, "a")
            assert refused.key == "too_many"
            told[now] = refused.values["seconds"]
        assert told == {1020.0: 40, 1059.4: 1, 1059.99: 1}  # who waits as long as told is not refused again
        assert await refusal(line, "b", "another") is None
        clock.now = 1060.0
        assert await refusal(line, "a") is None
        assert (await refusal(line, "a")).values["seconds"] == 10

    run(test())


@pytest.mark.parametrize("passed", [0.0, 0.3, 0.5, 12.34, 59.6, 59.999])
def test_who_waits_as_long_as_told_is_answered(passed: float):
    async def test() -> None:
        clock = Clock()
        line = WaitingLine(5, 1, clock)
        assert await refusal(line, "a") is None
        clock.now += passed
        seconds = (await refusal(line, "a")).values["seconds"]
        assert 1 <= seconds <= MINUTE + 1
        clock.now += seconds
        assert await refusal(line, "a") is None

    run(test())


def test_a_refused_request_counts_for_nothing():
    async def test() -> None:
        line = WaitingLine(1, 2, Clock())
        async with line.join(visitor("a")):
            for _ in range(10):
                assert (await refusal(line, "b")).key == "full"
                assert (await refusal(line, "a")).key == "one_at_a_time"
        assert len(line.rate.times["me"]) == 1
        assert await refusal(line, "b") is None
        for _ in range(10):
            assert (await refusal(line, "b")).key == "too_many"
        assert len(line.rate.times["me"]) == 2 and line.tickets == []

    run(test())


def test_users_of_an_earlier_minute_are_forgotten():
    async def test() -> None:
        clock = Clock()
        line = WaitingLine(5, 3, clock)
        for number in range(100):
            await refusal(line, "a", str(number))
        assert len(line.rate.times) == 100
        clock.now += MINUTE
        await refusal(line, "a", "last")
        assert list(line.rate.times) == ["last"]

    run(test())


@pytest.mark.parametrize("error", [ValueError, GeneratorExit, KeyboardInterrupt])
def test_an_exception_gives_up_the_place_and_wakes_the_others(error: type[BaseException]):
    async def test() -> None:
        line = WaitingLine(5, 100)
        joined = line.join(visitor("a"))
        await joined.__aenter__()
        async with line.join(visitor("b")) as ticket:
            with contextlib.suppress(error):
                assert not await joined.__aexit__(error, error(), None)
            assert ticket.place == 0 and ticket.moved.is_set() and len(line.tickets) == 1
        assert line.tickets == []

    run(test())


def test_cancelling_in_any_place_gives_it_up():
    async def test() -> None:
        line, reached = WaitingLine(5, 100), []

        async def come(name: str) -> None:
            async with line.join(visitor(name)) as ticket:
                while ticket.place:
                    await ticket.wait()
                reached.append(name)
                await asyncio.sleep(30)

        tasks = [asyncio.create_task(come(name)) for name in "abcd"]
        await asyncio.sleep(0)
        assert [ticket.visitor.session for ticket in line.tickets] == [*"abcd"]
        for cancelled, left in ((1, "acd"), (0, "cd"), (3, "c")):
            tasks[cancelled].cancel()
            await asyncio.gather(tasks[cancelled], return_exceptions=True)
            assert [ticket.visitor.session for ticket in line.tickets] == [*left]
            await asyncio.sleep(0.01)  # the others have woken and wait again
        while reached != ["a", "c"]:
            await asyncio.sleep(0.01)
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert line.tickets == []

    run(test())


def test_cancelling_at_the_moment_when_the_line_moves_is_not_lost():
    async def test() -> None:
        line = WaitingLine(5, 100)
        async with line.join(visitor("a")), line.join(visitor("b")) as ticket:
            waiting = asyncio.create_task(ticket.wait())
            await asyncio.sleep(0.01)
            ticket.moved.set()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    run(test())
