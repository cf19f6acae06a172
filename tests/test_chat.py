"""sft/chat.py: streamed pieces are the full decode, batches are single answers, and every way to end is told."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import TINY_SHAPES
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from sft.chat import GREEDY, ChatModel, Reply, Sampling, cut_at_marker, settled_length
from sft.models import load_tokenizer
from sft.prompts import build_chat_prompt, build_prompt

QUESTIONS = ["你好", "写一首关于春天的诗，要押韵，还要有山有水。", "1+1=?\n为什么？" * 4, "嗯"]
PROMPTS = [build_prompt(question) for question in QUESTIONS]
SHORT = Sampling(max_new_tokens=12, temperature=0)
RARE = "𠀀好😀👨‍👩‍👧é\u0301 Ω\n\n你\u3000\ufeffz"


def load_loud(folder: Path) -> ChatModel:
    """Load a random model with weights so large that what it says depends on the whole prompt."""
    chat = ChatModel.load(str(folder), device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in chat.model.parameters():
            if parameter.ndim == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)
    return chat


@pytest.fixture(scope="module", params=TINY_SHAPES)
def chat(request: pytest.FixtureRequest, make_model: Callable[[str], Path]) -> ChatModel:
    return load_loud(make_model(request.param))


@pytest.fixture(scope="module")
def one_chat(make_model: Callable[[str], Path]) -> ChatModel:
    return load_loud(make_model("bloom-tiny"))


@pytest.fixture(scope="module", params=["bloom-tiny", "falcon-tiny"])
def tokenizer(request: pytest.FixtureRequest, make_model: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(make_model(request.param)))


@pytest.fixture
def on_forward(one_chat: ChatModel) -> Iterator[Callable]:
    """Return a function that has every forward of `one_chat` call another one with its output."""
    handles = []
    yield lambda call: handles.append(one_chat.model.register_forward_hook(lambda *arguments: call(arguments[-1])))
    for handle in handles:
        handle.remove()


class Script:
    """Stands in for a ChatModel: its model "generates" given token ids, the last one when `before_last` returns."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        token_ids: Sequence[int],
        before_last: Callable[[], object] = lambda: None,
    ):
        self.tokenizer = tokenizer
        self.token_ids = token_ids
        self.before_last = before_last

    def generate(self, prompts, sampling, streamer, stopping_criteria):
        streamer.put(torch.tensor([[1, 2, 3]]))
        for token_id in self.token_ids[:-1]:
            streamer.put(torch.tensor([token_id]))
        self.before_last()
        streamer.put(torch.tensor(self.token_ids[-1:]))
        streamer.end()


