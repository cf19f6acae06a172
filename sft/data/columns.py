"""Columns: the role of each key of a record, by its name or by hand, and the keys that nobody reads.

Nothing that may change what a record means is left out in silence. A key has a role, is known to carry no meaning, is
reported as not read, or, where the answer may depend on it, is the reason to refuse the record.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ROLES = ("messages", "system", "history", "instruction", "input", "output")  # in the order of a conversation
TEXTS = ("system", "instruction", "input", "output")  # roles in which "[]" is a text, and not nothing
NAMES = {
    "messages": "messages conversations conversation dialog dialogue dialogs turns chat data 对话",
    "system": "system system_prompt system_message meta_instruction 系统 系统提示",
    "history": "history chat_history dialog_history conversation_history 历史 历史对话 对话历史",
    "instruction": "instruction prompt query question problem q human 问题 指令 问 提问 题目",
    "input": "input inputs context 输入",
    "output": "output response answer completion target targets solution a assistant reply chosen 回答 答案 输出 答",
}
SPEAKERS = ("user", "assistant")  # roles that --columns gives to the names of speakers
ROLE_OF = {name: role for role, names in NAMES.items() for name in names.split()}
CARRIES_NOTHING = _words(
    """
    id _id uid uuid guid idx index no num number row line qid source src origin dataset data_source source_file file
    filename file_name url urls link uri license licence author user_name username nickname model model_name generator
    engine lang locale category categories subcategory type task_type question_type task_name domain tag tags field
    difficulty level grade score scores rating quality reward likes upvotes votes views rank created created_at
    updated_at timestamp datetime version split hash md5 sha1 sha256 token_count num_tokens length num_turns turn_count
    turn meta metadata rejected 编号 序号 来源 类别 分类 标签 难度 链接 学科 领域 评分 作者
    """
)  # a rejected answer is one that nobody should learn
MEDIA = _words("image images image_path picture pictures video videos audio audios 图片 视频 音频")
TOOLS = _words("tools tool functions function tool_calls function_call apis api_list commands tool_responses 工具")
SOURCES = _words(
    """
    article articles passage passages paragraph paragraphs document documents doc docs law laws reference references
    evidence fact facts background knowledge material materials sentence sentences story schema
    snippet 原文 文章 材料 法条 背景 上下文 资料 文本 正文 句子 段落
    """
)
COPIES = _words("text content code 内容")  # may repeat the question and the answer, or say more
OPTIONS = _words("choices options option endings candidates 选项")  # a list, or texts by label
OPTION = re.compile("(?:option|choice|opt|选项)_?([a-j1-9])")  # one of them
NUM_LETTERS = 10  # options under "A", "B", ... or "a", "b", ...
TASKS = _words("task 任务")  # may say what is to be done with an input
GOOD = _words(
    "label kto_tag is_good is_correct correct correctness is_chosen accepted train trainable loss weight"
)  # true or false
BAD = _words("is_bad is_rejected")
MAX_NAMED = 30  # keys in one message
NOT_READ = "not read: "  # begins the remark on a key, or on a key of turns


class ColumnsError(Exception):
    """The keys of a record cannot be read; the message says why and what to type."""


@dataclass(frozen=True)
class Columns:
    """How records are to be read: (role, key) by hand, keys to ignore, and whether an empty output is an answer.

    A role may be one of a speaker; its key is the name that the speaker has in the turns.
    """

    by_hand: tuple[tuple[str, str], ...] = ()
    ignored: frozenset[str] = frozenset()
    trains_empty_outputs: bool = False
    layouts: dict[tuple[str, ...], "Layout"] = field(default_factory=dict, repr=False, compare=False)  # found so far

    @cached_property
    def given(self) -> dict[str, str]:
        """Return the roles by the keys that have them by hand, without those of speakers."""
        return {key.strip(): role for role, key in self.by_hand if role not in SPEAKERS}

    @cached_property
    def speakers(self) -> dict[str, str]:
        """Return the speakers by the names that they have by hand."""
        return {name.strip().lower(): role for role, name in self.by_hand if role in SPEAKERS}


BY_NAME = Columns()
MAX_LAYOUTS = 10_000  # kept at a time
MESSAGES = _words(NAMES["messages"])


@dataclass(frozen=True)
class Layout:
    """The keys of a record by role; `options` are of a multiple-choice question, `verdicts` say if it is a good answer.

    Beside messages, the texts under `beside` must be among the messages, or they would be lost; the texts under
    `copies` must repeat what is read.
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
    copies: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()  # those that have a role, in the order of a conversation
    shape: str = ""  # the same, for people


def name_of(key: str) -> str:
    """Return a key as it stands in this file's lists."""
    return key.strip().lower().replace(" ", "_").replace("-", "_")


