"""The numbers of a run: what it computes in on this card, what its optimizer keeps, and which packages that takes."""

from importlib.util import find_spec

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from sft.program import UserError

BITSANDBYTES = "bitsandbytes==0.50.2"
# torch and DeepSpeed begin with 65,536, which overflows in the first steps and skips them.
INITIAL_LOSS_SCALE = 2**12
# Bytes of state for each trained parameter, by what --optim begins with; Adafactor keeps a row and a column each.
OPTIMIZER_BYTES = {"adamw_torch": 8, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0, "sgd": 0}


def choose(device: torch.device | None) -> tuple[bool, bool]:
    """Return whether to compute in bf16, and whether in fp16: what an accelerator has; neither on a CPU, None.

    A GPU before Ampere has fp16; what other devices do in fp16 is not known here, and they compute in fp32.
    """
    if device is None:
        return False, False
    if device.type != "cuda":
        return is_torch_bf16_gpu_available(), False
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return bf16, not bf16


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    """Return the dtype that a run's matrix products are in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def optimizer_bytes(optim: str) -> int | None:
    """Return the bytes of state for each trained parameter under `--optim`, None where they are not known here."""
    return next((size for name, size in OPTIMIZER_BYTES.items() if optim.startswith(name)), None)


def check_optimizer(args: TrainingArguments) -> None:
    """Raise UserError if `--optim` needs a package that is not here."""
    name = args.optim.value if hasattr(args.optim, "value") else args.optim
    if name.startswith(("adamw_torch_4bit", "adamw_torch_8bit")):
        raise UserError(f"--optim {name} is torchao's, which peft does not go with here; type --optim adamw_bnb_8bit")
    if "bnb" in name or name.startswith("paged_") or name in ("adamw_8bit", "lion_8bit", "ademamix_8bit"):
        check_bitsandbytes(f"--optim {name}")


def check_bitsandbytes(flag: str) -> None:
    """Raise UserError if bitsandbytes, which `flag` needs, is not installed."""
    if not find_spec("bitsandbytes"):
        raise UserError(f"{flag} needs bitsandbytes; type pip install {BITSANDBYTES}")


def line(args: TrainingArguments, is_lora: bool) -> str:
    """Return in words what numbers a run has."""
    computed = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    held = f"fp32 for what is trained, {computed} for the frozen weights" if is_lora else "fp32 weights"
    scaled = f", the loss scaled by {INITIAL_LOSS_SCALE:,} at first" if args.fp16 else ""
    return f"{held}, computed in {computed}{scaled}"
