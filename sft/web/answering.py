"""One question to one or more checkpoints, from its arrival to its last token: checked, queued, streamed."""

from __future__ import annotations

import asyncio
import time
import unicodedata
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sft.chat.remote import ServerError
from sft.chat.reply import Reply
from sft.chat.sampling import Sampling
from sft.web.texts import RefusedError
from sft.web.visitors import Visitor, WaitingLine

if TYPE_CHECKING:
    from sft.chat.model import ChatModel
    from sft.chat.remote import RemoteModel

Messages = list[dict[str, str]]
ALLOWED_CONTROLS = "\t\n\r"
# A page shows an answer this often, in seconds, and for at most a fifth of the time: what it does between two tokens
# of a small model takes longer than the model, and both share Python's lock.
PAUSE, LONGEST_PAUSE, PAUSES_PER_UPDATE = 0.05, 0.5, 4


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_characters: int = 8_000  # of a question
    max_history: int = 300_000  # characters of a conversation before it
    max_new_tokens: int = 2_048


@dataclass
class Progress:
    """How far a request is: how many are `ahead` of it, or its answers so far and the replies they come from."""

    ahead: int = 0
    answers: list[str] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    finished: bool = False


class Answering:
    """Answers visitors with one or more checkpoints, as many visitors at a time as the waiting line lets in."""

    def __init__(
        self,
        chats: Sequence[ChatModel | RemoteModel],
        line: WaitingLine,
        limits: Limits = Limits(),
        is_gone: Callable[..., bool] = lambda *sessions: False,
    ):
        """Take the checkpoints, the queue, and a function that tells whether a visitor has gone."""
        self.chats = list(chats)
        self.line = line
        self.limits = limits
        self.is_gone = is_gone

    async def answer(
        self, visitor: Visitor, conversations: Sequence[Messages], sampling: Sampling
    ) -> AsyncIterator[Progress]:
        """Yield the progress of the answers; conversation i goes to checkpoint i, and there may be fewer of them.

        The last progress is `finished`, unless the visitor has gone. Closing the iterator ends the generation within
        one token. Raises RefusedError before the first progress if a check fails or a limit is reached.
        """
        self.check(conversations, sampling)
        async with self.line.join(visitor) as ticket:
            while ahead := ticket.place:
                yield Progress(ahead)
                await ticket.wait()
                if self.is_gone(visitor.session, visitor.event):
                    return
            yield Progress()
            replies = await self._prepare(conversations, sampling)
            progress = Progress(answers=[""] * len(replies), replies=replies)
            async with aclosing(merge(replies)) as pieces, refusals_of_servers():
                async for arrived in pieces:
                    for number, piece in arrived.items():
                        progress.answers[number] += piece
                    start = time.monotonic()
                    yield replace(progress, answers=list(progress.answers))
                    if self.is_gone(visitor.session, visitor.event):
                        return
                    await asyncio.sleep(pause_after(time.monotonic() - start))
            yield replace(progress, finished=True)

    async def _prepare(self, conversations: Sequence[Messages], sampling: Sampling) -> list[Reply]:
        """Tokenise in a thread: 300,000 characters of history would block the pages of all others for a moment."""
        chats = self.chats[: len(conversations)]
        pairs = [*zip(chats, conversations, strict=True)]
        return await asyncio.to_thread(lambda: [chat.reply(messages, sampling) for chat, messages in pairs])

    def check(self, conversations: Sequence[Messages], sampling: Sampling) -> None:
        """Raise RefusedError if a question, a history or a sampling number is not accepted."""
        self.check_sampling(sampling)
        for messages in conversations:
            *history, question = (message["content"] for message in messages)
            self.check_question(question)
            if not all(isinstance(text, str) for text in history):
                raise RefusedError("no_text")
            if (length := sum(map(len, history))) > self.limits.max_history:
                raise RefusedError("long_history", given=length, most=self.limits.max_history)
            for message in messages[:-1]:
                check_characters(message["content"], is_of_model=message["role"] == "assistant")

    def check_sampling(self, sampling: Sampling) -> None:
        """Raise RefusedError if a sampling number is out of bounds or asks for too long an answer."""
        try:
            sampling.check()
        except ValueError as error:
            raise RefusedError("bad_number", problem=error) from None
        if sampling.max_new_tokens > self.limits.max_new_tokens:
            raise RefusedError("long_answer", given=sampling.max_new_tokens, most=self.limits.max_new_tokens)

    def check_question(self, question: object) -> None:
        """Raise RefusedError if a question is not text, empty, too long, or contains a control character."""
        if not isinstance(question, str):
            raise RefusedError("no_text")
        if not question.strip():
            raise RefusedError("empty")
        if len(question) > self.limits.max_characters:
            raise RefusedError("long_question", given=len(question), most=self.limits.max_characters)
        check_characters(question)


@asynccontextmanager
async def refusals_of_servers() -> AsyncIterator[None]:
    """Raise RefusedError where a server refuses to answer, or is gone."""
    try:
        yield
    except ServerError as error:
        raise RefusedError("server", problem=error) from None


def check_characters(text: str, is_of_model: bool = False) -> None:
    """Raise RefusedError if a text contains a lone surrogate, or a control character that no model wrote."""
    forbidden = ("Cs",) if is_of_model else ("Cc", "Cs")
    for character in text:
        if character not in ALLOWED_CONTROLS and unicodedata.category(character) in forbidden:
            raise RefusedError("bad_character", character=f"U+{ord(character):04X}")


def pause_after(seconds: float) -> float:
    """Return how long to wait after an update that took some seconds; tokens that come meanwhile go into the next."""
    return min(LONGEST_PAUSE, max(PAUSE, PAUSES_PER_UPDATE * seconds))


async def merge(replies: Sequence[Reply]) -> AsyncIterator[dict[int, str]]:
    """Yield {number of the reply: piece} as pieces arrive; closing it ends all replies within one token."""
    loop = asyncio.get_running_loop()
    # One thread per reply waits for its pieces and closes it after the last one.
    executors = [ThreadPoolExecutor(1) for _ in replies]
    iterators = [iter(reply) for reply in replies]

    def next_of(number: int) -> asyncio.Future:
        return loop.run_in_executor(executors[number], next, iterators[number], None)

    waiting = {next_of(number): number for number in range(len(replies))}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            pieces = {waiting.pop(future): future.result() for future in done}
            arrived = {number: piece for number, piece in pieces.items() if piece is not None}
            waiting |= {next_of(number): number for number in arrived}
            if arrived:
                yield arrived
    finally:
        for reply, iterator, executor in zip(replies, iterators, executors, strict=True):
            reply.cancel()
            executor.submit(iterator.close)
            executor.shutdown(wait=False)
