"""Plan, machine and memory: what fits, what to type, and runs that are refused or get checkpointing."""

import gc
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from sft import machine
from sft.chat.model import choose_device, choose_dtype
from sft.machine import GIB, Machine
from sft.model.load import count_parameters
from sft.model.lora import LoraArguments
from sft.plan.memory import Load, Probe, Strategy, _kept, footprint, sizes_of
from sft.plan.plan import PlanArguments, Run, choose, choose_batch_size, options, prepare, table
from sft.program import UserError
from sft.tools.random_model import SHAPES
from sft.training import arguments, precision
from support.project import PROJECT


@pytest.fixture
def plan(run: Callable, make_model: Callable, data: Path, tmp_path: Path) -> Callable:
    """Return a function that runs train_sft.py on a tiny BLOOM with flags."""

    def plan(*flags: object, code: int = 0):
        given = ["--model_name_or_path", make_model("bloom-tiny"), "--data_path", data, "--output_dir", tmp_path / "o"]
        result = run("train_sft.py", *given, "--use_cpu", "True", *flags)
        assert result.returncode == code, result.stdout[-2000:] + result.stderr[-2000:]
        return result

    return plan


def load_of(shape: str, num_tokens: int = 2048) -> Load:
    return Load(SHAPES[shape], LoraArguments(lora_r=16), num_tokens, False, torch.bfloat16, True)


def cards(number: int, size: int, ram: int) -> Machine:
    return Machine(number, size * GIB, ram * GIB, is_gpu=True, name=f"{number} x {size}GB")


# -------------------------------------------------------------------------------------------------------- the machine


def test_named_cards_are_the_machine():
    found = machine.find("2x24GB", "128GB", None, use_cpu=False)
    assert (found.num_devices, found.device_bytes, found.host_bytes, found.is_gpu) == (2, 24 * GIB, 128 * GIB, True)
    assert machine.find("24GB", "1.5TB", None, use_cpu=False).host_bytes == 1536 * GIB
    assert found.usable_bytes < 0.92 * found.device_bytes


@pytest.mark.parametrize("given", ["0x24GB", "2x", "x24GB", "24", "2x24KB", "2x0GB", "-1x24GB"])
def test_no_card_is_refused(given):
    with pytest.raises(UserError, match=rf"--plan_gpu {re.escape(given)} is no (card|size)"):
        machine.find(given, "64GB", None, use_cpu=False)


def test_a_hosts_gpus_are_the_machine_unless_the_cpu_is_asked_for(monkeypatch):
    card = SimpleNamespace(total_memory=16 * GIB, name="Tesla T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    expected = Machine(4, 16 * GIB, 64 * GIB, is_gpu=True, name="4 x Tesla T4", capability=(7, 5))
    assert machine.find(None, "64GB", None, use_cpu=False) == expected
    assert machine.find(None, "64GB", 2, use_cpu=False).num_devices == 2
    assert not machine.find(None, "64GB", None, use_cpu=True).is_gpu


def test_a_control_group_limits_what_is_free(monkeypatch, tmp_path):
    files = {
        "/proc/meminfo": "MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\n",
        "/sys/fs/cgroup/memory.max": str(8 * GIB),
        "/sys/fs/cgroup/memory.current": str(5 * GIB),
        "/sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
    }
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / name.lstrip("/"))
    with pytest.raises(UserError, match="--plan_ram 64GB"):
        machine.available_bytes()
    for name, text in files.items():
        path = tmp_path / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert machine.available_bytes() == 5 * GIB  # 8 less the 5 in use, of which 2 are files that can go
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert machine.available_bytes() == 32 * GIB


