"""What the chat shows of a text: every character, as text, as code, or as the Markdown and formulas that it spells.

Gradio's chatbot takes a tag for HTML, which vanishes, and so do a definition of a link, the backslash of `\\.` and the
asterisks of `2*3*4`. It is therefore given blocks of HTML that are rendered here, in which a character that is not
clearly Markdown is a character. Code at the top level stays a fence, for Gradio to highlight.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import quote

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markdown_it.rules_block import StateBlock, blockquote, fence, heading, list_block, table
from markdown_it.rules_block.table import escapedSplit
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

# What Gradio draws as a formula stands between two of these. They are no characters of any text.
INLINE, DISPLAY = ("\ufdd0", "\ufdd1"), ("\ufdd2", "\ufdd3")
LATEX = [dict(zip(("left", "right", "display"), (*INLINE, False), strict=True))]
LATEX += [dict(zip(("left", "right", "display"), (*DISPLAY, True), strict=True))]
NO_CHARACTERS = re.compile("[\ufdd0-\ufdef]")
# The page's script gives whoever copies or edits a message the text between the second comment's marks.
BEGIN, RAW, END = "<!--shown-->", "<!--raw:", "-->"
ENCODED = re.compile(r"[\x00-/:-@\[-`{-\x7f\ufdd0-\ufdef]")

# What turns a character into Markdown, HTML or a formula.
MARKS = re.compile(r"([\\`*_{}\[\]()#+!|~$<>&-])")
LANGUAGE = re.compile(r"[A-Za-z0-9_+#.-]*")
URL = re.compile(r"(?<![\w(='\"])https?://[\w.~:/?#@!$&'()*+,;=%-]*[\w/#=%-]", re.ASCII)
IDEOGRAPHS = re.compile("[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]")
# An operator between two operands, and a name such as __init__.
OPERATOR = re.compile(r"(?<=[0-9A-Za-z])\*\*?(?=[0-9A-Za-z])|(?<=[0-9A-Za-z)\]])\*(?=[0-9A-Za-z(\[])|__[0-9A-Za-z_]+__")
# A backslash with what it would escape, and the beginning of an image, which the page's policy would not load.
LITERAL = re.compile(r"\\[!-/:-@\[-`{-~]|!\[")
# Where a single dollar begins and ends a formula rather than a price or a variable.
DOLLAR, SECOND_DOLLAR = r"(?<![0-9A-Za-z$\\])\$(?!\s)", r"(?<![\s\\])\$(?![0-9A-Za-z$])"
INLINE_FORMULA = re.compile(rf"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|{DOLLAR}([^\n$]+){SECOND_DOLLAR}", re.DOTALL)
BLOCK_FORMULA = re.compile(r"\s*(?:\$\$((?:(?!\$\$).)+)\$\$|\\\[((?:(?!\\\]).)+)\\\])\s*", re.DOTALL)


def escape(text: str) -> str:
    """Return a text escaped so that Gradio's Markdown shows it literally."""
    return MARKS.sub(r"\\\1", text)


def as_markdown(text: str) -> str:
    """Return the Markdown with which Gradio's chatbot shows every character of a text; empty if there is none."""
    tokens = PARSER.parse(NO_CHARACTERS.sub("\ufffd", text))
    if not tokens:
        return ""
    raw = ENCODED.sub(lambda match: quote(match[0], safe=""), text)
    return "\n\n".join([BEGIN, *map(_block, _blocks(tokens)), f"{RAW}{raw}{END}"])


