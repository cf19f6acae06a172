"""A model made to train on flat batches is told from its own forward only where it would be wrong."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sft import IGNORE_INDEX
from sft.model import attention, patch, products
from sft.program import UserError
from sft.tools.random_model import build_model
from support import examples
from support.examples import TOLERANCE, mask_prompt, off_by, positions_of, wrong_gradients
from support.project import TINY_SHAPES

LENGTHS = (7, 20, 1, 12)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 64}
MPT = {"d_model": 32, "n_layers": 2, "n_heads": 4}
OTHERS = {
    "llama": ("llama", {**LLAMA, "tie_word_embeddings": False}),
    "llama-tied": ("llama", {**LLAMA, "tie_word_embeddings": True}),
    # Embeddings that give their pad token no gradient are left to themselves.
    "llama-tied-padding": ("llama", {**LLAMA, "tie_word_embeddings": True, "pad_token_id": 3}),
    "qwen2": ("qwen2", {**LLAMA, "tie_word_embeddings": False}),
    "qwen2-tied": ("qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "gpt_neox": ("gpt_neox", {**SIZES, "intermediate_size": 64, "attention_dropout": 0.0, "hidden_dropout": 0.0}),
    "a window": ("mistral", {**LLAMA, "sliding_window": 8}),
}


def build_other(family: str, **fields) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=128, initializer_range=0.2, **fields)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def build(name: str, device: str = "cpu") -> PreTrainedModel:
    if name not in OTHERS:
        return build_model(name).to(device).eval()
    family, fields = OTHERS[name]
    return build_other(family, **fields).to(device)


def make_examples(vocab: int = 128, lengths: tuple[int, ...] = LENGTHS, device: str = "cpu") -> list[torch.Tensor]:
    return examples.make_examples(lengths, device, vocab)


def flatten(examples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    input_ids, lengths = torch.cat(examples, 1), tuple(example.shape[1] for example in examples)
    labels = torch.cat([mask_prompt(example) for example in examples], 1)
    return {"input_ids": input_ids, "position_ids": positions_of(lengths).to(input_ids.device), "labels": labels}


def add_own_gradients(own: PreTrainedModel, examples: list[torch.Tensor]) -> torch.Tensor:
    """Run a model's own forward and backward on each example alone; return the mean loss of all labels."""
    labels = [mask_prompt(example) for example in examples]
    num_items = sum((own_labels[:, 1:] != IGNORE_INDEX).sum() for own_labels in labels)
    pairs = zip(examples, labels, strict=True)
    loss = sum(own(example, labels=own_labels, num_items_in_batch=num_items).loss for example, own_labels in pairs)
    loss.backward()
    return loss


def replaced_forwards(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        *((shape, {"word_embeddings", "self_attention", "gelu_impl", "lm_head"}) for shape in TINY_SHAPES[:2]),
        *((shape, {"word_embeddings", "self_attention", "lm_head"}) for shape in TINY_SHAPES[2:]),
        ("llama", {"lm_head"}),
        ("llama-tied", {"embed_tokens", "lm_head"}),
        ("llama-tied-padding", {"lm_head"}),
    ],
)
@torch.no_grad()
def test_a_model_with_its_forwards_removed_is_as_it_was(name: str, modules: set[str], monkeypatch):
    monkeypatch.setattr(products, "is_faster", lambda: False)  # whatever processor this is
    model, (example,) = build(name), make_examples(lengths=(20,))
    classes, config = [type(module) for module in model.modules()], model.config.to_dict()
    logits = model(example).logits
    patch.install(model)
    assert {path.split(".")[-1] for path in replaced_forwards(model)} == {"", *modules}
    assert [type(module) for module in model.modules()] == classes
    assert model.config.to_dict() == config
    assert model(example, positions_of((20,))).logits.shape == logits.shape
    patch.remove(model)
    assert replaced_forwards(model) == []
    assert torch.equal(model(example).logits, logits)


