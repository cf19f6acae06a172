"""Only a whole checkpoint is trusted, and a kill at any point leaves none that looks whole."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sft.program import UserError
from sft.training import checkpoints

SHAPES = {"transformer.h.0.weight": (3, 4), "transformer.ln_f.weight": (4,)}
SETTINGS = {"--seed": 7, "rows a step": 16}
TEXTS = ["config.json", "latest", "optimizer.pt", "rng_state.pth", "global_step5/0/optim.pt", "trainer_state.json"]


@pytest.fixture(autouse=True)
def only_weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let folders of a few tensors pass as models, except in tests of real ones."""
    if "make_model" not in request.fixturenames:
        monkeypatch.setattr(checkpoints, "fault_of_settings", lambda folder: None)


class KilledError(BaseException):
    """The end of a process in the middle of its work."""


def kill(*args, **kwargs) -> None:
    raise KilledError


def save_weights(file: Path, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, file)


def fill(folder: Path) -> Path:
    """Write some of what Trainer and DeepSpeed would."""
    for number, name in enumerate(TEXTS, 7):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x" * number)
    save_weights(folder / "model.safetensors")
    return folder


def files_in(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def write_checkpoint(output_dir: Path, step: int = 5) -> Path:
    folder = fill(output_dir / f"checkpoint-{step}")
    checkpoints.mark(folder, SETTINGS, list(files_in(folder)))
    return folder


def write_checkpoints(output_dir: Path, complete: Iterable[int], incomplete: Iterable[int] = ()) -> None:
    for step in complete:
        write_checkpoint(output_dir, step)
    for step in incomplete:
        fill(output_dir / f"checkpoint-{step}")


def steps_in(output_dir: Path) -> list[int]:
    return [checkpoints.step_of(folder) for folder in checkpoints.folders_in(str(output_dir))]


def mark_again(folder: Path) -> None:
    checkpoints.mark(folder, SETTINGS, [name for name in files_in(folder) if name != checkpoints.MARKER])


def test_a_complete_checkpoint_has_no_fault_whatever_else_is_put_there(tmp_path: Path):
    folder = write_checkpoint(tmp_path)
    assert checkpoints.fault_of(folder) is None
    (folder / "notes.txt").write_text("good one")
    assert checkpoints.fault_of(folder) is None


def empty_a_tensor(folder: Path) -> None:
    save_weights(folder / "model.safetensors", SHAPES | {"transformer.h.1.weight": (0, 4), "lm_head.weight": (0,)})
    mark_again(folder)


def write_zeros(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))


def empty_before_the_marker(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    mark_again(folder)


def write_over(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "complete.json").write_text(content)


UNREADABLE = "its complete.json cannot be read: "
FAULTS = {
    "no marker": (lambda f: (f / "complete.json").unlink(), "it has no complete.json, so saving it did not finish"),
    "marker is no JSON": (write_over("yes"), UNREADABLE + "Expecting value"),
    "marker is empty": (write_over(""), UNREADABLE + "Expecting value"),
    "marker is cut off": (write_over('{"files": {"model.safetensors": 1'), UNREADABLE + "Expecting ',' delimiter"),
    "marker is no text": (lambda f: (f / "complete.json").write_bytes(b"\xff\xfe"), UNREADABLE + "'utf-8' codec"),
    **{
        f"marker is {marker}": (write_over(marker), UNREADABLE + "it lists no files with their sizes")
        for marker in (
            *("[]", '["files"]', "5", "1.5", '"files"', "null", "true", "{}", '{"settings": {}}', '{"files": null}'),
            *('{"files": []}', '{"files": ["model.safetensors"]}', '{"files": "model.safetensors"}', '{"files": 1}'),
            *(f'{{"files": {{"model.safetensors": {size}}}}}' for size in ("null", '"100"', "1.5", "[]", "{}")),
            '{"files": {"model.safetensors": 100, "latest": null}}',
        )
    },
    "marker lists no file": (write_over('{"files": {}, "settings": {}}'), "it has no weights"),
    "marker has no settings": (write_over('{"files": {"model.safetensors": 1}}'), UNREADABLE + "it lists no files"),
    "no weights": (lambda f: checkpoints.mark(f, SETTINGS, ["config.json"]), "it has no weights"),
    "weights are gone": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "a nested file is gone": (lambda f: (f / "global_step5/0/optim.pt").unlink(), "global_step5/0/optim.pt is missing"),
    "a file is cut off": (lambda f: (f / "latest").write_text("xx"), "latest has 2 of its 8 bytes"),
    "a file has grown": (lambda f: (f / "latest").write_text("x" * 1234), "latest has 1,234 of its 8 bytes"),
    "weights are emptied": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors has 0 of its "),
    "weights are zeros": (write_zeros, "model.safetensors cannot be read: Error while deserializing header"),
    "weights were empty": (empty_before_the_marker, "model.safetensors cannot be read: Error while deserializing"),
    "tensors are empty": (empty_a_tensor, "2 tensors are empty, such as lm_head.weight"),
}


@pytest.mark.parametrize(("damage", "said"), FAULTS.values(), ids=FAULTS)
def test_each_fault_has_its_own_line(tmp_path: Path, damage: Callable[[Path], object], said: str):
    folder = write_checkpoint(tmp_path)
    damage(folder)
    fault = checkpoints.fault_of(folder)
    assert fault.startswith(said) and "\n" not in fault


@pytest.mark.parametrize(
    ("saved", "fault"),
    [
        (SHAPES, None),
        ({}, "2 tensors are missing or unexpected, such as transformer.h.0.weight"),
        ({"transformer.h.0.weight": (3, 4)}, "1 tensors are missing or unexpected, such as transformer.ln_f.weight"),
        (SHAPES | {"lm_head.weight": (3, 4)}, "1 tensors are missing or unexpected, such as lm_head.weight"),
        (SHAPES | {"transformer.h.0.weight": (4, 3)}, "transformer.h.0.weight has the shape (4, 3), not (3, 4)"),
        (SHAPES | {"transformer.ln_f.weight": (0,)}, "1 tensors are empty, such as transformer.ln_f.weight"),
    ],
    ids=["as they are", "none", "one missing", "a head too many", "another shape", "empty"],
)
def test_weights_are_those_that_the_model_saves(tmp_path: Path, saved: dict, fault: str | None):
    save_weights(tmp_path / "model.safetensors", saved)
    assert checkpoints.fault_of_weights(tmp_path, SHAPES) == fault


def test_the_tensors_of_all_shards_are_counted(tmp_path: Path):
    assert checkpoints.fault_of_weights(tmp_path, SHAPES).startswith("2 tensors are missing")
    for number, name in enumerate(SHAPES, 1):
        save_weights(tmp_path / f"model-{number:05d}-of-00002.safetensors", {name: SHAPES[name]})
    assert checkpoints.fault_of_weights(tmp_path, SHAPES) is None
    second = tmp_path / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:20])
    assert checkpoints.fault_of_weights(tmp_path, SHAPES).startswith(f"{second.name} cannot be read: ")
    second.unlink()
    assert "transformer.ln_f.weight" in checkpoints.fault_of_weights(tmp_path, SHAPES)


