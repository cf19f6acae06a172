"""Checkpoints that can be trusted: written under another name, checked, renamed, and finally marked as complete.

    O/unfinished/checkpoint-20         while it is written
    O/checkpoint-20                    checked
    O/checkpoint-20/complete.json      its files with their sizes, and the settings of the run; without it, or if a
                                       size differs, the folder is skipped

O is the run's output folder.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer

from sft.model.folder import make_portable
from sft.program import UserError, one_line

MARKER = "complete.json"
UNFINISHED = "unfinished"
STATE = "trainer_state.json"
ADAPTER_CONFIG = "adapter_config.json"
# What a folder of weights does not need: Trainer's optimizer state, and DeepSpeed's folder and its pointer.
OPTIMIZER_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")
OPTIMIZER_FILES += ("global_step*", "latest", "zero_to_*.py")


def step_of(folder: Path) -> int:
    """Return the number of optimizer steps behind the checkpoint `O/checkpoint-N`."""
    return int(folder.name.split("-")[-1])


def folders_in(output_dir: str) -> list[Path]:
    """Return the checkpoints in an output folder, complete or not, oldest first."""
    if not os.access(output_dir, os.R_OK | os.X_OK):
        return []
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.is_dir()]
    folders = [folder for folder in folders if re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", folder.name)]
    return sorted(folders, key=step_of)


# --------------------------------------------------------------------------------------------- complete, or skipped


def files_of(folder: Path) -> dict[str, int]:
    """Return the sizes of a complete checkpoint's files by name; raise OSError or ValueError without a good marker."""
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    files, settings = (marker.get("files"), marker.get("settings")) if isinstance(marker, dict) else (None, None)
    sizes = files.values() if isinstance(files, dict) else [None]
    if not isinstance(settings, dict) or not all(isinstance(size, int) for size in sizes):
        raise ValueError("it lists no files with their sizes, or no settings")
    return files


def fault_of(folder: Path) -> str | None:
    """Return why a checkpoint cannot be trusted, or None if it is complete."""
    try:
        files = files_of(folder)
    except FileNotFoundError:
        return f"it has no {MARKER}, so saving it did not finish"
    except (OSError, ValueError, RecursionError) as error:
        return f"its {MARKER} cannot be read: {one_line(error)}"
    if not any(name.endswith(".safetensors") for name in files):
        return "it has no weights"
    for name, size in files.items():
        found = folder / name
        if not found.is_file():
            return f"{name} is missing"
        if found.stat().st_size != size:
            return f"{name} has {found.stat().st_size:,} of its {size:,} bytes"
    return fault_of_weights(folder)


def fault_of_weights(folder: Path, shapes: dict[str, tuple[int, ...]] | None = None) -> str | None:
    """Return what is wrong with the safetensors files of a folder, from their headers, or None.

    `shapes` are what the model saves, by name, a tied head not among them; by default any names, none of them empty.
    """
    saved = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                saved |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            return f"{file.name} cannot be read: {one_line(error)}"
    if empty := [name for name, shape in saved.items() if 0 in shape]:
        return f"{len(empty)} tensors are empty, such as {empty[0]}"
    if shapes is None:
        return None
    if wrong := shapes.keys() ^ saved.keys():
        return f"{len(wrong)} tensors are missing or unexpected, such as {min(wrong)}"
    if wrong := [name for name, shape in shapes.items() if saved[name] != shape]:
        return f"{wrong[0]} has the shape {saved[wrong[0]]}, not {shapes[wrong[0]]}"
    return None


def fault_of_settings(folder: Path) -> str | None:
    """Return why plain transformers, or peft, cannot read a folder's configuration or tokenizer; None if it can."""
    try:
        if (folder / ADAPTER_CONFIG).is_file():
            from peft import PeftConfig

            PeftConfig.from_pretrained(folder)
        else:
            AutoConfig.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds
        return f"its configuration or tokenizer does not load: {one_line(error)}"
    return None


def complete_steps(output_dir: str, tell: bool = False) -> list[int]:
    """Return the steps of the complete checkpoints, oldest first; `tell` prints a line for each of the others."""
    faults = {folder: fault_of(folder) for folder in folders_in(output_dir)}
    for folder, fault in faults.items():
        if fault and tell:
            print(f"{folder} is incomplete and skipped: {fault}", file=sys.stderr, flush=True)
    return [step_of(folder) for folder, fault in faults.items() if not fault]


def newest(output_dir: str) -> Path | None:
    """Return the newest complete checkpoint of an output folder."""
    steps = complete_steps(output_dir)
    return Path(output_dir, f"checkpoint-{steps[-1]}") if steps else None


