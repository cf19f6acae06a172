"""A mistake is reported before the libraries that it does not need are imported."""

import socket
from collections.abc import Callable

import pytest

SERVE = """
import sys
from argparse import Namespace
from sft.program import UserError
from sft.web.server import serve
try:
    serve(Namespace(listen=False, port={port}, server=None, checkpoint="nowhere", compare=None), [])
except UserError as error:
    print(error)
print(sorted({{"torch", "gradio"}} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("is_taken", "problem", "most"), [(True, "cannot be used", set()), (False, "nowhere is", set())]
)
def test_a_mistake_does_not_wait_for_imports(run: Callable, is_taken: bool, problem: str, most: set[str]):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not is_taken:
            server.close()
        said, imported = run("-c", SERVE.format(port=port)).stdout.splitlines()
    assert problem in said and set(eval(imported)) <= most
