"""Both families loaded, and every mistake told in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors
from transformers import BertConfig, BloomConfig, T5Config

from sft.model.download import locate
from sft.model.load import load_config, load_model, load_tokenizer
from sft.program import UserError
from sft.prompts import build_chat_prompt
from support.project import TINY_SHAPES

MESSAGES = [{"role": "user", "content": "你好"}]


@pytest.fixture
def copy_model(make_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that gives a copy of a random model's folder, to be changed."""
    return lambda shape, name="copy": Path(shutil.copytree(make_model(shape), tmp_path / name))


def edit_json(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def error_of(action: Callable, argument: object) -> str:
    with pytest.raises(UserError) as caught:
        action(str(argument))
    message = str(caught.value)
    assert str(argument) in message
    assert "\n" not in message
    return message


def test_folder_without_config_is_refused(tmp_path: Path):
    assert "without config.json" in error_of(load_config, tmp_path)


def test_adapter_is_not_taken_for_a_model_to_train(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is a LoRA adapter, and training needs a whole model" in error_of(load_config, tmp_path)


@pytest.mark.parametrize("content", ["{bad", "", "{}", "[]", '{"model_type": "nonsense"}'])
def test_broken_config_is_refused(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content)
    assert "cannot be read as a model" in error_of(load_config, tmp_path)


def test_file_is_no_model(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.write_text("x")
    assert error_of(locate, file) == f"{file} is a file; expected a model folder or a hub id; type {tmp_path}"


@pytest.mark.parametrize("name", ["bigscience/no-such-model", "no/such/folder", "a b"])
def test_unknown_name_is_refused_offline(name: str):
    assert "not in the local cache" in error_of(locate, name)


def test_folder_is_located_as_given(make_model: Callable[[str], Path]):
    folder = str(make_model("bloom-tiny"))
    assert locate(folder) == folder


def test_cached_hub_model_is_located(copy_model: Callable[..., Path], tmp_path: Path):
    repository = tmp_path / "hub" / "models--someone--bloom"
    snapshot = repository / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    copy_model("bloom-tiny").rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert Path(locate("someone/bloom", str(tmp_path / "hub"))) == snapshot


@pytest.mark.parametrize(
    ("config", "said"),
    [(T5Config(), "is a t5"), (BertConfig(architectures=["BertForMaskedLM"]), "is a bert (BertForMaskedLM)")],
    ids=["t5", "bert"],
)
def test_other_kinds_of_model_are_refused(tmp_path: Path, config: T5Config | BertConfig, said: str):
    config.save_pretrained(tmp_path)
    assert said in error_of(load_config, tmp_path)


def test_folder_without_tokenizer_is_refused(tmp_path: Path):
    BloomConfig(architectures=["BloomForCausalLM"]).save_pretrained(tmp_path)
    load_config(str(tmp_path))
    assert "tokenizer.json" in error_of(load_tokenizer, tmp_path)


def test_tokenizer_without_eos_is_refused(copy_model: Callable[..., Path]):
    folder = copy_model("falcon-tiny")
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    assert "no eos token" in error_of(load_tokenizer, folder)


def test_folder_without_weights_is_refused(copy_model: Callable[..., Path]):
    folder = copy_model("bloom-tiny")
    (folder / "model.safetensors").unlink()
    assert "the weights" in error_of(load_model, folder)


@pytest.mark.parametrize("size", [0, 10_000], ids=["empty", "cut off"])
def test_broken_weights_are_refused(copy_model: Callable[..., Path], size: int):
    weights = copy_model("bloom-tiny") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    assert "the weights" in error_of(load_model, weights.parent)


@pytest.mark.parametrize("content", ["", "version https://git-lfs.github.com/spec/v1\n"], ids=["empty", "pointer"])
def test_broken_weights_of_the_old_form_are_refused(copy_model: Callable[..., Path], content: str):
    folder = copy_model("falcon-tiny")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text(content)
    assert "the weights" in error_of(load_model, folder)


@pytest.mark.parametrize("fields", [{"hidden_size": 128}, {"vocab_size": 2048}])
def test_weights_of_another_shape_are_refused(copy_model: Callable[..., Path], fields: dict):
    folder = copy_model("bloom-tiny")
    edit_json(folder / "config.json", **fields)
    assert "the weights" in error_of(load_model, folder)


def test_weights_that_lack_layers_are_refused(copy_model: Callable[..., Path]):
    folder = copy_model("bloom-tiny")
    edit_json(folder / "config.json", n_layer=5)
    assert "lack 36 of the model's tensors, such as transformer.h.2." in error_of(load_model, folder)


def test_family_comes_from_the_config_whatever_the_folder_is_called(copy_model: Callable[..., Path]):
    folder = str(copy_model("falcon-tiny", name="bloom-560m"))
    assert load_config(folder).model_type == "falcon"
    assert type(load_model(folder)).__name__ == "FalconForCausalLM"
    assert load_tokenizer(folder).pad_token == "<|endoftext|>"


def test_falcon_pads_with_eos_and_sends_no_token_types(copy_model: Callable[..., Path]):
    folder = copy_model("falcon-tiny")
    edit_json(folder / "tokenizer_config.json", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 11
    inputs = tokenizer(["你好", "好"], padding=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    load_model(str(folder))(**inputs)


def test_bloom_keeps_its_pad(make_model: Callable[[str], Path]):
    tokenizer = load_tokenizer(str(make_model("bloom-tiny")))
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.eos_token_id) == ("<pad>", 3, 2)


@pytest.mark.parametrize("length", [None, 77])
def test_length_is_the_tokenizers_own_unless_given(make_model: Callable[[str], Path], length: int | None):
    assert load_tokenizer(str(make_model("bloom-tiny")), length).model_max_length == (length or 2048)


@pytest.mark.parametrize("model_type", ["bloom", "evil"])
def test_code_beside_a_model_is_never_run(copy_model: Callable[..., Path], tmp_path: Path, model_type: str):
    folder = copy_model("bloom-tiny")
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        code = f"open({str(tmp_path / 'was_run')!r}, 'w')\nEvil = EvilConfig = object\n"
        (folder / f"{name}.py").write_text(code)
    auto_map = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}
    edit_json(folder / "config.json", auto_map=auto_map, model_type=model_type)
    auto_map = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    edit_json(folder / "tokenizer_config.json", auto_map=auto_map)
    if model_type == "bloom":
        assert type(load_model(str(folder))).__module__ == "transformers.models.bloom.modeling_bloom"
        assert load_tokenizer(str(folder))("好").input_ids
    else:
        error_of(load_config, folder)
        error_of(load_model, folder)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("shape", TINY_SHAPES)
def test_chat_template_is_set(make_model: Callable[[str], Path], shape: str):
    tokenizer = load_tokenizer(str(make_model(shape)))
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert rendered == build_chat_prompt(MESSAGES)


def test_chat_template_begins_with_bos_where_the_tokenizer_does(copy_model: Callable[..., Path]):
    folder = copy_model("bloom-tiny")
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(folder))
    tokenised = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)
    assert tokenised["input_ids"] == tokenizer(build_chat_prompt(MESSAGES)).input_ids
    assert tokenised["input_ids"][:2] != [1, 1]
    assert tokenised["input_ids"][0] == 1
