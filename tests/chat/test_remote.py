"""A model behind a server: streamed, stopped, asked at the same time, and whatever the server says instead."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sft.chat.load import load_chat
from sft.chat.remote import KEY_VARIABLE, RemoteModel, ServerError, fault_of
from sft.chat.sampling import Sampling
from sft.model import gguf_file
from sft.model.load import load_config, load_tokenizer
from sft.program import UserError
from sft.prompts import build_chat_prompt

GREEDY_12 = Sampling(max_new_tokens=12, temperature=0)
TURNS = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "好"},
    {"role": "user", "content": "再说一遍"},
]


class Server(ThreadingHTTPServer):
    """A server of which a test says what it answers; it notes what it was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.models = [{"id": "mine"}]
        self.answer: Callable[[dict], tuple[int, list[str]]] = lambda body: (200, [])
        self.asked: list[tuple[str, dict, str]] = []
        self.hung_up = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    """Answers with a list of models, and with lines of a stream."""

    server: Server

    def do_GET(self) -> None:
        self._send(200 if self.server.models else 500, [json.dumps({"data": self.server.models})])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers.get("Authorization", "")))
        self._send(*self.server.answer(body))

    def _send(self, status: int, lines: list[str] | Iterator[str]) -> None:
        self.send_response(status)
        self.end_headers()
        try:
            for line in lines:
                self.wfile.write(f"{line}\n\n".encode())
                self.wfile.flush()
        except OSError:
            self.server.hung_up.set()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    """Serve until the end of the test."""
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def event(**choice: object) -> str:
    return f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}"


def streamed(*pieces: str, reason: str = "stop") -> list[str]:
    usage = f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': 7}})}"
    return [*(event(text=piece) for piece in pieces), event(text="", finish_reason=reason), usage, "data: [DONE]"]


@pytest.fixture(scope="module")
def real(make_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve a random model by llama.cpp, four requests at a time, and return its address."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
    folder, file = str(make_model("falcon-tiny")), tmp_path_factory.mktemp("real") / "model.gguf"
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    gguf_file.write(file, config, tokenizer, gguf_file.weights_in(Path(folder)), "f32", "real")
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(file), 4096, 4
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.model_alias, parameters.verbosity = {"real"}, 0
    running = xllamacpp.Server(parameters)
    yield f"{running.listening_address}/v1"
    del running


def test_what_is_asked_is_the_prompt_of_training(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    server.answer = lambda body: (200, streamed("你", "好"))
    sampling = replace(GREEDY_12, top_p=0.5, seed=3, repetition_penalty=1.1)
    reply = RemoteModel.connect(server.url).reply(TURNS, sampling)
    assert ("".join(reply), reply.finish_reason, reply.num_tokens) == ("你好", "eos", 7)
    path, body, key = server.asked[0]
    assert (path, key, body["prompt"]) == ("/v1/completions", "Bearer secret", build_chat_prompt(TURNS))
    numbers = {"model": "mine", "max_tokens": 12, "temperature": 0, "top_p": 0.5, "seed": 3, "repeat_penalty": 1.1}
    assert numbers.items() <= body.items() and body["stop"] == ["\n### Instruction", "\nHuman:"]


def test_with_the_servers_template_the_turns_are_sent(server: Server):
    server.answer = lambda body: (200, [event(delta={"role": "assistant"}), event(delta={"content": "好"})])
    assert "".join(RemoteModel.connect(server.url, uses_template=True).reply(TURNS)) == "好"
    path, body, _ = server.asked[0]
    assert (path, body["messages"], "prompt" in body) == ("/v1/chat/completions", TURNS, False)


def test_the_next_turn_is_cut_off_where_a_server_does_not(server: Server):
    server.answer = lambda body: (200, streamed("好。\nHu", "man:你是谁"))
    reply = RemoteModel.connect(server.url).reply(TURNS)
    assert ("".join(reply), reply.finish_reason) == ("好。", "marker")
    server.answer = lambda body: (200, streamed("好", reason="length"))
    reply = RemoteModel.connect(server.url).reply(TURNS)
    assert ("".join(reply), reply.finish_reason) == ("好", "length")


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (400, '{"error": {"message": "the prompt has 9999 tokens"}}', "400, the prompt has 9999 tokens"),
        (401, '{"detail": "who are you?"}', "401, who are you?; set CHAT_SERVER_KEY in the environment to its key"),
        (503, "<html>busy</html>", "503 <html>busy</html>"),
        (500, '["?"]', "500 "),
    ],
)
def test_what_a_server_says_instead_is_one_sentence(server: Server, status: int, body: str, said: str):
    server.answer = lambda asked: (status, [body])
    model = RemoteModel.connect(server.url)
    with pytest.raises(ServerError) as error:
        "".join(model.reply(TURNS))
    assert str(error.value).startswith(f"{server.url}: {said}") and "\n" not in str(error.value)


