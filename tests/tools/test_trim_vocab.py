"""The data's text is cut as before, its logits are the same, and any other text can be written."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from sft.data.encode import Encoder, special_tokens
from sft.data.formats import Sample
from sft.model.load import load_tokenizer
from sft.program import UserError
from sft.prompts import build_chat_prompt, build_prompt
from sft.tools.random_model import BLOOM_SPECIAL_TOKENS, build_model, read_texts, train_tokenizer
from sft.tools.trim_vocab import Merges, choose, pinned_ids, state_of, trim_model, trimmed_tokenizer
from support.plain_loop import replies_of, tensors_of
from support.project import SAMPLE

FAMILIES = ["bloom-tiny", "falcon-tiny"]
OTHER_TEXT = [
    "Привет, мир! 🌍🚀",
    "مرحبا بالعالم",
    "x² ≈ 3\t\n\n  y\u3000\u0301\0",
    "龘靐齉齾爩",
    "for i in range(10): pass",
]


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """Three rows, which leave half of a tiny vocabulary out."""
    lines = (SAMPLE / "school_math_0.25M.json").read_text(encoding="utf-8").splitlines()[:3]
    path = tmp_path_factory.mktemp("few") / "rows.json"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path, [json.loads(line) for line in lines]


@pytest.fixture
def trim(run: Callable, few_rows: tuple, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that trims a model for the few rows into tmp_path / "small"."""

    def trim(model: Path, *flags: object, data: Path = few_rows[0], code: int = 0) -> subprocess.CompletedProcess:
        result = run("-m", "sft.tools.trim_vocab", model, tmp_path / "small", "--data", data, *flags)
        assert result.returncode == code, result.stdout + result.stderr
        return result

    return trim


def loaded(folder: Path) -> tuple:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


# ----------------------------------------------------------------------------------------------------- from end to end


@pytest.mark.parametrize("shape", FAMILIES)
def test_text_of_the_data_has_the_same_tokens_and_logits(shape, trim, make_model, few_rows, tmp_path):
    trim(make_model(shape))
    (model, tokenizer), (small_model, small_tokenizer) = loaded(make_model(shape)), loaded(tmp_path / "small")
    assert small_model.config.vocab_size == len(small_tokenizer) < 0.7 * len(tokenizer)
    assert len(small_tokenizer) % 64 == 0
    kept = tokenizer.convert_tokens_to_ids(small_tokenizer.convert_ids_to_tokens(range(len(small_tokenizer))))
    assert kept == sorted(kept)
    for task in [task for row in few_rows[1] for task in replies_of(row)]:
        ids, small_ids = tensors_of(task, tokenizer)[0], tensors_of(task, small_tokenizer)[0]
        tokens = tokenizer.convert_ids_to_tokens(ids[0])
        assert small_tokenizer.convert_ids_to_tokens(small_ids[0]) == tokens
        with torch.no_grad():
            logits, small_logits = model(ids).logits, small_model(small_ids).logits
        torch.testing.assert_close(small_logits, logits[..., kept], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("flags", [(), ("--keep_top", 5)])
@pytest.mark.parametrize("shape", FAMILIES)
def test_no_text_is_lost_and_the_special_tokens_are_the_same(shape, flags, trim, make_model, few_rows, tmp_path):
    trim(make_model(shape), *flags)
    (model, tokenizer), (small_model, small_tokenizer) = loaded(make_model(shape)), loaded(tmp_path / "small")
    for text in [*OTHER_TEXT, *(row["output"] for row in few_rows[1])]:
        assert small_tokenizer.decode(small_tokenizer(text).input_ids) == text
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    for settings, small_settings in (
        (model.config, small_model.config),
        (model.generation_config, small_model.generation_config),
    ):
        for old, new in ((getattr(settings, name), getattr(small_settings, name)) for name in names):
            assert tokenizer.decode(old) == small_tokenizer.decode(new) if old is not None else new is None
    assert small_tokenizer.eos_token == tokenizer.eos_token
    messages = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "好"},
        {"role": "user", "content": "？"},
    ]
    asked = small_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == build_chat_prompt(messages)


@pytest.mark.parametrize("shape", FAMILIES)
def test_names_of_special_tokens_stay_plain_text(shape, trim, make_model, few_rows, tmp_path):
    names = "".join(special_tokens(load_tokenizer(str(make_model(shape)))))
    row = {"instruction": f"什么是{names}？", "input": "", "output": f"{names}。{names}"}
    (tmp_path / "rows.json").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    for data in (tmp_path / "rows.json", few_rows[0]):  # with such names, and without
        shutil.rmtree(tmp_path / "small", ignore_errors=True)
        trim(make_model(shape), data=data)
        tokenizer, small = load_tokenizer(str(make_model(shape))), load_tokenizer(str(tmp_path / "small"))
        sample = Sample(row["instruction"], "", row["output"], "rows:1")
        [[before]], [[after]] = Encoder(tokenizer).encode([sample]), Encoder(small).encode([sample])
        assert small.decode(after.answer) == row["output"] + small.eos_token
        assert small.decode(after.prompt) == build_prompt(row["instruction"])
        assert not set(special_tokens(small).values()) & {*after.prompt, *after.answer[:-1]}
        if data != few_rows[0]:
            assert small.convert_ids_to_tokens(after.answer) == tokenizer.convert_ids_to_tokens(before.answer)


