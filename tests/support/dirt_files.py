"""Dirt in files: gzip and Parquet, whole and broken, links, folders and what else has a shard's name; and all kinds."""

import codecs
import gzip
import io
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from support.dirt import (
    CANNOT_GO_ON,
    CHAT,
    GOOD,
    Kind,
    array,
    array_kinds,
    encoding_kinds,
    line_kinds,
    lines,
    row,
    value_kinds,
)
from support.workbook import workbook

CANNOT_BE_READ = "cannot be read ("
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

# ---------------------------------------------------------------------------------------------------------------- gzip


def flushed(text: str) -> bytes:
    """Return gzip's bytes of a text, all of which can be unpacked, though more should follow."""
    packer = zlib.compressobj(wbits=31)
    return packer.compress(text.encode()) + packer.flush(zlib.Z_FULL_FLUSH)


def gzip_kinds() -> list[Kind]:
    whole = gzip.compress(lines(*GOOD).encode())
    utf16 = gzip.compress(codecs.BOM_UTF16_LE + array(*GOOD).encode("utf-16-le"))
    two = gzip.compress(lines(*GOOD[:2]).encode()) + gzip.compress(lines(GOOD[2]).encode())
    nothing = {":1": CANNOT_GO_ON}
    return [
        Kind("gzip", whole, name="gzip.jsonl.gz"),
        Kind("gzip of an array in UTF-16", utf16, name="gzip16.json.gz"),
        Kind("gzip named .json", whole),
        Kind("gzip of two members", two, name="two.json.gz"),
        Kind("gzip of nothing", gzip.compress(b""), [], name="nothing.json.gz"),
        Kind("gzip cut, lines", flushed(lines(*GOOD)[:-6]), GOOD[:2], {":3": CANNOT_GO_ON}),
        Kind("gzip cut, array", flushed(array(*GOOD)[:-6]), GOOD[:2], {"[2]": CANNOT_GO_ON}),
        Kind("gzip cut in its header", b"\x1f\x8b\x08", [], nothing),
        Kind("gzip of an unknown method", b"\x1f\x8b\x07abcdefg", [], nothing),
        Kind("gzip, then rubbish", b"\x1f\x8b" + b"rubbish" * 99, [], nothing),
        Kind("gzip with rubbish behind it", whole + b"rubbish", GOOD, {":4": CANNOT_GO_ON}),
        Kind("text named .gz", lines(*GOOD).encode(), name="text.json.gz"),
    ]


# ------------------------------------------------------------------------------------------------------------- parquet


def parquet_bytes(table: pa.Table | list[dict], **options: object) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(table if isinstance(table, pa.Table) else pa.Table.from_pylist(table), buffer, **options)
    return buffer.getvalue()


def broken_half() -> bytes:
    """Return a thousand rows that can be read, and a thousand behind them that cannot."""
    content = parquet_bytes(GOOD[:1] * 2000, row_group_size=1000, use_dictionary=False, compression="zstd")
    column = parquet.ParquetFile(io.BytesIO(content)).metadata.row_group(1).column(0)
    start, length = column.data_page_offset, column.total_compressed_size
    return content[:start] + b"x" * length + content[start + length :]


def spoilt_second_rows() -> list[Kind]:
    """Return Parquet files of three rows, of which the second has a value that is refused."""
    texts = {"instruction": ["甲"] * 3, "output": ["一"] * 3}
    kept, unread = [row(instruction="甲", input="", output="一")] * 2, "contains a value that cannot be read ("
    not_utf8 = pa.array([b"a", b"\xff", b"b"]).cast(pa.string(), safe=False)
    map_second = pa.array([None, [(1, 2)], None], pa.map_(pa.int64(), pa.int64()))  # in Python a list of tuples
    bad_seconds = {
        "bytes that are not UTF-8": ({"more": not_utf8}, "contains bytes that are not UTF-8"),
        "a date beyond Python's": ({"more": pa.array([0, 2**30, 0], pa.date32())}, unread),
        "one null": ({"output": ["一", None, "一"]}, 'the "output" is null'),
        "a map for an input": ({"input": map_second}, '"input" is not a string: [(1, 2)]'),
        "a map for a history": ({"history": map_second}, "a turn is neither an object nor a text: turn 1 is (1, 2)"),
    }
    return [
        Kind(f"parquet of {name}", parquet_bytes(pa.table(texts | columns)), kept, {"[1]": said})
        for name, (columns, said) in bad_seconds.items()
    ]


