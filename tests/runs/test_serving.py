"""Many users at once, users who vanish, answers that are stopped, and the end of the server."""

import ctypes
import gc
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise

import httpx
import psutil
import pytest

from support.project import PROJECT
from support.serving import (
    API,
    PARAMETERS,
    QUESTION,
    AnsweredWithError,
    Served,
    event_number,
    join,
    listen,
    messages_of,
    post_event,
    served,
    wait_until,
    watched,
)

USERS = 20
CLIENTS = 200  # of a wave of which each vanishes
# MB that a further wave may take. Gradio keeps what it would have sent to the last 2,000 clients who never heard.
MORE_MEMORY = 40.0
GREEDY = {"max_new_tokens": 24, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 2.0}
LONG = {"max_new_tokens": 2000}


@pytest.fixture(scope="module")
def page(make_model) -> Iterator[Served]:
    with served(make_model("bloom-tiny"), max_waiting=USERS) as page:
        yield page


@pytest.fixture(scope="module")
def wide_page(make_model) -> Iterator[Served]:
    """A page in whose line a whole wave has room."""
    with served(make_model("bloom-tiny"), max_waiting=CLIENTS + 1) as page:
        yield page


def generating() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "_generate" in thread.name]


class Gate:
    """Holds a model before its forwards until it is opened, or lets a number of them through."""

    def __init__(self, chat):
        self.permits = threading.Semaphore(0)
        self.is_open = False
        self.watching = watched(chat, self.wait)

    def __enter__(self) -> "Gate":
        self.times = self.watching.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.open()
        self.watching.__exit__(*error)

    def wait(self) -> None:
        if not self.is_open:
            assert self.permits.acquire(timeout=60)

    def open(self) -> None:
        self.is_open = True
        self.permits.release(10_000)

    def forwards_until_no_reply(self) -> int:
        """Let forwards through one by one until nothing is generated any more; return how many."""
        for number in count():
            if wait_until(lambda: not generating(), 2):
                return number
            assert number < 20
            self.permits.release()
        return 0


def history_of(user: int) -> list[dict[str, str]]:
    """The conversation that a user alone has had."""
    secret = f"我叫{user * 7919}，秘密是{chr(0x4E00 + user * 37)}"
    return [{"role": "user", "content": secret}, {"role": "assistant", "content": f"好的，{secret}。"}]


def alone(page: Served, user: int) -> str:
    from sft.chat.sampling import Sampling

    return "".join(page.chat.reply([*history_of(user), {"role": "user", "content": QUESTION}], Sampling(**GREEDY)))


def hear(page: Served, event: str) -> str:
    """The whole answer, heard on a connection of its own."""
    with page.client() as client:
        return list(listen(client, event))[-1]


def is_idle(page: Served) -> bool:
    return not page.line.tickets and not generating()


def test_each_of_many_users_has_the_answer_to_their_own_conversation_in_the_order_of_coming(page, monkeypatch):
    expected = [alone(page, user) for user in range(USERS)]
    assert len(set(expected)) == USERS
    prepared = []
    reply = page.chat.reply
    monkeypatch.setattr(
        page.chat, "reply", lambda messages, *rest: (prepared.append(messages[:2]), reply(messages, *rest))[1]
    )
    with ThreadPoolExecutor(USERS) as pool, page.client() as client, Gate(page.chat) as gate:
        events, answers = [], []
        for user in range(USERS):
            events.append(join(client, QUESTION, history_of(user), **GREEDY))
            answers.append(pool.submit(hear, page, events[-1]))
            assert wait_until(lambda number=user + 1: len(page.line.tickets) == number)
        assert [ticket.visitor.session for ticket in page.line.tickets] == events
        gate.open()
        assert [answer.result(60) for answer in answers] == expected
    assert prepared == [history_of(user) for user in range(USERS)]


def test_users_who_come_at_the_same_moment_are_all_answered(page):
    def use(user: int) -> str:
        return page.ask(QUESTION, history_of(user), **GREEDY)

    with ThreadPoolExecutor(USERS) as pool:
        assert [*pool.map(use, range(USERS))] == [alone(page, user) for user in range(USERS)]


def test_the_line_is_full_politely_and_goes_on_afterwards(page):
    with ThreadPoolExecutor(USERS) as pool, page.client() as client, Gate(page.chat) as gate:
        answers = [pool.submit(page.ask) for _ in range(USERS)]
        assert wait_until(lambda: len(page.line.tickets) == USERS)
        for _ in range(5):
            with pytest.raises(AnsweredWithError, match="^20 questions are already waiting"):
                list(listen(client, join(client)))
        gate.open()
        assert len({answer.result(60) for answer in answers}) == 1
    assert page.ask()


