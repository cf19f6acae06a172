"""Pieces are the full decode to the character."""

import queue
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from sft.chat.model import GeneratedReply
from sft.chat.reply import Reply, cut_at_marker, settled_length
from sft.chat.sampling import GREEDY
from sft.data.encode import Encoder, special_tokens
from sft.data.formats import Sample
from sft.model.load import load_tokenizer

RARE = "𠀀好😀👨‍👩‍👧é\u0301 Ω\n\n你\u3000\ufeffz"
# Every character of the planes in which GB18030 has Chinese, and of the emoji; surrogates and private use are none.
PLANES = [range(0xA0, 0xD800), range(0xF900, 0x10000), range(0x1F000, 0x1FB00), range(0x20000, 0x323B0)]
CHARACTERS = [chr(code) for plane in PLANES for code in plane if chr(code).isprintable()]


@pytest.fixture(scope="module", params=["bloom-tiny", "falcon-tiny"])
def tokenizer(request: pytest.FixtureRequest, make_model: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(make_model(request.param)))


class Script:
    """Stands in for a model: "generates" given token ids, the last one after `before_last` returns."""

    def __init__(self, token_ids: Sequence[int], before_last: Callable[[], object] = lambda: None):
        self.token_ids = token_ids
        self.before_last = before_last

    def generate(self, prompts, sampling, streamer, stopping_criteria):
        streamer.put(torch.tensor([[1, 2, 3]]))
        for token_id in self.token_ids[:-1]:
            streamer.put(torch.tensor([token_id]))
        self.before_last()
        streamer.put(torch.tensor(self.token_ids[-1:]))
        streamer.end()


class OneByOne(queue.SimpleQueue):
    """Seems to hold one token, however many have come."""

    def qsize(self) -> int:
        return 1


def reply_of(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> Reply:
    """Return a reply that takes one token after another."""
    reply = GeneratedReply(Script(token_ids).generate, tokenizer, "", GREEDY)
    reply._arrived = OneByOne()
    return reply


def byte_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Spell a text with one token for every byte of its UTF-8."""
    [(letters, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return tokenizer.convert_tokens_to_ids(list(letters))


def test_any_bytes_stream_to_their_full_decode(tokenizer: PreTrainedTokenizerBase):
    rng = random.Random(0)
    spelled = byte_tokens(tokenizer, RARE + "\n### InstructioHuman:\ufffd")
    for _ in range(100):
        start = rng.randrange(len(spelled))
        token_ids = [*spelled[start : start + 12], *rng.choices(spelled, k=8), tokenizer.eos_token_id, *spelled[:3]]
        assert "".join(reply_of(tokenizer, token_ids)) == tokenizer.decode(token_ids, skip_special_tokens=True)


def test_an_answer_about_special_tokens_streams_as_it_is_and_ends_at_eos_alone(tokenizer: PreTrainedTokenizerBase):
    names = "".join(special_tokens(tokenizer))
    for text in (names, f"{tokenizer.eos_token}是 {names}。", f"好{tokenizer.eos_token}"):
        [[example]] = Encoder(tokenizer).encode([Sample("问", "", text, "rows:1")])
        reply = reply_of(tokenizer, example.answer)
        assert "".join(reply) == text
        assert reply.finish_reason == "eos"
        cut = reply_of(tokenizer, example.answer[:-1])
        assert "".join(cut) == text
        assert cut.finish_reason == "length"


@pytest.mark.parametrize("text", [RARE, "你好", "😀😀", "a\ufffdb\ufffd", "\nHuman", "\n### Instructor\n"])
def test_bytes_one_at_a_time_stream_to_exactly_the_characters(tokenizer: PreTrainedTokenizerBase, text: str):
    assert "".join(reply_of(tokenizer, byte_tokens(tokenizer, text))) == text


def test_characters_come_one_by_one(tokenizer: PreTrainedTokenizerBase):
    assert list(reply_of(tokenizer, byte_tokens(tokenizer, "𠀀好😀z"))) == ["𠀀", "好", "😀", "z"]


def test_tokens_that_come_while_nobody_asks_are_decoded_at_once(tokenizer: PreTrainedTokenizerBase, monkeypatch):
    decoded, decode = [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **named: decoded.append(len(ids)) or decode(ids, **named))
    token_ids, all_here = byte_tokens(tokenizer, "春眠不觉晓，处处闻啼鸟。"), threading.Event()
    script, pieces = Script(token_ids, all_here.set), []
    for piece in GeneratedReply(script.generate, tokenizer, "", GREEDY):
        pieces.append(piece)
        assert all_here.wait(5)
    assert "".join(pieces) == "春眠不觉晓，处处闻啼鸟。"
    assert len(decoded) <= 8 < len(token_ids) == decoded[-1]


def test_first_piece_comes_before_the_last_token(tokenizer: PreTrainedTokenizerBase):
    first_piece_seen = threading.Event()
    waits = []
    script = Script(byte_tokens(tokenizer, "好的"), lambda: waits.append(first_piece_seen.wait(5)))
    for _ in GeneratedReply(script.generate, tokenizer, "", GREEDY):
        first_piece_seen.set()
    assert waits == [True]


@pytest.mark.parametrize(
    ("text", "settled"),
    [
        ("", 0),
        ("你好", 2),
        ("你\ufffd", 1),
        ("\ufffd\ufffd", 1),
        ("\ufffd好", 2),
        ("好\n", 1),
        ("好\nHum", 1),
        ("好\nHuman", 1),
        ("好\n### Instructio", 1),
        ("好\n\n", 2),
        ("好\nHumus", 7),
        ("好\n#\ufffd", 3),
        ("好\nHum!", 6),
        ("Hum", 3),
    ],
)
def test_settled_length(text: str, settled: int):
    assert settled_length(text) == settled


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("好", ("好", False)),
        ("好\nHuman", ("好\nHuman", False)),
        ("好\nHuman:再问", ("好", True)),
        ("好\n\n### Instruction:\n", ("好\n", True)),
        ("一\n### Instruction\nHuman:", ("一", True)),
        ("一\nHuman:\n### Instruction", ("一", True)),
        ("Human:", ("Human:", False)),
    ],
)
def test_cut_at_marker(text: str, cut: tuple[str, bool]):
    assert cut_at_marker(text) == cut


def test_reply_that_runs_into_the_next_turn_is_cut(tokenizer: PreTrainedTokenizerBase):
    reply = reply_of(tokenizer, byte_tokens(tokenizer, "好的。\nHuman:再问\nAssistant:嗯"))
    assert "".join(reply) == "好的。"
    assert reply.finish_reason == "marker"


def test_text_after_a_literal_replacement_character_is_not_held_back(tokenizer: PreTrainedTokenizerBase):
    assert list(reply_of(tokenizer, byte_tokens(tokenizer, "一\ufffd二三")))[-2:] == ["二", "三"]


def test_every_character_of_gb18030_and_every_emoji_streams_as_bytes(tokenizer: PreTrainedTokenizerBase):
    assert len(CHARACTERS) > 100_000
    for start in range(0, len(CHARACTERS), 16):
        text = "".join(CHARACTERS[start : start + 16])
        assert text.encode("gb18030").decode("gb18030") == text
        token_ids = byte_tokens(tokenizer, text)
        assert len(token_ids) == len(text.encode())
        pieces = list(reply_of(tokenizer, token_ids))
        assert "".join(pieces) == text == tokenizer.decode(token_ids)
        assert len(pieces) == len(text)
