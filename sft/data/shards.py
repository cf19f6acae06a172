"""Shards: files of records, read one block at a time, whatever their form and encoding."""

import codecs
import gzip
import io
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
from python_calamine import CalamineError

from sft.data.json_stream import (
    DECODER,
    MAX_RECORD_BYTES,
    READ_ERRORS,
    BrokenError,
    RepeatedKeys,
    guess_encoding,
    read_some,
    reason_of,
    values_of,
)
from sft.data.kinds import TEXT_TABLES, NotRowsError, refuse_others, table_in, text_form
from sft.data.tables import Row, arrow_batches, csv_rows, excel_sheets, parquet_batches, place_in_sheet
from sft.program import one_line

LINE_FORMS = ("lines", *TEXT_TABLES)  # whose rows are numbered by lines
SHAPE = '{"instruction": "...", "input": "...", "output": "..."}'
BLOCK_RECORDS = 1000  # enough for a batched tokenizer, few enough to hold many blocks in memory
BLOCK_BYTES = 4 * 2**20
NUM_NAMED = 20  # refused rows that are printed; data_report.jsonl lists all
FAULTS = (BrokenError, pa.ArrowException, CalamineError, *READ_ERRORS)


@dataclass(frozen=True)
class Refused:
    """A row, or the rest of a file, that cannot be trained on, and why; `num_bytes` of the file stay unread."""

    place: str
    reason: str
    num_bytes: int = 0
    kind: str = ""  # the reason without what is this row's alone; rows are counted by it


@dataclass(frozen=True)
class Block:
    """Some consecutive records of a shard, not yet parsed, and the fault, if any, that makes the rest unreadable."""

    shard: Path
    form: (
        str  # "lines", "array", 'array in "KEY"', "objects", "csv", "tsv", "excel SHEETS", "arrow", "parquet", "unread"
    )
    encoding: str
    start: int  # the line of the first record, or its index
    # None stands for a line that is too long, and in a table for none; there a string says why a row is refused.
    records: list[bytes | None] | list[Row] | list[object] | pa.RecordBatch
    position: int  # bytes of the shard read so far
    fault: Refused | None = None


def size_of(shard: Path) -> int:
    """Return the size of a shard in bytes, 0 if it is not a file or cannot be accessed."""
    try:
        state = shard.stat()
    except OSError:
        return 0
    return state.st_size if stat.S_ISREG(state.st_mode) else 0


def place_of(shard: Path, form: str, number: int) -> str:
    """Return the place of a row, "file:line", "file[index]" or "file[sheet row 2]", in printable characters."""
    if form == "unread":  # no row of it is known
        where = ""
    elif form.startswith("excel"):
        where = f"[{place_in_sheet(form, number)}]"
    else:
        where = f":{number}" if form in LINE_FORMS else f"[{number}]"
    return printable(str(shard)) + where


@lru_cache
def printable(name: str) -> str:
    """Return a file's name as text that any terminal can print."""
    return name.encode("utf-8", "backslashreplace").decode()


# ------------------------------------------------------------------------------------------------------------- reading


def read_blocks(shard: Path) -> Iterator[Block]:
    """Yield a shard block by block; memory does not grow with the shard, unless that is an Excel file.

    The content decides the form: Parquet, Arrow, Excel, one JSON array, perhaps in an object, JSON objects over several
    lines, else JSON Lines, or CSV if the name says so; text may be compressed with gzip. Text is UTF-8 with or without
    a byte order mark, UTF-16 with one, or GB18030. If the rest of a file is unreadable, its last block says so.
    """
    start, position, form = 0, 0, "unread"
    try:
        if not stat.S_ISREG(shard.stat().st_mode):
            raise NotRowsError("not a file" if not shard.is_dir() else "a folder that cannot be listed")
        with shard.open("rb") as raw:
            if table := table_in(raw):
                form, blocks = table, _table_blocks(shard, table)
            else:
                form, encoding, mark = _look_into(_open(raw), shard.name)
                stream = _open(raw)  # again, since a stream that failed once may act as if it had ended
                stream.seek(mark)
                start = int(form in LINE_FORMS)
                blocks = _blocks(shard, form, encoding, start, _unparsed_records(stream, form, encoding), raw)
            for block in blocks:
                form, start, position = block.form, block.start + len(block.records), block.position
                yield block
    except FAULTS as error:
        if form == "excel":  # not opened, so that no sheet is known
            form = "unread"
        reason = str(error) if isinstance(error, BrokenError) else f"cannot be read ({one_line(error)})"
        size = size_of(shard)
        fault = Refused(place_of(shard, form, start), reason, max(0, size - position))
        yield Block(shard, form, "utf-8", start, [], size, fault)


def _table_blocks(shard: Path, form: str) -> Iterator[Block]:
    size = shard.stat().st_size
    if form == "excel":
        for form, start, rows in excel_sheets(shard):
            yield Block(shard, form, "utf-8", start, rows, size)
        return
    start = 0
    for batch, share in parquet_batches(shard) if form == "parquet" else arrow_batches(shard):
        yield Block(shard, form, "utf-8", start, batch, int(size * share))
        start += len(batch)


def _blocks(
    shard: Path, form: str, encoding: str, start: int, records: Iterator, raw: io.BufferedReader
) -> Iterator[Block]:
    """Collect records, each with its size, into blocks; the block where reading fails carries the fault."""
    size = os.fstat(raw.fileno()).st_size
    first, is_last = start, False
    while not is_last:
        block, is_last, error = _next_records(records)
        fault = None
        if error:
            unread = max(0, size - raw.tell()) + getattr(error, "num_bytes", 0)
            unread = min(size, unread) if start + len(block) > first else size
            reason = str(error) if isinstance(error, BrokenError) else f"reading failed ({one_line(error)})"
            fault = Refused(
                place_of(shard, form, start + len(block)), f"the rest of the file is unreadable: {reason}", unread
            )
        if block or fault:
            yield Block(shard, form, encoding, start, block, raw.tell(), fault)
        start += len(block)