def test_checkpoints_are_sorted_by_number_and_nothing_else_is_one(tmp_path: Path):
    write_checkpoints(tmp_path, [10], incomplete=[9, 100])
    for name in ("checkpoint-x", "checkpoint-", "checkpoint-1-old", "unfinished/checkpoint-3", "my-checkpoint-4"):
        fill(tmp_path / name)
    for step in ("007", "00", "07", "-7", "7.0", "7 "):
        fill(tmp_path / f"checkpoint-{step}")
    for name in ("checkpoint-7.zip", "checkpoint-7"):
        (tmp_path / name).write_text("x")
    assert checkpoints.folders_in(str(tmp_path)) == [tmp_path / f"checkpoint-{step}" for step in (9, 10, 100)]


def test_incomplete_checkpoints_are_left_aside_with_a_line_each(tmp_path: Path, capfd: pytest.CaptureFixture):
    write_checkpoints(tmp_path, [9, 10], incomplete=[8, 11])
    (tmp_path / "checkpoint-8" / "complete.json").write_text("[]")
    assert checkpoints.complete_steps(str(tmp_path)) == [9, 10]
    assert capfd.readouterr() == ("", "")
    assert checkpoints.complete_steps(str(tmp_path), tell=True) == [9, 10]
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith(f"{tmp_path}/checkpoint-8 is incomplete and skipped: its complete.json cannot be")
    assert second.startswith(f"{tmp_path}/checkpoint-11 is incomplete and skipped: it has no complete.json")


def test_the_newest_is_the_complete_one_of_most_steps(tmp_path: Path):
    write_checkpoints(tmp_path, [9, 10], incomplete=[11])
    assert checkpoints.newest(str(tmp_path)) == tmp_path / "checkpoint-10"
    assert checkpoints.what_is_left(str(tmp_path)) == f"{tmp_path}/checkpoint-10 is complete"
    assert f"--model_name_or_path {tmp_path}/checkpoint-10 " in checkpoints.where_to_restart(str(tmp_path))


def test_without_a_complete_one_nothing_is_left(tmp_path: Path):
    assert checkpoints.complete_steps(str(tmp_path / "not there"), tell=True) == []
    write_checkpoints(tmp_path, [], incomplete=[11])
    assert checkpoints.newest(str(tmp_path)) is None
    assert checkpoints.what_is_left(str(tmp_path)) == "there is no complete checkpoint"
    assert checkpoints.where_to_restart(str(tmp_path)) == "there is no complete checkpoint to start from"


