"""Ranks that are started, told to end and ended as a user expects, and exit codes that say why."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from sft.program import UserError
from sft.training import launch
from sft.training.launch import interface_towards, parse_arguments, torchrun_arguments
from support.project import PROJECT

SECONDS = 120  # after which a launcher that has not ended hangs
LOOPBACK = next(name for name, ones in psutil.net_if_addrs().items() if "127.0.0.1" in [one.address for one in ones])


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets how many GPUs torch sees."""
    return lambda number: monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_arguments([*arguments, "train.py"])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("arguments", [[], ["--ranks", "1"], ["--ranks", "8"]])
def test_without_a_gpu_the_cpu_is_named(gpus, arguments):
    gpus(0)
    said = refused(*arguments)
    assert said.startswith("no GPU is visible") and "DEVICE=cpu" in said


@pytest.mark.parametrize("ranks", ["5", "9", "-1"])
def test_ranks_that_no_gpu_is_there_for_are_refused(gpus, ranks):
    gpus(4)
    assert refused("--ranks", ranks).startswith(f"NUM_GPUS {ranks} must be from 1 to 4,")


def test_every_gpu_has_a_rank_unless_fewer_are_asked_for(gpus):
    gpus(4)
    assert parse_arguments(["train.py"]).ranks == 4
    assert parse_arguments(["--ranks", "4", "train.py"]).ranks == 4
    assert parse_arguments(["--ranks", "1", "train.py"]).ranks == 1


def test_a_cpu_has_two_ranks_unless_told_otherwise(gpus):
    gpus(1)
    assert parse_arguments(["--cpu", "train.py"]).ranks == 2
    assert parse_arguments(["--cpu", "--ranks", "3", "train.py"]).ranks == 3


def test_several_hosts_need_an_address_to_meet_at():
    assert refused("--cpu", "--nnodes", "2").startswith("NNODES needs MASTER_ADDR")


@pytest.mark.parametrize(("hosts", "host"), [("2", "2"), ("2", "-1"), ("1", "1")])
def test_a_host_that_is_none_of_them_is_refused(hosts, host):
    said = refused("--cpu", "--nnodes", hosts, "--node_rank", host, "--master_addr", "10.0.0.1")
    assert said.startswith(f"NODE_RANK {host} must be from 0 to {int(hosts) - 1}")


def test_flags_behind_the_script_are_the_scripts():
    given = parse_arguments(["--cpu", "train.py", "--ranks", "7", "--cpu", "x"])
    assert given.ranks == 2 and given.script_arguments == ["--ranks", "7", "--cpu", "x"]


HOSTS = ["--nnodes", "2", "--node_rank", "1", "--master_addr", "10.0.0.1"]


@pytest.mark.parametrize(
    ("arguments", "meeting"),
    [
        ([], ["--standalone"]),
        (["--master_port", "81"], ["--nnodes=1", "--node_rank=0", "--master_addr=127.0.0.1", "--master_port=81"]),
        (HOSTS, ["--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29500"]),
        (
            [*HOSTS, "--master_port", "81"],
            ["--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=81"],
        ),
    ],
)
def test_one_host_meets_anywhere_and_several_at_one_address(arguments, meeting):
    given = torchrun_arguments(parse_arguments(["--cpu", *arguments, "train.py", "--seed", "1"]))
    assert given[: len(meeting)] == meeting
    ranks, signals, *script = given[len(meeting) :]
    assert ranks == "--nproc_per_node=2" and script == ["train.py", "--seed", "1"]
    name, handled = signals.split("=")
    assert name == "--signals_to_handle" and not set(handled.split(",")) & {"SIGTERM", "SIGINT", "SIGHUP"}


def test_the_interface_towards_this_host_is_the_loopback():
    assert interface_towards("127.0.0.1", 29500) == LOOPBACK


def test_an_address_that_no_one_has_is_refused():
    with pytest.raises(UserError, match="MASTER_ADDR no-such-host.invalid cannot be reached: .*; give an address of"):
        interface_towards("no-such-host.invalid", 29500)


# ----------------------------------------------------------------------------------------------------- before the ranks


