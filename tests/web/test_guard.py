"""What the guard lets through, what it adds, and when a session is taken to be gone."""

import asyncio
import time
from collections.abc import Callable

import pytest
from gradio.route_utils import FnIndexInferError
from starlette.responses import PlainTextResponse

from sft.web.guard import GRACE, HEADERS, MAX_BODY, MAX_LOGINS, Guard, Listeners, int_or_zero, session_of

HOST = "127.0.0.1:7860"
Headers = dict[str, str]


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def scope_of(
    method: str, path: str, query: str = "", client: tuple[str, int] = ("127.0.0.1", 1), **headers: str
) -> dict:
    named = {"host": HOST} | {name.replace("_", "-"): value for name, value in headers.items()}
    return {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in named.items()],
        "client": client,
    }


def guard_of(app: Callable | None = None, clock: Callable[[], float] = time.monotonic, **options: bool) -> Guard:
    return Guard(app or PlainTextResponse("through"), Listeners(clock), **options)


def status_of(method: str, path: str, **headers: str) -> int | None:
    refused = guard_of().refusal(scope_of(method, path, **headers))
    return refused[0] if refused else None


def ask(guard: Guard, scope: dict, bodies: tuple[bytes, ...] = (b"",)) -> tuple[int, Headers, bytes]:
    """Send a request whose body comes in pieces; return the answer."""
    sent, pieces = [], list(bodies)

    async def receive() -> dict:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:])


async def read_all(scope: dict, receive: Callable, send: Callable) -> None:
    """An app that answers with the length of the body."""
    length, more = 0, True
    while more:
        message = await receive()
        length, more = length + len(message["body"]), message["more_body"]
    await PlainTextResponse(str(length))(scope, receive, send)


def test_a_session_is_gone_after_the_grace_and_no_sooner():
    clock = Clock()
    listeners = Listeners(clock)
    assert not listeners.is_gone("a")
    clock.now += GRACE
    assert not listeners.is_gone("a") and not listeners.is_gone("b")
    clock.now += 0.1
    assert listeners.is_gone("a") and not listeners.is_gone("b")


def test_a_listener_keeps_a_session_as_long_as_one_is_left():
    clock = Clock()
    listeners = Listeners(clock)
    listeners.is_gone("a")
    listeners.opened("a"), listeners.opened("a")
    listeners.closed("a")
    clock.now += 100 * GRACE
    assert not listeners.is_gone("a")
    listeners.closed("a")
    assert listeners.open == {}
    assert not listeners.is_gone("a")  # the grace begins anew
    clock.now += GRACE + 0.1
    assert listeners.is_gone("a")


def test_of_several_sessions_one_listener_is_enough():
    clock = Clock()
    listeners = Listeners(clock)
    listeners.opened("b")
    assert not listeners.is_gone("a", "b")
    listeners.closed("b")
    assert not listeners.is_gone("a", "b")
    clock.now += GRACE + 0.1
    assert listeners.is_gone("a", "b")


def test_a_session_that_is_asked_for_once_a_minute_is_gone_as_well():
    clock = Clock()
    listeners = Listeners(clock)
    assert not listeners.is_gone("a")
    clock.now += 60
    assert listeners.is_gone("a")


def test_of_very_many_silent_sessions_the_oldest_are_forgotten(monkeypatch):
    monkeypatch.setattr("sft.web.guard.MAX_SILENT", 5)
    listeners = Listeners(Clock())
    for number in range(100):
        listeners.is_gone(str(number))
    assert list(listeners.silent_since) == ["95", "96", "97", "98", "99"]


@pytest.mark.parametrize("host", [HOST, "localhost:7860", "localhost", "[::1]:7860"])
def test_this_machines_own_names_are_answered(host: str):
    assert status_of("GET", "/", host=host) is None


