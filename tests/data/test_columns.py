"""The role of each key of a record, by its name or by hand; and what is refused rather than read as something else."""

import numpy as np
import pytest

from sft.data.columns import NOT_READ, Columns
from sft.data.formats import Sample, to_sample
from sft.data.shards import Refused
from support.records import BY_NAME, advised, read, refusal, typed

# ------------------------------------------------------------------------------------------------------------- by name


@pytest.mark.parametrize(
    "question",
    ["instruction", "prompt", "query", "question", "problem", "q", "INSTRUCTION", "Question", "问题", "指令"],
)
@pytest.mark.parametrize(
    "answer",
    ["output", "response", "answer", "completion", "target", "solution", "a", "Output", "回答", "答案", "输出"],
)
def test_every_name_of_a_question_goes_with_every_name_of_an_answer(question: str, answer: str):
    sample = read({answer: "三条腿", question: "凳子有几条腿？"})
    assert sample == Sample("凳子有几条腿？", "", "三条腿", "行", shape=f"{question}/{answer}")


@pytest.mark.parametrize("question", ["instruction", "prompt", "question", "指令"])
@pytest.mark.parametrize("context", ["input", "context", "Input", "输入"])
def test_an_input_is_read_beside_every_question(question: str, context: str):
    sample = read({question: "加起来。", context: "5 和 8", "response": "13"})
    assert (sample.instruction, sample.input, sample.output) == ("加起来。", "5 和 8", "13")


def test_a_context_is_the_input_of_a_question():
    sample = read({"context": "院里有三只鸡。", "question": "几只鸡？", "answer": "三只"})
    assert (sample.instruction, sample.input, sample.output) == ("几只鸡？", "院里有三只鸡。", "三只")


@pytest.mark.parametrize("answer", ["response", "output", "target"])
def test_an_input_alone_is_the_question(answer: str):
    assert read({"input": "写一行诗", answer: "月落乌啼"}).instruction == "写一行诗"


def test_a_context_alone_is_not_taken_for_the_question():
    reason = refusal({"context": "院里有三只鸡。", "answer": "三只"})
    assert '"context" is the input' in reason and reason.endswith("type --columns instruction=context")


@pytest.mark.parametrize("system", ["system", "system_prompt", "System", "系统"])
@pytest.mark.parametrize("pair", [{"query": "叫一声", "response": "喵"}, {"messages": [["叫一声", "喵"]]}])
def test_a_system_text_is_read_beside_pairs_and_turns(system: str, pair: dict):
    sample = read({system: "你是一只猫。", **pair})
    assert (sample.system, sample.instruction, sample.output) == ("你是一只猫。\n", "叫一声", "喵")


@pytest.mark.parametrize(
    "history",
    [
        [["几点？", "三点"], ["晚吗？", "不晚"]],
        ["几点？", "三点", "晚吗？", "不晚"],
        [{"q": "几点？", "a": "三点"}, {"q": "晚吗？", "a": "不晚"}],
        [{"instruction": "几点？", "output": "三点"}, {"instruction": "晚吗？", "output": "不晚"}],
        [
            {"role": role, "content": text}
            for role, text in zip(["user", "assistant"] * 2, ["几点？", "三点", "晚吗？", "不晚"], strict=False)
        ],
    ],
)
def test_a_history_is_pairs_dicts_alternating_texts_or_turns(history: list):
    sample = read({"instruction": "走吧", "history": history, "output": "好"})
    assert sample.history == (("几点？", "三点"), ("晚吗？", "不晚"))
    assert (sample.instruction, sample.output, sample.untrained) == ("走吧", "好", ())


def test_a_row_in_a_list_of_its_own_is_that_row():
    assert read([{"question": "谁？", "answer": "我"}]).output == "我"


@pytest.mark.parametrize("wrapper", ["instances", "data"])
def test_a_row_within_a_row_takes_its_place(wrapper: str):
    sample = read({"instruction": "译成英文", wrapper: [{"input": "山", "output": "hill"}], "id": 5})
    assert (sample.instruction, sample.input, sample.output) == ("译成英文", "山", "hill")


@pytest.mark.parametrize(
    "rows", [[{"instruction": "一", "output": "1"}, {"instruction": "二", "output": "2"}]], ids=["two"]
)
def test_several_rows_within_one_are_refused_as_they_may_be_a_conversation(rows: list):
    assert "may be rows or the turns" in refusal(rows)
    assert '"data" holds rows, or the turns' in refusal({"data": rows})
    assert '"instances" holds rows, or the turns' in refusal({"instances": rows})
    sample = read({"messages": rows})
    assert sample.history == (("一", "1"),)


