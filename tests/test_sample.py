"""data_proj/sample: the small files of our own have the form of the sets they stand for."""

import json
import re

import pytest

from support.project import SAMPLE

NAMES = [
    "Belle_open_source_0.5M",
    "Belle_open_source_1M",
    "generated_chat_0.4M",
    "multiturn_chat_0.8M",
    "own_with_input",
    "school_math_0.25M",
    "train_2M_CN",
]


def read_lines(name: str) -> list[str]:
    return (SAMPLE / f"{name}.json").read_text(encoding="utf-8").removesuffix("\n").split("\n")


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in read_lines(name)]


def test_there_are_the_seven_files():
    assert sorted(file.name for file in SAMPLE.iterdir() if not file.name.startswith(".")) == [
        f"{n}.json" for n in NAMES
    ]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_many_and_distinct(name: str):
    rows = read(name)
    assert len(rows) >= 50
    assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows)
    assert len({row["output"] for row in rows}) == len(rows)


@pytest.mark.parametrize("name", NAMES)
def test_lines_are_unescaped_with_the_three_keys_in_order(name: str):
    for line in read_lines(name):
        row = json.loads(line)
        assert list(row) == ["instruction", "input", "output"]
        assert all(isinstance(value, str) for value in row.values())
        assert json.dumps(row, ensure_ascii=False) == line


@pytest.mark.parametrize("name", NAMES)
def test_every_row_has_an_instruction_and_an_output(name: str):
    assert all(row["instruction"].strip() and row["output"].strip() for row in read(name))


@pytest.mark.parametrize("name", NAMES)
def test_input_is_empty_but_in_our_own_file(name: str):
    assert all(bool(row["input"].strip()) == (name == "own_with_input") for row in read(name))
    assert all(row["input"] == "" for row in read(name) if name != "own_with_input")


def test_generated_chat_ends_in_newlines():
    for row in read("generated_chat_0.4M"):
        assert row["instruction"].endswith("\n")
        assert row["output"].startswith("\n")
        assert row["output"].endswith("\n")


def test_multiturn_chat_alternates():
    for row in read("multiturn_chat_0.8M"):
        speakers = re.findall(r"^(Human|Assistant):", row["instruction"], re.MULTILINE)
        assert row["instruction"].startswith("Human:")
        assert row["instruction"].endswith("\nAssistant:")
        assert speakers == ["Human", "Assistant"] * (len(speakers) // 2)
        assert row["instruction"].count("Human:") + row["instruction"].count("Assistant:") == len(speakers)
        assert not re.search("Human:|Assistant:", row["output"])


def test_multiturn_chat_has_one_to_three_turns():
    assert {row["instruction"].count("Human:") for row in read("multiturn_chat_0.8M")} == {1, 2, 3}


def test_school_math_has_the_sets_loose_beginnings():
    rows = read("school_math_0.25M")
    for some in (
        [row["instruction"].startswith("题目：") for row in rows],
        [row["instruction"].startswith(" ") for row in rows],
        [row["output"].startswith("\n") for row in rows],
    ):
        assert 5 <= sum(some) < len(rows)
