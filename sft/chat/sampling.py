"""How the next token is chosen: a reply's sampling numbers, their bounds, and the noise that draws a token.

Shapes: B prompts, V entries of the vocabulary. PyTorch and transformers are imported late, so that a command line
can be read without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

LONGEST_REPLY = 4096  # tokens
# The smallest and the largest value of each number of a `Sampling`.
BOUNDS = {
    "max_new_tokens": (1, LONGEST_REPLY),
    "temperature": (0.0, 2.0),
    "top_p": (0.01, 1.0),
    "top_k": (0, 1000),
    "repetition_penalty": (0.5, 2.0),
    "seed": (0, 2**63 - 1),
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. A temperature of 0 always takes the likeliest one.

    With a seed, the same prompt gets the same reply on the same device, whatever else is generated meanwhile.
    """

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.0
    seed: int | None = None

    def check(self) -> None:
        """Raise ValueError if a value is not a number or lies outside its `BOUNDS`."""
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if value is None and name == "seed":
                continue
            whole = isinstance(least, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ValueError(f"{name} is {value!r}; expected {'a whole number' if whole else 'a number'}")
            if not least <= value <= most:  # NaN fails this comparison too
                raise ValueError(f"{name} is {value}; expected {least} to {most}")

    def generation_config(self, eos_token_id: int, pad_token_id: int) -> GenerationConfig:
        """Return the part that `generate` does itself: the length, the penalty, and taking the maximum."""
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            repetition_penalty=self.repetition_penalty,
            do_sample=False,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )

    def processors(self, device: torch.device) -> LogitsProcessorList:
        """Return what turns logits into scores whose maximum is the sample; empty at temperature 0."""
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        if self.temperature == 0:
            return LogitsProcessorList()
        warpers = [TemperatureLogitsWarper(float(self.temperature))]
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList([*warpers, GumbelNoise(self.seed, device)])


GREEDY = Sampling(temperature=0.0)


class GumbelNoise:
    """Adds Gumbel noise to logits (B, V); the largest sum is then a sample of their softmax.

    The noise comes from its own generator: PyTorch's is shared by all threads, so replies generated at the same time
    would draw from one sequence. Gumbel 1954; https://arxiv.org/abs/1411.0030
    """

    def __init__(self, seed: int | None, device: torch.device):
        """Seed a generator on `device`; without a seed, from PyTorch's own generator."""
        import torch

        self.generator = torch.Generator(device)
        self.generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        import torch

        exponential = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=self.generator)
        return scores - exponential.log_()
