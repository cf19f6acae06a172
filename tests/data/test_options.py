"""Options of a multiple-choice question stand below it, under the labels that the answer names."""

import pytest

from support.records import advised, read, refusal, typed


@pytest.mark.parametrize(
    "options",
    [
        {"A": "石", "B": "梨"},
        {"B": "梨", "A": "石"},
        {"option_a": "石", "option_b": "梨"},
        {"optionB": "梨", "optionA": "石"},
        {"choices": ["石", "梨"]},
        {"options": {"A": "石", "B": "梨"}},
        {"choices": {"text": ["石", "梨"], "label": ["A", "B"]}},
        {"选项": ["A. 石", "B. 梨"]},
        {"choices": "A. 石\nB. 梨"},
    ],
)
def test_options_stand_below_the_question_under_the_labels_that_the_answer_names(options: dict):
    sample = read({"question": "哪个能吃？", **options, "answer": "B"})
    assert (sample.instruction, sample.output) == ("哪个能吃？\nA. 石\nB. 梨", "B")


def test_a_missing_option_does_not_move_the_labels_of_those_behind_it():
    options = {"A": "石", "B": "沙", "C": "", "D": "梨"}
    assert read({"question": "哪个能吃？", **options, "answer": "D"}).instruction.endswith("\nD. 梨")
    assert read({"question": "哪个大？", "choices": {"1": "狗", "2": "象"}, "answer": "2"}).instruction.endswith(
        "\n2. 象"
    )


def test_options_that_are_none_or_twice_there_are_refused():
    record = {"question": "哪个？", "choices": [["石"]], "answer": "A"}
    assert refusal(record) == "\"choices\" is not a list of options: [['石']]; type --ignore_columns choices"
    reason = refusal({"question": "哪个？", "choices": ["石", "沙"], "options": ["梨", "桃"], "answer": "A"})
    assert '"choices", "options"' in reason
    assert read({"question": "哪个？", "choices": ["石"], "options": ["梨"], "answer": "A"}, typed(advised(reason)[-1]))
    turns = [["哪个？", "A"]]
    assert refusal({"messages": turns, "choices": ["石", "沙"]}).endswith("type --ignore_columns choices")
