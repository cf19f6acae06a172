"""Files of a model's folder: read by whom, and what is no file of a model."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from sft.model.download import locate
from sft.model.folder import check_files, let_others_read
from sft.model.load import load_config, load_model, load_tokenizer
from sft.program import UserError
from support.project import PROJECT

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:7d1d\nsize 1118459450\n"


def mode_of(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_permissions_of_new_ones(tmp_path: Path, mask: int, expected: int):
    (tmp_path / "global_step2").mkdir()
    names = ["model.safetensors", "global_step2/states.pt", "run.sh"]
    for name in names:
        (tmp_path / name).touch(0o600)
    (tmp_path / "run.sh").chmod(0o700)
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere")
    before = os.umask(mask)
    try:
        let_others_read(tmp_path)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert [mode_of(tmp_path / name) for name in names] == [expected, expected, expected | 0o100]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "pytorch_model-00001.bin"])
def test_a_pointer_of_git_lfs_is_named_with_what_to_type(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(UserError) as error:
        locate(str(tmp_path))
    assert str(error.value) == f"{tmp_path / name} is a Git LFS pointer, not the file; type git lfs pull in {tmp_path}"


def test_a_long_file_that_begins_like_a_pointer_is_none(tmp_path: Path):
    (tmp_path / "NOTICE").write_bytes(POINTER * 30)
    check_files(tmp_path)


# As another user, after the imports, since that user may not read the installed packages.
AS_NOBODY = """
import os, sys
from sft.model.download import locate
from sft.program import run_program
os.seteuid(65534)
run_program(lambda: print(locate(sys.argv[1])))
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Return a folder that every user may look into, unlike pytest's own."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("which", ["model.safetensors", "config.json", ".", ".."])
def test_what_may_not_be_read_is_named_with_what_its_owner_types(open_folder: Path, which: str):
    folder = open_folder / "parent" / "model"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_text("{}")
    (folder / which).chmod(0o700 if which in (".", "..") else 0o600)
    command = [sys.executable, "-c", AS_NOBODY, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert "Permission denied" in result.stderr
    if which == "..":
        assert "give a folder you may read" in result.stderr
    else:
        path = folder if which == "." else folder / which
        assert result.stderr.startswith(f"error: {path} cannot be read: ")
        assert result.stderr.endswith(f"its owner may type chmod -R a+rX {folder}\n")


def test_code_that_a_base_model_names_is_not_named_by_what_is_saved(make_model: Callable[[str], Path], tmp_path: Path):
    base = shutil.copytree(make_model("falcon-tiny"), tmp_path / "base")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        settings = json.loads((base / name).read_text(encoding="utf-8"))
        settings["auto_map"] = {"AutoConfig": "configuration_falcon.FalconConfig"}
        (base / name).write_text(json.dumps(settings), encoding="utf-8")
    model, tokenizer = load_model(str(base), torch.float32), load_tokenizer(str(base))
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "saved")
    assert not [file for file in (tmp_path / "saved").glob("*.json") if "auto_map" in file.read_text(encoding="utf-8")]
    assert load_config(str(base)).model_type == "falcon"
