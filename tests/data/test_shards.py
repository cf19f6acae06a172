"""How values come out of files of JSON, and what is said of a file that is wrong."""

import codecs
import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from sft.data.shards import Block, Refused, read_blocks, records_of
from support.files import GOOD, RECORDS, as_lines, write


def values_in(file: Path) -> list[tuple[int, object]]:
    """Return the line or index of each value of a file, and the value; no part of the file may be unreadable."""
    blocks = list(read_blocks(file))
    assert [block.fault for block in blocks if block.fault] == []
    return [numbered for block in blocks for numbered in records_of(block)]


def last_block(file: Path) -> Block:
    """Return the only block of a small file that breaks off."""
    [block] = read_blocks(file)
    assert "\n" not in block.fault.reason
    return block


# ----------------------------------------------------------------------------------------------------- lines and arrays


@pytest.mark.parametrize("content", [as_lines(RECORDS), json.dumps(RECORDS), json.dumps(RECORDS, indent=1)])
@pytest.mark.parametrize("before", [b"", codecs.BOM_UTF8, b"\n \r\n\t", codecs.BOM_UTF8 + b"\n\n"])
def test_lines_and_array_give_the_same_values(tmp_path: Path, content: str, before: bytes):
    file = write(tmp_path, before + content.encode())
    assert [value for _, value in values_in(file)] == RECORDS
    [block] = read_blocks(file)
    assert (block.form, block.encoding) == ("array" if content.startswith("[") else "lines", "utf-8")
    assert block.position == file.stat().st_size


def test_number_of_a_line_counts_blank_lines(tmp_path: Path):
    file = write(tmp_path, f"\n{GOOD}\n\n  \n{GOOD}")
    assert values_in(file) == [(2, json.loads(GOOD)), (5, json.loads(GOOD))]


def test_number_in_an_array_is_the_index(tmp_path: Path):
    file = write(tmp_path, f"[{GOOD}, {GOOD}]")
    assert values_in(file) == [(0, json.loads(GOOD)), (1, json.loads(GOOD))]


def test_numbers_go_on_from_block_to_block(tmp_path: Path):
    records = [{"number": number} for number in range(3500)]
    lines, array = write(tmp_path, as_lines(records), "a.jsonl"), write(tmp_path, json.dumps(records), "b.json")
    assert values_in(lines) == list(enumerate(records, 1))
    assert values_in(array) == list(enumerate(records))
    assert len(list(read_blocks(lines))) == len(list(read_blocks(array))) == 4


@pytest.mark.parametrize("good_rows", [1, 3000])
def test_bytes_that_are_not_utf8_spoil_their_line_alone(tmp_path: Path, good_rows: int):
    before = (GOOD + "\n").encode() * good_rows
    file = write(tmp_path, before + GOOD.encode().replace("好".encode(), b"\xff\xb3") + f"\n{GOOD}\n".encode())
    values = values_in(file)
    assert [number for number, _ in values] == list(range(1, good_rows + 3))
    assert values[good_rows][1]["output"] == "\udcff\udcb3"  # what is refused where it becomes a row
    assert all(value == json.loads(GOOD) for number, value in values if number != good_rows + 1)


def test_a_file_whose_every_row_is_in_gb18030_is_read_as_that(tmp_path: Path):
    for content, form in ((as_lines(RECORDS), "lines"), (f"\n[{GOOD},\n{GOOD}]", "array")):
        file = write(tmp_path, content.encode("gb18030"))
        [block] = read_blocks(file)
        assert (block.form, block.encoding) == (form, "gb18030")
        expected = RECORDS if form == "lines" else [json.loads(GOOD)] * 2
        assert [value for _, value in values_in(file)] == expected


BAD_LINES = {"quotes": "{'instruction': 1}", "cut off": GOOD[:-1], "NUL": "\0", "too deep": '{"a":' * 100_000}


@pytest.mark.parametrize(
    ("first", "bad"),
    [
        *((first, bad) for first in (False, True) for bad in BAD_LINES),
        (False, "two rows"),  # a file that begins so holds objects that follow one another
    ],
)
def test_bad_json_is_named_by_its_line_and_spoils_no_other(tmp_path: Path, first: bool, bad: str):
    bad = {**BAD_LINES, "two rows": GOOD + GOOD}[bad]
    file = write(tmp_path, f"{bad}\n{GOOD}\n\n{GOOD}\n" if first else f"{GOOD}\n\n{bad}\n{GOOD}\n")
    values = dict(values_in(file))
    refused = values.pop(1 if first else 3)
    assert isinstance(refused, Refused) and refused.reason.startswith("invalid JSON (")
    assert refused.place == f"{file}:{1 if first else 3}" and "\n" not in refused.reason
    assert values == dict.fromkeys((2, 4) if first else (1, 4), json.loads(GOOD))


def test_a_number_of_too_many_digits_for_python_spoils_nothing(tmp_path: Path):
    file = write(tmp_path, f'{GOOD}\n{{"a": {"9" * 5000}}}\n')
    assert [number for number, _ in values_in(file)] == [1, 2]


@pytest.mark.parametrize(
    ("bad", "good_rows"),
    [
        (f"[\n{GOOD}\n{GOOD}]", 1),
        (f"\n[{GOOD},\n'x']", 1),
        (f"[{GOOD},\n{GOOD},\n", 2),
        (f"[{GOOD},\n{GOOD[:-1]}", 1),
        (f"[{GOOD}] {GOOD}", 1),
        ("[", 0),
    ],
)
def test_an_array_that_breaks_off_keeps_what_came_before_and_names_the_index(tmp_path: Path, bad: str, good_rows: int):
    file = write(tmp_path, bad)
    block = last_block(file)
    assert list(records_of(block)) == [(number, json.loads(GOOD)) for number in range(good_rows)]
    assert block.fault.place == f"{file}[{good_rows}]"
    assert block.fault.reason.startswith("the rest of the file is unreadable: ")
    assert 0 <= block.fault.num_bytes <= file.stat().st_size
    if not bad.endswith(",\n"):  # which breaks off at its very end
        assert block.fault.num_bytes


