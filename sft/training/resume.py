"""Resuming: from which checkpoint, and whether the run that made it had the same settings."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from accelerate.utils import gather_object
from transformers import PretrainedConfig

from sft.data.sequences import Sequences
from sft.model import lora
from sft.model.load import count_parameters
from sft.program import UserError
from sft.training.arguments import ModelArguments, TrainingArguments
from sft.training.checkpoints import (
    MARKER,
    STATE,
    complete_steps,
    fault_of,
    fault_of_weights,
    folders_in,
    has_optimizer_state,
    step_of,
)


def _flag(name: str):
    return field(metadata={"flag": name})


CONSTANT = ("constant", "constant_with_warmup")  # schedules that are the same however long the run is


@dataclass(frozen=True)
class RunSettings:
    """What two runs must share for one to resume exactly from the other's checkpoint.

    Each field has the name that a user knows it by, which is also its key in a checkpoint's marker.
    """

    num_parameters: int = _flag("parameters")
    lora_r: int = _flag("--lora_r")
    lora_alpha: int | None = _flag("--lora_alpha")
    lora_dropout: float | None = _flag("--lora_dropout")
    lora_target_modules: list[str] | None = _flag("--lora_target_modules")
    load_in_4bit: bool = _flag("--load_in_4bit")
    num_trained: int = _flag("trained parameters")
    data_fingerprint: str = _flag("the examples' hash")
    packing: bool = _flag("--packing")
    zero_stage: int = _flag("ZERO_STAGE")
    num_processes: int | None = _flag("processes")  # None without DeepSpeed: any number may resume
    sequences_per_step: int = _flag("rows a step")
    model_max_length: int = _flag("--model_max_length")
    seed: int = _flag("--seed")
    data_seed: int | None = _flag("--data_seed")
    train_sampling_strategy: str = _flag("--train_sampling_strategy")
    learning_rate: float = _flag("--learning_rate")
    lr_scheduler_type: str = _flag("--lr_scheduler_type")
    lr_scheduler_kwargs: dict | None = _flag("--lr_scheduler_kwargs")
    num_steps: int | None = _flag("steps")  # None where the learning rate does not depend on it
    warmup_steps: float = _flag("--warmup_steps")
    weight_decay: float = _flag("--weight_decay")
    max_grad_norm: float = _flag("--max_grad_norm")
    optim: str = _flag("--optim")
    adam_beta1: float = _flag("--adam_beta1")
    adam_beta2: float = _flag("--adam_beta2")
    adam_epsilon: float = _flag("--adam_epsilon")
    neftune_noise_alpha: float | None = _flag("--neftune_noise_alpha")
    share_prefixes: bool = _flag("--share_prefixes")
    bf16: bool = _flag("--bf16")
    fp16: bool = _flag("--fp16")

    @property
    def is_lora(self) -> bool:
        """Tell whether LoRA is trained instead of all weights."""
        return bool(self.lora_r)

    def named(self) -> dict[str, object]:
        """Return the settings by the names that a user knows, as a checkpoint's marker holds them."""
        return {each.metadata["flag"]: getattr(self, each.name) for each in fields(self)}

    def differences(self, made_with: dict[str, object]) -> Iterator[tuple[str, object, object]]:
        """Yield (name, value of the checkpoint, own value) of each setting of a marker that is another one here."""
        for name, value in self.named().items():
            if name in made_with and made_with[name] != value:
                yield name, made_with[name], value