def reply_of(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> Reply:
    return Reply(Script(tokenizer, token_ids), "", GREEDY)


def byte_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Spell a text with one token for every byte of its UTF-8."""
    [(letters, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return tokenizer.convert_tokens_to_ids(list(letters))


def test_greedy_pieces_are_the_full_decode(chat: ChatModel):
    for prompt in PROMPTS:
        pieces = list(chat.stream(prompt, SHORT))
        full = chat.tokenizer.decode(chat.generate([prompt], SHORT)[0], skip_special_tokens=True)
        assert "".join(pieces) == cut_at_marker(full)[0]
        assert len(pieces) > 1


def test_sampled_junk_pieces_are_the_full_decode(chat: ChatModel):
    sampling = Sampling(max_new_tokens=24, temperature=9.0, top_p=1.0, top_k=0)
    texts = []
    for seed in range(3):
        torch.manual_seed(seed)
        texts.append("".join(chat.stream(PROMPTS[0], sampling)))
        torch.manual_seed(seed)
        full = chat.tokenizer.decode(chat.generate([PROMPTS[0]], sampling)[0], skip_special_tokens=True)
        assert texts[-1] == cut_at_marker(full)[0]
    assert len(set(texts)) == 3
    assert any("\ufffd" in text for text in texts)


def test_any_bytes_stream_to_their_full_decode(tokenizer: PreTrainedTokenizerBase):
    rng = random.Random(0)
    spelled = byte_tokens(tokenizer, RARE + "\n### InstructioHuman:\ufffd")
    for _ in range(100):
        start = rng.randrange(len(spelled))
        token_ids = [*spelled[start : start + 12], *rng.choices(spelled, k=8), tokenizer.eos_token_id, *spelled[:3]]
        assert "".join(reply_of(tokenizer, token_ids)) == tokenizer.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", [RARE, "你好", "😀😀", "a\ufffdb\ufffd", "\nHuman", "\n### Instructor\n"])
def test_bytes_one_at_a_time_stream_to_exactly_the_characters(tokenizer: PreTrainedTokenizerBase, text: str):
    assert "".join(reply_of(tokenizer, byte_tokens(tokenizer, text))) == text


def test_characters_come_one_by_one(tokenizer: PreTrainedTokenizerBase):
    assert list(reply_of(tokenizer, byte_tokens(tokenizer, "𠀀好😀z"))) == ["𠀀", "好", "😀", "z"]


def test_first_piece_comes_before_the_last_token(tokenizer: PreTrainedTokenizerBase):
    first_piece_seen = threading.Event()
    waits = []
    script = Script(tokenizer, byte_tokens(tokenizer, "好的"), lambda: waits.append(first_piece_seen.wait(5)))
    for _ in Reply(script, "", GREEDY):
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


def test_batch_answers_are_the_single_answers(chat: ChatModel):
    single = [chat.answer([prompt], SHORT)[0] for prompt in PROMPTS]
    assert chat.answer(PROMPTS, SHORT) == single
    assert len(set(single)) == len(PROMPTS)


def test_closing_stops_within_one_token(one_chat: ChatModel, on_forward: Callable):
    forwards = []

    def count_slowly(_: object) -> None:
        forwards.append(time.monotonic())
        time.sleep(0.05)

    on_forward(count_slowly)
    reply = one_chat.stream(PROMPTS[0], Sampling(max_new_tokens=200, temperature=0))
    with closing(iter(reply)) as pieces:
        next(pieces)
        before = len(forwards)
    assert len(forwards) <= before + 1
    assert reply.finish_reason == "cancelled"
    time.sleep(0.2)
    assert len(forwards) <= before + 1


def test_closing_before_the_first_piece_stops_too(one_chat: ChatModel):
    reply = one_chat.stream(PROMPTS[0], SHORT)
    iter(reply).close()
    assert reply.finish_reason == "cancelled"
    assert reply.token_ids == []


def test_length_is_the_reason_when_the_limit_is_reached(one_chat: ChatModel):
    reply = one_chat.stream(PROMPTS[0], Sampling(max_new_tokens=5, temperature=0))
    list(reply)
    assert (reply.finish_reason, len(reply.token_ids)) == ("length", 5)


@pytest.mark.parametrize("after", [1, 4])
def test_eos_is_the_reason_when_the_model_ends(one_chat: ChatModel, on_forward: Callable, after: int):
    forwards = []

    def favour_eos(output) -> None:
        forwards.append(1)
        if len(forwards) == after:
            output.logits[..., one_chat.tokenizer.eos_token_id] = 1e9

    on_forward(favour_eos)
    reply = one_chat.stream(PROMPTS[0], SHORT)
    text = "".join(reply)
    assert reply.finish_reason == "eos"
    assert len(reply.token_ids) == after
    assert text == one_chat.tokenizer.decode(reply.token_ids[:-1])


def test_error_in_generation_reaches_the_consumer(one_chat: ChatModel, on_forward: Callable):
    def fail(_: object) -> None:
        raise RuntimeError("out of memory")

    on_forward(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(one_chat.stream(PROMPTS[0], SHORT))


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "简短回答。"}]], ids=["plain", "system"])
def test_oldest_turns_are_left_out_where_they_do_not_fit(
    one_chat: ChatModel, monkeypatch: pytest.MonkeyPatch, system: list[dict]
):
    roles = ["user", "assistant"] * 5
    turns = [{"role": role, "content": f"第{i}句" * 8} for i, role in enumerate(roles[:-1])]
    candidates = [build_chat_prompt([*system, *turns[start:]]) for start in range(0, len(turns), 2)]
    lengths = [len(one_chat.tokenizer(candidate).input_ids) for candidate in candidates]
    assert lengths == sorted(lengths, reverse=True)
    for room in (lengths[0], lengths[0] - 1, lengths[2], lengths[3] - 1, 10):
        monkeypatch.setattr(one_chat.tokenizer, "model_max_length", room + SHORT.max_new_tokens)
        fitting = [prompt for prompt, length in zip(candidates, lengths, strict=True) if length <= room]
        reply = one_chat.reply([*system, *turns], SHORT)
        assert reply.prompt == (fitting or candidates[-1:])[0]


def test_reply_leaves_the_callers_messages_alone(one_chat: ChatModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(one_chat.tokenizer, "model_max_length", 10)
    messages = [{"role": role, "content": "好"} for role in ("user", "assistant", "user")]
    one_chat.reply(messages, SHORT)
    assert len(messages) == 3


def test_temperature_zero_is_plain_greedy_search(chat: ChatModel):
    inputs = chat.tokenizer(PROMPTS[0], return_tensors="pt")
    ids = inputs.input_ids
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, chat.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    expected = ids[:, inputs.input_ids.shape[1] :]
    assert chat.generate([PROMPTS[0]], Sampling(max_new_tokens=6, temperature=0)).tolist() == expected.tolist()


def test_sampling_depends_on_the_seed_and_greedy_does_not(one_chat: ChatModel):
    warm, cold = Sampling(max_new_tokens=12, temperature=5.0), Sampling(max_new_tokens=12, temperature=0)
    answers: dict[Sampling, set[str]] = {warm: set(), cold: set()}
    for sampling, seen in answers.items():
        for seed in range(4):
            torch.manual_seed(seed)
            seen.add(one_chat.answer(PROMPTS[:1], sampling)[0])
    assert (len(answers[warm]), len(answers[cold])) == (4, 1)


def test_checkpoint_is_loaded_in_fp32_on_the_cpu(make_model: Callable[[str], Path]):
    chat = ChatModel.load(str(make_model("falcon-tiny")), device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(make_model("falcon-tiny"))
    assert not chat.model.training
    assert chat.model.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(chat.model.parameters(), plain.parameters(), strict=True))


def test_conversation_without_a_turn_is_refused_as_every_wrong_order(make_model: Callable[[str], Path]):
    chat = ChatModel.load(str(make_model("bloom-tiny")))
    with pytest.raises(ValueError, match="alternates user and assistant"):
        chat.reply([])
