"""An answer is shown as it grows, however fast that is, and the page keeps no model waiting."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sft.chat.model import ChatModel
from sft.chat.sampling import Sampling
from sft.web import answering
from sft.web.answering import Answering, pause_after
from sft.web.visitors import Visitor, WaitingLine

MESSAGES = [{"role": "user", "content": "写一首关于梅花的诗。"}]
SAMPLING = Sampling(max_new_tokens=40, temperature=0)


def test_pauses_are_short_after_quick_updates_and_a_share_of_slow_ones():
    quick, slow, slowest = [pause_after(seconds) for seconds in (0.001, 0.05, 9)]
    assert quick == answering.PAUSE < slow == 0.05 * answering.PAUSES_PER_UPDATE < slowest == answering.LONGEST_PAUSE


def test_tokens_that_come_during_a_pause_are_one_update(make_model: Callable[[str], Path], monkeypatch):
    chat = ChatModel.load(str(make_model("bloom-tiny")), "cpu", dtype="float32")
    expected = "".join(chat.reply(MESSAGES, SAMPLING))
    decoded, decode = [], chat.tokenizer.decode
    monkeypatch.setattr(chat.tokenizer, "decode", lambda *given, **named: decoded.append(1) or decode(*given, **named))
    all_generated, generate = threading.Event(), chat.generate
    monkeypatch.setattr(chat, "generate", lambda *given, **named: (generate(*given, **named), all_generated.set()))

    async def pause(seconds: float) -> None:
        assert seconds >= answering.PAUSE and await asyncio.to_thread(all_generated.wait, 20)

    async def read() -> list[str]:
        page = Answering([chat], WaitingLine(2, 10))
        return [
            answer async for each in page.answer(Visitor("s", "我"), [MESSAGES], SAMPLING) for answer in each.answers
        ]

    monkeypatch.setattr(asyncio, "sleep", pause)
    answers = asyncio.run(read())
    assert answers[-1] == expected and all(expected.startswith(each) for each in answers)
    assert len(set(answers)) <= 4 and len(decoded) <= 10


@pytest.mark.parametrize("num_replies", [1, 2])
def test_every_reply_arrives_whole(make_model: Callable[[str], Path], monkeypatch, num_replies: int):
    chats = [ChatModel.load(str(make_model(shape)), "cpu", dtype="float32") for shape in ("bloom-tiny", "falcon-tiny")]
    monkeypatch.setattr(answering, "pause_after", lambda seconds: 0)

    async def read() -> list[str]:
        page, asked = Answering(chats, WaitingLine(2, 10)), [MESSAGES] * num_replies
        return [each.answers async for each in page.answer(Visitor("s", "我"), asked, SAMPLING)][-1]

    assert asyncio.run(read()) == ["".join(chat.reply(MESSAGES, SAMPLING)) for chat in chats[:num_replies]]
