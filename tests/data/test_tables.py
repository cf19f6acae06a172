"""Rows of CSV, TSV, Excel and Arrow: what is in them, where they stand, and which are refused."""

import csv
import io
import os
import pickle
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from sft.data import tables
from sft.data.shards import Block, Refused, place_of, read_blocks, records_of
from support.dirt_files import parquet_bytes
from support.files import write
from support.workbook import workbook

ROWS = [
    {"ask": "春天，在哪里？", "more": "", "say": "在这里, 在那里"},
    {"ask": "两\n行\n", "more": '他说"好"', "say": "a;b\tc|d"},
    {"ask": " 007 ", "more": "1.0", "say": "冬"},
]


def found_in(file: Path) -> list[tuple[str, object]]:
    """Return the place of each row of a file, without the file, and the row or why it is refused."""
    found = []
    for block in read_blocks(file):
        for number, value in records_of(block):
            place = place_of(file, block.form, number)
            assert not isinstance(value, Refused) or value.place == place
            found.append((place.removeprefix(str(file)), value.reason if isinstance(value, Refused) else value))
        if block.fault:
            found.append((block.fault.place.removeprefix(str(file)), block.fault.reason))
    return found


def text_of(rows: list[dict[str, str]], **options: object) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ----------------------------------------------------------------------------------------------------------------- CSV


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("options", [{}, {"quoting": csv.QUOTE_ALL}, {"lineterminator": "\n"}])
def test_a_table_is_read_whatever_stands_between_its_fields(
    tmp_path: Path, delimiter: str, encoding: str, options: dict
):
    content = text_of(ROWS, delimiter=delimiter, **options).encode(encoding)
    for name in ("rows.csv", "rows.TSV"):
        assert found_in(write(tmp_path, content, name)) == list(zip((":2", ":3", ":6"), ROWS, strict=True))


def test_a_row_stands_where_it_begins_and_empty_ones_count_as_lines(tmp_path: Path):
    text = '\n\nask,say\n\n"春\n\n天",1\n,\n夏,2\n  \n秋,3'
    expected = [(":5", "春\n\n天", "1"), (":9", "夏", "2"), (":11", "秋", "3")]
    assert found_in(write(tmp_path, text, "rows.csv")) == [(place, {"ask": a, "say": b}) for place, a, b in expected]


def test_a_row_of_too_many_or_too_few_fields_is_refused_alone(tmp_path: Path):
    text = "ask,say\n春,1\n夏,2,多\n秋\n冬,4\n"
    assert found_in(write(tmp_path, text, "rows.csv")) == [
        (":2", {"ask": "春", "say": "1"}),
        (":3", "has 3 fields; the first row names 2 columns"),
        (":4", "has 1 field; the first row names 2 columns"),
        (":5", {"ask": "冬", "say": "4"}),
    ]


def test_a_quote_that_is_not_doubled_spoils_its_row_alone(tmp_path: Path):
    [(_, first), (place, said), (_, last)] = found_in(
        write(tmp_path, 'ask,say\n春,1\n"夏\n"又"夏",2\n冬,4\n', "rows.csv")
    )
    assert (first["ask"], last["ask"], place) == ("春", "冬", ":3")
    assert said == "cannot be split into fields (delimiter expected after '\"'); double a quote inside quotes"


def test_a_quote_that_is_never_closed_ends_the_file_where_its_row_begins(tmp_path: Path):
    file = write(tmp_path, 'ask,say\n春,1\n"夏,2\n冬,4\n', "rows.csv")
    [(_, first), (place, said)] = found_in(file)
    assert (first["ask"], place) == ("春", ":3")
    assert said == "the rest of the file is unreadable: a quote that opens in this row is never closed"
    [block] = read_blocks(file)
    assert block.fault.num_bytes == len('"夏,2\n冬,4\n'.encode())


def test_quotes_that_mean_nothing_between_tabs_stay(tmp_path: Path):
    text = 'ask\tsay\n"春"在哪里\t"这里\n"夏"呢\t那里\n'
    assert [row for _, row in found_in(write(tmp_path, text, "rows.tsv"))] == [
        {"ask": '"春"在哪里', "say": '"这里'},
        {"ask": '"夏"呢', "say": "那里"},
    ]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("1,2.5", "the first row is ['1', '2.5']; expected names of columns, such as instruction,input,output"),
        (f"问{'长' * 200},答", "the first row is ["),
        ('"问\n题",答', "the first row is ["),
        ("问,答,问", "the first row names the column '问' twice; rename one of them"),
        ('"问"题,答', "the first row names no columns ("),
    ],
)
def test_a_table_without_names_of_columns_is_not_read(tmp_path: Path, names: str, said: str):
    file = write(tmp_path, f"\n{names}\n3,4,5\n", "rows.csv")
    [(place, reason)] = found_in(file)
    assert place == ":2"
    assert [block.fault.num_bytes for block in read_blocks(file)] == [file.stat().st_size]
    assert reason.startswith(f"the rest of the file is unreadable: {said}")


def test_a_column_without_a_name_is_named_as_pandas_does(tmp_path: Path):
    assert found_in(write(tmp_path, ",ask,say\n0,春,夏\n", "rows.csv")) == [
        (":2", {"Unnamed: 0": "0", "ask": "春", "say": "夏"})
    ]


def test_bytes_that_are_not_text_spoil_their_field_alone(tmp_path: Path):
    content = ("ask,say\n" + "春天在哪里,这里\n" * 9).encode() + b"a\xff,b\n"
    assert found_in(write(tmp_path, content, "rows.csv"))[-1] == (":11", {"ask": "a\udcff", "say": "b"})


