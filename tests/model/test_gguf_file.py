"""GGUF files: the order of the weights, the type of each, the vocabulary, and what llama.cpp computes with them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import gguf
import httpx
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, TokenType
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig

from sft.model import gguf_file, llama_cpp
from sft.model.load import load_config, load_tokenizer
from sft.program import UserError

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
SHAPES = ["bloom-tiny", "bloom-tiny-6-heads", "falcon-tiny", "falcon-tiny-40b"]
PROMPTS = [
    "Below is a list:\n\n",
    "今天天气很好，",
    "def f(x):\n    return",
    "一二三四五六七",
    "a",
    "### Instruction:\n写诗",
]
NASTY = [
    "",
    " ",
    "  两个  空格",
    "\r\n\r\n\t制表",
    "</s>不是结束 <pad> <|endoftext|>",
    "。，、！？《》“”",
    "1234567 8.90 3,000",
    "it's don't WE'LL",
    "é ü ñ Ω ж",
    "👨‍👩‍👧‍👦🇨🇳",
    "\u200b\ufeff\u3000",
    "a" * 300,
    "ＡＢＣ１２３",
    "x = {'k': [1, 2]} // 注释\n\n\n#",
    "...!!!???",
    "_snake_case__x",
]


@pytest.fixture
def written(make_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the GGUF file of a shape, or of a folder."""

    def write(shape: str, kind: str = "f32", folder: Path | None = None) -> Path:
        folder, file = folder or make_model(shape), tmp_path / f"{shape}-{kind}.gguf"
        config, tokenizer = load_config(str(folder)), load_tokenizer(str(folder))
        gguf_file.write(file, config, tokenizer, gguf_file.weights_in(folder), kind, shape)
        return file

    return write


@pytest.fixture
def served() -> Iterator[Callable[[Path], httpx.Client]]:
    """Return a function that serves a file by llama.cpp, whose cache of keys and values is fp32."""
    servers = []

    def serve(file: Path) -> httpx.Client:
        parameters = xllamacpp.CommonParams()
        parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(file), 512, 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.verbosity = 0
        servers.append(xllamacpp.Server(parameters))
        return httpx.Client(base_url=servers[-1].listening_address, timeout=60, trust_env=False)

    yield serve
    servers.clear()


def likeliest(client: httpx.Client, ids: list[int], number: int) -> dict[int, float]:
    """Return llama.cpp's log-probabilities of the likeliest next tokens, by id."""
    # It leaves them out of a token that is part of a character, so another one is forced; they come from before that.
    forced = {"logit_bias": [["a", 1000.0]], "max_tokens": 1, "temperature": 0, "cache_prompt": False}
    answer = (
        client.post("/v1/completions", json={"prompt": ids, "logprobs": number, **forced}).raise_for_status().json()
    )
    [first] = answer["choices"][0]["logprobs"]["content"]
    return {each["id"]: each["logprob"] for each in first["top_logprobs"]}


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_computes_the_same_probabilities(make_model, written, served, shape: str):
    tokenizer = load_tokenizer(str(make_model(shape)))
    model = AutoModelForCausalLM.from_pretrained(make_model(shape), dtype=torch.float32)
    client = served(written(shape))
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        found = likeliest(client, ids, 20)
        # llama.cpp's GELU is a table in 16 bits.
        assert max(abs(expected[id] - value) for id, value in found.items()) < 0.02
        assert int(expected.argmax()) in found and len(found) == 20


@pytest.mark.parametrize(("kind", "within"), [("f16", 0.05), ("bf16", 0.2), ("q8_0", 0.3), ("q4_k_m", 2.0)])
def test_fewer_bits_stay_near(make_model, written, served, kind: str, within: float):
    tokenizer = load_tokenizer(str(make_model("bloom-tiny")))
    model = AutoModelForCausalLM.from_pretrained(make_model("bloom-tiny"), dtype=torch.float32)
    client = served(written("bloom-tiny", kind))
    ids = tokenizer(PROMPTS[1], add_special_tokens=False).input_ids
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    found = likeliest(client, ids, 5)
    assert max(abs(expected[id] - value) for id, value in found.items()) < within
    assert written("bloom-tiny", kind).stat().st_size < written("bloom-tiny", "f32").stat().st_size


