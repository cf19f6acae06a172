"""Kernels that PyTorch's compiler makes for a GPU, run on the CPU by Triton's interpreter, without a GPU.

    python tests/support/interpreted.py attention 71:1      (torch is told of an H100 while it compiles)

Graphs are traced and differentiated on CPU tensors, as always; each is then compiled as if its inputs were on the GPU,
and the kernels in the code that comes out are handed to the interpreter. Memory that nobody has written is NaN.
"""

import ctypes
import importlib.util
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ |= {
    "TRITON_INTERPRET": "1",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import triton
import triton.language as tl
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import flex_attention
from torch.utils import _triton
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget

from sft.model import attention, loss

H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    total_memory=80 * 2**30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
    is_integrated=0,
)
CUDA = torch.device("cuda", 0)
KERNELS: dict[str, str] = {}  # the source of each kernel that was made, by name
NUMBERS = itertools.count()
# Elements of a program, pointwise or summing. Kernels leave a mask out that no block of up to 4,096 would need.
BLOCKS = {"XBLOCK": 4096, "YBLOCK": 16}
BLOCKS_OF_SUMS = {"XBLOCK": 128, "YBLOCK": 16, "R0_BLOCK": 1024}


class Driver(triton.backends.driver.DriverBase):
    """What Triton asks of a GPU."""

    def __init__(self):
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def get_benchmarker(self):
        raise NotImplementedError


@triton.jit
def exponential(value):
    """Return the exponential in Triton's own language."""
    return tl.exp(value)


def pretend() -> None:
    """Let the code that the compiler writes run without CUDA, and its graphs hold tensors that claim to be there."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = guards[0]  # by device type: CUDA is guarded as the CPU is, by doing nothing
    triton.runtime.driver.set_active(Driver())
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    torch._C._dynamo.guards._empty_strided_cuda = unwritten
    torch.cuda._DeviceGuard = lambda index: nullcontext()
    torch.cuda.set_device = lambda index: None
    flex_attention._validate_device = lambda query, key, value: None
    triton_helpers.libdevice.exp = exponential  # CUDA's own is no Python
    AsyncCompile.triton = lambda self, name, source, device_str="cuda": Kernel(name, source)


def unwritten(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return memory that shows if it is read before it is written."""
    return torch.empty_strided(size, stride, dtype=dtype).fill_(math.nan if dtype.is_floating_point else -1)


@contextmanager
def gpu_to_compile_for() -> Iterator[None]:
    """Tell PyTorch's compiler of an H100."""
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_properties": H100,
        "get_device_name": H100.name,
        "is_bf16_supported": True,
        "synchronize": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "device": nullcontext(),
        "get_rng_state": torch.get_rng_state(),
        "set_rng_state": None,
        "current_stream": SimpleNamespace(stream_id=0, device_index=0, device_type=1),
    }
    of_interface = {**answers, "get_compute_capability": 90, "get_raw_stream": 0, "set_device": None}
    of_interface |= {"exchange_device": 0, "maybe_exchange_device": 0}
    with ExitStack() as patches:
        for owner, told in ((torch.cuda, answers), (CudaInterface, of_interface), (CudaInterface.Worker, of_interface)):
            for name in filter(partial(hasattr, owner), told):
                answer = partial(lambda value, *args, **kwargs: value, told[name])
                patches.enter_context(mock.patch.object(owner, name, staticmethod(answer)))
        patches.callback(_triton.has_triton.cache_clear)
        _triton.has_triton.cache_clear()
        yield


