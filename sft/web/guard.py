"""What stands between a browser and Gradio: only the routes of this page, small requests, and headers that keep a
model's text from running script, loading what lies elsewhere, or leaving in a frame.
"""

import re
import time
from collections import defaultdict, deque
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 4_000_000  # bytes; the store of a browser that is full takes about a million
MAX_PATH = 200  # characters
GRACE = 5.0  # seconds without a listener after which a session is taken to be gone
MAX_SILENT = 10_000  # sessions of which is kept since when they are silent
MAX_LOGINS = 10  # wrong or right, an address and minute
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
API = "/gradio_api"
EVENTS = re.compile(rf"{API}/(?:queue/data|call/(?:v2/)?\w+/(\w+))")
GET_ROUTES = re.compile(
    rf"/|/(?:assets|static|svelte)/[\w./@-]+|/(?:theme\.css|favicon\.ico|manifest\.json|robots\.txt|config|login_check|"
    rf"logout)/?|{API}/(?:info|openapi\.json|queue/data|app_id|user|token|login_check|startup-events|theme\.css|"
    rf"heartbeat/\w+|call/(?:v2/)?\w+/\w+)/?"
)
POST_ROUTES = re.compile(rf"/login/?|{API}/(?:queue/join|cancel|reset|run/predict|call/(?:v2/)?\w+)/?")
# Gradio's page begins with scripts of its own in its HTML, hence 'unsafe-inline' for elements; attributes such as
# onerror, which only a text of a user's or a model's could bring, run nothing.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; script-src-attr 'none'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'none'; font-src 'self' data:; connect-src 'self'; object-src 'none'; "
    "frame-src 'none'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


class Listeners:
    """Which sessions have a connection on which they hear of their events."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """Begin with nobody; `clock` returns seconds."""
        self.clock = clock
        self.open: dict[str, int] = defaultdict(int)
        self.silent_since: dict[str, float] = {}

    def opened(self, session: str) -> None:
        """Count a connection."""
        self.open[session] += 1
        self.silent_since.pop(session, None)

    def closed(self, session: str) -> None:
        """Count a connection off."""
        self.open[session] -= 1
        if self.open[session] <= 0:
            del self.open[session]

    def is_gone(self, *sessions: str) -> bool:
        """Tell whether no session has had a connection for `GRACE` seconds, counted from the first asking."""
        if any(session in self.open for session in sessions):
            return False
        now = self.clock()
        since = min(self.silent_since.setdefault(session, now) for session in sessions)
        while len(self.silent_since) > MAX_SILENT:
            del self.silent_since[next(iter(self.silent_since))]
        return now - since > GRACE


class Guard:
    """ASGI middleware in front of the whole page."""

    def __init__(self, app: ASGIApp, listeners: Listeners, any_host: bool = False):
        """Guard `app`; without `any_host` only requests to this machine's own names are answered.

        A page elsewhere may have its name point to 127.0.0.1, and would then read from here (DNS rebinding).
        """
        self.app = app
        self.listeners = listeners
        self.any_host = any_host
        self.logins: dict[str, deque[float]] = defaultdict(deque)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # lifespan; there is no websocket
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        if refusal := self.refusal(scope):
            await with_headers(PlainTextResponse(refusal[1], refusal[0]))(scope, receive, send)
            return
        session = session_of(scope)
        if session:
            self.listeners.opened(session)
        try:
            await self.app(scope, *limited(receive, send))
        except BodyTooLargeError:
            await with_headers(PlainTextResponse(f"more than {MAX_BODY:,} bytes", 413))(scope, receive, send)
        finally:
            if session:
                self.listeners.closed(session)

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return status and text for a request that is not let through."""
        headers, path, method = Headers(scope=scope), scope["path"], scope["method"]
        host = headers.get("host", "")
        if not self.any_host and re.sub(r":\d+$", "", host) not in LOCAL_HOSTS:
            return 421, "this page answers on 127.0.0.1 and localhost"
        routes = {"GET": GET_ROUTES, "HEAD": GET_ROUTES, "POST": POST_ROUTES}.get(method)
        if routes is None:
            return 405, "GET and POST"
        if len(path) > MAX_PATH or not routes.fullmatch(path) or ".." in path or any(c in path for c in "\\\0\r\n"):
            return 404, "no such page"
        if method == "POST" and "origin" in headers and not is_of(headers["origin"], host):
            return 403, "a request of another page"
        if int_or_zero(headers.get("content-length")) > MAX_BODY:
            return 413, f"more than {MAX_BODY:,} bytes"
        if method == "POST" and path.startswith("/login") and self.too_many_logins(scope):
            return 429, "too many attempts; wait a minute"
        return None

    def too_many_logins(self, scope: Scope) -> bool:
        """Count an attempt to log in; tell whether its address has had more than `MAX_LOGINS` in a minute."""
        now = time.monotonic()
        for address in [name for name, times in self.logins.items() if times[-1] < now - 60]:
            del self.logins[address]
        times = self.logins[scope["client"][0] if scope.get("client") else ""]
        times.append(now)
        while times[0] < now - 60:
            times.popleft()
        return len(times) > MAX_LOGINS


def is_of(origin: str, host: str) -> bool:
    """Tell whether an Origin header names the host of a Host header."""
    try:
        return urlsplit(origin).netloc == host
    except ValueError:
        return False


class BodyTooLargeError(Exception):
    """A request whose body is larger than it said, or than `MAX_BODY`."""


def session_of(scope: Scope) -> str:
    """Return the session or the event that a request listens to; nothing if it listens to none."""
    if scope["method"] != "GET" or not (match := EVENTS.fullmatch(scope["path"].rstrip("/"))):
        return ""
    return match[1] or parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]


def limited(receive: Receive, send: Send) -> tuple[Receive, Send]:
    """Return `receive` that raises BodyTooLargeError past `MAX_BODY` bytes, and `send` that adds `HEADERS`."""
    received = 0

    async def receive_limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY:
            raise BodyTooLargeError
        return message

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return receive_limited, send_with_headers


def with_headers(response: PlainTextResponse) -> PlainTextResponse:
    """Add `HEADERS` to a response of the guard's own."""
    response.headers.update(HEADERS)
    return response


def int_or_zero(text: str | None) -> int:
    """Return a header's number, of at most 18 digits; 0 if it is none."""
    return int(text[:18]) if text and text.isascii() and text.isdigit() else 0