# --------------------------------------------------------------------------------------------------------- bad answers


BAD = [
    {"train": False},
    {"weight": 0},
    {"is_correct": False},
    {"label": False},
    {"kto_tag": False},
    {"is_bad": True},
    {"is_good": False},
    {"is_rejected": True},
]
SAYS_BAD = [
    {"label": 0},
    {"kto_tag": "false"},
    {"is_bad": 1},
    {"is_bad": "True"},
    {"label": np.False_},
    {"label": "bad"},
]


@pytest.mark.parametrize("verdict", BAD + SAYS_BAD, ids=str)
@pytest.mark.parametrize("pair", [{"prompt": "骂人", "response": "蠢货"}, {"messages": [["骂人", "蠢货"]]}], ids=str)
def test_an_answer_that_is_marked_as_bad_is_refused(verdict: dict, pair: dict):
    [key] = verdict
    reason = refusal({**pair, **verdict})
    assert reason.startswith(f'"{key}" is ') and "marked as a bad one" in reason
    assert read({**pair, **verdict}, typed(reason.split("type ")[-1])).output == "蠢货"


@pytest.mark.parametrize("verdict", [{"label": True}, {"kto_tag": True}, {"is_bad": False}, {"is_bad": 0}], ids=str)
def test_an_answer_that_is_marked_as_good_is_kept(verdict: dict):
    assert read({"prompt": "打招呼", "response": "早", **verdict}).remarks == ()


@pytest.mark.parametrize("label", [3, "体育"])
def test_a_label_that_says_nothing_of_good_or_bad_is_named(label: object):
    assert read({"prompt": "打招呼", "response": "早", "label": label}).remarks == ("not read: label",)


@pytest.mark.parametrize("question", [{"prompt": "夸我"}, {"prompt": [{"role": "user", "content": "夸我"}]}], ids=str)
@pytest.mark.parametrize("answer", ["真棒", {"role": "assistant", "content": "真棒"}], ids=str)
def test_of_two_answers_the_chosen_one_is_trained_and_never_the_rejected(question: dict, answer: object):
    sample = read({**question, "chosen": answer, "rejected": "真笨"})
    assert (sample.instruction, sample.output) == ("夸我", "真棒") and "真笨" not in str(sample)


# ------------------------------------------------------------------------------------- keys on which the answer depends


@pytest.mark.parametrize("key", ["laws", "article", "passages", "Documents", "reference", "法条", "材料"])
def test_a_source_of_the_answer_is_refused_until_a_flag_says_what_it_is(key: str):
    record = {"question": "罚多少？", key: ["第七条：罚百元。"], "answer": "百元"}
    reason = refusal(record)
    assert f'"{key}" has no role' in reason
    as_input, as_nothing = advised(reason)
    assert (as_input, as_nothing) == (f"--columns input={key}", f"--ignore_columns {key}")
    assert read(record, typed(as_input)).input == "第七条：罚百元。"
    assert read(record, typed(as_nothing)).remarks == (f"not read: {key}",)


def test_sources_beside_an_input_or_turns_can_only_be_ignored():
    for rest in ({"question": "罚？", "input": "酒驾", "answer": "罚"}, {"messages": [["罚？", "罚"]]}):
        record = {**rest, "laws": "第七条", "facts": "案情"}
        reason = refusal(record)
        assert reason.endswith("type --ignore_columns laws,facts")
        assert read(record, typed(advised(reason)[0])).remarks == ("not read: laws", "not read: facts")


def test_of_several_sources_one_may_be_the_input():
    record = {"question": "罚？", "answer": "罚", "laws": "第七条", "facts": "案情"}
    first, second = advised(refusal(record))
    assert read(record, typed(first)).input == "第七条" and read(record, typed(first)).remarks == ("not read: facts",)
    assert read(record, typed(second)).input == ""


@pytest.mark.parametrize("key", ["images", "videos", "audios", "image", "图片"])
@pytest.mark.parametrize(
    "pair", [{"query": "几个人？", "answer": "三个"}, {"messages": [["几个人？", "三个"]]}], ids=str
)
def test_media_are_refused(key: str, pair: dict):
    assert f'"{key}" holds images, video or sound' in refusal({**pair, key: ["甲.jpg"]})
    assert read({**pair, key: []}).output == "三个"


