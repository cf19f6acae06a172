"""Prompts that inference sees, answers that are trained, and rows that are too long."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from sft.data.encode import Encoder, check_length, cuts_at_the_template, encode_samples
from sft.data.files import find_shards
from sft.data.formats import Sample, read_samples
from sft.model.load import load_tokenizer
from sft.program import UserError
from sft.prompts import build_chat_prompt, build_prompt
from sft.tools.random_model import train_tokenizer
from support.project import SAMPLE

PLAIN = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏的一是了我不人在他有𠀀𪛖😀"
NASTY = PLAIN + "。，！？、…「」（）().,!?|\n\n\n  \u3000\u3000\t۔।,éa1 #:"


@pytest.fixture(params=["bloom-tiny", "falcon-tiny"])
def tokenizer(request: pytest.FixtureRequest, make_model: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(make_model(request.param)))


def random_rows(alphabet: str, number: int, seed: int) -> list[Sample]:
    rng = random.Random(seed)

    def text(longest: int) -> str:
        return "".join(rng.choices(alphabet, k=rng.randint(1, longest)))

    return [Sample(text(40), text(40) if i % 2 else "", "答" + text(40), f"rows:{i}") for i in range(number)]


def sample_rows() -> list[Sample]:
    return [row for shard in find_shards(str(SAMPLE)) for row in read_samples(shard)]


def split_labels(example: dict) -> tuple[list[int], list[int], str]:
    """Return the ids of the prompt, those of the answer, and the note."""
    labels = [label for label in example["labels"] if label != -100]
    num_prompt = len(example["labels"]) - len(labels)
    assert example["labels"][:num_prompt] == [-100] * num_prompt
    assert example["input_ids"][num_prompt:] == labels
    assert example["length"] == len(example["input_ids"]) == len(example["labels"])
    return example["input_ids"][:num_prompt], labels, example["note"]


def encode(row: Sample, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], str]:
    """Return prompt, answer and note of a row with one reply."""
    [example] = encode_samples([row], tokenizer)
    return split_labels(example)


def replies_of(row: Sample) -> list[tuple[str, str]]:
    """Return the prompt that inference would ask for each reply of a row with, and the reply."""
    if row.input:
        return [(build_prompt(row.instruction, row.input), row.output)]
    messages, replies = [], []
    for question, reply in [*row.history, (row.instruction, row.output)]:
        messages.append({"role": "user", "content": question})
        replies.append((build_chat_prompt(messages), reply))
        messages.append({"role": "assistant", "content": reply})
    return replies


def whole(row: Sample, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids of a row's prompt and answer, by the tokenizer alone."""
    prompt = tokenizer(build_prompt(row.instruction, row.input)).input_ids
    return prompt, [*tokenizer(row.output).input_ids, tokenizer.eos_token_id]


def cut_rows(alphabet: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[Sample, list[int], list[int], str]]:
    """Encode random rows, each with a random length limit, from the shortest that is allowed to beyond the row."""
    tokenizer.model_max_length = 2048
    encoder, rng = Encoder(tokenizer), random.Random(1)
    shortest = len(tokenizer(build_prompt("-", "-")).input_ids) + 2
    found = []
    for row in random_rows(alphabet, 400, seed=0):
        longest = sum(map(len, whole(row, tokenizer)))
        encoder.max_length = tokenizer.model_max_length = rng.randint(shortest, max(shortest, longest + 2))
        check_length(tokenizer)
        [[example]] = encoder.encode([row])
        assert len(example) == len(example.prompt) + len(example.answer) <= tokenizer.model_max_length
        found.append((row, example.prompt, example.answer, example.note))
        if example.note and len(example.answer) == len(whole(row, tokenizer)[1]):
            # Whole characters go, of at most four tokens, so no more than three are given away.
            assert len(example) > tokenizer.model_max_length - 4
    return found


# ------------------------------------------------------------------------------------------------------ rows that fit


def test_labels_of_every_sample_row_are_the_answers_and_eos(tokenizer: PreTrainedTokenizerBase):
    rows = sample_rows()
    encoded = encode_samples(rows, tokenizer)
    for row in rows:
        for _, reply in replies_of(row):
            example = next(encoded)
            _, answer, note = split_labels(example)
            assert tokenizer.decode(answer) == reply + tokenizer.eos_token
            assert (note, example["place"]) == ("", row.place)
    assert next(encoded, None) is None


