"""The newest checkpoint that every host has, and none that was made with other settings."""

import copy
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, Features, List, Value
from safetensors.torch import save_file

from sft.data import sequences
from sft.data.packing import PackedSequences
from sft.data.sequences import SampleSequences, Sequences
from sft.program import UserError
from sft.tools.random_model import SHAPES
from sft.training import checkpoints, resume
from sft.training.arguments import ModelArguments, TrainingArguments
from sft.training.resume import RunSettings, check_settings, find, settings_of
from support.project import PROJECT

LENGTHS = [3, 5, 2, 4, 6, 3, 3]
LIST = List(Value("int32"))
FEATURES = Features({"input_ids": LIST, "lengths": LIST, "length": Value("int32")})


def columns_of(lengths: list[int]) -> dict[str, list]:
    """Return examples that no two tokens of which are equal."""
    ids = [[10 * index + place for place in range(length)] for index, length in enumerate(lengths)]
    return {"input_ids": ids, "lengths": [[1, length - 1] for length in lengths], "length": lengths}


def dataset_of(columns: dict[str, list]) -> Dataset:
    return Dataset.from_dict(columns, features=FEATURES)


@pytest.fixture
def columns() -> dict[str, list]:
    return columns_of(list(LENGTHS))


@pytest.fixture
def make_args(tmp_path: Path) -> Callable[..., TrainingArguments]:
    """Return a function that gives the arguments of a run, as the command line sets them."""

    def make(**flags: object) -> TrainingArguments:
        return TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[], **flags)

    return make


# ------------------------------------------------------------------------------------------------------------ settings


def of_run(
    args: TrainingArguments, data: Sequences | Dataset, shape: str = "bloom-tiny", **lora: object
) -> RunSettings:
    """Return the settings of a run of all weights, unless LoRA's flags are given."""
    data = SampleSequences(data) if isinstance(data, Dataset) else data
    return settings_of(ModelArguments("m", **lora), args, data, SHAPES[shape], num_steps=24)


def data_hash(args: TrainingArguments, data: Dataset) -> str:
    return of_run(args, data).data_fingerprint


def test_the_same_run_has_the_same_settings(make_args, columns):
    assert of_run(make_args(), dataset_of(copy.deepcopy(columns))) == of_run(make_args(), dataset_of(columns))


def test_rows_that_were_selected_are_the_same_as_if_they_stood_alone(make_args, columns):
    kept = [5, 1, 2]
    alone = dataset_of({name: [values[index] for index in kept] for name, values in columns.items()})
    assert data_hash(make_args(), dataset_of(columns).select(kept)) == data_hash(make_args(), alone)


def with_another(columns: dict[str, list], what: str) -> dict[str, list]:
    columns = copy.deepcopy(columns)
    if what == "token":
        columns["input_ids"][3][1] += 1
    elif what == "label":
        columns["lengths"][3] = [2, 2]
    elif what == "order":
        columns = {name: [values[5], *values[1:5], values[0], values[6]] for name, values in columns.items()}
    elif what == "example":
        columns = {name: values[:-1] for name, values in columns.items()}
    return columns


@pytest.mark.parametrize("what", ["token", "label", "order", "example"])
def test_other_data_has_another_hash(make_args, columns, what):
    # Rows 0 and 5, which change places, are of one length.
    args = make_args()
    assert data_hash(args, dataset_of(with_another(columns, what))) != data_hash(args, dataset_of(columns))


def test_of_much_data_the_lengths_of_all_and_the_tokens_of_some_are_told_apart(make_args, columns, monkeypatch):
    monkeypatch.setattr(sequences, "NUM_HASHED", 3)  # the first, the middle and the last one
    expected = data_hash(make_args(), dataset_of(columns))
    for index in range(len(LENGTHS)):
        changed = copy.deepcopy(columns)
        changed["input_ids"][index][-1] += 1
        assert (data_hash(make_args(), dataset_of(changed)) != expected) == (index in (0, 3, 6))
    changed = columns_of([3, 5, 2, 4, 5, 3, 3])
    assert data_hash(make_args(), dataset_of(changed)) != expected