def quoted(keys: Sequence[str]) -> str:
    """Return keys for people, long ones shortened."""
    shown = [f'"{key if len(key) <= 40 else key[:40] + "..."}"' for key in keys[:MAX_NAMED]]
    if len(keys) > MAX_NAMED:
        shown.append(f"{len(keys) - MAX_NAMED} more")
    return ", ".join(shown).encode("utf-8", "backslashreplace").decode()


def not_read(key: str, of: str = "") -> str:
    """Return the remark on a key that is not read."""
    return f"{NOT_READ}{shown(key)}{of}"


def without(key: str) -> str:
    """Return the remark on a key that --columns names and a record does not have."""
    return f"without {shown(key)}, which --columns names,"


def shown(key: str) -> str:
    """Return a key, shortened, on one line that any terminal can print."""
    key = key if key.isprintable() else ascii(key)[1:-1]
    return key if len(key) <= 80 else f"{key[:80]}..."


def by_hand(columns: Columns, *given: tuple[str, str]) -> str:
    """Return the flag that gives keys their roles, beside those that it gives already."""
    roles, keys = {role for role, _ in given} - {*SPEAKERS}, {key.strip() for _, key in given}
    kept = [(role, key) for role, key in columns.by_hand if role not in roles and key.strip() not in keys]
    return _flag("--columns", [f"{role}={key}" for role, key in (*kept, *given)])


def ignoring(columns: Columns, *keys: str) -> str:
    """Return the flag that leaves keys unread, beside those that it leaves already."""
    return _flag("--ignore_columns", [*sorted(columns.ignored), *keys])


def _flag(name: str, values: Sequence[str]) -> str:
    value = ",".join(dict.fromkeys(each.strip() for each in values))
    return f"{name} {value}" if re.fullmatch("[\\w=,.:/@%+-]+", value) else f"{name} '{value}'"


def layout_of(keys: tuple[str, ...], columns: Columns) -> Layout:
    """Return the role of each key of a record that has a value under it.

    Raises ColumnsError where two readings are possible, or a key changes what the record means and has no role.
    """
    layout = columns.layouts.get(keys)
    if layout is None:
        layout = _layout(keys, columns)
        if len(columns.layouts) >= MAX_LAYOUTS:
            columns.layouts.clear()
        columns.layouts[keys] = layout
    return layout


def _layout(keys: tuple[str, ...], columns: Columns) -> Layout:
    if strange := [key for key in keys if not isinstance(key, str)]:
        raise ColumnsError(f"a key is not a string but of the type {type(strange[0]).__name__}")
    found, rest = _by_role(keys, columns)
    ignored = _stripped(columns.ignored)
    unread = [key for key in keys if key.strip() in ignored]
    beside = _beside(found, unread, {role for role, _ in columns.by_hand})
    one = {role: _only(role, names, columns, not found["input"]) for role, names in found.items()}
    options = _options(rest, columns)
    verdicts = tuple(key for key in rest if name_of(key) in GOOD | BAD)
    is_question = one["input"] and name_of(one["input"]) != "context"
    if not one["messages"] and one["instruction"] is None and is_question:
        if tasks := [key for key in rest if name_of(key) in TASKS]:
            flag = by_hand(columns, ("instruction", tasks[0]))
            raise ColumnsError(f'"{tasks[0]}" may be the instruction; type {flag} or {ignoring(columns, *tasks)}')
        one["instruction"] = one.pop("input")
    if one["messages"] and options:
        raise ColumnsError(f'"{options[0]}" has no place beside turns; type {ignoring(columns, *options)}')
    rest = [key for key in rest if key not in (*options, *verdicts)]
    _check_meaning(rest, one, columns)
    unread += [key for key in rest if not carries_nothing(key)]
    copies = tuple(key for key in rest if name_of(key) in COPIES)
    with_role = tuple(filter(None, map(one.get, ROLES)))
    shape = "/".join(shown(key) for key in with_role)
    return Layout(
        **one,
        options=options,
        verdicts=verdicts,
        beside=beside,
        copies=copies,
        unread=tuple(unread),
        keys=with_role,
        shape=shape,
    )


def _beside(found: dict[str, list[str]], unread: list[str], decided: set[str]) -> tuple[str, ...]:
    """Return the keys of pairs beside messages; without a role is what another was chosen over by hand."""
    if found["messages"] and "messages" not in decided and decided & {"instruction", "output"}:
        unread += found["messages"]
        found["messages"] = []
    if not found["messages"]:
        return ()
    pairs = [key for role in ("history", "instruction", "input", "output") for key in found[role]]
    follows = found["output"] if {"messages", "output"} <= decided else ()  # the reply to the last turn
    pairs = [key for key in pairs if name_of(key) != "chosen" and key not in follows]
    for role, names in found.items():
        found[role] = [key for key in names if key not in pairs]
    if "messages" not in decided:
        return tuple(pairs)
    unread += pairs
    return ()


def _stripped(keys: frozenset[str]) -> set[str]:
    return {key.strip() for key in keys}


