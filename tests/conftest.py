"""What several tests need: tiny random models of every shape, and the programs run as a user runs them.

No test needs a network or a GPU. Each worker keeps its models and caches in its own temporary folder.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.project import PROJECT, SAMPLE, run_as_program

os.environ["HF_HUB_OFFLINE"] = "1"


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
    from sft.tools.random_model import read_texts, save_random_model

    folders: dict[str, Path] = {}

    def make(shape: str) -> Path:
        if shape not in folders:
            folders[shape] = tmp_path_factory.mktemp(shape)
            save_random_model(shape, read_texts(str(SAMPLE)), folders[shape])
        return folders[shape]

    return make


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
def run_forked(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Return a function that runs `python train_sft.py ARGUMENTS` without the five seconds of its imports.

    Each run is a process of its own, forked from one that has only imported the script.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_sft", "support.project"])
    os.environ["HF_DATASETS_CACHE"] = str(cache_dir)  # read while importing
    folder = tmp_path_factory.mktemp("printed")

    def run_forked(arguments: list[str], timeout: float) -> subprocess.CompletedProcess:
        printed = [str(folder / name) for name in ("output", "errors")]
        process = context.Process(target=run_as_program, args=(arguments, *printed))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout)
        texts = [Path(name).read_text(encoding="utf-8") for name in printed]
        return subprocess.CompletedProcess(arguments, process.exitcode, *texts)

    return run_forked


@pytest.fixture
def run(cache_dir: Path, run_forked: Callable) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs `python ARGUMENTS` in the project's folder and captures what it prints."""

    def run(
        *arguments: object, timeout: float = 300, input: str | None = None, **environment: str
    ) -> subprocess.CompletedProcess:
        if arguments[0] == "train_sft.py" and not environment:
            return run_forked([*map(str, arguments)], timeout)
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=PROJECT,
            input=input,
            env={**os.environ, "HF_DATASETS_CACHE": str(cache_dir), **environment},
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout,
        )

    return run
