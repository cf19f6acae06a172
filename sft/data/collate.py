"""Sequences joined end to end into one flat batch, without padding, and the labels of their answers.

Shapes: T = tokens of all examples in a flat batch, N = those whose next token has a label.
"""

from collections.abc import Sequence

import numpy as np
import torch

from sft import IGNORE_INDEX

COLUMNS = ("input_ids", "lengths")  # of a sequence: its token ids, and the lengths of each prompt and answer in turn


def labels_of(row: dict) -> list[int]:
    """Return a sequence's labels: the ids of its answers, and IGNORE_INDEX in place of its prompts."""
    input_ids, labels, start = row["input_ids"], [], 0
    for prompt, answer in zip(row["lengths"][::2], row["lengths"][1::2], strict=True):
        labels += [IGNORE_INDEX] * prompt
        labels += input_ids[start + prompt : start + prompt + answer]
        start += prompt + answer
    return labels


def flatten(rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    """Join sequences end to end, without padding: int64 `input_ids`, `labels`, `position_ids`, each (1, T).

    Positions start from 0 in each example. `label_positions`, int64 (1, N), are the positions whose next token has a
    label.
    """
    input_ids, lengths = (np.concatenate([row[name] for row in rows]).astype(np.int64) for name in COLUMNS)
    per_example = lengths[::2] + lengths[1::2]
    starts = np.cumsum(per_example) - per_example
    position_ids = np.arange(len(input_ids)) - np.repeat(starts, per_example)
    # The first token of an example does not continue the one before it.
    is_labelled = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths) & (position_ids != 0)
    flat = {
        "input_ids": input_ids,
        "labels": np.where(is_labelled, input_ids, IGNORE_INDEX),
        "position_ids": position_ids,
        "label_positions": np.flatnonzero(is_labelled) - 1,
    }
    return {name: torch.from_numpy(values)[None] for name, values in flat.items()}
