"""The chat in the terminal, as a program and with a model whose answers are given."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft.chat.__main__ import footer, left_out, recall
from support.project import SAMPLE


def test_talk_in_the_terminal(make_model: Callable[[str], Path], run: Callable):
    folder = make_model("bloom-tiny")
    command = ["-m", "sft.chat", folder, "--device", "cpu", "--temperature", "0", "--max_new_tokens", "5"]
    result = run(*command, input="你好\n再说一遍\n\n")
    assert result.returncode == 0
    assert result.stdout.count("> ") == 3
    assert len(re.findall(r"\(5 tokens, [\d.]+ tokens/s; cut at the token limit\)", result.stdout)) == 2
    wrong = run("-m", "sft.chat", folder, "--temperature", "7")
    assert (wrong.returncode, wrong.stderr) == (2, "error: --temperature is 7.0; expected 0.0 to 2.0\n")


class Interrupted:
    """A reply during which Ctrl-C comes."""

    finish_reason = "cancelled"

    def __iter__(self) -> Iterator[str]:
        yield "好"
        raise KeyboardInterrupt


def test_control_c_ends_the_comparison_and_does_not_count_as_a_wrong_answer():
    with pytest.raises(KeyboardInterrupt):
        recall(SimpleNamespace(stream=lambda prompt: Interrupted()), str(SAMPLE), 3)


def test_what_was_left_out_and_why_a_reply_ended():
    reply = SimpleNamespace(turns_left_out=2, tokens_left_out=3, num_tokens=6, seconds=2.0, finish_reason="length")
    assert (
        left_out(reply) == "left out because they do not fit: the oldest 2 turns and the first 3 tokens of the question"
    )
    assert footer(reply) == "6 tokens, 3.0 tokens/s; cut at the token limit"
    reply.turns_left_out = reply.tokens_left_out = 0
    assert left_out(reply) == ""


def test_flags_are_read_without_waiting_for_pytorch(run: Callable):
    code = "import sys, sft.chat.__main__; print({'torch', 'transformers', 'pyarrow'} & sys.modules.keys())"
    assert run("-c", code).stdout == "set()\n"


class Said:
    """A reply of one piece, ended by the model."""

    finish_reason, turns_left_out, tokens_left_out, token_ids, seconds = "eos", 0, 0, [1], 1.0

    def __init__(self, text: str):
        self.text = text

    def __iter__(self) -> Iterator[str]:
        yield self.text


def test_only_rows_that_were_asked_are_counted(tmp_path):
    (tmp_path / "one.json").write_text('{"q": "几点？", "a": "三点"}', encoding="utf-8")
    assert recall(SimpleNamespace(stream=lambda prompt: Said("三点")), str(tmp_path), 3) == (1, 1)
