"""What holds no rows is named by its content, and tables are found under any name."""

import bz2
import codecs
import gzip
import io
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest

from sft.data.shards import Refused, read_blocks, records_of
from support.dirt_files import LFS, arrow_bytes, parquet_bytes
from support.files import GOOD, write
from support.workbook import workbook


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, GOOD)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("rows.json"), io.BytesIO())
    return buffer.getvalue()


def database(folder: Path) -> bytes:
    with sqlite3.connect(folder / "rows.db") as connection:
        connection.execute("create table pairs (ask text, say text)")
    connection.close()
    return (folder / "rows.db").read_bytes()


NOT_ROWS = {
    "a zip archive; unpack it first": zipped("rows.json"),
    "a zip archive or .xlsx file that breaks off": zipped("rows.json")[:-9],
    "an empty zip archive": b"PK\x05\x06" + bytes(18),
    "compressed with bzip2; unpack it with bunzip2": bz2.compress(GOOD.encode()),
    "compressed with xz; unpack it with unxz": lzma.compress(GOOD.encode()),
    "compressed with zstd; unpack it with unzstd": pa.compress(GOOD.encode(), "zstd", asbytes=True),
    "a 7z archive": b"7z\xbc\xaf\x27\x1c\0\x04",
    "a tar archive": tarred(),
    "a tar archive; unpack it with": gzip.compress(tarred()),
    "a Git LFS pointer, not the data; run git lfs pull": LFS,
    "an HTML page, perhaps the error page of a download": b"\r\n<!doctype HTML>\n<title>404",
    "an HTML page": codecs.BOM_UTF8 + b"<html lang='zh'>",
    "a PNG image": b"\x89PNG\r\n\x1a\n",
    "a PDF document": b"%PDF-1.7\n",
    "a Python pickle, which may run code": pickle.dumps([GOOD]),
    "a Python pickle": pickle.dumps([GOOD], protocol=2),
    "an old or locked Office file; save it as .xlsx": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "a table or an archive that is compressed once more; unpack it with gunzip": gzip.compress(parquet_bytes([{}])),
}


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.txt", "rows"])
@pytest.mark.parametrize("said", NOT_ROWS)
def test_what_holds_no_rows_is_named_in_a_sentence_and_is_unread(tmp_path: Path, said: str, name: str):
    file = write(tmp_path, NOT_ROWS[said], name)
    [block] = read_blocks(file)
    assert list(records_of(block)) == []
    assert isinstance(block.fault, Refused)
    assert (block.fault.place, block.fault.num_bytes) == (str(file), file.stat().st_size)
    assert block.fault.reason.startswith(said) and block.fault.reason.isprintable()


def test_a_database_is_named(tmp_path: Path):
    [block] = read_blocks(write(tmp_path, database(tmp_path)))
    assert block.fault.reason.startswith("an SQLite database; export")


@pytest.mark.parametrize("name", ["book.txt", "notes.md", "LOG", "rows.txt.gz"])
@pytest.mark.parametrize("content", ["从前有座山。\n山里有座庙。\n", '"quoted" words', codecs.BOM_UTF8 + b"text"])
def test_plain_text_is_refused_in_a_sentence(tmp_path: Path, name: str, content: str | bytes):
    file = write(tmp_path, content, name)
    [block] = read_blocks(file)
    assert block.fault.place == str(file)
    assert block.fault.reason.startswith("plain text has no questions and answers; expected rows such as {")


def test_bytes_of_no_known_kind_are_not_called_text(tmp_path: Path):
    [block] = read_blocks(write(tmp_path, b"\x01\x02\0\0rows", "rows.bin"))
    assert block.fault.reason.startswith("of no known kind; expected rows such as {")


def test_a_text_with_the_name_of_a_table_is_not_that(tmp_path: Path):
    for suffix in (".parquet", ".arrow", ".xlsx"):
        [block] = read_blocks(write(tmp_path, "ask,say\n1,2", f"rows{suffix}"))
        assert block.fault.reason.startswith(f"named {suffix}, but it does not begin as such a file does")


@pytest.mark.parametrize("name", ["rows.txt", "rows.json", "rows", "数据.csv", "rows.parquet"])
def test_tables_are_found_under_any_name(tmp_path: Path, name: str):
    row = {"ask": "春", "say": "夏"}
    for content, form in (
        (parquet_bytes([row]), "parquet"),
        (arrow_bytes(rows=[row]), "arrow"),
        (arrow_bytes(pa.ipc.new_file, [row]), "arrow"),
        (workbook({"一": [list(row), list(row.values())]}), "excel 一"),
    ):
        [block] = read_blocks(write(tmp_path, content, name))
        assert block.form == form
        assert [value for _, value in records_of(block)] == [row]
