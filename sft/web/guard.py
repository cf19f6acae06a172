"""What stands between a browser and Gradio: only this page's routes, small requests, and headers that keep a model's
text from running scripts, loading anything from elsewhere, or being framed by another page.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

from gradio.route_utils import FnIndexInferError
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sft.web.visitors import RateLimit

MAX_BODY = 4_000_000  # bytes; a full store of a browser takes about a million
TOO_LARGE = 413, f"the request is larger than {MAX_BODY:,} bytes"
MAX_PATH = 200  # characters
GRACE = 5.0  # seconds without a listener after which a session counts as gone
MAX_SILENT = 10_000  # sessions for which the start of their silence is kept
MAX_LOGINS = 10  # attempts, wrong or right, per address and minute
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
API = "/gradio_api"
EVENTS = re.compile(rf"{API}/(?:queue/data|call/(?:v2/)?chat/(\w+))")
GET_ROUTES = re.compile(
    rf"/|/(?:assets|static|svelte)/[\w./@-]+|/(?:theme\.css|favicon\.ico|manifest\.json|robots\.txt|config|login_check|"
    rf"logout)/?|{API}/(?:info|openapi\.json|queue/data|app_id|user|token|login_check|startup-events|theme\.css|"
    rf"heartbeat/\w+|call/(?:v2/)?chat/\w+)/?"
)
POST_ROUTES = re.compile(rf"/login/?|{API}/(?:queue/join|cancel|reset|run/predict|call/(?:v2/)?chat)/?")
ROUTES = {"GET": GET_ROUTES, "HEAD": GET_ROUTES, "POST": POST_ROUTES}
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
    """Which sessions have an open connection on which they receive their events."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """Begin with nobody; `clock` returns seconds."""
        self.clock = clock
        self.open: dict[str, int] = defaultdict(int)
        self.silent_since: dict[str, float] = {}

    def opened(self, session: str) -> None:
        """Count a connection that opens."""
        self.open[session] += 1
        self.silent_since.pop(session, None)

    def closed(self, session: str) -> None:
        """Count a connection that closes."""
        self.open[session] -= 1
        if self.open[session] <= 0:
            del self.open[session]

    def is_gone(self, *sessions: str) -> bool:
        """Tell whether none of the sessions has had a connection for `GRACE` seconds, counted from the first call."""
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
        """Guard `app`; without `any_host`, answer only requests to this machine's own names.

        Otherwise a page elsewhere could point its own name to 127.0.0.1 and read from here (DNS rebinding).
        """
        self.app = app
        self.listeners = listeners
        self.any_host = any_host
        self.logins = RateLimit(MAX_LOGINS, listeners.clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":  # the page has no websocket
            return
        if refusal := self.refusal(scope):
            await respond(refusal, scope, receive, send)
            return
        session = session_of(scope)
        if session:
            self.listeners.opened(session)
        try:
            await self.app(scope, *limited(receive, send))
        except BodyTooLargeError:
            await respond(TOO_LARGE, scope, receive, send)
        except (FnIndexInferError, KeyError):  # Gradio's, for an event that the page does not have
            await respond((404, "no such event"), scope, receive, send)
        finally:
            if session:
                self.listeners.closed(session)

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return the status and the text with which a request is refused; None lets it through."""
        headers, path, method = Headers(scope=scope), scope["path"], scope["method"]
        host = headers.get("host", "")
        if not self.any_host and re.sub(r":\d+$", "", host) not in LOCAL_HOSTS:
            return 421, "this page answers only on 127.0.0.1 and localhost"
        if method not in ROUTES:
            return 405, "only GET and POST are allowed"
        if not is_route(method, path):
            return 404, "no such page"
        if method == "POST" and "origin" in headers and not is_of(headers["origin"], host):
            return 403, "requests from other pages are refused"
        if int_or_zero(headers.get("content-length")) > MAX_BODY:
            return TOO_LARGE
        if method == "POST" and path.startswith("/login") and self.logins.take(address_of(scope)):
            return 429, "too many attempts; try again in a minute"
        return None


def is_route(method: str, path: str) -> bool:
    """Tell whether a path is one of the page's, and leads nowhere else."""
    leads_elsewhere = len(path) > MAX_PATH or ".." in path or any(character in path for character in "\\\0\r\n")
    return bool(ROUTES[method].fullmatch(path)) and not leads_elsewhere


def address_of(scope: Scope) -> str:
    """Return the address that a request comes from."""
    return scope["client"][0] if scope.get("client") else ""


def is_of(origin: str, host: str) -> bool:
    """Tell whether an Origin header names the host of a Host header."""
    try:
        return urlsplit(origin).netloc == host
    except ValueError:
        return False


class BodyTooLargeError(Exception):
    """A request whose body is larger than `MAX_BODY`, whatever it announced."""


def session_of(scope: Scope) -> str:
    """Return the session or the event that a request listens to; empty if it listens to none."""
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


async def respond(answer: tuple[int, str], scope: Scope, receive: Receive, send: Send) -> None:
    """Send a response of the guard's own: status and text, with `HEADERS`."""
    status, text = answer
    await PlainTextResponse(text, status, HEADERS)(scope, receive, send)


def int_or_zero(text: str | None) -> int:
    """Return a header's number, cut to 18 digits; 0 if it is not a number."""
    return int(text[:18]) if text and text.isascii() and text.isdigit() else 0
