"""sft/dataset.py: labels, too long rows, flat rows, the cache, and the report on every row."""

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SAMPLE
from transformers import PreTrainedTokenizerBase

from sft import dataset
from sft.dataset import check_length, encode_rows, flatten, load_examples
from sft.models import load_tokenizer
from sft.program import UserError
from sft.prompts import build_prompt
from sft.random_model import train_tokenizer
from sft.shards import Row, find_shards, read_rows

PLAIN = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏的一是了我不人在他有𠀀𪛖😀"
NASTY = PLAIN + "。，！？、…「」（）().,!?|\n\n\n  \u3000\u3000\t۔।,éa1 #:"


@pytest.fixture(params=["bloom-tiny", "falcon-tiny"])
def tokenizer(request: pytest.FixtureRequest, make_model: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(make_model(request.param)))


def random_rows(alphabet: str, number: int, seed: int) -> list[Row]:
    rng = random.Random(seed)

    def text(longest: int) -> str:
        return "".join(rng.choices(alphabet, k=rng.randint(1, longest)))

    return [Row(text(40), text(40) if i % 2 else "", "答" + text(40), f"rows:{i}") for i in range(number)]


def encode(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], str]:
    """Return the ids of the prompt, those of the answer, and the note."""
    [example] = encode_rows([row], tokenizer)
    labels = [label for label in example["labels"] if label != -100]
    num_prompt = len(example["labels"]) - len(labels)
    assert example["labels"][:num_prompt] == [-100] * num_prompt
    assert example["input_ids"][num_prompt:] == labels
    return example["input_ids"][:num_prompt], labels, example["note"]


