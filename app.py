"""Chat with a checkpoint in the browser.

    python app.py --checkpoint output_dir/demo [--compare bigscience/bloom-560m] [--quantize int8] [--port 7860]

It answers on this machine alone (127.0.0.1). To answer others, it asks for a name and a password:

    echo me:secret > names && python app.py --checkpoint output_dir/demo --listen --auth names
"""

import argparse
import os
import sys
from pathlib import Path

from sft.program import ArgumentParser, UserError, run_program

AUTH_VARIABLE = "CHAT_AUTH"


def parse_arguments() -> argparse.Namespace:
    """Read the command line; raise UserError where it asks for what is not done."""
    parser = ArgumentParser(description="Chat with a checkpoint in the browser.")
    parser.add_argument("--checkpoint", required=True, help="a model folder, a LoRA adapter's folder or a hub id")
    parser.add_argument("--compare", help="another one, whose answers stand beside")
    parser.add_argument("--port", type=int, default=7860, help="default 7860")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, mps, xpu")
    parser.add_argument("--quantize", default="none", choices=("none", "int8"), help="int8: faster on a CPU")
    parser.add_argument("--listen", action="store_true", help="answer other machines too; needs --auth")
    parser.add_argument("--share", action="store_true", help="answer at a public gradio.live address; needs --auth")
    parser.add_argument(
        "--auth",
        metavar="FILE",
        help=f"a file with lines user:password; or user:password itself, or {AUTH_VARIABLE} in the environment",
    )
    parser.add_argument("--max_waiting", type=int, default=20, help="questions in line, the one answered among them")
    parser.add_argument("--requests_per_minute", type=int, default=60, help="of one user, or address without --auth")
    parser.add_argument("--max_characters", type=int, default=8_000, help="of a question")
    parser.add_argument("--max_new_tokens", type=int, default=2_048, help="of an answer")
    arguments = parser.parse_args()
    for name in ("max_waiting", "requests_per_minute", "max_characters", "max_new_tokens", "port"):
        most = 65535 if name == "port" else 2048 if name == "max_new_tokens" else 1_000_000
        if not 1 <= getattr(arguments, name) <= most:
            raise UserError(f"--{name} {getattr(arguments, name)} is out of range; expected 1 to {most}")
    return arguments


def hide_password(auth: str | None) -> None:
    """Start anew with a password from the command line in the environment, which other users cannot read.

    The process list shows command lines to everybody. Nothing is imported yet, so it is there for milliseconds.
    """
    if auth is None or ":" not in auth or Path(auth).exists():
        return
    words = [word for word in sys.argv if not word.endswith(f"={auth}")]
    if auth in words:  # behind its flag
        place = words.index(auth)
        del words[place - 1 : place + 1]
    environment = {**os.environ, AUTH_VARIABLE: auth}
    os.execve(sys.executable, [sys.executable, *words], environment)


def read_names(auth: str | None) -> list[tuple[str, str]]:
    """Return the names and passwords of a file, or of the environment; none if neither is given.

    Raises UserError if there is no such file, or a line is no user:password.
    """
    if auth is not None and not Path(auth).is_file():
        raise UserError(f"--auth {auth}: no such file; expected a file with lines user:password")
    text = Path(auth).read_text(encoding="utf-8") if auth is not None else os.environ.get(AUTH_VARIABLE, "")
    source = f"--auth {auth}" if auth is not None else AUTH_VARIABLE
    pairs = [tuple(line.strip().split(":", 1)) for line in text.splitlines() if line.strip()]
    if auth is not None and not pairs:
        raise UserError(f"{source} is empty; expected lines user:password")
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise UserError(f"{source} has a line that is no user:password; expected a name, a colon and a password")
    return pairs


def main() -> None:
    """Load the checkpoints and serve the page until interrupted."""
    arguments = parse_arguments()
    hide_password(arguments.auth)
    names = read_names(arguments.auth)
    if (arguments.listen or arguments.share) and not names:
        flag = "--listen" if arguments.listen else "--share"
        raise UserError(
            f"{flag} would let anybody in; give --auth FILE with lines user:password, or {AUTH_VARIABLE}=user:password "
            "in the environment"
        )
    # Only now what takes seconds to import, so that a mistake is told at once.
    from sft.web.server import serve

    serve(arguments, names)


if __name__ == "__main__":
    run_program(main)
