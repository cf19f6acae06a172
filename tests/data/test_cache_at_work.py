"""sft/data/cache.py at work: killed, interrupted, twice at once, on a full disk; and how much memory it takes.

Most programs here are forks of the tests' own process: to import torch and transformers takes longer than to tokenise.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerBase

from sft.data import cache, shards
from sft.data.columns import Columns
from sft.data.encode import Encoder
from sft.data.files import find_shards
from sft.data.load import load_examples
from sft.model.load import load_tokenizer
from sft.program import UserError, run_program
from support import disks
from support.project import PROJECT


@pytest.fixture(scope="module")
def tokenizer(make_model: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(make_model("falcon-tiny")), 1024)


def rows_of(number: int, first: int = 0) -> list[dict[str, str]]:
    """Return rows of about 150 characters, no two equal, of which every hundredth is refused, or cut."""
    rows = [{"instruction": f"第{first + i}题，" + "天地玄黄" * 10, "output": "宇宙洪荒，" * 20} for i in range(number)]
    for i in range(50, number, 100):
        rows[i] |= {"output": ""} if i % 200 == 50 else {"output": "日月盈昃" * 500}
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of three files, of which two are too large to be tokenised alone, and one is broken off."""
    folder = tmp_path_factory.mktemp("rows")
    for number, name in enumerate(("a", "b", "c")):
        write(folder / f"{name}.jsonl", rows_of(2000 + number, 10_000 * number))
    (folder / "d.json").write_text('[{"instruction": "问", "output": "答"}, {"instr', encoding="utf-8")
    return folder


