"""What a hostile visitor sends, as bytes, as requests and as events of the page; the server refuses it and goes on."""

import base64
import json
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.serving import (
    API,
    JSON,
    PARAMETERS,
    QUESTION,
    AnsweredWithError,
    Served,
    answer_to,
    event_number,
    join,
    listen,
    messages_of,
    post_event,
    served,
)

SECRETS = re.compile(rb'root:[^:]*:0:|"model_type"|model\.safetensors|def run_program')
SETTINGS = [8, 0.0, 1.0, 0, 1.0, ""]
CHAT = f"{API}/call/chat"


@pytest.fixture(scope="module")
def model(make_model) -> Path:
    return make_model("bloom-tiny")


@pytest.fixture(scope="module")
def open_page(model) -> Iterator[Served]:
    with served(model) as page:
        yield page


@pytest.fixture
def page(open_page) -> Iterator[Served]:
    """The page, which answers a plain question after every attack."""
    yield open_page
    assert open_page.ask() and not open_page.line.tickets


@pytest.fixture
def closed_page(model) -> Iterator[Served]:
    with served(model, names=[("me", "secret"), ("you", "other")]) as page:
        yield page


def request(page: Served, target: str, method: str = "GET", headers: str = "", body: str = "") -> bytes:
    head = f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\nConnection: close\r\n{headers}\r\n"
    return answer_to(page, head.encode("utf-8", "surrogateescape") + body.encode())


def status_of(answer: bytes) -> int:
    """The status of an answer; 0 if the connection just ended."""
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    return int(found[1]) if found else 0


def routes_of(page: Served) -> list[str]:
    """Every path that the program serves, with its parameters in braces."""
    found, waiting = set(), list(page.page.blocks.app.routes)
    while waiting:
        route = waiting.pop()
        inner = getattr(route, "original_router", None) or getattr(route, "app", None)
        waiting += getattr(inner, "routes", None) or []
        if getattr(route, "path", None):
            prefix = "" if route.path.startswith(API) or not str(inner).startswith("<fastapi.routing") else API
            found.add(prefix + route.path)
    return sorted(found)


def targets(page: Served, model: Path) -> Iterator[str]:
    """Every route with every path that leads out of it."""
    config = str(model / "config.json")
    ways = ["../../../../../../etc/passwd", "..%2f..%2f..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/%2e%2e/etc/passwd"]
    ways += ["%252e%252e%252fetc%252fpasswd", "/etc/passwd", "%2fetc%2fpasswd", "file=/etc/passwd", config]
    ways += ["..\\..\\..\\etc\\passwd", "..%5c..%5cetc%5cpasswd", "x%00/../../etc/passwd", "/etc/passwd%00.js"]
    ways += ["....//....//etc/passwd", f"%2f{config}", "http://127.0.0.1:1/", "app.py", "x" * 5000]
    for route in routes_of(page):
        for way in ways:
            yield re.sub(r"\{[^}]*\}", lambda _, way=way: way, route) if "{" in route else f"{route.rstrip('/')}/{way}"
    for start in (
        "",
        "/static",
        "/assets",
        "/svelte",
        "/file",
        f"{API}/file",
        f"{API}/proxy",
        f"{API}/custom_component",
    ):
        for way in ways:
            yield from (f"{start}/{way}", f"{start}={way}", f"{start}/..;/{way}")


