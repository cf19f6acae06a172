"""The conversations of one browser: plain data, kept by the browser itself and sent with every request.

A store is {"open": id or None, "language": str or None, "conversations": [conversation, ...]}, newest first. A
conversation is {"id", "title", "turns"}, a turn {"question": str, "answers": [str, ...]} with one answer for each
checkpoint of the page, or none so far. Every function returns a new store.
"""

import json
import secrets
from copy import deepcopy
from typing import Any

from sft.web.texts import DEFAULT_LANGUAGE, LANGUAGES, RefusedError

TITLE_LENGTH = 24  # characters
MAX_CHARACTERS = 300_000  # in all conversations together; browsers keep about 5 million bytes a page
MAX_CONVERSATIONS = 100

Store = dict[str, Any]
Conversation = dict[str, Any]


def blank() -> Store:
    """Return a store without conversations."""
    return {"open": None, "language": None, "conversations": []}


def checked(store: object) -> Store:
    """Return a browser's store if it is valid, else a blank one; what a browser sends may be anything."""
    try:
        conversations = [_checked_conversation(each) for each in store["conversations"]]
        ids = {each["id"] for each in conversations}
        language = store.get("language")
        return {
            "open": store["open"] if store.get("open") in ids else None,
            "language": language if isinstance(language, str) and language in LANGUAGES else None,
            "conversations": conversations if len(ids) == len(conversations) else [],
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return blank()


def _checked_conversation(conversation: Conversation) -> Conversation:
    turns = []
    for turn in conversation["turns"]:
        texts = [turn["question"], *turn["answers"]]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"a turn of {[type(text).__name__ for text in texts]}")
        turns.append({"question": well_formed(texts[0]), "answers": [well_formed(text) for text in texts[1:]]})
    return {
        "id": well_formed(str(conversation["id"])),
        "title": well_formed(str(conversation["title"])),
        "turns": turns,
    }


def well_formed(text: str) -> str:
    """Return a text with its lone surrogates, which cannot be encoded, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def language_of(store: Store) -> str:
    """Return the language that a store's browser has chosen, else the default."""
    return store["language"] or DEFAULT_LANGUAGE


def opened(store: Store) -> Conversation | None:
    """Return the conversation that is open, if one is."""
    return next((each for each in store["conversations"] if each["id"] == store["open"]), None)


def ask(store: Store, question: str, number: int | None = None) -> Store:
    """Add a question to the open conversation, or let it replace turn `number` and all turns after it.

    If no conversation is open, it begins one. Raises RefusedError if there is no room for it.
    """
    store = deepcopy(store)
    conversation = opened(store)
    if conversation is None:
        if len(store["conversations"]) >= MAX_CONVERSATIONS:
            raise RefusedError("list_full")
        title = " ".join(question.split())[:TITLE_LENGTH]
        conversation = {"id": secrets.token_urlsafe(8), "title": title, "turns": []}
        store["conversations"].insert(0, conversation)
        store["open"] = conversation["id"]
    del conversation["turns"][len(conversation["turns"]) if number is None else number :]
    conversation["turns"].append({"question": question, "answers": []})
    if num_characters(store) > MAX_CHARACTERS:
        raise RefusedError("list_full")
    return store


def num_characters(store: Store) -> int:
    """Count the characters of all questions and answers."""
    turns = [turn for each in store["conversations"] for turn in each["turns"]]
    return sum(len(turn["question"]) + sum(map(len, turn["answers"])) for turn in turns)


def answer(store: Store, answers: list[str]) -> Store:
    """Give the last question of the open conversation its answers, unless all are empty."""
    store = deepcopy(store)
    conversation = opened(store)
    if conversation and conversation["turns"] and any(answers):
        conversation["turns"][-1]["answers"] = list(answers)
    return store


def take_back(store: Store, number: int) -> tuple[Store, str]:
    """Remove turn `number` and all after it from the open conversation; return its question too."""
    store = deepcopy(store)
    conversation = opened(store)
    if conversation is None or not 0 <= number < len(conversation["turns"]):
        return store, ""
    question = conversation["turns"][number]["question"]
    del conversation["turns"][number:]
    return store, question


def start_new(store: Store) -> Store:
    """Close the open conversation; the next question begins another."""
    return {**store, "open": None}


def open_one(store: Store, id: str) -> Store:
    """Open the conversation with an id; none if it does not exist."""
    return {**store, "open": id if any(each["id"] == id for each in store["conversations"]) else None}


def rename(store: Store, title: str) -> Store:
    """Give the open conversation a new title; an empty one changes nothing."""
    store = deepcopy(store)
    conversation = opened(store)
    if conversation and (title := " ".join(well_formed(title).split())[: 3 * TITLE_LENGTH]):
        conversation["title"] = title
    return store


def delete(store: Store) -> Store:
    """Remove the open conversation."""
    left = [each for each in store["conversations"] if each["id"] != store["open"]]
    return {**store, "open": None, "conversations": left}


def messages(conversation: Conversation, checkpoint: int) -> list[dict[str, str]]:
    """Return the messages for a checkpoint: the turns that it answered itself, and the last question."""
    messages = []
    for turn in conversation["turns"][:-1]:
        if len(turn["answers"]) > checkpoint:
            messages.append({"role": "user", "content": turn["question"]})
            messages.append({"role": "assistant", "content": turn["answers"][checkpoint]})
    return [*messages, {"role": "user", "content": conversation["turns"][-1]["question"]}]


def export(conversation: Conversation) -> str:
    """Return a conversation as JSON that train_sft.py reads: one row of "messages", with the answered turns only.

    On a page with two checkpoints, the answers are the first one's.
    """
    turns = [turn for turn in conversation["turns"] if turn["answers"] and turn["answers"][0].strip()]
    said = [(role, text) for turn in turns for role, text in zip(ROLES, _first(turn), strict=True)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in said]}] if said else []
    return json.dumps(rows, ensure_ascii=False, indent=1) + "\n"


ROLES = ("user", "assistant")


def _first(turn: dict) -> tuple[str, str]:
    return turn["question"], turn["answers"][0]
