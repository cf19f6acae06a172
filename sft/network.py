"""The Hugging Face hub: whether it can be asked, how patiently, and what goes wrong between it and the disk."""

import errno
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants, set_client_factory
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RemoteEntryNotFoundError
from huggingface_hub.utils import httpx
from huggingface_hub.utils._http import default_client_factory, parse_ratelimit_headers

from sft.program import one_line

CHUNK_BYTES = 2**17  # what is lost where a connection is cut; huggingface_hub's 10 MiB may never be reached
NO_ROOM = "Not enough free disk space to download the file"  # huggingface_hub's warning
AGAIN = "type the same command again"
LOGIN = "type hf auth login or set HF_TOKEN to your token"
GATED = "only those who have accepted its terms may read it", f"accept them on its page at huggingface.co, then {LOGIN}"
MISSING = "there is none of this name, or it is private", f"correct the name, or, if it is private, {LOGIN}"


def hindrance() -> tuple[str, str] | None:
    """Return why the hub cannot be asked and what to type, or None if it can.

    From then on a request neither waits forever nor begins again where a connection was reset.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
    try:
        is_there = answers(constants.ENDPOINT)
    except (ValueError, ImportError) as error:  # httpx's, of a proxy's scheme and of a package that SOCKS takes
        return f"a proxy cannot be used ({one_line(error)})", "unset ALL_PROXY and set HTTPS_PROXY to http://HOST:PORT"
    if not is_there:
        return f"{constants.ENDPOINT} cannot be reached", "set HF_ENDPOINT to a mirror"
    # The warning comes before the first byte, and the download would go on until the disk is full.
    warnings.filterwarnings("error", NO_ROOM)
    set_client_factory(_patient_client)
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
    return None


def answers(endpoint: str) -> bool:
    """Tell whether there is an answer from a URL, of whatever kind."""
    try:
        httpx.head(endpoint, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return True


def _patient_client() -> httpx.Client:
    client = default_client_factory()
    hooks = client.event_hooks
    client.event_hooks = {
        "request": [*hooks["request"], _limit_waiting],
        "response": [*hooks["response"], _let_resets_be_resumed],
    }
    return client


def _limit_waiting(request: httpx.Request) -> None:
    most = max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT)
    limits = request.extensions.get("timeout") or {}
    kinds = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {kind: min(limits.get(kind) or most, most) for kind in kinds}


def _let_resets_be_resumed(response: httpx.Response) -> None:
    response.stream = _ResumableBody(response.stream)


class _ResumableBody(httpx.SyncByteStream):
    """A body that ends with the error of a closed connection where one is reset: huggingface_hub resumes after it."""

    def __init__(self, body: httpx.SyncByteStream):
        self.body = body

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self.body
        except httpx.ReadError as error:
            raise httpx.RemoteProtocolError(str(error) or "the connection was reset") from error

    def close(self) -> None:
        self.body.close()


def trouble(error: BaseException | None, folders: Sequence[str | Path]) -> tuple[str, str] | None:
    """Return what went wrong between the hub and the disk of `folders`, and what to type; None if nothing did."""
    for cause in causes(error):
        if isinstance(cause, UserWarning) and str(cause).startswith(NO_ROOM):
            return _no_room(folders, str(cause).removeprefix(NO_ROOM).strip(". "))
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return _no_room(folders, cause.strerror)
        if isinstance(cause, HfHubHTTPError):
            return _refusal(cause)
        if isinstance(cause, httpx.TimeoutException):
            return "the connection stalled", f"{AGAIN}, or set HF_ENDPOINT to a mirror"
        if isinstance(cause, httpx.TransportError):
            return f"the connection broke off ({cause})", f"{AGAIN}, or set HF_ENDPOINT to a mirror"
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it, the latest first."""
    seen = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def check_room(folder: str | Path, num_bytes: int) -> None:
    """Raise OSError if so many bytes do not fit on the disk of a folder."""
    if (free := _free_bytes(Path(folder))) < num_bytes:
        raise OSError(errno.ENOSPC, f"{num_bytes / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB free")


def _no_room(folders: Sequence[str | Path], detail: str) -> tuple[str, str]:
    free = {str(folder): _free_bytes(Path(folder)) for folder in folders}
    fullest = min(free, key=free.get)
    return f"the disk of {fullest} is too full ({detail})", "free space there, or set HF_HOME to another disk's folder"


def _free_bytes(folder: Path) -> int:
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return shutil.disk_usage(there).free


def _refusal(error: HfHubHTTPError) -> tuple[str, str]:
    """Return what an answer of the hub that is no success means, and what to type."""
    status, headers = error.response.status_code, error.response.headers
    if isinstance(error, GatedRepoError):
        return GATED
    if isinstance(error, RemoteEntryNotFoundError):
        return f"it has no {Path(urlsplit(str(error.response.url)).path).name}", "choose another one"
    if status in (401, 403) and error.response.request.headers.get("authorization"):
        return f"your token is not accepted ({status})", "type hf auth login, or correct HF_TOKEN"
    if status in (401, 403, 404):
        return MISSING
    if status == 429:
        limit = parse_ratelimit_headers(headers)
        seconds = limit.reset_in_seconds if limit else headers.get("retry-after")
        wait = f"wait {seconds} seconds" if seconds else "wait some minutes"
        return "too many requests (429)", f"{wait}, then {AGAIN}; HF_TOKEN with your token raises the limit"
    return f"the hub answers with an error ({status})", f"{AGAIN} later, or set HF_ENDPOINT to a mirror"
