"""A BLOOM or a Falcon that llama.cpp computes on this machine's processor, its weights in 8 or about 4 bits each.

Neither PyTorch nor transformers' models are imported once a checkpoint has been converted: the model is ready within
seconds, and takes little more memory than its weights.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock
from huggingface_hub import constants
from transformers import PreTrainedTokenizerFast

from sft.chat.context import fit
from sft.chat.remote import RemoteModel, ServerError, ServerReply
from sft.chat.reply import Reply
from sft.chat.sampling import GREEDY, Sampling
from sft.data.encode import Encoder
from sft.model import llama_cpp
from sft.model.download import fetch_weights, locate
from sft.model.folder import UNKNOWN_LENGTH, longest_context
from sft.program import UserError, one_line

STAMP = "made_of.json"
# Bytes of a file up to which one thread generates: below it threads wait for each other longer than they compute.
SMALL_FILE = 32_000_000
CONTEXT_MULTIPLE = 256  # tokens by which llama.cpp sets memory for its context aside
WATCHED_FILES = "*.json", "*.safetensors", "*.bin", "*.jinja"
# As for a model of transformers: top_k takes the same tokens before the temperature, and leaves it fewer to look at.
ORDER_OF_SAMPLERS = ["penalties", "top_k", "temperature", "top_p"]


class LlamaCppModel(RemoteModel):
    """A checkpoint in llama.cpp's server, which runs in this process and answers it alone."""

    batches = False

    def __init__(self, file: Path, quantization: str):
        """Load a GGUF file that has its tokenizer beside it; raise UserError if llama.cpp cannot."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent)
        self.encoder = Encoder(tokenizer)
        self.quantization = quantization
        self.num_threads = 1 if file.stat().st_size < SMALL_FILE else num_cores()
        parameters = llama_cpp.package(f"--quantize {quantization}").CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx = -(-self.encoder.max_length // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = self.num_threads
        parameters.verbosity = 0
        parameters.warmup = False
        parameters.ui = parameters.endpoint_slots = False
        parameters.api_keys = [secrets.token_hex()]  # its port is open to this machine's other users
        try:
            self.server = llama_cpp.package("").Server(parameters)
        except RuntimeError as error:
            raise UserError(f"llama.cpp cannot load {file}: {one_line(error)}; delete it and start again") from None
        super().__init__("llama.cpp", file.parent.name)
        # A server that is dropped before it has answered anything waits for itself for ever.
        self.answer([" "], Sampling(max_new_tokens=1, temperature=0))

    @classmethod
    def load(cls, checkpoint: str, quantization: str) -> "LlamaCppModel":
        """Load a checkpoint, converted once and kept in the cache; raise UserError if llama.cpp cannot compute it."""
        return cls(converted(locate(checkpoint), quantization), quantization)

    def __str__(self) -> str:
        return f"{self.quantization} by llama.cpp, cpu"

    def reply(self, messages: Sequence[dict[str, str]], sampling: Sampling = GREEDY) -> Reply:
        """Return the reply to a conversation, shortened as for a model of transformers where it does not fit."""
        prompt, sampling, turns_left_out, tokens_left_out = fit(self.encoder, messages, sampling)
        return LlamaCppReply(self, {"prompt": prompt}, sampling, turns_left_out, tokens_left_out)

    def stream(self, prompt: str | Sequence[int], sampling: Sampling = GREEDY) -> Reply:
        """Return the answer to a prompt, as text or token ids, as a reply that grows as it is iterated."""
        ids = self.encoder.encode_text(prompt) if isinstance(prompt, str) else list(prompt)
        return LlamaCppReply(self, {"prompt": ids}, sampling)

    def more(self, sampling: Sampling) -> dict[str, Any]:
        """Return the rest of the sampling as llama.cpp names it.

        With a seed nothing is taken over from an earlier prompt, which could round otherwise.
        """
        return {
            **super().more(sampling),
            "top_k": sampling.top_k if sampling.temperature else 1,
            "samplers": ORDER_OF_SAMPLERS,
            "repeat_last_n": self.encoder.max_length,
            "cache_prompt": sampling.seed is None,
        }


class LlamaCppReply(ServerReply):
    """A reply that llama.cpp generates; each token is handed over by a call, without a connection in between."""

    def generate(self) -> None:
        """Generate until the reply ends or is cancelled; raise ServerError for what llama.cpp refuses."""

        refusals: list[ServerError] = []

        def arrived(event: dict[str, Any]) -> bool:
            try:
                self.receive(event)
            except ServerError as error:  # which the caller of this function would swallow
                refusals.append(error)
            return bool(refusals) or self._cancelled.is_set()  # at which it stops

        self.model.server.handle_completions(self.model.body_of(self.asked, self.sampling), arrived)
        if refusals:
            raise refusals[0]


def num_cores() -> int:
    """Return how many cores this process may use; two threads of one core would share its arithmetic."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def converted(folder: str, quantization: str) -> Path:
    """Return the GGUF file of a model's folder in the cache, beside its tokenizer; write it if the model has changed.

    Raises UserError if llama.cpp is not installed or cannot compute the model.
    """
    llama_cpp.package(f"--quantize {quantization}")
    for each in dict.fromkeys((Path(folder), base_of(Path(folder)))):
        fetch_weights(each)
    source = Path(folder).resolve()
    name = f"{source.name}-{hashlib.sha256(str(source).encode()).hexdigest()[:12]}"
    target = Path(constants.HF_HOME, "gguf", name)
    file, stamp = target / f"{quantization}.gguf", made_of(source)
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        known = target / STAMP
        if not known.is_file() or json.loads(known.read_text(encoding="utf-8")) != stamp:
            shutil.rmtree(target)
            target.mkdir()
            known.write_text(json.dumps(stamp), encoding="utf-8")
        if not file.is_file():
            convert(folder, file, quantization)
    return file


