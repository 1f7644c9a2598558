"""Draws the photos of the concepts that have no name in the small model's vocabulary, five of each: OUT/NAME/NN.png.

    python3 scripts/make_concepts.py --output-dir hw2_data/concepts

Photo NN of a concept depends on the seed, the side, the concept and NN alone.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs in a checkout that is not installed

from common import cli
from common.data.concepts import DRAWN, PHOTOS, SIDE, draw_photo
from common.errors import InputError
from common.files import ROOT, make_folder
from common.images import write_png
from common.seeds import derive_seed


@dataclasses.dataclass(frozen=True)
class Config:
    """Draws the photos of the concepts that have no name in the small model's vocabulary."""

    output_dir: Path = ROOT / "hw2_data" / "concepts"
    """Folder for NAME/NN.png."""
    count: int = PHOTOS
    """Photos of each concept."""
    side: int = SIDE
    """Height and width."""
    seed: int = 0
    """Seed of all photos."""


def main(config: Config) -> None:
    """Writes the photos."""
    if config.count < 1 or config.side < 8:
        raise InputError(f"--count must be at least 1 and --side at least 8, not {config.count} and {config.side}")
    derive_seed(config.seed)  # checks it before the first file
    for name in DRAWN:
        folder = make_folder(config.output_dir / name)
        for index in range(config.count):
            photo = draw_photo(name, index, config.seed, config.side)
            write_png(folder / f"{index:02d}.png", photo, staging=config.output_dir)
    print(f"{config.count} photos each of {', '.join(DRAWN)} in {config.output_dir}")


if __name__ == "__main__":
    cli.run(main, Config)