def _next_records(records: Iterator[tuple[object, int]]) -> tuple[list, bool, Exception | None]:
    """Return the records of the next block, whether it is the last, and the error that ended it, if any."""
    block, num_bytes = [], 0
    try:
        for record, record_bytes in records:
            block.append(record)
            num_bytes += record_bytes
            if len(block) == BLOCK_RECORDS or num_bytes >= BLOCK_BYTES:
                return block, False, None
    except FAULTS as error:
        return block, True, error
    return block, True, None


def _open(raw: io.BufferedReader) -> io.BufferedIOBase:
    """Return a stream of the whole file, decompressed; what was decompressed before a fault is not lost."""
    raw.seek(0)
    is_packed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if is_packed else raw


def _look_into(stream: io.BufferedIOBase, name: str) -> tuple[str, str, int]:
    """Return the form and encoding of a text file, and the length of its byte order mark."""
    head = read_some(stream)
    refuse_others(head, is_unpacked=isinstance(stream, gzip.GzipFile))
    marks = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
    mark = next((mark for mark in marks if head.startswith(mark)), b"")
    encoding = marks[mark] if mark else guess_encoding(stream, head)
    text = head[len(mark) :].decode(encoding, "replace").lstrip(" \t\r\n")
    return text_form(text, name), encoding, len(mark)


def _unparsed_records(stream: io.BufferedIOBase, form: str, encoding: str) -> Iterator[tuple[object, int]]:
    """Yield the records of a text file, each with its size: lines as UTF-8 or GB18030 bytes, others as values."""
    if form in TEXT_TABLES:
        return csv_rows(stream, encoding)
    if form != "lines":
        return values_of(stream, form, encoding)
    return _utf16_lines(stream, encoding) if encoding.startswith("utf-16") else _lines(stream)


def _lines(stream: io.BufferedIOBase | io.TextIOWrapper) -> Iterator[tuple[bytes | str | None, int]]:
    ends = (b"\n", "\n")
    while line := stream.readline(MAX_RECORD_BYTES):
        if len(line) < MAX_RECORD_BYTES or line[-1:] in ends:
            yield line, len(line)
            continue
        while line and line[-1:] not in ends:
            line = stream.readline(MAX_RECORD_BYTES)
        yield None, MAX_RECORD_BYTES


def _utf16_lines(stream: io.BufferedIOBase, encoding: str) -> Iterator[tuple[bytes | None, int]]:
    text = io.TextIOWrapper(stream, encoding, "surrogatepass", newline="\n")
    try:
        for line, size in _lines(text):
            yield None if line is None else line.encode("utf-8", "surrogatepass"), size
    finally:
        if not stream.closed:  # as it is if nobody reads to the end
            text.detach()  # otherwise it would close the stream


# ------------------------------------------------------------------------------------------------------------- records


def records_of(block: Block) -> Iterator[tuple[int, object]]:
    """Yield each record of a block as (line or index, its value or a Refused); blank lines and rows are skipped."""
    if isinstance(block.records, pa.RecordBatch):
        yield from _batch_records(block)
    elif block.form == "lines":
        yield from _line_records(block)
    elif block.form in TEXT_TABLES or block.form.startswith("excel"):
        for number, row in enumerate(block.records, block.start):
            if row is not None:
                yield number, Refused(place_of(block.shard, block.form, number), row) if isinstance(row, str) else row
    else:
        yield from enumerate(block.records, block.start)


def _line_records(block: Block) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(block.records, block.start):
        if line is None:
            place = place_of(block.shard, block.form, number)
            yield number, Refused(place, f"over {MAX_RECORD_BYTES // 2**20} MiB long, too long for one row")
        elif line.strip():
            yield number, _parse_line(line, block, number)


def _parse_line(line: bytes, block: Block, number: int) -> object:
    text = line.decode(block.encoding if block.encoding == "gb18030" else "utf-8", "surrogateescape")
    try:
        if text.startswith("{"):  # as nearly all do; `decode` would look twice for blanks
            value, end = DECODER.raw_decode(text)
            if not text[end:].strip(" \t\r\n"):
                return value
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        if (unended := text.rstrip()).endswith(","):  # as where an array's rows were copied without its brackets
            try:
                return DECODER.decode(unended[:-1])
            except (ValueError, RecursionError):
                pass
        where = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        reason = f"invalid JSON ({reason_of(error)}{where})"
        return Refused(place_of(block.shard, block.form, number), reason, kind="invalid JSON")


def _batch_records(block: Block) -> Iterator[tuple[int, object]]:
    names = block.records.schema.names if len(block.records) else []
    record = dict if len(set(names)) == len(names) else RepeatedKeys
    for number in range(len(block.records)):
        try:
            yield block.start + number, record(block.records.slice(number, 1).to_pylist()[0])
        except UnicodeDecodeError:
            reason = "contains bytes that are not UTF-8"
        except (ValueError, OverflowError, LookupError, pa.ArrowException) as error:  # dates beyond Python's
            reason = f"contains a value that cannot be read ({one_line(error)})"
        else:
            continue
        yield block.start + number, Refused(place_of(block.shard, block.form, block.start + number), reason)
