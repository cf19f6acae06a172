"""Programs and notebooks given names of the hub: once from there, then from the cache, then without a hub."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from support.disks import small_disk
from support.hub import Fault, Hub, Repository
from support.project import PROJECT, SAMPLE
from support.serving import free_port
from support.warm_interpreter import warm_interpreter

MODEL, DATA = "bigscience/bloom-560m", "BelleGroup/train_2M_CN"
SETS = {
    "generated_chat_0.4M": "generated_chat_0.4M.json",
    "school_math_0.25M": "school_math_0.25M.json",
    "train_2M_CN": "train_2M_CN.json",
    "train_1M_CN": "Belle_open_source_1M.json",
    "train_0.5M_CN": "Belle_open_source_0.5M.json",
    "multiturn_chat_0.8M": "multiturn_chat_0.8M.json",
}
CARD = b"---\nlicense: gpl-3.0\ntask_categories:\n- text2text-generation\nlanguage:\n- zh\n---\n# a set\n"
WARM = ["train_sft", "sft.web.page", "datasets", "pandas", "matplotlib.pyplot", "matplotlib.backends.backend_agg"]
BRIEFLY = ["--max_steps", "1", "--report_to", "none", "--use_cpu", "True"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(running: Hub, home: Path) -> dict[str, str]:
    """Return an environment that leads to the hub and, as a proxy, back to it from every other host."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    limits = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    proxy = {"http_proxy": running.address, "no_proxy": "127.0.0.1,127.0.0.2"}
    return {**kept, **limits, **proxy, "HF_ENDPOINT": running.address, "HF_HOME": str(home), "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def python(online: dict[str, str]) -> Iterator[str]:
    with warm_interpreter(WARM, online) as python:
        yield python


@pytest.fixture
def stocked(hub: Hub, home: Path, make_model: Callable[[str], Path]) -> Hub:
    """Return a hub of a model and of the six sets, of which nothing is in the cache."""
    shutil.rmtree(home)
    home.mkdir()
    model = {file.name: file.read_bytes() for file in make_model("bloom-tiny").iterdir()}
    hub.repositories[f"models/{MODEL}"] = Repository(model)
    for name, file in SETS.items():
        files = {file: (SAMPLE / file).read_bytes(), "README.md": CARD, ".gitattributes": b"*.json filter=lfs\n"}
        hub.repositories[f"datasets/BelleGroup/{name}"] = Repository(files)
    return hub


@pytest.fixture
def train(python: str, online: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs train_sft.py for a step, on the hub's model and set unless flags say otherwise."""

    def train(*flags: object, **environment: str) -> subprocess.CompletedProcess:
        given = ["--model_name_or_path", MODEL, "--data_path", DATA, "--output_dir", tmp_path / "run", *BRIEFLY, *flags]
        return subprocess.run(
            [python, "train_sft.py", *map(str, given)],
            cwd=PROJECT,
            env=online | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=200,
        )

    return train


def refused(result: subprocess.CompletedProcess) -> str:
    """Return the one line in which a run ended, what libraries say of their tries left out."""
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    last = result.stderr.rstrip("\n").splitlines()[-1]
    assert last.startswith("error: ") and result.stderr.count("error: ") == 1
    return last


def bytes_of_files(hub: Hub) -> list[str]:
    """Return which weights, tokenizers and rows were sent."""
    return sorted({Path(request.path).name for request in hub.bodies(".safetensors") + hub.bodies(".json")})


def loss_of(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stderr
    return re.search(r"'loss': '([\d.]+)'", result.stdout)[1]


def test_a_model_and_a_set_are_downloaded_once_and_then_need_no_hub(stocked: Hub, train: Callable, tmp_path: Path):
    first = loss_of(train())
    assert {"model.safetensors", "tokenizer.json", "train_2M_CN.json"} <= set(bytes_of_files(stocked))
    stocked.forget()
    assert loss_of(train("--output_dir", tmp_path / "again")) == first
    assert bytes_of_files(stocked) == []
    stocked.stop()
    gone = train("--output_dir", tmp_path / "gone", "--data_path", f"{DATA}:train")
    assert loss_of(gone) == first
    assert not any("snapshots" in file.read_text() for file in tmp_path.glob("gone/*.json"))  # no path of the cache
    assert MODEL in (tmp_path / "gone" / "README.md").read_text()


@pytest.mark.slow  # the variable is read when modules are imported, so this starts cold
def test_with_hf_hub_offline_nothing_is_asked(stocked: Hub, train: Callable, tmp_path: Path):
    first = loss_of(train())
    stocked.forget()
    assert loss_of(train("--output_dir", tmp_path / "offline", HF_HUB_OFFLINE="1")) == first
    assert stocked.requests == []
    message = refused(train("--model_name_or_path", "bigscience/bloom-3b", HF_HUB_OFFLINE="1"))
    assert "is not in the local cache, and HF_HUB_OFFLINE is set; give the path of a downloaded model" in message


def test_bars_show_on_a_terminal_while_weights_and_rows_are_downloaded(
    stocked: Hub, python: str, online: dict[str, str], tmp_path: Path
):
    command = ["--model_name_or_path", MODEL, "--data_path", DATA, "--output_dir", tmp_path / "run", *BRIEFLY]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 120))
    program = subprocess.Popen(
        [python, "train_sft.py", *map(str, command)],
        cwd=PROJECT,
        env=online,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while piece := read_terminal(ours):
        shown += piece
    assert program.wait() == 0
    shown = shown.decode(errors="replace")
    assert re.search(r"train_2M_CN\.json: +100%.*18\.8k", shown)
    assert re.search(r"model\.safetensors: +100%.*666k", shown)
    assert "Reconstructing" not in shown  # the library's words for what it downloads


def read_terminal(number: int) -> bytes:
    try:
        return os.read(number, 65536)
    except OSError:  # as Linux ends it
        return b""


@pytest.mark.parametrize("kind", ["cut", pytest.param("stall", marks=pytest.mark.slow)])
def test_rows_that_are_cut_off_come_whole(stocked: Hub, train: Callable, kind: str):
    stocked.faults.append(Fault("train_2M_CN.json", kind, after=9_000, method="GET"))
    loss_of(train())
    assert len(stocked.bodies("train_2M_CN.json")) == 2


def test_a_set_that_is_not_to_be_had_is_one_line(stocked: Hub, train: Callable):
    stocked.repositories[f"datasets/{DATA}"].gated = True
    assert refused(train()) == (
        f"error: --data_path {DATA} cannot be downloaded from {stocked.address}: only those who have accepted its "
        "terms may read it; accept them on its page at huggingface.co, then type hf auth login or set HF_TOKEN to your "
        "token"
    )
    assert (
        f"{DATA}X cannot be downloaded from {stocked.address}: there is none of this name, or it is private"
        in refused(train("--data_path", f"{DATA}X"))
    )


@pytest.mark.slow  # the library waits between its tries
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("README.md", "status", status=429, headers={"ratelimit": '"api";r=0;t=0'}), "too many requests (429)"),
        (Fault("train_2M_CN.json", "status", status=503), "the hub answers with an error (503)"),
        (Fault("train_2M_CN.json", "cut", after=5, method="GET"), "the connection broke off ("),
        (Fault("train_2M_CN.json", "stall", after=5, method="GET"), "the connection stalled"),
        (Fault("README.md", "stall"), "the connection stalled"),
    ],
    ids=["429", "503", "cut", "stall", "stalled hub"],
)
def test_a_set_whose_download_fails_for_good_is_one_line(stocked: Hub, train: Callable, fault: Fault, said: str):
    fault.times = 99
    stocked.faults.append(fault)
    message = refused(train())
    assert message.startswith(f"error: --data_path {DATA} cannot be downloaded from {stocked.address}: {said}")
    assert "type the same command again" in message
    stocked.restart(), stocked.forget()
    loss_of(train())


