"""Makes the figures of the personalisation study, from its images and results.

    python3 -m p3_clip.personalisation.study.figures --pictures outputs/personalisation \
        --output-dir results/figures/p3_personalisation

single.png shows the photos of each drawn concept beside images of it by textual inversion and by
joint Custom Diffusion (or, without both, by the study's last method). place.png, beside.png and
place_ring.png show two concepts in one image: for each method, its first successes and its first
failures, as `measure.py` judges them. harder.png shows the same of the harder sentences, by the
last method that learned all of their concepts.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import cli
from common.data.concepts import DRAWN, PHOTOS, draw_photo
from common.errors import InputError
from common.files import ROOT, make_folder, read_json
from common.grid import labelled_grid
from common.images import read_rgb, write_png
from p3_clip.personalisation.sentences import HARDER, PAIRS
from p3_clip.personalisation.study.sweeps import (
    INVERSION,
    JOINT,
    JOINT_COLLAGE,
    JOINT_CUT_MIX,
    picture_paths,
)

EACH = 5  # images of each kind in a row
WHITE = 255
JOINTS = (JOINT, JOINT_CUT_MIX, JOINT_COLLAGE)
SHORT = {INVERSION: "inversion"} | dict.fromkeys(JOINTS, "Custom")


@dataclasses.dataclass(frozen=True)
class Config:
    """Makes the figures of the personalisation study."""

    pictures: Path = ROOT / "outputs" / "personalisation"
    """Folder of the study's images."""
    results: Path = ROOT / "results" / "p3_personalisation.json"
    """JSON file of the study's results."""
    output_dir: Path = ROOT / "results" / "figures" / "p3_personalisation"
    """Folder for the figures."""


def main(config: Config) -> None:
    """Writes the figures."""
    results = read_json(config.results)
    if not isinstance(results, dict) or not {"images", "methods"} <= results.keys():
        raise InputError(
            f"{config.results} is not a result of p3_clip.personalisation.study.sweeps"
        )
    figures = {"single": single_figure(config.pictures, results)}
    asked = {pair for found in results["methods"].values() for pair in found["pairs"]}
    figures |= {
        pair: pair_figure(config.pictures, pair, results) for pair in PAIRS if pair in asked
    }
    if any(found.get("harder") for found in results["methods"].values()):
        figures["harder"] = harder_figure(config.pictures, results)
    folder = make_folder(config.output_dir)
    for name, figure in figures.items():
        write_png(folder / f"{name}.png", figure)
        print(folder / f"{name}.png")


def single_figure(folder: Path, results: dict[str, Any]) -> Tensor:
    """Returns a figure with one row per drawn concept: its photos, and images by each method shown.

    The methods shown are textual inversion and joint Custom Diffusion (the last of its results), or
    the last method if there is neither.
    """
    methods = results["methods"]
    joint = [method for method in JOINTS if method in methods]
    shown = [method for method in (INVERSION, *joint[-1:]) if method in methods] or list(methods)[
        -1:
    ]
    names = [name for name in DRAWN if all(name in methods[method]["singles"] for method in shown)]
    rows = []
    for name in names:
        learned = [
            [
                read_rgb(path)
                for path in picture_paths(folder, method, name, results["images"])[:EACH]
            ]
            for method in shown
        ]
        side = learned[0][0].shape[-1]
        rows += _filled([draw_photo(name, index, side=side) for index in range(PHOTOS)], side)
        rows += [picture for pictures in learned for picture in _filled(pictures, side)]
    labels = [
        label
        for label in ("photo", *(SHORT.get(method, "learned") for method in shown))
        for _ in range(EACH)
    ]
    return labelled_grid(torch.stack(rows), len(labels), row_labels=names, column_labels=labels)


def pair_figure(folder: Path, pair: str, results: dict[str, Any]) -> Tensor:
    """Returns a figure with one row per method: its first successes and its first failures.

    A success has both concepts in their places.
    """
    shown = {
        method: (method, pair, found["pairs"][pair])
        for method, found in results["methods"].items()
        if pair in found["pairs"]
    }
    return _successes_and_failures(folder, shown, results["images"])


def harder_figure(folder: Path, results: dict[str, Any]) -> Tensor:
    """Returns a figure with one row per harder sentence: its first successes and failures.

    They are those of the last method that learned all concepts of the sentence.
    """
    shown = {}
    for key in HARDER:
        for method, found in results["methods"].items():
            if numbers := found.get("harder", {}).get(key):
                shown[numbers["prompt"]] = (method, key, numbers)
    return _successes_and_failures(folder, shown, results["images"])


def _successes_and_failures(
    folder: Path, shown: Mapping[str, tuple[str, str, dict[str, Any]]], count: int
) -> Tensor:
    """A figure with a row for each label of `shown`: (method, key of the sentence, its numbers)."""
    rows, labels = [], []
    for label, (method, key, numbers) in shown.items():
        bound: Sequence[bool] = numbers["bound_images"]
        paths = picture_paths(folder, method, key, count)
        side = read_rgb(paths[0]).shape[-1]
        for wanted in (True, False):
            chosen = [
                path for path, is_bound in zip(paths, bound, strict=True) if is_bound == wanted
            ][:EACH]
            rows += _filled([read_rgb(path) for path in chosen], side)
        labels.append(f"{label} ({sum(bound)} of {len(bound)})")
    columns = ["in place"] * EACH + ["not"] * EACH
    return labelled_grid(torch.stack(rows), 2 * EACH, row_labels=labels, column_labels=columns)


def _filled(pictures: Sequence[Tensor], side: int) -> list[Tensor]:
    """The images, with white ones appended if they are fewer than EACH."""
    blank = torch.full((3, side, side), WHITE, dtype=torch.uint8)
    return [*pictures, *[blank] * (EACH - len(pictures))]


if __name__ == "__main__":
    cli.run(main, Config)
