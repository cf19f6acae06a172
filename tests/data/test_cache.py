"""Tokenised rows are found again, and made anew where anything about them changed."""

import errno
import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from sft.data import cache
from sft.data.encode import Encoder
from sft.data.formats import Sample
from sft.data.load import load_examples
from sft.data.report import DataReport
from sft.model.load import load_tokenizer
from sft.program import UserError


@pytest.fixture(params=["bloom-tiny", "falcon-tiny"])
def tokenizer(request: pytest.FixtureRequest, make_model: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(make_model(request.param)))


@pytest.fixture
def count_encoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that gives how many rows were encoded since it was last called."""
    counted, encode = [], Encoder.encode

    def encode_and_count(encoder: Encoder, rows: list[Sample]):
        counted.extend(rows)
        return encode(encoder, rows)

    def take() -> int:
        number = len(counted)
        counted.clear()
        return number

    monkeypatch.setattr(Encoder, "encode", encode_and_count)
    return take


def write_rows(path: Path, *rows: tuple[str, str]) -> str:
    records = [{"instruction": instruction, "input": "", "output": output} for instruction, output in rows]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def fields_of(report: DataReport) -> dict:
    return asdict(report) | {"duplicates": report.duplicates.tolist(), "entries": list(report.entries())}


def test_second_call_reads_the_cache(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, count_encoded: Callable):
    path = write_rows(tmp_path / "rows.json", ("问", "答"), ("空", ""), ("长", "长" * 5000))
    first, first_report = load_examples(path, tokenizer, str(tmp_path / "cache"))
    assert count_encoded() == 2  # a row that is refused is not encoded
    again, again_report = load_examples(path, tokenizer, str(tmp_path / "cache"))
    assert count_encoded() == 0
    assert first[:] == again[:] and len(first) == 2
    assert fields_of(first_report) == fields_of(again_report)
    assert len(fields_of(again_report)["entries"]) == 2


def test_few_rows_are_tokenised_without_another_process(tokenizer, tmp_path: Path, monkeypatch):
    path = write_rows(tmp_path / "rows.json", ("问", "答"), ("三", "四"))
    monkeypatch.setattr(cache, "workers", None)
    assert len(load_examples(path, tokenizer, str(tmp_path / "cache"), num_workers=2)[0]) == 2


@pytest.mark.parametrize("later", [1, 0], ids=["later", "at the same time"])
def test_changed_file_is_noticed(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, count_encoded: Callable, later: int
):
    path = write_rows(tmp_path / "rows.json", ("问", "甲"))
    load_examples(path, tokenizer, str(tmp_path / "cache"))
    state = Path(path).stat()
    write_rows(Path(path), ("问", "乙"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + later))
    examples, _ = load_examples(path, tokenizer, str(tmp_path / "cache"))
    assert count_encoded() == 2
    assert "乙" in tokenizer.decode(examples[0]["input_ids"])


def test_another_length_is_noticed(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, count_encoded: Callable):
    path = write_rows(tmp_path / "rows.json", ("问", "长" * 500))
    for length in (100, 200):
        tokenizer.model_max_length = length
        examples, _ = load_examples(path, tokenizer, str(tmp_path / "cache"))
        assert count_encoded() == 1
        assert len(examples[0]["input_ids"]) == length


def test_another_tokenizer_is_noticed(make_model: Callable[[str], Path], tmp_path: Path, count_encoded: Callable):
    path = write_rows(tmp_path / "rows.json", ("问", "答"))
    for shape in ("bloom-tiny", "falcon-tiny"):
        load_examples(path, load_tokenizer(str(make_model(shape))), str(tmp_path / "cache"))
        assert count_encoded() == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_cache_whose_disk_has_no_locks_asks_for_a_local_one(tokenizer, tmp_path, monkeypatch, number):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=f"{os.strerror(number)}; give a --cache_dir on a local disk, or"):
        load_examples(write_rows(tmp_path / "rows.json", ("问", "答")), tokenizer, str(tmp_path / "cache"))
