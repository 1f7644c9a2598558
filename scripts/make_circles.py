"""Draws pairs of control and target images with circles, in the homework's layout.

    python3 -m scripts.make_circles --output-dir hw2_data/circles
    python3 -m scripts.make_circles --output-dir OUT --circles 0 --layouts two three touching cut

By default these are 25 pairs with one circle, like fill50k's testing pairs, and pairs with two
circles. No data is needed.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

from common import cli
from common.config import Pictures, Seed, bounds
from common.data.examples import circle_scenes
from common.data.layouts import LAYOUT_COUNT, LayoutKind, make_layouts, write_layouts
from common.errors import InputError


@dataclasses.dataclass(frozen=True)
class Config:
    """Draws pairs of control and target images with circles, in the homework's layout."""

    output_dir: Path
    """Output folder of prompt.json, source/ and target/."""
    circles: Annotated[int, *bounds(at_least=0, at_most=10**7)] = 25
    """Number of pairs with one circle, like fill50k's."""
    layouts: tuple[LayoutKind, ...] = ("two_shared", "two")
    """Kinds of pairs with several circles, which follow the single circles."""
    count: Pictures = LAYOUT_COUNT
    """Number of pairs of each kind in --layouts."""
    seed: Seed = 2025
    """Seed of the single circles. 0 and 1 are the seeds of training and validation."""


def main(config: Config) -> None:
    """Draws and writes the pairs."""
    scenes = circle_scenes(config.circles, config.seed)
    scenes += [scene for kind in config.layouts for scene in make_layouts(kind, config.count)]
    if not scenes:
        raise InputError("there is nothing to draw: --circles is 0 and --layouts is empty")
    print(f"{len(scenes)} pairs in {write_layouts(config.output_dir, scenes)}")


if __name__ == "__main__":
    cli.run(main, Config)