@pytest.mark.parametrize(
    "record",
    [
        {"query": "<image>几个人？", "answer": "三个"},
        {"query": "几个人？", "input": "<image>", "answer": "三个"},
        {"messages": [["几个人？<image>", "三个"], ["真的？", "真的"]]},
        {"system": "看<image>", "query": "几个人？", "answer": "三个"},
    ],
    ids=str,
)
def test_the_place_of_a_picture_in_a_text_is_refused(record: dict):
    assert "<image> stands in the text for a picture" in refusal(record)


@pytest.mark.parametrize("key", ["tools", "functions", "apis", "工具"])
@pytest.mark.parametrize("pair", [{"query": "几度？", "answer": "九度"}, {"messages": [["几度？", "九度"]]}], ids=str)
def test_lists_of_tools_are_refused_unless_they_are_empty(key: str, pair: dict):
    assert f'"{key}" lists tools' in refusal({**pair, key: [{"name": "温度"}]})
    assert f'"{key}" lists tools' in refusal({**pair, key: '[{"name": "温度"}]'})
    assert read({**pair, key: "[]"}).remarks == ()


def test_a_dialogue_that_is_a_text_is_not_left_out_in_silence():
    record = {"dialogue": "甲：雨大。乙：是。", "question": "天气？", "answer": "下雨"}
    as_input, as_nothing = advised(refusal(record))
    assert read(record, typed(as_input)).input == "甲：雨大。乙：是。"
    assert read(record, typed(as_nothing)).remarks == ("not read: dialogue",)
    assert read({"question": "天气？", "answer": "下雨", "turns": 1, "data": "2020"}).remarks == (
        "not read: turns",
        "not read: data",
    )


# ------------------------------------------------------------------------------------------------------------ ambiguous


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "用一句话回答", "question": "天为何蓝？", "answer": "散射"},
        {"problem": "二加二", "solution": "数手指，得四", "answer": "4"},
        {"instruction": "求和", "input": "1 2", "context": "3 4", "output": "3"},
        {"instruction": "求和", "output": "3", "Output": "7"},
        {"prompt": "问好", "response": "早", "chosen": "晚"},
        {"messages": [["问", "答"]], "conversations": [["甲", "乙"]]},
        {"instruction": "问好", "system": "你是猫", "system_prompt": "你是狗", "output": "喵"},
    ],
    ids=str,
)
def test_two_readings_are_refused_with_both_and_each_flag_works(record: dict):
    reason = refusal(record)
    assert "may each be the" in reason
    flags = advised(reason)
    samples = [read(record, typed(flag)) for flag in flags]
    if len(flags) == 3:  # where the input is free, both are read
        assert samples.pop(0).remarks == ()
    first, second = samples
    assert first != second
    assert any(remark.startswith(NOT_READ) for remark in first.remarks) and second.remarks


def test_keys_that_no_flag_tells_apart_are_to_be_renamed():
    assert refusal({"q": "问", "a": "答", " a": "复"}) == '"a", " a" may each be the output; rename one'


def test_advice_keeps_the_flags_that_were_typed_before():
    record = {"instruction": "简短", "question": "天为何蓝？", "answer": "散射", "response": "因为", "laws": "无"}
    columns, seen = BY_NAME, []
    while isinstance(to_sample(record, "行", columns), Refused):
        seen.append(advised(refusal(record, columns))[-1])
        flags = {name: value for each in seen for name, value in [each.split(" ")]}
        columns = typed(" ".join(f"{name} {value}" for name, value in flags.items()))
        assert len(seen) < 9
    assert read(record, columns).output == "因为"


@pytest.mark.parametrize(
    ("record", "ends"),
    [
        ({"instruction": "问好", "标准答案": "早"}, "type --columns output=标准答案"),
        ({"instruction": "问好", "skill": "早"}, "type --columns output=KEY"),
        ({"提": "问好", "output": "早", "id": 3}, "type --columns instruction=提"),
        ({"题 目": "问好", "output": "早"}, "type --columns 'instruction=题 目'"),
        ({"题": "问好", "复": "早"}, "type --columns instruction=KEY,output=KEY"),
    ],
)
def test_missing_roles_are_told_with_what_is_there_and_what_to_type(record: dict, ends: str):
    reason = refusal(record)
    assert reason.endswith(ends)
    assert all(f'"{key}"' in reason for key in record)
    if "KEY" not in ends:
        assert read(record, typed(advised(reason)[0])).output == "早"


