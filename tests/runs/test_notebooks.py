"""Both notebooks, executed cell by cell as Jupyter would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from support.project import PROJECT, SAMPLE

SETS = {  # data set: its file on the hub
    "generated_chat_0.4M": "generated_chat_0.4M.json",
    "school_math_0.25M": "school_math_0.25M.json",
    "train_2M_CN": "train_2M_CN.json",
    "train_1M_CN": "Belle_open_source_1M.json",
    "train_0.5M_CN": "Belle_open_source_0.5M.json",
    "multiturn_chat_0.8M": "multiturn_chat_0.8M.json",
}


def execute(notebook: str, monkeypatch: pytest.MonkeyPatch, **environment: object) -> str:
    """Run a notebook in its own folder; return what its cells printed."""
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    path = PROJECT / notebook
    document = nbformat.read(path, as_version=4)
    NotebookClient(document, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in document.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def lines_of(*files: Path) -> list[dict]:
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def process(monkeypatch: pytest.MonkeyPatch, output: Path, **environment: object) -> str:
    return execute("data_proj/process_data.ipynb", monkeypatch, OUTPUT_FOLDER=output, **environment)


def test_the_sample_becomes_shards_row_for_row(monkeypatch, tmp_path):
    printed = process(monkeypatch, tmp_path, SOURCE="sample", ROWS_PER_SET="none", ROWS_PER_SHARD=20)
    for name, file in {**SETS, "own_with_input": "own_with_input.json"}.items():
        shards = sorted(tmp_path.glob(f"{name}-*.json"))
        assert [shard.name for shard in shards] == [f"{name}-{i:05d}.json" for i in range(3)]
        assert lines_of(*shards) == lines_of(SAMPLE / file)
        assert [len(lines_of(shard)) for shard in shards] == [20, 20, 14]
        row = next(line for line in printed.splitlines() if line.startswith(name))
        assert row.split()[1:4] == ["54", "3", f"{sum(shard.stat().st_size for shard in shards):,}"]
    assert "\\u" not in (tmp_path / "train_2M_CN-00000.json").read_text(encoding="utf-8")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_a_local_copy_of_the_hub_gives_the_first_rows_of_each_set(monkeypatch, tmp_path):
    hub, output = tmp_path / "hub", tmp_path / "output"
    for name, file in SETS.items():
        folder = hub / name if name == "train_2M_CN" else hub  # as `git clone` leaves it, and as files
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes((SAMPLE / file).read_bytes())
    process(monkeypatch, output, SOURCE=hub, ROWS_PER_SET=7)
    for name, file in SETS.items():
        assert lines_of(output / f"{name}-00000.json") == lines_of(SAMPLE / file)[:7]


def test_rows_that_are_none_are_left_out_and_told(monkeypatch, tmp_path):
    hub, output = tmp_path / "hub", tmp_path / "output"
    hub.mkdir()
    rows = (SAMPLE / "school_math_0.25M.json").read_text(encoding="utf-8").splitlines(keepends=True)[:4]
    bad = ["{oops\n", '{"instruction": "问", "input": "", "output": ""}\n']
    file = hub / "school_math_0.25M.json"
    file.write_text("".join([*rows[:2], *bad, *rows[2:]]), encoding="utf-8")
    printed = process(monkeypatch, output, SOURCE=hub, DATASETS="school_math_0.25M", ROWS_PER_SET="none")
    assert lines_of(output / "school_math_0.25M-00000.json") == [json.loads(row) for row in rows]
    assert f"2 rows left out, the first of them {file}:3: invalid JSON" in printed


def test_a_second_run_replaces_its_own_shards_and_nothing_else(monkeypatch, tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text('{"instruction": "a", "output": "b"}\n')
    chosen = {"SOURCE": "sample", "DATASETS": "school_math_0.25M"}
    process(monkeypatch, tmp_path, **chosen, ROWS_PER_SHARD=20)
    printed = process(monkeypatch, tmp_path, **chosen, ROWS_PER_SHARD=50000)
    assert sorted(file.name for file in tmp_path.glob("*.json")) == ["mine.json", "school_math_0.25M-00000.json"]
    assert "not written by this run, and part of the training data: mine.json" in printed


def test_a_file_of_the_users_is_never_replaced(monkeypatch, tmp_path):
    mine = tmp_path / "school_math_0.25M-00000.json"
    mine.write_text("mine")
    with pytest.raises(CellExecutionError, match="is not this notebook's"):
        process(monkeypatch, tmp_path, SOURCE="sample", DATASETS="school_math_0.25M")
    assert mine.read_text() == "mine"


def peak_memory_of_processing(folder: Path, num_rows: int) -> int:
    """Return the largest resident size, in bytes, of the notebook's process on a set of `num_rows` rows."""
    folder.mkdir()
    row = {"instruction": "将以下三个句子组合成一个有意义的段落。" * 4, "input": "", "output": "狗是人类的朋友。" * 20}
    with (folder / "train_2M_CN.json").open("w", encoding="utf-8") as file:
        file.writelines([json.dumps(row, ensure_ascii=False) + "\n"] * num_rows)
    chosen = {"SOURCE": folder, "DATASETS": "train_2M_CN", "ROWS_PER_SET": "none", "OUTPUT_FOLDER": folder / "shards"}
    environment = {**os.environ, **{name: str(value) for name, value in chosen.items()}}
    command = [sys.executable, "-m", "IPython", str(PROJECT / "data_proj" / "process_data.ipynb")]
    process = subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert sum(file.stat().st_size for file in folder.glob("shards/*.json")) > num_rows * 700
    return usage.ru_maxrss * 1024


def test_memory_does_not_grow_with_the_set(tmp_path):
    small = peak_memory_of_processing(tmp_path / "small", 1_000)
    large = peak_memory_of_processing(tmp_path / "large", 100_000)  # 73 MB
    assert large - small < 25e6


@pytest.mark.parametrize("quantize", ["none", "q8_0"])
def test_answers_come_from_a_tiny_checkpoint(monkeypatch, make_model, tmp_path, quantize: str):
    folder = make_model("falcon-tiny")
    given = {"CHECKPOINT": folder, "BASE": folder, "HELD_OUT": SAMPLE, "NUM_HELD_OUT": 3, "MAX_NEW_TOKENS": 4}
    printed = execute("infer.ipynb", monkeypatch, **given, QUANTIZE=quantize, HF_HOME=tmp_path)
    assert f"{folder}: {'falcon, ' if quantize == 'none' else 'q8_0 by llama.cpp, cpu'}" in printed
    assert printed.count("微调后") == 3
    before, after = printed.splitlines()[-1].replace(",", "").split("loss ")[1].split()[::2]
    assert before == after and float(before) > 5
    assert os.environ["HF_HUB_OFFLINE"] == "1"
