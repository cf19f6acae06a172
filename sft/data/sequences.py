"""What training reads: sequences of token ids, whether one sample each, packed, or streamed.

A sequence is a dict of "input_ids", the token ids of its examples end to end, and "lengths", the number of tokens in
each example's prompt and answer in turn. `packing` and `streaming` have the other two kinds.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable

import datasets
import numpy as np
from torch.utils.data import Dataset

from sft.data.cache import lengths_of
from sft.data.collate import COLUMNS, flatten

NUM_HASHED = 1000  # samples whose tokens tell the data of two runs apart, beside the lengths of all
NUM_MEASURED = 50  # batches on which is measured what examples share
NOT_PACKED = "off: the examples of a batch lie end to end, without padding"


class Sequences(Dataset, ABC):
    """The data of a run; `num_samples` and `num_sequences` (of an epoch) are None while streaming."""

    is_packed: bool
    shares_prefixes: bool
    num_samples: int | None
    num_sequences: int | None

    @abstractmethod
    def first(self) -> dict[str, list[int]]:
        """Return the first sample as a sequence of its own; raise UserError if a stream has none."""

    @abstractmethod
    def longest_batch(self, batch_size: int) -> int:
        """Return the number of tokens in the longest flat batch that training may make."""

    def held_by(self, indices: Iterable[int]) -> int:
        """Return how many tokens the flat batch of some sequences has."""
        return flatten([self[index] for index in indices], self.shares_prefixes)["input_ids"].shape[1]

    def shared_part(self, batch_size: int) -> float:
        """Return which part of the tokens is shared with other examples, measured on some batches."""
        if not self.shares_prefixes or not self.num_sequences:
            return 0.0
        generator = np.random.default_rng(0)
        size = min(batch_size, self.num_sequences)
        batches = [generator.choice(self.num_sequences, size, replace=False).tolist() for _ in range(NUM_MEASURED)]
        num_tokens = sum(len(self[index]["input_ids"]) for batch in batches for index in batch)
        return 1 - sum(map(self.held_by, batches)) / num_tokens

    @abstractmethod
    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that tell the data of two runs apart."""

    @abstractmethod
    def samples_line(self) -> str:
        """Return how many samples are trained on, for people."""

    @abstractmethod
    def sequences_line(self) -> str:
        """Return how examples share the sequences that the model trains on, for people."""


class SampleSequences(Sequences):
    """One sequence per sample: those of `samples`, a data set that `sft.data.load.load_examples` made."""

    is_packed = False

    def __init__(self, samples: datasets.Dataset, shares_prefixes: bool = False):
        """Take the data set as it is."""
        self.samples = samples
        self.shares_prefixes = shares_prefixes
        self.num_samples = self.num_sequences = len(samples)

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return sequence_of(self.samples, index)

    def first(self) -> dict[str, list[int]]:
        """Return the first sample."""
        return self[0]

    def longest_batch(self, batch_size: int) -> int:
        """Return the number of tokens in the `batch_size` longest samples together."""
        return int(np.sort(lengths_of(self.samples, "held" if self.shares_prefixes else "length"))[-batch_size:].sum())

    def fingerprint(self) -> str:
        """Return a hash of the lengths of all samples and of the tokens of some."""
        return fingerprint_of(self.samples)

    def samples_line(self) -> str:
        """Return the number of samples."""
        return f"{self.num_samples:,} trained on"

    def sequences_line(self) -> str:
        """Return that nothing is packed."""
        return NOT_PACKED


def sequence_of(samples: datasets.Dataset, index: int) -> dict[str, list[int]]:
    """Return one sample of a data set as a sequence."""
    sample = samples[index]
    return {name: sample[name] for name in COLUMNS}


def evenly(number: int) -> list[int]:
    """Return some of so many indices, evenly spaced."""
    return np.unique(np.linspace(0, number - 1, NUM_MEASURED).astype(int)).tolist()


def fingerprint_of(samples: datasets.Dataset) -> str:
    """Return 16 hexadecimal digits of the lengths of all samples and the tokens of NUM_HASHED of them."""
    some = samples[np.linspace(0, len(samples) - 1, NUM_HASHED).astype(int).tolist()]
    content = lengths_of(samples).tobytes() + json.dumps([some["input_ids"], some["lengths"]]).encode()
    return hashlib.sha256(content).hexdigest()[:16]
