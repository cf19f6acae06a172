"""app.py served for real, asked through Gradio's own client."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from conftest import PROJECT
from gradio_client import Client

QUESTION = "写一首诗。"
SETTINGS = {"temperature": 0, "top_p": 1, "top_k": 0, "repetition_penalty": 1}


@pytest.fixture(scope="module")
def chat(make_model):
    from sft.chat import ChatModel

    return ChatModel.load(str(make_model("bloom-tiny")))


@pytest.fixture(scope="module")
def address(chat) -> Iterator[str]:
    from app import build_page

    page = build_page(chat, "tiny")
    yield page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)[1]
    page.close()


@pytest.fixture
def client(address) -> Client:
    """A visitor of its own; a conversation belongs to one visitor."""
    return Client(address, verbose=False)


def ask(client: Client, question: str, max_new_tokens: int):
    return client.submit(question, max_new_tokens=max_new_tokens, **SETTINGS, api_name="/chat")


def test_the_reply_arrives_in_growing_pieces_and_is_the_models(client, chat):
    from sft.chat import Sampling
    from sft.prompts import build_prompt

    pieces = list(ask(client, QUESTION, 40))
    assert len(pieces) > 3
    assert all(after.startswith(before) for before, after in zip(pieces, pieces[1:], strict=False))
    assert pieces[-1] == chat.answer([build_prompt(QUESTION)], Sampling(40, temperature=0))[0]


def test_the_second_turn_sees_the_first(client, chat, monkeypatch):
    prompts = []
    generate = chat.generate

    def watched(prompt, *rest, **named):
        prompts.extend(prompt)
        return generate(prompt, *rest, **named)

    monkeypatch.setattr(chat, "generate", watched)
    first = ask(client, QUESTION, 5).result()
    ask(client, "再短一点。", 5).result()
    history = f"Human:{QUESTION}\nAssistant:{first}\nHuman:再短一点。\nAssistant:"
    assert prompts[1].endswith(f"### Instruction:\n{history}\n\n### Response:")


def test_stop_ends_generation_within_one_token(client, chat):
    forwards = []
    hook = chat.model.register_forward_hook(lambda *_: forwards.append(time.monotonic()))
    try:
        job = ask(client, QUESTION, 1500)
        while len(job.outputs()) < 3:
            time.sleep(0.01)
        job.cancel()
        time.sleep(1.0)
        counted = len(forwards)
        time.sleep(1.0)
        assert len(forwards) == counted < 1500
    finally:
        hook.remove()


def test_a_question_without_an_answer_is_left_out():
    from app import answered

    def turn(role: str, text: str) -> dict:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    history = [turn("user", "a"), turn("user", "b"), turn("assistant", "B"), turn("user", "c")]
    assert answered(history) == [{"role": "user", "content": "b"}, {"role": "assistant", "content": "B"}]
    assert answered([]) == answered(history[:1]) == []


def test_the_page_names_every_control_in_both_languages():
    from app import TRANSLATIONS

    assert set(TRANSLATIONS["en"]) == set(TRANSLATIONS["zh"])


@pytest.mark.parametrize("checkpoint", ["nowhere", "tests"])
def test_a_checkpoint_that_is_none_is_one_line_and_exit_code_2(checkpoint):
    command = [sys.executable, "app.py", "--checkpoint", checkpoint]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert checkpoint in result.stderr
