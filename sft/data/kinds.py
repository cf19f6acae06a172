"""What a file is, told by its content: a table, text of some form, or something that holds no rows."""

import io
import json
import zipfile
from pathlib import Path

from sft.data.json_stream import BrokenError, is_lines_of_lists, spans_lines, wrapped_in

TEXT_TABLES = ("csv", "tsv")
JSON, TEXTS = (".json", ".jsonl"), (".json", ".jsonl", ".csv", ".tsv")
SUFFIXES = (*TEXTS, *(f"{suffix}.gz" for suffix in TEXTS), ".xlsx", ".arrow", ".parquet")
# The last is how a stream of Arrow begins: the mark of a message, which no text begins with.
TABLES = {b"PAR1": "parquet", b"ARROW1\0\0": "arrow", b"\xff\xff\xff\xff": "arrow"}
HEAD_BYTES = 1024  # read to tell a table or an archive
OTHERS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, not the data; run git lfs pull",
    b"BZh": "compressed with bzip2; unpack it with bunzip2, or compress it with gzip",
    b"\xfd7zXZ\0": "compressed with xz; unpack it with unxz, or compress it with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it with unzstd, or compress it with gzip",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"Rar!\x1a\x07": "a RAR archive; unpack it first",
    b"PK\x05\x06": "an empty zip archive; expected rows",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old or locked Office file; save it as .xlsx, without a password",
    b"%PDF-": "a PDF document; expected rows",
    b"\x89PNG": "a PNG image; expected rows",
    b"\xff\xd8\xff": "a JPEG image; expected rows",
    b"SQLite format 3\0": "an SQLite database; export the table of rows as .csv",
    b"\x93NUMPY": "a NumPy array; expected rows of text",
    b"\x89HDF": "an HDF5 file; expected rows of text",
    **{
        b"\x80" + bytes([protocol]): "a Python pickle, which may run code when it is read; save the rows as JSON"
        for protocol in range(2, 6)
    },
}
EXPECTED = 'expected rows such as {"instruction": "...", "output": "..."}, or a table of them'
HTML = ("<!doctype html", "<html", "<head")


class NotRowsError(BrokenError):
    """A file as a whole is something else than rows."""


def table_in(raw: io.BufferedReader) -> str | None:
    """Return "parquet", "arrow" or "excel"; None for text, perhaps compressed; raise NotRowsError if it is neither."""
    head = raw.read(HEAD_BYTES)
    if head.startswith(b"PK\x03\x04"):
        return _excel_in(raw)
    refuse_others(head)
    return next((form for magic, form in TABLES.items() if head.startswith(magic)), None)


def refuse_others(head: bytes, is_unpacked: bool = False) -> None:
    """Raise NotRowsError if a file's first bytes, perhaps unpacked from gzip, are those of something else than rows."""
    for magic, reason in OTHERS.items():
        if head.startswith(magic):
            raise NotRowsError(reason)
    if head[257:262] == b"ustar":
        raise NotRowsError("a tar archive; unpack it with tar -xf")
    if is_unpacked and head.startswith((*TABLES, b"PK\x03\x04")):
        raise NotRowsError("a table or an archive that is compressed once more; unpack it with gunzip")


def _excel_in(raw: io.BufferedReader) -> str:
    try:
        with zipfile.ZipFile(raw) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        raise NotRowsError("a zip archive or .xlsx file that breaks off; copy or download it again") from None
    if "xl/workbook.xml" in names:
        return "excel"
    raise NotRowsError("a zip archive; unpack it first")


def text_form(text: str, name: str) -> str:
    """Return the form of a text that begins so, without blanks before it, in a file of that name.

    "array", 'array in "KEY"', "objects", "lines", "csv" or "tsv". Raises NotRowsError if it holds no rows.
    """
    if text.startswith("["):
        return "lines" if is_lines_of_lists(text) else "array"
    if text.startswith("{"):
        key = wrapped_in(text)
        return f"array in {json.dumps(key)}" if key else "objects" if spans_lines(text) else "lines"
    if text[:20].lower().startswith(HTML):
        raise NotRowsError("an HTML page, perhaps the error page of a download; download the data again")
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    if not text or suffix in JSON:
        return "lines"
    if suffix[1:] in TEXT_TABLES:
        return suffix[1:]
    if suffix in SUFFIXES:
        raise NotRowsError(f"named {suffix}, but it does not begin as such a file does; copy or download it again")
    if "\0" in text:
        raise NotRowsError(f"of no known kind; {EXPECTED}")
    raise NotRowsError(f"plain text has no questions and answers; {EXPECTED}")
