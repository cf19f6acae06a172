"""Values of any kind under the keys of a record, empty and odd ones; and roles that are given by hand."""

import json
from datetime import datetime
from decimal import Decimal

import numpy as np
import pytest

from sft.data.columns import Columns
from sft.data.formats import Sample, to_sample
from sft.data.json_stream import RepeatedKeys
from sft.program import UserError
from sft.training.arguments import DataArguments
from support.records import BY_NAME, advised, read, refusal, typed

# ------------------------------------------------------------------------------------------------------- empty values


def test_empty_outputs_are_refused_or_trained():
    record = {"instruction": "找出人名", "input": "天晴了", "output": ""}
    assert refusal(record).endswith("--empty_output train trains it")
    sample = read(record, typed("--empty_output train"))
    assert (sample.output, sample.remarks) == ("", ("empty output, trained as an answer of nothing",))
    assert refusal({**record, "output": None}, typed("--empty_output train")) == 'the "output" is null'
    assert "no output found" in refusal({"instruction": "找", "备注": "x"}, typed("--empty_output train"))
    assert read({**record, "output": "", "laws": None, "images": None}, typed("--empty_output train")).output == ""


def test_an_empty_list_as_a_text_is_a_text():
    sample = read({"instruction": "这个列表多长？", "input": "[]", "output": "0"})
    assert sample.input == "[]"
    assert read({"instruction": "空列表怎么写？", "output": "[]"}).output == "[]"
    assert read({"instruction": "问", "output": "答", "history": "[]"}).remarks == ()


def test_an_empty_question_is_told():
    assert refusal({"instruction": "", "output": "答"}) == 'the "instruction" is empty'
    assert refusal({"instruction": " ", "output": "答"}) == 'the "instruction" is empty'


# --------------------------------------------------------------------------------------------------------- odd values


@pytest.mark.parametrize("key", ["instruction", "output", "input", "system", "history", "messages", "label", "心情"])
@pytest.mark.parametrize(
    "value",
    [
        0,
        False,
        1.5,
        float("nan"),
        Decimal("sNaN"),
        datetime(2020, 1, 1),
        b"x",
        np.array([1, 2]),
        np.array([]),
        np.float32(0),
    ]
    + [
        [],
        [[]],
        [1],
        ["一"],
        [None],
        {},
        {1: 2},
        {"x": {}},
        ("问", "答"),
        {"role": "user"},
        [{3: 4}],
        [{"role": 1, "content": 2}],
    ],
    ids=repr,
)
def test_values_of_any_kind_are_read_or_refused(key: str, value: object):
    result = to_sample({"instruction": "问", "output": "答", key: value}, "行")
    if isinstance(result, Sample):
        json.dumps([result.instruction, result.output, result.remarks, result.shape])
    else:
        assert result.reason and "\n" not in result.reason


@pytest.mark.parametrize("key", [1, None, ("x",), b"k", 1.5, True])
def test_keys_that_are_no_strings_are_refused(key: object):
    assert "is not a string" in refusal({"instruction": "问", "output": "答", key: "x"})
    assert "is not a string" in refusal({"messages": [{"role": "user", "content": "问", key: 1}, ["问", "答"]]})


@pytest.mark.parametrize("value", [[], [[]], [{}], {}, "文", 3, None, True, ["问", "答"], [["问", "答"]]], ids=repr)
def test_records_that_are_no_objects_are_refused(value: object):
    assert refusal(value)


def test_deep_values_are_read_or_refused():
    deep: dict = {}
    inner = deep
    for _ in range(50_000):
        inner["x"] = {}
        inner = inner["x"]
    assert read({"instruction": "问", "output": "答", "深": deep}).remarks == ("not read: 深",)
    for key in ("output", "history", "messages", "input", "choices"):
        assert refusal({"instruction": "问", "output": "答", key: deep})
    assert refusal([[deep]])


def test_a_reason_is_one_line_whatever_the_keys():
    assert r"\n" in refusal({"question": "问", "laws\n": "七", "answer": "答"})
    assert refusal({"\ud800": "问", "甲": "答"}).encode()


def test_a_repeated_key_is_refused():
    assert refusal(RepeatedKeys(instruction="问", output="答")) == 'a key appears twice: "instruction", "output"'


# -------------------------------------------------------------------------------------------------------------- by hand


def arguments(**given: str) -> Columns:
    return DataArguments("x", **given).reads_by


def test_roles_are_given_by_hand():
    record = {"问": "问好", "文": "短", "规": "你是猫", "前": [["谁？", "我"]], "复": "喵", "answer": "汪"}
    columns = arguments(columns="instruction=问, input=文,system=规,history=前,output=复")
    sample = read(record, columns)
    assert (sample.instruction, sample.output, sample.system) == ("问好\n短", "喵", "你是猫\n")
    assert sample.history == (("谁？", "我"),) and sample.remarks == ("not read: answer",)
    assert read({"聊": [["谁？", "我"]]}, arguments(columns="messages=聊")).output == "我"


def test_pairs_by_hand_come_before_turns_and_turns_by_hand_before_pairs():
    record = {"messages": [["谁？", "我"]], "prompt": "问好", "response": "早"}
    assert "are both there" in refusal(record)
    pair = read(record, arguments(columns="instruction=prompt,output=response"))
    assert (pair.output, pair.remarks) == ("早", ("not read: messages",))
    turns = read(record, arguments(columns="messages=messages"))
    assert (turns.output, turns.remarks) == ("我", ("not read: prompt", "not read: response"))


def test_keys_are_ignored_by_hand_and_named():
    record = {"instruction": "问好", "input": "短", "laws": "七", "output": "早"}
    sample = read(record, arguments(ignore_columns="laws, input"))
    assert (sample.input, sample.remarks) == ("", ("not read: input", "not read: laws"))


@pytest.mark.parametrize(
    "columns", ["instruction", "提问=问", "output=", "=问", "instruction=问,,output=答", "图=images"]
)
def test_columns_that_cannot_be_understood_are_refused_with_an_example(columns: str):
    with pytest.raises(UserError, match="--columns instruction=question,output=answer"):
        arguments(columns=columns)


@pytest.mark.parametrize("passages", [[{"标题": "鲸", "页": 3}], {"鲸": ["大", "灰"]}])
def test_objects_are_the_input_by_hand_and_written_as_json(passages: object):
    record = {"question": "鲸多大？", "passages": passages, "answer": "很大"}
    sample = read(record, typed(advised(refusal(record))[0]))
    assert json.loads(sample.input) == passages and "鲸" in sample.input
    assert sample.remarks == ("passages read as JSON",)
    assert refusal({"question": "鲸多大？", "input": passages, "answer": "很大"}).startswith('"input" is not a string')


def test_a_key_by_hand_that_a_row_does_not_have_is_noted():
    columns = arguments(columns="input=laws ,user=甲")
    assert read({"question": "问", "laws": "", "answer": "答"}, columns).remarks == ()
    sample = read({"question": "问", "input": "短", "answer": "答"}, columns)
    assert sample.remarks == ("not read: input", "without laws, which --columns names,")


def test_no_flag_reads_by_name_and_refuses_empty_outputs():
    assert DataArguments("x").reads_by == BY_NAME
    assert (
        arguments(empty_output="train").trains_empty_outputs and not arguments(columns="output=x").trains_empty_outputs
    )


def test_an_answer_under_another_name_is_advised_and_read():
    record = {"question": "一周几天？", "std_answer": "七天", "class": "常识"}
    reason = refusal(record)
    assert reason.endswith("type --columns output=std_answer")
    assert read(record, typed(advised(reason)[0])).output == "七天"
