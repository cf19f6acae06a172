"""Load checkpoints and serve the chat page of app.py, on this machine or to those who know a password."""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from sft.chat.model import ChatModel
from sft.model.load import locate
from sft.program import UserError
from sft.web.answering import Answering, Limits
from sft.web.guard import Guard, Listeners
from sft.web.page import CSS, FONTS, HEAD, ChatPage
from sft.web.visitors import WaitingLine

LOCAL, EVERYWHERE = "127.0.0.1", "0.0.0.0"
MAX_SESSIONS = 200  # pages of which Gradio remembers what they show


def serve(arguments: argparse.Namespace, names: Sequence[tuple[str, str]]) -> None:
    """Load what `arguments` of app.py name and serve it until interrupted; `names` are (user, password) pairs."""
    host = EVERYWHERE if arguments.listen else LOCAL
    check_port(host, arguments.port)
    checkpoints = [arguments.checkpoint, *([arguments.compare] if arguments.compare else [])]
    for each in checkpoints:  # a mistake in the second is told before the first is loaded
        locate(each)
    chats = [ChatModel.load(each, arguments.device, quantization=arguments.quantize) for each in checkpoints]
    listeners = Listeners()
    line = WaitingLine(arguments.max_waiting, arguments.requests_per_minute)
    limits = Limits(arguments.max_characters, max_new_tokens=arguments.max_new_tokens)
    page = ChatPage(Answering(chats, line, limits, listeners.is_gone), [Path(each).name for each in checkpoints])
    for checkpoint, chat in zip(checkpoints, chats, strict=True):
        print(f"{checkpoint}: {chat}")
    print(f"http://{LOCAL}:{arguments.port} (Ctrl-C ends)", flush=True)
    launch(page, listeners, host, arguments.port, list(names), arguments.share)
    try:
        page.blocks.block_thread()
    finally:
        # A reply that is being generated, or a thread of Gradio's that waits, would keep the process.
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


def check_port(host: str, port: int) -> None:
    """Raise UserError if a port cannot be listened on, before weights are loaded."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(f"--port {port} cannot be used ({error.strerror}); give another") from None


def launch(
    page: ChatPage,
    listeners: Listeners,
    host: str = LOCAL,
    port: int | None = None,
    names: list[tuple[str, str]] | None = None,
    share: bool = False,
) -> str:
    """Serve a page in threads of its own; return its address. Raises UserError if that cannot be."""
    # Without a proxy of the user's own, the address that a request gives of itself is not believed.
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "")
    guard = Middleware(Guard, listeners=listeners, any_host=bool(names))
    theme = gr.themes.Soft(font=FONTS, font_mono=["ui-monospace", "Consolas", "monospace"])
    try:
        _, address, _ = page.blocks.queue(max_size=None, api_open=False).launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=names or None,
            prevent_thread_lock=True,
            quiet=True,
            max_threads=page.answering.line.max_waiting + 40,
            app_kwargs={"middleware": [guard]},
            state_session_capacity=MAX_SESSIONS,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            theme=theme,
            css=CSS,
            head=HEAD,
            max_file_size=0,
        )
    except OSError as error:
        raise UserError(f"--port {port} cannot be used ({error}); give another") from None
    return address
