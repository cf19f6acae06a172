"""Which row a rank trains on, and when: each row once an epoch, whatever the number of ranks."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset, Sampler

# One token without a label: it runs the model and adds nothing to loss and gradients.
EMPTY_ROW = {"input_ids": [0], "lengths": [1, 0]}


class EvenRows(Dataset):
    """Rows, and empty ones behind them up to a multiple of all ranks' batches.

    Ranks must run the same number of batches, and accelerate would fill the last ones with rows already seen.
    """

    def __init__(self, rows: Dataset, multiple: int):
        """Fill `rows` up to a multiple of `multiple` rows."""
        self.rows = rows
        self.num_rows = len(rows)
        self.num_empty = -len(rows) % multiple

    def __len__(self) -> int:
        return self.num_rows + self.num_empty

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index] if index < self.num_rows else EMPTY_ROW


class EpochOrder(Sampler[int]):
    """The rows of an epoch in an order of its own, the empty ones last.

    The order is that of (seed, epoch) alone: all ranks have the same, a run of more ranks too, and one that goes on
    from a checkpoint.
    """

    def __init__(self, rows: EvenRows, seed: int):
        """Order `rows` by `seed`, starting with epoch 0."""
        self.rows = rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of another epoch from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows.num_rows)
        yield from map(int, order)
        yield from range(self.rows.num_rows, len(self.rows))
