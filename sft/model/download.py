"""Models of the Hugging Face hub, downloaded into the local cache: their weights only when they are loaded."""

import json
import re
import time
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import IncompleteSnapshotError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import tqdm

from sft import network
from sft.model.folder import check_files
from sft.program import UserError, one_line

ABOUT = ["*.json", "*.model", "*.txt", "*.jinja"]  # configuration, tokenizer, template
BELOW = ["*/*"]  # other forms of the model, and checkpoints of its training
# Those of an adapter before those of a model, and of two forms the safer one.
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "pytorch_model.bin")


def locate(name_or_path: str, cache_dir: str | None = None) -> str:
    """Return the folder to load a model from: as given, or, for a hub id, in the local cache, without weights yet.

    Raises UserError if there is no such folder, and no such model in the hub or in the cache.
    """
    folder = Path(name_or_path)
    try:
        is_folder = folder.is_dir()
    except PermissionError as error:
        raise UserError(
            f"{name_or_path} cannot be looked into: {one_line(error)}; give a folder you may read"
        ) from None
    if is_folder:
        check_files(folder)
        return name_or_path
    if folder.is_file():
        raise UserError(f"{name_or_path} is a file; expected a model folder or a hub id; type {folder.parent}")
    return find(name_or_path, cache_dir)


def find(name: str, cache_dir: str | None = None) -> str:
    """Return the folder of a model of the hub in the local cache, after downloading all of it but the weights.

    The cache alone is used if the hub cannot be reached, without waiting for half a minute of retries. Raises UserError
    if there is no such model in the hub or in the cache.
    """
    hindrance = network.hindrance()
    try:
        folder = snapshot_download(
            name,
            cache_dir=cache_dir,
            allow_patterns=ABOUT,
            ignore_patterns=BELOW,
            local_files_only=hindrance is not None,
            tqdm_class=_OneBar,
        )
    except Exception as error:
        raise _not_found(name, error, hindrance, cache_dir) from None
    if not any(Path(folder, config).is_file() for config in ("config.json", "adapter_config.json")):
        raise (
            _in_part(name, hindrance)
            if hindrance
            else UserError(f"{name} has no config.json; expected a model of the hub such as bigscience/bloom-560m")
        )
    return folder


class _OneBar(tqdm):
    """The bytes of all files in one bar, shown once they take a second; the library has two bars more."""

    def __init__(self, *args, name: str | None = None, **given):
        given |= {"desc": "downloading", "bar_format": None, "delay": 1}
        if name != "huggingface_hub.snapshot_download":
            given["disable"] = True
        super().__init__(*args, name=name, **given)

    def refresh(self, *args, **given) -> None:
        """Show nothing before the bar's first second is over."""
        if self.disable or time.time() - self.start_t >= self.delay:
            super().refresh(*args, **given)

    def set_description(self, *args, **given) -> None:
        """End, since only the end is told."""
        self.close()


def fetch_weights(folder: Path) -> None:
    """Download the weights of a model that `find` found; nothing if they are there, or the folder is another one.

    Raises UserError if they cannot be downloaded.
    """
    name = name_of(folder)
    if name == str(folder) or _has_weights(folder):
        return
    cache_dir = str(folder.parents[2])
    hindrance = network.hindrance()
    if hindrance:
        raise _in_part(name, hindrance)
    try:
        # One after the other, not in threads, which Ctrl-C could not end.
        for file in _choose_weights(name, folder, cache_dir):
            hf_hub_download(name, file, revision=folder.name, cache_dir=cache_dir)
    except Exception as error:
        raise _not_found(name, error, None, cache_dir) from None


def _choose_weights(name: str, folder: Path, cache_dir: str) -> list[str]:
    """Return the files of a model's weights in one form, none if it has no weights; fail if they do not fit."""
    sizes = {
        entry.path: entry.size
        for entry in HfApi().list_repo_tree(name, revision=folder.name)
        if isinstance(entry, RepoFile)
    }
    for whole in WEIGHTS:
        stem, suffix = whole.split(".")
        if files := [file for file in sizes if re.fullmatch(rf"{stem}(-\d+-of-\d+)?\.{suffix}", file)]:
            missing = sum(sizes[file] for file in files if not (folder / file).is_file())
            network.check_room(cache_dir, missing)
            return files
    return []


def name_of(folder: Path) -> str:
    """Return the name of the model whose folder in the local cache this is, or its path if it is another folder."""
    parts = folder.parts[-3:]
    if len(parts) == 3 and parts[0].startswith("models--") and parts[1] == "snapshots":
        return parts[0].removeprefix("models--").replace("--", "/")
    return str(folder)


def unfinished(folder: Path) -> UserError | None:
    """Return that a model's folder in the local cache may lack something, if the hub cannot be asked for it now."""
    hindrance = network.hindrance() if name_of(folder) != str(folder) else None
    return _in_part(name_of(folder), hindrance) if hindrance else None


def _has_weights(folder: Path) -> bool:
    for whole in WEIGHTS:
        shards = _shards_of(folder / f"{whole}.index.json")
        if (folder / whole).is_file() or (shards and all((folder / shard).is_file() for shard in shards)):
            return True
    return False


def _shards_of(index: Path) -> set[str]:
    """Return the names of the files that an index lists; none if it is missing or broken."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()


def _not_found(name: str, error: Exception, hindrance: tuple[str, str] | None, cache_dir: str | None) -> UserError:
    if hindrance and isinstance(error, IncompleteSnapshotError):
        return _in_part(name, hindrance)
    if hindrance:
        why, remedy = hindrance
        return UserError(
            f"{name} is not a folder, is not in the local cache, and {why}; give the path of a downloaded model "
            f"folder, or {remedy}"
        )
    if trouble := network.trouble(error, [cache_dir or constants.HF_HUB_CACHE]):
        why, remedy = trouble
        return UserError(f"{name} cannot be downloaded from {constants.ENDPOINT}: {why}; {remedy}")
    return UserError(
        f"{name} is not a folder, and no model of the hub ({one_line(error)}); expected a Hugging Face model folder or "
        "a hub id such as bigscience/bloom-560m"
    )


def _in_part(name: str, hindrance: tuple[str, str]) -> UserError:
    why, remedy = hindrance
    return UserError(f"{name} is in the local cache only in part, and {why}; {remedy}, and type the same again")
