"""Where things are in the project, and the shapes that tests go over."""

from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
SAMPLE = PROJECT / "data_proj" / "sample"
TINY_SHAPES = ["bloom-tiny", "bloom-tiny-6-heads", "falcon-tiny", "falcon-tiny-40b", "falcon-tiny-rw"]
# Where a case takes seconds: of the shapes, ALiBi and grouped queries with RoPE always, the others with --all.
SLOW_SHAPES = [
    shape if shape in ("bloom-tiny", "falcon-tiny-40b") else pytest.param(shape, marks=pytest.mark.slow)
    for shape in TINY_SHAPES
]