def test_the_real_falcon_is_trimmed(trim, real_falcon, few_rows, tmp_path):
    trim(real_falcon)
    (model, tokenizer), (small_model, small_tokenizer) = loaded(real_falcon), loaded(tmp_path / "small")
    assert len(tokenizer) == 65_024 and len(small_tokenizer) == small_model.config.vocab_size < 2_000
    kept = tokenizer.convert_tokens_to_ids(small_tokenizer.convert_ids_to_tokens(range(len(small_tokenizer))))
    for task in [task for row in few_rows[1] for task in replies_of(row)]:
        ids, small_ids = tensors_of(task, tokenizer)[0], tensors_of(task, small_tokenizer)[0]
        assert [kept[id] for id in small_ids[0]] == ids[0].tolist()
        with torch.no_grad():
            logits, small_logits = model(ids).logits, small_model(small_ids).logits
        torch.testing.assert_close(small_logits, logits[..., kept], rtol=1e-6, atol=1e-6)
    for text in [*OTHER_TEXT, "".join(tokenizer.all_special_tokens)]:
        assert small_tokenizer.decode(small_tokenizer(text, split_special_tokens=True).input_ids) == text


def test_what_is_saved_is_said_and_true(trim, make_model, few_rows, tmp_path):
    printed = trim(make_model("bloom-tiny")).stdout
    (model, tokenizer), (small_model, small_tokenizer) = loaded(make_model("bloom-tiny")), loaded(tmp_path / "small")
    before, after = model.num_parameters(), small_model.num_parameters()
    assert before - after == 64 * (len(tokenizer) - len(small_tokenizer))
    occurring = set()
    for task in [task for row in few_rows[1] for task in replies_of(row)]:
        occurring.update(tensors_of(task, tokenizer)[0][0].tolist())
    expected = [
        f"tokens: {len(small_tokenizer):,} of 1,024 kept; {len(occurring):,} occur in the data",
        f"parameters: {after:,} of {before:,}, {1 - after / before:.1%} fewer",
        "the data is split into as many tokens as before",
    ]
    card = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert all(line in printed.splitlines() and f"- {line}\n" in card for line in expected)
    assert "3 rows read: 3 kept" in printed and "3 rows read: 3 kept" in card and "RAIL" in card


def test_the_most_frequent_tokens_are_kept(trim, make_model, few_rows, tmp_path):
    printed = trim(make_model("bloom-tiny"), "--keep_top", 20).stdout
    (_, tokenizer), (_, small_tokenizer) = loaded(make_model("bloom-tiny")), loaded(tmp_path / "small")
    counts: dict[str, int] = {}
    tokens, small_tokens = 0, 0
    for task in [task for row in few_rows[1] for task in replies_of(row)]:
        ids = tensors_of(task, tokenizer)[0][0]
        for token in tokenizer.convert_ids_to_tokens(ids):
            counts[token] = counts.get(token, 0) + 1
        tokens, small_tokens = tokens + len(ids), small_tokens + tensors_of(task, small_tokenizer)[0].shape[1]
    frequent = sorted(counts, key=counts.get)[-15:]  # of equal counts any may be left out
    assert set(frequent) <= set(small_tokenizer.get_vocab())
    assert len(small_tokenizer) < 450 and small_tokens > tokens
    assert f"the data is split into {small_tokens / tokens - 1:.2%} more tokens than before" in printed


def test_what_comes_out_trains_and_answers(make_model, few_rows, run, tmp_path):
    trimmed = run("-m", "sft.tools.trim_vocab", make_model("bloom-tiny"), tmp_path / "small", "--data", few_rows[0])
    assert trimmed.returncode == 0, trimmed.stderr
    flags = ["--data_path", few_rows[0], "--output_dir", tmp_path / "tuned", "--max_steps", 2]
    trained = run("train_sft.py", "--model_name_or_path", tmp_path / "small", *flags)
    assert trained.returncode == 0, trained.stderr
    answered = run("-m", "sft.chat", tmp_path / "tuned", input="你好\n")
    assert answered.returncode == 0, answered.stderr


# ----------------------------------------------------------------------------------------------------- tokens and rows


