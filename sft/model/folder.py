"""Files of a model's folder: who may read them, and what is no file of a model."""

import os
import stat
from pathlib import Path

from sft.program import UserError, one_line

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_POINTER = 1024  # bytes, by Git LFS's own rule


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
