"""GGUF files out of checkpoints: what is beside them, adapters, and what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file

from support.adapters import save_adapter_and_merged

WEIGHTS = "model.safetensors"


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(file).tensors}


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_gguf_file_comes_with_what_ollama_needs(run, make_model, tmp_path: Path, kind: str):
    output = tmp_path / "new folder" / "mine.v2.gguf"
    folder = make_model("bloom-tiny")
    result = run("-m", "sft.tools.export", folder, output, "--dtype", kind)
    modelfile = output.with_name("mine.v2.Modelfile")
    assert result.returncode == 0 and sorted(output.parent.iterdir()) == sorted([output, modelfile])
    assert result.stdout.splitlines()[-2:] == [
        f"{folder} -> {output} in {kind}",
        f"Ollama: ollama create mine.v2 -f {modelfile}",
    ]
    text = modelfile.read_text(encoding="utf-8")
    assert text.startswith(f'FROM ./{output.name}\nTEMPLATE """') and "PARAMETER num_ctx 2048\n" in text
    stops = re.findall(r'PARAMETER stop """(.*?)"""', text, re.DOTALL)
    assert stops == ["\n### Instruction", "\nHuman:"] and "PARAMETER repeat_penalty 1.0\n" in text
    expected = load_file(folder / WEIGHTS)["transformer.h.1.mlp.dense_4h_to_h.weight"].numpy()
    [found] = [tensor for tensor in GGUFReader(output).tensors if tensor.name == "blk.1.ffn_down.weight"]
    within = 0 if kind == "f32" else np.abs(expected).max() / 127
    assert np.abs(dequantize(found.data, found.tensor_type) - expected).max() <= within


def test_an_adapter_is_merged_on_the_way(run, make_model, tmp_path: Path):
    save_adapter_and_merged(make_model("falcon-tiny"), tmp_path)
    for name in ("adapter", "merged"):
        result = run("-m", "sft.tools.export", tmp_path / name, tmp_path / f"{name}.gguf", "--dtype", "f32")
        assert result.returncode == 0, result.stderr
    merged, plain = tensors_of(tmp_path / "merged.gguf"), tensors_of(tmp_path / "adapter.gguf")
    assert merged.keys() == plain.keys()
    assert all(np.allclose(merged[name], plain[name], rtol=0, atol=1e-6) for name in merged)


@pytest.mark.parametrize(
    ("shape", "output", "flags", "said"),
    [
        ("bloom-tiny", "mine.gguf", ["--dtype", "bfloat16"], "none of f32, f16, bf16, q8_0, q4_k_m, and "),
        ("bloom-tiny", "folder", ["--dtype", "q8_0"], "for q8_0 give a file that ends in .gguf"),
        ("falcon-tiny-rw", "mine.gguf", [], "is a Falcon with ALiBi, biases or attention before its feed-forward"),
        ("bloom-tiny", "kept.gguf", [], "kept.gguf already exists; give a new file"),
        ("bloom-tiny", "kept.gguf/mine.gguf", [], "kept.gguf is a file; expected a folder"),
    ],
)
def test_a_gguf_file_that_cannot_be_is_refused(run, make_model, tmp_path: Path, shape, output, flags, said):
    (tmp_path / "kept.gguf").write_text("mine")
    before = sorted(tmp_path.iterdir())
    result = run("-m", "sft.tools.export", make_model(shape), tmp_path / output, *flags)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1) and result.stderr.startswith("error: ")
    assert said in result.stderr
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "kept.gguf").read_text() == "mine"
