"""The hub on loopback as the one that this process asks, without the pauses between its tries."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import close_session, constants, file_download, set_client_factory
from huggingface_hub.utils import _http

from sft import network
from support.hub import Hub


def ask_here(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process ask a hub, store in `cache`, and wait for a second at most, until the end of a test."""
    template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    limits = {"HF_HUB_ETAG_TIMEOUT": 1, "HF_HUB_DOWNLOAD_TIMEOUT": 1}
    settings = {"ENDPOINT": hub.address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False, **limits}
    settings |= {"HF_HUB_CACHE": str(cache), "DOWNLOAD_CHUNK_SIZE": constants.DOWNLOAD_CHUNK_SIZE}
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    at_once = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr(file_download, "time", at_once)
    monkeypatch.setattr(_http, "time", at_once)
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)
    close_session()
    assert network.hindrance() is None


def ask_no_more() -> None:
    """Forget the client of a hub that is gone."""
    set_client_factory(_http.default_client_factory)