@pytest.fixture(scope="module", params=["bloom", "falcon"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return train_tokenizer(request.param, read_texts(str(SAMPLE)), 2000)


def kept_for(tokenizer: PreTrainedTokenizerFast, texts: list[str], keep_top: int | None = None) -> list[int]:
    counts = np.bincount(sum(tokenizer(texts).input_ids, []), minlength=len(tokenizer))
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return choose(counts, tokens, Merges(state_of(tokenizer)), pinned_ids(tokenizer, ()), keep_top)


def test_a_token_is_made_of_what_the_tokenizer_merges(tokenizer):
    merges = Merges(state_of(tokenizer))
    model = tokenizer.backend_tokenizer.model
    made = [token for token in tokenizer.get_vocab() if merges.parts_of(token)]
    assert len(made) > 1500
    for token in made:
        assert [piece.value for piece in model.tokenize(token)] == [token]
        first, second = merges.parts_of(token)
        assert first + second == token and merges.ids[token] in merges.made_of(token)


@hypothesis.settings(deadline=None)  # a busy machine is no fault
@hypothesis.given(
    text=st.lists(st.sampled_from([*"的一是a1 ，。\n中文", "小明有", "the ", "答案", "等于", "123"]), max_size=30).map(
        "".join
    )
)
def test_any_text_is_cut_as_before_by_the_vocabulary_made_for_it(tokenizer, text):
    small = trimmed_tokenizer(tokenizer, kept_for(tokenizer, [text]))
    tokens, small_tokens = (each.convert_ids_to_tokens(each(text).input_ids) for each in (tokenizer, small))
    assert small_tokens == tokens


def test_fewer_than_asked_are_filled_with_the_first_of_the_vocabulary(tokenizer):
    kept = kept_for(tokenizer, ["小明"], keep_top=900)
    assert len(kept) % 64 == 0 and len(kept) >= 900
    anyway = kept_for(tokenizer, ["小明"])
    made = [token for token in range(len(tokenizer)) if token not in anyway and token in kept]
    assert len(made) > 400 and max(made) < made[0] + 900 + 64


@pytest.mark.parametrize("is_tied", [True, False])
def test_rows_of_embedding_and_head_stay_with_their_tokens(is_tied):
    model = build_model("bloom-tiny").to(torch.bfloat16)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not is_tied:
        head.weight = torch.nn.Parameter(torch.randn_like(head.weight))
    rows, head_rows = embedding.weight.detach().clone(), head.weight.detach().clone()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 700], pad_token_id=3)
    kept = [0, 1, 2, 3, 5, 700, 1023]
    trim_model(model, kept)
    assert torch.equal(embedding.weight, rows[kept]) and torch.equal(head.weight, head_rows[kept])
    assert (head.weight is embedding.weight) == is_tied and embedding.weight.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [2, 5] and model.config.vocab_size == 7


def test_the_files_keep_their_dtype(trim, make_model, tmp_path):
    AutoModelForCausalLM.from_pretrained(make_model("bloom-tiny"), dtype=torch.float16).save_pretrained(
        tmp_path / "half"
    )
    AutoTokenizer.from_pretrained(make_model("bloom-tiny")).save_pretrained(tmp_path / "half")
    trim(tmp_path / "half")
    assert {tensor.dtype for tensor in load_file(tmp_path / "small" / "model.safetensors").values()} == {torch.float16}


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_a_tokenizer_that_cannot_write_bytes_is_refused(tmp_path):
    pieces = {name: number for number, name in enumerate([*BLOOM_SPECIAL_TOKENS, "a"])}
    backend = Tokenizer(models.WordLevel(pieces, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="is a WordLevel that is not byte-level .*; expected a byte-level BPE"):
        state_of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    backend = Tokenizer(models.BPE({**pieces, "▁": len(pieces)}, [], byte_fallback=True))  # as Llama's
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    with pytest.raises(UserError, match="is a BPE that is not byte-level"):
        state_of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


def test_mistakes_are_refused_in_one_line_and_leave_nothing(trim, make_model, few_rows, tmp_path):
    model, empty = make_model("bloom-tiny"), tmp_path / "empty.json"
    empty.write_text("", encoding="utf-8")
    broken = shutil.copytree(model, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "pad_token_id": 1024, "vocab_size": 1024}))
    for folder, flags, data, message in (
        (model, ["--keep_top", 0], few_rows[0], "error: --keep_top 0 must be 1 or more"),
        (model, ["--keep_top", 1024], few_rows[0], f"drops no token of {model}; give a --keep_top far below 1,024"),
        (model, [], empty, "has no rows to train on"),
        (tmp_path / "none", [], few_rows[0], "is not a folder"),
        (broken, [], few_rows[0], "the model's pad_token_id 1024 is not a token of its tokenizer; correct config.json"),
    ):
        stderr = trim(folder, *flags, data=data, code=2).stderr.strip().splitlines()
        assert message in stderr[-1]
        assert not [path for path in tmp_path.iterdir() if "small" in path.name]
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine").touch()
    assert "already exists; give a new folder" in trim(model, code=2).stderr
    assert load_tokenizer(str(model)).eos_token == "</s>"
