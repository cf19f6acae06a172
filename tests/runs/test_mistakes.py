"""train_sft.py with a mistake on its command line or in its data: one line that says what to do, and exit code 2."""

import errno
import json
import sys
from pathlib import Path

import pytest

from support.project import SAMPLE

DATA = SAMPLE / "own_with_input.json"
GOOD_ROW = '{"instruction": "a", "input": "", "output": "b"}\n'
EMPTY_ROW = '{"instruction": "a", "output": ""}\n'


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def without_weights(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


MISTAKES = {  # name: (flags that replace the good ones, what the line must say)
    "missing data": (lambda t, m: {"--data_path": t / "nowhere"}, "does not exist"),
    "empty data folder": (lambda t, m: {"--data_path": (t / "empty")}, "contains no .json"),
    "unknown flag": (lambda t, m: {"--learnin_rate": "1"}, "type --learning_rate"),
    "value of the wrong type": (lambda t, m: {"--learning_rate": "fast"}, "--learning_rate"),
    "flags that contradict": (
        lambda t, m: {"--load_best_model_at_end": "True", "--save_steps": "3"},
        "type --eval_strategy steps --save_strategy steps",
    ),
    "folder without config.json": (lambda t, m: {"--model_name_or_path": t / "empty"}, "without config.json"),
    "model out of reach": (lambda t, m: {"--model_name_or_path": "nobody/nothing"}, "give the path of a downloaded"),
    "no causal language model": (
        lambda t, m: {"--model_name_or_path": write(t / "t5/config.json", '{"model_type": "t5"}').parent},
        "expected a causal language model",
    ),
    "output is a file": (lambda t, m: {"--output_dir": write(t / "taken", "mine")}, "is a file"),
    "output is the model": (lambda t, m: {"--output_dir": m}, "is the model folder itself"),
    "tracker that is not installed": (lambda t, m: {"--report_to": "wandb"}, "wandb is not installed"),
    "length below the template": (lambda t, m: {"--model_max_length": "20"}, "--model_max_length 20 is too short"),
    "share out of range": (lambda t, m: {"--eval_fraction": "2"}, "--eval_fraction 2.0"),
    "layers compiled twice": (
        lambda t, m: {"--compile_blocks": "True", "--torch_compile": "True"},
        "--compile_blocks does not go with --torch_compile",
    ),
    "layers compiled and recomputed": (
        lambda t, m: {"--compile_blocks": "True", "--activation_checkpointing": "True"},
        "--compile_blocks does not go with --activation_checkpointing",
    ),
    "strategy without rows": (lambda t, m: {"--eval_strategy": "steps"}, "add --eval_data_path FILE or"),
    "warmup beyond the end": (
        lambda t, m: {"--warmup_steps": "999", "--max_steps": "20"},
        "is beyond the last step, 20",
    ),
    "no epoch": (lambda t, m: {"--num_train_epochs": "0"}, "expected a number above 0"),
    "names of another project": (
        lambda t, m: {"--lora_rank": "8", "--stage": "sft"},
        "--lora_rank (type --lora_r); --st",
    ),
    "missing flag": (lambda t, m: {"--data_path": None}, "--data_path"),
}
# Name: (rows, further flags, what the line must say, what is said of the refused rows before it).
BAD_DATA = {
    "no output field": (
        GOOD_ROW + '{"instruction": "a"}\n',
        {},
        "has 1 of 2 rows refused, more than --max_bad_fraction 0.01",
        ':2: no output found ("instruction" is the instruction); expected a key such as output',
    ),
    "no instruction field": (
        '[{"title": "a", "output": "b"}]',
        {},
        "has 1 of 1 rows refused, more than --max_bad_fraction 0.01",
        '[0]: no instruction found ("output" is the output; other keys: "title"); type --columns instruction=title',
    ),
    "not JSON": (GOOD_ROW + "{oops\n", {}, "has 1 of 2 rows refused, more than", ":2: invalid JSON ("),
    "an array that breaks off": (
        f"[{GOOD_ROW}",
        {"--max_bad_fraction": "0.4"},
        "has 1 of 2 rows refused",
        "[1]: the rest of the file is unreadable: ",
    ),
    "only empty outputs": (EMPTY_ROW, {}, "has 1 of 1 rows refused, more than", ':1: the "output" is empty'),
    "only empty outputs, which is allowed": (
        EMPTY_ROW,
        {"--max_bad_fraction": "1"},
        "has no rows to train on: all 1 were refused",
        ':1: the "output" is empty',
    ),
    "nothing": ("\n", {}, "has no rows to train on; expected rows such as", ""),
}


def end_of(flags: dict[str, object], monkeypatch: pytest.MonkeyPatch, capfd) -> tuple[str, str]:
    """Run train_sft.py in this process to its end with exit code 2; return the line it ends with, and its output."""
    import train_sft
    from sft.program import run_program

    words = [str(word) for flag in flags.items() if flag[1] is not None for word in flag]
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *words])
    capfd.readouterr()  # what making the model printed
    with pytest.raises(SystemExit) as ended:
        run_program(train_sft.main)
    assert ended.value.code == 2
    printed, errors = capfd.readouterr()
    lines = errors.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0], printed


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name, make_model, cache_dir, tmp_path, monkeypatch, capfd):
    (tmp_path / "empty").mkdir()
    output = tmp_path / "output"
    make_flags, expected = MISTAKES[name]
    model = make_model("bloom-tiny")
    flags = {"--model_name_or_path": model, "--data_path": DATA, "--output_dir": output, "--cache_dir": cache_dir}
    flags |= make_flags(tmp_path, model)
    before = {file: file.read_bytes() for file in model.iterdir()}
    line, printed = end_of(flags, monkeypatch, capfd)
    assert expected in line and printed == ""
    assert not output.exists()
    assert not (tmp_path / "taken").exists() or (tmp_path / "taken").read_text() == "mine"
    assert before == {file: file.read_bytes() for file in model.iterdir()}