def finish(output_dir: Path, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Path:
    return checkpoints.finish(output_dir / "unfinished" / "checkpoint-5", str(output_dir), shapes, SETTINGS)


def test_a_finished_checkpoint_is_marked_with_the_size_of_every_file(tmp_path: Path):
    written = files_in(fill(tmp_path / "unfinished" / "checkpoint-5"))
    (tmp_path / "unfinished" / "leftover").mkdir()
    folder = finish(tmp_path)
    assert folder == tmp_path / "checkpoint-5" and checkpoints.fault_of(folder) is None
    marker = json.loads((folder / "complete.json").read_text())
    assert marker["files"] == written and len(written) == 7
    assert marker["settings"] == SETTINGS
    assert marker["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(files_in(folder)) == {*written, "complete.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_an_earlier_incomplete_one_of_the_same_name_is_replaced(tmp_path: Path):
    (fill(tmp_path / "checkpoint-5") / "old.pt").write_text("old")
    fill(tmp_path / "unfinished" / "checkpoint-5")
    folder = finish(tmp_path)
    assert checkpoints.fault_of(folder) is None and not (folder / "old.pt").exists()


def test_wrong_weights_are_not_given_the_name_of_a_checkpoint(tmp_path: Path):
    write_checkpoint(tmp_path, 4)
    written = files_in(fill(tmp_path / "unfinished" / "checkpoint-5"))
    with pytest.raises(UserError) as caught:
        finish(tmp_path, SHAPES | {"lm_head.weight": (3, 4)})
    assert "was not saved correctly: 1 tensors are missing or unexpected, such as lm_head.weight" in str(caught.value)
    assert f"{tmp_path}/checkpoint-4 is complete" in str(caught.value)
    assert steps_in(tmp_path) == [4]
    assert files_in(tmp_path / "unfinished" / "checkpoint-5") == written


def test_a_kill_after_the_rename_leaves_an_incomplete_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_checkpoint(tmp_path, 4)
    written = files_in(fill(tmp_path / "unfinished" / "checkpoint-5"))
    monkeypatch.setattr(checkpoints, "mark", kill)
    with pytest.raises(KilledError):
        finish(tmp_path)
    assert files_in(tmp_path / "checkpoint-5") == written
    assert "has no complete.json" in checkpoints.fault_of(tmp_path / "checkpoint-5")
    assert checkpoints.newest(str(tmp_path)) == tmp_path / "checkpoint-4"


def test_a_kill_before_the_rename_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill(tmp_path / "unfinished" / "checkpoint-5")
    monkeypatch.setattr(Path, "rename", kill)
    with pytest.raises(KilledError):
        finish(tmp_path)
    assert steps_in(tmp_path) == []
    assert "complete.json" not in files_in(tmp_path / "unfinished" / "checkpoint-5")


def test_a_kill_while_the_marker_is_written_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = fill(tmp_path / "checkpoint-5")
    monkeypatch.setattr(checkpoints, "_to_disk", kill)
    with pytest.raises(KilledError):
        mark_again(folder)
    assert "has no complete.json" in checkpoints.fault_of(folder)


def test_every_file_is_on_the_disk_before_the_marker_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    unfinished, folder = fill(tmp_path / "unfinished" / "checkpoint-5"), tmp_path / "checkpoint-5"
    brought = set()

    def note(path: Path) -> None:
        marked = "marked" if (folder / "complete.json").exists() else "renamed"
        brought.add(("written" if unfinished.exists() else marked, path))

    monkeypatch.setattr(checkpoints, "_to_disk", note)
    written = {("written", unfinished / name) for name in files_in(unfinished)}
    finish(tmp_path)
    assert written < brought
    assert {("renamed", tmp_path), ("renamed", folder / "complete.json.part"), ("marked", folder)} < brought


@pytest.mark.parametrize("spoilt", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_only_a_folder_that_plain_transformers_reads_is_trusted(make_model, tmp_path, spoilt):
    folder = tmp_path / "out" / "unfinished" / "checkpoint-5"
    shutil.copytree(make_model("bloom-tiny"), folder)
    assert checkpoints.fault_of_settings(folder) is None
    write_checkpoint(tmp_path / "out", 4)
    (folder / spoilt).write_text('{"model_type": "bl')
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    with pytest.raises(UserError) as caught:
        checkpoints.finish(folder, str(tmp_path / "out"), shapes, {})
    said = str(caught.value)
    assert said.startswith(f"{folder} was not saved correctly: its configuration or tokenizer does not load: ")
    assert said.endswith(f"; {tmp_path}/out/checkpoint-4 is complete") and "\n" not in said


def test_an_adapters_configuration_is_read_by_peft(make_model, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(make_model("bloom-tiny")), LoraConfig(r=2))
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(make_model("bloom-tiny") / name, tmp_path)
    assert checkpoints.fault_of_settings(tmp_path) is None
    (tmp_path / "adapter_config.json").write_text("{")
    assert checkpoints.fault_of_settings(tmp_path).startswith("its configuration or tokenizer does not load: ")
