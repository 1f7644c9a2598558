"""Control images: reading, resizing, and the seed of the image drawn from one."""

import sys
import zlib
from pathlib import Path

from torch import Tensor

from common.errors import InputError
from common.images import read_rgb, resize
from common.seeds import derive_seed

FAINTEST_LINE = 32  # grey levels between an outline and its ground


def read_hint(path: Path) -> Tensor:
    """Reads a control image as uint8 [3, S, S]; transparent pixels become black.

    An image of one colour, which can hold no outline, gets a warning on stderr. Raises InputError
    if the file is missing or not a square image.
    """
    hint = read_rgb(path, ground="black")
    if hint.shape[1] != hint.shape[2]:
        raise InputError(
            f"the control image {path} has {hint.shape[2]}x{hint.shape[1]} pixels,"
            " but must be square"
        )
    if int(hint.max()) - int(hint.min()) < FAINTEST_LINE:
        print(f"warning: the control image {path} has one colour and no outline", file=sys.stderr)
    return hint


def resize_hint(hint: Tensor, side: int) -> Tensor:
    """Resizes a control image uint8 [3, S, S] to uint8 [3, side, side].

    A smaller size is averaged over areas, which keeps a thin line in its place; a larger one is
    interpolated bilinearly.
    """
    return resize(hint, side, "area" if side < hint.shape[-1] else "bilinear", antialias=False)


def image_seed(name: str, seed: int) -> int:
    """The seed of one image, derived from the run's seed and the image's file name.

    A leading "target/", which is fill50k's folder, does not change the seed.
    """
    return derive_seed(seed, zlib.crc32(name.removeprefix("target/").encode()))