@pytest.mark.parametrize(
    "host", ["", "evil.example", "127.0.0.1.evil.example", "evil.example:7860", "localhost@evil", "127.0.0.1:7860:1"]
)
def test_another_name_is_not_answered_unless_all_are(host: str):
    assert status_of("GET", "/", host=host) == 421
    assert guard_of(any_host=True).refusal(scope_of("GET", "/", host=host)) is None


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "X"])
def test_other_methods_are_refused(method: str):
    assert status_of(method, "/") == 405


GET_PATHS = [
    *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/login_check", "/logout"),
    *("/assets/index-1a.js", "/static/img/logo.svg", "/gradio_api/info", "/gradio_api/heartbeat/a1"),
    *("/gradio_api/queue/data", "/gradio_api/call/chat/1a", "/gradio_api/call/v2/chat/1a"),
]
POST_PATHS = ["/login", *(f"/gradio_api/{name}" for name in ("queue/join", "cancel", "reset", "run/predict"))]
POST_PATHS += ["/gradio_api/call/chat", "/gradio_api/call/v2/chat"]
CLOSED_PATHS = [
    *("/file=/etc/passwd", "/gradio_api/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/gradio_api/upload"),
    *("/gradio_api/proxy=http://127.0.0.1", "/gradio_api/component_server", "/monitoring", "/monitoring/summary"),
    *("/gradio_api/upload_progress", "/gradio_api/stream/a", "/gradio_api/runs", "/gradio_api/run-history/records"),
    *("/gradio_api/deep_link", "/gradio_api/dev/reload", "/gradio_api/api/predict", "/gradio_api/run/chat", "/docs"),
    *("/openapi.json", "/gradio_api/queue/status", "/gradio_api/process_recording", "/pwa_icon", "/config/../x"),
    *("/assets/../config.json", "/assets/a\\b", "/assets/a\0", "/assets/a\r\n", "/static/..%2f", "//etc/passwd"),
    *("/assets/", "/assets", "", "/\n", "/config\n", "/gradio_api/call/chat/a/b", "/gradio_api/mcp"),
    *("/gradio_api/call/nothing", "/gradio_api/call/on_send/1a"),
]


def test_only_the_routes_of_the_page_are_open():
    assert [path for path in GET_PATHS if status_of("GET", path) or status_of("HEAD", path)] == []
    assert [path for path in POST_PATHS if status_of("POST", path)] == []
    closed = {(method, path): status_of(method, path) for method in ("GET", "POST") for path in CLOSED_PATHS}
    assert {request: status for request, status in closed.items() if status != 404} == {}
    assert {status_of("POST", path) for path in GET_PATHS if "call" not in path} == {404}
    assert {status_of("GET", path) for path in POST_PATHS if "call" not in path} == {404}


def test_a_page_elsewhere_may_not_post():
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://127.0.0.1", "x"):
        assert status_of("POST", "/gradio_api/queue/join", origin=origin) == 403, origin
    assert status_of("POST", "/gradio_api/queue/join", origin=f"http://{HOST}") is None
    assert status_of("POST", "/gradio_api/queue/join") is None


def test_an_origin_that_is_no_address_is_refused():
    assert status_of("POST", "/gradio_api/queue/join", origin="http://[") == 403


