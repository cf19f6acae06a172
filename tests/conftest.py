"""What several tests need: tiny random models of every shape, and the programs run as a user runs them.

No test needs a network or a GPU. Each worker keeps its models and caches in its own temporary folder.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
SAMPLE = PROJECT / "data_proj" / "sample"
TINY_SHAPES = ["bloom-tiny", "bloom-tiny-6-heads", "falcon-tiny", "falcon-tiny-40b", "falcon-tiny-rw"]

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(PROJECT))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a longer test of killed runs be asked for: sh tests/run.sh -k killed --kills 20 --rank_kills 5 -s."""
    parser.addoption("--kills", type=int, default=1, help="how often a run of one process is killed")
    parser.addoption("--rank_kills", type=int, default=1, help="how often a run of two ranks is killed")


def pytest_configure(config: pytest.Config) -> None:
    """Name the marks in use."""
    config.addinivalue_line("markers", "gpu: needs a GPU")
    config.addinivalue_line("markers", "slow: several ranks, or runs that are killed and started again")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a random model of a shape, made once and not to be changed."""
    from sft.random_model import read_texts, save_random_model

    folders: dict[str, Path] = {}

    def make(shape: str) -> Path:
        if shape not in folders:
            folders[shape] = tmp_path_factory.mktemp(shape)
            save_random_model(shape, read_texts(str(SAMPLE)), folders[shape])
        return folders[shape]

    return make


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder for tokenised rows."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(cache_dir: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs `python ARGUMENTS` in the project's folder and captures what it prints."""

    def run(*arguments: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=PROJECT,
            env={**os.environ, "HF_DATASETS_CACHE": str(cache_dir), **environment},
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout,
        )

    return run
