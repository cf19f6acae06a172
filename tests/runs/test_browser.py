"""The chat page in a real browser."""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sft.chat.model import ChatModel
from sft.chat.sampling import Sampling
from sft.data.formats import read_samples
from sft.prompts import build_prompt
from sft.web.texts import TEXTS
from support.browser import (
    BOT,
    BOX,
    USER,
    ask,
    exported,
    let_say,
    needs_chromium,
    playwright,
    started,
    visits,
    wait_for_end,
)
from support.serving import Served, served

pytestmark = needs_chromium
QUESTION, SECOND = "写一首诗。", "再短一点。"


@pytest.fixture(scope="module")
def page_served(make_model: Callable[[str], Path]) -> Iterator[Served]:
    with served(make_model("bloom-tiny")) as page_served:
        yield page_served


@pytest.fixture
def chat(page_served: Served) -> ChatModel:
    return page_served.chat


@pytest.fixture
def address(page_served: Served) -> str:
    return page_served.address


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with started() as browser:
        yield browser


@pytest.fixture
def visit(browser: playwright.Browser) -> Iterator[Callable[..., playwright.Page]]:
    with visits(browser) as visit:
        yield visit


@pytest.fixture
def slow(chat: ChatModel) -> Iterator[list[float]]:
    """Let every token of the model take 30 ms; the times of its forwards."""
    forwards: list[float] = []

    def wait(*_) -> None:
        forwards.append(time.monotonic())
        time.sleep(0.03)

    handle = chat.model.register_forward_hook(wait)
    yield forwards
    handle.remove()