# ------------------------------------------------------------------------------------------------------- other brackets


def test_a_file_of_rows_is_read_whatever_its_name(tmp_path: Path):
    for name in ("rows.txt", "rows", "rows.csv", "rows.parquet"):
        assert values_in(write(tmp_path, GOOD, name)) == [(1, json.loads(GOOD))]


@pytest.mark.parametrize("end", [",", " , "])
def test_a_comma_behind_the_last_row_is_nothing(tmp_path: Path, end: str):
    records = [json.loads(GOOD)] * 2
    spread = json.dumps(records[0], indent=1)
    for content in (f"[{GOOD},{GOOD}{end}]", f"{GOOD}{end}\n{GOOD}{end}\n", f"{spread}{end}\n{spread}{end}"):
        assert [value for _, value in values_in(write(tmp_path, content))] == records


def test_each_line_that_is_an_array_is_a_row(tmp_path: Path):
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in "春夏秋"]
    for end in ("", ","):
        file = write(tmp_path, "\n".join(json.dumps(each) + end for each in turns))
        assert values_in(file) == list(enumerate(turns, 1))
    assert values_in(write(tmp_path, json.dumps(turns[0]))) == [(1, turns[0])]


def test_rows_that_name_a_role_are_no_turns(tmp_path: Path):
    rows = [{"role": "老师", "question": "春", "answer": "夏"}] * 2
    for content in (json.dumps(rows), json.dumps({"data": rows})):
        assert values_in(write(tmp_path, content)) == list(enumerate(rows))


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_in_arrays_in_one_array_are_its_elements(tmp_path: Path, indent: int | None):
    rows = [[{"role": "user"}], [{"role": "user"}]]
    assert values_in(write(tmp_path, json.dumps(rows, indent=indent))) == list(enumerate(rows))
    assert values_in(write(tmp_path, "[[1],\n[2]\n]")) == [(0, [1]), (1, [2])]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("key", ["data", "instances", "rows", "examples", "items", "train"])
def test_an_object_around_the_rows_is_read_like_an_array(tmp_path: Path, key: str, indent: int | None):
    rows = [{"ask": "\n".join("春夏"), "say": str(number)} for number in range(2500)]
    around = {"type": "x", "version": 1.5, "note": None, key: rows, "test": [{"ask": "冬"}], "data_": {"n": 1}}
    file = write(tmp_path, json.dumps(around, indent=indent, ensure_ascii=False))
    assert values_in(file) == list(enumerate(rows))
    blocks = list(read_blocks(file))
    assert {block.form for block in blocks} == {f'array in "{key}"'} and len(blocks) == 3
    packed = write(tmp_path, gzip.compress(codecs.BOM_UTF16_LE + json.dumps(around).encode("utf-16-le")))
    assert [value for _, value in values_in(packed)] == rows


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"rows": [{"a": 1}', "expected , or ] after an element"),
        ('{"rows": [{"a": 1}]', "expected , or } after a value"),
        ('{"rows": [{"a": 1}], "more"}', "expected :"),
        ('{"rows":\n [{"a": 1}]} end', "more text follows the closing }"),
    ],
)
def test_an_object_around_the_rows_that_breaks_off_keeps_what_came_before(tmp_path: Path, bad: str, said: str):
    file = write(tmp_path, bad)
    block = last_block(file)
    assert list(records_of(block)) == [(0, {"a": 1})]
    assert block.fault.place == f"{file}[1]"
    assert block.fault.reason == f"the rest of the file is unreadable: {said}"


@pytest.mark.parametrize(
    "row",
    [
        {"data": ["问", "答"]},
        {"data": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]},
        {"id": 7, "items": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
        {"name": "task", "instruction": "译", "instances": [{"input": "问", "output": "答"}]},
        {"data": []},
        {"columns": ["a"], "data": [{"a": 1}]},
        {"more": [{"a": 1}]},
    ],
)
def test_a_row_with_an_array_of_its_own_is_a_row(tmp_path: Path, row: dict):
    assert values_in(write(tmp_path, json.dumps(row))) == [(1, row)]
    assert values_in(write(tmp_path, json.dumps(row, indent=1))) == [(0, row)]
    assert values_in(write(tmp_path, as_lines([row] * 3))) == [(number, row) for number in (1, 2, 3)]


def test_lines_or_objects_that_each_have_rows_are_not_the_object_around_them(tmp_path: Path):
    rows = [{"rows": [{"a": 1}, {"a": 2}]}] * 2
    for content in (as_lines(rows), "".join(json.dumps(row, indent=1) for row in rows)):
        assert [value for _, value in values_in(write(tmp_path, content))] == rows


def test_memory_does_not_grow_with_the_rows_in_an_object(tmp_path: Path):
    file = tmp_path / "rows.json"
    with file.open("w") as lines:
        lines.write('{"type": "pairs", "instances": [{"a": ""}')
        lines.writelines(f', {{"a": "{"x" * 10_000}"}}' for _ in range(5000))
        lines.write('], "test": [0')
        lines.writelines(f', "{"x" * 10_000}"' for _ in range(5000))
        lines.write("]}")
    tracemalloc.start()
    assert sum(len(block.records) for block in read_blocks(file)) == 5001
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 2**20 < file.stat().st_size / 4
