"""Two CPU ranks, on one host and on two, against one process: ds_all.sh with its two configurations, and plain DDP."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.data.encode import encode_samples
from sft.data.formats import read_samples
from support.plain_loop import logged
from support.project import PROJECT, SAMPLE

NUM_ROWS = 11  # no multiple of 4 rows a step, so each epoch ends in a step of 3
FLAGS = ["--num_train_epochs", "2", "--logging_steps", "1", "--learning_rate", "1e-2", "--save_strategy", "no"]
FLAGS += ["--activation_checkpointing", "False", "--warmup_steps", "0", "--per_device_eval_batch_size", "5"]
# With Adam's usual 1e-8, a gradient that is zero but for rounding moves its weight by the whole learning rate.
FLAGS += ["--adam_epsilon", "1e-3"]
APART = ["--packing", "False", "--per_device_train_batch_size", "1"]
PACKED = ["--packing", "True", "--model_max_length", "300"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def tensors_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Rows to train on, and held-out ones, no multiple of two ranks' batches either."""
    folder = tmp_path_factory.mktemp("rows")
    lines = (SAMPLE / "own_with_input.json").read_text(encoding="utf-8").splitlines(keepends=True)
    files = {"train": lines[:NUM_ROWS], "held out": lines[20:27]}
    for name, some in files.items():
        (folder / f"{name}.json").write_text("".join(some), encoding="utf-8")
    return {name: folder / f"{name}.json" for name in files}


@pytest.fixture(scope="module")
def train(make_model, cache_dir, data, warm_python) -> Callable[..., str]:
    """Return a function that runs a script, or a launcher and train_sft.py, to its end and returns what it printed."""

    def train(command: list, output: Path, shape: str, *flags: str, code: int = 0, **environment: str) -> str:
        places = {"MODEL": str(make_model(shape)), "DATA": str(data["train"]), "OUTPUT": str(output)}
        settings = {
            "PYTHON": sys.executable,
            "PYTHON_EXEC": warm_python,
            "HF_DATASETS_CACHE": str(cache_dir),
            **places,
            **environment,
        }
        if "train_sft.py" in command:
            given = ["--model_name_or_path", places["MODEL"], "--data_path", places["DATA"], "--output_dir", output]
            command = [*command, *given, "--use_cpu", "True", "--per_device_train_batch_size", "1"]
        result = subprocess.run(
            [str(word) for word in [*command, *FLAGS, "--eval_data_path", data["held out"], *flags]],
            cwd=PROJECT,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == code, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout if code == 0 else result.stderr

    return train


@pytest.fixture(scope="module")
def one_process(train, tmp_path_factory, warm_python) -> Callable[..., Path]:
    """Return a function that gives the folder one process makes, with twice a rank's accumulation."""

    @cache
    def one_process(shape: str, *packing: str) -> Path:
        output = tmp_path_factory.mktemp("one") / "model"
        train([warm_python, "train_sft.py"], output, shape, "--gradient_accumulation_steps", "4", *packing)
        return output

    return one_process


def two_ranks(train: Callable, kind: str, output: Path, shape: str, *flags: str) -> str:
    """Train by DDP, ZeRO-2 or ZeRO-3 on two ranks."""
    flags = ("--gradient_accumulation_steps", "2", *flags)
    if kind == "DDP":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
        return train([*launcher, "train_sft.py"], output, shape, *flags)
    return train(["sh", "ds_all.sh"], output, shape, *flags, DEVICE="cpu", NUM_GPUS="2", ZERO_STAGE=kind[-1])


def assert_equal_runs(output: Path, expected: Path) -> None:
    assert len(logged(expected)) > 2 and logged(output) == pytest.approx(logged(expected), rel=1e-5)
    assert logged(output, "eval_loss")[-1] == pytest.approx(logged(expected, "eval_loss")[-1], rel=1e-5)
    ours, theirs = weights(output), weights(expected)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)
    assert tensors_in(output) == tensors_in(expected), "the tied head was saved twice, or not at all"