def finish(unfinished: Path, output_dir: str, shapes: dict[str, tuple[int, ...]], settings: dict) -> Path:
    """Check a written checkpoint, flush it to the disk, rename it and mark it as complete; return where it is now.

    Raises UserError if it is not what the run's model needs.
    """
    if fault := fault_of_weights(unfinished, shapes) or fault_of_settings(unfinished):
        raise UserError(f"{unfinished} was not saved correctly: {fault}; {what_is_left(output_dir)}")
    make_portable(unfinished)
    files = {str(file.relative_to(unfinished)): file for file in sorted(unfinished.rglob("*")) if file.is_file()}
    for file in files.values():
        _to_disk(file)
    folder = Path(output_dir, unfinished.name)
    if folder.exists():  # of an earlier, incomplete save
        shutil.rmtree(folder)
    unfinished.rename(folder)
    _to_disk(folder.parent)
    mark(folder, settings, list(files))
    shutil.rmtree(unfinished.parent, ignore_errors=True)
    return folder


def mark(folder: Path, settings: dict, names: Sequence[str]) -> None:
    """Write the marker: the sizes of the named files, and the settings that a run must share to resume."""
    marker = {
        "files": {name: (folder / name).stat().st_size for name in names},
        "settings": settings,
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed", "accelerate")},
    }
    beside = folder / f"{MARKER}.part"
    beside.write_text(json.dumps(marker, indent=1), encoding="utf-8")
    _to_disk(beside)
    beside.rename(folder / MARKER)
    _to_disk(folder)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_older(output_dir: str, kept: int | None, best: str | None = None) -> None:
    """Delete all but `kept` complete checkpoints, the best and the newest, and incomplete ones older than these.

    None, or no positive number, keeps all complete ones; the newest always stays.
    """
    steps = complete_steps(output_dir)
    kept_steps = set(steps)
    if kept and kept > 0:
        best_steps = {step_of(Path(best))} & kept_steps if best else set()
        kept_steps = best_steps | set(steps[-max(1, kept - len(best_steps - set(steps[-kept:]))) :])
    for folder in folders_in(output_dir):
        if step_of(folder) not in kept_steps and steps and step_of(folder) < steps[-1]:
            (folder / MARKER).unlink(missing_ok=True)  # first, so that no half of it looks complete
            shutil.rmtree(folder, ignore_errors=True)


def keep_weights_alone(folder: Path) -> None:
    """Delete the optimizer state of a complete checkpoint: a new run can start from it, but none can resume."""
    paths = [path for pattern in OPTIMIZER_FILES for path in folder.glob(pattern)]
    gone = {str(file.relative_to(folder)) for path in paths for file in (path, *path.rglob("*"))}
    settings = json.loads((folder / MARKER).read_text(encoding="utf-8"))["settings"]
    mark(folder, settings, [name for name in files_of(folder) if name not in gone])
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def has_optimizer_state(folder: Path) -> bool:
    """Tell whether a complete checkpoint has its optimizer state."""
    return bool({"optimizer.pt", "latest"} & files_of(folder).keys())


def publish(source: Path, output_dir: str) -> None:
    """Make the model in `source` the result in `output_dir`, each file complete or not there at all.

    Weights are linked, which takes no room, or copied where the disk knows no links.
    """
    make_portable(source)
    files = [file for file in sorted(source.iterdir()) if file.suffix in {".json", ".safetensors", ".jinja"}]
    files = [file for file in files if file.name not in {MARKER, STATE}]
    for file in files:
        beside = Path(output_dir, f"{file.name}.part")
        beside.unlink(missing_ok=True)
        if file.suffix != ".safetensors" or not _linked(file, beside):
            shutil.copyfile(file, beside)
        beside.replace(Path(output_dir, file.name))
        beside.unlink(missing_ok=True)  # a second link to the same file is not renamed
    names = r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors(\.index\.json)?(\.part)?"
    for stale in {path.name for path in Path(output_dir).iterdir()} - {file.name for file in files}:
        if re.fullmatch(names, stale):  # of an earlier result in another number of files
            Path(output_dir, stale).unlink()


def _linked(file: Path, link: Path) -> bool:
    try:
        os.link(file, link)
    except OSError:
        return False
    return True


def what_is_left(output_dir: str) -> str:
    """Return what a message may say of the checkpoints that are there."""
    folder = newest(output_dir)
    return f"{folder} is complete" if folder else "there is no complete checkpoint"


def where_to_restart(output_dir: str) -> str:
    """Return what the message of a wasted run may say of its checkpoints."""
    folder = newest(output_dir)
    if folder is None:
        return "there is no complete checkpoint to start from"
    return f"the last checkpoint is {folder}; start from it: --model_name_or_path {folder} --output_dir ANOTHER"