def test_numbers_go_on_from_block_to_block_and_a_file_may_be_left(tmp_path: Path):
    rows = [{"ask": f"{number}\n", "say": "x"} for number in range(2500)]
    file = write(tmp_path, text_of(rows), "rows.csv")
    assert found_in(file) == [(f":{2 + 2 * number}", row) for number, row in enumerate(rows)]
    blocks = list(read_blocks(file))
    assert len(blocks) == 6 and blocks[-1].position == file.stat().st_size
    next(read_blocks(file)).records.clear()


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "rows.csv"
    with file.open("w") as lines:
        lines.write("ask,say\n")
        lines.writelines(f'{number},"{"x" * 10_000}\n"\n' for number in range(8000))
    tracemalloc.start()
    assert sum(row is not None for block in read_blocks(file) for row in block.records) == 8000
    _, peak = tracemalloc.get_traced_memory()
    assert peak < 30 * 2**20 < file.stat().st_size / 2

    monkeypatch.setattr(tables, "MAX_RECORD_BYTES", 2**20)
    write(tmp_path, 'ask,say\n春,夏\n"' + "1,2\n" * 10**6, "rows.csv")
    [_, (place, said)] = found_in(file)
    assert (place, said.partition(": ")[2]) == (":3", "a row is over 1 MiB long; is a quote never closed?")


# --------------------------------------------------------------------------------------------------------------- Excel


def test_a_sheet_is_read_as_it_looks(tmp_path: Path):
    cells = [[12.0, 0.5, True], [10**15, None, " 春\n天 "], [None, None, None], [-3, "007", False]]
    file = write(tmp_path, workbook({"问答": [["a", "b", "c"], *cells]}), "rows.xlsx")
    assert found_in(file) == [
        ("[问答 row 2]", {"a": "12", "b": "0.5", "c": "TRUE"}),
        ("[问答 row 3]", {"a": "1000000000000000", "b": "", "c": " 春\n天 "}),
        ("[问答 row 5]", {"a": "-3", "b": "007", "c": "FALSE"}),
    ]


def test_every_sheet_with_names_is_read_wherever_its_table_begins(tmp_path: Path):
    sheets = {
        "train set": [["ask", "say"], ["春", "1"]],
        "empty": [],
        "别的": [[], [None, "say", "ask"], [None, "2", "夏"], ["note", "3", "秋"], [None, "4", "冬", "note"]],
        "numbers": [[1, 2], [3, 4]],
        "end": [["ask"], ["终"]],
    }
    file = write(tmp_path, workbook(sheets), "rows.xlsx")
    assert found_in(file) == [
        ("[train set row 2]", {"ask": "春", "say": "1"}),
        ("[别的 row 3]", {"ask": "夏", "say": "2"}),
        ("[别的 row 4]", {"ask": "秋", "say": "3"}),
        ("[别的 row 5]", "has 3 fields; the first row names 2 columns"),
        (
            "[numbers row 1]",
            "its sheet is not read: the first row is ['1', '2']; expected names of columns, such as "
            "instruction,input,output",
        ),
        ("[end row 2]", {"ask": "终"}),
    ]
    assert {block.form for block in read_blocks(file)} == {"excel train set/别的/numbers/end"}


def test_a_large_sheet_is_several_blocks(tmp_path: Path):
    rows = [["ask"], *([str(number)] for number in range(2500))]
    file = write(tmp_path, workbook({"a": [["x"]], "b": rows}), "rows.xlsx")
    assert found_in(file) == [(f"[b row {number + 2}]", {"ask": str(number)}) for number in range(2500)]
    assert len(list(read_blocks(file))) == 4


def test_a_broken_sheet_is_named(tmp_path: Path):
    content = workbook({"a": [["ask"], ["春"]]}).replace(b"<sheetData>", b"<sheetData<")
    [(place, said)] = found_in(write(tmp_path, content, "rows.xlsx"))
    assert place == "" and said.startswith("cannot be read (")


# --------------------------------------------------------------------------------------------------------------- Arrow


@pytest.mark.parametrize("new_writer", [pa.ipc.new_stream, pa.ipc.new_file])
def test_rows_of_arrow_are_read_in_parts_that_do_not_carry_the_rest(tmp_path: Path, new_writer: object):
    table = pa.table(
        {"ask": [f"{number} {'x' * 200}" for number in range(5500)], "kind": pa.array(["a"] * 5500).dictionary_encode()}
    )
    file = tmp_path / "rows.arrow"
    with pa.OSFile(str(file), "wb") as sink, new_writer(sink, table.schema) as writer:
        writer.write_table(table)
    assert found_in(file) == [(f"[{number}]", row) for number, row in enumerate(table.to_pylist())]
    blocks = list(read_blocks(file))
    assert [len(block.records) for block in blocks] == [1000] * 5 + [500]
    assert max(len(pickle.dumps(block)) for block in blocks) < file.stat().st_size / 4
    assert 0.99 * file.stat().st_size < blocks[-1].position <= file.stat().st_size


def test_a_name_that_is_not_utf8_does_not_matter(tmp_path: Path):
    table = pa.Table.from_pylist(ROWS)
    for number, write_table in enumerate((parquet_bytes, arrow_stream)):
        file = tmp_path / os.fsdecode(f"表{number}".encode("gbk"))
        file.write_bytes(write_table(table))
        blocks: list[Block] = list(read_blocks(file))
        assert [value for block in blocks for _, value in records_of(block)] == ROWS


def arrow_stream(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table)
    return buffer.getvalue()


def test_what_datasets_saves_is_read(tmp_path: Path):
    import datasets

    datasets.Dataset.from_list(ROWS * 10).save_to_disk(tmp_path / "set", num_shards=3)
    files = sorted((tmp_path / "set").glob("*.arrow"))
    assert [row for file in files for _, row in found_in(file)] == ROWS * 10
