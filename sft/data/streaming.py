"""Sequences that are read and tokenised during training: nothing is stored, and training starts at once.

All ranks read every file and draw its samples in the same order; each tokenises only its share.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
from torch.utils.data import IterableDataset
from tqdm import tqdm

from sft.data import trees
from sft.data.columns import BY_NAME, Columns
from sft.data.encode import Encoder, group
from sft.data.formats import Sample, read_all
from sft.data.packing import pack
from sft.data.sequences import NOT_PACKED, Sequences
from sft.data.shards import NUM_NAMED, SHAPE, Refused, size_of
from sft.machine import gib
from sft.program import OneRankError, UserError

BUFFER_SAMPLES = 10_000  # in memory, from which the next one is drawn
ENCODED_REPLIES = 1000  # tokenised and packed together on one rank; a conversation has several
JUDGED_ROWS = 1000  # read before the refused fraction may end the run


@dataclass
class StreamedSequences(Sequences, IterableDataset):
    """An endless stream of sequences, epoch after epoch."""

    files: Sequence[Path]
    encoder: Encoder
    notes: Path  # the first rank appends one JSON line per refused row
    max_bad_fraction: float = 0.01
    is_packed: bool = False
    shares_prefixes: bool = False
    shuffle: bool = True
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    columns: Columns = BY_NAME

    num_samples = num_sequences = None

    def __post_init__(self):
        """Start counting from zero; keep the notes there are, on held-out rows."""
        self.num_rows = self.num_refused = self.unread_bytes = 0
        self.num_bytes, self.noted_bytes = sum(map(size_of, self.files)), size_of(self.notes)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        """Yield this rank's sequences from the first epoch on; raise UserError if too many rows were refused."""
        self.num_rows = self.num_refused = self.unread_bytes = 0
        self.has_begun, self.noted = False, set()
        if not self.rank:
            with self.notes.open("a") as lines:
                lines.truncate(self.noted_bytes)
        drawn = chain.from_iterable(map(self._drawn, count()))
        rounds = zip(*[drawn] * self.world_size, strict=True)  # one for each rank
        while samples := [of_ranks[self.rank] for of_ranks in some_of(rounds)]:
            tokenised = [
                [ids for example in together for ids in (example.prompt, example.answer)]
                for examples in self.encoder.encode(samples)
                for together in group(examples, self.encoder.max_length)
            ]
            for parts in self._packed(tokenised) if self.is_packed else tokenised:
                self.has_begun = True
                yield {"input_ids": list(chain.from_iterable(parts)), "lengths": list(map(len, parts))}

    def _packed(self, samples: list[list[list[int]]]) -> Iterator[list[list[int]]]:
        sizes, room = np.array([sum(map(len, parts)) for parts in samples]), self.encoder.max_length
        if self.shares_prefixes:  # each sequence holds what the template begins with once
            room -= trees.size(self.encoder.beginnings)
            sizes = np.minimum([self._own_size(parts) for parts in samples], room)  # a longer one is alone
        sequence_of = pack(sizes, room, self.seed)
        for sequence in np.random.default_rng(self.seed).permutation(sequence_of.max() + 1):
            yield [ids for index in np.flatnonzero(sequence_of == sequence) for ids in samples[index]]

    def _own_size(self, parts: list[list[int]]) -> int:
        """Return how many tokens the forest of a sample's examples has beside what the template begins with."""
        examples = [np.array(prompt + answer) for prompt, answer in zip(parts[::2], parts[1::2], strict=True)]
        begins = max(trees.common(examples[0], beginning) for beginning in self.encoder.beginnings)
        return max(1, trees.size(examples) - begins)

    def _drawn(self, epoch: int) -> Iterator[Sample]:
        """Yield the samples of an epoch; (seed, epoch) decides the order of files and of samples within a buffer."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.files)) if self.shuffle else range(len(self.files))
        samples = (sample for index in order for sample in self._kept(self.files[index], epoch))
        buffer = list(islice(samples, BUFFER_SAMPLES if self.shuffle else 1))
        if not buffer:
            listed = f"; {self.notes} lists what was refused" if self.num_rows else f"; expected rows such as {SHAPE}"
            raise UserError(f"there are no rows to train on{listed}")
        for sample in samples:
            index = generator.integers(len(buffer))
            yield buffer[index]
            buffer[index] = sample
        self._judge()
        yield from (buffer[index] for index in generator.permutation(len(buffer)))

    def _kept(self, file: Path, epoch: int) -> Iterator[Sample]:
        """Yield the samples of a file; in the first epoch count the rows and note those that are refused."""
        for sample in read_all(file, self.columns):
            if epoch == 0:
                self.num_rows += 1
                if isinstance(sample, Refused):
                    self._refuse(sample)
                if self.num_rows >= JUDGED_ROWS:
                    self._judge()
            if isinstance(sample, Sample):
                if epoch == 0 and len(self.noted) < NUM_NAMED and not self.noted.issuperset(sample.remarks):
                    self._note(sample)
                yield sample

    def _note(self, sample: Sample) -> None:
        """Print what a row has and no earlier one had, such as a key that is not read."""
        for remark in sample.remarks:
            if remark not in self.noted and not self.rank:
                tqdm.write(f"{'noted':9}{sample.place}: {remark}, and so in every row like it")
            self.noted.add(remark)

    def _refuse(self, refused: Refused) -> None:
        self.num_refused += 1
        self.unread_bytes += refused.num_bytes
        if self.rank:
            return
        if self.num_refused <= NUM_NAMED:
            tqdm.write(f"{'refused':9}{refused.place}: {refused.reason}")
        with self.notes.open("a", encoding="utf-8") as lines:
            note = {"place": refused.place, "note": f"refused: {refused.reason}"}
            lines.write(json.dumps(note, ensure_ascii=False) + "\n")

    def _judge(self) -> None:
        share = max(self.num_refused / max(1, self.num_rows), self.unread_bytes / max(1, self.num_bytes))
        if share > self.max_bad_fraction:
            unread = f" and {self.unread_bytes:,} of {self.num_bytes:,} bytes not read" if self.unread_bytes else ""
            # Until its first sequence every rank reads the same; later one may be ahead of the others and end alone.
            raise (OneRankError if self.rank and self.has_begun else UserError)(
                f"{self.num_refused:,} of the first {self.num_rows:,} rows were refused{unread}, more than "
                f"--max_bad_fraction {self.max_bad_fraction:g}; fix them ({self.notes} lists them), or raise the limit"
            )

    def first(self) -> dict[str, list[int]]:
        """Return the first example of the files as a sequence of its own; raise UserError if there is none."""
        for sample in chain.from_iterable(read_all(file, self.columns) for file in self.files):
            if isinstance(sample, Sample):
                example = self.encoder.encode([sample])[0][0]
                lengths = [len(example.prompt), len(example.answer)]
                return {"input_ids": example.prompt + example.answer, "lengths": lengths}
        raise UserError(f"there are no rows to train on in {self.files[0].parent}")

    def longest_batch(self, batch_size: int) -> int:
        """Return the number of tokens in `batch_size` full sequences; in one if not packed, since few are full."""
        return self.encoder.max_length * (batch_size if self.is_packed else 1)

    def fingerprint(self) -> str:
        """Return a hash of the files' names and sizes and of the tokenizer."""
        sizes = "".join(f"{file.name} {size_of(file)}\n" for file in self.files)
        content = sizes + self.encoder.tokenizer.backend_tokenizer.to_str()
        return hashlib.sha256(content.encode(errors="backslashreplace")).hexdigest()[:16]

    def samples_line(self) -> str:
        """Return the number and size of the files."""
        return f"streamed from {len(self.files):,} files, {gib(sum(map(size_of, self.files)))} in all"

    def sequences_line(self) -> str:
        """Return whether they are packed."""
        if not self.is_packed:
            return NOT_PACKED
        return f"sequences of up to {self.encoder.max_length:,} tokens, packed while training"

    def line(self) -> str:
        """Return how many rows were read and refused so far, for people."""
        return f"{self.num_rows:,} rows read while training, {self.num_refused:,} refused"


def some_of(rounds: Iterator[tuple[Sample, ...]]) -> Iterator[tuple[Sample, ...]]:
    """Yield rounds of one sample per rank until they have ENCODED_REPLIES replies per rank."""
    num_replies = 0
    for samples in rounds:
        yield samples
        num_replies += sum(1 + len(sample.history) for sample in samples)
        if num_replies >= ENCODED_REPLIES * len(samples):
            return
