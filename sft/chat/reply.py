"""A reply that grows token by token: how tokens are chosen, what of the text is settled, and why it ends.

Shapes: B prompts, V entries of the vocabulary.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import BaseStreamer

from sft.prompts import STOP_MARKERS

if TYPE_CHECKING:
    from sft.chat.model import ChatModel

LONGEST_REPLY = 4096  # tokens
# The least and the most of every number of a `Sampling`.
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
    """How the next token is chosen. A temperature of 0 takes the likeliest one each time.

    With a seed the same prompt has the same reply again on the same device, whatever else is generated meanwhile.
    """

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.0
    seed: int | None = None

    def check(self) -> None:
        """Raise ValueError if a number is none, or outside its `BOUNDS`."""
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if value is None and name == "seed":
                continue
            whole = isinstance(least, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ValueError(f"{name} is {value!r}; expected {'a whole number' if whole else 'a number'}")
            if not least <= value <= most:  # not a number is outside too
                raise ValueError(f"{name} is {value}; expected {least} to {most}")

    def generation_config(self, eos_token_id: int, pad_token_id: int) -> GenerationConfig:
        """Return transformers' form of what `processors` leaves: the length, the penalty, and the likeliest token."""
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            repetition_penalty=self.repetition_penalty,
            do_sample=False,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )

    def processors(self, device: torch.device) -> LogitsProcessorList:
        """Return what turns logits into ones whose maximum is the sample; nothing at temperature 0."""
        if self.temperature == 0:
            return LogitsProcessorList()
        warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(self.temperature))]
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList([*warpers, _GumbelNoise(self.seed, device)])


GREEDY = Sampling(temperature=0.0)


class _GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise to logits (B, V), after which the largest is a sample of their softmax.

    The noise comes from a generator of its own: torch's is shared by all threads, and replies that are generated at
    the same time would draw from one another's sequence. Gumbel 1954; https://arxiv.org/abs/1411.0030
    """

    def __init__(self, seed: int | None, device: torch.device):
        self.generator = torch.Generator(device)
        self.generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        exponential = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=self.generator)
        return scores - exponential.log_()


class Reply:
    """An answer in pieces; joined they are the full decode.

    Iterating starts the generation; closing the iterator ends it within one token. `finish_reason` is then "eos",
    "length" (the token limit), "marker" (the model began the next turn) or "cancelled". `seconds` is how long it took
    up to its last token; `turns_left_out` and `tokens_left_out` say what of the conversation did not fit before it.
    """

    def __init__(
        self,
        chat: "ChatModel",
        prompt: str | Sequence[int],
        sampling: Sampling,
        turns_left_out: int = 0,
        tokens_left_out: int = 0,
    ):
        """Prepare the reply of `chat` to a prompt, a text or token ids."""
        self.chat = chat
        self.prompt = prompt
        self.sampling = sampling
        self.turns_left_out = turns_left_out
        self.tokens_left_out = tokens_left_out
        self.token_ids: list[int] = []
        self.seconds = 0.0
        self.finish_reason = "cancelled"
        self._tokens: queue.Queue[int | BaseException | None] = queue.Queue()
        self._cancelled = threading.Event()

    def __iter__(self) -> Iterator[str]:
        """Yield text that can no longer change, as soon as it is settled; a reply is iterated once."""
        assert not self.token_ids, f"iterated again after {len(self.token_ids)} tokens"
        worker = threading.Thread(target=self._generate, daemon=True)
        worker.start()
        sent, start = 0, time.monotonic()
        try:
            while (token := self._tokens.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                self.token_ids.append(token)
                self.seconds = time.monotonic() - start
                text, stopped = cut_at_marker(self._decode())
                settled = text if stopped else text[: settled_length(text)]
                if len(settled) > sent:
                    yield settled[sent:]
                    sent = len(settled)
                if stopped:
                    self.finish_reason = "marker"
                    return
            text = self._decode()
            if len(text) > sent:
                yield text[sent:]
            ended = bool(self.token_ids) and self.token_ids[-1] == self.chat.tokenizer.eos_token_id
            self.finish_reason = "eos" if ended else "length"
        finally:
            self.cancel()
            worker.join()

    def cancel(self) -> None:
        """End the generation within one token, from any thread."""
        self._cancelled.set()

    def _decode(self) -> str:
        return self.chat.tokenizer.decode(self.token_ids, skip_special_tokens=True)

    def _generate(self) -> None:
        """Generate in a thread of its own: every token goes into the queue, then None, or the error that came."""
        try:
            self.chat.generate(
                [self.prompt],
                self.sampling,
                streamer=_QueueStreamer(self._tokens),
                stopping_criteria=StoppingCriteriaList([_StopWhenSet(self._cancelled)]),
            )
            self._tokens.put(None)
        except BaseException as error:
            self._tokens.put(error)


def settled_length(text: str) -> int:
    """Return how many characters of a growing text can no longer change.

    A last U+FFFD may be the beginning of a character whose bytes are still to come (an incomplete tail decodes to
    exactly one), and a last line may be the beginning of a stop marker.
    """
    settled = len(text) - text.endswith("\ufffd")
    for marker in STOP_MARKERS:
        for length in range(len(marker) - 1, 0, -1):
            if text.endswith(marker[:length]):
                settled = min(settled, len(text) - length)
                break
    return settled


def cut_at_marker(text: str) -> tuple[str, bool]:
    """Cut the text where a stop marker begins; return it and whether there was one."""
    found = [position for marker in STOP_MARKERS if (position := text.find(marker)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


class _QueueStreamer(BaseStreamer):
    """Puts each new token id into a queue; the first call brings the prompt, which is left out."""

    def __init__(self, tokens: queue.Queue):
        self.tokens = tokens
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.tokens.put(int(value))
        self.prompt_seen = True

    def end(self) -> None:
        pass


class _StopWhenSet(StoppingCriteria):
    """Ends generation after the token during which an event was set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
