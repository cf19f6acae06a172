"""A checkpoint that answers, by what computes it: transformers, or llama.cpp where its weights are quantized."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from sft.program import UserError

if TYPE_CHECKING:
    from sft.chat.model import ChatModel
    from sft.chat.remote import RemoteModel

QUANTIZATIONS = ("none", "q8_0", "q4_k_m")


def is_address(checkpoint: str) -> bool:
    """Tell whether what is given as a checkpoint is the address of a server."""
    return checkpoint.startswith(("http://", "https://"))


def load_chat(
    checkpoint: str,
    device: str = "auto",
    quantization: str = "none",
    model: str | None = None,
    uses_template: bool = False,
) -> ChatModel | RemoteModel:
    """Load a model folder, a hub id, or a LoRA adapter's folder together with the base model that it names.

    The address of a server, such as http://127.0.0.1:8000/v1, takes its only model or the one that `model` names, with
    the server's own chat template if `uses_template`. A quantization other than "none" takes llama.cpp and the CPU; the
    weights of a model that llama.cpp cannot compute stay as they are, which is said. Raises UserError if the checkpoint
    or the device does not exist, llama.cpp is not installed, or a quantization is to run elsewhere.
    """
    # Imported late: what computes a model takes seconds to import, and only one of the two is needed.
    if is_address(checkpoint):
        from sft.chat.remote import RemoteModel

        return RemoteModel.connect(checkpoint, model, uses_template)
    if quantization != "none":
        if device not in ("auto", "cpu"):
            raise UserError(
                f"--quantize {quantization} needs the CPU, and --device is {device}; type --device cpu with it, or "
                "leave --quantize out"
            )
        from sft.chat.llama_cpp_model import LlamaCppModel, hindrance

        if not (why := hindrance(checkpoint)):
            return LlamaCppModel.load(checkpoint, quantization)
        print(f"--quantize {quantization} is left out: {why}", file=sys.stderr)
    from sft.chat.model import ChatModel

    return ChatModel.load(checkpoint, device)
