"""Conversations as data sets write them: who speaks, which replies are trained, what is counted and told of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sft.data import cache
from sft.data.cache import Counts
from sft.data.columns import Columns
from sft.data.encode import Encoder
from sft.data.formats import Sample, to_sample
from sft.data.json_stream import RepeatedKeys
from sft.data.report import DataReport, print_data
from sft.data.shards import Refused
from sft.model.load import load_tokenizer

ASKS, SAYS = {"role": "user", "content": "下雨吗？"}, {"role": "assistant", "content": "不下。"}
THANKS, WELCOME = {"role": "user", "content": "谢谢"}, {"role": "assistant", "content": "不客气"}


def read(record: object) -> Sample:
    sample = to_sample(record, "行")
    assert isinstance(sample, Sample), sample
    return sample


def refusal(record: object) -> str:
    refused = to_sample(record, "行")
    assert isinstance(refused, Refused), refused
    return refused.reason


def said(*turns: dict, **others: object) -> dict:
    return {"messages": list(turns), **others}


# --------------------------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize(
    "key", ["messages", "conversations", "conversation", "dialog", "Messages", "对话", "data", "chat"]
)
@pytest.mark.parametrize(
    "turns",
    [
        [ASKS, SAYS, THANKS, WELCOME],
        [{"from": "human", "value": "下雨吗？"}, {"from": "gpt", "value": "不下。"}, THANKS, WELCOME],
        [{"Role": "User", "Content": "下雨吗？"}, SAYS, THANKS, WELCOME],
        [{"role": "user", "content": [{"type": "text", "text": "下雨"}, {"type": "text", "text": "吗？"}]}, SAYS]
        + [THANKS, WELCOME],
        ["下雨吗？", "不下。", "谢谢", "不客气"],
        [["下雨吗？", "不下。"], ["谢谢", "不客气"]],
    ],
    ids=["role", "from", "case", "parts", "texts", "pairs"],
)
def test_turns_are_read_under_every_name_and_in_every_form(key: str, turns: list):
    sample = read({key: turns})
    assert sample.history == (("下雨吗？", "不下。"),)
    assert (sample.instruction, sample.output, sample.shape, sample.remarks) == ("谢谢", "不客气", key, ())


@pytest.mark.parametrize(
    "turns",
    [
        [{"human": "下雨吗？", "assistant": "不下。"}, {"human": "谢谢", "assistant": "不客气"}],
        [{"system": "", "input": "下雨吗？", "output": "不下。"}, {"input": "谢谢", "output": "不客气"}],
        [{"question": "下雨吗？", "answer": "不下。"}, {"q": "谢谢", "a": "不客气"}],
    ],
)
def test_a_turn_may_be_a_question_with_its_reply(turns: list):
    sample = read({"conversation": turns})
    assert (sample.history, sample.instruction, sample.output) == ((("下雨吗？", "不下。"),), "谢谢", "不客气")


def test_the_system_text_of_xtuner_stands_in_the_first_turn():
    sample = read({"conversation": [{"system": "你是渔夫。", "input": "下雨吗？", "output": "不下。"}]})
    assert (sample.system, sample.output) == ("你是渔夫。\n", "不下。")


def test_texts_that_all_name_their_speakers_are_theirs():
    sample = read({"conversations": ["Assistant: 早", "Human：下雨吗？", "助手: 不下。"]})
    assert (sample.history, sample.instruction, sample.output) == (((None, "早"),), "下雨吗？", "不下。")
    assert read({"conversations": ["User: 下雨吗？", "天气: 不下。"]}).output == "天气: 不下。"


def moss(number: int, human: str, bot: str, **others: str) -> dict:
    nothing = dict.fromkeys(("Inner Thoughts", "Commands", "Tool Responses"), "<|Results|>: None<eor>\n") | others
    return {f"turn_{number}": {"Human": f"<|Human|>: {human}<eoh>\n", "MOSS": f"<|MOSS|>: {bot}<eom>\n", **nothing}}


def test_moss_is_read_without_its_tags_and_in_the_order_of_its_numbers():
    chat = moss(10, "谢谢", "不客气") | moss(2, "下雨吗？", "不下。")
    sample = read({"meta_instruction": "你是渔夫。", "num_turns": 2, "chat": chat})
    assert sample.history == (("下雨吗？", "不下。"),) and sample.system == "你是渔夫。\n"
    assert (sample.instruction, sample.output, sample.remarks) == ("谢谢", "不客气", ())


def test_what_moss_thought_is_named_and_what_it_called_is_refused():
    thought = moss(1, "下雨吗？", "不下。", **{"Inner Thoughts": "<|Inner Thoughts|>: None of my tools help<eot>"})
    assert read({"chat": thought}).remarks == ("not read: Inner Thoughts of turns",)
    called = moss(1, "下雨吗？", "不下。", Commands="<|Commands|>: 查(雨)<eoc>")
    assert 'a turn has "Commands"' in refusal({"chat": called})


@pytest.mark.parametrize("prompt", ["下雨吗？", [ASKS]])
@pytest.mark.parametrize("completion", ["不下。", SAYS, [SAYS]])
def test_prompts_and_completions_of_trl_are_texts_or_messages(prompt: object, completion: object):
    sample = read({"prompt": prompt, "completion": completion})
    assert (sample.instruction, sample.output, sample.history) == ("下雨吗？", "不下。", ())


@pytest.mark.parametrize("name", ["user", "human", "Human", "prompter", "用户", "问", "患者", "client"])
@pytest.mark.parametrize(
    "other", ["assistant", "gpt", "chatgpt", "bot", "bing", "bard", "ai", "AI", "助手", "医生", "counselor"]
)
def test_speakers_have_many_names(name: str, other: str):
    assert read(said({"from": name, "value": "谁？"}, {"from": other, "value": "我"})).output == "我"


@pytest.mark.parametrize("system", ["system", "developer"])
def test_the_first_turn_may_be_the_system_text(system: str):
    text = {"role": system, "content": "你是渔夫。"}
    assert read(said(text, ASKS, SAYS)).system == "你是渔夫。\n"
    assert read(said({**text, "content": " "}, ASKS, SAYS)).system == ""
    assert read(said(text, ASKS, SAYS, system="你是渔夫。")).system == "你是渔夫。\n"
    assert "a system turn in the middle" in refusal(said(ASKS, SAYS, text, THANKS, WELCOME))


def test_two_system_texts_are_refused_in_turns_and_in_a_history():
    turns = [{"role": "system", "content": "你是渔夫。"}, ASKS, SAYS]
    for record in (
        said(*turns, system="你是猎人。"),
        {"instruction": "谢谢", "output": "不客气", "system": "你是猎人。", "history": turns},
    ):
        assert refusal(record).endswith("are two system texts; type --ignore_columns system")
        assert to_sample(record, "行", Columns(ignored=frozenset(["system"]))).system == "你是渔夫。\n"


# --------------------------------------------------------------------------------------------------- order and endings


def test_an_opening_by_the_assistant_is_context_and_is_not_trained():
    sample = read(said(WELCOME, ASKS, SAYS))
    assert sample.history == ((None, "不客气"),) and sample.untrained == (0,)
    assert sample.remarks == ("opening turn by the assistant, read and not trained",)


def test_consecutive_turns_of_one_speaker_are_joined_by_a_blank_line():
    sample = read(said(ASKS, THANKS, SAYS, WELCOME))
    assert (sample.instruction, sample.output) == ("下雨吗？\n\n谢谢", "不下。\n\n不客气")
    assert sample.remarks == ("consecutive turns of one speaker joined",)


def test_many_turns_of_one_speaker_are_joined_in_time_and_in_bounds():
    assert "more than 1,000,000 characters together" in refusal(said(*[ASKS] * 300_000, SAYS))


def test_a_last_question_without_a_reply_is_cut_and_noted():
    sample = read(said(ASKS, SAYS, THANKS))
    assert (sample.output, sample.note) == ("不下。", "cut: the last turn, a question without a reply")


@pytest.mark.parametrize(
    "turns", [[ASKS], [SAYS], [{**ASKS, "content": ""}, SAYS], [ASKS, {**SAYS, "content": None}], [3], [[]]]
)
def test_turns_that_hold_no_question_with_a_reply_are_refused(turns: list):
    assert refusal({"messages": turns})


def test_a_history_must_end_with_a_reply():
    assert '"history" ends with a question' in refusal(
        {"instruction": "谢谢", "output": "好", "history": [ASKS, SAYS, ASKS]}
    )


# ---------------------------------------------------------------------------------------------------- chosen, rejected


@pytest.mark.parametrize(
    "chosen", [WELCOME, "不客气", [ASKS, SAYS, THANKS, WELCOME], [WELCOME]], ids=["turn", "text", "all", "list"]
)
@pytest.mark.parametrize("turns", ["messages", "conversations", "prompt"])
def test_the_chosen_answer_behind_several_turns_is_trained(turns: str, chosen: object):
    sample = read({turns: [ASKS, SAYS, THANKS], "chosen": chosen, "rejected": {**WELCOME, "content": "走开"}})
    assert sample.history == (("下雨吗？", "不下。"),)
    assert (sample.instruction, sample.output, sample.remarks) == ("谢谢", "不客气", ())


def test_a_chosen_answer_behind_a_reply_is_a_second_one_and_refused():
    assert '"chosen" is no reply to the last turn of "messages"' in refusal(
        said(ASKS, SAYS, chosen="下。", rejected="嗯")
    )
    assert '"chosen" is no reply' in refusal({"prompt": [ASKS], "chosen": [THANKS, WELCOME]})
    assert read(said(ASKS, SAYS, chosen="不下。")).output == "不下。"


def test_turns_and_a_pair_that_is_not_among_them_are_refused():
    assert "are both there" in refusal(said(ASKS, SAYS, output="下。"))
    assert "are both there" in refusal({"prompt": [ASKS], "completion": [SAYS], "input": "明天"})
    assert read(said(ASKS, SAYS, prompt="下雨吗？")).output == "不下。"


def test_an_answer_that_is_a_turn_is_read_as_one():
    pair = {"instruction": "走吧", "input": "快"}
    assert read({**pair, "output": [{**SAYS, "心情": "好"}]}).remarks == ("not read: 心情 of turns",)
    assert "not one trained reply" in refusal({**pair, "output": {**SAYS, "role": "user"}})
    assert "not one trained reply" in refusal({**pair, "output": {**SAYS, "weight": 0}})
    assert "calls of tools" in refusal({**pair, "output": {**SAYS, "tool_calls": [{"name": "查"}]}})


# --------------------------------------------------------------------------------------------- what is in a turn


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"train": False},
        {"loss": False},
        {"Loss": "false"},
        {"train": "0"},
        {"trainable": 0},
    ],
    ids=str,
)
def test_a_reply_with_a_weight_of_nothing_is_read_and_not_trained(mark: dict):
    sample = read(said(ASKS, {**SAYS, **mark}, THANKS, WELCOME))
    assert sample.history == (("下雨吗？", "不下。"),) and sample.untrained == (0,)
    assert sample.remarks == ("replies not trained, by their weight",)
    last = read(said(ASKS, SAYS, THANKS, {**WELCOME, **mark}))
    assert last.untrained == (1,)
    assert refusal(said(ASKS, {**SAYS, **mark})) == "no reply is to be trained"


def test_a_pair_of_xtuner_without_loss_is_not_trained():
    turns = [
        {"input": "下雨吗？", "output": "不下。", "output_with_loss": False},
        {"input": "谢谢", "output": "不客气"},
    ]
    assert read({"conversation": turns}).untrained == (0,)


def test_other_weights_are_trained_and_named_or_refused():
    assert read(said(ASKS, {**SAYS, "weight": 1, "train": True, "loss": None})).remarks == ()
    assert read(said(ASKS, {**SAYS, "weight": 0.5})).remarks == ("weight of turns other than 0 and 1, trained as 1",)
    assert '"weight" of a turn is neither true nor false' in refusal(said(ASKS, {**SAYS, "weight": "低"}))


def test_joined_replies_are_not_trained_if_one_of_them_is_not():
    assert read(said(ASKS, {**SAYS, "weight": 0}, SAYS, THANKS, WELCOME)).untrained == (0,)


def test_keys_of_turns_that_are_not_read_are_named():
    sample = read(said({**ASKS, "name": "甲", "id": 3}, {**SAYS, "reasoning_content": "云少", "心情": "好", "空": ""}))
    assert sample.remarks == ("not read: reasoning_content of turns", "not read: 心情 of turns")


@pytest.mark.parametrize("more", [{"value": "雪"}, {"text": "user"}, {"from": "gpt"}], ids=str)
def test_a_second_text_or_speaker_of_a_turn_is_refused(more: dict):
    [key] = more
    assert f'a turn has "{key}" beside content and role' in refusal(said({**ASKS, **more}, SAYS))
    pair = {"question": "谁？", "answer": "我", "content": "雪"}
    assert 'a turn has "content" beside answer and question' in refusal({"messages": [pair]})
    assert read(said({**ASKS, "text": "下雨吗？", "value": None}, SAYS)).remarks == ()


@pytest.mark.parametrize("speaker", ["tool", "function", "function_call", "observation"])
def test_calls_of_tools_and_what_they_return_are_refused(speaker: str):
    assert "calls of tools" in refusal(said(ASKS, {"role": speaker, "content": "九度"}, SAYS))
    assert "calls of tools" in refusal(said(ASKS, {**SAYS, "tool_calls": [{"name": "查"}]}, THANKS, WELCOME))


def test_media_and_parts_that_are_no_text_are_refused():
    assert 'a turn has "images"' in refusal(said({**ASKS, "images": ["甲.jpg"]}, SAYS))
    assert "a part that is no text" in refusal(said({**ASKS, "content": [{"type": "image", "image": "甲"}]}, SAYS))


def test_unknown_speakers_and_repeated_keys_are_refused():
    assert "a speaker is not" in refusal(said({"role": "旁白", "content": "天亮了"}, SAYS))
    assert "a turn repeats a key" in refusal(said(RepeatedKeys(ASKS), SAYS))


# -------------------------------------------------------------------------------------------- encoded, counted and told


@pytest.fixture(scope="module")
def encoder(make_model: Callable[[str], Path]) -> Encoder:
    return Encoder(load_tokenizer(str(make_model("bloom-tiny")), 2048))


def test_replies_that_are_not_trained_are_read_and_have_no_example(encoder: Encoder):
    opening = read(said(WELCOME, ASKS, {**SAYS, "weight": 0}, THANKS, WELCOME))
    whole = read(said(ASKS, SAYS, THANKS, WELCOME))
    first, second = encoder.encode([opening, whole])
    assert (len(first), len(second)) == (1, 2)
    ids = first[0].prompt
    assert "不下。" in encoder.tokenizer.decode(ids) and "不客气" in encoder.tokenizer.decode(ids)
    assert encoder.tokenizer.decode(first[0].answer[:-1]) == "不客气"


def test_what_is_not_read_or_refused_is_counted_by_file_and_kind_and_printed(
    tmp_path: Path, encoder: Encoder, capsys: pytest.CaptureFixture
):
    kept = [{"instruction": "问", "output": f"答{number}", "心情": "好"} for number in range(3)]
    refused = [{"instruction": "问", "output": 7 + number} for number in range(25)]
    talks = [said(ASKS, {**SAYS, "weight": 0}, THANKS, WELCOME), said(ASKS, ASKS, SAYS), said(ASKS)]
    files = [tmp_path / "甲.jsonl", tmp_path / "乙.jsonl"]
    for file, rows in zip(
        files, ([*refused, *kept, {"instruction": "问", "laws": "七", "output": "x"}], talks), strict=True
    ):
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    cache.write(tmp_path, files, encoder, 1)
    counts = Counts(**json.loads((tmp_path / cache.COUNTS).read_text(encoding="utf-8")))
    first, second = counts.files
    assert (counts.rows, counts.kept, counts.refused) == (32, 5, 27)
    assert first["remarks"] == {"not read: 心情": 3} and first["shapes"] == {"instruction/output": 3}
    assert first["refused"]['"output" is not a string'] == [25, f"{files[0]}:1", '"output" is not a string: 7']
    assert len(first["refused"]) == 2 and list(second["refused"]) == ["no question with a reply"]
    print_data("data", DataReport(counts, tmp_path / cache.NOTES, kept=counts.kept))
    lines = capsys.readouterr().out.splitlines()
    assert f"noted    {files[0]}: not read: 心情 in 3 rows" in lines
    [noted] = [line for line in lines if line.startswith(f"noted    {files[1]}")]
    assert (
        "replies not trained, by their weight in 1 row" in noted
        and "consecutive turns of one speaker joined in 1 row" in noted
    )
    told = [line for line in lines if line.startswith("refused")]
    assert told[0] == f'refused  {files[0]}:1: "output" is not a string: 7; and 24 more like it'
    assert len(told) == 3 and any('"laws" has no role' in line for line in told)
