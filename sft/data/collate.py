"""Sequences joined into one flat batch, without padding, and the labels of their answers.

Shapes: T = tokens of a flat batch, N = those that are trained on, counted in each example.
"""

from collections.abc import Sequence

import numpy as np
import torch

from sft import IGNORE_INDEX
from sft.data.trees import grow

COLUMNS = ("input_ids", "lengths")  # of a sequence: its token ids, and the lengths of each prompt and answer in turn


def labels_of(row: dict) -> list[int]:
    """Return a sequence's labels: the ids of its answers, and IGNORE_INDEX in place of its prompts."""
    input_ids, labels, start = row["input_ids"], [], 0
    for prompt, answer in zip(row["lengths"][::2], row["lengths"][1::2], strict=True):
        labels += [IGNORE_INDEX] * prompt
        labels += input_ids[start + prompt : start + prompt + answer]
        start += prompt + answer
    return labels


def flatten(rows: Sequence[dict], share_prefixes: bool = False) -> dict[str, torch.Tensor | int]:
    """Join sequences into one flat batch, without padding: int64 `input_ids`, `position_ids`, `subtree_ends`, (1, T).

    With `share_prefixes`, what examples begin with in common is there once, as `sft.data.trees` has it; otherwise they
    lie end to end, and positions start from 0 in each. `label_positions`, int64 (1, N), are the places whose next token
    is trained on, and `labels`, int64 (1, N), those tokens. `num_tokens` counts the tokens of all examples.
    """
    input_ids, lengths = (np.concatenate([row[name] for row in rows]).astype(np.int64) for name in COLUMNS)
    per_example = lengths[::2] + lengths[1::2]
    examples = np.split(input_ids, np.cumsum(per_example)[:-1])
    forest = grow(examples, lengths[::2].tolist(), share_prefixes)
    flat = {name: torch.from_numpy(values)[None] for name, values in vars(forest).items()}
    return {**flat, "num_tokens": len(input_ids)}
