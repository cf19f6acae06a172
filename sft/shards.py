"""Shards: the files that hold instruction rows, found and read one row at a time."""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sft.program import UserError, one_line

SHAPE = '{"instruction": "...", "input": "...", "output": "..."}'


@dataclass(frozen=True)
class Row:
    """One instruction row and the place it was read from, "file:line" or "file[index]"."""

    instruction: str
    input: str
    output: str
    place: str


def find_shards(path: str, flag: str = "--data_path") -> list[Path]:
    """Return the .json and .jsonl files at `path`, a file or a folder, sorted by name; hidden ones are ignored.

    Raises UserError, naming the `flag` that gave the path, if there is nothing there or no such file.
    """
    root = Path(path)
    if not root.exists():
        raise UserError(
            f"{flag} {path} does not exist; expected a .json or .jsonl file or a folder of them; "
            "run data_proj/process_data.ipynb to make data_proj/opendata, or try data_proj/sample"
        )
    if root.is_file():
        return [root]
    shards = [
        file
        for file in sorted(root.rglob("*"))
        if file.is_file()
        and file.suffix in {".json", ".jsonl"}
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    ]
    if not shards:
        raise UserError(
            f"{flag} {path} holds no .json or .jsonl file; expected shards of rows {SHAPE}; "
            "run data_proj/process_data.ipynb, or try data_proj/sample"
        )
    return shards


def read_rows(shard: Path) -> Iterator[Row]:
    """Yield the rows of a shard, JSON Lines or one JSON array, told apart by the first character.

    A missing or null input is "". Raises UserError with file and line if the file is not UTF-8 or not JSON, or a
    row is not an object with an instruction and an output that are strings.
    """
    with shard.open("rb") as file:
        if file.read(len(BOM_UTF8)) != BOM_UTF8:
            file.seek(0)
        start = file.tell()
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        file.seek(start)
        if first == b"[":
            for index, record in enumerate(_parse(file.read(), shard, 1)):
                yield _row(record, f"{shard}[{index}]")
        else:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _row(_parse(line.rstrip(), shard, number), f"{shard}:{number}")


def _parse(content: bytes, shard: Path, number: int) -> object:
    """Parse JSON that begins at line `number` of a shard."""
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = number + content.count(b"\n", 0, error.start)
        raise UserError(f"{shard}:{line} is not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        line = number + (error.lineno - 1 if isinstance(error, json.JSONDecodeError) else 0)
        raise UserError(
            f"{shard}:{line} is not JSON ({one_line(error)}); expected one row a line, {SHAPE}, or one JSON array of "
            "rows; mend or remove it"
        ) from None


def _row(record: object, place: str) -> Row:
    if not isinstance(record, dict):
        raise UserError(f"{place} is a JSON {type(record).__name__}; expected a row {SHAPE}")
    for field in ("instruction", "output"):
        if field not in record:
            raise UserError(
                f'{place} has no "{field}", only {sorted(record)}; expected a row {SHAPE}; rename the fields'
            )
    fields = {field: record.get(field) for field in ("instruction", "input", "output")}
    fields["input"] = "" if fields["input"] is None else fields["input"]
    for field, value in fields.items():
        if not isinstance(value, str):
            raise UserError(f'{place}: "{field}" is {value!r:.60}; expected a string, as in {SHAPE}')
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f'{place}: "{field}" holds half a character ({value[error.start]!r}, a lone surrogate); remove it'
            ) from None
    return Row(**fields, place=place)
