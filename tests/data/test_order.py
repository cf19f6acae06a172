"""Every row once an epoch, the same rows in the same step whatever the number of ranks."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader

from sft import IGNORE_INDEX
from sft.data.collate import flatten, labels_of
from sft.data.order import EMPTY_SEQUENCE, EpochOrder, EvenSequences
from sft.data.packing import PackedSequences
from sft.training.trainer import Trainer

SIZES = [1, 2, 5, 12, 29, 47]


def rows_of(number: int) -> list[dict]:
    """Return rows that are told apart by their only token."""
    return [{"input_ids": [index, index], "lengths": [1, 1]} for index in range(number)]


@pytest.fixture
def packed() -> PackedSequences:
    """Five examples in rows of up to eight tokens."""
    tokens = [[1] * 3, [2] * 5, [3] * 7, [4] * 2, [5] * 4]
    lengths = list(map(len, tokens))
    columns = {"input_ids": tokens, "lengths": [[1, length - 1] for length in lengths], "length": lengths}
    return PackedSequences(datasets.Dataset.from_dict(columns), 8)


# ------------------------------------------------------------------------------------------ EvenSequences


@pytest.mark.parametrize("number", [1, 5, 6, 7, 12])
@pytest.mark.parametrize("multiple", [1, 2, 3, 6, 20])
def test_the_length_is_the_next_multiple_and_no_row_changes(number, multiple):
    rows = rows_of(number)
    even = EvenSequences(rows, multiple)
    assert len(even) % multiple == 0 and 0 <= len(even) - number < multiple
    assert [even[index] for index in range(number)] == rows
    assert all(even[index] == EMPTY_SEQUENCE for index in range(number, len(even)))


def test_no_row_is_added_where_they_fit():
    assert len(EvenSequences(rows_of(6), 3)) == 6
    assert EvenSequences(rows_of(6), 3).num_empty == 0


def test_an_empty_row_has_a_token_and_no_label():
    flat = flatten([EvenSequences(rows_of(1), 2)[1]])
    assert flat["input_ids"].shape == (1, 1)
    assert flat["labels"].shape == flat["label_positions"].shape == (1, 0)
    # flatten takes the first label of every example away, also in a row that had one.
    assert labels_of(EvenSequences(rows_of(1), 2)[1]) == [IGNORE_INDEX]


def test_packed_rows_and_empty_ones_share_a_flat_batch(packed):
    even = EvenSequences(packed, 7)
    assert len(packed) == 3 and len(even) == 7
    first, second = packed[2], packed[0]
    flat = flatten([even[2], even[3], even[0], even[6]])
    assert flat["input_ids"].tolist() == [[*first["input_ids"], 0, *second["input_ids"], 0]]
    alone = [flatten([row]) for row in (first, second)]
    positions = [row["position_ids"][0].tolist() for row in alone]
    assert flat["position_ids"].tolist() == [[*positions[0], 0, *positions[1], 0]]
    assert flat["labels"].tolist() == [[label for row in alone for label in row["labels"][0].tolist()]]
    # A row of one example and one of two, so that positions begin anew within a row as well.
    assert {len(first["lengths"]), len(second["lengths"])} == {2, 4}


# ----------------------------------------------------------------------------------------------------------- EpochOrder


def order_of(rows: EvenSequences, seed: int, epoch: int) -> list[int]:
    order = EpochOrder(rows, seed)
    order.set_epoch(epoch)
    return list(order)


@pytest.mark.parametrize("number", SIZES)
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_has_every_row_once_and_the_empty_ones_last(number, epoch):
    rows = EvenSequences(rows_of(number), 6)
    order = order_of(rows, 42, epoch)
    assert sorted(order[:number]) == list(range(number))
    assert order[number:] == list(range(number, len(rows)))
    assert len(order) == len(EpochOrder(rows, 42)) == len(rows)


def test_the_order_is_that_of_seed_and_epoch_alone():
    rows = EvenSequences(rows_of(50), 8)
    orders = {(seed, epoch): order_of(rows, seed, epoch) for seed, epoch in product(range(4), range(4))}
    assert len(set(map(tuple, orders.values()))) == 16
    torch.manual_seed(1)
    np.random.seed(1)
    assert all(order_of(rows, seed, epoch) == order for (seed, epoch), order in orders.items())
    # An epoch that was broken off, or read twice, changes nothing either.
    order = EpochOrder(rows, 3)
    next(iter(order))
    assert list(order) == list(order) == orders[3, 0]


def test_rows_are_shuffled_and_the_number_of_empty_ones_changes_no_order():
    order = order_of(EvenSequences(rows_of(50), 1), 0, 0)
    assert order != sorted(order)
    assert order_of(EvenSequences(rows_of(50), 64), 0, 0)[:50] == order


# ---------------------------------------------------------------------------------------------------------------- ranks


def batches_of_ranks(number: int, world: int, batch_size: int, epoch: int) -> list[list[list[int]]]:
    """Return each rank's batches, by the shares that accelerate gives the ranks."""
    rows = EvenSequences(rows_of(number), batch_size * world)

    def batches_of(rank: int) -> list[list[int]]:
        order = EpochOrder(rows, 7)
        order.set_epoch(epoch)
        return list(BatchSamplerShard(BatchSampler(order, batch_size, False), world, rank))

    return [batches_of(rank) for rank in range(world)]


