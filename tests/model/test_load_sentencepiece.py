"""Models whose folder has sentencepiece's tokenizer.model and no tokenizer.json."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer, LlamaConfig

from sft.data.encode import Encoder, special_tokens
from sft.data.files import find_shards
from sft.data.formats import Sample, read_samples
from sft.data.load import load_examples
from sft.model.load import load_config, load_tokenizer
from sft.program import UserError
from sft.prompts import build_prompt
from sft.tools.random_model import read_texts
from support.project import SAMPLE

SETTINGS = {  # of tokenizer_config.json; None leaves it out
    "bare": None,
    "llama": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False},
    "llama without bos": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False},
}
LINE = "什么是</s>？ <s>x  <unk>\n\n龘 😀 "


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """Return a function that gives a sentencepiece model of a kind, trained on the sample once."""
    models: dict[str, bytes] = {}

    def trained(kind: str) -> bytes:
        if kind not in models:
            written = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=read_texts(str(SAMPLE)),
                model_writer=written,
                model_type=kind,
                vocab_size=2500,
                byte_fallback=True,
                character_coverage=0.99,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                minloglevel=2,
            )
            models[kind] = written.getvalue()
        return models[kind]

    return trained


@pytest.fixture(params=["bpe", "unigram"])
def make_folder(request: pytest.FixtureRequest, train: Callable[[str], bytes], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that gives the folder of a tiny Llama with only tokenizer.model."""

    def make(settings: dict | None) -> Path:
        LlamaConfig(vocab_size=2500, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
        (tmp_path / "tokenizer.model").write_bytes(train(request.param))
        if settings is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return tmp_path

    return make


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_are_tokenised_as_stock_transformers_does(make_folder: Callable[..., Path], name: str):
    folder = make_folder(SETTINGS[name])
    load_config(str(folder))
    tokenizer, stock = load_tokenizer(str(folder), 2048), AutoTokenizer.from_pretrained(folder)
    rows = [row for shard in find_shards(str(SAMPLE)) for row in read_samples(shard) if not row.history]
    for row, [example] in zip(rows, Encoder(tokenizer).encode(rows), strict=True):
        assert example.prompt == stock(build_prompt(row.instruction, row.input)).input_ids
        assert example.answer == [*stock(row.output, add_special_tokens=False).input_ids, stock.eos_token_id]
        assert (example.prompt[0] == stock.bos_token_id) == (name == "llama")
    asked = [{"role": "user", "content": rows[0].instruction}, {"role": "assistant", "content": rows[0].output}]
    ids = tokenizer.apply_chat_template(asked[:1], return_dict=True)["input_ids"]
    assert ids == stock(build_prompt(rows[0].instruction)).input_ids
    assert tokenizer.apply_chat_template(asked, return_dict=True)["input_ids"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", SETTINGS)
def test_names_of_special_tokens_are_plain_text(make_folder: Callable[..., Path], name: str):
    tokenizer = load_tokenizer(str(make_folder(SETTINGS[name])), 2048)
    special = set(special_tokens(tokenizer).values())
    assert special == {0, 1, 2}
    encoder = Encoder(tokenizer)
    [[example]] = encoder.encode([Sample(LINE, LINE, LINE, "rows:1")])
    assert [id for id in example.prompt + example.answer if id in special] == [1] * (name == "llama") + [2]
    assert tokenizer.decode(example.answer[:-1]) == LINE
    assert tokenizer.decode(example.prompt, skip_special_tokens=True) == build_prompt(LINE, LINE)
    assert encoder.encode_text(build_prompt(LINE, LINE)) == example.prompt


def test_a_folder_of_rows_is_read_and_the_saved_tokenizer_is_the_same(make_folder: Callable[..., Path], tmp_path: Path):
    folder = make_folder(SETTINGS["llama"])
    tokenizer = load_tokenizer(str(folder), 2048)
    _, report = load_examples(str(SAMPLE), tokenizer, str(tmp_path / "cache"))
    assert report.kept == 378 and not report.counts.refused
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(str(tmp_path / "saved"), 2048)
    assert Encoder(saved).encode_text(LINE) == Encoder(tokenizer).encode_text(LINE)
    assert saved(LINE).input_ids == AutoTokenizer.from_pretrained(folder)(LINE).input_ids


def test_a_broken_file_is_refused_in_one_line(make_folder: Callable[..., Path]):
    folder = make_folder(None)
    (folder / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes()[:999])
    with pytest.raises(UserError, match=r"^the tokenizer of .* cannot be loaded .* or tokenizer\.model[^\n]*$"):
        load_tokenizer(str(folder))
