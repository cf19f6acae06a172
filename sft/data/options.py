"""Options of a multiple-choice question, in the forms in which data sets write them."""

import re
from collections.abc import Sequence

from sft.data.columns import Columns, ignoring, label_of
from sft.data.texts import RefusedError, brief, text_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LABELLED = re.compile(r"\s*[(（]?([A-Za-z1-9])\s*[.、:：)）]")  # an option with its label


def read_options(record: dict, keys: Sequence[str], columns: Columns) -> list[str]:
    """Return the options of a multiple-choice question, each with the label that the answer may be."""
    key = keys[0]
    label, value = label_of(key), record[key]
    if label is None and isinstance(value, str):
        return [text_of(value, key)]
    if label is not None:
        labelled = [(label_of(key), record[key]) for key in keys]
    elif isinstance(value, dict) and {"text", "label"} == value.keys() and all(map(_is_list, value.values())):
        labelled = list(zip(value["label"], value["text"], strict=False)) * (len(value["label"]) == len(value["text"]))
    elif isinstance(value, dict):
        labelled = list(value.items())
    else:
        labelled = list(zip(LETTERS, value, strict=False)) if _is_list(value) and len(value) <= len(LETTERS) else []
    if not labelled or not all(_is_option(each) for pair in labelled for each in pair):
        raise RefusedError(f'"{key}" is not a list of options', f"{brief(value)}; type {ignoring(columns, key)}")
    texts = [(str(label), text_of(str(text), key)) for label, text in labelled]
    own = [LABELLED.match(text) for _, text in texts]
    if all(own) and [each[1] for each in own] == [label for label, _ in texts]:
        return [text for _, text in texts]
    return [f"{label}. {text}" for label, text in texts]


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _is_option(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)
