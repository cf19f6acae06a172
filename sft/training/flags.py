"""Which of transformers' own flags do here what they say, and what to type in place of the others.

What a flag says by itself is checked while the arguments are made, before transformers looks at them.
"""

import json
import math
import os
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import torch
import transformers
from accelerate.utils import DynamoBackend
from transformers.debug_utils import DebugOption
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

from sft.program import UserError

SMALLEST, LARGEST = sys.float_info.min, sys.float_info.max  # above zero, and below infinity
# The least and the most that a number may be. Those that transformers itself refuses in one line are left to it.
RANGES = {
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("model_max_length", "dataloader_prefetch_factor", "eval_accumulation_steps", "ddp_bucket_cap_mb"),
            "ddp_timeout",
        ),
        (1, LARGEST),
    ),
    **dict.fromkeys(
        (
            *("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps", "eval_delay"),
            *("eval_steps", "dataloader_num_workers", "save_optimizer_limit"),
        ),
        (0, LARGEST),
    ),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps"), (SMALLEST, LARGEST)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, math.nextafter(1, 0))),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
}
METRICS = "is for predictions, and only the loss is measured here; leave it out"
UPLOAD = (
    "is not done while training; leave it out, and afterwards type "
    "hf upload OWNER/NAME OUTPUT_DIR --exclude 'checkpoint-*'"
)
ZERO_3 = "is not run here; to split the weights over your GPUs, type ZERO_STAGE=3 sh ds_all.sh, which uses DeepSpeed"
# Flags that are refused unless they have their default.
REFUSED = {
    "auto_find_batch_size": "would change what a step trains on; leave it out, and type --plan True to see what fits",
    "batch_eval_metrics": METRICS,
    "bf16_full_eval": "has no effect: evaluation computes as training does; type --bf16 True",
    "dataloader_drop_last": "would leave rows out of each epoch; leave it out",
    "dataloader_in_order": "False would make the order of rows depend on which process is faster; leave it out",
    "do_predict": "does nothing here; after training, type python -m sft.chat OUTPUT_DIR",
    "enable_jit_checkpoint": "is built in: SIGTERM saves a checkpoint and stops; leave it out",
    "fp16_full_eval": "has no effect: evaluation computes as training does; type --fp16 True",
    "fsdp": ZERO_3,
    "fsdp_config": ZERO_3,
    "hub_always_push": UPLOAD,
    "hub_model_id": UPLOAD,
    "hub_revision": UPLOAD,
    "hub_strategy": UPLOAD,
    "hub_token": UPLOAD,
    "ignore_data_skip": "would train rows twice after a stop; leave it out: resuming skips what has been trained",
    "include_for_metrics": METRICS,
    "label_names": "has no effect: the labels are the answers; leave it out",
    "label_smoothing_factor": "needs the logits of every word, which the loss here never holds; leave it out",
    "length_column_name": "has no effect: no batch has padding, so none is grouped by length; leave it out",
    "push_to_hub": UPLOAD,
    "remove_unused_columns": "would remove the lengths of examples, which attention needs; leave it out",
    "save_on_each_node": "does not save all weights; leave it out, and share the output folder",
    "use_cache": "keeps what training never reads; leave it out: the saved model generates with its cache",
    "use_liger_kernel": "is not needed: the loss here holds no logits either; leave it out",
}
OF_TRACKIO = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "hub_private_repo")
# Flags that take a JSON object, and the keys of those in which not every key has its effect here.
JSON_FLAGS = (
    *("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "accelerator_config"),
)
KEYS = {
    "accelerator_config": ("non_blocking",),
    **dict.fromkeys(JSON_FLAGS[1:3], ("every_n_layers", "offload", "use_reentrant", "preserve_rng_state")),
}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
LOSSES = ("loss", "eval_loss", "perplexity", "eval_perplexity")


def name_of(choice: str) -> str:
    """Return a choice as it is typed; transformers makes a member of an enum of it."""
    return getattr(choice, "value", choice)


def check_each(args: transformers.TrainingArguments) -> None:
    """Raise UserError on a flag that does not do here what it says, or whose value cannot be used."""
    for name, reason in REFUSED.items():
        if _is_given(args, name):
            raise UserError(f"--{name} {reason}")
    _check_numbers(args)
    _check_json(args)
    _check_precision(args)
    _check_best(args)
    if args.train_sampling_strategy not in ("random", "sequential"):
        strategy = args.train_sampling_strategy
        raise UserError(f"--train_sampling_strategy {strategy} only reduces padding, and there is none; type random")
    if DebugOption.TPU_METRICS_DEBUG in (args.debug or ()):
        raise UserError("--debug tpu_metrics_debug needs a TPU, on which nothing runs here; leave it out")
    _check_compilation(args)


def _is_given(args: transformers.TrainingArguments, name: str) -> bool:
    """Tell whether a flag has another value than its default; an empty one and a word for false are none."""
    default = next(each.default for each in fields(args) if each.name == name)
    value = getattr(args, name)
    value = False if str(value).lower() in ("false", "none", "no", "", "[]", "{}") else value
    return value not in (default, None) if default is not MISSING and default else bool(value)


def _check_numbers(args: transformers.TrainingArguments) -> None:
    for name, (least, most) in RANGES.items():
        value = getattr(args, name)
        if value is None or least <= value <= most:
            continue
        expected = "a number above 0" if least == SMALLEST else f"{least} or more" if most == LARGEST else None
        expected = expected or (f"{least} to {most}" if isinstance(most, int) else f"{least} or more, and below 1")
        raise UserError(f"--{name} {value} is out of range; expected {expected}")
    if args.max_steps != -1 and args.max_steps < 1:
        raise UserError(
            f"--max_steps {args.max_steps} is out of range; type 1 or more, or leave it out for whole epochs"
        )
    if args.warmup_steps > 1 and args.warmup_steps != int(args.warmup_steps):
        raise UserError(
            f"--warmup_steps {args.warmup_steps} is neither a number of steps nor a share of them; type 30, or 0.03"
        )


def _check_json(args: transformers.TrainingArguments) -> None:
    for name in JSON_FLAGS:
        given = getattr(args, name)
        if not isinstance(given, str):
            continue
        is_file = name == "accelerator_config" and Path(given).is_file()
        try:
            settings = json.loads(Path(given).read_text(encoding="utf-8") if is_file else given)
        except ValueError:
            settings = None
        if not isinstance(settings, dict):
            raise UserError(f"""--{name} {given} is not a JSON object; type one in quotes, such as '{{"key": 1}}'""")
        own = settings.keys() - KEYS[name] if name in KEYS else ()
        if unknown := sorted(own):
            raise UserError(f"--{name} has {unknown[0]}; expected {', '.join(KEYS[name])}, the rest is decided here")
        if settings.get("offload") and not torch.accelerator.is_available():
            raise UserError(f"--{name} offloads activations, which are on the host already; leave offload out")


def _check_precision(args: transformers.TrainingArguments) -> None:
    has_bf16, in_one_process = is_torch_bf16_gpu_available(), int(os.environ.get("WORLD_SIZE", 1)) == 1
    if args.bf16 and args.fp16:
        raise UserError("--bf16 and --fp16 do not go together; leave one of them out")
    if args.bf16 and not args.use_cpu and not has_bf16:
        raise UserError(
            "--bf16 needs a GPU that computes in bf16, and there is none; leave it out, or add --use_cpu True"
        )
    if args.tf32 and not is_torch_tf32_available():
        raise UserError("--tf32 needs an NVIDIA GPU of Ampere or newer; leave it out")
    if args.ddp_backend and in_one_process:
        raise UserError(f"--ddp_backend {args.ddp_backend} is for several processes, and this is one; leave it out")


def _check_best(args: transformers.TrainingArguments) -> None:
    """Raise UserError if the best checkpoint is asked for in a way that cannot tell it."""
    metric = args.metric_for_best_model
    if metric and metric not in LOSSES:
        raise UserError(f"--metric_for_best_model {metric} is not measured here; type loss or perplexity")
    save, evaluate = name_of(args.save_strategy), name_of(args.eval_strategy)
    if args.load_best_model_at_end and save != "best" and (save == "no" or save != evaluate):
        raise UserError(
            f"--load_best_model_at_end needs an evaluation at each checkpoint, and there is --eval_strategy {evaluate} "
            f"with --save_strategy {save}; type --eval_strategy steps --save_strategy steps"
        )
    if evaluate == "no" and (save == "best" or args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")):
        flag = "--save_strategy best" if save == "best" else f"--lr_scheduler_type {name_of(args.lr_scheduler_type)}"
        raise UserError(f"{flag} needs a held-out loss; add --eval_strategy epoch --eval_fraction 0.05")


def _check_compilation(args: transformers.TrainingArguments) -> None:
    backend, mode = args.torch_compile_backend, args.torch_compile_mode
    backends = [each.value.lower() for each in DynamoBackend]
    if backend and backend.lower() not in backends:
        raise UserError(f"--torch_compile_backend {backend} is not one of {', '.join(backends)}; type inductor")
    if mode and mode not in COMPILE_MODES:
        raise UserError(f"--torch_compile_mode {mode} is not one of {', '.join(COMPILE_MODES)}; type default")


def check_together(args: transformers.TrainingArguments, holds_out: bool) -> None:
    """Raise UserError on a flag that needs another one, held-out rows, or what is not installed here."""
    _check_evaluation(args, holds_out)
    _check_trackers(args)
    _check_launcher(args)
    of_workers = ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context")
    if not args.dataloader_num_workers and (given := [name for name in of_workers if getattr(args, name)]):
        raise UserError(f"--{given[0]} is for processes that build batches; add --dataloader_num_workers 2")


def _check_launcher(args: transformers.TrainingArguments) -> None:
    """Raise UserError if accelerate's launcher was told what flags do not say: it tells the Trainer alone."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UserError(f"FSDP, which accelerate launch asks for, {ZERO_3}")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true" and not args.deepspeed:
        raise UserError(
            "accelerate launch asks for DeepSpeed; add --deepspeed ds_zero2_config.json, or type sh ds_all.sh"
        )
    launched, own = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), "bf16" if args.bf16 else "fp16"
    if launched != "no" and (launched != own or not (args.bf16 or args.fp16)):
        raise UserError(
            f"accelerate launch asks for --mixed_precision {launched}, and these flags do not; leave it out there, and "
            "type --bf16 True or --fp16 True here"
        )


def _check_evaluation(args: transformers.TrainingArguments, holds_out: bool) -> None:
    strategy = name_of(args.eval_strategy)
    if not holds_out:
        asked = {
            f"--eval_strategy {strategy}": strategy != "no",
            f"--eval_steps {args.eval_steps}": args.eval_steps,
            "--do_eval": args.do_eval,
            "--eval_on_start": args.eval_on_start,
            "--load_best_model_at_end": args.load_best_model_at_end,
            "--save_strategy best": args.save_strategy == "best",
        }
        if given := [flag for flag, is_given in asked.items() if is_given]:
            raise UserError(f"{given[0]} has no rows to evaluate on; add --eval_data_path FILE or --eval_fraction 0.05")
    elif args.eval_steps and strategy != "steps":
        raise UserError(f"--eval_steps {args.eval_steps} counts where steps decide; add --eval_strategy steps")


def _check_trackers(args: transformers.TrainingArguments) -> None:
    there = get_available_reporting_integrations()
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"--report_to {name} is not one of {', '.join(INTEGRATION_TO_CALLBACK)}, all, none")
        if name not in there:
            installed = ", ".join(there) or "none"
            raise UserError(f"--report_to {name} is not installed; pip install it, or use: {installed}")
    given = [name for name in OF_TRACKIO if _is_given(args, name)]
    if given and "trackio" not in args.report_to:
        raise UserError(f"--{given[0]} is for trackio alone; add --report_to trackio, or leave it out")
