"""A run has ended once its result is of the last step, whatever checkpoints are left."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from sft.training import checkpoints
from sft.training.resume import has_ended


def arguments(output_dir: Path, keeps_the_best: bool = True) -> SimpleNamespace:
    return SimpleNamespace(output_dir=str(output_dir), load_best_model_at_end=keeps_the_best)


def a_checkpoint(output_dir: Path, step: int) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("made", "weights", "step", "expected"),
    [(24, True, 6, True), (30, True, 6, True), (23, True, 6, False), (24, False, 6, False), (24, True, 24, False)],
)
def test_a_run_has_ended_if_its_result_is_of_the_last_step(tmp_path, made, weights, step, expected):
    folder = a_checkpoint(tmp_path, step)
    (tmp_path / checkpoints.STATE).write_text(json.dumps({"global_step": made}))
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    if not weights:
        (tmp_path / "model.safetensors").write_bytes(b"cut")
    assert has_ended(arguments(tmp_path), folder, 24) is expected
    assert not has_ended(arguments(tmp_path), None, 24)
    assert not has_ended(arguments(tmp_path, keeps_the_best=False), folder, 24)


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"global_step": null}'])
def test_a_state_that_says_no_step_is_of_no_ended_run(tmp_path, state):
    (tmp_path / checkpoints.STATE).write_text(state)
    assert not has_ended(arguments(tmp_path), a_checkpoint(tmp_path, 6), 24)
    assert not has_ended(arguments(tmp_path / "nowhere"), None, 24)
