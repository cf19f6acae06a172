"""Tables of rows under column names: CSV and TSV line by line, Excel sheet by sheet, Arrow and Parquet in batches."""

import csv
import io
import os
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from reprlib import Repr

import pyarrow as pa
from pyarrow import parquet
from python_calamine import CalamineWorkbook, SheetTypeEnum

from sft.data.json_stream import MAX_RECORD_BYTES, READ_ERRORS, BrokenError

BATCH_ROWS = 1000
DELIMITERS = ",\t;|"
SAMPLE_LINES, SAMPLE_CHARACTERS = 200, 2**18  # that decide the delimiter
MAX_NAME = 100  # characters in the name of a column
SHEET_ROWS = 2**32  # more than a sheet has, so that a number is that of a sheet and of its row
BRIEF = Repr()
BRIEF.maxstring = BRIEF.maxother = 40

# A row as a record; or why it is refused; or None where there is no row, or where the one above goes on.
Row = dict[str, str] | str | None


def column_names(cells: list[str]) -> list[str]:
    """Return the names of columns, as pandas gives them to those without; raise BrokenError if they are no names."""
    names = [cell.strip() or f"Unnamed: {number}" for number, cell in enumerate(cells)]
    said = f"the first row is {BRIEF.repr(cells)}; expected names of columns, such as instruction,input,output"
    if any(len(name) > MAX_NAME or not name.isprintable() for name in names) or not any(map(_is_name, cells)):
        raise BrokenError(said)
    if repeated := [name for name, number in Counter(names).items() if number > 1]:
        raise BrokenError(f"the first row names the column {BRIEF.repr(repeated[0])} twice; rename one of them")
    return names


def _is_name(cell: str) -> bool:
    return bool(cell.strip()) and not cell.strip().replace(".", "", 1).isdecimal()


def _to_row(cells: list[str], names: list[str]) -> Row:
    if not any(map(str.strip, cells)):
        return None
    if len(cells) != len(names):
        return f"has {_counted(cells, 'field')}; the first row names {_counted(names, 'column')}"
    return dict(zip(names, cells, strict=True))


def _counted(texts: list[str], name: str) -> str:
    return f"{len(texts):,} {name if len(texts) == 1 else f'{name}s'}"


# ----------------------------------------------------------------------------------------------------------------- CSV


class _Lines:
    """Lines of a text, which are counted, and kept from where `begin` was called."""

    def __init__(self, text: io.TextIOWrapper):
        self.text, self.number = text, 0
        self.fault: Exception | None = None  # of the stream, raised once everything before it is read
        self.sample = list(self._sample())
        self.lines = chain(self.sample, self._rest())
        self.begin()

    def _read(self) -> str:
        return self.text.readline(MAX_RECORD_BYTES)

    def _sample(self) -> Iterator[str]:
        num_characters = 0
        try:
            for line in islice(iter(self._read, ""), SAMPLE_LINES):
                yield line
                if (num_characters := num_characters + len(line)) > SAMPLE_CHARACTERS:
                    return
        except READ_ERRORS as error:
            self.fault = error

    def _rest(self) -> Iterator[str]:
        if self.fault:
            raise self.fault
        yield from iter(self._read, "")

    def begin(self) -> None:
        self.row, self.size = [], 0

    def num_bytes(self) -> int:
        return len("".join(self.row).encode(self.text.encoding, self.text.errors))

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.number += 1
        self.size += len(line)
        self.row.append(line)
        if self.size >= MAX_RECORD_BYTES:
            raise BrokenError(f"a row is over {MAX_RECORD_BYTES // 2**20} MiB long; is a quote never closed?")
        return line


def csv_rows(stream: io.BufferedIOBase, encoding: str) -> Iterator[tuple[Row, int]]:
    """Yield an entry for each line of CSV or TSV, with its size: a row where it begins."""
    errors = "surrogatepass" if encoding.startswith("utf-16") else "surrogateescape"
    text = io.TextIOWrapper(stream, encoding, errors, newline="")
    csv.field_size_limit(MAX_RECORD_BYTES)
    try:
        lines, names = _Lines(text), None
        delimiter, quoting = _guess("".join(lines.sample))
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
        while True:
            before = lines.number
            lines.begin()
            try:
                if (cells := next(reader, None)) is None:
                    return
                row = _to_row(cells, names) if names else None
                names = names or (column_names(cells) if any(map(str.strip, cells)) else None)
            except csv.Error as error:
                row = _refused(error, delimiter, bool(names))
            yield row, lines.size
            yield from ((None, 0) for _ in range(lines.number - before - 1))
    except BrokenError as error:
        error.num_bytes = lines.num_bytes() if names else sys.maxsize  # that is, all of the file
        raise
    finally:
        if not stream.closed:  # as it is if nobody reads to the end
            text.detach()  # otherwise it would close the stream


def _refused(error: csv.Error, delimiter: str, is_row: bool) -> str:
    """Return why a row is refused that cannot be split; raise BrokenError if nothing behind it can be read either."""
    if str(error) == "unexpected end of data":
        raise BrokenError("a quote that opens in this row is never closed") from None
    if not is_row:
        raise BrokenError(f"the first row names no columns ({error})") from None
    return f"cannot be split into fields ({error}); double a quote inside quotes".replace(repr(delimiter), "delimiter")


