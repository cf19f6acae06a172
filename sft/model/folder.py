"""Files of a model's folder: what other programs and users need of them, and what is no file of a model."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from sft.program import UserError, one_line

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_POINTER = 1024  # bytes, by Git LFS's own rule

USUAL_LENGTH = 2048  # tokens of context, where neither the configuration nor the tokenizer says more: BLOOM's, Falcon's
# transformers 5 names a class that transformers 4 lacks, and saves a list where 4 expects a mapping.
NEW_TOKENIZER_CLASS, OLD_TOKENIZER_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
UNKNOWN_LENGTH = 1e9  # above it, a tokenizer's model_max_length is transformers' value for unknown


def make_portable(folder: Path) -> None:
    """Make a folder that transformers 5 has saved one that transformers 4, llama.cpp and other users can read.

    What it says of the model stays the same, and so do files that need no change.
    """
    tokenizer = _read(folder / "tokenizer_config.json")
    _write(folder / "tokenizer_config.json", tokenizer | portable_tokenizer(tokenizer))
    config = _read(folder / "config.json")
    _write(folder / "config.json", config | portable_config(config, tokenizer.get("model_max_length")))
    let_others_read(folder)


def portable_tokenizer(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what to change in tokenizer_config.json; decoder-only models generate from prompts padded on the left."""
    changes: dict[str, Any] = {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}
    if settings.get("tokenizer_class") == NEW_TOKENIZER_CLASS:
        changes["tokenizer_class"] = OLD_TOKENIZER_CLASS
    if isinstance(settings.get("extra_special_tokens"), list):
        names = [*settings.get("additional_special_tokens", []), *settings["extra_special_tokens"]]
        changes |= {"extra_special_tokens": {}, **({"additional_special_tokens": names} if names else {})}
    return changes if settings else {}


def portable_config(config: dict[str, Any], model_max_length: float | None) -> dict[str, Any]:
    """Return what to change in config.json: names of transformers 4, and what llama.cpp's converter reads."""
    changes: dict[str, Any] = {}
    family, rope = config.get("model_type"), config.get("rope_parameters")
    if family == "falcon" and config.get("multi_query") and not config.get("new_decoder_architecture"):
        changes["num_kv_heads"] = 1  # transformers 5 fills in the number of heads, which no model of this kind has
    if family == "bloom":
        changes["seq_length"] = longest_context(config, model_max_length)
    if isinstance(rope, dict) and isinstance(rope.get("rope_theta"), float | int):
        changes["rope_theta"] = rope["rope_theta"]
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        if scaling.get("rope_type", "default") != "default":
            changes["rope_scaling"] = scaling
    return changes


def longest_context(config: dict[str, Any], model_max_length: float | None = None) -> int:
    """Return the tokens of context that a model can be given: its own or the tokenizer's, but no short training's."""
    names = ("max_position_embeddings", "seq_length", "n_positions")  # Falcon's, BLOOM's, and GPT-2's
    own = [length for name in names if isinstance(length := config.get(name), int) and length > 0]
    trained = int(model_max_length) if model_max_length and model_max_length < UNKNOWN_LENGTH else 0
    return max(own[0] if own else USUAL_LENGTH, trained)


def _read(file: Path) -> dict[str, Any]:
    """Return the settings in a file; nothing where there is none, or it holds something else."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _write(file: Path, settings: dict[str, Any]) -> None:
    if settings != _read(file):
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def let_others_read(folder: Path) -> None:
    """Give the files of a folder the permissions of any new file; safetensors makes its own for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(stat.S_IMODE(file.stat().st_mode) | (0o666 & ~mask))


def check_files(folder: Path) -> None:
    """Raise UserError if this process may not read a file of a model's folder, or one is a Git LFS pointer."""
    try:
        files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    except OSError as error:
        raise _unreadable(folder, folder, error) from None
    for file in files:
        try:
            with file.open("rb") as opened:
                head = opened.read(len(LFS_POINTER))
        except PermissionError as error:
            raise _unreadable(folder, file, error) from None
        if head == LFS_POINTER and file.stat().st_size <= LARGEST_POINTER:
            raise UserError(f"{file} is a Git LFS pointer, not the file; type git lfs pull in {folder}")


def _unreadable(folder: Path, path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be read: {one_line(error)}; its owner may type chmod -R a+rX {folder}"
        if isinstance(error, PermissionError)
        else f"{path} cannot be read: {one_line(error)}"
    )
