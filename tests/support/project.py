"""Where things are in the project, and the shapes that tests go over."""

from pathlib import Path

PROJECT = Path(__file__).parents[2]
SAMPLE = PROJECT / "data_proj" / "sample"
TINY_SHAPES = ["bloom-tiny", "bloom-tiny-6-heads", "falcon-tiny", "falcon-tiny-40b", "falcon-tiny-rw"]