Start = Callable[..., psutil.Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that runs a `main` as a program in a process group of its own and returns the process.

    What it prints goes into tmp_path / NAME.
    """
    started: list[psutil.Process] = []

    def start(main: Callable[[], object], name: str = "printed") -> psutil.Process:
        process_id = os.fork()
        if not process_id:
            run_in_fork(main, tmp_path / name)
        started.append(psutil.Process(process_id))
        return started[-1]

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def run_in_fork(main: Callable[[], object], printed: Path) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which a pool of processes ends them
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    code = 0
    try:
        run_program(main)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def until(happens: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.005)


def workers_at_work(process: psutil.Process, cache_dir: Path) -> list[psutil.Process]:
    """Return the two workers of a process when they have begun to write rows."""
    until(lambda: any(file.stat().st_size for file in cache_dir.glob("tokenised/*.unfinished/rows.arrow")))
    workers = process.children()
    assert len(workers) == 2
    return workers


def slowly(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.1) -> None:
    """Let every block take longer, so that a signal comes while others are at work."""
    encode_block = cache.encode_block

    def encode(*arguments: object) -> cache.Encoded:
        time.sleep(seconds)
        return encode_block(*arguments)

    monkeypatch.setattr(cache, "encode_block", encode)


def contents(folder: Path) -> tuple[pa.Table, list[dict], dict]:
    """Return rows, notes and counts that were tokenised."""
    with pa.memory_map(str(folder / cache.ROWS)) as source:
        table = pa.ipc.open_stream(source).read_all()
    notes = [json.loads(line) for line in (folder / cache.NOTES).read_text(encoding="utf-8").splitlines()]
    return table, notes, json.loads((folder / cache.COUNTS).read_text(encoding="utf-8"))


def names_in(cache_dir: Path) -> set[str]:
    """Return what lies among tokenised rows, locks left aside."""
    return {path.name for path in (cache_dir / "tokenised").iterdir() if path.suffix != ".lock"}


@pytest.fixture(scope="module")
def expected(folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory):
    """What one process makes of the folder's rows."""
    made = cache.tokenised(find_shards(str(folder)), tokenizer, str(tmp_path_factory.mktemp("alone")), 1)
    return contents(made)


def load(
    folder: Path, tokenizer: PreTrainedTokenizerBase, cache_dir: Path, num_workers: int = 2
) -> Callable[[], object]:
    """Return a program that tokenises the rows of a folder."""
    return lambda: load_examples(str(folder), tokenizer, str(cache_dir), num_workers=num_workers)


def assert_whole(folder: Path, tokenizer: PreTrainedTokenizerBase, cache_dir: Path, expected: tuple) -> None:
    """Tokenise, or find, the rows of a folder; nothing else is in the cache then."""
    made = cache.tokenised(find_shards(str(folder)), tokenizer, str(cache_dir), 2)
    assert contents(made) == expected
    assert names_in(cache_dir) == {made.name}


# --------------------------------------------------------------------------------------------------------------- whole


def test_rows_and_notes_are_in_the_order_of_the_files(expected, folder, tokenizer):
    table, notes, counts = expected
    rows, places = [], []
    for number, shard in enumerate(find_shards(str(folder))[:3]):
        for line, record in enumerate(map(json.loads, shard.read_text(encoding="utf-8").splitlines()), 1):
            if record["output"]:
                rows.append((number, line))
            if not record["output"] or len(record["output"]) > 100:
                places.append((f"{shard}:{line}", "cut" if record["output"] else "refused"))
    rows.append((3, 0))
    places.append((f"{folder / 'd.json'}[1]", "refused"))
    assert list(zip(table["file"].to_pylist(), table["row"].to_pylist(), strict=True)) == rows
    assert [(note["place"], note["note"].split(":")[0]) for note in notes] == places
    assert (counts["rows"], counts["kept"], counts["refused"], counts["cut"]) == (6005, 5974, 31, 30)
    assert counts["unread_bytes"] > 0 and [file["form"] for file in counts["files"]] == 3 * ["lines"] + ["array"]


@pytest.mark.parametrize("num_workers", [2, 3])
def test_several_processes_make_what_one_makes(num_workers, expected, folder, tokenizer, tmp_path):
    before = psutil.Process().children()
    made = cache.tokenised(find_shards(str(folder)), tokenizer, str(tmp_path), num_workers)
    assert contents(made) == expected
    assert psutil.Process().children() == before


# ------------------------------------------------------------------------------------------------------ killed, stopped


def test_a_killed_one_leaves_nothing_that_is_taken_for_whole(start, folder, tokenizer, expected, tmp_path, monkeypatch):
    cache_dir = tmp_path / "cache"
    slowly(monkeypatch)
    process = start(load(folder, tokenizer, cache_dir))
    workers = workers_at_work(process, cache_dir)
    process.kill()
    assert psutil.wait_procs([process, *workers], timeout=10)[1] == []
    assert [Path(name).suffix for name in names_in(cache_dir)] == [".unfinished"]
    monkeypatch.undo()
    assert_whole(folder, tokenizer, cache_dir, expected)


def test_a_killed_worker_is_told_in_one_line(start, folder, tokenizer, expected, tmp_path, monkeypatch):
    cache_dir = tmp_path / "cache"
    slowly(monkeypatch)
    process = start(load(folder, tokenizer, cache_dir))
    workers = workers_at_work(process, cache_dir)
    workers[1].kill()
    assert process.wait(timeout=20) == 2
    [line] = (tmp_path / "printed").read_text().splitlines()
    assert line.startswith("error: one of 2 tokenising processes was killed") and "--preprocessing_num_workers" in line
    assert not psutil.wait_procs(workers, timeout=10)[1]
    monkeypatch.undo()
    assert_whole(folder, tokenizer, cache_dir, expected)


@pytest.mark.parametrize("slow", ["reading", "tokenising", "tokenising, and Ctrl-C twice"])
def test_ctrl_c_ends_all_without_a_traceback(slow, start, folder, tokenizer, tmp_path, monkeypatch):
    if slow == "reading":  # so that it comes while the workers wait
        read = shards.read_blocks
        monkeypatch.setattr(shards, "read_blocks", lambda file: (time.sleep(0.2) or each for each in read(file)))
    else:
        slowly(monkeypatch)
    process = start(load(folder, tokenizer, tmp_path / "cache"))
    workers = workers_at_work(process, tmp_path / "cache")
    time.sleep(0.1)
    for _ in range(1 + slow.endswith("twice")):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    assert process.wait(timeout=20) == 130
    assert not psutil.wait_procs(workers, timeout=10)[1]
    assert (tmp_path / "printed").read_text() == ""


def test_ctrl_c_ends_a_real_program(make_model, tmp_path):
    file, cache = write(tmp_path / "rows.jsonl", rows_of(20_000)), tmp_path / "cache"
    given = ["--model_name_or_path", make_model("falcon-tiny"), "--data_path", file, "--output_dir", tmp_path / "run"]
    given += ["--preprocessing_num_workers", 2, "--cache_dir", cache]
    program = subprocess.Popen(
        list(map(str, [sys.executable, "train_sft.py", *given])),
        cwd=PROJECT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    workers = workers_at_work(psutil.Process(program.pid), cache)
    os.killpg(program.pid, signal.SIGINT)
    printed = "".join(program.communicate(timeout=30))
    assert program.returncode == 130 and "Traceback" not in printed and "rror" not in printed, printed
    assert not psutil.wait_procs(workers, timeout=10)[1]


# ------------------------------------------------------------------------------------------------ others in the way


def test_of_two_that_start_at_once_one_does_the_work(start, folder, tokenizer, expected, tmp_path, monkeypatch):
    cache_dir, log = tmp_path / "cache", tmp_path / "blocks"
    encode_block = cache.encode_block

    def encode(encoder: Encoder, columns: Columns, file: int, block: shards.Block) -> cache.Encoded:
        with log.open("a") as lines:
            lines.write(f"{block.shard} {block.start}\n")
        time.sleep(0.05)
        return encode_block(encoder, columns, file, block)

    monkeypatch.setattr(cache, "encode_block", encode)
    both = [start(load(folder, tokenizer, cache_dir), name) for name in ("one", "other")]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert sorted((tmp_path / name).read_text() for name in ("one", "other")) == [
        "",
        "waiting for another process that is tokenising the same rows\n",
    ]
    assert set(Counter(log.read_text().splitlines()).values()) == {1}
    monkeypatch.setattr(cache, "encode_block", None)
    assert_whole(folder, tokenizer, cache_dir, expected)


@pytest.mark.parametrize("change", ["a row more", "touched", "gone"])
def test_a_file_that_changes_meanwhile_is_refused(change, tokenizer, tmp_path, monkeypatch):
    file, cache_dir = write(tmp_path / "rows.jsonl", rows_of(1500)), tmp_path / "cache"
    encode_block = cache.encode_block

    def encode(encoder: Encoder, columns: Columns, number: int, block: shards.Block) -> cache.Encoded:
        if change == "gone":
            file.unlink(missing_ok=True)
        elif block.start == 1:
            write(file, rows_of(1501 if change == "a row more" else 1500))
        return encode_block(encoder, columns, number, block)

    monkeypatch.setattr(cache, "encode_block", encode)
    with pytest.raises(UserError, match="^a file changed while it was being tokenised; run again [^\n]*$"):
        load_examples(str(file), tokenizer, str(cache_dir), num_workers=1)
    assert {Path(name).suffix for name in names_in(cache_dir)} == {".unfinished"}
    monkeypatch.undo()
    write(file, rows_of(1501))
    assert load_examples(str(file), tokenizer, str(cache_dir))[1].counts.rows == 1501


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a disk of 1 MiB."""
    with disks.small_disk(tmp_path / "disk", "1m") as folder:
        yield folder


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_full_disk_is_told_in_one_line(num_workers, start, small_disk, folder, tokenizer, expected, tmp_path):
    process = start(load(folder, tokenizer, small_disk / "cache", num_workers))
    assert process.wait(timeout=60) == 2
    [line] = (tmp_path / "printed").read_text().splitlines()
    said = (
        rf"error: tokenised rows cannot be stored in {small_disk}/cache/tokenised: .*No space left on device.*; give a "
    )
    assert re.match(said + "--cache_dir with room, or use --streaming True", line), line
    disks.remount(small_disk, "size=64m")
    assert_whole(folder, tokenizer, small_disk / "cache", expected)


def test_a_cache_that_cannot_be_written_to_is_told_in_one_line(folder, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match="^tokenised rows cannot be stored in [^\n]*file/tokenised: .*; give a --cache_dir"
    ):
        load_examples(str(folder), tokenizer, str(tmp_path / "file"))


# ------------------------------------------------------------------------------------------------------- whole machines

PEAKS = """
import sys
from pathlib import Path
from sft.data import cache
from sft.model.load import load_tokenizer

def peak():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])

