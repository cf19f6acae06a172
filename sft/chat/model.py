"""A checkpoint that answers: one reply as a stream, or several in one batch."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from sft import machine
from sft.chat.context import fit
from sft.chat.reply import Reply
from sft.chat.sampling import GREEDY, Sampling
from sft.data.encode import Encoder
from sft.model import quantized
from sft.model.download import locate
from sft.model.folder import UNKNOWN_LENGTH, longest_context
from sft.model.load import check_ids, load_adapter, load_config, load_model, load_tokenizer
from sft.program import UserError, one_line

# Weights up to which a CPU generates with one thread. Threads that share a product wait for each other after it, for
# milliseconds where a browser takes a core from one of them, and below this size a product takes microseconds and one
# thread writes faster than anyone reads.
SMALL = 32_000_000


class ChatModel:
    """A checkpoint that is ready to answer, on a GPU if there is one."""

    batches = False  # what is asked at the same time

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        """Take a tokenizer and a model that is already on its device."""
        self.model = model.eval()
        self.tokenizer = tokenizer
        # Decoder-only models continue from the last position; padding on the right would fill it.
        self.tokenizer.padding_side = "left"
        if tokenizer.model_max_length > UNKNOWN_LENGTH:
            tokenizer.model_max_length = longest_context(model.config.to_dict())
        self.encoder = Encoder(tokenizer)
        self.weights = str(model.dtype).removeprefix("torch.")
        self.num_threads = choose_num_threads(model)

    @classmethod
    def load(cls, checkpoint: str, device: str = "auto", dtype: str = "auto") -> "ChatModel":
        """Load a model folder, a hub id, or a LoRA adapter's folder together with the base model that it names.

        The weights are in `dtype`, a name such as "float32"; "auto" is bf16 if the device computes in it, else fp16
        on a GPU and fp32 on a CPU. Raises UserError if the checkpoint or the device does not exist.
        """
        device = choose_device(device)
        chosen = getattr(torch, dtype) if dtype != "auto" else choose_dtype(device)
        checkpoint = locate(checkpoint)
        if (adapter := load_adapter(checkpoint, chosen)) is not None:
            model, tokenizer = adapter[0].to(device), adapter[1]
        else:
            config, tokenizer = load_config(checkpoint), load_tokenizer(checkpoint)
            check_ids(tokenizer, config, checkpoint)
            model = quantized.load(checkpoint, config, lambda: load_model(checkpoint, chosen).to(device))
        return cls(model, tokenizer)

    def __str__(self) -> str:
        return f"{self.model.config.model_type}, {self.weights}, {self.model.device.type}"

    def generate(self, prompts: Sequence[str | Sequence[int]], sampling: Sampling = GREEDY, **extra) -> torch.Tensor:
        """Return the new token ids after each prompt, int64 (number of prompts, new tokens), eos and pad included."""
        ids = [self.encoder.encode_text(each) if isinstance(each, str) else list(each) for each in prompts]
        inputs = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
        with torch.inference_mode(), THREADS.limited_to(self.num_threads):
            output = self.model.generate(
                **inputs,
                generation_config=sampling.generation_config(self.tokenizer.eos_token_id, self.tokenizer.pad_token_id),
                logits_processor=sampling.processors(self.model.device),
                **extra,
            )
        return output[:, inputs.input_ids.shape[1] :]

    def answer(self, prompts: Sequence[str | Sequence[int]], sampling: Sampling = GREEDY) -> list[str]:
        """Return the answers to several prompts, texts or ids, generated in one batch padded on the left."""
        return self.tokenizer.batch_decode(self.generate(prompts, sampling), skip_special_tokens=True)

    def stream(self, prompt: str, sampling: Sampling = GREEDY) -> Reply:
        """Return the answer to a prompt as a reply that grows as it is iterated."""
        return GeneratedReply(self.generate, self.tokenizer, prompt, sampling)

    def reply(self, messages: Sequence[dict[str, str]], sampling: Sampling = GREEDY) -> Reply:
        """Return the reply to a conversation of {"role", "content"} messages, the user's last.

        If the conversation and the longest answer do not fit together, the oldest turns are left out, and then the
        beginning of the question, as in training. Raises ValueError if the roles do not alternate.
        """
        prompt, sampling, turns_left_out, tokens_left_out = fit(self.encoder, messages, sampling)
        return GeneratedReply(self.generate, self.tokenizer, prompt, sampling, turns_left_out, tokens_left_out)


class GeneratedReply(Reply):
    """The reply of a model in this process; the text is decoded as often as it is asked for."""

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
        super().__init__(turns_left_out, tokens_left_out)
        self.generator = generate
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.sampling = sampling
        self.token_ids: list[int] = []

    def generate(self) -> None:
        """Generate with transformers, which calls a streamer at each token."""
        self.generator(
            [self.prompt],
            self.sampling,
            streamer=_Streamer(self.arrive),
            stopping_criteria=StoppingCriteriaList([_StopWhenSet(self._cancelled)]),
        )

    def take(self, token: int) -> None:
        """Add a token id."""
        self.token_ids.append(token)

    def text(self) -> str:
        """Decode all token ids so far."""
        return self.tokenizer.decode(self.token_ids, skip_special_tokens=True)

    def ended_by_itself(self) -> bool:
        """Tell whether the last token is the end of a text."""
        return bool(self.token_ids) and self.token_ids[-1] == self.tokenizer.eos_token_id


def choose_device(device: str) -> str:
    """Return the device of "auto", or the one given; raise UserError if it is missing or has no kernels."""
    if device == "auto":
        device = (machine.accelerator() or torch.device("cpu")).type
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError(f"--device {device}: no GPU is visible here; type --device cpu, or check nvidia-smi")
        machine.check_kernels("--device cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {one_line(error)}; expected auto, cpu, cuda or cuda:0") from None
    return device


def choose_num_threads(model: PreTrainedModel) -> int:
    """Return how many threads generate fastest: one for a small model on a CPU, else as many as PyTorch uses."""
    is_small = model.device.type == "cpu" and num_weights(model) <= SMALL
    return 1 if is_small else torch.get_num_threads()


def num_weights(model: nn.Module) -> int:
    """Count the weights that a model multiplies with at each token."""
    products = [each for each in model.modules() if isinstance(each, nn.Linear)]
    return sum(each.in_features * each.out_features for each in products)


class Threads:
    """How many threads PyTorch uses while there are generations, and otherwise; the number is one for all of them."""

    def __init__(self):
        """Begin with no generation."""
        self.lock = threading.Lock()
        self.usual, self.num_generations = 0, 0

    @contextmanager
    def limited_to(self, number: int) -> Iterator[None]:
        """Use a number of threads inside the block, and the usual number again after the last generation."""
        with self.lock:
            self.usual = self.usual if self.num_generations else torch.get_num_threads()
            self.num_generations += 1
            torch.set_num_threads(number)
        try:
            yield
        finally:
            with self.lock:
                self.num_generations -= 1
                if not self.num_generations:
                    torch.set_num_threads(self.usual)


THREADS = Threads()


def choose_dtype(device: str) -> torch.dtype:
    """Return the dtype in which a device computes fastest without overflow."""
    kind = torch.device(device)
    if kind.type == "cpu":
        # Without bf16 instructions the processor would convert at every product.
        return torch.bfloat16 if has_bf16_instructions() else torch.float32
    bf16, fp16 = machine.choose_precision(kind)
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def has_bf16_instructions() -> bool:
    """Tell whether this processor has instructions that multiply bf16."""
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class _Streamer(BaseStreamer):
    """Hands over each new token id; skips the first call, which brings the prompt."""

    def __init__(self, arrive: Callable[[int], None]):
        self.arrive = arrive
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.arrive(int(value))
        self.prompt_seen = True

    def end(self) -> None:
        pass


class _StopWhenSet(StoppingCriteria):
    """Ends generation after the token during which an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