@pytest.mark.parametrize("shape", ["bloom-tiny", "falcon-tiny", "Falcon's own tokenizer"])
def test_llama_cpp_splits_any_text_alike_and_has_the_same_chat_template(
    make_model, real_falcon: Path, written, served, rows, shape: str
):
    folder = real_falcon if shape.startswith("Falcon") else make_model(shape)
    tokenizer, client = load_tokenizer(str(folder)), served(written(shape, folder=folder))
    pieces, random = [*NASTY, *(row["instruction"] + row["output"] for row in rows)], Random(0)
    for text in (*pieces, *("".join(random.choices(pieces, k=3))[random.randrange(9) :] for _ in range(1000))):
        asked = {"content": text, "add_special": False, "parse_special": True}
        found = client.post("/tokenize", json=asked).raise_for_status().json()["tokens"]
        assert found == tokenizer(text, add_special_tokens=False).input_ids, text
    turns = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "好"},
        {"role": "user", "content": "a"},
    ]
    for messages in (turns[:1], turns, [{"role": "system", "content": "简短"}, *turns]):
        found = client.post("/apply-template", json={"messages": messages}).raise_for_status().json()["prompt"]
        assert found == tokenizer.apply_chat_template(messages, tokenize=False)


def test_tokens_without_a_name_have_a_row_and_special_ones_are_control(make_model, written):
    file = GGUFReader(written("falcon-tiny"))
    tokenizer = load_tokenizer(str(make_model("falcon-tiny")))
    field = {name: file.fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "eos_token_id", "pre")}
    kinds = [file.fields["tokenizer.ggml.token_type"].parts[index][0] for index in field["token_type"].data]
    assert len(kinds) == 1024 and field["eos_token_id"].contents() == tokenizer.eos_token_id == 11
    assert {id for id, kind in enumerate(kinds) if kind == TokenType.CONTROL} == set(range(12))
    assert {id for id, kind in enumerate(kinds) if kind == TokenType.UNUSED} == set(range(len(tokenizer), 1024))
    assert field["pre"].contents() == "falcon"


@pytest.mark.parametrize(("groups", "heads"), [(1, 4), (2, 4), (4, 4)])
def test_queries_come_first_then_keys_then_values(groups: int, heads: int):
    config = FalconConfig(hidden_size=8, num_attention_heads=heads, num_kv_heads=groups, new_decoder_architecture=True)
    queries, keys, values = (torch.randn(number, 2, 3) for number in (heads, groups, groups))
    fused = torch.cat(
        [
            torch.cat([queries.unflatten(0, (groups, -1))[group].flatten(0, 1), keys[group], values[group]])
            for group in range(groups)
        ]
    )
    expected = torch.cat([part.flatten(0, 1) for part in (queries, keys, values)])
    assert torch.equal(gguf_file.queries_first(fused, config), expected)


def test_a_falcon_of_one_key_has_one_whatever_transformers_has_saved():
    saved = {"num_attention_heads": 4, "num_kv_heads": 4}
    assert gguf_file.num_groups(FalconConfig(**saved, multi_query=True)) == 1
    assert gguf_file.num_groups(FalconConfig(**saved, multi_query=False)) == 4
    assert gguf_file.num_groups(FalconConfig(num_kv_heads=2, num_attention_heads=4, new_decoder_architecture=True)) == 2


BLOOM = BloomConfig(hidden_size=1024, n_layer=24, n_head=16)
FALCON = FalconConfig(hidden_size=4544, num_hidden_layers=32, num_attention_heads=71)


