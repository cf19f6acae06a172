"""app.py as a user starts it: what it refuses, and that a password opens the page."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from support.project import PROJECT


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def wait_until(is_there: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert process.poll() is None, process.stderr.read()[-2000:]
        try:
            if is_there():
                return
        except httpx.ConnectError:
            time.sleep(0.2)
    pytest.fail("the page did not open within a minute")


@pytest.fixture
def app(run: Callable, make_model: Callable[[str], Path]) -> Callable[..., tuple[int, str]]:
    """Return a function that starts app.py with flags that it refuses: its exit code and what it says."""

    def app(*flags: object, checkpoint: object = None, **environment: str) -> tuple[int, str]:
        given = ["--checkpoint", checkpoint or make_model("bloom-tiny"), "--port", free_port(), *flags]
        result = run("app.py", *given, **environment)
        assert len(result.stderr.splitlines()) == 1 and result.stdout == ""
        return result.returncode, result.stderr

    return app


@pytest.mark.parametrize("checkpoint", ["nowhere", "tests"])
def test_checkpoint_that_is_none(app: Callable, checkpoint: str):
    code, said = app(checkpoint=checkpoint)
    assert code == 2 and said.startswith("error: ") and checkpoint in said


@pytest.mark.parametrize("flag", ["--listen", "--share"])
def test_others_are_answered_only_with_a_password(app: Callable, flag: str):
    assert app(flag) == (
        2,
        f"error: {flag} would let anyone in; type --auth FILE with lines user:password, or set "
        "CHAT_AUTH=user:password in the environment\n",
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty; expected lines user:password"),
        ("me", "has a line that is not user:password"),
        ("me:secret\n:x\n", "has a line that is not user:password"),
        ("me:\n", "has a line that is not user:password"),
    ],
)
def test_file_of_passwords_that_is_none(app: Callable, tmp_path: Path, text: str, problem: str):
    file = tmp_path / "names"
    file.write_text(text)
    code, said = app("--listen", "--auth", file)
    assert code == 2 and problem in said and "secret" not in said


def test_file_of_passwords_that_is_missing(app: Callable):
    code, said = app("--listen", "--auth", "nofile")
    assert (code, said) == (2, "error: --auth nofile: no such file; expected a file with lines user:password\n")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--port", "0"], "--port 0 is out of range; expected 1 to 65535"),
        (["--max_waiting", "0"], "--max_waiting 0 is out of range"),
        (["--max_new_tokens", "5000"], "expected 1 to 2048"),
        (["--port", "x"], "argument --port: invalid int value: 'x'"),
        (["--quantize", "int3"], "argument --quantize: invalid choice: 'int3'"),
        (["--device", "cuda:77"], "--device cuda:77: "),
        (["--compare", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_flags_that_are_refused(app: Callable, flags: list[str], problem: str):
    code, said = app(*flags)
    assert code == 2 and said.startswith("error: ") and problem in said


def test_port_that_is_taken(app: Callable):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert app("--port", port)[0] == 2
        assert f"--port {port} cannot be used" in app("--port", port)[1]


@pytest.mark.parametrize("flag", [["--auth", "me:zaubern-77"], ["--auth=me:zaubern-77"]])
def test_password_on_the_command_line_is_refused_and_not_repeated(app: Callable, flag: list[str]):
    code, said = app("--listen", *flag)
    assert code == 2 and "zaubern" not in said
    assert said.startswith("error: --auth takes a file, not user:password")
    assert "type --auth FILE, or set CHAT_AUTH=user:password" in said


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks://127.0.0.1:9/"])
def test_page_opens_whatever_proxy_the_machine_has(make_model: Callable[[str], Path], proxy: str):
    port = free_port()
    command = [sys.executable, "app.py", "--checkpoint", str(make_model("bloom-tiny")), "--port", str(port)]
    proxies = {name: proxy for name in ("http_proxy", "https_proxy", "ALL_PROXY", "all_proxy")}
    process = subprocess.Popen(
        command, cwd=PROJECT, env={**os.environ, **proxies}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for _ in range(3):
            process.stdout.readline()
        with httpx.Client(trust_env=False) as client:
            wait_until(lambda: client.get(f"http://127.0.0.1:{port}/config").status_code == 200, process)
    finally:
        process.kill()
        process.communicate()


def test_page_that_listens_asks_for_the_password(make_model: Callable[[str], Path]):
    port = free_port()
    command = [sys.executable, "app.py", "--checkpoint", str(make_model("bloom-tiny")), "--port", str(port)]
    secret = "me:zaubern-77"
    process = subprocess.Popen(
        [*command, "--listen"],
        cwd=PROJECT,
        env={**os.environ, "CHAT_AUTH": secret},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert ": bloom, " in process.stdout.readline()  # the model is loaded
        assert process.stdout.readline().startswith("one question is answered at a time")
        assert f"http://127.0.0.1:{port}" in process.stdout.readline()
        assert status_of(port, "/config", {}) == 401
        cookies = log_in(port, *secret.split(":"))
        assert status_of(port, "/config", cookies) == 200
        assert log_in(port, "me", "zaubern-78") == {}
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode in (0, 130)
    assert "Traceback" not in errors


def status_of(port: int, path: str, cookies: dict[str, str]) -> int:
    deadline = time.monotonic() + 60
    while True:
        try:
            return httpx.get(f"http://127.0.0.1:{port}{path}", cookies=cookies, trust_env=False).status_code
        except httpx.ConnectError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def log_in(port: int, username: str, password: str) -> dict[str, str]:
    data = {"username": username, "password": password}
    return dict(httpx.post(f"http://127.0.0.1:{port}/login", data=data, trust_env=False).cookies)
