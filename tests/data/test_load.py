"""Rows as a data set, the report on every one of them, their labels, and flat batches."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from sft.data.encode import Encoder, encode_rows
from sft.data.formats import Row, read_rows
from sft.data.load import flatten, labels_of, lengths_of, load_examples
from sft.data.shards import find_shards
from sft.model.load import load_tokenizer
from sft.model.loss import label_positions
from sft.prompts import build_chat_prompt, build_prompt
from support.project import SAMPLE

NASTY = "天地玄黄宇宙洪荒𠀀𪛖😀。，！？、…「」（）().,!?|\n\n\n  \u3000\u3000\t۔।,éa1 #:"


@pytest.fixture(params=["bloom-tiny", "falcon-tiny"])
def tokenizer(request: pytest.FixtureRequest, make_model: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(make_model(request.param)))


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def record(instruction: str, output: str, input: str = "") -> dict[str, str]:
    return {"instruction": instruction, "input": input, "output": output}


def list_rows(records: list[dict[str, str]]) -> list[Row]:
    """Return those records that are rows."""
    return [Row(each["instruction"], each["input"], each["output"], "rows:1") for each in records if each["output"]]


def parts_of(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the ids of each prompt of a row and of its answer by turns, by the tokenizer alone."""
    if row.input:
        asked = [(build_prompt(row.instruction, row.input), row.output)]
    else:
        turns = [*row.history, (row.instruction, row.output)]
        said = [turn for pair in turns for turn in zip(("user", "assistant"), pair, strict=True)]
        messages = [{"role": role, "content": text} for role, text in said]
        asked = [(build_chat_prompt(messages[: 2 * i + 1]), reply) for i, (_, reply) in enumerate(turns)]
    encoded = [(tokenizer(prompt).input_ids, tokenizer(reply).input_ids) for prompt, reply in asked]
    return [ids for prompt, reply in encoded for ids in (prompt, [*reply, tokenizer.eos_token_id])]


# ---------------------------------------------------------------------------------------------------------- the report


