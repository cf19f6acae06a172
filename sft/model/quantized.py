"""Models whose weights were stored quantized, such as GPTQ's, AWQ's and those of bitsandbytes."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sft.program import UserError, one_line

NAMES = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors"}
ORIGINALS = {"bloom": "bigscience/bloom-560m", "falcon": "tiiuae/falcon-7b"}


def method_of(name_or_path: str, config: PretrainedConfig) -> str | None:
    """Return how a model's weights were quantized, such as "4-bit GPTQ"; None if they were not."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        # Early GPTQ folders say it in a file of their own.
        return "GPTQ" if (Path(name_or_path) / "quantize_config.json").is_file() else None
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method") or "quantized"))
    in_4_bits, in_8_bits = settings.get("load_in_4bit"), settings.get("load_in_8bit")
    bits = settings.get("bits") or (4 if in_4_bits else 8 if in_8_bits else None)
    return f"{bits}-bit {NAMES.get(method, method)}" if bits else NAMES.get(method, method)


def check_trainable(name_or_path: str, config: PretrainedConfig) -> None:
    """Raise UserError if a model's weights are quantized: a step would round to nothing.

    LoRA's result is merged into the base model's weights, which rounds it away too.
    """
    check_whole(
        name_or_path,
        config,
        "which can neither be trained nor have LoRA merged into them",
        "; QLoRA quantizes it while loading: --lora_r 16 --load_in_4bit True",
    )


def check_whole(name_or_path: str, config: PretrainedConfig, but: str, advice: str = "") -> None:
    """Raise UserError if a model's weights are quantized; `but` says what such weights cannot do."""
    if method := method_of(name_or_path, config):
        raise UserError(
            f"{name_or_path} holds {method} weights, {but}; give the model that they were made from, "
            f"{_such_as(config)}{advice}"
        )


def load(name_or_path: str, config: PretrainedConfig, loaded: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Return the model that `loaded` returns; a quantized one must also compute, which its kernels may not do here.

    Raises UserError, with what to load instead, if quantized weights cannot be used.
    """
    if (method := method_of(name_or_path, config)) is None:
        return loaded()
    try:
        model = loaded()
        with torch.inference_mode():
            for length in (2, 1):  # a prompt and a word after it take different kernels
                model(torch.zeros(1, length, dtype=torch.int64, device=model.device))
    except Exception as error:
        reason = one_line(error).removeprefix(f"the weights of {name_or_path} cannot be loaded: ").rstrip(". ")
        raise UserError(
            f"{name_or_path} holds {method} weights, which cannot be used here: {reason}; give the model that they "
            f"were made from, {_such_as(config)}; --quantize q8_0 makes it small on a CPU"
        ) from None
    return model


def _such_as(config: PretrainedConfig) -> str:
    original = ORIGINALS.get(config.model_type)
    return f"such as {original}" if original else "in 16 or 32 bits"
