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

from benchmarks.clients import CLIENTS, SkippedError, environment
from sft.model.download import locate
from sft.model.folder import check_files, let_others_read, longest_context, make_portable
from sft.model.load import load_config, load_model, load_tokenizer
from sft.program import UserError
from support.project import PROJECT, SAMPLE

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
from benchmarks.clients import CLIENTS, SkippedError, environment
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


LISTED = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "model_max_length": 300}


def portable(folder: Path, config: dict, tokenizer: dict) -> tuple[dict, dict]:
    """Return both settings after a folder was made portable."""
    for name, settings in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        (folder / name).write_text(json.dumps(settings), encoding="utf-8")
    make_portable(folder)
    return tuple(json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json"))


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ({"model_type": "bloom"}, {"seq_length": 2048}),
        ({"model_type": "bloom", "seq_length": 4096}, {}),
        ({"model_type": "falcon", "multi_query": True, "num_kv_heads": 71}, {"num_kv_heads": 1}),
        ({"model_type": "falcon", "multi_query": False, "num_kv_heads": 71}, {}),
        ({"model_type": "falcon", "multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 8}, {}),
        ({"model_type": "llama", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5}),
        (
            {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
    ],
)
def test_a_configuration_has_what_other_programs_read(tmp_path: Path, config: dict, changed: dict):
    assert portable(tmp_path, config, LISTED)[0] == {**config, **changed}


def test_a_tokenizer_has_what_transformers_4_reads(tmp_path: Path):
    _, settings = portable(tmp_path, {"model_type": "bloom"}, LISTED)
    assert settings == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "extra_special_tokens": {},
        "additional_special_tokens": ["<a>"],
        "model_max_length": 300,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }


def test_an_own_class_stays_and_a_second_time_writes_nothing(tmp_path: Path):
    _, settings = portable(tmp_path, {"model_type": "bloom"}, {"tokenizer_class": "BloomTokenizerFast"})
    assert settings["tokenizer_class"] == "BloomTokenizerFast"
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    make_portable(tmp_path)
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before
    (tmp_path / "adapter").mkdir()
    make_portable(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").iterdir())  # an adapter has no config.json, and gets none


@pytest.mark.parametrize("text", ["{ not JSON", "[1]", ""])
def test_a_file_that_holds_no_settings_stays_as_it_is(tmp_path: Path, text: str):
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(text)
    make_portable(tmp_path)
    assert {file.read_text() for file in tmp_path.iterdir()} == {text}


def test_a_context_is_never_shorter_than_the_models_own():
    assert longest_context({"seq_length": 4096}, 300) == 4096
    assert longest_context({}, 300) == longest_context({}) == longest_context({}, 1e30) == 2048
    assert longest_context({"max_position_embeddings": 2048}, 8192) == 8192


@pytest.fixture(scope="module")
def transformers_4() -> dict[str, str]:
    """Return the environment of transformers 4.57.6, installed beside the other packages once."""
    try:
        return environment(CLIENTS["transformers_4"], Path(sys.prefix) / "clients")
    except SkippedError as reason:
        pytest.skip(f"transformers 4.57.6 {reason}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "trained", "checkpoint", "exported", "merged", "trimmed"])
@pytest.mark.parametrize("shape", ["bloom-tiny", "falcon-tiny"])
def test_every_folder_loads_in_transformers_4(
    make_model, run, tmp_path: Path, cache_dir: Path, transformers_4: dict[str, str], shape: str, kind: str
):
    base, output = make_model(shape), tmp_path / "output"
    train = ["train_sft.py", "--model_name_or_path", base, "--data_path", SAMPLE / "own_with_input.json"]
    train += ["--output_dir", output, "--max_steps", 1, "--save_steps", 1, "--use_cpu", True, "--cache_dir", cache_dir]
    commands = {
        "trained": train,
        "checkpoint": train,
        "merged": [*train, "--lora_r", 4, "--merge_lora", True],
        "exported": ["-m", "sft.tools.export", base, output],
        "trimmed": ["-m", "sft.tools.trim_vocab", base, output, "--data", SAMPLE, "--keep_top", 300],
    }
    folder = {"checkpoint": output / "checkpoint-1"}.get(kind, output if kind in commands else base)
    if kind in commands:
        result = run(*commands[kind])
        assert result.returncode == 0, result.stderr[-2000:]
    prompts = ["今天天气很好。", "一二三四五六七八九十", "a"]
    # A random Falcon lacks a pad token, as the released ones do.
    program = "transformers_alone" if kind == "random" else "transformers_batch"
    command = [sys.executable, "-m", "benchmarks.client_programs", program, str(folder)]
    found = [
        subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True, cwd=PROJECT, env=each)
        for each in (dict(os.environ), transformers_4)
    ]
    assert found[0].returncode == found[1].returncode == 0, found[1].stderr[-2000:]
    assert found[0].stdout.splitlines()[-1] == found[1].stdout.splitlines()[-1]


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
