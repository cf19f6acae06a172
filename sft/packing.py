"""Examples packed into rows of a fixed length, so that a row of 2,048 tokens is nearly always full."""

from itertools import chain

import datasets
import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm


def pack(lengths: np.ndarray, max_length: int, seed: int = 0) -> np.ndarray:
    """Return the row of each example, int32, by best fit of the longest first; rows hold at most `max_length` tokens.

    Each example goes whole into the fullest row that has room for it, or opens a new one (best-fit decreasing:
    D. S. Johnson, Near-optimal bin packing algorithms, 1973). `seed` decides among examples of one length.
    """
    assert lengths.min() > 0 and lengths.max() <= max_length, (lengths.min(), lengths.max(), max_length)
    order = np.lexsort((np.random.default_rng(seed).permutation(len(lengths)), -lengths.astype(np.int64)))
    row_of = np.empty(len(lengths), np.int32)
    rows_by_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    rooms = 0  # bit r is set while some row has room for exactly r tokens more
    num_rows = 0
    # Shown on a terminal, from the second second on.
    for index in tqdm(order.tolist(), desc="packing", unit=" examples", delay=1, leave=False, disable=None):
        length = int(lengths[index])
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit: the fullest row that fits
            row = rows_by_room[room].pop()
            rooms ^= (not rows_by_room[room]) << room
        else:
            row, room = num_rows, max_length
            num_rows += 1
        rows_by_room[room - length].append(row)
        rooms |= 1 << (room - length)
        row_of[index] = row
    return row_of


class PackedDataset(Dataset):
    """Rows of examples end to end: "input_ids", "labels" and "position_ids", which count from 0 in each example."""

    def __init__(self, examples: datasets.Dataset, max_length: int, seed: int = 0):
        """Pack examples that have "input_ids", "labels" and a "length" of at most `max_length`."""
        self.examples = examples
        lengths = np.asarray(examples.with_format("numpy")["length"][:])
        row_of = pack(lengths, max_length, seed)
        self.order = np.argsort(row_of, kind="stable")
        self.ends = np.cumsum(np.bincount(row_of))
        self.fill_rate = lengths.sum() / (len(self.ends) * max_length)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        start = self.ends[row - 1] if row else 0
        examples = self.examples[self.order[start : self.ends[row]].tolist()]
        return {
            "input_ids": list(chain.from_iterable(examples["input_ids"])),
            "labels": list(chain.from_iterable(examples["labels"])),
            "position_ids": list(chain.from_iterable(range(length) for length in examples["length"])),
        }


def examples_of(rows: datasets.Dataset | PackedDataset) -> datasets.Dataset:
    """Return the examples that a data set's rows hold, one each or packed."""
    return rows.examples if isinstance(rows, PackedDataset) else rows
