"""Examples packed into rows of a fixed length, so that a row of 2,048 tokens is nearly always full."""

from itertools import chain

import datasets
import numpy as np
from torch.utils.data import Dataset

from sft.data.load import COLUMNS, lengths_of


def pack(lengths: np.ndarray, max_length: int, seed: int = 0) -> np.ndarray:
    """Return the row of each example, int32, by best fit of the longest first; rows hold at most `max_length` tokens.

    Each example goes whole into the fullest row that has room for it, or opens a new one (best-fit decreasing:
    D. S. Johnson, Near-optimal bin packing algorithms, 1973). `seed` decides among examples of one length, which are
    placed together: as many in a row as it has room for, row after row from the fullest that fits.
    """
    assert lengths.min() > 0 and lengths.max() <= max_length, (lengths.min(), lengths.max(), max_length)
    order = np.random.default_rng(seed).permutation(len(lengths)).astype(np.int32)
    order = order[np.argsort(-lengths[order].astype(np.int32), kind="stable")]
    row_of = np.empty(len(lengths), np.int32)
    rows_by_room: dict[int, np.ndarray] = {}  # rows that have room for so many tokens more
    num_rows, counts = 0, np.bincount(lengths)
    for length in np.flatnonzero(counts)[::-1].tolist():
        examples, order = order[: counts[length]], order[counts[length] :]
        for room in [*sorted(room for room in rows_by_room if room >= length), max_length]:
            if not len(examples):
                break
            per_row = room // length
            needed = -(len(examples) // -per_row)
            rows = rows_by_room.pop(room, None)
            if rows is None:
                rows = np.arange(num_rows, num_rows + needed, dtype=np.int32)
                num_rows += needed
            rows, untouched = rows[:needed], rows[needed:]
            placed = np.repeat(rows, per_row)[: len(examples)]
            row_of[examples[: len(placed)]] = placed
            examples = examples[len(placed) :]
            in_last = len(placed) - per_row * (len(rows) - 1)
            for some, left in ((untouched, room), (rows[:-1], room % length), (rows[-1:], room - in_last * length)):
                if len(some) and left:
                    rows_by_room[left] = np.concatenate([rows_by_room.get(left, some[:0]), some])
    return row_of


class PackedDataset(Dataset):
    """Rows of examples end to end: their "input_ids", and "lengths", the tokens of each one's prompt and answer."""

    def __init__(self, examples: datasets.Dataset, max_length: int, seed: int = 0):
        """Pack the rows of a data set, which have a "length" of at most `max_length`."""
        self.examples = examples
        lengths = lengths_of(examples)
        row_of = pack(lengths, max_length, seed)
        self.order = np.argsort(row_of, kind="stable")
        self.ends = np.cumsum(np.bincount(row_of))
        self.fill_rate = lengths.sum() / (len(self.ends) * max_length)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        start = self.ends[row - 1] if row else 0
        examples = self.examples[self.order[start : self.ends[row]].tolist()]
        return {name: list(chain.from_iterable(examples[name])) for name in COLUMNS}


def examples_of(rows: datasets.Dataset | PackedDataset) -> datasets.Dataset:
    """Return the examples that a data set's rows hold, one each or packed."""
    return rows.examples if isinstance(rows, PackedDataset) else rows
