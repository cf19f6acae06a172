"""Load checkpoints and serve app.py's chat page, to this machine only or to anyone with a password."""

from __future__ import annotations

import argparse
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

from sft.chat.load import is_address, load_chat
from sft.program import UserError

if TYPE_CHECKING:
    from sft.chat.model import ChatModel
    from sft.chat.remote import RemoteModel
    from sft.web.guard import Listeners
    from sft.web.page import ChatPage

LOCAL, EVERYWHERE = "127.0.0.1", "0.0.0.0"
# Serve in background threads and without whatever the page does not use; keep the state of 200 pages at most.
LAUNCH = {"prevent_thread_lock": True, "quiet": True, "state_session_capacity": 200, "max_file_size": 0}
LAUNCH |= {"footer_links": [], "run_history": False, "enable_monitoring": False, "ssr_mode": False, "pwa": False}


def serve(arguments: argparse.Namespace, names: Sequence[tuple[str, str]]) -> None:
    """Load the checkpoints of app.py's `arguments` and serve until interrupted; `names` are (user, password).

    The model's libraries take three seconds to import and Gradio's another three: each is imported when it is needed,
    so that a mistake is reported without them.
    """
    host = EVERYWHERE if arguments.listen else LOCAL
    check_port(host, arguments.port)
    checkpoints = [each for each in (arguments.server or arguments.checkpoint, arguments.compare) if each]
    chats = load(checkpoints, arguments)
    leave_out_proxies(arguments.share or any(map(is_address, checkpoints)))
    page, listeners = build_page(chats, checkpoints, arguments)
    for checkpoint, chat in zip(checkpoints, chats, strict=True):
        print(f"{checkpoint}: {chat}")
    if page.answering.line.at_once == 1:
        print("one question is answered at a time; for many visitors start a server that batches and type --server")
    signal.signal(signal.SIGINT, leave)
    launch(page, listeners, host, arguments.port, list(names), arguments.share)
    print(f"http://{LOCAL}:{arguments.port} (Ctrl-C to stop)", flush=True)
    page.blocks.block_thread()


def leave(signal_number: int, frame: FrameType | None) -> NoReturn:
    """End at Ctrl-C: a reply in progress, or a waiting thread of Gradio's, would keep the process alive.

    A KeyboardInterrupt would be lost where it meets the deletion of an object.
    """
    os._exit(0)


def load(checkpoints: Sequence[str], arguments: argparse.Namespace) -> list[ChatModel | RemoteModel]:
    """Load checkpoints, after finding all of them; raise UserError if one cannot be found or loaded.

    They answer at the same time, so all use as many threads as the one that needs most.
    """
    from sft.model.download import locate

    for each in checkpoints:
        if not is_address(each):
            locate(each)
    first = next(filter(is_address, checkpoints), None)  # --model names one of its models
    given = {"device": arguments.device, "quantization": arguments.quantize}
    given["uses_template"] = arguments.server_template == "True"
    chats = [load_chat(each, **given, model=arguments.model if each == first else None) for each in checkpoints]
    most = max(getattr(chat, "num_threads", 1) for chat in chats)
    for chat in chats:
        chat.num_threads = most
    return chats


def build_page(
    chats: Sequence[ChatModel | RemoteModel], checkpoints: Sequence[str], arguments: argparse.Namespace
) -> tuple[ChatPage, Listeners]:
    """Return the page of loaded checkpoints within app.py's limits, and what tells who listens to it."""
    from sft.web.answering import Answering, Limits
    from sft.web.guard import Listeners
    from sft.web.page import ChatPage
    from sft.web.visitors import WaitingLine

    listeners = Listeners()
    at_once = arguments.concurrent if all(chat.batches for chat in chats) else 1
    line = WaitingLine(arguments.max_waiting, arguments.requests_per_minute, at_once=at_once)
    limits = Limits(arguments.max_characters, max_new_tokens=arguments.max_new_tokens)
    answering = Answering(chats, line, limits, listeners.is_gone)
    return ChatPage(answering, [label_of(*each) for each in zip(checkpoints, chats, strict=True)]), listeners


def label_of(checkpoint: str, chat: ChatModel | RemoteModel) -> str:
    """Return what the page calls a checkpoint: its folder's name, or a server's model and host."""
    if not is_address(checkpoint):
        return Path(checkpoint).name
    return f"{Path(chat.name).name} ({urlsplit(checkpoint).netloc})"


def leave_out_proxies(share: bool) -> None:
    """Let Gradio reach this machine's own page whatever proxy is set; only --share needs others, through the proxy."""
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{os.environ.get('no_proxy', '')},{LOCAL},localhost"
    for name in ("http_proxy", "https_proxy", "all_proxy") if not share else ():
        os.environ.pop(name, None), os.environ.pop(name.upper(), None)


def check_port(host: str, port: int) -> None:
    """Raise UserError if a port cannot be used, before any weights are loaded."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(f"--port {port} cannot be used ({error.strerror}); choose another port") from None


def launch(
    page: ChatPage,
    listeners: Listeners,
    host: str = LOCAL,
    port: int | None = None,
    names: list[tuple[str, str]] | None = None,
    share: bool = False,
) -> str:
    """Serve a page in background threads and return its address; raise UserError if the port cannot be used."""
    import gradio as gr
    from starlette.middleware import Middleware

    from sft.web.guard import Guard
    from sft.web.page import CSS, FONTS, HEAD

    # The address in a request's own headers is not trusted unless the user sets this for a proxy of theirs.
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "")
    guard = Middleware(Guard, listeners=listeners, any_host=bool(names))
    theme = gr.themes.Soft(font=FONTS, font_mono=["ui-monospace", "Consolas", "monospace"])
    try:
        _, address, _ = page.blocks.queue(max_size=None, api_open=False).launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=names or None,
            max_threads=page.answering.line.max_waiting + 40,
            app_kwargs={"middleware": [guard]},
            **LAUNCH,
            theme=theme,
            css=CSS,
            head=HEAD,
        )
    except OSError as error:
        raise UserError(f"--port {port} cannot be used ({error}); choose another port") from None
    return address
