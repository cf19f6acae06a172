"""Items of `benchmarks.gpu` on kernels alone: is attention exact, is the loss, and how fast are both.

Shapes: T = tokens of a row, H = heads, K = key-value heads, D = size of a head, N = labelled positions, V = vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec

import torch
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import measure
from benchmarks.measure import Given
from sft.model import attention
from sft.model.attention import FlatBatch, Rotations, split
from sft.model.loss import next_token_loss
from sft.tools.random_model import SHAPES

Figures = tuple[str, dict]
ATTENTIONS = ("bloom-560m", "bloom-3b", "bloom-7b1", "falcon-7b")  # heads of 64, 80 and 128, and 71 to one of 64
STRIDED = "strided views"
LOSSES = ("bloom-560m", "bloom-1b7", "falcon-7b")


def machine(given: Given) -> Iterator[Figures]:
    """Yield what the card is, and what its products and copies reach in this run."""
    yield "versions", {"versions": measure.versions()}
    if given.device.type == "cuda":
        properties = torch.cuda.get_device_properties(given.device)
        yield (
            properties.name,
            {
                "capability": f"{properties.major}.{properties.minor}",
                "GiB": properties.total_memory / measure.GIB,
                "CUDA": torch.version.cuda,
            },
        )
    size = 256 if given.is_tiny else 8192
    left, right = torch.randn(2, size, size, device=given.device, dtype=torch.bfloat16)
    taken = measure.milliseconds(lambda: left @ right)
    yield f"product of {size} x {size} in bf16", {"TFLOP/s": 2 * size**3 / taken / 1e9}
    taken = measure.milliseconds(left.clone)
    yield "copy", {"GB/s": 2 * left.nbytes / taken / 1e6}


# ----------------------------------------------------------------------------------------------------------- attention


def make_row(shape: str, lengths: list[int], given: Given) -> tuple[torch.Tensor, FlatBatch, Rotations | None]:
    """Return a random packed projection, bf16 (1, T, K, H / K + 2, D), its row and RoPE's rotations."""
    config = SHAPES[shape]
    positions = torch.cat([torch.arange(length, device=given.device) for length in lengths])[None]
    num_heads = config.num_attention_heads
    num_groups = 1 if config.model_type == "falcon" else num_heads
    head_dim = config.hidden_size // num_heads
    size = (1, positions.shape[1], num_groups, num_heads // num_groups + 2, head_dim)
    packed = torch.randn(size, device=given.device, dtype=torch.bfloat16)
    if num_groups == num_heads:
        slopes = torch.rand(num_heads, 1, device=given.device)
        return packed, FlatBatch(positions, slopes * positions[0]), None
    angles = positions[..., None] * torch.rand(head_dim // 2, device=given.device).repeat(2)
    return packed, FlatBatch(positions), (angles.cos(), angles.sin())


def attended(packed: torch.Tensor, row: FlatBatch, rotations: Rotations | None) -> torch.Tensor:
    """Return attention by its formula, with every score there at once, in the dtype of `packed`."""
    query, key, value = split(packed, rotations)
    key, value = (heads.expand(-1, query.shape[1], -1, -1) for heads in (key, value))
    places = torch.arange(packed.shape[1], device=packed.device)
    is_seen = (places <= places[:, None]) & (places[:, None] < row.subtree_ends[0])
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if row.key_bias is not None:
        scores = scores + row.key_bias.to(packed.dtype)[None, :, None]
    scores = scores.masked_fill(~is_seen, -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


_strided_flex_attention = torch.compile(flex_attention)


def attend_strided(packed: torch.Tensor, row: FlatBatch, rotations: Rotations | None) -> torch.Tensor:
    """Attend with FlexAttention compiled for views of the projection: what splitting outside of it costs."""
    query, key, value = split(packed, rotations)
    grouped = query.shape[1] != key.shape[1]
    context = _strided_flex_attention(
        query, key, value, score_mod=row.score_mod, block_mask=row.block_mask, enable_gqa=grouped
    )
    return context.transpose(1, 2).flatten(2)


def ways_to_attend(given: Given) -> dict[str, Callable]:
    """Return attention by blocks and for strided views where FlexAttention runs, else path by path."""
    if not attention.has_flex_attention(given.device):
        return {"by paths": attention.attend_by_paths}
    return {"by blocks": attention.attend_by_blocks, STRIDED: attend_strided}


def poison(given: Given) -> None:
    """Leave the allocator with memory full of NaN, so that what a kernel does not write shows."""
    torch.full((2**20 if given.is_tiny else 2**29,), math.nan, device=given.device)


def off_by(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference by the norm of what is expected; NaN where a number is missing."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def attention_exact(given: Given) -> Iterator[Figures]:
    """Yield how far output and gradient are off float64's, for rows of several lengths by one compiled kernel."""
    totals = (128, 384, 256) if given.is_tiny else (128, 2048, 1920)
    for number, shape in enumerate(given.shapes(*ATTENTIONS)):
        for way, attend in ways_to_attend(given).items():
            if number and way == STRIDED:
                continue  # once is enough for what is not used
            for total in totals:
                yield f"{shape}, {way}", errors_of(shape, attend, total, given)


def errors_of(shape: str, attend: Callable, total: int, given: Given) -> dict:
    """Return how far attention over a row of so many tokens is off; the shortest one without a gradient."""
    half, has_gradient = total // 2 - 40, total > attention.BLOCK_SIZE
    packed, row, rotations = make_row(shape, [half, 7, total - half - 7 - 32, *(32 * [1])], given)
    packed.requires_grad_(has_gradient)
    poison(given)
    with torch.set_grad_enabled(has_gradient):
        output = attend(packed, row, rotations)
    exact = packed.detach().double().requires_grad_(has_gradient)
    expected = attended(exact, row, rotations and tuple(each.double() for each in rotations))
    figures = {"T": total, "output off by": off_by(output.detach(), expected.detach())}
    if has_gradient:
        upstream = torch.randn_like(output)
        poison(given)
        output.backward(upstream), expected.backward(upstream.double())
        figures["gradient off by"] = off_by(packed.grad, exact.grad)
    return figures


def attention_speed(given: Given) -> Iterator[Figures]:
    """Yield the milliseconds of forward and of both, and TFLOP/s, for short examples and long ones."""
    total, repeats = (256, 2) if given.is_tiny else (16384, 20)
    for shape in given.shapes("bloom-560m", "bloom-7b1", "falcon-7b"):
        for way, attend, changed in variants(given, is_grouped=shape.startswith("falcon")):
            with changed:
                for length in (total // 64, total // 4):
                    title = f"{shape}, examples of {length}, {way}"
                    yield title, times_of(attend, make_row(shape, total // length * [length], given), length, repeats)


def times_of(attend: Callable, given_to_it: tuple, length: int, repeats: int) -> dict:
    """Return the times of attention over a row of examples of one length."""
    packed, row, rotations = given_to_it
    packed.requires_grad_()
    total, width = packed.shape[1], packed.shape[2] * (packed.shape[3] - 2) * packed.shape[4]
    upstream = torch.randn(1, total, width).to(packed)
    forward = measure.milliseconds(lambda: attend(packed, row, rotations), repeats)
    both = measure.milliseconds(lambda: attend(packed, row, rotations).backward(upstream), repeats)
    flops = 2 * width * total * length  # of the forward: two products, half of the pairs
    return {"forward ms": forward, "both ms": both, "TFLOP/s": 3.5 * flops / both / 1e9}


@contextmanager
def setting(**values: object) -> Iterator[None]:
    """Change attention's own settings for a while, and compile its kernels anew."""
    own = {name: getattr(attention, name) for name in values}
    for names in (values, own):
        for name, value in names.items():
            setattr(attention, name, value)
        attention._compiled_for_blocks.cache_clear()
        if names is values:
            yield


def variants(given: Given, is_grouped: bool) -> Iterator[tuple[str, Callable, AbstractContextManager]]:
    """Yield the ways to attend with the settings that may be faster."""
    ways = ways_to_attend(given)
    for way, attend in ways.items():
        yield way, attend, nullcontext()
    if "by blocks" not in ways:
        return
    warps = {"fwd_num_warps": 8, "fwd_num_stages": 2}
    yield "by blocks, 8 warps, 2 stages", ways["by blocks"], setting(KERNEL_OPTIONS=warps)
    yield "by blocks, prescaled", ways["by blocks"], setting(KERNEL_OPTIONS={"PRESCALE_QK": True})
    if is_grouped:
        yield "by blocks, keys not repeated", ways["by blocks"], setting(EXPANDS_KEYS=False)
    yield "by paths", attention.attend_by_paths, nullcontext()


# ---------------------------------------------------------------------------------------------------------------- loss


def make_head(shape: str, num_positions: int, given: Given) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states, fp32 (1, N + 1, hidden), a head's weight, fp32 (V, hidden), and labels (1, N + 1)."""
    config = SHAPES[shape]
    hidden_states = torch.randn(1, num_positions + 1, config.hidden_size, device=given.device)
    weight = 0.02 * torch.randn(config.vocab_size, config.hidden_size, device=given.device)
    labels = torch.randint(config.vocab_size, (1, num_positions + 1), device=given.device)
    return hidden_states.requires_grad_(), weight.requires_grad_(), labels


def loss_exact(given: Given) -> Iterator[Figures]:
    """Yield how far the loss and its gradients are off float64's, of the same inputs rounded to 16 bits."""
    for shape in given.shapes(*LOSSES):
        for dtype in (torch.bfloat16, torch.float16):
            hidden_states, weight, labels = make_head(shape, 40 if given.is_tiny else 1500, given)
            num_items = torch.tensor(1000, device=given.device)
            poison(given)
            with torch.autocast(given.device.type, dtype):
                value = next_token_loss(hidden_states, weight, labels, num_items)
            value.backward()
            exact = [each.detach().to(dtype).double().requires_grad_() for each in (hidden_states, weight)]
            logits = exact[0][0, :-1] @ exact[1].T
            expected = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum") / 1000
            del logits
            expected.backward()
            yield (
                f"{shape}, {str(dtype).removeprefix('torch.')}",
                {
                    "loss off by": abs(value.item() / expected.item() - 1),
                    "hidden gradient off by": off_by(hidden_states.grad, exact[0].grad),
                    "weight gradient off by": off_by(weight.grad, exact[1].grad),
                },
            )


def loss_speed(given: Given) -> Iterator[Figures]:
    """Yield the milliseconds of the loss with its gradients, and their ratio to its three products alone."""
    for shape in given.shapes(*LOSSES):
        for num_positions in (30, 60) if given.is_tiny else (2048, 12288):
            hidden_states, weight, labels = make_head(shape, num_positions, given)
            products = measure.milliseconds(lambda: three_products(hidden_states[0, :-1], weight), 5)  # noqa: B023
            yield f"{shape}, {num_positions} labels, its products", {"ms": products}
            for name, compute in losses(given, hidden_states, weight, labels):
                taken = measure.milliseconds(lambda: compute().backward(), 5)  # noqa: B023
                yield f"{shape}, {num_positions} labels, {name}", {"ms": taken, "by products": taken / products}


def three_products(hidden_states: torch.Tensor, weight: torch.Tensor) -> None:
    """Multiply what no loss can do without: logits, and the gradients of hidden states and weight."""
    inputs, matrix = hidden_states.detach().bfloat16(), weight.detach().bfloat16()
    logits = inputs @ matrix.T
    logits @ matrix, logits.T @ inputs


def losses(given: Given, hidden_states, weight, labels) -> Iterator[tuple[str, Callable]]:
    """Yield the losses that there are: this project's, Liger's and Apple's where they are installed."""
    num_items = torch.tensor(float(labels.shape[1] - 1), device=given.device)

    def ours() -> torch.Tensor:
        with torch.autocast(given.device.type, torch.bfloat16):
            return next_token_loss(hidden_states, weight, labels, num_items)

    yield "this project", ours
    if given.device.type != "cuda":
        return
    inputs, matrix = (each.detach().bfloat16().requires_grad_() for each in (hidden_states[0, :-1], weight))
    if find_spec("liger_kernel"):
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        yield "Liger, rounded logits", lambda: LigerFusedLinearCrossEntropyLoss()(matrix, inputs, labels[0, 1:])
    if find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        yield "CCE", lambda: linear_cross_entropy(inputs, matrix, labels[0, 1:])