def parquet_kinds() -> list[Kind]:
    whole, no_rows = parquet_bytes(GOOD), pa.table({"instruction": ["甲"], "output": ["一"]}).slice(0, 0)
    twice = pa.table([["甲"], ["一"], ["二"]], ["instruction", "output", "output"])
    refused = dict.fromkeys(("[0]", "[1]"))
    return [
        *spoilt_second_rows(),
        Kind("parquet", whole, name="whole.parquet"),
        Kind("parquet named .json", whole),
        Kind("parquet of conversations", parquet_bytes([CHAT, CHAT]), [GOOD[0]] * 2, name="chat.parquet"),
        Kind("parquet of no rows", parquet_bytes(no_rows), [], name="no rows.parquet"),
        Kind("text named .parquet", lines(*GOOD).encode(), name="text.parquet"),
        Kind("parquet of other columns", parquet_bytes([{"text": "甲"}]), [], {"[0]": "pretraining text: "}),
        Kind(
            "parquet of a null column",
            parquet_bytes([{"instruction": "甲", "output": None}] * 2),
            [],
            refused | {place: 'the "output" is null' for place in refused},
        ),
        Kind(
            "parquet of numbers",
            parquet_bytes([{"instruction": 1, "output": 2}] * 2),
            [],
            refused | {place: '"instruction" is not a string: 1' for place in refused},
        ),
        Kind(
            "parquet, a column twice", parquet_bytes(twice), [], {"[0]": 'a key appears twice: "instruction", "output"'}
        ),
        Kind("parquet cut", whole[:-20], [], {"[0]": CANNOT_BE_READ}),
        Kind("parquet of four bytes", b"PAR1", [], {"[0]": CANNOT_BE_READ}),
        Kind("parquet broken in the middle", broken_half(), GOOD[:1] * 1000, {"[1000]": CANNOT_BE_READ}),
    ]


# -------------------------------------------------------------------------------------------------------------- tables

CSV = 'instruction,input,output\n甲,,一\n"乙\n丙",丁,二\t二\n戊。,," 三\n"\n'


def arrow_bytes(new_writer: Callable = pa.ipc.new_stream, rows: list[dict] = GOOD) -> bytes:
    table, buffer = pa.Table.from_pylist(rows), io.BytesIO()
    with new_writer(buffer, table.schema) as writer:
        for batch in table.to_batches(1000):
            writer.write_batch(batch)
    return buffer.getvalue()


def csv_kinds() -> list[Kind]:
    long, mixed = [*CSV.splitlines(), "己,庚"], f'{CSV}"己" 庚,,辛\n壬,,癸\n'
    return [
        Kind("CSV", CSV.encode(), name="rows.csv"),
        Kind("CSV with a mark, CRLF", codecs.BOM_UTF8 + CSV.replace(",", ";").encode(), name="marked.csv"),
        Kind("CSV in GB18030", CSV.encode("gb18030"), name="gb.csv"),
        Kind("CSV in UTF-16, gzip", gzip.compress(CSV.encode("utf-16")), name="rows.csv.gz"),
        Kind(
            "CSV with a short row",
            "\n".join(long).encode(),
            GOOD,
            {":7": "has 2 fields; the first row names 3"},
            name="short.csv",
        ),
        Kind(
            "CSV with a stray quote",
            mixed.encode(),
            [*GOOD, row(instruction="壬", input="", output="癸")],
            {":7": "cannot be split into fields ("},
            name="stray.csv",
        ),
        Kind(
            "CSV with an open quote",
            f'{CSV}己,,"庚\n'.encode(),
            GOOD,
            {":7": "a quote that opens in this row"},
            name="open.csv",
        ),
        Kind(
            "CSV of no names", b"1,2\n3,4\n", [], {":1": "the first row is ['1', '2']; expected names"}, name="none.csv"
        ),
        Kind("CSV, a column twice", b"a,a\n3,4\n", [], {":1": "names the column 'a' twice"}, name="twice.csv"),
        Kind("CSV in gzip, cut", flushed(CSV), GOOD, {":7": CANNOT_GO_ON}, name="cut.csv.gz"),
        Kind("CSV of nothing", b" \n\n", [], name="nothing.csv"),
        Kind("JSON named .csv", lines(*GOOD).encode(), name="lines.csv"),
        Kind("TSV", CSV.replace("二\t二", '"二\t二"').replace(",", "\t").encode(), name="rows.tsv"),
    ]


