"""A reply that grows token by token: which part of the text is settled, and why the reply ends."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from sft.chat.sampling import Sampling
from sft.prompts import STOP_MARKERS


class Reply:
    """An answer in pieces; joined, they are the full decode.

    Iterating starts the generation; closing the iterator ends it within one token. `finish_reason` is then "eos",
    "length" (the token limit), "marker" (the model began the next turn) or "cancelled". A piece holds all tokens that
    have come since the one before: the text is decoded as often as it is asked for. `seconds` is the time up to the
    last token; `turns_left_out` and `tokens_left_out` count what of the conversation did not fit into the prompt.
    """

    def __init__(
        self,
        generate: Callable[..., torch.Tensor],
        tokenizer: PreTrainedTokenizerBase,
        prompt: str | Sequence[int],
        sampling: Sampling,
        turns_left_out: int = 0,
        tokens_left_out: int = 0,
    ):
        """Prepare the reply to a prompt, given as text or token ids; `generate` is `ChatModel.generate`."""
        self.generate = generate
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.sampling = sampling
        self.turns_left_out = turns_left_out
        self.tokens_left_out = tokens_left_out
        self.token_ids: list[int] = []
        self.seconds = 0.0
        self.finish_reason = "cancelled"
        self._tokens: queue.SimpleQueue[tuple[int | BaseException | None, float]] = queue.SimpleQueue()
        self._cancelled = threading.Event()

    def __iter__(self) -> Iterator[str]:
        """Yield text as soon as it can no longer change; a reply can be iterated only once."""
        assert not self.token_ids, f"iterated again after {len(self.token_ids)} tokens"
        worker = threading.Thread(target=self._generate, daemon=True)
        worker.start()
        sent, start, ended = 0, time.monotonic(), False
        try:
            while not ended:
                ended = self._take(start)
                text, stopped = cut_at_marker(self._decode())
                settled = text if stopped else text[: settled_length(text)]
                if len(settled) > sent:
                    yield settled[sent:]
                    sent = len(settled)
                if stopped:
                    self.finish_reason = "marker"
                    return
            if len(text) > sent:
                yield text[sent:]
            by_itself = bool(self.token_ids) and self.token_ids[-1] == self.tokenizer.eos_token_id
            self.finish_reason = "eos" if by_itself else "length"
        finally:
            self.cancel()
            worker.join()

    def cancel(self) -> None:
        """End the generation within one token, from any thread."""
        self._cancelled.set()

    def _take(self, start: float) -> bool:
        """Take a token, and all that have come by now; tell whether the generation has ended."""
        for _ in range(max(1, self._tokens.qsize())):
            token, when = self._tokens.get()
            if token is None:
                return True
            if isinstance(token, BaseException):
                raise token
            self.token_ids.append(token)
            self.seconds = when - start
        return False

    def _decode(self) -> str:
        return self.tokenizer.decode(self.token_ids, skip_special_tokens=True)

    def _generate(self) -> None:
        """Generate in a separate thread: each token goes into the queue, then None, or the error that was raised."""
        try:
            self.generate(
                [self.prompt],
                self.sampling,
                streamer=_QueueStreamer(self._tokens),
                stopping_criteria=StoppingCriteriaList([_StopWhenSet(self._cancelled)]),
            )
            self._tokens.put((None, time.monotonic()))
        except BaseException as error:
            self._tokens.put((error, time.monotonic()))


def settled_length(text: str) -> int:
    """Return how many characters of a growing text can no longer change.

    A final U+FFFD may be the start of a character whose other bytes are still to come (an incomplete tail decodes to
    exactly one), and the last line may be the start of a stop marker.
    """
    settled = len(text) - text.endswith("\ufffd")
    for marker in STOP_MARKERS:
        for length in range(len(marker) - 1, 0, -1):
            if text.endswith(marker[:length]):
                settled = min(settled, len(text) - length)
                break
    return settled


def cut_at_marker(text: str) -> tuple[str, bool]:
    """Cut the text where a stop marker begins; return it, and whether there was a marker."""
    found = [position for marker in STOP_MARKERS if (position := text.find(marker)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


class _QueueStreamer(BaseStreamer):
    """Puts each new token id and its time into a queue; skips the first call, which brings the prompt."""

    def __init__(self, tokens: queue.SimpleQueue):
        self.tokens = tokens
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.tokens.put((int(value), time.monotonic()))
        self.prompt_seen = True

    def end(self) -> None:
        pass


class _StopWhenSet(StoppingCriteria):
    """Ends generation after the token during which an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
