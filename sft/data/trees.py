"""Examples as a forest: what several of them begin with is there once, so that it is computed once.

Shapes: T = tokens of the forest, N = tokens that are trained on, counted in each example.

    an example          the path from a root to the token that the example ends with
    a position          the tokens before a token on its path: examples that share it have it in the same place
    the subtree's end   the place in the flat batch where the tokens end that continue a token; so a token at `query`
                        has the one at `key` before it, on its own path, exactly if key <= query < subtree_ends[key]

Three examples, a b c d, a b e and f g, lie in depth-first order:

    input_ids      a  b  c  d  e  f  g
    position_ids   0  1  2  3  2  0  1
    subtree_ends   5  5  4  4  5  7  7
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class Forest:
    """Examples that lie in depth-first order: `input_ids`, `position_ids` and `subtree_ends` are int64 (T,).

    `label_positions`, int64 (N,), are the places of the tokens that predict; `labels`, int64 (N,), what each should
    predict. A place is there once for each example that trains it.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    subtree_ends: np.ndarray
    label_positions: np.ndarray
    labels: np.ndarray


def grow(examples: Sequence[np.ndarray], prompts: Sequence[int], share_prefixes: bool = True) -> Forest:
    """Return the forest of examples, token ids int64 (n,), the first `prompts[i]` of each not trained on.

    Without `share_prefixes` each has a tree of its own, in the order given.
    """
    order, shared = range(len(examples)), [0] * len(examples)
    if share_prefixes:
        order = sorted(order, key=lambda number: _bytes(examples[number]))
        shared = shared_with_the_one_before([examples[number] for number in order])
    num_tokens = sum(map(len, examples)) - sum(shared)
    ids, positions, ends = (np.empty(num_tokens, np.int64) for _ in range(3))
    path = np.empty(max(map(len, examples)), np.int64)  # the places of the last example's tokens
    places, labels, length, start = [], [], 0, 0
    for number, first in zip(order, shared, strict=True):
        ends[path[first:length]] = start
        example, length = examples[number], len(examples[number])
        end, predicted = start + length - first, max(prompts[number], 1)
        ids[start:end], positions[start:end] = example[first:], np.arange(first, length)
        path[first:length] = np.arange(start, end)
        places.append(path[predicted - 1 : length - 1].copy())
        labels.append(example[predicted:])
        start = end
    ends[path[:length]] = start
    return Forest(ids, positions, ends, np.concatenate(places), np.concatenate(labels))


def size(sequences: Sequence[np.ndarray]) -> int:
    """Return how many tokens the forest of some token ids has."""
    ordered = sorted(sequences, key=_bytes)
    return sum(map(len, ordered)) - sum(shared_with_the_one_before(ordered))


def shared_with_the_one_before(sequences: Sequence[np.ndarray]) -> list[int]:
    """Return how many tokens each has in common, from the first on, with the one before it; 0 for the first."""
    return [0, *(common(one, other) for one, other in zip(sequences, sequences[1:], strict=False))][: len(sequences)]


def common(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many tokens two sequences begin with in common."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length


def _bytes(ids: np.ndarray) -> bytes:
    """Return bytes in whose order sequences that begin alike lie together; the same number of bytes for each token."""
    return ids.astype(np.uint32).tobytes()
