"""Data sets of the Hugging Face hub, by their names there."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError

from sft import network
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
    hindrance = network.hindrance()
    try:
        with _offline() if hindrance else _the_hub_alone():
            files = datasets.load_dataset(name, split=split or "train", cache_dir=cache_dir).cache_files
        if not files:
            raise ValueError("it holds no rows")
    except Exception as error:  # of any kind: what a set holds decides what fails
        raise _why_not(f"{flag} {path}", name, error, hindrance, cache_dir) from None
    return [Path(file["filename"]) for file in files]


def stream(name: str) -> Iterator[dict]:
    """Yield the rows of a set's split "train" while they are downloaded; nothing is stored.

    Raises UserError if there is no such set, or the connection is lost for good.
    """
    import datasets

    hindrance = network.hindrance()
    try:
        with _offline() if hindrance else _the_hub_alone():
            rows = datasets.load_dataset(name, split="train", streaming=True)
        yield from rows
    except Exception as error:
        raise _why_not(name, name, error, hindrance, None) from None


def _why_not(
    given: str, name: str, error: Exception, hindrance: tuple[str, str] | None, cache_dir: str | None
) -> UserError:
    """Return why a set is not there: the hub, the network or the disk, or what the set holds."""
    import datasets

    folders = (constants.HF_HUB_CACHE, cache_dir or datasets.config.HF_DATASETS_CACHE)
    trouble = None if hindrance else network.trouble(error, folders)
    if not (hindrance or trouble) and isinstance(error, FileNotFoundError | ConnectionError):
        trouble = network.trouble(_asked_again(name), folders)
    if trouble:
        return UserError(f"{given} cannot be downloaded from {constants.ENDPOINT}: {trouble[0]}; {trouble[1]}")
    why, remedy = hindrance or (one_line(list(network.causes(error))[-1]), "correct it")
    return UserError(
        f"{given} is no file or folder, and no set of the Hugging Face hub that can be loaded ({why}); expected a "
        f"path, owner/name or owner/name:split; {remedy}, or give the folder of a set that was downloaded"
    )


def _asked_again(name: str) -> Exception | None:
    """Return why the hub gives nothing of a set now, None if it does: `datasets` loses the cause of its errors."""
    for file in ("README.md", "dataset_infos.json"):  # the first may be read where a set is gated
        try:
            get_hf_file_metadata(hf_hub_url(name, file, repo_type="dataset"))
        except EntryNotFoundError:
            continue
        except Exception as error:
            return error
    return None


@contextmanager
def _the_hub_alone() -> Iterator[None]:
    """Keep `datasets` from asking a second host about a set, which no mirror has."""
    import datasets

    before, datasets.config.USE_PARQUET_EXPORT = datasets.config.USE_PARQUET_EXPORT, False
    try:
        yield
    finally:
        datasets.config.USE_PARQUET_EXPORT = before


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
