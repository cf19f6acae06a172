"""LoRA on flat batches equals LoRA by hand, adapters are whole, and merged folders compute the same."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.model import lora, patch
from sft.model.load import count_parameters, load_config
from sft.tools.random_model import build_model
from support.plain_loop import FIXED, logged, plain_losses
from support.project import PROJECT, TINY_SHAPES

RANK = 4
LORA = ["--lora_r", RANK]
BITSANDBYTES = Path(sys.prefix, "bitsandbytes")  # where tests/run.sh puts it, so that it slows no other test down
needs_bitsandbytes = pytest.mark.skipif(
    not BITSANDBYTES.is_dir(), reason="no bitsandbytes; sh tests/run.sh installs it"
)


@pytest.fixture
def train(run: Callable, make_model: Callable, data: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that trains a shape with LoRA into a folder."""

    def train(shape: str, output: Path, *flags: object, code: int = 0, **environment: str):
        arguments = ["--model_name_or_path", make_model(shape), "--data_path", data, "--output_dir", output]
        result = run("train_sft.py", *arguments, "--learning_rate", "1e-2", *LORA, *flags, **environment)
        assert result.returncode == code, result.stdout[-2000:] + result.stderr[-2000:]
        return result

    return train


def with_lora(shape: str) -> PeftModel:
    """Return a model for flat batches with LoRA whose second matrices are no zeros."""
    model = build_model(shape).eval()
    patch.install(model)
    model = lora.add(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM"), "", seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def logits_of(model, tokenizer, text: str = "写一首关于春天的诗。") -> torch.Tensor:
    with torch.no_grad():
        return model(tokenizer(text, return_tensors="pt").input_ids).logits


# ---------------------------------------------------------------------------------------------------------- equalities


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", TINY_SHAPES)
def test_loss_and_gradients_of_a_flat_row_are_those_of_each_example_alone(shape, checkpointing):
    model = with_lora(shape)
    generator = torch.Generator().manual_seed(0)
    examples = [torch.randint(1024, (1, length), generator=generator) for length in (7, 20, 12)]
    labels = [example.masked_fill(torch.arange(example.shape[1]) < 3, -100) for example in examples]
    num_labels = sum((some[:, 1:] != -100).sum() for some in labels)
    with patch.removed(model):
        for example, some in zip(examples, labels, strict=True):
            logits = model(input_ids=example, use_cache=False).logits[0, :-1]
            (functional.cross_entropy(logits, some[0, 1:], reduction="sum") / num_labels).backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    assert expected and all(gradient.abs().max() > 1e-4 for gradient in expected.values())
    model.zero_grad()
    if checkpointing:
        model.train()
        model.activation_checkpointing_enable()
    positions = torch.cat([torch.arange(example.shape[1]) for example in examples])[None]
    model(input_ids=torch.cat(examples, 1), position_ids=positions, labels=torch.cat(labels, 1)).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.requires_grad == (name in expected) == ("lora_" in name)
        if weight.requires_grad:
            torch.testing.assert_close(weight.grad, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ["bloom-tiny-6-heads", "falcon-tiny", "falcon-tiny-rw"])
def test_every_step_has_the_loss_of_lora_by_hand(shape, train, make_model, rows, tmp_path):
    flags = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--num_train_epochs", 3]
    train(shape, tmp_path, *FIXED, *flags, "--activation_checkpointing", shape == "falcon-tiny")
    steps = 3 * [rows[start : start + 4] for start in range(0, 24, 4)]
    expected = plain_losses(make_model(shape), steps, lora_rank=RANK)
    assert logged(tmp_path) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 0.1


def test_accumulating_eight_examples_equals_a_batch_of_eight(train, tmp_path):
    for batch, accumulated in ((1, 8), (8, 1)):
        sizes = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulated]
        train("bloom-tiny", tmp_path / str(batch), *FIXED, *sizes, "--num_train_epochs", 1)
    assert logged(tmp_path / "1") == pytest.approx(logged(tmp_path / "8"), rel=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_killed_and_started_again_equals_never_interrupted(packing, train, tmp_path):
    flags = ["--packing", packing, "--model_max_length", 300, "--max_steps", 4, "--save_steps", 2]
    flags += ["--lora_dropout", 0.1, "--per_device_train_batch_size", 1, "--logging_steps", 1]
    train("falcon-tiny", tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-4")
    shutil.rmtree(tmp_path / "killed" / "adapter")
    (tmp_path / "killed" / "model.safetensors").unlink()
    assert "resuming from" in train("falcon-tiny", tmp_path / "killed", *flags).stdout
    for name in ("adapter", "checkpoint-4"):
        whole, killed = adapter_of(tmp_path / "whole" / name), adapter_of(tmp_path / "killed" / name)
        assert whole.keys() == killed.keys() and all(torch.equal(whole[key], killed[key]) for key in whole)
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")


@pytest.mark.slow
def test_two_ranks_of_either_stage_equal_one_process(make_model, data, cache_dir, warm_python, tmp_path):
    flags = ["--max_steps", "4", "--logging_steps", "1", "--learning_rate", "1e-2", "--warmup_steps", "0"]
    flags += ["--packing", "False", "--adam_epsilon", "1e-3", "--lora_r", "4", "--save_strategy", "no"]
    places = {"MODEL": str(make_model("bloom-tiny")), "DATA": str(data), "PYTHON": sys.executable}
    places |= {"PYTHON_EXEC": warm_python}
    ways = {"one": ["sh", "base_run.sh", "--gradient_accumulation_steps", "2"]}
    ways |= {"2": ["sh", "ds_all.sh"], "3": ["sh", "ds_all.sh"]}
    for name, command in ways.items():
        environment = {"OUTPUT": str(tmp_path / name), "DEVICE": "cpu", "NUM_GPUS": "2", "ZERO_STAGE": name}
        result = subprocess.run(
            [*command, *flags],
            cwd=PROJECT,
            env={**os.environ, "HF_DATASETS_CACHE": str(cache_dir), **places, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    expected = adapter_of(tmp_path / "one" / "adapter")
    assert any(matrix.abs().max() > 1e-3 for name, matrix in expected.items() if "lora_B" in name)
    for stage in ("2", "3"):
        assert logged(tmp_path / stage) == pytest.approx(logged(tmp_path / "one"), rel=1e-5)
        found = adapter_of(tmp_path / stage / "adapter")
        assert found.keys() == expected.keys(), "an adapter of a split model is empty or has other names"
        assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)
        AutoModelForCausalLM.from_pretrained(tmp_path / stage)


# ------------------------------------------------------------------------------------------------------ what comes out


@pytest.fixture(scope="module")
def trained(make_model, data, run, tmp_path_factory) -> tuple[Path, str]:
    """A finished run, and what it printed."""
    output = tmp_path_factory.mktemp("lora") / "model"
    given = ["--model_name_or_path", make_model("bloom-tiny"), "--data_path", data, "--output_dir", output, *LORA]
    flags = ["--learning_rate", "1e-2", "--max_steps", 3, "--save_steps", 3, "--eval_fraction", 0.2]
    result = run("train_sft.py", *given, *flags)
    assert result.returncode == 0, result.stderr
    return output, result.stdout


def test_the_merged_folder_computes_what_base_and_adapter_do(trained, make_model):
    output, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(output)
    base = AutoModelForCausalLM.from_pretrained(make_model("bloom-tiny"))
    merged = logits_of(AutoModelForCausalLM.from_pretrained(output), tokenizer)
    assert (merged - logits_of(base, tokenizer)).abs().max() > 1e-2, "nothing was trained"
    adapted = logits_of(PeftModel.from_pretrained(base, output / "adapter"), tokenizer)
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5)
    assert not (output / "adapter_config.json").exists(), "plain transformers would take the folder for an adapter"
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_header_and_card_say_what_share_is_trained(trained, make_model):
    output, stdout = trained
    total = count_parameters(load_config(str(make_model("bloom-tiny"))))
    # Two layers: 64 x 192, 64 x 64, 64 x 256 and 256 x 64, of which each has matrices of rank 4 on both sides.
    expected = 2 * 4 * ((64 + 192) + (64 + 64) + 2 * (64 + 256))
    assert sum(matrix.numel() for matrix in adapter_of(output / "adapter").values()) == expected
    assert f"{total:,} parameters, frozen; LoRA trains {expected:,} beside them ({expected / total:.2%})" in stdout
    assert f"{output} (merged) and {output}/adapter (adapter)" in stdout
    assert f"LoRA of rank {RANK}, {expected:,} parameters" in (output / "README.md").read_text(encoding="utf-8")


def test_a_checkpoint_is_an_adapter_that_chat_and_export_take(trained, run, tmp_path):
    output, _ = trained
    assert adapter_of(output / "checkpoint-3").keys() == adapter_of(output / "adapter").keys()
    assert not list((output / "checkpoint-3").glob("model*.safetensors"))
    assert run("-m", "sft.tools.export", output, tmp_path / "plain").returncode == 0
    exported, merged = load_file(tmp_path / "plain" / "model.safetensors"), load_file(output / "model.safetensors")
    assert all(torch.allclose(exported[name], merged[name], atol=1e-6) for name in merged)
    answered = run("-m", "sft.chat", output / "adapter", input="你好\n")
    assert answered.returncode == 0, answered.stderr


def test_without_merging_the_adapter_is_all(train, tmp_path):
    result = train("falcon-tiny", tmp_path, "--max_steps", 1, "--save_strategy", "no", "--merge_lora", "False")
    assert adapter_of(tmp_path / "adapter") and not list(tmp_path.glob("*.safetensors"))
    assert f"saved in {tmp_path}/adapter (adapter)" in result.stdout


def test_the_best_adapter_is_the_result(train, tmp_path):
    flags = ["--eval_fraction", "0.3", "--load_best_model_at_end", "True", "--save_steps", 1, "--eval_steps", 1]
    # The loss falls, so with the largest as the best that is the first checkpoint's and not the last one's.
    flags += ["--eval_strategy", "steps", "--max_steps", 3, "--metric_for_best_model", "eval_loss"]
    train("bloom-tiny", tmp_path, *flags, "--greater_is_better", "True")
    losses = logged(tmp_path, "eval_loss")[1:]
    assert losses[0] == max(losses)
    expected, found = adapter_of(tmp_path / "checkpoint-1"), adapter_of(tmp_path / "adapter")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_frozen_weights_are_held_in_what_the_run_computes_in(train, make_model, tmp_path):
    train("bloom-tiny", tmp_path, "--max_steps", 2, "--bf16", "True", "--use_cpu", "True", "--save_steps", 9)
    assert {matrix.dtype for matrix in adapter_of(tmp_path / "adapter").values()} == {torch.float32}
    assert {matrix.dtype for matrix in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


# ---------------------------------------------------------------------------------------------------------------- QLoRA


@needs_bitsandbytes
def test_four_bits_train_an_adapter_and_go_on(train, make_model, tmp_path):
    flags = ["--load_in_4bit", "--max_steps", 4, "--save_steps", 2, "--logging_steps", 1, "--eval_fraction", 0.2]
    assert "frozen in 4 bits" in train("bloom-tiny", tmp_path, *flags, PYTHONPATH=str(BITSANDBYTES)).stdout
    shutil.rmtree(tmp_path / "checkpoint-4")
    whole = adapter_of(tmp_path / "adapter")
    assert "resuming from" in train("bloom-tiny", tmp_path, *flags, PYTHONPATH=str(BITSANDBYTES)).stdout
    again = adapter_of(tmp_path / "adapter")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert logged(tmp_path)[-1] < logged(tmp_path)[0]
    plain = load_file(make_model("bloom-tiny") / "model.safetensors")
    merged = load_file(tmp_path / "model.safetensors")
    assert torch.equal(merged["transformer.word_embeddings.weight"], plain["transformer.word_embeddings.weight"])


@needs_bitsandbytes
def test_eight_bit_adam_trains(run, make_model, data, tmp_path):
    flags = ["--optim", "adamw_bnb_8bit", "--max_steps", 4, "--save_steps", 2, "--learning_rate", "1e-2"]
    given = ["--model_name_or_path", make_model("bloom-tiny"), "--data_path", data, "--output_dir", tmp_path]
    result = run("train_sft.py", *given, *flags, "--logging_steps", 1, PYTHONPATH=str(BITSANDBYTES))
    assert result.returncode == 0, result.stderr
    assert logged(tmp_path)[-1] < logged(tmp_path)[0]


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--lora_r", "-1"],
            "error: --lora_r -1 --lora_alpha None --lora_dropout 0.0 cannot be used: rank and alpha",
        ),
        (["--lora_dropout", "1"], "rank and alpha must be above 0, and dropout in [0, 1)"),
        (["--lora_r", "0", "--lora_alpha", "8"], "need LoRA, which is off; add --lora_r 16"),
        (["--lora_r", "0", "--load_in_4bit"], "need LoRA, which is off; add --lora_r 16"),
        (["--load_in_4bit"], "error: --load_in_4bit needs bitsandbytes; type pip install bitsandbytes=="),
        (["--optim", "paged_adamw_8bit"], "error: --optim paged_adamw_8bit needs bitsandbytes; type pip install"),
        (["--optim", "adamw_torch_8bit"], "type --optim adamw_bnb_8bit"),
        (["--lora_target_modules", "nothing"], "error: --lora_target_modules does not fit the model: "),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags, message, train, tmp_path):
    result = train("bloom-tiny", tmp_path / "out", *flags, code=2)
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "adapter").exists()


def test_four_bits_and_zero_3_are_refused(train, tmp_path):
    flags = ["--load_in_4bit", "--deepspeed", "ds_zero3_config.json", "--use_cpu", "True"]
    result = train("bloom-tiny", tmp_path, *flags, code=2)
    assert "--load_in_4bit does not go with ZeRO-3, which cannot split such weights; type ZERO_STAGE=2" in result.stderr


def test_another_rank_does_not_go_on_from_a_checkpoint(train, tmp_path):
    train("bloom-tiny", tmp_path, "--max_steps", 2, "--save_steps", 1)
    shutil.rmtree(tmp_path / "checkpoint-2")
    result = train("bloom-tiny", tmp_path, "--max_steps", 2, "--save_steps", 1, "--lora_r", "8", code=2)
    assert "was made with --lora_r 4, and this command has 8" in result.stderr
