"""Tokens that several examples begin with are computed once, and nothing is other than with each example alone."""

from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sft import IGNORE_INDEX
from sft.data import trees
from sft.model import attention, patch
from sft.model.attention import FlatBatch
from sft.model.node_attention import parts_of
from sft.tools.random_model import build_model
from support.examples import off_by, wrong_gradients
from support.project import TINY_SHAPES

LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = [*TINY_SHAPES, "llama", "qwen2"]
VOCABULARY = 90
RANDOM = np.random.default_rng(0)


def ids(length: int) -> list[int]:
    return RANDOM.integers(0, VOCABULARY, length).tolist()


TEMPLATE, TAIL = ids(23), ids(5)
# Each example: its token ids, and how many of them are its prompt's.
SINGLE_TURNS = [([*TEMPLATE, *ids(n), *TAIL, *ids(n)], 28 + n) for n in (3, 9, 1, 30)]


def conversation(num_replies: int) -> list[tuple[list[int], int]]:
    """Return an example for each reply, after all that was said before it; the template's tail ends each prompt."""
    examples, history = [], [*TEMPLATE]
    for _ in range(num_replies):
        history += ids(4)
        prompt, reply = [*history, *TAIL], ids(6)
        examples.append(([*prompt, *reply], len(prompt)))
        history += reply
    return examples


QUESTION = [*TEMPLATE, *ids(9), *TAIL]
CASES = {
    "one template": SINGLE_TURNS,
    **{f"a conversation of {n}": conversation(n) for n in (1, 2, 5, 8)},
    "two conversations and a question": [*conversation(3), *SINGLE_TURNS[:1], *conversation(2)],
    "one question, three answers": [([*QUESTION, *ids(n)], len(QUESTION)) for n in (8, 3, 12)],
    "answers that begin alike": [([*QUESTION, 1, 2, 3, n], len(QUESTION)) for n in (4, 5)],
    "equal examples": [SINGLE_TURNS[0], SINGLE_TURNS[1], SINGLE_TURNS[0]],
    "one begins another": [(SINGLE_TURNS[0][0][:40], 31), (SINGLE_TURNS[0][0][:33], 31), (SINGLE_TURNS[0][0][:20], 7)],
    "cut at the maximal length": [(example[:30], min(prompt, 27)) for example, prompt in conversation(4)],
    "nodes of one token": [([1, 2, 3, 4][:n] + [5] * (n < 4), 1) for n in (1, 2, 3, 4)],
    "nothing in common": [([n, *ids(5)], 2) for n in range(3)],
    "no prompts": [([1, 2, 3], 0), ([1, 2, 4], 0)],
}


