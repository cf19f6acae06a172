"""One GGUF file of a BLOOM or a Falcon: what llama.cpp, Ollama and LM Studio load.

The names, the order of queries, keys and values and the choice of types are those of llama.cpp's converter and of its
quantizer (convert_hf_to_gguf.py, src/llama-quant.cpp). Weights pass one at a time, so a model of any size takes the
memory of its largest tensor.

Symbols: V = vocabulary, D = size of a head, G = groups of query heads that share a key and a value.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType, TokenType
from safetensors import safe_open
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from sft.model import llama_cpp
from sft.model.download import fetch_weights
from sft.model.folder import longest_context
from sft.model.load import check_ids, load_model
from sft.program import UserError

ARCHITECTURES = {"bloom": gguf.MODEL_ARCH.BLOOM, "falcon": gguf.MODEL_ARCH.FALCON}
ELEMENTS_AT_ONCE = 2**22  # weights that one thread quantizes at once
# What stands in for a quantization whose blocks do not divide a tensor's rows.
SMALLER_BLOCKS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}


@dataclass(frozen=True)
class Kind:
    """A kind of file: what most of its matrices are stored as, and llama.cpp's number for it."""

    matrices: Type
    number: LlamaFileType


KINDS = {
    "f32": Kind(Type.F32, LlamaFileType.ALL_F32),
    "f16": Kind(Type.F16, LlamaFileType.MOSTLY_F16),
    "bf16": Kind(Type.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": Kind(Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_k_m": Kind(Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
}


def check(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, kind: str, name: str) -> None:
    """Raise UserError if llama.cpp cannot compute the model `name`, or what writes a kind of file is not installed."""
    if why := llama_cpp.hindrance(config.to_dict(), name):
        raise UserError(why)
    if _tokenizer_model(tokenizer)["type"] != "BPE":
        raise UserError(
            f"the tokenizer of {name} is no byte-level BPE, as BLOOM's and Falcon's are; give another model"
        )
    check_ids(tokenizer, config, name)
    if kind == "q4_k_m":
        llama_cpp.package("q4_k_m")


def weights_in(folder: Path) -> Mapping[str, torch.Tensor]:
    """Return the tensors of a model's folder by name; those of safetensors files stay there until they are read."""
    fetch_weights(folder)
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("model-*.safetensors"))
    if not files:
        return load_model(str(folder), "auto").state_dict()
    opened = [safe_open(file, "pt") for file in files]
    return {name: file.get_tensor(name) for file in opened for name in file.keys()}  # noqa: SIM118


def write(
    file: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    weights: Mapping[str, torch.Tensor],
    kind: str,
    name: str,
) -> None:
    """Write a model to a GGUF file; `weights` are its tensors by their names in transformers, in any floating dtype.

    A kind is one of `KINDS`; vectors stay f32, and matrices whose rows no block divides become f16. Raises UserError
    as `check` does.
    """
    check(config, tokenizer, kind, name)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    _add_model(writer, config, tokenizer, KINDS[kind], name)
    _add_tokenizer(writer, config, tokenizer)
    tensors = dict(_renamed(weights, config))
    types = {new: type_of(new, tensor.shape, config, kind) for new, tensor in tensors.items()}
    for new, tensor in tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[types[new]]
        num_bytes = tensor.numel() // block * size
        writer.add_tensor_info(new, tensor.shape, np.dtype(np.float32), num_bytes, raw_dtype=types[new])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for new, tensor in tqdm(tensors.items(), f"writing {kind}", leave=False):
        tensor = queries_first(tensor, config) if "attn_qkv" in new else tensor
        writer.write_tensor_data(stored(tensor, types[new], llama_cpp.quantized if kind == "q4_k_m" else gguf.quantize))
    writer.close()


# --------------------------------------------------------------------------------------------------------- the tensors


def _renamed(weights: Mapping[str, torch.Tensor], config: PretrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors by llama.cpp's names; a head that is the embedding is left out."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    # Releases of BLOOM have no name for the model around the layers, and the map has none for BLOOM either.
    before = "transformer." if config.model_type == "falcon" else ""
    for name, tensor in weights.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        plain = name.removeprefix("transformer.")
        new = names.get_name(plain if plain.startswith("lm_head") else before + plain, (".weight", ".bias"))
        assert new, f"llama.cpp has no name for {name}"
        yield new, tensor


def num_groups(config: PretrainedConfig) -> int:
    """Return how many pairs of a key and a value a layer has."""
    if config.model_type == "bloom":
        return config.n_head
    has_own = config.new_decoder_architecture or not config.multi_query
    return config.num_kv_heads if has_own else 1


def queries_first(tensor: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Return a fused projection, (out_features[, in_features]), with all queries first, then all keys, then all values.

    In transformers each group of heads has its G queries, its key and its value together, D rows each.
    """
    heads, groups = config.num_attention_heads, num_groups(config)
    parts = tensor.unflatten(0, (groups, heads // groups + 2, config.hidden_size // heads))
    return torch.cat([part.flatten(0, 2) for part in (parts[:, :-2], parts[:, -2:-1], parts[:, -1:])])


def type_of(name: str, shape: tuple[int, ...], config: PretrainedConfig, kind: str) -> Type:
    """Return what a tensor of llama.cpp's name is stored as, in a kind of file."""
    if len(shape) < 2:
        return Type.F32
    chosen = KINDS[kind].matrices
    if chosen == Type.Q4_K:
        chosen = _mixed_type_of(name, config)
    if shape[-1] % gguf.GGML_QUANT_SIZES[chosen][0]:
        chosen = SMALLER_BLOCKS.get(chosen, Type.F16)
    return chosen if shape[-1] % gguf.GGML_QUANT_SIZES[chosen][0] == 0 else Type.F16


def _mixed_type_of(name: str, config: PretrainedConfig) -> Type:
    """Return llama.cpp's choice for q4_k_m: more bits where errors weigh most, in the head and some of the layers."""
    is_falcon, num_layers = config.model_type == "falcon", config.num_hidden_layers
    if name == "output.weight" or (name == "token_embd.weight" and config.tie_word_embeddings):
        return Type.Q8_0 if is_falcon else Type.Q6_K
    layer = int(found[1]) if (found := re.match(r"blk\.(\d+)\.", name)) else 0
    first, last = num_layers // 8, 7 * num_layers // 8
    has_more = layer < first or layer >= last or (layer - first) % 3 == 2
    if "attn_qkv" in name and has_more:
        return Type.Q6_K
    if "ffn_down" in name and has_more:
        return Type.Q5_K if is_falcon and layer >= num_layers // 16 else Type.Q6_K
    return Type.Q4_K


def stored(tensor: torch.Tensor, type: Type, quantize: Callable[[np.ndarray, Type], np.ndarray]) -> np.ndarray:
    """Return a tensor as a type; what quantizes fp32 rows gets some at a time, in several threads."""
    at_once = max(1, ELEMENTS_AT_ONCE // tensor.shape[-1])
    quantize = gguf.quantize if type in (Type.F32, Type.F16) else quantize

    def part(rows: torch.Tensor) -> np.ndarray:
        return quantize(rows.float().numpy(), type)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return np.concatenate(list(pool.map(part, tensor.split(at_once))))


# ------------------------------------------------------------------------------------------------------ what is beside


def _add_model(
    writer: gguf.GGUFWriter, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, kind: Kind, name: str
) -> None:
    """Add the sizes of a model and its context length, which is not that of a short training."""
    writer.add_name(name)
    writer.add_file_type(kind.number)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(longest_context(config.to_dict(), tokenizer.model_max_length))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "ffn_hidden_size", None) or 4 * config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(num_groups(config))
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    if config.model_type == "falcon":
        writer.add_tensor_data_layout("jploski")  # the order of `queries_first`
        writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10_000.0)))


def _tokenizer_model(tokenizer: PreTrainedTokenizerBase) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]


def _add_tokenizer(writer: gguf.GGUFWriter, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the vocabulary, a name for each row of the embedding, the merges, special tokens and the chat template.

    llama.cpp splits a text into words by the family's rule; which tokens there are is up to the file.
    """
    names = {id: token for token, id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids) | {id for id, token in added.items() if token.special}

    def kind_of(id: int) -> TokenType:
        if id not in names:
            return TokenType.UNUSED
        return TokenType.CONTROL if id in special else TokenType.USER_DEFINED if id in added else TokenType.NORMAL

    ids = range(config.vocab_size)
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name of a byte-level BPE
    writer.add_tokenizer_pre(config.model_type)
    writer.add_token_list([names.get(id, f"[PAD{id}]") for id in ids])
    writer.add_token_types([kind_of(id) for id in ids])
    writer.add_token_merges([" ".join(pair) for pair in _tokenizer_model(tokenizer)["merges"]])
    for add, id in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if id is not None:
            add(id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