class Kernel:
    """A kernel's source, run by the interpreter with the arguments that the compiler's code has for it."""

    def __init__(self, name: str, source: str):
        KERNELS[name] = source
        path = Path(tempfile.mkdtemp(), f"kernel_{next(NUMBERS)}.py")  # the interpreter reads it again
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        with ExitStack() as patches:
            for kind in ("template", "pointwise", "reduction", "persistent_reduction"):
                keep = lambda **details: lambda function: (function, details)  # noqa: E731
                patches.enter_context(mock.patch.object(triton_heuristics, kind, keep))
            patches.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
            spec.loader.exec_module(module)
        self.function, details = getattr(module, name)
        self.grid = details["inductor_meta"]["grid_type"]

    def run(self, *arguments: object, stream: int) -> None:
        """Run every program of the kernel's grid, one after the other."""
        names = self.function.arg_names
        if self.grid == "FixedGrid":
            *arguments, x, y, z = arguments
            self.function[(x, y, z)](*arguments)
            return
        given, blocks = dict(zip(names, arguments, strict=False)), {}
        for name, size in (BLOCKS_OF_SUMS if "r0_numel" in names else BLOCKS).items():
            if name in names:
                number = given[name.lower().replace("block", "numel")]
                blocks[name] = min(size, triton.next_power_of_2(number))
        grid = [math.ceil(given.get(f"{axis}numel", 1) / blocks.get(f"{axis.upper()}BLOCK", 1)) for axis in "xyz"]
        self.function[tuple(grid)](*arguments, **blocks)


def on_the_gpu(value: object) -> object:
    """Return a traced tensor or device as one of the GPU's, anything else as it is."""
    if isinstance(value, FakeTensor):
        with value.fake_mode:
            return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=CUDA)
    return CUDA if isinstance(value, torch.device) else value


def compile_moved(graph: torch.fx.GraphModule, inputs: list, **options: object) -> Callable:
    """Compile a graph as if it had been traced on the GPU."""
    for node in (
        node for part in graph.modules() if isinstance(part, torch.fx.GraphModule) for node in part.graph.nodes
    ):
        for name in ("val", "example_value"):
            if name in node.meta:
                node.meta[name] = tree_map(on_the_gpu, node.meta[name])
        node.args, node.kwargs = tree_map(on_the_gpu, (node.args, node.kwargs))
        if str(node.target) == "flex_attention":
            # On a CPU the forward would not keep what the backward needs.
            kept = {"OUTPUT_LOGSUMEXP": not options.get("is_inference", False)}
            node.args = tuple({**part, **kept} if "OUTPUT_LOGSUMEXP" in str(part) else part for part in node.args)
    with gpu_to_compile_for():
        return compile_fx_inner(graph, [on_the_gpu(each) for each in inputs], **options)


def compiled_for_gpu(function: Callable) -> Callable:
    """Return a function of CPU tensors that computes with a GPU's kernels, forward and backward."""
    return torch.compile(function, backend=partial(compile_fx, inner_compile=compile_moved))


# ---------------------------------------------------------------------------------------------------------- the cases

# Query heads, key-value heads, head size; one key-value head has RoPE, as many as queries have ALiBi.
HEADS = {"64": (2, 2, 64), "80": (2, 2, 80), "128": (2, 2, 128), "71:1": (71, 1, 64), "8:2": (8, 2, 64)}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}  # the interpreter, which is NumPy's, has no bf16
# Boundaries inside of blocks and across them, and the single tokens that fill a row.
LENGTHS = [7, 120, 1, 130, 60, 50] + 16 * [1]
# The second run of tokens is continued by the third and by the fourth, the fifth by all that come after it.
BEFORE = [0, 0, 120, 120, 0, 60] + 16 * [60]
ENDS = [7, 258, 128, 258, 384, *range(368, 385)]


