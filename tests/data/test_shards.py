"""Which files are read, how values come out of them, and what is said of a file that is wrong."""

import codecs
import json
from pathlib import Path

import pytest

from sft.data.files import find_shards
from sft.data.shards import Block, Refused, read_blocks, records_of
from sft.program import UserError
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


# ----------------------------------------------------------------------------------------------------------- the files


def test_files_are_sorted_and_hidden_ones_ignored(tmp_path: Path):
    names = ["b.json", "a.jsonl", "sub/c.json", ".hidden.json", ".ipynb_checkpoints/b.json", "sub/.x/d.json", "e.txt"]
    names += ["f.jsonl.gz", "sub/g.parquet", "h.JSON.GZ", "i.gz"]
    for name in reversed(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(GOOD)
    (tmp_path / "folder.json").mkdir()
    assert [str(file.relative_to(tmp_path)) for file in find_shards(str(tmp_path))] == [
        "a.jsonl",
        "b.json",
        "f.jsonl.gz",
        "h.JSON.GZ",
        "sub/c.json",
        "sub/g.parquet",
    ]


def test_hidden_folder_above_the_data_does_not_matter(tmp_path: Path):
    (tmp_path / ".home").mkdir()
    file = write(tmp_path / ".home", GOOD)
    assert find_shards(str(tmp_path / ".home")) == [file]


def test_a_file_is_read_whatever_its_name(tmp_path: Path):
    file = write(tmp_path, GOOD, "rows.txt")
    assert find_shards(str(file)) == [file]
    assert values_in(file) == [(1, json.loads(GOOD))]


def test_missing_path_is_named_with_its_flag(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        find_shards(str(tmp_path / "nowhere"), "--eval_data_path")
    assert str(caught.value).startswith(f"--eval_data_path {tmp_path / 'nowhere'} does not exist")
    assert "\n" not in str(caught.value)


def test_folder_without_shards_is_named_with_its_flag(tmp_path: Path):
    write(tmp_path, GOOD, "rows.txt")
    with pytest.raises(UserError) as caught:
        find_shards(str(tmp_path))
    assert str(caught.value).startswith(f"--data_path {tmp_path} contains no")
    assert "\n" not in str(caught.value)


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
