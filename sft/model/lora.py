"""LoRA: small trained matrices beside frozen weights, by peft; frozen weights in 4 bits (QLoRA); the merged model.

A layer's weight W, (out, in), stays as it is; A, (r, in), and B, (out, r), are trained, and the layer computes with
W + alpha / r * B A (Hu et al. 2021, arXiv:2106.09685). B begins as zeros, so a run begins with the base model.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sft.model.load import count_parameters, load_adapter, without_weights
from sft.program import UserError, one_line
from sft.training import precision, zero

ADAPTER = "adapter"  # the folder in --output_dir with the trained matrices alone
# Attention and both layers of the MLP, as LoRA learns best with all of them (Dettmers et al. 2023, arXiv:2305.14314).
TARGET_MODULES = {
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "falcon": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}


@dataclass
class LoraArguments:
    """LoRA instead of training all weights; off unless --lora_r is given."""

    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA's matrices, such as 16; 0 trains all weights."})
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA's scale times its rank; by default 2 r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Share of LoRA's inputs to drop while training."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers that get LoRA; by default all of attention and MLP."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: the frozen weights in 4 bits."})
    merge_lora: bool = field(
        default=True, metadata={"help": "At the end, save a plain model with LoRA added to its weights as well."}
    )


def check(args: LoraArguments, training_args: TrainingArguments) -> None:
    """Raise UserError on values of LoRA's flags that do not fit together, or that cannot run here."""
    if args.lora_r < 0 or not 0 <= args.lora_dropout < 1 or (args.lora_alpha is not None and args.lora_alpha <= 0):
        raise UserError(
            f"--lora_r {args.lora_r} --lora_alpha {args.lora_alpha} --lora_dropout {args.lora_dropout} is no LoRA; "
            "expected a rank and an alpha above 0 and a dropout from 0 to below 1, such as --lora_r 16"
        )
    if not args.lora_r and (args.load_in_4bit or args.lora_alpha or args.lora_target_modules or args.lora_dropout):
        raise UserError("--load_in_4bit and --lora_* are LoRA's, which is off; add --lora_r 16")
    if args.load_in_4bit and zero.stage_of(training_args) == 3:
        raise UserError("--load_in_4bit weights cannot be split by ZeRO-3; type ZERO_STAGE=2 (or no --deepspeed)")
    if args.load_in_4bit:
        precision.check_bitsandbytes("--load_in_4bit")


def weights_dtype(args: LoraArguments, training_args: TrainingArguments) -> torch.dtype:
    """Return what loaded weights are held in: fp32 where they are trained, else what the run computes in."""
    return precision.compute_dtype(training_args) if args.lora_r else torch.float32


def quantization(args: LoraArguments, training_args: TrainingArguments) -> BitsAndBytesConfig | None:
    """Return how to hold frozen weights in 4 bits: NF4, its scales quantized too, as in QLoRA; None to leave them."""
    if not args.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision.compute_dtype(training_args),
    )


def configuration(args: LoraArguments, model: nn.Module) -> LoraConfig:
    """Return peft's configuration for a model of either family, or any other."""
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha or 2 * args.lora_r,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules or TARGET_MODULES.get(model.config.model_type, "all-linear"),
        task_type="CAUSAL_LM",
    )


def add(model: PreTrainedModel, args: LoraArguments, base: str, seed: int) -> PeftModel:
    """Return a model whose own weights are frozen and that trains LoRA's, fp32 (or what DeepSpeed makes of them).

    `base` is the folder or hub id that adapters name as their base model. Raises UserError if no layer has a name
    that LoRA was asked for.
    """
    for parameter in model.parameters():
        if parameter.ndim == 1 and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()  # norms and biases are few, and compute in fp32
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # In eval mode bitsandbytes would pack weights for its CPU kernel, from which it cannot train on.
            module.support_avx512bf16_for_cpu = False
    set_seed(seed)  # every rank makes the same matrices
    wrapped = _wrapped(model, args)
    wrapped.peft_config["default"].base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    # peft would ask the hub whether the vocabulary has grown, which it cannot here.
    wrapped.save_pretrained = partial(wrapped.save_pretrained, save_embedding_layers=False)
    return wrapped


def _wrapped(model: PreTrainedModel, args: LoraArguments) -> PeftModel:
    try:
        return get_peft_model(model, configuration(args, model))
    except ValueError as error:
        raise UserError(f"--lora_target_modules does not fit: {one_line(error)}") from None


def count_trained(args: LoraArguments, config: PretrainedConfig) -> int:
    """Return how many parameters LoRA of a model trains; raise UserError if no layer has a name it was asked for."""
    model = without_weights(config)
    with torch.device("meta"):
        wrapped = _wrapped(model, args)
    return sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)


def settings_of(args: LoraArguments, config: PretrainedConfig) -> dict[str, object]:
    """Return what of the model must be the same for a run to go on from another's checkpoint."""
    num_parameters = count_parameters(config)
    settings = {"parameters": num_parameters, "--lora_r": args.lora_r, "trained parameters": num_parameters}
    if args.lora_r:
        settings["trained parameters"] = count_trained(args, config)
        names = ("lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit")
        settings |= {f"--{name}": getattr(args, name) for name in names}
    return settings


def merged_bytes(args: LoraArguments, training_args: TrainingArguments, num_parameters: int) -> int:
    """Return the bytes on the disk of the merged model, 0 where there will be none."""
    if not args.lora_r or not args.merge_lora:
        return 0
    return num_parameters * precision.compute_dtype(training_args).itemsize


def saved_shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what an adapter's folder must hold, whole also where ZeRO-3 has split it."""
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