def whole(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    prompt = tokenizer(build_prompt(row.instruction, row.input)).input_ids
    return prompt, [*tokenizer(row.output).input_ids, tokenizer.eos_token_id]


def cut_rows(alphabet: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[Row, list[int], list[int], str]]:
    """Encode random rows, each with a random length limit, from the shortest that is allowed to beyond the row."""
    tokenizer.model_max_length = 2048
    rng = random.Random(1)
    shortest = len(tokenizer(build_prompt("-", "-")).input_ids) + 2
    found = []
    for row in random_rows(alphabet, 400, seed=0):
        longest = sum(map(len, whole(row, tokenizer)))
        tokenizer.model_max_length = rng.randint(shortest, max(shortest, longest + 2))
        check_length(tokenizer)
        prompt, answer, note = encode(row, tokenizer)
        assert len(prompt) + len(answer) <= tokenizer.model_max_length
        found.append((row, prompt, answer, note))
        if note and len(answer) == len(whole(row, tokenizer)[1]):
            # Whole characters go, of at most four tokens, so no more than three are given away.
            assert len(prompt) + len(answer) > tokenizer.model_max_length - 4
    return found


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def record(instruction: str, output: str, input: str = "") -> dict[str, str]:
    return {"instruction": instruction, "input": input, "output": output}


def test_labels_of_every_sample_row_are_the_answer_and_eos(tokenizer: PreTrainedTokenizerBase):
    for shard in find_shards(str(SAMPLE)):
        for row in read_rows(shard):
            _, answer, note = encode(row, tokenizer)
            assert tokenizer.decode(answer) == row.output + tokenizer.eos_token
            assert note == ""


def test_prompt_of_every_sample_row_is_what_inference_sees(tokenizer: PreTrainedTokenizerBase):
    for shard in find_shards(str(SAMPLE)):
        rows = list(read_rows(shard))
        for row, example in zip(rows, encode_rows(rows, tokenizer), strict=True):
            prompt = tokenizer(build_prompt(row.instruction, row.input)).input_ids
            assert example["input_ids"][: len(prompt)] == prompt
            assert example["labels"][: len(prompt)] == [-100] * len(prompt)
            assert example["labels"][len(prompt)] != -100


def test_no_token_reaches_over_the_joint():
    row = Row("问", "", "好的", "rows:1")
    tokenizer = train_tokenizer("bloom", [build_prompt("问") + "好的"] * 9, 1024)
    prompt, answer = whole(row, tokenizer)
    assert tokenizer(build_prompt("问") + "好的").input_ids != [*prompt, *answer[:-1]]
    assert encode(row, tokenizer)[:2] == (prompt, answer)


@pytest.mark.parametrize("alphabet", [PLAIN, NASTY], ids=["plain", "nasty"])
def test_too_long_rows_keep_template_labels_and_whole_characters(tokenizer: PreTrainedTokenizerBase, alphabet: str):
    for row, prompt, answer, _ in cut_rows(alphabet, tokenizer):
        assert answer
        text = tokenizer.decode(prompt)
        assert "\ufffd" not in text
        assert text.startswith("Below is an instruction that describes a task")
        assert "\n\n### Instruction:\n" in text
        assert ("\n\n### Input:\n" in text) == bool(row.input)
        assert text.endswith("\n\n### Response:")


@pytest.mark.parametrize("alphabet", [PLAIN, NASTY], ids=["plain", "nasty"])
def test_rows_that_fit_are_whole_and_end_in_a_labelled_eos(tokenizer: PreTrainedTokenizerBase, alphabet: str):
    num_fitting = 0
    for row, prompt, answer, note in cut_rows(alphabet, tokenizer):
        if answer[-1] == tokenizer.eos_token_id:
            assert tokenizer.decode(answer) == row.output + tokenizer.eos_token
        if not note:
            assert (prompt, answer) == whole(row, tokenizer)
            num_fitting += 1
    assert num_fitting > 10


def test_prompt_is_shortened_from_the_left_input_before_instruction_before_answer(tokenizer: PreTrainedTokenizerBase):
    seen = set()
    for row, prompt, answer, note in cut_rows(PLAIN, tokenizer):
        text = tokenizer.decode(prompt).removesuffix("\n\n### Response:").partition("### Instruction:\n")[2]
        instruction, _, input = text.partition("\n\n### Input:\n") if row.input else (text, "", "")
        assert row.instruction.endswith(instruction)
        assert row.input.endswith(input)
        if instruction != row.instruction:
            assert input == ""
        if answer[-1] != tokenizer.eos_token_id:
            assert instruction == input == ""
            assert answer == whole(row, tokenizer)[1][: len(answer)]
        assert bool(note) == ((prompt, answer) != whole(row, tokenizer))
        seen.add((instruction != row.instruction, input != row.input, answer[-1] == tokenizer.eos_token_id))
    assert {(False, False, True), (True, False, True), (False, True, True), (True, True, True)} <= seen
    assert {(True, False, False), (True, True, False)} <= seen


def test_note_counts_the_tokens_that_were_cut(tokenizer: PreTrainedTokenizerBase):
    noted = 0
    for row, prompt, answer, note in cut_rows(NASTY, tokenizer):
        whole_prompt, whole_answer = whole(row, tokenizer)
        if note:
            expected = f"cut: {len(whole_prompt) - len(prompt)} of the prompt's {len(whole_prompt)} tokens"
            assert note.startswith(expected)
            cut = len(whole_answer) - len(answer)
            assert (f", {cut} of the answer's {len(whole_answer)}" in note) == (cut > 0)
            noted += 1
    assert noted > 100


def test_too_short_length_is_refused(tokenizer: PreTrainedTokenizerBase):
    shortest = len(tokenizer(build_prompt("-", "-")).input_ids) + 2
    tokenizer.model_max_length = shortest
    check_length(tokenizer)
    tokenizer.model_max_length = shortest - 1
    with pytest.raises(UserError, match=f"--model_max_length {shortest - 1} .* at least {shortest}"):
        check_length(tokenizer)


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
    assert (report.rows, report.kept, len(report.dropped), len(report.cut)) == (7, 5, 2, 2)
    assert report.rows == report.kept + len(report.dropped)
    assert [entry["place"] for entry in report.dropped] == [f"{path}:4", f"{path}:6"]
    assert all("the output is empty" in entry["note"] for entry in report.dropped)
    assert [entry["place"] for entry in report.cut] == [f"{path}:5", f"{path}:7"]
    assert ["of the answer's" in entry["note"] for entry in report.cut] == [False, True]
    assert [example["place"] for example in examples] == [f"{path}:{line}" for line in (1, 2, 3, 5, 7)]


def test_report_counts_the_tokens_of_the_sample(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    tokenizer.model_max_length = 2048
    examples, report = load_examples(str(SAMPLE), tokenizer, str(tmp_path))
    expected = [whole(row, tokenizer) for shard in find_shards(str(SAMPLE)) for row in read_rows(shard)]
    assert [example["input_ids"] for example in examples] == [prompt + answer for prompt, answer in expected]
    assert report.rows == report.kept == len(expected)
    assert report.tokens == sum(len(prompt) + len(answer) for prompt, answer in expected)
    assert report.labelled_tokens == sum(len(answer) for _, answer in expected)
    assert report.longest == max(len(prompt) + len(answer) for prompt, answer in expected)
    assert report.cut == report.dropped == []


@pytest.mark.parametrize("content", ["", "\n", "[]", json.dumps(record("问", ""))])
def test_data_without_a_row_to_train_on_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, content: str):
    path = tmp_path / "rows.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"--eval_data_path {path} has no row to train on"):
        load_examples(str(path), tokenizer, str(tmp_path / "cache"), flag="--eval_data_path")


def test_a_bad_row_is_named_through_the_cache_too(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(record("问", "答")) + "\nbad\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"{path}:2 "):
        load_examples(str(path), tokenizer, str(tmp_path / "cache"))


@pytest.fixture
def count_encoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that gives how many rows were encoded since it was last called."""
    counted = []

    def encode_and_count(rows: list[Row], tokenizer: PreTrainedTokenizerBase):
        counted.extend(rows)
        return encode_rows(rows, tokenizer)

    def take() -> int:
        number = len(counted)
        counted.clear()
        return number

    monkeypatch.setattr(dataset, "encode_rows", encode_and_count)
    return take


def test_second_call_reads_the_cache(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, count_encoded: Callable):
    path = write_rows(tmp_path / "rows.json", [record("问", "答"), record("空", "")])
    first, first_report = load_examples(path, tokenizer, str(tmp_path / "cache"))
    assert count_encoded() == 2
    again, again_report = load_examples(path, tokenizer, str(tmp_path / "cache"))
    assert count_encoded() == 0
    assert first[:] == again[:]
    assert first_report == again_report


def test_changed_file_is_noticed(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, count_encoded: Callable):
    path = write_rows(tmp_path / "rows.json", [record("问", "甲")])
    load_examples(path, tokenizer, str(tmp_path / "cache"))
    state = Path(path).stat()
    write_rows(Path(path), [record("问", "乙")])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    examples, _ = load_examples(path, tokenizer, str(tmp_path / "cache"))
    assert count_encoded() == 2
    assert "乙" in tokenizer.decode(examples[0]["input_ids"])


def test_another_length_is_noticed(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, count_encoded: Callable):
    path = write_rows(tmp_path / "rows.json", [record("问", "长" * 500)])
    for length in (100, 200):
        tokenizer.model_max_length = length
        examples, _ = load_examples(path, tokenizer, str(tmp_path / "cache"))
        assert count_encoded() == 1
        assert len(examples[0]["input_ids"]) == length


def test_another_tokenizer_is_noticed(make_model: Callable[[str], Path], tmp_path: Path, count_encoded: Callable):
    path = write_rows(tmp_path / "rows.json", [record("问", "答")])
    for shape in ("bloom-tiny", "falcon-tiny"):
        load_examples(path, load_tokenizer(str(make_model(shape))), str(tmp_path / "cache"))
        assert count_encoded() == 1


def test_length_is_that_of_kept_cut_and_dropped_rows(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    tokenizer.model_max_length = 120
    records = [record("问", "答"), record("空", ""), record("尾", "长" * 300)]
    rows = [Row(each["instruction"], each["input"], each["output"], "rows:1") for each in records]
    short = sum(map(len, whole(rows[0], tokenizer)))
    assert [example["length"] for example in encode_rows(rows, tokenizer)] == [short, 0, 120]
    examples, _ = load_examples(write_rows(tmp_path / "rows.json", records), tokenizer, str(tmp_path / "cache"))
    assert examples["length"][:] == [short, 120]
    for example in examples:
        assert len(example["input_ids"]) == len(example["labels"]) == example["length"]


def example_of(length: int, first: int) -> dict[str, list[int]]:
    """Return an example of ascending ids that are all labels."""
    return {"input_ids": list(range(first, first + length)), "labels": list(range(first, first + length))}


def test_examples_are_joined_end_to_end_without_padding():
    row = flatten([example_of(3, 10), example_of(1, 20), example_of(2, 30)])
    assert {name: value.tolist() for name, value in row.items()} == {
        "input_ids": [[10, 11, 12, 20, 30, 31]],
        "labels": [[-100, 11, 12, -100, -100, 31]],
        "position_ids": [[0, 1, 2, 0, 0, 1]],
    }
    assert all(value.dtype == torch.int64 for value in row.values())


def test_packed_rows_keep_their_positions():
    packed = {**example_of(5, 10), "position_ids": [0, 1, 0, 1, 2]}
    row = flatten([packed, example_of(2, 20), packed])
    assert row["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 0, 1, 0, 1, 2]]
    assert row["input_ids"].tolist() == [[10, 11, 12, 13, 14, 20, 21, 10, 11, 12, 13, 14]]
    assert row["labels"].tolist() == [[-100, 11, -100, 13, 14, -100, 21, -100, 11, -100, 13, 14]]


def test_joining_leaves_the_examples_as_they_were():
    examples = [example_of(3, 10), {**example_of(2, 20), "position_ids": [0, 1]}]
    before = copy.deepcopy(examples)
    flatten(examples)
    assert examples == before


def test_tokenised_rows_join_into_what_they_are_alone(tokenizer: PreTrainedTokenizerBase):
    tokenizer.model_max_length = 2048
    examples = list(encode_rows(random_rows(NASTY, 9, seed=2), tokenizer))
    parts = flatten(examples)["input_ids"].split([example["length"] for example in examples], dim=1)
    assert [part[0].tolist() for part in parts] == [example["input_ids"] for example in examples]
    alone = [flatten([example]) for example in examples]
    assert all(len(row["input_ids"]) == 1 for row in alone)
    for name, value in flatten(examples).items():
        assert torch.equal(value, torch.cat([row[name] for row in alone], dim=1))


def test_real_eos_keeps_its_label_where_pad_is_eos(make_model: Callable[[str], Path]):
    tokenizer = load_tokenizer(str(make_model("falcon-tiny")))
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos
    examples = list(encode_rows([Row("问", "", "答", "a"), Row("问", "", "长" * 9, "b")], tokenizer))
    row = flatten(examples)
    ends = [examples[0]["length"] - 1, row["input_ids"].shape[1] - 1]
    assert (row["input_ids"][0] == eos).nonzero().flatten().tolist() == ends
    assert row["labels"][0, ends].tolist() == [eos, eos]
    assert row["labels"][0].tolist() == examples[0]["labels"] + examples[1]["labels"]