def test_few_and_many_examples_have_a_hash_that_says_their_number(make_args):
    hashes = {data_hash(make_args(), dataset_of(columns_of([2] * number))) for number in (1, 2, 3, 999, 1000, 1500)}
    assert len(hashes) == 6


FLAGS = {
    "model_max_length": 99,
    "seed": 7,
    "data_seed": 7,
    "train_sampling_strategy": "sequential",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "neftune_noise_alpha": 5.0,
    "warmup_steps": 0.03,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "optim": "adamw_torch",
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "bf16": True,
}


def differences(one: RunSettings, other: RunSettings) -> set[str]:
    return {name for name, *_ in one.differences(other.named())}


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_among_the_settings_by_its_name(make_args, columns, name):
    plain, changed = (of_run(args, dataset_of(columns)) for args in (make_args(), make_args(**FLAGS)))
    assert f"--{name}" in differences(plain, changed)
    assert changed.named()[f"--{name}"] == FLAGS[name]


def test_flags_that_change_no_number_are_not_among_the_settings(make_args, columns):
    other = make_args(logging_steps=3, save_steps=7, save_total_limit=9, num_train_epochs=9, dataloader_num_workers=1)
    assert of_run(make_args(), dataset_of(columns)) == of_run(other, dataset_of(columns))


def zero(stage: int) -> str:
    return str(PROJECT / f"ds_zero{stage}_config.json")


def test_packing_parameters_and_stage_are_among_the_settings(make_args, columns):
    args, samples = make_args(deepspeed=zero(2)), dataset_of(columns)
    plain = of_run(args, samples)
    assert differences(plain, of_run(args, PackedSequences(samples, 8))) == {"--packing"}
    assert differences(plain, of_run(make_args(deepspeed=zero(3)), samples)) == {"ZERO_STAGE"}
    other = of_run(args, samples, "bloom-tiny-6-heads")
    assert differences(plain, other) == {"parameters", "trained parameters"}
    lora = of_run(args, samples, lora_r=4)
    assert differences(plain, lora) >= {"--lora_r", "trained parameters"} and lora.is_lora and not plain.is_lora
    targets = {"lora_target_modules": ["dense"]}
    assert differences(lora, of_run(args, samples, lora_r=4, **targets)) == {
        "--lora_target_modules",
        "trained parameters",
    }


def test_other_ranks_may_resume_with_as_many_sequences_a_step_but_not_with_zero(make_args, columns, monkeypatch):
    samples = dataset_of(columns)
    sizes = ((4, 1, 1), (1, 2, 2), (1, 4, 1), (2, 1, 1))  # batch, accumulated, processes

    def settings(stage: int) -> list[RunSettings]:
        found = []
        for batch, accumulated, processes in sizes:
            args = make_args(
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulated,
                deepspeed=zero(stage) if stage else None,
            )
            with monkeypatch.context() as patched:
                patched.setattr(TrainingArguments, "world_size", processes)
                found.append(of_run(args, samples))
        return found

    batch, ranks, accumulated, fewer = settings(0)
    assert batch == ranks == accumulated
    assert batch.sequences_per_step == 4 and differences(batch, fewer) == {"rows a step"}
    batch, ranks, accumulated, _ = settings(2)
    assert batch == accumulated and differences(batch, ranks) == {"processes"}


@pytest.mark.parametrize("flags", [{}, FLAGS])
def test_settings_outlive_the_file_they_are_kept_in(make_args, columns, flags, tmp_path):
    settings = of_run(make_args(**flags), dataset_of(columns), lora_r=4, lora_target_modules=["dense"])
    # An enum equals its text and would stand in messages under another name.
    assert repr(json.loads(json.dumps(settings.named()))) == repr(settings.named())
    check_settings(make_checkpoint(tmp_path, 2, settings.named()), settings)


@pytest.mark.parametrize(("schedule", "expected"), [("linear", 24), ("cosine", 24), ("constant", None)])
def test_the_number_of_steps_is_a_setting_where_the_learning_rate_depends_on_it(make_args, columns, schedule, expected):
    settings = of_run(make_args(lr_scheduler_type=schedule), dataset_of(columns))
    assert settings.num_steps == expected and settings.named()["steps"] == expected


# --------------------------------------------------------------------------------------------------------- checkpoints

