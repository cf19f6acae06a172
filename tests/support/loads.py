"""What the plan's tests train: a shape in bf16 on a GPU, with LoRA of rank 16 where a strategy has it."""

from functools import cache

import torch
from peft import LoraConfig

from sft.plan.activations import Load
from sft.tools.random_model import SHAPES


@cache  # what is counted of a load is kept by its identity
def load_of(shape: str) -> Load:
    """Return what is trained of a shape in `SHAPES`."""
    return Load(SHAPES[shape], LoraConfig(r=16, task_type="CAUSAL_LM"), False, torch.bfloat16, is_gpu=True)
