"""Flags as other projects call them: each is answered with its name here, or why it is not needed."""

import re
import sys

import pytest

from sft.program import UserError
from sft.training import other_names

# Parts of commands as people type them elsewhere, and what one line must say of them.
COMMANDS = {
    "Stanford Alpaca": (
        "--bf16 True --num_train_epochs 3 --evaluation_strategy no --warmup_ratio 0.03 --lr_scheduler_type cosine "
        "--fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer --tf32 True",
        ["--evaluation_strategy (type --eval_strategy)", "--warmup_ratio (type --warmup_steps with", "sh ds_all.sh"],
    ),
    "alpaca-lora": (
        "--base_model x --cutoff_len 512 --val_set_size 2000 --micro_batch_size 4 --num_epochs 3 --train_on_inputs "
        "--group_by_length --lora_target_modules [q_proj,v_proj] --prompt_template_name alpaca --wandb_project mine",
        ["(type --model_name_or_path)", "(type --eval_fraction with", "--num_epochs (type --num_train_epochs)"]
        + ["no batch has padding", "the prompt is Alpaca's", "set WANDB_PROJECT"],
    ),
    "LLaMA-Factory": (
        "--stage sft --do_train --finetuning_type lora --lora_rank 8 --lora_target all --dataset alpaca_zh_demo "
        "--template default --overwrite_cache --overwrite_output_dir --plot_loss --preprocessing_num_workers 16",
        ["--lora_rank (type --lora_r)", "--lora_target (type --lora_target_modules)", "--dataset (type --data_path)"]
        + ["the same command resumes", "loss_curve.png is always drawn", "LoRA with --lora_r 16"],
    ),
    "BELLE": (
        "--llama --use_lora True --use_int8_training --lora_config configs/lora_config_bloom.json --train_file a.json "
        "--validation_file b.json --use_flash_attention",
        ["the family is read from", "there is no loading in 8 bits", "--train_file (type --data_path)"]
        + ["--validation_file (type --eval_data_path)", "is built in"],
    ),
    "TRL": (
        "--dataset_name trl-lib/Capybara --torch_dtype bfloat16 --max_seq_length 2048 --use_peft --load_in_8bit "
        "--attn_implementation flash_attention_2 --assistant_only_loss True --dataset_num_proc 4",
        ["--torch_dtype (type --bf16 True or --fp16 True", "--max_seq_length (type --model_max_length)"]
        + ["the loss is on every answer", "(type --preprocessing_num_workers)"],
    ),
    "axolotl": (
        "--base-model x --sequence-len 2048 --micro-batch-size 2 --sample-packing --adapter qlora --num-epochs=1",
        ["--sequence-len (type --model_max_length)", "--sample-packing (type --packing True)"]
        + ["--num-epochs (type --num_train_epochs)"],
    ),
    "older transformers": (
        "--logging_dir runs --no_cuda --per_gpu_train_batch_size 4 --adafactor True --save_safetensors True "
        "--include_inputs_for_metrics --use_mps_device --push_to_hub_model_id mine",
        ["TENSORBOARD_LOGGING_DIR=FOLDER", "--no_cuda (type --use_cpu True)", "(type --optim adafactor)"]
        + ["hf upload OWNER/NAME"],
    ),
}
EXAMPLES = {
    "--overwrite_output_dir": "unknown flag --overwrite_output_dir; leave it out: the same command resumes, and a new "
    "run takes a new --output_dir",
    "--max_seq_length 512": "unknown flag --max_seq_length; type --model_max_length",
    "--max-seq-length=512": "unknown flag --max-seq-length; type --model_max_length",
    "--learnin_rate 1": "unknown flag --learnin_rate; type --learning_rate",
    "--frobnicate": "unknown flag --frobnicate; --help lists every flag",
    "--liger_kernel_config {}": "unknown flag --liger_kernel_config; leave it out: the loss already holds no logits",
    "--report_to tensorboard wandb": "wandb belongs to no flag; put a value with spaces in quotes, or leave it out",
}
GOOD = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o"]


def error_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    import train_sft

    monkeypatch.setattr(sys, "argv", ["train_sft.py", *words])
    with pytest.raises(UserError) as refused:
        train_sft.parse_arguments()
    return str(refused.value)


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Return every flag of train_sft.py."""
    from train_sft import DataArguments, ModelArguments, Parser, PlanArguments, TrainingArguments

    return set(Parser((ModelArguments, DataArguments, PlanArguments, TrainingArguments))._option_string_actions)


def test_no_name_of_others_is_a_flag_here(known: set[str]):
    names = [name for names in other_names.ANSWERS.values() for name in names.split()]
    assert len(names) == len(set(names))
    # Both are transformers' own, take no text on a command line, and are answered before argparse fails on it.
    assert {name for name in names if f"--{name}" in known} == {"liger_kernel_config", "parallelism_config"}


def test_every_flag_in_an_answer_is_a_flag_here(known: set[str]):
    named = {flag for answer in other_names.ANSWERS for flag in re.findall(r"--[a-z_0-9-]+", answer)}
    assert named - known == {"--revision", "--local-dir"}  # of hf download


@pytest.mark.parametrize("project", COMMANDS)
def test_a_command_of_another_project_is_answered_in_one_line(project: str, monkeypatch: pytest.MonkeyPatch):
    words, says = COMMANDS[project]
    line = error_of(words.split(), monkeypatch)
    assert line.startswith("unknown flags: ") and "\n" not in line and "--help lists" not in line
    assert [each for each in says if each not in line] == []


@pytest.mark.parametrize("words", EXAMPLES)
def test_a_name_is_answered(words: str, monkeypatch: pytest.MonkeyPatch):
    assert error_of([*GOOD, *words.split()], monkeypatch) == EXAMPLES[words]


def test_a_file_of_settings_is_told_what_they_are_here(monkeypatch: pytest.MonkeyPatch):
    line = error_of(["bloom_lora_sft.yaml"], monkeypatch)
    assert line.startswith("bloom_lora_sft.yaml is not a flag; settings are given as flags: --model_name_or_path ")


def test_a_known_flag_is_never_unknown(known: set[str]):
    other_names.check([*GOOD, "--bf16", "--packing=True", "--no_skip_memory_metrics", "-h", "--", "--help"], known)
