"""Which way to train is chosen for a machine, and how the table says so."""

import pytest

from sft.machine import GIB, Machine
from sft.plan.activations import Strategy
from sft.plan.options import choose, options, table
from support.loads import load_of


def gpus(number: int, size: int, ram: int) -> Machine:
    return Machine(number, size * GIB, ram * GIB, is_gpu=True, name=f"{number} x {size}GB")


@pytest.mark.parametrize(
    ("shape", "here", "method", "expected"),
    [
        ("bloom-560m", gpus(1, 24, 64), "full", Strategy("full")),
        ("bloom-7b1", gpus(1, 80, 256), "full", Strategy("full", 2, "optimizer")),
        # Without a host to offload to, what may just fit is better than nothing.
        ("bloom-7b1", gpus(1, 80, 64), "full", Strategy("full", optim="adamw_bnb_8bit", checkpointing=True)),
        ("bloom-7b1", gpus(1, 24, 64), "full", None),
        ("bloom-7b1", gpus(1, 24, 64), "LoRA", Strategy("LoRA", checkpointing=True)),
        ("bloom-7b1", gpus(8, 80, 1024), "full", Strategy("full", 2)),
        ("bloom-3b", gpus(2, 24, 128), "full", Strategy("full", 2, "optimizer")),
        ("bloom-3b", gpus(2, 24, 16), "full", None),  # the host is too small to offload to
    ],
)
def test_the_best_that_fits_is_chosen(shape, here, method, expected):
    found = options(load_of(shape), 2048, here)
    assert choose(found, here, method) == expected
    lines = table(found, here).splitlines()
    assert len(lines) == len(found) + 1
    assert {line.split()[-1] for line in lines[1:]} <= {"yes", "no", "checkpointed", "unproven"}
