"""Conversations of every shape: each reply is trained, behind the prompt that the chat would ask for it with."""

import json
import random
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sft import IGNORE_INDEX
from sft.data.collate import flatten, labels_of
from sft.data.encode import Encoder, Example, group
from sft.data.formats import Sample, read_samples
from sft.data.load import load_examples
from sft.model import patch
from sft.model.load import load_tokenizer
from sft.prompts import build_chat_prompt, build_prompt
from support.project import TINY_SHAPES

Turn = tuple[str, str]
# The names of who speaks stand within lines here, where they mean nothing.
TURNS = [
    ("你好，Human: 是什么？", "“Human:”是人，\n  Assistant:是助手。"),
    ("第一行\n\n第二行 ", "表情😀👨‍👩‍👧\t{input}"),
    (" 再短一点。", "好。\n"),
    ("Assistant:谁？", "### Response:"),
    ("最后\u3000一问", " 答"),
]
SYSTEM = "你是助手。\nHuman:不是"


@pytest.fixture(scope="module", params=["bloom-tiny", "falcon-tiny"])
def shape(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokenizer(shape: str, make_model: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(make_model(shape)), 2048)


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def messages_of(turns: Sequence[Turn], system: str | None = None) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, reply in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return messages


def plain_ids(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, system: str | None = None
) -> tuple[list[int], list[int]]:
    """Return the prompt's ids for the last reply of some turns, and those of the reply and eos."""
    prompt = tokenizer(build_chat_prompt(messages_of(turns, system)[:-1])).input_ids
    return prompt, [*tokenizer(turns[-1][1]).input_ids, tokenizer.eos_token_id]


def ids_of(examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
    return [(example.prompt, example.answer) for example in examples]


# -------------------------------------------------------------------------------------------------------------- shapes


def named(list_key: str, role_key: str, text_key: str, user: str, assistant: str, system_role: str = "system"):
    """Return a function that puts turns into a list of turns with these keys and roles."""

    def record(turns: Sequence[Turn], system: str | None) -> dict:
        roles = {"user": user, "assistant": assistant, "system": system_role}
        said = [{role_key: roles[each["role"]], text_key: each["content"]} for each in messages_of(turns, system)]
        return {list_key: said}

    return record


def as_pairs(turns: Sequence[Turn], system: str | None) -> dict:
    """Return an Alpaca row with its earlier turns beside it."""
    question, reply = turns[-1]
    record = {"instruction": question, "input": "", "output": reply, "history": [list(turn) for turn in turns[:-1]]}
    return record if system is None else {**record, "system": system}


SHAPES = {
    "messages": named("messages", "role", "content", "user", "assistant"),
    "ShareGPT": named("conversations", "from", "value", "human", "gpt"),
    "ShareGPT, its other names": named("conversations", "from", "value", "user", "chatgpt"),
    "conversations of roles": named("conversations", "role", "content", "prompter", "bot"),
    "conversation": named("conversation", "from", "value", "Human", "Assistant", "System"),
    "conversation of roles": named("conversation", "role", "content", "User", "model"),
    "Alpaca with a history": as_pairs,
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("system", [None, SYSTEM])
def test_every_reply_of_every_shape_follows_the_prompt_that_the_chat_asks_for_it_with(
    name, system, tokenizer, tmp_path
):
    conversations = [TURNS[:length] for length in range(1, len(TURNS) + 1)]
    file = write(tmp_path / "rows.jsonl", *(SHAPES[name](turns, system) for turns in conversations))
    encoded = Encoder(tokenizer).encode(list(read_samples(file)))
    for turns, examples in zip(conversations, encoded, strict=True):
        expected = [plain_ids(turns[:number], tokenizer, system) for number in range(1, len(turns) + 1)]
        assert ids_of(examples) == expected
        for number, (prompt, _) in enumerate(expected, 1):
            asked = messages_of(turns[:number], system)[:-1]
            assert tokenizer.apply_chat_template(asked, return_dict=True)["input_ids"] == prompt
            rendered = tokenizer.apply_chat_template(messages_of(turns[:number], system), tokenize=False)
            assert rendered == build_chat_prompt(asked) + turns[number - 1][1] + tokenizer.eos_token
        assert [example.note for example in examples] == [""] * len(turns)


def test_a_history_in_the_instruction_gives_the_same_examples(tokenizer, tmp_path):
    # A text of this form has no room for a system turn, and a question of one turn stands in it with its name or bare.
    records = []
    for number in range(1, len(TURNS) + 1):
        *history, (question, reply) = TURNS[:number]
        so_far = "".join(f"Human:{asked}\nAssistant:{said}\n" for asked, said in history)
        records.append({"instruction": f"{so_far}Human:{question}\nAssistant:", "input": "", "output": reply})
    rows = list(read_samples(write(tmp_path / "rows.jsonl", *records)))
    for number, examples in enumerate(Encoder(tokenizer).encode(rows), 1):
        assert ids_of(examples) == [plain_ids(TURNS[:last], tokenizer) for last in range(1, number + 1)]
        assert examples[0].prompt == tokenizer(build_prompt(TURNS[0][0])).input_ids


def test_all_shapes_give_one_and_the_same_row(tmp_path):
    rows = [list(read_samples(write(tmp_path / "rows.jsonl", make(TURNS, SYSTEM)))) for make in SHAPES.values()]
    assert [[row._replace(shape="") for row in each] for each in rows] == [[rows[0][0]._replace(shape="")]] * len(rows)
    assert {row.shape for [row] in rows} == {
        "messages",
        "conversations",
        "conversation",
        "system/history/instruction/output",
    }
    assert (rows[0][0].history, rows[0][0].system) == (tuple(TURNS[:-1]), SYSTEM + "\n")


def test_the_input_of_an_alpaca_row_with_a_history_stands_below_its_question(tokenizer, tmp_path):
    record = {**as_pairs(TURNS[:2], None), "input": "材料"}
    [row] = read_samples(write(tmp_path / "rows.jsonl", record))
    (question, reply) = TURNS[1]
    expected = plain_ids([TURNS[0], (f"{question}\n材料", reply)], tokenizer)
    assert ids_of(Encoder(tokenizer).encode([row])[0]) == [plain_ids(TURNS[:1], tokenizer), expected]


def test_a_last_question_without_a_reply_is_left_out_and_noted(tokenizer, tmp_path):
    record = {"messages": [*messages_of(TURNS[:2]), {"role": "user", "content": "还有呢？"}]}
    examples, report = load_examples(str(write(tmp_path / "rows.jsonl", record)), tokenizer, str(tmp_path / "cache"))
    expected = [plain_ids(TURNS[:1], tokenizer), plain_ids(TURNS[:2], tokenizer)]
    assert examples[0]["input_ids"] == [token for pair in expected for ids in pair for token in ids]
    assert [entry["note"] for entry in report.entries()] == ["cut: the last turn, a question without a reply"]


def test_the_data_set_trains_every_reply_and_its_eos_and_nothing_else(tokenizer, tmp_path):
    file = write(tmp_path / "rows.jsonl", *({"messages": messages_of(TURNS[:number])} for number in range(1, 6)))
    examples, report = load_examples(str(file), tokenizer, str(tmp_path / "cache"))
    assert (report.counts.rows, report.kept, report.counts.conversations, len(examples)) == (5, 5, 4, 5)
    for number, row in enumerate(examples, 1):
        labels, trained = labels_of(row), []
        for start, end in pairwise(accumulate(row["lengths"], initial=0)):
            trained.append({label == IGNORE_INDEX for label in labels[start:end]})
        assert trained == [{True}, {False}] * number
        text = "".join(reply + tokenizer.eos_token for _, reply in TURNS[:number])
        assert tokenizer.decode([label for label in labels if label != IGNORE_INDEX]) == text
    assert report.labelled_tokens == sum(len(plain_ids(TURNS[:n], tokenizer)[1]) * (6 - n) for n in range(1, 6))


# ------------------------------------------------------------------------------------------------------------ too long


PLAIN = "天地玄黄宇宙洪荒日月盈昃😀𠀀"
NASTY = PLAIN + "，。!a1 \n\n\t"


def random_conversation(rng: random.Random, alphabet: str) -> tuple[list[Turn], str | None]:
    def text(longest: int) -> str:
        return "".join(rng.choices(alphabet, k=rng.randint(1, longest))) + "问"

    turns = [(text(20), text(30)) for _ in range(rng.randint(2, 9))]
    return turns, rng.choice([None, text(9)])


def to_row(turns: Sequence[Turn], system: str | None = None) -> Sample:
    (question, reply) = turns[-1]
    return Sample(question, "", reply, "rows:1", tuple(turns[:-1]), "" if system is None else f"{system}\n")


def shortest_length(tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer(build_prompt("-", "-")).input_ids) + 2


def most_that_fits(turns: Sequence[Turn], system: str | None, tokenizer: PreTrainedTokenizerBase):
    """Return how many of the oldest turns must go, and the ids then; None where the last turn is too long alone."""
    for first in range(len(turns)):
        prompt, answer = plain_ids(turns[first:], tokenizer, system)
        if len(prompt) + len(answer) <= tokenizer.model_max_length:
            return first, prompt, answer
    return None


def test_the_oldest_turns_go_whole_and_as_many_stay_as_fit(tokenizer):
    rng, num_cut, num_alone = random.Random(1), 0, 0
    for _ in range(60):
        turns, system = random_conversation(rng, NASTY)
        tokenizer.model_max_length = shortest_length(tokenizer) + rng.randint(0, 300)
        for last, example in enumerate(Encoder(tokenizer).encode([to_row(turns, system)])[0]):
            expected = most_that_fits(turns[: last + 1], system, tokenizer)
            if expected is None:
                num_alone += 1
                continue
            first, prompt, answer = expected
            assert (example.prompt, example.answer) == (prompt, answer)
            said = f"cut: the first {first} of the {last} turns before reply {last + 1}"
            assert example.note == (said if first else "")
            num_cut += first > 0
    assert num_cut > 50 and num_alone > 10


def test_then_the_question_is_shortened_and_then_the_reply_and_a_label_is_left(tokenizer):
    rng, seen = random.Random(2), set()
    for _ in range(60):
        turns, system = random_conversation(rng, PLAIN)
        tokenizer.model_max_length = shortest_length(tokenizer) + rng.randint(0, 60)
        for last, example in enumerate(Encoder(tokenizer).encode([to_row(turns, system)])[0]):
            if most_that_fits(turns[: last + 1], system, tokenizer):
                continue
            whole_prompt, whole_answer = plain_ids(turns[last : last + 1], tokenizer, system)
            whole_question = ("" if system is None else f"{system}\n") + turns[last][0]
            text = tokenizer.decode(example.prompt)
            question = text.removesuffix("\n\n### Response:").partition("### Instruction:\n")[2]
            assert text == build_prompt(question)
            assert question != whole_question and whole_question.endswith(question)
            assert example.answer == whole_answer[: len(example.answer)] and example.answer
            is_cut = len(example.answer) < len(whole_answer)
            if is_cut:
                assert question == "" and len(example) == tokenizer.model_max_length
            turns_gone = f"the first {last} of the {last} turns before reply {last + 1}; " if last else ""
            tokens_gone = f"{len(whole_prompt) - len(example.prompt)} of the prompt's {len(whole_prompt)} tokens"
            assert example.note.startswith(f"cut: {turns_gone}{tokens_gone}")
            assert (f" of the answer's {len(whole_answer)}" in example.note) == is_cut
            seen.add((last > 0, is_cut))
    assert seen == {(first, second) for first in (False, True) for second in (False, True)}


def test_what_was_cut_of_a_conversation_is_one_entry_of_the_report(tokenizer, tmp_path):
    tokenizer.model_max_length = shortest_length(tokenizer) + 30
    file = write(tmp_path / "rows.jsonl", {"messages": messages_of([("问" * 5, "答" * 5)] * 6)})
    _, report = load_examples(str(file), tokenizer, str(tmp_path / "cache"))
    [entry] = report.entries()
    assert entry["place"] == f"{file}:1" and entry["note"].startswith("cut: the first ")
    assert "of the 5 turns before reply 6" in entry["note"] and report.counts.cut == 1


@pytest.mark.parametrize("max_length", [512, 2048])
def test_a_conversation_of_1500_turns_is_not_tokenised_again_and_again(max_length, make_model, monkeypatch):
    """Neither once from its beginning for every reply, nor once for every turn that goes; each character a token."""
    handed_over = []

    def encode_texts(self: Encoder, texts: list[str]) -> list[list[int]]:
        handed_over.extend(map(len, texts))
        return [[0] * len(text) for text in texts]

    encoder = Encoder(load_tokenizer(str(make_model("bloom-tiny")), max_length))
    assert encoder.template_ids
    monkeypatch.setattr(Encoder, "_encode_texts", encode_texts)
    examples = encoder.encode([to_row([(f"{number}问", f"答{number}") for number in range(1000, 2500)])])[0]
    assert len(examples) == 1500 and all(len(example) > 0.95 * max_length for example in examples[100:])
    assert sum(handed_over) < 8 * max_length * len(examples)


# ---------------------------------------------------------------------------------------------------- one row together


def test_replies_are_grouped_into_rows_as_long_as_they_may_be():
    rng = random.Random(3)
    for _ in range(300):
        max_length = rng.randint(1, 40)
        examples = [Example([0] * (length - 1), [1]) for length in rng.choices(range(1, max_length + 1), k=12)]
        groups = list(group(examples, max_length))
        assert [example for together in groups for example in together] == examples
        sums = [sum(map(len, together)) for together in groups]
        assert max(sums) <= max_length
        assert all(length + len(after[0]) > max_length for length, after in zip(sums, groups[1:], strict=False))


def test_a_long_conversation_is_several_rows_of_the_data_set(tokenizer, tmp_path):
    tokenizer.model_max_length = 300
    turns = TURNS * 4
    file = write(tmp_path / "rows.jsonl", {"messages": messages_of(TURNS[:1])}, {"messages": messages_of(turns)})
    examples, report = load_examples(str(file), tokenizer, str(tmp_path / "cache"))
    alone, *parts = examples
    assert len(parts) > 1 and [row["row"] for row in examples] == [1] + [2] * len(parts)
    assert max(examples["length"][:]) <= 300 and sum(map(len, examples["input_ids"][:])) == report.tokens
    pairs = [ids for pair in ids_of(Encoder(tokenizer).encode([to_row(turns)])[0]) for ids in pair]
    assert [token for row in parts for token in row["input_ids"]] == [token for ids in pairs for token in ids]
    assert [length for row in parts for length in row["lengths"]] == list(map(len, pairs))
    assert (report.counts.rows, report.kept, report.counts.conversations) == (2, 2, 1)
    assert [row["labelled"] for row in examples] == [sum(row["lengths"][1::2]) for row in examples]


def mean_loss(model, pairs: Sequence[tuple[list[int], list[int]]]) -> float:
    """Return stock transformers' mean over all labels, each example alone."""
    loss_sum = 0.0
    with torch.no_grad():
        for prompt, answer in pairs:
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            loss_sum += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
    return loss_sum / sum(len(answer) for _, answer in pairs)


@pytest.mark.parametrize("family_member", TINY_SHAPES)
def test_a_row_of_several_replies_has_the_mean_loss_of_each_alone(family_member, make_model, tmp_path):
    folder = make_model(family_member)
    tokenizer = load_tokenizer(str(folder), 2048)
    file = write(
        tmp_path / "rows.jsonl", {"messages": messages_of(TURNS, SYSTEM)}, {"messages": messages_of(TURNS[1:])}
    )
    rows = load_examples(str(file), tokenizer, str(tmp_path / "cache"))[0][:]
    rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    pairs = [plain_ids(TURNS[:number], tokenizer, SYSTEM) for number in range(1, 6)]
    pairs += [plain_ids(TURNS[1:number], tokenizer) for number in range(2, 6)]
    flat = flatten(rows)
    positions = [place for prompt, answer in pairs for place in range(len(prompt) + len(answer))]
    assert flat["position_ids"][0].tolist() == positions
    assert (flat["labels"] != IGNORE_INDEX).sum() == sum(len(answer) for _, answer in pairs)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = mean_loss(model, pairs)
    patch.install(model)
    with torch.no_grad():
        assert model(**flat).loss.item() == pytest.approx(expected, rel=1e-5)
        assert model(**flatten(rows[:1])).loss.item() != pytest.approx(expected, rel=1e-3)


# -------------------------------------------------------------------------------------------------- the real program


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Turn]]]:
    """A folder of a file in each of three shapes, and the conversations in it in their order."""
    folder, rng = tmp_path_factory.mktemp("conversations"), random.Random(4)
    conversations = [random_conversation(rng, NASTY)[0][:3] for _ in range(9)]
    for number, name in enumerate(("messages", "ShareGPT", "Alpaca with a history")):
        records = [SHAPES[name](turns, None) for turns in conversations[3 * number : 3 * number + 3]]
        write(folder / f"{number}.jsonl", *records)
    return folder, conversations


