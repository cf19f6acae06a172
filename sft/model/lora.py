"""LoRA: small trained matrices beside frozen weights, by peft; frozen weights in 4 bits (QLoRA); the merged model.

A layer's weight W, (out, in), stays as it is; A, (r, in), and B, (out, r), are trained, and the layer computes with
W + alpha / r * B A (Hu et al. 2021, arXiv:2106.09685). B begins as zeros, so a run begins with the base model.
"""

import copy
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sft.model.load import load_adapter, without_weights
from sft.program import UserError, one_line

ADAPTER = "adapter"  # the folder in --output_dir with the trained matrices alone
# Attention and both layers of the MLP, as LoRA learns best with all of them (Dettmers et al. 2023, arXiv:2305.14314).
TARGET_MODULES = {
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "falcon": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}


def quantization(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return how QLoRA holds frozen weights in 4 bits: NF4, with its scales quantized too."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def add(model: PreTrainedModel, config: LoraConfig, base: str, seed: int) -> PeftModel:
    """Freeze a model's own weights and add LoRA's, in fp32 (or what DeepSpeed makes of them).

    `base` is the folder or hub id that adapters name as their base model. Raises UserError if no layer has a name
    among the target modules.
    """
    for parameter in model.parameters():
        if parameter.ndim == 1 and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()  # norms and biases are few, and compute in fp32
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # In eval mode bitsandbytes would pack weights for its CPU kernel, from which it cannot train on.
            module.support_avx512bf16_for_cpu = False
    set_seed(seed)  # every rank makes the same matrices
    wrapped = _wrapped(model, config)
    wrapped.peft_config["default"].base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    # peft would ask the hub whether the vocabulary has grown, which it cannot here.
    wrapped.save_pretrained = partial(wrapped.save_pretrained, save_embedding_layers=False)
    return wrapped


def _wrapped(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Wrap a model by peft; without target modules every linear layer of attention and MLP gets LoRA."""
    config = copy.copy(config)
    if config.target_modules is None:
        config.target_modules = TARGET_MODULES.get(model.config.model_type, "all-linear")
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora_target_modules does not fit the model: {one_line(error)}") from None


def count_trained(model_config: PretrainedConfig, config: LoraConfig) -> int:
    """Return how many parameters LoRA trains; raise UserError if no layer has a name among the target modules."""
    model = without_weights(model_config)
    with torch.device("meta"):
        wrapped = _wrapped(model, config)
    return sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)


def saved_shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """Return the full shapes of what an adapter's folder must hold, also where ZeRO-3 has split it."""
    return {
        name.replace(".default.", "."): tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def merge(adapter: str, dtype: torch.dtype, cache_dir: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the base model in `dtype`, in the host's memory, with an adapter's matrices added, and the tokenizer.

    No DeepSpeed run can load a model after it.
    """
    unset_hf_deepspeed_config()  # or ZeRO-3 would split this one over ranks that do not load it
    merged = load_adapter(adapter, dtype, cache_dir)
    assert merged is not None, f"{adapter} holds no adapter"
    return merged
