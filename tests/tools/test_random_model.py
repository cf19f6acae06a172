"""The shapes are the families' own, seeded, and their tokenizers lose nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sft.tools.random_model import build_model
from support.project import TINY_SHAPES

TEXTS = [
    "你好，世界！",
    "  两个空格在前，两个在后  ",
    "\n\n\t\r\n　全角空格　",
    "😀👨‍👩‍👧‍👦🇨🇳 e\u0301",
    "𠀀𪛖𫝀 㐀䶵 鿿",
    "".join(map(chr, range(128))),
    "\u200b\u2028\u2029\ufeff\ufffd\x85\xa0",
    "don't , a . b ? 1234567 3.14 (x|y)",
    "العربية हिन्दी। русский ไทย",
    "def f(x):\n    return {'a': [x, 1]}\n",
]


@pytest.mark.parametrize("shape", TINY_SHAPES)
def test_plain_transformers_loads_it(make_model: Callable[[str], Path], shape: str):
    model = AutoModelForCausalLM.from_pretrained(make_model(shape))
    family = "Bloom" if shape.startswith("bloom") else "Falcon"
    assert type(model).__name__ == f"{family}ForCausalLM"
    assert model.config.architectures == [f"{family}ForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(make_model(shape))
    assert len(tokenizer) <= model.config.vocab_size
    assert tokenizer.eos_token_id == model.config.eos_token_id
    with torch.no_grad():
        assert model(**tokenizer("你好", return_tensors="pt")).logits.isfinite().all()


@pytest.mark.parametrize("shape", TINY_SHAPES)
def test_the_seed_decides_the_weights(shape: str):
    first, again, other = (build_model(shape, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_five_tiny_shapes_are_five_forms():
    configs = {shape: build_model(shape).config for shape in TINY_SHAPES}
    assert configs["bloom-tiny"].n_head == 4
    assert configs["bloom-tiny-6-heads"].n_head == 6
    falcons = [configs[shape] for shape in TINY_SHAPES if shape.startswith("falcon")]
    assert [(config.rotary, config.new_decoder_architecture) for config in falcons] == [
        (True, False),
        (True, True),
        (False, False),
    ]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("bloom-560m", 559_214_592),
        ("bloom-1b1", 1_065_314_304),
        ("bloom-1b7", 1_722_408_960),
        ("bloom-3b", 3_002_557_440),
        ("bloom-7b1", 7_069_016_064),
        ("falcon-7b", 6_921_720_704),
    ],
)
def test_real_shapes_have_the_published_number_of_parameters(shape: str, expected: int):
    with torch.device("meta"):
        model = build_model(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerBase, text: str):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def cut(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in pieces]


def test_bloom_joins_the_colon_to_the_answer(make_model: Callable[[str], Path]):
    tokenizer = AutoTokenizer.from_pretrained(make_model("bloom-tiny"))
    assert cut(tokenizer, "Response:你好") == ["Response:你好"]
    assert cut(tokenizer, "Response:你好，世界") == ["Response:你好", "，", "世界"]


def test_falcon_cuts_at_the_colon(make_model: Callable[[str], Path]):
    tokenizer = AutoTokenizer.from_pretrained(make_model("falcon-tiny"))
    assert cut(tokenizer, "Response:你好")[:2] == ["Response", ":"]
    assert cut(tokenizer, "12345") == ["123", "45"]


def test_special_tokens_have_the_families_ids(make_model: Callable[[str], Path]):
    bloom, falcon = (AutoTokenizer.from_pretrained(make_model(shape)) for shape in ("bloom-tiny", "falcon-tiny"))
    assert bloom.convert_ids_to_tokens([0, 1, 2, 3]) == ["<unk>", "<s>", "</s>", "<pad>"]
    assert (bloom.bos_token_id, bloom.eos_token_id, bloom.pad_token_id) == (1, 2, 3)
    assert falcon.convert_ids_to_tokens(11) == falcon.eos_token == "<|endoftext|>"
    assert falcon.pad_token is None
