"""Rows as a data set, the report on every one of them, and what is held out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sft.data.cache import lengths_of
from sft.data.collate import labels_of
from sft.data.columns import Columns
from sft.data.encode import encode_samples
from sft.data.files import find_shards
from sft.data.formats import Sample, read_samples
from sft.data.load import hold_out, load_examples
from sft.model.load import load_tokenizer
from sft.program import UserError
from sft.prompts import build_chat_prompt, build_prompt
from support.project import SAMPLE


@pytest.fixture(params=["bloom-tiny", "falcon-tiny"])
def tokenizer(request: pytest.FixtureRequest, make_model: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(make_model(request.param)))


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def record(instruction: str, output: str, input: str = "") -> dict[str, str]:
    return {"instruction": instruction, "input": input, "output": output}


def list_rows(records: list[dict[str, str]]) -> list[Sample]:
    """Return those records that are rows."""
    return [Sample(each["instruction"], each["input"], each["output"], "rows:1") for each in records if each["output"]]


def parts_of(row: Sample, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
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
    reason = 'the "output" is empty; --empty_output train trains it'
    assert [entries[f"{path}:{line}"] for line in (4, 6)] == [f"refused: {reason}"] * 2
    cut = [entries[f"{path}:{line}"] for line in (5, 7)]
    assert all(note.startswith("cut: ") for note in cut)
    assert ["of the answer's" in note for note in cut] == [False, True]
    assert examples["row"][:] == [1, 2, 3, 5, 7] and set(examples["file"][:]) == {0}
    [file] = counts.files
    assert (file["file"], file["form"], file["encoding"]) == (path, "lines", "utf-8")
    assert file["shapes"] == {"instruction/output": 5} and file["remarks"] == {}
    assert file["refused"] == {reason: [2, f"{path}:4", reason]}


def test_report_counts_the_tokens_of_the_sample(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    tokenizer.model_max_length = 2048
    examples, report = load_examples(str(SAMPLE), tokenizer, str(tmp_path))
    expected = [parts_of(row, tokenizer) for shard in find_shards(str(SAMPLE)) for row in read_samples(shard)]
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
    [short, _] = [example["length"] for example in encode_samples(list_rows(records), tokenizer)]
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
    assert report.what_is_wrong(1.0).startswith("has no rows to train on")


def test_a_key_by_hand_that_no_row_has_is_a_mistake(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    (tmp_path / "data").mkdir()
    for number, key in enumerate(["input", "laws"]):
        write_rows(tmp_path / "data" / f"{number}.json", [{"prompt": "问", key: "短", "output": "答"}] * 2)
    columns = Columns((("input", "lawz"), ("user", "甲")))
    with pytest.raises(UserError) as error:
        load_examples(str(tmp_path / "data" / "0.json"), tokenizer, str(tmp_path), columns=columns)
    assert str(error.value) == (
        '--columns input=lawz: no row has the key "lawz"; the rows were read from prompt/output; type a key that they '
        "have"
    )
    columns = Columns((("input", "laws"),))
    _, report = load_examples(str(tmp_path / "data"), tokenizer, str(tmp_path), columns=columns)
    assert report.counts.kept == 4
    held_out = str(tmp_path / "data" / "0.json")
    assert load_examples(held_out, tokenizer, str(tmp_path), "--eval_data_path", columns=columns)[1].counts.kept == 2


def test_a_bad_row_is_named_through_the_cache_too(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(record("问", "答")) + "\nbad\n", encoding="utf-8")
    for _ in range(2):
        examples, report = load_examples(str(path), tokenizer, str(tmp_path / "cache"))
        assert len(examples) == 1
        [entry] = report.entries()
        assert report.counts.files[0]["refused"] == {
            "invalid JSON": [1, f"{path}:2", entry["note"].removeprefix("refused: ")]
        }
        assert entry["place"] == f"{path}:2" and entry["note"].startswith("refused: invalid JSON")
        assert report.what_is_wrong(0.5) is None
        assert report.what_is_wrong(0.49) == (
            "has 1 of 2 rows refused, more than --max_bad_fraction 0.49; fix them, or raise --max_bad_fraction"
        )


# ------------------------------------------------------------------------------------------------------------ held out


@pytest.mark.parametrize(
    ("number", "fraction", "num_held_out"), [(2, 0.9, 1), (50, 0.001, 1), (50, 0.1, 5), (7, 0.5, 4)]
)
def test_a_share_is_held_out_and_nothing_is_lost(number: int, fraction: float, num_held_out: int):
    samples = Dataset.from_dict({"row": range(number)})
    train, held_out = hold_out(samples, fraction, seed=3)
    assert len(held_out) == num_held_out
    assert sorted([*train["row"], *held_out["row"]]) == list(range(number))
    again, other = hold_out(samples, fraction, seed=3), hold_out(samples, fraction, seed=4)
    assert list(again[0]["row"]) == list(train["row"])
    assert number == 2 or list(other[0]["row"]) != list(train["row"])


def test_of_one_row_nothing_can_be_held_out():
    with pytest.raises(UserError, match="^--eval_fraction needs at least 2 rows to train on"):
        hold_out(Dataset.from_dict({"row": [1]}), 0.5, seed=0)
