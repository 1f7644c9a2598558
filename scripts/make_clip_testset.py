"""Writes the compositional zero-shot test: 50 held-out (colour, shape) classes of 50 images each.

    python3 -m scripts.make_clip_testset
    python3 -m scripts.make_clip_testset --output-dir hw2_data/clip_shapes_test --size 64

The files are OUT/val/{class_id}_{image_id}.png and OUT/id2label.json, in the layout of the course's
hw2_data/clip_zeroshot. The classes are those of `common.data.shapes.held_out_classes`, which are
excluded from all trainings. Each image shows one whole shape on a background whose colour differs
from the shape's by at least 10 (CIEDE2000). The pixels depend on the flags alone.
"""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np

from common import cli
from common.config import Pictures, Seed, Side
from common.data.shapes import held_out_classes, held_out_scene, render
from common.errors import InputError
from common.files import ROOT, make_folder, write_json
from common.images import write_png
from common.progress import Progress
from common.seeds import derive_seed


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes the compositional zero-shot test in the course's layout."""

    output_dir: Path = ROOT / "hw2_data" / "clip_shapes_test"
    """Output folder of val/ and id2label.json; must be missing or empty."""
    count: Pictures = 50
    """Number of images of each class."""
    size: Side = 64
    """Height and width of the images in pixels."""
    seed: Seed = 0
    """Seed of positions, sizes and backgrounds."""


def main(config: Config) -> None:
    """Writes the test set to a temporary folder, which is renamed at the end.

    An interrupted run therefore leaves no incomplete set.
    """
    target = config.output_dir
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(
            f"{target} is already there: remove it first, or give another --output-dir"
        )
    classes = held_out_classes()
    staging = make_folder(target.parent) / f".{target.name}.{os.getpid()}.partial"
    try:
        make_folder(staging / "val")
        for c in Progress(range(len(classes)), desc="drawing", unit="classes"):
            for n in range(config.count):
                scene = held_out_scene(c, np.random.default_rng(derive_seed(config.seed, c, n)))
                write_png(staging / "val" / f"{c}_{n:03d}.png", render(scene, config.size))
        write_json(
            staging / "id2label.json",
            {str(c): "_".join(pair).replace(" ", "_") for c, pair in enumerate(classes)},
        )
        if target.exists():
            target.rmdir()
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{len(classes)} classes x {config.count} pictures in {target}")


if __name__ == "__main__":
    cli.run(main, Config)