@pytest.mark.parametrize(
    ("name", "width", "config", "kind", "expected"),
    [
        ("output_norm.weight", None, BLOOM, "q4_k_m", Type.F32),
        ("token_embd.weight", 1024, BLOOM, "q4_k_m", Type.Q6_K),
        ("token_embd.weight", 4544, FALCON, "q4_k_m", Type.Q8_0),
        ("blk.0.attn_qkv.weight", 1024, BLOOM, "q4_k_m", Type.Q6_K),
        ("blk.3.attn_qkv.weight", 1024, BLOOM, "q4_k_m", Type.Q4_K),
        ("blk.5.ffn_down.weight", 4096, BLOOM, "q4_k_m", Type.Q6_K),
        ("blk.6.ffn_down.weight", 4096, BLOOM, "q4_k_m", Type.Q4_K),
        ("blk.23.ffn_up.weight", 1024, BLOOM, "q4_k_m", Type.Q4_K),
        ("blk.1.ffn_down.weight", 18176, FALCON, "q4_k_m", Type.Q6_K),
        ("blk.2.ffn_down.weight", 18176, FALCON, "q4_k_m", Type.Q5_K),
        ("blk.4.ffn_down.weight", 18176, FALCON, "q4_k_m", Type.Q4_K),
        ("blk.4.ffn_up.weight", 4544, FALCON, "q4_k_m", Type.Q5_0),  # 4,544 is no multiple of 256
        ("blk.0.attn_qkv.weight", 4544, FALCON, "q4_k_m", Type.Q8_0),
        ("blk.0.ffn_up.weight", 1024, BLOOM, "q8_0", Type.Q8_0),
        ("blk.0.ffn_up.weight", 72, BLOOM, "q8_0", Type.F16),  # nor 72 of 32
        ("blk.0.ffn_up.weight", 72, BLOOM, "q4_k_m", Type.F16),
        ("blk.0.ffn_up.weight", 72, BLOOM, "bf16", Type.BF16),
    ],
)
def test_each_tensor_has_the_type_that_llama_cpp_would_choose(name, width, config, kind, expected):
    shape = (width,) if width is None else (8, width)
    assert gguf_file.type_of(name, (1024,) if width is None else shape, config, kind) == expected


@pytest.mark.parametrize("type", [Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.Q8_0, Type.Q5_0, Type.Q5_1])
def test_quantized_rows_come_near_and_do_not_depend_on_those_beside_them(type: Type):
    torch.manual_seed(0)
    weights = torch.randn(5000, 1024)
    rows = gguf_file.stored(weights, type, llama_cpp.quantized)
    step = {Type.Q4_K: 0.5, Type.Q8_0: 0.03}.get(type, 0.25)
    error = torch.from_numpy(gguf.quants.dequantize(rows, type)) - weights
    assert 0 < error.abs().max() < step
    assert (gguf_file.stored(weights[4096:4100], type, llama_cpp.quantized) == rows[4096:4100]).all()
    if type not in gguf_file.SMALLER_BLOCKS:  # which gguf's own package does not quantize
        assert (gguf_file.stored(weights, type, gguf.quantize) != rows).mean() < 1e-3


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("falcon-tiny-rw", "a Falcon with ALiBi, biases or attention before"),
        ("llama-135m", "is a llama, and GGUF files"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(make_model, tmp_path: Path, shape: str, words: str):
    from sft.tools.random_model import SHAPES as ALL

    tokenizer = load_tokenizer(str(make_model("falcon-tiny")))
    with pytest.raises(UserError, match=words):
        gguf_file.check(ALL[shape], tokenizer, "f16", "mine")


def test_a_context_is_not_that_of_a_short_training(make_model, tmp_path: Path, written):
    import shutil

    folder = shutil.copytree(make_model("bloom-tiny"), tmp_path / "short")
    for length, expected in ((300, 2048), (4096, 4096)):
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings["model_max_length"] = length
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        file = GGUFReader(written(f"length-{length}", folder=folder))
        assert file.fields["bloom.context_length"].contents() == expected
