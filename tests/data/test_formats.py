"""Rows out of the values of a file, and what is said of one that is none."""

import json
from pathlib import Path

import pytest

from sft.data.formats import Sample, read_all, read_samples
from sft.data.shards import Refused
from sft.program import UserError
from support.files import GOOD, RECORDS, as_lines, write


def error_of(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(read_samples(file))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("content", [as_lines(RECORDS), json.dumps(RECORDS), json.dumps(RECORDS, indent=1)])
def test_lines_and_array_give_the_same_rows(tmp_path: Path, content: str):
    rows = list(read_samples(write(tmp_path, content)))
    expected = [("甲\n乙", "丙", "丁"), ("\u2028行", "", "\n尾\n"), ("无", "", "😀")]
    assert [(row.instruction, row.input, row.output) for row in rows] == expected
    assert {(row.history, row.system, row.note) for row in rows} == {((), "", "")}


def test_place_of_a_line_counts_blank_lines(tmp_path: Path):
    file = write(tmp_path, f"\n{GOOD}\n\n  \n{GOOD}")
    assert [row.place for row in read_samples(file)] == [f"{file}:2", f"{file}:5"]


def test_place_in_an_array_is_the_index(tmp_path: Path):
    file = write(tmp_path, f"[{GOOD}, {GOOD}]")
    assert [row.place for row in read_samples(file)] == [f"{file}[0]", f"{file}[1]"]


def test_rows_come_before_a_later_bad_line_is_met(tmp_path: Path):
    rows = read_samples(write(tmp_path, GOOD + "\nbad\n"))
    assert next(rows).output == "好"
    with pytest.raises(UserError):
        next(rows)


def test_rows_behind_a_bad_line_are_read_on(tmp_path: Path):
    file = write(tmp_path, f"{GOOD}\nbad\n{GOOD}\n")
    first, refused, last = read_all(file)
    assert (first, last) == (Sample("你", "们", "好", f"{file}:1"), Sample("你", "们", "好", f"{file}:3"))
    assert isinstance(refused, Refused) and refused.place == f"{file}:2"


def test_what_a_file_breaks_off_with_is_told_behind_its_rows(tmp_path: Path):
    file = write(tmp_path, f"[{GOOD},\n'x']")
    row, refused = read_all(file)
    assert row.output == "好" and refused.place == f"{file}[1]"
    assert error_of(file).startswith(f"{file}[1]: the rest of the file is unreadable: invalid JSON from here on")


@pytest.mark.parametrize("good_rows", [1, 3000])
def test_bytes_that_are_not_utf8_are_named_by_their_line(tmp_path: Path, good_rows: int):
    before = (GOOD + "\n").encode() * good_rows + b'{"instruction": "'
    file = write(tmp_path, before + "你好".encode("gbk") + b'", "output": "b"}')
    message = error_of(file)
    assert message.startswith(f'{file}:{good_rows + 1}: "instruction" contains ') and "not UTF-8" in message


def test_bytes_that_are_not_utf8_in_an_array_are_named_by_their_index(tmp_path: Path):
    bad = '{"instruction": "你好", "output": "b"}]'.encode("gbk")
    file = write(tmp_path, f"\n[{GOOD},\n{GOOD},\n".encode() + bad)
    message = error_of(file)
    assert message.startswith(f'{file}[2]: "instruction" contains ') and "not UTF-8" in message


@pytest.mark.parametrize(
    "bad",
    ["{'instruction': 1}", GOOD[:-1], GOOD + GOOD, "\0", '{"a":' * 100_000, f'{{"a": {"9" * 5000}}}'],
    ids=["quotes", "cut off", "two rows", "NUL", "too deep", "too many digits"],
)
def test_bad_json_is_named_by_its_line(tmp_path: Path, bad: str):
    file = write(tmp_path, f"{GOOD}\n\n{bad}\n")
    assert error_of(file).startswith(f"{file}:3: ")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([1], "list"),
        ("text\n", "str"),
        (None, "NoneType"),
        ({"input": "", "output": "好"}, '"instruction"'),
        ({"instruction": "你", "input": ""}, '"output"'),
        ({"prompt": "你", "response\n": "好"}, "prompt"),
        ({"instruction": 1, "output": "好"}, '"instruction" is 1'),
        ({"instruction": "你", "output": None}, '"output" is None'),
        ({"instruction": "你", "output": ["好\n"]}, '"output" is ['),
        ({"instruction": "你", "input": 0, "output": "好"}, '"input" is 0'),
        ({"instruction": "你", "input": {}, "output": "好"}, '"input" is {}'),
        ({"instruction": "你", "output": "\ud83d"}, '"output"'),
        ({"instruction": "你", "output": " \n"}, 'the "output" is empty'),
        ({"instruction": "", "input": None, "output": "好"}, 'the "instruction" is empty'),
    ],
)
def test_bad_row_is_named_by_its_place(tmp_path: Path, record: object, said: str):
    line = json.dumps(record)
    lines = write(tmp_path, f"{GOOD}\n{line}\n", "lines.json")
    array = write(tmp_path, f"[{GOOD}, {line}]", "array.json")
    for message, place in ((error_of(lines), f"{lines}:2: "), (error_of(array), f"{array}[1]: ")):
        assert message.startswith(place)
        assert said in message


def test_one_row_without_its_instruction_takes_it_from_no_other(tmp_path: Path):
    """Every row has the keys of the shape input/output, which must not be read in place of the whole one's."""
    rows = [{"instruction": "译", "input": "句", "output": "sentence"}] * 3 + [{"input": "句", "output": "sentence"}]
    *found, last = read_all(write(tmp_path, as_lines(rows)))
    assert [(row.instruction, row.input) for row in found] == [("译", "句")] * 3
    assert isinstance(last, Refused) and last.reason.startswith('no "instruction"')
