"""llama.cpp, as the package xllamacpp brings it: what it computes, whether it is there, how it quantizes weights."""

import ctypes
from types import ModuleType
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from sft.program import UserError

INSTALL = "pip install xllamacpp==2026.10.11549"
FAMILIES = ("bloom", "falcon")


def hindrance(config: dict[str, Any], name: str) -> str | None:
    """Return why llama.cpp, or what is written for it here, has no way for a model's configuration; None if it has."""
    family = config.get("model_type")
    if family not in FAMILIES:
        return (
            f"{name} is a {family}, and GGUF files are written here of {' and '.join(FAMILIES)}; for another family "
            "type python convert_hf_to_gguf.py in a checkout of llama.cpp"
        )
    if family == "falcon" and (config.get("alibi") or config.get("bias") or not config.get("parallel_attn", True)):
        return (
            f"{name} is a Falcon with ALiBi, biases or attention before its feed-forward layers, as falcon-rw-1b is, "
            "and llama.cpp computes none of these; expected one built as falcon-7b or falcon-40b"
        )
    if family == "bloom" and config.get("apply_residual_connection_post_layernorm"):
        return f"{name} adds its residuals after the norm, which llama.cpp does not; no release of BLOOM does"
    return None


def package(needed_by: str) -> ModuleType:
    """Return the package that brings llama.cpp; raise UserError, with what to type, if it is not installed."""
    try:
        import xllamacpp
    except ImportError as error:
        raise UserError(f"{needed_by} needs llama.cpp ({error}); type {INSTALL}") from None
    return xllamacpp


def quantized(rows: np.ndarray, type: Type) -> np.ndarray:
    """Return fp32 rows (N, in_features) as llama.cpp quantizes them, uint8 (N, bytes of a row).

    The function is a public one of llama.cpp's library ggml, and lets other threads run.
    """
    library = ctypes.CDLL(package("q4_k_m").xllamacpp.__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    rows = np.ascontiguousarray(rows, np.float32)
    blocks = np.empty(gguf.quant_shape_to_byte_shape(rows.shape, type), np.uint8)
    source, target = (array.ctypes.data_as(ctypes.c_void_p) for array in (rows, blocks))
    first, number, length = (ctypes.c_int64(value) for value in (0, *rows.shape))
    written = library.ggml_quantize_chunk(ctypes.c_int(type), source, target, first, number, length, None)
    assert written == blocks.nbytes, (written, blocks.nbytes)
    return blocks
