"""What a model or a visitor writes is what the page shows: its text is compared with theirs in a real browser."""

import re
import string
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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
# Where a mark is one of Markdown's or of a formula, and so not shown itself.
MARKED = {f"{mark}{word}{mark}": word for mark in "*_`" for word in ("山水", "river", "38")}
MARKED |= {f"{word}`{word}`{word}": word * 3 for word in ("山水", "river", "38")} | {"山水*山水*山水": "山水" * 3}
FORMULAS = {"$river$", "$38$"}
SENTENCES = [
    "请写 <restate your message here> 然后结束。",
    "用 List<String> 和 Map<K, V> 声明。",
    "<think>先想一想</think>再回答",
    "这是<b>粗</b>体吗？<br/>不是 <!-- 注 --> 吧 </s>",
    "2*3*4=24，3*(1+1)*4 也是；2**3**2=512",
    "路径 C:\\目录\\_tmp，正则 ^\\d+\\.\\*$，换行是 \\n",
    "[甲]: 乙",
    "handlers[0](事件)，见 [甲][乙] 和 ![图](x.png)，[点我](javascript:alert(1))",
    "实体 &lt;b&gt; &amp; &#42; &copy 原样",
    "这本 $5，那本 $10；$HOME:$PATH；US$3 和 US$4；打 $九折$",
    ">>> print(1)",
    "1) 第一",
    "C 和 #，~不~删",
    "~~~好开心",
    "def __init__(self): pass",
    "进度 %%%LATEX_BLOCK_0%%% 完",
    "网址 https://example.com/a_b_c?x=1&y=<2> 后",
]


@pytest.fixture(scope="module")
def page_served(make_model: Callable[[str], Path]) -> Iterator[Served]:
    with served(make_model("bloom-tiny")) as page_served:
        yield page_served


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with started() as browser:
        yield browser


@pytest.fixture
def visit(browser: playwright.Browser) -> Iterator[Callable[..., playwright.Page]]:
    with visits(browser) as visit:
        yield visit


@pytest.fixture
def say(page_served: Served, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that lets the model answer a text."""
    return lambda *text: let_say(page_served.chat, monkeypatch, *text)


def paragraphs(mark: str) -> list[str]:
    """Return a mark in and around words, digits and Chinese, each in every way."""
    forms = ("{0}{1}", "{1}{0}", "{1}{0}{1}", "{1} {0} {1}", "{1}{0}{1}{0}{1}", "{0}{1}{0}")
    return [form.format(mark, word) for word in ("river", "38", "山水") for form in forms]


def test_every_character_is_shown(page_served: Served, visit: Callable, say: Callable):
    written = [each for mark in string.punctuation for each in paragraphs(mark) if each not in FORMULAS] + SENTENCES
    text = "\n\n".join(written)
    say(text, 0)
    page = visit(page_served.address)
    ask(page, text)
    wait_for_end(page)
    for role in (USER, BOT):
        shown = [each.strip() for each in page.locator(f"{role} .md > *").all_inner_texts()]
        assert shown == [MARKED.get(each, each) for each in written], role
    assert [each["content"] for each in exported(page)] == [text, text]
    assert page_served.ask("再来一次") == text


def test_a_growing_answer_never_shows_less_than_it_says(page_served: Served, visit: Callable, say: Callable):
    text = "请写 <restate your message here> 然后 <b>结束</b>，List<String>。"
    say(text, 0.04)
    page = visit(page_served.address)
    ask(page, "怎么写？")
    page.wait_for_selector(BOT)
    seen = set()
    while not page.locator("#box .submit-button").is_visible():
        seen.add(page.locator(BOT).first.inner_text().strip())
    wait_for_end(page)
    assert len(seen) > 5 and page.locator(BOT).inner_text().strip() == text
    assert [each for each in seen if not text.startswith(each)] == []
    assert any(re.search("<[a-z ]+$", each) for each in seen)  # half a tag


def test_markdown_code_and_formulas_beside_tags(page_served: Served, visit: Callable, say: Callable):
    say(
        "# 用 <T> 的类\n\n3. **泛型** `Map<K, V>`\n5. ~~旧~~\n\n> 引 <q>\n\n"
        "| <a> | b |\n|---|---|\n| 1 | $x_1$ |\n\n```html\n<b>粗</b> &lt; $HOME *a*\n\n<i>\n```\n\n"
        "\\[\n\\sum_{i=1}^n i\n+ 1\n\\]\n\n- [站点](https://example.com/a?b=1&c=2)"
    )
    page = visit(page_served.address)
    ask(page, "说说泛型")
    wait_for_end(page)
    names = (
        "h1",
        "strong",
        "code:not(pre code)",
        "s",
        "blockquote",
        "table",
        "pre",
        ".katex",
        ".katex-display",
        "ul > li",
    )
    texts = {name: page.locator(f"{BOT} .md").locator(name).all_inner_texts() for name in names}
    assert {name: len(each) for name, each in texts.items()} == dict.fromkeys(names, 1) | {".katex": 2}
    assert texts["h1"] == ["用 <T> 的类"] and texts["code:not(pre code)"] == ["Map<K, V>"]
    assert texts["blockquote"] == ["引 <q>"] and texts["table"][0].startswith("<a>\tb")
    assert texts["pre"] == ["<b>粗</b> &lt; $HOME *a*\n\n<i>\n"]
    assert page.locator(f"{BOT} ol > li").evaluate_all("items => items.map(item => item.value)") == [3, 5]
    assert page.locator(f"{BOT} li a").get_attribute("href") == "https://example.com/a?b=1&c=2"
    formulas = page.locator(f"{BOT} .katex annotation").all_text_contents()
    assert [each.strip() for each in formulas] == ["x_1", "\\sum_{i=1}^n i\n+ 1"]


NO_CLIPBOARD = "delete Navigator.prototype.clipboard"  # as on a page that is not served by HTTPS


def pasted(page: playwright.Page) -> str:
    """Return what the clipboard brings into the box."""
    page.fill(BOX, "")
    page.press(BOX, "Control+V")
    return page.locator(BOX).input_value()


@pytest.mark.parametrize("script", ["", NO_CLIPBOARD], ids=["clipboard", "no clipboard"])
def test_what_is_copied_and_edited_is_the_text(page_served: Served, visit: Callable, say: Callable, script: str):
    answer, question = "用 `List<String>`：\n\n```\na &lt; b\n```\n\n100% <好> $x$\n", "把 <b>粗</b> 写成 2*3*4"
    say(answer)
    page = visit(page_served.address, script=script)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page, question)
    wait_for_end(page)
    buttons = (*page.get_by_label("Copy message").all(), page.locator(f"{BOT} .copy_code_button"))
    for button, expected in zip(buttons, (question, answer, "a &lt; b"), strict=True):
        button.click()
        for _ in range(100):  # a browser copies some time after the click
            if pasted(page) == expected:
                break
            page.wait_for_timeout(50)
        assert pasted(page) == expected
    page.get_by_label("编辑").click()
    playwright.expect(page.locator(f"{USER} textarea")).to_have_value(question)
    page.locator(f"{USER} textarea").press("End")
    page.keyboard.type(" <再>")
    page.get_by_label("发送").click()
    page.wait_for_timeout(300)
    wait_for_end(page)
    assert exported(page)[0]["content"] == f"{question} <再>"
    assert page.locator(USER).inner_text().strip() == f"{question} <再>"
