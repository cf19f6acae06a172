"""A model behind a server with OpenAI's protocol: llama.cpp's, vLLM, Ollama, `transformers serve` and others.

The server generates, and batches whatever is asked at the same time; prompts, where a reply ends and what is shown are
the same as for a model in this process.
"""

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from sft.chat.reply import Reply
from sft.chat.sampling import GREEDY, Sampling
from sft.program import UserError, one_line
from sft.prompts import STOP_MARKERS, build_chat_prompt

KEY_VARIABLE = "CHAT_SERVER_KEY"
SECONDS_TO_CONNECT = 10.0
SECONDS_BETWEEN_LOOKS = 0.05  # at whether a reply has been cancelled
NOT_FOUND, NOT_UNDERSTOOD = 404, (400, 422)


class ServerError(UserError):
    """What a server says instead of an answer, in one sentence."""


class RemoteModel:
    """A model of a server, by the server's address, which ends in /v1."""

    batches = True  # what is asked at the same time

    def __init__(self, url: str, name: str, uses_template: bool = False):
        """Take a model that is there; `uses_template` leaves the prompt to the server's own chat template."""
        self.url = url
        self.name = name
        self.uses_template = uses_template
        self.knows_more = True  # than OpenAI's own sampling numbers, until it says that it does not

    @classmethod
    def connect(cls, url: str, name: str | None = None, uses_template: bool = False) -> "RemoteModel":
        """Return the model of a name, or the only one of a server; raise UserError if there is none."""
        url = url.rstrip("/")
        try:
            answer = httpx.get(f"{url}/models", headers=key_headers(), timeout=SECONDS_TO_CONNECT)
            names = [each["id"] for each in answer.raise_for_status().json()["data"]]
        except httpx.HTTPStatusError:
            if name is None:
                fault = fault_of(answer.status_code, answer.text)
                raise ServerError(f"{url} does not list its models: {fault}; name one with --model") from None
            names = [name]  # not every server has a list
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            fault = f"{url} does not answer ({one_line(error)})"
            raise ServerError(f"{fault}; expected the address of a server, http://HOST:PORT/v1") from None
        except (ValueError, KeyError, TypeError):
            raise ServerError(f"{url} is no server of models; expected an address, http://HOST:PORT/v1") from None
        if name is None and len(names) == 1:
            name = names[0]
        elif name not in names and f"{name}:latest" not in names:  # as Ollama lists it
            given = f"--model {name} is none" if name else "--model is needed: give one"
            raise UserError(f"{given} of the models of {url}: {', '.join(sorted(names)) or 'it has none'}")
        return cls(url, name, uses_template)

    def __str__(self) -> str:
        return f"{self.name} of {self.url}"

    def reply(self, messages: Sequence[dict[str, str]], sampling: Sampling = GREEDY) -> Reply:
        """Return the reply to a conversation of {"role", "content"} messages, the user's last.

        What does not fit into the model's context is up to the server. Raises ValueError if the roles do not alternate.
        """
        prompt = build_chat_prompt(messages)
        asked = {"messages": list(messages)} if self.uses_template else {"prompt": prompt}
        return ServerReply(self, asked, sampling)

    def stream(self, prompt: str, sampling: Sampling = GREEDY) -> Reply:
        """Return the answer to a prompt as a reply that grows as it is iterated."""
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.uses_template else {"prompt": prompt}
        return ServerReply(self, asked, sampling)

    def answer(self, prompts: Sequence[str], sampling: Sampling = GREEDY) -> list[str]:
        """Return the answers to several prompts, asked at the same time if the server batches them."""
        with ThreadPoolExecutor(len(prompts) if self.batches else 1) as pool:
            return list(pool.map(lambda prompt: "".join(self.stream(prompt, sampling)), prompts))

    def body_of(self, asked: dict[str, Any], sampling: Sampling) -> dict[str, Any]:
        """Return the body of a request to generate what is asked, a prompt or messages."""
        return {
            **asked,
            "model": self.name,
            "stream": True,
            "stream_options": {"include_usage": True},
            "stop": list(STOP_MARKERS),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **({} if sampling.seed is None else {"seed": sampling.seed}),
            **(self.more(sampling) if self.knows_more else {}),
        }

    def ask_for_less(self) -> None:
        """Leave out what OpenAI's protocol lacks from now on, and say so once."""
        if self.knows_more:
            print(f"{self.url} does not know top_k and the repetition penalty, which are left out", file=sys.stderr)
        self.knows_more = False

    def more(self, sampling: Sampling) -> dict[str, Any]:
        """Return what OpenAI's protocol lacks, by the names of llama.cpp and of vLLM."""
        return {
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repeat_penalty": sampling.repetition_penalty,
            "repetition_penalty": sampling.repetition_penalty,
        }


