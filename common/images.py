"""Reading, writing and resizing images, and conversion between uint8 and the models' ranges."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

from common.errors import InputError
from common.files import atomic_write

SUFFIXES = (".png", ".jpg", ".jpeg")
_UNREADABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
)


def to_model_range(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [-1, 1]; `to_uint8` is its exact inverse."""
    return torch.div(images, 127.5).sub_(1.0)  # in place: one new tensor, not three


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1], clamped, to uint8 in 0..255, rounded to the nearest."""
    return ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def to_hint(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [0, 1], the range of control images.

    Raises ValueError for any other dtype: floats in this project are in [-1, 1], and no later step
    would notice the wrong range.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"a hint is made from uint8, not from {images.dtype}")
    return images.float() / 255.0


def resize(
    images: Tensor,
    size: int | tuple[int, int],
    mode: Literal["bicubic", "bilinear", "area", "nearest"] = "bicubic",
    *,
    antialias: bool = True,
) -> Tensor:
    """Images [C, H, W] or [N, C, H, W] resized to `size`, a side or (height, width).

    Returns the same tensor if it has that size. uint8 gives uint8, by rounding; floats give floats,
    neither rounded nor clamped. Modes:

    - "bicubic": for photos and generated pictures; agrees with PIL.
    - "bilinear": never overshoots, so it suits colour measurements. Without `antialias` it uses
      only the four nearest pixels.
    - "area": averages whole pixels when shrinking, which preserves the position of thin lines.
    - "nearest": repeats pixels, so no new colour appears.

    `antialias` applies to bicubic and bilinear only.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    if tuple(images.shape[-2:]) == size:
        return images
    smooth = mode in ("bicubic", "bilinear")
    options = {"align_corners": False, "antialias": antialias} if smooth else {}
    batch = images if images.ndim == 4 else images[None]
    scaled = F.interpolate(batch.float(), size, mode=mode, **options)
    if images.dtype == torch.uint8:
        scaled = scaled.round().clamp(0, 255).to(torch.uint8)
    return scaled if images.ndim == 4 else scaled[0]


def image_files(folder: Path) -> list[Path]:
    """Image files of a folder (by SUFFIXES), sorted by name; empty if the folder does not exist."""
    return sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in SUFFIXES)


# ----------------------------------------------------------------------------
# Reading and writing.


@contextlib.contextmanager
def open_image(path: Path, *, label: str = "", listed: bool = True) -> Iterator[Image.Image]:
    """PIL's image of a file, decoded on first use; yields it inside a `with` block.

    `label` precedes the path in the error sentence. `listed` states that the path comes from a
    folder listing, so the file exists: the sentence then says "not an image" where PIL would repeat
    the path. With `listed` off, a missing file has its own sentence, and the reason is always
    PIL's. Raises InputError if the file cannot be read or decoded.
    """
    try:
        with Image.open(path) as image:
            yield image
    except _UNREADABLE as error:
        if isinstance(error, FileNotFoundError) and not listed:
            raise InputError(f"the image {path} does not exist") from None
        unidentified = listed and isinstance(error, UnidentifiedImageError)
        reason = "not an image" if unidentified else error
        raise InputError(f"{label}{path} is not a readable image ({reason})") from None


def read_rgb(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """An image file as uint8 [3, H, W].

    Raises InputError if the file is missing, unreadable or not of `size` (width, height).
    """
    with open_image(path, listed=False) as image:
        if size is not None and image.size != size:
            raise InputError(
                f"{path} has {image.size[0]}x{image.size[1]} pixels, but {size[0]}x{size[1]} are"
                " expected"
            )
        return _from_pil(image)


def read_photo(path: Path) -> Tensor:
    """A photo as uint8 [3, H, W], rotated to upright by its EXIF orientation.

    `read_rgb` does not rotate, since images of a data set are used as stored. Raises InputError if
    the file is unreadable.
    """
    with open_image(path, label="the photo ") as image:
        return _from_pil(ImageOps.exif_transpose(image))


def _from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def to_pil(image: Tensor) -> Image.Image:
    """uint8 [3, H, W] as a PIL image, the input of CLIP's preprocessing."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def write_png(
    path: Path, image: Tensor, staging: Path | None = None, note: tuple[str, str] | None = None
) -> None:
    """Writes uint8 [3, H, W] as an RGB PNG, atomically (`staging`: see `atomic_write`).

    `note` is an optional (name, text) entry of the PNG.
    """
    buffer, info = io.BytesIO(), PngInfo()
    if note:
        info.add_text(*note)
    to_pil(image).save(buffer, "PNG", pnginfo=info if note else None)
    atomic_write(path, buffer.getvalue(), staging)


def read_note(path: Path, name: str) -> str | None:
    """The text entry of that name in a PNG, or None.

    None means that the file has no such entry, is missing, or is not a complete image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image.info.get(name)
    except (OSError, SyntaxError, ValueError):
        return None
