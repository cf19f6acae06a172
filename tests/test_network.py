"""The hub's bad days: a download goes on where it was cut, nothing waits forever, and each is told in one line."""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from sft import network
from support.disks import small_disk
from support.hub import Fault, Hub, Repository
from support.hub_here import ask_here, ask_no_more

NAME, FILE = "somebody/big", "model.safetensors"
CONTENT = random.Random(5).randbytes(1_000_000)


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Return a hub of one model that this process asks."""
    hub.repositories[f"models/{NAME}"] = Repository({FILE: CONTENT, "config.json": b"{}"})
    ask_here(hub, tmp_path / "cache", monkeypatch)
    yield hub
    ask_no_more()


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["cut", "reset", "stall"])
def test_a_download_goes_on_from_where_it_was_broken_off(here: Hub, kind: str):
    here.faults.append(Fault(FILE, kind, after=700_000, method="GET"))
    assert digest(hf_hub_download(NAME, FILE)) == hashlib.sha256(CONTENT).hexdigest()
    first, second = here.bodies(FILE)
    assert first.start == 0 and 700_000 - network.CHUNK_BYTES <= second.start <= 700_000


def test_a_line_that_is_cut_every_200_kb_brings_the_file_in_the_end(here: Hub):
    here.faults.append(Fault(FILE, "cut", after=200_000, method="GET", times=100))
    assert digest(hf_hub_download(NAME, FILE)) == hashlib.sha256(CONTENT).hexdigest()
    assert len(here.bodies(FILE)) >= 5


def test_a_download_that_is_lost_for_good_leaves_nothing_that_looks_like_the_file(here: Hub, tmp_path: Path):
    here.faults.append(Fault(FILE, "cut", after=20_000, method="GET", times=100))
    with pytest.raises(httpx.RemoteProtocolError) as caught:
        hf_hub_download(NAME, FILE)
    why, remedy = network.trouble(caught.value, [tmp_path])
    assert why.startswith("the connection broke off (peer closed connection")
    assert remedy == "type the same command again, or set HF_ENDPOINT to a mirror"
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1000] == []


def test_a_hub_that_falls_silent_is_not_waited_for_forever(here: Hub, tmp_path: Path):
    here.faults.append(Fault(NAME, "stall", times=9))
    with pytest.raises(httpx.TimeoutException) as caught:
        HfApi().model_info(NAME)
    assert network.trouble(caught.value, [tmp_path])[0] == "the connection stalled"
    assert network.answers(here.address) and not network.answers(f"{here.address}/{NAME}")


LOGIN = "type hf auth login or set HF_TOKEN to your token"
MIRROR = "type the same command again later, or set HF_ENDPOINT to a mirror"
LIMIT = {"ratelimit": '"api";r=0;t=37', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}


@pytest.mark.parametrize(
    ("status", "headers", "why", "remedy"),
    [
        (429, LIMIT, "too many requests (429)", "wait 37 seconds, then type the same command again; "),
        (429, {"Retry-After": "9"}, "too many requests (429)", "wait 9 seconds, then "),
        (429, {}, "too many requests (429)", "wait some minutes, then "),
        (401, {"X-Error-Code": "GatedRepo"}, "only those who have accepted its terms may read it", "accept them on "),
        (403, {"X-Error-Code": "GatedRepo"}, "only those who have accepted its terms may read it", "accept them on "),
        (401, {}, "there is none of this name, or it is private", f"correct the name, or, if it is private, {LOGIN}"),
        (404, {"X-Error-Code": "RepoNotFound"}, "there is none of this name, or it is private", "correct the name, "),
        (404, {"X-Error-Code": "EntryNotFound"}, "it has no config.json", "choose another one"),
        (503, {}, "the hub answers with an error (503)", MIRROR),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_type(
    here: Hub, tmp_path: Path, status: int, headers: dict[str, str], why: str, remedy: str
):
    here.faults.append(Fault("config.json", "status", status=status, headers=headers, times=9))
    with pytest.raises((HfHubHTTPError, OSError)) as caught:
        hf_hub_download(NAME, "config.json")
    said, to_type = network.trouble(caught.value, [tmp_path])
    assert said == why and to_type.startswith(remedy)


def test_a_token_that_is_wrong_is_told_from_a_name_that_is(here: Hub, tmp_path: Path):
    del here.repositories[f"models/{NAME}"]
    with pytest.raises(HfHubHTTPError) as caught:
        hf_hub_download(NAME, FILE, token="hf_of_yesterday")
    assert network.trouble(caught.value, [tmp_path]) == (
        "your token is not accepted (401)",
        "type hf auth login, or correct HF_TOKEN",
    )


def test_a_token_goes_to_the_hub_and_not_to_its_storage(here: Hub):
    here.repositories[f"models/{NAME}"].gated = True
    assert digest(hf_hub_download(NAME, FILE, token=here.token)) == hashlib.sha256(CONTENT).hexdigest()
    tokens = {request.host: request.token for request in here.requests if request.path.endswith(FILE)}
    assert tokens == {"127.0.0.1": here.token, "127.0.0.2": None}


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(here: Hub, tmp_path: Path):
    with small_disk(tmp_path / "disk", "512k") as disk:
        with pytest.raises(UserWarning) as caught:
            hf_hub_download(NAME, FILE, cache_dir=str(disk))
        why, remedy = network.trouble(caught.value, [tmp_path, disk / "not there yet"])
    assert why.startswith(f"the disk of {disk}/not there yet is too full (The expected file size is: 1.00 MB. The")
    assert remedy == "free space there, or set HF_HOME to another disk's folder"
    assert here.bodies(FILE) == []


def test_other_errors_are_not_the_networks(tmp_path: Path):
    try:
        try:
            raise httpx.ReadError("lost")
        except httpx.ReadError:
            raise ValueError("5 is no name") from None
    except ValueError as error:
        assert network.trouble(error, [tmp_path]) is None
    assert network.trouble(None, [tmp_path]) is None


def test_nothing_is_asked_where_the_user_forbids_it(here: Hub, monkeypatch: pytest.MonkeyPatch):
    here.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert network.hindrance() == ("HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
    assert here.requests == []


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:9", "socks5://127.0.0.1:9", "ftp://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_is_told_with_what_to_set(monkeypatch: pytest.MonkeyPatch, proxy: str):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("ALL_PROXY", proxy)
    for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    why, remedy = network.hindrance()
    assert why.startswith("a proxy cannot be used (") and "HTTPS_PROXY" in remedy