def hindrance(checkpoint: str) -> str | None:
    """Return why llama.cpp cannot compute a checkpoint, None if it can."""
    folder = base_of(Path(locate(checkpoint)))
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return llama_cpp.hindrance(config, checkpoint) if config else None


def base_of(folder: Path) -> Path:
    """Return the folder of a model itself, or of the base model of an adapter that names one."""
    file = folder / "adapter_config.json"
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path") if file.is_file() else None
    return Path(locate(base)) if base else folder


def made_of(folder: Path) -> dict[str, list[int]]:
    """Return size and time of each file of a model's folder, and of the base model's of an adapter."""
    folders = dict.fromkeys((folder, base_of(folder).resolve()))
    files = [file for each in folders for pattern in WATCHED_FILES for file in sorted(each.glob(pattern))]
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def convert(folder: str, file: Path, quantization: str) -> None:
    """Write the GGUF file of a model's folder, an adapter merged into its base model, and the tokenizer beside it."""
    # Imported late: from the second time on neither PyTorch nor a model of transformers is needed.
    import torch

    from sft.model import gguf_file, quantized
    from sft.model.load import load_adapter, load_config, load_tokenizer

    if (adapter := load_adapter(folder, torch.float32)) is not None:
        model, tokenizer = adapter
        config, weights = model.config, model.state_dict()
    else:
        config, tokenizer = load_config(folder), load_tokenizer(folder)
        quantized.check_whole(folder, config, "which cannot be quantized again")
        weights = gguf_file.weights_in(Path(folder))
    unfinished = file.with_suffix(".unfinished")
    gguf_file.write(unfinished, config, tokenizer, weights, quantization, Path(folder).name)
    if tokenizer.model_max_length > UNKNOWN_LENGTH:
        tokenizer.model_max_length = longest_context(config.to_dict())
    tokenizer.save_pretrained(file.parent)
    unfinished.rename(file)
