"""Int8 weights: near fp32, every Linear of them and no embedding, the same answer alone and in a batch."""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from sft.model.int8 import Int8Linear, quantize, weights_in_bytes
from sft.model.load import load_model
from sft.program import UserError
from support.project import TINY_SHAPES

LENGTHS = [3, 40, 17, 1, 29, 8, 2, 33]


@pytest.fixture(params=TINY_SHAPES)
def models(request: pytest.FixtureRequest, make_model: Callable[[str], Path]) -> tuple[PreTrainedModel, ...]:
    """Return a model in fp32 and the same with int8 weights."""
    folder = str(make_model(request.param))
    return load_model(folder).eval(), quantize(load_model(folder))


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(20, 1000, (length,), generator=generator) for length in LENGTHS]


def generate(model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    chosen = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": [], "pad_token_id": 3}
    with torch.inference_mode():
        return model.generate(input_ids, attention_mask=mask, **chosen)[:, input_ids.shape[1] :]


@torch.inference_mode()
def test_distributions_are_near_those_of_fp32(models: tuple[PreTrainedModel, ...]):
    input_ids = prompts()[1][None]
    expected, given = (model(input_ids).logits.double() for model in models)
    assert given.shape == expected.shape and models[1](input_ids).logits.dtype == torch.float32
    # Rounding a weight by half a step of a 127th of its row's largest is an error of about 1 %.
    assert (given - expected).norm() < 0.03 * expected.norm()
    divergence = nn.functional.kl_div(given.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="sum")
    assert 0 < divergence / input_ids.numel() < 0.02


def test_every_linear_is_int8_and_all_else_as_it_was(models: tuple[PreTrainedModel, ...]):
    original, model = models
    linears = {name: module for name, module in original.named_modules() if isinstance(module, nn.Linear)}
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert packed.keys() == linears.keys() and "lm_head" in packed
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    weights = {f"{name}.weight" for name in linears}
    kept = {name: parameter for name, parameter in original.named_parameters() if name not in weights}
    assert model.get_input_embeddings().weight.equal(original.get_input_embeddings().weight)
    for name, parameter in model.named_parameters():
        assert parameter.equal(kept.pop(name)) and not parameter.requires_grad, name
    assert not kept and (model.dtype, model.device.type) == (torch.float32, "cpu")


def test_weights_are_off_by_half_a_step_at_most(models: tuple[PreTrainedModel, ...]):
    original, model = models
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            weight = original.get_submodule(name).weight.detach()
            step = weight.abs().amax(1, keepdim=True) / 127
            assert ((module.dequantize() - weight).abs() <= 0.5001 * step).all(), name


@torch.inference_mode()
def test_each_row_of_activations_has_its_own_scale():
    torch.manual_seed(0)
    linear = nn.Linear(256, 64)
    module = Int8Linear(linear)
    hidden = torch.randn(4, 3, 256) * torch.logspace(-4, 4, 4)[:, None, None]
    hidden[0, 0], hidden[1, 0, 7] = 0, 1000.0  # nothing at all, and one large value among small ones
    expected = nn.functional.linear(hidden, module.dequantize(), linear.bias)
    scale = hidden.abs().amax(-1, keepdim=True) * module.dequantize().norm(dim=1)
    assert ((module(hidden) - expected).abs() <= 1e-3 * scale + 1e-6).all()
    assert torch.equal(module(hidden)[2, 1], module(hidden[2, 1][None])[0])


def test_a_batch_padded_on_the_left_answers_as_each_prompt_alone(models: tuple[PreTrainedModel, ...]):
    model = models[1]
    alone = [generate(model, prompt[None], torch.ones(1, len(prompt), dtype=torch.long)) for prompt in prompts()]
    input_ids = torch.full((len(LENGTHS), max(LENGTHS)), 3)
    for row, prompt in zip(input_ids, prompts(), strict=True):
        row[-len(prompt) :] = prompt
    mask = (torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]).long()
    assert torch.equal(generate(model, input_ids, mask), torch.cat(alone))


def test_other_threads_get_the_same_answer(models: tuple[PreTrainedModel, ...]):
    input_ids = prompts()[1][None]
    answers = []
    for _ in range(2):
        thread = threading.Thread(
            target=lambda: answers.append(generate(models[1], input_ids, torch.ones_like(input_ids)))
        )
        thread.start()
        thread.join()
    assert len(answers) == 2 and torch.equal(*answers)
    assert torch.equal(answers[0], generate(models[1], input_ids, torch.ones_like(input_ids)))


def test_the_bytes_of_weights_are_counted(models: tuple[PreTrainedModel, ...]):
    original, model = models
    linears = [module for module in original.modules() if isinstance(module, nn.Linear)]
    others = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    int8 = sum(linear.weight.numel() + 12 * linear.out_features for linear in linears)
    assert weights_in_bytes(model) == 4 * others + buffers + int8 < weights_in_bytes(original)
    assert weights_in_bytes(original) == 4 * original.num_parameters() + buffers


def test_quantizing_warns_of_nothing_and_leaves_the_engine(
    make_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    model = load_model(str(make_model("bloom-tiny")), torch.bfloat16)
    monkeypatch.setattr(torch.backends.quantized, "engine", "onednn")
    torch.set_warn_always(True)  # some warnings come once a process, and another test may have had them
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = quantize(model)
    finally:
        torch.set_warn_always(False)
    assert torch.backends.quantized.engine == "onednn" and model.dtype == torch.float32
    with pytest.raises(RuntimeError, match="int8 weights are not saved"):
        model.state_dict()


@pytest.mark.parametrize("lack", ["a CPU", "the engine"])
def test_a_refusal_names_what_to_type(lack: str, make_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    model = load_model(str(make_model("bloom-tiny")))
    if lack == "a CPU":
        model, expected = model.to("meta"), r"the model is on meta; type --device cpu"
    else:
        monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["qnnpack"])
        expected = r"needs PyTorch's fbgemm, .* has qnnpack; leave --quantize out"
    with pytest.raises(UserError, match=expected) as raised:
        quantize(model)
    assert "\n" not in str(raised.value)
    assert any(isinstance(module, nn.Linear) for module in model.modules())
