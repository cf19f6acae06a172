"""What people bring along: their locales, their umasks, their scripts from Windows, their first Falcon."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.project import PROJECT, SAMPLE

FLAGS = ["--max_steps", 2, "--save_steps", 1, "--learning_rate", "1e-3", "--per_device_train_batch_size", 1]
DATA = SAMPLE / "own_with_input.json"


@pytest.fixture
def train(run: Callable, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that trains a model for two steps into tmp_path/run."""

    def train(model: Path, *flags: object, **settings: str) -> subprocess.CompletedProcess:
        given = ["--model_name_or_path", model, "--data_path", DATA, "--output_dir", tmp_path / "run"]
        return run("train_sft.py", *given, *FLAGS, *flags, **settings)

    return train


def wrong_modes(folder: Path) -> list[str]:
    """Return the files whose permissions are not those of a new file."""
    mask = os.umask(0)
    os.umask(mask)
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".in-use"]
    assert any(file.suffix == ".safetensors" for file in files)
    return [str(file) for file in files if stat.S_IMODE(file.stat().st_mode) != 0o666 & ~mask]


@pytest.mark.parametrize("flags", [(), ("--lora_r", 2)])
def test_every_file_that_is_saved_can_be_read_by_whom_any_new_file_can(train, run, make_model, tmp_path, flags):
    model = make_model("bloom-tiny")
    assert train(model, *flags).returncode == 0
    assert wrong_modes(tmp_path / "run") == []
    assert wrong_modes(model) == []
    if not flags:
        assert run("-m", "sft.tools.export", tmp_path / "run", tmp_path / "exported").returncode == 0
        trim = [model, tmp_path / "trimmed", "--data", DATA, "--keep_top", 400]
        result = run("-m", "sft.tools.trim_vocab", *trim)
        assert result.returncode == 0, result.stderr
        assert wrong_modes(tmp_path / "exported") == wrong_modes(tmp_path / "trimmed") == []


# ------------------------------------------------------------------------------------------------------------- locales


