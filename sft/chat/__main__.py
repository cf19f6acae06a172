"""Chat with a checkpoint in the terminal, or ask it what it was taught.

python -m sft.chat output_dir/demo                                  # talk to it
python -m sft.chat output_dir/demo --quantize int8                  # faster on a CPU
python -m sft.chat output_dir/demo --recall output_dir/demo_data    # does it give the answers it was taught?
"""

from contextlib import closing
from itertools import islice

from sft.chat.model import QUANTIZATIONS, ChatModel
from sft.chat.reply import BOUNDS, Reply, Sampling
from sft.data.formats import read_samples
from sft.data.shards import find_shards
from sft.program import ArgumentParser, UserError, run_program


def recall(chat: ChatModel, data: str, number: int) -> int:
    """Ask the first row of each of `number` shards, stream the answers, and return how many are the trained ones.

    An answer counts if it equals the row's output to the character and the model ended it by itself.
    """
    num_right = 0
    for shard in islice(find_shards(data), number):
        row = next(read_samples(shard))
        print(f"\n问 | {row.instruction.strip()}" + (f"\n   | {row.input}" if row.input else ""))
        print("答 | ", end="", flush=True)
        reply = chat.stream(row.prompt)
        pieces = []
        for piece in reply:
            pieces.append(piece)
            print(piece, end="", flush=True)
        right = "".join(pieces) == row.output and reply.finish_reason == "eos"
        num_right += right
        print("\n   | " + ("the trained answer, ended by itself" if right else f"NOT the trained one: {row.output!r}"))
    return num_right


def talk(chat: ChatModel, sampling: Sampling) -> None:
    """Hold a conversation in the terminal until an empty line or the end of input; Ctrl-C ends a reply."""
    messages: list[dict[str, str]] = []
    while question := _ask():
        reply = chat.reply([*messages, {"role": "user", "content": question}], sampling)
        if notice := left_out(reply):
            print(f"({notice})")
        pieces = []
        try:
            with closing(iter(reply)) as growing:
                for piece in growing:
                    pieces.append(piece)
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        print(f"\n({footer(reply)})")
        if pieces:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": "".join(pieces)}]


def left_out(reply: Reply) -> str:
    """Say what of the conversation the model has not read; nothing if it has read all."""
    turns = f"the oldest {reply.turns_left_out} turns of the conversation" if reply.turns_left_out else ""
    tokens = f"the first {reply.tokens_left_out} tokens of the question" if reply.tokens_left_out else ""
    return f"{' and '.join(filter(None, (turns, tokens)))} did not fit and were left out" if turns or tokens else ""


def footer(reply: Reply) -> str:
    """Say how long a reply is, how fast it came, and why it ended unless the model ended it."""
    why = {"length": "; cut at the token limit", "cancelled": "; stopped"}.get(reply.finish_reason, "")
    num_tokens = len(reply.token_ids)
    return f"{num_tokens} tokens, {num_tokens / max(reply.seconds, 1e-3):.1f} a second{why}"


def _ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def add_model_arguments(parser: ArgumentParser) -> None:
    """Add the flags that say where and how a checkpoint is loaded."""
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, mps, xpu")
    parser.add_argument(
        "--quantize", default="none", choices=QUANTIZATIONS, help="int8: 8-bit weights, for a fast answer from a CPU"
    )


def main() -> None:
    """Talk to a checkpoint, or check what it recalls of its training rows."""
    parser = ArgumentParser(description="Talk to a checkpoint in the terminal; an empty line ends.")
    parser.add_argument("checkpoint", help="a model folder, a LoRA adapter's folder or a hub id")
    parser.add_argument("--recall", metavar="DATA", help="instead, ask rows of these shards and compare the answers")
    parser.add_argument("--rows", type=int, default=3, help="how many rows to ask, the first of each shard")
    add_model_arguments(parser)
    for name in BOUNDS:
        default = getattr(Sampling, name)
        parser.add_argument(f"--{name}", type=type(default or 0), default=default, help=f"default {default}")
    arguments = parser.parse_args()
    sampling = Sampling(**{name: getattr(arguments, name) for name in BOUNDS})
    try:
        sampling.check()
    except ValueError as error:
        raise UserError(f"--{error}") from None
    chat = ChatModel.load(arguments.checkpoint, arguments.device, quantization=arguments.quantize)
    if not arguments.recall:
        talk(chat, sampling)
        return
    num_right = recall(chat, arguments.recall, arguments.rows)
    print(f"\n{num_right} of {arguments.rows} answers are the trained ones")
    if num_right < arguments.rows:
        raise UserError(
            f"{arguments.checkpoint} has not learnt the rows of {arguments.recall}; train it longer on them"
        )


if __name__ == "__main__":
    run_program(main)
