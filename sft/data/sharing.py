"""What tokenised rows have in common, so that sequences are packed by the tokens that they will really hold.

Shapes: R = rows of a data set, U = units: rows that stay together.

The parts of one conversation share nearly all they have with one another, and so do answers to one question: they are
one unit. The template is in every row, and a sequence holds it once.
"""

from dataclasses import dataclass

import datasets
import numpy as np

from sft.data import trees
from sft.data.cache import lengths_of


@dataclass
class Units:
    """Rows that stay together, int64: the unit of each row, (R,), and what each unit takes of a sequence, (U,).

    Beside its units a sequence holds the beginnings of the template, at most `reserved` tokens.
    """

    unit_of: np.ndarray
    sizes: np.ndarray
    reserved: int


def find_units(samples: datasets.Dataset, max_length: int) -> Units:
    """Return the units of a data set that `sft.data.cache` made; each fits into a sequence of `max_length` tokens."""
    held, begins = lengths_of(samples, "held").astype(np.int64), lengths_of(samples, "begins")
    reserved = size_of_beginnings(samples, begins)
    own = np.maximum(held - begins, 1)
    unit_of, sizes = np.arange(len(samples)), own.copy()
    question = lengths_of(samples, "question")
    order = np.argsort(question, kind="stable")
    repeats = np.flatnonzero(question[order[1:]] == question[order[:-1]])
    shared = shared_within(samples, order[repeats], order[repeats + 1], begins)
    for before, row, number in zip(order[repeats].tolist(), order[repeats + 1].tolist(), shared.tolist(), strict=True):
        unit, added = unit_of[before], own[row] + begins[row] - number
        if sizes[unit] + added <= max_length - reserved:
            unit_of[row] = unit
            sizes[unit] += added
    first_rows, unit_of = np.unique(unit_of, return_inverse=True)
    return Units(unit_of, sizes[first_rows], reserved)


def shared_within(samples: datasets.Dataset, before: np.ndarray, rows: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Return how many tokens rows begin with as the rows before them of one question do, at least the template's."""
    lengths, labelled, continues = (lengths_of(samples, name) for name in ("length", "labelled", "continues"))
    file_of, row_of = lengths_of(samples, "file"), lengths_of(samples, "row")
    is_part = (file_of[before] == file_of[rows]) & (row_of[before] == row_of[rows])
    return np.maximum(np.where(is_part, continues[rows], (lengths - labelled)[rows]), begins[rows])


def size_of_beginnings(samples: datasets.Dataset, begins: np.ndarray) -> int:
    """Return how many tokens the template's beginnings have in all rows, what they share counted once."""
    _, rows = np.unique(2 * begins.astype(np.int64) + lengths_of(samples, "has_input"), return_index=True)
    some = samples[rows.tolist()]["input_ids"]
    return trees.size([np.asarray(ids[:length]) for ids, length in zip(some, begins[rows].tolist(), strict=True)])