def test_a_session_asks_one_question_at_a_time(page):
    number, data = event_number(page.page, "chat"), [QUESTION, None, *PARAMETERS.values()]
    with page.client() as client, Gate(page.chat) as gate:
        for session in ("one", "one", "another"):
            post_event(client, session, number, data)
        ended = []
        for message in messages_of(client, "one"):
            if message["msg"] == "process_completed":
                ended.append(message)
                gate.open()
        assert [message["success"] for message in ended] == [False, True]
        assert ended[0]["output"]["error"].startswith("Your previous question is still being answered")
        assert list(messages_of(client, "another"))[-2]["success"]


def test_a_users_questions_of_a_minute_are_counted(make_model):
    with served(make_model("bloom-tiny"), requests_per_minute=3) as page:
        assert len({page.ask() for _ in range(3)}) == 1
        with pytest.raises(AnsweredWithError, match=r"Please try again in (60|[1-5]?\d) seconds\.$"):
            page.ask()


def test_a_user_is_counted_under_no_other_address(make_model):
    with served(make_model("bloom-tiny"), requests_per_minute=1) as page:
        assert page.ask()
        client = page.client(headers={"X-Forwarded-For": "203.0.113.5"})
        with client, pytest.raises(AnsweredWithError, match="reached this minute's limit"):
            list(listen(client, join(client)))


def test_who_names_a_session_of_their_own_is_listened_to_as_well(page, monkeypatch):
    monkeypatch.setattr("sft.web.guard.GRACE", 0.2)
    data = [QUESTION, None, *{**PARAMETERS, "max_new_tokens": 100}.values()]
    with page.client() as client, watched(page.chat, lambda: threading.Event().wait(0.02)) as times:
        response = client.post(f"{API}/call/chat", json={"data": data, "session_hash": "mine"})
        assert list(listen(client, response.json()["event_id"]))[-1]
        assert len(times) == 100


def drop_while_waiting(page: Served, event: str) -> None:
    """Listen on a bare connection and reset it after the first bytes."""
    with socket.create_connection(("127.0.0.1", page.port)) as connection:
        request = f"GET {API}/call/chat/{event} HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\n\r\n"
        connection.sendall(request.encode())
        connection.recv(1000)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def wave(page: Served) -> None:
    """Let `CLIENTS` ask for long answers and vanish, a third each: unheard, after a piece, and while they wait."""
    limits = httpx.Limits(max_connections=None)
    with (
        pytest.MonkeyPatch.context() as patched,
        page.client(limits=limits) as client,
        ThreadPoolExecutor(CLIENTS) as pool,
        Gate(page.chat) as gate,
    ):
        patched.setattr("sft.web.guard.GRACE", 60.0)  # until all listen, which takes a busy machine seconds
        events = list(pool.map(lambda _: join(client, **LONG), range(CLIENTS)))
        assert wait_until(lambda: len(page.line.tickets) >= CLIENTS // 3)

        def hear_a_piece(event: str) -> bool:
            with page.client(verify=False) as own:  # a pool closes connections of one thread under another's feet
                answer = listen(own, event)
                heard = any(answer)
                answer.close()
            return heard

        heard = [pool.submit(hear_a_piece, event) for event in events[1::3]]
        wait_until(lambda: len(page.listeners.open) >= len(heard))
        patched.undo()
        list(pool.map(lambda event: drop_while_waiting(page, event), events[2::3]))
        gate.open()
        assert all(each.result(60) for each in heard)


def kept(page: Served) -> dict[str, int]:
    """How many entries Gradio keeps of its clients."""
    queue, app = page.page.blocks._queue, page.page.blocks.app
    tables = {
        "messages": queue.pending_messages_per_session,
        "sessions": queue.pending_event_ids_session,
        "events": queue.event_ids_to_events,
        "iterators": app.iterators,
        "resets": app.iterators_to_reset,
        "states": app.state_holder.session_data,
    }
    return {name: len(table) for name, table in tables.items()} | {"listeners": len(page.listeners.open)}


def threads_of_replies() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if "_generate" in name or "ThreadPoolExecutor" in name]