class ServerReply(Reply):
    """A reply that a server generates; closing it closes the request, at which a server stops."""

    def __init__(
        self,
        model: RemoteModel,
        asked: dict[str, Any],
        sampling: Sampling,
        turns_left_out: int = 0,
        tokens_left_out: int = 0,
    ):
        """Prepare the reply to what is asked, the part of a request's body that holds the prompt or the messages."""
        super().__init__(turns_left_out, tokens_left_out)
        self.model = model
        self.asked = asked
        self.sampling = sampling
        self.pieces: list[str] = []
        self.server_reason = ""

    def generate(self) -> None:
        """Read the server's stream until it ends or the reply is cancelled; raise ServerError for what it refuses."""
        try:
            asyncio.run(self._read_until_cancelled())
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise ServerError(f"{self.model.url} does not answer: {one_line(error)}") from None

    async def _read_until_cancelled(self) -> None:
        reading = asyncio.create_task(self._read())
        while not reading.done():
            await asyncio.wait({reading}, timeout=SECONDS_BETWEEN_LOOKS)
            if self._cancelled.is_set():
                reading.cancel()
        if not reading.cancelled():
            reading.result()

    async def _read(self) -> None:
        url = f"{self.model.url}/{'chat/' if self.model.uses_template else ''}completions"
        asks_for_more, body = self.model.knows_more, self.model.body_of(self.asked, self.sampling)
        timeout = httpx.Timeout(SECONDS_TO_CONNECT, read=None)  # a long prompt, or a long line of others
        async with (
            httpx.AsyncClient(timeout=timeout, headers=key_headers()) as client,
            client.stream("POST", url, json=body) as response,
        ):
            if response.is_error:
                await response.aread()
                if response.status_code in NOT_UNDERSTOOD and asks_for_more:
                    self.model.ask_for_less()
                    return await self._read()
                raise self._refusal(response)
            async for line in response.aiter_lines():
                if line.startswith("data:") and (event := line.removeprefix("data:").strip()) != "[DONE]":
                    self.receive(json.loads(event))
        return None

    def receive(self, event: dict[str, Any]) -> None:
        """Hand over what an event of the stream brings."""
        if "error" in event:
            raise ServerError(f"{self.model.url}: {message_of(event)}")
        for choice in event.get("choices", ()):
            self.server_reason = choice.get("finish_reason") or self.server_reason
            piece = choice["text"] if "text" in choice else (choice.get("delta") or {}).get("content")
            if piece:
                self.arrive(piece)
        if usage := event.get("usage"):
            self.arrive(int(usage.get("completion_tokens") or 0))

    def _refusal(self, response: httpx.Response) -> ServerError:
        if response.status_code == NOT_FOUND and not self.model.uses_template:
            return ServerError(f"{self.model.url} completes no prompts; start again with --server_template True")
        return ServerError(f"{self.model.url}: {fault_of(response.status_code, response.text)}")

    def take(self, token: str | int) -> None:
        """Add a piece of text, or take the server's own number of tokens: a piece may hold several, or part of one."""
        if isinstance(token, str):
            self.pieces.append(token)
        else:
            self.num_tokens = token - 1  # it is counted as a piece itself

    def text(self) -> str:
        """Return the pieces so far as one text."""
        return "".join(self.pieces)

    def ended_by_itself(self) -> bool:
        """Tell whether the server says that the model ended the reply."""
        return self.server_reason != "length"


def key_headers() -> dict[str, str]:
    """Return the headers of a request, with the key from the environment if there is one."""
    key = os.environ.get(KEY_VARIABLE, "")
    return {"Authorization": f"Bearer {key}"} if key else {}


def fault_of(status: int, body: str) -> str:
    """Return what a server says of its fault, in one line."""
    hint = f"; set {KEY_VARIABLE} in the environment to its key" if status in (401, 403) else ""
    try:
        return f"{status}, {message_of(json.loads(body))}{hint}"
    except (ValueError, AttributeError):
        return f"{status} {' '.join(body.split())[:200]}{hint}"


def message_of(event: dict[str, Any]) -> str:
    """Return the message of an error that a server sends, which may be a text, or an object that holds it."""
    error = event.get("error") or event.get("detail") or event
    return str(error.get("message", error) if isinstance(error, dict) else error).splitlines()[0]