def test_a_full_disk_is_told_with_its_folder_and_leaves_nothing_half(
    stocked: Hub, train: Callable, make_model: Callable[[str], Path], tmp_path: Path
):
    with small_disk(tmp_path / "disk", "400k") as disk:
        message = refused(train("--cache_dir", disk, "--data_path", SAMPLE))
        assert message.startswith(
            f"error: {MODEL} cannot be downloaded from {stocked.address}: the disk of {disk} is too"
        )
        assert "free space there, or set HF_HOME to" in message
        assert stocked.bodies("model.safetensors") == [] and not list(disk.rglob("*.incomplete"))
    stocked.repositories[f"datasets/{DATA}"].files["train_2M_CN.json"] *= 30
    with small_disk(tmp_path / "disk", "300k") as disk:
        message = refused(train("--cache_dir", disk, "--model_name_or_path", make_model("bloom-tiny")))
    assert f"--data_path {DATA} cannot be downloaded" in message and f"the disk of {disk} is too full" in message


def test_the_page_answers_with_a_model_of_the_hub(stocked: Hub, python: str, online: dict[str, str]):
    said = serve(python, online)
    assert f"{MODEL}: bloom, " in said and "http://127.0.0.1:" in said
    stocked.stop()
    assert "http://127.0.0.1:" in serve(python, online)


def serve(python: str, environment: dict[str, str]) -> str:
    """Return what app.py prints until it serves."""
    command = [python, "app.py", "--checkpoint", MODEL, "--device", "cpu", "--port", str(free_port())]
    program = subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said = ""
    while "http://" not in said and (line := program.stdout.readline()):
        said += line
    program.send_signal(signal.SIGINT)
    errors = program.communicate(timeout=60)[1]
    assert "http://" in said, errors
    return said


def test_a_second_model_that_is_missing_is_told_before_the_first_ones_weights(stocked: Hub, python: str, online: dict):
    command = [python, "app.py", "--checkpoint", MODEL, "--compare", "bigscience/blom-560m", "--port", str(free_port())]
    result = subprocess.run(command, cwd=PROJECT, env=online, capture_output=True, text=True, timeout=100)
    assert "bigscience/blom-560m cannot be downloaded" in refused(result)
    assert stocked.bodies("model.safetensors") == []


