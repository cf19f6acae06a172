"""Examples joined end to end into one flat batch, and their labels."""

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from sft.data.collate import flatten, labels_of
from sft.data.encode import Encoder, encode_samples
from sft.data.formats import Sample
from sft.model.load import load_tokenizer
from sft.model.loss import label_positions

NASTY = "天地玄黄宇宙洪荒𠀀𪛖😀。，！？、…「」（）().,!?|\n\n\n  \u3000\u3000\t۔।,éa1 #:"


@pytest.fixture(params=["bloom-tiny", "falcon-tiny"])
def tokenizer(request: pytest.FixtureRequest, make_model: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(make_model(request.param)))


def example_of(length: int, first: int, *lengths: int) -> dict[str, list[int]]:
    """Return a row of ascending ids that are all labels; of one example, or of those of some lengths."""
    turns = [number for each in lengths or (length,) for number in (0, each)]
    return {"input_ids": list(range(first, first + length)), "lengths": turns}


def test_labels_are_the_answers_ids_in_their_places():
    row = {"input_ids": [7, 8, 9, 10, 11, 12, 13], "lengths": [2, 1, 1, 3]}
    assert labels_of(row) == [-100, -100, 9, -100, 11, 12, 13]
    assert labels_of({"input_ids": [7, 8], "lengths": [2, 0]}) == [-100, -100]


def test_examples_are_joined_end_to_end_without_padding():
    row = flatten([example_of(3, 10), example_of(1, 20), example_of(2, 30)])
    assert row.pop("num_tokens") == 6
    assert {name: value.tolist() for name, value in row.items()} == {
        "input_ids": [[10, 11, 12, 20, 30, 31]],
        "position_ids": [[0, 1, 2, 0, 0, 1]],
        "subtree_ends": [[3, 3, 3, 4, 6, 6]],
        "label_positions": [[0, 1, 4]],
        "labels": [[11, 12, 31]],
    }
    assert all(value.dtype == torch.int64 for value in row.values())


def test_what_examples_begin_with_is_joined_once_and_all_their_tokens_are_counted():
    rows = [{"input_ids": [7, 8, 9, 1, 7, 8, 9, 2], "lengths": [3, 1, 2, 2]}, {"input_ids": [7, 5], "lengths": [1, 1]}]
    row = flatten(rows, share_prefixes=True)
    assert row.pop("num_tokens") == 10
    assert {name: value.tolist() for name, value in row.items()} == {
        "input_ids": [[7, 5, 8, 9, 1, 2]],
        "position_ids": [[0, 1, 1, 2, 3, 3]],
        "subtree_ends": [[6, 2, 6, 6, 5, 6]],
        "label_positions": [[0, 3, 2, 3]],
        "labels": [[5, 1, 9, 2]],
    }


def test_positions_count_over_prompt_and_answer_of_each_example():
    row = flatten([{"input_ids": [7, 8, 9, 10, 11, 12, 13], "lengths": [2, 1, 1, 3]}])
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert row["labels"].tolist() == [[9, 11, 12, 13]]


def test_packed_rows_keep_their_positions():
    packed = example_of(5, 10, 2, 3)
    row = flatten([packed, example_of(2, 20), packed])
    assert row["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 0, 1, 0, 1, 2]]
    assert row["input_ids"].tolist() == [[10, 11, 12, 13, 14, 20, 21, 10, 11, 12, 13, 14]]
    assert row["labels"].tolist() == [[11, 13, 14, 21, 11, 13, 14]]


def test_joining_leaves_the_examples_as_they_were():
    examples = [example_of(3, 10), example_of(2, 20), example_of(5, 30, 2, 3)]
    before = copy.deepcopy(examples)
    flatten(examples)
    assert examples == before


def rows_of_tokens(rows: list[Sample], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Return rows of one reply as `flatten` takes them."""
    examples = [example for [example] in Encoder(tokenizer).encode(rows)]
    pairs = [(example.prompt, example.answer) for example in examples]
    return [{"input_ids": prompt + answer, "lengths": [len(prompt), len(answer)]} for prompt, answer in pairs]


def test_tokenised_rows_join_into_what_they_are_alone(tokenizer: PreTrainedTokenizerBase):
    tokenizer.model_max_length = 2048
    rng = random.Random(2)
    texts = [["".join(rng.choices(NASTY, k=rng.randint(1, 40))) for _ in range(3)] for _ in range(9)]
    rows = [Sample(*three, "rows:1") for three in texts]
    examples = rows_of_tokens(rows, tokenizer)
    parts = flatten(examples)["input_ids"].split([len(example["input_ids"]) for example in examples], dim=1)
    assert [part[0].tolist() for part in parts] == [example["input_ids"] for example in examples]
    alone = [flatten([example]) for example in examples]
    assert all(len(row["input_ids"]) == 1 for row in alone)
    joined = flatten(examples)
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(joined[name], torch.cat([row[name] for row in alone], dim=1))
    labels = torch.tensor([[label for example in examples for label in labels_of(example)]])
    assert torch.equal(joined["label_positions"][0], label_positions(labels))


def test_real_eos_keeps_its_label_where_pad_is_eos(make_model: Callable[[str], Path]):
    tokenizer = load_tokenizer(str(make_model("falcon-tiny")))
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos
    rows = [Sample("问", "", "答", "a"), Sample("问", "", "长" * 9, "b")]
    examples = rows_of_tokens(rows, tokenizer)
    row = flatten(examples)
    ends = [len(examples[0]["input_ids"]) - 1, row["input_ids"].shape[1] - 1]
    assert (row["input_ids"][0] == eos).nonzero().flatten().tolist() == ends
    assert torch.isin(torch.tensor(ends) - 1, row["label_positions"]).all()
    labels = [label for each in encode_samples(rows, tokenizer) for label in each["labels"] if label != -100]
    assert row["labels"][0].tolist() == labels and labels.count(eos) == 2
