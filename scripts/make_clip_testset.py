"""Writes the compositional zero-shot test in the course's layout: 50 held-out (colour, shape)
classes x 50 pictures.

    python3 -m scripts.make_clip_testset
    python3 -m scripts.make_clip_testset --output-dir hw2_data/clip_shapes_test --size 64

OUT/val/{class_id}_{image_id}.png and OUT/id2label.json, like hw2_data/clip_zeroshot. The classes
are those of common.data.shapes.held_out_classes, which no training shows; every picture is one
whole shape on a background that differs from it by at least 10 (CIEDE2000). The same seed writes
the same pixels.
"""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import cli
from common.data.shapes import held_out_classes, held_out_scene, render
from common.errors import InputError
from common.files import ROOT, make_folder, write_json
from common.images import write_png
from common.seeds import derive_seed


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes the compositional zero-shot test in the course's layout."""

    output_dir: Path = ROOT / "hw2_data" / "clip_shapes_test"
    """Gets val/ and id2label.json; must not be there yet, or be empty."""
    count: int = 50
    """Pictures of each class."""
    size: int = 64
    """Side of the pictures."""
    seed: int = 0
    """Seed of places, sizes and backgrounds."""


def main(config: Config) -> None:
    """Writes to a temporary folder and renames it at the end: the set is there as a whole or not at
    all."""
    for name in ("count", "size"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name} must be at least 1, not {getattr(config, name)}")
    if config.seed < 0:
        raise InputError(f"--seed must not be negative, not {config.seed}")
    target = config.output_dir
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(
            f"{target} is already there; remove it first, or give another --output-dir"
        )
    classes = held_out_classes()
    staging = make_folder(target.parent) / f".{target.name}.{os.getpid()}.partial"
    try:
        make_folder(staging / "val")
        for c in tqdm(range(len(classes)), unit="class", dynamic_ncols=True):
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