def test_numbers_that_a_server_does_not_know_are_left_out_and_named(server: Server, capsys: pytest.CaptureFixture):
    def strict(body: dict) -> tuple[int, list[str]]:
        return (422, ['{"detail": "Unexpected keys: top_k"}']) if "top_k" in body else (200, streamed("好"))

    server.answer, model = strict, RemoteModel.connect(server.url)
    assert ["".join(model.reply(TURNS)) for _ in range(2)] == ["好", "好"]
    assert ["top_k" in body for _, body, _ in server.asked] == [True, False, False]
    assert capsys.readouterr().err.count("does not know top_k and the repetition penalty, which are left out") == 1


def test_of_several_at_once_each_is_asked_again(server: Server, capsys: pytest.CaptureFixture):
    together = threading.Barrier(4)

    def strict(body: dict) -> tuple[int, list[str]]:
        if "top_k" not in body:
            return 200, streamed("好")
        together.wait(20)  # all have asked before one is refused
        return 422, ['{"detail": "Unexpected keys: top_k"}']

    server.answer, model = strict, RemoteModel.connect(server.url)
    assert model.answer(["a"] * 4) == ["好"] * 4 and capsys.readouterr().err.count("left out") == 1


def test_an_error_in_the_middle_and_a_server_that_is_gone(server: Server):
    server.answer = lambda body: (200, [event(text="好"), 'data: {"error": {"message": "out of memory"}}'])
    model = RemoteModel.connect(server.url)
    with pytest.raises(ServerError, match="out of memory"):
        list(model.reply(TURNS))
    server.shutdown()
    server.server_close()
    with pytest.raises(ServerError, match="does not answer"):
        list(model.reply(TURNS))


def test_prompts_that_are_not_completed_name_the_flag(server: Server):
    server.answer = lambda body: (404, ["{}"])
    with pytest.raises(ServerError, match="--server_template True"):
        list(RemoteModel.connect(server.url).reply(TURNS))


def test_a_cancelled_reply_closes_the_request_at_once(server: Server):
    def endless(body: dict) -> tuple[int, Iterator[str]]:
        def lines() -> Iterator[str]:
            yield event(text="好")
            while not server.hung_up.wait(0.02):
                yield ": still here"

        return 200, lines()

    server.answer = endless
    reply = RemoteModel.connect(server.url).reply(TURNS)
    growing = iter(reply)
    assert next(growing) == "好"
    start = time.monotonic()
    growing.close()
    assert time.monotonic() - start < 2 and reply.finish_reason == "cancelled"
    assert server.hung_up.wait(5)


@pytest.mark.parametrize(
    ("models", "name", "said"),
    [
        ([{"id": "a"}, {"id": "b"}], None, "--model is needed: give one of the models of .*: a, b"),
        ([{"id": "a"}], "c", "--model c is none of the models of .*: a"),
        ([], None, "does not list its models: 500.*; name one with --model"),
        (7, None, "is no server of models"),
    ],
)
def test_a_model_that_is_not_there_is_refused(server: Server, models: object, name: str | None, said: str):
    server.models = models
    with pytest.raises(UserError, match=said):
        load_chat(server.url, model=name)


def test_a_name_without_ollamas_tag_is_its_latest(server: Server):
    server.models = [{"id": "mine:latest"}, {"id": "other:latest"}]
    assert str(load_chat(server.url, model="mine")) == f"mine of {server.url}"


def test_a_server_without_a_list_takes_the_name_that_is_given(server: Server):
    server.models, server.answer = [], lambda body: (200, streamed(body["model"]))
    assert "".join(load_chat(server.url, model="folder/mine").stream("x")) == "folder/mine"


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/v1", "http://nowhere.invalid/v1", "http://[/v1"])
def test_an_address_without_a_server_is_refused(address: str):
    with pytest.raises(UserError, match="does not answer"):
        load_chat(address)


def test_llama_cpps_server_answers_twenty_at_once_none_mixed(real: str):
    model = load_chat(real)
    conversations = [[{"role": "user", "content": f"第{number}个问题：{'是' * number}？"}] for number in range(20)]
    alone = ["".join(model.reply(each, GREEDY_12)) for each in conversations]
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda each: "".join(model.reply(each, GREEDY_12)), conversations))
    assert together == alone and len(set(alone)) > 10


def test_llama_cpps_server_understands_every_number(real: str, capsys: pytest.CaptureFixture):
    model = load_chat(real)
    sampling = Sampling(max_new_tokens=20, temperature=1.0, top_p=1.0, top_k=0, seed=1)
    texts = ["".join(model.reply(TURNS, replace(sampling, **more))) for more in ({}, {"top_k": 1}, {"seed": 2})]
    assert len(set(texts)) == 3 and texts[1] == "".join(model.reply(TURNS, replace(sampling, temperature=0)))
    assert "".join(model.reply(TURNS, replace(sampling, top_k=1, repetition_penalty=1.9))) != texts[1]
    assert not capsys.readouterr().err


def test_a_fault_without_words_is_its_number():
    assert fault_of(500, "") == "500 "
