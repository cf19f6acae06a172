"""train_sft.py through its command line: losses, resuming, and the folder it leaves; see also test_mistakes.py."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.data.load import load_examples
from sft.data.packing import PackedSequences, pack
from sft.machine import processor
from sft.model.load import load_tokenizer
from support.plain_loop import FIXED, HEAD, logged, plain_losses, replies_of, tensors_of
from support.project import PROJECT, SLOW_SHAPES


def train(run: Callable, model: Path, data: Path, output: Path, *flags: object) -> subprocess.CompletedProcess:
    arguments = ["--model_name_or_path", model, "--data_path", data, "--output_dir", output, "--learning_rate", "1e-2"]
    result = run("train_sft.py", *arguments, *flags)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("shape", SLOW_SHAPES)
def test_every_step_has_the_loss_of_a_plain_loop(shape, run, make_model, data, rows, tmp_path):
    flags = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--num_train_epochs", 4]
    train(run, make_model(shape), data, tmp_path, *FIXED, *flags)
    expected = plain_losses(make_model(shape), 4 * [rows[i : i + 4] for i in range(0, 24, 4)])
    assert logged(tmp_path) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 0.1


@pytest.mark.parametrize("shape", SLOW_SHAPES)
def test_every_packed_step_has_the_loss_of_a_plain_loop_over_its_examples(shape, run, make_model, data, rows, tmp_path):
    length = 512
    flags = ["--packing", "True", "--model_max_length", length, "--per_device_train_batch_size", 1]
    flags += ["--share_prefixes", "False"]
    flags += ["--activation_checkpointing", shape.endswith("tiny"), "--num_train_epochs", 3]
    result = train(run, make_model(shape), data, tmp_path, *FIXED, *flags)
    tokenizer = AutoTokenizer.from_pretrained(make_model(shape))
    lengths = np.array([sum(tensors_of(task, tokenizer)[0].shape[1] for task in replies_of(row)) for row in rows])
    row_of = pack(lengths, length, seed=42)  # the Trainer's default seed
    packed = [[rows[i] for i in np.flatnonzero(row_of == row)] for row in range(row_of.max() + 1)]
    assert logged(tmp_path) == pytest.approx(plain_losses(make_model(shape), 3 * packed), abs=1e-5)
    full = lengths.sum() / len(packed) / length
    assert f"{len(packed)} sequences of up to 512 tokens, {full:.1%} full" in result.stdout
    assert (
        f"about {24 / len(packed):.0f} examples per step = {24 / len(packed):.1f} per sequence x 1 per device"
        in result.stdout
    )


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shape", ["bloom-tiny", "falcon-tiny"])
def test_every_step_that_shares_prefixes_has_the_loss_of_a_plain_loop(
    shape, packing, run, make_model, data, rows, tmp_path
):
    flags = ["--packing", packing, "--model_max_length", 512, "--per_device_train_batch_size", 1 if packing else 4]
    result = train(run, make_model(shape), data, tmp_path, *FIXED, *flags, "--num_train_epochs", 2)
    assert re.search(r"^shared   \d+\.\d% of the tokens", result.stdout, re.MULTILINE), result.stdout
    samples, _ = load_examples(str(data), load_tokenizer(str(make_model(shape)), 512), str(tmp_path))
    packed = PackedSequences(samples, 512, 42, shares_prefixes=True)
    batches = np.split(packed.order, packed.ends[:-1]) if packing else np.split(np.arange(24), 6)
    steps = [[rows[index] for index in batch] for batch in batches]
    assert logged(tmp_path) == pytest.approx(plain_losses(make_model(shape), 2 * steps), abs=1e-5)


@pytest.mark.parametrize("shape", ["bloom-tiny", "falcon-tiny"])
def test_packing_is_refused_where_one_example_reads_another(
    shape, make_model, data, cache_dir, tmp_path, monkeypatch, capfd
):
    import train_sft
    from sft.model import attention
    from sft.program import run_program

    def one_example(row):
        return [(0, row.position_ids.shape[1], row.position_ids.shape[1])]

    monkeypatch.setattr(attention.FlatBatch, "nodes", property(one_example))
    given = ["--model_name_or_path", make_model(shape), "--data_path", data, "--output_dir", tmp_path / "output"]
    given += ["--packing", "True", "--cache_dir", cache_dir]
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *map(str, given)])
    with pytest.raises(SystemExit) as ended:
        run_program(train_sft.main)
    assert ended.value.code == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert re.search(rf"error: {shape.split('-')[0]} cannot be packed: .* off by 0?\.?\d", message), message
    assert "type --packing False" in message
    assert not list(tmp_path.rglob("*.safetensors"))


def test_accumulating_eight_examples_equals_a_batch_of_eight(run, make_model, data, tmp_path):
    for batch, accumulated in ((1, 8), (8, 1)):
        sizes = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulated]
        train(run, make_model("falcon-tiny"), data, tmp_path / str(batch), *FIXED, *sizes, "--num_train_epochs", 1)
    assert logged(tmp_path / "1") == pytest.approx(logged(tmp_path / "8"), rel=1e-5)


@pytest.fixture(scope="module")
def finished(run, make_model, data, tmp_path_factory) -> tuple[Path, str]:
    """A finished run with held-out rows, and what it printed."""
    output = tmp_path_factory.mktemp("finished") / "model"
    dirty = tmp_path_factory.mktemp("dirty") / "rows.jsonl"
    long_row = {"instruction": "很长的任务。" * 300, "input": None, "output": "好。"}
    held_out = tmp_path_factory.mktemp("held") / "held_out.jsonl"
    held_out.write_text(data.read_text(encoding="utf-8") + '{"instruction": "问", "output": ""}\n', encoding="utf-8")
    dirty_rows = [long_row, {"instruction": "问", "output": " "}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in dirty_rows)
    dirty.write_text(data.read_text(encoding="utf-8") + text, encoding="utf-8")
    flags = ["--eval_data_path", held_out, "--per_device_eval_batch_size", "5", "--num_train_epochs", "2"]
    flags += ["--model_max_length", "600", "--report_to", "tensorboard", "--max_bad_fraction", "0.1"]
    return output, train(run, make_model("bloom-tiny"), dirty, output, *flags).stdout


@pytest.mark.parametrize("moment", ["before", "after"])
def test_the_eval_loss_is_the_models_mean_over_all_labels(moment, finished, make_model, rows):
    output, _ = finished
    model = AutoModelForCausalLM.from_pretrained(make_model("bloom-tiny") if moment == "before" else output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    loss_sum, num_labels = 0.0, 0
    with torch.no_grad():
        for task in [task for row in rows for task in replies_of(row)]:
            input_ids, labels = tensors_of(task, tokenizer)
            logits = model(input_ids).logits[0, :-1]
            loss_sum += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
            num_labels += (labels != -100).sum().item()
    of_each_epoch = logged(output, "eval_loss")
    assert len(of_each_epoch) == 3
    assert of_each_epoch[0 if moment == "before" else -1] == pytest.approx(loss_sum / num_labels, rel=1e-5)


def test_the_saved_folder_is_a_plain_model_that_a_clean_process_loads(finished):
    output, _ = finished
    code = (
        "import sys; from transformers import pipeline; p = pipeline('text-generation', sys.argv[1]);"
        "print(type(p.model).__name__, p.model.generation_config.eos_token_id, p.model.generation_config.pad_token_id,"
        "p.model.config.use_cache, len(p([{'role': 'user', 'content': '你好'}], max_new_tokens=3)))"
    )
    command = [sys.executable, "-c", code, output]
    loaded = subprocess.run(command, cwd=output.parent, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == ["BloomForCausalLM", "2", "3", "True", "1"]
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["BloomForCausalLM"]
    assert (output / "model.safetensors").stat().st_size > 100_000


def test_the_saved_chat_template_gives_the_training_prompt(finished):
    tokenizer = AutoTokenizer.from_pretrained(finished[0])
    messages = [{"role": "user", "content": "你好"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith(HEAD) and prompt.endswith("### Instruction:\n你好\n\n### Response:")


def test_curve_card_and_tensorboard_are_written(finished):
    output, _ = finished
    assert (output / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    card = (output / "README.md").read_text(encoding="utf-8")
    assert f"training loss: {logged(output)[0]:.4f} at step 1, {logged(output)[-1]:.4f} at step " in card
    before, *_, after = logged(output, "eval_loss")
    assert f"held-out loss: {before:.4f} before the first step, {after:.4f} at step " in card
    assert re.search(r"^- [1-9][\d,]* tokens/s in the steps", card, re.MULTILINE)
    assert f"hardware: {processor().split(',')[0]}" in card and f"torch {version('torch')}, transformers" in card
    assert "25 kept (1 of them cut), 1 refused" in card and "`data_report.jsonl`" in card
    assert "research only" in card and "RAIL" in card
    assert list(output.rglob("events.out.tfevents.*"))


def test_cut_and_refused_rows_are_reported_with_their_place(finished):
    output, stdout = finished
    lines = (output / "data_report.jsonl").read_text(encoding="utf-8").splitlines()
    notes = {Path(entry["place"]).name: entry["note"] for entry in map(json.loads, lines)}
    assert set(notes) == {"rows.jsonl:25", "rows.jsonl:26", "held_out.jsonl:25"}
    assert notes["rows.jsonl:25"].startswith("cut: ")
    assert (
        notes["rows.jsonl:26"]
        == notes["held_out.jsonl:25"]
        == ('refused: the "output" is empty; --empty_output train trains it')
    )
    assert "data     26 rows read: 25 kept (1 of them cut), 1 refused" in stdout
    assert "held out 25 rows read: 24 kept (0 of them cut), 1 refused" in stdout
    assert "examples 25 trained on, 24 held out" in stdout


def test_the_header_tells_steps_and_one_example_with_its_trained_part(finished, rows):
    output, stdout = finished
    state = json.loads((output / "trainer_state.json").read_text())
    assert f"{state['max_steps']:,} steps" in stdout and state["global_step"] == state["max_steps"]
    assert "fp32 weights, computed in fp32" in stdout
    assert f"### Response:⟦{rows[0]['output']}</s>⟧" in stdout
    assert f"loss {logged(output)[0]:.4f} -> {logged(output)[-1]:.4f}" in stdout


def test_a_held_out_share_is_not_trained_on(run, make_model, data, tmp_path):
    flags = ["--eval_fraction", "0.25", "--max_steps", "1", "--save_strategy", "no"]
    result = train(run, make_model("bloom-tiny"), data, tmp_path, *flags)
    assert "24 rows read: 24 kept" in result.stdout and "18 trained on, 6 held out" in result.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_killed_and_started_again_equals_never_interrupted(run, warm_python, make_model, data, cache_dir, tmp_path):
    flags = ["--per_device_train_batch_size", "2", "--num_train_epochs", "3", "--save_steps", "5"]
    train(run, make_model("bloom-tiny"), data, tmp_path / "whole", *flags)

    killed = tmp_path / "killed"
    command = [warm_python, "train_sft.py", "--model_name_or_path", make_model("bloom-tiny"), "--data_path", data]
    command += ["--output_dir", killed, "--learning_rate", "1e-2", *flags]
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        env={**os.environ, "HF_DATASETS_CACHE": str(cache_dir)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (killed / "checkpoint-10" / "complete.json").exists():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "model.safetensors").exists(), "finished before it was killed"

    (killed / "checkpoint-99").mkdir()
    again = train(run, make_model("bloom-tiny"), data, killed, *flags)
    assert re.search(r"resuming from \S+checkpoint-(10|15|20|25|30)", again.stdout)
    assert "checkpoint-99 is incomplete" in again.stderr
    whole, resumed = weights(tmp_path / "whole"), weights(killed)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert logged(tmp_path / "whole") == logged(killed)


def test_a_finished_run_started_again_trains_no_step_more(run, make_model, data, tmp_path):
    flags = ["--max_steps", "3", "--save_steps", "2"]
    train(run, make_model("falcon-tiny"), data, tmp_path, *flags)
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.safetensors")}
    (tmp_path / "model.safetensors").unlink()  # as if killed after the last checkpoint
    again = train(run, make_model("falcon-tiny"), data, tmp_path, *flags)
    assert "is the last one: all 3 steps are done" in again.stdout and "in 3 steps; saved" in again.stdout
    assert before == {file.name: file.read_bytes() for file in tmp_path.glob("*.safetensors")}
    AutoTokenizer.from_pretrained(tmp_path)
