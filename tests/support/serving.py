"""A page served in this process by a tiny model, and Gradio's HTTP API in a few functions."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

QUESTION = "写一首诗。"
API = "/gradio_api"
JSON = {"Content-Type": "application/json"}
PARAMETERS = dict(max_new_tokens=8, temperature=0, top_p=1, top_k=0, repetition_penalty=1, seed=None)


class AnsweredWithError(Exception):
    """The API answered with an error; its text is the message."""


@dataclass
class Served:
    """A page that is being served, and the objects behind it."""

    address: str
    port: int
    chat: Any
    page: Any
    line: Any
    listeners: Any

    def client(self, **options: Any) -> httpx.Client:
        """Return a client of this page alone; its connections are its own."""
        return httpx.Client(**{"base_url": self.address, "timeout": 60, "trust_env": False, **options})

    def ask(self, message: Any = QUESTION, history: Any = None, **parameters: Any) -> str:
        """Return the answer to a question; raise AnsweredWithError if there is none."""
        with self.client() as client:
            return list(listen(client, join(client, message, history, **parameters)))[-1]


def free_port() -> int:
    """Return a port that nobody listens to."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextmanager
def served(
    *models: Any, max_waiting: int = 20, requests_per_minute: int = 100_000, names: Any = None, at_once: int = 1
) -> Iterator[Served]:
    """Serve one model or several side by side, given loaded or as folders, until the end of the block."""
    from sft.chat.model import ChatModel
    from sft.web.answering import Answering, Limits
    from sft.web.guard import Listeners
    from sft.web.page import ChatPage
    from sft.web.server import launch
    from sft.web.visitors import WaitingLine

    chats = [ChatModel.load(str(each), "cpu", dtype="float32") if isinstance(each, Path) else each for each in models]
    listeners, line = Listeners(), WaitingLine(max_waiting, requests_per_minute, at_once=at_once)
    page = ChatPage(Answering(chats, line, Limits(), listeners.is_gone), [each.name for each in models])
    address = launch(page, listeners, names=names)
    try:
        yield Served(address, urlsplit(address).port, chats[0], page, line, listeners)
    finally:
        page.blocks.close(verbose=False)


def join(client: httpx.Client, message: Any = QUESTION, history: Any = None, **parameters: Any) -> str:
    """Ask through /call/chat; return the event that brings the answer."""
    data = [message, history, *{**PARAMETERS, **parameters}.values()]
    response = client.post(f"{API}/call/chat", content=json.dumps({"data": data}), headers=JSON)
    response.raise_for_status()
    return response.json()["event_id"]


def listen(client: httpx.Client, event: str) -> Iterator[str]:
    """Yield an answer as it grows, "" while it waits; raise AnsweredWithError if it ends in one."""
    with client.stream("GET", f"{API}/call/chat/{event}") as response:
        name = ""
        for line in response.iter_lines():
            kind, _, value = line.partition(": ")
            if kind == "event":
                name = value
            elif kind == "data" and name == "error":
                raise AnsweredWithError((json.loads(value) or {}).get("error"))
            elif kind == "data" and name in ("generating", "complete"):
                yield json.loads(value)[0]


def post_event(client: httpx.Client, session: str, number: int, data: list, **fields: Any) -> httpx.Response:
    """Send event `number` of the page into Gradio's queue, as a browser does."""
    body = {"data": data, "fn_index": number, "session_hash": session, **fields}
    return client.post(f"{API}/queue/join", content=json.dumps(body), headers=JSON)


def messages_of(client: httpx.Client, session: str) -> Iterator[dict]:
    """Yield the messages that a browser gets of a session until its stream closes."""
    with client.stream("GET", f"{API}/queue/data", params={"session_hash": session}) as response:
        yield from (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: "))


def event_number(page: Any, name: str) -> int:
    """Return the number by which Gradio knows the handler of a name, the first of them."""
    return next(number for number, each in page.blocks.fns.items() if each.name == name)


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Tell whether a condition becomes true within some seconds."""
    deadline = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(true)


@contextmanager
def watched(chat: Any, before: Callable[[], None] = lambda: None) -> Iterator[list[float]]:
    """Call `before` ahead of each forward of the model; yield a list that holds the time of each."""
    times: list[float] = []
    hook = chat.model.register_forward_pre_hook(lambda *_: (before(), times.append(time.monotonic()))[:0] or None)
    try:
        yield times
    finally:
        hook.remove()


def answer_to(page: Served, sent: bytes) -> bytes:
    """Send raw bytes; return what comes back until the connection ends or five seconds pass."""
    with socket.create_connection(("127.0.0.1", page.port), timeout=5) as connection:
        received = b""
        try:
            connection.sendall(sent)
            while piece := connection.recv(65536):
                received += piece
                if len(received) > 2_000_000:
                    break
        except (TimeoutError, ConnectionError):
            pass
        return received