@cache
def build(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a model as transformers has it, and one with the same weights for flat batches."""
    if family in TINY_SHAPES:
        own, model = build_model(family), build_model(family)
    else:
        config = AutoConfig.for_model(
            family, vocab_size=VOCABULARY, initializer_range=0.2, intermediate_size=64, **LLAMA
        )
        own, model = (AutoModelForCausalLM.from_config(deepcopy(config), dtype=torch.float32) for _ in range(2))
        model.load_state_dict(own.state_dict())
    patch.install(model)
    return own.eval(), model.eval()


def as_batch(examples: list[tuple[list[int], int]], share_prefixes: bool = True) -> dict[str, torch.Tensor]:
    forest = trees.grow([np.array(ids) for ids, _ in examples], [prompt for _, prompt in examples], share_prefixes)
    return {name: torch.from_numpy(values)[None] for name, values in vars(forest).items()}


def loss_alone(own: PreTrainedModel, examples: list[tuple[list[int], int]]) -> torch.Tensor:
    """Return the mean loss of all labels, each example in a forward of its own, and add its gradients."""
    own.zero_grad(set_to_none=True)
    num_items = sum(len(ids) - max(prompt, 1) for ids, prompt in examples)
    total = torch.zeros(())
    for ids, prompt in examples:
        labels = torch.tensor([[*[IGNORE_INDEX] * prompt, *ids[prompt:]]])
        if (labels[:, 1:] != IGNORE_INDEX).any():
            loss = own(torch.tensor([ids]), labels=labels, num_items_in_batch=num_items).loss
            loss.backward()
            total += loss.detach()
    return total


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients_are_those_of_each_example_alone(family: str, case: str):
    own, model = build(family)
    examples, batch = CASES[case], as_batch(CASES[case])
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in ("input_ids", "position_ids", "subtree_ends")}).logits[0]
        for ids, _ in examples:
            places = torch.arange(logits.shape[0])
            path = next(
                path
                for last in places
                if batch["input_ids"][0][path := places[(places <= last) & (last < batch["subtree_ends"][0])]].tolist()
                == ids
            )
            assert off_by(logits[path], own(torch.tensor([ids])).logits[0]) <= 1e-5
    expected = loss_alone(own, examples)
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert wrong_gradients(model, own) == {}


TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=12)
FORESTS = st.lists(TOKENS.flatmap(lambda ids: st.tuples(st.just(ids), st.integers(0, len(ids) - 1))), min_size=1)


@pytest.mark.parametrize("family", ["bloom-tiny", "falcon-tiny", "llama"])
@given(examples=FORESTS)
@settings(max_examples=30, deadline=None)
def test_any_forest_has_the_loss_of_each_example_alone(family: str, examples: list[tuple[list[int], int]]):
    own, model = build(family)
    with torch.no_grad():
        loss = model(**as_batch(examples)).loss
    assert loss.item() == pytest.approx(loss_alone(own, examples).item(), rel=1e-5, abs=1e-6)


@given(examples=FORESTS)
@settings(deadline=None)
def test_a_query_meets_the_keys_of_its_path_and_parts_meet_each_pair_once(examples: list[tuple[list[int], int]]):
    batch = as_batch(examples)
    flat, length = FlatBatch(batch["position_ids"], subtree_ends=batch["subtree_ends"]), batch["input_ids"].shape[1]
    places, met = torch.arange(length), torch.zeros(length, length, dtype=torch.int)
    seen = flat.mask_mod(0, 0, places[:, None], places[None])
    assert torch.equal(seen.sum(1), batch["position_ids"][0] + 1)
    for queries, keys, is_causal, _ in parts_of(flat.nodes):
        pairs = torch.ones(queries.stop - queries.start, keys.stop - keys.start, dtype=torch.int)
        met[queries, keys] += pairs.tril() if is_causal else pairs
    assert torch.equal(met, seen.int())
    for parts, _ in flat.paths:
        path = torch.cat([places[part] for part in parts])
        assert torch.equal(seen[path[-1]].nonzero()[:, 0], path)
    assert sum(number for _, number in flat.paths) == length


def long_forest(seed: int) -> dict[str, torch.Tensor]:
    """Return a random forest of some blocks' length: trees of random depths and nodes of random lengths."""
    generator, examples = np.random.default_rng(seed), []
    beginnings = [[]]
    for _ in range(generator.integers(1, 12)):
        beginning = beginnings[generator.integers(len(beginnings))]
        beginning = beginning[: generator.integers(len(beginning) + 1)]
        examples.append((beginning + generator.integers(0, 99, generator.choice([1, 7, 128, 200])).tolist(), 0))
        beginnings.append(examples[-1][0])
    return as_batch(examples)


def blocks(mask, kind: str) -> list[list[int]]:
    numbers, indices = (getattr(mask, f"{kind}_{name}")[0, 0].tolist() for name in ("num_blocks", "indices"))
    return [sorted(row[:number]) for number, row in zip(numbers, indices, strict=True)]


@pytest.mark.parametrize("seed", range(40))
def test_the_block_mask_of_a_forest_is_the_one_torch_makes_of_every_pair(seed: int):
    batch = long_forest(seed)
    flat, length = FlatBatch(batch["position_ids"], subtree_ends=batch["subtree_ends"]), batch["input_ids"].shape[1]
    expected = create_block_mask(flat.mask_mod, 1, 1, length, length, device="cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        assert blocks(flat.block_mask, kind) == blocks(expected, kind), kind
    assert torch.equal(flat.block_mask.to_dense(), expected.to_dense())


@pytest.mark.parametrize("family", FAMILIES)
def test_where_there_is_no_kernel_for_nodes_paths_give_the_same(family: str, monkeypatch: pytest.MonkeyPatch):
    _, model = build(family)
    batch = as_batch([*conversation(4), *SINGLE_TURNS])
    model.zero_grad(set_to_none=True)
    by_nodes = model(**batch).loss
    by_nodes.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    monkeypatch.setattr(attention, "attends_by_nodes", lambda device: False)
    model.zero_grad(set_to_none=True)
    by_paths = model(**batch).loss
    by_paths.backward()
    assert by_paths.item() == pytest.approx(by_nodes.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert off_by(parameter.grad, expected[name], 1e-3) <= 1e-5, name
