"""Examples packed into rows of a fixed length, so that a row of 2,048 tokens is nearly always full."""

from itertools import chain

import datasets
import numpy as np

from sft.data.cache import lengths_of
from sft.data.collate import COLUMNS
from sft.data.sequences import Sequences, fingerprint_of, sequence_of


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


class PackedSequences(Sequences):
    """Sequences of up to `max_length` tokens, each of several samples end to end."""

    is_packed = True

    def __init__(self, samples: datasets.Dataset, max_length: int, seed: int = 0):
        """Pack the samples of a data set, which have a "length" of at most `max_length`."""
        self.samples = samples
        self.max_length = max_length
        lengths = lengths_of(samples)
        bins = pack(lengths, max_length, seed)
        self.order = np.argsort(bins, kind="stable")
        self.ends = np.cumsum(np.bincount(bins))
        self.num_samples, self.num_sequences = len(samples), len(self.ends)
        self.fill_rate = lengths.sum() / (self.num_sequences * max_length)

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        start = self.ends[index - 1] if index else 0
        samples = self.samples[self.order[start : self.ends[index]].tolist()]
        return {name: list(chain.from_iterable(samples[name])) for name in COLUMNS}

    def first(self) -> dict[str, list[int]]:
        """Return the first sample as a sequence of its own."""
        return sequence_of(self.samples, 0)

    def longest_batch(self, batch_size: int) -> int:
        """Return the number of tokens in `batch_size` full sequences, or in all of them if they are fewer."""
        return self.max_length * min(batch_size, self.num_sequences)

    def fingerprint(self) -> str:
        """Return the hash that the samples have without packing."""
        return fingerprint_of(self.samples)

    def samples_line(self) -> str:
        """Return the number of samples."""
        return f"{self.num_samples:,} trained on"

    def sequences_line(self) -> str:
        """Return how many sequences there are and how full they are."""
        return (
            f"{self.num_sequences:,} packed of up to {self.max_length:,} tokens, {self.fill_rate:.1%} full, "
            f"{self.num_samples / self.num_sequences:.1f} examples each"
        )
