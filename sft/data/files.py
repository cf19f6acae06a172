"""The files of rows at a path: a file, all that are below a folder, or those of a data set of the Hugging Face hub."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from sft.data import hub
from sft.data.kinds import SUFFIXES
from sft.data.shards import SHAPE
from sft.program import UserError, one_line

# Files of objects that tell of a data set, a model or a run.
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
METADATA |= {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"}
METADATA |= {"adapter_config.json", "trainer_state.json", "data_report.jsonl", "package.json"}
ABOUT, COPIES = "about the data, no rows", "made by the datasets library beside the data"
OTHER_SPLIT = "another split than train; to read it, give its folder"
ASIDE = "hidden, or a licence, a README or an image"  # counted, not named
ASIDE_NAMES = re.compile(r"(\.|~\$|licen[cs]e|readme|.*\.(png|jpe?g|gif|svg|webp|ico)$)", re.IGNORECASE)
COPY_NAMES = re.compile(r"(indices.*|cache-.*|tmp.*)\.arrow")


def find_shards(path: str, flag: str = "--data_path", cache_dir: str | None = None) -> list[Path]:
    """Return the files of rows at `path`, sorted: a file, those below a folder, or those of a data set "owner/name".

    Folders that cannot be listed are included, so that reading them reports the fault; `cache_dir` is where a data set
    of the hub is stored. Raises UserError, naming the `flag` that gave the path, if there is nothing to read.
    """
    return look_through(path, flag, cache_dir)[0]


def look_through(
    path: str, flag: str = "--data_path", cache_dir: str | None = None
) -> tuple[list[Path], dict[str, list[Path]]]:
    """Return the files of rows at `path` as `find_shards` does, and those in a folder that are not read, by reason."""
    root = Path(path)
    try:
        exists = root.exists()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be reached ({one_line(error)}); give a path that you may read") from None
    if not exists and hub.is_id(path, SUFFIXES):
        return hub.download(path, flag, cache_dir), {}
    if not exists:
        raise UserError(
            f"{flag} {path} does not exist; expected a file of rows, a folder of them, or owner/name of a set of the "
            "Hugging Face hub; run data_proj/process_data.ipynb to make data_proj/opendata, or try data_proj/sample"
        )
    if not root.is_dir():
        return [root], {}
    shards, skipped = _sorted_out(root)
    if not shards:
        raise UserError(
            f"{flag} {path} contains no {', '.join(SUFFIXES)} file; expected files of rows such as {SHAPE}; "
            "run data_proj/process_data.ipynb, or try data_proj/sample"
        )
    return shards, skipped


def skipped_in(path: str) -> list[str]:
    """Return a sentence on each kind of file in a folder that is not read; nothing on a file or a set of the hub."""
    if not Path(path).is_dir():
        return []
    sentences = []
    for reason, files in _sorted_out(Path(path))[1].items():
        first = os.fsencode(files[0].relative_to(path)).decode("utf-8", "backslashreplace")
        more = f" and {len(files) - 1:,} more" if len(files) > 1 else ""
        number = f"{len(files):,} {'file' if len(files) == 1 else 'files'}"
        sentences.append(f"{number if reason == ASIDE else first + more}: {reason}")
    return sentences


def _sorted_out(root: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    shards, skipped = [], {}
    for file, reason in sorted(_walk(root), key=lambda each: each[::-1]):
        (skipped.setdefault(reason, []) if reason else shards).append(file)
    return shards, skipped


def _walk(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield every file below a folder, and why it is not read, "" if it is; a hidden folder is one file."""
    unlisted: list[OSError] = []
    visited = set()  # links may lead back to a parent folder
    for folder, folders, names in os.walk(root, followlinks=True, onerror=unlisted.append):
        state = Path(folder).stat()
        if (state.st_dev, state.st_ino) in visited:
            folders.clear()
            continue
        visited.add((state.st_dev, state.st_ino))
        others = _other_splits(Path(folder)) if "train" in folders else set()
        yield from ((Path(folder, name), ASIDE) for name in folders if name.startswith("."))
        yield from ((Path(folder, name), OTHER_SPLIT) for name in others.intersection(folders))
        folders[:] = [name for name in folders if not name.startswith(".") and name not in others]
        yield from ((Path(folder, name), _reason_to_skip(Path(folder, name))) for name in names)
    yield from ((Path(error.filename), "") for error in unlisted)


def _other_splits(folder: Path) -> set[str]:
    """Return the splits beside "train" in a folder that the datasets library has saved with several."""
    try:
        saved = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))
        return {name for name in saved["splits"] if isinstance(name, str)} - {"train"}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return set()


def _reason_to_skip(file: Path) -> str:
    is_shard = file.name.lower().endswith(SUFFIXES)
    if file.name.startswith((".", "~$")) or (not is_shard and ASIDE_NAMES.match(file.name)):
        return ASIDE
    if not is_shard:
        suffix = "".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix
        return f"no rows are read from {f'{suffix} files' if suffix else 'files without a suffix'}"
    if COPY_NAMES.fullmatch(file.name):
        return COPIES
    return ABOUT if file.name in METADATA and not _begins_array(file) else ""


def _begins_array(file: Path) -> bool:
    """Tell whether a file, by whatever name, holds an array of rows."""
    try:
        with file.open("rb") as raw:
            return raw.read(100).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except OSError:
        return False