def test_prompt_of_every_sample_reply_is_what_inference_sees(tokenizer: PreTrainedTokenizerBase):
    rows = sample_rows()
    expected = [prompt for row in rows for prompt, _ in replies_of(row)]
    assert len(expected) > len(rows), "no conversation is among them"
    for prompt, example in zip(expected, encode_samples(rows, tokenizer), strict=True):
        assert split_labels(example)[0] == tokenizer(prompt).input_ids


def test_the_last_reply_of_a_written_history_has_the_prompt_of_the_text_as_it_stands(
    tokenizer: PreTrainedTokenizerBase,
):
    shard, num_histories = SAMPLE / "multiturn_chat_0.8M.json", 0
    for row, line in zip(read_samples(shard), shard.read_text(encoding="utf-8").splitlines(), strict=True):
        written = json.loads(line)["instruction"]
        *_, last = encode_samples([row], tokenizer)
        if row.history:
            assert split_labels(last)[0] == tokenizer(build_prompt(written)).input_ids
            num_histories += 1
        else:  # a conversation of one turn is a task
            assert written == f"Human:{row.instruction}\nAssistant:"
            assert split_labels(last)[0] == tokenizer(build_prompt(row.instruction)).input_ids
    assert num_histories > 20


def test_no_token_reaches_over_the_joint():
    row = Sample("问", "", "好的", "rows:1")
    tokenizer = train_tokenizer("bloom", [build_prompt("问") + "好的"] * 9, 1024)
    prompt, answer = whole(row, tokenizer)
    assert tokenizer(build_prompt("问") + "好的").input_ids != [*prompt, *answer[:-1]]
    assert encode(row, tokenizer)[:2] == (prompt, answer)


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


def test_the_template_is_tokenised_once_and_the_ids_are_those_of_the_whole_prompt(tokenizer: PreTrainedTokenizerBase):
    tokenizer.model_max_length = 2048
    encoder, rows = Encoder(tokenizer), random_rows(NASTY, 400, seed=3)
    assert len(encoder.template_ids) == 4
    for row, [example] in zip(rows, encoder.encode(rows), strict=True):
        assert (example.prompt, example.answer) == whole(row, tokenizer)


NOT_AT_THE_TEMPLATE = {
    "line ends stay with the word before them": pre_tokenizers.Metaspace(),
    "how a text ends decides how its line ends are cut": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "a space is put before every text": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "nothing is cut": None,
}


@pytest.mark.parametrize("how", [*NOT_AT_THE_TEMPLATE, "text is rewritten"])
def test_a_tokenizer_that_does_not_cut_at_the_template_is_given_the_whole_prompt(how: str):
    row = Sample("问", "", "好的", "rows:1")
    tokenizer = train_tokenizer("falcon", [build_prompt("问") + "好的"] * 9, 1024)
    assert cuts_at_the_template(tokenizer)
    if how == "text is rewritten":
        tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    else:
        tokenizer.backend_tokenizer.pre_tokenizer = NOT_AT_THE_TEMPLATE[how]
    assert not cuts_at_the_template(tokenizer)
    assert Encoder(tokenizer).template_ids == {}
    assert encode(row, tokenizer)[:2] == whole(row, tokenizer)


# --------------------------------------------------------------------------------------------------- rows that do not


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


def test_length_is_that_of_whole_and_cut_rows(tokenizer: PreTrainedTokenizerBase):
    tokenizer.model_max_length = 120
    rows = [Sample("问", "", "答", "rows:1"), Sample("尾", "", "长" * 300, "rows:2")]
    short = sum(map(len, whole(rows[0], tokenizer)))
    assert [example["length"] for example in encode_samples(rows, tokenizer)] == [short, 120]


def test_too_short_length_is_refused(tokenizer: PreTrainedTokenizerBase):
    shortest = len(tokenizer(build_prompt("-", "-")).input_ids) + 2
    tokenizer.model_max_length = shortest
    check_length(tokenizer)
    tokenizer.model_max_length = shortest - 1
    with pytest.raises(UserError, match=f"--model_max_length {shortest - 1} .* at least {shortest}"):
        check_length(tokenizer)