def _guess(sample: str) -> tuple[str, int]:
    """Return the delimiter of a text, and whether quotes mean something in it, as csv.QUOTE_MINIMAL or QUOTE_NONE."""
    ways = [(delimiter, csv.QUOTE_MINIMAL) for delimiter in DELIMITERS]
    best, plain = max(ways, key=lambda way: _merit(sample, *way)), ("\t", csv.QUOTE_NONE)
    is_plain = best[0] == "\t" and _merit(sample, *plain) > _merit(sample, *best) and not _quotes_fields(sample)
    return plain if is_plain else best


def _merit(sample: str, delimiter: str, quoting: int) -> tuple[bool, int, int]:
    """Return whether a text has several columns if split so, how many rows have as many as the first, and how many."""
    widths, is_strict = [], quoting == csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter, quoting=quoting, strict=is_strict)
    while True:
        try:
            if (cells := next(reader, None)) is None:
                break
        except csv.Error:
            continue
        if cells:
            widths.append(len(cells))
    width = widths[0] if widths else 0
    return width > 1, widths.count(width), width


def _quotes_fields(sample: str) -> bool:
    """Tell whether most fields, between tabs, that a quote opens are closed by one."""
    opened = [field for line in sample.splitlines() for field in line.split("\t") if field.startswith('"')]
    return 2 * sum(len(field) > 1 and field.endswith('"') for field in opened) > len(opened)


# --------------------------------------------------------------------------------------------------------------- Excel


def excel_sheets(shard: Path) -> Iterator[tuple[str, int, list[Row]]]:
    """Yield some consecutive rows after others of all sheets: the form, which has the sheets' names, and their number.

    A number is SHEET_ROWS times that of the sheet among those that are not empty, plus the row as Excel counts it.
    """
    with shard.open("rb") as raw, CalamineWorkbook.from_filelike(raw) as book:
        names = [each.name for each in book.sheets_metadata if each.typ == SheetTypeEnum.WorkSheet]
        sheets = [sheet for sheet in map(book.get_sheet_by_name, names) if sheet.end]
        form = f"excel {'/'.join(sheet.name.replace('/', '_') for sheet in sheets)}"  # Excel allows no / in a name
        for number, sheet in enumerate(sheets):
            start, rows = number * SHEET_ROWS + 1, _sheet_rows(sheet.iter_rows())
            while some := list(islice(rows, BATCH_ROWS)):
                yield form, start, some
                start += len(some)


def _sheet_rows(rows: Iterator[list[object]]) -> Iterator[Row]:
    names, first = None, 0
    for values in rows:
        cells = list(map(_cell, values))
        if names:
            named, more = cells[first : first + len(names)], cells[first + len(names) :]
            yield _to_row(named + more if any(more) else named, names)
        elif any(cells):
            first = next(number for number, cell in enumerate(cells) if cell)
            try:
                names = column_names(cells[first : 1 + max(number for number, cell in enumerate(cells) if cell)])
            except BrokenError as error:
                yield f"its sheet is not read: {error}"
                return
            yield None
        else:
            yield None


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return str(value).upper()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def place_in_sheet(form: str, number: int) -> str:
    """Return the sheet and row of a number, given the form with the sheets' names."""
    sheet, row = divmod(number, SHEET_ROWS)
    return f"{form.removeprefix('excel ').split('/')[sheet]} row {row}"


# --------------------------------------------------------------------------------------------------- Arrow and Parquet


def parquet_batches(shard: Path) -> Iterator[tuple[pa.RecordBatch, float]]:
    """Yield the rows of a Parquet file, and the share of the file read so far."""
    start = 0
    with pa.memory_map(os.fsencode(shard)) as source, parquet.ParquetFile(source) as file:
        num_rows = file.metadata.num_rows
        for batch in file.iter_batches(BATCH_ROWS):
            start += len(batch)
            yield batch, start / num_rows


def arrow_batches(shard: Path) -> Iterator[tuple[pa.RecordBatch, float]]:
    """Yield the rows of an Arrow file or stream, and the share of the file read so far."""
    with pa.memory_map(os.fsencode(shard)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        for batch, share in _batches_of_file(source) if is_file else _batches_of_stream(source):
            for start in range(0, len(batch), BATCH_ROWS):
                part = batch.slice(start, BATCH_ROWS)
                yield part if len(part) == len(batch) else _copied(part), share


def _batches_of_file(source: pa.MemoryMappedFile) -> Iterator[tuple[pa.RecordBatch, float]]:
    with pa.ipc.open_file(source) as file:
        for number in range(file.num_record_batches):
            yield file.get_batch(number), (number + 1) / file.num_record_batches


def _batches_of_stream(source: pa.MemoryMappedFile) -> Iterator[tuple[pa.RecordBatch, float]]:
    with pa.ipc.open_stream(source) as stream:
        for batch in stream:
            yield batch, source.tell() / source.size()


def _copied(part: pa.RecordBatch) -> pa.RecordBatch:
    """Return a part of a batch on its own, since another process would be sent the whole batch with it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, part.schema) as stream:
        stream.write_batch(part)
    return pa.ipc.open_stream(sink.getvalue()).read_next_batch()
