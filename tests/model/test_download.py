"""Models of the hub: the files that are needed and no others, once; what is half there is never taken for whole."""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import _tree_cache, constants
from peft import LoraConfig, get_peft_model

from sft.model import download
from sft.model.download import locate
from sft.model.load import load_adapter, load_config, load_model, load_tokenizer
from sft.program import UserError
from support.disks import small_disk
from support.hub import Fault, Hub, Repository
from support.hub_here import ask_here, ask_no_more

NAME = "bigscience/bloom-small"
OTHERS = {"README.md": b"# BLOOM", "flax_model.msgpack": b"flax" * 9000, "tf_model.h5": b"tf" * 9000}
OTHERS |= {"onnx/config.json": b"{}", "checkpoint-9/trainer_state.json": b"{}", "modeling_x.py": b"raise SystemExit"}


@pytest.fixture
def files(make_model: Callable[[str], Path]) -> dict[str, bytes]:
    """Return the files of a BLOOM, and those in other forms and of its training that a repository has beside them."""
    return {file.name: file.read_bytes() for file in make_model("bloom-tiny").iterdir()} | OTHERS


@pytest.fixture
def here(hub: Hub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Return a hub of that model that this process asks."""
    hub.repositories[f"models/{NAME}"] = Repository(files)
    ask_here(hub, tmp_path / "cache", monkeypatch)
    yield hub
    ask_no_more()


def given(hub: Hub) -> list[str]:
    """Return the files whose bytes were sent."""
    return sorted({Path(request.path).name for request in hub.bodies("") if "/api/models/" not in request.path} - {""})


def load(name: str = NAME) -> str:
    """Load a model as the programs do; return its folder."""
    folder = locate(name)
    load_config(folder), load_tokenizer(folder), load_model(folder)
    return folder


def error_of(action: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_needed_is_downloaded_once_and_the_weights_last(here: Hub):
    about = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    folder = locate(NAME)
    assert given(here) == about and download.name_of(Path(folder)) == NAME
    load()
    assert given(here) == [*about[:2], "model.safetensors", *about[2:]]
    here.forget()
    assert load() == folder and given(here) == []
    here.stop()
    assert load() == folder


def shards_of(files: dict[str, bytes], names: list[str]) -> dict[str, bytes]:
    """Return the files of a model with its weights in two shards."""
    tensors = safetensors.torch.load(files["model.safetensors"])
    halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    of_tensor = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
    index = {"metadata": {"total_size": 1}, "weight_map": of_tensor}
    rest = {name: data for name, data in files.items() if name != "model.safetensors"}
    shards = {name: safetensors.torch.save(half, {"format": "pt"}) for name, half in zip(names, halves, strict=True)}
    return rest | {"model.safetensors.index.json": json.dumps(index).encode()} | shards


def test_shards_are_all_downloaded_and_no_second_form_of_them(here: Hub, files: dict[str, bytes]):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    second = {"pytorch_model-00001-of-00001.bin": b"x" * 20_000, "pytorch_model.bin.index.json": b"{}"}
    here.repositories[f"models/{NAME}"].files = shards_of(files, names) | second
    folder = Path(load())
    assert [file.name for file in sorted(folder.glob("*model*"))] == sorted(
        [*names, *list(second)[1:], "model.safetensors.index.json"]
    )
    blob = (folder / names[1]).resolve()
    (folder / names[1]).unlink(), blob.unlink()
    here.forget()
    load()
    assert given(here) == names[1:]


def test_weights_of_the_old_form_are_loaded_and_nobody_is_asked_to_convert_them(here: Hub, files: dict[str, bytes]):
    buffer = io.BytesIO()
    torch.save(safetensors.torch.load(files.pop("model.safetensors")), buffer)
    here.repositories[f"models/{NAME}"].files = files | {"pytorch_model.bin": buffer.getvalue()}
    load()
    assert not any("discussions" in request.path for request in here.requests)


def test_a_repository_without_weights_is_one_line(here: Hub, files: dict[str, bytes]):
    del files["model.safetensors"]
    assert "no file named model.safetensors, or pytorch_model.bin" in error_of(load)


@pytest.mark.parametrize(
    "suffix",
    ["model.safetensors", *(pytest.param(each, marks=pytest.mark.slow) for each in ("tokenizer.json", "/config.json"))],
)
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("", "status", status=429), "too many requests (429); wait some minutes, then type the same command"),
        (Fault("", "status", status=503), "the hub answers with an error (503); type the same command again later"),
        (Fault("", "cut", after=10, method="GET"), "the connection broke off (peer closed connection"),
        (Fault("", "reset", after=10, method="GET"), "the connection broke off ("),
    ],
    ids=["429", "503", "cut", "reset"],
)
def test_a_file_that_cannot_be_had_is_never_left_out(here: Hub, suffix: str, fault: Fault, said: str):
    here.faults.append(Fault(suffix, fault.kind, fault.after, fault.status, fault.headers, 99, fault.method))
    message = error_of(load)
    assert message.startswith(f"{NAME} cannot be downloaded from {here.address}: {said}")
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))
    here.forget()
    load()


def test_names_that_are_none(here: Hub):
    login = "correct the name, or, if it is private, type hf auth login or set HF_TOKEN to your token"
    for name in ("bigscience/bloom-smal", "bloom"):
        assert error_of(locate, name).endswith(f": there is none of this name, or it is private; {login}")
    for name in ("no/such/folder", "a b", "-"):
        assert error_of(locate, name).startswith(f"{name} is not a folder, and no model of the hub (")
    here.repositories["models/some/readme"] = Repository({"README.md": b"# nothing"})
    assert error_of(locate, "some/readme").startswith("some/readme has no config.json; expected a model of the hub")


def test_a_model_that_is_gated_says_so_although_its_page_is_open(here: Hub):
    here.repositories[f"models/{NAME}"].gated = True
    assert "only those who have accepted its terms may read it; accept them on its page" in error_of(locate, NAME)


@pytest.mark.parametrize("is_told", [True, False], ids=["HF_HUB_OFFLINE", "server gone"])
@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_a_download_that_did_not_end_is_not_taken_for_whole_offline(
    here: Hub, monkeypatch: pytest.MonkeyPatch, missing: str, is_told: bool
):
    here.faults.append(Fault(missing, "cut", after=10, method="GET", times=99))
    error_of(load)
    here.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_told)
    why = "HF_HUB_OFFLINE is set; unset" if is_told else f"{here.address} cannot be reached; set HF_ENDPOINT to"
    assert error_of(load).startswith(f"{NAME} is in the local cache only in part, and {why}")


def test_a_cache_that_another_program_filled_in_part_is_not_taken_for_whole(here: Hub, monkeypatch: pytest.MonkeyPatch):
    folder = Path(load())
    for listing in folder.parents[1].glob("trees/*"):
        listing.unlink()
    monkeypatch.setattr(_tree_cache, "_IN_MEMORY_TREE_CACHE", {})
    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert error_of(load).startswith(f"{NAME} is in the local cache only in part, and HF_HUB_OFFLINE is set")


def test_the_cache_is_used_while_the_hub_has_a_bad_day(here: Hub):
    folder = load()
    here.faults.append(Fault("", "status", status=503, times=99))
    assert load() == folder


def test_files_are_the_hubs_own(here: Hub, files: dict[str, bytes]):
    folder = Path(load())
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert hashlib.sha256((folder / name).read_bytes()).digest() == hashlib.sha256(files[name]).digest()


def test_folders_that_are_not_of_the_cache_are_called_by_their_paths(tmp_path: Path):
    assert download.name_of(tmp_path) == str(tmp_path) and download.name_of(Path("x")) == "x"
    assert download.name_of(Path("/c/models--a--b.c/snapshots/0f")) == "a/b.c"
    assert download.unfinished(tmp_path) is None


def test_an_adapter_of_the_hub_is_loaded_with_its_base_model(
    here: Hub, make_model: Callable[[str], Path], tmp_path: Path
):
    model = load_model(str(make_model("bloom-tiny")))
    adapted = get_peft_model(model, LoraConfig(target_modules=["query_key_value"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = NAME
    adapted.save_pretrained(tmp_path / "adapter")
    files = {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}
    here.repositories["models/somebody/lora"] = Repository(files)
    merged, _ = load_adapter(locate("somebody/lora"), torch.float32)
    name = "transformer.h.0.self_attention.query_key_value.weight"
    expected = adapted.merge_and_unload().get_parameter(name)
    assert torch.allclose(merged.get_parameter(name), expected)
    assert not torch.allclose(expected, load_model(str(make_model("bloom-tiny"))).get_parameter(name))


def test_shards_that_do_not_fit_together_are_refused_before_the_first(
    here: Hub, files: dict[str, bytes], tmp_path: Path
):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    here.repositories[f"models/{NAME}"].files = shards_of(files, names)
    with small_disk(tmp_path / "disk", "600k") as disk:
        folder = locate(NAME, str(disk))
        message = error_of(load_model, folder)
    said = rf"the disk of {disk} is too full \(0\.7 MB are needed and 0\.\d MB free\); free space there, or set HF_HOME"
    assert re.search(said, message)
    assert not any(name.startswith("model-") for name in given(here))
