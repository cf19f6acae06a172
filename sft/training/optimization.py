"""The optimizer and the learning rate: what --optim and --lr_scheduler_type need, and which settings they take."""

import json
import math
from importlib.util import find_spec

import torch
import transformers
from transformers import get_scheduler
from transformers.trainer_optimizer import _parse_optim_args

from sft.program import UserError, one_line
from sft.training.flags import name_of

BITSANDBYTES = "bitsandbytes==0.50.2"
IN_BITSANDBYTES = ("adamw_bnb", "adamw_8bit", "ademamix", "lion", "paged_", "rmsprop_bnb")
# Optimizers in a package of their own: what their names begin with, how it is imported, and how it is installed.
PACKAGES = {
    "galore_": ("galore_torch", "galore-torch"),
    "apollo_": ("apollo_torch", "apollo-torch"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free_": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "adamw_torch_npu_fused": ("torch_npu", "torch_npu"),
}
REFUSED = {
    "adamw_torch_4bit": "needs torchao, which peft does not support here; type --optim adamw_bnb_8bit",
    "adamw_torch_8bit": "needs torchao, which peft does not support here; type --optim adamw_bnb_8bit",
    "adamw_torch_xla": "is for TPUs, on which nothing runs here; type --optim adamw_torch_fused",
    "adamw_anyprecision": "needs torchdistx, which is no longer made; type --optim adamw_torch_fused",
    **dict.fromkeys(
        (
            *("lomo", "adalomo", "apollo_adamw_layerwise", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise"),
            "galore_adafactor_layerwise",
        ),
        "updates weights within the backward, before gradients are clipped; type --optim adafactor to save memory",
    ),
}
LOW_RANK = ("galore_", "apollo_")
OF_BOTH = "rank update_proj_gap scale proj_type"
OF_ADEMAMIX = "alpha beta1 beta2 beta3 eps t_alpha t_beta3"
# What --optim_args may set, by what an optimizer's name begins with; the others take none.
SETTINGS = {
    "sgd": "momentum dampening weight_decay nesterov",
    "adagrad": "lr_decay weight_decay eps",
    "rmsprop_bnb": "",
    "rmsprop": "momentum alpha eps weight_decay centered",
    "ademamix": OF_ADEMAMIX,
    "paged_ademamix": OF_ADEMAMIX,
    "galore_": OF_BOTH,
    "apollo_": f"{OF_BOTH} proj scale_type",
    "grokadamw": "alpha_init lamb gamma grokking_signal_decay_rate gradient_clipping",
    "schedule_free_": "weight_lr_power r",
    "stable_adamw": "max_lr kahan_sum decouple_lr",
}
WORDS = ("nesterov", "centered", "proj", "proj_type", "scale_type", "kahan_sum", "decouple_lr")  # all else is numbers
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
# What a scheduler may be told by --lr_scheduler_kwargs, as an example; the others are told nothing.
EXAMPLES = {
    "cosine": {"num_cycles": 0.5},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"lr_end": 1e-7, "power": 2},
    "inverse_sqrt": {"timescale": 1000},
    "reduce_lr_on_plateau": {"factor": 0.5, "patience": 1},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 100},
    "greedy": {"min_lr": 1e-6, "patience": 1},
}
MANY_STEPS = 1_000_000  # of a run whose rows are not counted yet


