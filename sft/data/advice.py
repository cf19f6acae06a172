"""Why a record has no question or no answer, what it has instead, and what to type."""

import json
from collections.abc import Sequence

from sft.data.columns import (
    NAMES,
    ROLES,
    Columns,
    ColumnsError,
    Layout,
    by_hand,
    carries_nothing,
    has_value,
    layout_of,
    name_of,
    quoted,
    role_of,
)
from sft.data.texts import RefusedError
from sft.data.turns import NO_REPLY, speaks


def lacks(record: dict, layout: Layout, role: str, columns: Columns) -> RefusedError:
    """Return why a record without a text of this role is refused."""
    keys = [key for key, value in record.items() if has_value(value, key, columns)]
    if empty := empty_key(record, role, columns):
        others = [key for key in keys if key not in layout.keys and _may_be(role, key, record[key])]
        advice = f"; type {by_hand(columns, (role, others[0]))}" if others else ""
        return RefusedError(f'the "{empty}" is {"null" if record[empty] is None else "empty"}{advice}')
    if speaks(record) and not layout.keys:
        return RefusedError("one turn in a row of its own; give the turns of a conversation one row, under messages")
    turns = [key for key in record if isinstance(key, str) and role_of(key, columns) == "messages"]
    if turns and not layout.keys:
        is_empty = not has_value(record[turns[0]], turns[0], columns)
        return RefusedError(f'the "{turns[0]}" is {"empty" if is_empty else "not a list of turns"}')
    if rows := _rows_within(record, layout, columns):
        return rows
    return RefusedError(_missing(layout, keys, role, columns))


def _may_be(role: str, key: str, value: object) -> bool:
    """Tell whether a key of another name may hold the text of this role."""
    return isinstance(value, str) and (is_like(role, key) or (role == "output" and name_of(key) == "label"))


def _rows_within(record: dict, layout: Layout, columns: Columns) -> RefusedError | None:
    """Return what to do with rows that stand within a record, under one key or each under its own."""
    for key, value in record.items():
        if isinstance(value, list) and _are_rows(value, layout, columns):
            write = f"jq -c '.[{json.dumps(key, ensure_ascii=False)}][]' FILE > rows.jsonl"
            return RefusedError(
                f'rows stand under "{quoted([key])[1:-1]}"; to write each as a line of its own, type {write}'
            )
    if not layout.keys and _are_rows(list(record.values()), layout, columns):
        return RefusedError(
            f"each row stands under a key of its own ({quoted(list(record)[:2])}, ...); to write each as a line of its "
            "own, type jq -c '.[]' FILE > rows.jsonl"
        )
    return None


def _are_rows(values: list, layout: Layout, columns: Columns) -> bool:
    """Tell whether values are rows: readable ones, or, in a record without roles, objects of the same keys."""
    if len(values) < 2 or not all(isinstance(each, dict) and each and not speaks(each) for each in values):
        return False
    if not layout.keys and len(values) > 2 and all(each.keys() == values[0].keys() for each in values):
        return True
    try:
        own = layout_of(tuple(key for key, each in values[0].items() if has_value(each, key, columns)), columns)
    except ColumnsError:
        return False
    return bool(own.messages or (own.instruction and own.output))


def without_reply(error: RefusedError, layout: Layout, columns: Columns) -> RefusedError:
    """Return why turns are refused, and where their reply may stand if they have none."""
    ignored = {key.strip() for key in columns.ignored}
    others = [key for key in (*layout.beside, *layout.unread) if is_like("output", key) and key.strip() not in ignored]
    if error.kind != NO_REPLY or not others:
        return error
    turns = [("messages", layout.messages)] if layout.messages else []
    flags = [by_hand(columns, *turns, ("output", key)) for key in others]
    return RefusedError(f"{NO_REPLY}, but {quoted(others)} beside the turns; type {' or '.join(flags)}")


def _missing(layout: Layout, keys: Sequence[str], role: str, columns: Columns) -> str:
    """Return what a record lacks, what it has instead, and what to type."""
    if set(map(name_of, layout.unread)) == {"text"} and not layout.keys:
        return 'pretraining text: a "text" has no question and no answer; expected instructions or conversations'
    roles = [f'"{getattr(layout, each)}" is the {each}' for each in ROLES if getattr(layout, each)]
    others = [key for key in keys if key not in layout.keys]
    others.sort(key=lambda key: (carries_nothing(key), not (is_like("output", key) or is_like("instruction", key))))
    found = "; ".join(filter(None, (", ".join(roles), f"other keys: {quoted(others)}" if others else "")))
    ignored = {key.strip() for key in columns.ignored}
    likely = [key for key in others if not carries_nothing(key) and key.strip() not in ignored]
    if role == "instruction" and layout.output is None:
        flag = by_hand(columns, ("instruction", "KEY"), ("output", "KEY"))
        return f"no instruction and no output found ({found or 'no keys'}); type {flag}"
    if role == "instruction" and not likely and layout.input:
        likely = [layout.input]
    is_there = likely or not ignored.issuperset(others)
    like = [key for key in likely if is_like(role, key)]
    likely = like or (likely if role == "instruction" else [])  # what is trained is not guessed
    flag = by_hand(columns, (role, likely[0] if len(likely) == 1 else "KEY"))
    return f"no {role} found ({found}); {f'type {flag}' if is_there else f'expected a key such as {role}'}"


def is_like(role: str, key: str) -> bool:
    """Tell whether a key is named like a role: by a whole word in English, by any part in Chinese."""
    words = name_of(key).split("_")
    if words[-1] in ("type", "number", "class", "subject"):
        return False
    names = [name for name in NAMES[role].split() if len(name) > 1]
    is_truth = role == "output" and name_of(key) == "ground_truth"
    return is_truth or any(name in words if name.isascii() else name in name_of(key) for name in names)


def empty_key(record: dict, role: str, columns: Columns) -> str | None:
    """Return a key of this role that is there and has no value."""
    keys = [key for key in record if isinstance(key, str) and role_of(key, columns) == role]
    return next((key for key in keys if not has_value(record[key], key, columns)), None)