def _blocks(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """Yield the tokens of one block of the top level after another."""
    block: list[Token] = []
    for token in tokens:
        block.append(token)
        if token.level == 0 and token.nesting != 1:
            yield block
            block = []


def _block(tokens: list[Token]) -> str:
    """Return a block of the top level: a fence, or HTML in one line, for a blank line would end it."""
    if tokens[0].type in ("fence", "code_block"):
        language, note = _language(tokens[0])
        code = tokens[0].content.removesuffix("\n")
        longest = max(map(len, re.findall("`+", code)), default=0)
        marks = "`" * max(3, longest + 1)
        return f"{note}{marks}{language}\n{code}\n{marks}"
    html = PARSER.renderer.render(tokens, PARSER.options, {}).strip()
    # Gradio puts formulas where it finds %%%LATEX_BLOCK_0%%%.
    return html.replace("\n", "&#10;").replace("%%%", "%%&#37;")


def _language(token: Token) -> tuple[str, str]:
    """Return the language of a block of code, and a paragraph of what else is written behind its opening marks."""
    info = token.info.strip()
    if not LANGUAGE.fullmatch(info):
        return LANGUAGE.match(info)[0], f"<p>{escapeHtml(info)}</p>\n\n"
    return ("" if info == "mermaid" else info), ""  # which Gradio would draw


def _is_formula(text: str) -> bool:
    """Tell whether KaTeX shows a text whole: no comment, no blank line, and braces in pairs."""
    depth = 0
    for mark in re.findall(r"\\.|[{}%]|\n\s*\n", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(mark, 0)
        if depth < 0 or mark == "%" or mark.isspace():
            return False
    return depth == 0 and bool(text.strip())


def _inline_formula(state: StateInline, silent: bool) -> bool:
    match = INLINE_FORMULA.match(state.src, state.pos, state.posMax)
    if not match:
        return False
    text = match[match.lastindex]
    # Between single dollars there may be prices; Chinese within a formula stands in braces, as in \text{}.
    if not _is_formula(text) or (match.lastindex == 4 and IDEOGRAPHS.search(re.sub(r"\{[^{}]*\}", "", text))):
        return False
    if not silent:
        token = state.push("formula", "", 0)
        token.content, token.meta = text, {"marks": DISPLAY if match.lastindex < 3 else INLINE}
    state.pos = match.end()
    return True


def _block_formula(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    if not _line(state, start).startswith(("$$", "\\[")) or state.is_code_block(start):
        return False
    for after in range(start + 1, end + 1):
        if after > start + 1 and (state.isEmpty(after - 1) or state.sCount[after - 1] < state.blkIndent):
            return False
        match = BLOCK_FORMULA.fullmatch(state.getLines(start, after, state.blkIndent, False))
        if match and _is_formula(match[match.lastindex]):
            if not silent:
                token = state.push("formula", "", 0)
                token.content, token.meta, token.block = match[match.lastindex], {"marks": DISPLAY}, True
                state.line = after
            return True
    return False


def _literal(pattern: re.Pattern[str]) -> Callable[[StateInline, bool], bool]:
    """Return a rule that takes what matches for text."""

    def rule(state: StateInline, silent: bool) -> bool:
        if not (match := pattern.match(state.src, state.pos, state.posMax)):
            return False
        if not silent:
            state.pending += match[0]
        state.pos = match.end()
        return True

    return rule


def _line(state: StateBlock, number: int) -> str:
    return state.src[state.bMarks[number] + state.tShift[number] : state.eMarks[number]]


def _only(pattern: str, rule: Callable[..., bool]) -> Callable[..., bool]:
    """Return a rule for blocks whose first line matches."""
    begins = re.compile(pattern)
    return lambda state, start, end, silent: bool(begins.match(_line(state, start))) and rule(state, start, end, silent)


def _whole_table(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Take for a table only what has no row with more cells than its head, for they would not be shown."""
    rows = []
    for number in range(start, end):
        if state.isEmpty(number):
            break
        rows.append(len(escapedSplit(_line(state, number).strip().removeprefix("|").removesuffix("|"))))
    return bool(rows) and max(rows) <= rows[0] and table(state, start, end, silent)


def _link_urls(state: StateCore) -> None:
    """Make links of the URLs in a text that is not in a link."""
    for token in state.tokens:
        depth = 0
        for child in token.children or ():
            depth += child.nesting * (child.tag == "a")
            if child.type == "text" and not depth and "://" in child.content:
                child.type, child.content = "html_inline", _with_links(child.content)


def _with_links(text: str) -> str:
    parts, last = [], 0
    for match in URL.finditer(text):
        url = escapeHtml(match[0])
        parts += [escapeHtml(text[last : match.start()]), f'<a href="{url}">{url}</a>']
        last = match.end()
    return "".join([*parts, escapeHtml(text[last:])])


class _Renderer(RendererHTML):
    """Shows formulas, the numbers of list items, and code within lists and quotes."""

    def formula(self, tokens: Sequence[Token], index: int, options: object, env: object) -> str:
        token = tokens[index]
        left, right = token.meta["marks"]
        formula = f"{left}{escapeHtml(token.content)}{right}"
        return f"<p>{formula}</p>" if token.block else formula

    def list_item_open(self, tokens: Sequence[Token], index: int, options: object, env: object) -> str:
        number = tokens[index].info
        return f'<li value="{number}">' if number else "<li>"

    def fence(self, tokens: Sequence[Token], index: int, options: object, env: object) -> str:
        _, note = _language(tokens[index])
        return f"{note.strip()}<pre><code>{escapeHtml(tokens[index].content)}</code></pre>"


def _build_parser() -> MarkdownIt:
    parser = MarkdownIt("js-default", {"html": False, "breaks": True}, renderer_cls=_Renderer)
    parser.disable(["lheading", "reference", "autolink", "image", "entity", "linkify"])
    parser.validateLink = lambda url: url.startswith(("http://", "https://", "mailto:"))
    block, inline = parser.block.ruler, parser.inline.ruler
    ends = {"alt": ["paragraph", "blockquote", "list"]}
    block.before("table", "formula", _block_formula, ends)
    block.at("table", _whole_table, {"alt": ["paragraph"]})
    block.at("fence", _only(rf"`|~+[ \t]*{LANGUAGE.pattern}[ \t]*$", fence), ends)
    block.at("heading", _only(r"#+[ \t]+(?!.*(?<=[ \t])#+[ \t]*$)\S", heading), ends)
    block.at("list", _only(r"(?:[-*+]|\d+\.)[ \t]+\S", list_block), {"alt": ["paragraph", "blockquote"]})
    block.at("blockquote", _only(r">[ \t]+\S", blockquote), ends)
    inline.before("escape", "formula", _inline_formula)
    inline.at("escape", _literal(LITERAL))
    inline.before("emphasis", "operator", _literal(OPERATOR))
    parser.core.ruler.push("urls", _link_urls)
    return parser


PARSER = _build_parser()
