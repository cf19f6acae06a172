"""A few good records, and files that hold them."""

import json
from pathlib import Path

GOOD = '{"instruction": "你", "input": "们", "output": "好"}'
RECORDS = [
    {"instruction": "甲\n乙", "input": "丙", "output": "丁"},
    {"instruction": "\u2028行", "input": None, "output": "\n尾\n"},
    {"instruction": "无", "output": "😀"},
]


def write(folder: Path, content: str | bytes, name: str = "rows.json") -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def as_lines(records: list[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