def settings_of(
    model_args: ModelArguments,
    args: TrainingArguments,
    data: Sequences,
    config: PretrainedConfig,
    num_steps: int,
) -> RunSettings:
    """Return a run's settings; raise UserError if LoRA is asked for layers that the model does not have."""
    num_parameters, lora_config = count_parameters(config), model_args.lora_config
    own = {name: getattr(model_args, name) for name in ("lora_alpha", "lora_dropout", "lora_target_modules")}
    shared = {each.name for each in fields(RunSettings)} & vars(args).keys()
    values = {name: getattr(args, name) for name in shared}
    return RunSettings(
        **{name: getattr(value, "value", value) for name, value in values.items()},
        **(own if lora_config else dict.fromkeys(own)),
        num_parameters=num_parameters,
        lora_r=model_args.lora_r,
        load_in_4bit=model_args.load_in_4bit,
        num_trained=lora.count_trained(config, lora_config) if lora_config else num_parameters,
        data_fingerprint=data.fingerprint(),
        packing=data.is_packed,
        share_prefixes=data.shares_prefixes,
        zero_stage=args.zero_stage,
        num_processes=args.world_size if args.zero_stage else None,
        sequences_per_step=args.sequences_per_step,
        num_steps=None if values["lr_scheduler_type"] in CONSTANT else num_steps,
    )


# How to name what must stay the same where it is not a flag with its value.
SAME = {
    "parameters": "the same model",
    "trained parameters": "the same model and LoRA flags",
    "the examples' hash": "the same data",
    "processes": "as many processes",
    "rows a step": "as many rows a step",
    "steps": "the same --num_train_epochs and --max_steps, since the learning rate depends on their number",
}


def check_settings(folder: Path, settings: RunSettings) -> None:
    """Raise UserError if a run with other settings made the checkpoint, or if it has no optimizer state."""
    start_anew = f"start a new run from its weights: --model_name_or_path {folder} --output_dir ANOTHER"
    if not has_optimizer_state(folder):
        raise UserError(f"{folder} has weights but no optimizer state, so no run can resume from it; {start_anew}")
    made_with = json.loads((folder / MARKER).read_text(encoding="utf-8"))["settings"]
    for name, before, now in settings.differences(made_with):
        same = SAME.get(name) or (f"no {name}" if before is None else f"{name} {before}")
        raise UserError(
            f"{folder} was made with {name} {before}, and this command has {now}; resume with {same}, or {start_anew}"
        )


def find(args: TrainingArguments, settings: RunSettings, num_steps: int) -> Path | None:
    """Return the checkpoint to resume from: the newest that is complete on every host, or the one that is named.

    None starts a new run. Raises UserError if the settings differ, or the named checkpoint is incomplete.
    """
    named = args.resume_from_checkpoint
    folder = _newest_on_all_hosts(args) if not named or named.lower() == "true" else _named(named, args.output_dir)
    if folder and step_of(folder) < num_steps:
        check_settings(folder, settings)
    return folder


def has_ended(args: TrainingArguments, resumed: Path | None, num_steps: int) -> bool:
    """Tell whether the run has made all its steps, saved its result, and kept no checkpoint of the last one.

    With --load_best_model_at_end the best checkpoint may be the only one, long before the last step.
    """
    output_dir = Path(args.output_dir)
    try:
        num_made = json.loads((output_dir / STATE).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    if resumed is None or not args.load_best_model_at_end or not isinstance(num_made, int):
        return False
    return num_made >= num_steps > step_of(resumed) and not fault_of_weights(output_dir)


def _newest_on_all_hosts(args: TrainingArguments) -> Path | None:
    steps_by_rank = gather_object([complete_steps(args.output_dir, tell=args.should_log)])
    steps = set.intersection(*map(set, steps_by_rank))
    return Path(args.output_dir, f"checkpoint-{max(steps)}") if steps else None


def _named(name: str, output_dir: str) -> Path:
    """Return the checkpoint of --resume_from_checkpoint; raise UserError if it cannot be used."""
    folder = Path(name)
    if fault := fault_of(folder):
        raise UserError(f"cannot resume from --resume_from_checkpoint {name}: {fault}; leave the flag out")
    if not re.fullmatch(r"checkpoint-\d+", folder.name):
        raise UserError(f"--resume_from_checkpoint {name} must be named checkpoint-STEP; rename it back")
    if later := [other for other in folders_in(output_dir) if step_of(other) > step_of(folder)]:
        raise UserError(
            f"--resume_from_checkpoint {name} is older than {later[-1]}, and the run would mix both; "
            "delete the later ones, or give another --output_dir"
        )
    return folder
