"""Control pictures: reading, resizing, and the seed of the picture drawn from one."""

import zlib
from pathlib import Path

from torch import Tensor

from common.errors import InputError
from common.images import read_rgb, resize
from common.seeds import derive_seed


def read_hint(path: Path) -> Tensor:
    """A control image, uint8 [3, S, S]; grey ones are read as RGB. Raises InputError if it is
    missing or not square."""
    hint = read_rgb(path)
    if hint.shape[1] != hint.shape[2]:
        raise InputError(
            f"the control image {path} has {hint.shape[2]}x{hint.shape[1]} pixels, but must be"
            " square"
        )
    return hint


def resize_hint(hint: Tensor, side: int) -> Tensor:
    """uint8 [3, S, S] at another side: averaged over areas, which keeps the place of a thin line,
    or bilinear."""
    return resize(hint, side, "area" if side < hint.shape[-1] else "bilinear", antialias=False)


def image_seed(name: str, seed: int) -> int:
    """The seed of one picture, from the run's seed and the picture's own name, with or without
    fill50k's folder."""
    return derive_seed(seed, zlib.crc32(name.removeprefix("target/").encode()))