MARKED = {
    "parameters": 100,
    "the examples' hash": "a1",
    "ZERO_STAGE": 0,
    "rows a step": 4,
    "--seed": 42,
    "--data_seed": None,
    "steps": 6,
}
SETTINGS = RunSettings(
    **{each.name: MARKED.get(each.metadata["flag"]) for each in fields(RunSettings)},
)


def make_checkpoint(
    output_dir: Path, step: int, settings: dict | None = None, state: str | None = "optimizer.pt"
) -> Path:
    """Write a checkpoint of one small tensor, complete as far as its files go."""
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(3)}, folder / "model.safetensors")
    if state:
        (folder / state).write_text("state")
    names = [file.name for file in folder.iterdir()]
    checkpoints.mark(folder, MARKED if settings is None else settings, names)
    return folder


@pytest.mark.parametrize("state", ["optimizer.pt", "latest"])
def test_a_run_with_the_same_settings_may_resume(tmp_path, state):
    check_settings(make_checkpoint(tmp_path, 2, state=state), SETTINGS)


@pytest.mark.parametrize(
    ("field", "value", "same"),
    [
        ("num_parameters", 101, "the same model"),
        ("data_fingerprint", "other", "the same data"),
        ("zero_stage", 2, "ZERO_STAGE 0"),
        ("seed", 43, "--seed 42"),
        ("data_seed", 1, "no --data_seed"),
        ("sequences_per_step", 8, "as many rows a step"),
        (
            "num_steps",
            12,
            "the same --num_train_epochs and --max_steps, since the learning rate depends on their number",
        ),
    ],
)
def test_a_setting_that_differs_is_named_with_both_values(tmp_path, field, value, same):
    folder = make_checkpoint(tmp_path, 2)
    [name] = [each.metadata["flag"] for each in fields(RunSettings) if each.name == field]
    with pytest.raises(UserError) as caught:
        check_settings(folder, replace(SETTINGS, **{field: value}))
    said = str(caught.value)
    assert said.startswith(f"{folder} was made with {name} {MARKED[name]}, and this command has {value}; ")
    assert f"; resume with {same}, or start a new run" in said
    assert f"--model_name_or_path {folder} --output_dir ANOTHER" in said


def test_weights_alone_are_to_start_from(tmp_path):
    folder = make_checkpoint(tmp_path, 2, state=None)
    with pytest.raises(UserError) as caught:
        check_settings(folder, SETTINGS)
    assert f"{folder} has weights but no optimizer state" in str(caught.value)
    assert f"--model_name_or_path {folder} --output_dir ANOTHER" in str(caught.value)


def test_a_setting_that_an_older_checkpoint_does_not_know_is_not_compared(tmp_path):
    assert "--learning_rate" not in MARKED
    check_settings(make_checkpoint(tmp_path, 2), replace(SETTINGS, learning_rate=1.0))


# ----------------------------------------------------------------------------------------------------------- which one


def arguments(output_dir: Path, named: object = None, should_log: bool = True) -> SimpleNamespace:
    named = None if named is None else str(named)
    return SimpleNamespace(output_dir=str(output_dir), resume_from_checkpoint=named, should_log=should_log)


@pytest.mark.parametrize("named", [None, "True", "true"])
def test_without_a_checkpoint_a_run_begins_anew(tmp_path, named):
    (tmp_path / "unfinished" / "checkpoint-2").mkdir(parents=True)
    assert find(arguments(tmp_path, named), SETTINGS, 100) is None
    assert find(arguments(tmp_path / "not there", named), SETTINGS, 100) is None


@pytest.mark.parametrize("named", [None, "True", "true"])
def test_the_newest_one_is_that_of_the_most_steps(tmp_path, named, capfd):
    for step in (10, 9, 2):
        make_checkpoint(tmp_path, step)
    assert find(arguments(tmp_path, named), SETTINGS, 100) == tmp_path / "checkpoint-10"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("should_log", [True, False])
def test_an_incomplete_one_is_skipped_with_a_line(tmp_path, should_log, capfd):
    make_checkpoint(tmp_path, 2)
    incomplete = make_checkpoint(tmp_path, 4)
    (incomplete / "optimizer.pt").write_text("st")
    assert find(arguments(tmp_path, should_log=should_log), SETTINGS, 100) == tmp_path / "checkpoint-2"
    line = f"{incomplete} is incomplete and skipped: optimizer.pt has 2 of its 5 bytes\n"
    assert capfd.readouterr().err == (line if should_log else "")