def check_optimizer(args: transformers.TrainingArguments) -> None:
    """Raise UserError if --optim is not there, or --optim_args and --optim_target_modules do not fit it."""
    name = name_of(args.optim)
    if name in REFUSED:
        raise UserError(f"--optim {name} {REFUSED[name]}")
    for beginning, (module, package) in PACKAGES.items():
        if name.startswith(beginning) and not find_spec(module):
            raise UserError(f"--optim {name} needs {package}; type pip install {package}, or --optim adafactor")
    if name.startswith((*IN_BITSANDBYTES, *LOW_RANK)):  # the packages of the latter import it
        check_bitsandbytes(f"--optim {name}")
    if (name.startswith("paged_") or name == "galore_adamw_8bit") and args.device.type == "cpu":
        raise UserError(f"--optim {name} needs a GPU; type --optim adamw_torch_fused")
    if name.startswith(LOW_RANK) and not args.optim_target_modules:
        raise UserError(f"--optim {name} needs the layers that it is for; add --optim_target_modules all-linear")
    if args.optim_target_modules and not name.startswith(LOW_RANK):
        raise UserError(f"--optim_target_modules is for GaLore and APOLLO, not for --optim {name}; leave it out")
    _check_settings(name, args.optim_args)


def _check_settings(name: str, given: str | None) -> None:
    if not given:
        return
    allowed = next((names for beginning, names in SETTINGS.items() if name.startswith(beginning)), "")
    if not allowed:
        raise UserError(f"--optim_args {given} has no effect on --optim {name}; leave it out")
    try:
        settings = _parse_optim_args(given)
        [float(value) for key, value in settings.items() if key not in WORDS]
    except ValueError:
        settings = {}
    if not settings or settings.keys() - allowed.split():
        raise UserError(
            f"--optim_args {given} cannot be used with --optim {name}; type NAME=VALUE,NAME=VALUE with names "
            f"among {allowed.replace(' ', ', ')}"
        )


def check_bitsandbytes(flag: str) -> None:
    """Raise UserError if bitsandbytes is not installed, which `flag` needs."""
    if not find_spec("bitsandbytes"):
        raise UserError(f"{flag} needs bitsandbytes; type pip install {BITSANDBYTES}")


def check_schedule(args: transformers.TrainingArguments, num_steps: int | None = None) -> None:
    """Raise UserError if the learning rate cannot be scheduled over so many steps, by default those of --max_steps."""
    if num_steps is None and args.max_steps > 0:
        num_steps = args.max_steps
    name, kwargs = name_of(args.lr_scheduler_type), args.lr_scheduler_kwargs or {}
    if num_steps is not None and args.warmup_steps > num_steps:
        raise UserError(
            f"--warmup_steps {args.warmup_steps:g} is beyond the last step, {num_steps:,}, so --learning_rate would "
            "never be reached; type a share of the steps, such as 0.03"
        )
    if args.warmup_steps and name in WITHOUT_WARMUP:
        other = "type --lr_scheduler_type constant_with_warmup" if name == "constant" else "type --warmup_steps 0"
        raise UserError(f"--lr_scheduler_type {name} has no warmup, and there is --warmup_steps; {other}")
    if kwargs and name not in EXAMPLES:
        raise UserError(f"--lr_scheduler_kwargs has no effect on --lr_scheduler_type {name}; leave it out")
    steps = num_steps or MANY_STEPS
    try:
        if name == "greedy" and kwargs.get("min_lr", 1e-3) > args.learning_rate:  # this default would become the rate
            raise ValueError("its least rate, min_lr, is above --learning_rate")
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
        schedule = get_scheduler(name, optimizer, args.get_warmup_steps(steps), steps, dict(kwargs))
        for rate in getattr(schedule, "lr_lambdas", ()):
            shares = [rate(step) for step in (0, args.get_warmup_steps(steps), steps)]
            if not all(math.isfinite(share) and share >= 0 for share in shares):
                raise ValueError(f"it would be multiplied by {min(shares)}")
    except Exception as error:
        raise UserError(_cannot(args, one_line(error))) from None


def _cannot(args: transformers.TrainingArguments, reason: str) -> str:
    name = name_of(args.lr_scheduler_type)
    given = f" --lr_scheduler_kwargs {json.dumps(args.lr_scheduler_kwargs)}" if args.lr_scheduler_kwargs else ""
    example = f"type, for example, --lr_scheduler_kwargs '{json.dumps(EXAMPLES.get(name, {}))}'"
    return f"--lr_scheduler_type {name}{given} cannot be used: {reason}; {example}"