def execute(notebook: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, **variables: object) -> str:
    """Run a notebook under an environment; return what its cells printed."""
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    for name, value in (environment | variables).items():
        monkeypatch.setenv(name, str(value))
    path = PROJECT / notebook
    document = nbformat.read(path, as_version=4)
    NotebookClient(document, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in document.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.slow
def test_the_notebook_answers_with_a_model_of_the_hub(stocked: Hub, online: dict, monkeypatch: pytest.MonkeyPatch):
    given = {"CHECKPOINT": MODEL, "BASE": MODEL, "HELD_OUT": SAMPLE, "NUM_HELD_OUT": 2, "MAX_NEW_TOKENS": 2}
    printed = execute("infer.ipynb", online, monkeypatch, **given)
    assert printed.startswith(f"{MODEL}: bloom, ") and "before," in printed
    assert len(stocked.bodies("model.safetensors")) == 1


def test_the_notebook_streams_the_six_sets(
    stocked: Hub, online: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path
):
    stocked.faults.append(Fault("school_math_0.25M.json", "cut", after=9_000, method="GET"))
    execute("data_proj/process_data.ipynb", online, monkeypatch, SOURCE="hub", ROWS_PER_SET=40, OUTPUT_FOLDER=tmp_path)
    for name, file in SETS.items():
        rows = (tmp_path / f"{name}-00000.json").read_text(encoding="utf-8").splitlines()
        expected = (SAMPLE / file).read_text(encoding="utf-8").splitlines()[:40]
        assert list(map(json.loads, rows)) == list(map(json.loads, expected))
    stored = sum(file.stat().st_size for file in home.rglob("*") if file.is_file())
    assert stored < 20_000  # cards, no rows


@pytest.mark.slow
@pytest.mark.parametrize("day", ["missing", "full disk"])
def test_the_notebooks_bad_days_are_one_line(
    stocked: Hub, online: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, day: str
):
    chosen = {"SOURCE": "hub", "DATASETS": "school_math_0.25M"}
    if day == "missing":
        del stocked.repositories["datasets/BelleGroup/school_math_0.25M"]
        with pytest.raises(CellExecutionError, match="error: BelleGroup/school_math_0.25M cannot be downloaded"):
            execute("data_proj/process_data.ipynb", online, monkeypatch, OUTPUT_FOLDER=tmp_path, **chosen)
        return
    with small_disk(tmp_path / "disk", "8k") as disk:
        with pytest.raises(CellExecutionError, match=r"cannot be written .*No space left on device.*; free disk space"):
            execute("data_proj/process_data.ipynb", online, monkeypatch, OUTPUT_FOLDER=disk, **chosen)
        assert not list(disk.glob("*school*")) and not list(disk.glob(".*partial"))


def peak_memory_of_streaming(hub: Hub, environment: dict[str, str], output: Path, num_rows: int) -> int:
    """Return the largest resident size, in bytes, of the notebook on a set of `num_rows` rows."""
    row = {"instruction": "把下面的句子改写成疑问句。" * 6, "input": "", "output": "河水流过村庄。" * 24}
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    hub.repositories[f"datasets/{DATA}"].files["train_2M_CN.json"] = line * num_rows
    chosen = {"DATASETS": "train_2M_CN", "ROWS_PER_SET": "none", "OUTPUT_FOLDER": str(output)}
    command = [sys.executable, "-m", "IPython", str(PROJECT / "data_proj" / "process_data.ipynb")]
    process = subprocess.Popen(
        command, cwd=PROJECT, env=environment | chosen, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peak = 0  # of this program alone: what getrusage tells begins with the size of the process that started it
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = int(found[1]) * 1024 if (found := re.search(r"VmHWM:\s*(\d+)", status)) else peak
        time.sleep(0.05)
    assert process.returncode == 0
    assert sum(len(file.read_bytes().splitlines()) for file in output.glob("*.json")) == num_rows
    return peak


@pytest.mark.slow
def test_memory_does_not_grow_with_a_set_that_is_streamed(stocked: Hub, online: dict[str, str], tmp_path: Path):
    small = peak_memory_of_streaming(stocked, online, tmp_path / "small", 30_000)
    # 120 MB; on a busy machine the allocator now and then keeps more, which is not more with each row.
    larger = (peak_memory_of_streaming(stocked, online, tmp_path / f"large-{n}", 150_000) - small for n in range(3))
    assert any(difference < 25e6 for difference in larger)


@pytest.mark.slow
def test_a_download_that_is_killed_is_not_taken_for_whole(
    stocked: Hub, python: str, online: dict, train: Callable, tmp_path: Path
):
    stocked.faults.append(Fault("model.safetensors", "stall", after=300_000, method="GET", times=99))
    flags = ["--model_name_or_path", MODEL, "--data_path", DATA, "--output_dir", tmp_path / "run", *BRIEFLY]
    program = subprocess.Popen(
        [python, "train_sft.py", *map(str, flags)],
        cwd=PROJECT,
        env=online,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not stocked.bodies("model.safetensors"):
        time.sleep(0.05)
    program.kill()
    program.wait()
    stocked.restart(), stocked.forget()
    loss_of(train())