@pytest.mark.parametrize(
    ("capability", "built_for", "is_fine"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90a", "compute_120"], False),
        ((6, 1), ["sm_75", "sm_80"], False),
        ((7, 0), ["sm_70", "sm_80"], True),
        ((7, 5), ["sm_75", "sm_80", "sm_120"], True),
        ((12, 1), ["sm_75", "sm_80", "sm_120"], True),
    ],
)
def test_a_gpu_without_kernels_is_refused_in_one_line(capability, built_for, is_fine, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100-SXM2-32GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    if is_fine:
        machine.check_kernels("--use_cpu True")
        return
    oldest = "from 7.5 on; .*CUDA_VISIBLE_DEVICES"
    with pytest.raises(UserError, match=f"V100.* has compute capability {capability[0]}.{capability[1]}, .*{oldest}"):
        choose_device("auto")
    own = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(UserError, match="type --use_cpu True"):
        arguments.check(None, None, PlanArguments(), own)


@pytest.mark.parametrize("kind", ["xpu", "mps", "npu"])
def test_other_accelerators_are_found_by_what_they_can_do(kind, monkeypatch):
    card = SimpleNamespace(total_memory=48 * GIB, name="Card")
    module = SimpleNamespace(get_device_properties=lambda index: card, device_count=lambda: 2)
    device = torch.device("privateuseone" if kind == "npu" else kind)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert machine.accelerator() == device and machine.accelerator(use_cpu=True) is None
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    assert choose_device("auto") == device.type
    monkeypatch.setattr(precision, "is_torch_bf16_gpu_available", lambda: kind != "mps")
    assert choose_dtype(device.type) == (torch.float32 if kind == "mps" else torch.bfloat16)
    found = machine.find(None, "64GB", None, use_cpu=False)
    if kind == "mps":
        assert (found.is_gpu, found.device_bytes, found.num_devices) == (False, 64 * GIB, 1)
    else:
        assert (found.is_gpu, found.device_bytes, found.num_devices, found.name) == (True, 48 * GIB, 2, "2 x Card")


# ------------------------------------------------------------------------------------------------------- what it takes


@pytest.mark.parametrize("shape", ["bloom-tiny", "falcon-tiny", "bloom-560m", "bloom-7b1", "falcon-7b"])
def test_sizes_are_the_models(shape):
    sizes = sizes_of(SHAPES[shape], LoraArguments(lora_r=16), is_lora=False)
    assert sizes.total == sizes.trained == count_parameters(SHAPES[shape])
    assert sizes.embedding == SHAPES[shape].vocab_size * SHAPES[shape].hidden_size


def test_states_of_all_weights_are_sixteen_bytes_each_and_eight_bits_ten():
    load, total = load_of("bloom-7b1", 1), count_parameters(SHAPES["bloom-7b1"])
    embedding = SHAPES["bloom-7b1"].vocab_size * SHAPES["bloom-7b1"].hidden_size
    for optim, states in (("adamw_torch_fused", 16 * total), ("adamw_bnb_8bit", 10 * total + 6 * embedding)):
        needs = footprint(Strategy("full", optim=optim, checkpointing=True), load, 1).device
        assert states <= needs < 1.05 * states + 2 * GIB


@pytest.mark.parametrize("shape", ["bloom-560m", "falcon-7b"])
def test_more_tokens_take_more_and_checkpointing_and_lora_less(shape):
    def needs(strategy: Strategy, num_tokens: int = 2048) -> int:
        return footprint(strategy, load_of(shape, num_tokens), 1).device

    full, checkpointed = Strategy("full"), Strategy("full", checkpointing=True)
    assert needs(full, 4096) > needs(full, 512) and needs(checkpointed, 4096) < needs(full, 4096)
    assert needs(Strategy("QLoRA")) < needs(Strategy("LoRA")) < needs(full)
    first, second, third = (needs(full, num_tokens) for num_tokens in (8192, 16384, 24576))
    assert second - first == pytest.approx(third - second, rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "method", "by_token"),
    [
        ("bloom-560m", "full", 36_944),
        ("bloom-560m", "LoRA", 39_120),
        ("falcon-7b", "full", 136_996),
        ("falcon-7b", "LoRA", 146_212),
    ],
)
def test_a_layer_keeps_what_was_counted_under_the_autocast_of_a_gpu(shape, method, by_token):
    # Counted with tensors that claim to be on a GPU: its autocast, unlike the CPU's, norms in fp32.
    assert _kept(Probe(Strategy(method), load_of(shape))).layer_by_token == by_token


