"""Columns: the role of each key of a record, by its name or by hand, and the keys that nobody reads.

Nothing that may change what a record means is left out in silence. A key has a role, is known to carry no meaning, is
reported as not read, or, where the answer may depend on it, is the reason to refuse the record.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ROLES = ("messages", "system", "history", "instruction", "input", "output")  # in the order of a conversation
NAMES = {
    "messages": "messages conversations conversation dialog dialogue dialogs turns chat data 对话",
    "system": "system system_prompt system_message meta_instruction 系统 系统提示",
    "history": "history 历史",
    "instruction": "instruction prompt query question problem q human 问题 指令 问 提问",
    "input": "input inputs context 输入",
    "output": "output response answer completion target targets solution a assistant reply chosen 回答 答案 输出 答",
}
ROLE_OF = {name: role for role, names in NAMES.items() for name in names.split()}
CARRIES_NOTHING = _words(
    """
    id _id uid uuid guid idx index no num number row line qid source src origin dataset data_source source_file file
    filename file_name url urls link uri license licence author user_name username nickname model model_name generator
    engine lang language locale category categories subcategory type task tasks task_type task_name domain subject topic
    topics tag tags keyword keywords field difficulty level grade score scores rating quality reward likes upvotes votes
    views rank created created_at updated_at timestamp time date datetime version split hash md5 sha1 sha256 token_count
    num_tokens length num_turns turn_count turn meta metadata name rejected 编号 序号 来源 类别 分类 标签 难度 时间 日期
    链接 学科 领域 语言 评分 作者
    """
)  # a rejected answer is one that nobody should learn
MEDIA = _words("image images image_path picture pictures video videos audio audios 图片 视频 音频")
TOOLS = _words("tools tool functions function tool_calls function_call apis api_list commands tool_responses 工具")
SOURCES = _words(
    """
    article articles passage passages paragraph paragraphs document documents doc docs law laws reference references
    evidence fact facts background knowledge material materials 原文 文章 材料 法条 背景 上下文 资料
    """
)
OPTIONS = _words("choices options option 选项")
LETTERS = "ABCDEFGHIJ"
GOOD, BAD = _words("label kto_tag is_good"), _words("is_bad is_rejected")  # true or false
MAX_NAMED = 30  # keys in one message
NOT_READ = "not read: "  # begins the remark on a key, or on a key of turns


class ColumnsError(Exception):
    """The keys of a record cannot be read; the message says why and what to type."""


@dataclass(frozen=True)
class Columns:
    """How records are to be read: (role, key) by hand, keys to ignore, and whether an empty output is an answer."""

    by_hand: tuple[tuple[str, str], ...] = ()
    ignored: frozenset[str] = frozenset()
    trains_empty_outputs: bool = False


BY_NAME = Columns()
MESSAGES = _words(NAMES["messages"])


@dataclass(frozen=True)
class Layout:
    """The keys of a record by role; `options` are of a multiple-choice question, `verdicts` say if it is a good answer.

    Beside messages, the texts under `beside` must be among the messages, or they would be lost.
    """

    messages: str | None = None
    system: str | None = None
    history: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    options: tuple[str, ...] = ()
    verdicts: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the keys that have a role, in the order of a conversation."""
        return tuple(filter(None, (getattr(self, role) for role in ROLES)))


def name_of(key: str) -> str:
    """Return a key as it stands in this file's lists."""
    return key.strip().lower().replace(" ", "_").replace("-", "_")


def quoted(keys: Sequence[str]) -> str:
    """Return keys for people, long ones shortened."""
    shown = [f'"{shortened(key)}"' for key in keys[:MAX_NAMED]]
    if len(keys) > MAX_NAMED:
        shown.append(f"{len(keys) - MAX_NAMED} more")
    return ", ".join(shown).encode("utf-8", "backslashreplace").decode()


