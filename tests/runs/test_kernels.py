"""The kernels that the compiler makes for a GPU: forward and backward against fp64, and how they read their inputs.

They are compiled for an H100 and run by Triton's interpreter, so no GPU is needed; see interpreted.py.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.project import PROJECT

BESIDE = Path(sys.prefix) / "triton"  # where tests/run.sh puts it
TOLERANCE = {"fp32": 5e-6, "fp16": 1e-3}

pytestmark = pytest.mark.skipif(not (BESIDE / "triton").is_dir(), reason="Triton is not installed")


def interpret(*arguments: str) -> dict:
    """Return what tests/support/interpreted.py finds out."""
    environment = {**os.environ, "PYTHONPATH": str(BESIDE)}
    command = [sys.executable, "tests/support/interpreted.py", *arguments]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def read_from_memory(kernel: str, pointer: str) -> int:
    """Return how many loads a kernel's source has of a pointer."""
    return len(re.findall(rf"tl\.load\({pointer} ", kernel))


@pytest.mark.parametrize(
    "heads",
    [
        "64,fp32",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("80,fp16", "128,fp16", "8:2,fp16", "71:1,fp16")),
    ],
)
def test_attention_by_blocks_is_attention_forward_and_backward(heads: str):
    found = interpret("attention", heads)
    kernels = found.pop("kernels")
    assert len(found) == 3
    assert [name for name, error in found.items() if not error <= TOLERANCE[heads.split(",")[1]]] == [], found
    sources = [source for name, source in kernels.items() if name.startswith("triton_tem")]
    assert any("backward" in name for name in kernels) and len(sources) >= 2
    for source in sources:
        # Known strides and whole blocks: only then does Triton load keys and values asynchronously.
        assert "IS_DIVISIBLE : tl.constexpr = True" in source
        _, *strides = re.search(r"stride_qz, stride_qh, stride_qm, stride_q[kd] = (.*)", source)[1].split(", ")
        assert all(stride.isdecimal() for stride in strides) or heads.startswith("71"), strides
    # The length is only known when the kernel runs, so other rows need no other one.
    assert any(re.search(r"Q_LEN = 128\*ks\d", source) for source in sources)


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["64,fp32", "8:2,fp16"])
def test_attention_of_heads_that_another_family_splits_is_attention_too(heads: str):
    found = interpret("split attention", heads)
    kernels = found.pop("kernels")
    assert len(found) == 4 and any("backward" in name for name in kernels)
    assert [name for name, error in found.items() if not error <= TOLERANCE[heads.split(",")[1]]] == [], found
    for source in (source for name, source in kernels.items() if name.startswith("triton_tem")):
        assert "IS_DIVISIBLE : tl.constexpr = True" in source


def test_the_softmax_of_a_chunk_is_one_kernel_that_reads_the_logits_twice():
    found = interpret("loss", "any")
    kernels = found.pop("kernels")
    assert len(found) == 4
    assert [name for name, error in found.items() if not error <= 1e-6] == [], found
    [softmax] = [source for name, source in kernels.items() if "softmax" in name]
    assert read_from_memory(softmax, r"in_ptr0 \+ \(r0_1") == 2, "once for the maximum and the sum, once to write"


def test_the_interpreted_triton_is_the_one_that_this_pytorch_is_made_for():
    [found] = importlib.metadata.distributions(name="triton", path=[str(BESIDE)])
    assert found.version == re.search(r"triton==(\S+)", (PROJECT / "tests" / "run.sh").read_text())[1].strip('"')
