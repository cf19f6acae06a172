"""Tokenised rows as a data set, and its examples as one flat row.

Shapes: R = rows of the data set, T = tokens of all examples in a flat row.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sft import IGNORE_INDEX
from sft.data import cache
from sft.data.cache import Counts
from sft.data.encode import check_length
from sft.data.shards import SHAPE, find_shards, place_of


@dataclass
class DataReport:
    """What became of every row that was read: counts.rows = kept + counts.refused + duplicates."""

    counts: Counts
    notes: Path  # one JSON line for each row that was refused or cut
    kept: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    longest: int = 0  # tokens of a row
    # File and row of each row left out as a duplicate, and of the first one with its text, (D, 4).
    duplicates: np.ndarray = field(default_factory=lambda: np.empty((0, 4), np.int64))

    @property
    def bad_fraction(self) -> float:
        """Return the share of refused rows, or that of bytes which could not be read if it is larger."""
        counts = self.counts
        return max(counts.refused / max(1, counts.rows), counts.unread_bytes / max(1, counts.num_bytes))

    def what_is_wrong(self, max_bad_fraction: float) -> str | None:
        """Return why no run should train on this, if so."""
        counts = self.counts
        if not counts.rows:
            return f"has no row to train on; expected rows such as {SHAPE}"
        if self.bad_fraction > max_bad_fraction:
            unread = (
                f" and {counts.unread_bytes:,} of {counts.num_bytes:,} bytes not read" if counts.unread_bytes else ""
            )
            return (
                f"has {counts.refused:,} of {counts.rows:,} rows refused{unread}, more than --max_bad_fraction "
                f"{max_bad_fraction:g}; mend them, or allow more"
            )
        return None if self.kept else f"has no row to train on: all of {counts.rows:,} are refused"

    def entries(self) -> Iterator[dict[str, str]]:
        """Yield the place of every row that was refused, cut or left out as a duplicate, and why."""
        first_of = {self._place(*pair[:2]): self._place(*pair[2:]) for pair in self.duplicates.tolist()}
        with self.notes.open(encoding="utf-8") as lines:
            yield from (entry for entry in map(json.loads, lines) if entry["place"] not in first_of)
        yield from ({"place": place, "note": f"duplicate: of {first}"} for place, first in first_of.items())

    def refused(self, number: int) -> list[dict[str, str]]:
        """Return the entries of the first so many refused rows."""
        return list(islice((entry for entry in self.entries() if entry["note"].startswith("refused")), number))

    def _place(self, file: int, row: int) -> str:
        return place_of(Path(self.counts.files[file]["file"]), self.counts.files[file]["form"], row)


def load_examples(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | None = None,
    flag: str = "--data_path",
    dedup: bool = False,
    num_workers: int | None = None,
) -> tuple[Dataset, DataReport]:
    """Return the rows at `path` tokenised, and the report on them.

    The rows are those of `sft.data.cache`, in an Arrow file under `cache_dir` that is mapped into memory; `dedup`
    leaves out those whose text stood before. Raises UserError, naming the `flag` that gave the path, if there are
    no files, or `tokenizer.model_max_length` is too short.
    """
    files = find_shards(path, flag)
    check_length(tokenizer)
    folder = cache.tokenised(files, tokenizer, cache_dir, num_workers)
    report = DataReport(Counts(**json.loads((folder / cache.COUNTS).read_text(encoding="utf-8"))), folder / cache.NOTES)
    if not report.counts.kept:
        return Dataset.from_list([]), report
    examples = Dataset.from_file(str(folder / cache.ROWS))
    if dedup:
        first_of = first_equals(examples)
        is_first = first_of == np.arange(len(first_of))
        where = np.stack([lengths_of(examples, name) for name in ("file", "row")], axis=1)
        pairs = np.concatenate([where, where[first_of]], axis=1)[~is_first]
        report.duplicates = np.unique(pairs, axis=0)  # a row of several parts once
        report.counts.cut = sum(entry["note"].startswith("cut") for entry in report.entries())
        examples = examples.select(np.flatnonzero(is_first), keep_in_memory=True)
    lengths = lengths_of(examples)
    report.kept = report.counts.kept - len(report.duplicates)
    report.tokens, report.labelled_tokens = int(lengths.sum()), int(lengths_of(examples, "labelled").sum())
    report.longest = int(lengths.max())
    return examples, report


def lengths_of(examples: Dataset, name: str = "length") -> np.ndarray:
    """Return a column of numbers, by default the tokens of each row, (R,)."""
    return np.asarray(examples.with_format("numpy")[name][:])


def first_equals(examples: Dataset) -> np.ndarray:
    """Return for each row the index of the first row with the same digest, (R,)."""
    chunks = (np.frombuffer(chunk.buffers()[1], "<u8") for chunk in examples.data.column("digest").chunks)
    digests = np.concatenate(list(chunks)).reshape(-1, 2)
    order = np.lexsort(digests.T)  # stable: rows of one digest stay in their order
    begins = np.ones(len(order), bool)
    begins[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    first_of = np.empty_like(order)
    first_of[order] = order[begins][np.cumsum(begins) - 1]
    return first_of


# -------------------------------------------------------------------------------------------------------- the flat row


COLUMNS = ("input_ids", "lengths")  # of a row: its token ids, and the tokens of each prompt and answer by turns


def labels_of(row: dict) -> list[int]:
    """Return a row's labels: the ids of its answers, and IGNORE_INDEX in place of its prompts."""
    input_ids, labels, start = row["input_ids"], [], 0
    for prompt, answer in zip(row["lengths"][::2], row["lengths"][1::2], strict=True):
        labels += [IGNORE_INDEX] * prompt
        labels += input_ids[start + prompt : start + prompt + answer]
        start += prompt + answer
    return labels


def flatten(rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    """Join rows end to end, without padding: int64 `input_ids`, `labels`, `position_ids`, each (1, T).

    Positions count from 0 in each example, whose prompt and answer are as long as the row's "lengths" say by turns.
    `label_positions`, int64 (1, N), are the positions whose next token has a label.
    """
    input_ids, lengths = (np.concatenate([row[name] for row in rows]).astype(np.int64) for name in COLUMNS)
    per_example = lengths[::2] + lengths[1::2]
    starts = np.cumsum(per_example) - per_example
    position_ids = np.arange(len(input_ids)) - np.repeat(starts, per_example)
    # What begins an example is no continuation of the one before it.
    is_labelled = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths) & (position_ids != 0)
    flat = {
        "input_ids": input_ids,
        "labels": np.where(is_labelled, input_ids, IGNORE_INDEX),
        "position_ids": position_ids,
        "label_positions": np.flatnonzero(is_labelled) - 1,
    }
    return {name: torch.from_numpy(values)[None] for name, values in flat.items()}
