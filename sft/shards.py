"""Shards: the files that hold instruction rows, found and read one row at a time."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sft.program import UserError

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
    try:
        with shard.open(encoding="utf-8-sig") as file:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            file.seek(0)
            yield from _read_array(shard, file.read()) if first == "[" else _read_lines(shard, file)
    except UnicodeDecodeError as error:
        raise UserError(f"{shard} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _read_lines(shard: Path, lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{shard}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{place} is not JSON ({error.msg} at column {error.colno}); "
                    f"expected one row a line, {SHAPE}, or one JSON array of rows; mend or remove the line"
                ) from None
            yield _row(record, place)


def _read_array(shard: Path, text: str) -> Iterator[Row]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{shard}:{error.lineno} is not JSON ({error.msg} at column {error.colno}); "
            f"expected an array of rows {SHAPE}; mend the file"
        ) from None
    for index, record in enumerate(records):
        yield _row(record, f"{shard}[{index}]")


def _row(record: object, place: str) -> Row:
    if not isinstance(record, dict):
        raise UserError(f"{place} is a JSON {type(record).__name__}; expected a row {SHAPE}")
    for field in ("instruction", "output"):
        if field not in record:
            raise UserError(
                f'{place} has no "{field}", only {sorted(record)}; expected a row {SHAPE}; rename the fields'
            )
        if not isinstance(record[field], str):
            raise UserError(f'{place}: "{field}" is {record[field]!r:.60}; expected a string, as in {SHAPE}')
    input = record.get("input")
    if input is not None and not isinstance(input, str):
        raise UserError(f'{place}: "input" is {input!r:.60}; expected a string, null or nothing, as in {SHAPE}')
    return Row(record["instruction"], input or "", record["output"], place)