@lru_cache(maxsize=10_000)
def layout_of(keys: tuple[str, ...], columns: Columns) -> Layout:
    """Return the role of each key of a record that has a value under it.

    Raises ColumnsError where two readings are possible, or a key changes what the record means and has no role.
    """
    found, rest = _by_role(keys, columns)
    unread = [key for key in keys if key in columns.ignored]
    decided = {role for role, _ in columns.by_hand}
    if found["messages"] and "messages" not in decided and decided & {"instruction", "output"}:
        unread += found["messages"]
        found["messages"] = []
    beside: tuple[str, ...] = ()
    if found["messages"]:
        pairs = [key for role in ("history", "instruction", "input", "output") for key in found[role]]
        pairs = [key for key in pairs if key != "chosen"]
        found = {role: [key for key in names if key not in pairs] for role, names in found.items()}
        if "messages" in decided:
            unread += pairs
        else:
            beside = tuple(pairs)
    one = {role: _only(role, names) for role, names in found.items()}
    letters = tuple(key for key in rest if key in LETTERS and {"A", "B"} <= set(rest))
    options = letters or tuple(key for key in rest if name_of(key) in OPTIONS)
    verdicts = tuple(key for key in rest if name_of(key) in GOOD | BAD)
    if not one["messages"] and one["instruction"] is None and one["input"]:
        one["instruction"] = one.pop("input")
    if one["messages"] and options:
        raise ColumnsError(f'"{options[0]}" has no place beside turns; type --ignore_columns {",".join(options)}')
    rest = [key for key in rest if key not in (*options, *verdicts)]
    _check_meaning(rest)
    unread += [key for key in rest if not carries_nothing(key)]
    return Layout(**one, options=options, verdicts=verdicts, beside=beside, unread=tuple(unread))


def _by_role(keys: tuple[str, ...], columns: Columns) -> tuple[dict[str, list[str]], list[str]]:
    """Return the keys of each role, and those without one; what is given by hand is alone in its role."""
    by_hand = {key: role for role, key in columns.by_hand}
    decided = set(by_hand.values())
    found: dict[str, list[str]] = {role: [] for role in ROLES}
    rest = []
    are_options = "A" in keys and "B" in keys
    for key in keys:
        if key in columns.ignored:
            continue
        role = by_hand.get(key)
        if role is None and not (are_options and key in LETTERS):
            role = ROLE_OF.get(name_of(key))
            role = None if role in decided else role
        (found[role] if role else rest).append(key)
    return found, rest


def keys_of(role: str, keys: Sequence[str], columns: Columns) -> list[str]:
    """Return the keys that would have a role, whatever stands under them."""
    return _by_role(tuple(keys), columns)[0][role]


def shortened(key: str) -> str:
    """Return a key for people."""
    return key if len(key) <= 40 else key[:40] + "..."


def _only(role: str, names: list[str]) -> str | None:
    if len(names) < 2:
        return names[0] if names else None
    flags = " or ".join(f"--columns {role}={name}" for name in names)
    raise ColumnsError(f"{quoted(names)} may each be the {role}; type {flags}")


def _check_meaning(keys: Sequence[str]) -> None:
    """Raise ColumnsError for a key without a role on which the answer may depend."""
    for key in keys:
        name = name_of(key)
        if name in MEDIA:
            raise ColumnsError(f'"{key}" holds images, video or sound, which these models cannot see or hear')
        if name in TOOLS:
            raise ColumnsError(f'"{key}" lists tools, and calls of tools are not trained here')
        if name in SOURCES:
            raise ColumnsError(
                f'"{key}" has no role, and the answer may depend on it; type --columns input={key}, or '
                f"--ignore_columns {key}"
            )


def carries_nothing(key: str) -> bool:
    """Tell whether a key is known to say nothing that a question or an answer needs."""
    name = name_of(key)
    return name in CARRIES_NOTHING or name.endswith("_id") or name.startswith(("__", "unnamed:"))


def missing(layout: Layout, keys: Sequence[str], role: str) -> str:
    """Return what a record lacks, what it has instead, and what to type."""
    if set(map(name_of, layout.unread)) == {"text"} and not layout.keys:
        return 'pretraining text: a "text" has no question and no answer; expected instructions or conversations'
    roles = [f'"{getattr(layout, each)}" is the {each}' for each in ROLES if getattr(layout, each)]
    others = sorted((key for key in keys if key not in layout.keys), key=carries_nothing)
    found = "; ".join(filter(None, (", ".join(roles), f"other keys: {quoted(others)}" if others else "")))
    likely = [key for key in others if not carries_nothing(key)]
    if role == "instruction" and layout.output is None:
        return f"no instruction and no output found ({found or 'no keys'}); type --columns instruction=KEY,output=KEY"
    return f"no {role} found ({found}); type --columns {role}={likely[0] if len(likely) == 1 else 'KEY'}"