def role_of(key: str, columns: Columns) -> str | None:
    """Return the role of a key, by hand or by its name; what is given by hand is alone in its role."""
    if key.strip() in _stripped(columns.ignored):
        return None
    given = columns.given
    role = given.get(key.strip()) or ROLE_OF.get(name_of(key))
    return None if role in given.values() and key.strip() not in given else role


def _by_role(keys: tuple[str, ...], columns: Columns) -> tuple[dict[str, list[str]], list[str]]:
    """Return the keys of each role, and those without one that are not ignored."""
    found: dict[str, list[str]] = {role: [] for role in ROLES}
    rest = []
    letters, ignored = _letters(keys), _stripped(columns.ignored)
    given = columns.given
    for key in keys:
        if key.strip() in ignored:
            continue
        role = role_of(key, columns) if key not in letters or key in given else None
        (found[role] if role else rest).append(key)
    return found, rest


def _letters(keys: Sequence[str]) -> frozenset[str]:
    """Return the keys of options that are named by letters."""
    for first in "Aa":
        letters = [chr(ord(first) + number) for number in range(NUM_LETTERS)]
        if letters[0] in keys and letters[1] in keys:
            return frozenset(letters).intersection(keys)
    return frozenset()


def label_of(key: str) -> str | None:
    """Return the label of the option that a key holds; None if it holds them all."""
    single = OPTION.fullmatch(name_of(key))
    return single[1].upper() if single else key if len(key) == 1 else None


def _options(keys: Sequence[str], columns: Columns) -> tuple[str, ...]:
    """Return the keys of the options of a multiple-choice question, in the order of their labels."""
    letters = _letters(keys)
    single = [key for key in keys if key in letters or OPTION.fullmatch(name_of(key))]
    whole = [key for key in keys if name_of(key) in OPTIONS and not OPTION.fullmatch(name_of(key))]
    labels = [label_of(key) for key in single]
    if len(whole) + bool(single) > 1 or len(set(labels)) < len(labels):
        raise ColumnsError(
            f"{quoted([*single, *whole])} may each be the options of a question; leave out some, for example "
            f"{ignoring(columns, *((whole if single else whole[1:]) or single[1:]))}"
        )
    return tuple(whole or sorted(single, key=label_of))


def _only(role: str, names: list[str], columns: Columns, input_is_free: bool) -> str | None:
    if len(names) < 2:
        return names[0] if names else None
    if len(_stripped(frozenset(names))) < len(names):
        raise ColumnsError(f"{quoted(names)} may each be the {role}; rename one")
    flags = [by_hand(columns, (role, name)) for name in names]
    if role == "instruction" and input_is_free and len(names) == 2:
        first, second = sorted(names, key=lambda name: name_of(name) not in ("instruction", "prompt", "指令"))
        flags.insert(0, by_hand(columns, (role, first), ("input", second)))
    raise ColumnsError(f"{quoted(names)} may each be the {role}; type {' or '.join(flags)}")


def _check_meaning(keys: Sequence[str], one: dict[str, str | None], columns: Columns) -> None:
    """Raise ColumnsError for a key without a role on which the answer may depend."""
    for key in keys:
        name = name_of(key)
        if name in MEDIA:
            raise ColumnsError(f'"{key}" holds images, video or sound, which these models cannot see or hear')
        if name in TOOLS:
            raise ColumnsError(f'"{key}" lists tools, and calls of tools are not trained here')
    if sources := [key for key in keys if name_of(key) in SOURCES]:
        raise no_role(sources, one["messages"], one.get("input"), columns)


def no_role(keys: Sequence[str], messages: str | None, input: str | None, columns: Columns) -> ColumnsError:
    """Return the error for keys on which the answer may depend, beside the keys of messages and input, if any."""
    flags = [] if messages or input else [by_hand(columns, ("input", keys[0]))]
    if not flags or len(keys) == 1:
        flags.append(ignoring(columns, *keys))
    else:
        flags = [f"{flags[0]} {ignoring(columns, *keys[1:])}", ignoring(columns, *keys)]
    has = "has no role, and the answer may depend on it"
    has = has if len(keys) == 1 else "have no role, and the answer may depend on them"
    return ColumnsError(f"{quoted(keys)} {has}; type {', or '.join(flags)}")


def carries_nothing(key: str) -> bool:
    """Tell whether a key is known to say nothing that a question or an answer needs."""
    name = name_of(key)
    return name in CARRIES_NOTHING or name.endswith("_id") or name.startswith(("__", "unnamed:"))


def has_value(value: object, key: str, columns: Columns) -> bool:
    """Tell whether there is something under a key; an empty list may be written as a text where no text is expected."""
    if value.__class__ is str:
        return value != "" and (len(value) > 2 or value not in ("[]", "{}") or role_of(key, columns) in TEXTS)
    return bool(value) if isinstance(value, list | dict) else value is not None
