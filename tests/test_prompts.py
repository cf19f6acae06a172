"""The templates' text, conversations, and the chat template that says the same in Jinja."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sft.prompts import body_spans, build_chat_prompt, build_prompt, chat_template, ollama_template

NASTY = [
    '他说："好"，它\'s \\n 不是换行，\\\\ 是两条',
    "  第一行\n\n第二行\t\r\n",
    "{instruction} {input} {} {0} {{x}} %s",
    "{{ messages }} {% if true %}{# 注 #}{% endif %} {%- raw -%}",
    "表情😀👨‍👩‍👧 𠀀 \u3000全角",
    "Human:你是谁？\nAssistant:### Response:",
    "BEFORE AFTER EOS </s",
    "",
]
WRONG_ORDERS = [
    ["system"],
    ["assistant"],
    ["user", "user"],
    ["assistant", "user"],
    ["user", "assistant", "assistant"],
    ["user", "user", "user"],
    ["user", "system", "user"],
    ["system", "system", "user"],
    ["tool"],
]


def conversation(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ["user", "assistant"] * len(contents)
    return messages + [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def in_template(instruction: str) -> str:
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{instruction}\n\n### Response:"
    )


def test_prompt_without_input_is_alpacas():
    assert build_prompt("写一首诗。") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n写一首诗。\n\n### Response:"
    )


def test_prompt_with_input_is_alpacas():
    assert build_prompt("翻译成英文。", "你好") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request."
        "\n\n### Instruction:\n翻译成英文。\n\n### Input:\n你好\n\n### Response:"
    )


@pytest.mark.parametrize("text", NASTY)
def test_user_text_is_kept_to_the_letter(text: str):
    assert build_prompt(text) == in_template(text)
    assert build_prompt(text, "材料") == build_prompt("§", "材料").replace("§", text)
    if text:
        assert build_prompt("任务", text) == build_prompt("任务", "§").replace("§", text)


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (["你好"], "你好"),
        (["你好", "您好！", "你是谁？"], "Human:你好\nAssistant:您好！\nHuman:你是谁？\nAssistant:"),
        (
            ["一", "二", "三", "四", "五"],
            "Human:一\nAssistant:二\nHuman:三\nAssistant:四\nHuman:五\nAssistant:",
        ),
    ],
)
def test_turns_stand_in_the_instruction(contents: list[str], expected: str):
    assert build_chat_prompt(conversation(*contents)) == in_template(expected)
    assert build_chat_prompt(conversation(*contents, system="简短。")) == in_template("简短。\n" + expected)


@pytest.mark.parametrize("roles", [[], ["user", "assistant"], *WRONG_ORDERS])
def test_another_order_is_refused(roles: list[str]):
    with pytest.raises(ValueError, match="alternates"):
        build_chat_prompt([{"role": role, "content": "好"} for role in roles])


@pytest.mark.parametrize("roles", WRONG_ORDERS)
def test_chat_template_refuses_another_order(tokenizer: PreTrainedTokenizerBase, roles: list[str]):
    messages = [{"role": role, "content": "好"} for role in roles]
    with pytest.raises(TemplateError, match="alternates"):
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("instruction", NASTY)
@pytest.mark.parametrize("input", NASTY)
def test_body_spans_cut_out_the_users_text(instruction: str, input: str):
    prompt = build_prompt(instruction, input)
    expected = [input, instruction] if input else [instruction]
    assert [prompt[start:end] for start, end in body_spans(instruction, input)] == expected


@pytest.mark.parametrize("system", [None, "", '你是助手。{{ 1 }} "\\\n'])
@pytest.mark.parametrize("num_turns", [1, 2, 3])
def test_chat_template_equals_build_chat_prompt(tokenizer: PreTrainedTokenizerBase, num_turns: int, system: str | None):
    for first in range(len(NASTY)):
        contents = [NASTY[(first + i) % len(NASTY)] for i in range(2 * num_turns - 1)]
        messages = conversation(*contents, system=system)
        expected = build_chat_prompt(messages)
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
        tokenised = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert tokenised["input_ids"] == tokenizer(expected).input_ids


@pytest.mark.parametrize("num_turns", [1, 2])
def test_chat_template_ends_a_finished_conversation_with_eos(tokenizer: PreTrainedTokenizerBase, num_turns: int):
    asked = conversation(*["问", "答", "再问"][: 2 * num_turns - 1])
    rendered = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "好。\n"}], tokenize=False)
    assert rendered == build_chat_prompt(asked) + "好。\n" + tokenizer.eos_token


def test_chat_template_quotes_any_special_token(tokenizer: PreTrainedTokenizerBase):
    bos, eos = '"<\\n>\\', "\n</'\"}}>"
    messages = conversation("问", "答")
    rendered = tokenizer.apply_chat_template(messages, chat_template=chat_template(bos, eos), tokenize=False)
    assert rendered == bos + build_chat_prompt(messages[:1]) + "答" + eos


GO = """
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

func main() {
	var given struct {
		Template      string
		Conversations []map[string]any
	}
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Parse(given.Template))
	for _, conversation := range given.Conversations {
		if err := parsed.Execute(os.Stdout, conversation); err != nil {
			panic(err)
		}
		os.Stdout.Write([]byte{0})
	}
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed, whose templates Ollama takes")
def test_ollamas_template_writes_the_same(tmp_path: Path):
    (tmp_path / "main.go").write_text(GO)
    given = [conversation(*NASTY[:number], system=system) for number in (1, 3, 7) for system in (None, "简短。")]
    # As Ollama hands them over: the system text apart, and among the messages as well.
    conversations = [
        {
            "System": messages[0]["content"] if messages[0]["role"] == "system" else "",
            "Messages": [{"Role": each["role"], "Content": each["content"]} for each in messages],
        }
        for messages in given
    ]
    asked = json.dumps({"Template": ollama_template(), "Conversations": conversations})
    command = ["go", "run", str(tmp_path / "main.go")]
    environment = {**os.environ, "GOCACHE": str(tmp_path / "cache"), "GO111MODULE": "off"}
    found = subprocess.run(command, input=asked.encode(), capture_output=True, check=True, env=environment).stdout
    assert found.decode().split("\0")[:-1] == [build_chat_prompt(messages) for messages in given]
