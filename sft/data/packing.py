"""Examples packed into sequences of up to a fixed length, which are nearly always full."""

from functools import cached_property
from itertools import chain

import datasets
import numpy as np

from sft.data.cache import lengths_of
from sft.data.collate import COLUMNS
from sft.data.sequences import Sequences, evenly, fingerprint_of, sequence_of
from sft.data.sharing import find_units


def pack(lengths: np.ndarray, max_length: int, seed: int = 0) -> np.ndarray:
    """Return the number of the sequence that each example goes into, int32, best-fit decreasing.

    The longest example comes first; each goes whole into the fullest sequence that has room for it, or opens a new one
    (D. S. Johnson, Near-optimal bin packing algorithms, 1973). Examples of one length are placed together, as many per
    sequence as fit; `seed` decides among them. With sequences of 10 tokens and lengths 7 5 5 3 2 2:

        0  7777777333  7 opens it, 3 fills it
        1  5555555555  both 5s open it and fill it at once
        2  2222        no room for the 2s elsewhere; 6 tokens stay free
    """
    assert lengths.min() > 0 and lengths.max() <= max_length, (lengths.min(), lengths.max(), max_length)
    order = np.random.default_rng(seed).permutation(len(lengths)).astype(np.int32)
    order = order[np.argsort(-lengths[order].astype(np.int32), kind="stable")]
    sequence_of, free, counts = np.empty(len(lengths), np.int32), _FreeRoom(max_length), np.bincount(lengths)
    for length in np.flatnonzero(counts)[::-1].tolist():
        examples, order = order[: counts[length]], order[counts[length] :]
        for room in free.rooms_for(length):
            if not len(examples):
                break
            per_sequence = room // length
            chosen = free.take(room, -(len(examples) // -per_sequence))
            placed = np.repeat(chosen, per_sequence)[: len(examples)]
            sequence_of[examples[: len(placed)]] = placed
            examples = examples[len(placed) :]
            num_in_last = len(placed) - per_sequence * (len(chosen) - 1)
            free.put_back(room - per_sequence * length, chosen[:-1])
            free.put_back(room - num_in_last * length, chosen[-1:])
    return sequence_of


class _FreeRoom:
    """The numbers of the sequences that are not full, by the tokens that they have room for."""

    def __init__(self, max_length: int):
        self.max_length, self.num_opened = max_length, 0
        self.by_room: dict[int, np.ndarray] = {}

    def rooms_for(self, length: int) -> list[int]:
        """Return the rooms that hold so many tokens, of the fullest sequences first and of a new one last."""
        return [*sorted(room for room in self.by_room if room >= length), self.max_length]

    def take(self, room: int, number: int) -> np.ndarray:
        """Return sequences that have this room, at most so many; new ones if it is all of `max_length`."""
        if room == self.max_length:
            self.num_opened += number
            return np.arange(self.num_opened - number, self.num_opened, dtype=np.int32)
        sequences = self.by_room.pop(room)
        self.put_back(room, sequences[number:])
        return sequences[:number]

    def put_back(self, room: int, sequences: np.ndarray) -> None:
        """Keep sequences that have this room, unless it is none."""
        if room and len(sequences):
            self.by_room[room] = np.concatenate([self.by_room.get(room, sequences[:0]), sequences])


class PackedSequences(Sequences):
    """Sequences of up to `max_length` tokens, each of several samples end to end."""

    is_packed = True

    def __init__(self, samples: datasets.Dataset, max_length: int, seed: int = 0, shares_prefixes: bool = False):
        """Pack the samples of a data set, which have a "length" of at most `max_length`.

        With `shares_prefixes`, sequences are filled by the tokens that they hold once their samples share them.
        """
        self.samples = samples
        self.max_length = max_length
        self.shares_prefixes = shares_prefixes
        if shares_prefixes:
            units = find_units(samples, max_length)
            room = max_length - units.reserved
            bins = pack(np.minimum(units.sizes, room), room, seed)[units.unit_of]  # a longer one is alone
        else:
            bins = pack(lengths_of(samples), max_length, seed)
        self.order = np.argsort(bins, kind="stable")
        self.ends = np.cumsum(np.bincount(bins))
        self.num_samples, self.num_sequences = len(samples), len(self.ends)

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

    @cached_property
    def fill_rate(self) -> float:
        """Return which part of all sequences' room is filled; with shared prefixes, that of some sequences."""
        if not self.shares_prefixes:
            return lengths_of(self.samples).sum() / (self.num_sequences * self.max_length)
        return np.mean([self.held_by([index]) for index in evenly(self.num_sequences)]) / self.max_length

    def sequences_line(self) -> str:
        """Return how many sequences there are and how full they are."""
        return (
            f"{self.num_sequences:,} sequences of up to {self.max_length:,} tokens, {self.fill_rate:.1%} full, "
            f"{self.num_samples / self.num_sequences:.1f} examples each"
        )
