"""No key of any record is dropped in silence: its text is read, or the key is named, or says nothing, or is refused.

The examples are the same at every run.
"""

import shlex
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.columns import (
    BAD,
    COPIES,
    GOOD,
    MEDIA,
    NAMES,
    NOT_READ,
    OPTIONS,
    SOURCES,
    TOOLS,
    Columns,
    carries_nothing,
)
from sft.data.formats import Sample, to_sample
from sft.data.shards import Refused
from sft.data.turns import NO_MEANING, SPEAKERS, TRAINED_KEYS
from sft.training.arguments import DataArguments

KNOWN = sorted(name for names in NAMES.values() for name in names.split())
QUESTIONS, ANSWERS = NAMES["instruction"].split(), NAMES["output"].split()
NOTHING = ["id", "source", "category", "score", "url", "timestamp", "doc_id", "编号", "model", "__index_level_0__"]
CHANGING = sorted(MEDIA | TOOLS | SOURCES | OPTIONS | COPIES) + [
    "A",
    "B",
    "C",
    "D",
    "option_a",
    "label",
    "is_bad",
    "kto_tag",
    "train",
    "weight",
]
UNKNOWN = ["心情", "reasoning", "remark", "title", "Thought", "评语", "chain of thought", "explanation"]
SPOKEN = [
    "role",
    "from",
    "content",
    "value",
    "text",
    "speaker",
    "utterance",
    *TRAINED_KEYS,
    *NO_MEANING,
    "reasoning_content",
]
MANY = settings(max_examples=700, deadline=None, derandomize=True, database=None)


def written(key: str, case: int) -> str:
    return (key, key.upper(), key.capitalize(), f" {key}", key.replace("_", " "), key.replace("_", "-"))[case]


CASES = st.sampled_from([0, 0, 0, 1, 2, 3, 4, 5])
KEYS = st.builds(written, st.sampled_from(KNOWN + CHANGING) | st.sampled_from(NOTHING + UNKNOWN), CASES)
QUESTION, ANSWER = (st.builds(written, st.sampled_from(names), CASES) for names in (QUESTIONS, ANSWERS))
TURN_KEYS = st.builds(written, st.sampled_from([*SPOKEN, *UNKNOWN, *QUESTIONS, *ANSWERS, "images", "system"]), CASES)


def texts_in(value: object) -> list[str]:
    """Return every text under a key, at any depth."""
    if isinstance(value, dict):
        value = list(value.values())
    return [text for each in value for text in texts_in(each)] if isinstance(value, list) else [str(value)]


@st.composite
def values(draw: st.DrawFn, numbers: count) -> object:
    """Draw something with texts that stand nowhere else."""

    def text() -> str:
        return f"第{next(numbers)}句。"

    kind = draw(st.sampled_from(["text"] * 6 + ["number", "texts", "pairs", "turns", "object", "true", "false"]))
    if kind in ("true", "false"):
        return kind == "true"
    if kind == "turns":
        return [{"role": role, "content": text()} for role in ("user", "assistant")]
    return {
        "text": text(),
        "number": 10**6 + next(numbers),
        "texts": [text(), text()],
        "pairs": [[text(), text()]],
    }.get(kind, {"甲": text(), "乙": text()})


@st.composite
def records(draw: st.DrawFn) -> dict:
    """Draw a record, mostly with a question and an answer among its keys."""
    numbers = count(1)
    keys = draw(st.lists(KEYS, max_size=5))
    record = {key: draw(values(numbers)) for key in keys}
    if draw(st.booleans()) or draw(st.booleans()):
        record |= {draw(QUESTION): f"第{next(numbers)}问？", draw(ANSWER): f"第{next(numbers)}答。"}
    return {key: record[key] for key in draw(st.permutations(list(record)))}


def parts(sample: Sample) -> list[str]:
    return list(sample.texts())