def train(run: Callable, model: Path, data: Path, output: Path, *flags: object) -> tuple[list[float], str]:
    given = ["--model_name_or_path", model, "--data_path", data, "--output_dir", output, "--save_strategy", "no"]
    given += [
        "--logging_steps",
        1,
        "--train_sampling_strategy",
        "sequential",
        "--max_steps",
        3,
        "--learning_rate",
        1e-2,
    ]
    result = run("train_sft.py", *given, *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry], result.stdout


def replies_of(conversations: Sequence[Sequence[Turn]], tokenizer: PreTrainedTokenizerBase):
    return [plain_ids(turns[:n], tokenizer) for turns in conversations for n in range(1, len(turns) + 1)]


def test_a_run_on_conversations_has_the_loss_of_a_plain_loop_over_all_replies(run, make_model, files, tmp_path):
    data, conversations = files
    losses, printed = train(run, make_model("bloom-tiny"), data, tmp_path, "--per_device_train_batch_size", 3)
    tokenizer = AutoTokenizer.from_pretrained(make_model("bloom-tiny"))
    model = AutoModelForCausalLM.from_pretrained(make_model("bloom-tiny"))
    expected = mean_loss(model, replies_of(conversations[:3], tokenizer))
    assert losses[0] == pytest.approx(expected, abs=1e-4) and losses[2] < losses[0] - 0.1
    assert "9 rows read: 9 kept (0 of them cut), 0 refused" in printed
    for shape_name in ("messages", "conversations", "history/instruction/output"):
        assert f"shape    {shape_name} in 1 file (lines)" in printed
    (question, reply), *_ = conversations[0]
    assert f"### Instruction:\n{question}\n\n### Response:⟦{reply}</s>⟧Below is an instruction" in printed


def test_a_packed_run_on_conversations_has_the_loss_of_a_plain_loop_too(run, make_model, files, tmp_path):
    data, conversations = files
    flags = ["--packing", "True", "--per_device_train_batch_size", 99, "--model_max_length", 600]
    losses, printed = train(run, make_model("falcon-tiny"), data, tmp_path, *flags)
    assert "sequences of up to 600 tokens" in printed
    tokenizer = AutoTokenizer.from_pretrained(make_model("falcon-tiny"))
    model = AutoModelForCausalLM.from_pretrained(make_model("falcon-tiny"))
    assert losses[0] == pytest.approx(mean_loss(model, replies_of(conversations, tokenizer)), abs=1e-4)
    assert losses[2] < losses[0] - 0.1
