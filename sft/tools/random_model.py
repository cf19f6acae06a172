"""Write a randomly initialised BLOOM or Falcon of a named shape, with a tokenizer trained on given text.

The demo and the tests use these, so that they need no model hub:

    python -m sft.tools.random_model --shape bloom-demo --text data_proj/sample --output output_dir/demo_base
"""

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sft.data.files import find_shards
from sft.data.formats import read_samples
from sft.model.folder import make_portable
from sft.program import ArgumentParser, UserError, run_program

BLOOM_SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]
FALCON_SPECIAL_TOKENS = [
    ">>TITLE<<",
    ">>ABSTRACT<<",
    ">>INTRODUCTION<<",
    ">>SUMMARY<<",
    ">>COMMENT<<",
    ">>ANSWER<<",
    ">>QUESTION<<",
    ">>DOMAIN<<",
    ">>PREFIX<<",
    ">>SUFFIX<<",
    ">>MIDDLE<<",
    "<|endoftext|>",
]


SPECIAL_TOKENS = {"bloom": BLOOM_SPECIAL_TOKENS, "falcon": FALCON_SPECIAL_TOKENS, "llama": ["<|endoftext|>"]}


def bloom(hidden_size: int, n_layer: int, n_head: int, vocab_size: int = 250880, **fields) -> BloomConfig:
    """Return the configuration of a BLOOM; all but the sizes are BLOOM's own defaults."""
    return BloomConfig(
        hidden_size=hidden_size,
        n_layer=n_layer,
        n_head=n_head,
        vocab_size=vocab_size,
        pad_token_id=3,
        **fields,
    )


def falcon(hidden_size: int, num_hidden_layers: int, num_attention_heads: int, **fields) -> FalconConfig:
    """Return the configuration of a Falcon; without further fields it is built as Falcon-7b: RoPE, multi-query."""
    fields = {"vocab_size": 65024, "multi_query": True, "parallel_attn": True, "bias": False, "alibi": False, **fields}
    return FalconConfig(
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        bos_token_id=11,
        eos_token_id=11,
        **fields,
    )


def llama(hidden_size: int, num_hidden_layers: int, num_attention_heads: int, **fields) -> LlamaConfig:
    """Return the configuration of a Llama with a tied head, as the small ones have."""
    return LlamaConfig(
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        **fields,
    )


DEMO_VOCAB_SIZE = 4096
# With the families' 0.02 such a small model gives every token the same probability, and tests could not tell two
# models apart.
TINY = {"vocab_size": 1024, "initializer_range": 0.2}
FALCON_40B = {"new_decoder_architecture": True, "num_kv_heads": 2}
FALCON_RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
SHAPES: dict[str, PretrainedConfig] = {
    # 6 heads take the branch of the ALiBi slopes for head counts that are not a power of two.
    # FlexAttention needs heads of 16 or more.
    "bloom-tiny": bloom(64, 2, 4, **TINY),
    "bloom-tiny-6-heads": bloom(96, 2, 6, **TINY),
    "falcon-tiny": falcon(64, 2, 4, **TINY),
    "falcon-tiny-40b": falcon(64, 2, 4, **TINY, **FALCON_40B),
    "falcon-tiny-rw": falcon(64, 2, 4, **TINY, **FALCON_RW),
    "bloom-demo": bloom(192, 4, 6, vocab_size=DEMO_VOCAB_SIZE),
    "falcon-demo": falcon(192, 4, 6, vocab_size=DEMO_VOCAB_SIZE),
    "bloom-154m": bloom(512, 8, 8),
    "falcon-174m": falcon(960, 12, 15),
    "bloom-560m": bloom(1024, 24, 16),
    "bloom-1b1": bloom(1536, 24, 16),
    "bloom-1b7": bloom(2048, 24, 16),
    "bloom-3b": bloom(2560, 30, 32),
    "bloom-7b1": bloom(4096, 30, 32),
    "falcon-7b": falcon(4544, 32, 71),
    # To compare with another family: the sizes of SmolLM-135M.
    "llama-135m": llama(576, 30, 9, num_key_value_heads=3, intermediate_size=1536, vocab_size=49152),
}


def train_tokenizer(family: str, texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE vocabulary on `texts` with the pre-tokenizer and special tokens of `family`.

    The pre-tokenizers are those of bigscience/tokenizer and tiiuae/falcon-7b, and GPT-2's for Llama, so text is split
    where the real ones split it; the vocabulary has every byte, so it can write any text.
    """
    special_tokens = SPECIAL_TOKENS[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[family]
    tokenizer.decoder = decoders.ByteLevel()
    if family == "bloom":
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    named = (
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "padding_side": "left"}
        if family == "bloom"
        else {"eos_token": "<|endoftext|>"}
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=2048, **named)


_PRE_TOKENIZERS = {
    "bloom": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[^(\s|[.,!?…。，、।۔،])]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "falcon": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation(behavior="contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
        ]
    ),
    "llama": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}


def build_model(shape: str, seed: int = 0) -> PreTrainedModel:
    """Return a randomly initialised fp32 model of a shape in `SHAPES`; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(SHAPES[shape]), dtype=torch.float32)


def save_random_model(shape: str, texts: Iterable[str], output: Path, seed: int = 0) -> PreTrainedModel:
    """Write model and tokenizer as a Hugging Face folder, with the same names inside as the families' own."""
    config = SHAPES[shape]
    tokenizer = train_tokenizer(config.model_type, texts, config.vocab_size)
    model = build_model(shape, seed)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    if config.model_type == "bloom":
        settings = json.loads((output / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings["tokenizer_class"] = "BloomTokenizerFast"
        (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    make_portable(output)
    return model


def read_texts(path: str) -> Iterator[str]:
    """Yield the prompts and answers of the data at `path`, to train a vocabulary on."""
    for shard in find_shards(path):
        for row in read_samples(shard):
            yield row.prompt
            yield row.output


def main() -> None:
    """Write the model that the command line describes."""
    parser = ArgumentParser(description="Write a randomly initialised model with a trained tokenizer.")
    parser.add_argument("--shape", required=True, choices=SHAPES, help="family and size")
    parser.add_argument("--text", required=True, help="data whose prompts and answers train the vocabulary")
    parser.add_argument("--output", required=True, type=Path, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    arguments = parser.parse_args()
    if arguments.output.is_file():
        raise UserError(f"--output {arguments.output} is a file; expected a folder to write")
    model = save_random_model(arguments.shape, read_texts(arguments.text), arguments.output, arguments.seed)
    print(f"{arguments.shape}: {model.num_parameters():,} random parameters in {arguments.output}")


if __name__ == "__main__":
    run_program(main)
