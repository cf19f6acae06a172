"""Loading of every kind, batches are single answers, and every way to end is told."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sft.chat import model as chat_model
from sft.chat.model import ChatModel, Threads, num_weights
from sft.chat.reply import cut_at_marker
from sft.chat.sampling import Sampling
from sft.data.encode import special_tokens
from sft.data.formats import Sample
from sft.model.load import load_tokenizer
from sft.program import UserError
from sft.prompts import build_chat_prompt, build_prompt
from sft.tools.random_model import SHAPES
from support.project import TINY_SHAPES

QUESTIONS = ["你好", "写一首关于春天的诗，要押韵，还要有山有水。", "1+1=?\n为什么？" * 4, "嗯"]
PROMPTS = [build_prompt(question) for question in QUESTIONS]
SHORT = Sampling(max_new_tokens=12, temperature=0)
RARE = "𠀀好😀👨‍👩‍👧é\u0301 Ω\n\n你\u3000\ufeffz"


def load_loud(folder: Path) -> ChatModel:
    """Load a random model with weights so large that what it says depends on the whole prompt."""
    chat = ChatModel.load(str(folder), "cpu", dtype="float32")
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


@pytest.fixture
def on_forward(one_chat: ChatModel) -> Iterator[Callable]:
    """Return a function that has every forward of `one_chat` call another one with its output."""
    handles = []
    yield lambda call: handles.append(one_chat.model.register_forward_hook(lambda *arguments: call(arguments[-1])))
    for handle in handles:
        handle.remove()


def test_greedy_pieces_are_the_full_decode(chat: ChatModel):
    for prompt in PROMPTS:
        pieces = list(chat.stream(prompt, SHORT))
        full = chat.tokenizer.decode(chat.generate([prompt], SHORT)[0], skip_special_tokens=True)
        assert "".join(pieces) == cut_at_marker(full)[0]


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
    for room in (lengths[0], lengths[0] - 1, lengths[2], lengths[3] - 1, lengths[-1]):
        monkeypatch.setattr(one_chat.encoder, "max_length", room + SHORT.max_new_tokens)
        fitting = next(number for number, length in enumerate(lengths) if length <= room)
        reply = one_chat.reply([*system, *turns], SHORT)
        assert one_chat.tokenizer.decode(reply.prompt) == candidates[fitting]
        assert (reply.turns_left_out, reply.tokens_left_out) == (fitting, 0)
        assert reply.sampling == SHORT


def test_question_that_does_not_fit_loses_its_beginning_and_keeps_the_template(
    one_chat: ChatModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(one_chat.encoder, "max_length", 200)
    messages = [{"role": role, "content": "从前有座山。" * 200} for role in ("user", "assistant", "user")]
    reply = one_chat.reply(messages, Sampling(max_new_tokens=500))
    text = one_chat.tokenizer.decode(reply.prompt)
    assert len(reply.prompt) <= 100 and reply.turns_left_out == 1
    assert reply.tokens_left_out == len(one_chat.tokenizer(build_prompt(messages[0]["content"])).input_ids) - len(
        reply.prompt
    )
    before, after = build_prompt("|").split("|")
    assert text.startswith(before) and text.endswith("从前有座山。" + after)
    assert reply.sampling.max_new_tokens == 200 - len(reply.prompt)


def test_reply_leaves_the_callers_messages_alone(one_chat: ChatModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(one_chat.encoder, "max_length", 10)
    messages = [{"role": role, "content": "好"} for role in ("user", "assistant", "user")]
    one_chat.reply(messages, SHORT)
    assert len(messages) == 3


def test_message_with_the_name_of_a_special_token_is_the_prompt_of_training(chat: ChatModel):
    special = special_tokens(chat.tokenizer)
    texts = ["".join(special), *(f"什么是{name}？{name}" for name in special)]
    for question in texts:
        turns = [(question, f"{question}。"), (f" {question}", question)]
        messages = [{"role": "system", "content": question}]
        for asked, said in turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        sample = Sample(question, "", "答", "rows:1", turns, f"{question}\n")
        [examples] = chat.encoder.encode([sample])
        reply = chat.reply([*messages, {"role": "user", "content": question}], SHORT)
        assert reply.prompt == examples[-1].prompt
        assert not set(special.values()) & set(reply.prompt)
        assert chat.tokenizer.decode(reply.prompt).endswith(f"{question}\nAssistant:\n\n### Response:")


def test_prompt_that_is_text_is_plain_text(chat: ChatModel, monkeypatch: pytest.MonkeyPatch):
    seen, prompt = [], build_prompt(f"什么是{chat.tokenizer.eos_token}？")
    generate = chat.model.generate
    monkeypatch.setattr(chat.model, "generate", lambda **given: seen.append(given["input_ids"]) or generate(**given))
    list(chat.stream(prompt, SHORT))
    chat.answer([prompt], SHORT)
    expected = chat.encoder.encode_prompt(Sample(f"什么是{chat.tokenizer.eos_token}？", "", "", ""), 1)[0]
    assert [ids.tolist() for ids in seen] == [[expected], [expected]]
    assert chat.tokenizer.eos_token_id not in expected


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


@pytest.mark.parametrize("has_instructions", [True, False])
def test_weights_on_a_cpu_are_bf16_where_it_computes_in_it(
    make_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, has_instructions: bool
):
    capabilities = {"avx512_bf16": has_instructions, "avx2": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    chat = ChatModel.load(str(make_model("falcon-tiny")), device="cpu")
    dtype = torch.bfloat16 if has_instructions else torch.float32
    plain = AutoModelForCausalLM.from_pretrained(make_model("falcon-tiny"), dtype=dtype)
    assert not chat.model.training
    assert all(torch.equal(a, b) for a, b in zip(chat.model.parameters(), plain.parameters(), strict=True))
    assert str(chat) == f"falcon, {'bfloat16' if has_instructions else 'float32'}, cpu"


@pytest.mark.parametrize("shape", ["bloom-tiny", "falcon-tiny"])
def test_lora_folder_answers_as_its_base_with_the_adapter(
    make_model: Callable[[str], Path], tmp_path: Path, shape: str
):
    base = AutoModelForCausalLM.from_pretrained(make_model(shape))
    config = LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path)
    chat = ChatModel.load(str(tmp_path), "cpu", dtype="float32")
    ids = chat.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    with torch.inference_mode():
        expected, without = adapted(ids).logits, adapted.disable_adapter
        torch.testing.assert_close(chat.model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        with without():
            assert (adapted(ids).logits - expected).abs().max() > 1e-3
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "nowhere/x"}))
    with pytest.raises(UserError, match="LoRA adapter whose base model cannot be found.*nowhere/x"):
        ChatModel.load(str(tmp_path), "cpu")
    other = "falcon-tiny" if shape == "bloom-tiny" else "bloom-tiny"
    wrong = {**settings, "base_model_name_or_path": str(make_model(other))}
    (tmp_path / "adapter_config.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match="does not fit its base model"):
        ChatModel.load(str(tmp_path), "cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "gpu", "tpu:0"])
def test_device_that_is_not_here_is_refused(make_model: Callable[[str], Path], device: str):
    if torch.cuda.is_available() and device == "cuda":
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=f"--device {device}: .*(expected|type --device cpu)"):
        ChatModel.load(str(make_model("bloom-tiny")), device)


def test_length_that_the_tokenizer_does_not_know_is_the_configs(make_model: Callable[[str], Path]):
    folder = make_model("bloom-tiny")
    tokenizer = load_tokenizer(str(folder), model_max_length=int(1e30))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.seq_length = 777
    assert ChatModel(model, tokenizer).encoder.max_length == 777


def test_conversation_without_a_turn_is_refused_as_every_wrong_order(make_model: Callable[[str], Path]):
    chat = ChatModel.load(str(make_model("bloom-tiny")))
    with pytest.raises(ValueError, match="alternates user and assistant"):
        chat.reply([])


def test_a_small_model_generates_with_one_thread_and_a_large_one_with_all(
    make_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    usual, numbers = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        small = ChatModel.load(str(make_model("falcon-tiny")), "cpu")
        monkeypatch.setattr(chat_model, "SMALL", 1000)
        large = ChatModel.load(str(make_model("falcon-tiny")), "cpu")
        for chat in (small, large):
            chat.model.register_forward_hook(lambda *_: numbers.append(torch.get_num_threads()))
            assert list(chat.stream(PROMPTS[0], SHORT)) and chat.answer(PROMPTS[:1], SHORT)
            assert torch.get_num_threads() == 3
        assert numbers == [1] * (len(numbers) // 2) + [3] * (len(numbers) // 2)
    finally:
        torch.set_num_threads(usual)


def test_the_usual_number_of_threads_comes_back_after_the_last_of_several_generations():
    usual, threads = torch.get_num_threads(), Threads()
    torch.set_num_threads(3)
    try:
        first, second = threads.limited_to(1), threads.limited_to(1)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 1
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(usual)


def test_the_demo_is_small_and_every_published_model_is_not():
    numbers = {}
    for shape in ("bloom-demo", "falcon-demo", "bloom-560m", "bloom-154m"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(SHAPES[shape])
        numbers[shape] = num_weights(model)
    assert max(numbers["bloom-demo"], numbers["falcon-demo"]) < chat_model.SMALL
    assert min(numbers["bloom-154m"], numbers["bloom-560m"]) > chat_model.SMALL
