"""The benchmarks at the smallest size: every way trains on the same tokens, and equal ways have equal losses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import clients, gpu, measure, throughput
from benchmarks.throughput import Meter
from sft.data.collate import flatten
from sft.prompts import build_prompt
from sft.tools.export import export
from support.project import PROJECT, SAMPLE


def measured(module: str, *arguments: object, timeout: float = 300) -> str:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_way_trains_on_the_same_tokens(tmp_path: Path):
    ways = ["plain", "padded", "ours-apart", "ours", "plain-packed", "ours-packed-apart", "ours-packed"]
    ways += ["trl-padded"] if find_spec("trl") else []
    given = ["--shape", "bloom-tiny", "--data", SAMPLE, "--steps", 2, "--warmup", 1, "--max_length", 512]
    printed = measured("benchmarks.throughput", *given, "--output", tmp_path, "--ways", *ways)
    name = next(tmp_path.glob("*.json")).stem
    results = json.loads((tmp_path / f"{name}.json").read_text())["results"]
    assert list(results) == ways
    for way in set(ways) - {"plain-packed", "ours-packed-apart", "ours-packed"}:
        assert results[way]["losses"] == pytest.approx(results["plain"]["losses"], abs=1e-4), way
        assert results[way]["tokens"] == results["plain"]["tokens"], way
        assert results[way]["labels"] == results["plain"]["labels"], way
    assert results["ours-packed-apart"]["tokens"] == results["plain-packed"]["tokens"]
    assert results["ours-packed"]["tokens"] > results["ours-packed"]["computed"] > 0
    assert results["ours-apart"]["tokens"] == results["ours-apart"]["computed"] > results["ours"]["computed"]
    assert results["ours-packed"]["leak"] < 1e-5 < 1e-2 < results["plain-packed"]["leak"]
    assert all(result["seconds"] > 0 and result["peak_bytes"] > 0 for result in results.values())
    assert printed.count("\n| ") == 2 + len(ways)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["stock", "ours"])
def test_memory_above_the_model_grows_with_the_row(way):
    given = ["--shape", "bloom-demo", "--only", way]
    short, long = (json.loads(measured("benchmarks.memory", *given, length))["bytes"] for length in (512, 2048))
    assert 0 < short < long


@pytest.mark.slow
def test_every_way_generates_and_its_quality_is_measured(tmp_path: Path, make_model: Callable[[str], Path]):
    given = ["--shape", "bloom-tiny", "--prompt_tokens", 8, "--new_tokens", 64, "--rounds", 1, "--rows", 3]
    printed = measured(
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
    ours = ["fp32", "bf16", "q8_0", "q4_k_m"]
    assert set(results) == {*ours, "llama.cpp q8_0", "llama.cpp q4_k_m"}
    assert all(result["tokens_per_second"] > 0 for result in results.values())
    assert 0 == results["fp32"]["kl"] < results["q8_0"]["kl"] < results["q4_k_m"]["kl"] < 0.5
    assert results["fp32"]["agreement"] == 1 >= results["q8_0"]["agreement"] > 0.9
    assert printed.count("\n| ") == 2 + len(results)


@pytest.mark.slow
def test_a_trimmed_model_trains_on_the_same_tokens(tmp_path: Path):
    given = ["--shape", "bloom-tiny", "--vocab_size", 600, "--steps", 1, "--max_length", 256, "--output", tmp_path]
    printed = measured("benchmarks.trim_vocab", *given)
    results = json.loads((tmp_path / "trim-vocab-bloom-tiny-cpu.json").read_text())["results"]
    whole, trimmed = results["whole"], results["trimmed"]
    assert whole["parameters"] - trimmed["parameters"] == (1024 - 600) * 64
    assert (whole["tokens"], whole["labels"]) == (trimmed["tokens"], trimmed["labels"])
    assert "| trimmed: 600 tokens | 138,624 | 83.6% |" in printed


@pytest.mark.slow
def test_the_gpu_script_runs_every_item_on_a_cpu_with_tiny_shapes(tmp_path: Path):
    printed = measured("benchmarks.gpu", "--minutes", 8, "--output", tmp_path, timeout=600)
    saved = json.loads((tmp_path / "gpu-cpu.json").read_text())
    figures = saved["figures"]
    assert [figure for figure in figures if figure["what"] == "FAILED" or "failed" in figure] == []
    assert list(dict.fromkeys(figure["item"] for figure in figures)) == list(gpu.ITEMS)
    assert not any("left out" in figure["what"] for figure in figures), "the time was over"
    for name in ("output off by", "gradient off by", "hidden gradient off by", "weight gradient off by"):
        errors = [figure[name] for figure in figures if name in figure]
        assert errors and max(errors) < 0.01, name
    speeds = [figure for figure in figures if figure["item"] == "speed"]
    assert all(figure["tokens/s"] > 0 for figure in speeds)
    assert all(figure["leak"] < 1e-5 for figure in speeds if figure["leak"] is not None)
    [start, again] = [figure for figure in figures if figure["item"] == "train" and "seconds" in figure]
    assert "resumed from" not in start and again["resumed from"] == "checkpoint-10"
    assert len([line for line in printed.splitlines() if " s  " in line]) == len(figures)


@pytest.mark.slow
def test_an_item_that_fails_or_dies_is_said_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = tmp_path / "sitecustomize.py"
    broken.write_text(
        "import os, sys\n"
        "if '--worker' in sys.argv:\n"
        "    from benchmarks import gpu, gpu_kernels\n"
        "    def fails(given):\n"
        "        yield 'first', {'x': 1.0}\n"
        "        raise ValueError('of its own')\n"
        "    def dies(given):\n"
        "        os._exit(9)\n"
        "        yield\n"
        "    gpu_kernels.attention_exact, gpu_kernels.loss_exact = fails, dies\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{PROJECT}")
    items = ["attention_exact", "loss_exact", "machine"]
    measured("benchmarks.gpu", "--output", tmp_path, "--items", *items)
    figures = json.loads((tmp_path / "gpu-cpu.json").read_text())["figures"]
    told = [(figure["item"], figure["what"]) for figure in figures]
    assert told[:3] == [("attention_exact", "first"), ("attention_exact", "FAILED"), ("loss_exact", "FAILED")]
    assert figures[1]["reason"] == "ValueError: of its own" and figures[2]["exit code"] == 9
    assert told[3] == ("machine", "versions")


def test_what_is_named_is_what_was_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    assert measure.processor(uses_gpu=True) == "NVIDIA H100 PCIe" != measure.processor(uses_gpu=False)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("Tesla T4", None),
    ],
)
def test_the_peak_is_that_of_the_cards_form(name: str, tflops: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert measure.peak_flops() == (tflops and tflops * 1e12)


def test_the_clock_starts_when_nothing_is_compiled_any_more_and_counts_stay_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
):
    compilations, clock = iter([3, 5, 5, 5, 5]), iter([10.0, 14.0])
    monkeypatch.setattr(measure, "num_compilations", lambda: next(compilations))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    meter, control = Meter(warmup=1, steps=2), SimpleNamespace(should_training_stop=False)
    labels = torch.tensor([[-100, 4, 5]])
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("the host waits for the device"))
    for step in range(1, 6):
        meter.count({"input_ids": labels, "labels": labels, "position_ids": torch.arange(3)[None]})
        meter.loss += torch.tensor(float(step))
        meter.on_step_end(None, SimpleNamespace(global_step=step), control)
        if control.should_training_stop:
            break
    monkeypatch.undo()
    assert step == 5, "steps 1 and 2 compile, 3 is the first that does not, 4 and 5 are measured"
    found = meter.results()
    assert (found["tokens"], found["labels"], found["squares"], found["seconds"]) == (6, 4, 18, 4.0)
    assert found["losses"] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_tokens_that_examples_share_count_in_each_and_are_computed_once():
    rows = [{"input_ids": [7, 8, 9, 7, 8, 5, 6], "lengths": [2, 1, 2, 2]}]
    meter = Meter(warmup=0, steps=1)
    meter.count(flatten(rows, share_prefixes=True))
    assert {name: int(number) for name, number in meter.counts.items()} == {
        "tokens": 7,
        "computed": 5,
        "labels": 3,
        "squares": 1 + 3 + 5 + 5 + 7,
    }


@pytest.mark.parametrize(
    ("module", "given", "expected"),
    [
        ("throughput", ["--data", "nowhere"], "--data nowhere does not exist"),
        ("gpu", ["--part", "3"], "--part"),
        ("gpu", ["--data", "nowhere"], "--data nowhere does not exist"),
        ("throughput", [], "the following arguments are required: --data"),
        ("memory", ["--no_such_flag"], "--no_such_flag"),
        ("trim_vocab", ["--vocab_size", "1024"], "--vocab_size 1024 must be from 512 to 1,023"),
        ("generation", ["--checkpoint", "x"], "--checkpoint and --data belong together"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(module, given, expected, run):
    shape = [] if module == "gpu" else ["--shape", "bloom-tiny"]
    done = run("-m", f"benchmarks.{module}", *shape, *given)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and expected in done.stderr, done.stderr


def test_answers_of_other_programs_are_compared_up_to_their_end():
    expected, letters = [[1, 2, 9], [3, 4, 5]], {1: "a", 2: "b", 3: "c", 4: "d", 5: "e"}

    def decode(ids: list[int]) -> str:
        return "".join(letters[id] for id in ids)

    assert clients.num_equal(expected, [[1, 2, 9, 9, 9], [3, 4, 5]], decode, eos=9) == 2
    assert clients.num_equal(expected, [[1, 2], [3, 4]], decode, eos=9) == 1  # the second ended too early
    assert clients.num_equal(expected, ["ab", "cdx"], decode, eos=9) == 1


def test_a_client_that_cannot_be_installed_is_skipped_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    client = clients.Client("x", "transformers_alone", ("no-such-package-at-all==1.0",))
    with pytest.raises(clients.SkippedError, match="cannot be installed: .*no-such-package-at-all"):
        clients.environment(client, tmp_path)
    assert clients.environment(clients.CLIENTS["batch"], tmp_path).get("PYTHONPATH") is None


@pytest.mark.slow
def test_the_task_of_the_evaluation_harness_runs_on_a_folder(make_model: Callable[[str], Path], tmp_path: Path):
    try:
        environment = clients.environment(clients.CLIENTS["lm_eval"], Path(sys.prefix) / "clients")
    except clients.SkippedError as reason:
        pytest.skip(f"lm-eval {reason}")
    export(str(make_model("bloom-tiny")), str(tmp_path / "mine"))  # with the chat template, which a base model lacks
    given = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'mine'},dtype=float32", "--device", "cpu"]
    given += ["--include_path", "benchmarks/lm_eval", "--tasks", "chinese_sample", "--apply_chat_template"]
    command = [sys.executable, "-m", "lm_eval", *given, "--limit", "3", "--output_path", str(tmp_path), "--log_samples"]
    environment |= {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [samples] = tmp_path.rglob("samples_chinese_sample*.jsonl")
    asked = [json.loads(line)["arguments"]["gen_args_0"]["arg_0"] for line in samples.read_text().splitlines()]
    rows = [json.loads(line) for line in (SAMPLE / "Belle_open_source_1M.json").read_text().splitlines()]
    assert asked == [build_prompt(row["instruction"]) for row in rows[:3]]