def off_by(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference by the norm of what is expected; NaN where a number is missing."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def attended(packed: torch.Tensor, row: attention.FlatBatch, rotations: attention.Rotations | None) -> torch.Tensor:
    """Return attention by its formula, every score there at once, in the dtype of `packed`."""
    return attended_heads(*attention.split(packed, rotations), row)


def attended_heads(query, key, value, row: attention.FlatBatch) -> torch.Tensor:
    """Return attention of heads that are split already, as `attended` does."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(repeats, 1) for heads in (key, value))
    places = torch.arange(row.position_ids.shape[1])
    is_seen = (places <= places[:, None]) & (places[:, None] < row.subtree_ends[0])
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if row.key_bias is not None:
        scores = scores + row.key_bias.to(query.dtype)[None, :, None]
    return (scores.masked_fill(~is_seen, -math.inf).softmax(-1) @ value).transpose(1, 2).flatten(2)


def run_attention(name: str) -> dict:
    """Return how far output and gradient are off, for a row of one block and then one of three, and the kernels."""
    heads, dtype = name.split(",")
    num_heads, num_groups, head_dim = HEADS[heads]
    attend = compiled_for_gpu(attention._attend_blocks)
    attention._compiled_for_blocks = lambda: attend
    torch.manual_seed(0)
    found = {}
    plain, forest = ([100, 28], [0, 0], [100, 128]), (LENGTHS, BEFORE, ENDS)
    for (lengths, before, ends), has_gradient in ((plain, False), (forest, True)):
        runs = zip(lengths, before, strict=True)
        positions = torch.cat([torch.arange(length) + start for length, start in runs])[None]
        ends = torch.tensor(ends).repeat_interleave(torch.tensor(lengths))[None]
        size = (1, positions.shape[1], num_groups, num_heads // num_groups + 2, head_dim)
        packed = torch.randn(size, dtype=DTYPES[dtype], requires_grad=has_gradient)
        bias = torch.randn(num_heads, 1) * positions[0] if num_groups == num_heads else None
        angles = positions[..., None] * torch.rand(head_dim // 2).repeat(2)
        rotations = None if bias is not None else (angles.cos(), angles.sin())
        row = attention.FlatBatch(positions, bias, ends)
        with torch.set_grad_enabled(has_gradient):
            output = attention.attend_by_blocks(packed, row, rotations)
        exact = packed.detach().double().requires_grad_(has_gradient)
        expected = attended(exact, row, rotations and tuple(each.double() for each in rotations))
        found[f"output of {len(lengths)}"] = off_by(output, expected)
    upstream = torch.randn_like(output)
    output.backward(upstream), expected.backward(upstream.double())
    return {**found, "gradient": off_by(packed.grad, exact.grad), "kernels": KERNELS}


def run_split_attention(name: str) -> dict:
    """Return how far output and gradients of heads that are split already are off, and the kernels."""
    heads, dtype = name.split(",")
    num_heads, num_groups, head_dim = HEADS[heads]
    attend = compiled_for_gpu(attention._attend_split_blocks)
    attention._compiled_for_split_blocks = lambda: attend
    torch.manual_seed(0)
    ends = torch.tensor(ENDS).repeat_interleave(torch.tensor(LENGTHS))[None]
    row = attention.FlatBatch(torch.zeros_like(ends), subtree_ends=ends)
    shapes = [(1, number, ends.shape[1], head_dim) for number in (num_heads, num_groups, num_groups)]
    given = [torch.randn(shape, dtype=DTYPES[dtype], requires_grad=True) for shape in shapes]
    exact = [heads.detach().double().requires_grad_() for heads in given]
    output, expected = attention.attend_split_blocks(*given, row, head_dim**-0.5), attended_heads(*exact, row)
    upstream = torch.randn_like(output)
    output.backward(upstream), expected.backward(upstream.double())
    gradients = {f"gradient of {n}": off_by(given[n].grad, exact[n].grad) for n in range(3)}
    return {"output": off_by(output, expected), **gradients, "kernels": KERNELS}


def run_loss(name: str) -> dict:
    """Return how far the loss of a chunk and its gradient by the logits are off, for two sizes, and the kernels."""
    compute = compiled_for_gpu(loss._softmax_loss)
    torch.manual_seed(0)
    found = {}
    for positions in (5, 3):
        logits, labels = 4 * torch.randn(positions, 3000), torch.randint(3000, (positions,))
        value, gradient = compute(logits, labels, torch.float32)
        exact = logits.double().requires_grad_()
        expected = torch.nn.functional.cross_entropy(exact, labels, reduction="sum")
        expected.backward()
        found[f"loss of {positions}"] = off_by(value, expected.detach())
        found[f"gradient of {positions}"] = off_by(gradient, exact.grad)
    return {**found, "kernels": KERNELS}


if __name__ == "__main__":
    pretend()
    print(
        json.dumps(
            {"attention": run_attention, "split attention": run_split_attention, "loss": run_loss}[sys.argv[1]](
                sys.argv[2]
            )
        )
    )