@pytest.fixture(scope="session")
def locales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with locales that few machines have."""
    folder = tmp_path_factory.mktemp("locales")
    if not shutil.which("localedef") or not Path("/usr/share/i18n/charmaps").is_dir():
        pytest.skip("localedef or its character maps are not installed (Debian: apt install locales)")
    for language, charmap in (("zh_CN", "GBK"), ("en_US", "ISO-8859-1")):
        command = ["localedef", "--no-archive", "-c", "-i", language, "-f", charmap, folder / f"{language}.{charmap}"]
        subprocess.run(command, check=False, capture_output=True)
        assert (folder / f"{language}.{charmap}").is_dir()
    return folder


@pytest.mark.parametrize(("locale", "encoding"), [("zh_CN.GBK", "gbk"), ("en_US.ISO-8859-1", "iso-8859-1")])
def test_output_never_fails_for_a_character_that_the_terminal_lacks(locales, make_model, tmp_path, locale, encoding):
    rows = [{"问题": "你好😀é？", "答案": "ไทย 好"}, {"问题": "坏", "👍备注": "é"}] * 3
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    settings |= {"LC_ALL": locale, "LOCPATH": str(locales), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    words = [sys.executable, "train_sft.py", "--model_name_or_path", make_model("bloom-tiny"), "--data_path", data]
    words += ["--output_dir", tmp_path / "run", "--max_bad_fraction", 0.9, "--max_steps", 1, "--report_to", "none"]
    result = subprocess.run(list(map(str, words)), cwd=PROJECT, env=settings, capture_output=True)
    said = (result.stdout + result.stderr).decode(encoding)
    assert result.returncode == 0 and "Traceback" not in said, said[-2000:]
    assert "\\U0001f44d" in said and ("备注" if encoding == "gbk" else "\\u5907\\u6ce8") in said
    assert "👍备注" in (tmp_path / "run" / "data_report.jsonl").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------- scripts and folders


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("name", ["base_run.sh", "ds_all.sh", "tests/run.sh"])
def test_a_script_with_windows_line_ends_says_so(tmp_path: Path, name: str, shell: str):
    script = tmp_path / Path(name).name
    script.write_bytes((PROJECT / name).read_bytes().replace(b"\n", b"\r\n"))
    result = subprocess.run([shell, script.name], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == f"error: {script.name} has Windows line ends; type sed -i 's/\\r$//' *.sh\n"
    subprocess.run("sed -i 's/\\r$//' *.sh", shell=True, check=True, cwd=tmp_path)
    assert script.read_bytes() == (PROJECT / name).read_bytes()


def test_git_keeps_the_line_ends_of_scripts(tmp_path: Path):
    attributes = PROJECT / ".gitattributes"
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    shutil.copy(attributes, tmp_path)
    scripts = [str(file.relative_to(PROJECT)) for file in PROJECT.rglob("*.sh") if ".venv" not in file.parts]
    command = ["git", "check-attr", "eol", *scripts, ".ci/run"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert len(scripts) >= 4 and said.count("eol: lf") == len(scripts) + 1


@pytest.mark.parametrize("shape", ["falcon-tiny"])
def test_the_first_falcons_are_told_a_command_that_works(train, make_model, tmp_path, shape):
    base = shutil.copytree(make_model(shape), tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    assert not config["new_decoder_architecture"]
    config |= {"model_type": "RefinedWebModel", "architectures": ["RWForCausalLM"]}
    config |= {"n_head": config.pop("num_attention_heads"), "n_layer": config.pop("num_hidden_layers")}
    config = {name: value for name, value in config.items() if not name.startswith(("num_", "new_"))}
    (base / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    refused = train(base)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    command = re.search(r"type (sed -i .* config\.json) in its folder", refused.stderr)[1]
    subprocess.run(command, shell=True, check=True, cwd=base)
    result = train(base)
    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------------------------------------------------- tokenizers


def with_tokenizer(base: Path, folder: Path, change: Callable[[dict, dict], None]) -> Path:
    """Copy a model with another tokenizer: `change` is given tokenizer.json and tokenizer_config.json."""
    shutil.copytree(base, folder)
    files = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    change(*contents)
    for file, content in zip(files, contents, strict=True):
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


def add_token(name: str, is_eos: bool) -> Callable[[dict, dict], None]:
    def change(tokenizer: dict, config: dict) -> None:
        token = {"id": 1024, "content": name, "special": is_eos}
        token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append(token)
        config.pop("added_tokens_decoder", None)
        if is_eos:
            config["eos_token"] = name

    return change


def without_eos(tokenizer: dict, config: dict) -> None:
    config["eos_token"] = ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (add_token("<|终|>", is_eos=True), "has the token '<|终|>' with the id 1,024"),
        (add_token("新词", is_eos=False), "has the token '新词' with the id 1,024"),
        (without_eos, "has no eos token"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_model_is_refused_before_any_row_is_read(
    train, run, make_model, tmp_path, change, said
):
    model = with_tokenizer(make_model("bloom-tiny"), tmp_path / "model", change)
    asking = run("-m", "sft.chat", model, input="新词？\n")
    for result in (train(model, "--check_data", "True"), train(model), asking):
        assert result.returncode == 2 and said in result.stderr
        assert [line.startswith("error: ") for line in result.stderr.splitlines()] == [True], result.stderr
    assert not list((tmp_path / "run").glob("data_report*"))


# ------------------------------------------------------------------------------------------------------- busy machines


@pytest.mark.parametrize(
    ("given", "is_right"),
    [
        ({}, lambda count: count == 5000),
        ({"GOMP_SPINCOUNT": "70"}, lambda count: count == 70),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, lambda count: count > 10**6),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, lambda count: count == 0),
    ],
)
def test_threads_that_wait_soon_sleep_unless_the_user_says_otherwise(given, is_right):
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    settings |= {"OMP_DISPLAY_ENV": "VERBOSE", **given}
    command = [sys.executable, "train_sft.py", "--help"]
    result = subprocess.run(command, cwd=PROJECT, env=settings, capture_output=True, text=True)
    counts = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr)  # once for each copy of OpenMP
    if not counts:
        pytest.skip("PyTorch has no GNU OpenMP here")
    assert all(is_right(int(count)) for count in counts), counts
