"""A device that is neither a CPU nor CUDA: training computes there what it does on a CPU, in plain PyTorch."""

import json
import subprocess
import sys

import pytest

from support.project import PROJECT


@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [
        ("bloom-tiny-6-heads", "float32", 1e-5),
        ("falcon-tiny-40b", "float32", 1e-5),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("bloom-tiny", "bfloat16", 2e-2),
                ("falcon-tiny", "float32", 1e-5),
                ("falcon-tiny-rw", "float32", 1e-5),
            ]
        ),
    ],
)
def test_another_device_has_the_loss_and_gradients_of_the_cpu(shape: str, dtype: str, tolerance: float):
    command = [sys.executable, "tests/support/elsewhere.py", shape, dtype]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loss"] <= tolerance and found["gradients"] <= tolerance, found
    # Where the examples lie, for attention by examples; FlexAttention does not ask.
    assert found["waits"] == ["nonzero", "tolist"], "a forward and a backward make the host wait for the device"
    there = [given[1:] for given in found["given"] if given[0] == "elsewhere"]
    assert there, "attention did not run on the device"
    for *num_heads, head_dim in there:
        # Otherwise GPUs before Ampere, which go this way too, would hold scores of (H, T, T).
        assert len(set(num_heads)) == 1, "no kernel there takes grouped queries"
        assert head_dim % 8 == 0, "no kernel there takes such heads"