def test_the_newest_one_of_another_run_is_refused(tmp_path):
    make_checkpoint(tmp_path, 2)
    make_checkpoint(tmp_path, 4, {**MARKED, "--seed": 1})
    with pytest.raises(UserError, match="checkpoint-4 was made with --seed 1, and this command has 42"):
        find(arguments(tmp_path), SETTINGS, 100)


@pytest.mark.parametrize("place", ["run/checkpoint-4", "another/checkpoint-4", "another/checkpoint-9"])
def test_one_that_is_named_is_taken_though_it_lies_elsewhere(tmp_path, place):
    for step in (2, 4):
        make_checkpoint(tmp_path / "run", step)
    for step in (4, 9):
        make_checkpoint(tmp_path / "another", step)
    given = arguments(tmp_path / "run", tmp_path / place)
    assert find(given, SETTINGS, 100) == tmp_path / place
    with pytest.raises(UserError, match=f"{place} was made with --seed 42, and this command has 1"):
        find(given, replace(SETTINGS, seed=1), 100)


@pytest.mark.parametrize("place", ["run/checkpoint-2", "another/checkpoint-3"])
def test_one_that_is_named_and_has_later_ones_is_refused(tmp_path, place):
    make_checkpoint(tmp_path / "another", 3)
    for step in (2, 9, 10):
        make_checkpoint(tmp_path / "run", step)
    with pytest.raises(UserError) as caught:
        find(arguments(tmp_path / "run", tmp_path / place), SETTINGS, 100)
    later = tmp_path / "run" / "checkpoint-10"
    assert str(caught.value).startswith(f"--resume_from_checkpoint {tmp_path / place} is older than {later}, ")
    assert "delete the later ones, or give another --output_dir" in str(caught.value)


@pytest.mark.parametrize("fault", ["not there", "complete.json", "model.safetensors"])
def test_one_that_is_named_and_faulty_is_refused(tmp_path, fault):
    make_checkpoint(tmp_path, 2)
    folder = make_checkpoint(tmp_path, 4)
    named = tmp_path / "checkpoint-6" if fault == "not there" else folder
    if fault != "not there":
        (folder / fault).unlink()
    with pytest.raises(UserError) as caught:
        find(arguments(tmp_path, named), SETTINGS, 100)
    said = str(caught.value)
    assert said.startswith(f"cannot resume from --resume_from_checkpoint {named}: ")
    assert ("model.safetensors is missing" if fault == "model.safetensors" else "it has no complete.json") in said


def test_one_that_is_named_must_have_its_step_in_its_name(tmp_path):
    named = make_checkpoint(tmp_path, 4).rename(tmp_path / "best")
    with pytest.raises(
        UserError, match=f"^--resume_from_checkpoint {named} must be named checkpoint-STEP; rename it back"
    ):
        find(arguments(tmp_path / "run", named), SETTINGS, 100)


@pytest.mark.parametrize("named", [False, True])
def test_one_with_all_its_steps_is_the_result_whatever_the_settings(tmp_path, named):
    folder = make_checkpoint(tmp_path, 4, state=None)
    given = arguments(tmp_path, folder if named else None)
    for num_steps in (4, 3):
        assert find(given, replace(SETTINGS, seed=1), num_steps) == folder
    with pytest.raises(UserError):
        find(given, replace(SETTINGS, seed=1), 5)


@pytest.mark.parametrize(("of_others", "step"), [([[2, 4], [2, 4, 8]], 4), ([[2], [4]], None), ([[8], [2, 8]], 8)])
def test_hosts_resume_from_the_newest_one_that_all_of_them_have(tmp_path, monkeypatch, of_others, step):
    for own in (2, 4, 8):
        make_checkpoint(tmp_path, own)
    asked = []
    monkeypatch.setattr(resume, "gather_object", lambda own: asked.append(own) or [*own, *of_others])
    assert find(arguments(tmp_path), SETTINGS, 100) == (tmp_path / f"checkpoint-{step}" if step else None)
    assert asked == [[[2, 4, 8]]]
