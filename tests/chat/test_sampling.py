"""The probabilities decide the samples, a seed repeats them, and numbers out of bounds are refused."""

import pytest
import torch

from sft.chat.sampling import GREEDY, Sampling


def test_samples_are_drawn_as_the_warped_probabilities_say():
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -30.0]]).repeat(20_000, 1)
    sampling = Sampling(temperature=0.8, top_p=0.95, top_k=4, seed=3)
    scores = sampling.processors(torch.device("cpu"))(torch.zeros(len(logits), 1, dtype=torch.long), logits.clone())
    drawn = torch.bincount(scores.argmax(-1), minlength=6) / len(logits)
    kept = torch.softmax(logits[0] / 0.8, 0)[:4]
    assert kept[:3].sum() / kept.sum() < 0.95  # so that the fourth is among the likeliest 95 %, and the last two not
    expected = torch.cat([kept / kept.sum(), torch.zeros(2)])
    assert (drawn - expected).abs().max() < 0.012  # 3.4 standard deviations of a frequency in 20,000


def test_seed_gives_the_same_sample_whatever_is_drawn_meanwhile():
    logits = torch.randn(64, 100)
    ids = torch.zeros(64, 1, dtype=torch.long)

    def draw(seed: int | None) -> list[int]:
        processors = Sampling(seed=seed).processors(torch.device("cpu"))
        torch.rand(7)
        return processors(ids, logits.clone()).argmax(-1).tolist()

    assert draw(5) == draw(5) != draw(6)
    assert draw(None) != draw(None)
    torch.manual_seed(0)
    first = draw(None)
    torch.manual_seed(0)
    assert draw(None) == first


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("max_new_tokens", 0, "expected 1 to 4096"),
        ("max_new_tokens", 1e9, "expected a whole number"),
        ("max_new_tokens", True, "expected a whole number"),
        ("temperature", -0.1, "expected 0.0 to 2.0"),
        ("temperature", float("nan"), "expected 0.0 to 2.0"),
        ("temperature", "1", "expected a number"),
        ("top_p", 0, "expected 0.01 to 1.0"),
        ("top_p", float("inf"), "expected 0.01 to 1.0"),
        ("top_k", -1, "expected 0 to 1000"),
        ("top_k", 2.5, "expected a whole number"),
        ("repetition_penalty", 0, "expected 0.5 to 2.0"),
        ("repetition_penalty", None, "expected a number"),
        ("seed", -1, "expected 0 to"),
        ("seed", 2**63, "expected 0 to"),
    ],
)
def test_numbers_out_of_bounds_are_named(name: str, value: object, problem: str):
    with pytest.raises(ValueError, match=rf"{name} is .*; {problem}"):
        Sampling(**{name: value}).check()


def test_usual_numbers_are_in_bounds():
    for sampling in (Sampling(), GREEDY, Sampling(1, 2, 1, 0, 0.5, 2**63 - 1), Sampling(seed=None)):
        sampling.check()
