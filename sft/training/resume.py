"""Going on from a checkpoint: which one, and whether the run that made it had the same settings."""

import json
import re
from pathlib import Path

from accelerate.utils import gather_object
from transformers import TrainingArguments

from sft.data.sequences import Sequences
from sft.program import UserError
from sft.training.checkpoints import MARKER, can_go_on, complete_steps, fault_of, folders_in, step_of

SETTINGS_BY_FLAG = (
    "model_max_length",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "fp16",
)


def settings_of(
    args: TrainingArguments, sequences: Sequences, zero_stage: int, model_settings: dict[str, object]
) -> dict[str, object]:
    """Return what must be the same, by name, for a run to go on exactly from another's checkpoint.

    `model_settings` are those of the model and of LoRA. Without DeepSpeed another number of processes may go on, with
    as many rows a step.
    """
    flags = {f"--{name}": getattr(args, name) for name in SETTINGS_BY_FLAG}
    return {
        **model_settings,
        "the examples' hash": sequences.fingerprint(),
        "--packing": sequences.is_packed,
        "ZERO_STAGE": zero_stage,
        **({"processes": args.world_size} if zero_stage else {}),
        "rows a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        **{name: getattr(value, "value", value) for name, value in flags.items()},
    }


def check_settings(folder: Path, settings: dict[str, object]) -> None:
    """Raise UserError if a run with other settings made the checkpoint, or if it has no optimizer state."""
    start_anew = f"start a new run from its weights: --model_name_or_path {folder} --output_dir ANOTHER"
    if not can_go_on(folder):
        raise UserError(f"{folder} has weights but no optimizer state, so no run can go on from it; {start_anew}")
    made_with = json.loads((folder / MARKER).read_text(encoding="utf-8"))["settings"]
    for name, value in settings.items():
        if name in made_with and made_with[name] != value:
            raise UserError(
                f"{folder} was made with {name} {made_with[name]}, and this command has {value}; go on with "
                f"{made_with[name]}, or {start_anew}"
            )


def find(args: TrainingArguments, settings: dict[str, object], num_steps: int) -> Path | None:
    """Return the checkpoint that a run goes on from: the newest that is complete on every host, or the one it names.

    None begins anew. Raises UserError if the run has other settings, or the checkpoint it names is incomplete.
    """
    named = args.resume_from_checkpoint
    if named and named.lower() != "true":
        if fault := fault_of(Path(named)):
            raise UserError(f"--resume_from_checkpoint {named} cannot be gone on from: {fault}; leave the flag out")
        folder = Path(named)
        if not re.fullmatch(r"checkpoint-\d+", folder.name):
            raise UserError(f"--resume_from_checkpoint {named} is not named checkpoint-STEP; give it its name back")
        if later := [other for other in folders_in(args.output_dir) if step_of(other) > step_of(folder)]:
            raise UserError(
                f"--resume_from_checkpoint {named} has {later[-1]} after it, and the run would mix its own with it; "
                "delete what is later, or give another --output_dir"
            )
    else:
        steps_by_rank = gather_object([complete_steps(args.output_dir, tell=args.should_log)])
        steps = set.intersection(*map(set, steps_by_rank))
        if not steps:
            return None
        folder = Path(args.output_dir, f"checkpoint-{max(steps)}")
    if step_of(folder) < num_steps:
        check_settings(folder, settings)
    return folder
