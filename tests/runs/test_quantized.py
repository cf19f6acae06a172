"""Every program with a model whose weights are quantized: one line that names the model to give instead."""

import json
import shutil
import socket
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from support.project import SAMPLE

STORED = {
    "GPTQ": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "AWQ": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
TRAIN = ["train_sft.py", "--data_path", SAMPLE, "--output_dir", "{output}", "--model_name_or_path", "{folder}"]
PROGRAMS = {
    "fine-tuning": TRAIN,
    "LoRA": [*TRAIN, "--lora_r", "4"],
    "the plan": [*TRAIN, "--plan"],
    "the terminal": ["-m", "sft.chat", "{folder}"],
    "the terminal in 8 bits": ["-m", "sft.chat", "--quantize", "q8_0", "{folder}"],
    "a smaller vocabulary": ["-m", "sft.tools.trim_vocab", "--data", SAMPLE, "{folder}", "{output}"],
    "the export": ["-m", "sft.tools.export", "{folder}", "{output}"],
    "a GGUF file": ["-m", "sft.tools.export", "{folder}", "{output}.gguf"],
    "the page": ["app.py", "--port", "{port}", "--checkpoint", "{folder}"],
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
    words = [str(word).format(folder=folder, output=tmp_path / "output", port=port) for word in PROGRAMS[program]]
    result = run(*words)
    assert result.returncode == 2, result.stderr
    line = result.stderr.splitlines()[-1]
    assert (
        line.startswith(f"error: {folder} holds 4-bit {method} weights, ") and "such as bigscience/bloom-560m" in line
    )
    assert "Traceback" not in result.stderr and not (tmp_path / "output" / "config.json").exists()


def test_an_adapter_of_a_quantized_model_is_one_line(run, make_model, tmp_path: Path):
    folder = Path(shutil.copytree(make_model("bloom-tiny"), tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(model, LoraConfig(target_modules=["query_key_value"])).save_pretrained(tmp_path / "adapter")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": STORED["GPTQ"]}))
    for program in (["-m", "sft.chat", tmp_path / "adapter"], ["-m", "sft.tools.export", tmp_path / "adapter", "out"]):
        result = run(*map(str, program))
        assert result.returncode == 2, result.stderr
        expected = (
            f"{folder} holds 4-bit GPTQ weights, into which the LoRA adapter {tmp_path / 'adapter'} cannot be merged"
        )
        assert result.stderr.splitlines()[-1].startswith(f"error: {expected}")
