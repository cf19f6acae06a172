"""A file or folder of rows as a data set of tokenised samples, and the part of it that is held out."""

import json
from collections import Counter

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sft.data import cache
from sft.data.cache import Counts, lengths_of
from sft.data.columns import BY_NAME, Columns, without
from sft.data.encode import check_length
from sft.data.files import find_shards
from sft.data.report import DataReport
from sft.program import UserError

NUM_LOOKED_AT = 1000  # rows of a file among which one of several turns is looked for


def load_examples(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | None = None,
    flag: str = "--data_path",
    dedup: bool = False,
    num_workers: int | None = None,
    columns: Columns = BY_NAME,
) -> tuple[Dataset, DataReport]:
    """Return the rows at `path` tokenised, and the report on them.

    The data set is the Arrow file that `sft.data.cache` keeps under `cache_dir`, mapped into memory; `dedup` drops
    repeated rows, and `columns` says how records are read. Raises UserError, naming the `flag` that gave the path, if
    there are no files, or if `tokenizer.model_max_length` is too short.
    """
    files = find_shards(path, flag, cache_dir)
    check_length(tokenizer)
    folder = cache.tokenised(files, tokenizer, cache_dir, num_workers, columns)
    report = DataReport(Counts(**json.loads((folder / cache.COUNTS).read_text(encoding="utf-8"))), folder / cache.NOTES)
    if flag == "--data_path":  # held-out rows may have other keys
        _check_by_hand(report.counts, columns)
    if not report.counts.kept:
        return Dataset.from_list([]), report
    examples = Dataset.from_file(str(folder / cache.ROWS))
    if dedup:
        first_of = first_equals(examples)
        is_first = first_of == np.arange(len(first_of))
        where = np.stack([lengths_of(examples, name) for name in ("file", "row")], axis=1)
        pairs = np.concatenate([where, where[first_of]], axis=1)[~is_first]
        report.duplicates = np.unique(pairs, axis=0)  # a conversation of several parts counts once
        report.counts.cut = sum(entry["note"].startswith("cut") for entry in report.entries())
        examples = examples.select(np.flatnonzero(is_first), keep_in_memory=True)
    lengths = lengths_of(examples)
    report.kept = report.counts.kept - len(report.duplicates)
    report.tokens, report.labelled_tokens = int(lengths.sum()), int(lengths_of(examples, "labelled").sum())
    report.longest = int(lengths.max())
    return examples, report


def _check_by_hand(counts: Counts, columns: Columns) -> None:
    """Raise UserError if no row has a key that --columns names."""
    for key, role in columns.given.items():
        if counts.kept and counts.kept == sum(file["remarks"].get(without(key), 0) for file in counts.files):
            shapes = Counter(shape for file in counts.files for shape in file["shapes"])
            raise UserError(
                f'--columns {role}={key}: no row has the key "{key}"; the rows were read from '
                f"{shapes.most_common(1)[0][0]}; type a key that they have"
            )


def first_equals(examples: Dataset) -> np.ndarray:
    """Return, for each of the R rows, the index of the first row with the same digest, (R,)."""
    chunks = (np.frombuffer(chunk.buffers()[1], "<u8") for chunk in examples.data.column("digest").chunks)
    digests = np.concatenate(list(chunks)).reshape(-1, 2)
    order = np.lexsort(digests.T)  # stable: equal digests stay in order
    begins = np.ones(len(order), bool)
    begins[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    first_of = np.empty_like(order)
    first_of[order] = order[begins][np.cumsum(begins) - 1]
    return first_of


def telling_rows(examples: Dataset) -> dict[int, list[int]]:
    """Return up to three rows of each file that look different: the first, the longest, one of several turns.

    Where no row of the file's first thousand has several turns, the third is from the middle.
    """
    file_of, lengths = lengths_of(examples, "file"), lengths_of(examples)
    telling = {}
    for file in np.unique(file_of).tolist():
        rows = np.flatnonzero(file_of == file)
        num_parts = list(map(len, examples[rows[:NUM_LOOKED_AT].tolist()]["lengths"]))
        third = rows[int(np.argmax(num_parts))] if max(num_parts) > 2 else rows[len(rows) // 2]
        longest = rows[int(np.argmax(lengths[rows]))]
        telling[file] = list(dict.fromkeys(map(int, (rows[0], longest, third))))
    return telling


def hold_out(examples: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Return the samples without a random fraction, at least one, and that fraction; `seed` chooses it."""
    if len(examples) < 2:
        raise UserError(f"--eval_fraction needs at least 2 rows to train on; there is {len(examples)}")
    num_held_out = min(max(1, round(len(examples) * fraction)), len(examples) - 1)
    order = np.random.default_rng(seed).permutation(len(examples))
    parts = (order[num_held_out:], order[:num_held_out])
    return tuple(examples.select(part, keep_in_memory=True) for part in parts)