@torch.no_grad()
def test_forwards_removed_for_a_while_come_back():
    model, (example,) = build("bloom-tiny"), make_examples(lengths=(20,))
    expected = model.generate(example, max_new_tokens=5, do_sample=False)
    patch.install(model)
    installed = model.forward

    def on_top(*arguments, **named):
        return installed(*arguments, **named)

    model.forward = on_top
    before = {module: module.__dict__.get("forward") for module in model.modules()}
    with patch.removed(model):
        assert replaced_forwards(model) == []
        assert torch.equal(model.generate(example, max_new_tokens=5, do_sample=False), expected)
    assert {module: module.__dict__.get("forward") for module in model.modules()} == before
    assert model.forward is on_top
    with suppress(KeyError), patch.removed(model):
        raise KeyError
    assert model.forward is on_top


@pytest.mark.parametrize("shape", TINY_SHAPES)
@torch.no_grad()
def test_a_folder_saved_of_an_installed_model_is_a_plain_one(shape: str, tmp_path: Path):
    own, model = build_model(shape).eval(), build_model(shape)
    patch.install(model)
    model.save_pretrained(tmp_path / "installed")
    own.save_pretrained(tmp_path / "own")
    assert (tmp_path / "installed/config.json").read_text() == (tmp_path / "own/config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "installed").eval()
    assert replaced_forwards(loaded) == []
    assert loaded.config.architectures == [type(own).__name__]
    assert len({(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("installed", "own")}) == 1
    assert model.state_dict().keys() == loaded.state_dict().keys() == own.state_dict().keys()
    (example,) = make_examples(lengths=(20,))
    assert off_by(loaded(example).logits, own(example).logits) <= 1e-6


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*TINY_SHAPES, *OTHERS])
def test_the_check_passes_and_leaves_the_model_as_it_was(name: str, training: bool, device: str):
    model = build(name, device)
    patch.install(model)
    model.train(training)
    forwards = replaced_forwards(model)
    leak = patch.measure_leak(model)
    assert max(leak) < TOLERANCE[device] and (leak.shared > 0) == patch.can_share_prefixes(model.config)
    assert patch.check(model, torch.float32, shares_batches=True) == leak.packed
    assert patch.check(model, torch.float32, shares_batches=True, shares_prefixes=True) == max(leak[1:])
    assert patch.check(model, torch.float32, shares_batches=False) == leak.alone
    assert model.training is training
    assert replaced_forwards(model) == forwards


def test_the_check_looks_without_dropout():
    model = build("bloom-tiny").train()
    for module in model.modules():
        if hasattr(module, "hidden_dropout"):
            module.hidden_dropout = 0.5
    patch.install(model)
    assert patch.check(model, torch.float32, shares_batches=True) < 1e-5


def test_the_leak_is_measured_by_the_largest_logit():
    model = build("llama")
    model.lm_head.weight.data *= 1000
    patch.install(model)
    assert max(patch.measure_leak(model)) < 1e-5
    model.lm_head.weight.data /= 1e6
    # The same leak as of large logits, though it moves none by as much as the limit.
    model.forward = run_on(model.forward)
    assert_told_as_a_leak(model)


def run_on(installed: Callable) -> Callable:
    def forward(input_ids: torch.Tensor, position_ids: torch.Tensor, subtree_ends: torch.Tensor | None = None):
        return installed(input_ids, torch.arange(input_ids.shape[1])[None])

    return forward


def assert_told_as_a_leak(model: PreTrainedModel):
    alone, packed, _ = patch.measure_leak(model)
    assert alone < 1e-5
    assert packed > 0.1
    for dtype, limit in ((torch.float32, "0.001"), (torch.bfloat16, "0.05"), (torch.float16, "0.05")):
        with pytest.raises(UserError) as refusal:
            patch.check(model, dtype, shares_batches=True)
        text = str(refusal.value)
        assert text.startswith(f"{model.config.model_type} cannot be packed")
        assert f"off by {packed:.2g} of the largest, and rounding explains at most {limit}" in text
        assert "--packing False" in text
        assert patch.check(model, dtype, shares_batches=False) == alone