@pytest.mark.parametrize(
    ("kind", "shape", "packing"),
    [
        ("ZeRO-2", "falcon-tiny", PACKED),  # BLOOM, not packed: the two hosts below
        pytest.param("ZeRO-3", "falcon-tiny", APART, marks=pytest.mark.slow),  # BLOOM, packed: the next test
        pytest.param("DDP", "falcon-tiny", PACKED, marks=pytest.mark.slow),  # BLOOM, not packed: the test after it
    ],
)
def test_two_ranks_equal_one_process_with_twice_the_accumulation(kind, shape, packing, train, one_process, tmp_path):
    printed = two_ranks(train, kind, tmp_path, shape, *packing)
    assert "1 per device x 2 accumulated x 2 processes" in printed
    assert printed.count("examples per step") == 1, "both ranks printed the header"
    assert ("per sequence x" in printed) == (packing is PACKED)
    assert ("each with the whole model" if kind == "DDP" else kind) in printed
    assert_equal_runs(tmp_path, one_process(shape, *packing))


def mean_loss(folder: Path, rows: Path, dtype: torch.dtype) -> float:
    """Return stock transformers' loss of a folder over all labels of some rows, each alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)
    loss_sum, num_labels = 0.0, 0
    for example in encode_samples(list(read_samples(rows)), tokenizer):
        with torch.no_grad():
            logits = model(torch.tensor([example["input_ids"]])).logits[0, :-1].float()
        labels = torch.tensor(example["labels"][1:])
        loss_sum += functional.cross_entropy(logits, labels, reduction="sum").item()
        num_labels += (labels != -100).sum().item()
    return loss_sum / num_labels


@pytest.mark.slow
def test_a_zero_3_folder_gives_the_losses_of_the_run_itself_and_a_run_goes_on_from_it(
    train, one_process, data, tmp_path
):
    flags = [*PACKED, "--save_strategy", "steps", "--save_steps", "3"]
    two_ranks(train, "ZeRO-3", tmp_path, "bloom-tiny", *flags)
    assert_equal_runs(tmp_path, one_process("bloom-tiny", *PACKED))
    losses, result = logged(tmp_path), weights(tmp_path)
    expected = pytest.approx(logged(tmp_path, "eval_loss")[-1], rel=1e-5)
    assert mean_loss(tmp_path, data["held out"], torch.float32) == expected

    newest = max(tmp_path.glob("checkpoint-*"), key=lambda folder: int(folder.name[11:]))
    assert newest.name != "checkpoint-3"
    shutil.rmtree(newest)
    (tmp_path / "model.safetensors").unlink()
    printed = two_ranks(train, "ZeRO-3", tmp_path, "bloom-tiny", *flags)
    assert f"resuming from {tmp_path}/checkpoint-3" in printed
    assert logged(tmp_path) == losses
    assert all(torch.equal(tensor, result[name]) for name, tensor in weights(tmp_path).items())


@pytest.mark.slow
def test_a_zero_3_folder_of_a_run_in_16_bits_gives_its_losses(train, data, tmp_path):
    two_ranks(train, "ZeRO-3", tmp_path, "bloom-tiny", *APART, "--bf16", "True")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    expected = pytest.approx(logged(tmp_path, "eval_loss")[-1], rel=1e-3)
    assert mean_loss(tmp_path, data["held out"], torch.bfloat16) == expected


@pytest.mark.slow
def test_one_process_goes_on_exactly_from_a_checkpoint_of_two(train, one_process, warm_python, tmp_path):
    flags = [*APART, "--save_strategy", "steps", "--save_steps", "3"]
    printed = two_ranks(train, "DDP", tmp_path, "bloom-tiny", *flags)
    assert "each with the whole model" in printed
    assert_equal_runs(tmp_path, one_process("bloom-tiny", *APART))
    shutil.rmtree(tmp_path / "checkpoint-6")
    flags += ["--gradient_accumulation_steps", "4"]
    printed = train([warm_python, "train_sft.py"], tmp_path, "bloom-tiny", *flags)
    assert f"resuming from {tmp_path}/checkpoint-3" in printed
    assert_equal_runs(tmp_path, one_process("bloom-tiny", *APART))


@pytest.fixture
def two_hosts() -> Iterator[list[list[str]]]:
    """Two network namespaces joined by a veth pair: the command prefixes that run something in each."""
    names = [f"host{number}-{os.getpid()}" for number in range(2)]
    commands = [f"netns add {name}" for name in names]
    commands += [f"link add veth0 netns {names[0]} type veth peer name veth1 netns {names[1]}"]
    for number, name in enumerate(names):
        commands += [f"-n {name} addr add 10.99.0.{number + 1}/24 dev veth{number}"]
        commands += [f"-n {name} link set {device} up" for device in (f"veth{number}", "lo")]
    try:
        for command in commands:
            made = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"network namespaces need root and iproute2: ip {command}: {made.stderr.strip()}")
        yield [["ip", "netns", "exec", name] for name in names]
    except FileNotFoundError:
        pytest.skip("network namespaces need iproute2")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def train_on_hosts(
    train: Callable, hosts: list[list[str]], outputs: list[Path], *flags: str, code: int = 0
) -> list[str]:
    """Run ds_all.sh on each host at once, one rank each; return what each printed."""
    common = {"DEVICE": "cpu", "NUM_GPUS": "1", "NNODES": "2", "MASTER_ADDR": "10.99.0.1", "code": code}
    flags = ("--gradient_accumulation_steps", "2", *APART)

    def train_on(number: int) -> str:
        command = [*hosts[number], "sh", "ds_all.sh"]
        return train(command, outputs[number], "bloom-tiny", *flags, **common, NODE_RANK=str(number))

    with ThreadPoolExecutor() as pool:
        return list(pool.map(train_on, range(2)))


@pytest.mark.slow
def test_two_hosts_equal_one_process(two_hosts, train, one_process, tmp_path):
    printed = train_on_hosts(train, two_hosts, [tmp_path, tmp_path])
    assert "1 per device x 2 accumulated x 2 processes" in printed[0] and "examples per step" not in printed[1]
    assert_equal_runs(tmp_path, one_process("bloom-tiny", *APART))


@pytest.mark.slow
def test_two_hosts_without_a_shared_folder_are_refused(two_hosts, train, tmp_path):
    outputs = [tmp_path / "first", tmp_path / "second"]
    for stderr in train_on_hosts(train, two_hosts, outputs, code=2):
        assert "is a different folder on each host" in stderr and "disk that the hosts share" in stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_launching_ranks_that_do_not_join_is_refused(run, make_model, tmp_path):
    given = ["--model_name_or_path", make_model("bloom-tiny"), "--data_path", SAMPLE, "--output_dir", tmp_path / "o"]
    result = run("train_sft.py", *given, WORLD_SIZE="2", RANK="0")
    assert result.returncode == 2 and "add --use_cpu True" in result.stderr


@pytest.mark.parametrize("stage", [2, 3])
def test_the_configuration_leaves_to_the_trainer_what_is_the_trainers(stage):
    config = json.loads((PROJECT / f"ds_zero{stage}_config.json").read_text())
    assert config["zero_optimization"]["stage"] == stage
    for name in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "gradient_clipping"):
        assert config[name] == "auto"
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
    # Races in overlapped reductions gave bloomz-7b1 another loss at every run (DeepSpeed issue 2867).
    assert config["zero_optimization"]["overlap_comm"] is False
    assert not {"train_batch_size", "optimizer", "scheduler"} & set(config)
    if stage == 3:
        assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
