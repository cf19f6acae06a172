"""Models with quantized weights: told by their config, refused for training, and told what to load instead."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sft.model import quantized
from sft.model.load import load_config
from sft.program import UserError

STORED = {
    "4-bit GPTQ": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "8-bit GPTQ": {"quant_method": "gptq", "bits": 8, "group_size": -1, "dataset": "c4"},
    "4-bit AWQ": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "4-bit bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "8-bit bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "one-of-next-year": {"quant_method": "one-of-next-year"},
    "quantized": {"a_key_without": "a method"},
}


@pytest.fixture
def store(make_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., str]:
    """Return a function that gives a copy of a model's folder whose config names a quantization."""

    def store(shape: str, settings: dict | None) -> str:
        folder = Path(shutil.copytree(make_model(shape), tmp_path / shape))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        changed = config | ({"quantization_config": settings} if settings else {})
        (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        return str(folder)

    return store


@pytest.mark.parametrize("method", STORED)
def test_a_quantized_model_is_not_trained(method: str, store: Callable[..., str]):
    folder = store("bloom-tiny", STORED[method])
    config = load_config(folder)
    assert quantized.method_of(folder, config) == method
    with pytest.raises(UserError) as refused:
        quantized.check_trainable(folder, config)
    line = str(refused.value)
    assert line.startswith(f"{folder} holds {method} weights, which can neither be trained nor have LoRA merged")
    assert "such as bigscience/bloom-560m; " in line and line.endswith("--lora_r 16 --load_in_4bit True")


def test_an_early_gptq_folder_names_its_method_in_another_file(store: Callable[..., str]):
    folder = store("falcon-tiny", None)
    quantized.check_trainable(folder, load_config(folder))
    Path(folder, "quantize_config.json").write_text('{"bits": 4}')
    with pytest.raises(UserError, match="holds GPTQ weights, .* such as tiiuae/falcon-7b;"):
        quantized.check_trainable(folder, load_config(folder))


def test_what_fails_while_plain_weights_are_loaded_stays_as_it_is(store: Callable[..., str]):
    folder = store("bloom-tiny", None)

    def fail():
        raise KeyError("else")

    with pytest.raises(KeyError, match="else"):
        quantized.load(folder, load_config(folder), fail)


def test_quantized_weights_that_load_must_compute_too(store: Callable[..., str]):
    folder = store("bloom-tiny", STORED["4-bit AWQ"])
    config = load_config(folder)

    class Loaded:
        device = "cpu"

        def __init__(self, shapes: list[tuple[int, ...]]):
            self.shapes = shapes

        def __call__(self, input_ids: torch.Tensor) -> None:
            self.shapes.append(tuple(input_ids.shape))
            if len(self.shapes) > 2:
                raise RuntimeError("no kernel\nfor this")

    shapes = []
    assert isinstance(quantized.load(folder, config, lambda: Loaded(shapes)), Loaded)
    assert shapes == [(1, 2), (1, 1)]
    with pytest.raises(UserError, match="holds 4-bit AWQ weights, which cannot be used here: no kernel; give"):
        quantized.load(folder, config, lambda: Loaded(shapes))