def test_an_ignored_key_is_not_advised():
    reason = refusal({"article": "天", "a": "蓝"}, Columns(ignored=frozenset(["article"])))
    assert (
        reason == 'no instruction found ("a" is the output; other keys: "article"); expected a key such as instruction'
    )


def test_no_key_is_left_out_of_a_refusal_and_the_likely_ones_come_first():
    reason = refusal({"id": 1, "source": "书", **{f"键{number}": "x" for number in range(20)}})
    assert all(f'"键{number}"' in reason for number in range(20))
    assert reason.index('"键19"') < reason.index('"id"')


def test_a_text_is_pretraining_and_no_task():
    assert refusal({"text": "从前有座山", "id": 4}).startswith("pretraining text")


# ---------------------------------------------------------------------------------------------------------- not read


def test_keys_without_meaning_are_silent_and_unknown_ones_are_named():
    record = {"instruction": "问好", "output": "早", "id": 1, "Source": "书", "score": 0.5, "url": "u", "timestamp": 9}
    assert read({**record, "心情": "好", "reasoning": "想"}).remarks == ("not read: 心情", "not read: reasoning")
    assert read({**record, "心情": None, "评语": "", "附": []}).remarks == ()


def test_a_key_that_no_terminal_prints_is_named_in_letters_that_it_does():
    assert read({"instruction": "问", "output": "答", "a\nb\ud800": 1}).remarks == (r"not read: a\nb\ud800",)


# -------------------------------------------------------------------------------------- what real files were misread as


@pytest.mark.parametrize("key", ["turns", "prompt", "input"])
def test_a_list_of_questions_is_no_conversation(key: str):
    assert "who speaks is not said" in refusal({key: ["写一张便条。", "再写短些。"], "id": 4})


def test_what_an_input_is_for_may_stand_under_task():
    record = {"task": "译成法文", "input": "早", "output": "bonjour"}
    flags = advised(refusal(record))
    sample = read(record, typed(flags[0]))
    assert (sample.instruction, sample.input, sample.output) == ("译成法文", "早", "bonjour")
    assert read(record, typed(flags[1])).remarks == ("not read: task",)


def test_marks_of_other_templates_and_ends_are_remarked():
    remarks = read({"instruction": "### Instruction:\n发热", "output": "### Response:\n喝水<|endoftext|>"}).remarks
    assert remarks == (
        "a prompt template of its own",
        "an answer that ends with a mark such as </s>, which is trained as text,",
    )


def test_a_verdict_without_an_answer_is_no_verdict():
    assert "pretraining text" in refusal({"text": "跌了", "label": 0})
    assert '"correctness" is false' in refusal({"q": "几？", "a": "五", "correctness": False})


def test_a_lone_turn_is_told_to_join_its_conversation():
    assert refusal({"role": "user", "content": "在吗"}).startswith("one turn in a row of its own")


@pytest.mark.parametrize("key", ["日期", "topic", "keywords", "name", "language"])
def test_what_may_bear_on_an_answer_is_named(key: str):
    assert read({"q": "写诗", "a": "花开", key: "春"}).remarks == (f"not read: {key}",)


def test_a_part_may_hold_its_text_as_value_and_a_weight_of_a_loss_counts():
    turns = [
        {"role": "user", "content": [{"type": "text", "value": "甲"}]},
        {"role": "assistant", "content": "乙", "loss_weight": 0.0},
        {"role": "user", "content": "丙"},
        {"role": "assistant", "content": "丁"},
    ]
    sample = read({"messages": turns})
    assert (sample.history, sample.untrained) == ((("甲", "乙"),), (0,))


@pytest.mark.parametrize("key", ["text", "content", "Code", "内容"])
def test_a_further_text_is_named_where_it_repeats_the_row_and_refused_where_it_may_say_more(key: str):
    pair = {"instruction": "数到二\n", "output": " 一二"}
    whole = f"### Instruction:\n{pair['instruction'].strip()}\n\n### Response: 一二"
    assert read({**pair, key: whole}).remarks == (f"not read: {key}",)
    for more in ("数到二", "一二三", "从前有座山。", {"甲": 1}, 7, [whole]):
        reason = refusal({**pair, key: more})
        assert reason.startswith(f'"{key}" has no role, and the answer may depend on it')
        read({**pair, key: more}, typed(advised(reason)[1]))
        read({**pair, key: more}, typed(advised(reason)[0])) if more != 7 else None
    assert refusal({"messages": [["数到二", "一二"]], key: "数"}).endswith(f"; type --ignore_columns {key}")
    assert refusal({"instruction": "数到二", key: "一二"}).startswith("no output found")
