"""Shards: the files of records, found, and read one block at a time, whatever their form and encoding."""

import codecs
import gzip
import io
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from sft.data.json_stream import (
    DECODER,
    MAX_RECORD_BYTES,
    READ_ERRORS,
    BrokenError,
    RepeatedKeys,
    guess_encoding,
    read_some,
    reason_of,
    spans_lines,
    values_of,
)
from sft.program import UserError, one_line

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
SHAPE = '{"instruction": "...", "input": "...", "output": "..."}'
BLOCK_RECORDS = 1000  # enough for a batched tokenizer, few enough to hold many blocks in memory
BLOCK_BYTES = 4 * 2**20
NUM_NAMED = 20  # refused rows that are printed; data_report.jsonl lists all
FAULTS = (BrokenError, pa.ArrowException, *READ_ERRORS)


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
    form: str  # "lines", "array", "objects" or "parquet"
    encoding: str
    start: int  # the line of the first record, or its index
    records: list[bytes | None] | list[object] | pa.RecordBatch  # None stands for a line that is too long
    position: int  # bytes of the shard read so far
    fault: Refused | None = None


# --------------------------------------------------------------------------------------------------------------- files


def find_shards(path: str, flag: str = "--data_path") -> list[Path]:
    """Return the shards at `path`, a file or a folder searched recursively, sorted; hidden ones are ignored.

    Folders that cannot be listed are included, so that reading them reports the fault. Raises UserError, naming the
    `flag` that gave the path, if the path does not exist or contains no shard.
    """
    root = Path(path)
    try:
        exists = root.exists()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be reached ({one_line(error)}); give a path that you may read") from None
    if not exists:
        raise UserError(
            f"{flag} {path} does not exist; expected a file of rows or a folder of them; "
            "run data_proj/process_data.ipynb to make data_proj/opendata, or try data_proj/sample"
        )
    if not root.is_dir():
        return [root]
    shards = sorted(_walk(root))
    if not shards:
        raise UserError(
            f"{flag} {path} contains no {', '.join(SUFFIXES)} file; expected files of rows such as {SHAPE}; "
            "run data_proj/process_data.ipynb, or try data_proj/sample"
        )
    return shards


def _walk(root: Path) -> Iterator[Path]:
    unlisted: list[OSError] = []
    visited = set()  # links may lead back to a parent folder
    for folder, folders, names in os.walk(root, followlinks=True, onerror=unlisted.append):
        state = Path(folder).stat()
        if (state.st_dev, state.st_ino) in visited:
            folders.clear()
            continue
        visited.add((state.st_dev, state.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(folder, name)
    yield from (Path(error.filename) for error in unlisted)


def size_of(shard: Path) -> int:
    """Return the size of a shard in bytes, 0 if it is not a file or cannot be accessed."""
    try:
        state = shard.stat()
    except OSError:
        return 0
    return state.st_size if stat.S_ISREG(state.st_mode) else 0


def place_of(shard: Path, form: str, number: int) -> str:
    """Return the place of a row, "file:line" or "file[index]", in printable characters."""
    where = f":{number}" if form == "lines" else f"[{number}]"
    return printable(str(shard)) + where


def printable(name: str) -> str:
    """Return a file's name as text that any terminal can print."""
    return name.encode("utf-8", "backslashreplace").decode()


# ------------------------------------------------------------------------------------------------------------- reading


def read_blocks(shard: Path) -> Iterator[Block]:
    """Yield a shard block by block; memory does not grow with the shard.

    The content decides the form: Parquet, one JSON array, JSON objects over several lines, else JSON Lines, the last
    three also compressed with gzip. Text is UTF-8 with or without a byte order mark, UTF-16 with one, or GB18030. If
    the rest of a file is unreadable, its last block says so.
    """
    start, position, form = 0, 0, "lines"
    try:
        if not stat.S_ISREG(shard.stat().st_mode):
            raise BrokenError("not a file" if not shard.is_dir() else "a folder that cannot be listed")
        with shard.open("rb") as raw:
            if raw.read(4) == b"PAR1":
                form, blocks = "parquet", _parquet_blocks(shard)
            else:
                form, encoding, mark = _look_into(_open(raw))
                stream = _open(raw)  # again, since a stream that failed once may act as if it had ended
                stream.seek(mark)
                start = int(form == "lines")
                blocks = _blocks(shard, form, encoding, start, _unparsed_records(stream, form, encoding), raw)
            for block in blocks:
                start, position = block.start + len(block.records), block.position
                yield block
    except FAULTS as error:
        reason = str(error) if isinstance(error, BrokenError) else f"cannot be read ({one_line(error)})"
        size = size_of(shard)
        fault = Refused(place_of(shard, form, start), reason, max(0, size - position))
        yield Block(shard, form, "utf-8", start, [], size, fault)


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


def _look_into(stream: io.BufferedIOBase) -> tuple[str, str, int]:
    """Return the form and encoding of a text file, and the length of its byte order mark."""
    head = read_some(stream)
    marks = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
    mark = next((mark for mark in marks if head.startswith(mark)), b"")
    encoding = marks[mark] if mark else guess_encoding(stream, head)
    text = head[len(mark) :].decode(encoding, "replace").lstrip(" \t\r\n")
    form = "array" if text.startswith("[") else "objects" if spans_lines(text) else "lines"
    return form, encoding, len(mark)


def _unparsed_records(stream: io.BufferedIOBase, form: str, encoding: str) -> Iterator[tuple[object, int]]:
    """Yield the records of a text file, each with its size: lines as UTF-8 or GB18030 bytes, others as JSON values."""
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


def _parquet_blocks(shard: Path) -> Iterator[Block]:
    start, size = 0, shard.stat().st_size
    with parquet.ParquetFile(shard, memory_map=True) as file:
        num_rows = file.metadata.num_rows
        for batch in file.iter_batches(BLOCK_RECORDS):
            position = size * (start + len(batch)) // num_rows
            yield Block(shard, "parquet", "utf-8", start, batch, position)
            start += len(batch)


# ---------------------------------------------------------------------------------------------------------------- JSON


def records_of(block: Block) -> Iterator[tuple[int, object]]:
    """Yield each record of a block as (line or index, its value or a Refused); blank lines are skipped."""
    if block.form == "parquet":
        yield from _parquet_records(block)
        return
    for number, record in enumerate(block.records, block.start):
        if block.form != "lines":
            yield number, record
        elif record is None:
            place = place_of(block.shard, block.form, number)
            yield number, Refused(place, f"over {MAX_RECORD_BYTES // 2**20} MiB long, too long for one row")
        elif record.strip():
            yield number, _parse_line(record, block, number)


def _parse_line(line: bytes, block: Block, number: int) -> object:
    try:
        return DECODER.decode(
            line.decode(block.encoding if block.encoding == "gb18030" else "utf-8", "surrogateescape")
        )
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        reason = f"invalid JSON ({reason_of(error)}{where})"
        return Refused(place_of(block.shard, block.form, number), reason, kind="invalid JSON")


def _parquet_records(block: Block) -> Iterator[tuple[int, object]]:
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
