"""A forest holds what examples begin with once, and each example is one of its paths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.data import trees

FEW_TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=9)
EXAMPLES = st.lists(FEW_TOKENS.flatmap(lambda ids: st.tuples(st.just(ids), st.integers(0, len(ids)))), min_size=1)


def grow(examples: list[tuple[list[int], int]], share_prefixes: bool = True) -> trees.Forest:
    return trees.grow([np.array(ids) for ids, _ in examples], [prompt for _, prompt in examples], share_prefixes)


def paths_of(forest: trees.Forest) -> list[list[int]]:
    """Return the token ids from a root to each token, by the rule that the mask follows."""
    places = np.arange(len(forest.input_ids))
    return [forest.input_ids[(places <= q) & (q < forest.subtree_ends)].tolist() for q in places]


def test_the_example_of_the_docstring():
    forest = grow([(list(b"abcd"), 2), (list(b"abe"), 1), (list(b"fg"), 1)])
    assert bytes(forest.input_ids.tolist()) == b"abcdefg"
    assert forest.position_ids.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert forest.subtree_ends.tolist() == [5, 5, 4, 4, 5, 7, 7]
    assert forest.label_positions.tolist() == [1, 2, 0, 1, 5]
    assert bytes(forest.labels.tolist()) == b"cdbeg"


@given(EXAMPLES)
def test_the_paths_are_the_examples_and_their_beginnings_each_once(examples):
    forest = grow(examples)
    beginnings = {tuple(ids[:length]) for ids, _ in examples for length in range(1, len(ids) + 1)}
    paths = [tuple(path) for path in paths_of(forest)]
    assert sorted(paths) == sorted(beginnings)
    assert forest.position_ids.tolist() == [len(path) - 1 for path in paths]
    assert trees.size([np.array(ids) for ids, _ in examples]) == len(paths)


@given(EXAMPLES, st.booleans())
def test_each_example_trains_its_answer_after_all_that_comes_before_it(examples, share_prefixes):
    forest = grow(examples, share_prefixes)
    paths = paths_of(forest)
    trained = [(paths[at], label) for at, label in zip(forest.label_positions, forest.labels.tolist(), strict=True)]
    expected = [(ids[:at], ids[at]) for ids, prompt in examples for at in range(max(prompt, 1), len(ids))]
    assert sorted(trained) == sorted(expected)


@given(EXAMPLES)
def test_without_sharing_examples_lie_end_to_end_in_their_order(examples):
    forest = grow(examples, share_prefixes=False)
    lengths = [len(ids) for ids, _ in examples]
    assert forest.input_ids.tolist() == [token for ids, _ in examples for token in ids]
    assert forest.position_ids.tolist() == [position for length in lengths for position in range(length)]
    assert forest.subtree_ends.tolist() == np.repeat(np.cumsum(lengths), lengths).tolist()


@pytest.mark.parametrize(
    ("one", "other", "number"), [("abc", "abd", 2), ("ab", "abc", 2), ("a", "b", 0), ("a", "a", 1)]
)
def test_what_two_sequences_begin_with(one: str, other: str, number: int):
    assert trees.common(np.array(list(one)), np.array(list(other))) == number