def table_kinds() -> list[Kind]:
    many = arrow_bytes(rows=GOOD[:1] * 2000)
    return [
        Kind("Arrow stream", arrow_bytes(), name="stream.arrow"),
        Kind("Arrow file named .json", arrow_bytes(pa.ipc.new_file)),
        Kind("Arrow stream, cut", many[: 3 * len(many) // 4], GOOD[:1] * 1000, {"[1000]": CANNOT_BE_READ}),
        Kind("Arrow file, cut", arrow_bytes(pa.ipc.new_file)[:-20], [], {"[0]": CANNOT_BE_READ}),
        Kind("Excel", workbook({"问答": [list(GOOD[0]), *map(dict.values, GOOD)]}), name="rows.xlsx"),
        Kind("Excel, cut", workbook({"a": [["b"]]})[:-30], [], {"": "a zip archive or .xlsx file that breaks off"}),
        Kind("text named .xlsx", b"instruction", [], {"": "named .xlsx, but it does not begin as"}, name="text.xlsx"),
        Kind("zip", gzip.compress(b"PK\x03\x04"), [], {"": "compressed once more"}),
        Kind("pickle", pickle.dumps(GOOD), [], {"": "a Python pickle"}),
        Kind("HTML", b"\n<!DOCTYPE html>\n<p>404", [], {"": "an HTML page, perhaps the error page"}),
        Kind("Git LFS pointer", LFS, [], {"": "a Git LFS pointer, not the data; run git lfs pull"}, name="lfs.parquet"),
    ]


# --------------------------------------------------------------------------------------------------------------- files


def write_good(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(lines(*GOOD), encoding="utf-8")
    return file


def link_to(target: str, has_target: bool = False) -> Callable[[Path], None]:
    def make(file: Path) -> None:
        file.symlink_to(target)
        if has_target:
            write_good(file.with_name(target))

    return make


def make_circle(file: Path) -> None:
    file.symlink_to("circle.link")
    file.with_name("circle.link").symlink_to(file.name)


def make_loop(file: Path) -> None:
    write_good(file)
    (file.parent / "again").symlink_to(".")
    (file.parent / "below").mkdir()
    (file.parent / "below" / "up").symlink_to("..")


def make_hidden(file: Path) -> None:
    write_good(file)
    for name in (".hidden.json", ".ipynb_checkpoints/rows.json", "rows.txt", "rows.json.bak", "sub/.git/rows.json"):
        write_good(file.parent / name)


def make_unreadable(file: Path) -> None:
    write_good(file).chmod(0)


def file_kinds() -> list[Kind]:
    no_file = {"": "not a file"}
    missing, circle = ({"": f"{CANNOT_BE_READ}[Errno {number}]"} for number in (2, 40))
    read = os.geteuid() == 0  # root may read any file
    unreadable = [] if read else {"": f"{CANNOT_BE_READ}[Errno 13]"}
    odd_name = os.fsdecode("数据".encode("gbk") + b".json")
    return [
        Kind("folder with a shard's name", write_good, name="folder.json/rows.json"),
        Kind("link", link_to("rows.txt", has_target=True)),
        Kind("link to nothing", link_to("nowhere"), [], missing),
        Kind("circle of links", make_circle, [], circle),
        Kind("folders in a circle", make_loop, name="loop/rows.json"),
        Kind("hidden files around", make_hidden, name="seen/rows.json"),
        Kind("unreadable", make_unreadable, GOOD if read else [], {} if read else unreadable),
        Kind("pipe", os.mkfifo, [], no_file),
        Kind("device", link_to("/dev/zero"), [], no_file),
        Kind("name in GBK", write_good, name=odd_name),
        Kind("name in capitals", write_good, name="数 据.JSONL"),
    ]


KINDS = [
    kind
    for kinds in (
        value_kinds,
        encoding_kinds,
        line_kinds,
        array_kinds,
        gzip_kinds,
        parquet_kinds,
        table_kinds,
        file_kinds,
    )
    for kind in kinds()
]
