"""Plain model folders out of checkpoints, plain ones and those that DeepSpeed has split."""

import json
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sft.tools.export import DTYPES, export
from sft.training import checkpoints
from support.project import SAMPLE

PLAIN_SHAPES = ["bloom-tiny", "falcon-tiny"]
WEIGHTS = "model.safetensors"


def mark(folder: Path) -> Path:
    """Make a checkpoint of all files in a folder."""
    (folder / checkpoints.MARKER).unlink(missing_ok=True)
    checkpoints.mark(folder, {}, [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()])
    return folder


@pytest.fixture
def make_checkpoint(make_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a checkpoint of a random model, its weights times a factor."""

    def make(shape: str = "bloom-tiny", step: int = 2, factor: float = 1) -> Path:
        folder = Path(shutil.copytree(make_model(shape), tmp_path / "run" / f"checkpoint-{step}"))
        weights = load_file(folder / WEIGHTS)
        save_file({name: factor * tensor for name, tensor in weights.items()}, folder / WEIGHTS, {"format": "pt"})
        (folder / "optimizer.pt").write_bytes(b"state")
        (folder / checkpoints.STATE).write_text("{}")
        return mark(folder)

    return make


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def files_of(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.rglob("*")}


# ---------------------------------------------------------------------------------------------------- plain checkpoints


@pytest.mark.parametrize("shape", PLAIN_SHAPES)
def test_a_checkpoint_in_fp32_has_the_same_logits_in_plain_transformers(shape, make_checkpoint, tmp_path):
    folder = make_checkpoint(shape)
    before = files_of(folder)
    assert export(str(folder), str(tmp_path / "exported")) == folder
    assert torch.allclose(logits_of(tmp_path / "exported"), logits_of(folder), rtol=0, atol=1e-6)
    assert files_of(folder) == before
    names = set(files_of(tmp_path / "exported"))
    assert {WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not names & {checkpoints.MARKER, checkpoints.STATE, "optimizer.pt"}
    assert [path.name for path in tmp_path.iterdir() if "exported" in path.name] == ["exported"]


@pytest.mark.parametrize("shape", PLAIN_SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_halve_the_file_and_stand_in_the_config(shape, dtype, make_checkpoint, tmp_path):
    folder, exported = make_checkpoint(shape), tmp_path / "exported"
    export(str(folder), str(exported), DTYPES[dtype])
    whole, half = load_file(folder / WEIGHTS), load_file(exported / WEIGHTS)
    assert whole.keys() == half.keys()
    assert all(torch.equal(half[name], tensor.to(DTYPES[dtype])) for name, tensor in whole.items())
    assert (exported / WEIGHTS).stat().st_size < 0.55 * (folder / WEIGHTS).stat().st_size
    assert json.loads((exported / "config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(exported).dtype == DTYPES[dtype]


def test_fp32_stands_in_the_config(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    export(str(mark(folder)), str(tmp_path / "exported"))
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == "float32"
    assert load_file(tmp_path / "exported" / WEIGHTS).popitem()[1].dtype == torch.float32


@pytest.mark.parametrize("shape", PLAIN_SHAPES)
def test_the_tokenizer_comes_along_with_the_prompt_of_training(shape, make_checkpoint, tmp_path):
    folder = make_checkpoint(shape)
    export(str(folder), str(tmp_path / "exported"))
    tokenizer, before = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "exported", folder))
    assert tokenizer("你好，世界。Hello").input_ids == before("你好，世界。Hello").input_ids
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False)
    assert "### Instruction:\n你好" in prompt


def scale_of(exported: Path, plain: Path) -> float:
    name, tensor = load_file(plain / WEIGHTS).popitem()
    return (load_file(exported / WEIGHTS)[name] / tensor).median().item()


def test_of_an_output_folder_the_newest_complete_checkpoint_is_taken(make_checkpoint, make_model, tmp_path):
    for step, factor in ((2, 2), (9, 9), (10, 10), (12, 12)):
        make_checkpoint(step=step, factor=factor)
    (tmp_path / "run" / "checkpoint-12" / "optimizer.pt").unlink()
    shutil.copy(make_model("bloom-tiny") / WEIGHTS, tmp_path / "run")  # a result, of an earlier step
    shutil.copy(make_model("bloom-tiny") / "config.json", tmp_path / "run")
    assert export(str(tmp_path / "run"), str(tmp_path / "exported")) == tmp_path / "run" / "checkpoint-10"
    assert scale_of(tmp_path / "exported", make_model("bloom-tiny")) == pytest.approx(10)


def test_a_checkpoint_that_is_named_is_taken_though_it_is_older(make_checkpoint, make_model, tmp_path):
    older, _ = make_checkpoint(step=2, factor=2), make_checkpoint(step=4, factor=4)
    assert export(str(older), str(tmp_path / "exported")) == older
    assert scale_of(tmp_path / "exported", make_model("bloom-tiny")) == pytest.approx(2)


@pytest.mark.parametrize("exists", [False, True])
def test_a_plain_model_folder_is_written_to_a_new_or_empty_one(exists, make_model, tmp_path):
    target = tmp_path / "new" / "exported"
    if exists:
        target.mkdir(parents=True)
    folder = make_model("falcon-tiny")
    assert export(str(folder), str(target)) == folder
    assert torch.allclose(logits_of(target), logits_of(folder), rtol=0, atol=1e-6)


def test_what_an_export_that_was_killed_left_is_no_part_of_the_next(make_model, tmp_path):
    unfinished = tmp_path / ".exported.unfinished"
    unfinished.mkdir()
    (unfinished / "half.safetensors").write_bytes(b"half")
    export(str(make_model("bloom-tiny")), str(tmp_path / "exported"))
    assert not (tmp_path / "exported" / "half.safetensors").exists() and not unfinished.exists()


def test_the_config_without_which_no_folder_is_a_model_comes_last(make_model, tmp_path, monkeypatch):
    moved, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda file, target: moved.append(Path(target)) or replace(file, target))
    export(str(make_model("bloom-tiny")), str(tmp_path / "exported"))
    moved = [file.name for file in moved if file.parent == tmp_path / "exported"]
    assert set(moved) == set(files_of(tmp_path / "exported")) and moved[-1] == "config.json"


def test_a_folder_of_the_users_that_ends_in_part_stays(make_model, tmp_path):
    kept = tmp_path / "exported.part" / "kept"
    kept.parent.mkdir()
    kept.write_text("mine")
    export(str(make_model("bloom-tiny")), str(tmp_path / "exported"))
    assert kept.read_text() == "mine"


def test_the_working_folder_may_be_the_target(make_model, tmp_path, monkeypatch):
    target, folder = tmp_path / "exported", make_model("bloom-tiny")
    target.mkdir()
    monkeypatch.chdir(target)
    assert export(str(folder), ".") == folder
    assert {WEIGHTS, "config.json", "tokenizer.json"} <= set(files_of(target))
    assert list(tmp_path.iterdir()) == [target]


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs `python -m sft.tools.export ARGUMENTS`: exit code, output, errors."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def exported(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        code = 0
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.delitem(sys.modules, "sft.tools.export")
                runpy.run_module("sft.tools.export", run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    return exported


def lines_of(stderr: str) -> list[str]:
    """Return the lines beside those of progress bars."""
    return [line for line in stderr.splitlines() if line and not re.search(r"\d%\|", line)]


def test_the_program_writes_the_folder_and_says_so(exported, make_checkpoint, tmp_path):
    folder, target = make_checkpoint("falcon-tiny"), tmp_path / "exported"
    code, stdout, stderr = exported(tmp_path / "run", target, "--dtype", "bfloat16")
    assert (code, lines_of(stderr)) == (0, [])
    assert stdout == f"{folder} -> {target}, a model folder in bfloat16\n"
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"


def test_unless_told_otherwise_the_program_writes_fp32(exported, make_checkpoint, tmp_path):
    folder, target = make_checkpoint(), tmp_path / "exported"
    assert exported(folder, target)[:2] == (0, f"{folder} -> {target}, a model folder in float32\n")
    assert json.loads((target / "config.json").read_text())["dtype"] == "float32"


def error_line(result: tuple[int, str, str]) -> str:
    code, stdout, stderr = result
    assert (code, stdout) == (2, "") and stderr.startswith("error: ") and stderr.count("\n") == 1, result
    return stderr


def test_a_mistake_is_one_line_of_the_program(run, tmp_path):
    result = run("-m", "sft.tools.export", tmp_path / "run", tmp_path / "exported")
    line = error_line((result.returncode, result.stdout, result.stderr))
    assert line.startswith(f"error: {tmp_path / 'run'} is not a folder; give a checkpoint")


def test_an_output_folder_without_a_complete_checkpoint_is_refused(exported, make_checkpoint, tmp_path):
    for step in (2, 4):
        (make_checkpoint(step=step) / "optimizer.pt").unlink()
    code, stdout, stderr = exported(tmp_path / "run", tmp_path / "exported")
    lines = lines_of(stderr)
    assert (code, stdout, len(lines)) == (2, "", 3)
    assert lines[-1] == f"error: {tmp_path / 'run'} has no complete checkpoint; give another folder"
    for step, line in zip((2, 4), lines, strict=False):
        assert f"checkpoint-{step} is incomplete and skipped: optimizer.pt is missing" in line
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("complete.json", "saving it did not finish"),
        ("tokenizer.json", "tokenizer.json is missing"),
        (WEIGHTS, "missing"),
    ],
)
def test_a_faulty_checkpoint_is_refused(exported, make_checkpoint, tmp_path, fault, said):
    folder = make_checkpoint()
    (folder / fault).unlink()
    line = error_line(exported(folder, tmp_path / "exported"))
    assert line.startswith(f"error: {folder} cannot be exported: ") and said in line
    assert not (tmp_path / "exported").exists()


def test_a_model_folder_with_broken_weights_is_refused(exported, make_model, tmp_path):
    folder = Path(shutil.copytree(make_model("bloom-tiny"), tmp_path / "model"))
    os.truncate(folder / WEIGHTS, 1000)
    line = error_line(exported(folder, tmp_path / "exported"))
    assert line.startswith(f"error: {folder} cannot be exported: {WEIGHTS} cannot be read")


@pytest.mark.parametrize("is_folder", [True, False])
def test_nothing_that_is_there_is_written_over(exported, make_checkpoint, tmp_path, is_folder):
    folder, target = make_checkpoint(), tmp_path / "exported"
    kept = target / "kept" if is_folder else target
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    said = "already exists; give a new folder" if is_folder else "is a file; expected a folder"
    assert f"{target} {said}" in error_line(exported(folder, target))
    assert kept.read_text() == "mine"


def test_a_dtype_that_no_weights_have_is_refused(exported, make_checkpoint, tmp_path):
    assert "argument --dtype" in error_line(exported(make_checkpoint(), tmp_path / "exported", "--dtype", "int8"))


# ---------------------------------------------------------------------------------------------- DeepSpeed's checkpoints


@pytest.fixture(scope="module")
def split_run(run: Callable, make_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of two ranks with ZeRO-3, its checkpoint split over them; not to be changed."""
    output = tmp_path_factory.mktemp("split") / "run"
    flags = ["--model_name_or_path", make_model("falcon-tiny"), "--data_path", SAMPLE / "own_with_input.json"]
    flags += ["--output_dir", output, "--max_steps", 2, "--save_steps", 2, "--per_device_train_batch_size", 2]
    flags += ["--use_cpu", True, "--deepspeed", "ds_zero3_config.json", "--learning_rate", "1e-2"]
    flags += ["--cache_dir", tmp_path_factory.mktemp("split_cache")]
    result = run("-m", "sft.training.launch", "--cpu", "--ranks", 2, "train_sft.py", *flags, DS_ACCELERATOR="cpu")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return output


@pytest.fixture
def split(split_run: Path, tmp_path: Path) -> Path:
    """A copy of the split checkpoint, to be changed."""
    return Path(shutil.copytree(split_run / "checkpoint-2", tmp_path / "run" / "checkpoint-2"))


def assert_same_weights(exported: Path, trained: Path) -> None:
    expected, found = load_file(trained / WEIGHTS), load_file(exported / WEIGHTS)
    assert expected.keys() == found.keys()
    assert all(torch.allclose(found[name], tensor, rtol=0, atol=1e-7) for name, tensor in expected.items())


def test_what_deepspeed_has_split_is_put_together(split_run, make_model, tmp_path):
    assert export(str(split_run), str(tmp_path / "exported")) == split_run / "checkpoint-2"
    assert_same_weights(tmp_path / "exported", split_run)
    before = load_file(make_model("falcon-tiny") / WEIGHTS)
    assert not any(torch.equal(before[name], tensor) for name, tensor in load_file(split_run / WEIGHTS).items())
    assert torch.allclose(logits_of(tmp_path / "exported"), logits_of(split_run), rtol=0, atol=1e-6)


def test_of_what_was_split_a_tied_head_is_written_once_in_sixteen_bits_too(split_run, tmp_path):
    export(str(split_run), str(tmp_path / "exported"), torch.bfloat16)
    trained = load_file(split_run / WEIGHTS)
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in trained.items()}
    found = load_file(tmp_path / "exported" / WEIGHTS)
    assert found.keys() == rounded.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in rounded.items())


