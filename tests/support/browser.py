"""A real browser, Debian's Chromium, driven by Playwright, and what a visitor does on the chat page."""

import base64
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
BOX, USER, BOT = "#box textarea", ".message.user", ".message.bot"


@contextmanager
def started() -> Iterator[Any]:
    """Start a browser until the end of the block."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def visits(browser: Any) -> Iterator[Callable[..., Any]]:
    """Yield a function that opens a page as a new visitor, and fail where the page met an error of its own.

    With `refused` the browser may say that it refused to load what the page's policy forbids.
    """
    contexts, errors = [], []

    def visit(address: str, locale: str = "zh-CN", width: int = 1280, refused: bool = False, script: str = "") -> Any:
        context = browser.new_context(locale=locale, viewport={"width": width, "height": 800})
        contexts.append(context)
        context.add_init_script(script)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        if not refused:
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        page.wait_for_selector(".placeholder-content, .message")
        playwright.expect(page.locator("#language input:checked")).to_have_count(1)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert errors == []


def let_say(chat: Any, monkeypatch: pytest.MonkeyPatch, text: str, seconds: float = 0.002) -> None:
    """Let the model answer a text, token by token, each of which takes some seconds."""
    token_ids = [*chat.encoder.encode_text(text), chat.tokenizer.eos_token_id]

    def generate(prompts, sampling, streamer, stopping_criteria):
        for token_id in [0, *token_ids]:
            streamer.put(torch.tensor([token_id]))
            time.sleep(seconds)

    monkeypatch.setattr(chat, "generate", generate)


def ask(page: Any, question: str) -> None:
    """Type a question and send it."""
    page.fill(BOX, question)
    page.press(BOX, "Enter")


def wait_for_end(page: Any, num_answers: int = 1) -> None:
    """Wait until the answer has ended and the page has kept it."""
    playwright.expect(page.locator(BOT)).to_have_count(num_answers, timeout=20_000)
    playwright.expect(page.locator("#box .submit-button")).to_be_visible(timeout=20_000)
    page.wait_for_timeout(300)


def exported(page: Any) -> list[dict[str, str]]:
    """Return the messages of the open conversation, as the page would save them."""
    link = page.locator("#export a").get_attribute("href")
    rows = json.loads(base64.b64decode(link.partition("base64,")[2]))
    return rows[0]["messages"] if rows else []