@pytest.mark.parametrize("shape", TINY_SHAPES)
def test_boundaries_that_attention_ignores_are_found(shape: str, monkeypatch: pytest.MonkeyPatch):
    model = build(shape)
    patch.install(model)
    whole = property(lambda row: [(0, row.position_ids.shape[1], row.position_ids.shape[1])])
    monkeypatch.setattr(attention.FlatBatch, "nodes", whole)
    assert_told_as_a_leak(model)


@pytest.mark.parametrize("name", ["bloom-tiny", "falcon-tiny", "llama"])
def test_positions_that_run_on_are_found(name: str):
    model = build(name)
    patch.install(model)
    model.forward = run_on(model.forward)
    assert_told_as_a_leak(model)


def test_a_family_that_cannot_tell_examples_apart_is_not_packed():
    model = build_other("mpt", **MPT)
    patch.install(model)
    assert_told_as_a_leak(model)


def test_a_family_whose_logits_are_not_the_heads_is_refused_even_without_packing():
    model = build_other("gemma2", **LLAMA, head_dim=8, final_logit_softcapping=5.0)
    patch.install(model)
    alone = patch.measure_leak(model).alone
    assert alone > 0.1
    for shares_batches in (True, False):
        with pytest.raises(UserError, match=f"gemma2 cannot be trained here: .* off by {alone:.2g} of the largest"):
            patch.check(model, torch.float32, shares_batches)


def test_logits_that_are_no_numbers_are_refused():
    model = build("bloom-tiny")
    model.transformer.ln_f.weight.data[0] = torch.nan
    patch.install(model)
    for dtype, has_way_out in ((torch.bfloat16, True), (torch.float32, False)):
        with pytest.raises(UserError, match="nan or infinite before any training; if its files are damaged") as refusal:
            patch.check(model, dtype, shares_batches=False)
        assert ("--fp16 False --bf16 False" in str(refusal.value)) == has_way_out


@pytest.mark.parametrize("name", ["bloom-tiny", "falcon-tiny"])
def test_attention_dropout_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    model = build(name)
    monkeypatch.setattr(model.config, "attention_dropout", 0.1)
    with pytest.raises(UserError, match=r"attention_dropout is 0\.1 in config\.json"):
        patch.install(model)
    assert replaced_forwards(model) == []


def test_a_head_with_a_bias_is_refused():
    model = build("bloom-tiny")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    with pytest.raises(UserError, match="bloom has a bias in its head"):
        patch.install(model)
    assert replaced_forwards(model) == []


@pytest.mark.parametrize("heads", [{"multi_query": True}, {"new_decoder_architecture": True, "num_kv_heads": 2}])
def test_falcon_may_have_alibi_and_fewer_key_value_heads(heads: dict):
    own = build_model("falcon-tiny-rw").config.to_dict()
    config = AutoConfig.for_model(**{**own, "parallel_attn": True, **heads})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    patch.install(model)
    assert patch.check(model, torch.float32, shares_batches=True) < 1e-5


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_have_the_loss_and_gradients_of_each_example_alone(name: str, device: str):
    own, model, examples = build(name, device).train(), build(name, device).train(), make_examples(device=device)
    patch.install(model)
    expected = add_own_gradients(own, examples)
    loss = model(**flatten(examples)).loss
    loss.backward()
    assert off_by(loss, expected) <= TOLERANCE[device]
    assert wrong_gradients(model, own, TOLERANCE[device]) == {}
    with torch.no_grad():
        expected_logits = torch.cat([own(example).logits for example in examples], 1)
        packed = flatten(examples) | {"labels": None}
        assert off_by(model(**packed).logits, expected_logits) <= TOLERANCE[device]


