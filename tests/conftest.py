"""What several tests need: tiny random models of every shape, and the programs run as a user runs them.

No test needs a network or a GPU. Each worker keeps its models and caches in its own temporary folder.
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.hub import Hub, running_hub
from support.project import PROJECT, SAMPLE
from support.warm_interpreter import warm_interpreter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a warm program has imported: all that training and its launcher import sooner or later.
WARM = ["train_sft", "sft.training.launch", "sft.chat.model", "sft.tools.export", "sft.web.page"]
WARM += ["deepspeed", "torch.distributed.run", "torch.profiler", "matplotlib.pyplot", "matplotlib.backends.backend_agg"]

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with Ctrl-C ignored
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the scripts set it
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "True"  # as Gradio sets it; else what a test imports decides who starts warm


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a longer test of killed runs be asked for: sh tests/run.sh -k killed --kills 20 --rank_kills 5 -s."""
    parser.addoption("--kills", type=int, default=1, help="how often a run of one process is killed")
    parser.addoption("--rank_kills", type=int, default=1, help="how often a run of two ranks is killed")


def pytest_configure(config: pytest.Config) -> None:
    """Name the marks in use."""
    config.addinivalue_line("markers", "slow: long and rare; sh tests/run.sh --all runs these as well")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave gpu/ out where there is no GPU."""
    if collection_path != PROJECT / "tests" / "gpu":
        return None
    import torch

    return None if torch.cuda.is_available() else True


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a random model of a shape, made once and not to be changed."""
    from sft.tools.random_model import read_texts, save_random_model

    folders: dict[str, Path] = {}

    def make(shape: str) -> Path:
        if shape not in folders:
            folders[shape] = tmp_path_factory.mktemp(shape)
            save_random_model(shape, read_texts(str(SAMPLE)), folders[shape])
        return folders[shape]

    return make


@pytest.fixture(scope="module", params=["bloom-tiny", "falcon-tiny"])
def tokenizer(request: pytest.FixtureRequest, make_model: Callable[[str], Path]) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of each family."""
    from sft.model.load import load_tokenizer

    return load_tokenizer(str(make_model(request.param)))


@pytest.fixture(scope="session")
def real_falcon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Falcon with the tokenizer of the real ones."""
    from transformers import AutoModelForCausalLM, FalconConfig

    from benchmarks.tokenise import save_falcon_tokenizer

    folder = tmp_path_factory.mktemp("real_falcon")
    save_falcon_tokenizer(folder)
    config = FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=11, eos_token_id=11)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def device() -> str:
    """Return the device on which a test computes; gpu/ has another one."""
    return "cpu"


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """Two dozen rows of all seven sample files."""
    files = sorted(SAMPLE.glob("*.json"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()[:4]][:24]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.json"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder for tokenised rows."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def running() -> Iterator[Hub]:
    """Return a hub that stays at one address."""
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(running: Hub) -> Iterator[Hub]:
    """Return a hub without repositories; what it does not know may not be asked for."""
    running.repositories.clear()
    running.forget()
    yield running
    running.restart()
    assert running.unknown == []


@pytest.fixture(scope="session")
def warm_python(cache_dir: Path) -> Iterator[str]:
    """Return a stand-in for sys.executable: programs of this project start in it without seconds of imports.

    Give it as PYTHON_EXEC to a launcher, too, for its ranks. See support/warm_server.py.
    """
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache_dir), "DS_ACCELERATOR": "cpu"}
    with warm_interpreter(WARM, environment) as python:
        yield python


@pytest.fixture(scope="session")
def run(cache_dir: Path, warm_python: str) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs `python ARGUMENTS` in the project's folder and captures what it prints."""

    def run(
        *arguments: object, timeout: float = 300, input: str | None = None, **environment: str
    ) -> subprocess.CompletedProcess:
        settings = {"HF_DATASETS_CACHE": str(cache_dir), "PYTHON_EXEC": warm_python, **environment}
        return subprocess.run(
            [warm_python, *map(str, arguments)],
            cwd=PROJECT,
            input=input,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout,
        )

    return run
