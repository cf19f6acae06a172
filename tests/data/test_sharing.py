"""Sequences are packed by what they really hold: templates once, conversations and answers to one question together."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from sft.data import trees
from sft.data.collate import flatten
from sft.data.encode import Encoder
from sft.data.load import load_examples
from sft.data.packing import PackedSequences
from sft.data.sharing import find_units
from sft.data.streaming import StreamedSequences
from sft.model.load import load_tokenizer

MAX_LENGTH = 300
WORDS = ["天气", "怎么样", "，", "河水", "流过村庄", "abc ", "12", "。", "老王", "问"]


def text(generator: random.Random, most: int) -> str:
    return "".join(generator.choices(WORDS, k=generator.randint(1, most)))


def records(seed: int, number: int = 120) -> Iterator[dict]:
    """Yield tasks with and without an input, long and short conversations, and several answers to one question."""
    generator = random.Random(seed)
    for _ in range(number):
        question = {"instruction": text(generator, 12), "input": generator.choice(["", text(generator, 9)])}
        for _ in range(generator.choice([1, 1, 1, 3])):
            yield {**question, "output": text(generator, generator.choice([5, 40, 300]))}
        turns = [text(generator, 12) for _ in range(2 * generator.randint(1, 9))]
        roles = ("human", "gpt") * len(turns)
        yield {"conversations": [{"from": role, "value": turn} for role, turn in zip(roles, turns, strict=False)]}


@pytest.fixture(scope="module", params=["bloom-tiny", "falcon-tiny"])
def samples(request: pytest.FixtureRequest, make_model: Callable, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(1)))
    tokenizer = load_tokenizer(str(make_model(request.param)), MAX_LENGTH)
    return load_examples(str(folder / "rows.jsonl"), tokenizer, str(folder))[0]


def examples_of(row: dict) -> list[np.ndarray]:
    lengths = np.array(row["lengths"]).reshape(-1, 2).sum(1)
    return np.split(np.array(row["input_ids"]), np.cumsum(lengths)[:-1])


def all_examples(packed: PackedSequences) -> list[list[int]]:
    return [ids.tolist() for index in range(len(packed)) for ids in examples_of(packed[index])]


def test_rows_know_how_much_of_the_template_they_begin_with(samples: Dataset):
    for has_input in (False, True):
        rows = [row for row in samples if row["has_input"] is has_input]
        begins = rows[0]["begins"]
        assert {tuple(row["input_ids"][: row["begins"]]) for row in rows} == {tuple(rows[0]["input_ids"][:begins])}
        assert begins == min(trees.common(examples_of(rows[0])[0], examples_of(row)[0]) for row in rows[1:]) > 10


def test_rows_know_what_they_hold_and_what_they_continue(samples: Dataset):
    before, num_parts = None, 0
    for row in samples:
        assert row["held"] == trees.size(examples_of(row)) <= row["length"]
        is_part = before is not None and before["row"] == row["row"]
        num_parts += is_part
        shared = trees.common(examples_of(before)[-1], examples_of(row)[0]) if is_part else 0
        assert row["continues"] == shared
        before = row
    assert num_parts > 20, "conversations that do not fit into one row are missing"


@pytest.mark.parametrize("seed", range(3))
def test_no_sequence_holds_more_than_fits_and_every_row_is_there_once(samples: Dataset, seed: int):
    packed = PackedSequences(samples, MAX_LENGTH, seed, shares_prefixes=True)
    held = [packed.held_by([index]) for index in range(len(packed))]
    assert max(held) <= MAX_LENGTH
    apart = PackedSequences(samples, MAX_LENGTH, seed)
    assert len(packed) < len(apart)
    assert sorted(all_examples(packed)) == sorted(all_examples(apart))
    assert packed.fill_rate > 0.85


def test_the_same_seed_packs_the_same(samples: Dataset):
    first, again, other = (PackedSequences(samples, MAX_LENGTH, seed, shares_prefixes=True) for seed in (3, 3, 4))
    assert [first[index] for index in range(len(first))] == [again[index] for index in range(len(again))]
    assert not np.array_equal(first.order, other.order)


def test_parts_of_a_conversation_and_answers_to_a_question_stay_together(samples: Dataset):
    units = find_units(samples, MAX_LENGTH)
    rows = list(samples)
    for unit in range(len(units.sizes)):
        members = [rows[index] for index in np.flatnonzero(units.unit_of == unit)]
        assert len({member["question"] for member in members}) == 1
        held = trees.size([ids for member in members for ids in examples_of(member)])
        assert held - members[0]["begins"] <= units.sizes[unit]
    num_together = len(rows) - len(units.sizes)
    num_repeated = len(rows) - len({row["question"] for row in rows})
    assert num_together > 0.3 * num_repeated > 30, "those that fit"


def test_a_question_that_was_cut_is_no_other_ones(make_model: Callable, tmp_path: Path):
    # What is left of a long question depends on its answer, so two answers share less than the question.
    question = "河水流过村庄。" * 100
    rows = [{"instruction": question, "output": "好" * number} for number in (5, 90)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    samples, _ = load_examples(
        str(tmp_path / "rows.json"), load_tokenizer(str(make_model("bloom-tiny")), 128), str(tmp_path)
    )
    assert len(find_units(samples, 128).sizes) == 2


@pytest.mark.parametrize("shares_prefixes", [False, True])
def test_streamed_sequences_hold_no_more_than_fits(make_model: Callable, tmp_path: Path, shares_prefixes: bool):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(2)))
    encoder = Encoder(load_tokenizer(str(make_model("bloom-tiny")), MAX_LENGTH))
    stream = StreamedSequences([tmp_path / "rows.jsonl"], encoder, tmp_path / "notes")
    stream.is_packed, stream.shares_prefixes = True, shares_prefixes
    sizes = [flatten([row], shares_prefixes)["input_ids"].shape[1] for row, _ in zip(stream, range(60), strict=False)]
    assert max(sizes) <= MAX_LENGTH and np.mean(sizes) > 0.75 * MAX_LENGTH