tokenizer = load_tokenizer(sys.argv[1], 1024)
for file in sys.argv[3:]:
    made = cache.tokenised([Path(file)], tokenizer, sys.argv[2], 1)
    print((made / cache.ROWS).stat().st_size // 1024, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_twice_the_rows_take_no_more_memory(run, make_model, tmp_path):
    files = [write(tmp_path / f"{number}.jsonl", rows_of(number, number)) for number in (20_000, 40_000)]
    result = run("-c", PEAKS, make_model("bloom-tiny"), tmp_path / "cache", *files)
    assert result.returncode == 0, result.stderr
    half, whole = ([int(number) for number in line.split()] for line in result.stdout.splitlines()[-2:])
    # In KiB: what twice the rows take more, on the disk and in memory.
    written, taken = whole[0] - half[0], whole[1] - half[1]
    assert written > 20_000 and taken < written / 2
    assert whole[1] < 1.1 * half[1]


COUNTED = """
import sys
sys.path.insert(0, {project!r})
import train_sft
from sft.data import cache
from sft.program import run_program

encode_block = cache.encode_block

def encode(encoder, columns, file, block):
    with open({log!r}, "a") as lines:
        lines.write(f"{{block.shard}} {{block.start}}\\n")
    return encode_block(encoder, columns, file, block)

cache.encode_block = encode
run_program(train_sft.main)
"""


@pytest.mark.slow
def test_ranks_of_one_host_tokenise_the_rows_once(run, make_model, folder, tmp_path):
    log, script = tmp_path / "blocks", tmp_path / "counted.py"
    script.write_text(COUNTED.format(project=str(PROJECT), log=str(log)))
    given = ["--model_name_or_path", make_model("falcon-tiny"), "--data_path", folder, "--output_dir", tmp_path / "run"]
    given += ["--use_cpu", "True", "--check_data", "True", "--cache_dir", tmp_path / "cache"]
    result = run("-m", "sft.training.launch", "--cpu", "--ranks", "2", script, *given)
    assert result.returncode == 0, result.stderr[-3000:]
    blocks = Counter(log.read_text().splitlines())
    assert len(blocks) == 9 and set(blocks.values()) == {1}
    assert result.stdout.count("data     6,005 rows read: 5,974 kept (30 of them cut), 31 refused") == 1
    assert len((tmp_path / "run" / "data_report.jsonl").read_text(encoding="utf-8").splitlines()) == 61
