"""Configuration, tokenizer and model, loaded from a folder or a hub id; a mistake is an error of one line."""

import warnings
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sft.model import download, quantized
from sft.program import UserError, one_line
from sft.prompts import chat_template

warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")  # peft asks for it


FIRST_FALCONS = ("RefinedWebModel", "RefinedWeb")  # model types of Falcon's first revisions, 7b's and 40b's
FIRST_FALCON_EDITS = (
    's/"RefinedWeb\\(Model\\)\\?"/"falcon"/;s/"n_head"/"num_attention_heads"/;s/"n_layer"/"num_hidden_layers"/;'
    's/"n_head_kv": *\\([0-9]*\\)/"num_kv_heads": \\1, "new_decoder_architecture": true/'
)


def load_config(name_or_path: str, cache_dir: str | None = None) -> PretrainedConfig:
    """Return the configuration of the causal language model at a folder or hub id.

    The classes are always transformers' own; code that comes with a model is never run. Raises UserError if there is
    no such model, it cannot be reached, or it is not a causal language model.
    """
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{name_or_path} is a LoRA adapter, and training needs a whole model; give its merged model, which "
                "--merge_lora True puts beside it, or the base model"
            )
        raise UserError(
            f"{download.name_of(folder)} is a folder without config.json; expected a Hugging Face model folder "
            "(config.json, tokenizer.json, *.safetensors) or a hub id such as bigscience/bloom-560m"
        )
    try:
        config = AutoConfig.from_pretrained(name_or_path, cache_dir=cache_dir, trust_remote_code=False)
    except Exception as error:
        if any(f"`{name}`" in str(error) for name in FIRST_FALCONS):
            raise UserError(
                f"{name_or_path} has a config.json from before Falcon was part of transformers; download the model "
                f"again, or type sed -i '{FIRST_FALCON_EDITS}' config.json in its folder"
            ) from None
        raise UserError(
            f"{name_or_path} cannot be read as a model: {one_line(error)}; expected a Hugging Face model folder or a "
            "hub id such as bigscience/bloom-560m"
        ) from None
    supported = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    architectures = config.architectures or []
    if supported is None or (architectures and supported.__name__ not in architectures and _is_encoder(config)):
        raise UserError(
            f"{name_or_path} is a {config.model_type} ({', '.join(architectures) or 'no architecture named'}); "
            "expected a causal language model, such as bigscience/bloom-560m or tiiuae/falcon-7b"
        )
    return config


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


def count_parameters(config: PretrainedConfig) -> int:
    """Return a model's number of parameters, tied ones once, without allocating any."""
    return sum(parameter.numel() for parameter in without_weights(config).parameters())


def _is_encoder(config: PretrainedConfig) -> bool:
    """Tell whether a model of a family that can be either (bert, roberta) is an encoder."""
    return getattr(config, "is_decoder", None) is False


def load_tokenizer(
    name_or_path: str, model_max_length: int | None = None, cache_dir: str | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with a pad token and the chat template that training, notebook and app share.

    Falcon has no pad token; its eos is used, since labels never depend on token ids here. Raises UserError if there is
    no fast tokenizer or no eos token.
    """
    extra = {"model_max_length": model_max_length} if model_max_length else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, cache_dir=cache_dir, trust_remote_code=False, **extra)
    except Exception as error:
        raise download.unfinished(Path(name_or_path)) or UserError(
            f"the tokenizer of {name_or_path} cannot be loaded ({one_line(error)}); expected tokenizer.json or "
            "tokenizer.model, and tokenizer_config.json, beside config.json; copy them from the base model"
        ) from None
    # An eos that is not in the vocabulary, such as "", has the id of the unknown token.
    has_eos = tokenizer.eos_token and tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == tokenizer.eos_token
    if not tokenizer.is_fast or not has_eos:
        raise UserError(
            f"the tokenizer of {name_or_path} has no {'eos token' if tokenizer.is_fast else 'fast version'}; expected "
            "a tokenizer.json with an eos token, as bigscience/bloom-560m and tiiuae/falcon-7b have"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = chat_template(_beginning(tokenizer), tokenizer.eos_token)
    # Falcon's forward takes no token types, which older tokenizer files would add.
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.init_kwargs.pop("auto_map", None)  # names code that no folder saved here has
    return tokenizer


def check_ids(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, name: str) -> None:
    """Raise UserError if the tokenizer of the model `name` has a token that the model has no embedding for."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= config.vocab_size:
        raise UserError(
            f"the tokenizer of {name} has the token {token!r} with the id {largest:,}, and the model has embeddings "
            f"for the ids below {config.vocab_size:,}; copy the base model's tokenizer files into the folder, or give "
            "the model more embeddings first: model.resize_token_embeddings(len(tokenizer))"
        )


def _beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what a template begins with, so that its text has the ids of a prompt that the tokenizer begins itself."""
    expected, bos = tokenizer("x").input_ids, tokenizer.bos_token
    if expected[0] != tokenizer.bos_token_id:
        return ""
    # Llama's tokenizer puts a space before a text, but not before one that follows a special token.
    for space in ("", " "):
        if tokenizer(f"{bos}{space}x", add_special_tokens=False).input_ids == expected:
            return bos + space
    return bos


def load_adapter(
    folder: str, dtype: torch.dtype, cache_dir: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
    """Return the base model with a LoRA adapter merged into it, and the tokenizer; None if there is no adapter.

    The tokenizer comes from the adapter's folder if it has one. Raises UserError if the base model that it names cannot
    be loaded, or is not the one that the adapter was made for.
    """
    if not (Path(folder) / "adapter_config.json").is_file():
        return None
    from peft import PeftConfig, PeftModel  # its import takes seconds

    download.fetch_weights(Path(folder))

    try:
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
        located = download.locate(base, cache_dir)
        config = load_config(located, cache_dir)
    except Exception as error:
        raise UserError(
            f"{folder} is a LoRA adapter whose base model cannot be found: {one_line(error)}; write the path of the "
            'base model\'s folder as "base_model_name_or_path" into its adapter_config.json'
        ) from None
    quantized.check_whole(located, config, f"into which the LoRA adapter {folder} cannot be merged")
    has_tokenizer = (Path(folder) / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(folder if has_tokenizer else located, cache_dir=cache_dir)
    check_ids(tokenizer, config, base)
    model = load_model(located, dtype, cache_dir)
    try:
        return PeftModel.from_pretrained(model, folder).merge_and_unload(safe_merge=True), tokenizer
    except Exception as error:
        raise UserError(f"the LoRA adapter {folder} does not fit its base model {base}: {one_line(error)}") from None


def load_model(
    name_or_path: str,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    cache_dir: str | None = None,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """Return the model with its weights in `dtype`, in that of its files ("auto"), or quantized.

    There is no device map, so that DeepSpeed may place them.

    Raises UserError if weights are missing, incomplete or broken, or cannot be downloaded.
    """
    download.fetch_weights(Path(name_or_path))
    keywords = {"quantization_config": quantization} if quantization else {}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            dtype=dtype,
            cache_dir=cache_dir,
            trust_remote_code=False,
            output_loading_info=True,
            **keywords,
        )
    except Exception as error:
        raise UserError(f"the weights of {name_or_path} cannot be loaded: {one_line(error)}") from None
    for each in (model.config, model.generation_config):
        each.__dict__.pop("auto_map", None)  # names code that no folder saved here has
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"the weights of {name_or_path} lack {len(missing)} of the model's tensors, such as {missing[0]}; "
            "expected all of them, since the missing ones would be random; download or copy the folder again"
        )
    return model
