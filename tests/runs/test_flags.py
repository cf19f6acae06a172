"""Flags of transformers that work do so through the command line; see support/flag_table.py for what is right."""

import shlex
from pathlib import Path

import pytest

from support.flag_table import KWARGS, TABLE, WORKS, WORKS_ALONE
from support.plain_loop import logged
from support.project import SAMPLE

ALONE = [words for cases in TABLE.values() for words, says in cases.items() if says is WORKS_ALONE]


def flags_of(words: str) -> set[str]:
    return {word.replace("--no_", "--") for word in words.split() if word.startswith("--")}


def commands() -> list[str]:
    """Return as few commands as hold every case that works, each flag at most once in a command."""
    joined: list[list[str]] = []
    for words in (words for cases in TABLE.values() for words, says in cases.items() if says == WORKS):
        room = next((each for each in joined if not flags_of(words) & flags_of(" ".join(each))), None)
        if room is None:
            joined.append([words])
        else:
            room.append(words)
    return [" ".join(each) for each in joined]


COMMANDS = commands()


def train(run, model: Path, output: Path, words: str) -> str:
    given = ["--model_name_or_path", model, "--data_path", SAMPLE / "own_with_input.json", "--output_dir", output]
    words = shlex.split(words)
    if not {"--max_steps", "--num_train_epochs"} & {*words}:
        words += ["--max_steps", "4"]
    result = run("train_sft.py", *given, *words)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (output / "model.safetensors").is_file()
    return result.stdout


@pytest.mark.parametrize(
    "number", [0, *(pytest.param(each, marks=pytest.mark.slow) for each in range(1, len(COMMANDS)))]
)
def test_flags_that_work_train_a_model(number: int, run, make_model, tmp_path):
    train(run, make_model("bloom-tiny"), tmp_path / "output", COMMANDS[number])


@pytest.mark.slow
@pytest.mark.parametrize("words", ALONE)
def test_a_flag_that_works_alone_trains_a_model(words: str, run, make_model, tmp_path):
    train(run, make_model("bloom-tiny"), tmp_path / "output", words)


def test_settings_of_a_scheduler_reach_it(run, make_model, tmp_path):
    words = f"--learning_rate 1e-3 --logging_steps 1 --lr_scheduler_type cosine_with_min_lr {KWARGS}"
    train(run, make_model("bloom-tiny"), tmp_path, words + """ '{"min_lr_rate": 0.5}'""")
    rates = logged(tmp_path, "learning_rate")
    assert rates[0] == 1e-3 and 0.5e-3 < rates[-1] < 0.7e-3
