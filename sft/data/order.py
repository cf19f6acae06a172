"""Which sequence a rank trains on, and when: each one once per epoch, whatever the number of ranks."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset, Sampler

# One token without a label: it runs through the model and adds nothing to loss or gradients.
EMPTY_SEQUENCE = {"input_ids": [0], "lengths": [1, 0]}


class EvenSequences(Dataset):
    """Sequences, followed by empty ones up to a multiple of all ranks' batches.

    Ranks must run equally many batches, and accelerate would fill up the last ones with sequences already seen.
    """

    def __init__(self, sequences: Dataset, multiple: int):
        """Fill `sequences` up to a multiple of `multiple`."""
        self.sequences = sequences
        self.num_sequences = len(sequences)
        self.num_empty = -len(sequences) % multiple

    def __len__(self) -> int:
        return self.num_sequences + self.num_empty

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.sequences[index] if index < self.num_sequences else EMPTY_SEQUENCE


class EpochOrder(Sampler[int]):
    """The sequences of an epoch in random order, the empty ones last.

    The order depends only on (seed, epoch), so it is the same on all ranks, for any number of ranks, and after resuming
    from a checkpoint.
    """

    def __init__(self, sequences: EvenSequences, seed: int):
        """Order `sequences` by `seed`, starting with epoch 0."""
        self.sequences = sequences
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Switch to the order of another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.sequences.num_sequences)
        yield from map(int, order)
        yield from range(self.sequences.num_sequences, len(self.sequences))