@pytest.fixture
def prompts(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that the model is asked from now on."""
    asked: list[str] = []
    generate = chat.generate

    def watched(prompts, *rest, **named):
        asked.extend(chat.tokenizer.decode(prompt) for prompt in prompts)
        return generate(prompts, *rest, **named)

    monkeypatch.setattr(chat, "generate", watched)
    return asked


def set_number(page: playwright.Page, name: str, value: float) -> None:
    """Set a number of the settings, which are opened for it."""
    number = page.locator(f"#{name} input[type=number]")
    if not number.is_visible():
        page.locator("#settings > button").click()
        # Settings that have just opened take their words, and with them their first values once more.
        playwright.expect(page.locator("#max_new_tokens")).to_contain_text("token")
        page.wait_for_timeout(500)
    number.fill(str(value))
    number.press("Tab")  # only now is it sent
    playwright.expect(page.locator(f"#{name} input[type=range]")).to_have_value(str(value))


def set_longest(page: playwright.Page, num_tokens: int) -> None:
    """Set the longest answer."""
    set_number(page, "max_new_tokens", num_tokens)


def roles_and_questions(page: playwright.Page) -> tuple[list[str], list[str]]:
    messages = exported(page)
    return [each["role"] for each in messages], [each["content"] for each in messages if each["role"] == "user"]


def test_text_arrives_before_it_is_complete_and_is_the_models(
    chat: ChatModel, address: str, visit: Callable, slow: list[float]
):
    page = visit(address)
    set_number(page, "temperature", 0)
    set_longest(page, 40)
    ask(page, QUESTION)
    page.wait_for_selector(BOT)
    seen = []
    while not page.locator("#box .submit-button").is_visible():
        seen.append(page.locator(BOT).inner_text())
        page.wait_for_timeout(50)
    wait_for_end(page)
    lengths = [len(text) for text in seen]
    assert len(set(lengths)) > 3 and lengths[:-3] == sorted(lengths[:-3])
    expected = chat.answer([build_prompt(QUESTION)], Sampling(40, temperature=0))[0]
    assert exported(page)[1] == {"role": "assistant", "content": expected}
    assert "40 个 token" in page.inner_text("#status")


def test_stop_ends_the_generation_and_keeps_what_there_is(address: str, visit: Callable, slow: list[float]):
    page = visit(address)
    set_longest(page, 1000)
    ask(page, QUESTION)
    playwright.expect(page.locator(BOT)).to_have_text(re.compile(".{20}", re.DOTALL))
    playwright.expect(page.locator("#conversations input")).to_be_disabled()  # it would change what is written to
    page.locator("#box .stop-button").click()
    clicked = time.monotonic()
    wait_for_end(page)
    playwright.expect(page.locator("#conversations input")).to_be_enabled()
    after = len([moment for moment in slow if moment > clicked])
    time.sleep(0.5)
    assert len([moment for moment in slow if moment > clicked]) == after <= 12
    assert len(slow) < 1000
    assert "已停止" in page.inner_text("#status")
    assert roles_and_questions(page) == (["user", "assistant"], [QUESTION])
    assert len(exported(page)[1]["content"]) > 10
    print(f"{after} tokens from the click to the end, its way to the server among them")


def test_second_turn_sees_the_first(address: str, visit: Callable, prompts: list[str]):
    page = visit(address)
    set_longest(page, 8)
    ask(page, QUESTION)
    wait_for_end(page)
    [_, first] = exported(page)
    ask(page, SECOND)
    wait_for_end(page, 2)
    assert f"Human:{QUESTION}\nAssistant:{first['content']}\nHuman:{SECOND}\nAssistant:" in prompts[1]
    assert roles_and_questions(page) == (["user", "assistant"] * 2, [QUESTION, SECOND])


def test_regenerate_edit_and_undo(address: str, visit: Callable, prompts: list[str]):
    page = visit(address)
    set_longest(page, 30)
    ask(page, QUESTION)
    wait_for_end(page)
    before = exported(page)
    page.get_by_label("重试").click()
    page.wait_for_timeout(300)
    wait_for_end(page)
    assert exported(page)[0] == before[0] and exported(page)[1] != before[1]
    assert prompts[0] == prompts[1]
    page.get_by_label("编辑").click()
    page.locator(f"{USER} textarea").fill(SECOND)
    page.get_by_label("发送").click()
    page.wait_for_timeout(300)
    wait_for_end(page)
    assert roles_and_questions(page) == (["user", "assistant"], [SECOND])
    assert SECOND in prompts[2] and QUESTION not in prompts[2]
    page.get_by_label("撤销").click()
    playwright.expect(page.locator(BOX)).to_have_value(SECOND)
    playwright.expect(page.locator(USER)).to_have_count(0)


def test_list_of_conversations(address: str, visit: Callable):
    page = visit(address)
    set_longest(page, 4)
    titles = page.locator("#conversations label")
    ask(page, QUESTION)
    wait_for_end(page)
    page.get_by_text("新对话").click()
    playwright.expect(page.locator(BOT)).to_have_count(0)
    ask(page, "第二个")
    wait_for_end(page)
    assert titles.all_inner_texts() == ["第二个", QUESTION]
    page.locator("#title textarea, #title input").fill("诗")
    page.locator("#title button").click()
    playwright.expect(titles.first).to_have_text("诗")
    page.reload()
    playwright.expect(titles).to_have_text(["诗", QUESTION])
    titles.last.click()
    playwright.expect(page.locator(USER)).to_have_text(QUESTION)
    page.locator("#delete").click()
    page.locator("#confirm").click()
    playwright.expect(titles).to_have_text(["诗"])
    other = visit(address)
    playwright.expect(other.locator("#conversations label")).to_have_count(0)


def test_exported_file_is_training_data(chat: ChatModel, address: str, visit: Callable, monkeypatch, tmp_path: Path):
    let_say(chat, monkeypatch, "春眠不觉晓，\n  处处闻啼鸟。")
    page = visit(address)
    for number, question in enumerate((QUESTION, SECOND)):
        ask(page, question)
        wait_for_end(page, number + 1)
    with page.expect_download() as download:
        page.locator("#export a").click()
    download.value.save_as(tmp_path / download.value.suggested_filename)
    [row] = read_samples(tmp_path / "写一首诗.json")
    assert list(row.history) == [(QUESTION, "春眠不觉晓，\n  处处闻啼鸟。")]
    assert (row.instruction, row.output) == (SECOND, "春眠不觉晓，\n  处处闻啼鸟。")


@pytest.mark.parametrize(("locale", "first", "then"), [("zh-CN", "zh", "en"), ("de-DE", "en", "zh")])
def test_language_is_the_browsers_until_switched(address: str, visit: Callable, locale: str, first: str, then: str):
    page = visit(address, locale)
    for language in (first, then, then):
        new = page.get_by_text(TEXTS[language]["new"])
        playwright.expect(new).to_be_visible()
        playwright.expect(page.locator(BOX)).to_have_attribute("placeholder", TEXTS[language]["ask"])
        playwright.expect(page.locator("#settings")).to_contain_text(TEXTS[language]["settings"])
        if language == first:
            page.locator(f"#language input[value={then}]").click()
        else:
            page.reload()


def test_two_checkpoints_side_by_side(make_model: Callable[[str], Path], visit: Callable):
    with served(make_model("bloom-tiny"), make_model("falcon-tiny")) as pair:
        page = visit(pair.address)
        set_number(page, "temperature", 0)
        set_longest(page, 12)
        ask(page, QUESTION)
        wait_for_end(page, 2)
        shown = [page.locator(".chat").nth(i).locator(BOT).inner_text() for i in range(2)]
        sampling = Sampling(12, temperature=0)
        answers = [each.answer([build_prompt(QUESTION)], sampling)[0] for each in pair.page.answering.chats]
        assert answers[0] != answers[1]
        assert [words_of(text) for text in shown] == [words_of(text) for text in answers]
        assert exported(page)[1]["content"] == answers[0]


def words_of(text: str) -> str:
    """Return the letters and digits of a text, which Markdown shows as they are."""
    return re.sub(r"[\W_]", "", text)


def test_phone_width(address: str, visit: Callable):
    page = visit(address, width=375)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    ask(page, QUESTION)
    page.wait_for_selector(BOT)
    for selector in (BOX, BOT, "#status"):
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 375, selector
    page.locator(".sidebar .toggle-button").click()
    playwright.expect(page.get_by_text("新对话")).to_be_in_viewport()
    page.locator("#conversations label").first.click()


def test_place_in_the_line_is_shown(address: str, visit: Callable, slow: list[float]):
    first, second = visit(address), visit(address)
    set_longest(first, 1000)
    set_longest(second, 5)
    ask(first, QUESTION)
    first.wait_for_selector(BOT)
    ask(second, QUESTION)
    playwright.expect(second.locator("#status")).to_contain_text("前面还有 1 个问题")
    first.close()
    wait_for_end(second)
    assert "5 个 token" in second.inner_text("#status")


def test_markdown_code_and_formulas_are_rendered(chat: ChatModel, address: str, visit: Callable, monkeypatch):
    let_say(
        chat,
        monkeypatch,
        "**粗** $x^2$ \\(y\\)\n\n```python\ndef f():\n    return 1\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
    )
    page = visit(address)
    ask(page, QUESTION)
    wait_for_end(page)
    counts = {selector: page.locator(f"{BOT} {selector}").count() for selector in ("strong", ".katex", "table", "pre")}
    assert counts == {"strong": 1, ".katex": 2, "table": 1, "pre": 1}
    assert page.locator(f"{BOT} pre .token.keyword").all_inner_texts() == ["def", "return"]


ATTACK = (
    "<script>window.broken = 1</script><img src=x onerror='window.broken = 2'><svg onload='window.broken = 3'></svg>"
    "<iframe srcdoc='<script>parent.broken = 4</script>'></iframe><a href='javascript:window.broken = 5'>link</a>\n\n"
    "![image](http://ADDRESS/leak.png) <img src='http://ADDRESS/leak2.png'> <style>@import 'http://ADDRESS/leak3'</style>"
    "<div style='position: fixed; inset: 0; background: url(http://ADDRESS/leak4)'>x</div>"
    "[link](javascript:window.broken=6) "
    "<form action='http://ADDRESS/leak5'><button>send</button></form>"
    "<meta http-equiv=refresh content='0;url=http://ADDRESS/leak6'>"
)


def test_neither_a_question_nor_an_answer_runs_script_or_loads_what_is_elsewhere(
    chat: ChatModel, address: str, visit: Callable, monkeypatch
):
    asked: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=lambda: asked.append(listener.accept()[0].recv(100)), daemon=True).start()
    attack = ATTACK.replace("ADDRESS", f"127.0.0.1:{listener.getsockname()[1]}")
    let_say(chat, monkeypatch, attack)
    page = visit(address, refused=True)
    ask(page, attack)
    wait_for_end(page)
    assert page.locator(".message :is(script, iframe, style, meta)").count() == 0
    assert page.locator(".message .md :is(img, svg, form, div, button, [style], [onerror])").count() == 0
    assert exported(page)[1]["content"] == attack
    for clickable in page.locator(f"{BOT} .md :is(a, button)").all():
        clickable.dispatch_event("click")
    page.wait_for_timeout(500)
    assert page.evaluate("window.broken") is None
    assert asked == [] and page.url.startswith(address)
