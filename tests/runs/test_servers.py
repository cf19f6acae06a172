"""The page in front of other people's servers: many visitors at once, errors in a sentence, two side by side."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from sft.chat.load import load_chat
from sft.chat.sampling import Sampling
from sft.model import gguf_file
from sft.model.load import load_config, load_tokenizer
from support.project import PROJECT
from support.serving import AnsweredWithError, free_port, join, listen, served, wait_until

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
LONG = Sampling(max_new_tokens=64, temperature=0, top_k=0, top_p=1.0)


@pytest.fixture(scope="module")
def address(make_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve a random model by llama.cpp, eight requests at a time."""
    folder, file = str(make_model("falcon-tiny")), tmp_path_factory.mktemp("served") / "mine.gguf"
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    gguf_file.write(file, config, tokenizer, gguf_file.weights_in(Path(folder)), "f32", "mine")
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(file), 8 * 1024, 8
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.model_alias, parameters.verbosity = {"mine"}, 0
    server = xllamacpp.Server(parameters)
    yield f"{server.listening_address}/v1"
    del server


def test_twenty_visitors_at_once_get_their_own_answers(address: str):
    model = load_chat(address)
    questions = [f"第{number}个问题：{'是' * number}？" for number in range(20)]
    expected = ["".join(model.reply([{"role": "user", "content": each}], LONG)) for each in questions]
    with served(model, max_waiting=40, at_once=16) as page, ThreadPoolExecutor(20) as pool:
        numbers = {"max_new_tokens": 64, "temperature": 0, "top_p": 1, "top_k": 0}
        found = list(pool.map(lambda question: page.ask(question, **numbers), questions))
    assert found == expected and len(set(expected)) > 10


def test_a_visitor_who_leaves_frees_the_server(address: str):
    model = load_chat(address)
    with served(model, at_once=2) as page, page.client() as client:
        event = join(client, max_new_tokens=900)
        assert wait_until(lambda: bool(page.line.tickets))
        growing = listen(client, event)
        next(growing)
        growing.close()
        client.close()
        assert wait_until(lambda: not page.line.tickets)
    slots = httpx.get(f"{address.removesuffix('/v1')}/slots", timeout=20)
    assert slots.status_code != 200 or not any(slot["is_processing"] for slot in slots.json())


def test_what_the_server_says_is_shown(address: str):
    model = load_chat(address)
    with served(model, at_once=4) as page, pytest.raises(AnsweredWithError) as error:
        page.ask("很" * 3000, max_new_tokens=8)
    assert "The server of the model does not answer this: http://127.0.0.1" in str(error.value)
    assert "context" in str(error.value)


def test_a_server_and_a_checkpoint_side_by_side(address: str, make_model: Callable[[str], Path]):
    port = free_port()
    command = [sys.executable, "app.py", "--server", address, "--compare", make_model("bloom-tiny"), "--port", port]
    app = subprocess.Popen(list(map(str, command)), cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    try:
        said = [app.stdout.readline() for _ in range(4)]
        assert said[0] == f"{address}: mine of {address}\n" and "bloom, " in said[1]
        assert said[2].startswith("one question is answered at a time; ")  # since the checkpoint answers one
        assert said[3] == f"http://127.0.0.1:{port} (Ctrl-C to stop)\n"
        page = httpx.get(f"http://127.0.0.1:{port}/config", trust_env=False, timeout=20).text
        assert "mine (127.0.0.1" in page and make_model("bloom-tiny").name in page
    finally:
        app.send_signal(signal.SIGINT)
        app.wait(20)


def test_a_model_of_a_server_alone_is_asked_by_many_and_needs_no_pytorch(address: str):
    port = free_port()
    command = [sys.executable, "app.py", "--server", address, "--port", str(port)]
    app = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    try:
        assert [app.stdout.readline() for _ in range(2)] == [
            f"{address}: mine of {address}\n",
            f"http://127.0.0.1:{port} (Ctrl-C to stop)\n",
        ]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
            assert list(listen(client, join(client, max_new_tokens=4)))[-1]
        if (maps := Path(f"/proc/{app.pid}/maps")).exists():
            assert "libtorch" not in maps.read_text()
    finally:
        app.send_signal(signal.SIGINT)
        app.wait(20)
