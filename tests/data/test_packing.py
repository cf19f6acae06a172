"""Rows that are full, hold every example once, and are what training reads."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from sft.data.collate import flatten
from sft.data.load import load_examples
from sft.data.packing import PackedSequences, pack
from sft.model.load import load_tokenizer
from support.project import SAMPLE

MAX_LENGTH = 640  # of the packed sample rows, a few of which are cut


def random_lengths(seed: int) -> tuple[np.ndarray, int]:
    """Return lengths from 1 to at most a random maximum, and the maximum."""
    generator = np.random.default_rng(seed)
    max_length = int(generator.integers(1, 80))
    longest = int(generator.integers(1, max_length + 1))
    return generator.integers(1, longest + 1, size=generator.integers(1, 200), dtype=np.int32), max_length


def lengths_like_real_rows(number: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).lognormal(mean=5.2, sigma=0.8, size=number)
    return np.clip(drawn, 30, 2048).astype(np.int32)


def sums_of_rows(row_of: np.ndarray, lengths: np.ndarray) -> list[int]:
    sums = np.zeros(row_of.max() + 1, np.int64)
    np.add.at(sums, row_of, lengths)
    return sums.tolist()


def naive_sums(lengths: np.ndarray, max_length: int) -> list[int]:
    """Return the tokens of each row by best fit of the longest first, every row looked at for every example."""
    sums: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [row for row, held in enumerate(sums) if held + length <= max_length]
        if fitting:
            sums[max(fitting, key=sums.__getitem__)] += length
        else:
            sums.append(length)
    return sums


@pytest.mark.parametrize("seed", range(40))
def test_rows_are_those_of_a_naive_best_fit_of_the_longest_first(seed):
    lengths, max_length = random_lengths(seed)
    row_of = pack(lengths, max_length, seed)
    sums = sums_of_rows(row_of, lengths)
    assert row_of.shape == lengths.shape and row_of.dtype == np.int32
    assert min(sums) > 0 and max(sums) <= max_length
    # Which of several equal rows or examples is taken changes no sum.
    assert sorted(sums) == sorted(naive_sums(lengths, max_length))


@pytest.mark.parametrize("seed", range(5))
def test_lengths_that_are_all_different_are_packed_as_the_naive_way_does(seed):
    lengths = np.random.default_rng(seed).permutation(np.arange(1, 151, dtype=np.int32))
    assert sorted(sums_of_rows(pack(lengths, 150, seed), lengths)) == sorted(naive_sums(lengths, 150))


def test_best_fit_saves_a_row_over_first_fit():
    # First fit lays the 7 beside the 19, best fit beside the two 10s, and only so do all rows come out full.
    lengths = np.array([2, 6, 7, 10, 10, 19])
    assert sums_of_rows(pack(lengths, 27), lengths) == [27, 27]


@pytest.mark.parametrize(
    ("lengths", "max_length", "num_rows"),
    [([9] * 12, 9, 12), ([1] * 12, 5, 3), ([1] * 12, 1, 12), ([4], 9, 1), ([1], 1, 1), ([5, 4, 5, 4], 9, 2)],
)
def test_border_cases_fill_as_many_rows_as_they_must(lengths, max_length, num_rows):
    lengths = np.array(lengths, np.int32)
    sums = sums_of_rows(pack(lengths, max_length), lengths)
    assert len(sums) == num_rows and sum(sums) == sum(lengths) and max(sums) <= max_length


def test_the_seed_decides_among_examples_of_one_length():
    lengths = np.array([40, 60] * 30 + [20, 30, 50] * 10, np.int32)
    first, again, other = (pack(lengths, 100, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert sorted(sums_of_rows(first, lengths)) == sorted(sums_of_rows(other, lengths))
    together = {tuple(np.flatnonzero(first == row)) for row in first}
    assert together != {tuple(np.flatnonzero(other == row)) for row in other}


def test_rows_of_many_examples_are_nearly_full():
    lengths = lengths_like_real_rows(5000)
    sums = sums_of_rows(pack(lengths, 2048), lengths)
    assert sum(sums) / (len(sums) * 2048) > 0.98


def test_two_hundred_thousand_examples_are_packed():
    lengths = lengths_like_real_rows(200_000)
    sums = sums_of_rows(pack(lengths, 2048), lengths)
    assert max(sums) <= 2048 and sum(sums) == lengths.sum()


@pytest.mark.parametrize("lengths", [[3, 0, 2], [3, 11], [-1]])
def test_lengths_that_fit_no_row_are_refused(lengths):
    with pytest.raises(AssertionError):
        pack(np.array(lengths), 10)


@pytest.fixture(scope="module", params=["bloom-tiny", "falcon-tiny"])
def examples(request: pytest.FixtureRequest, make_model: Callable[[str], Path], cache_dir: Path) -> Dataset:
    """Return the tokenised sample."""
    tokenizer = load_tokenizer(str(make_model(request.param)), MAX_LENGTH)
    return load_examples(str(SAMPLE), tokenizer, str(cache_dir))[0]


def split_rows(packed: PackedSequences) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of every example in every row, found by the flat batch's positions alone."""
    found = []
    for index in range(len(packed)):
        row = packed[index]
        assert row.keys() == {"input_ids", "lengths"}
        flat = flatten([row])
        ids, positions = flat["input_ids"][0].tolist(), flat["position_ids"][0].tolist()
        labels = torch.full((len(ids),), -100)
        labels[flat["label_positions"][0] + 1] = flat["labels"][0]
        labels = labels.tolist()
        assert len(ids) == len(positions) == sum(row["lengths"]) <= MAX_LENGTH
        starts = [place for place, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert positions[start:end] == list(range(end - start))
            found.append((ids[start:end], labels[start:end]))
    return found


def ids_and_labels(examples: Dataset) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of every example, those of one conversation apart."""
    found = []
    for row in examples:
        start = 0
        for prompt, answer in zip(row["lengths"][::2], row["lengths"][1::2], strict=True):
            ids = row["input_ids"][start : start + prompt + answer]
            found.append((ids, [-100] * prompt + ids[prompt:]))
            start += prompt + answer
        assert start == row["length"]
    return found


def test_all_rows_together_hold_every_example_once(examples: Dataset):
    packed = PackedSequences(examples, MAX_LENGTH)
    assert 1 < len(packed) < len(examples) / 1.5
    assert sorted(split_rows(packed)) == sorted(ids_and_labels(examples))
    assert len(ids_and_labels(examples)) > len(examples), "no conversation is among them"


def test_a_row_holds_the_examples_that_pack_put_there_in_their_order(examples: Dataset):
    row_of = pack(np.array(examples["length"][:]), MAX_LENGTH, seed=3)
    packed = PackedSequences(examples, MAX_LENGTH, seed=3)
    assert len(packed) == row_of.max() + 1
    for row in range(len(packed)):
        members = examples.select(np.flatnonzero(row_of == row))
        assert packed[row] == {
            "input_ids": [token for ids in members["input_ids"] for token in ids],
            "lengths": [length for lengths in members["lengths"] for length in lengths],
        }


def test_fill_rate_is_tokens_by_the_room_of_all_rows(examples: Dataset):
    packed = PackedSequences(examples, 2048)
    num_tokens = sum(len(example["input_ids"]) for example in examples)
    assert packed.fill_rate == pytest.approx(num_tokens / (2048 * len(packed)))
    assert 0.8 < packed.fill_rate <= 1


def test_examples_that_were_split_off_are_packed_alone(examples: Dataset):
    split = examples.train_test_split(0.3, seed=1)
    packed = {name: PackedSequences(part, MAX_LENGTH) for name, part in split.items()}
    for name, part in split.items():
        assert part._indices is not None  # otherwise this would test nothing new
        assert sorted(split_rows(packed[name])) == sorted(ids_and_labels(part))
    both = split_rows(packed["train"]) + split_rows(packed["test"])
    assert sorted(both) == sorted(ids_and_labels(examples))


def test_a_packed_row_is_as_flat_as_its_examples_joined(examples: Dataset):
    row_of = pack(np.array(examples["length"][:]), MAX_LENGTH)
    packed = PackedSequences(examples, MAX_LENGTH)
    for index in range(len(packed)):
        flat = flatten([packed[index]])
        expected = flatten(list(examples.select(np.flatnonzero(row_of == index))))
        assert flat.keys() == expected.keys()
        assert flat.pop("num_tokens") == expected.pop("num_tokens")
        assert all(torch.equal(flat[name], expected[name]) for name in flat)


def test_rows_come_out_of_a_pickle_and_a_worker_the_same(examples: Dataset):
    packed = PackedSequences(examples, MAX_LENGTH)
    again = pickle.loads(pickle.dumps(packed))
    rows = [packed[index] for index in range(len(packed))]
    assert [again[index] for index in range(len(again))] == rows
    loaded = list(DataLoader(packed, batch_size=2, collate_fn=flatten, num_workers=1))
    assert len(loaded) == (len(rows) + 1) // 2
    for batch, start in zip(loaded, range(0, len(rows), 2), strict=True):
        expected = flatten(rows[start : start + 2])
        assert batch.pop("num_tokens") == expected.pop("num_tokens")
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
