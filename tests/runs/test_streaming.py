"""train_sft.py --streaming True through its command line: what it refuses, what it keeps, and how it goes on."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import train_sft
from sft.program import run_program
from support.project import PROJECT


def task(number: int) -> dict[str, str]:
    return {
        "instruction": f"第{number}题" + "问" * (number % 7),
        "output": "答" * (1 + number % 11) + "天地玄黄"[number % 4],
    }


def conversation(number: int) -> dict[str, list]:
    texts = [f"第{number}题第{turn}句" for turn in range(2 + number % 4 * 2)]
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def write(path: Path, *records: dict | str) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder of 60 rows in two shapes, one row of which is refused."""
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "tasks.jsonl", *map(task, range(30)))
    write(folder / "conversations.jsonl", *map(conversation, range(29)), "bad")
    return folder


@pytest.fixture
def arguments(make_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that gives the arguments of a streamed run into a folder."""

    def arguments(data: Path, output: Path, *flags: object) -> list[str]:
        given = ["--model_name_or_path", make_model("bloom-tiny"), "--data_path", data, "--output_dir", output]
        given += [
            "--streaming",
            "True",
            "--learning_rate",
            1e-2,
            "--logging_steps",
            1,
            "--cache_dir",
            tmp_path / "cache",
        ]
        return list(map(str, ["train_sft.py", *given, *flags]))

    return arguments


@pytest.fixture
def refused(arguments: Callable, tmp_path: Path, monkeypatch, capfd) -> Callable[..., str]:
    """Return a function that runs the program in this process to its error, and gives the line it prints of it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def refused(data: Path, *flags: object) -> str:
        given = arguments(data, tmp_path / "run", "--use_cpu", "True", "--report_to", "none", *flags)
        monkeypatch.setattr(sys, "argv", given)
        with pytest.raises(SystemExit) as ended:
            run_program(train_sft.main)
        for number, handler in handlers.items():
            signal.signal(number, handler)  # where training had begun
        assert ended.value.code == 2
        [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert not list((tmp_path / "run").rglob("*.safetensors"))
        return line

    return refused


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "needs --max_steps"),
        (["--num_train_epochs", 3], "needs --max_steps"),
        (["--max_steps", 3, "--eval_fraction", 0.1], "leave out --eval_fraction"),
        (["--max_steps", 3, "--dedup", "True"], "leave out --dedup"),
        (["--max_steps", 3, "--dataloader_num_workers", 2], "leave out --dataloader_num_workers"),
        (["--max_steps", 3, "--check_data", "True"], "--check_data"),
    ],
)
def test_what_does_not_go_with_streaming_is_refused(flags, said, refused, data, tmp_path):
    line = refused(data, *flags)
    assert line.startswith("error: --streaming True ") and said in line
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", ["", "bad\n" * 1500, "[]"])
def test_without_a_row_the_run_ends(content, refused, tmp_path):
    (tmp_path / "rows.json").write_text(content)
    line = refused(tmp_path / "rows.json", "--max_steps", 3, "--max_bad_fraction", 1)
    assert line.startswith(f"error: there are no rows to train on in {tmp_path}")


def test_too_many_bad_rows_end_the_run_and_are_listed(refused, data, tmp_path):
    line = refused(data, "--max_steps", 3)
    notes, place = tmp_path / "run" / "data_report.jsonl", f"{data / 'conversations.jsonl'}:30"
    assert line.startswith("error: 1 of the first 60 rows were refused, more than --max_bad_fraction 0.01; fix them")
    assert str(notes) in line
    assert [json.loads(each)["place"] for each in notes.read_text(encoding="utf-8").splitlines()] == [place]


# -------------------------------------------------------------------------------------------------------- real programs


def logged(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def finish(run: Callable, arguments: list[str], *launcher: str) -> str:
    result = run(*launcher, *arguments)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout


def kill_behind(checkpoint: Path, arguments: list[str]) -> None:
    """Start a run and kill it when a checkpoint of it is complete."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *arguments], cwd=PROJECT, **silent)
    while not (checkpoint / "complete.json").exists():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (checkpoint.parent / "model.safetensors").exists(), "finished before it was killed"


@pytest.mark.slow
def test_killed_and_started_again_equals_never_interrupted(run, arguments, data, tmp_path):
    held_out = write(tmp_path / "held_out.jsonl", *map(task, range(100, 103)), "bad")
    flags = ["--max_steps", 36, "--save_steps", 12, "--per_device_train_batch_size", 4, "--max_bad_fraction", 0.5]
    flags += ["--packing", "True", "--model_max_length", 600, "--eval_data_path", held_out]
    flags += ["--eval_strategy", "steps", "--eval_steps", 30]
    printed = finish(run, arguments(data, tmp_path / "whole", *flags))
    kill_behind(tmp_path / "killed" / "checkpoint-12", arguments(data, tmp_path / "killed", *flags))
    again = finish(run, arguments(data, tmp_path / "killed", *flags))
    assert "resuming from" in again and "/checkpoint-" in again
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert logged(whole) == logged(killed) and len(logged(whole)) == 36
    assert "examples streamed from 2 files, " in printed and "36 steps" in printed
    assert "60 rows read while training, 1 refused" in (whole / "README.md").read_text(encoding="utf-8")
    listed = [json.loads(line)["place"] for line in (killed / "data_report.jsonl").open(encoding="utf-8")]
    assert listed == [f"{held_out}:4", f"{data / 'conversations.jsonl'}:30"]
    [tokenised] = (tmp_path / "cache" / "tokenised").glob("*/counts.json")
    assert json.loads(tokenised.read_text(encoding="utf-8"))["rows"] == 4, "more than the held-out rows are kept"


@pytest.mark.slow
def test_two_ranks_train_on_the_rows_of_one_process(run, arguments, tmp_path):
    file = write(tmp_path / "rows.jsonl", *map(task, range(29)))
    flags = ["--max_steps", 20, "--train_sampling_strategy", "sequential", "--save_strategy", "no", "--use_cpu", "True"]
    flags += ["--adam_epsilon", 1e-3]  # with 1e-8 a gradient of rounding alone would move a weight
    finish(run, arguments(file, tmp_path / "one", *flags, "--per_device_train_batch_size", 2))
    two = arguments(file, tmp_path / "two", *flags, "--per_device_train_batch_size", 1)
    printed = finish(run, two, "-m", "sft.training.launch", "--cpu", "--ranks", "2")
    assert "2 examples per step" in printed and printed.count("examples streamed from 1 files") == 1
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-5)
    assert len(set(logged(tmp_path / "one"))) == 20
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_too_many_bad_rows_end_two_ranks_with_one_line(run, arguments, data, tmp_path):
    given = arguments(data, tmp_path / "run", "--max_steps", 3, "--use_cpu", "True", "--per_device_train_batch_size", 1)
    result = run("-m", "sft.training.launch", "--cpu", "--ranks", "2", *given)
    assert result.returncode == 2, result.stderr[-3000:]
    errors = [line for line in result.stderr.splitlines() if "rror" in line]
    assert len(errors) == 1 and errors[0].startswith("error: 1 of the first 60 rows were refused, more than"), errors
