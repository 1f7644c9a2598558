"""Grades faces against reference images as Problem 2's grader does, or against real photos.

    # MSE to the references, on pixels in 0..255; a mean below 20 passes
    python3 -m p2_ddim.evaluate --images OUT --references hw2_data/face/GT
    # a page with every image beside its reference, the worst first
    python3 -m p2_ddim.evaluate --images OUT --references hw2_data/face/GT --html page.html
    # Frechet distance to real photos, and distance to the nearest photo
    python3 -m p2_ddim.evaluate --images OUT --photos hw2_data/face

The exit code is 0 if the mean MSE is below 20 or no references are given, 1 if it is not below 20,
and 2 if the folder cannot be graded.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from common import cli
from common.data.faces import load_faces
from common.errors import InputError
from common.files import check_files, write_json
from common.images import image_files, read_rgb
from common.page import Grade, Measure, Picture, write_grade
from p2_ddim.study.features import SHIPPED, choose_features
from p2_ddim.study.quality import nearest_photo, quality, stack_like

PASS_BELOW = 20.0
AMPLIFIED = 8  # factor of the differences on the page of --html


@dataclasses.dataclass(frozen=True)
class Config:
    """Grades a folder of generated faces."""

    GRADES: ClassVar[bool] = True

    images: Path
    """Folder of the generated faces."""
    references: Path | None = None
    """Folder of the reference images, with the same names and sizes; adds the MSE to them."""
    photos: Path | None = None
    """Folder with photos/, real faces of the same size; adds the Frechet distance to them and the
    distance to the nearest photo."""
    features: Path = SHIPPED
    """Folder of the network whose features the Frechet distance uses; if the folder does not exist,
    the colours on an 8x8 grid are used."""
    result: Path | None = None
    """JSON file to write; none is written if it is not given."""
    html: Path | None = None
    """Page to write, with every image beside its reference; needs --references. None is written if
    it is not given."""


def main(config: Config) -> None:
    """Prints the tables and writes the result; exits with 1 if the mean MSE is not below 20."""
    if not config.references and not config.photos:
        raise InputError("nothing to compare with: give --references, --photos or both")
    if config.html and not config.references:
        raise InputError("--html shows images beside references: give --references too")
    check_files(config.result, config.html)
    images = read_images(config.images)
    result: dict[str, Any] = {"images": len(images)}
    if config.references:
        references = read_images(config.references)
        result |= compare(images, references)
        for name, mse in result["mse"].items():
            print(f"{name:<12} MSE {mse:10.4f}")
    if config.photos:
        train, held_out = load_faces(config.photos, "train"), load_faces(config.photos, "held_out")
        stack = stack_like(images, train)
        features, name = choose_features(config.features)
        result["quality"] = {"features": name, **quality(stack, train, held_out, features)}
        result["nearest_photo"] = nearest_photo(stack, train, held_out)
        for name in ("quality", "nearest_photo"):
            for key, value in result[name].items():
                print(
                    f"{key.replace('_', ' ')}:"
                    f" {value if isinstance(value, str) else format(value, '.3f')}"
                )
    if config.result:
        write_json(config.result, result)
    if config.html:
        write_grade(config.html, page_content(config.images, result, images, references))
    if config.references:
        print(verdict(result))
        if not result["passes"]:
            raise SystemExit(1)


# ----------------------------------------------------------------------------
# What the grader does: the mean squared error to the references.


def read_images(folder: Path) -> dict[str, Tensor]:
    """Reads the images of a folder, uint8 [3, H, W], by file name without suffix.

    Raises InputError if the folder is missing or holds no image, or if two names are equal.
    """
    if not Path(folder).is_dir():
        raise InputError(f"the folder {folder} does not exist")
    paths = image_files(folder, report=True)
    if not paths:
        raise InputError(f"{folder} holds no image")
    seen: dict[str, Path] = {}
    for path in paths:
        if (other := seen.setdefault(path.stem, path)) is not path:
            raise InputError(
                f"{folder} holds several images of one name, {other.name} and {path.name}: keep one"
                " of each"
            )
    return {name: read_rgb(path) for name, path in seen.items()}


def compare(images: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> dict[str, Any]:
    """Mean squared error of each image to its reference, on pixels in 0..255.

    Adds the mean and the sum over images, the largest absolute difference of a pixel, and whether
    the mean is below PASS_BELOW. Raises InputError if counts, names or sizes differ.
    """
    if len(images) != len(references):
        raise InputError(
            f"{len(images)} images cannot be compared with {len(references)} references"
        )
    strange = sorted(images.keys() ^ references.keys())
    if strange:
        raise InputError(f"images and references have different names, such as {strange[0]}")
    mse, largest = {}, 0
    for name, image in images.items():
        reference = references[name]
        if image.shape != reference.shape:
            sizes = [f"{shape[2]}x{shape[1]}" for shape in (image.shape, reference.shape)]
            raise InputError(f"the image {name} has {sizes[0]} pixels, its reference {sizes[1]}")
        difference = image.double() - reference.double()
        mse[name] = difference.square().mean().item()
        largest = max(largest, int(difference.abs().max()))
    mean = sum(mse.values()) / len(mse)
    return {
        "mse": mse,
        "mean_mse": mean,
        "sum_mse": sum(mse.values()),
        "max_difference": largest,
        "passes": mean < PASS_BELOW,
    }


def verdict(result: dict[str, Any]) -> str:
    """PASS or FAIL and the reason."""
    return (
        f"{'PASS' if result['passes'] else 'FAIL'}: mean MSE {result['mean_mse']:.4f} (below"
        f" {PASS_BELOW:g} passes), sum {result['sum_mse']:.4f}, largest difference"
        f" {result['max_difference']}"
    )


def page_content(
    folder: Path,
    result: Mapping[str, Any],
    images: Mapping[str, Tensor],
    references: Mapping[str, Tensor],
) -> Grade:
    """The grade of a folder, with every image, its reference and their amplified difference."""
    pictures = []
    for name, mse in result["mse"].items():
        image, reference = images[name], references[name]
        difference = (image.int() - reference.int()).abs() * AMPLIFIED
        shown = {
            "image": image,
            "reference": reference,
            f"difference x {AMPLIFIED}": difference.clamp(max=255).to(torch.uint8),
        }
        pictures.append(Picture(name, shown, f"MSE {mse:.3f}", mse < PASS_BELOW, mse))
    measures = [
        Measure("mean MSE", f"{result['mean_mse']:.4f}", f"< {PASS_BELOW:g}", result["passes"]),
        Measure("sum of MSE", f"{result['sum_mse']:.4f}"),
        Measure("largest difference of a pixel", f"{result['max_difference']} of 255"),
    ]
    note = "A picture counts as wrong where its own MSE misses the threshold of the mean."
    return Grade("Problem 2: faces", folder, result["passes"], measures, pictures, note=note)


if __name__ == "__main__":
    cli.run(main, Config)
