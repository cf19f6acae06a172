"""The machine there is, GPUs that are only named, and GPUs without kernels."""

import re
from types import SimpleNamespace

import pytest
import torch

from sft import machine
from sft.chat.model import choose_device, choose_dtype
from sft.machine import GIB, Machine
from sft.program import UserError


def test_named_cards_are_the_machine():
    found = machine.find("2x24GB", "128GB", None, use_cpu=False)
    assert (found.num_devices, found.device_bytes, found.host_bytes, found.is_gpu) == (2, 24 * GIB, 128 * GIB, True)
    assert machine.find("24GB", "1.5TB", None, use_cpu=False).host_bytes == 1536 * GIB
    assert found.usable_bytes < 0.92 * found.device_bytes


@pytest.mark.parametrize("given", ["0x24GB", "2x", "x24GB", "24", "2x24KB", "2x0GB", "-1x24GB"])
def test_no_card_is_refused(given):
    with pytest.raises(UserError, match=rf"--plan_gpu {re.escape(given)} (names no GPU|is not a valid size)"):
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
    oldest = "supports 7.5 and newer; .*CUDA_VISIBLE_DEVICES"
    with pytest.raises(UserError, match=f"V100.* has compute capability {capability[0]}.{capability[1]}, .*{oldest}"):
        choose_device("auto")
    with pytest.raises(UserError, match="type --use_cpu True"):
        machine.check_kernels("--use_cpu True")


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
    monkeypatch.setattr(machine, "is_torch_bf16_gpu_available", lambda: kind != "mps")
    assert choose_dtype(device.type) == (torch.float32 if kind == "mps" else torch.bfloat16)
    found = machine.find(None, "64GB", None, use_cpu=False)
    if kind == "mps":
        assert (found.is_gpu, found.device_bytes, found.num_devices) == (False, 64 * GIB, 1)
    else:
        assert (found.is_gpu, found.device_bytes, found.num_devices, found.name) == (True, 48 * GIB, 2, "2 x Card")