@pytest.mark.parametrize("name", ["bloom-tiny", "falcon-tiny", "llama", "llama-tied", "llama-tied-padding"])
def test_gradients_of_tokens_that_occur_again_add_up_over_batches(name: str, device: str):
    own, model = build(name, device).train(), build(name, device).train()
    patch.install(model)
    # Tokens 0 to 4 alone: each occurs often in a row, and token 3 is the pad token of one of the models.
    for lengths in ((30, 10), (1, 2, 40)):
        examples = make_examples(5, lengths, device)
        add_own_gradients(own, examples)
        model(**flatten(examples)).loss.backward()
    assert wrong_gradients(model, own, TOLERANCE[device]) == {}


@pytest.mark.parametrize("name", ["bloom-tiny", "falcon-tiny", "llama-tied"])
def test_one_backward_may_serve_two_rows(name: str):
    own, model, examples = build(name), build(name), make_examples()
    patch.install(model)
    for half in (examples[:2], examples[2:]):
        add_own_gradients(own, half)
    sum(model(**flatten(half)).loss for half in (examples[:2], examples[2:])).backward()
    assert wrong_gradients(model, own) == {}


class NewTensors(TorchDispatchMode):
    """The storages of a shape that operations gave; held, so that none is used again for another tensor."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape, self.storages = shape, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        leaves = (leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf) and leaf.shape == self.shape)
        self.storages |= {leaf.data_ptr(): leaf.untyped_storage() for leaf in leaves}
        return output


@pytest.mark.parametrize("name", ["bloom-tiny", "falcon-tiny", "llama-tied"])
def test_a_tied_weight_has_one_gradient_of_its_size(name: str):
    model, row = build(name).train(), flatten(make_examples())
    patch.install(model)
    with NewTensors(model.lm_head.weight.shape) as new:
        model(**row).loss.backward()
    assert set(new.storages) - {model.lm_head.weight.data_ptr()} == {model.lm_head.weight.grad.data_ptr()}


@pytest.mark.parametrize("name", ["bloom-tiny", "falcon-tiny"])
def test_gradients_of_logits_reach_a_tied_weight_too(name: str):
    own, model, (example,) = build(name), build(name), make_examples(lengths=(20,))
    patch.install(model)
    own(example).logits.square().mean().backward()
    model(example, positions_of((20,))).logits.square().mean().backward()
    assert wrong_gradients(model, own) == {}


@pytest.mark.parametrize("frozen", ["head and embeddings", "all but them"])
def test_frozen_weights_leave_the_others_their_gradients(frozen: str):
    own, model, examples = build("bloom-tiny"), build("bloom-tiny"), make_examples()
    patch.install(model)
    for either in (own, model):
        for parameter in either.parameters():
            parameter.requires_grad_((parameter is either.lm_head.weight) == (frozen == "all but them"))
    add_own_gradients(own, examples)
    model(**flatten(examples)).loss.backward()
    trained = {name: parameter.grad for name, parameter in own.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained)
        assert name not in trained or off_by(parameter.grad, trained[name]) <= 1e-4


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (20, 3)])
@pytest.mark.parametrize("name", [*TINY_SHAPES, "llama"])
def test_a_row_without_labels_has_loss_zero_and_moves_nothing(name: str, lengths: tuple[int, ...], device: str):
    model = build(name, device).train()
    patch.install(model)
    row = flatten(make_examples(lengths=lengths, device=device))
    row["labels"].fill_(IGNORE_INDEX)
    loss = model(**row).loss
    assert loss == 0
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", ["bloom-tiny", "falcon-tiny", "llama-tied"])
def test_the_loss_is_the_same_without_gradients(name: str):
    model, row = build(name), flatten(make_examples())
    patch.install(model)
    with torch.no_grad():
        loss = model(**row).loss
    assert not loss.requires_grad
    assert torch.allclose(loss, model(**row).loss.detach(), rtol=1e-6)
