"""Its values and gradients against PyTorch's own in fp64, what it holds on the way, and tied weights."""

from collections.abc import Iterable

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sft.model import loss
from sft.model.loss import TiedEmbedding, TiedGradient, next_token_loss
from support.batches import HIDDEN, VOCAB, batch

TOLERANCE = 1e-5  # of the largest entry
PRODUCTS = {"mm", "addmm", "addmm_", "_linear_pointwise"}


class Recorder(TorchDispatchMode):
    """Notes every tensor that an operation allocates, and every product of matrices."""

    def __init__(self):
        super().__init__()
        self.made: list[torch.Size] = []
        self.products: list[torch.Size] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        # What shares the storage of an argument is a view of it or written in place.
        given = {leaf.untyped_storage().data_ptr() for leaf in tensors_of((args, kwargs))}
        self.made += [leaf.shape for leaf in tensors_of(output) if leaf.untyped_storage().data_ptr() not in given]
        if function.overloadpacket.__name__ in PRODUCTS:
            self.products.append(output.shape)
        return output


def tensors_of(tree: object) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def hold(monkeypatch: pytest.MonkeyPatch, positions: int, vocab: int = VOCAB) -> None:
    """Let a chunk be of so many positions at most; at 0, the logits of a single one are already too many."""
    for name in ("CHUNK_BYTES", "CHUNK_BYTES_ON_HOST"):
        monkeypatch.setattr(loss, name, 4 * vocab * positions)


def reference_loss(
    hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, num_items: float | None = None
) -> torch.Tensor:
    """Return the same loss from all logits in fp64."""
    logits, targets = hidden_states.double()[:, :-1] @ weight.double().T, labels[:, 1:]
    summed = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return summed / ((targets != -100).sum() if num_items is None else float(num_items))


