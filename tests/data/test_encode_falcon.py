"""The tokenizer of the real Falcon: the template's length, every sample row, and llama.cpp's own texts."""

import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.tokenise import FALCON_TOKENIZER
from sft.data.cache import LOST
from sft.data.encode import Encoder, special_tokens
from sft.data.files import find_shards
from sft.data.formats import Sample, read_samples
from sft.data.load import load_examples
from sft.model.load import load_tokenizer
from sft.prompts import build_prompt
from sft.tools.random_model import FALCON_SPECIAL_TOKENS
from support.project import SAMPLE

CASES = json.loads((FALCON_TOKENIZER / "cases.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer(real_falcon: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(real_falcon), 2048)


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    return Encoder(tokenizer)


def test_llama_cpp_has_the_same_ids(encoder: Encoder):
    texts, expected = zip(*CASES, strict=True)
    assert len(texts) == 45
    assert [encoder.encode_text(text) for text in texts] == list(expected)


@pytest.mark.parametrize(("input", "expected"), [("", 23), ("猫", 32)], ids=["without input", "with input"])
def test_the_prompt_begins_with_so_many_tokens(encoder: Encoder, input: str, expected: int):
    before = build_prompt("|", input).partition("|")[0]
    ids = encoder.encode_text(before)
    assert len(ids) == expected
    for question in ("天空为什么是蓝的？", "Why?", "1 + 1", " 空格"):
        [[example]] = encoder.encode([Sample(question, input, "好", "rows:1")])
        assert example.prompt[:expected] == ids


def test_rows_are_tokenised_as_stock_transformers_does(real_falcon: Path, encoder: Encoder):
    stock, generator = AutoTokenizer.from_pretrained(real_falcon), random.Random(0)
    assert len(encoder.template_ids) == 4 and len(stock) == 65_024
    rows = [row for shard in find_shards(str(SAMPLE)) for row in read_samples(shard) if not row.history]
    texts = [text for text, _ in CASES] + [f" {text}" for text, _ in CASES]
    rows += [Sample(*generator.choices(texts, k=3), "made") for _ in range(300)]
    for row, [example] in zip(rows, encoder.encode(rows), strict=True):
        assert example.prompt == stock(build_prompt(row.instruction, row.input)).input_ids
        assert example.answer == stock(row.output).input_ids + [stock.eos_token_id]
        assert stock.decode(example.answer[:-1]) == row.output


def test_names_of_special_tokens_are_plain_text(encoder: Encoder):
    special = special_tokens(encoder.tokenizer)
    assert list(special) == FALCON_SPECIAL_TOKENS and list(special.values()) == list(range(12))
    for text in ("".join(special), *(f"什么是{name}？ {name}\n" for name in special)):
        [[example]] = encoder.encode([Sample(text, text, text, "rows:1")])
        assert not set(range(12)) & {*example.prompt, *example.answer[:-1]}
        assert encoder.tokenizer.decode(example.answer) == text + "<|endoftext|>"


def test_rows_with_control_characters_that_the_vocabulary_lacks_are_counted(real_falcon: Path, tmp_path: Path):
    rows = [{"q": f"第{number}行{char}？", "a": "好"} for number, char in enumerate("\x0b\x1c\t\n好\x00")]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    examples, report = load_examples(str(tmp_path / "rows.json"), load_tokenizer(str(real_falcon)), str(tmp_path))
    backend = AutoTokenizer.from_pretrained(real_falcon)
    lost = [row["q"] for row in rows if row["q"] not in backend.decode(backend(row["q"]).input_ids)]
    assert len(lost) == 2 and report.counts.files[0]["remarks"] == {LOST: 2}