@pytest.mark.parametrize("method", ["full", "LoRA"])
def test_a_counted_model_is_let_go_of(method):
    Probe(Strategy(method), load_of("bloom-560m")).count(2, 8)
    gc.collect()
    shapes = [tuple(tensor.shape) for tensor in gc.get_objects() if isinstance(tensor, torch.nn.Parameter)]
    assert (3 * 1024, 1024) not in shapes, "gigabytes of a large model would stay for the whole run"


def test_a_gpu_that_attends_by_examples_keeps_the_wider_heads():
    strategy, load = Strategy("full"), load_of("bloom-560m")
    turing = replace(load, attends_by_blocks=False)
    assert footprint(strategy, turing, 1).device > footprint(strategy, load, 1).device


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_divides_and_offload_moves_to_the_host(stage):
    load = load_of("bloom-7b1")
    few, many = (footprint(Strategy("full", stage), load, number) for number in (2, 8))
    offloaded = footprint(Strategy("full", stage, "optimizer"), load, 2)
    assert many.device < few.device and offloaded.device < few.device and offloaded.host > few.host


# ------------------------------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize(
    ("shape", "here", "method", "expected"),
    [
        ("bloom-560m", cards(1, 24, 64), "full", Strategy("full")),
        ("bloom-7b1", cards(1, 80, 256), "full", Strategy("full", 2, "optimizer")),
        # Without a host to offload to, what may just fit is better than nothing.
        ("bloom-7b1", cards(1, 80, 64), "full", Strategy("full", optim="adamw_bnb_8bit", checkpointing=True)),
        ("bloom-7b1", cards(1, 24, 64), "full", None),
        ("bloom-7b1", cards(1, 24, 64), "LoRA", Strategy("LoRA", checkpointing=True)),
        ("bloom-7b1", cards(8, 80, 1024), "full", Strategy("full", 2)),
        ("bloom-3b", cards(2, 24, 128), "full", Strategy("full", 2, "optimizer")),
        ("bloom-3b", cards(2, 24, 16), "full", None),  # the host is too small to offload to
    ],
)
def test_the_best_that_fits_is_chosen(shape, here, method, expected):
    found = options(load_of(shape), here)
    assert choose(found, here, method) == expected
    lines = table(found, here).splitlines()
    assert len(lines) == len(found) + 1
    assert {line.split()[-1] for line in lines[1:]} <= {"yes", "no", "checkpointed", "unproven"}


def test_the_table_names_commands_that_are_there(plan):
    printed = plan("--plan", "--plan_gpu", "2x24GB", "--plan_ram", "128GB", "--model_max_length", "256").stdout
    lines = printed.splitlines()
    assert "2 x 24GB of 24 GiB, 128 GiB of host memory; rows of 256 tokens" in lines[0]
    for method, script in (("full", "ds_all.sh"), ("LoRA", "ds_all.sh"), ("QLoRA", "base_run.sh")):
        [line] = [line for line in lines if re.match(rf"{method} +MODEL=", line)]
        words = shlex.split(line)
        assert words[words.index("sh") + 1] == script and (PROJECT / script).exists()
        assert ("--lora_r" in words) == (method != "full") and ("--load_in_4bit" in words) == (method == "QLoRA")
        assert "--model_max_length" in words


def test_the_shell_is_told_stage_offload_and_checkpointing(plan):
    printed = plan("--plan", "True", "--plan_for_shell", "True", "--plan_ranks", "2").stdout
    assert printed.split() == ["2", "none", "False"]
    stderr = plan("--plan", "True", "--plan_for_shell", "True", "--plan_gpu", "2x1200MB", "--plan_ram", "1GB", code=2)
    assert "ZERO_STAGE=auto finds no stage that fits 2 x 1200MB" in stderr.stderr


# ---------------------------------------------------------------------------------------------------- before each run


