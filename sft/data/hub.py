"""Data sets of the Hugging Face hub, by their names there."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from huggingface_hub import constants

from sft.machine import answers
from sft.program import UserError, one_line

ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(\w+))?", re.ASCII)


def is_id(path: str, suffixes: tuple[str, ...]) -> bool:
    """Tell whether a path that does not exist may be owner/name or owner/name:split; `suffixes` are those of files.

    In a folder that exists, it is the path of a file that is missing.
    """
    return bool(ID.fullmatch(path)) and not path.lower().endswith(suffixes) and not Path(path).parent.exists()


def download(path: str, flag: str, cache_dir: str | None = None) -> list[Path]:
    """Return the Arrow files of owner/name, or of owner/name:split, downloaded into the cache of `datasets`.

    Without a split it is "train". The cache alone is used if the hub cannot be reached, without waiting for half a
    minute of retries. Raises UserError, naming the `flag` that gave the path, if there is no such set.
    """
    import datasets  # here, since a second goes by until it is imported

    name, split = ID.fullmatch(path).groups()
    why, remedy = "", "correct it"
    if constants.HF_HUB_OFFLINE:
        why, remedy = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
    elif not answers(constants.ENDPOINT):
        why, remedy = f"{constants.ENDPOINT} cannot be reached", "set HF_ENDPOINT to a mirror"
    try:
        with _offline() if why else nullcontext():
            files = datasets.load_dataset(name, split=split or "train", cache_dir=cache_dir).cache_files
        if not files:
            raise ValueError("it holds no rows")
    except Exception as error:  # of any kind: what a set holds decides what fails
        raise UserError(
            f"{flag} {path} is no file or folder, and no set of the Hugging Face hub that can be loaded "
            f"({why or one_line(error)}); expected a path, owner/name or owner/name:split; {remedy}, or give the "
            "folder of a set that was downloaded"
        ) from None
    return [Path(file["filename"]) for file in files]


@contextmanager
def _offline() -> Iterator[None]:
    """Let `datasets` look into its cache alone."""
    import datasets

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