def test_no_path_leads_to_the_disk(page, model):
    tried = sorted(set(targets(page, model)))
    assert len(tried) > 500 and len({target.split("=")[0] for target in tried if "file=" in target}) >= 2
    with socket.create_connection(("127.0.0.1", page.port), timeout=20) as connection:
        stream = connection.makefile("rb")
        for target in tried:
            head = f"HEAD {target} HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\n\r\n"
            connection.sendall(head.encode())
            status = int(stream.readline().split()[1])
            assert 400 <= status < 500, target
            while stream.readline() not in (b"\r\n", b""):
                pass
    for target in tried[:: len(tried) // 60]:
        answer = request(page, target)
        assert 400 <= status_of(answer) < 500 and not SECRETS.search(answer), target


@pytest.mark.parametrize("target", ["/etc/passwd", "http://127.0.0.1/etc/passwd", "*", "//", "/?/etc/passwd", "x"])
def test_a_target_that_is_no_path_gives_nothing_of_the_disk(page, target: str):
    answer = request(page, target)
    assert not SECRETS.search(answer) and status_of(answer) < 500


def test_a_file_cannot_be_sent(page):
    with page.client() as client:
        for path in ("/upload", f"{API}/upload", f"{API}/upload/", f"{API}/upload?upload_id=1"):
            assert client.post(path, files={"files": ("a.py", b"x")}).status_code == 404
        data = [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, None, *PARAMETERS.values()]
        events = [
            client.post(CHAT, json={"data": each}).json()["event_id"] for each in (data, [data[0]["path"], *data[1:]])
        ]
        for event in events:
            assert b"root:" not in client.get(f"{CHAT}/{event}").content


def log_in(client: httpx.Client, name: str, password: str, **headers: str) -> int:
    return client.post("/login", data={"username": name, "password": password}, headers=headers).status_code


def refused_everywhere(client: httpx.Client) -> bool:
    """Whether nothing but the form to log in is answered."""
    assert "chinese_bloom_conversations" not in client.get("/").text and "on_send" not in client.get("/").text
    paths = ("/config", f"{API}/info", f"{API}/openapi.json", f"{API}/queue/data?session_hash=x", f"{CHAT}/x")
    answers = [client.get(path) for path in paths]
    body = {"data": ["a", None, *PARAMETERS.values()], "session_hash": "a", "fn_index": 0}
    answers += [client.post(f"{API}/{path}", json=body) for path in ("queue/join", "run/predict", "call/v2/chat")]
    answers.append(client.post(CHAT, json=body))
    return {answer.status_code for answer in answers} == {401} and client.get(f"{API}/user").json() is None


def test_without_name_and_password_nothing_is_answered(closed_page):
    with closed_page.client() as client:
        assert refused_everywhere(client)
        basic = base64.b64encode(b"me:secret").decode()
        identifier = closed_page.page.blocks.app.cookie_id
        for headers in (
            {"Authorization": f"Basic {basic}"},
            {"X-Forwarded-User": "me", "X-Forwarded-For": "127.0.0.1", "X-Forwarded-Host": "localhost"},
            {"X-Remote-User": "me", "X-Real-Ip": "127.0.0.1", "Forwarded": "for=127.0.0.1"},
            {"Cookie": f"access-token-{identifier}=me; access-token-unsecure-{identifier}=None"},
            {"Cookie": f"access-token-unsecure-{identifier}="},
        ):
            with closed_page.client(headers=headers) as forged:
                assert refused_everywhere(forged), headers


def test_the_right_password_opens_and_others_do_not(closed_page):
    with closed_page.client() as client:
        for name, password in (("me", "Secret"), ("me", "other"), ("me", ""), ("", ""), ("nobody", "secret")):
            assert log_in(client, name, password) in (400, 422)
        assert refused_everywhere(client)
        assert log_in(client, "me", "secret") == 200
        assert "chinese_bloom_conversations" in client.get("/config").text
        assert list(listen(client, join(client)))[-1]
        assert client.get(f"{API}/user").json() == "me"
        client.get("/logout")
        client.cookies.clear()
        assert refused_everywhere(client)


def test_passwords_cannot_be_tried_many_times(closed_page):
    with closed_page.client() as client:
        assert [log_in(client, "me", str(number)) for number in range(12)] == [400] * 10 + [429] * 2
        assert log_in(client, "me", "secret") == 429


def test_passwords_cannot_be_tried_under_other_addresses(closed_page):
    with closed_page.client() as client:
        answers = [log_in(client, "me", "x", **{"X-Forwarded-For": f"203.0.113.{number}"}) for number in range(12)]
        assert answers[-1] == 429


def test_tricks_with_headers_are_refused(page):
    post = "Content-Length: 2\r\nContent-Type: application/json\r\n\r\n{}"
    here, chat = f"Host: 127.0.0.1:{page.port}\r\n", f"POST {CHAT} HTTP/1.1\r\n"
    tricks = {
        "GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n": {421},
        f"GET / HTTP/1.1\r\nHost: evil.example:{page.port}\r\n\r\n": {421},
        "GET / HTTP/1.1\r\n\r\n": {400, 421},
        f"GET / HTTP/1.1\r\nHost: evil.example\r\n{here}\r\n": {400, 421},
        f"{chat}{here}Origin: http://evil.example\r\n{post}": {403},
        f"{chat}{here}Origin: null\r\n{post}": {403},
        f"GET / HTTP/1.1\r\n{here}X: {'x' * 200_000}\r\n\r\n": {0, 400, 431},
        f"GET / HTTP/1.1\r\n{here}X: a\x00b\r\n\r\n": {400},
        f"GET / HTTP/1.1\r\n{here}X : a\r\n\r\n": {400},
        f"GET /\rSet-Cookie:x HTTP/1.1\r\n{here}\r\n": {0, 400},
        f"{chat}{here}Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\nGET /x": {400, 411, 413, 422},
        f"{chat}{here}Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n": {400, 501},
        f"{chat}{here}Transfer-Encoding: chunked\r\n\r\nZZ\r\n\r\n": {400},
        f"{chat}{here}Content-Length: 1\r\nContent-Length: 2\r\n\r\n{{}}": {400},
        f"{chat}{here}Content-Length: -1\r\n\r\n": {400},
        f"{chat}{here}Content-Length: {'9' * 5000}\r\n\r\n": {400, 413},
        f"{chat}{here}Upgrade: websocket\r\nConnection: Upgrade\r\n{post}": {400, 404, 422},
        "\x16\x03\x01\x02\x00": {0, 400},
        "GET / HTTP/9.9\r\n\r\n": {0, 400, 421, 505},
    }
    for sent, statuses in tricks.items():
        end = "" if "\r\nConnection" in sent or "\r\n\r\n" not in sent else "Connection: close\r\n"
        sent = sent.replace("\r\n", f"\r\n{end}", 1)
        assert status_of(answer_to(page, sent.encode("latin-1"))) in statuses, sent[:200]
    with page.client() as client:
        for method in ("PUT", "DELETE", "PATCH", "TRACE", "OPTIONS"):
            assert client.request(method, CHAT).status_code == 405
        asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        assert "access-control-allow-origin" not in client.options(CHAT, headers=asked).headers


def test_an_origin_that_is_no_address_is_refused(page):
    assert status_of(request(page, CHAT, "POST", "Origin: http://[\r\nContent-Length: 2\r\n", "{}")) == 403


def test_large_and_broken_bodies_are_refused(page):
    large = json.dumps({"data": ["x" * 10_000_000, None, *PARAMETERS.values()]}).encode()
    with page.client(headers=JSON) as client:
        assert client.post(CHAT, content=large).status_code == 413
        pieces = (large[start : start + 65536] for start in range(0, len(large), 65536))
        with suppress(httpx.TransportError):  # the server need not read what it refuses
            assert client.post(CHAT, content=pieces).status_code in (400, 413)
        deep = '{"data": ' + "[" * 100_000 + "]" * 100_000 + "}"
        for body in ("", "{", "null", "[]", "5", "\ufeff{}", '{"data": {}}', '{"data": "x"}', "[" * 200_000, deep):
            assert client.post(CHAT, content=body).status_code in (400, 422), body[:50]
        number = '{"data": ["a", null, ' + "9" * 5000 + ", 0, 1, 0, 1, null]}"
        assert client.post(CHAT, content=number).status_code in (400, 422)
        assert client.post(CHAT, content=b"\xff\xfe\x00").status_code in (400, 422)
        nested = json.loads("[" * 900 + "]" * 900)
        for body in ({"data": []}, {"data": ["a"]}, {"data": nested}, {"data": ["a", nested, *PARAMETERS.values()]}):
            with pytest.raises(AnsweredWithError):
                list(listen(client, client.post(CHAT, json=body).json()["event_id"]))
        assert client.post(f"{API}/call/nothing", json={"data": []}).status_code == 404


def refusal(page: Served, *asked: Any, **parameters: Any) -> str | None:
    """The sentence with which the API refuses; nothing where it tells none."""
    with pytest.raises(AnsweredWithError) as error:
        page.ask(*asked, **parameters)
    return error.value.args[0]


def turns(number: int, characters: int) -> list[dict[str, str]]:
    roles = ("user", "assistant") * number
    return [{"role": role, "content": f"{place}" + "的" * characters} for place, role in enumerate(roles)]


def test_a_very_long_history_is_answered_without_its_oldest_turns_and_a_longer_one_refused(page, monkeypatch):
    replies, reply = [], page.chat.reply
    monkeypatch.setattr(page.chat, "reply", lambda *asked: replies.append(reply(*asked)) or replies[-1])
    assert page.ask(QUESTION, turns(300, 150))
    assert 0 < replies[0].turns_left_out < 300
    told = refusal(page, QUESTION, turns(300, 600))
    assert re.match(r"The conversation has 36\d,\d{3} characters; the limit is 300,000", told)
    assert re.match("The question has 8,001 characters; the limit is 8,000", refusal(page, "x" * 8001))
    assert page.ask("x" * 8000)


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x1b", "\x7f", "\x85", "\ud800", "\udfff"])
def test_what_is_no_text_is_refused(page, character: str):
    sentence = f"The text contains the control character U+{ord(character):04X}; please remove it."
    assert refusal(page, f"a{character}b") == sentence
    of_user, of_model = turns(1, 1), turns(1, 1)
    of_user[0]["content"] += character
    of_model[1]["content"] += character
    assert refusal(page, QUESTION, of_user) == sentence
    if character in "\ud800\udfff":  # no model writes one
        assert refusal(page, QUESTION, of_model) == sentence
    else:
        assert page.ask(QUESTION, of_model)
    assert page.ask("a\tb\r\nc\u200b\ufeff\U0010ffff")


@pytest.mark.parametrize(
    "history",
    ["x", 5, True, {"a": 1}, [None], [["a", "b"]], [{}], turns(1, 1)[:1], turns(1, 1)[::-1], [{"role": "user"}] * 2]
    + [[{"role": role, "content": 5} for role in ("user", "assistant")], [{"role": [], "content": {}}], [[[[[]]]]]],
)
def test_a_history_that_is_none_is_refused(page, history: Any):
    assert refusal(page, QUESTION, history).startswith("The history must be a list of")


@pytest.mark.parametrize("message", ["", " \n", "\u3000"])
def test_an_empty_question_is_refused(page, message: str):
    assert refusal(page, message) == "Please type a question."


@pytest.mark.parametrize("message", [None, 5, True, ["a"], {"a": 1}])
def test_a_question_that_is_no_text_is_refused_with_a_sentence(page, message: Any):
    assert refusal(page, message)


@pytest.mark.parametrize("name", PARAMETERS)
def test_numbers_out_of_range_are_refused_by_name(page, name: str):
    values = [-1, 1e9, float("nan"), float("inf"), float("-inf"), "abc", True, [], {}, 10**30]
    values += [0] if name in ("max_new_tokens", "top_p", "repetition_penalty") else []
    values += [None] if name != "seed" else []
    for value in values:
        told = refusal(page, QUESTION, **{name: value})
        assert told.startswith(f"Sampling: {name} is "), (value, told)
    assert page.ask(QUESTION, **{name: {"seed": None}.get(name, 1)})


def test_an_answer_that_is_too_long_is_refused(page):
    assert refusal(page, max_new_tokens=2049) == "2049 tokens is too long for an answer; the limit is 2048."


STORES: list[Any] = [None, 5, "x", [], {}, {"conversations": 5}, {"conversations": [{}]}, {"conversations": {"a": "b"}}]
STORES += [{"open": [], "language": {}, "conversations": []}]
STORES += [{"open": "1", "language": "xx", "conversations": [[[[]]]]}]
TURN = {"question": "q", "answers": "abc"}
STORES += [{"open": 1, "conversations": [{"id": 1, "title": {"a": [1]}, "turns": [TURN]}]}]
STORES += [{"open": "a", "conversations": [{"id": "a", "title": "t", "turns": []}] * 3}]
STORES += [
    {
        "open": "a",
        "conversations": [{"id": "a", "title": "\ud800", "turns": [{"question": "\ud800\x00", "answers": []}]}],
    }
]
STORES += [
    {"open": "a", "conversations": [{"id": "a", "title": "t", "turns": [{"question": "", "answers": []}] * 5000}]}
]


def predict(client: httpx.Client, number: int, data: list) -> httpx.Response:
    body = {"data": data, "fn_index": number, "session_hash": "forger", "event_data": {"index": 0, "value": "x"}}
    return client.post(f"{API}/run/predict", content=json.dumps(body), headers=JSON)


def test_forged_stores_are_harmless(page):
    handlers = page.page.blocks.fns
    inputs = {number: len(each.inputs) for number, each in handlers.items() if each.fn}
    with page.client(headers={"Connection": "close"}) as client:
        for store in STORES:
            assert predict(client, event_number(page.page, "on_load"), [store]).status_code == 200, store
            for number, count in inputs.items():
                answer = predict(client, number, [store, "x"][:count])
                expected = 404 if handlers[number].queue else 200  # what is queued is not run directly
                assert answer.status_code == expected and not SECRETS.search(answer.content), (number, store)
        for number in (-1, 10_000, 10**30):
            assert predict(client, number, []).status_code == 404


def send(page: Served, client: httpx.Client, name: str, data: list, **event: Any) -> str:
    """Send an event of the page's into the queue; return all its messages as text."""
    session = f"forger{abs(hash((name, str(data), str(event))))}"
    assert post_event(client, session, event_number(page.page, name), data, event_data=event or None).status_code == 200
    messages = [message for message in messages_of(client, session) if message["msg"] != "estimation"]
    assert messages[-1]["msg"] == "close_stream", messages
    return json.dumps(messages)


def test_forged_events_are_harmless(page):
    indices: list[Any] = ["x", [], 99, -5, None, True, 0.5, {"a": 1}, 10**30]
    with page.client() as client:
        for store in STORES:
            assert "process_completed" in send(page, client, "on_send", ["", store, *SETTINGS])
        for name in ("on_retry", "on_edit", "on_example"):
            for index in indices:
                event = {"index": index, "value": "x", "previous_value": "y"}
                assert "process_completed" in send(page, client, name, [STORES[-3], *SETTINGS], **event)
            assert "process_completed" in send(page, client, name, [None, *SETTINGS])
        for text, name in (("\x00", "U+0000"), ("a\ud800", "U+D800")):
            assert name in send(page, client, "on_send", [text, None, *SETTINGS])
        told = send(page, client, "on_send", ["x" * 400_000, None, *SETTINGS])
        assert "The question has 400,000 characters; the limit is 8,000." in told


@pytest.mark.parametrize("place", ["title", "id"])
def test_a_lone_surrogate_in_a_store_or_a_title_is_made_harmless(page, place: str):
    store = {"open": "a", "conversations": [{"id": "a", "title": "t", "turns": []}]}
    data = [store, "\ud800"] if place == "title" else [{"conversations": [{"id": "\ud800", "title": "t", "turns": []}]}]
    handlers = [each for each in page.page.blocks.fns.values() if len(each.inputs) == len(data)]
    renaming = [each._id for each in handlers if (page.page.title._id, "submit") in each.targets]
    number = renaming[0] if place == "title" else event_number(page.page, "on_load")
    with page.client() as client:
        assert predict(client, number, data).status_code == 200