def test_a_run_that_cannot_fit_is_refused_before_the_model_is_loaded(plan, tmp_path):
    result = plan("--plan_ram", "1000MB", "--max_steps", 1, code=2)
    assert len(result.stderr.strip().splitlines()) == 1
    assert "full, one process on rows of" in result.stderr and "--check_fit False" in result.stderr
    assert not list(tmp_path.rglob("*.safetensors"))
    assert (
        "loss" in plan("--plan_ram", "1000MB", "--max_steps", 1, "--check_fit", "False", "--save_strategy", "no").stdout
    )


def test_activation_checkpointing_is_on_where_the_run_fits_only_with_it(make_model, tmp_path):
    from train_sft import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1, save_strategy="no")
    # Cards that leave 23 MiB for sure, between the 18 that tiny BLOOM takes with activation checkpointing and the 29
    # without; 94 MiB in all.
    plan_args = PlanArguments(plan_gpu="1x1177MB", plan_ram="64GB")
    run = Run(args, LoraArguments(), plan_args, SHAPES["bloom-tiny"], "m", "d", "o")
    assert prepare(run, 512).endswith("by --plan")
    assert prepare(run, 2048).endswith("; activation checkpointing is on, without which it is not sure to fit")
    model = AutoModelForCausalLM.from_pretrained(make_model("bloom-tiny"))
    Trainer(model, args, train_dataset=[{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8).train()
    assert model.is_activation_checkpointing

    open_no_more = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, activation_checkpointing=False)
    assert prepare(replace(run, args=open_no_more), 2048).endswith(
        "; unproven: it leaves little to what no plan can know"
    )
    smaller = PlanArguments(plan_gpu="1x1102MB", plan_ram="64GB")  # of 22 MiB in all
    with pytest.raises(UserError, match="--activation_checkpointing True"):
        prepare(replace(run, args=open_no_more, plan_args=smaller), 2048)


@pytest.mark.parametrize(
    ("card", "shape", "expected"),
    [("1x80GB", "bloom-560m", 8), ("1x24GB", "bloom-560m", 4), ("1x16GB", "bloom-560m", 1), ("1x24GB", "bloom-7b1", 1)],
)
def test_a_gpus_batch_has_as_many_packed_rows_as_make_16384_tokens_and_fit(card, shape, expected, tmp_path):
    args = arguments.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert args.batch_size_is_open
    run = Run(args, LoraArguments(), PlanArguments(plan=True, plan_gpu=card, plan_ram="256GB"), SHAPES[shape], *"mdo")
    choose_batch_size(run)
    assert args.per_device_train_batch_size == expected
    choose_batch_size(replace(run, plan_args=PlanArguments()))
    assert args.per_device_train_batch_size == 1, "on a CPU"


def test_the_header_says_what_the_run_takes(plan):
    printed = plan("--max_steps", 1, "--save_strategy", "no").stdout
    assert re.search(
        r"^memory   about 0\.\d of \d+\.\d GiB on each process and \d+\.\d of \d+\.\d on the host, by --plan$",
        printed,
        re.M,
    )


@pytest.mark.slow
def test_the_script_runs_the_stage_that_the_plan_chose(make_model, data, cache_dir, warm_python, tmp_path):
    variables = {"MODEL": make_model("bloom-tiny"), "DATA": data, "OUTPUT": tmp_path / "o", "DEVICE": "cpu"}
    variables |= {"ZERO_STAGE": "auto", "NUM_GPUS": 2, "PYTHON": sys.executable, "PYTHON_EXEC": warm_python}
    variables |= {"HF_DATASETS_CACHE": cache_dir}
    result = subprocess.run(
        ["sh", PROJECT / "ds_all.sh", "--max_steps", "1", "--save_strategy", "no"],
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "ZERO_STAGE=2 OFFLOAD=none, activation checkpointing False: the fastest that fits" in result.stdout
    assert ", ZeRO-2; fp32 weights" in result.stdout and (tmp_path / "o" / "model.safetensors").exists()