@pytest.fixture
def settings_of_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[list[str], dict[str, str]]]]:
    """Return a function that gives the command line of torchrun and what main adds to the environment."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    wakeup = signal.set_wakeup_fd(-1)
    logger = logging.getLogger("torch.distributed.elastic")
    level = logger.level
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})

    def main(*arguments: str, **environment: str) -> tuple[list[str], dict[str, str]]:
        before = {"PATH": os.environ["PATH"], **environment}
        given, os.environ = [], dict(before)
        monkeypatch.setattr(launch.torchrun, "main", given.extend)
        monkeypatch.setattr(sys, "argv", ["launch", *arguments, "train.py"])
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        launch.main()
        return given, {name: value for name, value in os.environ.items() if name not in before}

    yield main
    logger.setLevel(level)
    signal.set_wakeup_fd(wakeup)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(12, 3, "4"), (7, 2, "3"), (2, 4, "1"), (None, 1, "1")])
def test_ranks_share_the_cores_unless_told_otherwise(settings_of_ranks, monkeypatch, cores, ranks, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert settings_of_ranks("--cpu", "--ranks", str(ranks))[1] == {"OMP_NUM_THREADS": threads}
    assert settings_of_ranks("--cpu", "--ranks", str(ranks), OMP_NUM_THREADS="9")[1] == {}


def test_hosts_talk_over_the_interface_that_leads_to_the_first(settings_of_ranks):
    hosts = ["--cpu", "--nnodes", "2", "--master_addr", "127.0.0.1"]
    given, added = settings_of_ranks(*hosts, OMP_NUM_THREADS="1")
    assert added == {"GLOO_SOCKET_IFNAME": LOOPBACK}
    assert given == torchrun_arguments(parse_arguments([*hosts, "train.py"]))
    assert settings_of_ranks(*hosts, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="eth7")[1] == {}


@pytest.mark.parametrize(("environment", "seconds"), [({}, 25), ({"GRACE_SECONDS": "0.5"}, 0.5)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_with_seconds_to_end_in(settings_of_ranks, monkeypatch, environment, seconds, number):
    passed_on = []
    monkeypatch.setattr(launch, "pass_on", lambda *given: passed_on.append(given))
    settings_of_ranks("--cpu", **environment)
    signal.raise_signal(number)
    end = time.monotonic() + SECONDS
    while not passed_on and time.monotonic() < end:  # by a thread
        time.sleep(0.01)
    assert passed_on == [(number, seconds)]


# ---------------------------------------------------------------------------------------------------------- real ranks


@pytest.fixture
def start(warm_python: str, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Return a function that starts ranks of a script; what they leave behind is killed."""
    launchers = []

    def start(
        code: str, *arguments: object, flags: tuple[str, ...] = (), python: str = warm_python, **environment: str
    ) -> subprocess.Popen:
        script = tmp_path / "script.py"
        script.write_text(f"import json, os, signal, subprocess, sys, time\nrank = os.environ['RANK']\n{code}")
        started = subprocess.Popen(
            [python, *["-m", "sft.training.launch", "--cpu", "--ranks", "2"], *flags, script, *map(str, arguments)],
            cwd=PROJECT,
            env={**os.environ, "PYTHONPATH": str(PROJECT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        launchers.append(started)
        return started

    yield start
    for launcher in launchers:
        if launcher.poll() is None:
            for process in (*psutil.Process(launcher.pid).children(recursive=True), launcher):
                process.kill()
            launcher.communicate()


def finish(launcher: subprocess.Popen) -> tuple[int, str, str]:
    stdout, stderr = launcher.communicate(timeout=SECONDS)
    return launcher.returncode, stdout, stderr


def wait_for(files: list[Path]) -> None:
    end = time.monotonic() + SECONDS
    while not all(file.exists() for file in files):
        assert time.monotonic() < end, f"{files} are not there"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS")


def test_ranks_know_their_places_and_have_the_arguments(start):
    port = str(free_port())
    code = f"print(json.dumps([sys.argv[1:], *map(os.environ.get, {NAMES})]) + '\\n', end='', flush=True)"
    launcher = start(code, "--ranks", 7, "你 好", "", flags=("--master_port", port), OMP_NUM_THREADS="3")
    code, stdout, stderr = finish(launcher)
    given = ["--ranks", "7", "你 好", ""]
    assert (code, stderr) == (0, "")
    assert sorted(map(json.loads, stdout.splitlines())) == [[given, rank, rank, "2", "2", port, "3"] for rank in "01"]


@pytest.mark.parametrize(
    ("flags", "environment", "said"),
    [
        (("--ranks", "-1"), {}, "NUM_GPUS -1 must be 1 or more"),
        ((), {"GRACE_SECONDS": "abc"}, "GRACE_SECONDS is abc; expected a number of seconds"),
    ],
)
def test_a_number_that_is_none_is_one_line(start, flags, environment, said):
    assert finish(start("", flags=flags, **environment)) == (2, "", f"error: {said}\n")


def test_a_port_in_use_is_one_line(start):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, stdout, stderr = finish(start("", flags=("--master_port", str(port))))
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert stderr.startswith(f"error: the ranks cannot meet at 127.0.0.1:{port}: ")
    assert stderr.endswith("; give another MASTER_PORT\n")


SAY_AND_END = """
if rank == '1':
    print('its own line', file=sys.stderr, flush=True)
    {end}
time.sleep(600)
"""


@pytest.mark.parametrize("code", [2, 75])
def test_a_rank_that_says_why_it_ends_gives_its_exit_code_and_no_more_lines(start, code):
    assert finish(start(SAY_AND_END.format(end=f"sys.exit({code})"))) == (code, "", "its own line\n")


@pytest.mark.parametrize(
    ("end", "code", "how"),
    [("sys.exit(1)", 1, "exit code 1"), ("os.kill(os.getpid(), signal.SIGKILL)", 137, "SIGKILL")],
)
def test_a_rank_that_ends_without_a_word_is_told_of_in_one_line(start, end, code, how):
    line = f"stopped: rank 1 ended with {how}, and the others with it; see its output above\n"
    assert finish(start(SAY_AND_END.format(end=end))) == (code, "", f"its own line\n{line}")


SAVE_AND_END = """
def end(number, frame):
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    time.sleep(0.7)
    open(f'{sys.argv[1]}/saved-{rank}', 'w').write(signal.Signals(number).name)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, end)
open(f'{sys.argv[1]}/ready-{rank}', 'w')
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_every_rank_and_each_ends_in_its_own_time(start, tmp_path, number):
    launcher = start(SAVE_AND_END, tmp_path, GRACE_SECONDS="600")
    wait_for([tmp_path / "ready-0", tmp_path / "ready-1"])
    launcher.send_signal(number)
    assert finish(launcher) == (75, "", "")
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in "01"] == [number.name] * 2


def wait_for_listener(launcher: subprocess.Popen, port: int) -> None:
    end = time.monotonic() + SECONDS
    while port not in [one.laddr.port for one in psutil.Process(launcher.pid).net_connections("tcp")]:
        assert launcher.poll() is None and time.monotonic() < end, f"nothing listens on port {port}"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launcher_that_waits_for_another_host_ends_at_once(start, number):
    port = free_port()
    flags = ("--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(port))
    launcher = start("", flags=flags, python=sys.executable)
    wait_for_listener(launcher, port)
    launcher.send_signal(number)
    assert finish(launcher) == (128 + number, "", "")  # and not after the minutes that torchrun waits


HEAR_NOTHING = """
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
worker = 'import subprocess, sys; print(subprocess.Popen(["sleep", "600"]).pid, flush=True); sys.stdin.read()'
worker = subprocess.Popen([sys.executable, '-c', worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
pids = [os.getpid(), worker.pid, int(worker.stdout.readline())]
open(f'{sys.argv[1]}/pids-{rank}.part', 'w').write(' '.join(map(str, pids)))
os.rename(f'{sys.argv[1]}/pids-{rank}.part', f'{sys.argv[1]}/pids-{rank}')
time.sleep(600)
"""


def processes_of(folder: Path) -> list[psutil.Process]:
    """Wait for both ranks; return them, the processes they started and those that these started."""
    files = [folder / "pids-0", folder / "pids-1"]
    wait_for(files)
    return [psutil.Process(int(pid)) for file in files for pid in file.read_text().split()]


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_of(processes: list[psutil.Process], seconds: float = 30) -> list[psutil.Process]:
    """Return those that are alive after a while, and kill them."""
    end = time.monotonic() + seconds
    while (alive := [process for process in processes if is_alive(process)]) and time.monotonic() < end:
        time.sleep(0.05)
    for process in alive:
        process.kill()
    return alive


def test_ranks_that_hear_nothing_are_killed_after_a_while_with_all_they_started(start, tmp_path):
    launcher = start(HEAR_NOTHING, tmp_path, GRACE_SECONDS="2")
    processes = processes_of(tmp_path)
    told = time.monotonic()
    launcher.send_signal(signal.SIGTERM)
    try:
        code, stdout, stderr = finish(launcher)
    finally:
        seconds = time.monotonic() - told
        alive = end_of(processes)
    assert alive == []
    assert seconds >= 2
    assert (code, stdout) == (137, "")
    lines = [f"stopped: rank {rank} ended with SIGKILL, and the others with it; see its output" for rank in "01"]
    assert stderr.count("\n") == 1 and stderr.startswith(tuple(lines)), stderr


RANK_PROGRAM = """
from sft.program import run_program
def main():
    open(f'{sys.argv[1]}/pids-{rank}.part', 'w').write(str(os.getpid()))
    os.rename(f'{sys.argv[1]}/pids-{rank}.part', f'{sys.argv[1]}/pids-{rank}')
    time.sleep(600)
run_program(main)
"""


def test_ranks_are_killed_with_their_launcher(start, tmp_path):
    launcher = start(RANK_PROGRAM, tmp_path, python=sys.executable)
    processes = processes_of(tmp_path)
    launcher.kill()
    launcher.wait()
    assert end_of(processes) == []
    launcher.communicate()


def test_control_c_ends_ranks_that_only_wait(start, tmp_path):
    launcher = start(RANK_PROGRAM, tmp_path)
    processes = processes_of(tmp_path)
    launcher.send_signal(signal.SIGINT)
    assert finish(launcher) == (130, "", "")
    assert end_of(processes) == []
