"""A `Human:` / `Assistant:` history in an instruction is split into turns where it is one, else kept."""

import random

import pytest

from sft.data.formats import split_history
from sft.prompts import chat_instruction

Turn = tuple[str, str]
IN_LINES = ("问Human:吗 Human:", " Human:\n Human:")


@pytest.mark.parametrize(
    ("text", "history", "question"),
    [
        ("Human:一\nAssistant:二\nHuman:三\nAssistant:", [("一", "二")], "三"),
        ("Human: 一 \n\nAssistant:\n二\n\nHuman:三\n\nAssistant:", [(" 一 \n", "\n二\n")], "三\n"),
        ("Human:问Human:吗 Human:\nAssistant: Human:\n Human:\nHuman:三\nAssistant:", [IN_LINES], "三"),
        ("Human:Assistant:\nAssistant:Human:\nHuman:三\nAssistant:", [("Assistant:", "Human:")], "三"),
        ("Human:一\r\nAssistant:二\r\nHuman:三\r\nAssistant:", [("一\r", "二\r")], "三\r"),
        ("Human:一\rAssistant:二\u2028Human:三\nAssistant:", [], "一\rAssistant:二\u2028Human:三"),
        ("Human:一\nAssistant:", [], "一"),
    ],
)
def test_a_history_is_split_at_the_names_that_begin_lines(text, history, question):
    split, last = split_history(text)
    assert (list(split), last) == (history, question)


WHOLE = [
    "",
    "问",
    "说说 Human: 和 Assistant: 的意思",
    "Human:",
    "Assistant:",
    "Human:一",
    "Human:一\nAssistant:二",
    "Human:一\nAssistant:二\nHuman:三",
    "Human:一\nAssistant:二\nHuman:三\nAssistant:四",
    "Human:一\nAssistant:二\nHuman:三\nAssistant: ",
    "Human:一\nAssistant:二\nHuman:三\nAssistant:\n",
    "Human:一\nAssistant:二\nHuman:三\n Assistant:",
    "Human:一\nHuman:二\nAssistant:",
    "Human:一\nHuman:二\nAssistant:三\nHuman:四\nAssistant:",
    "Human:一\nAssistant:二\nAssistant:",
    "Human:一\nAssistant:\nHuman:三\nAssistant:",
    "Human:\nAssistant:二\nHuman:三\nAssistant:",
    "Human:一\nAssistant:二\nHuman:\nAssistant:",
    "Human:一\nAssistant: \t\nHuman:三\nAssistant:",
    "Human:一Assistant:二\nHuman:三Assistant:",
    "\nHuman:一\nAssistant:二\nHuman:三\nAssistant:",
    "请续写：\nHuman:一\nAssistant:二\nHuman:三\nAssistant:",
    "Assistant:二\nHuman:三\nAssistant:",
    "human:一\nassistant:二\nhuman:三\nassistant:",
    "Human：一\nAssistant：二\nHuman：三\nAssistant：",
]


@pytest.mark.parametrize("text", WHOLE)
def test_another_text_is_a_question_as_it_is(text):
    assert split_history(text) == ((), text)


def split_by_lines(text: str) -> tuple[tuple[Turn, ...], str]:
    """Return what `split_history` should, line by line."""
    said: list[list[str]] = []
    for line in text.split("\n"):
        name = next((name for name in ("Human:", "Assistant:") if line.startswith(name)), None)
        if name:
            said.append([name, line.removeprefix(name)])
        elif said:
            said[-1][1] += f"\n{line}"
        else:
            return (), text
    in_turns = [name for name, _ in said] == ["Human:", "Assistant:"] * (len(said) // 2)
    if not in_turns or said[-1][1] or not all(part.strip() for _, part in said[:-1]):
        return (), text
    parts = [part for _, part in said]
    return tuple(zip(parts[:-2:2], parts[1:-2:2], strict=True)), parts[-2]


def test_what_is_split_off_makes_the_same_text_again():
    pieces = [
        "Human:",
        "\nHuman:",
        "\nAssistant:",
        "\n",
        "问",
        "答 ",
        "\r\n",
        "\t",
        *2 * ["问\nAssistant:答\nHuman:三"],
    ]
    rng, num_split = random.Random(0), 0
    for _ in range(20_000):
        text = "".join(["Human:", *rng.choices(pieces, k=rng.randint(1, 12)), "\nAssistant:"])
        history, question = split_history(text)
        assert (history, question) == split_by_lines(text)
        if history:
            assert chat_instruction("", history, question) == text
        num_split += bool(history)
    assert 2000 < num_split < 10_000