@pytest.mark.slow
def test_clients_who_vanish_leave_nothing_running_and_little_in_memory(wide_page):
    page, memory = wide_page, []
    for number in range(4):
        wave(page)
        assert wait_until(lambda: is_idle(page) and not threads_of_replies())
        assert wait_until(lambda: not page.page.blocks._queue.event_ids_to_events)
        with watched(page.chat) as times:
            threading.Event().wait(0.5)
            assert not times
        assert page.ask()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what other tests of this process have let go of, too
        memory.append(psutil.Process().memory_info().rss / 1e6)
        print(f"wave {number + 1}: {memory[-1]:.1f} MB, {kept(page)}, {threading.active_count()} threads")
        assert not page.listeners.open and not page.page.blocks.app.iterators
    # What stays behind of every client adds to every wave; the first makes what is made once.
    assert min(later - earlier for earlier, later in pairwise(memory[1:])) < MORE_MEMORY, memory


def test_what_nobody_hears_is_not_kept(page, monkeypatch):
    monkeypatch.setattr("sft.web.guard.GRACE", 0.2)
    number, queue = event_number(page.page, "on_send"), page.page.blocks._queue
    sessions = {f"deaf{each}" for each in range(5)}
    with page.client() as client:
        for session in sessions:
            post_event(client, session, number, ["", None, 8, 0.0, 1.0, 0, 1.0, None])
    assert wait_until(lambda: is_idle(page))
    # Whoever asks later sweeps.
    assert wait_until(lambda: page.ask() and not sessions & set(queue.pending_messages_per_session.keys()))
    assert not sessions & set(queue.pending_event_ids_session)


@pytest.mark.parametrize("way", ["cancel", "drop"])
def test_a_stopped_answer_ends_within_one_token(page, way: str):
    number, session = event_number(page.page, "chat"), f"stopped by {way}".replace(" ", "-")
    data = [QUESTION, None, *{**PARAMETERS, **LONG}.values()]
    with page.client() as client, Gate(page.chat) as gate:
        event = post_event(client, session, number, data).json()["event_id"]
        gate.permits.release(10)
        stream = messages_of(client, session)
        assert next(message for message in stream if message["msg"] == "process_generating" and any(answer_in(message)))
        assert wait_until(lambda: len(gate.times) == 10)
        if way == "cancel":
            body = {"session_hash": session, "fn_index": number, "event_id": event}
            assert client.post(f"{API}/cancel", json=body).json() == {"success": True}
        stream.close()
        assert wait_until(lambda: not page.listeners.open)
        forwards = gate.forwards_until_no_reply()
        print(f"{way}: {forwards} forwards")
        # The forward that has begun ends. Its token is what tells that nobody hears; meanwhile one more has begun.
        assert forwards <= (1 if way == "cancel" else 2)
        assert wait_until(lambda: is_idle(page))
    assert page.ask()


def answer_in(message: dict) -> list:
    """The strings of a message; those after the first are told as changes."""
    data = message["output"]["data"][0]
    return [data] if isinstance(data, str) else [change[2] for change in data]


def test_who_goes_while_waiting_loses_the_place_and_nobody_else(page):
    with ThreadPoolExecutor(2) as pool, page.client() as client, Gate(page.chat) as gate:
        first = pool.submit(page.ask)
        assert wait_until(lambda: len(page.line.tickets) == 1)
        gone = join(client)
        assert wait_until(lambda: len(page.line.tickets) == 2)
        drop_while_waiting(page, gone)
        assert wait_until(lambda: len(page.line.tickets) == 1)
        last = pool.submit(page.ask)
        gate.open()
        assert first.result(60) == last.result(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def program(make_model, tmp_path) -> Iterator[tuple[subprocess.Popen, int, Callable[[], str]]]:
    """app.py as a program: the process, its port, and what it has written to standard error."""
    port, errors = free_port(), tmp_path / "errors"
    command = [sys.executable, "app.py", "--checkpoint", str(make_model("bloom-tiny")), "--port", str(port)]
    with errors.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=stream, start_new_session=True, text=True
        )
        yield process, port, lambda: errors.read_text(encoding="utf-8")
        process.kill()
        process.wait()


def test_control_c_ends_the_server_in_the_middle_of_an_answer(program):
    process, port, errors = program
    assert any(line.startswith("http://") for line in process.stdout), errors()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        assert client.get("/theme.css").status_code == 200, "the address was printed before it answers"
        with client.stream("GET", f"{API}/call/chat/{join(client, **LONG)}") as response:
            lines = (line for line in response.iter_lines() if line.startswith("data: [") and any(json.loads(line[6:])))
            assert next(lines)
            process.send_signal(signal.SIGINT)
            assert process.wait(10) in (0, 130)
    assert "Traceback" not in errors()