def test_how_to_generate_comes_along_with_what_was_split(split, tmp_path):
    GenerationConfig(eos_token_id=11, pad_token_id=11, max_new_tokens=77).save_pretrained(split)
    export(str(mark(split)), str(tmp_path / "exported"))
    settings = GenerationConfig.from_pretrained(tmp_path / "exported")
    assert (settings.eos_token_id, settings.pad_token_id, settings.max_new_tokens) == (11, 11, 77)


def test_weights_come_from_the_optimizers_copies_where_they_are(split, split_run, tmp_path):
    weights = load_file(split / WEIGHTS)
    save_file({name: 0 * tensor for name, tensor in weights.items()}, split / WEIGHTS, {"format": "pt"})
    export(str(mark(split)), str(tmp_path / "exported"))
    assert_same_weights(tmp_path / "exported", split_run)


def test_a_split_checkpoint_whose_optimizer_was_deleted_is_exported_from_its_weights(split, split_run, tmp_path):
    checkpoints.keep_weights_alone(split)
    assert not list(split.glob("global_step*"))
    export(str(split), str(tmp_path / "exported"))
    assert_same_weights(tmp_path / "exported", split_run)


@pytest.mark.parametrize("pattern", ["*optim_states.pt", "*model_states.pt"])
def test_a_split_checkpoint_that_lacks_a_file_is_refused(exported, split, tmp_path, pattern):
    missing = sorted(split.glob(f"global_step*/{pattern}"))[-1]
    missing.unlink()
    line = error_line(exported(split, tmp_path / "exported"))
    assert (
        line == f"error: {split} cannot be exported: {missing.relative_to(split)} is missing; give another checkpoint\n"
    )


def test_files_that_deepspeed_cannot_put_together_are_refused_in_one_line(exported, split, tmp_path):
    sorted(split.glob("global_step*/*optim_states.pt"))[-1].unlink()
    code, _, stderr = exported(mark(split), tmp_path / "exported")
    lines = lines_of(stderr)
    assert code == 2 and len(lines) == 1, stderr
    assert lines[0].startswith(f"error: DeepSpeed's files in {split} cannot be merged: ")
    assert not [path for path in tmp_path.iterdir() if "exported" in path.name]