def test_report_counts_every_row(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    tokenizer.model_max_length = 120
    rows = [record("问", "答")] * 3 + [
        record("空", ""),
        record("长" * 200, "好"),
        record("白", " \n"),
        record("尾", "长" * 300),
    ]
    path = write_rows(tmp_path / "rows.json", rows)
    examples, report = load_examples(path, tokenizer, str(tmp_path / "cache"))
    counts = report.counts
    assert (counts.rows, counts.kept, counts.refused, counts.cut) == (7, 5, 2, 2)
    assert report.kept == len(examples) == counts.rows - counts.refused
    entries = {entry["place"]: entry["note"] for entry in report.entries()}
    assert list(entries) == [f"{path}:{line}" for line in (4, 5, 6, 7)]
    refused = [{"place": f"{path}:{line}", "note": 'refused: the "output" is empty'} for line in (4, 6)]
    assert report.refused(20) == refused and report.refused(1) == refused[:1]
    cut = [entries[f"{path}:{line}"] for line in (5, 7)]
    assert all(note.startswith("cut: ") for note in cut)
    assert ["of the answer's" in note for note in cut] == [False, True]
    assert examples["row"][:] == [1, 2, 3, 5, 7] and set(examples["file"][:]) == {0}
    assert counts.files == [{"file": path, "form": "lines", "encoding": "utf-8", "shape": "instruction/input/output"}]


def test_report_counts_the_tokens_of_the_sample(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    tokenizer.model_max_length = 2048
    examples, report = load_examples(str(SAMPLE), tokenizer, str(tmp_path))
    expected = [parts_of(row, tokenizer) for shard in find_shards(str(SAMPLE)) for row in read_rows(shard)]
    assert [example["input_ids"] for example in examples] == [sum(parts, []) for parts in expected]
    assert [example["lengths"] for example in examples] == [list(map(len, parts)) for parts in expected]
    counts = report.counts
    assert counts.rows == counts.kept == report.kept == len(expected)
    assert counts.conversations == sum(len(parts) > 2 for parts in expected) > 20
    assert report.tokens == sum(len(ids) for parts in expected for ids in parts)
    assert report.labelled_tokens == sum(len(ids) for parts in expected for ids in parts[1::2])
    assert report.longest == max(sum(map(len, parts)) for parts in expected)
    assert counts.cut == counts.refused == counts.unread_bytes == 0 and list(report.entries()) == []


def test_length_is_that_of_kept_and_cut_rows(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    tokenizer.model_max_length = 120
    records = [record("问", "答"), record("空", ""), record("尾", "长" * 300)]
    [short, _] = [example["length"] for example in encode_rows(list_rows(records), tokenizer)]
    examples, _ = load_examples(write_rows(tmp_path / "rows.json", records), tokenizer, str(tmp_path / "cache"))
    assert examples["length"][:] == lengths_of(examples).tolist() == [short, 120]
    assert lengths_of(examples, "labelled").tolist() == [example["lengths"][1] for example in examples]
    for example in examples:
        assert len(example["input_ids"]) == sum(example["lengths"]) == len(labels_of(example)) == example["length"]


@pytest.mark.parametrize("content", ["", "\n", "[]", json.dumps(record("问", "")), "bad\n"])
def test_data_without_a_row_to_train_on_is_told(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, content: str):
    path = tmp_path / "rows.json"
    path.write_text(content, encoding="utf-8")
    examples, report = load_examples(str(path), tokenizer, str(tmp_path / "cache"))
    assert len(examples) == report.kept == report.counts.kept == 0
    # Whatever share of refused rows is allowed.
    assert report.what_is_wrong(1.0).startswith("has no row to train on")


def test_a_bad_row_is_named_through_the_cache_too(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(record("问", "答")) + "\nbad\n", encoding="utf-8")
    for _ in range(2):
        examples, report = load_examples(str(path), tokenizer, str(tmp_path / "cache"))
        assert len(examples) == 1
        [entry] = report.refused(20)
        assert entry["place"] == f"{path}:2" and entry["note"].startswith("refused: not JSON")
        assert report.what_is_wrong(0.5) is None
        assert report.what_is_wrong(0.49) == (
            "has 1 of 2 rows refused, more than --max_bad_fraction 0.49; mend them, or allow more"
        )


# -------------------------------------------------------------------------------------------------------- the flat batch


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
    assert {name: value.tolist() for name, value in row.items()} == {
        "input_ids": [[10, 11, 12, 20, 30, 31]],
        "labels": [[-100, 11, 12, -100, -100, 31]],
        "position_ids": [[0, 1, 2, 0, 0, 1]],
        "label_positions": [[0, 1, 4]],
    }
    assert all(value.dtype == torch.int64 for value in row.values())


def test_positions_count_over_prompt_and_answer_of_each_example():
    row = flatten([{"input_ids": [7, 8, 9, 10, 11, 12, 13], "lengths": [2, 1, 1, 3]}])
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert row["labels"].tolist() == [[-100, -100, 9, -100, 11, 12, 13]]


def test_packed_rows_keep_their_positions():
    packed = example_of(5, 10, 2, 3)
    row = flatten([packed, example_of(2, 20), packed])
    assert row["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 0, 1, 0, 1, 2]]
    assert row["input_ids"].tolist() == [[10, 11, 12, 13, 14, 20, 21, 10, 11, 12, 13, 14]]
    assert row["labels"].tolist() == [[-100, 11, -100, 13, 14, -100, 21, -100, 11, -100, 13, 14]]


def test_joining_leaves_the_examples_as_they_were():
    examples = [example_of(3, 10), example_of(2, 20), example_of(5, 30, 2, 3)]
    before = copy.deepcopy(examples)
    flatten(examples)
    assert examples == before


def rows_of_tokens(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Return rows of one reply as `flatten` takes them."""
    examples = [example for [example] in Encoder(tokenizer).encode(rows)]
    pairs = [(example.prompt, example.answer) for example in examples]
    return [{"input_ids": prompt + answer, "lengths": [len(prompt), len(answer)]} for prompt, answer in pairs]


def test_tokenised_rows_join_into_what_they_are_alone(tokenizer: PreTrainedTokenizerBase):
    tokenizer.model_max_length = 2048
    rng = random.Random(2)
    texts = [["".join(rng.choices(NASTY, k=rng.randint(1, 40))) for _ in range(3)] for _ in range(9)]
    rows = [Row(*three, "rows:1") for three in texts]
    examples = rows_of_tokens(rows, tokenizer)
    parts = flatten(examples)["input_ids"].split([len(example["input_ids"]) for example in examples], dim=1)
    assert [part[0].tolist() for part in parts] == [example["input_ids"] for example in examples]
    alone = [flatten([example]) for example in examples]
    assert all(len(row["input_ids"]) == 1 for row in alone)
    joined = flatten(examples)
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(joined[name], torch.cat([row[name] for row in alone], dim=1))
    assert torch.equal(joined["label_positions"][0], label_positions(joined["labels"]))


def test_real_eos_keeps_its_label_where_pad_is_eos(make_model: Callable[[str], Path]):
    tokenizer = load_tokenizer(str(make_model("falcon-tiny")))
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos
    rows = [Row("问", "", "答", "a"), Row("问", "", "长" * 9, "b")]
    examples = rows_of_tokens(rows, tokenizer)
    row = flatten(examples)
    ends = [len(examples[0]["input_ids"]) - 1, row["input_ids"].shape[1] - 1]
    assert (row["input_ids"][0] == eos).nonzero().flatten().tolist() == ends
    assert row["labels"][0, ends].tolist() == [eos, eos]
    assert row["labels"][0].tolist() == [label for each in encode_rows(rows, tokenizer) for label in each["labels"]]