def test_a_model_without_weights_is_one_line_and_exit_code_2(make_model, cache_dir, tmp_path, monkeypatch, capfd):
    output, model = tmp_path / "output", without_weights(make_model("bloom-tiny"), tmp_path / "bare")
    flags = {"--model_name_or_path": model, "--data_path": DATA, "--output_dir": output, "--cache_dir": cache_dir}
    line, printed = end_of(flags, monkeypatch, capfd)
    assert "weights" in line
    assert printed.startswith("data     54 rows read: 54 kept") and len(printed.splitlines()) == 2
    assert {file.name for file in output.iterdir()} <= {"data_report.jsonl", ".in-use"}


def test_a_disk_without_room_for_the_data_report_is_one_line(make_model, cache_dir, tmp_path, monkeypatch, capfd):
    import train_sft

    def fill(reports, path: Path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_sft, "write_data_report", fill)
    flags = {"--model_name_or_path": make_model("bloom-tiny"), "--data_path": DATA, "--cache_dir": cache_dir}
    line, _ = end_of({**flags, "--output_dir": tmp_path / "output"}, monkeypatch, capfd)
    assert f"{tmp_path / 'output' / 'data_report.jsonl'} cannot be written: " in line and "No space left" in line


@pytest.mark.parametrize("flag", ["--data_path", "--eval_data_path"])
@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_one_line_and_exit_code_2(name, flag, make_model, cache_dir, tmp_path, monkeypatch, capfd):
    text, more_flags, expected, refused = BAD_DATA[name]
    file, output = write(tmp_path / "a.json", text), tmp_path / "output"
    flags = {"--model_name_or_path": make_model("bloom-tiny"), "--data_path": DATA, "--output_dir": output}
    flags |= {"--cache_dir": cache_dir, **more_flags, flag: file}
    line, printed = end_of(flags, monkeypatch, capfd)
    assert line.startswith(f"error: {flag} {file} {expected}")
    assert line.endswith(f"; {output / 'data_report.jsonl'} lists what was refused")
    assert [file.name for file in output.iterdir()] == ["data_report.jsonl"]
    entries = [json.loads(entry) for entry in (output / "data_report.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(entries) == bool(refused)
    for entry in entries:
        assert entry["note"].startswith("refused: ")
        told = f"refused  {entry['place']}: {entry['note'].removeprefix('refused: ')}"
        assert told.startswith(f"refused  {file}{refused}") and told in printed.splitlines()


def test_a_rank_that_is_not_the_first_leaves_the_folder_to_its_run(make_model, cache_dir, tmp_path, monkeypatch):
    import train_sft
    from sft.model.load import load_tokenizer
    from sft.program import UserError

    (tmp_path / ".in-use").touch()
    monkeypatch.setattr(train_sft.TrainingArguments, "process_index", 1)
    args = train_sft.TrainingArguments(output_dir=str(tmp_path), cache_dir=str(cache_dir), use_cpu=True, report_to=[])
    data_args = train_sft.DataArguments(data_path=str(write(tmp_path / "a" / "a.json", EMPTY_ROW)))
    with pytest.raises(UserError, match="has 1 of 1 rows refused"):
        train_sft.make_data(data_args, args, load_tokenizer(str(make_model("bloom-tiny"))))
    assert sorted(file.name for file in tmp_path.iterdir()) == [".in-use", "a"]


def test_a_mistake_prints_no_traceback_from_the_shell(run, make_model, tmp_path):
    given = ["--model_name_or_path", make_model("bloom-tiny"), "--data_path", DATA, "--output_dir", tmp_path / "o"]
    result = run("train_sft.py", *given, "--warmup_ratio", "0.03")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: unknown flag --warmup_ratio; type --warmup_steps with the ratio, such as 0.03\n"
