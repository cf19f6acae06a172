"""Load a checkpoint and answer: one reply as a stream, or several in one batch.

Usage:
    python -m sft.chat output_dir/demo                                  # talk to it in the terminal
    python -m sft.chat output_dir/demo --recall output_dir/demo_data    # does it give the answers it was taught?
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from sft.models import load_config, load_model, load_tokenizer, locate
from sft.program import ArgumentParser, UserError, run_program
from sft.prompts import STOP_MARKERS, build_chat_prompt
from sft.rows import read_rows
from sft.shards import find_shards


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. A temperature of 0 takes the likeliest one each time."""

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.0


GREEDY = Sampling(temperature=0.0)


class ChatModel:
    """A checkpoint ready to answer, on the GPU where there is one."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model = model.eval()
        self.tokenizer = tokenizer
        # Decoder-only models go on from the last position, which padding on the right would fill.
        self.tokenizer.padding_side = "left"

    @classmethod
    def load(cls, checkpoint: str, device: str = "auto") -> "ChatModel":
        """Load a folder or a hub id; bf16 on a GPU that has it, fp16 on another, fp32 on the CPU.

        Raises UserError if there is no such checkpoint.
        """
        checkpoint = locate(checkpoint)
        load_config(checkpoint)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float32
        if device.startswith("cuda"):
            dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return cls(load_model(checkpoint, dtype).to(device), load_tokenizer(checkpoint))

    def generation_config(self, sampling: Sampling) -> GenerationConfig:
        """Return transformers' form of `sampling`, with this tokenizer's eos and pad."""
        chosen = asdict(sampling)
        if sampling.temperature == 0:
            chosen = {name: chosen[name] for name in ("max_new_tokens", "repetition_penalty")}
        return GenerationConfig(
            **chosen,
            do_sample=sampling.temperature > 0,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def num_tokens(self, prompt: str) -> int:
        """Count the tokens of a prompt."""
        return len(self.tokenizer(prompt, verbose=False).input_ids)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str], sampling: Sampling = GREEDY, **extra) -> torch.Tensor:
        """Return the new token ids after each prompt, int64 (number of prompts, new tokens), eos and pad included."""
        inputs = self.tokenizer(list(prompts), padding=True, return_tensors="pt").to(self.model.device)
        output = self.model.generate(**inputs, generation_config=self.generation_config(sampling), **extra)
        return output[:, inputs.input_ids.shape[1] :]

    def answer(self, prompts: Sequence[str], sampling: Sampling = GREEDY) -> list[str]:
        """Return the answers to several prompts, generated in one batch padded on the left."""
        return self.tokenizer.batch_decode(self.generate(prompts, sampling), skip_special_tokens=True)

    def stream(self, prompt: str, sampling: Sampling = GREEDY) -> "Reply":
        """Return the answer to a prompt as a reply that grows while it is iterated."""
        return Reply(self, prompt, sampling)

    def reply(self, messages: Sequence[dict[str, str]], sampling: Sampling = GREEDY) -> "Reply":
        """Return the reply to a conversation of {"role", "content"} messages, the user's last.

        Where the conversation and an answer of the longest length do not fit, the oldest turns are left out.
        """
        room = self.tokenizer.model_max_length - sampling.max_new_tokens
        messages = list(messages)
        oldest = sum(message["role"] == "system" for message in messages[:1])
        while len(messages) > oldest + 2 and self.num_tokens(build_chat_prompt(messages)) > room:
            del messages[oldest : oldest + 2]
        return self.stream(build_chat_prompt(messages), sampling)


class Reply:
    """An answer in pieces; joined they are the full decode.

    Iterating starts the generation; closing the iterator ends it within one token. `finish_reason` is then "eos",
    "length" (the token limit), "marker" (the model began the next turn) or "cancelled".
    """

    def __init__(self, chat: ChatModel, prompt: str, sampling: Sampling):
        self.chat = chat
        self.prompt = prompt
        self.sampling = sampling
        self.token_ids: list[int] = []
        self.finish_reason = "cancelled"
        self._tokens: queue.Queue[int | BaseException | None] = queue.Queue()
        self._cancelled = threading.Event()

    def __iter__(self) -> Iterator[str]:
        """Yield text that can no longer change, as soon as it is settled; a reply is iterated once."""
        assert not self.token_ids, f"iterated again after {len(self.token_ids)} tokens"
        worker = threading.Thread(target=self._generate, daemon=True)
        worker.start()
        sent = 0
        try:
            while (token := self._tokens.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                self.token_ids.append(token)
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
            self._cancelled.set()
            worker.join()

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


def recall(chat: ChatModel, data: str, number: int) -> int:
    """Ask the first row of each of `number` shards, stream the answers, and return how many are the trained ones.

    An answer counts if it equals the row's output to the character and the model ended it by itself.
    """
    num_right = 0
    for shard in islice(find_shards(data), number):
        row = next(read_rows(shard))
        print(f"\n问 | {row.instruction.strip()}" + (f"\n   | {row.input}" if row.input else ""))
        print("答 | ", end="", flush=True)
        reply = chat.stream(row.prompt)
        pieces = []
        for piece in reply:
            pieces.append(piece)
            print(piece, end="", flush=True)
        right = "".join(pieces) == row.output and reply.finish_reason == "eos"
        num_right += right
        print("\n   | " + ("the trained answer, ended by itself" if right else f"NOT the trained one: {row.output!r}"))
    return num_right


def talk(chat: ChatModel) -> None:
    """Hold a conversation in the terminal until an empty line or the end of input."""
    messages: list[dict[str, str]] = []
    while question := _ask():
        messages.append({"role": "user", "content": question})
        pieces = []
        for piece in chat.reply(messages, Sampling()):
            pieces.append(piece)
            print(piece, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": "".join(pieces)})


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def main() -> None:
    """Talk to a checkpoint, or check what it recalls of its training rows."""
    parser = ArgumentParser(description="Talk to a checkpoint in the terminal; an empty line ends.")
    parser.add_argument("checkpoint", help="a model folder or a hub id")
    parser.add_argument("--recall", metavar="DATA", help="instead, ask rows of these shards and compare the answers")
    parser.add_argument("--rows", type=int, default=3, help="how many rows to ask, the first of each shard")
    arguments = parser.parse_args()
    chat = ChatModel.load(arguments.checkpoint)
    if not arguments.recall:
        talk(chat)
        return
    num_right = recall(chat, arguments.recall, arguments.rows)
    print(f"\n{num_right} of {arguments.rows} answers are the trained ones")
    if num_right < arguments.rows:
        raise UserError(
            f"{arguments.checkpoint} has not learnt the rows of {arguments.recall}; train it longer on them"
        )


if __name__ == "__main__":
    run_program(main)
