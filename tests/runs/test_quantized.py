"""Every program with a model whose weights are quantized: one line that names the model to give instead."""

import json
import shutil
import socket
from pathlib import Path

import pytest

from support.project import SAMPLE

STORED = {
    "GPTQ": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "AWQ": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
PROGRAMS = {
    "fine-tuning": ["train_sft.py", "--data_path", SAMPLE, "--output_dir", "{output}", "--model_name_or_path"],
    "LoRA": [
        "train_sft.py",
        "--lora_r",
        "4",
        "--data_path",
        SAMPLE,
        "--output_dir",
        "{output}",
        "--model_name_or_path",
    ],
    "the plan": ["train_sft.py", "--plan", "--data_path", SAMPLE, "--output_dir", "{output}", "--model_name_or_path"],
    "the terminal": ["-m", "sft.chat"],
    "the terminal in 8 bits": ["-m", "sft.chat", "--quantize", "int8"],
    "the page": ["app.py", "--port", "{port}", "--checkpoint"],
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("method", STORED)
def test_a_quantized_model_is_one_line(method: str, program: str, run, make_model, tmp_path: Path):
    folder = Path(shutil.copytree(make_model("bloom-tiny"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": STORED[method]}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(word).format(output=tmp_path / "output", port=port) for word in PROGRAMS[program]]
    result = run(*words, folder)
    assert result.returncode == 2, result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"error: {folder} holds 4-bit {method} weights, ") and "bigscience/bloom-560m; " in line
    assert "Traceback" not in result.stderr
