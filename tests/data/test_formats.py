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
    shape = "instruction/input/output"
    assert first == Sample("你", "们", "好", f"{file}:1", shape=shape)
    assert last == Sample("你", "们", "好", f"{file}:3", shape=shape)
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
        (
            [{"instruction": "你", "output": "好"}, {"instruction": "我", "output": "坏"}],
            "a list of objects that may be rows or the turns of a conversation; give each",
        ),
        ({"data": [{"instruction": "你", "output": "好"}] * 2}, '"data" holds rows, or the turns of a conversation'),
        (
            {"input": "", "output": "好"},
            'no instruction found ("output" is the output); expected a key such as instruction',
        ),
        (
            {"instruction": "你", "input": ""},
            'no output found ("instruction" is the instruction); expected a key such as output',
        ),
        ({"title\n": "你", "output": "好"}, 'other keys: "title\\n"); type --columns instruction=title'),
        ({"response\n": " ", "prompt": "你"}, 'the "response\\n" is empty'),
        ({"instruction": 1, "output": "好"}, '"instruction" is not a string: 1'),
        ({"instruction": [1], "output": "好"}, "a turn is neither an object nor a text: turn 1 is 1"),
        ({"instruction": [1], "output": [2, "好"]}, '"output" is no reply to the last turn of "instruction"'),
        ({"instruction": [1], "output": [{"role": "user"}, 2]}, '"output" is no reply to the last turn'),
        ({"instruction": "你", "output": None}, 'the "output" is null'),
        ({"instruction": "你", "output": []}, 'the "output" is empty'),
        ({"instruction": "你", "output": ["好\n", "坏"]}, '"output" is not a string: ['),
        (
            {"instruction": "你", "output": {"role": "user", "content": "好"}},
            '"output" is not one trained reply',
        ),
        ({"instruction": "你", "output": {"content": "好", "weight": 0}}, '"output" is not one trained reply'),
        ({"instruction": "你", "output": "", "documents": ""}, 'the "output" is empty'),
        ({"instruction": "你", "input": 0, "output": "好"}, '"input" is not a string: 0'),
        ({"instruction": "你", "input": {"a": 1}, "output": "好"}, "\"input\" is not a string: {'a': 1}"),
        ({"messages": []}, 'the "messages" is empty'),
        ({"messages": "你"}, 'the "messages" is not a list of turns'),
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


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "你", "response\n": "好"}, ("你", "", "好")),
        ({"instruction": "你", "output": ["好\n"]}, ("你", "", "好\n")),
        ({"instruction": "你", "output": {"role": "assistant", "content": "好"}}, ("你", "", "好")),
        ({"instruction": "你", "output": [{"text": "好"}]}, ("你", "", "好")),
        ({"instruction": "你", "input": {}, "output": "好"}, ("你", "", "好")),
        ({"instruction": "你", "input": ["一", "二"], "output": "好"}, ("你", "一\n二", "好")),
        ({"instruction": "排序", "input": "[]", "output": "[]"}, ("排序", "[]", "[]")),
        ({"instruction": "你", "output": "{}", "history": "[]"}, ("你", "", "{}")),
        ({"instruction": None, "input": "你", "output": "好"}, ("你", "", "好")),
        ({"prompt": [{"role": "user", "content": "你"}], "completion": "好"}, ("你", "", "好")),
        ({"prompt": [{"role": "user", "content": "你"}], "completion": ["好"]}, ("你", "", "好")),
        ([{"prompt": "你", "response": "好"}], ("你", "", "好")),
        ([{"role": "user", "content": "你"}, {"role": "assistant", "content": "好"}], ("你", "", "好")),
    ],
)
def test_what_is_written_in_another_way_is_read_as_what_it_means(tmp_path: Path, record: object, expected: tuple):
    line = json.dumps(record)
    for content in (f"{GOOD}\n{line}\n", f"[{GOOD}, {line}]"):
        _, row = read_samples(write(tmp_path, content))
        assert (row.instruction, row.input, row.output) == expected
        assert (row.history, row.system, row.note, row.remarks) == ((), "", "", ())


@pytest.mark.parametrize(
    "history",
    [
        ["一", "二", "三", "四"],
        [["一", "二"], ["三", "四"]],
        [{"instruction": "一", "output": "二"}, {"question": "三", "answer": "四"}],
        [{"human": "一", "assistant": "二"}, {"human": "三", "assistant": "四"}],
        [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "一二三四", strict=True)],
    ],
)
def test_a_history_is_one_in_any_form(tmp_path: Path, history: list):
    record = {"instruction": "你", "output": "好", "history": history}
    [row] = read_samples(write(tmp_path, json.dumps(record)))
    assert (row.history, row.instruction, row.output) == ((("一", "二"), ("三", "四")), "你", "好")
    assert row.remarks == ()


def test_what_is_noted_of_keys_can_be_printed_by_any_terminal(tmp_path: Path):
    record = {"instruction": "你", "output": "好", "\ud83d": 1, "a\nb": 1, "长" * 1000: 1}
    [row] = read_samples(write(tmp_path, json.dumps(record)))
    assert row.remarks == ("not read: \\ud83d", "not read: a\\nb", f"not read: {'长' * 80}...")


def test_one_row_without_its_instruction_takes_it_from_no_other(tmp_path: Path):
    """Every row has an input and an output, which must not be read in place of the whole ones."""
    rows = [{"instruction": "译", "input": "句", "output": "sentence"}] * 3 + [{"input": "句", "output": "sentence"}]
    *found, last = read_samples(write(tmp_path, as_lines(rows)))
    assert [(row.instruction, row.input) for row in found] == [("译", "句")] * 3
    assert (last.instruction, last.input, last.output, last.shape) == ("句", "", "sentence", "input/output")
