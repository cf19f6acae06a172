"""Chat with a checkpoint in the browser.

    python app.py --checkpoint output_dir/demo [--compare bigscience/bloom-560m] [--quantize q8_0] [--port 7860]
    python app.py --server http://127.0.0.1:8000/v1        a model of vLLM, llama.cpp's server, Ollama, ...

It answers only on this machine (127.0.0.1). To let others in, give a file of names and passwords:

    echo me:secret > names && python app.py --checkpoint output_dir/demo --listen --auth names
"""

import argparse
import os
from pathlib import Path

from sft.chat.load import QUANTIZATIONS
from sft.program import ArgumentParser, UserError, run_program

AUTH_VARIABLE = "CHAT_AUTH"
NUMBERS = {  # the default, the most, and what it is
    "port": (7860, 65_535, "the port to listen on"),
    "concurrent": (16, 1_000_000, "most questions at once to a server"),
    "max_waiting": (20, 1_000_000, "most questions in the queue, with those being answered"),
    "requests_per_minute": (60, 1_000_000, "most questions a minute from one user, or one address without login"),
    "max_characters": (8_000, 1_000_000, "most characters of a question"),
    "max_new_tokens": (2_048, 2_048, "most tokens of an answer"),
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line; raise UserError for a flag or a number that is out of range."""
    parser = ArgumentParser(description="Chat with a checkpoint in the browser.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="a model folder, a LoRA adapter's folder or a hub id")
    source.add_argument("--server", metavar="URL", help="a server with OpenAI's protocol: http://HOST:PORT/v1")
    parser.add_argument("--compare", help="a second checkpoint, or server; its answers appear beside the first one's")
    parser.add_argument("--model", help="which model of the server, if it has several")
    parser.add_argument(
        "--server_template",
        default="False",
        choices=("True", "False"),
        help="True: the server's own chat template, for servers that complete no prompts (default False)",
    )
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps, xpu")
    parser.add_argument("--quantize", default="none", choices=QUANTIZATIONS, help="faster on a CPU, by llama.cpp")
    parser.add_argument("--listen", action="store_true", help="accept connections from other machines; needs passwords")
    parser.add_argument("--share", action="store_true", help="serve at a public gradio.live address; needs passwords")
    parser.add_argument(
        "--auth",
        metavar="FILE",
        help=f"a file with lines user:password; without it, {AUTH_VARIABLE} in the environment is read",
    )
    for name, (default, _, meaning) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default {default})")
    arguments = parser.parse_args()
    for name, (_, most, _) in NUMBERS.items():
        if not 1 <= getattr(arguments, name) <= most:
            raise UserError(f"--{name} {getattr(arguments, name)} is out of range; expected 1 to {most}")
    return arguments


def read_names(auth: str | None) -> list[tuple[str, str]]:
    """Return the names and passwords in a file, or in the environment; none if neither is given.

    Raises UserError if the file does not exist, a line is not user:password, or `auth` is a password itself: every
    user of the machine can read it in the process list. No message repeats what may be a password.
    """
    if auth is not None and not Path(auth).is_file():
        if ":" in auth:
            raise UserError(
                f"--auth takes a file, not user:password, which others could read in the process list; write the line "
                f"user:password into a file and type --auth FILE, or set {AUTH_VARIABLE}=user:password"
            )
        raise UserError(f"--auth {auth}: no such file; expected a file with lines user:password")
    text = Path(auth).read_text(encoding="utf-8") if auth is not None else os.environ.get(AUTH_VARIABLE, "")
    source = f"--auth {auth}" if auth is not None else AUTH_VARIABLE
    pairs = [tuple(line.strip().split(":", 1)) for line in text.splitlines() if line.strip()]
    if auth is not None and not pairs:
        raise UserError(f"{source} is empty; expected lines user:password")
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise UserError(f"{source} has a line that is not user:password; expected a name, a colon and a password")
    return pairs


def main() -> None:
    """Load the checkpoints and serve the page until interrupted."""
    arguments = parse_arguments()
    names = read_names(arguments.auth)
    if (arguments.listen or arguments.share) and not names:
        flag = "--listen" if arguments.listen else "--share"
        raise UserError(
            f"{flag} would let anyone in; type --auth FILE with lines user:password, or set "
            f"{AUTH_VARIABLE}=user:password in the environment"
        )
    # Imported late, so that mistakes in the flags are reported at once.
    from sft.web.server import serve

    serve(arguments, names)


if __name__ == "__main__":
    run_program(main)
