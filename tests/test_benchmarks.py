"""The benchmarks at the smallest size: every way trains on the same tokens, and equal ways have equal losses."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import PROJECT, SAMPLE


def run(module: str, *arguments: object) -> str:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_way_trains_on_the_same_tokens(tmp_path: Path):
    ways = ["plain", "padded", "ours", "plain-packed", "ours-packed", *(["trl-padded"] if find_spec("trl") else [])]
    given = ["--shape", "bloom-tiny", "--data", SAMPLE, "--steps", 2, "--warmup", 1, "--max_length", 512]
    printed = run("benchmarks.throughput", *given, "--output", tmp_path, "--ways", *ways)
    name = next(tmp_path.glob("*.json")).stem
    results = json.loads((tmp_path / f"{name}.json").read_text())["results"]
    assert list(results) == ways
    for way in set(ways) - {"plain-packed", "ours-packed"}:
        assert results[way]["losses"] == pytest.approx(results["plain"]["losses"], abs=1e-4), way
        assert results[way]["tokens"] == results["plain"]["tokens"], way
        assert results[way]["labels"] == results["plain"]["labels"], way
    assert results["ours-packed"]["tokens"] == results["plain-packed"]["tokens"]
    assert results["ours-packed"]["leak"] < 1e-5 < 1e-2 < results["plain-packed"]["leak"]
    assert all(result["seconds"] > 0 and result["peak_bytes"] > 0 for result in results.values())
    table = (tmp_path / f"{name}.md").read_text()
    assert table.count("\n| ") == 2 + len(ways) and table in printed


@pytest.mark.parametrize("way", ["stock", "ours"])
def test_memory_above_the_model_grows_with_the_row(way):
    given = ["--shape", "bloom-demo", "--only", way]
    short, long = (json.loads(run("benchmarks.memory", *given, length))["bytes"] for length in (512, 2048))
    assert 0 < short < long


def test_every_way_generates_and_its_quality_is_measured(tmp_path: Path, make_model: Callable[[str], Path]):
    given = ["--shape", "bloom-tiny", "--prompt_tokens", 8, "--new_tokens", 4, "--rounds", 1, "--rows", 3]
    printed = run(
        "benchmarks.generation",
        *given,
        "--checkpoint",
        make_model("bloom-tiny"),
        "--data",
        SAMPLE,
        "--output",
        tmp_path,
    )
    name = next(tmp_path.glob("*.json")).stem
    results = json.loads((tmp_path / f"{name}.json").read_text())["results"]
    assert list(results) == ["fp32", "bf16", "int8"]
    assert all(result["tokens_per_second"] > 0 for result in results.values())
    assert results["fp32"]["kl"] == 0
    assert all(0 < results[way]["kl"] < 2e-3 for way in ("bf16", "int8"))
    assert results["fp32"]["agreement"] == 1 >= results["int8"]["agreement"] > 0.9
    assert results["bf16"]["bytes"] < results["int8"]["bytes"] < results["fp32"]["bytes"]
    assert (tmp_path / f"{name}.md").read_text().split("\n\n")[-1] in printed


def test_a_trimmed_model_trains_on_the_same_tokens(tmp_path: Path):
    given = ["--shape", "bloom-tiny", "--vocab_size", 600, "--steps", 1, "--max_length", 256, "--output", tmp_path]
    printed = run("benchmarks.trim_vocab", *given)
    results = json.loads((tmp_path / "trim-vocab-bloom-tiny-cpu.json").read_text())["results"]
    whole, trimmed = results["whole"], results["trimmed"]
    assert whole["parameters"] - trimmed["parameters"] == (1024 - 600) * 64
    assert (whole["tokens"], whole["labels"]) == (trimmed["tokens"], trimmed["labels"])
    assert "| trimmed: 600 tokens | 138,624 | 83.6% |" in printed


@pytest.mark.parametrize(
    ("module", "given", "expected"),
    [
        ("throughput", ["--data", "nowhere"], "--data nowhere does not exist"),
        ("throughput", [], "the following arguments are required: --data"),
        ("memory", ["--no_such_flag"], "--no_such_flag"),
        ("trim_vocab", ["--vocab_size", "1024"], "--vocab_size 1024 is not 512 to 1,023"),
        ("generation", ["--checkpoint", "x"], "--checkpoint and --data belong together"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(module, given, expected):
    command = [sys.executable, "-m", f"benchmarks.{module}", "--shape", "bloom-tiny", *given]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and expected in done.stderr, done.stderr
