"""Speakers of other names: what is typed for them is advised, and read in every form of turns."""

import pytest

from support.records import advised, read, refusal, typed

BY_HAND = typed("--columns user=buyer,assistant=掌柜")
ASKS, SAYS = "鱼新鲜吗？", "早上刚捞的。"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "buyer", "content": ASKS}, {"role": "掌柜", "content": SAYS}]},
        {"messages": [{"from": " Buyer", "value": ASKS}, {"from": "掌柜 ", "value": SAYS}]},
        {"dialog": [{"buyer": ASKS, "掌柜": SAYS}]},
        {"dialog": [f"BUYER：{ASKS}", f"掌柜: {SAYS}"]},
        {"prompt": [{"role": "buyer", "content": ASKS}], "completion": [{"role": "掌柜", "content": SAYS}]},
        {"question": ASKS, "chosen": {"role": "掌柜", "content": SAYS}},
        {"chat": {"turn_2": {"speaker": "掌柜", "text": SAYS}, "turn_1": {"speaker": "buyer", "text": ASKS}}},
    ],
)
def test_speakers_by_hand_are_read_in_every_form(record: dict):
    sample = read(record, BY_HAND)
    assert (sample.instruction, sample.output, sample.remarks) == (ASKS, SAYS, ())


def test_a_history_has_the_same_speakers():
    history = [{"role": "buyer", "content": "有鱼吗？"}, {"role": "掌柜", "content": "有。"}]
    sample = read({"history": history, "question": ASKS, "answer": SAYS}, BY_HAND)
    assert sample.history == (("有鱼吗？", "有。"),)


def test_each_unknown_speaker_is_advised_until_all_are_read():
    turns = [{"role": name, "content": text} for name, text in (("buyer", ASKS), ("掌柜", SAYS), ("fish boy", "嗯。"))]
    columns = typed("--columns system=规")
    for role, position in (("user", 0), ("assistant", 1), ("assistant", 1)):
        flags = advised(refusal({"messages": turns}, columns))
        columns = typed(flags[position])
        assert columns.by_hand[-1][0] == role and columns.by_hand[0] == ("system", "规")
    assert read({"messages": turns}, columns).output == f"{SAYS}\n\n嗯。"


def test_speakers_that_are_the_keys_of_a_turn_are_advised():
    assert refusal({"dialog": [{"buyer": ASKS, "掌柜": SAYS}]}).endswith("type --columns user=KEY,assistant=KEY")


@pytest.mark.parametrize("speaker", [7, None, "", " "])
def test_a_speaker_that_no_flag_can_name_is_refused_without_one(speaker: object):
    assert "--columns" not in refusal({"messages": [{"role": speaker, "content": ASKS}]})


def test_texts_with_such_names_keep_them():
    record = {"question": f"buyer: {ASKS}", "input": "掌柜: 甲", "answer": SAYS}
    assert read(record, BY_HAND).instruction == f"buyer: {ASKS}" and read(record, BY_HAND).input == "掌柜: 甲"
    repeated = {"messages": [{"buyer": ASKS, "user": "二", "掌柜": SAYS}]}
    assert "a turn has no speaker" in refusal(repeated, BY_HAND)
    columns = typed("--columns user=buyer,input=账")
    assert read({"question": ASKS, "账": [{"buyer": "张三", "role": "buyer"}], "answer": SAYS}, columns).input == (
        '[{"buyer": "张三", "role": "buyer"}]'
    )
