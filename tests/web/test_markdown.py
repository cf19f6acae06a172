"""What a text is given to Gradio as: blocks of safe HTML, fences, formulas, and the text itself for copying."""

import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.web.markdown import BEGIN, DISPLAY, END, INLINE, RAW, as_markdown, escape

TAGS = {"p", "br", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "ul", "ol", "li", "blockquote", "pre", "code", "a"}
TAGS |= {"strong", "em", "s", "table", "thead", "tbody", "tr", "th", "td"}
PIECES = ["<b>", "</script>", "<!--", "-->", "&lt;", "*", "**", "_", "`", "```", "\n\n", "\n", "# ", "- ", "1. ", "> "]
PIECES += [
    "|",
    "\n|---|---|\n",
    "$",
    "$$",
    "\\(",
    "\\)",
    "\\[",
    "\\",
    "[甲](http://a.b)",
    "[",
    "](",
    "~~",
    "山水",
    "river",
    "38",
    " ",
]


class Tags(HTMLParser):
    """The tags of a page, and the attributes of each."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.found += [(tag, *each) for each in attributes] or [(tag, "", "")]


def body(text: str) -> str:
    """Return what is between the two comments."""
    return as_markdown(text).removeprefix(f"{BEGIN}\n\n").rpartition(f"\n\n{RAW}")[0]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_any_text_is_blocks_without_a_tag_of_its_own_and_can_be_had_back(text: str):
    shown = as_markdown(text)
    if not text.strip():
        assert shown == ""
        return
    assert unquote(re.search(f"\n\n{RAW}([^<>\n]*){END}$", shown)[1]) == text
    fences = re.compile(r"^(`{3,})[\w+#.-]*\n.*?^\1$", re.DOTALL | re.MULTILINE)
    for block in fences.sub("", body(text)).split("\n\n"):
        assert "\n" not in block.strip() and (not block.strip() or block.strip().startswith("<"))
    for tag, name, value in Tags(fences.sub("", body(text))).found:
        assert tag in TAGS and (name in ("", "value", "start") or value.startswith(("http://", "text-align:")))


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("2*3*4 和 2**3**4 和 (1)*x*(2)", "<p>2*3*4 和 2**3**4 和 (1)*x*(2)</p>"),
        ("**粗**体 *斜*体 ~~删~~", "<p><strong>粗</strong>体 <em>斜</em>体 <s>删</s></p>"),
        ("# C #", "<p># C #</p>"),
        ("#", "<p>#</p>"),
        ("# 题", "<h1>题</h1>"),
        ("甲\n---\n乙\n===", "<p>甲</p>\n\n<hr>\n\n<p>乙<br>&#10;===</p>"),
        ("7. 甲\n9. 乙", '<ol start="7">&#10;<li value="7">甲</li>&#10;<li value="9">乙</li>&#10;</ol>'),
        ("| 甲 | 乙 |\n|---|---|\n| 1 | 2 | 3 |", "<p>| 甲 | 乙 |<br>&#10;|---|---|<br>&#10;| 1 | 2 | 3 |</p>"),
        ("    甲 <b>", "```\n甲 <b>\n```"),
        ("````md\n```\n````", "````md\n```\n````"),
        ("```python", "```python\n\n```"),
        ("```py title=<b>\n1", "<p>py title=&lt;b&gt;</p>\n\n```py\n1\n```"),
        ("```mermaid\ngraph\n```", "```\ngraph\n```"),
        ("\ufdd0甲\ufdd1", "<p>\ufffd甲\ufffd</p>"),
    ],
)
def test_a_text_and_what_shows_it(text: str, html: str):
    assert body(text) == html


def formulas(text: str) -> list[str]:
    pairs = "|".join(f"{left}(?:.*?){right}" for left, right in (INLINE, DISPLAY))
    return [each[1:-1].replace("&#10;", "\n").strip() for each in re.findall(pairs, body(text))]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("设$x$为$y^2$。", ["x", "y^2"]),
        (r"\(a\) 与 $$b$$ 与 \[c\]", ["a", "b", "c"]),
        ("$$\na\n- b\n$$", ["a\n- b"]),
        ("- 甲\n\n  \\[\n  a\n  + b\n  \\]", ["a\n+ b"]),
        (r"$\text{面积}=\frac{1}{2}$", [r"\text{面积}=\frac{1}{2}"]),
        ("$5 和 $10，$5，共$，A$1$2", []),
        ("$HOME:$PATH `$x$` ", []),
        ("$50% 的$ 和 $a}b{c$ 和 $九折$", []),
        (r"\$x\$ 和 $x\$", []),
        ("$$\na\n\nb\n$$", []),
    ],
)
def test_what_is_a_formula(text: str, found: list[str]):
    assert formulas(text) == found


def test_escaped_names():
    assert escape("a_b*<c>[d](e)") == r"a\_b\*\<c\>\[d\]\(e\)"
