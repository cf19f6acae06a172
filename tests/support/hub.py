"""A Hugging Face hub on loopback: repositories of models and data sets, storage beside it, and its bad days.

It answers what `huggingface_hub` and `datasets` ask for, in the form of the real one: file names are redirected, small
files to another path of the hub, large ones to signed addresses on another host. What it does not know is noted in
`unknown`. There is no Xet.
"""

import hashlib
import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from urllib.parse import parse_qs, unquote, urlsplit

HOST, STORAGE_HOST = "127.0.0.1", "127.0.0.2"
LARGE_BYTES = 10_000  # from here on a file is kept in the storage, as the hub does from 10 MB or by suffix
PAGE_ENTRIES = 3  # of a tree in one answer; the hub gives 1000
PIECE_BYTES = 16_384
GATED = "Access to this repository is restricted. You must have access to it and be authenticated to access it."


@dataclass
class Repository:
    """Files by path; `gated` asks for the hub's token."""

    files: dict[str, bytes]
    gated: bool = False

    @property
    def commit(self) -> str:
        """Return the hash of the commit that "main" is."""
        content = "".join(f"{path} {etag(data)}\n" for path, data in sorted(self.files.items()))
        return hashlib.sha1(content.encode()).hexdigest()

    def entries(self, folder: str, recursive: bool) -> list[dict] | None:
        """Return what the hub tells of the files and folders below a folder; None if there is no such folder."""
        inside = f"{folder}/" if folder else ""
        paths = [path for path in sorted(self.files) if path.startswith(inside)]
        if folder and not paths:
            return None
        below = {path: path[len(inside) :].split("/") for path in paths}
        folders = {inside + "/".join(parts[:n]) for parts in below.values() for n in range(1, len(parts))}
        shown = [path for path, parts in below.items() if recursive or len(parts) == 1]
        nested = sorted(each for each in folders if recursive or "/" not in each[len(inside) :])
        return [
            *map(self.file_entry, shown),
            *({"type": "directory", "oid": "0" * 40, "size": 0, "path": each} for each in nested),
        ]

    def file_entry(self, path: str) -> dict:
        """Return what the hub tells of a file."""
        data = self.files[path]
        entry = {"type": "file", "oid": git_hash(data), "size": len(data), "path": path}
        if is_large(data):
            entry["lfs"] = {"oid": etag(data), "size": len(data), "pointerSize": 134}
        return entry


@dataclass
class Fault:
    """What happens to requests for paths with a `part`, `times` times: of a status, else after some bytes."""

    part: str
    kind: str  # "status", "cut", "reset" or "stall"
    after: int = 0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    method: str = ""


@dataclass
class Request:
    """A request and what became of it."""

    method: str
    path: str
    start: int = 0  # where the range of bytes that was asked for begins
    status: int = 0
    sent: int = 0  # bytes of a body
    token: str | None = None
    host: str = ""


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(data: bytes) -> bool:
    return len(data) >= LARGE_BYTES


def etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if is_large(data) else git_hash(data)


class Hub:
    """Repositories by "models/owner/name" or "datasets/owner/name", what was asked for, and what shall go wrong."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.unknown: list[str] = []
        self.faults: list[Fault] = []
        self.token = "hf_one_of_mine"
        self.stalls, self.lock = Event(), Lock()
        self.servers: list[ThreadingHTTPServer] = []
        self.ports = {HOST: 0, STORAGE_HOST: 0}

    @property
    def address(self) -> str:
        """Return what HF_ENDPOINT is set to."""
        return f"http://{HOST}:{self.ports[HOST]}"

    def start(self) -> None:
        """Answer, at the same address as before if there was one."""
        self.stalls.clear()
        for host in self.ports:
            handler = type("Handler", (Handler,), {"hub": self, "host": host})
            server = ThreadingHTTPServer((host, self.ports[host]), handler)
            server.daemon_threads = True
            self.ports[host] = server.server_address[1]
            Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            self.servers.append(server)

    def stop(self) -> None:
        """Answer no more: connections are refused."""
        self.stalls.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()
        self.servers.clear()

    def restart(self) -> None:
        """Answer again whoever it was stopped for, and let go of who is kept waiting."""
        self.stalls.set()
        self.stalls.clear()
        if not self.servers:
            self.start()

    def fault_of(self, method: str, path: str) -> Fault | None:
        """Return what shall go wrong with this request, once less from now on."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.part in path and fault.method in ("", method):
                    fault.times -= 1
                    return fault
        return None

    def bodies(self, suffix: str) -> list[Request]:
        """Return the requests that were answered with bytes of a file whose path ends so."""
        return [each for each in self.requests if each.path.endswith(suffix) and each.method == "GET" and each.sent]

    def forget(self) -> None:
        """Forget what was asked for, and what shall go wrong."""
        self.requests.clear(), self.faults.clear(), self.unknown.clear()