def gradients(value: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients of leaves, which keep none."""
    value.backward()
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference by the largest entry."""
    assert found.shape == expected.shape and found.isfinite().all()
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def assert_equal_to_reference(hidden_states, weight, labels, num_items=None) -> None:
    found = next_token_loss(hidden_states, weight, labels, num_items)
    expected = reference_loss(hidden_states, weight, labels, num_items)
    assert found.dtype == torch.float32
    assert error(found.detach(), expected.detach()) < TOLERANCE
    pairs = zip(gradients(found, hidden_states, weight), gradients(expected, hidden_states, weight), strict=True)
    assert [error(mine, true) < TOLERANCE for mine, true in pairs] == [True, True]


@pytest.mark.parametrize("positions", [0, 1, 7, 1000])
@pytest.mark.parametrize(("rows", "length"), [(1, 2), (1, 23), (3, 9)])
def test_value_and_gradients_are_those_of_all_logits_in_fp64(positions, rows, length, device, monkeypatch):
    hold(monkeypatch, positions)
    assert_equal_to_reference(*batch(device, rows, length))


@pytest.mark.parametrize("vocab", [2, 1023, 5003])  # softmax has kernels for short rows and for long ones
def test_any_size_of_vocabulary_will_do(vocab, device, monkeypatch):
    hold(monkeypatch, 7, vocab)
    assert_equal_to_reference(*batch(device, rows=2, vocab=vocab))


@pytest.mark.parametrize("positions", [3, 1000])
@pytest.mark.parametrize("num_items", [40, 2.5, torch.tensor(17)], ids=["int", "float", "tensor"])
def test_the_sum_is_divided_by_the_number_of_items_that_was_given(num_items, positions, device, monkeypatch):
    hold(monkeypatch, positions)
    num_items = num_items.to(device) if isinstance(num_items, torch.Tensor) else num_items
    assert_equal_to_reference(*batch(device, rows=2), num_items)


@pytest.mark.parametrize("position", [0, 1, 5])
def test_a_single_label_is_predicted_from_the_position_before_it(position, device):
    hidden_states, weight, _ = batch(device, length=6)
    labels = torch.full((1, 6), -100, device=device)
    labels[0, position] = 5
    value = next_token_loss(hidden_states, weight, labels)
    [gradient] = gradients(value, hidden_states)
    moved = gradient[0].abs().sum(1).nonzero().flatten().tolist()
    assert moved == ([position - 1] if position else [])
    if position:
        log_probs = (weight.double() @ hidden_states[0, position - 1].double()).log_softmax(0)
        assert value.item() == pytest.approx(-log_probs[5].item(), rel=TOLERANCE)


@pytest.mark.parametrize("positions", [2, 1000])
def test_extreme_logits_give_finite_and_right_numbers(positions, device, monkeypatch):
    hold(monkeypatch, positions)
    hidden_states, weight, labels = batch(device, rows=2)
    hidden_states = (1e3 * hidden_states.detach()).requires_grad_()
    assert (hidden_states @ weight.T).abs().max() > 5000  # fp32's exp overflows at 89
    assert_equal_to_reference(hidden_states, weight, labels)


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("num_items", [None, 0, 9])
def test_without_labels_the_loss_is_zero_and_so_are_its_gradients(num_items, length, device):
    hidden_states, weight, _ = batch(device, rows=2, length=length)
    labels = torch.full((2, length), -100, device=device)
    labels[:, 0] = 3  # a row's first token is predicted by nothing
    value = next_token_loss(hidden_states, weight, labels, num_items)
    assert value.item() == 0 and value.requires_grad
    for gradient, leaf in zip(gradients(value, hidden_states, weight), (hidden_states, weight), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


def test_no_more_than_a_chunk_of_logits_is_ever_held(monkeypatch):
    # Hidden states so few that everything else, the weight's gradient too, is smaller than a chunk of logits.
    vocab, hidden, positions = 64, 3, 4
    hold(monkeypatch, positions, vocab)
    hidden_states, weight, labels = batch(length=41, vocab=vocab, hidden=hidden, share=1.0)
    with Recorder() as recorder:
        next_token_loss(hidden_states, weight, labels).backward()
    assert max(shape.numel() for shape in recorder.made) == positions * vocab


def test_only_positions_with_a_label_are_multiplied(monkeypatch):
    hold(monkeypatch, 4)
    hidden_states, weight, labels = batch(rows=3, length=20, share=0.3)
    num_labels = (labels[:, 1:] != -100).sum().item()
    assert num_labels % 4 and num_labels < 30
    with Recorder() as recorder:
        next_token_loss(hidden_states, weight, labels)
    logits = [shape for shape in recorder.products if shape[1] == VOCAB]
    assert sum(shape[0] for shape in logits) == num_labels
    # One product for the logits, one for each of the two gradients.
    assert len(recorder.products) == 3 * len(logits) == 3 * -(-num_labels // 4)


def test_without_gradients_only_the_logits_are_multiplied(device, monkeypatch):
    hold(monkeypatch, 4)
    hidden_states, weight, labels = batch(device, length=18, share=1.0)
    trained = next_token_loss(hidden_states, weight, labels)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, Recorder() as recorder:
            value = next_token_loss(hidden_states, weight, labels)
        assert value.item() == trained.item() and not value.requires_grad
        assert recorder.products == [(4, VOCAB)] * 4 + [(1, VOCAB)]
        assert weight.shape not in recorder.made


@pytest.mark.parametrize("factor", [3.0, 0.25, 65536.0])  # the last as a gradient scaler multiplies
def test_gradients_scale_with_the_loss_exactly(factor, device, monkeypatch):
    hold(monkeypatch, 5)
    hidden_states, weight, labels = batch(device, rows=2)
    plain = gradients(next_token_loss(hidden_states, weight, labels), hidden_states, weight)
    scaled = gradients(next_token_loss(hidden_states, weight, labels) * factor, hidden_states, weight)
    assert all(torch.equal(one * factor, other) for one, other in zip(plain, scaled, strict=True))


def test_a_frozen_weight_costs_no_gradient_of_its_size(device, monkeypatch):
    hold(monkeypatch, 5)
    hidden_states, weight, labels = batch(device, rows=2)
    weight.requires_grad_(False)
    with Recorder() as recorder:
        [found] = gradients(next_token_loss(hidden_states, weight, labels), hidden_states)
    assert weight.shape not in recorder.made and weight.grad is None
    [expected] = gradients(reference_loss(hidden_states, weight, labels), hidden_states)
    assert error(found, expected) < TOLERANCE


def test_frozen_hidden_states_leave_the_weight_its_gradient(device, monkeypatch):
    hold(monkeypatch, 5)
    hidden_states, weight, labels = batch(device, rows=2)
    hidden_states.requires_grad_(False)
    with Recorder() as recorder:
        [found] = gradients(next_token_loss(hidden_states, weight, labels), weight)
    assert len(recorder.products) == 2 * sum(shape[1] == VOCAB for shape in recorder.products)
    [expected] = gradients(reference_loss(hidden_states, weight, labels), weight)
    assert error(found, expected) < TOLERANCE


def norm_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def test_autocast_computes_in_bf16_and_keeps_the_dtypes(device):
    hidden_states, weight, labels = batch(device, rows=2, length=40)
    with torch.autocast(device, torch.bfloat16):
        value = next_token_loss(hidden_states, weight, labels)
    expected = reference_loss(hidden_states, weight, labels)
    difference = abs(value.item() - expected.item()) / expected.item()
    assert value.dtype == torch.float32 and 0 < difference < 2e-2
    pairs = zip(gradients(value, hidden_states, weight), gradients(expected, hidden_states, weight), strict=True)
    for mine, true in pairs:
        assert mine.dtype == torch.float32
        assert 1e-4 < norm_error(mine, true) < 2e-2


def test_weights_in_bf16_get_gradients_in_bf16(device, monkeypatch):
    hold(monkeypatch, 5)
    hidden_states, weight, labels = batch(device, rows=2, length=40)
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden_states, weight)]
    value = next_token_loss(*rounded, labels)
    assert value.dtype == torch.float32
    expected = gradients(reference_loss(hidden_states, weight, labels), hidden_states, weight)
    for mine, true in zip(gradients(value, *rounded), expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert norm_error(mine, true) < 2e-2


def test_many_chunks_in_bf16_sum_up_no_less_exactly_than_one(device, monkeypatch):
    hidden_states, weight, labels = batch(device, length=257, share=1.0)
    # A common direction, so that every chunk adds to the same sums; they would stop growing in bf16.
    hidden_states = (0.2 * hidden_states.detach() + 1).requires_grad_()
    [expected] = gradients(reference_loss(hidden_states, weight, labels), weight)
    errors = []
    for positions in (256, 16, 1):
        hold(monkeypatch, positions)
        with torch.autocast(device, torch.bfloat16):
            value = next_token_loss(hidden_states, weight, labels)
        errors.append(norm_error(*gradients(value, weight), expected))
    assert max(errors[1:]) < 1.5 * errors[0] < 1e-2


def tied_model(input_ids, weight, middle, own: bool = True, num_items: float | None = None) -> torch.Tensor:
    """Return the loss of a model whose weight is embedding and head, with a layer between: ours, or the reference."""
    tied = TiedGradient()
    embeddings = TiedEmbedding.apply(input_ids, weight, tied) if own else functional.embedding(input_ids, weight)
    hidden_states = torch.tanh(embeddings @ middle)
    if own:
        return next_token_loss(hidden_states, weight, input_ids, num_items, tied)
    return reference_loss(hidden_states, weight, input_ids, num_items)


def tied_batch(device: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, weight and middle layer; the ids are from few, so most are there several times."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(7, (2, 15), generator=generator).to(device)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(device).requires_grad_()
    middle = torch.randn(HIDDEN, HIDDEN, generator=generator).to(device).requires_grad_()
    return input_ids, weight, middle


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_tied_weight_gets_the_gradients_of_head_and_embedding(factor, device, monkeypatch):
    hold(monkeypatch, 5)
    input_ids, weight, middle = tied_batch(device)
    found = gradients(tied_model(input_ids, weight, middle) * factor, weight, middle)
    expected = gradients(tied_model(input_ids, weight, middle, own=False) * factor, weight, middle)
    assert [error(mine, true) < TOLERANCE for mine, true in zip(found, expected, strict=True)] == [True, True]


def test_gradients_of_a_tied_weight_accumulate_over_batches(device):
    _, weight, middle = tied_batch(device)
    found, expected = [], []
    for own, kept in ((True, found), (False, expected)):
        first, second = (tied_model(tied_batch(device, seed)[0], weight, middle, own, 40) for seed in (1, 2))
        first.backward()
        kept += gradients(second, weight, middle)
    assert [error(mine, true) < TOLERANCE for mine, true in zip(found, expected, strict=True)] == [True, True]


def test_a_tied_weight_has_one_gradient_of_its_size():
    input_ids, weight, middle = tied_batch("cpu")
    with Recorder() as recorder:
        tied_model(input_ids, weight, middle).backward()
    assert recorder.made.count(weight.shape) == 1


def test_a_finished_backward_keeps_no_hold_of_the_tied_gradient():
    input_ids, weight, _ = tied_batch("cpu")
    tied = TiedGradient()
    next_token_loss(TiedEmbedding.apply(input_ids, weight, tied), weight, input_ids, None, tied).backward()
    assert tied.tensor is None


def test_a_tied_embedding_without_its_head_has_a_plain_gradient(device):
    input_ids, weight, _ = tied_batch(device)
    [found] = gradients(TiedEmbedding.apply(input_ids, weight, TiedGradient()).square().sum(), weight)
    [expected] = gradients(functional.embedding(input_ids, weight).square().sum(), weight)
    assert error(found, expected) < TOLERANCE


def test_a_tied_weight_in_bf16_autocast_is_near_fp32(device):
    input_ids, weight, middle = tied_batch(device)
    with torch.autocast(device, torch.bfloat16):
        value = tied_model(input_ids, weight, middle)
    expected = gradients(tied_model(input_ids, weight, middle, own=False), weight, middle)
    for mine, true in zip(gradients(value, weight, middle), expected, strict=True):
        assert mine.dtype == torch.float32 and norm_error(mine, true) < 3e-2


def test_a_tied_weight_in_bf16_gets_one_gradient_in_bf16(device):
    input_ids, weight, middle = tied_batch(device)
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in (weight, middle)]
    found = gradients(tied_model(input_ids, *rounded), *rounded)
    expected = gradients(tied_model(input_ids, weight, middle, own=False), weight, middle)
    for mine, true in zip(found, expected, strict=True):
        assert mine.dtype == torch.bfloat16 and norm_error(mine, true) < 3e-2


@pytest.mark.parametrize("also", ["a second loss", "a penalty on the weight"])
def test_a_tied_weight_with_another_gradient_in_the_same_backward_gets_all(also):
    torch.manual_seed(0)
    weight = torch.randn(VOCAB, 4, requires_grad=True)
    first, second = torch.randint(VOCAB, (2, 1, 6))

    def loss(input_ids: torch.Tensor, own: bool) -> torch.Tensor:
        tied = TiedGradient()
        embed = TiedEmbedding.apply(input_ids, weight, tied) if own else functional.embedding(input_ids, weight)
        return next_token_loss(embed.tanh(), weight, input_ids, None, tied if own else None)

    found, expected = (
        torch.autograd.grad(
            loss(first, own) + (loss(second, own) if "loss" in also else weight.square().sum()), weight
        )[0]
        for own in (True, False)
    )
    assert error(found, expected) < 1e-5
