"""A checkpoint computed by llama.cpp: converted once, the same prompt and sampling, and what it falls back to."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from huggingface_hub import constants

from sft.chat.load import load_chat
from sft.chat.model import ChatModel
from sft.chat.remote import ServerError
from sft.chat.sampling import Sampling
from sft.program import UserError
from support.adapters import save_adapter_and_merged

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
SHORT = Sampling(max_new_tokens=8, temperature=0)
QUESTION = [{"role": "user", "content": "写一首诗。"}]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what is converted in a folder of this test alone."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(constants, "HF_HOME", str(folder))
    return folder


def files_in(cache: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in cache.rglob("*.gguf")}


@pytest.mark.parametrize("shape", ["bloom-tiny", "falcon-tiny"])
def test_a_prompt_has_the_ids_of_the_model_of_transformers(make_model: Callable[[str], Path], shape: str):
    ours, plain = load_chat(str(make_model(shape)), quantization="q8_0"), ChatModel.load(str(make_model(shape)), "cpu")
    long = [*QUESTION, {"role": "assistant", "content": "好" * 3000}, {"role": "user", "content": "</s>再写"}]
    for messages in (QUESTION, long):
        reply, expected = ours.reply(messages, SHORT), plain.reply(messages, SHORT)
        assert reply.asked["prompt"] == expected.prompt and reply.sampling == expected.sampling
        assert reply.turns_left_out == expected.turns_left_out == (messages is long)
        list(reply)
        assert 0 < reply.num_tokens <= 8 and reply.finish_reason in ("eos", "length")
    assert str(ours) == "q8_0 by llama.cpp, cpu"
    assert ours.answer(["一", "二"], SHORT) == ["".join(ours.stream(each, SHORT)) for each in ("一", "二")]


def test_a_seed_repeats_an_answer_and_sampling_numbers_reach_it(make_model: Callable[[str], Path]):
    chat = load_chat(str(make_model("falcon-tiny")), quantization="q8_0")

    def said(**numbers: float) -> str:
        return "".join(chat.reply(QUESTION, Sampling(max_new_tokens=30, temperature=1.0, top_p=1.0, **numbers)))

    assert said(seed=5) == said(seed=5) != said(seed=6)
    greedy = "".join(chat.reply(QUESTION, Sampling(max_new_tokens=30, temperature=0)))
    assert said(seed=5, top_k=1) == greedy
    assert "".join(chat.reply(QUESTION, Sampling(max_new_tokens=30, temperature=0, repetition_penalty=1.9))) != greedy


def test_a_checkpoint_is_converted_once_and_anew_when_it_has_changed(
    make_model: Callable[[str], Path], tmp_path: Path, cache: Path
):
    folder = Path(shutil.copytree(make_model("bloom-tiny"), tmp_path / "mine"))
    load_chat(str(folder), quantization="q8_0")
    first = files_in(cache)
    load_chat(str(folder), quantization="q8_0")
    assert files_in(cache) == first and list(first) == ["q8_0.gguf"]
    load_chat(str(folder), quantization="q4_k_m")
    assert files_in(cache).keys() == {"q8_0.gguf", "q4_k_m.gguf"} and first.items() <= files_in(cache).items()
    shutil.copy(make_model("bloom-tiny") / "config.json", folder / "config.json")
    (folder / "config.json").touch()
    load_chat(str(folder), quantization="q4_k_m")
    assert list(files_in(cache)) == ["q4_k_m.gguf"]  # what was made of the old one is gone


def test_a_length_that_the_tokenizer_does_not_know_is_the_models(make_model: Callable[[str], Path], tmp_path: Path):
    folder = Path(shutil.copytree(make_model("bloom-tiny"), tmp_path / "mine"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert load_chat(str(folder), quantization="q8_0").encoder.max_length == 2048


def test_an_adapter_answers_merged_into_its_base(make_model: Callable[[str], Path], tmp_path: Path):
    save_adapter_and_merged(make_model("bloom-tiny"), tmp_path)
    found = [
        load_chat(str(tmp_path / name), quantization="q8_0").answer(["一二三"], SHORT) for name in ("adapter", "merged")
    ]
    alone = load_chat(str(make_model("bloom-tiny")), quantization="q8_0").answer(["一二三"], SHORT)
    assert found[0] == found[1] != alone


@pytest.mark.parametrize("shape", ["falcon-tiny-rw"])
def test_what_llama_cpp_cannot_compute_keeps_its_weights_and_says_so(make_model, capsys, cache: Path, shape: str):
    chat = load_chat(str(make_model(shape)), quantization="q8_0")
    assert isinstance(chat, ChatModel) and not files_in(cache)
    said = capsys.readouterr().err
    assert "--quantize q8_0 is left out: " in said and "is a Falcon with ALiBi" in said


def test_a_gpu_or_a_missing_package_is_one_line(make_model, monkeypatch: pytest.MonkeyPatch):
    folder = str(make_model("bloom-tiny"))
    with pytest.raises(UserError, match="--quantize q8_0 needs the CPU, and --device is cuda"):
        load_chat(folder, "cuda", "q8_0")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(UserError, match="--quantize q4_k_m needs llama.cpp .*; type pip install xllamacpp==20"):
        load_chat(folder, "auto", "q4_k_m")


def test_a_broken_file_says_what_to_do(make_model, cache: Path):
    load_chat(str(make_model("bloom-tiny")), quantization="q8_0")
    [file] = cache.rglob("*.gguf")
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match=f"llama.cpp cannot load {file}.*; delete it and start again"):
        load_chat(str(make_model("bloom-tiny")), quantization="q8_0")


def test_only_this_process_may_ask(make_model):
    chat = load_chat(str(make_model("bloom-tiny")), quantization="q8_0")
    asked = {"prompt": "一", "max_tokens": 1}
    assert httpx.post(f"{chat.server.listening_address}/v1/completions", json=asked).status_code == 401


def test_a_reply_that_is_closed_stops_and_the_next_one_is_whole(make_model):
    chat = load_chat(str(make_model("falcon-tiny")), quantization="q8_0")
    expected = "".join(chat.reply(QUESTION, SHORT))
    reply, events = chat.reply(QUESTION, Sampling(max_new_tokens=1900, temperature=0)), []
    receive = reply.receive
    reply.receive = lambda event: (events.append(event), time.sleep(0.01), receive(event))
    growing = iter(reply)
    next(growing)
    growing.close()
    assert reply.finish_reason == "cancelled" and len(events) < 100
    assert "".join(chat.reply(QUESTION, SHORT)) == expected


def test_what_llama_cpp_refuses_is_an_error(make_model):
    chat = load_chat(str(make_model("bloom-tiny")), quantization="q8_0")
    with pytest.raises(ServerError, match="^llama.cpp: .*context"):
        list(chat.stream("很" * 5000, SHORT))


NO_TORCH = """
import sys
from sft.chat.load import load_chat
chat = load_chat(sys.argv[1], quantization="q8_0")
print(repr("".join(chat.stream("一"))[:0]), sorted({"torch", "gradio"} & sys.modules.keys()))
"""


def test_the_second_time_pytorch_is_not_imported(make_model, run, cache: Path):
    for expected in (["torch"], []):
        result = run("-c", NO_TORCH, make_model("bloom-tiny"), HF_HOME=str(cache))
        assert result.stdout.splitlines()[-1] == f"'' {expected}", result.stderr
