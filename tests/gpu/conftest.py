"""Here `device` is the GPU. Where there is none, nothing of this folder is collected; see ../conftest.py."""

import pytest


@pytest.fixture
def device() -> str:
    """Return the device on which a test computes."""
    return "cuda"
