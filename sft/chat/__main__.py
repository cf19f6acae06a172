"""Chat with a checkpoint in the terminal, or ask it for what it was taught.

python -m sft.chat output_dir/demo                                  # talk to it
python -m sft.chat output_dir/demo --quantize q8_0                  # faster on a CPU
python -m sft.chat http://127.0.0.1:8000/v1                         # a model of a server
python -m sft.chat output_dir/demo --recall output_dir/demo_data    # does it give the answers it was trained on?
"""

from __future__ import annotations

import argparse
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING

from sft.chat.load import QUANTIZATIONS, load_chat
from sft.chat.sampling import BOUNDS, Sampling
from sft.program import ArgumentParser, UserError, run_program

if TYPE_CHECKING:
    from sft.chat.model import ChatModel
    from sft.chat.remote import RemoteModel
    from sft.chat.reply import Reply


def recall(chat: ChatModel | RemoteModel, data: str, number: int) -> tuple[int, int]:
    """Ask the first row of each of `number` shards, stream the answers, and return how many match and were asked.

    An answer matches if it equals the row's output to the character and the model ended it itself.
    """
    from sft.data.files import find_shards
    from sft.data.formats import read_samples

    num_right, shards = 0, list(islice(find_shards(data), number))
    for shard in shards:
        row = next(read_samples(shard))
        print(f"\n问 | {row.instruction.strip()}" + (f"\n   | {row.input}" if row.input else ""))
        print("答 | ", end="", flush=True)
        reply = chat.stream(row.prompt)
        answer = show(reply)
        if reply.finish_reason == "cancelled":
            raise KeyboardInterrupt
        right = answer == row.output and reply.finish_reason == "eos"
        num_right += right
        judgement = "the trained answer, ended by itself" if right else f"NOT the trained answer: {row.output!r}"
        print(f"\n   | {judgement}")
    return num_right, len(shards)


def show(reply: Reply) -> str:
    """Print a reply as it grows and return its text; Ctrl-C ends it."""
    pieces = []
    try:
        with closing(iter(reply)) as growing:
            for piece in growing:
                pieces.append(piece)
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    return "".join(pieces)


def talk(chat: ChatModel | RemoteModel, sampling: Sampling) -> None:
    """Hold a conversation in the terminal until an empty line or the end of input; Ctrl-C ends a reply."""
    messages: list[dict[str, str]] = []
    while question := _ask():
        reply = chat.reply([*messages, {"role": "user", "content": question}], sampling)
        if notice := left_out(reply):
            print(f"({notice})")
        answer = show(reply)
        print(f"\n({footer(reply)})")
        if answer:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def left_out(reply: Reply) -> str:
    """Say which part of the conversation the model has not read; empty if it has read everything."""
    turns = f"the oldest {reply.turns_left_out} turns" if reply.turns_left_out else ""
    tokens = f"the first {reply.tokens_left_out} tokens of the question" if reply.tokens_left_out else ""
    return f"left out because they do not fit: {' and '.join(filter(None, (turns, tokens)))}" if turns or tokens else ""


def footer(reply: Reply) -> str:
    """Say how long a reply is, how fast it came, and why it ended, unless the model ended it."""
    why = {"length": "; cut at the token limit", "cancelled": "; stopped"}.get(reply.finish_reason, "")
    num_tokens = reply.num_tokens
    return f"{num_tokens} tokens, {num_tokens / max(reply.seconds, 1e-3):.1f} tokens/s{why}"


def _ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def main() -> None:
    """Talk to a checkpoint, or check how much it recalls of its training data."""
    arguments, sampling = parse_arguments()
    chat = load_chat(arguments.checkpoint, arguments.device, arguments.quantize, arguments.model)
    if not arguments.recall:
        talk(chat, sampling)
        return
    num_right, num_asked = recall(chat, arguments.recall, arguments.rows)
    print(f"\n{num_right} of {num_asked} answers are the trained ones")
    if num_right < num_asked:
        raise UserError(f"{arguments.checkpoint} has not learnt the rows of {arguments.recall}; train it longer")


def parse_arguments() -> tuple[argparse.Namespace, Sampling]:
    """Read the command line; raise UserError for a flag or a number that is out of range."""
    parser = ArgumentParser(
        "python -m sft.chat", description="Talk to a checkpoint in the terminal; an empty line ends the chat."
    )
    parser.add_argument("checkpoint", help="a model folder, a LoRA adapter's folder, a hub id or a server's URL")
    parser.add_argument("--model", help="which model of the server, if it has several")
    parser.add_argument("--recall", metavar="DATA", help="do not chat: ask questions from these rows, and compare")
    parser.add_argument("--rows", type=int, default=3, help="how many rows to ask, the first of each file (default 3)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps, xpu")
    parser.add_argument(
        "--quantize",
        default="none",
        choices=QUANTIZATIONS,
        help="weights in 8 or 4 bits: faster on a CPU, by llama.cpp",
    )
    for name, (least, most) in BOUNDS.items():
        default = getattr(Sampling, name)
        meaning = f"{least} to {most} (default {'a new one each time' if default is None else default})"
        parser.add_argument(f"--{name}", type=type(least), default=default, help=meaning)
    arguments = parser.parse_args()
    sampling = Sampling(**{name: getattr(arguments, name) for name in BOUNDS})
    try:
        sampling.check()
    except ValueError as error:
        raise UserError(f"--{error}") from None
    return arguments, sampling


if __name__ == "__main__":
    run_program(main)
