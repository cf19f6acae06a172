"""sft/shards.py: which files are read, how rows come out of them, and what is said of a file that is wrong."""

import codecs
import json
from pathlib import Path

import pytest

from sft.program import UserError
from sft.shards import Row, find_shards, read_rows

GOOD = '{"instruction": "你", "input": "们", "output": "好"}'
RECORDS = [
    {"instruction": "甲\n乙", "input": "丙", "output": "丁"},
    {"instruction": "\u2028行", "input": None, "output": "\n尾\n"},
    {"instruction": "无", "output": "😀"},
]


def write(folder: Path, content: str | bytes, name: str = "rows.json") -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def as_lines(records: list[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def error_of(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(read_rows(file))
    message = str(caught.value)
    assert "\n" not in message
    return message


def fields(rows: list[Row]) -> list[tuple[str, str, str]]:
    return [(row.instruction, row.input, row.output) for row in rows]


@pytest.mark.parametrize("content", [as_lines(RECORDS), json.dumps(RECORDS), json.dumps(RECORDS, indent=1)])
@pytest.mark.parametrize("before", [b"", codecs.BOM_UTF8, b"\n \r\n\t", codecs.BOM_UTF8 + b"\n\n"])
def test_lines_and_array_give_the_same_rows(tmp_path: Path, content: str, before: bytes):
    rows = list(read_rows(write(tmp_path, before + content.encode())))
    assert fields(rows) == [("甲\n乙", "丙", "丁"), ("\u2028行", "", "\n尾\n"), ("无", "", "😀")]


def test_place_of_a_line_counts_blank_lines(tmp_path: Path):
    file = write(tmp_path, f"\n{GOOD}\n\n  \n{GOOD}")
    assert [row.place for row in read_rows(file)] == [f"{file}:2", f"{file}:5"]


def test_place_in_an_array_is_the_index(tmp_path: Path):
    file = write(tmp_path, f"[{GOOD}, {GOOD}]")
    assert [row.place for row in read_rows(file)] == [f"{file}[0]", f"{file}[1]"]


def test_files_are_sorted_and_hidden_ones_ignored(tmp_path: Path):
    names = ["b.json", "a.jsonl", "sub/c.json", ".hidden.json", ".ipynb_checkpoints/b.json", "sub/.x/d.json", "e.txt"]
    for name in reversed(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(GOOD)
    (tmp_path / "folder.json").mkdir()
    assert [str(file.relative_to(tmp_path)) for file in find_shards(str(tmp_path))] == [
        "a.jsonl",
        "b.json",
        "sub/c.json",
    ]


def test_hidden_folder_above_the_data_does_not_matter(tmp_path: Path):
    (tmp_path / ".home").mkdir()
    file = write(tmp_path / ".home", GOOD)
    assert find_shards(str(tmp_path / ".home")) == [file]


def test_a_file_is_read_whatever_its_name(tmp_path: Path):
    file = write(tmp_path, GOOD, "rows.txt")
    assert find_shards(str(file)) == [file]


def test_rows_come_before_a_later_bad_line_is_met(tmp_path: Path):
    rows = read_rows(write(tmp_path, GOOD + "\nbad\n"))
    assert next(rows).output == "好"
    with pytest.raises(UserError):
        next(rows)


def test_missing_path_is_named_with_its_flag(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        find_shards(str(tmp_path / "nowhere"), "--eval_data_path")
    assert str(caught.value).startswith(f"--eval_data_path {tmp_path / 'nowhere'} does not exist")
    assert "\n" not in str(caught.value)


def test_folder_without_shards_is_named_with_its_flag(tmp_path: Path):
    write(tmp_path, GOOD, "rows.txt")
    with pytest.raises(UserError) as caught:
        find_shards(str(tmp_path))
    assert str(caught.value).startswith(f"--data_path {tmp_path} holds no")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("good_rows", [0, 3000])
def test_bytes_that_are_not_utf8_are_named_by_their_line(tmp_path: Path, good_rows: int):
    before = (GOOD + "\n").encode() * good_rows + b'{"instruction": "'
    file = write(tmp_path, before + "你好".encode("gbk") + b'"}')
    assert error_of(file).startswith(f"{file}:{good_rows + 1} is not UTF-8")


def test_bytes_that_are_not_utf8_in_an_array_are_named_by_their_line(tmp_path: Path):
    file = write(tmp_path, f"\n[{GOOD},\n{GOOD},\n".encode() + '{"instruction": "你好"}]'.encode("gbk"))
    assert error_of(file).startswith(f"{file}:4 is not UTF-8")


@pytest.mark.parametrize(
    "bad",
    ["{'instruction': 1}", GOOD[:-1], GOOD + GOOD, "\0", '{"a":' * 100_000, f'{{"a": {"9" * 5000}}}'],
    ids=["quotes", "cut off", "two rows", "NUL", "too deep", "too many digits"],
)
def test_bad_json_is_named_by_its_line(tmp_path: Path, bad: str):
    file = write(tmp_path, f"{GOOD}\n\n{bad}\n")
    assert error_of(file).startswith(f"{file}:3 ")


@pytest.mark.parametrize("bad", [f"[\n{GOOD}\n{GOOD}]", f"\n[{GOOD},\n'x']", f"[{GOOD},\n{GOOD},\n"])
def test_bad_json_in_an_array_is_named_by_its_line(tmp_path: Path, bad: str):
    file = write(tmp_path, bad)
    line = 1 + bad[: bad.rindex("\n") + 1].count("\n")
    assert error_of(file).startswith(f"{file}:{line} ")


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
    ],
)
def test_bad_row_is_named_by_its_place(tmp_path: Path, record: object, said: str):
    line = json.dumps(record)
    lines = write(tmp_path, f"{GOOD}\n{line}\n", "lines.json")
    array = write(tmp_path, f"[{GOOD}, {line}]", "array.json")
    for message, place in ((error_of(lines), f"{lines}:2"), (error_of(array), f"{array}[1]")):
        assert message.startswith(place)
        assert said in message
