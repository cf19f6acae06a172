"""Conversations of any texts, written as records of every shape under every name, and what the chat would ask."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from sft.data.columns import NAMES
from sft.data.formats import split_history
from sft.data.turns import SPEAKER_KEYS, SPEAKERS, TEXT_KEYS
from sft.prompts import build_chat_prompt, build_prompt

NAMES_OF = {role: names.split() for role, names in NAMES.items()}
PIECES = ["</s>", "<s>", "<pad>", "<|endoftext|>", "### Response:", "\n\n### Response:", "### Instruction:\n", "Human:"]
PIECES += [
    "\nHuman:",
    "Assistant:",
    "\nAssistant:",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\0",
    "\x1b",
    "\x85",
    "\u2028",
    "\u3000",
]
PIECES += [
    "\ufeff",
    "\ufffd",
    "\u200b",
    "\u0301",
    "你好",
    "。",
    "😀",
    "𠀀",
    "e",
    "'s",
    "12345",
    "{instruction}",
    "\\u0041",
]
ANY_TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=6).map("".join)
TEXT = ANY_TEXT.filter(str.strip)


@dataclass(frozen=True)
class Talk:
    """Questions and replies, perhaps after a system's text, the last question perhaps with an input."""

    pairs: list[tuple[str, str]]
    system: str | None
    input: str


TALKS = st.builds(
    Talk,
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3),
    st.none() | ANY_TEXT,
    st.just("") | ANY_TEXT,
).filter(lambda talk: split_history(talk.pairs[-1][0])[1] == talk.pairs[-1][0])  # no turns written into a question
SPELT = {speaker: [name for name in SPEAKERS if SPEAKERS[name] == speaker] for speaker in SPEAKERS.values()}


@dataclass(frozen=True)
class Pair:
    """A record with the keys of one question and answer, and others beside them."""

    instruction: str
    output: str
    input: str
    system: str
    history: str


@dataclass(frozen=True)
class Turns:
    """A record with a list of turns."""

    turns: str
    role: str
    content: str


def shapes(make: type, *keys: Sequence[str]) -> list:
    """Return as many shapes as there are keys in the longest list, so that every key is in one."""
    return [make(*(some[number % len(some)] for some in keys)) for number in range(max(map(len, keys)))]


PAIRS = shapes(Pair, *(NAMES_OF[role] for role in ("instruction", "output", "input", "system", "history")))
SHAPES = [*PAIRS, *shapes(Turns, NAMES_OF["messages"], SPEAKER_KEYS, TEXT_KEYS)]


def record_of(talk: Talk, shape: Pair | Turns, number: int) -> dict:
    """Write a conversation in a shape, with another name of each role in each record."""
    if isinstance(shape, Pair):
        *history, (question, reply) = talk.pairs
        asked = {shape.instruction: question, shape.input: talk.input}
        return asked | {shape.output: reply, shape.system: talk.system, shape.history: history}
    turns = [("system", talk.system)] if talk.system is not None else []
    for question, reply in talk.pairs:
        turns += [("user", question), ("assistant", reply)]
    names = {role: spelt[number % len(spelt)] for role, spelt in SPELT.items()}
    return {shape.turns: [{shape.role: names[role], shape.content: text} for role, text in turns]}


def messages_of(talk: Talk, shape: Pair | Turns) -> tuple[list[dict[str, str]], str]:
    """Return the messages that the chat would have, without the last reply, and the input of a task alone."""
    system, input = talk.system, "" if isinstance(shape, Turns) else talk.input
    messages = [{"role": "system", "content": system}] if system and system.strip() else []
    for question, reply in talk.pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    if input and len(messages) > 2:
        messages[-2]["content"] += f"\n{input}"
        input = ""
    return messages[:-1], input


def prompts_of(messages: list[dict[str, str]], input: str) -> list[str]:
    """Return what the chat would ask each reply of a conversation with."""
    if input:
        return [build_prompt(messages[0]["content"], input)]
    asked = [number for number, message in enumerate(messages, 1) if message["role"] == "user"]
    return [build_chat_prompt(messages[:number]) for number in asked]


def write_talks(file: Path, talks: list[Talk], shapes: Sequence[Pair | Turns], form: str) -> None:
    """Write each conversation in the next of the shapes."""
    records = [record_of(talk, shapes[number % len(shapes)], number) for number, talk in enumerate(talks)]
    if form == "lines":
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    else:
        text = json.dumps(records, ensure_ascii=form == "ASCII array", indent=1)
    file.write_text(text, encoding="utf-8", newline="")
