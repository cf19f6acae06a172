"""In a flat batch each example is attended as if it were alone, and nothing of (T, T) is held."""

import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from sft.model import attention, patch
from sft.model.attention import FlatBatch
from sft.tools.random_model import build_model
from support.examples import TOLERANCE, make_examples, mask_prompt, off_by, positions_of, wrong_gradients
from support.project import SLOW_SHAPES, TINY_SHAPES

ALIBI_SHAPES = ["bloom-tiny", "bloom-tiny-6-heads", "falcon-tiny-rw"]
LENGTHS = (5, 300, 1, 40)  # boundaries inside blocks of 128, an example over three of them, one of one token
NUM_ITEMS = 1000  # labels of the batch, more than of the row: other rows and ranks have some too


def make_installed(shape: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = build_model(shape).to(device, dtype).eval()
    patch.install(model)
    return model


@pytest.mark.parametrize("shape", TINY_SHAPES)
@torch.no_grad()
def test_a_flat_row_has_the_logits_of_each_example_alone(shape: str, device: str):
    own, model = build_model(shape).to(device).eval(), make_installed(shape, device)
    examples = make_examples(LENGTHS, device)
    expected = torch.cat([own(example).logits for example in examples], 1)
    logits = model(torch.cat(examples, 1), positions_of(LENGTHS, device)).logits
    assert logits.shape == expected.shape
    assert off_by(logits, expected) <= TOLERANCE[device]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("shape", TINY_SHAPES)
def test_a_flat_row_has_the_loss_and_gradients_of_each_example_alone(shape: str, checkpointing: bool, device: str):
    own, model = build_model(shape).to(device).train(), make_installed(shape, device).train()
    examples = make_examples(LENGTHS, device)
    labels = [mask_prompt(example) for example in examples]
    pairs = zip(examples, labels, strict=True)
    expected = sum(own(example, labels=own_labels, num_items_in_batch=NUM_ITEMS).loss for example, own_labels in pairs)
    expected.backward()

    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    for block in model.base_model.h:
        block.self_attention.register_forward_hook(lambda module, *_: calls.append(module))
    loss = model(torch.cat(examples, 1), positions_of(LENGTHS, device), torch.cat(labels, 1), NUM_ITEMS).loss
    loss.backward()
    assert len(calls) == len(model.base_model.h) * (2 if checkpointing else 1)
    assert off_by(loss, expected) <= TOLERANCE[device]
    assert wrong_gradients(model, own, TOLERANCE[device]) == {}


@pytest.mark.parametrize("shape", SLOW_SHAPES)
def test_compiling_the_rest_of_the_model_changes_nothing(shape: str, device: str):
    own, model = make_installed(shape, device).train(), make_installed(shape, device).train()
    examples = make_examples(LENGTHS, device)
    inputs = [torch.cat(examples, 1), positions_of(LENGTHS, device), torch.cat(list(map(mask_prompt, examples)), 1)]
    expected = own(*inputs).loss
    expected.backward()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    loss = torch.compile(model, backend=backend)(*inputs).loss
    loss.backward()
    # Their own kernels stay their own: the compiler cannot lower the loss's, and attention has its own graph.
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert called, "nothing was compiled"
    assert [name for name in called if "scaled_dot_product" in name or "_linear_pointwise" in name] == []
    assert off_by(loss, expected) <= TOLERANCE[device]
    assert wrong_gradients(model, own, TOLERANCE[device]) == {}


@pytest.mark.parametrize("shape", SLOW_SHAPES)
def test_compiled_blocks_change_nothing_and_are_compiled_once_for_all_layers(shape: str):
    own, model = make_installed(shape).train(), make_installed(shape).train()
    examples = make_examples(LENGTHS)
    inputs = [torch.cat(examples, 1), positions_of(LENGTHS), torch.cat(list(map(mask_prompt, examples)), 1)]
    expected = own(*inputs).loss
    expected.backward()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch.compiler.reset()
    patch.compile_blocks(model)
    for block in model.base_model.h:
        block._compiled_call_impl = torch.compile(block._call_impl, backend=backend)
    loss = model(*inputs).loss
    loss.backward()
    assert off_by(loss, expected) <= 1e-6
    assert wrong_gradients(model, own, 1e-5) == {}
    assert 2 <= len(graphs) <= 5, "each layer was compiled anew"
    names = {name for graph in graphs for name in graph}
    assert not any("scaled_dot_product" in name for name in names)
    with patch.removed(model):
        assert all(block._compiled_call_impl is None for block in model.base_model.h)
    assert all(block._compiled_call_impl is not None for block in model.base_model.h)


@pytest.mark.parametrize("shape", ["falcon-tiny", "falcon-tiny-40b"])
@torch.no_grad()
def test_rotations_start_anew_with_each_example(shape: str):
    # Scores depend on distances alone, so in fp32 rotations that ran on would show in no logit; in 16 bits they would.
    model, rotations = make_installed(shape), []
    model.base_model.rotary_emb.register_forward_hook(lambda module, inputs, output: rotations.append(output))
    examples = make_examples(LENGTHS)
    for example in examples:
        model(example, positions_of(example.shape[1:]))
    model(torch.cat(examples, 1), positions_of(LENGTHS))
    *alone, row = rotations
    for of_row, of_each in zip(row, zip(*alone, strict=True), strict=True):
        assert torch.equal(of_row, torch.cat(of_each, 1))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "lengths", [(5, 300, 1, 78), (512,), (128, 128), (256, 1, 127), 128 * (1,), (1, 126, 1, 2, 254)], ids=str
)
@pytest.mark.parametrize("shape", ["bloom-tiny-6-heads", "falcon-tiny-rw", "falcon-tiny", "falcon-tiny-40b"])
@torch.no_grad()
def test_blocks_and_examples_give_the_same(shape: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "_compiled_for_blocks", lambda: attention._attend_blocks)
    model, position_ids = build_model(shape), positions_of(lengths)
    num_heads = model.config.num_attention_heads
    num_groups = {"falcon-tiny": 1, "falcon-tiny-40b": 2}.get(shape, num_heads)
    generator = torch.Generator().manual_seed(0)
    packed = 2 * torch.randn(1, sum(lengths), num_groups, num_heads // num_groups + 2, 8, generator=generator)
    row = FlatBatch(position_ids, attention.key_bias(model, position_ids))
    rotations = None if row.key_bias is not None else tuple(torch.randn(2, 1, sum(lengths), 8, generator=generator))
    by_examples = attention.attend_by_paths(packed, row, rotations)
    by_blocks = attention.attend_by_blocks(packed, row, rotations)
    assert by_blocks.shape == by_examples.shape == (1, sum(lengths), num_heads * 8)
    assert off_by(by_blocks, by_examples) <= 1e-5


def draw_lengths(seed: int) -> tuple[int, ...]:
    generator = random.Random(seed)
    longest = generator.choice([3, 60, 200, 600])
    lengths = [generator.choice([1, 128, 256, *3 * [generator.randint(1, longest)]]) for _ in range(1 + seed % 9)]
    if seed % 3:  # most rows on a GPU fill whole blocks
        lengths.append(128 - sum(lengths) % 128)
    return tuple(lengths)


def named_blocks(mask: BlockMask, kind: str) -> list[list[int]]:
    """Return which blocks each row (or column) names; the entries past their number mean nothing."""
    counts, indices = (getattr(mask, f"{kind}_{name}")[0, 0].tolist() for name in ("num_blocks", "indices"))
    return [sorted(row[:count]) for count, row in zip(counts, indices, strict=True)]


# Boundaries at and beside the edges of blocks; one example behind an edge that the row does not fill.
EDGES = [(256,), (255, 50), (256, 50), (257, 127), (127, 257), (1, 383), (300,), (5, 300), 300 * (1,), (1,)]


@pytest.mark.parametrize("lengths", [*EDGES, *map(draw_lengths, range(30))])
def test_the_block_mask_is_the_one_torch_makes_of_every_pair(lengths: tuple[int, ...]):
    row = FlatBatch(positions_of(lengths))
    length = row.position_ids.shape[1]
    expected = create_block_mask(row.mask_mod, 1, 1, length, length, device="cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        assert named_blocks(row.block_mask, kind) == named_blocks(expected, kind), kind
        for name in (f"{kind}_num_blocks", f"{kind}_indices"):
            tensor, expected_tensor = getattr(row.block_mask, name), getattr(expected, name)
            assert (tensor.dtype, tensor.shape) == (expected_tensor.dtype, expected_tensor.shape), name
    assert torch.equal(row.block_mask.to_dense(), expected.to_dense())
    assert row.block_mask.seq_lengths == (length, length)


def test_a_query_meets_the_keys_of_its_own_example_up_to_itself():
    row = FlatBatch(positions_of((2, 3)))
    tokens = torch.arange(5)
    assert row.mask_mod(0, 0, tokens[:, None], tokens[None]).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert row.subtree_ends.tolist() == [[2, 2, 5, 5, 5]]
    assert row.nodes == [(0, 2, 2), (2, 5, 5)]


def paper_slopes(num_heads: int) -> torch.Tensor:
    """Return the slopes of the ALiBi paper (Press et al., 2022, section 3) and of its code for other head counts."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 / power * (i + 1)) for i in range(power)]
    of_double = [2 ** (-8 / (2 * power) * (i + 1)) for i in range(2 * power)]
    return torch.tensor([*slopes, *of_double[::2][: num_heads - power]])


@pytest.mark.parametrize("shape", TINY_SHAPES)
def test_the_bias_of_each_key_is_alibis_counted_from_its_example(shape: str):
    model, position_ids = build_model(shape), positions_of(LENGTHS)
    bias = attention.key_bias(model, position_ids)
    if shape not in ALIBI_SHAPES:
        assert bias is None
        return
    slopes, positions = paper_slopes(model.config.num_attention_heads)[:, None], position_ids.float()
    if shape == "falcon-tiny-rw":
        expected = (slopes.bfloat16() * positions.bfloat16()).float() / math.sqrt(model.config.head_dim)
    else:
        expected = slopes * positions
    assert bias.dtype == torch.float32
    assert bias.shape == expected.shape == (len(slopes), sum(LENGTHS))
    assert torch.allclose(bias, expected, rtol=1e-6, atol=0)


class LargestTensor(TorchDispatchMode):
    """The largest number of elements of any tensor that an operation gave."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.size = max([self.size, *(leaf.numel() for leaf in tree_leaves(output) if torch.is_tensor(leaf))])
        return output


def largest_tensor(model: PreTrainedModel, length: int) -> int:
    (example,) = make_examples((length,))
    with LargestTensor() as largest:
        if "forward" in model.__dict__:
            hidden_states = attention.hidden_states_of(model.base_model, example, positions_of((length,)))
        else:
            hidden_states = model.base_model(example, use_cache=False)[0]
        hidden_states.sum().backward()
    return largest.size


@pytest.mark.parametrize("shape", TINY_SHAPES)
def test_the_largest_tensor_grows_with_the_row_and_not_with_its_square(shape: str):
    sizes = [largest_tensor(make_installed(shape), length) for length in (256, 512, 1024)]
    assert sizes[1] <= 2.1 * sizes[0]
    assert sizes[2] <= 2.1 * sizes[1]
    # transformers' own forward holds at least a mask of that size, which shows that the count would see one.
    assert sizes[2] < 1024 * 1024 <= largest_tensor(build_model(shape), 1024)


# 16 bits everywhere but in ALiBi's ramp are off by half of these; a ramp in 16 bits too, by 0.2 and 0.03 at least.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)], ids=str)
@pytest.mark.parametrize("shape", TINY_SHAPES)
@torch.no_grad()
def test_autocast_to_16_bits_stays_close_on_a_long_example(shape: str, dtype: torch.dtype, bound: float):
    model, (example,) = make_installed(shape), make_examples((1024,))
    expected = model(example, positions_of((1024,))).logits
    with torch.autocast("cpu", dtype):
        logits = model(example, positions_of((1024,))).logits
    assert off_by(logits.float(), expected) <= bound


@pytest.mark.parametrize("shape", ALIBI_SHAPES)
@torch.no_grad()
def test_16_bits_know_nothing_of_the_long_example_before(shape: str, monkeypatch: pytest.MonkeyPatch):
    model = make_installed(shape, dtype=torch.bfloat16)
    long, short = make_examples((1000, 24))
    both, position_ids = torch.cat([long, short], 1), positions_of((1000, 24))
    expected = model(short, positions_of((24,))).logits.float()
    # Equal but for the order in which a matrix product of other size may add.
    assert off_by(model(both, position_ids).logits[:, 1000:].float(), expected) <= 0.01
    ramp = attention.key_bias(model, positions_of((1024,)))
    monkeypatch.setattr(attention, "key_bias", lambda *_: ramp.bfloat16().float())
    assert off_by(model(both, position_ids).logits[:, 1000:].float(), expected) > 0.03


@pytest.fixture
def forgotten_devices() -> Iterator[None]:
    attention.has_flex_attention.cache_clear()
    yield
    attention.has_flex_attention.cache_clear()


@pytest.mark.usefixtures("forgotten_devices")
@pytest.mark.parametrize(("capability", "expected"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_blocks_are_for_gpus_from_capability_8_on(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "has_triton", lambda: True)
    assert attention.has_flex_attention(torch.device("cuda", 0)) is expected
    monkeypatch.setattr(attention, "has_triton", lambda: False)  # as on Windows
    assert attention.has_flex_attention(torch.device("cuda", 1)) is False
    assert attention.has_flex_attention(torch.device("cpu")) is False
