"""transformers' own flags: each works, or is refused in one line before a model or a record is read."""

import shlex
import sys
from dataclasses import fields

import pytest
import transformers
from transformers.debug_utils import DebugOption
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from sft.program import UserError
from sft.training import arguments, flags, optimization
from support.flag_table import TABLE, WORKS, WORKS_ALONE
from support.project import PROJECT

CASES = [(words, says) for cases in TABLE.values() for words, says in cases.items()]
ENUMS = {
    "optim": [each.value for each in OptimizerNames],
    "lr_scheduler_type": [each.value for each in SchedulerType],
    "eval_strategy": [each.value for each in IntervalStrategy],
    "logging_strategy": [each.value for each in IntervalStrategy],
    "save_strategy": [each.value for each in SaveStrategy],
    "hub_strategy": [each.value for each in HubStrategy],
    "debug": [each.value for each in DebugOption],
    "report_to": [*INTEGRATION_TO_CALLBACK, "all", "none"],
}
ENUMS |= {
    each.name: list(each.metadata["choices"])
    for each in fields(transformers.TrainingArguments)
    if "choices" in each.metadata
}


def settle(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what train_sft.py does with its command line before it looks for a model; its run has 4 steps."""
    import train_sft
    from sft.training import resume

    given = ["--model_name_or_path", "nowhere", "--data_path", "nothing", "--output_dir", "never"]
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *given, *shlex.split(words)])
    for name in ("is_torch_bf16_gpu_available", "is_torch_tf32_available"):  # cached from tests that pretend a GPU
        monkeypatch.setattr(flags, name, lambda: False)
    model_args, data_args, plan_args, training_args = train_sft.parse_arguments()
    arguments.settle(data_args, training_args)
    arguments.check(model_args, data_args, plan_args, training_args)
    optimization.check_schedule(training_args, 4)
    if training_args.resume_from_checkpoint:
        resume.find(training_args, None, 4)


def test_every_flag_of_transformers_is_in_the_table():
    """A new release of transformers brings new flags: each needs a row that says what is right."""
    assert TABLE.keys() == {each.name for each in fields(transformers.TrainingArguments)}
    assert flags.REFUSED.keys() | flags.RANGES.keys() <= {each.name for each in fields(arguments.TrainingArguments)}


@pytest.mark.parametrize("name", ENUMS)
def test_every_choice_of_a_flag_is_in_the_table(name: str):
    typed = {words.split(" --")[0] for words in TABLE[name]}
    assert [choice for choice in ENUMS[name] if f"--{name} {choice}" not in typed] == []


@pytest.mark.parametrize(("words", "says"), CASES, ids=[words for words, _ in CASES])
def test_a_flag_is_settled_before_training_begins(words: str, says: str | None, monkeypatch: pytest.MonkeyPatch):
    if says in (WORKS, WORKS_ALONE):
        settle(words, monkeypatch)
        return
    with pytest.raises(UserError) as refused:
        settle(words, monkeypatch)
    line = str(refused.value)
    assert says in line and "\n" not in line
    assert "hf_secret" not in line


def test_less_perplexity_is_better(monkeypatch: pytest.MonkeyPatch, tmp_path):
    args = arguments.TrainingArguments(output_dir=str(tmp_path), metric_for_best_model="perplexity", use_cpu=True)
    assert args.greater_is_better is False
    best = {"save_strategy": "best", "eval_strategy": "epoch"}
    args = arguments.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **best)
    assert (args.metric_for_best_model, args.greater_is_better) == ("loss", False)


LAUNCHED = {  # what accelerate's launcher puts into the environment
    "ACCELERATE_USE_FSDP=true": "type ZERO_STAGE=3 sh ds_all.sh",
    "ACCELERATE_USE_DEEPSPEED=true": "add --deepspeed ds_zero2_config.json",
    "ACCELERATE_MIXED_PRECISION=bf16": "type --bf16 True or --fp16 True here",
    "ACCELERATE_MIXED_PRECISION=no": WORKS,
}


@pytest.mark.parametrize("setting", LAUNCHED)
def test_what_a_launcher_was_told_is_not_half_done(setting: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(*setting.split("="))
    if LAUNCHED[setting] == WORKS:
        settle("", monkeypatch)
        return
    with pytest.raises(UserError, match=LAUNCHED[setting]):
        settle("", monkeypatch)


def test_a_launcher_and_a_flag_may_ask_for_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    settle("--bf16 True --use_cpu True", monkeypatch)


def test_offload_has_its_own_optimizer(monkeypatch: pytest.MonkeyPatch):
    words = f"--use_cpu True --deepspeed {PROJECT / 'ds_zero2_config.json'} --offload optimizer --optim adafactor"
    with pytest.raises(UserError, match="runs DeepSpeed's own AdamW, not --optim adafactor; leave --optim out"):
        settle(words, monkeypatch)
