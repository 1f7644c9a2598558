"""Draws pairs like fill50k's testing ones, and control pictures with two circles, in the homework's
layout, without any data.

python3 -m scripts.make_circles --output-dir hw2_data/circles
python3 -m scripts.make_circles --output-dir OUT --circles 0 --layouts two three touching cut
"""

import dataclasses
from pathlib import Path

from common import cli
from common.data.examples import circle_scenes
from common.data.layouts import LAYOUT_COUNT, LayoutKind, make_layouts, write_layouts
from common.errors import InputError


@dataclasses.dataclass(frozen=True)
class Config:
    """Draws pairs of circles in the homework's layout."""

    output_dir: Path
    """Gets prompt.json, source/ and target/."""
    circles: int = 25
    """Pairs of one circle, like fill50k's."""
    layouts: tuple[LayoutKind, ...] = ("two_shared", "two")
    """Kinds of layouts with several circles that come after them."""
    count: int = LAYOUT_COUNT
    """Layouts of each kind."""
    seed: int = 2025
    """Seed of the single circles; 0 and 1 are those of the training and of its validation."""


def main(config: Config) -> None:
    """Writes them."""
    if config.circles < 0 or config.count < 1:
        raise InputError("--circles must not be negative, and --count must be at least 1")
    scenes = circle_scenes(config.circles, config.seed)
    scenes += [scene for kind in config.layouts for scene in make_layouts(kind, config.count)]
    if not scenes:
        raise InputError("there is nothing to draw: neither --circles nor --layouts")
    print(f"{len(scenes)} pairs in {write_layouts(config.output_dir, scenes)}")


if __name__ == "__main__":
    cli.run(main, Config)