def is_accounted_for(key: str, value: object, sample: Sample, of: str = "") -> bool:
    """Tell whether a value is in the sample's texts or its key in the remarks."""
    whole = "\n".join(parts(sample))
    if f"{NOT_READ}{key}{of}" in sample.remarks or all(text in whole for text in texts_in(value)):
        return True
    turns = value if isinstance(value, list) and all(isinstance(turn, dict) for turn in value) else []
    return bool(turns) and all(each in whole for turn in turns for each in texts_in(turn.get("content", "")))


@MANY
@given(records(), st.lists(KEYS, max_size=2), st.booleans())
def test_every_value_of_a_record_is_read_or_its_key_is_named(record: dict, ignored: list[str], trains: bool):
    columns = Columns(ignored=frozenset(ignored), trains_empty_outputs=trains)
    sample = to_sample(record, "行", columns)
    if isinstance(sample, Refused):
        assert sample.reason and sample.reason.isprintable()
        return
    assert sample.output.strip() or trains
    for key, value in record.items():
        says_good = key.strip().lower() in GOOD | BAD and isinstance(value, bool)
        assert carries_nothing(key) or says_good or is_accounted_for(key, value, sample), (key, sample)
    for key in set(ignored) & record.keys():
        assert f"{NOT_READ}{key}" in sample.remarks


@st.composite
def turns(draw: st.DrawFn) -> list[dict]:
    """Draw turns of two speakers, each with a few keys more."""
    numbers = count(1)
    drawn = []
    for speaker in draw(
        st.sampled_from([["user", "gpt"], ["system", "user", "bot", "用户", "助手"], ["gpt", "human", "ai"]])
    ):
        turn = {"role": speaker, "content": f"第{next(numbers)}句。"}
        if draw(st.booleans()):
            turn = {"question": f"第{next(numbers)}问？", "answer": f"第{next(numbers)}答。"}
        keys = draw(st.lists(TURN_KEYS, max_size=2))
        more = {key: draw(st.sampled_from([f"第{next(numbers)}外。", "user", 0, 1, None])) for key in keys}
        drawn.append(turn | more)
    return drawn


@MANY
@given(turns(), st.sampled_from(NAMES["messages"].split()))
def test_every_value_of_a_turn_is_read_or_its_key_is_named(turns: list[dict], name: str):
    sample = to_sample({name: turns}, "行")
    if isinstance(sample, Refused):
        assert sample.reason
        return
    while sample.note and "role" in turns[-1] and SPEAKERS[turns[-1]["role"]] == "user":  # cut, and so noted
        turns = turns[:-1]
    for key, value in ((key, value) for turn in turns for key, value in turn.items()):
        plain = key.strip().lower().replace(" ", "_").replace("-", "_")
        if plain in NO_MEANING or plain in TRAINED_KEYS or value is None:
            continue
        if plain in ("role", "from", "speaker") and str(value).lower() in SPEAKERS:
            continue
        assert is_accounted_for(key, value, sample, " of turns"), (key, sample)


@MANY
@given(records())
def test_what_is_advised_works_or_leads_to_other_advice(record: dict):
    """Type what a refusal says until the record is read, or nothing can be typed; never the same twice."""
    seen, columns = set(), Columns()
    while isinstance(result := to_sample(record, "行", columns), Refused):
        flags = result.reason.split("; type ")[1:]
        if not flags or "KEY" in flags[0] or "--empty_output" in flags[0]:
            return
        assert result.reason not in seen, result.reason
        seen.add(result.reason)
        columns = typed(flags[0].replace(", or ", " or ").replace(", for example ", " or ").split(" or ")[-1], columns)


def typed(advice: str, columns: Columns) -> Columns:
    words = shlex.split(advice)
    given = {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    own = DataArguments("x", **given).reads_by
    return Columns(own.by_hand or columns.by_hand, own.ignored or columns.ignored)


@pytest.mark.parametrize("key", UNKNOWN)
def test_an_unknown_key_beside_a_pair_is_named(key: str):
    sample = to_sample({"prompt": "问", "response": "答", key: "别的"}, "行")
    assert sample.remarks == (f"not read: {key}",)
