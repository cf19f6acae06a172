"""Conversions between conversations, replies and requests and Gradio's form of them; plain functions."""

import html
import re
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import gradio as gr
from gradio.context import LocalContext

from sft.chat.sampling import Sampling
from sft.web import history
from sft.web.answering import Messages, Progress
from sft.web.history import Conversation
from sft.web.markdown import as_markdown, escape
from sft.web.texts import RefusedError, say
from sft.web.visitors import Visitor

Updates = dict[gr.blocks.Block, dict[str, Any]]


def merged(*all_updates: Updates) -> Updates:
    """Return the union of updates, property by property; later ones win."""
    union: Updates = {}
    for updates in all_updates:
        for component, properties in updates.items():
            union[component] = {**union.get(component, {}), **properties}
    return union


def as_updates(updates: Updates) -> dict[gr.blocks.Block, Any]:
    """Return updates as Gradio takes them from a handler."""
    return {component: gr.update(**properties) for component, properties in updates.items()}


def as_message(role: str, text: str) -> dict[str, Any]:
    """Return a chatbot's message that shows every character of a text; as a part, for Gradio strips plain strings."""
    return {"role": role, "content": [{"type": "text", "text": as_markdown(text)}]}


def as_messages(conversation: Conversation | None, checkpoint: int) -> list[dict[str, Any]]:
    """Return the messages of a conversation with one checkpoint."""
    shown = []
    for turn in conversation["turns"] if conversation else []:
        shown.append(as_message("user", turn["question"]))
        if turn["answers"]:
            shown.append(
                as_message("assistant", turn["answers"][checkpoint] if checkpoint < len(turn["answers"]) else "")
            )
    return shown


def turn_at(conversation: Conversation | None, index: int | Sequence[int]) -> int:
    """Return the number of the turn to which message `index` of a chatbot belongs; -1 if there is none."""
    index = index if isinstance(index, int) else index[0]
    owners = [
        number
        for number, turn in enumerate(conversation["turns"] if conversation else [])
        for _ in range(1 + bool(turn["answers"]))
    ]
    return owners[index] if 0 <= index < len(owners) else -1


def export_link(conversation: Conversation, language: str) -> str:
    """Return a link that contains a conversation as a file, so that the server writes none."""
    content = b64encode(history.export(conversation).encode()).decode()
    name = re.sub(r"[^\w-]+", "_", conversation["title"]).strip("_") or "conversation"
    label = html.escape(say(language, "export"))
    return f'<a download="{name}.json" href="data:application/json;base64,{content}">{label}</a>'


def footer(labels: Sequence[str], progress: Progress, language: str, stopped: bool = False) -> str:
    """Return the line below the answers of labelled checkpoints: what was left out, how fast, why they ended."""
    lines = []
    for label, answer, reply in zip(labels, progress.answers, progress.replies, strict=False):
        parts = [escape(label)]
        if reply.turns_left_out:
            parts.append(say(language, "left_out", turns=reply.turns_left_out))
        if reply.tokens_left_out:
            parts.append(say(language, "cut", tokens=reply.tokens_left_out))
        if tokens := reply.num_tokens:
            parts.append(say(language, "speed", tokens=tokens, speed=tokens / reply.seconds))
        if stopped and reply.finish_reason == "cancelled":
            parts.append(say(language, "cancelled"))
        elif progress.finished:
            parts += [say(language, "length")] * (reply.finish_reason == "length")
            parts += [say(language, "nothing")] * (not answer)
        lines.append(" · ".join(parts))
    return "  \n".join(lines) or say(language, "reading")


def visitor_of(request: gr.Request) -> Visitor:
    """Return who sent a request: the login name, or else the address."""
    address = request.client.host if request.client else ""
    return Visitor(request.session_hash or "", request.username or address, LocalContext.event_id.get() or "")


def as_history(history: object) -> Messages:
    """Return an API caller's history; raise RefusedError if it is not a list of alternating turns."""
    try:
        messages = [{"role": str(turn["role"]), "content": turn["content"]} for turn in history or []]
        roles = [message["role"] for message in messages]
        if roles == ["user", "assistant"] * (len(roles) // 2) and all(isinstance(m["content"], str) for m in messages):
            return messages
    except (TypeError, KeyError):
        pass
    raise RefusedError("bad_history")


def as_sampling(numbers: dict[str, float | str]) -> Sampling:
    """Return the sampling of a page's settings; an empty seed is None.

    Raises RefusedError if the seed is not a whole number.
    """
    seed = str(numbers["seed"] or "").strip()
    if seed and not (seed.isascii() and seed.isdigit()):
        raise RefusedError("bad_number", problem=f"seed is {seed!r}; expected a whole number")
    return Sampling(**{**numbers, "seed": int(seed) if seed else None})