def test_a_large_body_is_refused_before_and_while_it_comes():
    scope = scope_of("POST", "/gradio_api/queue/join", content_length=str(MAX_BODY + 1))
    assert ask(guard_of(read_all), scope)[0] == 413
    scope = scope_of("POST", "/gradio_api/queue/join")
    half = b"x" * (MAX_BODY // 2)
    assert ask(guard_of(read_all), scope, (half, half))[::2] == (200, str(MAX_BODY).encode())
    status, headers, _ = ask(guard_of(read_all), scope, (half, half, b"x"))
    assert status == 413 and headers["content-security-policy"]


@pytest.mark.parametrize("length", ["-1", "abc", "", "１２", "1e9", "+5", " 7"])
def test_a_length_that_is_no_number_is_zero(length: str):
    assert int_or_zero(length) == 0


def test_a_length_of_very_many_digits_is_too_large():
    assert int_or_zero("9" * 5000) > MAX_BODY


def test_logins_of_an_address_are_counted_a_minute():
    clock = Clock()
    guard = guard_of(clock=clock, any_host=True)

    def log_in(address: str, path: str = "/login") -> int | None:
        refused = guard.refusal(scope_of("POST", path, client=(address, 1)))
        return refused[0] if refused else None

    assert [log_in("a", "/login/" if each % 2 else "/login") for each in range(MAX_LOGINS)] == [None] * MAX_LOGINS
    assert log_in("a") == log_in("a", "/login/") == 429
    assert log_in("b") is None
    clock.now += 59
    assert log_in("a") == 429
    clock.now += 61
    assert log_in("c") is None and list(guard.logins.times) == ["c"]
    assert log_in("a") is None


def test_every_answer_carries_the_headers():
    for scope in (scope_of("GET", "/"), scope_of("GET", "/file=/etc/passwd"), scope_of("GET", "/", host="evil")):
        headers = ask(guard_of(), scope)[1]
        assert {name: headers.get(name.lower()) for name in HEADERS} == HEADERS
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["Content-Security-Policy"].split(";"))
    for name in ("script-src-attr", "object-src", "frame-src", "frame-ancestors"):
        assert policy[name] == "'none'"
    assert "'unsafe-eval'" not in policy["script-src"] and policy["connect-src"] == "'self'"


def test_listeners_are_counted_while_they_listen():
    listening = []

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        listening.append(dict(guard.listeners.open))
        await PlainTextResponse("")(scope, receive, send)

    guard = guard_of(app)
    ask(guard, scope_of("GET", "/gradio_api/queue/data", "session_hash=a"))
    ask(guard, scope_of("GET", "/gradio_api/call/chat/b"))
    ask(guard, scope_of("GET", "/config"))
    assert listening == [{"a": 1}, {"b": 1}, {}] and guard.listeners.open == {}


def test_a_listener_whose_answer_fails_is_counted_off():
    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        raise RuntimeError

    guard = guard_of(app)
    with pytest.raises(RuntimeError):
        ask(guard, scope_of("GET", "/gradio_api/call/chat/b"))
    assert guard.listeners.open == {}


@pytest.mark.parametrize(
    ("method", "path", "query", "session"),
    [
        ("GET", "/gradio_api/queue/data", "session_hash=a", "a"),
        ("GET", "/gradio_api/queue/data/", "x=1&session_hash=a&session_hash=b", "a"),
        ("GET", "/gradio_api/queue/data", "", ""),
        ("GET", "/gradio_api/call/chat/1a", "", "1a"),
        ("GET", "/gradio_api/call/v2/chat/1a/", "", "1a"),
        ("POST", "/gradio_api/queue/data", "session_hash=a", ""),
        ("HEAD", "/gradio_api/call/chat/1a", "", ""),
        ("GET", "/gradio_api/heartbeat/1a", "", ""),
    ],
)
def test_what_a_request_listens_to(method: str, path: str, query: str, session: str):
    assert session_of(scope_of(method, path, query)) == session


@pytest.mark.parametrize("error", [KeyError(10_000), FnIndexInferError()])
def test_an_event_that_the_page_does_not_have_is_not_found(error: Exception):
    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        raise error

    status, headers, text = ask(guard_of(app), scope_of("POST", "/gradio_api/run/predict"))
    assert (status, text) == (404, b"no such event") and headers["content-security-policy"]


def test_what_is_no_request_is_not_answered():
    reached = []

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        reached.append(scope["type"])

    for kind in ("lifespan", "websocket"):
        asyncio.run(guard_of(app)({"type": kind}, None, None))
    assert reached == ["lifespan"]