class Handler(BaseHTTPRequestHandler):
    """One connection to the hub or to its storage."""

    protocol_version = "HTTP/1.1"
    hub: Hub
    host: str

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.posted = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer()

    def answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.query = parse_qs(url.query)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.request_made = Request(self.command, path, token=token, host=self.host)
        self.hub.requests.append(self.request_made)
        self.fault = self.hub.fault_of(self.command, path)
        if self.fault and self.fault.kind == "stall" and not self.fault.after:
            self.hub.stalls.wait(120)
            self.close_connection = True
        elif self.fault and self.fault.kind == "status":
            self.refuse(self.fault.status, "", "", self.fault.headers)
        elif url.netloc:  # a request to another host, by way of this one as a proxy
            self.not_known()
        elif self.host == STORAGE_HOST:
            self.store(path)
        else:
            self.route(path)

    def route(self, path: str) -> None:
        parts = path.strip("/").split("/")
        if path in ("/", ""):
            self.send(200, b"a hub", {"Content-Type": "text/html"})
        elif parts[0] == "api" and parts[1:2] == ["resolve-cache"]:
            self.small_file(parts)
        elif parts[0] == "api" and parts[1] in ("models", "datasets") and len(parts) >= 4:
            self.api("/".join(parts[1:4]), parts[4:])
        elif "resolve" in parts:
            kind, *parts = parts if parts[0] == "datasets" else ["models", *parts]
            if parts[2:3] == ["resolve"]:
                self.resolve("/".join((kind, *parts[:2])), parts[3], "/".join(parts[4:]))
            else:
                self.not_known()
        else:
            self.not_known()

    def not_known(self) -> None:
        self.hub.unknown.append(f"{self.command} {self.path}")
        self.refuse(404, "", "Not Found")

    def repository(self, name: str, revision: str = "main") -> Repository | None:
        """Return a repository that may be read; else refuse, as the hub does, and return None."""
        repository = self.hub.repositories.get(name)
        has_token = self.request_made.token == self.hub.token
        if repository is None:
            if has_token:
                self.refuse(404, "RepoNotFound", "Repository not found")
            else:  # the hub does not tell strangers which repositories are private
                self.refuse(401, "", "Invalid username or password.")
            return None
        if revision not in ("main", repository.commit):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository

    def api(self, name: str, parts: list[str]) -> None:
        what, revision, folder = parts[0] if parts else "revision", (parts[1:2] or ["main"])[0], "/".join(parts[2:])
        repository = self.repository(name, revision)
        if repository is None:
            return
        if what == "revision" and not folder:
            self.info(name, repository)
        elif what == "tree":
            self.tree(repository, folder)
        elif what == "paths-info" and self.command == "POST":
            paths = parse_qs(self.posted.decode())["paths"]
            self.send_json([repository.file_entry(path) for path in paths if path in repository.files])
        else:
            self.not_known()

    def info(self, name: str, repository: Repository) -> None:
        about = {"id": name.partition("/")[2], "sha": repository.commit, "private": False, "disabled": False}
        about |= {"gated": "auto" if repository.gated else False, "tags": [], "downloads": 1, "likes": 1}
        self.send_json(about | {"siblings": [{"rfilename": path} for path in sorted(repository.files)]})

    def tree(self, repository: Repository, folder: str) -> None:
        entries = repository.entries(folder, self.query.get("recursive", ["false"])[0].lower() in ("true", "1"))
        if entries is None:
            self.refuse(404, "EntryNotFound", f"{folder} does not exist on main")
            return
        begin = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if len(entries) > begin + PAGE_ENTRIES:
            kept = "&".join(f"{key}={value[0]}" for key, value in self.query.items() if key != "cursor")
            url = f"{self.hub.address}{urlsplit(self.path).path}?{kept}&cursor={begin + PAGE_ENTRIES}"
            headers["Link"] = f'<{url}>; rel="next"'
        self.send_json(entries[begin : begin + PAGE_ENTRIES], headers)

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.repository(name, revision)
        if repository is None:
            return
        headers = {"X-Repo-Commit": repository.commit}
        if repository.gated and self.request_made.token != self.hub.token and path != "README.md":
            self.refuse(401, "GatedRepo", GATED, headers)
        elif path not in repository.files:
            self.refuse(404, "EntryNotFound", "Entry not found", headers)
        elif is_large(data := repository.files[path]):
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{etag(data)}"'}
            storage = f"http://{STORAGE_HOST}:{self.hub.ports[STORAGE_HOST]}/{name}/{path}"
            self.send(302, b"Found.", headers | {"Location": f"{storage}?Signature=s"})
        else:
            to = f"/api/resolve-cache/{name}/{repository.commit}/{path}"
            self.send(307, b"Temporary Redirect.", headers | {"Location": to})

    def small_file(self, parts: list[str]) -> None:
        repository = self.hub.repositories["/".join(parts[2:5])]
        data = repository.files["/".join(parts[6:])]
        self.send_file(data, {"X-Repo-Commit": repository.commit})

    def store(self, path: str) -> None:
        name, path = "/".join(path.split("/")[1:4]), "/".join(path.split("/")[4:])
        if self.query.get("Signature") != ["s"] or self.request_made.token:
            self.refuse(403, "", "The request has no signature, or a token that is not for this host")
        else:
            shown_as = {"Content-Disposition": f'inline; filename="{path.split("/")[-1]}";'}
            self.send_file(self.hub.repositories[name].files[path], shown_as)

    def send_file(self, data: bytes, headers: dict[str, str] | None = None) -> None:
        headers = {"ETag": f'"{etag(data)}"', "Accept-Ranges": "bytes", **(headers or {})}
        if not (asked := self.headers.get("Range")):
            self.send(200, data, headers)
            return
        begin, _, end = asked.removeprefix("bytes=").partition("-")
        begin, end = int(begin), min(int(end or len(data)), len(data) - 1)
        self.request_made.start = begin
        if begin >= len(data):
            self.send(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
        else:
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            self.send(206, data[begin : end + 1], headers)

    def refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        headers = dict(headers or {})
        if code:
            headers["X-Error-Code"] = code
        if message:
            headers["X-Error-Message"] = message
        self.send_json({"error": message or "Error"}, headers, status)

    def send_json(self, value: object, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.request_made.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = self.fault if status in (200, 206) else None
        end = fault.after if fault else len(body)
        with suppress(ConnectionError):
            for begin in range(0, min(end, len(body)), PIECE_BYTES):
                piece = body[begin : min(begin + PIECE_BYTES, end)]
                self.wfile.write(piece)
                self.request_made.sent += len(piece)
        if fault:
            self.break_off(fault.kind)

    def break_off(self, kind: str) -> None:
        self.wfile.flush()
        self.close_connection = True
        if kind == "stall":
            self.hub.stalls.wait(120)
        elif kind == "reset":
            time.sleep(0.1)  # so that what was sent is read first
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve an empty hub until the end of the block."""
    hub = Hub()
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()