def real_rows(batches: list[list[int]], number: int) -> list[int]:
    return [row for batch in batches for row in batch if row < number]


def steps_of(ranks: list[list[list[int]]], accumulated: int, number: int) -> list[set[int]]:
    """Return the rows of every optimizer step, without the empty ones."""
    starts = range(0, len(ranks[0]), accumulated)
    shares = [[batch for batches in ranks for batch in batches[start : start + accumulated]] for start in starts]
    return [set(real_rows(share, number)) for share in shares]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_ranks_see_disjoint_rows_that_are_all_rows_once(world, batch_size):
    for number, epoch in product(SIZES, [0, 3]):
        ranks = batches_of_ranks(number, world, batch_size, epoch)
        assert {len(batches) for batches in ranks} == {-(-number // (world * batch_size))}
        assert {len(batch) for batches in ranks for batch in batches} == {batch_size}
        seen = [row for batches in ranks for batch in batches for row in batch]
        assert sorted(seen) == list(range(len(seen)))
        assert len(seen) - number == -number % (world * batch_size)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_step_has_the_rows_of_one_process_with_more_accumulation(world, batch_size):
    for number, accumulated, epoch in product(SIZES, [1, 2, 3], [0, 3]):
        together = steps_of(batches_of_ranks(number, world, batch_size, epoch), accumulated, number)
        alone = steps_of(batches_of_ranks(number, 1, batch_size, epoch), accumulated * world, number)
        assert together == alone
        assert all(together), "a step of empty rows alone"


# --------------------------------------------------------------------------------------------- the Trainer's own loader


@pytest.fixture
def make_loader(tmp_path: Path) -> Callable[..., DataLoader]:
    """Return a function that gives the training loader of a Trainer on seven rows in batches of three."""
    import train_sft
    from sft.tools.random_model import build_model

    def make(**flags: object) -> DataLoader:
        args = train_sft.TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=3, **flags
        )
        trainer = Trainer(
            model=build_model("bloom-tiny"),
            args=args,
            data_collator=flatten,
            train_dataset=rows_of(7),
            settings=SimpleNamespace(share_prefixes=False),
            shares_batches=True,
        )
        return trainer.get_train_dataloader()

    return make


def tokens_of(loader: DataLoader) -> list[list[int]]:
    return [batch["input_ids"][0].tolist() for batch in loader]


def tokens_in_order(epoch: int, seed: int) -> list[list[int]]:
    rows = EvenSequences(rows_of(7), 3)
    order = order_of(rows, seed, epoch)
    return [[token for row in order[start : start + 3] for token in rows[row]["input_ids"]] for start in (0, 3, 6)]


@pytest.mark.parametrize(("flags", "seed"), [({"seed": 5}, 5), ({"seed": 5, "data_seed": 6}, 6), ({"data_seed": 0}, 0)])
def test_the_trainers_batches_follow_the_order_of_each_epoch(make_loader, flags, seed):
    loader = make_loader(**flags)
    for epoch in (0, 1, 4):
        loader.set_epoch(epoch)
        assert tokens_of(loader) == tokens_in_order(epoch, seed)


def test_a_loader_that_goes_on_within_an_epoch_has_the_rest_of_its_batches(make_loader):
    loader = make_loader(seed=5)
    loader.set_epoch(2)
    rest = skip_first_batches(loader, 2)
    assert tokens_of(rest) == tokens_in_order(2, 5)[2:]


def test_rows_in_the_files_order_are_filled_up_too(make_loader):
    expected = [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5], [6, 6, 0, 0]]
    assert tokens_of(make_loader(train_sampling_strategy="sequential")) == expected
